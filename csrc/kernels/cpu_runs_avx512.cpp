// Compiled for AVX-512 F, BW, DQ, VL.
#define ADAREDUCE_RUNS kAvx512Runs
#define ADAREDUCE_RUNS_ISA "avx512"
#include "kernels/cpu_runs_body.h"
