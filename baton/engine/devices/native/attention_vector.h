/* The vectors of attention: their width, transposition, and the two operations all its time goes into, products and exponentials.
 *
 * Words are 4 bytes that lie in the order of the sum over them: one float, or two bfloat16 of which the first is the lower half.
 */
#pragma once

#include "element.h"

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

/* A register tile is ROWS x COLS vectors of sums: with COLS vectors of one operand and a broadcast of the other they fill the
 * registers, and there are enough of them to hide how long a multiply-add takes. */
#if defined(__AVX512F__)
#define LANES 16
#define COLS 4
#elif defined(__AVX2__)
#define LANES 8
#define COLS 2
#else
#define LANES 4
#define COLS 4
#endif
#define ROWS 6
#define STRAIGHT_ROWS 8 /* not fewer */

#define INLINE static inline __attribute__((always_inline))

typedef float vfloat __attribute__((vector_size(4 * LANES)));
typedef int32_t vint __attribute__((vector_size(4 * LANES)));

INLINE vfloat vload(const float *from) {
    vfloat x;
    memcpy(&x, from, sizeof x);
    return x;
}

INLINE void vstore(float *to, vfloat x) { memcpy(to, &x, sizeof x); }

INLINE vint vload_words(const uint32_t *from) {
    vint x;
    memcpy(&x, from, sizeof x);
    return x;
}

INLINE vfloat all(float x) { return x - (vfloat){0}; } /* not x + 0: that would lose the sign of -0 */

/* 0, 1, 2 ... */
INLINE vint ascending(void) {
    vint x;
    for (int i = 0; i < LANES; i++) x[i] = i;
    return x;
}

/* where ? x : y, lane by lane; `where` is what comparisons give. */
INLINE vfloat choose(vint where, vfloat x, vfloat y) { return (vfloat)(((vint)x & where) | ((vint)y & ~where)); }

/* The larger of two; if either is NaN, x. */
INLINE vfloat vmax(vfloat x, vfloat y) {
#if defined(__AVX512F__)
    return (vfloat)_mm512_max_ps((__m512)y, (__m512)x);
#elif defined(__AVX2__)
    return (vfloat)_mm256_max_ps((__m256)y, (__m256)x);
#else
    return choose(x < y, y, x);
#endif
}

INLINE float hmax(vfloat x) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps((__m512)x);
#else
    float most = x[0];
    for (int i = 1; i < LANES; i++) most = x[i] > most ? x[i] : most;
    return most;
#endif
}

/* In a fixed order, whatever the compiler. */
INLINE float hsum(vfloat x) {
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) x[i] += x[i + half];
    return x[0];
}

/* 2 ** x for x <= 0, within 2e-7 of it, exactly 1 for 0; 0 for what is below 2 ** -126; NaN stays NaN. */
INLINE vfloat vexp2(vfloat x) {
    vfloat shifted = x + 12582912.0f; /* 1.5 * 2 ** 23: the sum's last bits are the nearest integer */
    vfloat f = x - (shifted - 12582912.0f);
    vfloat p = f * 1.32647272e-3f + 9.67151264e-3f; /* minimax on [-1/2, 1/2], but for the last coefficient */
    p = p * f + 5.55073374e-2f;
    p = p * f + 2.40222421e-1f;
    p = p * f + 6.93146978e-1f;
    p = p * f + 1.0f;
    vfloat power = (vfloat)(((vint)shifted + 127) << 23);
    return choose(x < -126.0f, (vfloat){0}, p * power);
}

/* sum + the products of a's word with b's words. */
INLINE vfloat dot_floats(vfloat sum, uint32_t a, vint b) { return sum + float_of_bits(a) * (vfloat)b; }

INLINE vfloat dot_pairs(vfloat sum, uint32_t a, vint b) {
#if defined(__AVX512BF16__)
    return (vfloat)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32((int)a), (__m512bh)b);
#else
    sum += float_of_bits(a << 16) * (vfloat)(b << 16);
    return sum + float_of_bits(a & 0xffff0000u) * (vfloat)(b & (int32_t)0xffff0000u);
#endif
}

#if defined(__clang__)
#define ZIP(type, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define ZIP(type, a, b, ...) __builtin_shuffle(a, b, (type){__VA_ARGS__})
#endif

/* a0 b0 a1 b1 ... of the lower and of the upper halves: of words, and of their halves. */
typedef uint16_t vhalf __attribute__((vector_size(4 * LANES)));
#if LANES == 16
INLINE vint zip_low(vint a, vint b) { return ZIP(vint, a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23); }
INLINE vint zip_high(vint a, vint b) { return ZIP(vint, a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31); }
INLINE vhalf zip_low_halves(vhalf a, vhalf b) {
    return ZIP(vhalf, a, b, 0, 32, 1, 33, 2, 34, 3, 35, 4, 36, 5, 37, 6, 38, 7, 39, 8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14,
               46, 15, 47);
}
INLINE vhalf zip_high_halves(vhalf a, vhalf b) {
    return ZIP(vhalf, a, b, 16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55, 24, 56, 25, 57, 26, 58, 27, 59, 28, 60,
               29, 61, 30, 62, 31, 63);
}
#elif LANES == 8
INLINE vint zip_low(vint a, vint b) { return ZIP(vint, a, b, 0, 8, 1, 9, 2, 10, 3, 11); }
INLINE vint zip_high(vint a, vint b) { return ZIP(vint, a, b, 4, 12, 5, 13, 6, 14, 7, 15); }
INLINE vhalf zip_low_halves(vhalf a, vhalf b) { return ZIP(vhalf, a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23); }
INLINE vhalf zip_high_halves(vhalf a, vhalf b) { return ZIP(vhalf, a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31); }
#else
INLINE vint zip_low(vint a, vint b) { return ZIP(vint, a, b, 0, 4, 1, 5); }
INLINE vint zip_high(vint a, vint b) { return ZIP(vint, a, b, 2, 6, 3, 7); }
INLINE vhalf zip_low_halves(vhalf a, vhalf b) { return ZIP(vhalf, a, b, 0, 8, 1, 9, 2, 10, 3, 11); }
INLINE vhalf zip_high_halves(vhalf a, vhalf b) { return ZIP(vhalf, a, b, 4, 12, 5, 13, 6, 14, 7, 15); }
#endif

/* LANES vectors as a matrix, transposed in place but for the last round: column i and the next one, for even i, are zip_low and zip_high
 * of rows i / 2 and i / 2 + LANES / 2 of the result. Zipping row i with row i + LANES / 2 moves one bit of each word's row number into
 * its column number, so as many rounds as they have bits exchange the two. */
INLINE void transpose_nearly(vint *rows) {
#pragma GCC unroll 4
    for (int round = 2; round < LANES; round *= 2) {
        vint next[LANES];
#pragma GCC unroll 8
        for (int i = 0; i < LANES / 2; i++) {
            next[2 * i] = zip_low(rows[i], rows[i + LANES / 2]);
            next[2 * i + 1] = zip_high(rows[i], rows[i + LANES / 2]);
        }
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++) rows[i] = next[i];
    }
}
