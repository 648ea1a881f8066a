/* Attention for one element type; see attention.c. */

#define PER_WORD (E_IS_BF16 ? 2 : 1)

/* Words of a key, padded with zeros to whole vectors. */
INLINE int OF_E(words_of)(const struct step *step) { return (int)padded((step->key_dim + PER_WORD - 1) / PER_WORD, LANES); }

INLINE vfloat OF_E(dot)(vfloat sum, uint32_t a, vint b) { return E_IS_BF16 ? dot_pairs(sum, a, b) : dot_floats(sum, a, b); }

/* LANES words of a row from element `from` on, zeros beyond `dim`. */
INLINE vint OF_E(words)(const E *row, int from, int dim) {
    vint x = {0};
    if (from + LANES * PER_WORD <= dim)
        memcpy(&x, row + from, sizeof x);
    else if (from < dim)
        memcpy(&x, row + from, (size_t)(dim - from) * sizeof(E));
    return x;
}

/* c[rows, COLS vectors] (+)= a[rows, depth] b[depth, ...]. Rows and columns are constants where this is inlined, so that the sums stay
 * in registers. Every sum is one chain of additions in order of depth: how rows are cut into tiles changes no bit.
 * adds: c is multiplied by factor[row] first; otherwise c is overwritten and the result multiplied by factor[0]. */
INLINE void OF_E(tile)(int rows, int cols, bool adds, const uint32_t *a, int64_t a_stride, const uint32_t *b, int64_t b_stride, int depth,
                       const float *factor, float *c, int64_t c_stride) {
    vfloat sums[ROWS][COLS];
#pragma GCC unroll 8
    for (int row = 0; row < rows; row++)
#pragma GCC unroll 8
        for (int col = 0; col < cols; col++)
            sums[row][col] = adds ? vload(c + row * c_stride + col * LANES) * factor[row] : (vfloat){0};
    for (int step = 0; step < depth; step++, b += b_stride) {
        vint of_b[COLS];
#pragma GCC unroll 8
        for (int col = 0; col < cols; col++) of_b[col] = vload_words(b + col * LANES);
#pragma GCC unroll 8
        for (int row = 0; row < rows; row++)
#pragma GCC unroll 8
            for (int col = 0; col < cols; col++) sums[row][col] = OF_E(dot)(sums[row][col], a[row * a_stride + step], of_b[col]);
    }
#pragma GCC unroll 8
    for (int row = 0; row < rows; row++)
#pragma GCC unroll 8
        for (int col = 0; col < cols; col++) vstore(c + row * c_stride + col * LANES, adds ? sums[row][col] : sums[row][col] * factor[0]);
}

#define TILE_ROWS_CASE(n) \
    case n: OF_E(tile)(n, cols, adds, a, a_stride, b, b_stride, depth, factor, c, c_stride); break;

INLINE void OF_E(tile_rows)(int rows, int cols, bool adds, const uint32_t *a, int64_t a_stride, const uint32_t *b, int64_t b_stride,
                            int depth, const float *factor, float *c, int64_t c_stride) {
    switch (rows) {
        TILE_ROWS_CASE(1)
        TILE_ROWS_CASE(2)
        TILE_ROWS_CASE(3)
        TILE_ROWS_CASE(4)
        TILE_ROWS_CASE(5)
        TILE_ROWS_CASE(6)
    }
}
#undef TILE_ROWS_CASE

/* The same over `width` columns, a whole number of vectors. */
INLINE void OF_E(product)(int rows, int width, bool adds, const uint32_t *a, int64_t a_stride, const uint32_t *b, int64_t b_stride,
                          int depth, const float *factor, float *c, int64_t c_stride) {
    int at = 0;
    for (; at + COLS * LANES <= width; at += COLS * LANES)
        OF_E(tile_rows)(rows, COLS, adds, a, a_stride, b + at, b_stride, depth, factor, c + at, c_stride);
    for (; COLS > 2 && at + 2 * LANES <= width; at += 2 * LANES)
        OF_E(tile_rows)(rows, 2, adds, a, a_stride, b + at, b_stride, depth, factor, c + at, c_stride);
    for (; at < width; at += LANES) OF_E(tile_rows)(rows, 1, adds, a, a_stride, b + at, b_stride, depth, factor, c + at, c_stride);
}

