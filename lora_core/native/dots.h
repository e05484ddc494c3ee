// The shrink product of some rows with some rank rows of one adapter, which lie as long as each other.
#pragma once
#include "vector.h"

// xs rows x as rank rows, together 1, 2, 4 or 8 products.
INLINE void dots(int xs, int as, const float *x, int64_t I, const T *a, float weight, float *h, int64_t ldh) {
    vec sums[8];
    float rest[8] = {0}, found[8];
#pragma GCC unroll 8
    for (int d = 0; d < xs * as; d++)
        sums[d] = all(0);
    int64_t k = 0;
    for (; k + VL <= I; k += VL) {
        vec own[4];
        if (k * sizeof(T) % LINE == 0)
#pragma GCC unroll 4
            for (int j = 0; j < as; j++)
                __builtin_prefetch(a + (as + j) * I + k); // the next rank rows
#pragma GCC unroll 4
        for (int j = 0; j < as; j++)
            own[j] = load(a + j * I + k);
#pragma GCC unroll 4
        for (int i = 0; i < xs; i++) {
            vec row = load_float(x + i * I + k);
#if VL == 8
            asm("" : "+x"(row)); // once, into a register
#endif
#pragma GCC unroll 4
            for (int j = 0; j < as; j++)
                sums[i * as + j] += row * own[j];
        }
    }
    for (; k < I; k++)
        for (int i = 0; i < xs; i++)
            for (int j = 0; j < as; j++)
                rest[i * as + j] += x[i * I + k] * get(a + j * I + k);
    int d = 0;
#pragma GCC unroll 2
    for (; d + 4 <= xs * as; d += 4) {
        quad four = sums_of_four(sums + d);
        memcpy(found + d, &four, sizeof four);
    }
#pragma GCC unroll 3
    for (; d < xs * as; d++)
        found[d] = sum(sums[d]);
#pragma GCC unroll 4
    for (int i = 0; i < xs; i++)
#pragma GCC unroll 4
        for (int j = 0; j < as; j++)
            h[i * ldh + j] = weight * (found[i * as + j] + rest[i * as + j]);
}

// Some rows x some rank rows of one adapter.
static void shrink(int64_t rows, int64_t rank, const float *x, int64_t I, const T *a, float weight, float *h,
                   int64_t ldh) {
    int64_t i = 0;
    for (; i + 4 <= rows; i += 4) {
        int64_t j = 0;
        for (; j + 2 <= rank; j += 2)
            dots(4, 2, x + i * I, I, a + j * I, weight, h + i * ldh + j, ldh);
        if (j < rank)
            dots(4, 1, x + i * I, I, a + j * I, weight, h + i * ldh + j, ldh);
    }
    for (; i + 2 <= rows; i += 2) {
        int64_t j = 0;
        for (; j + 4 <= rank; j += 4)
            dots(2, 4, x + i * I, I, a + j * I, weight, h + i * ldh + j, ldh);
        for (; j < rank; j++)
            dots(2, 1, x + i * I, I, a + j * I, weight, h + i * ldh + j, ldh);
    }
    if (i < rows) {
        int64_t j = 0;
        for (; j + 4 <= rank; j += 4)
            dots(1, 4, x + i * I, I, a + j * I, weight, h + i * ldh + j, ldh);
        for (; j < rank; j++)
            dots(1, 1, x + i * I, I, a + j * I, weight, h + i * ldh + j, ldh);
    }
}
