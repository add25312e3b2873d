// Numerics: see the kernels, peer_gram.cu, peer_coefficients.cu, peer_levels.cu, peer_combine.cu.
#include <algorithm>

#include "kernels/cuda/peer_adasum.cuh"

namespace adareduce::cuda {

void peer_adasum(const PeerAdasumArgs& args, Stream stream) {
  const PeerContext& context = args.peers;
  const SegmentTable& segments = *context.segments;
  PeerAdasum launched{};
  launched.peers = peers_of(*context.view, *context.sync, "peer_adasum");
  const int size = launched.peers.size;
  if (args.tree.size != size)
    throw UsageError(
        concat("peer_adasum: tree must be that of ", size, " ranks, got one of ", args.tree.size));
  launched.work = shard_items(segments, peer_shard(context.numel, launched.peers.rank, size), size);
  launched.tree = args.tree;
  launched.segments = segments.on_device;
  launched.stage = args.stage;
  launched.stage_stride = peer_shard(context.numel, 0, size).size();
  launched.slots = args.work;
  launched.coefficients =
      launched.slots +
      peer_num_slots(segments.count, segments.items->count, size) * gram_numel(size);
  launched.cancellation = launched.coefficients + segments.count * size;
  launched.orthogonality_out = args.orthogonality;
  launched.cancellation_out = args.cancellation;

  // Blocks for the part of the work that is every rank's: equal on all.
  const auto blocks_for = [&](std::int64_t parts) {
    return static_cast<int>(std::clamp<std::int64_t>(parts, 1, context.sync->num_blocks));
  };
  const int for_items = blocks_for(segments.items->count / size + 1);
  const int for_segments = blocks_for(segments.count);
  launch_peer_gram(launched, context.dtype, for_items, stream);
  launch_peer_coefficients(launched, for_segments, stream);
  launch_peer_levels(launched, context.dtype, for_segments, stream);
  launch_peer_combine(launched, context.dtype, for_items, stream);
}

}  // namespace adareduce::cuda
