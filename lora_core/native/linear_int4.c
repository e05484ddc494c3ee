// y = x·Wᵀ + bias for a weight in 4 bits, in whole numbers: a row's inputs are rounded to 8 bits first, group by group.
//
// GROUP numbers along the input share a scale and the value of code 8: a weight is (code - 8)·scale + that value. So a
// group's part of a product is scale·Σ code·x + (value of code 0)·Σ x, and both sums are exact.
//
// W [O, I] lies as codes [O / PANEL, I / 8, PANEL, 4]: of a column's next eight codes, the first four are the lower
// halves of four bytes and the others the upper ones. Scales and values of code 8 are [O / PANEL, I / GROUP, 2, PANEL].
#include "functions.h"
#include "scratch.h"
#include <math.h>

#define GROUP 32
#define TILE_ROWS 4
#define BLOCK_ROWS 64   // rows that are rounded at once
#define MIN_WORK 300000 // multiplications below which a second thread does not pay

typedef uint8_t codes __attribute__((vector_size(VL * 4)));
typedef int16_t pairs __attribute__((vector_size(VL * 4)));

// Rows as whole numbers from -127 to 127; for each group what one is worth, and the sum of what they are worth.
typedef struct {
    int8_t *numbers;     // [rows, I]
    float *worth, *sums; // [rows, I / GROUP]
} Rounded;

static void round_row(const T *x, int64_t I, int8_t *numbers, float *worth, float *sums) {
    for (int64_t g = 0; g < I / GROUP; g++, x += GROUP, numbers += GROUP) {
        vec largest = all(0), total = all(0), unsound = all(0);
        for (int i = 0; i < GROUP; i += VL) {
            vec v = load(x + i);
            unsound += v - v; // not zero if one is infinite or no number
            largest = larger(larger(v, -v), largest);
        }
        float peak = highest(largest), nothing = sum(unsound);
        float factor = peak > 0 && nothing == 0 ? 127 / peak : 0;
        for (int i = 0; i < GROUP; i += VL) {
            vec whole = load(x + i) * factor + 12582912.0f; // 1.5·2^23: rounds, and the number is in the low bits
            ivec bits = nothing == 0 ? (ivec)whole : (ivec){0};
            bvec bytes = __builtin_convertvector((uvec)bits, bvec);
            memcpy(numbers + i, &bytes, sizeof bytes);
            total += whole - 12582912.0f;
        }
        worth[g] = peak / 127 + nothing;
        sums[g] = worth[g] * sum(total);
    }
}

// Neighbouring codes times four numbers, over and over; sums of two.
INLINE pairs multiply(codes c, const int8_t *x) {
    int32_t four;
    memcpy(&four, x, sizeof four);
#if defined(__AVX512BW__)
    return (pairs)_mm512_maddubs_epi16((__m512i)c, _mm512_set1_epi32(four));
#elif defined(__AVX2__) && VL == 8
    return (pairs)_mm256_maddubs_epi16((__m256i)c, _mm256_set1_epi32(four));
#else
    pairs out;
    for (int i = 0; i < 2 * VL; i++)
        out[i] = c[2 * i] * x[2 * i % 4] + c[2 * i + 1] * x[(2 * i + 1) % 4];
    return out;
#endif
}

INLINE vec add_pairs(pairs p) {
#if defined(__AVX512BW__)
    ivec sums = (ivec)_mm512_madd_epi16((__m512i)p, _mm512_set1_epi16(1));
#elif defined(__AVX2__) && VL == 8
    ivec sums = (ivec)_mm256_madd_epi16((__m256i)p, _mm256_set1_epi16(1));
#else
    ivec sums;
    for (int i = 0; i < VL; i++)
        sums[i] = p[2 * i] + p[2 * i + 1];
#endif
    return __builtin_convertvector(sums, vec);
}

