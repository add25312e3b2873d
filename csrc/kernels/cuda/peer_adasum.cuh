#pragma once
// The four kernels of one-shot Adasum: their arguments and launchers. See docs/algorithms.md.
#include "kernels/cuda/element_types.h"
#include "kernels/cuda/peer_device.cuh"

namespace adareduce::cuda {

/// What the four kernels share. `T` is the element type of `stage` and the windows.
struct PeerAdasum {
  Peers peers;
  ShardItems work;
  GramTree tree;
  const TensorSegment* segments;
  void* stage;                ///< [size][stage_stride] elements: every rank's slice of the shard
  std::int64_t stage_stride;  ///< elements
  double* slots;              ///< [slots][pairs]: Gram matrices of runs of items
  double* coefficients;       ///< [segments][size]
  double* cancellation;       ///< [segments]
  double* orthogonality_out;  ///< [segments] or null
  double* cancellation_out;   ///< [segments] or null

  /// The same bits on all ranks: so are the Gram matrices that it comes from.
  __device__ bool is_flagged(std::int64_t segment) const {
    return cancellation[segment] > kMostCancellation;
  }
  __device__ int pairs() const { return gram_numel(peers.size); }
  /// Of `from` in rank `of`'s window: its part of the Gram matrix of a segment.
  __device__ double* gram(int of, int from, std::int64_t segment) const {
    return peers.scalars[of] + (from * work.num_segments + segment) * pairs();
  }
  /// The whole one, added in rank order from what the peers have left in this rank's window.
  __device__ void gather_gram(std::int64_t segment, double* to) const {
    for (int q = 0; q < pairs(); ++q) {
      to[q] = 0;
      for (int r = 0; r < peers.size; ++r) to[q] += gram(peers.rank, r, segment)[q];
    }
  }
  /// Likewise, the statistics of a node of the tree.
  __device__ double* stats(int of, int from, std::int64_t segment, int node) const {
    return gram(of, peers.size, 0) +
           ((from * work.num_segments + segment) * tree.num_nodes() + node) * kStatsPerSegment;
  }
};

/// The same vector of all ranks' slices.
template <typename T, int kRanks>
struct Slices {
  Vector<T> of[kRanks];
};

/// Meets the peers; copies their slices into the stage and writes slots.
void launch_peer_gram(const PeerAdasum& args, DType dtype, int blocks, Stream stream);
/// Slots become Gram matrices, which the ranks exchange, and coefficients.
void launch_peer_coefficients(const PeerAdasum& args, int blocks, Stream stream);
/// Segments of too much cancellation: coefficients anew, from vectors, level by level.
void launch_peer_levels(const PeerAdasum& args, DType dtype, int blocks, Stream stream);
/// The weighted sum of the stage's slices, into all ranks' windows; meets the peers.
void launch_peer_combine(const PeerAdasum& args, DType dtype, int blocks, Stream stream);

/// body(std::integral_constant) of the smallest of 2, 4, 8 that `size` ranks fit into.
template <typename Body>
void with_capacity(int size, Body&& body) {
  if (size <= 2)
    body(std::integral_constant<int, 2>{});
  else if (size <= 4)
    body(std::integral_constant<int, 4>{});
  else
    body(std::integral_constant<int, 8>{});
}

}  // namespace adareduce::cuda
