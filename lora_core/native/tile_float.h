// What `linear.c` multiplies by in float32.
#pragma once
#include "vector.h"

typedef float Unit;
#define GROUP 16 // numbers for which a tile fetches ahead at once; nothing else goes by groups here
#define X_UNITS GROUP
#define X_WORTHS 0
#define W_UNITS GROUP
#define W_WORTHS 0
#define ROWS MAX_TILE
#define FOR_ROWS FOR_TILE_ROWS

// n <= GROUP numbers, `ld` apart, filled up with zeros; one is worth 1.
INLINE float spread(const T *x, int64_t n, Unit *out, int64_t ld) {
    for (int64_t k = 0; k < GROUP; k++)
        out[k * ld] = k < n ? x[k] : 0;
    return 1;
}

INLINE void spread_input(const T *x, int64_t n, Unit *out, float *worth, int64_t ld) {
    (void)worth;
    spread(x, n, out, ld);
}

// The n numbers of the units that `spread` made.
INLINE void unspread(const Unit *units, int64_t ld, float worth, int64_t n, T *out) {
    (void)worth;
    for (int64_t k = 0; k < n; k++)
        out[k] = units[k * ld];
}

// sums [rows, 2 · panels] += the products of a group: x [GROUP, rows], w [GROUP, PANEL] in each panel, `ld` apart.
INLINE void add_group(int rows, int panels, vec sums[ROWS][8], const Unit *x, const float *worth_x, const Unit *w,
                      int64_t ld, const T *worth_w, int64_t ld_worth) {
    (void)worth_x, (void)worth_w, (void)ld_worth;
    for (int k = 0; k < GROUP; k++, x += rows, w += PANEL) {
        vec own[8];
#pragma GCC unroll 8
        for (int c = 0; c < 2 * panels; c++)
            own[c] = load(w + c / 2 * ld + c % 2 * VL);
#pragma GCC unroll 12
        for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
            for (int c = 0; c < 2 * panels; c++)
                sums[r][c] += x[r] * own[c];
    }
}
