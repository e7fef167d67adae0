/* C interface of libccq_cuda: the CCQ types on an NVIDIA GPU.
 *
 * All pointers are to memory of the current device and all work is queued on `stream` (a cudaStream_t; NULL is the
 * default stream), where nothing waits, unless said otherwise.  Types are named by their GGUF tensor type id (spec
 * section 3). Of a tensor's bytes the aligned 4-byte words with the first and the last one are read whole; device
 * allocations hold them.  All functions are thread safe. */
#ifndef CCQ_CUDA_H
#define CCQ_CUDA_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define CCQ_CUDA_MAX_VECTOR_COLUMNS 8

typedef enum ccq_cuda_status {
    CCQ_CUDA_OK = 0,
    CCQ_CUDA_ERR_TYPE = 1,       /* no CCQ type has this id, or no float type this number */
    CCQ_CUDA_ERR_ARGUMENT = 2,   /* a null pointer, a count or stride that is negative or does not fit */
    CCQ_CUDA_ERR_ROW_LENGTH = 3, /* the row length is no multiple of the type's block */
    CCQ_CUDA_ERR_CUDA = 4,       /* the CUDA runtime refused: ccq_cuda_error */
    CCQ_CUDA_ERR_WEIGHTS = 5,    /* encode: a weight is NaN or infinite */
    CCQ_CUDA_ERR_IMPORTANCE = 6, /* encode: an importance is negative, NaN or infinite */
} ccq_cuda_status;

typedef enum ccq_cuda_float { CCQ_CUDA_F32 = 0, CCQ_CUDA_F16 = 1, CCQ_CUDA_BF16 = 2 } ccq_cuda_float;

/* English text for a status; never NULL. */
const char * ccq_cuda_status_text(ccq_cuda_status status);

/* What CUDA said in this thread's last call that gave CCQ_CUDA_ERR_CUDA; never NULL. */
const char * ccq_cuda_error(void);

/* Devices that can be used. */
ccq_cuda_status ccq_cuda_device_count(int32_t * count);

/* Make `device` this thread's current one; *previous is the one before. */
ccq_cuda_status ccq_cuda_set_device(int32_t device, int32_t * previous);

/* Rows of n weights as floats, `out_stride` floats apart, the exact weights rounded once to their type.  With `index`,
 * row i is row index[i] of the matrix (NaN if there is none) and n_out rows are made, at most 65535; else all rows are,
 * and n_out is ignored. */
ccq_cuda_status ccq_cuda_dequantize(int32_t type, const void * blocks, int64_t row_stride, int64_t n_rows, int64_t n,
                                    const int32_t * index, int64_t n_out, int32_t out_type, void * out,
                                    int64_t out_stride, void * stream);

/* A product with activations that are rounded to 8 bits first (backend/cpu/ACTIVATIONS.md, with its error bound):
 * out[c][r] = <row r, x[c]>.  With `ids` column c takes the matrix of expert ids[c], and x row c / repeat; columns
 * whose id is outside [0, n_experts) become NaN. */
typedef struct ccq_cuda_product {
    int32_t type;
    int64_t n; /* weights of a row */
    const void *
        blocks; /* n_rows rows, row_stride bytes apart; an expert's matrix expert_stride bytes after the last */
    int64_t row_stride;
    int64_t n_rows;
    const int32_t * ids; /* NULL: one matrix */
    int64_t expert_stride;
    int32_t n_experts;
    int32_t repeat; /* columns that share a row of x; 1 without ids */
    const void * x; /* rows of n floats, aligned to two of them, x_stride floats (even) apart */
    int32_t x_type;
    int64_t x_stride;
    int64_t n_cols;
    float * out; /* rows of n_rows floats, out_stride floats apart */
    int64_t out_stride;
} ccq_cuda_product;

/* At most CCQ_CUDA_MAX_VECTOR_COLUMNS columns without ids, 65535 with: weights are multiplied as they are decoded. */
ccq_cuda_status ccq_cuda_mat_vec(const ccq_cuda_product * product, void * stream);

/* Any number of columns up to 4 million: tiles of weights are decoded to int8, for tensor cores. */
ccq_cuda_status ccq_cuda_mat_mul(const ccq_cuda_product * product, void * stream);

/* The encoder of the T types.  The bytes are those of ccq_encode in backend/include/ccq.h, which has more to say about
 * the arguments; scales are always searched. */
typedef struct ccq_cuda_encoding {
    int32_t type;
    const float * weights; /* n_rows rows of n_cols, all arrays contiguous and in the host's memory */
    int64_t n_rows;
    int64_t n_cols;
    const float * importance; /* NULL: all ones */
    int64_t
        importance_stride;  /* floats from one row's importance to the next: n_cols; 0: all rows share n_cols values */
    int32_t effort;         /* a ccq_effort */
    const float * coupling; /* NULL: errors are independent; else n_cols / block matrices of block x block */
    void * blocks;
} ccq_cuda_encoding;

/* Unlike all others this copies to and from the device, and waits. */
ccq_cuda_status ccq_cuda_encode(const ccq_cuda_encoding * encoding, void * stream);

#ifdef __cplusplus
}
#endif
#endif
