/* Linked with -Wl,--wrap into a plugin that the self-test must see through: CCQ_FAULT names the op that is wrong. */
#include "ccq.h"

#include <stdlib.h>
#include <string.h>

static int faulty(const char * op) {
    const char * fault = getenv("CCQ_FAULT");
    return fault != NULL && strcmp(fault, op) == 0;
}

ccq_status __real_ccq_mul_mat(int32_t, const ccq_product *);
ccq_status __wrap_ccq_mul_mat(int32_t type, const ccq_product * product) {
    const ccq_status status = __real_ccq_mul_mat(type, product);
    if (faulty("product")) {
        product->out[(product->out_index ? product->out_index[0] : 0) * product->out_stride + product->n_rows - 1] *=
            1.25f;
    }
    return status;
}

/* The self-test decodes all weights of a type at once; an op decodes no more than a row. */
ccq_status __real_ccq_decode(int32_t type, const void * blocks, int64_t n, float * out);
ccq_status __wrap_ccq_decode(int32_t type, const void * blocks, int64_t n, float * out) {
    const ccq_status status = __real_ccq_decode(type, blocks, n, out);
    if (faulty("rows") && n <= 1024) { out[n - 1] += 0x1p-20f; }
    return status;
}

ccq_status __real_ccq_quantize_activations(const float *, int64_t, int64_t, int64_t, void *);
ccq_status __wrap_ccq_quantize_activations(const float * x, int64_t n, int64_t first, int64_t count, void * act) {
    return faulty("memory") ? CCQ_ERR_MEMORY : __real_ccq_quantize_activations(x, n, first, count, act);
}
