/* Kernels of elementwise.c for one element type; see element.h. Rows are dense unless a stride is given; strides are in elements. */

#ifndef ELEMENTWISE_ONCE
#define ELEMENTWISE_ONCE

enum { SHARED_FROM = 1 << 16, RUN = 512, LANES = 16 }; /* with fewer elements, waking another thread costs more than it saves */

/* What `enter` needs and no layer changes. slots: where each token's part of the first head lies, counted from the part's start. */
typedef struct {
    int64_t num_tokens, num_kv_heads, dim, head_stride;
    const int64_t *slots;
} Entry;

#endif

/* 1 / root of the mean square, in float32. In lanes that are folded at the end: one sum would have to wait for itself. */
static inline float OF_E(inverse_rms)(const E *restrict x, int64_t width, float eps) {
    float lanes[LANES] = {0};
    int64_t start = 0;
    for (; start + LANES <= width; start += LANES)
        for (int64_t i = 0; i < LANES; i++) lanes[i] += to_float(x[start + i]) * to_float(x[start + i]);
    for (; start < width; start++) lanes[start % LANES] += to_float(x[start]) * to_float(x[start]);
    for (int half = LANES / 2; half > 0; half /= 2)
        for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];
    return 1.0f / sqrtf(lanes[0] / (float)width + eps);
}

/* Rounded before the weight and after it, as in transformers. */
static inline void OF_E(normed)(const E *restrict x, const E *restrict weight, int64_t width, float eps, E *restrict out) {
    float inverse = OF_E(inverse_rms)(x, width, eps);
    for (int64_t i = 0; i < width; i++) out[i] = from_float(to_float(weight[i]) * rounded(to_float(x[i]) * inverse));
}

EXPORT void OF_E(rms_norm)(const E *x, int64_t stride, const E *weight, int64_t rows, int64_t width, float eps, E *out) {
#pragma omp parallel for if (rows * width > SHARED_FROM)
    for (int64_t row = 0; row < rows; row++) OF_E(normed)(x + row * stride, weight, width, eps, out + row * width);
}

static inline void OF_E(added)(E *restrict total, const E *restrict x, int64_t width) {
    for (int64_t i = 0; i < width; i++) total[i] = from_float(to_float(total[i]) + to_float(x[i]));
}

/* total += x; out = norm of total. */
EXPORT void OF_E(add_rms_norm)(const E *x, E *total, const E *weight, int64_t rows, int64_t width, float eps, E *out) {
#pragma omp parallel for if (rows * width > SHARED_FROM)
    for (int64_t row = 0; row < rows; row++) {
        OF_E(added)(total + row * width, x + row * width, width);
        OF_E(normed)(total + row * width, weight, width, eps, out + row * width);
    }
}

static inline void OF_E(gated)(const E *restrict gate, const E *restrict up, int64_t width, E *restrict out) {
    for (int64_t i = 0; i < width; i++) {
        float x = to_float(gate[i]);
        float silu = rounded(x / (1.0f + exp_float(-x)));
        out[i] = from_float(silu * to_float(up[i]));
    }
}

/* gate_up: [rows, 2 * width] -> out [rows, width]. */
EXPORT void OF_E(silu_mul)(const E *gate_up, int64_t rows, int64_t width, E *out) {
#pragma omp parallel for if (rows * width > SHARED_FROM / 4)
    for (int64_t row = 0; row < rows; row++) {
        const E *gate = gate_up + 2 * row * width;
        OF_E(gated)(gate, gate + width, width, out + row * width);
    }
}

/* A pair of a head, first and second, turned by an angle. Each product is rounded. */
static inline void OF_E(turned)(float first, float second, E cosine, E sine, E *restrict to_first, E *restrict to_second) {
    float c = to_float(cosine), s = to_float(sine);
    *to_first = from_float(rounded(first * c) - rounded(second * s));
    *to_second = from_float(rounded(second * c) + rounded(first * s));
}

/* One head; pair i is (i, i + half). simd: nothing overlaps, which the compiler could not know of the halves. */
static inline void OF_E(rotated)(const E *restrict x, const E *restrict cosines, const E *restrict sines, int64_t half, E *restrict out) {
#pragma omp simd
    for (int64_t i = 0; i < half; i++)
        OF_E(turned)(to_float(x[i]), to_float(x[i + half]), cosines[i], sines[i], out + i, out + i + half);
}

