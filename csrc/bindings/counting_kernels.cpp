#include "bindings/counting_kernels.h"

#include <mutex>

namespace adareduce {
namespace {

std::mutex mutex;
std::map<std::string, WorkCount> counts;

void count(const char* entry, std::int64_t elements) {
  const std::lock_guard lock(mutex);
  ++counts[entry].calls;
  counts[entry].elements += elements;
}

std::int64_t numel_of(const SegmentTable& segments) {
  std::int64_t numel = 0;
  for (std::int64_t s = 0; s < segments.count; ++s) numel += segments.on_host[s].numel;
  return numel;
}

const KernelTable kCounting{
    .device = "cpu",
    .pair_stats =
        [](const PairStatsArgs& args, Stream stream) {
          count("pair_stats", 2 * args.pair.range.size());
          cpu_kernels().pair_stats(args, stream);
        },
    .pair_combine =
        [](const PairCombineArgs& args, Stream stream) {
          count("pair_combine", 2 * args.pair.range.size());
          cpu_kernels().pair_combine(args, stream);
        },
    .pack =
        [](const PackArgs& args, Stream stream) {
          count("pack", numel_of(*args.segments));
          cpu_kernels().pack(args, stream);
        },
    .unpack =
        [](const UnpackArgs& args, Stream stream) {
          count("unpack", numel_of(*args.segments));
          cpu_kernels().unpack(args, stream);
        },
    .reduce =
        [](const ReduceArgs& args, Stream stream) {
          count("reduce", args.num_inputs * args.numel);
          cpu_kernels().reduce(args, stream);
        },
    .reduce_squares =
        [](const ReduceSquaresArgs& args, Stream stream) {
          count("reduce", args.reduce.num_inputs * args.reduce.numel);
          cpu_kernels().reduce_squares(args, stream);
        },
    .contribute_leaf_squares = cpu_kernels().contribute_leaf_squares,
    .collect_leaf_squares = cpu_kernels().collect_leaf_squares,
    .copy = cpu_kernels().copy,
};

}  // namespace

std::map<std::string, WorkCount> counted_work() {
  const std::lock_guard lock(mutex);
  return counts;
}

void reset_counted_work() {
  const std::lock_guard lock(mutex);
  counts.clear();
}

const KernelTable& counting_kernels() { return kCounting; }

}  // namespace adareduce
