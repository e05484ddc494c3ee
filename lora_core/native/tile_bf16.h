// What `linear.c` multiplies by in bfloat16: whole numbers, which a processor without products of bfloat16 multiplies
// and adds faster than floats.
//
// GROUP numbers along the input become whole multiples of one power of two, the largest of 13 bits. So a number is exact
// unless it is less than 1/32 of the group's largest, and else wrong by at most 2^-13 of the power of two below that.
// The root of a group's summed squares of that is less than a fifth of what rounding the largest to bfloat16 may have
// done. A group's sum of products fits 32 bits (32 · 8160² < 2^31), and is exact.
#pragma once
#include "vector.h"

typedef int32_t Unit; // two neighbours along the input, of 16 bits each
#define GROUP 32
#define X_UNITS (GROUP / 2)
#define X_WORTHS 1
#define W_UNITS (GROUP / 2)
#define W_WORTHS 1
#define BITS 12 // a group's largest number is at least 2^12
#if VL == 16
#define ROWS 12 // of a tile: 2 · 12 of 32 registers hold its sums
#define FOR_ROWS FOR_TILE_ROWS
#else
#define ROWS 6 // 2 · 6 of 16
#define FOR_ROWS(CASE) FOR_5_ROWS(CASE) CASE(6)
#endif

typedef int16_t pairs __attribute__((vector_size(VL * 4)));
typedef int16_t octet __attribute__((vector_size(16)));

#define LARGER(a, b) (((a) & ((a) > (b))) | ((b) & ~((a) > (b)))) // of each two numbers of vectors

// The largest number of a vector.
INLINE int16_t largest_of(pairs v) {
    octet parts[VL / 4];
    memcpy(parts, &v, sizeof v);
    for (int i = 1; i < VL / 4; i++)
        parts[0] = LARGER(parts[0], parts[i]);
    parts[0] = LARGER(parts[0], __builtin_shuffle(parts[0], (octet){4, 5, 6, 7}));
    parts[0] = LARGER(parts[0], __builtin_shuffle(parts[0], (octet){2, 3}));
    return LARGER(parts[0], __builtin_shuffle(parts[0], (octet){1}))[0];
}

INLINE float float_of(uint32_t bits) {
    float out;
    memcpy(&out, &bits, sizeof out);
    return out;
}

// GROUP numbers as units `ld` apart; returns what one is worth, NaN if one is not finite.
INLINE float spread_group(const T *x, Unit *out, int64_t ld) {
    typedef int16_t svec __attribute__((vector_size(VL * 2)));
    pairs largest = {0}; // without their signs, which are the order of their sizes
    for (int i = 0; i < GROUP; i += 2 * VL) {
        pairs own;
        memcpy(&own, x + i, sizeof own);
        own &= 0x7fff;
        largest = LARGER(own, largest);
    }
    uint32_t most = largest_of(largest);
    uint32_t exponent = most >> 7 > BITS + 1 ? most >> 7 : BITS + 1; // as floats have them, 127 more than it is
    float factor = float_of((254 + BITS - exponent) << 23);
    Unit units[GROUP / 2];
    for (int i = 0; i < GROUP; i += VL) {
        ivec rounded = (ivec)(load(x + i) * factor + 12582912.0f); // 1.5·2^23: the number is in the lower bits
        svec numbers = __builtin_convertvector(rounded, svec);
        memcpy(units + i / 2, &numbers, sizeof numbers);
    }
    for (int k = 0; k < GROUP / 2; k++)
        out[k * ld] = units[k];
    return float_of(exponent == 255 ? 0x7fc00000 : (exponent - BITS) << 23);
}

// n <= GROUP numbers, filled up with zeros, likewise.
INLINE float spread(const T *x, int64_t n, Unit *out, int64_t ld) {
    T group[GROUP] = {0};
    if (n == GROUP)
        return spread_group(x, out, ld);
    memcpy(group, x, n * sizeof(T));
    return spread_group(group, out, ld);
}

