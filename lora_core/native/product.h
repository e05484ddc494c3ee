// The product of a few rows with numbers that lie row by row: what attention and adapters have in common.
#pragma once
#include "vector.h"

// out [rows, parts · VL] (+)= x [rows, size] · numbers [size, ...], of which n columns are there in each vector. Lines of
// `next`, which is wanted afterwards and lies as `numbers` does, are fetched meanwhile; it may be null. Numbers are of
// type T, or floats.
INLINE void product_of(int is_float, int rows, int parts, int n, int is_sum, const float *x, int64_t ldx,
                       const void *numbers, int64_t ld, int64_t size, const T *next, float *out, int64_t ldo) {
    vec sums[MAX_TILE][4];
#pragma GCC unroll 12
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int c = 0; c < parts; c++)
            sums[r][c] = is_sum ? load_float(out + r * ldo + c * VL) : all(0);
#pragma GCC unroll 8
    for (int64_t j = 0; j < size; j++) {
        vec own[4];
#pragma GCC unroll 4
        for (int c = 0; c < parts; c++)
            own[c] = is_float ? load_float((const float *)numbers + j * ld + c * VL)
                              : load_part((const T *)numbers + j * ld + c * VL, n);
        if (next)
            __builtin_prefetch(next + j * ld);
#pragma GCC unroll 12
        for (int r = 0; r < rows; r++) {
            vec factor = all(x[r * ldx + j]);
#pragma GCC unroll 4
            for (int c = 0; c < parts; c++)
                sums[r][c] += factor * own[c];
        }
    }
#pragma GCC unroll 12
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int c = 0; c < parts; c++)
            store_float(out + r * ldo + c * VL, sums[r][c]);
}

INLINE void product(int rows, int parts, int n, int is_sum, const float *x, int64_t ldx, const T *numbers, int64_t ld,
                    int64_t size, const T *next, float *out, int64_t ldo) {
    product_of(0, rows, parts, n, is_sum, x, ldx, numbers, ld, size, next, out, ldo);
}
