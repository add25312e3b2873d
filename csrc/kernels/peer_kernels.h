#pragma once
#include "kernels/kernels.h"

namespace adareduce {

/// The same elements of several vectors: each pointer is to the first of `numel`.
struct VectorsArgs {
  const void* const* inputs = nullptr;
  int num_inputs = 0;
  std::int64_t numel = 0;
  DType dtype = DType::f32;
};

/// Adds <g_i, g_j> of these elements, i <= j, to gram[gram_index(i, j, num_inputs)].
struct GramArgs {
  VectorsArgs vectors;
  double* gram = nullptr;
};

/// out = sum coefficients[i] * inputs[i], computed in double, in that order, rounded once.
struct WeightedSumArgs {
  VectorsArgs vectors;
  const double* coefficients = nullptr;  ///< [num_inputs]
  void* out = nullptr;                   ///< may be one of the inputs
};

/// Adds {<a,b>, |a|^2, |b|^2} of two nodes of Adasum's tree to `stats`, where a and b are the
/// combinations sum c_i g_i over the inputs whose bits are set in `lower` and `upper`.
struct NodeStatsArgs {
  VectorsArgs vectors;
  const double* coefficients = nullptr;  ///< [num_inputs]
  unsigned lower = 0;                    ///< bit i for input i
  unsigned upper = 0;
  double* stats = nullptr;  ///< [3]
};

/// Arithmetic on memory of several ranks that this rank can address, on the CPU. Float types only,
/// but for copy; 1 to GramTree::kMaxLeaves inputs; else UsageError. Empty vectors are legal.
struct PeerKernelTable {
  void (*gram)(const GramArgs&);
  void (*weighted_sum)(const WeightedSumArgs&);
  void (*node_stats)(const NodeStatsArgs&);
  /// memcpy; `streams`: by stores that leave no copy in this core's cache, where the CPU has them.
  /// A release store makes them visible to other cores after finish_streams() on this thread.
  void (*copy)(const void* from, std::int64_t bytes, void* to, bool streams);
  void (*finish_streams)();
};

/// For the best instruction set that this CPU has, as cpu_kernels().
const PeerKernelTable& cpu_peer_kernels();
/// As cpu_kernels_for().
const PeerKernelTable* cpu_peer_kernels_for(std::string_view isa);

}  // namespace adareduce
