/* The activation format (ACTIVATIONS.md): a row of n values is three arrays behind one another,
 *
 *     q     n integers of 8 or 16 bits, as the kernel set multiplies them, in their natural order
 *     d     n / 64 float32: a value is d * q
 *     sum   n / 64 int32: the sum of each group's q, so that levels may be taken with an offset
 *
 * and its start and its length are multiples of 64 bytes. */
#ifndef CCQ_ACTIVATIONS_H
#define CCQ_ACTIVATIONS_H

#include "../core/decode.h"

/* The largest magnitude of q: with 16 bits a multiple of 127, so that what 8 bits hold exactly, 16 bits do. */
#define CCQ_ACT8_MAX 127
#define CCQ_ACT16_MAX 32512

static inline size_t ccq_act_row_bytes(int64_t n, int32_t value_bytes) {
    return ((size_t)(n * value_bytes + n / CCQ_GROUP * 8) + 63) & ~(size_t)63;
}

static inline float * ccq_act_scales(const void * row, int64_t n, int32_t value_bytes) {
    return (float *)((char *)(uintptr_t)row + n * value_bytes);
}

static inline int32_t * ccq_act_sums(const void * row, int64_t n, int32_t value_bytes) {
    return (int32_t *)(ccq_act_scales(row, n, value_bytes) + n / CCQ_GROUP);
}

#endif
