// What adapters add to the outputs of layers with one input (`lora_core.ops.native` says which; `apply_lora` what).
//
// Rows that want the same are a group. Each adapter's numbers are read once, where they lie in the arenas, for all rows
// that want it; no row reads another's. Between the two products a row has ΣR floats for each layer.
#include "dots.h"
#include "functions.h"
#include "product.h"
#include "scratch.h"
#include <omp.h>

#define CHUNK_ROWS 64  // rows that one thread takes at a time, at most
#define RANK_BLOCK 8   // rank rows, likewise
#define MAX_STRIP 384  // and at most so many columns, a multiple of PANEL
#define MIN_WORK 50000 // multiplications below which a second thread does not pay
#define LINE_COLUMNS 32 // that a line of memory has at most, whole panels
#define MANY_ROWS 16   // of a group, from which its numbers are brought together first
#define MAX_RANKS 64   // that are brought together at a time
#define TILE (MAX_TILE < 6 ? MAX_TILE : 6) // rows that expand together

// Where what a layer's shrink product gives lies: a group's floats, how many a row has, each entry's place among them.
typedef struct {
    float **begin;
    int64_t *width, *place;
} Shrunk;

// A tile's rows are a group's, from `first` on in the order of `rows`; its columns are the layer's.
typedef struct {
    const Plan *plan;
    const Layer *layer;
    const Extent *extents; // the layer's
    const Shrunk *shrunk;
    const T *base_bias; // the layer's, or null
    T *y;
    int64_t ldy, group, first;
    int has_gain, has_bias; // the group, from one of its adapters
} Tile;

// Whether one of the group's adapters has gains, or biases.
INLINE int has_any(const Tile *t, int is_gain) {
    if (!(is_gain ? t->layer->gain : t->layer->bias))
        return 0;
    for (int32_t e = t->plan->groups[2 * t->group + 1]; e < t->plan->groups[2 * t->group + 3]; e++) {
        const Extent *own = t->extents + t->plan->entries[e];
        if (is_gain ? own->has_gain : own->has_bias)
            return 1;
    }
    return 0;
}

// The group's weighted sum of gains or biases, columns [column, column + n).
INLINE vec vector_sum(const Tile *t, const T *table, int is_gain, int64_t column, int n) {
    const Plan *plan = t->plan;
    vec out = all(0);
    for (int32_t e = plan->groups[2 * t->group + 1]; e < plan->groups[2 * t->group + 3]; e++) {
        int32_t adapter = plan->entries[e];
        const Extent *own = t->extents + adapter;
        if (is_gain ? own->has_gain : own->has_bias)
            out += plan->weights[e] * load_part(table + plan->slots[adapter] * t->layer->num_columns + column, n);
    }
    return out;
}

// What rows of a tile's group have in common in columns [column, column + size): sums of gains and of biases, as floats.
typedef struct {
    float gain[MAX_STRIP], bias[MAX_STRIP];
} Vectors;

static void add_up(const Tile *t, int64_t column, int64_t size, Vectors *out) {
    for (int64_t c = 0; c < size && (t->has_gain || t->has_bias); c += VL) {
        int n = size - c < VL ? size - c : VL;
        store_float(out->gain + c, t->has_gain ? vector_sum(t, t->layer->gain, 1, column + c, n) : all(0));
        store_float(out->bias + c, t->has_bias ? vector_sum(t, t->layer->bias, 0, column + c, n) : all(0));
    }
}

// y += gain·(y - bias0) + sums + bias for n columns of a row.
INLINE void finish_vector(int has_gain, int has_bias, T *y, const float *sums, const float *gain, const float *bias,
                          const T *bias0, int n) {
    vec old = load_part(y, n), out = old + load_float(sums);
    if (has_bias)
        out += load_float(bias);
    if (has_gain)
        out += load_float(gain) * (bias0 ? old - load_part(bias0, n) : old);
    store_part(y, out, n);
}

INLINE void finish_row(int has_gain, int has_bias, T *y, const float *sums, const Vectors *vectors, const T *bias0,
                       int64_t size) {
    int64_t c = 0;
    for (; c + VL <= size; c += VL)
        finish_vector(has_gain, has_bias, y + c, sums + c, vectors->gain + c, vectors->bias + c, bias0 ? bias0 + c : 0, VL);
    if (c < size)
        finish_vector(has_gain, has_bias, y + c, sums + c, vectors->gain + c, vectors->bias + c, bias0 ? bias0 + c : 0,
                      size - c);
}

