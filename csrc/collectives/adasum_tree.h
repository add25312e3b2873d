#pragma once
#include <vector>

#include "base/types.h"
#include "kernels/gram.h"

namespace adareduce {

/// The tree over ranks that Adasum is defined by: part of the public contract, see
/// docs/algorithms.md. Leaves 0 ... size-1 are the ranks, node size+i is nodes[i], the last node is
/// the root. Children stand before their parents.
struct AdasumTree {
  enum class Kind {
    fold,   ///< the upper rank hands its whole vector to the lower one and sits out
    halve,  ///< both sides halve what they own
  };
  struct Node {
    Kind kind;
    int lower;  ///< index of the child with the lower ranks
    int upper;
    /// Ranks that hold the node's vector, each an equal place of it. Position i of `lower` meets
    /// position i of `upper`.
    std::vector<Rank> owners;
  };

  int size = 1;
  std::vector<Node> nodes;

  /// Ranks that hold the vector of a leaf or node.
  std::vector<Rank> owners_of(int index) const;
};

/// With core the largest power of two <= size: ranks (0,1), (2,3), ... fold until core vectors are
/// left, then neighbours at distance 1, 2, 4, ... are combined. Throws UsageError for size < 1.
AdasumTree make_adasum_tree(int size);

/// What Adasum of equal vectors weighs each rank with: 2^-depth of its leaf. They add up to 1.
std::vector<double> parallel_weights(const AdasumTree& tree);

/// The tree as data for kernels and adasum_of_gram(). Throws UsageError beyond
/// GramTree::kMaxLeaves ranks.
GramTree gram_tree(const AdasumTree& tree);

}  // namespace adareduce
