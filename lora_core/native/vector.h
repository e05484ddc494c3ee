// Vectors of floats as wide as the processor's, and numbers of type T in memory, read as floats and written rounded.
//
// A library is compiled for one T: bfloat16, or with -DFLOAT32 float. GCC's vector extensions make one source serve
// processors with AVX2, with AVX-512 and without either. Every sum is taken in one order, which depends on nothing but
// the row that it belongs to.
#pragma once
#include <stdint.h>
#include <string.h>
#ifdef __AVX2__
#include <immintrin.h>
#endif

#if defined(__AVX512F__) || defined(WIDE) // WIDE: as with AVX-512, on any processor, for tests
#define VL 16
#define MAX_TILE 12 // rows of a tile of one panel: 2 · 12 of 32 registers hold its sums
#else
#define VL 8
#define MAX_TILE 5 // 2 · 5 of 16, as two are read into and one holds a mask
#endif
#define PANEL (2 * VL) // a tile has whole panels of columns
// A switch's cases for the numbers of rows that a tile can have, and for up to five or six.
#define FOR_5_ROWS(CASE) CASE(1) CASE(2) CASE(3) CASE(4) CASE(5)
#if MAX_TILE > 5
#define FOR_6_ROWS(CASE) FOR_5_ROWS(CASE) CASE(6)
#define FOR_TILE_ROWS(CASE) FOR_6_ROWS(CASE) CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
#else
#define FOR_6_ROWS(CASE) FOR_5_ROWS(CASE)
#define FOR_TILE_ROWS(CASE) FOR_5_ROWS(CASE)
#endif
#define LINE 64 // bytes that come from memory together
#define INLINE static inline __attribute__((always_inline))

typedef float vec __attribute__((vector_size(VL * 4)));
typedef uint32_t uvec __attribute__((vector_size(VL * 4)));
typedef int32_t ivec __attribute__((vector_size(VL * 4)));
typedef uint16_t hvec __attribute__((vector_size(VL * 2)));

INLINE vec load_float(const float *p) {
    vec v;
    memcpy(&v, p, sizeof v);
    return v;
}

INLINE void store_float(float *p, vec v) { memcpy(p, &v, sizeof v); }

typedef uint8_t bvec __attribute__((vector_size(VL)));

INLINE vec all(float x) { return x - (vec){0}; }

INLINE vec pick(ivec mask, vec a, vec b) { return (vec)((mask & (ivec)a) | (~mask & (ivec)b)); }

// b where one is not a number.
INLINE vec larger(vec a, vec b) {
#if defined(__AVX512F__)
    return (vec)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__) && VL == 8
    return (vec)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return pick(a > b, a, b);
#endif
}

#ifdef FLOAT32
typedef float T;

INLINE vec load(const T *p) { return load_float(p); }

INLINE void store(T *p, vec v) { store_float(p, v); }

INLINE float get(const T *p) { return *p; }
#else
typedef uint16_t T;

INLINE uvec widen(hvec h) {
#if defined(__AVX512F__)
    return (uvec)_mm512_cvtepu16_epi32((__m256i)h);
#elif defined(__AVX2__) && VL == 8
    return (uvec)_mm256_cvtepu16_epi32((__m128i)h);
#else
    return __builtin_convertvector(h, uvec);
#endif
}

INLINE vec load(const T *p) {
    hvec h;
    memcpy(&h, p, sizeof h);
    return (vec)(widen(h) << 16);
}

// To the nearest, ties to even; NaN stays NaN.
INLINE void store(T *p, vec v) {
    uvec u = (uvec)v, is_nan = (uvec)(v != v);
    uvec rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    hvec h = __builtin_convertvector((rounded & ~is_nan) | (0x7fc0 & is_nan), hvec);
    memcpy(p, &h, sizeof h);
}

INLINE float get(const T *p) {
    uint32_t u = (uint32_t)*p << 16;
    float f;
    memcpy(&f, &u, sizeof f);
    return f;
}
#endif

// Of n <= VL numbers; what lies behind them is not touched.
INLINE vec load_part(const T *p, int n) {
    if (n == VL)
        return load(p);
    T part[VL] = {0};
    memcpy(part, p, n * sizeof(T));
    return load(part);
}

INLINE void store_part(T *p, vec v, int n) {
    if (n == VL) {
        store(p, v);
        return;
    }
    T part[VL];
    store(part, v);
    memcpy(p, part, n * sizeof(T));
}

INLINE float sum(vec v) {
    float lanes[VL];
    store_float(lanes, v);
#pragma GCC unroll 4
    for (int width = VL / 2; width; width /= 2)
#pragma GCC unroll 16
        for (int i = 0; i < width; i++)
            lanes[i] += lanes[i + width];
    return lanes[0];
}

typedef float quad __attribute__((vector_size(16)));
typedef int32_t qmask __attribute__((vector_size(16)));

// Each of four's sum, added up in the order of `sum`.
INLINE quad sums_of_four(const vec v[4]) {
    quad folded[4], halves[2];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        quad parts[VL / 4];
        memcpy(parts, v + i, sizeof parts);
#if VL == 16
        parts[0] += parts[2];
        parts[1] += parts[3];
#endif
        folded[i] = parts[0] + parts[1];
    }
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++)
        halves[i] = __builtin_shuffle(folded[2 * i], folded[2 * i + 1], (qmask){0, 1, 4, 5}) +
                    __builtin_shuffle(folded[2 * i], folded[2 * i + 1], (qmask){2, 3, 6, 7});
    return __builtin_shuffle(halves[0], halves[1], (qmask){0, 2, 4, 6}) +
           __builtin_shuffle(halves[0], halves[1], (qmask){1, 3, 5, 7});
}

INLINE float highest(vec v) {
    float lanes[VL], out;
    store_float(lanes, v);
    out = lanes[0];
    for (int i = 1; i < VL; i++)
        out = lanes[i] > out ? lanes[i] : out;
    return out;
}

// e^x for x <= 0 to some 2 units in the last place, 0 below -87 (Cephes' polynomial).
INLINE vec exp_negative(vec x) {
    vec clamped = larger(x, all(-87.0f));
    vec shifted = clamped * 1.44269504f + 12582912.0f; // 1.5·2^23: the whole number is in the low bits
    vec whole = shifted - 12582912.0f;
    vec r = clamped - whole * 0.693359375f + whole * 2.12194440e-4f;
    vec p = all(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return pick(x < -87.0f, all(0.0f), (vec)(((uvec)shifted << 23) + (uvec)p));
}
