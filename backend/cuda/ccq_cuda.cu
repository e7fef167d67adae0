/* What is behind ccq_cuda.h: arguments are checked, scratch memory comes from the stream's pool. */
#include "launch.h"

namespace {

using namespace ccq;

ccq_cuda_status check_product(const ccq_cuda_product * p, int64_t most_cols) {
    if (p == nullptr) { return CCQ_CUDA_ERR_ARGUMENT; }
    const type_row * type = type_with_id(p->type);
    if (type == nullptr || p->x_type < CCQ_CUDA_F32 || p->x_type > CCQ_CUDA_BF16) { return CCQ_CUDA_ERR_TYPE; }
    if (p->n < 0 || p->n_rows < 0 || p->n_cols < 0 || p->n_rows > INT32_MAX || p->n_cols > most_cols) {
        return CCQ_CUDA_ERR_ARGUMENT;
    }
    if (p->n % type->weights != 0) { return CCQ_CUDA_ERR_ROW_LENGTH; }
    if (p->n_rows == 0 || p->n_cols == 0) { return CCQ_CUDA_OK; }
    const uintptr_t pair = p->x_type == CCQ_CUDA_F32 ? 8 : 4;
    if (p->out == nullptr || p->out_stride < p->n_rows || p->repeat < 1 || (p->n > 0 && p->blocks == nullptr) ||
        (p->n > 0 && p->x == nullptr) || p->row_stride < p->n / type->weights * type->bytes || p->x_stride < p->n ||
        p->x_stride % 2 != 0 || (uintptr_t)p->x % pair != 0) {
        return CCQ_CUDA_ERR_ARGUMENT;
    }
    if (p->ids != nullptr && (p->n_experts < 1 || p->expert_stride < p->n_rows * p->row_stride)) {
        return CCQ_CUDA_ERR_ARGUMENT;
    }
    return CCQ_CUDA_OK;
}

} // namespace

CCQ_API const char * ccq_cuda_status_text(ccq_cuda_status status) {
    switch (status) {
    case CCQ_CUDA_OK: return "no error";
    case CCQ_CUDA_ERR_TYPE: return "no CCQ type has this id, or no float type this number";
    case CCQ_CUDA_ERR_ARGUMENT: return "an argument is missing or out of range";
    case CCQ_CUDA_ERR_ROW_LENGTH: return "the row length is no multiple of the type's block";
    case CCQ_CUDA_ERR_CUDA: return "CUDA refused";
    case CCQ_CUDA_ERR_WEIGHTS: return "a weight is NaN or infinite";
    case CCQ_CUDA_ERR_IMPORTANCE: return "an importance is negative, NaN or infinite";
    }
    return "unknown status";
}

CCQ_API const char * ccq_cuda_error(void) { return cudaGetErrorString(last_error); }

CCQ_API ccq_cuda_status ccq_cuda_device_count(int32_t * count) {
    if (count == nullptr) { return CCQ_CUDA_ERR_ARGUMENT; }
    int devices = 0;
    const ccq_cuda_status status = checked(cudaGetDeviceCount(&devices));
    *count = devices;
    return status;
}

CCQ_API ccq_cuda_status ccq_cuda_set_device(int32_t device, int32_t * previous) {
    if (previous == nullptr) { return CCQ_CUDA_ERR_ARGUMENT; }
    int before = 0;
    const ccq_cuda_status status = checked(cudaGetDevice(&before));
    *previous = before;
    return status != CCQ_CUDA_OK ? status : checked(cudaSetDevice(device));
}

CCQ_API ccq_cuda_status ccq_cuda_dequantize(int32_t type, const void * blocks, int64_t row_stride, int64_t n_rows,
                                            int64_t n, const int32_t * index, int64_t n_out, int32_t out_type,
                                            void * out, int64_t out_stride, void * stream) {
    const type_row * row = type_with_id(type);
    if (row == nullptr || out_type < CCQ_CUDA_F32 || out_type > CCQ_CUDA_BF16) { return CCQ_CUDA_ERR_TYPE; }
    if (index == nullptr) { n_out = n_rows; }
    if (n < 0 || n_rows < 0 || n_out < 0 || (index != nullptr && n_out > MAX_GRID_Y)) { return CCQ_CUDA_ERR_ARGUMENT; }
    if (n % row->weights != 0) { return CCQ_CUDA_ERR_ROW_LENGTH; }
    if (n == 0 || n_out == 0) { return CCQ_CUDA_OK; }
    if ((blocks == nullptr && n_rows > 0) || out == nullptr || row_stride < n / row->weights * row->bytes ||
        out_stride < n) {
        return CCQ_CUDA_ERR_ARGUMENT;
    }
    dequantize_args a;
    a.blocks = static_cast<const uint8_t *>(blocks);
    a.row_stride = row_stride;
    a.n_rows = n_rows;
    a.index = index;
    a.n_out = n_out;
    a.n_groups = n / CCQ_GROUP;
    a.out_stride = out_stride;
    a.stream = static_cast<cudaStream_t>(stream);
    return checked(dequantize_type(type, out_type, a, out));
}

static ccq_cuda_status run(product_path path, const ccq_cuda_product * p, int64_t most_cols, void * stream) {
    const ccq_cuda_status status = check_product(p, most_cols);
    if (status != CCQ_CUDA_OK || p->n_rows == 0 || p->n_cols == 0) { return status; }
    scratch memory(static_cast<cudaStream_t>(stream));
    cudaError_t error = memory.allocate(product_scratch(path, *p) + 16); /* of no bytes there may be no memory */
    if (error == cudaSuccess) { error = run_product(path, *p, memory.bytes(), static_cast<cudaStream_t>(stream)); }
    return checked(error);
}

CCQ_API ccq_cuda_status ccq_cuda_mat_vec(const ccq_cuda_product * p, void * stream) {
    return run(VECTOR_PATH, p, p != nullptr && p->ids != nullptr ? MAX_GRID_Y : CCQ_CUDA_MAX_VECTOR_COLUMNS, stream);
}

CCQ_API ccq_cuda_status ccq_cuda_mat_mul(const ccq_cuda_product * p, void * stream) {
    return run(MATRIX_PATH, p, MAX_GRID_Y / 2 * TILE_COLS, stream);
}
