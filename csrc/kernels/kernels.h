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
  double scale = 1.0;  ///< every element is multiplied; other than 1 only where can_scale()
  /// GPU only. Per segment: receives the sum of squares of what was written. May be null.
  double* squares = nullptr;
  bool streams = false;  ///< CPU only: by stores that leave no copy in the cache, as far as it pays
};
struct UnpackArgs {
  const void* fused = nullptr;
  void* const* tensors = nullptr;
  DType dtype = DType::f32;
  const SegmentTable* segments = nullptr;
  double scale = 1.0;
  /// Per segment: receives the number of results that are infinite or not a number. May be null.
  std::int64_t* nonfinite = nullptr;
  /// GPU only. Per segment: receives the sum of squares of what was read. May be null.
  double* squares = nullptr;
};

/// How reduce makes one of several. Averages are sums with a divisor.
enum class Elementwise : std::uint8_t { sum = 0, min = 1, max = 2, product = 3 };

/// out[i] = (inputs[0][i] op inputs[1][i] op ...) / divisor, in that order.
struct ReduceArgs {
  Elementwise op = Elementwise::sum;
  const void* const* inputs = nullptr;
  int num_inputs = 0;
  void* out = nullptr;  ///< may be one of the inputs
  std::int64_t numel = 0;
  DType dtype = DType::f32;
  double divisor = 1.0;  ///< other than 1 only for sums
};

/// Per group: sum over the inputs of |input|^2, and |(inputs[0] + inputs[1] + ...)|^2.
inline constexpr int kSquaresPerGroup = 2;

/// reduce() of a part of a fused buffer that also adds up squares, in the same pass: of all inputs,
/// and of their sum before it is divided: on CPUs in double, on GPUs in the accumulator's type.
/// Sums of float types only.
struct ReduceSquaresArgs {
  ReduceArgs reduce;
  std::int64_t begin = 0;  ///< where in the fused buffer the inputs start
  const SegmentTable* segments = nullptr;
  const std::int32_t* group_of = nullptr;  ///< per segment
  double* squares = nullptr;               ///< [groups][kSquaresPerGroup], added to
};

/// Per segment: the sum of |g_i|^2 over the leaves below a node of Adasum's tree. A leaf's is among
/// the node's pair statistics; those of inner nodes are carried along with them.
struct LeafSquaresArgs {
  std::int64_t num_segments = 0;
  double* of_node = nullptr;  ///< [segments]: of this rank's operand, then of the node
  double* carried = nullptr;  ///< [segments]: what the ranks that share a pair add up
  /// contribute_leaf_squares: `of_node` goes into `carried`, or zeros do.
  bool contributes = false;
  /// collect_leaf_squares: {<a,b>, |a|^2, |b|^2} of the pair, and which operands are leaves.
  const double* pair_stats = nullptr;  ///< [segments][kStatsPerSegment]
  bool lower_is_leaf = true;
  bool upper_is_leaf = true;
  double* orthogonality = nullptr;  ///< [segments]: receives adasum_orthogonality() of the node
};

/// The arithmetic of one device. Collectives hold a table and never ask which device it is.
/// Empty ranges are legal everywhere. Which types have arithmetic: has_arithmetic(); all can be
/// moved. Arrays inside the arguments lie on the host where their pointers are to be followed by
/// the caller's thread (`tensors`, `inputs`, segments' on_host) and on the device where numbers
/// are read or written (`stats`, `squares`, `group_of`, `nonfinite`).
struct KernelTable {
  const char* device;
  void (*pair_stats)(const PairStatsArgs&, Stream);
  void (*pair_combine)(const PairCombineArgs&, Stream);
  void (*pack)(const PackArgs&, Stream);
  void (*unpack)(const UnpackArgs&, Stream);
  void (*reduce)(const ReduceArgs&, Stream);
  void (*reduce_squares)(const ReduceSquaresArgs&, Stream);
  void (*contribute_leaf_squares)(const LeafSquaresArgs&, Stream);
  void (*collect_leaf_squares)(const LeafSquaresArgs&, Stream);
  void (*copy)(const void* from, std::int64_t bytes, void* to, Stream);
};

/// The CPU's, for the best instruction set that this CPU has. They run on the calling thread, which
/// has finished when a call returns. They throw UsageError for a dtype without the operation.
const KernelTable& cpu_kernels();
/// Those for "baseline", "avx2" or "avx512"; null where this build or this CPU lacks it. All give
/// the same bits, but for sign and payload of a NaN.
const KernelTable* cpu_kernels_for(std::string_view isa);

/// Whether elements of `dtype` can be reduced by `op`.
bool has_arithmetic(ReduceOp op, DType dtype);
/// Whether they can be multiplied by a factor.
bool can_scale(DType dtype);

}  // namespace adareduce