/* Of places first ... first + num - 1 of what comes next, elements from ... to - 1, for no processor guesses where the next block is. Into
 * the second-level cache: the misses that the first one can have under way at a time are too few to keep memory busy. */
INLINE void OF_E(fetch)(const E *of, const int64_t *places, int first, int num, int count, int from, int to) {
    int end = first + num < count ? first + num : count;
    for (int i = first; i < end; i++)
        for (int at = from; at < to; at += 64 / (int)sizeof(E)) __builtin_prefetch(of + places[i] + at, 0, 2);
}

/* LANES keys of a tile from the `first` on, LANES words of each from element `from` on, nearly transposed: lanes become keys. */
INLINE void OF_E(key_columns)(const E *keys, const struct tile *tile, int first, int from, int dim, vint *rows) {
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) rows[i] = OF_E(words)(keys + tile->keys[first + i], from, dim);
    transpose_nearly(rows);
}

/* Keys of a tile -> [words of a key, TILE]: lanes are keys. */
static void OF_E(pack_keys)(const struct step *step, const E *keys, const struct tile *tile, const struct tile *ahead, uint32_t *packed) {
    for (int first = 0; first < TILE; first += LANES) {
        OF_E(fetch)(keys, ahead->keys, first, LANES, ahead->count, 0, step->key_dim);
        if (first >= tile->count) continue;
        for (int from = 0; from < OF_E(words_of)(step); from += LANES) {
            vint rows[LANES];
            OF_E(key_columns)(keys, tile, first, from * PER_WORD, step->key_dim, rows);
            uint32_t *to = packed + from * TILE + first;
#pragma GCC unroll 8
            for (int i = 0; i < LANES / 2; i++, to += 2 * TILE) {
                vint low = zip_low(rows[i], rows[i + LANES / 2]), high = zip_high(rows[i], rows[i + LANES / 2]);
                memcpy(to, &low, sizeof low);
                memcpy(to + TILE, &high, sizeof high);
            }
        }
    }
}

/* Element i of the first row beside element i of the second: LANES words from element `from` on. */
INLINE vint OF_E(pairs)(const E *first, const E *second, int from, int dim) {
    typedef uint16_t half __attribute__((vector_size(2 * LANES)));
    half low = {0}, high = {0};
    if (from + LANES <= dim) {
        memcpy(&low, first + from, sizeof low);
        if (second) memcpy(&high, second + from, sizeof high);
    } else if (from < dim) {
        memcpy(&low, first + from, (size_t)(dim - from) * 2);
        if (second) memcpy(&high, second + from, (size_t)(dim - from) * 2);
    }
    return __builtin_convertvector(low, vint) | __builtin_convertvector(high, vint) << 16;
}

/* `cols` vectors of words of values from element `from` on: of one key, or of two that share words, the second of which may be NULL. */
INLINE void OF_E(value_words)(int cols, const E *first, const E *second, int from, int dim, vint *to) {
    if (E_IS_BF16 && cols % 2 == 0 && second && from + cols * LANES <= dim) {
#pragma GCC unroll 8
        for (int col = 0; col < cols; col += 2) {
            vhalf low, high;
            memcpy(&low, first + from + col * LANES, sizeof low);
            memcpy(&high, second + from + col * LANES, sizeof high);
            to[col] = (vint)zip_low_halves(low, high);
            to[col + 1] = (vint)zip_high_halves(low, high);
        }
        return;
    }
#pragma GCC unroll 8
    for (int col = 0; col < cols; col++)
        to[col] = E_IS_BF16 ? OF_E(pairs)(first, second, from + col * LANES, dim) : OF_E(words)(first, from + col * LANES, dim);
}

/* Values of a tile -> [words of keys, width]: lanes are dimensions. Rows from `count` on count as zeros: what is in slots that a row does
 * not see may be anything, and 0 times NaN is NaN. */
