#pragma once
// What kernels over the memory of several ranks share: meeting the other ranks, and walking over a
// part of a fused buffer. Their memory is read by plain loads only: the non-coherent path would not
// see what a peer has written since the launch.
#include <algorithm>
#include <cuda/atomic>

#include "kernels/cuda/item_walk.cuh"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/peer_kernels.h"

namespace adareduce::cuda {

inline constexpr int kPeerThreads = 256;
inline constexpr int kPeerWarps = kPeerThreads / kWarp;

/// clip(), Range::size() and the rest, on the device.
__device__ inline Range overlap(Range range, Range bounds) {
  const std::int64_t begin = range.begin > bounds.begin ? range.begin : bounds.begin;
  const std::int64_t end = range.end < bounds.end ? range.end : bounds.end;
  return {begin, end > begin ? end : begin};
}
__device__ inline Range elements_of(const Item& item) {
  return {item.begin, item.begin + item.numel};
}
__device__ inline std::int64_t length(Range range) { return range.end - range.begin; }

/// PeerView and PeerSync, as kernels take them.
struct Peers {
  const void* in[kMaxPeers];
  void* out[kMaxPeers];
  double* scalars[kMaxPeers];
  std::uint32_t* flags[kMaxPeers];
  int rank;
  int size;
  std::uint32_t* epochs;
  std::uint32_t* error;
  std::uint64_t deadline_ns;
};

/// Throws UsageError for more than kMaxPeers ranks; `caller` begins the text.
inline Peers peers_of(const PeerView& view, const PeerSync& sync, const char* caller) {
  if (view.size < 1 || view.size > kMaxPeers)
    throw UsageError(
        concat(caller, ": view must be of 1 to ", kMaxPeers, " ranks, got ", view.size));
  Peers peers{};
  for (int r = 0; r < view.size; ++r) {
    peers.in[r] = view.in[r];
    peers.out[r] = view.out[r];
    peers.scalars[r] = view.scalars[r];
    peers.flags[r] = view.flags[r];
  }
  peers.rank = view.rank;
  peers.size = view.size;
  peers.epochs = sync.epochs;
  peers.error = sync.error;
  peers.deadline_ns = sync.deadline_ns;
  return peers;
}

/// Waits until `flag`, of this rank, has reached `epoch`; gives up where the error word is set, and
/// sets it to 1 + `peer` when the deadline passes.
__device__ inline void wait_for_peer(const Peers& peers, std::uint32_t* flag, std::uint32_t epoch,
                                     int peer) {
  using Word = ::cuda::atomic_ref<std::uint32_t, ::cuda::thread_scope_system>;
  constexpr int kPollsBetweenLooks = 64;  // the error word lies on the host, far away
  const Word arrived(*flag), error(*peers.error);
  std::uint64_t start = 0;
  for (int poll = 1;; ++poll) {
    const std::uint32_t seen = arrived.load(::cuda::memory_order_acquire);
    if (static_cast<std::int32_t>(seen - epoch) >= 0) return;  // epochs may wrap around
    if (poll % kPollsBetweenLooks != 0) continue;
    __nanosleep(200);  // others compute on this processor meanwhile
    if (error.load(::cuda::memory_order_relaxed) != 0) return;
    const std::uint64_t now = now_ns();
    if (start == 0) start = now;
    if (peers.deadline_ns != 0 && now - start > peers.deadline_ns) {
      error.store(static_cast<std::uint32_t>(1 + peer), ::cuda::memory_order_relaxed);
      return;
    }
  }
}

/// A barrier of the blocks of one index on all ranks. What any thread of any of these blocks, or an
/// earlier kernel of their streams, has written is visible to all of them afterwards. Called by all
/// threads of a block, equally often on all ranks.
///
/// Why that is so: what came before is ordered before the flag's release store by stream order and
/// the first __syncthreads, the store before the peer's acquire load of it, and that load before
/// the peer's other threads by the second __syncthreads.
__device__ inline void meet_peers(const Peers& peers) {
  using Word = ::cuda::atomic_ref<std::uint32_t, ::cuda::thread_scope_system>;
  const int block = static_cast<int>(blockIdx.x), peer = static_cast<int>(threadIdx.x);
  __syncthreads();
  if (peer < peers.size) {
    const std::uint32_t epoch = peers.epochs[block] + 1;
    const Word theirs(peers.flags[peer][block * kMaxPeers + peers.rank]);
    theirs.store(epoch, ::cuda::memory_order_release);
    wait_for_peer(peers, &peers.flags[peers.rank][block * kMaxPeers + peer], epoch, peer);
  }
  __syncthreads();
  if (peer == 0) ++peers.epochs[block];
}

/// Calls load(i) and use(i, what load has returned) for all whole vectors of 16 bytes at element i
/// inside `part`, kUnroll of them at a time, and element(i) for the up to 2 (kNumel - 1) elements
/// before and behind them. `lanes` threads, at least a warp, share the work; the element 0 is
/// aligned.
template <typename T, int kUnroll, typename Load, typename Use, typename Element>
__device__ inline void for_each_vector(Range part, int lane, int lanes, Load&& load, Use&& use,
                                       Element&& element) {
  constexpr int kNumel = Vector<T>::kNumel;
  const std::int64_t first = (part.begin + kNumel - 1) / kNumel, last = part.end / kNumel;
  std::int64_t i = first + lane;
  for (; i + (kUnroll - 1) * lanes < last; i += kUnroll * lanes) {
    decltype(load(i)) loaded[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) loaded[u] = load((i + u * lanes) * kNumel);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) use((i + u * lanes) * kNumel, loaded[u]);
  }
  if constexpr (kUnroll > 1)
    for (; i < last; i += lanes) use(i * kNumel, load(i * kNumel));

