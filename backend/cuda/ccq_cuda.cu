/* What is behind ccq_cuda.h: arguments are checked, scratch memory comes from the stream's pool, kernels are chosen. */
#include "host.h"
#include "kernels.h"

namespace {

using namespace ccq;

constexpr int64_t MAX_GRID_Y = 65535;

struct type_row {
    int32_t id, weights, bytes;
};

const type_row * find_type(int32_t id) {
#define ROW(STEM, stem, id, weights, bytes) {id, weights, bytes},
    static const type_row rows[] = {CCQ_TYPES(ROW)};
#undef ROW
    for (const type_row & row : rows) {
        if (row.id == id) { return &row; }
    }
    return nullptr;
}

/* --- weights ---------------------------------------------------------------------------------------------------- */

struct dequantize_args {
    const uint8_t * blocks;
    int64_t row_stride, n_rows;
    const int32_t * index;
    int64_t n_out, n_groups, out_stride;
    cudaStream_t stream;
};

template <float (*LEVELS)(const uint8_t *, int, int8_t *), int GROUPS, int BYTES, int TRELLIS, class OUT>
cudaError_t dequantize_rows(const dequantize_args & a, OUT * out) {
    for (int64_t first = 0; first < a.n_out; first += MAX_GRID_Y) { /* the grid has a limit; an index has one pass */
        const int64_t rows = a.n_out - first < MAX_GRID_Y ? a.n_out - first : MAX_GRID_Y;
        const cudaError_t error = CCQ_LAUNCH(
            (dequantize<LEVELS, GROUPS, BYTES, TRELLIS, OUT>), grid_of(divided(a.n_groups, DECODE_GROUPS), rows),
            DECODE_GROUPS, a.stream, a.blocks + first * a.row_stride, a.row_stride,
            a.index != nullptr ? a.n_rows : rows, a.index, a.n_groups, out + first * a.out_stride, a.out_stride);
        if (error != cudaSuccess) { return error; }
    }
    return cudaSuccess;
}

template <float (*LEVELS)(const uint8_t *, int, int8_t *), int GROUPS, int BYTES, int TRELLIS>
cudaError_t dequantize_to(int32_t out_type, const dequantize_args & a, void * out) {
    switch (out_type) {
    case CCQ_CUDA_F32: return dequantize_rows<LEVELS, GROUPS, BYTES, TRELLIS>(a, static_cast<float *>(out));
    case CCQ_CUDA_F16: return dequantize_rows<LEVELS, GROUPS, BYTES, TRELLIS>(a, static_cast<half_bits *>(out));
    default: return dequantize_rows<LEVELS, GROUPS, BYTES, TRELLIS>(a, static_cast<bfloat16_bits *>(out));
    }
}

cudaError_t dequantize_type(int32_t type, int32_t out_type, const dequantize_args & a, void * out) {
    switch (type) {
#define CASE(STEM, stem, id, weights, bytes)                                                                           \
    case id:                                                                                                           \
        return dequantize_to < ccq_group_##stem, CCQ_##STEM##_GROUPS, bytes,                                           \
               (int)CCQ_INDEX_##STEM<(int)CCQ_FIRST_PAPER_INDEX>(out_type, a, out);
        CCQ_TYPES(CASE)
#undef CASE
    default: return cudaErrorInvalidValue;
    }
}

/* --- products --------------------------------------------------------------------------------------------------- */

template <act_layout LAYOUT>
cudaError_t quantize_rows(const ccq_cuda_product & in, int64_t n_rows, uint8_t * act, cudaStream_t stream) {
    const int64_t n_groups = in.n / CCQ_GROUP, stride = activations<LAYOUT>::row_bytes(n_groups);
    for (int64_t first = 0; first < n_rows; first += MAX_GRID_Y) {
        const int64_t rows = n_rows - first < MAX_GRID_Y ? n_rows - first : MAX_GRID_Y;
        const dim3 grid = grid_of(divided(n_groups, QUANTIZE_THREADS / 32), rows);
        uint8_t * to = act + first * stride;
        cudaError_t error;
        if (in.x_type == CCQ_CUDA_F32) {
            error =
                CCQ_LAUNCH((quantize<LAYOUT, float>), grid, QUANTIZE_THREADS, stream,
                           static_cast<const float *>(in.x) + first * in.x_stride, in.x_stride, n_groups, to, stride);
        } else if (in.x_type == CCQ_CUDA_F16) {
            error = CCQ_LAUNCH((quantize<LAYOUT, half_bits>), grid, QUANTIZE_THREADS, stream,
                               static_cast<const half_bits *>(in.x) + first * in.x_stride, in.x_stride, n_groups, to,
                               stride);
        } else {
            error = CCQ_LAUNCH((quantize<LAYOUT, bfloat16_bits>), grid, QUANTIZE_THREADS, stream,
                               static_cast<const bfloat16_bits *>(in.x) + first * in.x_stride, in.x_stride, n_groups,
                               to, stride);
        }
        if (error != cudaSuccess) { return error; }
    }
    return cudaSuccess;
}

ccq_cuda_status check_product(const ccq_cuda_product * p, int64_t most_cols) {
    if (p == nullptr) { return CCQ_CUDA_ERR_ARGUMENT; }
    const type_row * type = find_type(p->type);
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

product to_kernel(const ccq_cuda_product & in, const uint8_t * act, int64_t act_stride) {
    product p;
    p.blocks = static_cast<const uint8_t *>(in.blocks);
    p.row_stride = in.row_stride;
    p.expert_stride = in.ids != nullptr ? in.expert_stride : 0;
    p.n_rows = in.n_rows;
    p.n_groups = in.n / CCQ_GROUP;
    p.act = act;
    p.act_stride = act_stride;
    p.ids = in.ids;
    p.n_experts = in.ids != nullptr ? in.n_experts : 1;
    p.repeat = in.repeat;
    p.n_cols = in.n_cols;
    p.out = in.out;
    p.out_stride = in.out_stride;
    return p;
}

/* With fewer groups than this, four rows a thread would leave multiprocessors of a large GPU idle. */
enum { MANY_GROUPS = 1 << 18 };

template <class GROUP, int COLS, int ROWS>
cudaError_t launch_mat_vec(const ccq_cuda_product & in, cudaStream_t stream) {
    constexpr act_layout LAYOUT = operands<GROUP, COLS>::LAYOUT;
    const int64_t stride = activations<LAYOUT>::row_bytes(in.n / CCQ_GROUP), rows = divided(in.n_cols, in.repeat);
    scratch memory(stream);
    cudaError_t error = memory.allocate(rows * stride + 16);
    if (error == cudaSuccess && in.n > 0) { error = quantize_rows<LAYOUT>(in, rows, memory.bytes(), stream); }
    if (error != cudaSuccess) { return error; }
    const product p = to_kernel(in, memory.bytes(), stride);
    int span = 1;
    while (span < VECTOR_THREADS && span < p.n_groups) { span *= 2; }
    const int64_t rows_per_block = VECTOR_THREADS / span * ROWS;
    return CCQ_LAUNCH((mat_vec<GROUP, COLS, ROWS>), grid_of(divided(p.n_rows, rows_per_block), divided(p.n_cols, COLS)),
                      VECTOR_THREADS, stream, p, span);
}

template <class GROUP> cudaError_t vector_product(const ccq_cuda_product & in, cudaStream_t stream) {
    if (in.n_cols == 1 || in.ids != nullptr) {
        const bool many = in.n_rows * (in.n / CCQ_GROUP) * (in.ids != nullptr ? in.n_cols : 1) >= MANY_GROUPS;
        return many ? launch_mat_vec<GROUP, 1, 4>(in, stream) : launch_mat_vec<GROUP, 1, 1>(in, stream);
    }
    return in.n_cols <= 4 ? launch_mat_vec<GROUP, 4, 2>(in, stream) : launch_mat_vec<GROUP, 8, 1>(in, stream);
}

template <class GROUP> cudaError_t matrix_product(const ccq_cuda_product & in, cudaStream_t stream) {
    const int64_t stride = activations<ACT_NATURAL>::row_bytes(in.n / CCQ_GROUP), rows = divided(in.n_cols, in.repeat);
    int64_t max_tiles = divided(in.n_cols, TILE_COLS);
    int64_t table = 0; /* counts, columns, tiles */
    if (in.ids != nullptr) {
        max_tiles += in.n_experts < in.n_cols ? in.n_experts : in.n_cols; /* every expert may leave one unfilled */
        max_tiles += 1;
        table = (in.n_experts + 1 + in.n_cols) * (int64_t)sizeof(int32_t) + max_tiles * (int64_t)sizeof(col_tile);
    }
    if (max_tiles > MAX_GRID_Y) { return cudaErrorInvalidValue; }
    scratch memory(stream);
    cudaError_t error = memory.allocate(rows * stride + table + 16);
    if (error == cudaSuccess && in.n > 0) { error = quantize_rows<ACT_NATURAL>(in, rows, memory.bytes(), stream); }
    int32_t * columns = nullptr;
    col_tile * tiles = nullptr;
    if (error == cudaSuccess && in.ids != nullptr) {
        int32_t * counts = reinterpret_cast<int32_t *>(memory.bytes() + rows * stride);
        columns = counts + in.n_experts + 1;
        tiles = reinterpret_cast<col_tile *>(columns + in.n_cols);
        error = CCQ_LAUNCH((sort_columns), grid_of(1, 1), SORT_THREADS, stream, in.ids, (int32_t)in.n_cols,
                           in.n_experts, counts, columns, tiles, (int32_t)max_tiles);
    }
    if (error != cudaSuccess) { return error; }
    return CCQ_LAUNCH((mat_mul<GROUP>), grid_of(divided(in.n_rows, TILE_ROWS), max_tiles), MATRIX_THREADS, stream,
                      to_kernel(in, memory.bytes(), stride), columns, tiles);
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
    const type_row * row = find_type(type);
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

#define CCQ_PRODUCT(name, most_cols, function)                                                                         \
    CCQ_API ccq_cuda_status name(const ccq_cuda_product * p, void * stream) {                                          \
        const ccq_cuda_status status = check_product(p, most_cols);                                                    \
        if (status != CCQ_CUDA_OK || p->n_rows == 0 || p->n_cols == 0) { return status; }                              \
        switch (p->type) {                                                                                             \
            CCQ_TYPES(function)                                                                                        \
        default: return CCQ_CUDA_ERR_TYPE;                                                                             \
        }                                                                                                              \
    }
#define VECTOR(STEM, stem, id, weights, bytes)                                                                         \
    case id: return checked(vector_product<group_##stem>(*p, static_cast<cudaStream_t>(stream)));
#define MATRIX(STEM, stem, id, weights, bytes)                                                                         \
    case id: return checked(matrix_product<group_##stem>(*p, static_cast<cudaStream_t>(stream)));
CCQ_PRODUCT(ccq_cuda_mat_vec, p != nullptr && p->ids != nullptr ? MAX_GRID_Y : CCQ_CUDA_MAX_VECTOR_COLUMNS, VECTOR)
CCQ_PRODUCT(ccq_cuda_mat_mul, MAX_GRID_Y / 2 * TILE_COLS, MATRIX)
