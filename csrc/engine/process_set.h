#pragma once
#include <array>
#include <atomic>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "collectives/task.h"
#include "engine/agreement.h"
#include "engine/cuda_group.h"
#include "engine/event_log.h"
#include "engine/execution.h"
#include "engine/handle.h"
#include "engine/plan.h"
#include "engine/presence.h"
#include "engine/settings.h"
#include "engine/shared_node.h"

namespace adareduce {

/// Some ranks, their two transports, and the queues of what they are to do together.
///
/// Requests run one after the other in the order of submission, which is the same on every rank.
/// Barriers have a channel of their own, so that they overtake requests. Requests on CUDA tensors
/// are compared in the same order as the others, and not executed: engine/device_calls.h. submit(),
/// drive() and fail() may be called by any thread; what stands under "the driver" by one thread at
/// a time, which holds driving(): the engine's worker, or a caller that waits for its own request.
class ProcessSet {
 public:
  /// `ranks` are global and increasing. `name` is for people.
  ProcessSet(std::string name, std::vector<Rank> ranks, TransportPair transports,
             const KernelTable& kernels, const Settings& settings, EventLog& log,
             std::unique_ptr<SharedNode> shared = nullptr);
  ~ProcessSet();
  ProcessSet(const ProcessSet&) = delete;
  ProcessSet& operator=(const ProcessSet&) = delete;

  const std::string& name() const { return name_; }
  const std::vector<Rank>& ranks() const { return ranks_; }
  Rank rank() const { return transports_.data->rank(); }  ///< of this process, in the set
  int size() const { return transports_.data->size(); }

  /// Queues a request. Throws TransportError when the set is broken or a rank has left it.
  std::shared_ptr<Handle> submit(Request request);
  /// Queues the departure of this rank on every channel that is still open. Throws nothing.
  std::vector<std::shared_ptr<Handle>> submit_departure(const std::string& reason, bool is_orderly);

  /// Does the driver's work on the calling thread until `handle` has ended, unless somebody else
  /// does it or nothing has moved for a while.
  void drive(const Handle& handle);

  /// submit() and drive() of an all-reduce without statistics; with next to no overhead where it is
  /// small and nothing else is pending. Null: it has ended well.
  std::shared_ptr<Handle> run_at_once(const Request& request);

  /// Memory of `bytes` of every rank, which all of them map. Collective, after an agreement that
  /// all ranks call it; blocks. Only with shared(). Throws SharedMemoryError on all ranks where
  /// there is not enough, TransportError where a rank is lost.
  /// Throws what `poll` throws, which it calls now and then.
  std::shared_ptr<SharedRegion> share(std::int64_t bytes, const std::function<void()>& poll);

  /// Held by a thread from its request for share() to the end.
  std::mutex& sharing() { return sharing_; }

  /// As break_down on all ranks, soon: wake the worker. Nothing can be submitted from now on.
  void fail(const std::string& text);
  /// What the callers of CUDA requests share with the worker.
  const std::shared_ptr<CudaGroup>& cuda_group() const { return cuda_group_; }

  // The driver.

  std::mutex& driving() { return driving_; }
  /// Moves everything as far as it goes without waiting. True if anything moved.
  bool progress(Clock::time_point now);
  /// Something is queued or under way.
  bool is_busy();
  /// All ranks of the request under way have begun it, so that what is missing are only bytes.
  bool is_moving_bytes() const;
  /// How long progress() may sleep while it waits for shared memory, and on whose thread; whether
  /// it has since the last call.
  void set_waiter(Seconds longest_sleep, bool is_caller);
  bool has_slept();
  /// What the set has of shared memory; null: nothing. Constant.
  SharedNode* shared() const { return shared_.get(); }
  /// Answers the questions of peers that wait.
  void serve_peers(Clock::time_point now);
  /// Looks for errors of the device and for calls of its libraries that never come back.
  void watch_device(Clock::time_point now);
  /// Ends everything with this error; nothing can be submitted afterwards. `tell_peers`: on them
  /// too.
  void break_down(const std::string& text, bool tell_peers = true);
  /// Why nothing can be submitted, if so; and whether messages may be lost (a clean departure of
  /// all ranks loses none).
  std::optional<std::string> problem();
  bool is_broken();
  /// All ranks have left in agreement, or the set is broken.
  bool is_over();

