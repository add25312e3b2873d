#include "collectives/allgather.h"

#include <vector>

namespace adareduce {

Task allgather(Context context, int tag, void* all, std::span<const std::int64_t> bytes_of) {
  const auto self = static_cast<std::size_t>(context.transport.rank());
  std::vector<std::int64_t> begin_of{0};
  for (const std::int64_t bytes : bytes_of) begin_of.push_back(begin_of.back() + bytes);

  std::vector<SendPart> sends;
  std::vector<RecvPart> receives;
  for (std::size_t peer = 0; peer < bytes_of.size(); ++peer) {
    if (peer == self) continue;
    if (bytes_of[self] > 0)
      sends.push_back({static_cast<Rank>(peer), at(all, begin_of[self], 1), bytes_of[self]});
    if (bytes_of[peer] > 0)
      receives.push_back({static_cast<Rank>(peer), at(all, begin_of[peer], 1), bytes_of[peer]});
  }
  co_await context.transport.start(tag, sends, receives);
}

Task allgather_numbers(Context context, int tag, std::span<std::int64_t> all, std::int64_t count) {
  const std::vector<std::int64_t> bytes_of(static_cast<std::size_t>(context.transport.size()),
                                           count * static_cast<std::int64_t>(sizeof all[0]));
  co_await allgather(context, tag, all.data(), bytes_of);
}

}  // namespace adareduce