// Rows of a tile, columns [column, column + size); sums lie `ld` floats apart.
static void finish(int64_t rows, const Tile *t, int64_t column, int64_t size, const float *sums, int64_t ld,
                   const Vectors *vectors) {
    const T *bias0 = t->base_bias ? t->base_bias + column : 0;
    for (int64_t i = 0; i < rows; i++, sums += ld) {
        T *y = t->y + t->plan->rows[t->first + i] * t->ldy + t->layer->column + column;
        if (t->has_gain)
            finish_row(1, 1, y, sums, vectors, bias0, size);
        else if (t->has_bias)
            finish_row(0, 1, y, sums, vectors, bias0, size);
        else
            finish_row(0, 0, y, sums, vectors, bias0, size);
    }
}

// sums [rows, size] += h [rows, rank] · b [rank, ...]. Eight rank rows are eight streams, read ahead of their use.
INLINE void add_rows(int rows, int64_t rank, const float *h, int64_t ldh, const T *b, int64_t ldb, float *sums,
                     int64_t ld, int64_t size) {
    enum { FEW_ROWS = 2 }; // of which a whole line of b is read at a time: enough sums are under way
    const int parts = rows > FEW_ROWS ? 2 : LINE_COLUMNS / VL;
    int64_t r = 0;
    for (; r < rank; r += rank - r >= RANK_BLOCK ? RANK_BLOCK : 1) {
        const T *own = b + r * ldb;
        int64_t c = 0;
        if (rank - r >= RANK_BLOCK) {
            for (; c + parts * VL <= size; c += parts * VL) {
                if (c * sizeof(T) % LINE == 0)
#pragma GCC unroll 8
                    for (int ahead = RANK_BLOCK; ahead < 2 * RANK_BLOCK; ahead++)
                        __builtin_prefetch(own + ahead * ldb + c);
                product(rows, parts, VL, 1, h + r, ldh, own + c, ldb, RANK_BLOCK, 0, sums + c, ld);
            }
            for (; c < size; c += VL)
                product(rows, 1, size - c < VL ? size - c : VL, 1, h + r, ldh, own + c, ldb, RANK_BLOCK, 0, sums + c, ld);
        } else {
            for (; c < size; c += VL)
                product(rows, 1, size - c < VL ? size - c : VL, 1, h + r, ldh, own + c, ldb, 1, 0, sums + c, ld);
        }
    }
}

#define CASE(rows)                                                                                                     \
    case rows:                                                                                                         \
        add_rows(rows, own->rank, h, width, b, O, sums, MAX_STRIP, stop - column);                                     \
        break;

// A tile's rows x columns [column, stop).
static void expand(int64_t rows, const Tile *t, int64_t column, int64_t stop) {
    const Plan *plan = t->plan;
    int64_t O = t->layer->num_columns, width = t->shrunk->width[t->group];
    float sums[TILE * MAX_STRIP];
    for (int64_t i = 0; i < rows; i++)
        memset(sums + i * MAX_STRIP, 0, (stop - column + VL - 1) / VL * VL * sizeof(float));
    for (int32_t e = plan->groups[2 * t->group + 1]; e < plan->groups[2 * t->group + 3]; e++) {
        const Extent *own = t->extents + plan->entries[e];
        const T *b = t->layer->b + own->start * O + column;
        const float *h = t->shrunk->begin[t->group] + (t->first - plan->groups[2 * t->group]) * width;
        h += t->shrunk->place[e];
        switch (rows) {
            FOR_6_ROWS(CASE)
        }
    }
    Vectors vectors;
    add_up(t, column, stop - column, &vectors);
    finish(rows, t, column, stop - column, sums, MAX_STRIP, &vectors);
}

#undef CASE
#define CASE(rows)                                                                                                     \
    case rows:                                                                                                         \
        product_of(1, rows, 2, VL, 1, own_h, width, wide, LINE_COLUMNS, ranks, 0, out, LINE_COLUMNS);                  \
        break;

// sums [rows, PANEL] += h [rows, ranks] · wide [ranks, PANEL], each with rows LINE_COLUMNS apart.
static void add_panel(int64_t rows, const float *h, int64_t width, const float *wide, int64_t ranks, float *sums) {
    for (int64_t i = 0; i < rows; i += MAX_TILE) {
        const float *own_h = h + i * width;
        float *out = sums + i * LINE_COLUMNS;
        switch (rows - i < MAX_TILE ? rows - i : MAX_TILE) {
            FOR_TILE_ROWS(CASE)
        }
    }
}
#undef CASE

