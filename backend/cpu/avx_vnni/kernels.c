/* Kernels for x86 CPUs with AVX2, FMA and AVX-VNNI: Alder Lake and later (compiled with those flags). */
#define CCQ_SET ccq_kernels_avx_vnni
#define CCQ_ACT int8_t
#define CCQ_ACT_MAX CCQ_ACT8_MAX
#include "multiply.h" /* what mul_mat.h multiplies with */

#include "../avx2/groups.h"
#include "../avx2/lanes.h"
#include "../avx2/mul_mat.h"

#include "../generic/kernels.inl"