 private:
  struct Work {
    Request request;
    std::shared_ptr<Handle> handle;
    std::shared_ptr<const Plan> plan;
    Header header;
    bool is_shared = false;     ///< goes through shared memory
    bool is_posted = false;     ///< its header is on the board
    bool has_proposal = false;  ///< its choice is the tuning's
    bool is_callers = false;    ///< who drove it when that was proposed
  };
  struct Channel {
    int header_tag = 0;
    int record_tag = 0;
    std::uint64_t submitted = 0;  // guarded by mutex_
    std::deque<Work> queue;       // guarded by mutex_
    bool is_closed = false;       // guarded by mutex_
    std::optional<Work> current;  // of the driver, like all below
    std::optional<Work> ended;    // the last one
    std::optional<Task> task;
    bool is_agreed = false;
    std::uint64_t seen_exchanges = 0;
    Clock::time_point waiting_since{};
    Clock::time_point asked_at{};
    Seconds reported{0};
  };
  enum { kRequests = 0, kBarriers = 1, kNumChannels = Presence::kNumChannels };

  /// The last call of this rank, for peers that wait; put into words when somebody asks.
  struct LastCall {
    int channel = 0;
    std::optional<std::uint64_t> sequence;
    std::optional<std::string> text;
  };

  std::shared_ptr<Handle> enqueue(int index, Request request);
  bool progress_channel(int index, Clock::time_point now);
  std::shared_ptr<Handle> run_alone(const Request& request, const std::shared_ptr<const Plan>& plan,
                                    const Header& header);
  static void name_if_nameless(Request& request, std::uint64_t sequence);
  void throw_if_unusable(const Request& request) const;
  bool start_next(Channel& channel, Clock::time_point now);
  void start(Channel& channel, Clock::time_point now);
  void prepare(Work& work);
  Task run(Channel& channel);
  Task execute_agreed(Work& work, Result& result);
  void settle(Channel& channel, const std::vector<Record>& records);
  void close(Channel& channel, const std::string& why);
  std::string explain(const std::exception& error) const;
  void watch(int index, Clock::time_point now);
  /// The same for a thread that waits in share(), which does not drive.
  struct ShareWait {
    Clock::time_point since;
    Clock::time_point asked_at{};
    Seconds reported{0};
  };
  void watch_share(const std::string& call, ShareWait& wait);
  void end_current(Channel& channel);
  Presence::Progress my_progress();
  const Request* find_request(int index, std::uint64_t sequence) const;

  const std::string name_;
  const std::vector<Rank> ranks_;
  TransportPair transports_;
  const KernelTable& kernels_;
  const Settings settings_;
  EventLog& log_;
  PlanCache plans_;
  Presence presence_;
  std::array<Channel, kNumChannels> channels_;

  const std::unique_ptr<SharedNode> shared_;
  std::mutex driving_;
  std::mutex sharing_;
  Workspace workspace_;
  const std::shared_ptr<CudaGroup> cuda_group_ = std::make_shared<CudaGroup>();
  Clock::time_point broken_at_{};    // of the driver
  bool has_reported_stuck_ = false;  // of the driver

  std::mutex mutex_;
  std::optional<std::string> problem_;  // guarded by mutex_
  bool is_broken_ = false;              // guarded by mutex_
  LastCall last_call_;                  // guarded by mutex_
  std::string failure_;                 // guarded by mutex_
  std::atomic<bool> has_failure_{false};
};

}  // namespace adareduce
