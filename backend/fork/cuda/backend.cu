// ggml-cuda's part: MUL_MAT, MUL_MAT_ID, GET_ROWS and CPY in one early return of ggml_cuda_compute_forward.
#include "ggml-ccq-cuda.h"

#include "../op_class.h"
#include "nodes.h"

static constexpr int kTuring = 750; // has the int8 tensor cores that the kernels use

bool ggml_ccq_cuda_supports_op(const ggml_tensor * op, int cc) {
    return cc >= kTuring && ccq::gpu::can_run(ccq::classify(op->op), *op);
}

size_t ggml_ccq_cuda_work_size(const ggml_tensor * node) {
    return ccq::gpu::work_bytes(ccq::classify(node->op), *node);
}

cudaError_t ggml_ccq_cuda_compute_forward(const ggml_tensor * node, void * work, cudaStream_t stream) {
    return ccq::gpu::compute(ccq::classify(node->op), *node, static_cast<uint8_t *>(work), stream);
}
