#include "bootstrap/liveness.h"

#include <poll.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <utility>

namespace adareduce {
namespace {

#ifdef SYS_pidfd_open
constexpr long kPidfdOpen = SYS_pidfd_open;
#else
constexpr long kPidfdOpen = 434;  // the same on every architecture
#endif

// The kernel sets close-on-exec. A forked child inherits the descriptor and merely closes it.
int open_pidfd(std::int64_t pid) {
  return static_cast<int>(syscall(kPidfdOpen, static_cast<pid_t>(pid), 0u));
}

}  // namespace

Liveness::Liveness(std::span<const ProcessInfo> processes, Rank self) {
  const ProcessInfo& mine = processes[static_cast<std::size_t>(self)];
  if (mine.pid == 0 || mine.pid_namespace.empty()) return;
  descriptors_.reserve(processes.size());
  ranks_.reserve(processes.size());
  for (std::size_t rank = 0; rank < processes.size(); ++rank) {
    const ProcessInfo& other = processes[rank];
    if (other.pid_namespace != mine.pid_namespace || other.pid == mine.pid || other.pid == 0)
      continue;
    const int descriptor = open_pidfd(other.pid);
    // Other errors (an old kernel, a sandbox, too many files) say nothing about the process.
    if (descriptor < 0 && errno != ESRCH) continue;
    descriptors_.push_back(descriptor);
    ranks_.push_back(static_cast<Rank>(rank));
  }
}

Liveness::~Liveness() {
  for (const int descriptor : descriptors_)
    if (descriptor >= 0) close(descriptor);
}

Liveness::Liveness(Liveness&& other) noexcept
    : descriptors_(std::exchange(other.descriptors_, {})),
      ranks_(std::exchange(other.ranks_, {})) {}

Liveness& Liveness::operator=(Liveness&& other) noexcept {
  descriptors_.swap(other.descriptors_);
  ranks_.swap(other.ranks_);
  return *this;
}

std::vector<Rank> Liveness::dead() const {
  std::vector<pollfd> polls;
  polls.reserve(descriptors_.size());
  for (const int descriptor : descriptors_) polls.push_back({descriptor, POLLIN, 0});
  // A failed poll (a signal came) leaves revents empty: the next look will tell.
  poll(polls.data(), polls.size(), 0);
  std::vector<Rank> dead;
  for (std::size_t i = 0; i < polls.size(); ++i) {
    // Readable from the moment the process is a zombie, whether or not its parent has reaped it.
    if (polls[i].fd < 0 || (polls[i].revents & POLLIN) != 0) dead.push_back(ranks_[i]);
  }
  return dead;
}

}  // namespace adareduce
