/* Matrix products over packed weights: what linear maps (gemm.c) and experts (moe.c) share.
 *
 * Weights [n, k] lie packed in panels of PANEL outputs. A panel holds, step by step along k, PANEL words of 4 bytes: one float each,
 * or two bfloat16 neighbours along k. So a step costs one broadcast of 4 bytes a row and two vector products, whatever the type. An
 * odd k is filled up with a zero, outputs beyond n with zeros. Gated weights alternate: a panel of the gate, one of what it gates.
 *
 * Every output is one chain of additions in float32 in the order of k, whatever the number of rows: a row's result does not depend
 * on its batch, nor on the number of threads.
 */
#pragma once

#include "element.h"

#if defined(__AVX512F__)
enum { LANES = 16, TILE_ROWS = 14 }; /* 28 of 32 registers hold sums, 2 weights, 1 an activation */
#elif defined(__AVX2__)
enum { LANES = 8, TILE_ROWS = 4 }; /* 8 of 16; bfloat16 takes 4 more for weights, 2 for activations */
#else
enum { LANES = 4, TILE_ROWS = 8 };
#endif
enum { PANEL = 2 * LANES, STEP_BYTES = 4 * PANEL };

/* k in steps, and in bytes of a row, by element size. */
static inline long steps_of(long k, long size) { return (k * size + 3) / 4; }
static inline long panels_of(long n) { return (n + PANEL - 1) / PANEL; }
static inline long panel_bytes(long k, long size) { return steps_of(k, size) * STEP_BYTES; }

/* sums[i][j] = rows[i] . output j of the panel, for i < m <= TILE_ROWS. */
void tile_bf16(const char *const *rows, int m, const char *panel, long k, float (*sums)[PANEL]);
void tile_f32(const char *const *rows, int m, const char *panel, long k, float (*sums)[PANEL]);

/* One product: out [.., n] = x [.., k] @ weights transposed (+ bias), or with gated weights silu(gate) * up, all of them + bias.
 * index: where it is given, row i of the product is row index[i] of x. Row strides in bytes; within rows all is contiguous.
 */
typedef struct {
    const char *x, *packed, *bias;
    const int32_t *index;
    char *out;
    long n, k, x_stride, out_stride;
    bool gated;
} Product;

/* Rows of this many bytes fall into so few sets of the L1 cache that a tile's rows push each other out; with PAD_BYTES between, not. */
enum { PAD_BYTES = 64 };
static inline bool collides(long row_bytes) { return row_bytes % 2048 == 0; }

/* A copy of x [m, row_bytes] with PAD_BYTES between its rows, for the caller to free. NULL without memory: then x itself must do. */
char *spread(const char *x, long m, long row_bytes, int threads);

/* How many rows of activations to take while panels go by: as many as stay in a core's L2, and enough to make reading panels cheap. */
static inline long row_block(long row_bytes) {
    long fitting = (128 << 10) / row_bytes / TILE_ROWS, least = 128 / TILE_ROWS;
    return (fitting > least ? fitting : least) * TILE_ROWS;
}

/* Rows first ... stop - 1 of the outputs that panels from ... to - 1 make. */
void product_bf16(const Product *p, long first, long stop, long from, long to);
void product_f32(const Product *p, long first, long stop, long from, long to);
