#pragma once
#include <vector>

#include "collectives/adasum_tree.h"

namespace adareduce {

/// One level of vector halving: with whom, what stays, what leaves.
///
/// A fold is a level with an empty `give` on the side that stays and an empty `keep` on the side
/// that sits out, so that the loop needs no branch for worlds that are not a power of two.
struct AdasumLevel {
  Rank peer = 0;
  bool is_lower = true;  ///< this rank's vector is the left operand of adasum(lower, upper)
  Range keep;            ///< elements that this rank owns after the level
  Range give;            ///< elements that the peer owns after the level
  /// Ranks that the pair of vectors is spread over, increasing: their partial statistics are added.
  /// A power of two of them; only this rank where the pair lies whole on it; none where it sits
  /// out.
  std::vector<Rank> group;
  bool is_fold = false;
  bool lower_is_leaf = true;  ///< the left operand is one rank's own vector
  bool upper_is_leaf = true;
  /// This rank is the first owner of its operand, and speaks for it where one voice is enough.
  bool is_speaker = true;
};

/// The levels that `rank` walks forward to reduce `numel` elements, and backward to gather them.
/// Pure: knows no device, transport or dtype.
std::vector<AdasumLevel> make_adasum_schedule(const AdasumTree& tree, Rank rank,
                                              std::int64_t numel);

}  // namespace adareduce
