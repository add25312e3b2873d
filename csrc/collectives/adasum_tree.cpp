#include "collectives/adasum_tree.h"

#include <bit>

#include "base/errors.h"

namespace adareduce {

std::vector<Rank> AdasumTree::owners_of(int index) const {
  if (index < size) return {index};
  return nodes[static_cast<std::size_t>(index - size)].owners;
}

AdasumTree make_adasum_tree(int size) {
  if (size < 1) throw UsageError(concat("make_adasum_tree: size must be positive, got ", size));
  AdasumTree tree;
  tree.size = size;
  const auto add_node = [&](AdasumTree::Kind kind, int lower, int upper) {
    std::vector<Rank> owners = tree.owners_of(lower);
    if (kind == AdasumTree::Kind::halve) {
      const std::vector<Rank> others = tree.owners_of(upper);
      owners.insert(owners.end(), others.begin(), others.end());
    }
    tree.nodes.push_back({kind, lower, upper, std::move(owners)});
    return tree.size + static_cast<int>(tree.nodes.size()) - 1;
  };

  const int core = static_cast<int>(std::bit_floor(static_cast<unsigned>(size)));
  const int folds = size - core;
  std::vector<int> row;
  for (int i = 0; i < folds; ++i) row.push_back(add_node(AdasumTree::Kind::fold, 2 * i, 2 * i + 1));
  for (Rank rank = 2 * folds; rank < size; ++rank) row.push_back(rank);

  while (row.size() > 1) {
    std::vector<int> above;
    for (std::size_t i = 0; i < row.size(); i += 2)
      above.push_back(add_node(AdasumTree::Kind::halve, row[i], row[i + 1]));
    row = std::move(above);
  }
  return tree;
}

std::vector<double> parallel_weights(const AdasumTree& tree) {
  std::vector<double> weights(static_cast<std::size_t>(tree.size) + tree.nodes.size(), 1.0);
  for (std::size_t i = tree.nodes.size(); i-- > 0;) {
    const double half = weights[static_cast<std::size_t>(tree.size) + i] / 2;
    weights[static_cast<std::size_t>(tree.nodes[i].lower)] = half;
    weights[static_cast<std::size_t>(tree.nodes[i].upper)] = half;
  }
  weights.resize(static_cast<std::size_t>(tree.size));
  return weights;
}

GramTree gram_tree(const AdasumTree& tree) {
  if (tree.size > GramTree::kMaxLeaves)
    throw UsageError(
        concat("gram_tree: size must be at most ", GramTree::kMaxLeaves, ", got ", tree.size));
  GramTree result;
  result.size = tree.size;
  for (std::size_t i = 0; i < tree.nodes.size(); ++i) {
    result.lower[i] = static_cast<signed char>(tree.nodes[i].lower);
    result.upper[i] = static_cast<signed char>(tree.nodes[i].upper);
  }
  return result;
}

}  // namespace adareduce
