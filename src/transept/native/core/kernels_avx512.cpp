#define TRANSEPT_ISA avx512
#include "kernels.inl"
