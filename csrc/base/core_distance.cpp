#include "base/core_distance.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

#include "base/errors.h"

namespace adareduce {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int kRoundTripsPerSample = 50;  // the clock takes about as long as half a round trip
constexpr std::int64_t kStop = -1;
constexpr std::size_t kCacheLine = 64;

struct alignas(2 * kCacheLine) Counter {  // pairs of lines are fetched together
  std::atomic<std::int64_t> value{0};
};

void pin_this_thread(int core) {
  cpu_set_t cores;
  CPU_ZERO(&cores);
  CPU_SET(static_cast<std::size_t>(core), &cores);
  pthread_setaffinity_np(pthread_self(), sizeof cores, &cores);
}

void require_usable(int core) {
  cpu_set_t cores;
  CPU_ZERO(&cores);
  sched_getaffinity(0, sizeof cores, &cores);
  if (core < 0 || core >= CPU_SETSIZE || !CPU_ISSET(static_cast<std::size_t>(core), &cores))
    throw UsageError(
        concat("core_round_trip_ns: core must be one that this process may run on, got ", core));
}

void echo(Counter& ball) {
  for (std::int64_t expected = 1;; expected += 2) {
    std::int64_t seen = ball.value.load(std::memory_order_acquire);
    while (seen != expected && seen != kStop) seen = ball.value.load(std::memory_order_acquire);
    if (seen == kStop) return;
    ball.value.store(expected + 1, std::memory_order_release);
  }
}

double round_trips(Counter& ball, Clock::time_point deadline) {
  std::vector<double> samples;
  std::int64_t count = 0;
  Clock::time_point begin = Clock::now();
  while (begin < deadline || samples.empty()) {
    for (int trip = 0; trip < kRoundTripsPerSample; ++trip) {
      ball.value.store(count + 1, std::memory_order_release);
      count += 2;
      while (ball.value.load(std::memory_order_acquire) != count) {
      }
    }
    const Clock::time_point end = Clock::now();
    samples.push_back(std::chrono::duration<double, std::nano>(end - begin).count() /
                      kRoundTripsPerSample);
    begin = end;
  }
  ball.value.store(kStop, std::memory_order_release);
  const auto middle = samples.begin() + static_cast<std::ptrdiff_t>(samples.size() / 2);
  std::nth_element(samples.begin(), middle, samples.end());
  return *middle;
}

}  // namespace

double core_round_trip_ns(int first, int second, std::chrono::microseconds duration) {
  require_usable(first);
  require_usable(second);
  Counter ball;
  double median = 0;
  std::thread replying([&] {
    pin_this_thread(second);
    echo(ball);
  });
  std::thread asking([&] {
    pin_this_thread(first);
    median = round_trips(ball, Clock::now() + duration);
  });
  asking.join();
  replying.join();
  return median;
}

}  // namespace adareduce
