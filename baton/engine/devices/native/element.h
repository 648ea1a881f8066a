/* What kernels compute with: two element types, sums in float32, and an exponential that vectorises.
 *
 * A kernel is written once for an element type `E` and compiled for both, by a pair of files:
 *
 *     elementwise.c:        #define BODY "elementwise_of.h"
 *                           #include "each_element.h"
 *     elementwise_of.h:     void OF_E(add_rms_norm)(const E *restrict x, ...) { ... y[i] = from_float(to_float(x[i]) * 2); ... }
 *
 * which makes add_rms_norm_bf16 and add_rms_norm_f32. Loops are plain C: with -O3 the compiler vectorises them for each level;
 * reductions in float32 need `#pragma omp simd reduction(+ : sum)`, for without it their order is that of the source.
 * Exported functions are C functions without a header of their own: the Python file that calls them keeps their argument types.
 */
#pragma once

#include <math.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))

typedef uint16_t bf16; /* the upper half of a float32 */

static inline float float_of_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline uint32_t bits_of_float(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline float bf16_to_float(bf16 x) { return float_of_bits((uint32_t)x << 16); }

/* To the nearest, ties to even, as torch rounds; the processor's own instruction would flush subnormals. NaN stays NaN if its
 * lower half is not all ones: that of arithmetic never is. */
static inline uint32_t bf16_upper_half(float x) {
    uint32_t bits = bits_of_float(x);
    return bits + 0x7fffu + ((bits >> 16) & 1u);
}

static inline bf16 bf16_from_float(float x) { return (bf16)(bf16_upper_half(x) >> 16); }

/* bf16_to_float(bf16_from_float(x)), for results that are rounded on the way and computed with again. */
static inline float bf16_rounded(float x) { return float_of_bits(bf16_upper_half(x) & 0xffff0000u); }

static inline float f32_to_float(float x) { return x; }
static inline float f32_from_float(float x) { return x; }
static inline float f32_rounded(float x) { return x; }

/* e ** x within 2 ulp for all floats: NaN stays NaN, what is too large is infinite, what is too small 0 or subnormal. */
static inline float exp_float(float x) {
    float in_range = x > 89.0f ? 89.0f : x < -104.0f ? -104.0f : x; /* comparisons so written that NaN falls through */
    float shifted = fmaf(in_range, 1.44269504f, 12582912.0f); /* 1.5 * 2 ** 23: the sum's last bits are the nearest integer */
    float n = shifted - 12582912.0f;
    float r = fmaf(n, -1.42860677e-6f, fmaf(n, -0.693145752f, in_range)); /* ln 2 in two parts */
    float p = fmaf(1.98412698e-4f, r, 1.38888889e-3f);
    p = fmaf(p, r, 8.33333333e-3f);
    p = fmaf(p, r, 4.16666667e-2f);
    p = fmaf(p, r, 1.66666667e-1f);
    p = fmaf(p, r, 0.5f);
    p = fmaf(p, r * r, r) + 1.0f;
    int32_t whole = (int32_t)(bits_of_float(shifted) & 0x7fffffu) - 0x400000, half = whole >> 1;
    /* In two factors, for 2 ** n may be infinite or subnormal where the product is neither. */
    float low = float_of_bits((uint32_t)(half + 127) << 23), high = float_of_bits((uint32_t)(whole - half + 127) << 23);
    return x != x ? x : p * low * high;
}
