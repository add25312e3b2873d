#include "engine/cuda/standalone_tables.h"

#include "engine/cuda/device_memory.h"

namespace adareduce::cuda {
namespace {

template <typename T>
DeviceBuffer uploaded(const std::vector<T>& values) {
  const auto bytes = static_cast<std::int64_t>(values.size() * sizeof(T));
  DeviceBuffer buffer(bytes);
  if (bytes > 0)
    ADAREDUCE_CUDA(cudaMemcpy(buffer.data(), values.data(), static_cast<std::size_t>(bytes),
                              cudaMemcpyHostToDevice));
  return buffer;
}

}  // namespace

struct StandaloneTables::Memory {
  DeviceBuffer segments, items, first, slots;
};

StandaloneTables::StandaloneTables(std::vector<TensorSegment> segments)
    : segments_(std::move(segments)),
      items_(make_items(segments_.data(), static_cast<std::int64_t>(segments_.size()))),
      memory_(std::make_unique<Memory>()) {
  const auto num_items = static_cast<std::int64_t>(items_.items.size());
  memory_->segments = uploaded(segments_);
  memory_->items = uploaded(items_.items);
  memory_->first = uploaded(items_.first);
  memory_->slots =
      DeviceBuffer(num_items * kSlotsPerItem * static_cast<std::int64_t>(sizeof(double)));
  item_table_ = {items_.items.data(), memory_->items.at<const Item>(0),
                 items_.first.data(), memory_->first.at<const std::int64_t>(0),
                 num_items,           memory_->slots.at<double>(0)};
  table_ = {segments_.data(), memory_->segments.at<const TensorSegment>(0),
            static_cast<std::int64_t>(segments_.size()), &item_table_};
}

StandaloneTables::~StandaloneTables() = default;

std::vector<Item> StandaloneTables::items_from_device() const {
  std::vector<Item> items(items_.items.size());
  if (!items.empty())
    ADAREDUCE_CUDA(cudaMemcpy(items.data(), item_table_.on_device, items.size() * sizeof(Item),
                              cudaMemcpyDeviceToHost));
  return items;
}

}  // namespace adareduce::cuda
