/* Of gemm.c, for an element type E. */

/* source [rows <= PANEL, k] -> one panel. */
static void OF_E(pack_panel)(const char *source, long rows, long k, char *panel) {
    long row_bytes = k * (long)sizeof(E), words = row_bytes / 4;
    memset(panel, 0, (size_t)panel_bytes(k, sizeof(E)));
    for (long row = 0; row < rows; row++) {
        const char *from = source + row * row_bytes;
        char *to = panel + 4 * row;
        for (long step = 0; step < words; step++) memcpy(to + step * STEP_BYTES, from + 4 * step, 4);
        if (row_bytes % 4) memcpy(to + words * STEP_BYTES, from + 4 * words, 2);
    }
}

/* source [count, parts, n, k] -> per matrix of n its panels; those of a matrix's parts (1, or gate and up: 2) alternate. */
EXPORT void OF_E(gemm_pack)(const char *source, long count, long parts, long n, long k, char *packed, int threads) {
    long panels = panels_of(n), bytes = panel_bytes(k, sizeof(E)), row_bytes = k * (long)sizeof(E);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long i = 0; i < count * panels * parts; i++) {
        long matrix = i / (panels * parts), panel = i / parts % panels, part = i % parts, first = panel * PANEL;
        const char *from = source + ((matrix * parts + part) * n + first) * row_bytes;
        OF_E(pack_panel)(from, n - first < PANEL ? n - first : PANEL, k, packed + i * bytes);
    }
}

/* sums + bias, rounded to E: what silu and stores see. bias: of these outputs, or NULL. */
static void OF_E(round_sums)(float (*sums)[PANEL], int m, const E *bias, long width) {
    for (int i = 0; i < m; i++)
        for (long j = 0; j < width; j++) sums[i][j] = to_float(from_float(bias ? sums[i][j] + to_float(bias[j]) : sums[i][j]));
}

/* A row of sums -> the outputs of a panel, or those of the last one. */
static inline void OF_E(store)(const float *restrict sums, long width, E *restrict out) {
    if (width == PANEL)
        for (int j = 0; j < PANEL; j++) out[j] = from_float(sums[j]);
    else
        for (long j = 0; j < width; j++) out[j] = from_float(sums[j]);
}

/* gate = silu(gate) * up, silu rounded to E as torch does it. */
static void OF_E(gate_sums)(float (*gate)[PANEL], float (*up)[PANEL], int m) {
    for (int i = 0; i < m; i++)
        for (int j = 0; j < PANEL; j++) gate[i][j] = to_float(from_float(gate[i][j] / (1.0f + exp_float(-gate[i][j])))) * up[i][j];
}

/* m rows from `first` on times one panel, or pair of them. */
static void OF_E(tile_product)(const Product *p, long first, int m, long panel) {
    const char *rows[TILE_ROWS];
    float sums[2][TILE_ROWS][PANEL] __attribute__((aligned(64)));
    long bytes = panel_bytes(p->k, sizeof(E)), column = panel * PANEL, width = p->n - column < PANEL ? p->n - column : PANEL;
    int parts = p->gated ? 2 : 1;
    for (int i = 0; i < m; i++) rows[i] = p->x + (p->index ? p->index[first + i] : first + i) * p->x_stride;
    for (int part = 0; part < parts; part++) {
        OF_E(tile)(rows, m, p->packed + (panel * parts + part) * bytes, p->k, sums[part]);
        if (p->bias || p->gated) OF_E(round_sums)(sums[part], m, p->bias ? (const E *)p->bias + part * p->n + column : NULL, width);
    }
    if (p->gated) OF_E(gate_sums)(sums[0], sums[1], m);
    for (int i = 0; i < m; i++) OF_E(store)(sums[0][i], width, (E *)(p->out + (first + i) * p->out_stride) + column);
}

void OF_E(product)(const Product *p, long first, long stop, long from, long to) {
    for (long panel = from; panel < to; panel++) {
        long row = first;
        for (long tiles = (stop - first + TILE_ROWS - 1) / TILE_ROWS; tiles > 0; tiles--) { /* of equal size, give or take a row */
            int m = (int)((stop - row + tiles - 1) / tiles);
            OF_E(tile_product)(p, row, m, panel);
            row += m;
        }
    }
}

/* x [m, k] times packed weights [n, k], or gated [2, n, k] -> out [m, n]; bias [n] or [2, n], or NULL. */
EXPORT void OF_E(gemm)(const char *x, const char *packed, const char *bias, char *out, long m, long n, long k, bool gated, int threads) {
    long row_bytes = k * (long)sizeof(E), panels = panels_of(n), rows = row_block(row_bytes), blocks = (m + rows - 1) / rows;
    threads = threads_for(m, n * (gated ? 2 : 1), k, sizeof(E), threads);
    char *copy = m > 4 && collides(row_bytes) ? spread(x, m, row_bytes, threads) : NULL;
    Product p = {copy ? copy : x, packed, bias, NULL, out, n, k, row_bytes + (copy ? PAD_BYTES : 0), n * (long)sizeof(E), gated};
    long run = panels / (8 * threads) > 1 ? panels / (8 * threads) : 1, runs = (panels + run - 1) / run;
#pragma omp parallel for num_threads(threads) schedule(dynamic) collapse(2)
    for (long block = 0; block < blocks; block++)
        for (long i = 0; i < runs; i++) {
            long stop = (block + 1) * rows, to = (i + 1) * run;
            OF_E(product)(&p, block * rows, stop < m ? stop : m, i * run, to < panels ? to : panels);
        }
    free(copy);
}
