#include "collectives/adasum.h"

#include <algorithm>
#include <array>

#include "kernels/coefficients.h"

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
  context.kernels.reduce({.inputs = parts.data(),
                          .num_inputs = static_cast<int>(group_size),
                          .out = sum,
                          .numel = row_numel,
                          .dtype = DType::f64},
                         context.stream);
}

// Per tensor, in a row behind its triples: the sum of |g_i|^2 over the leaves below a node. A
// leaf's is among the triples; that of an inner node is carried up by the node's first owner.
struct LeafSquares {
  std::span<double> of_node;  // what this rank's operand has collected
  std::span<double> of_row;   // what the group adds up

  void contribute(const AdasumLevel& level) const {
    const bool is_inner = !(level.is_lower ? level.lower_is_leaf : level.upper_is_leaf);
    for (std::size_t t = 0; t < of_row.size(); ++t)
      of_row[t] = is_inner && level.is_speaker ? of_node[t] : 0.0;
  }
  void collect(const AdasumLevel& level, const double* triples) const {
    for (std::size_t t = 0; t < of_row.size(); ++t) {
      of_node[t] = of_row[t];
      if (level.lower_is_leaf) of_node[t] += triples[t * kStatsPerSegment + 1];
      if (level.upper_is_leaf) of_node[t] += triples[t * kStatsPerSegment + 2];
    }
  }
};

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
  const auto num_segments = static_cast<std::size_t>(buffer.segments.count);
  const std::size_t num_triples = num_segments * kStatsPerSegment;
  const std::size_t num_leaf_squares = orthogonality == nullptr ? 0 : num_segments;
  const std::span<double> rows = stats.subspan(num_leaf_squares);
  const LeafSquares leaves{stats.first(num_leaf_squares),
                           rows.subspan(num_triples, num_leaf_squares)};
  const auto tail_bytes = static_cast<std::int64_t>(num_leaf_squares * sizeof(double));
  double* const tail = reinterpret_cast<double*>(at(buffer.data, buffer.numel, width));
  std::fill_n(tail, num_leaf_squares, 1.0);  // of one rank alone

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
    context.kernels.pair_stats({pair, rows.data()}, context.stream);
    leaves.contribute(level);
    co_await add_over_group(context, level.group, rows,
                            static_cast<std::int64_t>(num_triples + num_leaf_squares));
    leaves.collect(level, rows.data());
    context.kernels.pair_combine({pair, rows.data(), buffer.data}, context.stream);
    for (std::size_t t = 0; t < num_leaf_squares; ++t)  // the last level's stays
      tail[t] = adasum_orthogonality(&rows[t * kStatsPerSegment], leaves.of_node[t]);
  }

  // Allgather: the same levels backward; what was kept is sent, what was given away comes home.
  // A rank that sat out receives the tail with its result.
  for (std::size_t i = schedule.size(); i-- > 0;) {
    const AdasumLevel& level = schedule[i];
    const auto with_tail = [&](Range range) {
      const bool is_whole = level.is_fold && range == Range{0, buffer.numel};
      return Range{range.begin * width, range.end * width + (is_whole ? tail_bytes : 0)};
    };
    co_await exchange_with(context, level.peer, 1, buffer.data, with_tail(level.keep), buffer.data,
                           with_tail(level.give));
  }
  if (orthogonality != nullptr) std::copy_n(tail, num_leaf_squares, orthogonality);
}

}  // namespace adareduce
