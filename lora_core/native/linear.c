// y = x·Wᵀ + bias for a weight that was brought into panels, whatever the number of rows.
//
// Numbers along the input are taken in groups, of STEPS units of 4 bytes each (`tile_float.h`, `tile_bf16.h`): W [O, I]
// lies as units [O / PANEL, I / GROUP, STEPS, PANEL], so that what a tile reads is one stream, and what one number of a
// group is worth as [O / PANEL, I / GROUP, PANEL] if that is not 1.
#include "functions.h"
#include "scratch.h"
#include <omp.h>
#ifdef FLOAT32
#include "tile_float.h"
#else
#include "tile_bf16.h"
#endif

#define STEPS (GROUP * (int)sizeof(T) / (int)sizeof(Unit))
#define BLOCK_ROWS 96   // rows that are spread at once, and stay in the second-level cache
#define MIN_WORK 100000 // multiplications below which a second thread does not pay

// Of a block, tile by tile: units [I / GROUP, STEPS, tile's rows], and what one is worth, [I / GROUP, tile's rows].
typedef struct {
    Unit *units;
    float *worth;
} Rows;

typedef struct {
    const Unit *units;
    const T *worth; // or null
} Panels;

INLINE int64_t groups(int64_t I) { return (I + GROUP - 1) / GROUP; }

int panel_width(void) { return PANEL; }

int group_size(void) { return GROUP; }

// Where column o's part of group g begins, of G.
INLINE int64_t unit_place(int64_t o, int64_t g, int64_t G) { return (o / PANEL * G + g) * STEPS * PANEL + o % PANEL; }

INLINE int64_t worth_place(int64_t o, int64_t g, int64_t G) { return (o / PANEL * G + g) * PANEL + o % PANEL; }

INLINE int64_t group_length(int64_t I, int64_t g) { return I - g * GROUP < GROUP ? I - g * GROUP : GROUP; }

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
// fetched from `next` on, which are wanted next: reading and computing overlap.
INLINE void tile(int rows, int panels, Rows x, Panels w, const T *bias, T *y, int64_t G, int64_t O, int64_t column,
                 const char *next, int64_t share) {
    vec sums[ROWS][8];
#pragma GCC unroll 12
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
        for (int c = 0; c < 2 * panels; c++)
            sums[r][c] = all(0);
    for (int64_t g = 0; g < G; g++, next += share) {
        for (int64_t line = 0; line < share; line += 64)
            __builtin_prefetch(next + line, 0, 2);
        add_group(rows, panels, sums, x.units + g * STEPS * rows, x.worth + g * rows, w.units + g * STEPS * PANEL,
                  G * STEPS * PANEL, w.worth + g * PANEL, G * PANEL);
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
                                                      int64_t column, const char *next, int64_t share) {               \
        tile(rows, 1, x, w, bias, y, G, O, column, next, share);                                                       \
    }
FOR_ROWS(TILE)
#define CASE(rows)                                                                                                     \
    case rows:                                                                                                         \
        tile_##rows(own, w, bias, y + first * O, G, O, column, next, share);                                           \
        break;

// A block of rows x one panel.
static void panel(int64_t rows, Rows x, Panels w, const T *bias, T *y, int64_t G, int64_t O, int64_t column) {
    Tiling tiling = tiling_of(rows);
    int64_t size, share = STEPS * PANEL * sizeof(Unit) / tiles_of(rows);
    const char *next = (const char *)(w.units + G * STEPS * PANEL); // each tile fetches its share of the next panel
    for (int64_t first = 0; first < rows; first += size, next += G * share) {
        Rows own = {x.units + first * G * STEPS, x.worth + first * G};
        switch (size = tile_rows(tiling, first)) { FOR_ROWS(CASE) }
    }
}

// A block of rows x panels [first, stop) of W.
static void panels(int64_t rows, Rows x, Panels w, const T *bias, T *y, int64_t G, int64_t O, int64_t first,
                   int64_t stop) {
    for (int64_t p = first, taken; p < stop; p += taken) {
        Panels own = {w.units + p * G * STEPS * PANEL, w.worth + p * G * PANEL};
        // Few rows take more panels at once, so that enough sums are under way, and enough is being read.
        taken = rows > 3 || stop - p < 2 ? 1 : rows > 1 || stop - p < 4 ? 2 : 4;
        if (taken == 4)
            tile(1, 4, x, own, bias, y, G, O, p * PANEL, 0, 0);
        else if (taken == 2 && rows == 1)
            tile(1, 2, x, own, bias, y, G, O, p * PANEL, 0, 0);
        else if (taken == 2 && rows == 2)
            tile(2, 2, x, own, bias, y, G, O, p * PANEL, 0, 0);
        else if (taken == 2)
            tile(3, 2, x, own, bias, y, G, O, p * PANEL, 0, 0);
        else
            panel(rows, x, own, bias, y, G, O, p * PANEL);
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
            Unit *own = out.units + (first * G + g * size) * STEPS + r - first;
            out.worth[first * G + g * size + r - first] =
                spread(x + (start + r) * ldx + g * GROUP, group_length(I, g), own, size);
        }
    }
}

// x [M, I] with rows `ldx` apart, bias [O] or null, y [M, O]. Not 0 if there is no memory.
int linear(const T *x, int64_t ldx, const void *w, const T *worth, const T *bias, T *y, int64_t M, int64_t I,
           int64_t O) {
    static __thread Scratch scratch;
    int64_t P = (O + PANEL - 1) / PANEL, G = groups(I);
    Unit *units = room(&scratch, BLOCK_ROWS * G * (STEPS * sizeof(Unit) + sizeof(float)));
    if (!units)
        return 1;
    Rows own = {units, (float *)(units + BLOCK_ROWS * G * STEPS)};
#pragma omp parallel if (M * I * O > MIN_WORK)
    for (int64_t start = 0; start < M; start += BLOCK_ROWS) {
        int64_t rows = M - start < BLOCK_ROWS ? M - start : BLOCK_ROWS, more = start + rows < M;
        int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
        spread_rows(x, ldx, start, rows, I, own);
        panels(rows, own, (Panels){w, worth}, bias, y + start * O, G, O, P * thread / threads,
               P * (thread + 1) / threads);
        if (more) {
#pragma omp barrier
        }
    }
    return 0;
}
