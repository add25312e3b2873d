#pragma once
#include "collectives/shared_walk.h"
#include "kernels/gram.h"

namespace adareduce {

/// One-shot Adasum of every segment (docs/algorithms.md): pack, gram, combine, unpack; gram and
/// combine where the tensors are resident. `orthogonality`, where it is not null, has one number
/// per segment. Collective, as shared_reduce.
Task shared_adasum(SharedContext context, const SharedSchedule& schedule, SharedTensors tensors,
                   const GramTree& tree, double* orthogonality);

/// The same of P vectors that one rank holds, each a fused buffer with these segments: the bits
/// depend on nothing else. `out` may be one of the inputs.
void local_gram_adasum(const PeerKernelTable& kernels, const GramTree& tree,
                       const void* const* inputs, const std::vector<TensorSegment>& segments,
                       DType dtype, void* out, double* orthogonality);

/// Whether Adasum's coefficients cannot be taken from a Gram matrix alone.
inline bool needs_levels(const GramTree& tree, const GramResult& result) {
  return tree.size > 2 && result.cancellation > kMostCancellation;
}

}  // namespace adareduce
