// y = x·Wᵀ + bias for a weight of numbers of type T.
#include "functions.h"
#ifdef FLOAT32
#include "tile_float.h"
#else
#include "tile_bf16.h"
#endif
#include "tiles.h"

int panel_width(void) { return PANEL; }

int group_size(void) { return GROUP; }

// Where column o's part of group g begins, of G.
INLINE int64_t unit_place(int64_t o, int64_t g, int64_t G) { return (o / PANEL * G + g) * W_UNITS * PANEL + o % PANEL; }

INLINE int64_t worth_place(int64_t o, int64_t g, int64_t G) { return (o / PANEL * G + g) * PANEL + o % PANEL; }

// w [O, I] as panels, of which the last one's missing columns are zeros already. Notes which numbers are not multiplied
// as they are, in [O, I].
void pack(const T *w, Unit *units, T *worth, uint8_t *is_rounded, int64_t O, int64_t I) {
    int64_t G = groups(I);
#pragma omp parallel for
    for (int64_t o = 0; o < O; o++)
        for (int64_t g = 0; g < G; g++) {
            int64_t n = group_length(I, g), start = o * I + g * GROUP;
            Unit *own = units + unit_place(o, g, G);
            T back[GROUP];
            float one = spread(w + start, n, own, PANEL);
            if (worth)
                store_part(worth + worth_place(o, g, G), all(one), 1);
            unspread(own, PANEL, one, n, back);
            for (int64_t k = 0; k < n; k++)
                is_rounded[start + k] = back[k] != w[start + k];
        }
}

// Rows [first, stop) of W as they are multiplied, to out [stop - first, I].
void unpack(const Unit *units, const T *worth, T *out, int64_t first, int64_t stop, int64_t I) {
    int64_t G = groups(I);
    for (int64_t o = first; o < stop; o++)
        for (int64_t g = 0; g < G; g++) {
            float one = worth ? get(worth + worth_place(o, g, G)) : 1;
            unspread(units + unit_place(o, g, G), PANEL, one, group_length(I, g), out + (o - first) * I + g * GROUP);
        }
}

int linear(const T *x, int64_t ldx, const void *w, const T *worth, const T *bias, T *y, int64_t M, int64_t I,
           int64_t O, const Adapters *next) {
    static __thread Scratch scratch;
    return multiply(&scratch, x, ldx, w, worth, bias, y, M, I, O, next);
}
