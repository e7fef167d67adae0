/* The kernels of one set, from a template: the including file
 *
 *   - defines CCQ_SET, the name of the table, and CCQ_ACT with CCQ_ACT_MAX, the integers of its activations
 *     (int8_t and CCQ_ACT8_MAX, or int16_t and CCQ_ACT16_MAX),
 *   - includes what it does better than the template; every part of the template says in its head which macro replaces
 *     what (CCQ_HAVE_...).  What depends on the type it does for those in its lists CCQ_OWN_TRELLIS_TYPES and
 *     CCQ_OWN_PAPER_TYPES only; types that it does not list, or no list, are the template's,
 *   - is compiled with that set's flags, and is named in cpu/CMakeLists.txt and in the table of dispatch.c.
 *
 * Loops are written so that GCC and clang vectorise them. */
#include <string.h>

#include "../activations.h"
#include "../kernels.h"
#include "inline.h"

#ifndef CCQ_OWN_TRELLIS_TYPES
#define CCQ_OWN_TRELLIS_TYPES(X)
#endif
#ifndef CCQ_OWN_PAPER_TYPES
#define CCQ_OWN_PAPER_TYPES(X)
#endif

#include "decode.inl"

#include "quantize.inl"

#include "mul_mat.inl"

#include "viterbi.inl"

#include "coupled.inl"

#include "paper.inl"

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Woverride-init" /* the set's own functions replace the plain ones */
const ccq_kernels CCQ_SET = {
#define PLAIN(STEM, stem, id, weights, bytes) [CCQ_INDEX_##STEM] = plain_decode_##stem,
#define OWN(STEM, stem, id, weights, bytes) [CCQ_INDEX_##STEM] = decode_##stem,
    .decode = {CCQ_TYPES(PLAIN) CCQ_OWN_TYPES(OWN)},
#undef PLAIN
#undef OWN
    .act_value_bytes = sizeof(CCQ_ACT),
    .quantize = quantize,
    .work_bytes = most_work_bytes,
#define PLAIN(STEM, stem, id, weights, bytes) [CCQ_INDEX_##STEM] = plain_mul_mat_##stem,
#define OWN(STEM, stem, id, weights, bytes) [CCQ_INDEX_##STEM] = mul_mat_##stem,
    .mul_mat = {CCQ_TYPES(PLAIN) CCQ_OWN_TYPES(OWN)},
#undef PLAIN
#undef OWN
    .viterbi = viterbi,
    .coupled = coupled_pass,
    .scan_p2_5 = scan_p2_5,
    .scan_p2_75 = scan_p2_75,
    .scan_p2 = scan_p2,
    .scan_p2_codes = scan_p2_codes,
};
#pragma GCC diagnostic pop
