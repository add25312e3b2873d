#pragma once
#include <memory>
#include <vector>

#include "kernels/cuda/cuda_kernels.h"

namespace adareduce::cuda {

/// The tables of a fused buffer on the current GPU, without a group: for tests and benchmarks of
/// kernels.
class StandaloneTables {
 public:
  explicit StandaloneTables(std::vector<TensorSegment> segments);
  ~StandaloneTables();
  StandaloneTables(const StandaloneTables&) = delete;
  StandaloneTables& operator=(const StandaloneTables&) = delete;

  const SegmentTable& segments() const { return table_; }
  /// Copied back from the device; waits for it.
  std::vector<Item> items_from_device() const;
  std::int64_t num_items() const { return item_table_.count; }

 private:
  struct Memory;
  std::vector<TensorSegment> segments_;
  Items items_;
  std::unique_ptr<Memory> memory_;
  ItemTable item_table_;
  SegmentTable table_;
};

}  // namespace adareduce::cuda