// `rows` rows, a constant where this is called, from `row` on x one panel.
INLINE void tile(int rows, const Rounded *x, int64_t row, const uint8_t *w, const T *scales, const T *bias, T *y,
                 int64_t I, int64_t O, int64_t column) {
    vec sums[TILE_ROWS][2];
    int64_t G = I / GROUP;
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++)
        sums[r][0] = sums[r][1] = all(0);
    for (int64_t g = 0; g < G; g++, scales += 2 * PANEL) {
        // Eight products of two numbers each: at most 8·2·15·127, which 16 bits hold.
        pairs dots[TILE_ROWS][2] = {{{0}}};
#pragma GCC unroll 1 // else it adds up products that it keeps in memory
        for (int o = 0; o < GROUP; o += 8, w += 4 * PANEL) {
            codes low[2], high[2];
#pragma GCC unroll 2
            for (int half = 0; half < 2; half++) {
                memcpy(&high[half], w + half * sizeof(codes), sizeof(codes));
                low[half] = high[half] & 15;
                high[half] >>= 4;
            }
#pragma GCC unroll 4
            for (int r = 0; r < rows; r++) {
                const int8_t *own = x->numbers + (row + r) * I + g * GROUP + o;
#pragma GCC unroll 2
                for (int half = 0; half < 2; half++) {
                    dots[r][half] += multiply(low[half], own);
                    dots[r][half] += multiply(high[half], own + 4);
                }
            }
        }
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++) {
            vec scale = load(scales + half * VL), zero = load(scales + PANEL + half * VL) - 8 * scale;
#pragma GCC unroll 4
            for (int r = 0; r < rows; r++) {
                int64_t place = (row + r) * G + g;
                sums[r][half] += add_pairs(dots[r][half]) * x->worth[place] * scale;
                sums[r][half] += zero * x->sums[place];
            }
        }
    }
#pragma GCC unroll 2
    for (int half = 0; half < 2; half++) {
        int64_t start = column + half * VL, n = O - start < VL ? O - start : VL;
        for (int r = 0; n > 0 && r < rows; r++)
            store_part(y + r * O + start, sums[r][half] + (bias ? load_part(bias + start, n) : all(0)), n);
    }
}

#define CASE(rows)                                                                                                     \
    case rows:                                                                                                         \
        tile(rows, x, row, w, scales, bias, y + row * O, I, O, column);                                                \
        break;

// All rows x one panel.
static void panel(int64_t rows, const Rounded *x, const uint8_t *w, const T *scales, const T *bias, T *y, int64_t I,
                  int64_t O, int64_t column) {
    for (int64_t row = 0; row < rows; row += TILE_ROWS)
        switch (rows - row) {
            CASE(1)
            CASE(2)
            CASE(3)
            default:
                tile(4, x, row, w, scales, bias, y + row * O, I, O, column);
        }
}

// x [M, I] with rows `ldx` apart and I a multiple of GROUP, bias [O] or null, y [M, O]. Not 0 if there is no memory.
int linear_int4(const T *x, int64_t ldx, const void *w, const T *scales, const T *bias, T *y, int64_t M, int64_t I,
                int64_t O) {
    static __thread Scratch scratch;
    int64_t G = I / GROUP, P = (O + PANEL - 1) / PANEL;
    float *memory = room(&scratch, BLOCK_ROWS * (2 * G * sizeof(float) + I));
    if (!memory)
        return 1;
    Rounded own = {(int8_t *)(memory + 2 * G * BLOCK_ROWS), memory, memory + G * BLOCK_ROWS};
#pragma omp parallel if (M * I * O > MIN_WORK)
    for (int64_t start = 0; start < M; start += BLOCK_ROWS) {
        int64_t rows = M - start < BLOCK_ROWS ? M - start : BLOCK_ROWS;
#pragma omp for schedule(static)
        for (int64_t r = 0; r < rows; r++)
            round_row(x + (start + r) * ldx, I, own.numbers + r * I, own.worth + r * G, own.sums + r * G);
#pragma omp for schedule(static)
        for (int64_t p = 0; p < P; p++)
            panel(rows, &own, (const uint8_t *)w + p * I / 2 * PANEL, scales + p * G * 2 * PANEL, bias, y + start * O, I, O,
                  p * PANEL);
    }
    return 0;
}
