#pragma once
#include <vector>

#include "kernels/gram.h"
#include "kernels/peer_kernels.h"

namespace adareduce {

/// Adasum's coefficients for a tensor whose Gram matrix has lost too many digits: products of nodes
/// above the leaves are taken from vectors. Level by level: add() the products of the nodes of a
/// level over all elements, anywhere and in parts, add up the parts, then climb().
class AdasumLevels {
 public:
  AdasumLevels(const GramTree& tree, const double* gram);

  /// Some level is left.
  bool is_climbing() const { return height_ <= top_; }
  /// Adds products over these elements of all vectors to stats().
  void add(const PeerKernelTable& kernels, const VectorsArgs& vectors);
  /// Of the nodes of this level, [nodes][3].
  std::vector<double>& stats() { return stats_; }
  /// With the sums over all elements in stats(): to the next level.
  void climb();

  const std::vector<double>& coefficients() const { return coefficients_; }
  double orthogonality() const { return orthogonality_; }

 private:
  void collect_nodes();

  const GramTree& tree_;
  const std::vector<double> gram_;
  std::vector<unsigned> leaves_;
  std::vector<double> coefficients_;
  std::vector<int> nodes_;  // of this level
  std::vector<double> stats_;
  int height_ = 2;
  int top_ = 0;
  double orthogonality_ = 1;
};

}  // namespace adareduce