  const std::int64_t head_end = first * kNumel < part.end ? first * kNumel : part.end;
  const std::int64_t tail_begin = last * kNumel > head_end ? last * kNumel : head_end;
  const std::int64_t head = head_end - part.begin;
  if (lane < head)
    element(part.begin + lane);
  else if (lane - head < part.end - tail_begin)
    element(tail_begin + lane - head);
}

/// The items that meet a shard, and how their sums are stored. `per_run` items whose indices have
/// the same quotient by it, and that belong to one segment, are added up by one warp into one slot:
/// fixed by the fused buffer and the number of ranks alone, and so are the bits of the sums.
struct ShardItems {
  const Item* items;
  const std::int64_t* first_of_segment;  ///< [segments + 1]
  Range shard;
  Range indices;  ///< of the items
  std::int64_t per_run;
  std::int64_t num_segments;

  __device__ std::int64_t slot(std::int64_t item, std::int64_t segment) const {
    return item / per_run + segment;
  }
  /// First and last + 1 slot of a segment inside the shard.
  __device__ Range slots(std::int64_t segment) const {
    const Range inside =
        overlap({first_of_segment[segment], first_of_segment[segment + 1]}, indices);
    if (length(inside) == 0) return {0, 0};
    return {slot(inside.begin, segment), slot(inside.end - 1, segment) + 1};
  }
  /// The segments that this block finishes, on every rank.
  __device__ Range segments_of_block() const {
    const std::int64_t block = blockIdx.x, blocks = gridDim.x;
    return {num_segments * block / blocks, num_segments * (block + 1) / blocks};
  }
};
inline ShardItems shard_items(const SegmentTable& segments, Range shard, int size) {
  const ItemTable& table = *segments.items;
  return {table.on_device,
          table.first_on_device,
          shard,
          items_in(table, shard),
          peer_items_per_run(table.count, size),
          segments.count};
}

/// Calls part(elements of an item inside the shard) for the items of every run that falls to this
/// warp, and flush(slot) after each run. All lanes come along.
template <typename Part, typename Flush>
__device__ inline void for_each_run(const ShardItems& work, Part&& part, Flush&& flush) {
  const std::int64_t end = (work.indices.end + work.per_run - 1) / work.per_run;
  for (std::int64_t group = work.indices.begin / work.per_run + warp_of_grid(); group < end;
       group += warps_of_grid()) {
    const Range run = overlap({group * work.per_run, (group + 1) * work.per_run}, work.indices);
    std::int32_t segment = -1;
    for (std::int64_t i = run.begin; i < run.end; ++i) {
      const Item item = work.items[i];
      if (segment >= 0 && item.segment != segment) flush(work.slot(i - 1, segment));
      segment = item.segment;
      part(overlap(elements_of(item), work.shard));
    }
    if (segment >= 0) flush(work.slot(run.end - 1, segment));
  }
}

/// Adds up the slots of this block's segments, `numbers` (at most kPeerThreads) doubles in each, in
/// a fixed order, and calls put(segment, number, sum). Segments of a few slots are a warp's work,
/// others the block's.
template <typename Put>
__device__ inline void sum_slots(const ShardItems& work, const double* slots, int numbers,
                                 Put&& put) {
  constexpr std::int64_t kFew = 64;
  __shared__ double partial[kPeerThreads];
  const Range segments = work.segments_of_block();
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp, lane = lane_of_warp();
  for (std::int64_t s = segments.begin + warp; s < segments.end; s += kPeerWarps) {
    const Range mine = work.slots(s);
    if (length(mine) > kFew) continue;
    for (int number = lane; number < numbers; number += kWarp) {
      double sum = 0;
      for (std::int64_t slot = mine.begin; slot < mine.end; ++slot)
        sum += slots[slot * numbers + number];
      put(s, number, sum);
    }
  }
  const int phases = kPeerThreads / numbers, phase = thread / numbers, number = thread % numbers;
  for (std::int64_t s = segments.begin; s < segments.end; ++s) {
    const Range mine = work.slots(s);
    if (length(mine) <= kFew) continue;
    if (phase < phases) {
      double sum = 0;
#pragma unroll 8
      for (std::int64_t slot = mine.begin + phase; slot < mine.end; slot += phases)
        sum += slots[slot * numbers + number];
      partial[thread] = sum;
    }
    __syncthreads();
    if (thread < numbers) {
      double sum = 0;
      for (int p = 0; p < phases; ++p) sum += partial[p * numbers + thread];
      put(s, thread, sum);
    }
    __syncthreads();
  }
}

}  // namespace adareduce::cuda
