#pragma once
#include <chrono>
#include <string>
#include <string_view>
#include <vector>

#include "base/types.h"

namespace adareduce {

using Seconds = std::chrono::duration<double>;

/// Who is there, before any transport exists. Made by MPI, by threads of one process, later by a
/// torch store. Calls are collective, in the same order on all ranks, and block the caller.
class Bootstrap {
 public:
  virtual ~Bootstrap() = default;

  virtual Rank rank() const = 0;
  virtual int size() const = 0;

  /// Every rank's bytes, in rank order; lengths may differ.
  /// Throws TransportError after `timeout` or when a rank is gone.
  virtual std::vector<std::string> allgather(std::string_view mine, Seconds timeout) = 0;

  /// Returns when every rank has called. Throws TransportError after `timeout`.
  virtual void barrier(Seconds timeout) = 0;

  /// After a failure: the destructor will not wait for anybody.
  virtual void abandon() {}

  /// "mpi", "threads".
  virtual std::string_view kind() const = 0;
};

/// One rank's process: enough to tell whether it shares this machine and whether it is alive.
struct ProcessInfo {
  std::string host;           ///< host name, a blank, and what else makes a node (bootstrap.cpp)
  std::int64_t pid = 0;       ///< 0 where ranks are threads
  std::string pid_namespace;  ///< pids can be compared where these are equal
};

/// Where the ranks of a bootstrap sit.
struct Layout {
  Rank rank = 0;
  int size = 1;
  int local_rank = 0;  ///< place among the ranks of this node
  int local_size = 1;
  int cross_rank = 0;  ///< place of this node among the nodes that have this local_rank
  int cross_size = 1;
  bool homogeneous = true;             ///< every node holds the same number of ranks
  std::vector<ProcessInfo> processes;  ///< by rank
};

/// What this process says of itself.
ProcessInfo describe_this_process();

/// Collective over the bootstrap. Nodes are numbered by their lowest rank.
Layout discover_layout(Bootstrap& bootstrap, const ProcessInfo& mine, Seconds timeout);

}  // namespace adareduce
