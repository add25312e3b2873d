#pragma once
#include <pybind11/pybind11.h>

#include "kernels/cuda/gain_kernel.h"

namespace adareduce {

/// What Python says about a step of AdaScale: numbers by name, and addresses of memory by name, 0
/// where there is none. The caller vouches for dtypes and sizes. A name that is missing is an
/// error.
inline cuda::GainStepArgs gain_arguments(const pybind11::dict& numbers,
                                         const pybind11::dict& memory) {
  const auto number = [&](const char* name) { return numbers[name].cast<double>(); };
  const auto flag = [&](const char* name) { return numbers[name].cast<bool>(); };
  const auto count = [&](const char* name) { return numbers[name].cast<std::int64_t>(); };
  const auto address = [&](const char* name) {
    return reinterpret_cast<void*>(memory[name].cast<std::uintptr_t>());
  };
  const auto doubles = [&](const char* name) { return static_cast<double*>(address(name)); };
  const auto floats = [&](const char* name) { return static_cast<float*>(address(name)); };
  const auto bools = [&](const char* name) { return static_cast<bool*>(address(name)); };
  const auto integers = [&](const char* name) { return static_cast<std::int64_t*>(address(name)); };
  return {
      .rule = {.count = number("count"),
               .scale = number("scale"),
               .smoothing = number("smoothing"),
               .is_papers = flag("is_papers"),
               .clips_before = flag("clips_before"),
               .floor = number("floor"),
               .is_floor_absolute = flag("is_floor_absolute"),
               .is_per_group = flag("is_per_group"),
               .is_differenced = flag("is_differenced")},
      .state = {.num_samples = doubles("num_samples"),
                .averages = doubles("averages"),
                .is_biased = bools("is_biased"),
                .tau = doubles("tau"),
                .skipped = integers("skipped"),
                .has_previous = bools("has_previous")},
      .input = {.num_groups = count("num_groups"),
                .rows = doubles("rows"),
                .stride = count("stride"),
                .group_of = static_cast<const std::int32_t*>(address("group_of")),
                .num_rows = count("num_rows"),
                .divisors = {number("divisor_of_sum"), number("divisor_of_mean")},
                .factors = {number("factor_of_sum"), number("factor_of_mean")},
                .loss_scale = number("loss_scale"),
                .device_loss_scale = floats("device_loss_scale"),
                .nonfinite = integers("nonfinite"),
                .num_counts = count("num_counts"),
                .found_inf = floats("found_inf"),
                .base_rates = doubles("base_rates"),
                .schedule = doubles("schedule"),
                .num_entries = count("num_entries"),
                .step_rates = doubles("step_rates")},
      .output = {.work = doubles("work"),
                 .gains = doubles("gains"),
                 .rates = doubles("rates"),
                 .rates_f32 = floats("rates_f32"),
                 .shares = doubles("shares"),
                 .shares_f32 = floats("shares_f32"),
                 .skips = bools("skips"),
                 .found_inf = floats("skips_f32"),
                 .report = doubles("report")},
  };
}

}  // namespace adareduce
