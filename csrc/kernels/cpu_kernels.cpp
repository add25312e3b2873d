#include "kernels/cpu_kernels.h"

namespace adareduce {

const KernelTable kCpuKernels{
    "cpu", cpu::pair_stats, cpu::pair_combine, cpu::pack, cpu::unpack, cpu::sum,
};

bool has_arithmetic(DType dtype) { return dtype == DType::f32 || dtype == DType::f64; }

}  // namespace adareduce