/* The same after a norm. Between the two it stays in float32, rounded. */
static inline void OF_E(normed_and_rotated)(
    const E *restrict x, const E *restrict weight, float eps, const E *restrict cosines, const E *restrict sines, int64_t half,
    E *restrict out) {
    float inverse = OF_E(inverse_rms)(x, 2 * half, eps);
#pragma omp simd
    for (int64_t i = 0; i < half; i++) {
        float first = rounded(to_float(weight[i]) * rounded(to_float(x[i]) * inverse));
        float second = rounded(to_float(weight[i + half]) * rounded(to_float(x[i + half]) * inverse));
        OF_E(turned)(first, second, cosines[i], sines[i], out + i, out + i + half);
    }
}

static inline void OF_E(query_or_key)(
    const E *x, const E *weight, float eps, const E *cosines, const E *sines, int64_t half, E *out) {
    if (weight)
        OF_E(normed_and_rotated)(x, weight, eps, cosines, sines, half, out);
    else
        OF_E(rotated)(x, cosines, sines, half, out);
}

/* One token's heads [query heads | key heads | value heads]: norm and rotate the first two, keys and values go to their slots. */
static inline void OF_E(entered)(
    const Entry *to, int64_t token, int64_t num_heads, const E *heads, const E *query_norm, const E *key_norm, float eps,
    const E *cosines, const E *sines, E *keys, E *values, E *queries) {
    int64_t dim = to->dim, half = dim / 2;
    cosines += token * half, sines += token * half;
    for (int64_t head = 0; head < num_heads; head++, heads += dim)
        OF_E(query_or_key)(heads, query_norm, eps, cosines, sines, half, queries + (token * num_heads + head) * dim);
    for (int64_t head = 0; head < to->num_kv_heads; head++, heads += dim)
        OF_E(query_or_key)(heads, key_norm, eps, cosines, sines, half, keys + to->slots[token] + head * to->head_stride);
    for (int64_t head = 0; head < to->num_kv_heads; head++, heads += dim)
        memcpy(values + to->slots[token] + head * to->head_stride, heads, (size_t)dim * sizeof(E));
}

/* qkv: [tokens, (num_heads + 2 * num_kv_heads) * dim] -> queries [tokens, num_heads, dim], and keys and values in the cache.
 * The norms may be null. cosines, sines: [tokens, dim / 2]. */
EXPORT void OF_E(enter)(
    const Entry *to, int64_t num_heads, const E *qkv, const E *query_norm, const E *key_norm, float eps, const E *cosines, const E *sines,
    E *keys, E *values, E *queries) {
    int64_t width = (num_heads + 2 * to->num_kv_heads) * to->dim;
#pragma omp parallel for if (to->num_tokens * width > SHARED_FROM)
    for (int64_t token = 0; token < to->num_tokens; token++)
        OF_E(entered)(to, token, num_heads, qkv + token * width, query_norm, key_norm, eps, cosines, sines, keys, values, queries);
}

/* Pair i is (2i, 2i + 1), of the result (i, i + half). */
static inline void OF_E(rotated_interleaved)(
    const E *restrict x, const E *restrict cosines, const E *restrict sines, int64_t half, E *restrict out) {
#pragma omp simd
    for (int64_t i = 0; i < half; i++)
        OF_E(turned)(to_float(x[2 * i]), to_float(x[2 * i + 1]), cosines[i], sines[i], out + i, out + i + half);
}

static inline void OF_E(rotated_either)(
    const E *x, const E *cosines, const E *sines, int64_t half, int64_t interleaved, E *out) {
    if (interleaved)
        OF_E(rotated_interleaved)(x, cosines, sines, half, out);
    else
        OF_E(rotated)(x, cosines, sines, half, out);
}

/* x: [tokens, heads, dim] with strides -> out, dense. cosines, sines: [tokens, dim / 2]. */
EXPORT void OF_E(rotate)(
    const E *x, int64_t token_stride, int64_t head_stride, int64_t tokens, int64_t heads, int64_t dim, const E *cosines, const E *sines,
    int64_t interleaved, E *out) {
    int64_t half = dim / 2;
#pragma omp parallel for if (tokens * heads * dim > SHARED_FROM)
    for (int64_t token = 0; token < tokens; token++)
        for (int64_t head = 0; head < heads; head++) {
            const E *from = x + token * token_stride + head * head_stride;
            E *to = out + (token * heads + head) * dim;
            OF_E(rotated_either)(from, cosines + token * half, sines + token * half, half, interleaved, to);
        }
}

