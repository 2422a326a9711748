#define TRANSEPT_ISA neon
#include "kernels.inl"
