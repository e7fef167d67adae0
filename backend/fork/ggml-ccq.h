// The CCQ types inside ggml: what the lines that `ccq-convert integrate` inserts into its sources call.
#pragma once

#include "../core/layouts.h"
#include "ggml.h"

#ifdef __cplusplus
extern "C" {
#endif

// --- ggml-base

bool ggml_is_ccq(enum ggml_type type);

// True if one of the types takes part in the op, as its result or as a source.
bool ggml_ccq_involved(const struct ggml_tensor * op);

// True if a backend that is not the CPU's has kernels of the types: "CUDA", if they were put into the tree.
bool ggml_ccq_runs_on(const char * backend);

#define X(STEM, stem, id, weights, bytes)                                                                              \
    void ggml_ccq_dequantize_row_##stem(const void * x, float * y, int64_t k);                                         \
    void ggml_ccq_quantize_row_##stem(const float * x, void * y, int64_t k);                                           \
    void ggml_ccq_vec_dot_##stem(int n, float * s, size_t bs, const void * x, size_t bx, const void * y, size_t by,    \
                                 int nrc);
CCQ_TYPES(X)
#undef X

// What a row of the CPU backend's table says.
#define GGML_CCQ_CPU_MEMBERS(stem)                                                                                     \
    .from_float = ggml_ccq_quantize_row_##stem, .vec_dot = ggml_ccq_vec_dot_##stem, .vec_dot_type = GGML_TYPE_Q8_0,    \
    .nrows = 1

// A row of the table type_traits_cpu; type_traits.inl has those of type_traits.
#define GGML_CCQ_TRAITS_CPU(STEM, stem, id, weights, bytes) [GGML_TYPE_CCQ_##STEM] = {GGML_CCQ_CPU_MEMBERS(stem)},

// Encodes rows as `ccq-convert quantize` does, with the same bytes.  imatrix: n_per_row importances, or NULL.  Returns
// the bytes written; aborts on weights or importances that are not finite.
size_t ggml_ccq_quantize(enum ggml_type type, const float * src, void * dst, int64_t nrows, int64_t n_per_row,
                         const float * imatrix);

// False, with a line on standard error that names the block, if one holds parameters that no encoder may write.
bool ggml_ccq_validate_row_data(enum ggml_type type, const void * data, size_t n_blocks);

// For trees that give some of the ids of our types to their own: the number in memory of a type in a CCQ file, and the
// other way round.  Other types have one number.
enum ggml_type ggml_ccq_type_of_file(int32_t id);
int32_t ggml_ccq_type_in_file(enum ggml_type type);

// --- ggml-cpu

// Bytes of the work buffer that the node needs while it is computed: 0 if it is no product of ours.
size_t ggml_ccq_work_size(int n_threads, const struct ggml_tensor * node);

// Bytes that a graph needs at the end of the work buffer, beyond what any op needs, for what one product leaves to the
// next.
size_t ggml_ccq_kept_size(struct ggml_tensor * const * nodes, int n_nodes);

// What a thread that computes a node is given: ggml's struct ggml_compute_params, which not every tree declares in a
// header.
struct ggml_ccq_params {
    int ith, nth;
    void * wdata;
    size_t wsize;
    void (*barrier)(void * threads);
    void * threads;
};

// Runs the node `at` of a graph if it is a MUL_MAT, MUL_MAT_ID or GET_ROWS of our types; false if it is none.  Those
// before it have been computed, with the same work buffer.
bool ggml_ccq_compute_forward(const struct ggml_ccq_params * params, struct ggml_tensor * const * nodes, int at);

// False if the op involves our types and the CPU backend would abort.
bool ggml_ccq_supports_op(const struct ggml_tensor * op);

#ifdef __cplusplus
}
#endif