static void OF_E(pack_values)(const struct step *step, const E *values, const struct tile *tile, int count, const struct tile *ahead,
                              uint32_t *packed) {
    int dim = step->value_dim, width = width_of(step);
    for (int key = 0; key < TILE; key += PER_WORD) {
        OF_E(fetch)(values, ahead->values, key, PER_WORD, ahead->count, 0, dim);
        if (key >= count) continue;
        const E *first = values + tile->values[key], *second = key + 1 < count ? values + tile->values[key + 1] : NULL;
        for (int from = 0; from < width; from += 2 * LANES) {
            vint x[2];
            OF_E(value_words)(2, first, second, from, dim, x);
            memcpy(packed + key / PER_WORD * width + from, x, from + LANES < width ? sizeof x : sizeof x[0]);
        }
    }
}

/* Whether a value of the tile is infinite or NaN. */
static bool OF_E(is_wild)(const struct step *step, const E *values, const struct tile *tile) {
    int wild = 0;
    for (int key = 0; key < tile->count; key++)
        for (int i = 0; i < step->value_dim; i++) {
            float x = to_float(values[tile->values[key] + i]);
            wild |= x - x != 0.0f;
        }
    return wild;
}

INLINE void OF_E(store_shares)(uint32_t *to, int at, vfloat x) {
#if E_IS_BF16 && defined(__AVX512BF16__)
    __m256bh rounded = _mm512_cvtneps_pbh((__m512)x);
    memcpy((bf16 *)to + at, &rounded, sizeof rounded);
#else
    for (int i = 0; i < LANES; i++) ((E *)to)[at + i] = from_float(x[i]);
#endif
}

/* One row's scores, relative to `from` -> shares, and their sum added to `sum`. */
INLINE vfloat OF_E(shares_of)(const float *scores, int width, float from, vfloat sum, uint32_t *shares) {
    for (int at = 0; at < width; at += LANES) {
        vfloat share = vexp2(vload(scores + at) - from);
        sum += share;
        OF_E(store_shares)(shares, at, share);
    }
    return sum;
}

/* The largest of a row's scores; those it does not see become -inf. */
INLINE float OF_E(largest)(float *scores, int width, int seen, float most) {
    vfloat larger = all(most);
    for (int at = 0; at < width; at += LANES) {
        vfloat x = vload(scores + at);
        if (seen < at + LANES) {
            x = choose(ascending() + at < seen, x, all(-INFINITY));
            vstore(scores + at, x);
        }
        larger = vmax(larger, x);
    }
    return hmax(larger);
}

/* Scores of rows, up to STRAIGHT_ROWS, over a tile -> shares of those keys that they see; keep: what becomes of what they had before. */
static void OF_E(soften)(const struct scratch *scratch, int row, int rows, const struct tile *tile, int width, float *keep) {
    float *most = scratch->run.most + row, *sum = scratch->run.sum + row * LANES, from[STRAIGHT_ROWS];
    for (int i = 0; i < rows; i++) {
        float larger = OF_E(largest)(scratch->scores + i * TILE, width, scratch->seen[row + i] - tile->start, most[i]);
        from[i] = origin(larger);
        keep[i] = most[i] - from[i];
        most[i] = larger;
    }
    for (int i = 0; i < rows; i += LANES) vstore(keep + i, vexp2(vload(keep + i)));
    for (int i = 0; i < rows; i++) {
        uint32_t *shares = scratch->shares + i * (TILE / PER_WORD);
        vfloat kept = vload(sum + i * LANES) * keep[i];
        vstore(sum + i * LANES, OF_E(shares_of)(scratch->scores + i * TILE, width, from[i], kept, shares));
    }
}

