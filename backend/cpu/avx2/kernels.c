/* Kernels for x86 CPUs with AVX2 and FMA (compiled with those flags). */
#define CCQ_SET ccq_kernels_avx2
#define CCQ_ACT int16_t
#define CCQ_ACT_MAX CCQ_ACT16_MAX
#include "multiply.h" /* what mul_mat.h multiplies with */

#include "groups.h"
#include "lanes.h"
#include "mul_mat.h"

#include "../generic/kernels.inl"
