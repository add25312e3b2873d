#pragma once
#include <array>
#include <chrono>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "bootstrap/bootstrap.h"
#include "transports/transport.h"

namespace adareduce {

using Clock = std::chrono::steady_clock;

/// Finds out who keeps the others waiting. Silent until a wait becomes long: then a rank asks its
/// peers once a second how far they are, and every engine that is alive answers, an idle one
/// included. A dead or stopped process does not. Used by the worker only; never blocks.
class Presence {
 public:
  static constexpr int kNumChannels = 2;

  /// How far one rank is.
  struct Progress {
    std::array<std::uint64_t, kNumChannels> submitted{};  ///< requests, per channel
    std::string last_call;
  };
  /// Who a wait is for.
  struct Missing {
    std::vector<Rank> silent;  ///< of the process set; dead, stopped or cut off
    std::vector<Rank> late;    ///< alive, but have not made the call
    std::string text;          ///< both, in words, with global ranks
  };

  /// `ranks` are the global ranks of the group, for texts.
  Presence(Transport& transport, int tag, std::vector<Rank> ranks);
  ~Presence();
  Presence(const Presence&) = delete;
  Presence& operator=(const Presence&) = delete;

  /// Asks every peer.
  void ask();
  /// Tells every peer that this process set has broken here.
  void announce_failure(const std::string& text);
  /// Reads what has come in and answers questions with `mine`. Returns a peer's failure, if any.
  std::optional<std::string> serve(const Progress& mine, Clock::time_point now);
  /// Judges by the answers since `since` who has not submitted request `sequence` of `channel`.
  Missing find_missing(int channel, std::uint64_t sequence, Clock::time_point since) const;

 private:
  struct Message;
  struct Peer {
    Clock::time_point heard{};
    Progress progress;
  };
  struct Outgoing;

  void send(Rank peer, std::uint32_t kind, const Progress& progress, const std::string& text);

  Transport& transport_;
  int tag_;
  std::vector<Rank> ranks_;
  std::vector<Peer> peers_;
  std::vector<std::unique_ptr<Outgoing>> outgoing_;
};

}  // namespace adareduce