// As `expand`, for so many rows that it pays to bring columns together as floats first. They are as many as lie in a
// line of memory: rows of y are often so far apart that the cache holds few of their lines at once.
static void expand_many(int64_t rows, const Tile *t, int64_t column, int64_t stop) {
    const Plan *plan = t->plan;
    int64_t O = t->layer->num_columns, width = t->shrunk->width[t->group];
    float sums[CHUNK_ROWS * LINE_COLUMNS], wide[MAX_RANKS * LINE_COLUMNS];
    for (int64_t c = column; c < stop; c += LINE_COLUMNS) {
        int64_t size = stop - c < LINE_COLUMNS ? stop - c : LINE_COLUMNS;
        for (int64_t i = 0; i < rows; i++) // while the products are computed
            __builtin_prefetch(t->y + plan->rows[t->first + i] * t->ldy + t->layer->column + c, 1);
        memset(sums, 0, rows * LINE_COLUMNS * sizeof(float));
        for (int32_t e = plan->groups[2 * t->group + 1]; e < plan->groups[2 * t->group + 3]; e++) {
            const Extent *own = t->extents + plan->entries[e];
            const float *h = t->shrunk->begin[t->group] + (t->first - plan->groups[2 * t->group]) * width;
            for (int64_t r = 0; r < own->rank; r += MAX_RANKS) {
                int64_t ranks = own->rank - r < MAX_RANKS ? own->rank - r : MAX_RANKS;
                const T *b = t->layer->b + (own->start + r) * O + c;
                for (int64_t i = 0; i < ranks; i++)
                    for (int64_t j = 0; j < size; j += VL)
                        store_float(wide + i * LINE_COLUMNS + j, load_part(b + i * O + j, size - j < VL ? size - j : VL));
                for (int64_t j = 0; j < size; j += PANEL)
                    add_panel(rows, h + t->shrunk->place[e] + r, width, wide + j, ranks, sums + j);
            }
        }
        Vectors vectors;
        add_up(t, c, size, &vectors);
        finish(rows, t, c, size, sums, LINE_COLUMNS, &vectors);
    }
}

// Columns that are one unit of work: an even number of units, for two threads, if that leaves whole panels.
static int64_t strip_of(int64_t num_columns) {
    int64_t units = 2 * ((num_columns + 2 * MAX_STRIP - 1) / (2 * MAX_STRIP));
    return ((num_columns + units - 1) / units + PANEL - 1) / PANEL * PANEL;
}

typedef struct {
    const Plan *plan;
    const Layer *layers;
    int64_t num_layers, num_blocks, num_ranks; // blocks of rank rows, and rank rows, of all layers' adapters
    const Shrunk *shrunk;
    float *x; // [num_rows, I], in the order of `rows`
    int64_t I;
    const T *base_bias; // [ΣO] or null
    T *y;
    int64_t ldy, chunk_rows;
} Call;

INLINE int64_t blocks_of(const Extent *extent) { return (extent->rank + RANK_BLOCK - 1) / RANK_BLOCK; }

// Threads get as many chunks as each other, if there are more than one.
static int64_t chunks_of(int64_t rows) {
    int64_t chunks = (rows + CHUNK_ROWS - 1) / CHUNK_ROWS, threads = omp_get_max_threads();
    return chunks > 1 ? (chunks + threads - 1) / threads * threads : 1;
}

// A group's rows that are in a chunk: [*first, *stop).
INLINE void rows_in_chunk(const Call *call, int64_t group, int64_t chunk, int64_t *first, int64_t *stop) {
    int64_t start = call->plan->groups[2 * group], end = call->plan->groups[2 * group + 2];
    *first = start < chunk * call->chunk_rows ? chunk * call->chunk_rows : start;
    *stop = end < (chunk + 1) * call->chunk_rows ? end : (chunk + 1) * call->chunk_rows;
}

// One block of rank rows, counted through all layers' adapters, for the rows of a chunk that want it.
static void shrink_block(const Call *call, int64_t block, int64_t chunk) {
    const Plan *plan = call->plan;
    int64_t K = plan->num_adapters, m = 0, k = 0, first, stop;
    const Extent *own = plan->extents;
    for (; block >= blocks_of(own); own = plan->extents + m * K + k) {
        block -= blocks_of(own);
        m += ++k == K;
        k %= K;
    }
    int64_t r = block * RANK_BLOCK, ranks = own->rank - r < RANK_BLOCK ? own->rank - r : RANK_BLOCK;
    const T *a = call->layers[m].a + (own->start + r) * call->I;
    const Shrunk *shrunk = call->shrunk + m;
    for (int64_t g = 0; g < plan->num_groups; g++) {
        rows_in_chunk(call, g, chunk, &first, &stop);
        if (first >= stop)
            continue;
        float *h = shrunk->begin[g] + (first - plan->groups[2 * g]) * shrunk->width[g] + r;
        for (int32_t e = plan->groups[2 * g + 1]; e < plan->groups[2 * g + 3]; e++)
            if (plan->entries[e] == k)
                shrink(stop - first, ranks, call->x + first * call->I, call->I, a, plan->weights[e],
                       h + shrunk->place[e], shrunk->width[g]);
    }
}

