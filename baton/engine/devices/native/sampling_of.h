/* Kernels of sampling.c for one element type; see element.h.
 *
 * The weight of an id is e ** ((logit - largest) * sharpness), one over the temperature. Weights are summed part by part: float32
 * within a part of PART ids, in the order of the compiler, and float64 from part to part. So a draw looks for its part first, and then into
 * that one only.
 */

#ifndef SAMPLING_ONCE
#define SAMPLING_ONCE
#include <float.h>
enum { PART = 512 };
#endif

static inline float OF_E(weight)(E logit, float largest, float sharpness) {
    return exp_float((to_float(logit) - largest) * sharpness);
}

/* The weights of num ids <= PART, all together. */
static inline float OF_E(part_sum)(const E *row, int64_t num, float largest, float sharpness) {
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < num; i++) sum += OF_E(weight)(row[i], largest, sharpness);
    return sum;
}

/* The first of num ids at which the sum of weights, from `before` on, exceeds the target; if rounding has it that none does, the last one
 * that has a weight. */
static int64_t OF_E(reaching)(const E *row, int64_t num, float largest, float sharpness, double before, double target) {
    int64_t last = 0;
    for (int64_t i = 0; i < num; i++) {
        float weight = OF_E(weight)(row[i], largest, sharpness);
        if (weight > 0.0f) last = i;
        before += weight;
        if (weight > 0.0f && before > target) break;
    }
    return last;
}

static int64_t OF_E(drawn)(const E *row, int64_t width, float largest, float sharpness, float uniform, float *sums) {
    int64_t parts = (width + PART - 1) / PART, part = 0;
    double total = 0.0, before = 0.0;
    for (int64_t i = 0; i < parts; i++) {
        int64_t left = width - i * PART;
        total += sums[i] = OF_E(part_sum)(row + i * PART, left < PART ? left : PART, largest, sharpness);
    }
    double target = total * uniform; /* below total, for uniform has 24 bits and is below 1 */
    while (before + sums[part] <= target) before += sums[part++];
    int64_t start = part * PART, left = width - start;
    return start + OF_E(reaching)(row + start, left < PART ? left : PART, largest, sharpness, before, target);
}

/* x: [rows, width]; top_ids: where each row's largest is, which is finite; temperatures, above 0; uniforms, in [0, 1). -> ids [rows].
 * sums: memory, [rows, parts of width]. */
EXPORT void OF_E(draw)(
    const E *x, int64_t stride, int64_t rows, int64_t width, const int64_t *top_ids, const float *temperatures, const float *uniforms,
    float *sums, int64_t *ids) {
    int64_t parts = (width + PART - 1) / PART;
#pragma omp parallel for if (rows > 1) schedule(dynamic)
    for (int64_t i = 0; i < rows; i++) {
        const E *row = x + i * stride;
        float sharpness = fminf(1.0f / temperatures[i], FLT_MAX); /* not infinite: the largest logit less itself is 0 */
        ids[i] = OF_E(drawn)(row, width, to_float(row[top_ids[i]]), sharpness, uniforms[i], sums + i * parts);
    }
}
