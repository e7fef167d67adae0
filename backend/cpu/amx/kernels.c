/* Kernels for x86 CPUs with AMX for int8: Sapphire Rapids and later (compiled with those flags). */
#include <string.h>

#define CCQ_SET ccq_kernels_amx
#define CCQ_ACT int8_t
#define CCQ_ACT_MAX CCQ_ACT8_MAX
#include "../avx512/lanes.h"
#include "tiles.h"

#include "../avx512_vbmi/mul_mat.h"

#include "../generic/kernels.inl"
