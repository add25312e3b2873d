#include "transports/shared_memory/shared_memory.h"

#include <algorithm>

namespace adareduce {
namespace {

// Busy looks at a counter before anything else: some 20 us where every rank has its core. Ranks
// that share one give it away at once.
constexpr int kPauses = 500;
// A caller's first look at a counter: some 400 us where a pause takes 40 ns. To be woken would take
// longer than a small call.
constexpr int kCallerPauses = 10000;
constexpr int kYieldsAlone = 20;
constexpr int kYieldsShared = 200;
// A peer that has not come after so many looks will be long: no more of the above, and sleeps that
// last longer by this factor. They end when it comes; what else this thread has to do waits.
constexpr int kQuickTests = 8;
constexpr double kLongWait = 5;

}  // namespace

// Blocks begin on lines of their own, and what one rank writes while another reads is apart.
struct SharedMemory::Segment {
  Epoch epochs[kNumSignals];
  alignas(128) char headers[kNumBoards][2][kHeaderBytes];
  alignas(128) double grams[kGramPlaces][kGramNumel];
  double levels[2][kLevelNumel];
  char level_data[2][kLevelDataBytes];
  double totals[kTotalsNumel];
  alignas(4096) char payloads[2][kPayloadBytes];
  alignas(4096) char ring[kRingBytes];
};

std::int64_t SharedMemory::segment_bytes() { return static_cast<std::int64_t>(sizeof(Segment)); }

SharedMemory::SharedMemory(std::shared_ptr<SharedWindows> windows, bool may_spin,
                           bool may_look_long)
    : windows_(std::move(windows)),
      may_look_long_(may_look_long),
      patience_{.pauses = may_spin ? kPauses : 0,
                .yields = may_spin ? kYieldsAlone : kYieldsShared,
                .longest_sleep = Seconds{0}},
      peers_(kNumSignals) {
  for (int s = 0; s < kNumSignals; ++s)
    for (Rank rank = 0; rank < size(); ++rank)
      if (rank != windows_->rank())
        peers_[static_cast<std::size_t>(s)].push_back(&of(rank).epochs[s]);
}

SharedMemory::Segment& SharedMemory::of(Rank rank) const {
  return *reinterpret_cast<Segment*>(windows_->of(rank));
}

void SharedMemory::signal(Signal signal, std::uint32_t epoch) {
  advance(of(rank()).epochs[signal], epoch);
}

void SharedMemory::set_waiter(Seconds longest_sleep, bool is_caller) {
  patience_.longest_sleep = longest_sleep;
  is_caller_ = is_caller;
}

bool SharedMemory::has_any(Signal signal, std::uint32_t epoch) const {
  const std::vector<Epoch*>& epochs = peers_[static_cast<std::size_t>(signal)];
  return std::any_of(epochs.begin(), epochs.end(), [&](const Epoch* of_peer) {
    return has_reached(of_peer->value.load(std::memory_order_acquire), epoch);
  });
}

bool SharedMemory::Wait::is_soon() {
  if (wait_.poll()) return true;
  int pauses = memory_.patience_.pauses;
  if (looks_long_ && memory_.is_caller_ && memory_.may_look_long_) {
    pauses = kCallerPauses;
    memory_.long_looks_.fetch_add(1, std::memory_order_relaxed);
  }
  return wait_.wait({.pauses = pauses, .yields = 0, .longest_sleep = Seconds{0}});
}

bool SharedMemory::Wait::test() {
  Patience patience = memory_.patience_;
  if (tests_ >= kQuickTests) {
    patience.pauses = patience.yields = 0;
    patience.longest_sleep *= kLongWait;
  }
  if (wait_.wait(patience)) return true;
  ++tests_;
  memory_.has_slept_ |= patience.longest_sleep > Seconds{0};
  return false;
}

char* SharedMemory::header(int board, std::uint64_t sequence, Rank rank) const {
  return of(rank).headers[board][sequence % 2];
}
char* SharedMemory::payload(std::uint64_t sequence, Rank rank) const {
  return of(rank).payloads[sequence % 2];
}
double* SharedMemory::gram(int place, Rank rank) const { return of(rank).grams[place]; }
double* SharedMemory::level(std::uint32_t round, Rank rank) const {
  return of(rank).levels[round % 2];
}
char* SharedMemory::level_data(std::uint32_t round, Rank rank) const {
  return of(rank).level_data[round % 2];
}
double* SharedMemory::totals(Rank rank) const { return of(rank).totals; }
char* SharedMemory::ring(Rank rank) const { return of(rank).ring; }

}  // namespace adareduce
