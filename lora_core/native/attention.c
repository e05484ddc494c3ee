// Attention of new tokens over a cache in blocks: rotation, writing and reading in one call.
//
// A unit of work is a key head and some rows, a row being one query head of one token. Keys are taken in chunks of whole
// blocks, so that a row's sums have one order, whether its token is one of a prompt or decodes. In a block keys lie
// transposed, [dim, block_size]: scores of neighbouring keys are neighbours in a vector. For many rows each block's
// numbers become floats once, in panels.
#include "functions.h"
#include "product.h"
#include <math.h>
#include <stdlib.h>

#define ROWS 30       // of a unit: whole tiles
#define TILE 5        // rows whose sums for two vectors of columns fit the registers
#define MIN_CHUNK 128 // keys
#define MIN_WORK 20000
#define PADDED(n) (((n) + VL - 1) / VL * VL)
#define WHOLE(n) (((n) + PANEL - 1) / PANEL * PANEL)

// x·cos + rotate_half(x)·sin, times a factor; out has dim floats.
INLINE void rotated(const Attention *a, const Step *s, const T *x, int64_t token, float factor, float *out) {
    int64_t half = a->dim / 2;
    const T *cos = s->cos + token * a->dim, *sin = s->sin + token * a->dim;
    for (int64_t i = 0; i < half; i++) {
        float low = get(x + i), high = get(x + half + i);
        out[i] = (low * get(cos + i) - high * get(sin + i)) * factor;
        out[half + i] = (high * get(cos + half + i) + low * get(sin + half + i)) * factor;
    }
}

static void write_token(const Attention *a, const Step *s, int64_t token) {
    int64_t block = s->positions[token] / a->block_size, offset = s->positions[token] % a->block_size;
    for (int64_t head = 0; head < a->num_kv_heads; head++) {
        const T *key = a->key + token * a->key_stride + head * a->dim;
        T *place = a->keys + head * a->keys_head + block * a->block_size * a->dim + offset, turned[PADDED(a->dim)];
        if (s->cos) {
            float numbers[PADDED(a->dim)];
            rotated(a, s, key, token, 1, numbers);
            for (int64_t i = 0; i < a->dim; i += VL)
                store(turned + i, load_float(numbers + i));
            key = turned;
        }
        for (int64_t i = 0; i < a->dim; i++)
            place[i * a->block_size] = key[i];
        memcpy(a->values + head * a->values_head + s->positions[token] * a->value_dim,
               a->value + token * a->value_stride + head * a->value_dim, a->value_dim * sizeof(T));
    }
}

// Some rows x all columns, `ld` of them; `parts` vectors of them at a time.
INLINE void products(int rows, int parts, int is_sum, const float *x, int64_t ldx, const T *numbers, int64_t ld,
                     int64_t size, const T *next, float *out, int64_t ldo) {
    int64_t c = 0;
    for (; c + parts * VL <= ld; c += parts * VL)
        product(rows, parts, VL, is_sum, x, ldx, numbers + c, ld, size, next ? next + c : 0, out + c, ldo);
    for (; c + VL <= ld; c += VL)
        product(rows, 1, VL, is_sum, x, ldx, numbers + c, ld, size, next ? next + c : 0, out + c, ldo);
    if (c < ld)
        product(rows, 1, ld - c, is_sum, x, ldx, numbers + c, ld, size, 0, out + c, ldo);
}

#define CASE(rows)                                                                                                     \
    case rows:                                                                                                         \
        products(rows, 2, 0, q, dim, keys, B, dim, next, scores, ldo);                                                 \
        break;

// scores [rows, B] = q [rows, dim] · keys [dim, B].
static void score(int64_t rows, const float *q, int64_t dim, const T *keys, int64_t B, const T *next, float *scores,
                  int64_t ldo) {
    for (; rows > 0; rows -= TILE, q += TILE * dim, scores += TILE * ldo, next = 0)
        switch (rows < TILE ? rows : TILE) { FOR_5_ROWS(CASE) }
}
#undef CASE

// out [rows, dim] += weights [rows, n] · values [n, dim]; out has whole vectors.
static void add(int64_t rows, const float *weights, int64_t ldw, const T *values, int64_t dim, int64_t n, const T *next,
                float *out, int64_t ldo) {
    for (int64_t left = rows; left > 0; left -= 3, weights += 3 * ldw, out += 3 * ldo, next = 0)
        if (left == 1)
            products(1, 4, 1, weights, ldw, values, dim, n, next, out, ldo);
        else if (left == 2)
            products(2, 4, 1, weights, ldw, values, dim, n, next, out, ldo);
        else
            products(3, 4, 1, weights, ldw, values, dim, n, next, out, ldo);
}

