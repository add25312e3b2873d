#include "collectives/adasum_local.h"

#include <algorithm>
#include <array>
#include <cstring>

#include "collectives/context.h"
#include "kernels/coefficients.h"

namespace adareduce {
namespace {

const AdasumTree::Node& node_of(const AdasumTree& tree, int index) {
  return tree.nodes[static_cast<std::size_t>(index - tree.size)];
}

int depth_of(const AdasumTree& tree, int index) {
  if (index < tree.size) return 0;
  const AdasumTree::Node& node = node_of(tree, index);
  return 1 + std::max(depth_of(tree, node.lower), depth_of(tree, node.upper));
}

// Depth first, so that one vector per level is enough: the left child comes to lie where the node
// will, the right one in the first free vector.
class Walk {
 public:
  Walk(const KernelTable& kernels, const AdasumTree& tree, std::span<const void* const> inputs,
       TensorSegment segment, DType dtype)
      : kernels_(kernels), tree_(tree), inputs_(inputs), segment_(segment), dtype_(dtype) {}

  struct Node {
    const void* vector;
    double sum_of_squares;
  };

  Node visit(int index, void* out, char* work) {
    if (index < tree_.size) return {inputs_[static_cast<std::size_t>(index)], 0};
    const AdasumTree::Node& node = node_of(tree_, index);
    const Node lower = visit(node.lower, out, work);
    const Node upper = visit(node.upper, work, work + segment_.numel * size_of(dtype_));
    const SegmentTable table{&segment_, nullptr, 1};
    const VectorPair pair{lower.vector, upper.vector, segment_.range(), dtype_, &table};
    kernels_.pair_stats({pair, stats_.data()}, {});
    kernels_.pair_combine({pair, stats_.data(), out}, {});
    return {out, (node.lower < tree_.size ? stats_[1] : lower.sum_of_squares) +
                     (node.upper < tree_.size ? stats_[2] : upper.sum_of_squares)};
  }

  double orthogonality(const Node& root) const {
    return adasum_orthogonality(stats_.data(), root.sum_of_squares);
  }

 private:
  const KernelTable& kernels_;
  const AdasumTree& tree_;
  std::span<const void* const> inputs_;
  TensorSegment segment_;
  DType dtype_;
  std::array<double, kStatsPerSegment> stats_{};
};

}  // namespace

int adasum_local_work_vectors(const AdasumTree& tree) {
  return depth_of(tree, tree.size - 1 + static_cast<int>(tree.nodes.size()));
}

double adasum_local(const KernelTable& kernels, const AdasumTree& tree,
                    std::span<const void* const> inputs, std::int64_t numel, DType dtype, void* out,
                    void* work) {
  if (tree.nodes.empty()) {
    if (numel > 0) std::memcpy(out, inputs[0], static_cast<std::size_t>(numel * size_of(dtype)));
    return 1.0;
  }
  Walk walk(kernels, tree, inputs, {0, numel}, dtype);
  const int root = tree.size + static_cast<int>(tree.nodes.size()) - 1;
  return walk.orthogonality(walk.visit(root, out, static_cast<char*>(work)));
}

}  // namespace adareduce
