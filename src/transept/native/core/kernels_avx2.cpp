#define TRANSEPT_ISA avx2
#include "kernels.inl"
