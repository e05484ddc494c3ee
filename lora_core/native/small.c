// What a model does between its products, each in one pass.
#include "functions.h"
#include <math.h>

#define MIN_WORK 30000 // numbers below which a second thread does not pay

// x / sqrt(mean(x²) + eps) · weight of `size` numbers; y may be x.
static void norm_row(const T *x, const T *weight, T *y, int64_t size, float eps) {
    int64_t whole = size / VL * VL;
    vec squares = all(0);
    for (int64_t i = 0; i < whole; i += VL)
        squares += load(x + i) * load(x + i);
    float total = sum(squares);
    for (int64_t i = whole; i < size; i++)
        total += get(x + i) * get(x + i);
    float scale = 1 / sqrtf(total / size + eps);
    for (int64_t i = 0; i < whole; i += VL)
        store(y + i, load(x + i) * scale * load(weight + i));
    if (whole < size)
        store_part(y + whole, load_part(x + whole, size - whole) * scale * load_part(weight + whole, size - whole),
                   size - whole);
}

// Of each row: x and y [rows, size], weight [size].
void rms_norm(const T *x, const T *weight, T *y, int64_t rows, int64_t size, float eps) {
#pragma omp parallel for schedule(static) if (rows * size > MIN_WORK)
    for (int64_t r = 0; r < rows; r++)
        norm_row(x + r * size, weight, y + r * size, size, eps);
}

// Of each head, in place: x [tokens, heads, dim], tokens `stride` apart, weight [dim].
void norm_heads(T *x, const T *weight, int64_t tokens, int64_t stride, int64_t heads, int64_t dim, float eps) {
#pragma omp parallel for schedule(static) if (tokens * heads * dim > MIN_WORK)
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t h = 0; h < heads; h++)
            norm_row(x + t * stride + h * dim, weight, x + t * stride + h * dim, dim, eps);
}

// silu(gate) · up for rows [gate | up], x [rows, 2 · size] -> y [rows, size]; silu(x) = x / (1 + e^-x).
void silu_gate(const T *x, T *y, int64_t rows, int64_t size) {
#pragma omp parallel for schedule(static) if (rows * size > MIN_WORK / 4)
    for (int64_t r = 0; r < rows; r++)
        for (int64_t i = 0; i < size; i += VL) {
            int n = size - i < VL ? size - i : VL;
            vec gate = load_part(x + 2 * r * size + i, n), up = load_part(x + (2 * r + 1) * size + i, n);
            vec small = exp_negative(-larger(gate, -gate)); // e^-|x|
            vec numerator = pick(gate >= 0, all(1), small);
            store_part(y + r * size + i, gate * up * numerator / (1 + small), n);
        }
}

// y = a + b, `size` numbers each; y may be a.
void add_numbers(const T *a, const T *b, T *y, int64_t size) {
#pragma omp parallel for schedule(static) if (size > MIN_WORK)
    for (int64_t i = 0; i < size; i += VL) {
        int n = size - i < VL ? size - i : VL;
        store_part(y + i, load_part(a + i, n) + load_part(b + i, n), n);
    }
}

// The largest of `size` numbers, and the first place where it is; NaN if one is.
static float maximum(const T *x, int64_t size, int64_t *place) {
    int64_t whole = size / VL * VL;
    vec best = all(-INFINITY);
    ivec where = {0}, is_nan = {0};
    for (int64_t i = 0; i < whole; i += VL) {
        vec v = load(x + i);
        ivec is_larger = v > best;
        best = pick(is_larger, v, best);
        where = (is_larger & ((int32_t)i - (ivec){0})) | (~is_larger & where);
        is_nan |= v != v;
    }
    float peak = -INFINITY;
    int has_nan = 0;
    *place = 0;
    for (int k = 0; k < VL && whole; k++) {
        has_nan |= is_nan[k];
        if (best[k] > peak || (best[k] == peak && where[k] + k < *place)) {
            peak = best[k];
            *place = where[k] + k;
        }
    }
    for (int64_t i = whole; i < size; i++) {
        float number = get(x + i);
        has_nan |= number != number;
        if (number > peak) {
            peak = number;
            *place = i;
        }
    }
    return has_nan ? NAN : peak;
}

// Of each row of x [rows, size].
void row_maxima(const T *x, float *peaks, int64_t *places, int64_t rows, int64_t size) {
#pragma omp parallel for schedule(static) if (rows * size > MIN_WORK)
    for (int64_t r = 0; r < rows; r++)
        peaks[r] = maximum(x + r * size, size, places + r);
}