INLINE void spread_input(const T *x, int64_t n, Unit *out, float *worth, int64_t ld) { *worth = spread(x, n, out, ld); }

// The n numbers of the units that `spread` made, as they are multiplied; bfloat16 holds them, as it held what they were.
static void unspread(const Unit *units, int64_t ld, float worth, int64_t n, T *out) {
    int16_t numbers[GROUP];
    T group[GROUP];
    for (int k = 0; k < GROUP / 2; k++)
        memcpy(numbers + 2 * k, units + k * ld, sizeof *units);
    for (int i = 0; i < GROUP; i++) {
        float number = numbers[i] * worth;
        uint32_t bits;
        memcpy(&bits, &number, sizeof bits);
        group[i] = bits >> 16;
    }
    memcpy(out, group, n * sizeof(T));
}

// *sums += products of pairs, added up.
INLINE void add_products(ivec *sums, ivec a, ivec b) {
#if defined(__AVX512BW__)
    *sums += (ivec)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__) && VL == 8
    ivec products; // one after the other, else gcc keeps products in memory
    asm("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+x"(*sums), "=&x"(products) : "x"(a), "x"(b));
#else
    for (int i = 0; i < VL; i++)
        (*sums)[i] += ((pairs)a)[2 * i] * ((pairs)b)[2 * i] + ((pairs)a)[2 * i + 1] * ((pairs)b)[2 * i + 1];
#endif
}

#define MULTIPLY "vpmaddwd"
#define ADD "vpaddd"
#include "tile_assembly.h"
#define READ_UNIT "vmovdqu 64*.Lk(%[w]), %[left]\n\tvmovdqu 64*.Lk+32(%[w]), %[right]\n\t"

// whole [rows, 2 · panels] = the products of a group, added up.
INLINE void multiply_panels(int rows, int panels, const Unit *x, const Unit *w, int64_t ld, ivec whole[ROWS][8]) {
#ifdef PANEL_CODE
    if (panels == 1) {
        PANEL_CODE(READ_UNIT OF_ROWS(FIRST_UNIT) NEXT ".rept 15\n\t" READ_UNIT OF_ROWS(NEXT_UNIT) NEXT ".endr")
        return;
    }
#endif
#pragma GCC unroll 12
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
        for (int c = 0; c < 2 * panels; c++)
            whole[r][c] = (ivec){0};
#pragma GCC unroll 1 // else sums leave their registers
    for (int k = 0; k < GROUP / 2; k++, x += rows, w += PANEL) {
        ivec own[8];
#pragma GCC unroll 8
        for (int c = 0; c < 2 * panels; c++)
            memcpy(own + c, w + c / 2 * ld + c % 2 * VL, sizeof *own);
#pragma GCC unroll 12
        for (int r = 0; r < rows; r++) {
            ivec pair = x[r] - (ivec){0};
#pragma GCC unroll 8
            for (int c = 0; c < 2 * panels; c++)
                add_products(&whole[r][c], pair, own[c]);
        }
    }
}

// sums [rows, 2 · panels] += the products of a group: x [GROUP / 2, rows], w [GROUP / 2, PANEL] in each panel, `ld`
// apart; what a number is worth of each row, and of each column [PANEL], panels `ld_worth` apart.
INLINE void add_group(int rows, int panels, vec sums[ROWS][8], const Unit *x, const float *worth_x, const Unit *w,
                      int64_t ld, const T *worth_w, int64_t ld_worth) {
    ivec whole[ROWS][8];
    multiply_panels(rows, panels, x, w, ld, whole);
#pragma GCC unroll 8
    for (int c = 0; c < 2 * panels; c++) {
        vec worth = load(worth_w + c / 2 * ld_worth + c % 2 * VL);
#pragma GCC unroll 12
        for (int r = 0; r < rows; r++)
            sums[r][c] += __builtin_convertvector(whole[r][c], vec) * (worth_x[r] * worth);
    }
}
