// y = x·Wᵀ + bias for a weight that was brought into panels, whatever the number of rows: what `linear.c` and
// `linear_int4.c` have in common. Each includes a `tile_*.h` first, which says what numbers are multiplied as.
//
// Numbers along the input are taken in groups. Of each, a row of x has X_UNITS units and X_WORTHS floats, which say what
// a unit is worth; W [O, I] lies as units [O / PANEL, I / GROUP, W_UNITS, PANEL], so that what a tile reads is one stream,
// and what they are worth as [O / PANEL, I / GROUP, W_WORTHS, PANEL].
#pragma once
#include "fetch.h"
#include "scratch.h"
#include <omp.h>

#define BLOCK_ROWS 96   // rows that are spread at once, and stay in the second-level cache
#define FEW_ROWS 3      // up to which a tile takes more panels at once
#define MIN_WORK 100000 // multiplications below which a second thread does not pay

// Of a block, tile by tile: units [I / GROUP, X_UNITS, tile's rows], worth [I / GROUP, X_WORTHS, tile's rows].
typedef struct {
    Unit *units;
    float *worth;
} Rows;

typedef struct {
    const Unit *units;
    const T *worth; // null if W_WORTHS is 0
} Panels;

INLINE int64_t groups(int64_t I) { return (I + GROUP - 1) / GROUP; }

INLINE int64_t group_length(int64_t I, int64_t g) { return I - g * GROUP < GROUP ? I - g * GROUP : GROUP; }

// Sums [rows, 2 · panels], and the bias, into y, of which `left` columns are there.
INLINE void finish(int rows, int panels, int is_whole, vec sums[ROWS][8], const T *bias, T *y, int64_t O, int64_t left) {
#pragma GCC unroll 8
    for (int c = 0; c < 2 * panels; c++) {
        int64_t start = c * VL;
        if (!is_whole && left <= start)
            break;
        int n = is_whole || left - start >= VL ? VL : left - start;
        vec b = bias ? load_part(bias + start, n) : all(0);
#pragma GCC unroll 12
        for (int r = 0; r < rows; r++)
            store_part(y + r * O + start, sums[r][c] + b, n);
    }
}

// `rows` rows x `panels` panels of G groups; both are constants where this is called. With each group `share` bytes are
// fetched from `next` on, which are wanted next, and some of what is wanted later: reading and computing overlap.
INLINE void tile(int rows, int panels, Rows x, Panels w, const T *bias, T *y, int64_t G, int64_t O, int64_t column,
                 const char *next, int64_t share, Fetch *later) {
    vec sums[ROWS][8];
#pragma GCC unroll 12
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
        for (int c = 0; c < 2 * panels; c++)
            sums[r][c] = all(0);
    for (int64_t g = 0; g < G; g++, next += share) {
        for (int64_t line = 0; line < share; line += 64)
            __builtin_prefetch(next + line, 0, 2);
        if (later && later->lines)
            fetch(later);
        add_group(rows, panels, sums, x.units + g * X_UNITS * rows, x.worth + g * X_WORTHS * rows,
                  w.units + g * W_UNITS * PANEL, G * W_UNITS * PANEL, w.worth + g * W_WORTHS * PANEL,
                  G * W_WORTHS * PANEL);
    }
    bias = bias ? bias + column : 0;
    if (O - column >= panels * PANEL)
        finish(rows, panels, 1, sums, bias, y + column, O, 0);
    else
        finish(rows, panels, 0, sums, bias, y + column, O, O - column);
}

// Rows of a block as tiles, all as large as each other or one smaller; the larger ones come first.
typedef struct {
    int64_t small, larger_rows; // rows of a small tile; rows in all larger ones
} Tiling;

INLINE int64_t tiles_of(int64_t rows) { return (rows + ROWS - 1) / ROWS; }

INLINE Tiling tiling_of(int64_t rows) {
    int64_t tiles = tiles_of(rows), small = rows / tiles;
    return (Tiling){small, rows % tiles * (small + 1)};
}

INLINE int64_t tile_rows(Tiling tiling, int64_t start) { return tiling.small + (start < tiling.larger_rows); }

// The row that a row's tile begins with.
INLINE int64_t tile_start(Tiling tiling, int64_t r) {
    int64_t larger = tiling.larger_rows;
    return r < larger ? r - r % (tiling.small + 1) : r - (r - larger) % tiling.small;
}

// Each in a function of its own, whose registers gcc gives to nothing else.
#define TILE(rows)                                                                                                     \
    static __attribute__((noinline)) void tile_##rows(Rows x, Panels w, const T *bias, T *y, int64_t G, int64_t O,     \
                                                      int64_t column, const char *next, int64_t share, Fetch *later) { \
        tile(rows, 1, x, w, bias, y, G, O, column, next, share, later);                                                \
    }
