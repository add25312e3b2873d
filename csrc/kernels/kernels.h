#pragma once
#include "base/types.h"

namespace adareduce {

/// Two vectors about to be combined, both indexed like the fused buffer that they come from.
struct VectorPair {
  const void* lower = nullptr;  ///< of the node with the lower rank
  const void* upper = nullptr;
  Range range;  ///< the elements to read
  DType dtype = DType::f32;
  const SegmentTable* segments = nullptr;
};

/// Per segment: <lower, upper>, |lower|^2, |upper|^2.
inline constexpr int kStatsPerSegment = 3;

struct PairStatsArgs {
  VectorPair pair;
  double* stats =
      nullptr;  ///< [segments][kStatsPerSegment], over the part of each inside the range
};

struct PairCombineArgs {
  VectorPair pair;
  const double* stats = nullptr;  ///< [segments][kStatsPerSegment], over each whole segment
  void* out = nullptr;            ///< may be `lower` or `upper`; indexed like them
};

/// Moves tensors into a fused buffer, or out of it. `tensors` is parallel to the segments.
struct PackArgs {
  const void* const* tensors = nullptr;
  void* fused = nullptr;  ///< padding between segments is set to zero
  std::int64_t numel = 0;
  DType dtype = DType::f32;
  const SegmentTable* segments = nullptr;
  double scale = 1.0;  ///< every element is multiplied; other than 1 only for float types
};
struct UnpackArgs {
  const void* fused = nullptr;
  void* const* tensors = nullptr;
  DType dtype = DType::f32;
  const SegmentTable* segments = nullptr;
  double scale = 1.0;
};

/// out[i] = (inputs[0][i] + inputs[1][i] + ...) / divisor, added in that order.
struct SumArgs {
  const void* const* inputs = nullptr;
  int num_inputs = 0;
  void* out = nullptr;  ///< may be one of the inputs
  std::int64_t numel = 0;
  DType dtype = DType::f32;
  double divisor = 1.0;
};

/// The arithmetic of one device. Collectives hold a table and never ask which device it is.
/// Empty ranges are legal everywhere. Arithmetic is defined for f32 and f64; moving for all types.
struct KernelTable {
  const char* device;
  void (*pair_stats)(const PairStatsArgs&, Stream);
  void (*pair_combine)(const PairCombineArgs&, Stream);
  void (*pack)(const PackArgs&, Stream);
  void (*unpack)(const UnpackArgs&, Stream);
  void (*sum)(const SumArgs&, Stream);
};

/// Runs on the calling thread, which has finished when a call returns. Throws UsageError for a
/// dtype without arithmetic.
extern const KernelTable kCpuKernels;

/// Whether this build adds and scales elements of `dtype`.
bool has_arithmetic(DType dtype);

}  // namespace adareduce
