// What `linear_int4.c` multiplies by: weights in 4 bits, and inputs that are rounded to 8 bits, group by group.
//
// GROUP numbers along the input share a scale and a middle: a weight is (code - 8)·scale + middle. So a group's part of a
// product is scale·Σ code·x + (middle - 8·scale)·Σ x, and both sums are exact.
//
// Of a column's next eight codes, the first four are the lower halves of a unit's four bytes and the others the upper ones.
#pragma once
#include "vector.h"

typedef int32_t Unit; // eight codes, or four numbers of a row
#define GROUP 32
#define X_UNITS (GROUP / 4)
#define X_WORTHS 2 // what a number is worth, and the sum of what all are worth
#define W_UNITS (GROUP / 8)
#define W_WORTHS 2 // scales and middles
#if VL == 16
#define ROWS 4
#define FOR_ROWS(CASE) CASE(1) CASE(2) CASE(3) CASE(4)
#else
#define ROWS 6 // of a tile: 2 · 6 of 16 registers hold its sums
#define FOR_ROWS(CASE) FOR_5_ROWS(CASE) CASE(6)
#endif

typedef uint8_t codes __attribute__((vector_size(VL * 4)));
typedef int16_t pairs __attribute__((vector_size(VL * 4)));

// GROUP numbers as whole ones from -127 to 127; those of a group that has no largest number are 0, and worth NaN.
INLINE void spread_input(const T *x, int64_t n, Unit *out, float *worth, int64_t ld) {
    (void)n; // this many: rows of such weights are whole groups
    vec largest = all(0), total = all(0), unsound = all(0);
    for (int i = 0; i < GROUP; i += VL) {
        vec v = load(x + i);
        unsound += v - v; // not zero if one is infinite or no number
        largest = larger(larger(v, -v), largest);
    }
    float peak = highest(largest), nothing = sum(unsound);
    float factor = peak > 0 && nothing == 0 ? 127 / peak : 0;
    Unit units[X_UNITS];
    for (int i = 0; i < GROUP; i += VL) {
        vec whole = load(x + i) * factor + 12582912.0f; // 1.5·2^23: rounds, and the number is in the low bits
        ivec bits = nothing == 0 ? (ivec)whole : (ivec){0};
        bvec bytes = __builtin_convertvector((uvec)bits, bvec);
        memcpy(units + i / 4, &bytes, sizeof bytes);
        total += whole - 12582912.0f;
    }
    for (int k = 0; k < X_UNITS; k++)
        out[k * ld] = units[k];
    worth[0] = peak / 127 + nothing;
    worth[ld] = worth[0] * sum(total);
}

// *sums += codes times four numbers, over and over; sums of two.
INLINE void add_codes(pairs *sums, codes c, Unit four) {
#if defined(__AVX512BW__)
    *sums += (pairs)_mm512_maddubs_epi16((__m512i)c, _mm512_set1_epi32(four));
#elif defined(__AVX2__) && VL == 8
    *sums += (pairs)_mm256_maddubs_epi16((__m256i)c, _mm256_set1_epi32(four));
#else
    int8_t x[4];
    memcpy(x, &four, sizeof four);
    for (int i = 0; i < 2 * VL; i++)
        (*sums)[i] += c[2 * i] * x[2 * i % 4] + c[2 * i + 1] * x[(2 * i + 1) % 4];
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

#define MULTIPLY "vpmaddubsw"
#define ADD "vpaddw"
#include "tile_assembly.h"
// Two units of x meet one of w.
#define LOW_CODES                                                                                                      \
    "vmovdqu %[fifteens], %[right]\n\t"                                                                                \
    "vpand 32*.Lk(%[w]), %[right], %[left]\n\t"                                                                        \
    "vpand 32*.Lk+32(%[w]), %[right], %[right]\n\t"
#define HIGH_CODES                                                                                                     \
    "vmovdqu 32*.Lk-32(%[w]), %[left]\n\t"                                                                             \
    "vmovdqu 32*.Lk(%[w]), %[right]\n\t"                                                                               \
    "vpsrlw $4, %[left], %[left]\n\t"                                                                                  \
    "vpsrlw $4, %[right], %[right]\n\t"                                                                                \
    "vpand %[fifteens], %[left], %[left]\n\t"                                                                          \
    "vpand %[fifteens], %[right], %[right]\n\t"

// whole [rows, 2 · panels] = a group's products, of which pairs are to be added: eight of two each, at most 8·2·15·127,
// which 16 bits hold.
INLINE void multiply_panels(int rows, int panels, const Unit *x, const Unit *w, int64_t ld, pairs whole[ROWS][8]) {
#ifdef PANEL_CODE
    if (panels == 1) {
        const codes fifteens = (codes){0} + 15;
        PANEL_CODE(LOW_CODES OF_ROWS(FIRST_UNIT) NEXT HIGH_CODES OF_ROWS(NEXT_UNIT) NEXT
                   ".rept 3\n\t" LOW_CODES OF_ROWS(NEXT_UNIT) NEXT HIGH_CODES OF_ROWS(NEXT_UNIT) NEXT ".endr",
                   [fifteens] "m"(fifteens))
        return;
    }
#endif
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
        for (int c = 0; c < 2 * panels; c++)
            whole[r][c] = (pairs){0};
#pragma GCC unroll 1 // else it adds up products that it keeps in memory
    for (int k = 0; k < W_UNITS; k++, x += 2 * rows, w += PANEL) {
        codes low[8], high[8];
#pragma GCC unroll 8
        for (int c = 0; c < 2 * panels; c++) {
            memcpy(high + c, w + c / 2 * ld + c % 2 * VL, sizeof *high);
            low[c] = high[c] & 15;
            high[c] >>= 4;
        }
#pragma GCC unroll 6
        for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
            for (int c = 0; c < 2 * panels; c++) {
                add_codes(&whole[r][c], low[c], x[r]);
                add_codes(&whole[r][c], high[c], x[rows + r]);
            }
    }
}

// sums [rows, 2 · panels] += the products of a group: x [X_UNITS, rows], w [W_UNITS, PANEL] in each panel, `ld` apart;
// worths [X_WORTHS, rows] of x, and [W_WORTHS, PANEL] of w, panels `ld_worth` apart.
INLINE void add_group(int rows, int panels, vec sums[ROWS][8], const Unit *x, const float *worth_x, const Unit *w,
                      int64_t ld, const T *worth_w, int64_t ld_worth) {
    pairs whole[ROWS][8];
    multiply_panels(rows, panels, x, w, ld, whole);
#pragma GCC unroll 8
    for (int c = 0; c < 2 * panels; c++) {
        const T *own = worth_w + c / 2 * ld_worth + c % 2 * VL;
        vec scale = load(own), zero = load(own + PANEL) - 8 * scale;
#pragma GCC unroll 6
        for (int r = 0; r < rows; r++) {
            sums[r][c] += add_pairs(whole[r][c]) * (worth_x[r] * scale);
            sums[r][c] += zero * worth_x[rows + r];
        }
    }
}
