// y = x·Wᵀ + bias for a weight in 4 bits, of which `tile_int4.h` says how it lies.
#include "functions.h"
#include "tile_int4.h"
#include "tiles.h"

// I is a multiple of GROUP.
int linear_int4(const T *x, int64_t ldx, const void *w, const T *scales, const T *bias, T *y, int64_t M, int64_t I,
                int64_t O, const Adapters *next) {
    static __thread Scratch scratch;
    return multiply(&scratch, x, ldx, w, scales, bias, y, M, I, O, next);
}
