/* What attention is told about a step, the memory that a thread works in, and where keys and values lie.
 *
 * cpu_native_attention.py has the other side of `struct step`, `item` and `merge`, and makes the memory.
 */
#pragma once

#include "attention_vector.h"

/* Keys of a context are taken in tiles, and tiles in runs, both at absolute positions: what is added up, and in which order, depends
 * on a row's own context alone. A run is what one thread takes at least of a sequence with few rows; cpu_units.py knows it too. */
#define TILE 64
#define RUN_KEYS 512

/* How many units a thread takes at once: the next one's keys are fetched while one is computed. */
#define UNITS_AT_ONCE 4

#define LOG2_E 1.44269504f

/* Query heads head ... head + num_heads - 1 of every KV head's group, for tokens token ... token + num_tokens - 1 of the step,
 * over keys start ... stop - 1 of their sequence, at least one. The first token sees `seen` keys of the sequence, each later token
 * one more. partial: where the first row of the result goes among each KV head's partial results; negative if the result is whole.
 */
struct item {
    int32_t sequence, token, num_tokens, head, num_heads, start, stop, seen, partial;
};

/* A row of partial results, `stride` rows apart, in order of their runs: that many, and whose they are. */
struct merge {
    int32_t token, head, partial, num_runs, stride;
};

/* Made once per step, for all its layers. Strides are in elements; keys and values themselves are dense. */
struct step {
    const int32_t *tables; /* [num_sequences, table_width] */
    const struct item *items;
    const struct merge *merges;
    float *partials; /* [num_kv_heads, partial_rows, PARTIAL_OUT + width] */
    char *scratch;   /* [num_threads, scratch_bytes], both divisible by 64 */
    int64_t scratch_bytes, partial_rows;
    int64_t key_strides[3], value_strides[3]; /* block, head, slot */
    int64_t query_strides[2];                 /* token, head */
    int64_t out_stride;                       /* token */
    int32_t num_items, num_merges, table_width, block_size, num_kv_heads, group, key_dim, value_dim, max_rows, num_threads;
};

/* An item for one KV head. */
struct unit {
    const struct item *item;
    int kv_head;
};

/* Up to TILE keys of a unit from `start` on, and where they and their values lie, in elements. */
struct tile {
    int start, count;
    int64_t keys[TILE], values[TILE];
};

/* The online softmax of rows, https://arxiv.org/abs/1805.02867: what they have seen so far. */
struct sums {
    float *most; /* [rows], the largest score */
    float *sum;  /* [rows, LANES], of 2 ** (score - most), lane by lane */
    float *out;  /* [rows, width], of the same times values */
};

struct scratch {
    uint32_t *queries; /* [rows, words of a key] */
    uint32_t *keys;    /* [words of a key, TILE] */
    uint32_t *values;  /* [TILE / elements of a word, width] */
    float *scores;     /* [STRAIGHT_ROWS, TILE] */
    uint32_t *shares;  /* [STRAIGHT_ROWS, TILE / elements of a word] */
    int32_t *seen;     /* [rows], how many keys of the sequence a row sees */
    struct sums run, total;
};

