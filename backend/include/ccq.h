/* Public C interface of the CCQ kernels.
 *
 * Everything here returns a status; nothing prints, aborts or keeps state besides the kernel table that the first
 * call chooses.  Types are named by their GGUF tensor type id (spec section 3).  All functions are thread safe. */
#ifndef CCQ_H
#define CCQ_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define CCQ_GROUP 64 /* weights that share one scale; activations too */

typedef enum ccq_status {
    CCQ_OK = 0,
    CCQ_ERR_TYPE = 1,       /* no CCQ type has this id */
    CCQ_ERR_ARGUMENT = 2,   /* a null pointer, a negative count or stride, an encoding parameter outside its range */
    CCQ_ERR_ROW_LENGTH = 3, /* the row length is no multiple of the type's block */
    CCQ_ERR_WEIGHTS = 4,    /* a weight is NaN or infinite */
    CCQ_ERR_IMPORTANCE = 5, /* an importance is negative, NaN or infinite */
    CCQ_ERR_SCALE = 6,      /* a given scale cannot be represented in the type */
    CCQ_ERR_MEMORY = 7,
    CCQ_ERR_ISA_UNKNOWN = 8,     /* CCQ_ISA names no kernel set of this build */
    CCQ_ERR_ISA_UNSUPPORTED = 9, /* CCQ_ISA names one that this CPU cannot run */
} ccq_status;

/* English text for a status; never NULL. */
const char * ccq_status_text(ccq_status status);

typedef struct ccq_type_info {
    const char * name;
    int32_t gguf_id;
    int32_t block_weights;
    int32_t block_bytes;
} ccq_type_info;

/* Row of the type table, or NULL if no type has this id. */
const ccq_type_info * ccq_type(int32_t gguf_id);

/* --- kernel sets ------------------------------------------------------------------------------------------------ */

/* Name of the kernel set in use ("scalar", "avx2", ...).  The set is chosen on the first call of any function: the
 * best that the CPU runs, or the one that the environment variable CCQ_ISA names; if that one is unknown or
 * unsupported, every function fails with CCQ_ERR_ISA_*.  *name is set to NULL on error. */
ccq_status ccq_isa(const char ** name);

/* The i-th kernel set of this build, best first, and whether this CPU runs it; NULL past the end. */
const char * ccq_isa_name(int32_t i, int32_t * supported);

/* --- weights ---------------------------------------------------------------------------------------------------- */

/* Decode n weights (a multiple of the type's block) to float32, bit-exact as the spec says. */
ccq_status ccq_decode(int32_t type, const void * blocks, int64_t n, float * out);

typedef enum ccq_effort {
    CCQ_EFFORT_DEFAULT = 0,
    CCQ_EFFORT_FAST = 1, /* less than half of the default's time; errors 1 to 4 % larger */
    CCQ_EFFORT_BEST = 2, /* three times its time; errors 1 % smaller */
} ccq_effort;

typedef struct ccq_encode_params {
    int32_t n_threads;         /* <= 0: one per online CPU */
    const float * importance;  /* weights of the squared error, >= 0; NULL: all ones */
    int64_t importance_stride; /* floats from one row's importance to the next; 0: all rows share n_cols values */
    const float * scales; /* T types only: fixes each block's scale (n_rows * n_cols / block_weights); NULL: searched */
    int32_t effort;       /* a ccq_effort: how far the encoder searches; P types have one way */
    const float * coupling; /* not P types: a matrix for each block of a row, see ccq_encode; NULL: none */
} ccq_encode_params;

/* Encode an n_rows x n_cols row-major matrix so that sum(importance * (w - decoded)^2) is small.  `type` may also be
 * one of ggml's Q4_0 (2), Q5_0 (6) and IQ4_NL (20), which mixtures have beside ours.  The bytes do not depend on
 * n_threads nor on the kernel set.  blocks receives n_rows * n_cols / block_weights * block_bytes bytes. params may be
 * NULL.
 *
 * With a coupling, the row e of the errors w - decoded of the i-th block of every row of the matrix counts as
 * sum(importance * (e + e U)^2) instead, U being the i-th row-major matrix of block_weights x block_weights: what
 * earlier errors add to later ones.  U must be finite and zero on and below its diagonal (CCQ_ERR_ARGUMENT).  Takes two
 * to three times as long. */
ccq_status ccq_encode(int32_t type, const float * weights, int64_t n_rows, int64_t n_cols,
                      const ccq_encode_params * params, void * blocks);

/* --- products with integer activations -------------------------------------------------------------------------- */

/* The kernels multiply weights with activations that are rounded to integers first.  The format is the kernel set's own
 * (backend/cpu/ACTIVATIONS.md), is never stored in a file and is only to be handed on. */

/* Bytes of a row of n activations (a multiple of 64); rows lie at multiples of 64 bytes. */
ccq_status ccq_act_bytes(int64_t n, size_t * bytes);

/* Quantize the groups of 64 floats [first, first + count) of a row of n: x points to the first of them, act to the row.
 * Group-local: threads may share a row. */
ccq_status ccq_quantize_activations(const float * x, int64_t n, int64_t first, int64_t count, void * act);

/* What a row of n holds: value i is d[i / 64] * q[i], exactly. */
ccq_status ccq_read_activations(const void * act, int64_t n, int16_t * q, float * d);

/* A product: out(c)[r] = <row r, activations of column c>.  Column c's activations are row act_index[c] of `act`, its
 * results row out_index[c] of `out`; an index that is NULL means c itself. */
typedef struct ccq_product {
    int64_t n;           /* weights of a row */
    const void * blocks; /* n_rows rows, row_stride bytes apart */
    int64_t row_stride;
    int64_t n_rows;
    const void * act; /* rows of ccq_act_bytes(n), 64-byte aligned, act_stride bytes apart */
    int64_t act_stride;
    const int32_t * act_index;
    int64_t n_cols;
    float * out; /* rows of at least n_rows floats, out_stride floats apart */
    int64_t out_stride;
    const int32_t * out_index;
    void * work; /* ccq_mul_mat_work bytes, 64-byte aligned, one area per thread */
} ccq_product;

/* Bytes of working memory for products of n weights with up to n_cols columns. */
ccq_status ccq_mul_mat_work(int64_t n, int64_t n_cols, size_t * bytes);

/* Compute a product.  Weights are decoded once for all columns, or once for a few where that is cheaper. */
ccq_status ccq_mul_mat(int32_t type, const ccq_product * product);

#ifdef __cplusplus
}
#endif
#endif
