/* Kernels for x86 CPUs with AVX-512 F, BW, DQ and VL (compiled with those flags and FMA): the Viterbi steps have
 * 512-bit vectors of their own, products are those of AVX2. */
#define CCQ_SET ccq_kernels_avx512
#define CCQ_ACT int16_t
#define CCQ_ACT_MAX CCQ_ACT16_MAX
#include "../avx2/multiply.h" /* what mul_mat.h multiplies with */

#include "../avx2/groups.h"
#include "../avx2/mul_mat.h"
#include "lanes.h"

#include "../generic/kernels.inl"
