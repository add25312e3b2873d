#include "collectives/adasum_levels.h"

#include "kernels/kernels.h"

namespace adareduce {

AdasumLevels::AdasumLevels(const GramTree& tree, const double* gram)
    : tree_(tree),
      gram_(gram, gram + gram_numel(tree.size)),
      leaves_(static_cast<std::size_t>(tree.size + tree.num_nodes())),
      coefficients_(static_cast<std::size_t>(tree.size)),
      top_(gram_height(tree, tree.size + tree.num_nodes() - 1)) {
  gram_leaves(tree, leaves_.data());
  adasum_of_gram(tree, gram, coefficients_.data(), 1);  // products of leaves have lost nothing
  collect_nodes();
}

void AdasumLevels::collect_nodes() {
  nodes_.clear();
  for (int n = 0; n < tree_.num_nodes(); ++n)
    if (gram_height(tree_, tree_.size + n) == height_) nodes_.push_back(n);
  stats_.assign(nodes_.size() * kStatsPerSegment, 0.0);
}

void AdasumLevels::add(const PeerKernelTable& kernels, const VectorsArgs& vectors) {
  for (std::size_t i = 0; i < nodes_.size(); ++i)
    kernels.node_stats({.vectors = vectors,
                        .coefficients = coefficients_.data(),
                        .lower = leaves_[static_cast<std::size_t>(tree_.lower[nodes_[i]])],
                        .upper = leaves_[static_cast<std::size_t>(tree_.upper[nodes_[i]])],
                        .stats = stats_.data() + i * kStatsPerSegment});
}

void AdasumLevels::climb() {
  for (std::size_t i = 0; i < nodes_.size(); ++i) {
    const int node = nodes_[i];
    double* const stats = stats_.data() + i * kStatsPerSegment;
    const unsigned lower = leaves_[static_cast<std::size_t>(tree_.lower[node])];
    const unsigned upper = leaves_[static_cast<std::size_t>(tree_.upper[node])];
    const auto nothing = [&](unsigned of) {
      return kNothingOfVector *
             gram_product(tree_.size, gram_.data(), coefficients_.data(), of, of).diagonal;
    };
    const double nothing_of_lower = nothing(lower), nothing_of_upper = nothing(upper);
    adasum_combine(stats, nothing_of_lower, nothing_of_upper, tree_.size, lower, upper,
                   coefficients_.data());
    if (node != tree_.num_nodes() - 1) continue;
    double sum_of_squares = 0;
    for (int r = 0; r < tree_.size; ++r)
      sum_of_squares += gram_[static_cast<std::size_t>(gram_index(r, r, tree_.size))];
    orthogonality_ = adasum_orthogonality(stats, sum_of_squares);
  }
  ++height_;
  collect_nodes();
}

}  // namespace adareduce
