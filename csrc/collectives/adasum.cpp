#include "collectives/adasum.h"

#include <algorithm>
#include <array>

namespace adareduce {
namespace {

// Sends `out` of one array to the peer and receives `in` of another that is indexed alike.
std::unique_ptr<Exchange> exchange_with(Context& context, Rank peer, std::int64_t width,
                                        const void* from, Range out, void* into, Range in) {
  const std::array send{SendPart{peer, at(from, out.begin, width), out.size() * width}};
  const std::array receive{RecvPart{peer, at(into, in.begin, width), in.size() * width}};
  return context.transport.start(kDataTag, std::span(send).first(out.empty() ? 0 : 1),
                                 std::span(receive).first(in.empty() ? 0 : 1));
}

// Adds the statistics of the group's ranks in rank order. Row 0 of `rows` holds this rank's part
// and receives the sum; the rows after it hold every rank's part by position in the group.
// Recursive doubling: log2(group) exchanges.
Task add_over_group(Context context, std::span<const Rank> group, std::span<double> rows,
                    std::int64_t row_numel) {
  const auto group_size = static_cast<std::int64_t>(group.size());
  if (group_size <= 1) co_return;
  double* const sum = rows.data();
  double* const gathered = sum + row_numel;
  const std::int64_t mine =
      std::find(group.begin(), group.end(), context.transport.rank()) - group.begin();
  std::copy_n(sum, row_numel, gathered + mine * row_numel);

  for (std::int64_t distance = 1; distance < group_size; distance *= 2) {
    const std::int64_t other = mine ^ distance;
    const auto rows_held_by = [&](std::int64_t position) {
      const std::int64_t first = position / distance * distance;
      return Range{first * row_numel, (first + distance) * row_numel};
    };
    co_await exchange_with(context, group[static_cast<std::size_t>(other)], sizeof(double),
                           gathered, rows_held_by(mine), gathered, rows_held_by(other));
  }

  std::vector<const void*> parts;
  for (std::int64_t i = 0; i < group_size; ++i) parts.push_back(gathered + i * row_numel);
  context.kernels.sum({.inputs = parts.data(),
                       .num_inputs = static_cast<int>(group_size),
                       .out = sum,
                       .numel = row_numel,
                       .dtype = DType::f64},
                      context.stream);
}

}  // namespace

std::int64_t adasum_stats_numel(std::span<const AdasumLevel> schedule, std::int64_t num_segments) {
  std::size_t rows = 1;
  for (const AdasumLevel& level : schedule)
    if (level.group.size() > 1) rows = std::max(rows, 1 + level.group.size());
  return static_cast<std::int64_t>(rows) * num_segments * kStatsPerSegment;
}

Task adasum_allreduce(Context context, FusedBuffer buffer, std::span<const AdasumLevel> schedule,
                      std::span<double> stats) {
  const std::int64_t width = size_of(buffer.dtype);

  // Reduce-scatter: halve what this rank owns, double the distance to the peer.
  for (const AdasumLevel& level : schedule) {
    co_await exchange_with(context, level.peer, width, buffer.data, level.give, buffer.scratch,
                           level.keep);
    if (level.group.empty()) continue;
    const VectorPair pair{.lower = level.is_lower ? buffer.data : buffer.scratch,
                          .upper = level.is_lower ? buffer.scratch : buffer.data,
                          .range = level.keep,
                          .dtype = buffer.dtype,
                          .segments = &buffer.segments};
    context.kernels.pair_stats({pair, stats.data()}, context.stream);
    co_await add_over_group(context, level.group, stats, buffer.segments.count * kStatsPerSegment);
    context.kernels.pair_combine({pair, stats.data(), buffer.data}, context.stream);
  }

  // Allgather: the same levels backward; what was kept is sent, what was given away comes home.
  for (std::size_t i = schedule.size(); i-- > 0;)
    co_await exchange_with(context, schedule[i].peer, width, buffer.data, schedule[i].keep,
                           buffer.data, schedule[i].give);
}

}  // namespace adareduce
