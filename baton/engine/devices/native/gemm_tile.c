/* The register tile of all matrix products. See gemm.h for the packed form. */
#include "gemm.h"

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));

/* sums + a * b, where words are one float or two bfloat16. */
INLINE Floats dot(Floats sums, uint32_t a, Words b, bool is_bf16) {
    if (!is_bf16) return sums + float_of_bits(a) * (Floats)b;
#if defined(__AVX512BF16__)
    return (Floats)_mm512_dpbf16_ps((__m512)sums, (__m512bh)_mm512_set1_epi32((int)a), (__m512bh)b);
#else
    sums += float_of_bits(a << 16) * (Floats)(b << 16);
    return sums + float_of_bits(a & 0xffff0000u) * (Floats)(b & 0xffff0000u);
#endif
}

/* m and is_bf16 are constants where this is inlined, so that sums stay in registers. */
INLINE void tile_of(const char *const *rows, int m, const char *panel, long k, float (*out)[PANEL], bool is_bf16) {
    Floats sums[TILE_ROWS][2];
    long whole = is_bf16 ? k / 2 : k;
#pragma GCC unroll 16
    for (int i = 0; i < m; i++) sums[i][0] = sums[i][1] = (Floats){0};
#pragma GCC unroll 4
    for (long step = 0; step < whole; step++, panel += STEP_BYTES) {
        Words b0 = ((const Words *)panel)[0], b1 = ((const Words *)panel)[1];
#pragma GCC unroll 16
        for (int i = 0; i < m; i++) {
            uint32_t a;
            memcpy(&a, rows[i] + 4 * step, 4);
            sums[i][0] = dot(sums[i][0], a, b0, is_bf16);
            sums[i][1] = dot(sums[i][1], a, b1, is_bf16);
        }
    }
    if (is_bf16 && k % 2) {
#pragma GCC unroll 16
        for (int i = 0; i < m; i++) {
            bf16 last;
            memcpy(&last, rows[i] + 4 * whole, 2);
            sums[i][0] = dot(sums[i][0], last, ((const Words *)panel)[0], is_bf16);
            sums[i][1] = dot(sums[i][1], last, ((const Words *)panel)[1], is_bf16);
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < m; i++) { /* one by one: a copy of both would make the compiler keep sums in memory */
        memcpy(out[i], &sums[i][0], sizeof(Floats));
        memcpy(out[i] + LANES, &sums[i][1], sizeof(Floats));
    }
}

#define TILE(m) \
    case m: tile_of(rows, m, panel, k, sums, is_bf16); break;

INLINE void tile(const char *const *rows, int m, const char *panel, long k, float (*sums)[PANEL], bool is_bf16) {
    switch (m) {
        TILE(1) TILE(2) TILE(3) TILE(4)
#if !defined(__AVX2__) || defined(__AVX512F__)
        TILE(5) TILE(6) TILE(7) TILE(8)
#endif
#if defined(__AVX512F__)
        TILE(9) TILE(10) TILE(11) TILE(12) TILE(13) TILE(14)
#endif
    }
}

void tile_bf16(const char *const *rows, int m, const char *panel, long k, float (*sums)[PANEL]) { tile(rows, m, panel, k, sums, true); }
void tile_f32(const char *const *rows, int m, const char *panel, long k, float (*sums)[PANEL]) { tile(rows, m, panel, k, sums, false); }