/* Rows row ... row + rows - 1 of a unit, up to ROWS, over one packed tile. */
static void OF_E(add_packed)(const struct step *step, const struct scratch *scratch, int row, int rows, const struct tile *tile,
                             float scale) {
    int words = OF_E(words_of)(step), width = width_of(step), seen = seen_of(scratch, row + rows - 1, tile);
    if (seen <= 0) return;
    float keep[STRAIGHT_ROWS + LANES] = {0};
    OF_E(product)(rows, (int)padded(seen, LANES), false, scratch->queries + (int64_t)row * words, words, scratch->keys, TILE, words, &scale,
                  scratch->scores, TILE);
    OF_E(soften)(scratch, row, rows, tile, (int)padded(seen, LANES), keep);
    OF_E(product)(rows, width, true, scratch->shares, TILE / PER_WORD, scratch->values, width, (seen + PER_WORD - 1) / PER_WORD, keep,
                  scratch->run.out + (int64_t)row * width, width);
}

/* What pack_keys and product do, without the way through memory. */
INLINE void OF_E(straight_scores)(int rows, const struct step *step, const struct scratch *scratch, const E *keys, const struct tile *tile,
                                  const struct tile *ahead, int count, float scale) {
    int dim = step->key_dim, words = OF_E(words_of)(step);
    for (int first = 0; first < TILE; first += LANES) {
        if (first >= count) {
            OF_E(fetch)(keys, ahead->keys, first, LANES, ahead->count, 0, dim);
            continue;
        }
        vfloat sums[STRAIGHT_ROWS];
#pragma GCC unroll 8
        for (int row = 0; row < rows; row++) sums[row] = (vfloat){0};
        for (int from = 0; from < words; from += LANES) {
            vint of_key[LANES];
            const uint32_t *queries = scratch->queries + from;
            OF_E(key_columns)(keys, tile, first, from * PER_WORD, dim, of_key);
            OF_E(fetch)(keys, ahead->keys, first, LANES, ahead->count, from * PER_WORD, (from + LANES) * PER_WORD);
#pragma GCC unroll 8
            for (int i = 0; i < LANES / 2; i++, queries += 2) { /* the last round: a column is used where it comes to be */
                vint low = zip_low(of_key[i], of_key[i + LANES / 2]), high = zip_high(of_key[i], of_key[i + LANES / 2]);
#pragma GCC unroll 8
                for (int row = 0; row < rows; row++) sums[row] = OF_E(dot)(sums[row], queries[row * words], low);
#pragma GCC unroll 8
                for (int row = 0; row < rows; row++) sums[row] = OF_E(dot)(sums[row], queries[row * words + 1], high);
            }
        }
#pragma GCC unroll 8
        for (int row = 0; row < rows; row++) vstore(scratch->scores + row * TILE + first, sums[row] * scale);
    }
}

/* What pack_values and product do, without the way through memory, for `cols` vectors from element `from` on. */
INLINE void OF_E(straight_values)(int rows, int cols, const struct step *step, const struct scratch *scratch, const E *values,
                                  const struct tile *tile, const struct tile *ahead, int count, const float *keep, int from) {
    int width = width_of(step);
    float *out = scratch->run.out + from;
    vfloat sums[STRAIGHT_ROWS][COLS];
#pragma GCC unroll 8
    for (int row = 0; row < rows; row++)
#pragma GCC unroll 8
        for (int col = 0; col < cols; col++) sums[row][col] = vload(out + row * width + col * LANES) * keep[row];
    for (int key = 0; key < count; key += PER_WORD) {
        vint words[COLS];
        const E *first = values + tile->values[key], *second = key + 1 < count ? values + tile->values[key + 1] : NULL;
        OF_E(value_words)(cols, first, second, from, step->value_dim, words);
        OF_E(fetch)(values, ahead->values, key, PER_WORD, ahead->count, from, from + cols * LANES);
#pragma GCC unroll 8
        for (int row = 0; row < rows; row++)
#pragma GCC unroll 8
            for (int col = 0; col < cols; col++)
                sums[row][col] = OF_E(dot)(sums[row][col], scratch->shares[row * (TILE / PER_WORD) + key / PER_WORD], words[col]);
    }
#pragma GCC unroll 8
    for (int row = 0; row < rows; row++)
#pragma GCC unroll 8
        for (int col = 0; col < cols; col++) vstore(out + row * width + col * LANES, sums[row][col]);
}