INLINE int64_t padded(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
INLINE int width_of(const struct step *step) { return (int)padded(step->value_dim, LANES); }

INLINE void *taken(char **at, int64_t bytes) {
    char *start = *at;
    *at += padded(bytes, 64);
    return start;
}

INLINE struct sums sums_at(char **at, int64_t rows, int64_t width) {
    float *most = taken(at, 4 * rows), *sum = taken(at, 4 * LANES * rows);
    return (struct sums){most, sum, taken(at, 4 * width * rows)};
}

/* Laid out for words of one element: those of two take half of it. *at ends up behind it. */
static inline struct scratch scratch_at(int64_t rows, int64_t key_dim, int64_t width, char **at) {
    uint32_t *queries = taken(at, 4 * rows * padded(key_dim, LANES));
    uint32_t *keys = taken(at, 4 * TILE * padded(key_dim, LANES));
    uint32_t *values = taken(at, 4 * TILE * width);
    float *scores = taken(at, 4 * STRAIGHT_ROWS * TILE);
    uint32_t *shares = taken(at, 4 * STRAIGHT_ROWS * TILE);
    int32_t *seen = taken(at, 4 * rows);
    struct sums run = sums_at(at, rows, width);
    return (struct scratch){queries, keys, values, scores, shares, seen, run, sums_at(at, rows, width)};
}

static inline struct scratch scratch_of(const struct step *step, int thread) {
    char *at = step->scratch + thread * step->scratch_bytes;
    return scratch_at(step->max_rows, step->key_dim, width_of(step), &at);
}

static inline struct unit unit_at(const struct step *step, int i) {
    return (struct unit){step->items + i / step->num_kv_heads, i % step->num_kv_heads};
}

INLINE int64_t place_of(const int64_t *strides, int64_t block, int64_t head, int64_t slot) {
    return block * strides[0] + head * strides[1] + slot * strides[2];
}

static inline void tile_at(const struct step *step, const struct unit *unit, int start, struct tile *tile) {
    const int32_t *table = step->tables + (int64_t)unit->item->sequence * step->table_width;
    int left = unit->item->stop - start, count = left < TILE ? left : TILE;
    int block = start / step->block_size, slot = start % step->block_size;
    for (int i = 0, end; i < count; i = end, block++, slot = 0) {
        end = step->block_size - slot < count - i ? i + step->block_size - slot : count;
        int64_t key = place_of(step->key_strides, table[block], unit->kv_head, slot - i);
        int64_t value = place_of(step->value_strides, table[block], unit->kv_head, slot - i);
        for (int j = i; j < end; j++) {
            tile->keys[j] = key + j * step->key_strides[2];
            tile->values[j] = value + j * step->value_strides[2];
        }
    }
    for (int i = count; i < padded(count, LANES); i++) tile->keys[i] = tile->keys[0]; /* something to read, for nobody */
    tile->start = start;
    tile->count = count;
}

/* How many keys of a tile a row sees; not positive if none. */
INLINE int seen_of(const struct scratch *scratch, int row, const struct tile *tile) {
    int seen = scratch->seen[row] - tile->start;
    return seen < tile->count ? seen : tile->count;
}

static inline void clear(struct sums *sums, int64_t rows, int64_t width) {
    for (int64_t i = 0; i < rows; i++) sums->most[i] = -INFINITY;
    memset(sums->sum, 0, (size_t)(4 * LANES * rows));
    memset(sums->out, 0, (size_t)(4 * width * rows));
}

/* What scores are taken relative to: the largest, or 0 while there is none, for -inf - -inf would be NaN. */
INLINE float origin(float most) { return most == -INFINITY ? 0.0f : most; }

/* Adds one row's sums over later keys to those over earlier ones. */
static inline void add_row(float *most, float *sum, float *out, float next_most, const float *next_sum, const float *next_out, int width) {
    float larger = next_most > *most ? next_most : *most, from = origin(larger);
    vfloat keep = vexp2(all(*most - from)), add = vexp2(all(next_most - from));
    *most = larger;
    vstore(sum, vload(sum) * keep + vload(next_sum) * add);
    for (int i = 0; i < width; i += LANES) vstore(out + i, vload(out + i) * keep + vload(next_out + i) * add);
}

/* Moves a run's sums into the total, and makes room for the next one. */
static inline void end_run(const struct step *step, struct scratch *scratch, int rows, bool is_first, bool is_last) {
    struct sums *run = &scratch->run, *total = &scratch->total;
    int width = width_of(step);
    if (is_first) {
        struct sums done = *run;
        *run = *total;
        *total = done;
    } else {
        for (int64_t i = 0; i < rows; i++) {
            int64_t sum = i * LANES, out = i * width;
            add_row(total->most + i, total->sum + sum, total->out + out, run->most[i], run->sum + sum, run->out + out, width);
        }
    }
    if (!is_last) clear(run, rows, width);
}

/* A partial result: the largest score, then from here on the sum by lanes, then from there on the weighted values. */
#define PARTIAL_SUM LANES
#define PARTIAL_OUT (2 * LANES)

INLINE float *partial_at(const struct step *step, int kv_head, int64_t row) {
    return step->partials + (kv_head * step->partial_rows + row) * (PARTIAL_OUT + width_of(step));
}

static inline void keep_partial(const struct step *step, float *to, float most, const float *sum, const float *out) {
    to[0] = most;
    memcpy(to + PARTIAL_SUM, sum, 4 * LANES);
    memcpy(to + PARTIAL_OUT, out, sizeof(float) * (size_t)width_of(step));
}
