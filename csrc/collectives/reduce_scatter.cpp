#include "collectives/reduce_scatter.h"

namespace adareduce {

std::int64_t reduce_scatter_scratch_numel(const Shards& shards, Rank rank) {
  // Each slice on a line of its own.
  return align_up(shards.shard(rank).size()) * (static_cast<std::int64_t>(shards.of.size()) - 1);
}

Task reduce_scatter(Context context, FusedBuffer buffer, const Shards& shards, Reduction reduction,
                    SquaresOutput output) {
  const Rank self = context.transport.rank();
  const std::int64_t width = size_of(buffer.dtype);
  const Range mine = shards.shard(self);

  std::vector<SendPart> sends;
  std::vector<RecvPart> receives;
  std::vector<const void*> inputs;
  for (Rank peer = 0; peer < context.transport.size(); ++peer) {
    if (peer == self) {
      inputs.push_back(at(buffer.data, mine.begin, width));
      continue;
    }
    const Range theirs = shards.shard(peer);
    if (!theirs.empty())
      sends.push_back({peer, at(buffer.data, theirs.begin, width), theirs.size() * width});
    if (mine.empty()) continue;
    const std::int64_t place = peer < self ? peer : peer - 1;
    void* into = at(buffer.scratch, place * align_up(mine.size()), width);
    receives.push_back({peer, into, mine.size() * width});
    inputs.push_back(into);
  }
  co_await context.transport.start(kDataTag, sends, receives);

  const ReduceArgs args{.op = reduction.op,
                        .inputs = inputs.data(),
                        .num_inputs = static_cast<int>(inputs.size()),
                        .out = at(buffer.data, mine.begin, width),
                        .numel = mine.size(),
                        .dtype = buffer.dtype,
                        .divisor = reduction.divisor};
  if (output.num_groups == 0)
    context.kernels.reduce(args, context.stream);
  else
    context.kernels.reduce_squares({.reduce = args,
                                    .begin = mine.begin,
                                    .segments = &buffer.segments,
                                    .group_of = output.group_of,
                                    .squares = output.squares},
                                   context.stream);
}

}  // namespace adareduce