/* One token of `enter_latent`. */
static inline void OF_E(entered_latent)(
    const Entry *to, int64_t token, int64_t num_heads, int64_t plain, int64_t latent, const E *compressed, const E *norm, float eps,
    const E *cosines, const E *sines, int64_t interleaved, E *rows, const E *queries, E *out) {
    int64_t turned = to->dim - latent, half = turned / 2, width = plain + turned;
    E *row = rows + to->slots[token];
    cosines += token * half, sines += token * half, compressed += token * to->dim;
    OF_E(normed)(compressed, norm, latent, eps, row);
    OF_E(rotated_either)(compressed + latent, cosines, sines, half, interleaved, row + latent);
    for (int64_t head = token * num_heads; head < (token + 1) * num_heads; head++) {
        memcpy(out + head * width, queries + head * width, (size_t)plain * sizeof(E));
        OF_E(rotated_either)(queries + head * width + plain, cosines, sines, half, interleaved, out + head * width + plain);
    }
}

/* compressed: [tokens, dim], of which the first `latent` are normalised and the others, a key, rotated, into the cache's only head.
 * queries: [tokens, num_heads, plain + dim - latent] -> out, the last dim - latent of each rotated. */
EXPORT void OF_E(enter_latent)(
    const Entry *to, int64_t num_heads, int64_t plain, int64_t latent, const E *compressed, const E *norm, float eps, const E *cosines,
    const E *sines, int64_t interleaved, E *rows, const E *queries, E *out) {
    int64_t width = to->dim + num_heads * (plain + to->dim - latent);
#pragma omp parallel for if (to->num_tokens * width > SHARED_FROM)
    for (int64_t token = 0; token < to->num_tokens; token++)
        OF_E(entered_latent)
        (to, token, num_heads, plain, latent, compressed, norm, eps, cosines, sines, interleaved, rows, queries, out);
}

/* Rows of table [num_ids, width] for ids first_id ... first_id + num_ids - 1; zeros for others. */
EXPORT void OF_E(embed)(const int64_t *ids, int64_t rows, const E *table, int64_t first_id, int64_t num_ids, int64_t width, E *out) {
    size_t size = (size_t)width * sizeof(E);
#pragma omp parallel for if (rows * width > SHARED_FROM)
    for (int64_t row = 0; row < rows; row++) {
        int64_t local = ids[row] - first_id;
        if (local >= 0 && local < num_ids)
            memcpy(out + row * width, table + local * width, size);
        else
            memset(out + row * width, 0, size);
    }
}

/* The bits of an element as an integer in the same order: what is NaN lies beyond the infinities, on either side. */
#if E_IS_BF16
#define BITS int16_t
#define BITS_MAX INT16_MAX
#define INFINITE 0x7f80
#else
#define BITS int32_t
#define BITS_MAX INT32_MAX
#define INFINITE 0x7f800000
#endif

/* Of negative numbers all bits but the sign are turned over. Its own inverse. */
static inline BITS OF_E(in_order)(BITS bits) { return (BITS)(bits ^ ((bits >> (8 * sizeof(BITS) - 1)) & BITS_MAX)); }

/* The first of the row's elements that equals `largest`, which is one of them. 0 equals -0. */
static inline int64_t OF_E(first_equal)(const E *row, int64_t width, float largest) {
    int64_t start = 0;
    for (; start + RUN <= width; start += RUN) {
        int found = 0;
        for (int64_t i = start; i < start + RUN; i++) found |= to_float(row[i]) == largest;
        if (found) break;
    }
    while (to_float(row[start]) != largest) start++;
    return start;
}

static inline void OF_E(largest_of)(const E *row, int64_t width, int64_t *id, uint8_t *finite) {
    const BITS *bits = (const BITS *)row;
    BITS most = OF_E(in_order)(bits[0]), least = most;
#pragma omp simd reduction(max : most) reduction(min : least)
    for (int64_t i = 0; i < width; i++) {
        BITS value = OF_E(in_order)(bits[i]);
        most = value > most ? value : most;
        least = value < least ? value : least;
    }
    BITS lowest = (BITS)(-INFINITE - 1); /* minus infinity */
    *finite = most < INFINITE && most > lowest && least >= lowest;
    BITS at = OF_E(in_order)(most);
    E largest;
    memcpy(&largest, &at, sizeof largest);
    *id = *finite ? OF_E(first_equal)(row, width, to_float(largest)) : 0;
}

/* The largest of each row, of equal ones the first, and whether there is one: no NaN in the row, and it is not infinite. */
EXPORT void OF_E(argmax)(const E *x, int64_t stride, int64_t rows, int64_t width, int64_t *ids, uint8_t *finite) {
#pragma omp parallel for if (rows * width > SHARED_FROM)
    for (int64_t row = 0; row < rows; row++) OF_E(largest_of)(x + row * stride, width, ids + row, finite + row);
}

#undef BITS
#undef BITS_MAX
#undef INFINITE
