/* The kernels.  Sizes and layouts are checked by their callers, which go through launch.h. */
#ifndef CCQ_CUDA_KERNELS_H
#define CCQ_CUDA_KERNELS_H

#include "blocks.h"

namespace ccq {

/* --- weights ---------------------------------------------------------------------------------------------------- */

enum { DECODE_GROUPS = 64 };

/* Rows of blocks to floats; row i is row index[i] of the matrix, or i.  A thread decodes a group into shared memory,
 * then all write: so that stores are whole lines.  An index outside the matrix makes a row of NaN. */
template <float (*GROUP_LEVELS)(const uint8_t *, int, int8_t *), int GROUPS, int BYTES, int TRELLIS, class OUT>
__global__ void __launch_bounds__(DECODE_GROUPS)
    dequantize(const uint8_t * blocks, int64_t row_stride, int64_t n_rows, const int32_t * index, int64_t n_groups,
               OUT * out, int64_t out_stride) {
    __shared__ int8_t levels[DECODE_GROUPS][CCQ_GROUP + 4]; /* a word more: neighbours store to different banks */
    __shared__ float scales[DECODE_GROUPS];
    const int64_t first = (int64_t)blockIdx.x * DECODE_GROUPS;
    const int count = n_groups - first < DECODE_GROUPS ? (int)(n_groups - first) : DECODE_GROUPS;
    const int64_t row = index != nullptr ? index[blockIdx.y] : (int64_t)blockIdx.y;
    const bool inside = row >= 0 && row < n_rows;
    if ((int)threadIdx.x < count && inside) {
        const int64_t group = first + threadIdx.x;
        const uint8_t * block = blocks + row * row_stride + group / GROUPS * BYTES;
        int8_t v[CCQ_GROUP];
        scales[threadIdx.x] = GROUP_LEVELS(block, (int)(group % GROUPS), v);
        CCQ_UNROLL
        for (int i = 0; i < CCQ_GROUP; i += 4) { memcpy(&levels[threadIdx.x][i], v + i, 4); }
    }
    __syncthreads();
    out += (int64_t)blockIdx.y * out_stride + first * CCQ_GROUP;
    for (int i = (int)threadIdx.x; i < count * CCQ_GROUP; i += DECODE_GROUPS) {
        const float scale = inside ? scales[i / CCQ_GROUP] : ccq_bits_float(0x7fc00000u);
        float w = (float)levels[i / CCQ_GROUP][i % CCQ_GROUP] * scale;
        if (TRELLIS && scale == 0.0f) { w = 0.0f; }
        if ((ccq_float_bits(scale) & 0x7f800000u) == 0x7f800000u) { w = ccq_bits_float(0x7fc00000u); }
        from_float(w, out + i);
    }
}

/* --- activations ------------------------------------------------------------------------------------------------ */

/* Integers as in ../cpu/ACTIVATIONS.md with 8 bits.  A row is its values followed by a `group_scale` for each group.
 *
 *     paired      one column, T types: each value twice;  128 bytes a group
 *     plain       few columns;                             64 bytes a group
 *     natural     matrix-matrix: the values in their order
 *
 * For the first two, in which a thread holds a group and its neighbour the next one, the 16-byte pieces of 32 groups
 * lie interleaved: piece 0 of all, piece 1 of all, ...: a warp reads 512 contiguous bytes at a time. */
enum act_layout { ACT_PAIRED, ACT_PLAIN, ACT_NATURAL };

struct group_scale {
    float d;     /* a value is d * q */
    int32_t sum; /* of the group's q */
};

enum { TILE_GROUPS = 32 };

template <act_layout LAYOUT> struct activations {
    static constexpr int BYTES = LAYOUT == ACT_PAIRED ? 2 * CCQ_GROUP : CCQ_GROUP;

    static __host__ __device__ __forceinline__ int64_t values(int64_t n_groups) {
        return (n_groups + TILE_GROUPS - 1) / TILE_GROUPS * TILE_GROUPS * BYTES;
    }
    static __host__ __device__ __forceinline__ int64_t row_bytes(int64_t n_groups) {
        return (values(n_groups) + n_groups * (int64_t)sizeof(group_scale) + 15) & ~(int64_t)15;
    }
    static __device__ __forceinline__ int64_t piece(int64_t group, int i) {
        return LAYOUT == ACT_NATURAL
                   ? group * CCQ_GROUP + i * 16
                   : group / TILE_GROUPS * (TILE_GROUPS * BYTES) + i * (TILE_GROUPS * 16) + group % TILE_GROUPS * 16;
    }
};

enum { QUANTIZE_THREADS = 128 };

/* A warp takes a group, a lane two of its values. */
template <act_layout LAYOUT, class IN>
__global__ void __launch_bounds__(QUANTIZE_THREADS)
    quantize(const IN * x, int64_t x_stride, int64_t n_groups, uint8_t * act, int64_t act_stride) {
    const int lane = (int)threadIdx.x % 32;
    const int64_t group = (int64_t)blockIdx.x * (QUANTIZE_THREADS / 32) + threadIdx.x / 32;
    if (group >= n_groups) { return; } /* whole warps */
    x += (int64_t)blockIdx.y * x_stride + group * CCQ_GROUP + 2 * lane;
    act += (int64_t)blockIdx.y * act_stride;
    const float x0 = to_float(x[0]), x1 = to_float(x[1]);
    /* The largest |x|, as bits: integers order like the floats they are, NaN last. */
    const uint32_t b0 = ccq_float_bits(x0) & 0x7fffffffu, b1 = ccq_float_bits(x1) & 0x7fffffffu;
    uint32_t top = b0 > b1 ? b0 : b1;
    for (int i = 16; i > 0; i /= 2) {
        const uint32_t other = __shfl_xor_sync(0xffffffffu, top, i);
        top = other > top ? other : top;
    }
    const float amax = ccq_bits_float(top);
    const bool broken = top >= 0x7f800000u, none = amax < 0x1p-100f;
    int32_t q0 = 0, q1 = 0;
    if (!broken && !none) {
        const float inverse = 127.0f / amax;
        /* Adding 1.5 * 2^23 leaves the nearest integer, ties to even, in the low mantissa bits. */
        q0 = (int32_t)(ccq_float_bits(x0 * inverse + 12582912.0f) - 0x4b400000u);
        q1 = (int32_t)(ccq_float_bits(x1 * inverse + 12582912.0f) - 0x4b400000u);
    }
    int32_t sum = q0 + q1;
    for (int i = 16; i > 0; i /= 2) { sum += __shfl_xor_sync(0xffffffffu, sum, i); }
    const uint32_t two = ((uint32_t)q0 & 255) | ((uint32_t)q1 & 255) << 8;
    using layout = activations<LAYOUT>;
    if (LAYOUT == ACT_PAIRED) {
        *(uint32_t *)(act + layout::piece(group, lane / 4) + lane % 4 * 4) = __byte_perm(two, 0, 0x1100);
    } else {
        *(uint16_t *)(act + layout::piece(group, lane / 8) + lane % 8 * 2) = (uint16_t)two;
    }
    if (lane == 0) {
        group_scale s;
        s.d = broken ? ccq_bits_float(0x7fc00000u) : none ? 0.0f : amax / 127.0f;
        s.sum = sum;
        ((group_scale *)(act + layout::values(n_groups)))[group] = s;
    }
}

/* --- products --------------------------------------------------------------------------------------------------- */

/* out[c][r] = <row r of expert ids[c], activations c / repeat>; without ids the matrix is the only expert. */
struct product {
    const uint8_t * blocks;
    int64_t row_stride, expert_stride;
    int64_t n_rows, n_groups;
    const uint8_t * act;
    int64_t act_stride;
    const int32_t * ids;
    int32_t n_experts, repeat;
    int64_t n_cols;
    float * out;
    int64_t out_stride;
};

enum { VECTOR_THREADS = 128 };

/* Operands of `dp4a`: two for four weights where a column pays for them alone, else one, whose levels are put together
 * once for all columns (16 instructions for four weights and a column, 15 without; but one more for each further column
 * instead of two). */
template <class GROUP, int COLS> struct operands {
    static constexpr bool PAIRS = GROUP::HAS_PAIRS && COLS == 1;
    static constexpr act_layout LAYOUT = PAIRS ? ACT_PAIRED : ACT_PLAIN;

    static __device__ __forceinline__ int32_t get(const GROUP & group, int i) {
        if constexpr (PAIRS) { return (int32_t)group.pair(i); }
        return (int32_t)group.quad(i);
    }
    static __device__ __forceinline__ int32_t offset(int32_t sum) { return PAIRS ? -CCQ_T2_LEVEL_OFFSET * sum : 0; }
};

/* Blocks that a multiprocessor shall hold, which limits a thread's registers: as many as go without spills. */
template <class GROUP, int COLS> constexpr int resident_blocks() {
    return COLS == 8 ? 2 : GROUP::HAS_PAIRS && COLS == 1 ? 6 : 4;
}

/* Few columns.  `span` threads, a power of two, share ROWS rows: each takes every span-th group of all of them, and the
 * activations that it loads serve all ROWS.  A span is at most a block; smaller ones share a block.  Splitting rows
 * among so many threads is also what fills the GPU when a matrix is small.
 *
 * With ids every column has an expert of its own, and COLS is 1. */
template <class GROUP, int COLS, int ROWS>
__global__ void __launch_bounds__(VECTOR_THREADS, resident_blocks<GROUP, COLS>()) mat_vec(const product p, int span) {
    using operand = operands<GROUP, COLS>;
    using layout = activations<operand::LAYOUT>;
    __shared__ float partial[VECTOR_THREADS / 32][ROWS * COLS];
    const int t = (int)threadIdx.x & (span - 1);
    const uint32_t spans = VECTOR_THREADS / (uint32_t)span;
    const int64_t first_row = ((int64_t)blockIdx.x * spans + threadIdx.x / (uint32_t)span) * ROWS;
    const int64_t first_col = (int64_t)blockIdx.y * COLS;
    const uint8_t * blocks = p.blocks;
    bool inside = true;
    if (COLS == 1 && p.ids != nullptr) {
        const int32_t expert = p.ids[first_col];
        inside = expert >= 0 && expert < p.n_experts;
        blocks += inside ? expert * p.expert_stride : 0;
    }
    /* Rows and columns past the end are the last one again; their results are dropped. */
    const uint8_t * row[ROWS];
    CCQ_UNROLL
    for (int r = 0; r < ROWS; r++) {
        row[r] = blocks + (first_row + r < p.n_rows ? first_row + r : p.n_rows - 1) * p.row_stride;
    }
    const uint8_t * act[COLS];
    CCQ_UNROLL
    for (int c = 0; c < COLS; c++) {
        const int64_t col = first_col + c < p.n_cols ? first_col + c : p.n_cols - 1;
        act[c] = p.act + (uint32_t)col / (uint32_t)p.repeat * p.act_stride;
    }
    float total[ROWS][COLS] = {};
    for (int64_t group = t; group < p.n_groups; group += span) {
        GROUP w[ROWS];
        CCQ_UNROLL
        for (int r = 0; r < ROWS; r++) { w[r].load(row[r], group); }
        int32_t dot[ROWS][COLS];
        float d[COLS];
        CCQ_UNROLL
        for (int c = 0; c < COLS; c++) {
            const int2 s = __ldg((const int2 *)(act[c] + layout::values(p.n_groups)) + group);
            d[c] = ccq_bits_float((uint32_t)s.x);
            CCQ_UNROLL
            for (int r = 0; r < ROWS; r++) { dot[r][c] = operand::offset(s.y); }
        }
        CCQ_UNROLL
        for (int i = 0; i < layout::BYTES / 16; i++) {
            uint4 a[COLS];
            CCQ_UNROLL
            for (int c = 0; c < COLS; c++) { a[c] = __ldg((const uint4 *)(act[c] + layout::piece(group, i))); }
            CCQ_UNROLL
            for (int r = 0; r < ROWS; r++) {
                const int32_t w0 = operand::get(w[r], 4 * i), w1 = operand::get(w[r], 4 * i + 1);
                const int32_t w2 = operand::get(w[r], 4 * i + 2), w3 = operand::get(w[r], 4 * i + 3);
                CCQ_UNROLL
                for (int c = 0; c < COLS; c++) {
                    dot[r][c] = __dp4a(w0, (int32_t)a[c].x, dot[r][c]);
                    dot[r][c] = __dp4a(w1, (int32_t)a[c].y, dot[r][c]);
                    dot[r][c] = __dp4a(w2, (int32_t)a[c].z, dot[r][c]);
                    dot[r][c] = __dp4a(w3, (int32_t)a[c].w, dot[r][c]);
                }
            }
        }
        CCQ_UNROLL
        for (int r = 0; r < ROWS; r++) {
            CCQ_UNROLL
            for (int c = 0; c < COLS; c++) { total[r][c] = fmaf(w[r].scale, d[c] * (float)dot[r][c], total[r][c]); }
        }
    }
    CCQ_UNROLL
    for (int r = 0; r < ROWS; r++) {
        CCQ_UNROLL
        for (int c = 0; c < COLS; c++) {
            CCQ_UNROLL
            for (int i = 16; i > 0; i /= 2) {
                const float other = __shfl_xor_sync(0xffffffffu, total[r][c], i);
                total[r][c] += i < span ? other : 0.0f;
            }
            if (threadIdx.x % 32 == 0) { partial[threadIdx.x / 32][r * COLS + c] = total[r][c]; }
        }
    }
    __syncthreads();
    if (t != 0) { return; }
    CCQ_UNROLL
    for (int r = 0; r < ROWS; r++) {
        CCQ_UNROLL
        for (int c = 0; c < COLS; c++) {
            float sum = total[r][c];
            for (int i = 1; i < span / 32; i++) { sum += partial[threadIdx.x / 32 + i][r * COLS + c]; }
            if (first_row + r < p.n_rows && first_col + c < p.n_cols) {
                p.out[(first_col + c) * p.out_stride + first_row + r] = inside ? sum : ccq_bits_float(0x7fc00000u);
            }
        }
    }
}

enum { TILE_ROWS = 64, TILE_COLS = 64, MATRIX_THREADS = 128, STAGE = MATRIX_THREADS / TILE_ROWS };

/* Which columns a block of mat_mul takes: those of one expert, at most TILE_COLS, columns[first] to columns[end - 1].
 */
struct col_tile {
    int32_t expert, first, end;
};

enum { SORT_THREADS = 256 };

/* Columns in order of their experts, and tiles of them; tiles that are not needed are empty.  One block; each thread
 * takes every SORT_THREADS-th expert, so the order within an expert is that of the columns.  Columns with an expert
 * that does not exist come last, with expert -1. */
__global__ void __launch_bounds__(SORT_THREADS)
    sort_columns(const int32_t * ids, int32_t n_cols, int32_t n_experts, int32_t * counts, int32_t * columns,
                 col_tile * tiles, int32_t max_tiles) {
    for (int32_t e = (int32_t)threadIdx.x; e <= n_experts; e += SORT_THREADS) {
        int32_t count = 0;
        for (int32_t c = 0; c < n_cols; c++) { count += (ids[c] >= 0 && ids[c] < n_experts ? ids[c] : n_experts) == e; }
        counts[e] = count;
    }
    __syncthreads();
    if (threadIdx.x == 0) { /* counts become ends; the tiles of all experts */
        int32_t at = 0, tile = 0;
        for (int32_t e = 0; e <= n_experts; e++) {
            const int32_t end = at + counts[e];
            for (; at < end; at = at + TILE_COLS < end ? at + TILE_COLS : end) {
                tiles[tile].expert = e < n_experts ? e : -1;
                tiles[tile].first = at;
                tiles[tile++].end = at + TILE_COLS < end ? at + TILE_COLS : end;
            }
            counts[e] = end;
        }
        for (; tile < max_tiles; tile++) { tiles[tile].first = tiles[tile].end = 0; }
    }
    __syncthreads();
    for (int32_t e = (int32_t)threadIdx.x; e <= n_experts; e += SORT_THREADS) {
        int32_t at = e > 0 ? counts[e - 1] : 0;
        for (int32_t c = 0; c < n_cols; c++) {
            if ((ids[c] >= 0 && ids[c] < n_experts ? ids[c] : n_experts) == e) { columns[at++] = c; }
        }
    }
}

/* Many columns: a block computes TILE_ROWS x TILE_COLS results, a warp 16 x TILE_COLS.  In each step its threads decode
 * STAGE groups of all rows, one group each, to int8 in shared memory, from where tensor cores multiply them; what they
 * give is scaled once per group.
 *
 * The order of the 64 products in a group is free, so a lane takes 16 consecutive weights, and 16 activations, as the
 * four operands of two steps: all are one load of 16 bytes.  Those four pieces of a row are stored with their numbers
 * XORed with the row's (swizzled), so that the stores of 8 neighbouring rows go to different banks. */
template <class GROUP>
__global__ void __launch_bounds__(MATRIX_THREADS, 4)
    mat_mul(const product p, const int32_t * columns, const col_tile * tiles) {
    using layout = activations<ACT_NATURAL>;
    __shared__ uint4 levels[STAGE][TILE_ROWS][4], values[STAGE][TILE_COLS][4];
    __shared__ float scales[STAGE][TILE_ROWS], factors[STAGE][TILE_COLS];
    __shared__ int32_t column[TILE_COLS];
    col_tile tile;
    if (tiles != nullptr) {
        tile = tiles[blockIdx.y];
    } else {
        tile.expert = 0;
        tile.first = (int32_t)blockIdx.y * TILE_COLS;
        tile.end = p.n_cols - tile.first < TILE_COLS ? (int32_t)p.n_cols : tile.first + TILE_COLS;
    }
    if (tile.first == tile.end) { return; }
    const int t = (int)threadIdx.x, lane = t % 32, warp_row = t / 32 * 16;
    const int64_t first_row = (int64_t)blockIdx.x * TILE_ROWS;
    const int count = tile.end - tile.first;
    if (t < TILE_COLS) { /* past the end the last one again */
        const int32_t at = tile.first + (t < count ? t : count - 1);
        column[t] = columns != nullptr ? columns[at] : at;
    }
    __syncthreads();
    const int my_row = t % TILE_ROWS, my_group = t / TILE_ROWS;
    const int64_t last = p.n_rows - 1;
    const uint8_t * row = p.blocks + (tile.expert > 0 ? tile.expert : 0) * p.expert_stride +
                          (first_row + my_row < last ? first_row + my_row : last) * p.row_stride;
    float total[TILE_COLS / 8][4] = {};
    for (int64_t group = 0; group < p.n_groups; group += STAGE) {
        const int stages = p.n_groups - group < STAGE ? (int)(p.n_groups - group) : STAGE;
        if (my_group < stages) {
            GROUP w;
            w.load(row, group + my_group);
            scales[my_group][my_row] = w.scale;
            CCQ_UNROLL
            for (int i = 0; i < 4; i++) {
                levels[my_group][my_row][i ^ (my_row >> 1 & 3)] =
                    make_uint4(w.quad(4 * i), w.quad(4 * i + 1), w.quad(4 * i + 2), w.quad(4 * i + 3));
            }
        }
        for (int i = t; i < stages * TILE_COLS * 4; i += MATRIX_THREADS) {
            const int c = i / 4 % TILE_COLS, s = i / (4 * TILE_COLS);
            const uint8_t * act = p.act + (uint32_t)column[c] / (uint32_t)p.repeat * p.act_stride;
            values[s][c][i % 4] = __ldg((const uint4 *)(act + layout::piece(group + s, i % 4)));
            if (i % 4 == 0) {
                factors[s][c] =
                    ccq_bits_float((uint32_t)__ldg((const int2 *)(act + layout::values(p.n_groups)) + group + s).x);
            }
        }
        __syncthreads();
        for (int s = 0; s < stages; s++) {
            const int r = warp_row + lane / 4, q = lane % 4;
            const uint4 above = levels[s][r][q ^ (r >> 1 & 3)], below = levels[s][r + 8][q ^ (r >> 1 & 3)];
            const uint32_t a[2][4] = {{above.x, below.x, above.y, below.y}, {above.z, below.z, above.w, below.w}};
            const float scale[2] = {scales[s][r], scales[s][r + 8]};
            CCQ_UNROLL
            for (int n = 0; n < TILE_COLS / 8; n++) {
                const uint4 v = values[s][n * 8 + lane / 4][q];
                const uint32_t b[2][2] = {{v.x, v.y}, {v.z, v.w}};
                int32_t c[4] = {0, 0, 0, 0};
                mma(c, a[0], b[0]);
                mma(c, a[1], b[1]);
                CCQ_UNROLL
                for (int i = 0; i < 4; i++) {
                    total[n][i] = fmaf(scale[i / 2], factors[s][n * 8 + 2 * q + i % 2] * (float)c[i], total[n][i]);
                }
            }
        }
        __syncthreads();
    }
    CCQ_UNROLL
    for (int n = 0; n < TILE_COLS / 8; n++) {
        CCQ_UNROLL
        for (int i = 0; i < 4; i++) {
            const int64_t r = first_row + warp_row + lane / 4 + i / 2 * 8;
            const int c = n * 8 + 2 * (lane % 4) + i % 2;
            if (r < p.n_rows && c < count) {
                p.out[column[c] * p.out_stride + r] = tile.expert >= 0 ? total[n][i] : ccq_bits_float(0x7fc00000u);
            }
        }
    }
}

} // namespace ccq

#endif
