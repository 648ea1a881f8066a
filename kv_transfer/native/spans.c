/* Copying many spans with one call: the loop that Python cannot afford, since it gives up and takes the interpreter's lock per span. */
#include <stdint.h>
#include <string.h>
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#define LINE 64
#define AHEAD 512 /* bytes that are asked for before they are copied */
/* So much at once is not all read again before caches have lost it: written past them it costs two thirds, since the lines that are
 * overwritten need not be read first. */
#define STREAM_FROM (1 << 20)
#define STREAM_SPAN (16 << 10) /* shorter ones do not gain by it */

#if defined(__SSE2__)
static void copy_past_caches(char *target, const char *source, int64_t nbytes) {
    int64_t head = (int64_t)(-(uintptr_t)target & (LINE - 1));
    if (head > nbytes)
        head = nbytes;
    memcpy(target, source, (size_t)head);
    for (target += head, source += head, nbytes -= head; nbytes >= LINE; target += LINE, source += LINE, nbytes -= LINE) {
        __builtin_prefetch(source + AHEAD); /* beyond the span's end, too: that is never a fault */
        for (int part = 0; part < LINE; part += 16)
            _mm_stream_si128((__m128i *)(target + part), _mm_loadu_si128((const __m128i *)(source + part)));
    }
    memcpy(target, source, (size_t)nbytes);
}

static void fence(void) { _mm_sfence(); }
#else
static void copy_past_caches(char *target, const char *source, int64_t nbytes) { memcpy(target, source, (size_t)nbytes); }

static void fence(void) {}
#endif

/* Copies nbytes[i] bytes from source + from[i] to target + to[i], for all i < count. Spans lie within both buffers, which do not overlap. */
void baton_copy_spans(char *target, const char *source, const int64_t *to, const int64_t *from, const int64_t *nbytes, int64_t count) {
    int64_t total = 0;
    for (int64_t i = 0; i < count; i++)
        total += nbytes[i];
    for (int64_t i = 0; i < count; i++) {
        if (total >= STREAM_FROM && nbytes[i] >= STREAM_SPAN)
            copy_past_caches(target + to[i], source + from[i], nbytes[i]);
        else
            memcpy(target + to[i], source + from[i], (size_t)nbytes[i]);
    }
    fence(); /* what was written past the caches is seen by whoever sees what this thread does next */
}
