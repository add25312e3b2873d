#include <barrier>
#include <thread>
#include <vector>

#include "bindings/bindings.h"
#include "bindings/gain_arguments.h"

namespace py = pybind11;
using namespace py::literals;

namespace adareduce {
namespace {

/// A warp's lanes as threads of the host, for tests.
struct ThreadLanes {
  std::int64_t number;
  std::int64_t count;
  std::barrier<>* barrier;
  double* slots;  ///< [count]

  void meet() const { barrier->arrive_and_wait(); }
  double sum(double x) const {
    slots[number] = x;
    meet();
    double total = 0;
    for (std::int64_t i = 0; i < count; ++i) total += slots[i];
    meet();  // nobody writes the next number before all have read this one
    return total;
  }
};

void gain_step_on_threads(const cuda::GainStepArgs& args, int num_lanes) {
  std::barrier barrier(num_lanes);
  std::vector<double> slots(static_cast<std::size_t>(num_lanes));
  std::vector<std::thread> threads;
  for (int lane = 0; lane < num_lanes; ++lane)
    threads.emplace_back(
        [&, lane] { cuda::gain_step(args, ThreadLanes{lane, num_lanes, &barrier, slots.data()}); });
  for (std::thread& thread : threads) thread.join();
}

}  // namespace

void bind_gain(py::module_& module) {
  module.def(
      "gain_step",
      [](const py::dict& numbers, const py::dict& memory) {
        cuda::gain_step(gain_arguments(numbers, memory), cuda::OneLane{});
      },
      "numbers"_a, "memory"_a);
}

void bind_gain_testing(py::module_& module) {
  module.def(
      "gain_step",
      [](const py::dict& numbers, const py::dict& memory, int num_lanes) {
        gain_step_on_threads(gain_arguments(numbers, memory), num_lanes);
      },
      "numbers"_a, "memory"_a, "num_lanes"_a);
}

}  // namespace adareduce
