// Arguments of the peer kernels; arithmetic and numerics stand in cpu_runs_adasum.h and
// cpu_runs_gram.h.
#include <cstring>

#include "kernels/cpu_kernels.h"
#include "kernels/gram.h"
#include "kernels/peer_kernels.h"

namespace adareduce {
namespace {

static_assert(cpu::kMostInputs == GramTree::kMaxLeaves);

template <typename Entry>
Entry entry_for(Entry const (&entries)[kNumDTypes], const VectorsArgs& vectors,
                const char* kernel) {
  if (vectors.num_inputs < 1 || vectors.num_inputs > cpu::kMostInputs)
    throw UsageError(concat(kernel, ": num_inputs must be 1 ... ", cpu::kMostInputs, ", got ",
                            vectors.num_inputs));
  return cpu::entry_of(entries, vectors.dtype, kernel);
}

template <const cpu::Runs& runs>
void gram(const GramArgs& args) {
  const VectorsArgs& vectors = args.vectors;
  entry_for(runs.gram, vectors, "gram")(vectors.inputs, vectors.num_inputs, vectors.numel,
                                        args.gram);
}

template <const cpu::Runs& runs>
void weighted_sum(const WeightedSumArgs& args) {
  const VectorsArgs& vectors = args.vectors;
  entry_for(runs.weighted_sum, vectors, "weighted_sum")(vectors.inputs, vectors.num_inputs,
                                                        vectors.numel, args.coefficients, args.out);
}

template <const cpu::Runs& runs>
void node_stats(const NodeStatsArgs& args) {
  const VectorsArgs& vectors = args.vectors;
  const auto stats_of_run = entry_for(runs.node_stats, vectors, "node_stats");
  if ((args.lower | args.upper) >> vectors.num_inputs != 0)
    throw UsageError(concat("node_stats: lower and upper must be sets of ", vectors.num_inputs,
                            " inputs, got ", args.lower, " and ", args.upper));
  stats_of_run(vectors.inputs, vectors.numel, args.coefficients, args.lower, args.upper,
               args.stats);
}

template <const cpu::Runs& runs>
void copy(const void* from, std::int64_t bytes, void* to, bool streams) {
  if (streams)
    runs.stream(from, bytes, to);
  else
    cpu::copy(from, bytes, to, {});
}

template <const cpu::Runs& runs>
struct PeerKernels {
  static constexpr PeerKernelTable kTable{gram<runs>, weighted_sum<runs>, node_stats<runs>,
                                          copy<runs>, cpu::finish_streams};
};

}  // namespace

const PeerKernelTable& cpu_peer_kernels() {
  static const PeerKernelTable& best = *cpu::best_table<PeerKernels>();
  return best;
}

const PeerKernelTable* cpu_peer_kernels_for(std::string_view isa) {
  return cpu::table_for<PeerKernels>(isa);
}

}  // namespace adareduce
