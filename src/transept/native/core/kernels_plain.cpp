#define TRANSEPT_ISA plain
#include "kernels.inl"
