// The CCQ types in ggml's CUDA backend: what the lines that `ccq-convert integrate --cuda` inserts into it call.
#pragma once

#include "../ggml-ccq.h"

#include <cuda_runtime.h>

// False if the op involves our types and a GPU of compute capability cc / 100 cannot run it.
bool ggml_ccq_cuda_supports_op(const ggml_tensor * op, int cc);

// Bytes of scratch memory, aligned to 16, for a node that is supported; never 0.
size_t ggml_ccq_cuda_work_size(const ggml_tensor * node);

// Queues a node that is supported; nothing waits.
cudaError_t ggml_ccq_cuda_compute_forward(const ggml_tensor * node, void * work, cudaStream_t stream);
