#pragma once
#include <array>
#include <atomic>
#include <map>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "bootstrap/liveness.h"
#include "engine/device_calls.h"
#include "engine/process_set.h"
#include "engine/wakeup.h"

namespace adareduce {

/// Decides when things happen. An object, so that several can live in one process as threads; no
/// globals. One worker thread drives all process sets; it sleeps while there is nothing to do.
class Engine {
 public:
  static constexpr int kGlobalSet = 0;

  /// Connects the set of all ranks. Collective over the bootstrap; blocks, at most `fail_after`.
  Engine(std::shared_ptr<Bootstrap> bootstrap, std::shared_ptr<TransportProvider> transports,
         Settings settings, const KernelTable& kernels = cpu_kernels());
  /// Stops the worker. Not collective: call leave() first where peers should know.
  ~Engine();
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  const Layout& layout() const { return layout_; }
  EventLog& log() { return log_; }

  /// A set over some of the ranks, increasing. Collective over all ranks of the engine, in the same
  /// order; blocks. Returns its id, the same everywhere, on ranks outside the set too.
  int add_process_set(const std::vector<Rank>& ranks);

  /// Queues a request and returns; with `drives`, does its work on the calling thread as long as it
  /// goes on and nothing else is pending. Ranks of the set submit in the same order.
  /// Throws UsageError for an unknown set, a rank outside it or an impossible request;
  /// TransportError where the set is broken.
  std::shared_ptr<Handle> submit(int process_set, Request request, bool drives = false);

  /// submit() with `drives` of an all-reduce without statistics, made for small ones. Null: it has
  /// ended well. Throws the request's error, too, where it has ended with one.
  std::shared_ptr<Handle> run_at_once(int process_set, const Request& request);

  /// How the ranks of a set share memory, and how data go through it; or why they do not.
  struct SharedFacts {
    bool is_used = false;
    std::string why_not;
    int workers = 1;  ///< threads that walk a large request on this rank
    std::vector<SharedTuning::Row> choices;
    /// As SharedRoutes: by board, through slots, in place, as messages.
    std::array<std::int64_t, 4> requests{};
    std::int64_t long_looks = 0;  ///< as SharedMemory's
  };
  SharedFacts shared_facts(int process_set);
  /// Memory of `bytes` of every rank of the set, which all of them map. Collective; blocks. Null on
  /// all ranks where they share no memory. Throws SharedMemoryError on all ranks where there is not
  /// enough, and what submit() and its handle throw.
  std::shared_ptr<SharedRegion> empty_shared(int process_set, std::int64_t bytes,
                                             const DeviceCalls::Poll& poll);

  /// Lets process sets work on CUDA tensors, with this adareduce_cuda_path. Once per engine; local.
  /// The plugin outlives the engine. Throws UsageError for one of another version.
  void attach_cuda(const adareduce_cuda_plugin* plugin, int wanted_path);
  /// The calls on CUDA tensors of a set. Throws UsageError as submit(), and without attach_cuda().
  std::shared_ptr<DeviceCalls> device_calls(int process_set);

  /// Takes the place of a request that this rank's caller got wrong, so that the others raise.
  void reject(int process_set, bool is_barrier, const std::string& reason);

  /// Tells all ranks that this one goes. The handles end when they have taken note, or when that
  /// has failed. `is_orderly`: not because of an error, so that the others may take their time;
  /// then it waits first for this rank's GPU.
  std::vector<std::shared_ptr<Handle>> leave(const std::string& reason, bool is_orderly,
                                             const DeviceCalls::Poll& poll = {});

  /// Why the engine cannot be left in peace: a dead or silent rank. Empty if all is well.
  std::string breakage();

 private:
  using Sets = std::vector<std::shared_ptr<ProcessSet>>;

  std::shared_ptr<ProcessSet> connect(std::string name, const std::vector<Rank>& ranks, int id);
  std::shared_ptr<ProcessSet> find(int process_set);
  Sets snapshot();
  std::vector<std::shared_ptr<DeviceCalls>> all_device_calls();
  void run();
  void report_deaths(const Sets& sets, Clock::time_point now);

  const Settings settings_;
  const KernelTable& kernels_;
  const std::shared_ptr<Bootstrap> bootstrap_;
  const std::shared_ptr<TransportProvider> transports_;
  const Layout layout_;
  EventLog log_;
  Liveness liveness_;
  Wakeup wakeup_;
  const std::shared_ptr<Workers> workers_;  // of all sets; null: each driver works alone
  Clock::time_point death_seen_{};

  std::mutex mutex_;
  Sets sets_;  // by id; null on ranks outside the set. Guarded by mutex_
  std::map<int, std::string> why_not_shared_;                 // by id; guarded by mutex_
  bool has_warned_of_workers_ = false;                        // guarded by mutex_
  std::map<int, std::shared_ptr<DeviceCalls>> device_calls_;  // by id; guarded by mutex_
  const adareduce_cuda_plugin* cuda_plugin_ = nullptr;        // guarded by mutex_
  int wanted_cuda_path_ = ADAREDUCE_CUDA_AUTO;                // guarded by mutex_
  std::atomic<bool> must_stop_{false};
  std::thread worker_;  // last: it uses all of the above
};

}  // namespace adareduce
