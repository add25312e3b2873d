#pragma once
#include "kernels/kernels.h"
#include "transports/transport.h"

namespace adareduce {

/// What a collective works with: a group of ranks, and arithmetic where the data lie.
struct Context {
  Transport& transport;
  const KernelTable& kernels;
  Stream stream{};
};

/// Collectives of one process set run one after the other and complete each exchange before the
/// next, so that one tag is enough.
inline constexpr int kDataTag = 1;

/// The address of element `index`.
inline char* at(void* base, std::int64_t index, std::int64_t width) {
  return static_cast<char*>(base) + index * width;
}
inline const char* at(const void* base, std::int64_t index, std::int64_t width) {
  return static_cast<const char*>(base) + index * width;
}

}  // namespace adareduce
