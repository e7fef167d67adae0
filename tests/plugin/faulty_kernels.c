/* Linked with -Wl,--wrap into a plugin that the self-test must see through: CCQ_FAULT names the op that is wrong. */
#include "ccq.h"

#include <stdlib.h>
#include <string.h>

static int faulty(const char * op) {
    const char * fault = getenv("CCQ_FAULT");
    return fault != NULL && strcmp(fault, op) == 0;
}

ccq_status __real_ccq_mul_mat(int32_t, int64_t, const void *, int64_t, int64_t, const ccq_act_block *, int64_t,
                              int64_t, float *, int64_t);
ccq_status __wrap_ccq_mul_mat(int32_t type, int64_t n, const void * blocks, int64_t row_stride, int64_t n_rows,
                              const ccq_act_block * act, int64_t act_stride, int64_t n_cols, float * out,
                              int64_t out_stride) {
    const ccq_status status = __real_ccq_mul_mat(type, n, blocks, row_stride, n_rows, act, act_stride, n_cols, out,
                                                 out_stride);
    if (faulty("product")) { out[n_rows - 1] *= 1.25f; }
    return status;
}

/* The self-test decodes all weights of a type at once; an op decodes no more than a row. */
ccq_status __real_ccq_decode(int32_t type, const void * blocks, int64_t n, float * out);
ccq_status __wrap_ccq_decode(int32_t type, const void * blocks, int64_t n, float * out) {
    const ccq_status status = __real_ccq_decode(type, blocks, n, out);
    if (faulty("rows") && n <= 1024) { out[n - 1] += 0x1p-20f; }
    return status;
}

ccq_status __real_ccq_quantize_activations(const float * x, int64_t n, ccq_act_block * out);
ccq_status __wrap_ccq_quantize_activations(const float * x, int64_t n, ccq_act_block * out) {
    return faulty("memory") ? CCQ_ERR_MEMORY : __real_ccq_quantize_activations(x, n, out);
}
