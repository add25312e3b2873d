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

/// Of gram, weighted_sum and node_stats.
inline constexpr int kMostInputs = 16;

/// Elements [begin, begin + numel) of all inputs and of `out`, which may be one of the inputs.
struct ReduceRun {
  const void* const* inputs;
  int num_inputs;  ///< at least 1
  void* out;
  std::int64_t begin;
  std::int64_t numel;
  double divisor;   ///< of the result; 1 does nothing
  double* squares;  ///< null, or 2 to add to: squares of all inputs, and of their sum in double
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
  /// Adds <inputs[i], inputs[j]>, i <= j, to the numbers of a Gram matrix, row by row.
  void (*gram[kNumDTypes])(const void* const* inputs, int num_inputs, std::int64_t numel,
                           double* gram);
  /// out = sum coefficients[k] * inputs[k]; `out` may be one of them.
  void (*weighted_sum[kNumDTypes])(const void* const* inputs, int num_inputs, std::int64_t numel,
                                   const double* coefficients, void* out);
  /// Adds <a,b>, |a|^2, |b|^2 of a, b = sum coefficients[k] * inputs[k] over the bits set in
  /// `lower` and `upper`.
  void (*node_stats[kNumDTypes])(const void* const* inputs, std::int64_t numel,
                                 const double* coefficients, unsigned lower, unsigned upper,
                                 double* stats);
  void (*scale[kNumDTypes])(const void* in, std::int64_t numel, double scale, void* out);
  void (*reduce[kNumRunOps][kNumDTypes])(const ReduceRun& run);
  /// How many elements are infinite or not a number.
  std::int64_t (*count_nonfinite[kNumDTypes])(const void* in, std::int64_t numel);
  /// memcpy by stores that leave no copy in the cache, where the CPU has them. They are not ordered
  /// with others before finish_streams() (cpu_kernels.h).
  void (*stream)(const void* from, std::int64_t bytes, void* to);
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
