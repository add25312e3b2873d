// Segments of the pair kernels; arithmetic and numerics stand in cpu_runs_adasum.h.
#include "kernels/coefficients.h"
#include "kernels/cpu_kernels.h"

namespace adareduce::cpu {
namespace {

// Calls body(segment index, part of the segment inside the range); a part may be empty.
template <typename Body>
void for_each_part(const VectorPair& pair, Body&& body) {
  for (std::int64_t s = 0; s < pair.segments->count; ++s)
    body(s, clip(pair.segments->on_host[s].range(), pair.range));
}

const void* element(const void* base, std::int64_t index, DType dtype) {
  return static_cast<const char*>(base) + index * size_of(dtype);
}
void* element(void* base, std::int64_t index, DType dtype) {
  return static_cast<char*>(base) + index * size_of(dtype);
}

}  // namespace

template <const Runs& runs>
void pair_stats(const PairStatsArgs& args, Stream) {
  const VectorPair& pair = args.pair;
  const auto stats_of_run = entry_of(runs.pair_stats, pair.dtype, "pair_stats");
  for_each_part(pair, [&](std::int64_t s, Range part) {
    stats_of_run(element(pair.lower, part.begin, pair.dtype),
                 element(pair.upper, part.begin, pair.dtype), part.size(),
                 args.stats + s * kStatsPerSegment);
  });
}

template <const Runs& runs>
void pair_combine(const PairCombineArgs& args, Stream) {
  const VectorPair& pair = args.pair;
  const auto combine_run = entry_of(runs.pair_combine, pair.dtype, "pair_combine");
  for_each_part(pair, [&](std::int64_t s, Range part) {
    const double* stats = args.stats + s * kStatsPerSegment;
    combine_run(element(pair.lower, part.begin, pair.dtype),
                element(pair.upper, part.begin, pair.dtype), part.size(),
                adasum_share(stats[0], stats[1]), adasum_share(stats[0], stats[2]),
                element(args.out, part.begin, pair.dtype));
  });
}

void contribute_leaf_squares(const LeafSquaresArgs& args, Stream) {
  for (std::int64_t s = 0; s < args.num_segments; ++s)
    args.carried[s] = args.contributes ? args.of_node[s] : 0.0;
}

void collect_leaf_squares(const LeafSquaresArgs& args, Stream) {
  for (std::int64_t s = 0; s < args.num_segments; ++s) {
    const double* stats = args.pair_stats + s * kStatsPerSegment;
    double squares = args.carried[s];
    if (args.lower_is_leaf) squares += stats[1];
    if (args.upper_is_leaf) squares += stats[2];
    args.of_node[s] = squares;
    args.orthogonality[s] = adasum_orthogonality(stats, squares);
  }
}

#define ADAREDUCE_INSTANTIATE(runs)                             \
  template void pair_stats<runs>(const PairStatsArgs&, Stream); \
  template void pair_combine<runs>(const PairCombineArgs&, Stream);
ADAREDUCE_FOR_ALL_RUNS(ADAREDUCE_INSTANTIATE)

}  // namespace adareduce::cpu
