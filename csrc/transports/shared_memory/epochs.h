#pragma once
#include <atomic>
#include <cstdint>
#include <span>

#include "bootstrap/bootstrap.h"

namespace adareduce {

/// A counter in shared memory that one rank advances and others wait for. Zeroed memory is one at
/// 0. It wraps around: values are compared by their signed difference, which must stay below 2^31.
struct alignas(128) Epoch {  // two cache lines: processors fetch them in pairs
  std::atomic<std::uint32_t> value{0};
  std::atomic<std::uint32_t> sleepers{0};  ///< waiters that may be asleep; killed ones stay counted
};
static_assert(sizeof(Epoch) == 128 && std::atomic<std::uint32_t>::is_always_lock_free);

/// `value` is `target` or has passed it.
inline bool has_reached(std::uint32_t value, std::uint32_t target) {
  return static_cast<std::int32_t>(value - target) >= 0;
}

/// What this thread has written before is visible to whoever sees the epoch at `to`. Wakes those
/// who sleep. Only one thread at a time advances an epoch. Never blocks.
void advance(Epoch& epoch, std::uint32_t to);

/// How a wait spends its time: pauses first, where peers have cores of their own; then it gives its
/// core to others; then it sleeps.
struct Patience {
  int pauses = 2000;            ///< of some 40 ns each; few where ranks outnumber cores
  int yields = 20;              ///< each of them lets every other runnable thread have a turn
  Seconds longest_sleep{0.01};  ///< 0: never sleep; infinity: until woken
};

/// Waits until the epochs of several ranks have reached a target. Owns nothing, allocates nothing;
/// used by one thread. It looks at each epoch until that is reached, and never again.
class EpochWait {
 public:
  EpochWait(std::span<Epoch* const> epochs, std::uint32_t target)
      : epochs_(epochs), target_(target) {}

  /// All are reached; then what their ranks had written before is visible here. Never blocks.
  bool poll();
  /// Blocks until all are reached (true), or one pass of `patience` is over or a signal came
  /// (false). Every advance of an epoch ends a sleep for it at once. Deadlines are the caller's.
  bool wait(const Patience& patience);
  /// Which of `epochs` lags first; their number where none does. As the last call saw it.
  std::size_t first_lagging() const { return reached_; }

 private:
  bool sleep(const Seconds& longest);

  std::span<Epoch* const> epochs_;
  std::uint32_t target_;
  std::size_t reached_ = 0;  // so many from the front
};

/// Tells the processor that this is a loop that waits.
inline void pause_processor() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("isb");  // "yield" does nothing on most of them
#endif
}

}  // namespace adareduce
