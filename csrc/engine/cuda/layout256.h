#pragma once
#include <cstdint>

namespace adareduce::cuda {

/// Lays arrays one after the other in one block of memory, each on 256 bytes.
class Layout256 {
 public:
  /// Returns the array's offset in bytes.
  std::int64_t add(std::int64_t bytes) {
    const std::int64_t offset = end_;
    end_ = (end_ + bytes + 255) / 256 * 256;
    return offset;
  }
  std::int64_t bytes() const { return end_; }

 private:
  std::int64_t end_ = 0;
};

}  // namespace adareduce::cuda