// A layer's columns [column, column + strip) for the rows of a chunk.
static void expand_strip(const Call *call, int64_t m, int64_t column, int64_t strip, int64_t chunk) {
    const Plan *plan = call->plan;
    const Layer *layer = call->layers + m;
    int64_t stop = column + strip < layer->num_columns ? column + strip : layer->num_columns, end;
    const T *base_bias = call->base_bias ? call->base_bias + layer->column : 0;
    Tile tile = {.plan = plan, .layer = layer, .extents = plan->extents + m * plan->num_adapters,
                 .shrunk = call->shrunk + m, .base_bias = base_bias, .y = call->y, .ldy = call->ldy};
    for (tile.group = 0; tile.group < plan->num_groups; tile.group++) {
        rows_in_chunk(call, tile.group, chunk, &tile.first, &end);
        tile.has_gain = has_any(&tile, 1);
        tile.has_bias = has_any(&tile, 0);
        if (end - tile.first >= MANY_ROWS) {
            expand_many(end - tile.first, &tile, column, stop);
            continue;
        }
        for (; tile.first < end; tile.first += TILE)
            expand(end - tile.first < TILE ? end - tile.first : TILE, &tile, column, stop);
    }
}

// Lays out what the shrink products give; returns how many floats that is. With `shrunk` null it only counts.
static int64_t lay_out(Call *call, Shrunk *shrunk, float *h) {
    const Plan *plan = call->plan;
    int64_t K = plan->num_adapters, total = 0;
    call->num_blocks = call->num_ranks = 0;
    for (int64_t m = 0; m < call->num_layers; m++) {
        const Extent *extents = plan->extents + m * K;
        for (int64_t k = 0; k < K; k++) {
            call->num_ranks += extents[k].rank;
            call->num_blocks += blocks_of(extents + k);
        }
        for (int64_t g = 0; g < plan->num_groups; g++) {
            int64_t width = 0;
            for (int32_t e = plan->groups[2 * g + 1]; e < plan->groups[2 * g + 3]; e++) {
                if (shrunk)
                    shrunk[m].place[e] = width;
                width += extents[plan->entries[e]].rank;
            }
            if (shrunk) {
                shrunk[m].begin[g] = h + total;
                shrunk[m].width[g] = width;
            }
            total += (plan->groups[2 * g + 2] - plan->groups[2 * g]) * width;
        }
    }
    return total;
}

// x [T, I] and y [T, ΣO] with rows ldx and ldy apart; base_bias [ΣO] or null. Not 0 if there is no memory.
int lora(T *y, int64_t ldy, const T *x, int64_t ldx, int64_t I, const T *base_bias, const Layer *layers,
         int64_t num_layers, const Plan *plan) {
    static __thread Scratch scratch;
    int64_t N = plan->num_rows, chunks = chunks_of(N);
    Call call = {plan, layers, num_layers, 0, 0, 0, 0, I, base_bias, y, ldy, (N + chunks - 1) / chunks};
    int64_t G = plan->num_groups, books = 2 * G + plan->num_entries, num_columns = 0;
    int64_t num_floats = N * I + lay_out(&call, 0, 0);
    int64_t *numbers = room(&scratch, num_layers * books * sizeof(int64_t) + num_floats * sizeof(float));
    if (!numbers)
        return 1;
    Shrunk shrunk[num_layers];
    for (int64_t m = 0; m < num_layers; m++) {
        int64_t *own = numbers + m * books;
        shrunk[m] = (Shrunk){(float **)own, own + G, own + 2 * G};
        num_columns += layers[m].num_columns;
    }
    call.x = (float *)(numbers + num_layers * books);
    call.shrunk = shrunk;
    lay_out(&call, shrunk, call.x + N * I);
#pragma omp parallel if (call.num_ranks * N * (I + num_columns) > MIN_WORK)
    {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < N; i++)
            for (int64_t k = 0; k < I; k++)
                call.x[i * I + k] = get(x + plan->rows[i] * ldx + k);
#pragma omp for schedule(static)
        for (int64_t u = 0; u < call.num_blocks * chunks; u++)
            shrink_block(&call, u % call.num_blocks, u / call.num_blocks);
        for (int64_t m = 0; m < num_layers; m++) {
            int64_t strip = strip_of(layers[m].num_columns);
#pragma omp for schedule(static) collapse(2) nowait
            for (int64_t column = 0; column < layers[m].num_columns; column += strip)
                for (int64_t c = 0; c < chunks; c++)
                    expand_strip(&call, m, column, strip, c);
        }
    }
    return 0;
}
