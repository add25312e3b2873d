#include "bootstrap/bootstrap.h"

#include <limits.h>
#include <unistd.h>

#include <cstdio>
#include <fstream>
#include <map>

#include "base/errors.h"

namespace adareduce {
namespace {

std::string host_name() {
  char name[HOST_NAME_MAX + 1] = "";
  gethostname(name, sizeof name - 1);
  return name;
}

// One running kernel. Differs between machines that were cloned with one host name.
std::string boot_id() {
  std::string id;
  std::ifstream("/proc/sys/kernel/random/boot_id") >> id;
  return id;
}

// "net:[4026531840]"; empty where /proc does not tell.
std::string own_namespace(const char* kind) {
  char target[64] = "";
  const std::string path = concat("/proc/self/ns/", kind);
  const ssize_t length = readlink(path.c_str(), target, sizeof target - 1);
  return length > 0 ? std::string(target, static_cast<std::size_t>(length)) : std::string();
}

constexpr char kSeparator = '\n';

std::string encode(const ProcessInfo& info) {
  return concat(info.pid, kSeparator, info.pid_namespace, kSeparator, info.host);
}

ProcessInfo decode(const std::string& text) {
  const std::size_t first = text.find(kSeparator);
  const std::size_t second = text.find(kSeparator, first + 1);
  if (first == std::string::npos || second == std::string::npos)
    throw TransportError(
        "init: a rank described its process in a way that this version of "
        "adareduce does not understand");
  ProcessInfo info;
  info.pid = std::stoll(text.substr(0, first));
  info.pid_namespace = text.substr(first + 1, second - first - 1);
  info.host = text.substr(second + 1);
  return info;
}

}  // namespace

// What makes a node:
// - the boot id, because memory can be shared only inside one kernel;
// - the network namespace, because a descriptor of shared memory travels over an abstract socket,
//   which ends there, and because another namespace has another address on the network;
// - the host name, because that is what users and mpirun call a machine.
// Left out: the PID, IPC and mount namespaces. A container per rank (Apptainer's habit) has its own
// but keeps the network's, can share memory, and its ranks must not all take GPU 0. The UTS
// namespace counts by the host name that it holds.
ProcessInfo describe_this_process() {
  const std::string boot = boot_id();
  const std::string pids = own_namespace("pid");
  ProcessInfo info;
  info.host = concat(host_name(), " ", boot, " ", own_namespace("net"));
  info.pid = getpid();
  // Without a boot id two machines' first namespaces look alike, and a stranger would be watched.
  if (!boot.empty() && !pids.empty()) info.pid_namespace = concat(boot, " ", pids);
  return info;
}

Layout discover_layout(Bootstrap& bootstrap, const ProcessInfo& mine, Seconds timeout) {
  Layout layout;
  layout.rank = bootstrap.rank();
  layout.size = bootstrap.size();
  std::map<std::string, int> ranks_on;  // host to the number of its ranks
  std::vector<int> local_ranks;
  for (const std::string& text : bootstrap.allgather(encode(mine), timeout)) {
    layout.processes.push_back(decode(text));
    local_ranks.push_back(ranks_on[layout.processes.back().host]++);
  }
  const auto self = static_cast<std::size_t>(layout.rank);
  layout.local_rank = local_ranks[self];
  layout.local_size = ranks_on[layout.processes[self].host];
  layout.cross_rank = 0;
  layout.cross_size = 0;
  // Nodes come in the order of their lowest rank, found where the local rank is 0.
  bool seen_own_node = false;
  for (std::size_t rank = 0; rank < local_ranks.size(); ++rank) {
    if (local_ranks[rank] != 0) continue;
    const std::string& host = layout.processes[rank].host;
    const int on_node = ranks_on[host];
    layout.homogeneous = layout.homogeneous && on_node == layout.local_size;
    if (host == layout.processes[self].host) seen_own_node = true;
    if (on_node <= layout.local_rank) continue;
    ++layout.cross_size;
    if (!seen_own_node) ++layout.cross_rank;
  }
  return layout;
}

}  // namespace adareduce
