/* The kernel sets (one per instruction set): what each must provide, and which is in use. */
#ifndef CCQ_KERNELS_H
#define CCQ_KERNELS_H

#include "../core/decode.h"
#include "../include/ccq.h"
#include "encode.h"

/* The kernels of one instruction set.  Pointers are valid and counts whole blocks: the entry points check.
 *
 * Decoding and the encoder's kernels give the same bits in every set.  Activations and products are a set's own affair
 * within the rules of ACTIVATIONS.md: which integers it multiplies, and in which order it adds. */
typedef struct ccq_kernels {
    /* n_blocks blocks to floats. */
    void (*decode[CCQ_TYPE_COUNT])(const uint8_t * blocks, int64_t n_blocks, float * out);

    /* Activations: bytes of one integer (1 or 2), and n_groups groups of 64 floats to them (activations.h). */
    int32_t act_value_bytes;
    void (*quantize)(const float * x, int64_t n_groups, void * q, float * d, int32_t * sum);

    /* Bytes of ccq_product.work that mul_mat wants, and products as in ccq_mul_mat. */
    size_t (*work_bytes)(int64_t n, int64_t n_cols);
    void (*mul_mat[CCQ_TYPE_COUNT])(const ccq_product * product);

    /* One pass of the Viterbi algorithm over the 64 steps that start at step `first` of the block and wrap around.
     * metric[0] is given; fills metric[1..64].  The meaning of x and factor (NULL for all ones) is ccq_step_cost's. */
    void (*viterbi)(ccq_trellis * trellis, const int16_t * x, const int16_t * factor, int32_t first);
    /* A good cycle through `state` before step 0 where errors are coupled, from coupled->reversed.metric: see
     * generic/coupled.inl. */
    void (*coupled)(ccq_coupled * coupled, const int16_t * x, const int16_t * factor, int32_t keep, int32_t state,
                    uint16_t * window);

    /* err[l] is the least weighted squared error of a group of 64 at scale g[l], l < CCQ_PAPER_LANES. */
    void (*scan_p2_5)(const float * x, const float * w, const float * g, float * err);
    void (*scan_p2_75)(const float * x, const float * w, const float * g, float * err);
    /* The sum of the least errors of a group's words at scale g > 0, given the ints of every byte; and the bytes. */
    double (*scan_p2)(const ccq_p2_words * words, float ints[4][CCQ_P2_STATES], float g);
    double (*scan_p2_codes)(const ccq_p2_words * words, float ints[4][CCQ_P2_STATES], float g, uint8_t * code);
} ccq_kernels;

/* The set in use; CCQ_ERR_ISA_* if there is none. */
ccq_status ccq_active_kernels(const ccq_kernels ** kernels);

/* Position of a type in the tables, or -1. */
int32_t ccq_type_index(int32_t gguf_id);

#endif
