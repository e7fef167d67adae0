/* Kernels for x86 CPUs with AVX-512 VBMI, VBMI2 and VNNI: Ice Lake, Zen 4 and later (compiled with those flags). */
#include <string.h>

#define CCQ_SET ccq_kernels_avx512_vbmi
#define CCQ_ACT int8_t
#define CCQ_ACT_MAX CCQ_ACT8_MAX
#include "../avx512/lanes.h"
#include "mul_mat.h"

#include "../generic/kernels.inl"
