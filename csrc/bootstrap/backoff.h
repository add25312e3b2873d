#pragma once
#include <algorithm>
#include <chrono>
#include <thread>

namespace adareduce {

/// The pause between two looks at something that another process does: busy at first, because most
/// waits are short, then asleep, because the others may need this core.
class Backoff {
 public:
  /// Returns at once for the first 50 us after the start or `reset`, then sleeps 200 us at most.
  void pause() {
    if (sleep_ == kFirstSleep && Clock::now() - start_ < kSpin) {
      std::this_thread::yield();
      return;
    }
    std::this_thread::sleep_for(sleep_);
    sleep_ = std::min(2 * sleep_, kLongestSleep);
  }

  /// Something happened: be quick again.
  void reset() { *this = Backoff(); }

 private:
  using Clock = std::chrono::steady_clock;
  using Microseconds = std::chrono::microseconds;
  static constexpr Microseconds kSpin{50};
  static constexpr Microseconds kFirstSleep{10};
  static constexpr Microseconds kLongestSleep{200};

  Clock::time_point start_ = Clock::now();
  Microseconds sleep_ = kFirstSleep;
};

}  // namespace adareduce
