#pragma once
#include <cstddef>
#include <cstdint>
#include <string_view>

/// Words that every layer shares. Nothing here allocates, communicates or knows a library.
namespace adareduce {

using Rank = int;

/// Element types. The codes cross the Python border and the wire: append, never renumber.
enum class DType : std::uint8_t {
  u8 = 0,
  i8 = 1,
  i16 = 2,
  i32 = 3,
  i64 = 4,
  f16 = 5,
  bf16 = 6,
  f32 = 7,
  f64 = 8,
  boolean = 9,
};
inline constexpr int kNumDTypes = 10;

/// Bytes per element.
std::int64_t size_of(DType dtype);
/// The name users know from torch: "float32".
std::string_view name_of(DType dtype);

/// Reductions. The codes cross the Python border and the wire: append, never renumber.
enum class ReduceOp : std::uint8_t {
  average = 0,
  sum = 1,
  adasum = 2,
  min = 3,
  max = 4,
  product = 5,
};
inline constexpr int kNumReduceOps = 6;

std::string_view name_of(ReduceOp op);

/// Where a tensor's memory lies.
enum class DeviceKind : std::uint8_t { cpu = 0, cuda = 1 };

struct Device {
  DeviceKind kind = DeviceKind::cpu;
  int index = 0;  ///< which GPU; 0 on the CPU
};

/// An opaque execution queue: a cudaStream_t on CUDA, ignored on the CPU.
struct Stream {
  void* native = nullptr;
};

/// Half-open range of elements of a fused buffer.
struct Range {
  std::int64_t begin = 0;
  std::int64_t end = 0;

  std::int64_t size() const { return end - begin; }
  bool empty() const { return begin >= end; }
  friend bool operator==(const Range&, const Range&) = default;
};

/// The part of `range` inside `bounds`; empty where they do not meet.
inline Range clip(Range range, Range bounds) {
  const std::int64_t begin = range.begin > bounds.begin ? range.begin : bounds.begin;
  const std::int64_t end = range.end < bounds.end ? range.end : bounds.end;
  return {begin, end > begin ? end : begin};
}

/// One tensor's place in a fused buffer, in elements. Padding lies between segments, never inside.
struct TensorSegment {
  std::int64_t offset = 0;
  std::int64_t numel = 0;

  Range range() const { return {offset, offset + numel}; }
};

/// At most kItemNumel consecutive elements of one segment: what one warp of a GPU works on.
struct Item {
  std::int64_t begin = 0;  ///< element of the fused buffer
  std::int32_t numel = 0;
  std::int32_t segment = 0;

  Range range() const { return {begin, begin + numel}; }
};
inline constexpr std::int32_t kItemNumel = 4096;

/// A fused buffer cut into items, in the order of the buffer; an empty segment has none. Owns
/// nothing.
struct ItemTable {
  const Item* on_host = nullptr;
  const Item* on_device = nullptr;
  const std::int64_t* first_on_host = nullptr;    ///< [segments + 1]: a segment's first item
  const std::int64_t* first_on_device = nullptr;  ///< the same on the GPU
  std::int64_t count = 0;
  double* slots = nullptr;  ///< on the GPU, [count][kSlotsPerItem]: partial sums
};
inline constexpr int kSlotsPerItem = 4;

/// All segments of a fused buffer, in order of their offsets. Owns nothing.
struct SegmentTable {
  const TensorSegment* on_host = nullptr;
  const TensorSegment* on_device = nullptr;  ///< the same table where kernels of a GPU can read it
  std::int64_t count = 0;
  const ItemTable* items = nullptr;  ///< kernels of a GPU need it, those of the CPU do not
};

/// Tensors laid end to end, and a second buffer indexed alike. Owns nothing.
struct FusedBuffer {
  void* data = nullptr;
  void* scratch = nullptr;
  std::int64_t numel = 0;  ///< padding included
  DType dtype = DType::f32;
  SegmentTable segments;
};

/// Memory of all ranks of one node that this rank can address: shared segments on the CPU, CUDA IPC
/// or NCCL windows on a GPU, plain buffers of one process in tests. Arrays have `size` entries,
/// indexed by rank. Only kernels/peer_* read through it, and only they may wait for a peer.
struct PeerView {
  Rank rank = 0;
  int size = 1;
  const void* const* in = nullptr;        ///< every rank's input
  void* const* out = nullptr;             ///< every rank's result
  double* const* scalars = nullptr;       ///< every rank's partial statistics
  std::uint32_t* const* flags = nullptr;  ///< every rank's epoch counters (acquire / release)
};

}  // namespace adareduce
