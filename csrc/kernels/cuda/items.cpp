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

}  // namespace adareduce::cuda
