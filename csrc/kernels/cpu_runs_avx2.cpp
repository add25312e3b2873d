// Compiled with -mavx2 -mfma -mf16c.
#define ADAREDUCE_RUNS kAvx2Runs
#define ADAREDUCE_RUNS_ISA "avx2"
#include "kernels/cpu_runs_body.h"
