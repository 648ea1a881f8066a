/* Routed experts: tokens sorted by expert, then every expert's gated MLP over its tokens, then each token's weighted sum. */
#include <stdlib.h>

#include "gemm.h"

enum { TASK_BYTES = 192 << 10 }; /* weights that a thread takes at a time: little enough to share the last ones out */

/* Who goes where. A slot is (token, choice), a row one slot whose expert is here; rows are sorted by expert. */
typedef struct {
    int32_t *starts;   /* [num_experts + 1] first row of each expert */
    int32_t *active;   /* [num_experts] those with rows */
    int32_t *token_of; /* [slots] by row */
    int32_t *slot_of;  /* [slots] by row */
    int32_t *rows_of;  /* [slots] by token, its rows: in order of expert */
    int32_t *count;    /* [tokens] how many */
    long num_active;
} Plan;

/* int32s that a plan needs. */
EXPORT long experts_plan_len(long tokens, long top_k, long num_experts) { return 2 * num_experts + 2 + tokens + 3 * tokens * top_k; }

static Plan plan_in(int32_t *memory, long tokens, long top_k, long num_experts) {
    Plan plan = {.starts = memory, .active = memory + num_experts + 2};
    plan.count = plan.active + num_experts;
    plan.token_of = plan.count + tokens;
    plan.slot_of = plan.token_of + tokens * top_k;
    plan.rows_of = plan.slot_of + tokens * top_k;
    return plan;
}

/* Sorts by counting; what is sorted by expert is so for every token as well. */
static void sort_slots(Plan *plan, const int64_t *ids, long tokens, long top_k, long num_experts) {
    int32_t *next = plan->starts + 1; /* of expert e, at e + 1: ends as the start of e + 1 */
    memset(plan->starts, 0, (size_t)(num_experts + 2) * sizeof(int32_t));
    memset(plan->count, 0, (size_t)tokens * sizeof(int32_t));
    for (long slot = 0; slot < tokens * top_k; slot++)
        if (ids[slot] >= 0 && ids[slot] < num_experts) next[ids[slot] + 1]++;
    for (long e = 0; e < num_experts; e++) next[e + 1] += next[e];
    for (long slot = 0; slot < tokens * top_k; slot++) {
        if (ids[slot] < 0 || ids[slot] >= num_experts) continue;
        int32_t row = next[ids[slot]]++;
        plan->slot_of[row] = (int32_t)slot;
        plan->token_of[row] = (int32_t)(slot / top_k);
    }
    for (long row = 0; row < plan->starts[num_experts]; row++) {
        int32_t token = plan->token_of[row];
        plan->rows_of[token * top_k + plan->count[token]++] = (int32_t)row;
    }
    for (long e = 0; e < num_experts; e++)
        if (plan->starts[e] < plan->starts[e + 1]) plan->active[plan->num_active++] = (int32_t)e;
}

#define BODY "moe_of.h"
#include "each_element.h"
