#include "transports/shared_memory/epochs.h"

#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <climits>
#include <cmath>
#include <ctime>

namespace adareduce {
namespace {

constexpr double kForEver = 1e9;  // seconds; more does not fit a timespec everywhere

// Not FUTEX_PRIVATE: the sleepers are other processes, at other addresses.
enum class Sleep { woken, over, interrupted };
Sleep sleep_while(std::atomic<std::uint32_t>& word, std::uint32_t value, const timespec* until) {
  if (syscall(SYS_futex, reinterpret_cast<std::uint32_t*>(&word), FUTEX_WAIT_BITSET, value, until,
              nullptr, FUTEX_BITSET_MATCH_ANY) == 0)
    return Sleep::woken;
  if (errno == ETIMEDOUT) return Sleep::over;
  return errno == EAGAIN ? Sleep::woken : Sleep::interrupted;
}

timespec monotonic_after(const Seconds& duration) {
  timespec time{};
  clock_gettime(CLOCK_MONOTONIC, &time);
  const double whole = std::floor(duration.count());
  time.tv_sec += static_cast<time_t>(whole);
  time.tv_nsec += static_cast<long>((duration.count() - whole) * 1e9);
  if (time.tv_nsec >= 1'000'000'000) {
    time.tv_nsec -= 1'000'000'000;
    ++time.tv_sec;
  }
  return time;
}

}  // namespace

// No wake-up is lost. The one who advances writes `value`, then reads `sleepers`; the one who waits
// writes `sleepers`, then reads `value`; all four are sequentially consistent, so at least one of
// the two sees what the other wrote. Either the waiter finds the new value, or it is counted and
// woken; between its look and its sleep the kernel compares `value` once more.
void advance(Epoch& epoch, std::uint32_t to) {
  epoch.value.store(to, std::memory_order_seq_cst);
  if (epoch.sleepers.load(std::memory_order_seq_cst) != 0)
    syscall(SYS_futex, reinterpret_cast<std::uint32_t*>(&epoch.value), FUTEX_WAKE, INT_MAX, nullptr,
            nullptr, 0);
}

bool EpochWait::poll() {
  while (reached_ < epochs_.size() &&
         has_reached(epochs_[reached_]->value.load(std::memory_order_acquire), target_))
    ++reached_;
  return reached_ == epochs_.size();
}

bool EpochWait::wait(const Patience& patience) {
  for (int i = 0; i < patience.pauses; ++i) {
    if (poll()) return true;
    pause_processor();
  }
  for (int i = 0; i < patience.yields; ++i) {
    if (poll()) return true;
    sched_yield();
  }
  return poll() || (patience.longest_sleep > Seconds{0} && sleep(patience.longest_sleep));
}

// Sleeps on one epoch after the other; the time counts for all of them together.
bool EpochWait::sleep(const Seconds& longest) {
  const bool is_bounded = longest.count() < kForEver;
  const timespec until = is_bounded ? monotonic_after(longest) : timespec{};
  while (true) {
    Epoch& epoch = *epochs_[reached_];
    epoch.sleepers.fetch_add(1, std::memory_order_seq_cst);
    const std::uint32_t value = epoch.value.load(std::memory_order_seq_cst);
    Sleep ended = Sleep::woken;
    if (!has_reached(value, target_))
      ended = sleep_while(epoch.value, value, is_bounded ? &until : nullptr);
    epoch.sleepers.fetch_sub(1, std::memory_order_seq_cst);
    if (poll()) return true;
    if (ended != Sleep::woken) return false;
  }
}

}  // namespace adareduce
