#pragma once
#include "base/errors.h"
#include "kernels/cpu_runs.h"
#include "kernels/kernels.h"

/// The entries of the CPU's kernel tables, one instance per instruction set. Contracts stand in
/// kernels.h; what they do with contiguous elements stands in cpu_runs_body.h.
namespace adareduce::cpu {

template <const Runs& runs>
void pair_stats(const PairStatsArgs& args, Stream);
template <const Runs& runs>
void pair_combine(const PairCombineArgs& args, Stream);
template <const Runs& runs>
void pack(const PackArgs& args, Stream);
template <const Runs& runs>
void unpack(const UnpackArgs& args, Stream);
template <const Runs& runs>
void reduce(const ReduceArgs& args, Stream);
template <const Runs& runs>
void reduce_squares(const ReduceSquaresArgs& args, Stream);

void contribute_leaf_squares(const LeafSquaresArgs& args, Stream);
void collect_leaf_squares(const LeafSquaresArgs& args, Stream);
void copy(const void* from, std::int64_t bytes, void* to, Stream);

/// Orders what Runs::stream wrote before all that this thread writes from here on.
void finish_streams();

/// The table for "baseline", "avx2" or "avx512"; null where this build or this CPU lacks it.
const Runs* runs_for(std::string_view isa);

/// For<runs>::kTable of that instruction set; null where this build or this CPU lacks it.
template <template <const Runs&> class For>
auto table_for(std::string_view isa) -> decltype(&For<kBaselineRuns>::kTable) {
  const Runs* const runs = runs_for(isa);
#ifdef __x86_64__
  if (runs == &kAvx512Runs) return &For<kAvx512Runs>::kTable;
  if (runs == &kAvx2Runs) return &For<kAvx2Runs>::kTable;
#endif
  return runs == nullptr ? nullptr : &For<kBaselineRuns>::kTable;
}

/// For<runs>::kTable of the widest instruction set that this CPU has.
template <template <const Runs&> class For>
auto best_table() -> decltype(&For<kBaselineRuns>::kTable) {
  for (const std::string_view isa : {"avx512", "avx2"})
    if (const auto* table = table_for<For>(isa)) return table;
  return &For<kBaselineRuns>::kTable;
}

#ifdef __x86_64__
#define ADAREDUCE_FOR_ALL_RUNS(macro) macro(kBaselineRuns) macro(kAvx2Runs) macro(kAvx512Runs)
#else
#define ADAREDUCE_FOR_ALL_RUNS(macro) macro(kBaselineRuns)
#endif

/// The entry for `dtype`. Throws UsageError in the name of `kernel` where there is none.
template <typename Entry>
Entry entry_of(Entry const (&entries)[kNumDTypes], DType dtype, const char* kernel) {
  const auto code = static_cast<std::size_t>(dtype);
  if (code >= kNumDTypes || entries[code] == nullptr)
    throw UsageError(
        concat(kernel, ": dtype must be one that it is defined for, got ", name_of(dtype)));
  return entries[code];
}

}  // namespace adareduce::cpu
