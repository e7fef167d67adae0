// ggml's nodes on a GPU: which of them can run there, how batches and experts become launches, and their scratch
// memory. The tests run the same on a CPU (tests/cuda).
#pragma once

#include "../../cuda/launch.h"
#include "../../ggml/nodes.h"

namespace ccq::gpu {

using abi::tensor;

// The type of one of the host's type numbers, or nullptr if it is not ours.
inline const type_row * type_of(int32_t host) {
    switch (host) {
#define X(STEM, stem, id, weights, bytes)                                                                              \
    case abi::host_type(id): return type_with_id(id);
        CCQ_TYPES(X)
#undef X
    default: return nullptr;
    }
}

// A ccq_cuda_float and the bytes of one, or -1.
struct float_type {
    int32_t code, bytes;
};

inline float_type float_of(int32_t host) {
    switch (host) {
    case abi::kTypeF32: return {CCQ_CUDA_F32, 4};
    case abi::kTypeF16: return {CCQ_CUDA_F16, 2};
    case abi::kTypeBF16: return {CCQ_CUDA_BF16, 2};
    default: return {-1, -1};
    }
}

// True if what lies along dimension `dim` goes on evenly spaced through all dimensions above.
inline bool is_even(const tensor & t, int dim) {
    size_t next = t.nb[dim];
    for (int i = dim + 1; i < 4; i++) {
        next *= static_cast<size_t>(t.ne[i - 1]);
        if (t.ne[i] != 1 && t.nb[i] != next) {
            return false;
        }
    }
    return true;
}

inline bool same_shape(const tensor & a, const tensor & b) {
    return a.ne[0] == b.ne[0] && a.ne[1] == b.ne[1] && a.ne[2] == b.ne[2] && a.ne[3] == b.ne[3];
}

inline const uint8_t * at(const tensor & t, int64_t i2, int64_t i3) {
    return static_cast<const uint8_t *>(t.data) + i2 * static_cast<int64_t>(t.nb[2]) +
           i3 * static_cast<int64_t>(t.nb[3]);
}

// --- products

// What all products of a node have in common.
inline ccq_cuda_product product_of(const tensor & node) {
    const tensor & w = *node.src[0];
    const tensor & x = *node.src[1];
    ccq_cuda_product p{};
    p.type = type_of(w.type)->id;
    p.n = w.ne[0];
    p.blocks = w.data;
    p.row_stride = static_cast<int64_t>(w.nb[1]);
    p.n_rows = w.ne[1];
    p.repeat = 1;
    p.x = x.data;
    p.x_type = CCQ_CUDA_F32;
    p.x_stride = static_cast<int64_t>(x.nb[1] / sizeof(float));
    p.n_cols = x.ne[1];
    p.out = static_cast<float *>(node.data);
    p.out_stride = w.ne[1];
    return p;
}

// All columns of all dimensions in one product: if there is one matrix for them, and they are evenly spaced.
inline bool is_one_product(const tensor & node) {
    const tensor & w = *node.src[0];
    const tensor & x = *node.src[1];
    return w.ne[2] == 1 && w.ne[3] == 1 && is_even(x, 1);
}

// A MUL_MAT's product, or the first of them: they differ in pointers only.
inline ccq_cuda_product mul_mat_product(const tensor & node) {
    ccq_cuda_product p = product_of(node);
    if (is_one_product(node)) {
        p.n_cols *= node.src[1]->ne[2] * node.src[1]->ne[3];
    }
    return p;
}

// A MUL_MAT_ID's product: column t * used + i is what token t's i-th expert makes of it.  The experts' numbers are
// evenly spaced in `ids`.
inline ccq_cuda_product mul_mat_id_product(const tensor & node, const int32_t * ids) {
    const tensor & w = *node.src[0];
    const tensor & x = *node.src[1];
    const int64_t used = node.src[2]->ne[0];
    ccq_cuda_product p = product_of(node);
    p.ids = ids;
    p.expert_stride = static_cast<int64_t>(w.nb[2]);
    p.n_experts = static_cast<int32_t>(w.ne[2]);
    p.n_cols = used * x.ne[2];
    if (x.ne[1] == 1) { // the experts of a token get the same
        p.repeat = static_cast<int32_t>(used);
        p.x_stride = static_cast<int64_t>(x.nb[2] / sizeof(float));
    }
    return p;
}

// Experts take few columns each until there are many tokens.
inline product_path path_of(const tensor & node, const ccq_cuda_product & p) {
    const int64_t columns = p.ids ? node.src[1]->ne[2] : p.n_cols;
    return columns <= CCQ_CUDA_MAX_VECTOR_COLUMNS ? VECTOR_PATH : MATRIX_PATH;
}

inline bool fits_grid(product_path path, const ccq_cuda_product & p) {
    return p.n_rows <= INT32_MAX && (path == VECTOR_PATH ? p.n_cols : max_tiles(p)) <= MAX_GRID_Y;
}

// Experts' numbers are usually a view of all experts in their order, of which a token takes the first.
inline int64_t gathered_bytes(const tensor & ids) {
    return !is_even(ids, 0) ? (ids.ne[0] * ids.ne[1] * static_cast<int64_t>(sizeof(int32_t)) + 15) / 16 * 16 : 0;
}

constexpr int kGatherThreads = 128;

__global__ void __launch_bounds__(kGatherThreads)
    gather_ids(const int32_t * ids, int64_t stride, int64_t used, int64_t count, int32_t * out) {
    const int64_t i = static_cast<int64_t>(blockIdx.x) * kGatherThreads + threadIdx.x;
    if (i < count) {
        out[i] = ids[i / used * stride + i % used];
    }
}

inline cudaError_t mul_mat(const tensor & node, uint8_t * work, cudaStream_t stream) {
    const tensor & w = *node.src[0];
    const tensor & x = *node.src[1];
    ccq_cuda_product p = mul_mat_product(node);
    const product_path path = path_of(node, p);
    if (is_one_product(node)) {
        return run_product(path, p, work, stream);
    }
    cudaError_t error = cudaSuccess;
    for (int64_t i3 = 0; i3 < x.ne[3]; i3++) {
        for (int64_t i2 = 0; i2 < x.ne[2] && error == cudaSuccess; i2++) {
            p.blocks = at(w, i2 / (x.ne[2] / w.ne[2]), i3 / (x.ne[3] / w.ne[3]));
            p.x = at(x, i2, i3);
            p.out = static_cast<float *>(node.data) + (i3 * x.ne[2] + i2) * x.ne[1] * p.n_rows;
            error = run_product(path, p, work, stream); // one after the other: the work buffer is free again
        }
    }
    return error;
}

inline cudaError_t mul_mat_id(const tensor & node, uint8_t * work, cudaStream_t stream) {
    const tensor & ids = *node.src[2];
    const auto * experts = static_cast<const int32_t *>(ids.data);
    cudaError_t error = cudaSuccess;
    if (!is_even(ids, 0)) {
        const int64_t count = ids.ne[0] * ids.ne[1];
        auto * gathered = reinterpret_cast<int32_t *>(work);
        error = CCQ_LAUNCH(gather_ids, grid_of(divided(count, kGatherThreads), 1), kGatherThreads, stream, experts,
                           static_cast<int64_t>(ids.nb[1] / sizeof(int32_t)), ids.ne[0], count, gathered);
        experts = gathered;
        work += gathered_bytes(ids);
    }
    const ccq_cuda_product p = mul_mat_id_product(node, experts);
    return error == cudaSuccess ? run_product(path_of(node, p), p, work, stream) : error;
}

// --- weights as floats

inline dequantize_args rows_of(const tensor & w, int64_t i2, int64_t i3, cudaStream_t stream) {
    dequantize_args a{};
    a.blocks = at(w, i2, i3);
    a.row_stride = static_cast<int64_t>(w.nb[1]);
    a.n_rows = a.n_out = w.ne[1];
    a.n_groups = w.ne[0] / CCQ_GROUP;
    a.out_stride = w.ne[0];
    a.stream = stream;
    return a;
}

inline cudaError_t get_rows(const tensor & node, cudaStream_t stream) {
    const tensor & w = *node.src[0];
    const tensor & rows = *node.src[1];
    const float_type out = float_of(node.type);
    cudaError_t error = cudaSuccess;
    for (int64_t i2 = 0; i2 < rows.ne[2]; i2++) {
        for (int64_t i1 = 0; i1 < rows.ne[1]; i1++) {
            dequantize_args a = rows_of(w, i1, i2, stream);
            const auto * index = static_cast<const uint8_t *>(rows.data) + i1 * static_cast<int64_t>(rows.nb[1]) +
                                 i2 * static_cast<int64_t>(rows.nb[2]);
            for (int64_t first = 0; first < rows.ne[0] && error == cudaSuccess; first += MAX_GRID_Y) {
                a.index = reinterpret_cast<const int32_t *>(index) + first;
                a.n_out = rows.ne[0] - first < MAX_GRID_Y ? rows.ne[0] - first : MAX_GRID_Y;
                const int64_t to = ((i2 * rows.ne[1] + i1) * rows.ne[0] + first) * w.ne[0] * out.bytes;
                error = dequantize_type(type_of(w.type)->id, out.code, a, static_cast<uint8_t *>(node.data) + to);
            }
        }
    }
    return error;
}

inline cudaError_t copy(const tensor & node, cudaStream_t stream) {
    const tensor & w = *node.src[0];
    const float_type out = float_of(node.type);
    cudaError_t error = cudaSuccess;
    for (int64_t i3 = 0; i3 < w.ne[3]; i3++) {
        for (int64_t i2 = 0; i2 < w.ne[2] && error == cudaSuccess; i2++) {
            const int64_t to = (i3 * w.ne[2] + i2) * w.ne[1] * w.ne[0] * out.bytes;
            error = dequantize_type(type_of(w.type)->id, out.code, rows_of(w, i2, i3, stream),
                                    static_cast<uint8_t *>(node.data) + to);
        }
    }
    return error;
}

// --- nodes

// True if a GPU can run a node that involves our types.
inline bool can_run(OpClass op, const tensor & node) {
    if (op == OpClass::View) {
        return true;
    }
    const tensor * w = node.src[0];
    const tensor * x = node.src[1];
    const type_row * type = w ? type_of(w->type) : nullptr;
    const float_type out = float_of(node.type);
    if (!type || !x || w->nb[0] != static_cast<size_t>(type->bytes) || node.nb[0] != static_cast<size_t>(out.bytes) ||
        !is_even(node, 0)) {
        return false;
    }
    const bool floats = x->type == abi::kTypeF32 && x->nb[0] == sizeof(float) && out.code == CCQ_CUDA_F32;
    switch (op) {
    case OpClass::MulMat: {
        if (!floats) {
            return false;
        }
        const ccq_cuda_product p = mul_mat_product(node);
        return fits_grid(path_of(node, p), p);
    }
    case OpClass::MulMatId: {
        const tensor * ids = node.src[2];
        // A token's rows must be one, or one for each expert, and evenly spaced.
        if (!floats || !ids || ids->type != abi::kTypeI32 || ids->nb[0] != sizeof(int32_t) ||
            (x->ne[1] != 1 && (x->ne[1] != ids->ne[0] || !is_even(*x, 1)))) {
            return false;
        }
        const ccq_cuda_product p = mul_mat_id_product(node, static_cast<const int32_t *>(ids->data));
        return fits_grid(path_of(node, p), p);
    }
    case OpClass::GetRows: return x->type == abi::kTypeI32 && x->nb[0] == sizeof(int32_t);
    case OpClass::Copy: return same_shape(*w, node);
    default: return false;
    }
}

// Bytes of scratch memory for a node that can run, never 0.
inline size_t work_bytes(OpClass op, const tensor & node) {
    int64_t bytes = 0;
    if (op == OpClass::MulMat) {
        const ccq_cuda_product p = mul_mat_product(node);
        bytes = product_scratch(path_of(node, p), p);
    } else if (op == OpClass::MulMatId) {
        const tensor & ids = *node.src[2];
        const ccq_cuda_product p = mul_mat_id_product(node, static_cast<const int32_t *>(ids.data));
        bytes = gathered_bytes(ids) + product_scratch(path_of(node, p), p);
    }
    return static_cast<size_t>(bytes > 0 ? bytes : 16);
}

// Queues a node that can run.
inline cudaError_t compute(OpClass op, const tensor & node, uint8_t * work, cudaStream_t stream) {
    if (node.ne[0] == 0 || node.ne[1] == 0 || node.ne[2] == 0 || node.ne[3] == 0) {
        return cudaSuccess;
    }
    switch (op) {
    case OpClass::View: return cudaSuccess;
    case OpClass::MulMat: return mul_mat(node, work, stream);
    case OpClass::MulMatId: return mul_mat_id(node, work, stream);
    case OpClass::GetRows: return get_rows(node, stream);
    case OpClass::Copy: return copy(node, stream);
    default: return cudaErrorInvalidValue;
    }
}

} // namespace ccq::gpu
