#include "kernels/cpu_kernels.h"

namespace adareduce {
namespace {

template <const cpu::Runs& runs>
struct CpuKernels {
  static constexpr KernelTable kTable{
      "cpu",
      cpu::pair_stats<runs>,
      cpu::pair_combine<runs>,
      cpu::pack<runs>,
      cpu::unpack<runs>,
      cpu::reduce<runs>,
      cpu::reduce_squares<runs>,
      cpu::contribute_leaf_squares,
      cpu::collect_leaf_squares,
      cpu::copy,
  };
};

}  // namespace

const KernelTable& cpu_kernels() {
  static const KernelTable& best = *cpu::best_table<CpuKernels>();
  return best;
}

const KernelTable* cpu_kernels_for(std::string_view isa) { return cpu::table_for<CpuKernels>(isa); }

const cpu::Runs* cpu::runs_for(std::string_view isa) {
  if (isa == "baseline") return &kBaselineRuns;
#ifdef __x86_64__
  // F16C came before AVX2 and FMA with it in every CPU that has AVX2.
  if (isa == "avx2" && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    return &kAvx2Runs;
  if (isa == "avx512" && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return &kAvx512Runs;
#endif
  return nullptr;
}

bool has_arithmetic(ReduceOp op, DType dtype) {
  const auto code = static_cast<std::size_t>(dtype);
  switch (op) {
    case ReduceOp::adasum:
      return cpu::kBaselineRuns.pair_stats[code] != nullptr;
    case ReduceOp::average:
    case ReduceOp::sum:
      return cpu::kBaselineRuns.reduce[cpu::kRunSum][code] != nullptr;
    case ReduceOp::min:
    case ReduceOp::max:
    case ReduceOp::product:
      return cpu::kBaselineRuns.reduce[cpu::kRunMin][code] != nullptr;
  }
  return false;
}

bool can_scale(DType dtype) {
  return cpu::kBaselineRuns.scale[static_cast<std::size_t>(dtype)] != nullptr;
}

}  // namespace adareduce
