#include "engine/wakeup.h"

#include <poll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <cmath>
#include <ctime>

#include "base/errors.h"

namespace adareduce {

Wakeup::Wakeup() : event_(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {
  if (event_ < 0) throw Error("engine: no file descriptor is left for its eventfd");
}

Wakeup::~Wakeup() { close(event_); }

void Wakeup::wake() {
  // Only the first of several calls pays for a system call.
  if (is_pending_.exchange(true, std::memory_order_acq_rel)) return;
  const std::uint64_t one = 1;
  (void)!write(event_, &one, sizeof one);
}

void Wakeup::sleep(Seconds timeout, std::span<const int> descriptors) {
  std::vector<pollfd> watched{{event_, POLLIN, 0}};
  for (const int descriptor : descriptors) watched.push_back({descriptor, POLLIN, 0});
  const double whole = std::floor(timeout.count());
  const timespec limit{static_cast<time_t>(whole),
                       static_cast<long>((timeout.count() - whole) * 1e9)};
  ppoll(watched.data(), watched.size(), &limit, nullptr);
  std::uint64_t count = 0;
  (void)!read(event_, &count, sizeof count);
  // An exchange, not a store: what a wake() that found it set has written is visible from here.
  is_pending_.exchange(false, std::memory_order_acq_rel);
}

}  // namespace adareduce