FOR_ROWS(TILE)
#define CASE(rows)                                                                                                     \
    case rows:                                                                                                         \
        tile_##rows(own, w, bias, y + first * O, G, O, column, next, share, later);                                    \
        break;

// A block of rows x one panel.
static void panel(int64_t rows, Rows x, Panels w, const T *bias, T *y, int64_t G, int64_t O, int64_t column,
                  Fetch *later) {
    Tiling tiling = tiling_of(rows);
    int64_t size, share = W_UNITS * PANEL * sizeof(Unit) / tiles_of(rows);
    const char *next = (const char *)(w.units + G * W_UNITS * PANEL); // each tile fetches its share of the next panel
    for (int64_t first = 0; first < rows; first += size, next += G * share) {
        Rows own = {x.units + first * G * X_UNITS, x.worth + first * G * X_WORTHS};
        switch (size = tile_rows(tiling, first)) { FOR_ROWS(CASE) }
    }
}

// A block of rows x panels [first, stop) of W.
static void panels(int64_t rows, Rows x, Panels w, const T *bias, T *y, int64_t G, int64_t O, int64_t first,
                   int64_t stop, Fetch *later) {
    for (int64_t p = first, taken; p < stop; p += taken) {
        Panels own = {w.units + p * G * W_UNITS * PANEL, w.worth + p * G * W_WORTHS * PANEL};
        // Few rows take more panels at once, so that enough sums are under way, and enough is being read.
        taken = rows > FEW_ROWS || stop - p < 2 ? 1 : rows > 1 || stop - p < 4 ? 2 : 4;
        if (taken == 4)
            tile(1, 4, x, own, bias, y, G, O, p * PANEL, 0, 0, 0);
        else if (taken == 2 && rows == 1)
            tile(1, 2, x, own, bias, y, G, O, p * PANEL, 0, 0, 0);
        else if (taken == 2 && rows == 2)
            tile(2, 2, x, own, bias, y, G, O, p * PANEL, 0, 0, 0);
        else if (taken == 2)
            tile(3, 2, x, own, bias, y, G, O, p * PANEL, 0, 0, 0);
        else
            panel(rows, x, own, bias, y, G, O, p * PANEL, later);
    }
}

// The rows [start, start + rows) of x; a loop that threads share.
INLINE void spread_rows(const T *x, int64_t ldx, int64_t start, int64_t rows, int64_t I, Rows out) {
    int64_t G = groups(I);
    Tiling tiling = tiling_of(rows);
#pragma omp for schedule(static)
    for (int64_t r = 0; r < rows; r++) {
        int64_t first = tile_start(tiling, r), size = tile_rows(tiling, first);
        for (int64_t g = 0; g < G; g++) {
            int64_t place = first * G + g * size;
            spread_input(x + (start + r) * ldx + g * GROUP, group_length(I, g), out.units + place * X_UNITS + r - first,
                         out.worth + place * X_WORTHS + r - first, size);
        }
    }
}

// x [M, I] with rows `ldx` apart, bias [O] or null, y [M, O]. Not 0 if there is no memory.
INLINE int multiply(Scratch *scratch, const T *x, int64_t ldx, const void *w, const T *worth, const T *bias, T *y,
                    int64_t M, int64_t I, int64_t O, const Adapters *next) {
    int64_t P = (O + PANEL - 1) / PANEL, G = groups(I);
    Unit *units = room(scratch, BLOCK_ROWS * G * (X_UNITS * sizeof(Unit) + X_WORTHS * sizeof(float)));
    if (!units)
        return 1;
    Rows own = {units, (float *)(units + BLOCK_ROWS * G * X_UNITS)};
#pragma omp parallel if (M * I * O > MIN_WORK)
    for (int64_t start = 0; start < M; start += BLOCK_ROWS) {
        int64_t rows = M - start < BLOCK_ROWS ? M - start : BLOCK_ROWS, more = start + rows < M;
        int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
        int64_t first = P * thread / threads, stop = P * (thread + 1) / threads;
        int is_small = M > FEW_ROWS && M <= BLOCK_ROWS; // fewer wait for memory themselves, more hardly at all
        Fetch later = begin_fetch(is_small ? next : 0, I, thread, threads, tiles_of(rows) * G * (stop - first));
        spread_rows(x, ldx, start, rows, I, own);
        panels(rows, own, (Panels){w, worth}, bias, y + start * O, G, O, first, stop, &later);
        if (more) {
#pragma omp barrier
        }
    }
    return 0;
}
