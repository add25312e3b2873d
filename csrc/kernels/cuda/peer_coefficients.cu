// Numerics. Gram matrices of runs are added in the order of the runs (of many: in phases, then the
// phases), those of the ranks in rank order, all in double: the same bits on every rank.
#include "kernels/cuda/peer_adasum.cuh"

namespace adareduce::cuda {
namespace {

// A segment is the business of one block, the same on all ranks: it waits for nobody else.
__global__ void __launch_bounds__(kPeerThreads, 1) coefficients_kernel(PeerAdasum args) {
  const int size = args.peers.size;
  sum_slots(args.work, args.slots, args.pairs(), [&](std::int64_t s, int number, double sum) {
    for (int r = 0; r < size; ++r) args.gram(r, args.peers.rank, s)[number] = sum;
  });
  meet_peers(args.peers);
  const Range segments = args.work.segments_of_block();
  for (std::int64_t s = segments.begin + threadIdx.x; s < segments.end; s += kPeerThreads) {
    double gram[gram_numel(kMaxPeers)], c[kMaxPeers];
    args.gather_gram(s, gram);
    const GramResult result = adasum_of_gram(args.tree, gram, c);
    for (int r = 0; r < size; ++r) args.coefficients[s * size + r] = c[r];
    args.cancellation[s] = result.cancellation;
    if (args.cancellation_out != nullptr) args.cancellation_out[s] = result.cancellation;
    if (args.orthogonality_out != nullptr) args.orthogonality_out[s] = result.orthogonality;
  }
}

}  // namespace

void launch_peer_coefficients(const PeerAdasum& args, int blocks, Stream stream) {
  launch(coefficients_kernel, blocks, kPeerThreads, stream, args);
}

}  // namespace adareduce::cuda
