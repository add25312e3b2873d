#pragma once
#include "kernels/kernels.h"

namespace adareduce::cuda {

/// Adds up what the warps have left in the items' slots, per segment and in the order of the items:
/// the first `num_sums` of a slot as sums, the one behind them as a count.
struct AddSlotsArgs {
  const SegmentTable* segments = nullptr;
  Range items;  ///< indices; other items count as zero
  int num_sums = 0;
  double* sums = nullptr;          ///< [segments][num_sums]
  std::int64_t* counts = nullptr;  ///< [segments]; or null
};
void add_slots(const AddSlotsArgs& args, Stream stream);

/// Adds the first two numbers of all slots of `items` to the two numbers of the groups of their
/// segments, in order. Overwrites slots.
struct AddSlotsToGroupsArgs {
  const SegmentTable* segments = nullptr;
  Range items;
  const std::int32_t* group_of = nullptr;
  double* groups = nullptr;  ///< [groups][2]
};
void add_slots_to_groups(const AddSlotsToGroupsArgs& args, Stream stream);

}  // namespace adareduce::cuda
