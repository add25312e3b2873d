#pragma once
#include <array>
#include <cstdint>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "bootstrap/bootstrap.h"
#include "engine/request.h"

namespace adareduce {

/// How data go through shared memory: what is quicker depends on where cores lie, which changes
/// while a program runs, and changes no bit of a result.
struct SharedChoice {
  std::int64_t chunk_bytes = 0;
  bool streams = false;  ///< copies into slots by stores that leave nothing in a cache
  /// A caller looks for longer at what it waits for. Not where its core and the late rank's are
  /// one.
  bool looks_long = false;

  /// "chunks of 512 KiB, streaming stores, long looks"
  std::string text() const;
};

/// Learns on one rank, by the time that its requests take, which choice is best for which size; the
/// choice travels with the rank's headers, so that all make the same. All calls by any thread.
class SharedTuning {
 public:
  static const std::vector<SharedChoice>& choices();

  /// Which of choices() this rank proposes for a request that moves `bytes`: mostly the best one
  /// (the first, until others are known), now and then another, to notice when that is better. Once
  /// more after a time that was better than the best one's are, so that its own become known.
  /// `is_caller`: its caller drives it, not the engine's thread, which never looks for long.
  std::uint32_t propose(const Request& request, std::int64_t bytes, bool is_caller);
  /// What the request with this proposal took, from the agreement to the end.
  void record(const Request& request, std::int64_t bytes, bool is_caller, std::uint32_t choice,
              Seconds took);

  /// What is proposed at present.
  struct Row {
    std::string what;  ///< "element by element, 16 MiB to 32 MiB, in the background"
    std::string choice;
    std::int64_t requests = 0;
  };
  std::vector<Row> rows() const;

 private:
  /// The last samples of a choice, of which one now and then is an outlier: a core was taken away,
  /// or pages were touched for the first time.
  struct Candidate {
    static constexpr std::size_t kWindow = 5;
    std::array<double, kWindow> seconds_per_byte{};
    std::int64_t samples = 0;

    void add(double sample);
    double median() const;  ///< the lower one of an even number
    /// Every one of the last samples is more than `share` above `before`, or below it.
    bool has_moved(double before, double share) const;
  };
  struct Class {
    std::vector<Candidate> candidates;
    std::int64_t requests = 0;
    std::int64_t since_trial = 0;  ///< requests
    std::size_t tried = 0;         ///< the last candidate
    std::size_t due = 0;           ///< trials that do not wait long
    double settled = 0;            ///< the best one's median when others were compared with it
    std::optional<std::uint32_t> again;
  };
  static constexpr int kKinds = 4;
  static constexpr int kSizes = 12;  ///< powers of 2 from 256 KiB on

  static int kind_of(const Request& request);
  static int size_class(std::int64_t bytes);
  Class& class_of(const Request& request, std::int64_t bytes, bool is_caller);
  static std::uint32_t best(const Class& of);

  mutable std::mutex mutex_;
  using Classes = std::array<std::array<Class, kSizes>, kKinds>;
  std::array<Classes, 2> classes_;  // of callers, of the engine's thread; guarded by mutex_
};

}  // namespace adareduce
