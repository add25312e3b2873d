#include <algorithm>

#include "kernels/cuda/cuda_kernels.h"

namespace adareduce::cuda {

Items make_items(const TensorSegment* segments, std::int64_t count) {
  Items result;
  for (std::int64_t s = 0; s < count; ++s) {
    result.first.push_back(static_cast<std::int64_t>(result.items.size()));
    const Range range = segments[s].range();
    for (std::int64_t begin = range.begin; begin < range.end; begin += kItemNumel)
      result.items.push_back(
          {begin, static_cast<std::int32_t>(std::min<std::int64_t>(kItemNumel, range.end - begin)),
           static_cast<std::int32_t>(s)});
  }
  result.first.push_back(static_cast<std::int64_t>(result.items.size()));
  return result;
}

Range items_in(const ItemTable& items, Range range) {
  if (range.empty()) return {};
  const Item* end = items.on_host + items.count;
  const Item* first = std::partition_point(
      items.on_host, end, [&](const Item& item) { return item.range().end <= range.begin; });
  const Item* last =
      std::partition_point(first, end, [&](const Item& item) { return item.begin < range.end; });
  return {first - items.on_host, last - items.on_host};
}

}  // namespace adareduce::cuda
