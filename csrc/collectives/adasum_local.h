#pragma once
#include <span>

#include "collectives/adasum_tree.h"
#include "kernels/kernels.h"

namespace adareduce {

/// Vectors of work memory that adasum_local needs.
int adasum_local_work_vectors(const AdasumTree& tree);

/// Adasum of one tensor of `tree.size` workers that all lie in this process, by the tree and the
/// kernels of adasum_allreduce. Not collective. `inputs` stay as they are; `out` is none of them;
/// `work` has room for adasum_local_work_vectors() vectors. Returns the tensor's orthogonality.
double adasum_local(const KernelTable& kernels, const AdasumTree& tree,
                    std::span<const void* const> inputs, std::int64_t numel, DType dtype, void* out,
                    void* work);

}  // namespace adareduce
