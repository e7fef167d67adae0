/* Internal interface between the dispatcher, the encoder and the kernel sets (one per instruction set). */
#ifndef CCQ_KERNELS_H
#define CCQ_KERNELS_H

#include <float.h>

#include "../generated/ccq_layouts.h"
#include "../include/ccq.h"

#if FLT_EVAL_METHOD != 0
#error "float arithmetic must be evaluated in float: decoding is bit-exact"
#endif

/* Position of a type in every table below; the order of CCQ_TYPES. */
enum {
#define X(STEM, stem, id, weights, bytes) CCQ_INDEX_##STEM,
    CCQ_TYPES(X)
#undef X
        CCQ_TYPE_COUNT
};

enum {
    CCQ_TRELLIS_LEVELS = 4096,  /* windows of 12 bits */
    CCQ_TRELLIS_STATES = 2048   /* the most states between two steps: 12 bits less a stride of 1 */
};

CCQ_STATIC_ASSERT(CCQ_T1_5_WINDOW_BITS == 12 && CCQ_T2_WINDOW_BITS == 12 && CCQ_T2_5_WINDOW_BITS == 12 &&
                      CCQ_T3_WINDOW_BITS == 12,
                  "the Viterbi tables are made for 12-bit windows");

/* Working memory of one encoder thread, and the tables of the T type it encodes.
 *
 * packed[step & 1] holds the levels as bfloat16 (exact: they have 7 bits), two to a word, in the order in which a
 * Viterbi step reads them; viterbi_step in kernels.inl says which.  Half the bytes of a float table, which would fill
 * half of a first-level cache. */
typedef struct ccq_trellis {
    int32_t stride[2];                               /* of even and odd steps */
    int8_t level[CCQ_TRELLIS_LEVELS];                /* by window */
    uint32_t packed[2][CCQ_TRELLIS_LEVELS / 2];      /* of even and odd steps */
    float sorted[CCQ_TRELLIS_STATES];                /* the metrics entering a step, split by predecessor */
    float metric[CCQ_GROUP + 1][CCQ_TRELLIS_STATES]; /* [i]: least cost of reaching each state before the i-th step */
} ccq_trellis;

/* After each of the first CCQ_COUPLED_OPEN steps only about so many of the best ways are kept; later ones must be able to reach any
 * state, since a cycle has to end where it began. */
enum { CCQ_COUPLED_KEPT = 256, CCQ_COUPLED_OPEN = CCQ_GROUP - 10 };

/* Working memory of a search with coupled errors (coupled.inl), and its tables. */
typedef struct ccq_coupled {
    float owed[2][CCQ_TRELLIS_STATES][CCQ_GROUP]; /* before even and odd steps: added to the targets, by state */
    float level[2][CCQ_TRELLIS_LEVELS];           /* of even and odd steps: by lowest bits, then state after */
    float metric[CCQ_TRELLIS_STATES];
    float split_metric[CCQ_TRELLIS_STATES];
    float split_target[CCQ_TRELLIS_STATES];
    int32_t chosen[CCQ_TRELLIS_STATES];
    uint8_t way[CCQ_GROUP][CCQ_TRELLIS_STATES];
} ccq_coupled;

/* The kernels of one instruction set.  Pointers are valid and counts whole blocks: the entry points check. */
typedef struct ccq_kernels {
    /* n_blocks blocks to floats. */
    void (*decode[CCQ_TYPE_COUNT])(const uint8_t * blocks, int64_t n_blocks, float * out);
    /* n_blocks blocks to integer levels and one scale per group. */
    void (*levels[CCQ_TYPE_COUNT])(const uint8_t * blocks, int64_t n_blocks, int8_t * levels, float * scales);
    /* <blocks, act>, in the order of ACTIVATIONS.md. */
    float (*vec_dot[CCQ_TYPE_COUNT])(const uint8_t * blocks, int64_t n_blocks, const ccq_act_block * act);
    /* The same from decoded levels: n_rows rows after one another, n_cols columns; results as in ccq_mul_mat. */
    void (*panel_dot)(const int8_t * levels, const float * scales, int64_t n_groups, int64_t n_rows,
                      const ccq_act_block * act, int64_t act_stride, int64_t n_cols, float * out, int64_t out_stride);
    void (*quantize)(const float * x, int64_t n_blocks, ccq_act_block * out);
    /* One pass of the Viterbi algorithm over the 64 steps that start at step `first` of the block and wrap around.
     * metric[0] is given; fills metric[1..64].  x is in units of the levels; w is NULL for all ones. */
    void (*viterbi)(ccq_trellis * trellis, const float * x, const float * w, int32_t first);
    /* The best cycle through `state` where errors are coupled; see coupled.inl. */
    void (*coupled)(const ccq_trellis * trellis, ccq_coupled * coupled, const float * x, const float * w,
                    const float * coupling, int32_t state, uint16_t * window);
} ccq_kernels;

extern const ccq_kernels ccq_kernels_scalar;
extern const ccq_kernels ccq_kernels_avx2;
extern const ccq_kernels ccq_kernels_avx512;

/* The set in use; CCQ_ERR_ISA_* if there is none. */
ccq_status ccq_active_kernels(const ccq_kernels ** kernels);

/* Position of a type in the tables, or -1. */
int32_t ccq_type_index(int32_t gguf_id);

/* --- T encoder (encode_trellis.c) ------------------------------------------------------------------------------- */

/* Fill the tables for the type at `index` (a T type). */
void ccq_trellis_init(ccq_trellis * trellis, int32_t index);

/* The tables of `coupled`, for the type of `trellis`. */
void ccq_coupled_init(ccq_coupled * coupled, const ccq_trellis * trellis);

/* Encode 64 weights; w is NULL for all ones; scale_byte < 0: searched; coupled and coupling (64 x 64, as in ccq.h) are
 * NULL where errors are independent. */
void ccq_encode_trellis_block(const ccq_kernels * kernels, ccq_trellis * trellis, const float * x, const float * w,
                              int32_t scale_byte, ccq_coupled * coupled, const float * coupling, uint8_t * block);

/* The scale byte that means exactly `scale`, or -1. */
int32_t ccq_trellis_scale_byte(float scale);

#endif
