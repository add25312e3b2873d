// Compiled for any CPU of its family.
#define ADAREDUCE_RUNS kBaselineRuns
#define ADAREDUCE_RUNS_ISA "baseline"
#include "kernels/cpu_runs_body.h"
