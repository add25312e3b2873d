#pragma once
#include <atomic>
#include <span>
#include <vector>

#include "bootstrap/bootstrap.h"

namespace adareduce {

/// Sleep that other threads can end. One sleeper, any number of callers of wake().
class Wakeup {
 public:
  Wakeup();
  ~Wakeup();
  Wakeup(const Wakeup&) = delete;
  Wakeup& operator=(const Wakeup&) = delete;

  /// Ends the present sleep, or the next one.
  void wake();
  /// Returns after wake(), after `timeout`, or when one of `descriptors` is readable.
  void sleep(Seconds timeout, std::span<const int> descriptors);

 private:
  int event_;
  std::atomic<bool> is_pending_{false};
};

}  // namespace adareduce
