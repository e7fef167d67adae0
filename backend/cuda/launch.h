/* Which kernels compute what, and in which scratch memory: for ccq_cuda.cu and for llama.cpp's CUDA backend
 * (../fork/cuda).  Arguments have been checked by the callers. */
#ifndef CCQ_CUDA_LAUNCH_H
#define CCQ_CUDA_LAUNCH_H

#include "host.h"
#include "kernels.h"

namespace ccq {

constexpr int64_t MAX_GRID_Y = 65535;

struct type_row {
    int32_t id, weights, bytes;
};

inline const type_row * type_with_id(int32_t id) {
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

inline cudaError_t dequantize_type(int32_t type, int32_t out_type, const dequantize_args & a, void * out) {
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

/* Rows of x. */
inline int64_t x_rows(const ccq_cuda_product & in) { return divided(in.n_cols, in.repeat); }

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

inline product to_kernel(const ccq_cuda_product & in, const uint8_t * act, int64_t act_stride) {
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
cudaError_t launch_mat_vec(const ccq_cuda_product & in, uint8_t * scratch, cudaStream_t stream) {
    constexpr act_layout LAYOUT = operands<GROUP, COLS>::LAYOUT;
    if (in.n > 0) {
        const cudaError_t error = quantize_rows<LAYOUT>(in, x_rows(in), scratch, stream);
        if (error != cudaSuccess) { return error; }
    }
    const product p = to_kernel(in, scratch, activations<LAYOUT>::row_bytes(in.n / CCQ_GROUP));
    int span = 1;
    while (span < VECTOR_THREADS && span < p.n_groups) { span *= 2; }
    const int64_t rows_per_block = VECTOR_THREADS / span * ROWS;
    return CCQ_LAUNCH((mat_vec<GROUP, COLS, ROWS>), grid_of(divided(p.n_rows, rows_per_block), divided(p.n_cols, COLS)),
                      VECTOR_THREADS, stream, p, span);
}

/* Columns that a thread takes at once. */
inline int vector_columns(const ccq_cuda_product & in) {
    return in.n_cols == 1 || in.ids != nullptr ? 1 : in.n_cols <= 4 ? 4 : 8;
}

template <class GROUP> int64_t vector_scratch(const ccq_cuda_product & in) {
    constexpr act_layout ONE = operands<GROUP, 1>::LAYOUT, SEVERAL = operands<GROUP, 8>::LAYOUT;
    static_assert(SEVERAL == operands<GROUP, 4>::LAYOUT);
    const int64_t n_groups = in.n / CCQ_GROUP;
    return x_rows(in) * (vector_columns(in) == 1 ? activations<ONE>::row_bytes(n_groups)
                                                 : activations<SEVERAL>::row_bytes(n_groups));
}

template <class GROUP> cudaError_t vector_product(const ccq_cuda_product & in, uint8_t * scratch, cudaStream_t stream) {
    switch (vector_columns(in)) {
    case 1: {
        const bool many = in.n_rows * (in.n / CCQ_GROUP) * (in.ids != nullptr ? in.n_cols : 1) >= MANY_GROUPS;
        return many ? launch_mat_vec<GROUP, 1, 4>(in, scratch, stream)
                    : launch_mat_vec<GROUP, 1, 1>(in, scratch, stream);
    }
    case 4: return launch_mat_vec<GROUP, 4, 2>(in, scratch, stream);
    default: return launch_mat_vec<GROUP, 8, 1>(in, scratch, stream);
    }
}

/* Tiles of columns; with ids every expert may leave one unfilled, and so may the ids that name none. */
inline int64_t max_tiles(const ccq_cuda_product & in) {
    return divided(in.n_cols, TILE_COLS) +
           (in.ids == nullptr ? 0 : 1 + (in.n_experts < in.n_cols ? in.n_experts : in.n_cols));
}

inline int64_t matrix_scratch(const ccq_cuda_product & in) {
    int64_t bytes = x_rows(in) * activations<ACT_NATURAL>::row_bytes(in.n / CCQ_GROUP);
    if (in.ids != nullptr) { /* counts, columns, tiles */
        bytes += (in.n_experts + 1 + in.n_cols) * (int64_t)sizeof(int32_t) + max_tiles(in) * (int64_t)sizeof(col_tile);
    }
    return bytes;
}

template <class GROUP> cudaError_t matrix_product(const ccq_cuda_product & in, uint8_t * scratch, cudaStream_t stream) {
    const int64_t stride = activations<ACT_NATURAL>::row_bytes(in.n / CCQ_GROUP), tiles_at_most = max_tiles(in);
    if (tiles_at_most > MAX_GRID_Y) { return cudaErrorInvalidValue; }
    cudaError_t error = cudaSuccess;
    if (in.n > 0) { error = quantize_rows<ACT_NATURAL>(in, x_rows(in), scratch, stream); }
    int32_t * columns = nullptr;
    col_tile * tiles = nullptr;
    if (error == cudaSuccess && in.ids != nullptr) {
        int32_t * counts = reinterpret_cast<int32_t *>(scratch + x_rows(in) * stride);
        columns = counts + in.n_experts + 1;
        tiles = reinterpret_cast<col_tile *>(columns + in.n_cols);
        error = CCQ_LAUNCH((sort_columns), grid_of(1, 1), SORT_THREADS, stream, in.ids, (int32_t)in.n_cols,
                           in.n_experts, counts, columns, tiles, (int32_t)tiles_at_most);
    }
    if (error != cudaSuccess) { return error; }
    return CCQ_LAUNCH((mat_mul<GROUP>), grid_of(divided(in.n_rows, TILE_ROWS), tiles_at_most), MATRIX_THREADS, stream,
                      to_kernel(in, scratch, stride), columns, tiles);
}

/* --- both, for any type ------------------------------------------------------------------------------------------ */

enum product_path { VECTOR_PATH, MATRIX_PATH }; /* ccq_cuda_mat_vec, ccq_cuda_mat_mul */

/* Bytes of scratch memory for a product, which must be aligned to 16. */
inline int64_t product_scratch(product_path path, const ccq_cuda_product & in) {
    if (path == MATRIX_PATH) { return matrix_scratch(in); }
    switch (in.type) {
#define CASE(STEM, stem, id, weights, bytes)                                                                           \
    case id: return vector_scratch<group_##stem>(in);
        CCQ_TYPES(CASE)
#undef CASE
    default: return 0;
    }
}

inline cudaError_t run_product(product_path path, const ccq_cuda_product & in, uint8_t * scratch, cudaStream_t stream) {
    switch (in.type) {
#define CASE(STEM, stem, id, weights, bytes)                                                                           \
    case id:                                                                                                           \
        return path == VECTOR_PATH ? vector_product<group_##stem>(in, scratch, stream)                                 \
                                   : matrix_product<group_##stem>(in, scratch, stream);
        CCQ_TYPES(CASE)
#undef CASE
    default: return cudaErrorInvalidValue;
    }
}

} // namespace ccq

#endif
