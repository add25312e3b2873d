#include "collectives/adasum_schedule.h"

#include <algorithm>

namespace adareduce {
namespace {

// Halves start on a multiple of this many elements: whole cache lines for every dtype of 4 bytes
// and more, and the 16 lanes of the kernels.
constexpr std::int64_t kSplitAlignment = 16;

struct Halves {
  Range first;
  Range second;
};

Halves halve(Range range) {
  const std::int64_t half = (range.size() / 2 + kSplitAlignment - 1) / kSplitAlignment;
  const std::int64_t middle = std::min(range.begin + half * kSplitAlignment, range.end);
  return {{range.begin, middle}, {middle, range.end}};
}

}  // namespace

std::vector<AdasumLevel> make_adasum_schedule(const AdasumTree& tree, Rank rank,
                                              std::int64_t numel) {
  std::vector<AdasumLevel> levels;
  Range owned{0, numel};
  for (const AdasumTree::Node& node : tree.nodes) {
    const std::vector<Rank> lower = tree.owners_of(node.lower);
    const std::vector<Rank> upper = tree.owners_of(node.upper);
    const auto in_lower = std::find(lower.begin(), lower.end(), rank);
    const auto in_upper = std::find(upper.begin(), upper.end(), rank);
    if (in_lower == lower.end() && in_upper == upper.end()) continue;

    AdasumLevel level;
    level.is_lower = in_lower != lower.end();
    const std::ptrdiff_t position =
        level.is_lower ? in_lower - lower.begin() : in_upper - upper.begin();
    level.is_fold = node.kind == AdasumTree::Kind::fold;
    level.lower_is_leaf = node.lower < tree.size;
    level.upper_is_leaf = node.upper < tree.size;
    level.is_speaker = position == 0;
    level.peer = (level.is_lower ? upper : lower)[static_cast<std::size_t>(position)];

    const Halves halves = level.is_fold ? Halves{owned, {owned.end, owned.end}} : halve(owned);
    level.keep = level.is_lower ? halves.first : halves.second;
    level.give = level.is_lower ? halves.second : halves.first;
    if (std::find(node.owners.begin(), node.owners.end(), rank) != node.owners.end()) {
      level.group = node.owners;
      std::sort(level.group.begin(), level.group.end());
    }
    owned = level.keep;
    levels.push_back(std::move(level));
  }
  return levels;
}

}  // namespace adareduce
