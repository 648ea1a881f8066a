/* Linear maps over packed weights: pack once, multiply often. */
#include <stdlib.h>
#include <sys/mman.h>

#include "gemm.h"

/* How many outputs a panel has: what Python sizes packed weights by. */
EXPORT int gemm_panel(void) { return PANEL; }

/* For memory that weights will lie in, before it is touched: read from end to end, it comes half as fast again in large pages.
 * A hint, so what the system answers does not matter. */
EXPORT void gemm_prefer_large_pages(char *memory, long bytes) {
#if defined(MADV_HUGEPAGE)
    uintptr_t page = 2 << 20, start = ((uintptr_t)memory + page - 1) / page * page, stop = ((uintptr_t)memory + (uintptr_t)bytes) / page * page;
    if (start < stop) (void)madvise((void *)start, stop - start, MADV_HUGEPAGE);
#else
    (void)memory, (void)bytes;
#endif
}

char *spread(const char *x, long m, long row_bytes, int threads) {
    char *copy = malloc((size_t)(m * (row_bytes + PAD_BYTES)));
    if (copy == NULL) return NULL;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long row = 0; row < m; row++) memcpy(copy + row * (row_bytes + PAD_BYTES), x + row * row_bytes, (size_t)row_bytes);
    return copy;
}

/* Waking a thread takes microseconds: what takes no longer than that is done alone. */
static int threads_for(long m, long n, long k, long size, int threads) {
    long products = m * n * k, bytes = n * k * size;
    return products < 1 << 20 && bytes < 1 << 18 ? 1 : threads;
}

#define BODY "gemm_of.h"
#include "each_element.h"
