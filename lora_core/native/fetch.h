// What adapters' products read is fetched while the layer's own product is computed: that one waits for multiplications,
// which few rows want of each weight, and those for memory.
#pragma once
#include "functions.h"

#define MAX_LINES 16 // with each group; more would leave the caches before they are wanted

// A thread's share, which it will read itself, if threads divide the work evenly: first of a, then of b.
typedef struct {
    const Adapters *adapters;
    int64_t I, thread, threads;
    int64_t first, stop, seen; // its share of a's rank rows, counted through all layers' adapters; those before `extent`
    int64_t extent, row;       // where the piece after this one is
    const char *place, *end;   // what is left of this one
    int64_t lines;             // to fetch at a time; 0 if nothing is left
} Fetch;

INLINE void set_piece(Fetch *f, const T *first, int64_t size) {
    f->place = (const char *)first;
    f->end = (const char *)(first + size);
}

static void next_piece(Fetch *f) {
    const Plan *plan = f->adapters->plan;
    int64_t K = plan->num_adapters, num_extents = f->adapters->num_layers * K;
    while (f->extent < num_extents) {
        const Extent *own = plan->extents + f->extent;
        int64_t first = f->first > f->seen ? f->first - f->seen : 0;
        int64_t stop = f->stop - f->seen < own->rank ? f->stop - f->seen : own->rank;
        f->seen += own->rank;
        const T *a = f->adapters->layers[f->extent++ / K].a;
        if (first < stop)
            return set_piece(f, a + (own->start + first) * f->I, (stop - first) * f->I);
    }
    for (; f->extent < 2 * num_extents; f->extent++, f->row = 0) {
        const Extent *own = plan->extents + f->extent - num_extents;
        const Layer *layer = f->adapters->layers + (f->extent - num_extents) / K;
        int64_t first = layer->num_columns * f->thread / f->threads;
        if (f->row < own->rank)
            return set_piece(f, layer->b + (own->start + f->row++) * layer->num_columns + first,
                             layer->num_columns * (f->thread + 1) / f->threads - first);
    }
    f->lines = 0;
}

// So that all is fetched after `times` calls of `fetch`; adapters may be null, or have no plan.
INLINE Fetch begin_fetch(const Adapters *adapters, int64_t I, int64_t thread, int64_t threads, int64_t times) {
    Fetch out = {.adapters = adapters, .I = I, .thread = thread, .threads = threads};
    int64_t ranks = 0, numbers = 0;
    if (!adapters || !adapters->plan || !times)
        return out;
    for (int64_t i = 0; i < adapters->num_layers * adapters->plan->num_adapters; i++) {
        int64_t rank = adapters->plan->extents[i].rank;
        ranks += rank;
        numbers += rank * (I + adapters->layers[i / adapters->plan->num_adapters].num_columns);
    }
    out.first = ranks * thread / threads;
    out.stop = ranks * (thread + 1) / threads;
    out.lines = numbers * sizeof(T) / LINE / threads / times + 1;
    out.lines = out.lines < MAX_LINES ? out.lines : MAX_LINES;
    next_piece(&out);
    return out;
}

INLINE void fetch(Fetch *f) {
    const char *place = f->place, *stop = place + f->lines * LINE;
    int is_last = stop >= f->end;
    for (stop = is_last ? f->end : stop; place < stop; place += LINE)
        __builtin_prefetch(place);
    f->place = place;
    if (is_last)
        next_piece(f);
}
