/* Of moe.c, for an element type E. */

/* One expert's product over one run of its panels. p is of all experts, with rows and weights of the first. */
static void OF_E(expert_run)(const Plan *plan, const Product *p, long expert, long from, long run) {
    long panels = panels_of(p->n), first = plan->starts[expert], stop = plan->starts[expert + 1], rows = row_block(p->k * (long)sizeof(E));
    long to = from + run < panels ? from + run : panels;
    Product of_one = *p;
    of_one.packed += expert * panels * (p->gated ? 2 : 1) * panel_bytes(p->k, sizeof(E));
    for (; first < stop; first += rows) OF_E(product)(&of_one, first, first + rows < stop ? first + rows : stop, from, to);
}

/* All experts' products, shared out among the threads of the team that calls, which wait for each other at the end. */
static void OF_E(all_experts)(const Plan *plan, const Product *p) {
    long panels = panels_of(p->n), bytes = panel_bytes(p->k, sizeof(E)) * (p->gated ? 2 : 1);
    long run = TASK_BYTES / bytes > 1 ? TASK_BYTES / bytes : 1, runs = (panels + run - 1) / run;
#pragma omp for schedule(dynamic)
    for (long task = 0; task < plan->num_active * runs; task++)
        OF_E(expert_run)(plan, p, plan->active[task / runs], task % runs * run, run);
}

/* A token's sum, rounded after every step as transformers does it. Compiled without contraction: a product is rounded, then added. */
static void OF_E(combine)(const Plan *plan, const E *outs, const float *weights, long token, long top_k, long hidden, E *out) {
    memset(out, 0, (size_t)hidden * sizeof(E));
    for (long i = 0; i < plan->count[token]; i++) {
        int32_t row = plan->rows_of[token * top_k + i];
        float weight = weights[plan->slot_of[row]];
        const E *part = outs + row * hidden;
        for (long h = 0; h < hidden; h++) out[h] = from_float(to_float(out[h]) + to_float(from_float(to_float(part[h]) * weight)));
    }
}

/* x [tokens, hidden], weights and ids [tokens, top_k], gate_up and down packed -> out [tokens, hidden]. Memory for what lies between:
 * plan [experts_plan_len], inner [tokens * top_k, width + PAD_BYTES], outs [tokens * top_k, hidden].
 */
EXPORT void OF_E(experts)(
    const E *x, const float *weights, const int64_t *ids, const char *gate_up, const char *down, int32_t *memory, E *inner, E *outs, E *out,
    long tokens, long top_k, long num_experts, long hidden, long width, int threads
) {
    long size = sizeof(E), row = hidden * size, inner_row = width * size + (collides(width * size) ? PAD_BYTES : 0);
    Plan plan = plan_in(memory, tokens, top_k, num_experts);
    sort_slots(&plan, ids, tokens, top_k, num_experts);
    char *copy = collides(row) && plan.starts[num_experts] > 4 * plan.num_active ? spread((const char *)x, tokens, row, threads) : NULL;
    long stride = row + (copy ? PAD_BYTES : 0);
    Product up = {copy ? copy : (const char *)x, gate_up, NULL, plan.token_of, (char *)inner, width, hidden, stride, inner_row, true};
    Product back = {(const char *)inner, down, NULL, NULL, (char *)outs, hidden, width, inner_row, row, false};
#pragma omp parallel num_threads(threads)
    {
        OF_E(all_experts)(&plan, &up);
        OF_E(all_experts)(&plan, &back);
#pragma omp for schedule(static)
        for (long token = 0; token < tokens; token++) OF_E(combine)(&plan, outs, weights, token, top_k, hidden, out + token * hidden);
    }
    free(copy);
}
