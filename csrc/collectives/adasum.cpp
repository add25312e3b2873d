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

std::int64_t position_in(std::span<const Rank> group, Rank rank) {
  return std::find(group.begin(), group.end(), rank) - group.begin();
}

// Where this rank's part of the statistics belongs: row 0 is for the sum, the rows after it hold
// every rank's part by position in the group.
double* own_row(std::span<const Rank> group, Rank rank, double* rows, std::int64_t row_numel) {
  return group.size() <= 1 ? rows : rows + (1 + position_in(group, rank)) * row_numel;
}

// Adds the statistics of the group's ranks in rank order, from their rows into row 0.
// Recursive doubling: log2(group) exchanges.
Task add_over_group(Context context, std::span<const Rank> group, double* rows,
                    std::int64_t row_numel) {
  const auto group_size = static_cast<std::int64_t>(group.size());
  if (group_size <= 1) co_return;
  double* const sum = rows;
  double* const gathered = sum + row_numel;
  const std::int64_t mine = position_in(group, context.transport.rank());

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
  context.kernels.reduce({.inputs = parts.data(),
                          .num_inputs = static_cast<int>(group_size),
                          .out = sum,
                          .numel = row_numel,
                          .dtype = DType::f64},
                         context.stream);
}

}  // namespace

std::int64_t adasum_stats_numel(std::span<const AdasumLevel> schedule, std::int64_t num_segments,
                                bool has_orthogonality) {
  std::size_t rows = 1;
  for (const AdasumLevel& level : schedule)
    if (level.group.size() > 1) rows = std::max(rows, 1 + level.group.size());
  const std::int64_t row_numel = num_segments * (kStatsPerSegment + (has_orthogonality ? 1 : 0));
  return static_cast<std::int64_t>(rows) * row_numel + (has_orthogonality ? num_segments : 0);
}

Task adasum_allreduce(Context context, FusedBuffer buffer, std::span<const AdasumLevel> schedule,
                      std::span<double> stats, double* orthogonality) {
  const std::int64_t width = size_of(buffer.dtype);
  const std::int64_t num_triples = buffer.segments.count * kStatsPerSegment;
  const std::int64_t num_leaf_squares = orthogonality == nullptr ? 0 : buffer.segments.count;
  const std::int64_t row_numel = num_triples + num_leaf_squares;
  double* const leaf_squares = stats.data();  // what this rank's operand has collected
  double* const rows = leaf_squares + num_leaf_squares;
  double* const tail = reinterpret_cast<double*>(at(buffer.data, buffer.numel, width));
  if (schedule.empty()) {
    if (orthogonality != nullptr) std::fill_n(orthogonality, num_leaf_squares, 1.0);
    co_return;
  }

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
    double* const mine = own_row(level.group, context.transport.rank(), rows, row_numel);
    context.kernels.pair_stats({pair, mine}, context.stream);
    const bool is_inner = !(level.is_lower ? level.lower_is_leaf : level.upper_is_leaf);
    LeafSquaresArgs leaves{.num_segments = num_leaf_squares,
                           .of_node = leaf_squares,
                           .carried = mine + num_triples,
                           .contributes = is_inner && level.is_speaker,
                           .pair_stats = rows,
                           .lower_is_leaf = level.lower_is_leaf,
                           .upper_is_leaf = level.upper_is_leaf,
                           .orthogonality = tail};  // the last level's stays
    if (orthogonality != nullptr) context.kernels.contribute_leaf_squares(leaves, context.stream);
    co_await add_over_group(context, level.group, rows, row_numel);
    leaves.carried = rows + num_triples;
    if (orthogonality != nullptr) context.kernels.collect_leaf_squares(leaves, context.stream);
    context.kernels.pair_combine({pair, rows, buffer.data}, context.stream);
  }

  // Allgather: the same levels backward; what was kept is sent, what was given away comes home.
  // A rank that sat out receives the tail with its result.
  const std::int64_t tail_bytes = num_leaf_squares * static_cast<std::int64_t>(sizeof(double));
  for (std::size_t i = schedule.size(); i-- > 0;) {
    const AdasumLevel& level = schedule[i];
    const auto with_tail = [&](Range range) {
      const bool is_whole = level.is_fold && range == Range{0, buffer.numel};
      return Range{range.begin * width, range.end * width + (is_whole ? tail_bytes : 0)};
    };
    co_await exchange_with(context, level.peer, 1, buffer.data, with_tail(level.keep), buffer.data,
                           with_tail(level.give));
  }
  if (orthogonality != nullptr)
    context.kernels.copy(tail, tail_bytes, orthogonality, context.stream);
}

}  // namespace adareduce
