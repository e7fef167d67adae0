/* Block encoders.  One call encodes one block; the driver (encode.c) checks the input, splits rows into blocks and runs
 * blocks on threads, so an encoder holds no state between calls and its bytes depend on its arguments only. */
#ifndef CCQ_ENCODE_H
#define CCQ_ENCODE_H

#include "../include/ccq.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Encode one block of a P type.  x and importance_or_null are type->block_weights contiguous floats, already checked:
 * x finite, importance finite and >= 0 (NULL: all ones).  block receives type->block_bytes bytes.  Thread safe. */
ccq_status ccq_encode_paper_block(const ccq_type_info * type, const float * x, const float * importance_or_null,
                                  uint8_t * block);

#ifdef __cplusplus
}
#endif
#endif
