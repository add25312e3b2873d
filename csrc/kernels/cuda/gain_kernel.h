#pragma once
#include <cmath>
#include <cstdint>

#include "base/types.h"
#include "kernels/coefficients.h"

/// A step of AdaScale after the gradients are reduced: averages, gains, tau, schedule and rates.
/// Readable without CUDA: the host and the GPU run the same function. docs/algorithms.md,
/// "AdaScale"; torch/gain.py has the same formulas as operations of torch.
namespace adareduce::cuda {

/// How gains follow from statistics: the arguments of torch/gain.py's GainEstimator.
struct GainRule {
  double count = 1;       ///< n, micro-batches of a step
  double scale = 1;       ///< S
  double smoothing = 0;   ///< theta
  bool is_papers = true;  ///< the plain mean, then an exponential average; else a debiased one
  bool clips_before = false;
  double floor = 0;
  bool is_floor_absolute = false;
  bool is_per_group = true;  ///< each group's rate has its own gain; else all have the total one
  /// The samples are this step's gradient and the last one's.
  bool is_differenced = false;
};

/// What is kept from step to step, in device memory.
struct GainState {
  double* num_samples = nullptr;
  double* averages = nullptr;  ///< [groups + 1][3]: sigma^2, mu^2, mean |g|^2; the last row: total
  bool* is_biased = nullptr;
  double* tau = nullptr;
  std::int64_t* skipped = nullptr;
  /// With is_differenced: whether there was a step whose gradient is kept. May be null: yes.
  bool* has_previous = nullptr;
};

/// Device memory but for the numbers. Null pointers where noted mean that there is nothing.
struct GainInput {
  std::int64_t num_groups = 0;
  const double* rows = nullptr;  ///< [rows][stride]: sum of |g|^2, |mean|^2; null: nothing was seen
  std::int64_t stride = 2;
  const std::int32_t* group_of = nullptr;  ///< [rows]
  std::int64_t num_rows = 0;
  double divisors[2] = {1, 1};               ///< of the columns
  double factors[2] = {1, 1};                ///< then
  double loss_scale = 1;                     ///< its square divides both columns
  const float* device_loss_scale = nullptr;  ///< instead of `loss_scale`; may be null
  const std::int64_t* nonfinite = nullptr;   ///< [counts]: the step is skipped where one is not 0
  std::int64_t num_counts = 0;
  const float* found_inf = nullptr;    ///< the step is skipped where it is above 0; may be null
  const double* base_rates = nullptr;  ///< [groups]
  const double* schedule = nullptr;    ///< [entries][groups], instead of base_rates; may be null
  std::int64_t num_entries = 0;
  const double* step_rates = nullptr;  ///< [groups]: what `shares` are of
};

/// Device memory.
struct GainOutput {
  double* work = nullptr;   ///< [groups + 1][2], nobody's afterwards
  double* gains = nullptr;  ///< [groups + 1]; the last is the total one
  double* rates = nullptr;  ///< [groups]: rate times gain
  float* rates_f32 = nullptr;
  double* shares = nullptr;  ///< [groups]: rates / step_rates, 0 where a step rate is 0
  float* shares_f32 = nullptr;
  bool* skips = nullptr;       ///< this step is none
  float* found_inf = nullptr;  ///< the same, 1 or 0
  double* report = nullptr;    ///< [3]: tau, total gain, skipped steps
};

struct GainStepArgs {
  GainRule rule;
  GainState state;
  GainInput input;
  GainOutput output;
};

/// sigma^2, mu^2 and mean |g|^2.
struct GainMoments {
  double variance;
  double squared_norm;
  double mean_square;
};

/// Unbiased estimates of `samples` gradients, sigma^2 at scale 1.
ADAREDUCE_HOST_DEVICE inline GainMoments gain_moments(const GainRule& rule, const double* squares,
                                                      double samples) {
  const double variance = (squares[0] - samples * squares[1]) / (samples - 1);
  return {variance * (rule.scale / rule.count), squares[1] - variance / samples,
          squares[0] / samples};
}

ADAREDUCE_HOST_DEVICE inline GainMoments gain_clipped(const GainRule& rule, GainMoments moments) {
  const double lowest = rule.is_floor_absolute ? rule.floor : rule.floor * moments.mean_square;
  // Written so that a NaN stays.
  if (moments.variance < lowest) moments.variance = lowest;
  if (moments.squared_norm < 0) moments.squared_norm = 0;
  return moments;
}

/// r of averaged moments, in [1, S].
ADAREDUCE_HOST_DEVICE inline double gain_of(const GainRule& rule, GainMoments average) {
  average = gain_clipped(rule, average);
  const double noise = average.variance / rule.scale + average.squared_norm;
  const double gain = noise > 0 ? (average.variance + average.squared_norm) / noise : 1.0;
  return gain < 1.0 ? 1.0 : gain > rule.scale ? rule.scale : gain;
}

/// Of the newest of `seen` samples in an average.
ADAREDUCE_HOST_DEVICE inline double gain_weight(const GainRule& rule, double seen) {
  const double least = 1.0 - rule.smoothing;
  if (!rule.is_papers) return least / (1.0 - std::pow(rule.smoothing, seen));
  return 1.0 / seen < least ? least : 1.0 / seen;
}

/// a + weight (b - a), with the rounding of torch.lerp: exact at both ends.
ADAREDUCE_HOST_DEVICE inline double gain_lerp(double a, double b, double weight) {
  return weight < 0.5 ? a + weight * (b - a) : b - (b - a) * (1.0 - weight);
}

ADAREDUCE_HOST_DEVICE inline bool gain_is_finite(GainMoments x) {
  return std::isfinite(x.variance) && std::isfinite(x.squared_norm) && std::isfinite(x.mean_square);
}

/// The only lane, on the host.
struct OneLane {
  static constexpr std::int64_t number = 0, count = 1;
  void meet() const {}
  double sum(double x) const { return x; }
};

/// One step, on `Lanes` that work together: `number` of `count`; meet() waits for all and lets them
/// see what the others have written; sum() is the same on all. A step with anything that is not
/// finite changes `skipped` and `skips` alone.
template <typename Lanes>
ADAREDUCE_HOST_DEVICE void gain_step(const GainStepArgs& args, const Lanes& lanes) {
  const GainRule& rule = args.rule;
  const GainState& state = args.state;
  const GainInput& input = args.input;
  const GainOutput& output = args.output;
  const std::int64_t total = input.num_groups;  // the row behind those of the groups
  const std::int64_t num_rows = input.rows == nullptr ? 0 : input.num_rows;
  const bool is_first_lane = lanes.number == 0;

  double bad = 0;
  for (std::int64_t i = lanes.number; i < input.num_counts; i += lanes.count)
    if (input.nonfinite[i] != 0) bad = 1;
  const bool skips = lanes.sum(bad) > 0 || (input.found_inf != nullptr && !(*input.found_inf <= 0));

  const double loss_scale = input.device_loss_scale == nullptr
                                ? input.loss_scale
                                : static_cast<double>(*input.device_loss_scale);
  for (std::int64_t k = lanes.number; k < input.num_groups; k += lanes.count)
    for (int column = 0; column < 2; ++column) {
      double sum = 0;
      for (std::int64_t row = 0; row < num_rows; ++row)
        if (input.group_of[row] == k) sum += input.rows[row * input.stride + column];
      output.work[2 * k + column] =
          sum / input.divisors[column] * input.factors[column] / (loss_scale * loss_scale);
    }
  lanes.meet();
  if (is_first_lane)
    for (int column = 0; column < 2; ++column) {
      double sum = 0;
      for (std::int64_t k = 0; k < input.num_groups; ++k) sum += output.work[2 * k + column];
      output.work[2 * total + column] = sum;
    }
  lanes.meet();

  const bool has_sample =
      input.rows != nullptr && (state.has_previous == nullptr || *state.has_previous);
  const double samples = rule.is_differenced ? 2.0 : rule.count;
  const bool is_other_kind = *state.is_biased != rule.is_differenced;
  double seen = (is_other_kind ? 0.0 : *state.num_samples) + 1.0;
  const double weight = gain_weight(rule, seen);
  const auto sample_of = [&](std::int64_t k) {
    const GainMoments sample = gain_moments(rule, output.work + 2 * k, samples);
    return rule.clips_before ? gain_clipped(rule, sample) : sample;
  };
  bad = 0;
  if (has_sample)
    for (std::int64_t k = lanes.number; k <= total; k += lanes.count)
      if (!gain_is_finite(sample_of(k))) bad = 1;
  const bool observes = has_sample && lanes.sum(bad) == 0 && !skips;
  if (!observes) seen = *state.num_samples;
  const double tau = *state.tau;
  const double needed = rule.is_papers ? 2.0 : 1.0;
  lanes.meet();  // all have read what is written from here on

  for (std::int64_t k = lanes.number; k <= total; k += lanes.count) {
    double* average = state.averages + 3 * k;
    if (observes) {
      const GainMoments sample = sample_of(k);
      average[0] = gain_lerp(average[0], sample.variance, weight);
      average[1] = gain_lerp(average[1], sample.squared_norm, weight);
      average[2] = gain_lerp(average[2], sample.mean_square, weight);
    }
    output.gains[k] = seen < needed ? 1.0 : gain_of(rule, {average[0], average[1], average[2]});
  }
  lanes.meet();

  const double* rates = input.base_rates;
  if (input.schedule != nullptr) {
    const double last = static_cast<double>(input.num_entries - 1), now = std::floor(tau);
    rates = input.schedule + static_cast<std::int64_t>(now < last ? now : last) * total;
  }
  for (std::int64_t k = lanes.number; k < total; k += lanes.count) {
    const double rate = rates[k] * output.gains[rule.is_per_group ? k : total];
    const double whole = input.step_rates[k], share = whole == 0 ? 0.0 : rate / whole;
    output.rates[k] = rate;
    output.rates_f32[k] = static_cast<float>(rate);
    output.shares[k] = share;
    output.shares_f32[k] = static_cast<float>(share);
  }
  if (!is_first_lane) return;
  *output.skips = skips;
  *output.found_inf = skips ? 1.0f : 0.0f;
  if (skips) *state.skipped += 1;
  if (observes) *state.num_samples = seen;
  if (observes) *state.is_biased = rule.is_differenced;
  if (state.has_previous != nullptr && !skips) *state.has_previous = true;
  if (!skips) *state.tau = tau + output.gains[total];
  output.report[0] = *state.tau;
  output.report[1] = output.gains[total];
  output.report[2] = static_cast<double>(*state.skipped);
}

/// gain_step() on one warp of the GPU, in stream order.
void launch_gain_step(const GainStepArgs& args, Stream stream);

}  // namespace adareduce::cuda