// n rows of `size` numbers as floats, in panels of `ld` rows that zeros fill up.
static void widen_rows(const T *numbers, int64_t n, int64_t size, float *out, int64_t ld) {
    for (int64_t c = 0; c < size; c += PANEL, out += ld * PANEL)
        for (int64_t r = 0; r < n; r++)
            for (int half = 0; half < 2; half++) {
                int64_t left = size - c - half * VL;
                const T *own = numbers + r * size + c + half * VL;
                vec v = left >= VL ? load(own) : left > 0 ? load_part(own, left) : all(0);
                store_float(out + r * PANEL + half * VL, v);
            }
}

#define CASE(rows)                                                                                                     \
    case rows:                                                                                                         \
        product_of(1, rows, 2, VL, is_sum, x + r * ldx, ldx, own, PANEL, size, 0, out + r * ldo + c, ldo);             \
        break;

// out [rows, columns] (+)= x [rows, size] · panels of `ld` rows, of which there are `size`.
INLINE void product_of_panels(int is_sum, int64_t rows, const float *x, int64_t ldx, const float *panels, int64_t ld,
                              int64_t columns, int64_t size, float *out, int64_t ldo) {
    for (int64_t c = 0; c < columns; c += PANEL) {
        const float *own = panels + c * ld;
        for (int64_t r = 0; r < rows; r += TILE)
            switch (rows - r < TILE ? rows - r : TILE) { FOR_5_ROWS(CASE) }
    }
}
#undef CASE

// Scores [size] of a row become weights; keys outside [oldest, newest], counted from the first, have none. Returns the
// factor for what was added up before.
static float soften(float softcap, float *scores, int64_t size, int64_t oldest, int64_t newest, float *peak,
                    float *total) {
    vec highest_scores = all(*peak), sums = all(0);
    ivec is_bad = {0}, place;
    for (int i = 0; i < VL; i++)
        place[i] = i;
    for (int64_t j = 0; softcap != 0 && j < size; j++)
        scores[j] = softcap * tanhf(scores[j] / softcap);
    for (int64_t j = 0; j < size; j += VL, place += VL) {
        vec s = load_float(scores + j);
        if (j < oldest || j + VL > newest + 1) {
            s = pick((place < (int32_t)oldest) | (place > (int32_t)newest), all(-INFINITY), s);
            store_float(scores + j, s);
        }
        is_bad |= ~(s < INFINITY);
        highest_scores = larger(s, highest_scores);
    }
    for (int i = 0; i < VL; i++)
        if (is_bad[i])
            *total = NAN; // and so is the result
    float now = highest(highest_scores), factor;
    if (now == -INFINITY) {
        memset(scores, 0, size * sizeof(float));
        return 1;
    }
    for (int64_t j = 0; j < size; j += VL) {
        vec weights = exp_negative(load_float(scores + j) - now);
        store_float(scores + j, weights);
        sums += weights;
    }
    factor = *peak == now ? 1 : expf(*peak - now);
    *total = *total * factor + sum(sums);
    *peak = now;
    return factor;
}

