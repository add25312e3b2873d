#pragma once
#include <cstdint>
#include <string>

namespace adareduce {

/// Bytes that this process could allocate now without being killed for it: what the machine has
/// free, and what every memory limit above this process (cgroups of version 1 and 2, with their
/// ancestors) leaves; the least of them, less a margin. An estimate, since others allocate, too.
/// `root` stands before the paths of /proc and /sys that are read; tests have their own there.
std::int64_t room_for_shared_memory(const std::string& root = "");

}  // namespace adareduce
