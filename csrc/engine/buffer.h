#pragma once
#include <cstddef>
#include <cstdlib>
#include <memory>
#include <new>

namespace adareduce {

/// Uninitialised memory on a cache line boundary.
class Buffer {
 public:
  static constexpr std::size_t kAlignment = 64;

  Buffer() = default;
  /// Throws std::bad_alloc.
  explicit Buffer(std::size_t bytes) : bytes_(bytes) {
    if (bytes == 0) return;
    data_.reset(std::aligned_alloc(kAlignment, (bytes + kAlignment - 1) / kAlignment * kAlignment));
    if (data_ == nullptr) throw std::bad_alloc();
  }

  void* data() const { return data_.get(); }
  std::size_t bytes() const { return bytes_; }

  /// Makes room for `bytes`; the contents are lost where it grows.
  void reserve(std::size_t bytes) {
    if (bytes <= bytes_) return;
    *this = Buffer();  // first give back, then ask: never both at once
    *this = Buffer(bytes);
  }
  /// Forgets the memory without giving it back.
  void leak() {
    (void)data_.release();
    bytes_ = 0;
  }

 private:
  struct Free {
    void operator()(void* data) const { std::free(data); }
  };
  std::unique_ptr<void, Free> data_;
  std::size_t bytes_ = 0;
};

}  // namespace adareduce
