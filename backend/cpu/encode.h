/* The encoders: working memory and arithmetic that encoder and kernel sets share.
 *
 * One call encodes one block; the driver (encode.c) checks the input, splits rows into blocks and runs blocks on
 * threads, so an encoder holds no state between calls and its bytes depend on its arguments only. */
#ifndef CCQ_ENCODE_H
#define CCQ_ENCODE_H

#include "../core/trellis.h"
#include "../include/ccq.h"

struct ccq_kernels;

/* --- T types (encode_trellis.c) ----------------------------------------------------------------------------------- */

/* Working memory of one encoder thread, and the tables of the T type it encodes.
 *
 * The tables by step & 1 hold the levels in the order in which a Viterbi step reads them: the window
 * (run * part + k) << after | p at (run * ways + p) * part + k; viterbi_step in kernels.inl says what these are. */
typedef struct ccq_trellis {
    int32_t steps;                         /* of a block */
    int32_t stride[2];                     /* of even and odd steps */
    int8_t level[CCQ_TRELLIS_LEVELS];      /* by window */
    int16_t levels[2][CCQ_TRELLIS_LEVELS]; /* of even and odd steps */
    int16_t scaled[2][CCQ_TRELLIS_LEVELS]; /* CCQ_FACTOR_ONE times that */
    uint16_t sorted[CCQ_TRELLIS_STATES];   /* plain steps: the metrics entering a step, by predecessor */
    uint16_t metric[CCQ_TRELLIS_STEPS + 1]
                   [CCQ_TRELLIS_STATES]; /* [i]: least cost of reaching each state before the i-th step */
} ccq_trellis;

enum {
    CCQ_COUPLED_KEPT = 256,
    CCQ_COUPLED_WAYS = CCQ_MOST_SURVIVORS << CCQ_TRELLIS_STRIDE /* on from all survivors */
};

/* Working memory of one encoder thread's searches with coupled errors (coupled.inl).  The reversed trellis passes the
 * same cycles backwards: windows and states have their bits in reverse order, step i is the i-th from the block's end.
 */
typedef struct ccq_coupled {
    ccq_trellis reversed;
    uint16_t reverse[CCQ_TRELLIS_LEVELS];              /* windows with their bits in reverse order */
    const float * coupling;                            /* which one lies in row: it stays as it is for all blocks */
    int16_t row[CCQ_TRELLIS_STEPS][CCQ_TRELLIS_STEPS]; /* the coupling, rows in units of 2^(shift - 15) */
    int32_t shift[CCQ_TRELLIS_STEPS];
    int16_t target[2][CCQ_COUPLED_KEPT][CCQ_TRELLIS_STEPS]; /* of the survivors before even and odd steps, 1/64 level */
    uint16_t state[2][CCQ_COUPLED_KEPT];
    int32_t metric[2][CCQ_COUPLED_KEPT];
    uint16_t found[CCQ_TRELLIS_STATES]; /* the last step after which a state had a survivor << 8 | which */
    uint32_t back[CCQ_TRELLIS_STEPS]
                 [CCQ_COUPLED_KEPT]; /* of each survivor after a step: its window, its parent << 16 */
} ccq_coupled;

/* Fill the tables for the type at `index` (a T type). */
void ccq_trellis_init(ccq_trellis * trellis, int32_t index);
void ccq_coupled_init(ccq_coupled * coupled, const ccq_trellis * trellis);

/* Encode a block; w is NULL for all ones; coupled and coupling (one matrix, as in ccq.h) are NULL where errors are
 * independent; scale_byte < 0: searched; effort is a ccq_effort. */
void ccq_encode_trellis_block(const struct ccq_kernels * kernels, ccq_trellis * trellis, ccq_coupled * coupled,
                              const float * x, const float * w, const float * coupling, int32_t scale_byte,
                              int32_t effort, uint8_t * block);

/* The scale byte that means exactly `scale`, or -1. */
int32_t ccq_trellis_scale_byte(float scale);

/* --- llama.cpp's types of 4 and 5 bits (encode_stock.c) ----------------------------------------------------------- */

enum { CCQ_STOCK_WEIGHTS = 32 };

typedef struct ccq_stock ccq_stock;

/* The type with this id, or NULL. */
const ccq_stock * ccq_stock_type(int32_t gguf_id);
const ccq_type_info * ccq_stock_info(const ccq_stock * type);

/* Encode a block; w, coupling and effort as in ccq_encode_trellis_block. */
void ccq_encode_stock_block(const ccq_stock * type, const float * x, const float * w, const float * coupling,
                            int32_t effort, uint8_t * block);

/* --- P types (encode_paper.c) ------------------------------------------------------------------------------------- */

enum { CCQ_PAPER_LANES = 16, CCQ_P2_STATES = 256, CCQ_P2_WORDS = CCQ_GROUP / CCQ_P2_WORD_WEIGHTS };

/* Weights of a P2 group and their importances by their place in the word: [place][word]. */
typedef struct ccq_p2_words {
    float x[CCQ_P2_WORD_WEIGHTS][CCQ_P2_WORDS], w[CCQ_P2_WORD_WEIGHTS][CCQ_P2_WORDS];
} ccq_p2_words;

/* Encode one block of a P type.  x and importance_or_null are type->block_weights contiguous floats, already checked:
 * x finite, importance finite and >= 0 (NULL: all ones).  block receives type->block_bytes bytes.  Thread safe. */
ccq_status ccq_encode_paper_block(const struct ccq_kernels * kernels, const ccq_type_info * type, const float * x,
                                  const float * importance_or_null, uint8_t * block);

#endif
