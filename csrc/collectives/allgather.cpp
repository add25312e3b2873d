#include "collectives/allgather.h"

#include <vector>

namespace adareduce {

Task allgather_ranges(Context context, int tag, void* data, std::int64_t width,
                      std::span<const Range> ranges) {
  const auto self = static_cast<std::size_t>(context.transport.rank());
  std::vector<SendPart> sends;
  std::vector<RecvPart> receives;
  for (std::size_t peer = 0; peer < ranges.size(); ++peer) {
    if (peer == self) continue;
    const auto block = [&](std::size_t rank) { return at(data, ranges[rank].begin, width); };
    const auto bytes = [&](std::size_t rank) { return ranges[rank].size() * width; };
    if (bytes(self) > 0) sends.push_back({static_cast<Rank>(peer), block(self), bytes(self)});
    if (bytes(peer) > 0) receives.push_back({static_cast<Rank>(peer), block(peer), bytes(peer)});
  }
  co_await context.transport.start(tag, sends, receives);
}

Task allgather(Context context, int tag, void* all, std::span<const std::int64_t> bytes_of) {
  std::vector<Range> blocks;
  std::int64_t end = 0;
  for (const std::int64_t bytes : bytes_of) {
    blocks.push_back({end, end + bytes});
    end += bytes;
  }
  co_await allgather_ranges(context, tag, all, 1, blocks);
}

Task allgather_numbers(Context context, int tag, std::span<std::int64_t> all, std::int64_t count) {
  const std::vector<std::int64_t> bytes_of(static_cast<std::size_t>(context.transport.size()),
                                           count * static_cast<std::int64_t>(sizeof all[0]));
  co_await allgather(context, tag, all.data(), bytes_of);
}

}  // namespace adareduce
