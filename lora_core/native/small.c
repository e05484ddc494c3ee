// What a model does between its products, each in one pass.
#include "functions.h"
#include <math.h>

#define MIN_WORK 30000 // numbers below which a second thread does not pay

// x / sqrt(mean(x²) + eps) · weight for each row: x and y [rows, size], weight [size].
void rms_norm(const T *x, const T *weight, T *y, int64_t rows, int64_t size, float eps) {
    int64_t whole = size / VL * VL;
#pragma omp parallel for schedule(static) if (rows * size > MIN_WORK)
    for (int64_t r = 0; r < rows; r++) {
        const T *from = x + r * size;
        T *to = y + r * size;
        vec squares = all(0);
        for (int64_t i = 0; i < whole; i += VL)
            squares += load(from + i) * load(from + i);
        float total = sum(squares);
        for (int64_t i = whole; i < size; i++)
            total += get(from + i) * get(from + i);
        float scale = 1 / sqrtf(total / size + eps);
        for (int64_t i = 0; i < whole; i += VL)
            store(to + i, load(from + i) * scale * load(weight + i));
        if (whole < size)
            store_part(to + whole, load_part(from + whole, size - whole) * scale * load_part(weight + whole, size - whole),
                       size - whole);
    }
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
