/* Attention over blocks: prefill chunks and decode rows in one call, without a gather.
 *
 * A unit of work is the query heads of one KV head for some tokens of one sequence, over some of its keys. The keys come in tiles, and
 * are transposed, so that scores are sums in registers whose lanes are keys, while those of the result have dimensions as lanes. Where
 * many rows share a tile, which is what chunks are, it is packed for them once, at next to no cost; where they are few, as in decode,
 * it goes from memory into registers, and what counts is that the next tile is on its way meanwhile. Both add up the same in the same
 * order: a row has the same bits alone and in a chunk, however that was cut. Between scores and result runs the softmax of each row:
 * FlashAttention-2, https://arxiv.org/abs/2307.08691, algorithm 1.
 *
 * Contexts of few rows are cut into runs that threads share (flash decoding), merged in their order. Where rows are many they take
 * their runs one by one, and add them up likewise. So neither the number of threads nor what else is in the step changes a bit.
 */
#include <omp.h>

#include "attention.h"

/* How much scratch memory each thread needs, and how long a row of partial results is, in bytes and floats. */
EXPORT void attention_sizes(int32_t max_rows, int32_t key_dim, int32_t value_dim, int64_t *scratch_bytes, int64_t *partial_floats) {
    char *end = NULL;
    int64_t width = padded(value_dim, LANES);
    scratch_at(max_rows, key_dim, width, &end);
    *scratch_bytes = (int64_t)(intptr_t)end;
    *partial_floats = PARTIAL_OUT + width;
}

#define BODY "attention_of.h"
#include "each_element.h"
