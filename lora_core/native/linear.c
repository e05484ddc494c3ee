// y = x·Wᵀ + bias for a weight that was brought into panels, whatever the number of rows.
//
// W [O, I] lies as [O / PANEL, I, PANEL]: what a tile reads is one stream. Two columns of a panel are VL apart in
// memory order where T is bfloat16, so that a float's upper half is one and its lower half the other
// (`lora_core/native/__init__.py` packs).
#include "functions.h"
#include "scratch.h"

#define BLOCK_ROWS (8 * MAX_TILE) // rows whose floats stay in the second-level cache
#define MIN_WORK 100000           // multiplications below which a second thread does not pay

int panel_width(void) { return PANEL; }

// One of a panel's rows, `w` as it is packed.
INLINE void load_panel(const T *w, vec *low, vec *high) {
#ifdef FLOAT32
    *low = load(w);
    *high = load(w + VL);
#else
    uvec u;
    memcpy(&u, w, sizeof u);
    *low = (vec)(u << 16);
    *high = (vec)(u & 0xffff0000);
#endif
}

INLINE void clear(int rows, int parts, vec sums[MAX_TILE][8]) {
#pragma GCC unroll 12
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
        for (int c = 0; c < parts; c++)
            sums[r][c] = all(0);
}

// Sums of `rows` rows x `parts` vectors of columns, and the bias, into y.
INLINE void finish(int rows, int parts, vec sums[MAX_TILE][8], const T *bias, T *y, int64_t O, int64_t column) {
    for (int c = 0; c < parts; c++) {
        int64_t start = column + c * VL, left = O - start;
        if (left <= 0)
            break;
        int n = left < VL ? left : VL;
        vec b = bias ? load_part(bias + start, n) : all(0);
#pragma GCC unroll 12
        for (int r = 0; r < rows; r++)
            store_part(y + r * O + start, sums[r][c] + b, n);
    }
}

#define FETCH_LINES 2 // lines of 64 bytes that a tile fetches at once
#define FETCH_BYTES (64 * FETCH_LINES)

// `rows` rows x `panels` panels; both are constants where this is called. x lies as [I, rows]. Meanwhile `num_ahead`
// bytes from `ahead` on are fetched, which are wanted next: reading and computing overlap.
INLINE void tile(int rows, int panels, const float *x, const T *w, const T *bias, T *y, int64_t I,
                 int64_t O, int64_t column, const char *ahead, int64_t num_ahead) {
    vec sums[MAX_TILE][8];
    clear(rows, 2 * panels, sums);
    int64_t fetch_every = num_ahead ? I * FETCH_BYTES / num_ahead : 0, next_fetch = num_ahead ? 0 : I;
    for (int64_t k = 0; k < I; k++) {
        vec low[4], high[4];
        if (k == next_fetch) {
            for (int line = 0; line < FETCH_LINES; line++)
                __builtin_prefetch(ahead + 64 * line, 0, 2);
            ahead += FETCH_BYTES;
            next_fetch += fetch_every;
        }
#pragma GCC unroll 4
        for (int p = 0; p < panels; p++)
            load_panel(w + (p * I + k) * PANEL, &low[p], &high[p]);
#pragma GCC unroll 12
        for (int r = 0; r < rows; r++) {
            vec own = all(x[k * rows + r]);
#pragma GCC unroll 4
            for (int p = 0; p < panels; p++) {
                sums[r][2 * p] += own * low[p];
                sums[r][2 * p + 1] += own * high[p];
            }
        }
    }
    finish(rows, 2 * panels, sums, bias, y, O, column);
}

#define CASE(rows)                                                                                                     \
    case rows:                                                                                                         \
        tile(rows, 1, x, w, bias, y, I, O, column, ahead, num_ahead);                                                  \
        break;

INLINE void tile_of(int rows, const float *x, const T *w, const T *bias, T *y, int64_t I, int64_t O,
                    int64_t column, const char *ahead, int64_t num_ahead) {
    switch (rows) {
        FOR_TILE_ROWS(CASE)
    }
}

// Rows of the tile that begins at row `start`: all tiles of a block are as large as each other, or one smaller.
INLINE int64_t tile_rows(int64_t rows, int64_t start) {
    int64_t tiles = (rows + MAX_TILE - 1) / MAX_TILE, large = rows % tiles;
    return rows / tiles + (start < large * (rows / tiles + 1));
}

// A block of rows x panels [first, stop).
static void panels(int64_t rows, const float *x, const T *w, const T *bias, T *y, int64_t I, int64_t O, int64_t first,
                   int64_t stop) {
    int64_t p = first;
    // Few rows take more panels at once, so that enough sums are under way.
    for (; rows == 1 && p + 4 <= stop; p += 4)
        tile(1, 4, x, w + p * I * PANEL, bias, y, I, O, p * PANEL, 0, 0);
    for (; rows == 2 && p + 2 <= stop; p += 2)
        tile(2, 2, x, w + p * I * PANEL, bias, y, I, O, p * PANEL, 0, 0);
    for (; rows == 3 && p + 2 <= stop; p += 2)
        tile(3, 2, x, w + p * I * PANEL, bias, y, I, O, p * PANEL, 0, 0);
    // Each tile of a panel fetches its share of the next one.
    int64_t tiles = (rows + MAX_TILE - 1) / MAX_TILE, share = I * PANEL * sizeof(T) / tiles;
    for (; p < stop; p++) {
        const char *next = (const char *)(w + (p + 1) * I * PANEL);
        for (int64_t t = 0; t < rows; t += tile_rows(rows, t), next += share)
            tile_of(tile_rows(rows, t), x + t * I, w + p * I * PANEL, bias, y + t * O, I, O, p * PANEL, next, share);
    }
}

// The rows [start, start + rows) of x as floats, tile by tile, [I, tile's rows] each; a loop that threads share.
INLINE void spread_rows(const T *x, int64_t ldx, int64_t start, int64_t rows, int64_t I, float *out) {
#pragma omp for schedule(static)
    for (int64_t r = 0; r < rows; r++) {
        int64_t first = 0;
        while (first + tile_rows(rows, first) <= r)
            first += tile_rows(rows, first);
        int64_t n = tile_rows(rows, first);
        for (int64_t k = 0; k < I; k++)
            out[first * I + k * n + r - first] = get(x + (start + r) * ldx + k);
    }
}

// Panels that one thread takes at a time, of P.
INLINE int64_t panels_at_once(int64_t P) { return P / 32 > 4 ? P / 32 / 4 * 4 : 4; }

// x [M, I] with rows `ldx` apart, bias [O] or null, y [M, O]. Not 0 if there is no memory.
int linear(const T *x, int64_t ldx, const T *w, const T *bias, T *y, int64_t M, int64_t I, int64_t O) {
    static __thread Scratch scratch;
    float *own = room(&scratch, BLOCK_ROWS * I * sizeof(float));
    if (!own)
        return 1;
    int64_t P = (O + PANEL - 1) / PANEL, at_once = panels_at_once(P);
#pragma omp parallel if (M * I * O > MIN_WORK)
    for (int64_t start = 0; start < M; start += BLOCK_ROWS) {
        int64_t rows = M - start < BLOCK_ROWS ? M - start : BLOCK_ROWS;
        spread_rows(x, ldx, start, rows, I, own);
#pragma omp for schedule(dynamic)
        for (int64_t p = 0; p < P; p += at_once)
            panels(rows, own, w, bias, y + start * O, I, O, p, P - p < at_once ? P : p + at_once);
    }
    return 0;
}
