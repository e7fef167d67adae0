/* Kernels for any CPU of the target architecture (no instruction set beyond the compiler's default). */
#define CCQ_SET ccq_kernels_scalar
#define CCQ_ACT int16_t
#define CCQ_ACT_MAX CCQ_ACT16_MAX
#include "../generic/kernels.inl"