INLINE void OF_E(straight_rows)(int rows, const struct step *step, const struct scratch *scratch, const E *keys, const E *values,
                                const struct tile *tile, const struct tile *ahead, float scale) {
    int seen = seen_of(scratch, rows - 1, tile), from = 0, width = width_of(step);
    float keep[STRAIGHT_ROWS + LANES] = {0};
    OF_E(fetch)(values, ahead->values, seen, TILE - seen, ahead->count, 0, step->value_dim);
    OF_E(straight_scores)(rows, step, scratch, keys, tile, ahead, seen, scale);
    if (seen <= 0) return;
    OF_E(soften)(scratch, 0, rows, tile, (int)padded(seen, LANES), keep);
    const int cols = rows <= ROWS ? COLS : COLS / 2; /* as many as there are registers for */
    for (; from + cols * LANES <= width; from += cols * LANES)
        OF_E(straight_values)(rows, cols, step, scratch, values, tile, ahead, seen, keep, from);
    for (; from < width; from += LANES) OF_E(straight_values)(rows, 1, step, scratch, values, tile, ahead, seen, keep, from);
}

#define STRAIGHT_CASE(n) \
    case n: OF_E(straight_rows)(n, step, scratch, keys, values, tile, ahead, scale); break;

/* All rows of a unit, up to STRAIGHT_ROWS, over one tile: what is shared by no more rows than registers hold need not be packed. */
static void OF_E(add_straight)(int rows, const struct step *step, const struct scratch *scratch, const E *keys, const E *values,
                               const struct tile *tile, const struct tile *ahead, float scale) {
    switch (rows) {
        STRAIGHT_CASE(1)
        STRAIGHT_CASE(2)
        STRAIGHT_CASE(3)
        STRAIGHT_CASE(4)
        STRAIGHT_CASE(5)
        STRAIGHT_CASE(6)
        STRAIGHT_CASE(7)
        STRAIGHT_CASE(8)
    }
}
#undef STRAIGHT_CASE

/* All rows of a unit over one tile. */
static void OF_E(add_tile)(const struct step *step, const struct scratch *scratch, int rows, const E *keys, const E *values,
                           const struct tile *tile, const struct tile *ahead, float scale) {
    bool all_see_all = scratch->seen[0] >= tile->start + tile->count, is_tame = all_see_all || !OF_E(is_wild)(step, values, tile);
    if (rows <= STRAIGHT_ROWS && is_tame) {
        OF_E(add_straight)(rows, step, scratch, keys, values, tile, ahead, scale);
        return;
    }
    OF_E(pack_keys)(step, keys, tile, ahead, scratch->keys);
    if (is_tame) {
        OF_E(pack_values)(step, values, tile, tile->count, ahead, scratch->values);
        for (int row = 0, some; row < rows; row += some) {
            some = rows - row < ROWS ? rows - row : ROWS;
            OF_E(add_packed)(step, scratch, row, some, tile, scale);
        }
        return;
    }
    for (int row = 0; row < rows; row++) { /* each with its own keys only, lest later ones spoil it */
        OF_E(pack_values)(step, values, tile, seen_of(scratch, row, tile), ahead, scratch->values);
        OF_E(add_packed)(step, scratch, row, 1, tile, scale);
    }
}

/* A unit's queries as words, and what each sees. Row after row: heads of a token, then the next token. */
static void OF_E(take_queries)(const struct step *step, const struct item *item, const E *queries, struct scratch *scratch) {
    int words = OF_E(words_of)(step), row = 0;
    for (int token = 0; token < item->num_tokens; token++)
        for (int head = 0; head < item->num_heads; head++, row++) {
            uint32_t *to = scratch->queries + (int64_t)row * words;
            size_t bytes = (size_t)step->key_dim * sizeof(E);
            memcpy(to, queries + token * step->query_strides[0] + head * step->query_strides[1], bytes);
            memset((char *)to + bytes, 0, (size_t)words * 4 - bytes);
            scratch->seen[row] = item->seen + token;
        }
}

static void OF_E(write_row)(const float *sum, const float *out, int dim, E *to) {
    float inverse = 1.0f / hsum(vload(sum));
    for (int i = 0; i < dim; i++) to[i] = from_float(out[i] * inverse);
}

