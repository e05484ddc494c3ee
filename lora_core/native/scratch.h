// Memory that a thread keeps from call to call.
#pragma once
#include <stdint.h>
#include <stdlib.h>

typedef struct {
    void *place;
    int64_t size;
} Scratch;

// Room for so many bytes; null if there is no memory.
static inline void *room(Scratch *scratch, int64_t bytes) {
    if (scratch->size < bytes) {
        free(scratch->place);
        scratch->size = (bytes + bytes / 4 + 63) / 64 * 64;
        scratch->place = aligned_alloc(64, scratch->size);
        if (!scratch->place)
            scratch->size = 0;
    }
    return scratch->place;
}