// Rows [first, first + rows) of a sequence for one key head; row r is query head r % group of new token r / group.
static void unit(const Attention *a, const Step *s, int64_t sequence, int64_t kv_head, int64_t first, int64_t rows) {
    const int32_t *own = s->sequences + 3 * sequence, *table = s->table + sequence * s->table_width;
    int64_t group = a->num_heads / a->num_kv_heads, B = a->block_size, value_size = WHOLE(a->value_dim);
    int64_t before = own[2] - own[1]; // tokens of the sequence before the new ones
    int64_t blocks = (MIN_CHUNK + B - 1) / B, chunk = PADDED(blocks * B) + PANEL;
    float q[ROWS * a->dim], out[ROWS * value_size], scores[ROWS * chunk], peaks[ROWS], totals[ROWS];
    int64_t is_wide = rows > TILE, key_room = a->dim * WHOLE(B), value_room = blocks * B * value_size;
    float numbers[!is_wide ? 1 : key_room > value_room ? key_room : value_room]; // a block's keys, or a chunk's values
    const T *key_pool = a->keys + kv_head * a->keys_head, *value_pool = a->values + kv_head * a->values_head;
    memset(out, 0, sizeof out);
    for (int64_t r = 0; r < rows; r++) {
        int64_t token = own[0] + (first + r) / group, head = kv_head * group + (first + r) % group;
        const T *from = a->query + token * a->query_stride + head * a->dim;
        if (s->cos)
            rotated(a, s, from, token, a->scaling, q + r * a->dim);
        else
            for (int64_t i = 0; i < a->dim; i++)
                q[r * a->dim + i] = get(from + i) * a->scaling;
        peaks[r] = a->sinks ? a->sinks[head] : -INFINITY;
        totals[r] = a->sinks ? 1 : 0;
    }
    int64_t newest = before + (first + rows - 1) / group, stop = newest / B + 1, block = 0;
    if (a->window && before + first / group >= a->window)
        block = (before + first / group - a->window + 1) / B / blocks * blocks;
    for (; block < stop; block += blocks) {
        int64_t n = stop - block < blocks ? stop - block : blocks, keys = n * B;
        for (int64_t b = block; b < block + n; b++) {
            const T *next = b + 1 < stop ? key_pool + table[b + 1] * B * a->dim : 0;
            const T *own = key_pool + table[b] * B * a->dim;
            if (is_wide) {
                widen_rows(own, a->dim, B, numbers, a->dim);
                product_of_panels(0, rows, q, a->dim, numbers, a->dim, B, a->dim, scores + (b - block) * B, chunk);
            } else
                score(rows, q, a->dim, own, B, next, scores + (b - block) * B, chunk);
        }
        for (int64_t r = 0; r < rows; r++) {
            int64_t position = before + (first + r) / group - block * B;
            int64_t oldest = a->window ? position - a->window + 1 : 0;
            int64_t last = position < keys ? position : keys - 1; // of the chunk
            float factor = soften(a->softcap, scores + r * chunk, PADDED(keys), oldest, last, peaks + r, totals + r);
            for (int64_t i = 0; factor != 1 && i < value_size; i += VL)
                store_float(out + r * value_size + i, load_float(out + r * value_size + i) * factor);
        }
        // What lies behind the newest key is nobody's yet, and is not read.
        int64_t known = newest - block * B + 1 < keys ? newest - block * B + 1 : keys;
        for (int64_t k = 0; k < known; k += B) {
            int64_t b = block + k / B, size = known - k < B ? known - k : B;
            const T *own = value_pool + table[b] * B * a->value_dim;
            const T *next = b + 1 < stop ? value_pool + table[b + 1] * B * a->value_dim : 0;
            if (is_wide)
                widen_rows(own, size, a->value_dim, numbers + k * PANEL, known);
            else
                add(rows, scores + k, chunk, own, a->value_dim, size, next, out, value_size);
        }
        if (is_wide)
            product_of_panels(1, rows, scores, chunk, numbers, known, value_size, known, out, value_size);
    }
    for (int64_t r = 0; r < rows; r++) {
        int64_t token = own[0] + (first + r) / group, head = kv_head * group + (first + r) % group;
        T *to = a->out + (token * a->num_heads + head) * a->value_dim;
        for (int64_t i = 0; i < a->value_dim; i += VL) {
            vec result = load_float(out + r * value_size + i) / totals[r];
            store_part(to + i, result, a->value_dim - i < VL ? a->value_dim - i : VL);
        }
    }
}

int attend(const Attention *a, const Step *s) {
    int64_t group = a->num_heads / a->num_kv_heads, num_units = 0, work = 0;
    for (int64_t i = 0; i < s->num_sequences; i++) {
        const int32_t *own = s->sequences + 3 * i;
        num_units += (own[1] * group + ROWS - 1) / ROWS * a->num_kv_heads;
        work += (int64_t)own[1] * own[2] * a->num_heads * a->dim;
    }
#pragma omp parallel if (work > MIN_WORK)
    {
#pragma omp for schedule(static)
        for (int64_t token = 0; token < s->num_tokens; token++)
            write_token(a, s, token);
#pragma omp for schedule(dynamic)
        for (int64_t u = 0; u < num_units; u++) {
            int64_t i = 0, left = u, parts;
            while (left >= (parts = (s->sequences[3 * i + 1] * group + ROWS - 1) / ROWS) * a->num_kv_heads) {
                left -= parts * a->num_kv_heads;
                i++;
            }
            int64_t first = left % parts * ROWS, rows = s->sequences[3 * i + 1] * group - first;
            unit(a, s, i, left / parts, first, rows < ROWS ? rows : ROWS);
        }
    }
    return 0;
}