/* Runs of a unit -> total. Each starts from nothing and is added when it is done, as if another thread had done it. */
static void OF_E(add_runs)(const struct step *step, const struct unit *unit, const struct unit *after, const E *keys, const E *values,
                           struct scratch *scratch, float scale) {
    const struct item *item = unit->item;
    int rows = item->num_tokens * item->num_heads;
    struct tile tiles[2], *tile = tiles, *ahead = tiles + 1;
    tile_at(step, unit, item->start, tile);
    clear(&scratch->run, rows, width_of(step));
    for (;;) {
        int next = tile->start + tile->count;
        if (next < item->stop)
            tile_at(step, unit, next, ahead);
        else
            tile_at(step, after, after->item->start, ahead);
        OF_E(add_tile)(step, scratch, rows, keys, values, tile, ahead, scale);
        if (next == item->stop || next % RUN_KEYS == 0) end_run(step, scratch, rows, next <= item->start + RUN_KEYS, next == item->stop);
        if (next == item->stop) return;
        struct tile *done = tile;
        tile = ahead;
        ahead = done;
    }
}

static void OF_E(attend_unit)(const struct step *step, const struct unit *unit, const struct unit *after, const E *queries, const E *keys,
                              const E *values, E *out, struct scratch *scratch, float scale) {
    const struct item *item = unit->item;
    int first = unit->kv_head * step->group + item->head;
    OF_E(take_queries)(step, item, queries + item->token * step->query_strides[0] + first * step->query_strides[1], scratch);
    OF_E(add_runs)(step, unit, after, keys, values, scratch, scale);
    for (int row = 0; row < item->num_tokens * item->num_heads; row++) {
        const struct sums *total = &scratch->total;
        const float *sum = total->sum + row * LANES, *of_row = total->out + (int64_t)row * width_of(step);
        int token = item->token + row / item->num_heads, head = first + row % item->num_heads;
        if (item->partial < 0)
            OF_E(write_row)(sum, of_row, step->value_dim, out + token * step->out_stride + (int64_t)head * step->value_dim);
        else
            keep_partial(step, partial_at(step, unit->kv_head, item->partial + row), total->most[row], sum, of_row);
    }
}

static void OF_E(merge_row)(const struct step *step, const struct merge *merge, int kv_head, E *out) {
    float *total = partial_at(step, kv_head, merge->partial);
    for (int run = 1; run < merge->num_runs; run++) {
        const float *next = partial_at(step, kv_head, merge->partial + run * merge->stride);
        add_row(total, total + PARTIAL_SUM, total + PARTIAL_OUT, next[0], next + PARTIAL_SUM, next + PARTIAL_OUT, width_of(step));
    }
    int64_t head = (int64_t)kv_head * step->group + merge->head;
    E *to = out + merge->token * step->out_stride + head * step->value_dim;
    OF_E(write_row)(total + PARTIAL_SUM, total + PARTIAL_OUT, step->value_dim, to);
}

/* Causal attention of a step's queries over blocks; see BlockAttention.attend. Made for many layers: step says what they share. */
EXPORT void OF_E(attend)(const struct step *step, const E *queries, const E *keys, const E *values, E *out, float scale) {
    int num_units = step->num_items * step->num_kv_heads, num_merges = step->num_merges * step->num_kv_heads;
#pragma omp parallel num_threads(step->num_threads)
    {
        struct scratch scratch = scratch_of(step, omp_get_thread_num());
#pragma omp for schedule(dynamic, UNITS_AT_ONCE)
        for (int i = 0; i < num_units; i++) {
            struct unit unit = unit_at(step, i), after = unit_at(step, i + 1 < num_units ? i + 1 : i);
            OF_E(attend_unit)(step, &unit, &after, queries, keys, values, out, &scratch, scale * LOG2_E);
        }
#pragma omp for schedule(static)
        for (int i = 0; i < num_merges; i++)
            OF_E(merge_row)(step, step->merges + i / step->num_kv_heads, i % step->num_kv_heads, out);
    }
}

#undef PER_WORD
