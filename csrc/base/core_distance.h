#pragma once
#include <chrono>

namespace adareduce {

/// How long a cache line takes from one core to another and back: about 100 ns where they share a
/// cache, several times as much where they do not. Shared-memory results differ accordingly.
/// Two threads pass a counter to and fro for `duration`; the median of the round trips is returned,
/// in nanoseconds. Threads are pinned to `first` and `second`, numbers of the operating system.
/// Blocks. Throws UsageError where this process may not run on one of them.
double core_round_trip_ns(int first, int second, std::chrono::microseconds duration);

}  // namespace adareduce
