#pragma once
#include <span>
#include <vector>

#include "bootstrap/bootstrap.h"

namespace adareduce {

/// Tells at once when a process of this machine ends, killed or not, through pidfds (Linux 5.3).
/// Ranks on other machines, in other PID namespaces, or on older kernels are never reported.
class Liveness {
 public:
  Liveness() = default;
  /// Opens a descriptor for every other rank whose process this one can watch.
  Liveness(std::span<const ProcessInfo> processes, Rank self);
  ~Liveness();
  Liveness(Liveness&&) noexcept;
  Liveness& operator=(Liveness&&) noexcept;

  /// Watched ranks whose process has ended. Does not block.
  std::vector<Rank> dead() const;
  /// Descriptors that become readable when a watched process ends, for poll(); -1 (which poll
  /// skips) for one that had ended before it could be watched.
  std::span<const int> descriptors() const { return descriptors_; }

 private:
  std::vector<int> descriptors_;
  std::vector<Rank> ranks_;  // parallel to descriptors_
};

}  // namespace adareduce
