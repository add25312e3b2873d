// Numerics: products and sums in double. Element i of a part adds into virtual lane i mod 16, and
// the lanes are added pairwise, (0,8) (1,9) ... then (0,4) ...: any vector width gives these bits.
// Multiply and add round separately, on every CPU (this file is compiled with -ffp-contract=off);
// for float32 the product is exact in double. Relative error of a sum about n/16 * 2^-53.
#include "kernels/coefficients.h"
#include "kernels/cpu_kernels.h"
#include "kernels/dispatch.h"

namespace adareduce::cpu {
namespace {

constexpr int kLanes = 16;

double add_lanes(double (&lanes)[kLanes]) {
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int lane = 0; lane < width; ++lane) lanes[lane] += lanes[lane + width];
  return lanes[0];
}

template <typename T>
void stats_of_part(const T* lower, const T* upper, std::int64_t numel, double* stats) {
  double dot[kLanes] = {}, lower_sq[kLanes] = {}, upper_sq[kLanes] = {};
  const auto add_to_lane = [&](std::int64_t i, int lane) {
    const double a = lower[i + lane], b = upper[i + lane];
    dot[lane] += a * b;
    lower_sq[lane] += a * a;
    upper_sq[lane] += b * b;
  };
  std::int64_t i = 0;
  for (; i + kLanes <= numel; i += kLanes)
    for (int lane = 0; lane < kLanes; ++lane) add_to_lane(i, lane);
  for (int lane = 0; i + lane < numel; ++lane) add_to_lane(i, lane);
  stats[0] = add_lanes(dot);
  stats[1] = add_lanes(lower_sq);
  stats[2] = add_lanes(upper_sq);
}

template <typename T>
void combine_part(const T* lower, const T* upper, std::int64_t numel, const double* stats, T* out) {
  const double lower_share = adasum_share(stats[0], stats[1]);
  const double upper_share = adasum_share(stats[0], stats[2]);
  for (std::int64_t i = 0; i < numel; ++i)
    out[i] = static_cast<T>(lower_share * static_cast<double>(lower[i]) +
                            upper_share * static_cast<double>(upper[i]));
}

// Calls body(segment index, part of the segment inside the range); a part may be empty.
template <typename Body>
void for_each_part(const VectorPair& pair, Body&& body) {
  for (std::int64_t s = 0; s < pair.segments->count; ++s)
    body(s, clip(pair.segments->on_host[s].range(), pair.range));
}

}  // namespace

void pair_stats(const PairStatsArgs& args, Stream) {
  for_arithmetic_type(args.pair.dtype, "pair_stats", [&]<typename T>(T) {
    const T* lower = static_cast<const T*>(args.pair.lower);
    const T* upper = static_cast<const T*>(args.pair.upper);
    for_each_part(args.pair, [&](std::int64_t s, Range part) {
      stats_of_part(lower + part.begin, upper + part.begin, part.size(),
                    args.stats + s * kStatsPerSegment);
    });
  });
}

void pair_combine(const PairCombineArgs& args, Stream) {
  for_arithmetic_type(args.pair.dtype, "pair_combine", [&]<typename T>(T) {
    const T* lower = static_cast<const T*>(args.pair.lower);
    const T* upper = static_cast<const T*>(args.pair.upper);
    T* out = static_cast<T*>(args.out);
    for_each_part(args.pair, [&](std::int64_t s, Range part) {
      combine_part(lower + part.begin, upper + part.begin, part.size(),
                   args.stats + s * kStatsPerSegment, out + part.begin);
    });
  });
}

}  // namespace adareduce::cpu
