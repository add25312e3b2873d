#pragma once
#include "base/types.h"

/// Arithmetic on runs: contiguous elements of one type. Every instruction set has a table of the
/// same functions, which give the same bits but for sign and payload of a NaN (docs/algorithms.md,
/// "Sixteen lanes").
///
/// The files that are compiled for an instruction set include this header and nothing that defines
/// inline functions which they use: the linker keeps one copy of those, and it could be theirs.
namespace adareduce::cpu {

/// What reduce() does with its inputs. Averages are sums with a divisor.
enum RunOp : int { kRunSum = 0, kRunMin = 1, kRunMax = 2, kRunProduct = 3 };
inline constexpr int kNumRunOps = 4;

/// Elements [begin, begin + numel) of all inputs and of `out`, which may be one of the inputs.
struct ReduceRun {
  const void* const* inputs;
  int num_inputs;  ///< at least 1
  void* out;
  std::int64_t begin;
  std::int64_t numel;
  double divisor;   ///< of the result; 1 does nothing
  double* squares;  ///< null, or 2 sums to add to: squares of all inputs, and of (result * divisor)
};

/// Entries are indexed by DType; null where the operation has no meaning for the type.
struct Runs {
  const char* isa;
  /// Writes <lower, upper>, |lower|^2, |upper|^2.
  void (*pair_stats[kNumDTypes])(const void* lower, const void* upper, std::int64_t numel,
                                 double* stats);
  /// out = lower_share * lower + upper_share * upper; `out` may be one of them.
  void (*pair_combine[kNumDTypes])(const void* lower, const void* upper, std::int64_t numel,
                                   double lower_share, double upper_share, void* out);
  void (*scale[kNumDTypes])(const void* in, std::int64_t numel, double scale, void* out);
  void (*reduce[kNumRunOps][kNumDTypes])(const ReduceRun& run);
  /// How many elements are infinite or not a number.
  std::int64_t (*count_nonfinite[kNumDTypes])(const void* in, std::int64_t numel);
  /// Yardsticks for benchmarks: reads `numel` floats and adds them up somehow; y = a x + b y.
  double (*read)(const float* in, std::int64_t numel);
  void (*axpby)(const float* x, float a, float* y, float b, std::int64_t numel);
};

extern const Runs kBaselineRuns;
#ifdef __x86_64__
extern const Runs kAvx2Runs;
extern const Runs kAvx512Runs;
#endif

}  // namespace adareduce::cpu
