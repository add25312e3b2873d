#include "collectives/sum.h"

#include <vector>

#include "collectives/shards.h"

namespace adareduce {

std::int64_t sum_scratch_numel(std::int64_t numel, int size) {
  return shard_of(numel, 0, size).size() * (size - 1);
}

Task sum_allreduce(Context context, FusedBuffer buffer, double divisor) {
  const Rank self = context.transport.rank();
  const int size = context.transport.size();
  const std::int64_t width = size_of(buffer.dtype);
  const Range mine = shard_of(buffer.numel, self, size);

  // Reduce-scatter: every rank sends each peer its shard, and adds what it receives for its own.
  std::vector<SendPart> sends;
  std::vector<RecvPart> receives;
  std::vector<const void*> inputs;
  for (Rank peer = 0; peer < size; ++peer) {
    if (peer == self) {
      inputs.push_back(at(buffer.data, mine.begin, width));
      continue;
    }
    const Range theirs = shard_of(buffer.numel, peer, size);
    if (!theirs.empty())
      sends.push_back({peer, at(buffer.data, theirs.begin, width), theirs.size() * width});
    if (mine.empty()) continue;
    const std::int64_t place = peer < self ? peer : peer - 1;
    void* into = at(buffer.scratch, place * mine.size(), width);
    receives.push_back({peer, into, mine.size() * width});
    inputs.push_back(into);
  }
  co_await context.transport.start(kDataTag, sends, receives);
  context.kernels.sum({.inputs = inputs.data(),
                       .num_inputs = static_cast<int>(inputs.size()),
                       .out = at(buffer.data, mine.begin, width),
                       .numel = mine.size(),
                       .dtype = buffer.dtype,
                       .divisor = divisor},
                      context.stream);

  // Allgather: the finished shards go to everybody.
  sends.clear();
  receives.clear();
  for (Rank peer = 0; peer < size; ++peer) {
    if (peer == self) continue;
    const Range theirs = shard_of(buffer.numel, peer, size);
    if (!mine.empty())
      sends.push_back({peer, at(buffer.data, mine.begin, width), mine.size() * width});
    if (!theirs.empty())
      receives.push_back({peer, at(buffer.data, theirs.begin, width), theirs.size() * width});
  }
  co_await context.transport.start(kDataTag, sends, receives);
}

}  // namespace adareduce
