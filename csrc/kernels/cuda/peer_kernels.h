#pragma once
#include "kernels/cuda/cuda_kernels.h"
#include "kernels/gram.h"

/// Kernels that read and write the memory of all ranks of a node and wait for them. Every rank of a
/// view launches the same kernels in the same order with the same number of blocks: block c of each
/// rank meets block c of the others, in epochs that are counted in device memory, so that a graph's
/// replays work. Plain launches: kernel boundaries are the barriers of a grid. A request is over,
/// for its windows, work memory and scalars as well, when its last kernel is: the next may follow
/// in stream order.
namespace adareduce::cuda {

inline constexpr int kMaxPeers = 8;

/// What the waiting needs beside PeerView::flags, which has [num_blocks][kMaxPeers] counters on
/// each rank, all zero at first. One counter per block serves all kernels: they follow each other
/// in a stream.
struct PeerSync {
  int num_blocks = 1;  ///< of a launch at most; equal on all ranks. They need not be co-resident.
  std::uint32_t* epochs = nullptr;  ///< own device memory, [num_blocks], zero at first
  /// Mapped host memory: 1 + the rank that did not come. Once set, nobody waits any more, and what
  /// comes out is undefined. Also set by the host, to end all waits.
  std::uint32_t* error = nullptr;
  std::uint64_t deadline_ns = 0;  ///< of one wait; 0: none
};
inline std::int64_t peer_flags_numel(int num_blocks) {
  return num_blocks * std::int64_t{kMaxPeers};
}

/// Windows in[] of all ranks are laid out alike, so are out[]; they start on 16 bytes. out[r] may
/// be in[r].
struct PeerContext {
  const PeerView* view = nullptr;
  const PeerSync* sync = nullptr;
  DType dtype = DType::f32;
  std::int64_t numel = 0;  ///< of the fused buffer, padding included
  const SegmentTable* segments = nullptr;
};

/// The shard of a fused buffer that `rank` works on: equal parts on multiples of 16 elements.
Range peer_shard(std::int64_t numel, int rank, int size);
/// Sums of a shard are kept for runs of this many items.
std::int64_t peer_items_per_run(std::int64_t num_items, int size);
std::int64_t peer_num_slots(std::int64_t num_segments, std::int64_t num_items, int size);

/// Every rank's out[] = in[0] op in[1] op ... / divisor, by elements, with the CPU's rules; all
/// dtypes with arithmetic. With `squares`, of sums of floats, only elements of segments are
/// reduced, and per segment come the sums over all ranks of |in[r]|^2, and |result|^2 after the
/// division and before it is rounded: summed over the shards in rank order, the same bits on all
/// ranks; what scattered ranks keep must then cut the buffer up. Two launches with squares, one
/// without.
struct PeerReduceArgs {
  PeerContext peers;
  Elementwise op = Elementwise::sum;
  double divisor = 1.0;
  /// Each rank receives only the elements of `keeps` (of its own choice); empty: everything.
  bool scatters = false;
  Range keeps{};              ///< with `scatters`: what this rank wants in its out[]
  double* squares = nullptr;  ///< device, [2][segments]: sum over ranks, result; or null
  double* work = nullptr;     ///< device, peer_work_numel() doubles
};
void peer_reduce(const PeerReduceArgs& args, Stream stream);

/// Every rank's out[] = Adasum of all in[], per segment, by the Gram form. float types, at most
/// kMaxPeers ranks. Four launches; the last but one returns at once where no segment's
/// cancellation exceeds kMostCancellation.
struct PeerAdasumArgs {
  PeerContext peers;
  GramTree tree;
  void* stage = nullptr;            ///< device: room for all ranks' slices of this rank's shard
  double* work = nullptr;           ///< device, peer_work_numel() doubles
  double* orthogonality = nullptr;  ///< device, [segments]; may be null
  double* cancellation = nullptr;   ///< device, [segments]; may be null
};
void peer_adasum(const PeerAdasumArgs& args, Stream stream);

/// Copies pieces of peers' windows; bytes.
struct PeerPiece {
  std::int64_t from_offset = 0;  ///< bytes into in[rank]
  std::int64_t to_offset = 0;    ///< bytes into the own out[]
  std::int64_t bytes = 0;
  int rank = 0;
  int padding = 0;
};
struct PeerCopyArgs {
  const PeerView* view = nullptr;
  const PeerSync* sync = nullptr;
  const PeerPiece* pieces = nullptr;  ///< on the device
  std::int64_t num_pieces = 0;
};
void peer_copy(const PeerCopyArgs& args, Stream stream);

/// Sizes that the windows and work memory must have, for `size` ranks.
std::int64_t peer_scalars_numel(std::int64_t num_segments, int size);  ///< doubles, scalars[]
std::int64_t peer_work_numel(std::int64_t num_segments, std::int64_t num_items, int size);
std::int64_t peer_stage_bytes(std::int64_t numel, DType dtype, int size);

}  // namespace adareduce::cuda
