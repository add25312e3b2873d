#pragma once
#include <array>
#include <atomic>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include "transports/shared_memory/epochs.h"
#include "transports/shared_memory/shared_windows.h"
#include "transports/transport.h"

namespace adareduce {

/// Where the ranks of a process set that all sit on one node meet: of every rank a segment with
/// counters, two boards for what ranks agree on, doubles, and a ring of slots for data. A rank
/// writes into its own segment only; all read all of them.
///
/// One thread at a time uses it, whoever drives the process set.
class SharedMemory {
 public:
  /// What a rank tells the others by a counter. Data: chunks whose work is done.
  enum Signal : int {
    kPacked,
    kGram,
    kCombined,
    kUnpacked,
    kLevel,   ///< rounds of Adasum's levels
    kTotals,  ///< rounds of statistics at the end of a request
    kRequestBoard,
    kBarrierBoard,
    kGone,  ///< 1: the rank has given up, whatever it has posted before
    kNumSignals
  };
  static constexpr int kNumBoards = 2;

  static constexpr std::int64_t kHeaderBytes = 64;
  static constexpr std::int64_t kPayloadBytes = std::int64_t{64} << 10;
  static constexpr int kGramPlaces = 8;
  static constexpr std::int64_t kGramNumel = 8192;  ///< doubles of a place
  static constexpr std::int64_t kLevelNumel = 64;   ///< doubles of a round
  static constexpr std::int64_t kLevelDataBytes = std::int64_t{16} << 10;
  static constexpr std::int64_t kTotalsNumel = 32768;  ///< doubles
  static constexpr std::int64_t kRingBytes = std::int64_t{16} << 20;

  /// Bytes of a rank's segment.
  static std::int64_t segment_bytes();

  /// `windows` of segment_bytes() each, zero. `may_spin`: every rank has a core for itself;
  /// `may_look_long`: and its other workers have one each, too.
  SharedMemory(std::shared_ptr<SharedWindows> windows, bool may_spin, bool may_look_long);

  Rank rank() const { return windows_->rank(); }
  int size() const { return windows_->size(); }

  /// This rank's counter goes up to `epoch`: all that it has written before is visible to whoever
  /// sees that.
  void signal(Signal signal, std::uint32_t epoch);

  /// Some other rank's counter has come to `epoch`.
  bool has_any(Signal signal, std::uint32_t epoch) const;

  /// Waits until every other rank's counter has come to `epoch`.
  class Wait final : public Exchange {
   public:
    Wait(SharedMemory& memory, Signal signal, std::uint32_t epoch, bool looks_long)
        : memory_(memory),
          wait_(memory.peers_[static_cast<std::size_t>(signal)], epoch),
          looks_long_(looks_long) {}
    /// As test(), but only busily and for a short time.
    bool is_soon();
    /// Sleeps for a moment where that is allowed and nothing else helps.
    bool test() override;

   private:
    SharedMemory& memory_;
    EpochWait wait_;
    const bool looks_long_;
    int tests_ = 0;  ///< in vain
  };
  /// `looks_long`: a caller, who has nothing else to do with its core, looks for longer than the
  /// engine's thread, beside which a rank computes.
  Wait wait(Signal signal, std::uint32_t epoch, bool looks_long) {
    return {*this, signal, epoch, looks_long};
  }

  /// Place `sequence` % 2 of a board: a header and a payload. Who may write the next one but one:
  /// those who have seen that all have posted the next.
  char* header(int board, std::uint64_t sequence, Rank rank) const;
  char* payload(std::uint64_t sequence, Rank rank) const;  ///< of the board for requests
  double* gram(int place, Rank rank) const;
  double* level(std::uint32_t round, Rank rank) const;
  char* level_data(std::uint32_t round, Rank rank) const;
  double* totals(Rank rank) const;
  char* ring(Rank rank) const;

  /// Counts that all ranks have in common: what went through the slots up to now.
  std::uint32_t chunks_done = 0;
  std::uint32_t level_rounds = 0;
  std::uint32_t totals_rounds = 0;

  /// Who waits from now on, and how long test() may sleep: not at all (0) where the thread has
  /// other things to do as well.
  void set_waiter(Seconds longest_sleep, bool is_caller);
  bool is_caller() const { return is_caller_; }
  /// How often a caller has looked for longer. Any thread.
  std::int64_t long_looks() const { return long_looks_.load(std::memory_order_relaxed); }
  /// Whether test() has slept since the last call.
  bool has_slept() { return std::exchange(has_slept_, false); }

 private:
  struct Segment;
  Segment& of(Rank rank) const;

  std::shared_ptr<SharedWindows> windows_;
  const bool may_look_long_;
  bool is_caller_ = false;
  std::atomic<std::int64_t> long_looks_{0};
  Patience patience_;
  bool has_slept_ = false;
  std::vector<std::vector<Epoch*>> peers_;  // by signal
};

}  // namespace adareduce
