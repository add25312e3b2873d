// Segments and blocks of the element-wise kernels; arithmetic and numerics stand in
// cpu_runs_body.h.
#include <algorithm>
#include <cstring>

#include "kernels/cpu_kernels.h"
#ifdef __SSE2__
#include <emmintrin.h>
#endif

namespace adareduce::cpu {
namespace {

// Shorter copies are not worth a trip to memory.
constexpr std::int64_t kLeastStreamed = 4096;

// Where results are counted while they are in the first-level cache.
constexpr std::int64_t kCountBlock = 4096;

template <const Runs& runs>
void copy_or_scale(const void* in, std::int64_t numel, DType dtype, double scale, void* out,
                   const char* kernel) {
  if (scale == 1.0)
    copy(in, numel * size_of(dtype), out, {});
  else if (numel > 0)
    entry_of(runs.scale, dtype, kernel)(in, numel, scale, out);
}

}  // namespace

void copy(const void* from, std::int64_t bytes, void* to, Stream) {
  // A null pointer is legal for an empty tensor, not for memcpy.
  if (bytes > 0) std::memcpy(to, from, static_cast<std::size_t>(bytes));
}

void finish_streams() {
#ifdef __SSE2__
  _mm_sfence();
#endif
}

template <const Runs& runs>
void pack(const PackArgs& args, Stream) {
  const std::int64_t width = size_of(args.dtype);
  char* fused = static_cast<char*>(args.fused);
  std::int64_t filled = 0;
  const auto zero_until = [&](std::int64_t end) {
    if (end > filled)
      std::memset(fused + filled * width, 0, static_cast<std::size_t>((end - filled) * width));
  };
  for (std::int64_t s = 0; s < args.segments->count; ++s) {
    const TensorSegment& segment = args.segments->on_host[s];
    zero_until(segment.offset);
    const std::int64_t bytes = segment.numel * width;
    char* out = fused + segment.offset * width;
    if (args.streams && args.scale == 1.0 && bytes >= kLeastStreamed)
      runs.stream(args.tensors[s], bytes, out);
    else
      copy_or_scale<runs>(args.tensors[s], segment.numel, args.dtype, args.scale, out, "pack");
    filled = segment.range().end;
  }
  zero_until(args.numel);
  if (args.streams) finish_streams();
}

template <const Runs& runs>
void unpack(const UnpackArgs& args, Stream) {
  const std::int64_t width = size_of(args.dtype);
  for (std::int64_t s = 0; s < args.segments->count; ++s) {
    const TensorSegment& segment = args.segments->on_host[s];
    const char* in = static_cast<const char*>(args.fused) + segment.offset * width;
    char* out = static_cast<char*>(args.tensors[s]);
    if (args.nonfinite == nullptr) {
      copy_or_scale<runs>(in, segment.numel, args.dtype, args.scale, out, "unpack");
      continue;
    }
    const auto count = entry_of(runs.count_nonfinite, args.dtype, "unpack");
    args.nonfinite[s] = 0;
    for (std::int64_t i = 0; i < segment.numel; i += kCountBlock) {
      const std::int64_t numel = std::min(kCountBlock, segment.numel - i);
      copy_or_scale<runs>(in + i * width, numel, args.dtype, args.scale, out + i * width, "unpack");
      args.nonfinite[s] += count(out + i * width, numel);
    }
  }
}

template <const Runs& runs>
void reduce(const ReduceArgs& args, Stream) {
  if (args.numel == 0 || args.num_inputs == 0) return;
  const auto op = static_cast<std::size_t>(args.op);
  entry_of(runs.reduce[op], args.dtype, "reduce")({.inputs = args.inputs,
                                                   .num_inputs = args.num_inputs,
                                                   .out = args.out,
                                                   .begin = 0,
                                                   .numel = args.numel,
                                                   .divisor = args.divisor,
                                                   .squares = nullptr});
}

template <const Runs& runs>
void reduce_squares(const ReduceSquaresArgs& args, Stream) {
  const ReduceArgs& reduction = args.reduce;
  if (reduction.numel == 0 || reduction.num_inputs == 0) return;
  const auto reduce_run = entry_of(runs.reduce[kRunSum], reduction.dtype, "reduce_squares");
  const Range whole{args.begin, args.begin + reduction.numel};
  std::int64_t reduced = args.begin;
  const auto reduce_until = [&](std::int64_t end, double* squares) {
    if (end <= reduced) return;
    reduce_run({.inputs = reduction.inputs,
                .num_inputs = reduction.num_inputs,
                .out = reduction.out,
                .begin = reduced - args.begin,
                .numel = end - reduced,
                .divisor = reduction.divisor,
                .squares = squares});
    reduced = end;
  };
  for (std::int64_t s = 0; s < args.segments->count; ++s) {
    const Range part = clip(args.segments->on_host[s].range(), whole);
    if (part.empty()) continue;
    reduce_until(part.begin, nullptr);  // padding
    reduce_until(part.end, args.squares + args.group_of[s] * kSquaresPerGroup);
  }
  reduce_until(whole.end, nullptr);
}

#define ADAREDUCE_INSTANTIATE(runs)                      \
  template void pack<runs>(const PackArgs&, Stream);     \
  template void unpack<runs>(const UnpackArgs&, Stream); \
  template void reduce<runs>(const ReduceArgs&, Stream); \
  template void reduce_squares<runs>(const ReduceSquaresArgs&, Stream);
ADAREDUCE_FOR_ALL_RUNS(ADAREDUCE_INSTANTIATE)

}  // namespace adareduce::cpu
