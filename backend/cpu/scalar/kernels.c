/* Kernels for any CPU of the target architecture (no instruction set beyond the compiler's default). */
#define CCQ_SET ccq_kernels_scalar
#include "../kernels.inl"
