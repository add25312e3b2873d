#include "engine/engine.h"

#include <sched.h>

#include <algorithm>
#include <numeric>

#include "base/errors.h"

namespace adareduce {
namespace {

// Once all ranks have begun, only bytes are missing and the transport needs the processor to move
// them. A peer that was stopped in the middle costs this much before the worker goes to sleep.
constexpr Seconds kSpinForBytes{1.0};
constexpr Seconds kFirstSleep{20e-6};

// Last words of a process may still be on their way when its end is noticed.
constexpr Seconds kGraceAfterDeath{0.2};

// Drives a set for a moment, unless a caller does. An error that belongs to no request, such as
// MPI's end under our feet, ends the process set and not the process.
template <typename Step>
bool guarded(ProcessSet& set, Step step) {
  const std::unique_lock driver(set.driving(), std::try_to_lock);
  if (!driver) return false;
  try {
    return step();
  } catch (const std::exception& error) {
    set.break_down(concat(set.name(), ": ", error.what()));
    return true;
  }
}

std::vector<Rank> all_ranks(int size) {
  std::vector<Rank> ranks(static_cast<std::size_t>(size));
  std::iota(ranks.begin(), ranks.end(), 0);
  return ranks;
}

}  // namespace

Engine::Engine(std::shared_ptr<Bootstrap> bootstrap, std::shared_ptr<TransportProvider> transports,
               Settings settings, const KernelTable& kernels)
    : settings_(settings),
      kernels_(kernels),
      bootstrap_(std::move(bootstrap)),
      transports_(std::move(transports)),
      layout_(discover_layout(*bootstrap_, describe_this_process(), settings_.fail_after)),
      liveness_(bootstrap_->kind() == "threads" ? Liveness()
                                                : Liveness(layout_.processes, layout_.rank)),
      workers_(settings.shared_memory && settings.workers != 1
                   ? std::make_shared<Workers>(settings.workers)
                   : nullptr) {
  const std::vector<Rank> ranks = all_ranks(layout_.size);
  sets_.push_back(connect("the global process set", ranks, kGlobalSet));
  worker_ = std::thread([this] { run(); });
}

Engine::~Engine() {
  // Where the ranks have left in agreement the GPU may take its time; else it is told to stop.
  const auto device_calls = all_device_calls();
  for (const auto& calls : device_calls) calls->wait_if_left();
  must_stop_.store(true, std::memory_order_release);
  wakeup_.wake();
  worker_.join();
  log_.close();
  // Without a departure nobody may wait for the peers any more.
  for (const auto& set : snapshot())
    if (!set->is_over()) set->break_down("the engine was destroyed before shutdown()");
  for (const auto& calls : device_calls) calls->destroy();
  if (!breakage().empty()) bootstrap_->abandon();
}

std::shared_ptr<ProcessSet> Engine::connect(std::string name, const std::vector<Rank>& ranks,
                                            int id) {
  TransportPair transports = transports_->connect(ranks, id);
  std::string why_not;
  auto shared =
      SharedNode::make(*transports.control, ranks, layout_, settings_, kernels_, workers_, why_not);
  {
    const std::lock_guard lock(mutex_);
    why_not_shared_[id] = why_not;
    if (shared != nullptr && !shared->crowding().empty() &&
        !std::exchange(has_warned_of_workers_, true))
      log_.add(EventLog::Level::warning, shared->crowding());
  }
  return std::make_shared<ProcessSet>(std::move(name), ranks, std::move(transports), kernels_,
                                      settings_, log_, std::move(shared));
}

Engine::SharedFacts Engine::shared_facts(int process_set) {
  const auto set = find(process_set);
  SharedFacts facts;
  facts.is_used = set->shared() != nullptr;
  if (facts.is_used) {
    facts.workers = set->shared()->num_workers();
    facts.choices = set->shared()->tuning().rows();
    const SharedRoutes& routes = set->shared()->routes();
    facts.requests = {routes.on_boards, routes.through_slots, routes.in_place, routes.as_messages};
    facts.long_looks = set->shared()->memory().long_looks();
  } else {
    const std::lock_guard lock(mutex_);
    facts.why_not = why_not_shared_[process_set];
  }
  return facts;
}

std::shared_ptr<SharedRegion> Engine::empty_shared(int process_set, std::int64_t bytes,
                                                   const DeviceCalls::Poll& poll) {
  if (bytes < 0) throw UsageError(concat("empty_shared: bytes must not be negative, got ", bytes));
  Request request;
  request.collective = Collective::empty_shared;
  request.bytes = bytes;
  const auto set = find(process_set);
  // Two threads of this rank: what they share comes in the order of their requests.
  const std::lock_guard lock(set->sharing());
  const auto agreement = submit(process_set, std::move(request));
  // The others have agreed to come, or will, and would wait for this rank.
  const auto give_up = [&](const std::string& why) {
    set->fail(concat("empty_shared(", bytes, " bytes) of rank ", layout_.rank,
                     " has ended before its time: ", why));
    wakeup_.wake();
  };
  try {
    while (!agreement->wait_for(Seconds{0.2})) poll();
  } catch (...) {
    give_up("its caller was interrupted");
    throw;
  }
  agreement->rethrow();
  if (set->shared() == nullptr) return nullptr;
  try {
    return set->share(bytes, poll);
  } catch (const SharedMemoryError&) {
    throw;  // on all ranks
  } catch (const Error& error) {
    give_up(error.what());
    throw;
  } catch (...) {
    give_up("its caller was interrupted");
    throw;
  }
}

int Engine::add_process_set(const std::vector<Rank>& ranks) {
  if (ranks.empty() || !std::is_sorted(ranks.begin(), ranks.end()) ||
      std::adjacent_find(ranks.begin(), ranks.end()) != ranks.end() || ranks.front() < 0 ||
      ranks.back() >= layout_.size)
    throw UsageError(concat("add_process_set: ranks must be increasing and in [0, ", layout_.size,
                            "), got [", join_words(ranks), "]"));
  int id = 0;
  {
    const std::lock_guard lock(mutex_);
    id = static_cast<int>(sets_.size());
  }
  Request request;
  request.collective = Collective::add_process_set;
  request.members = ranks;
  const auto agreement = submit(kGlobalSet, std::move(request));
  while (!agreement->wait_for(Seconds{1.0})) continue;  // the engine's own deadline ends this
  agreement->rethrow();

  {
    // The id is taken even if connecting fails: the next one must be the same on all ranks.
    const std::lock_guard lock(mutex_);
    sets_.push_back(nullptr);
  }
  if (std::find(ranks.begin(), ranks.end(), layout_.rank) != ranks.end()) {
    auto set = connect(concat("process set ", id), ranks, id);
    const std::lock_guard lock(mutex_);
    sets_[static_cast<std::size_t>(id)] = std::move(set);
  }
  wakeup_.wake();
  return id;
}

std::shared_ptr<ProcessSet> Engine::find(int process_set) {
  const std::lock_guard lock(mutex_);
  if (process_set < 0 || process_set >= static_cast<int>(sets_.size()))
    throw UsageError(concat("process_set must be in [0, ", sets_.size(), "), got ", process_set));
  const auto set = sets_[static_cast<std::size_t>(process_set)];
  if (set == nullptr)
    throw UsageError(concat("process_set ", process_set, " does not contain rank ", layout_.rank));
  return set;
}

std::shared_ptr<Handle> Engine::submit(int process_set, Request request, bool drives) {
  const auto set = find(process_set);
  check(request, set->size());
  if (request.device.kind != DeviceKind::cpu)
    throw UsageError(concat(name_of(request.collective), ": device must be cpu, got cuda"));
  auto handle = set->submit(std::move(request));
  if (drives) set->drive(*handle);
  if (!drives || !handle->is_finished()) wakeup_.wake();
  return handle;
}

std::shared_ptr<Handle> Engine::run_at_once(int process_set, const Request& request) {
  const auto set = find(process_set);
  check(request, set->size());
  auto handle = set->run_at_once(request);
  if (handle == nullptr) return nullptr;
  if (handle->is_finished()) {
    handle->rethrow();
    return nullptr;
  }
  wakeup_.wake();
  return handle;
}

void Engine::attach_cuda(const adareduce_cuda_plugin* plugin, int wanted_path) {
  if (plugin->version != ADAREDUCE_CUDA_PLUGIN_VERSION ||
      plugin->bytes != sizeof(adareduce_cuda_plugin))
    throw UsageError(concat("attach_cuda: _cuda must have version ", ADAREDUCE_CUDA_PLUGIN_VERSION,
                            " of the table (", sizeof(adareduce_cuda_plugin), " bytes), got ",
                            plugin->version, " (", plugin->bytes,
                            " bytes): it is of another build"));
  if (wanted_path < ADAREDUCE_CUDA_AUTO || wanted_path > ADAREDUCE_CUDA_SINGLE)
    throw UsageError(
        concat("attach_cuda: wanted_path must be an adareduce_cuda_path, got ", wanted_path));
  const std::lock_guard lock(mutex_);
  if (cuda_plugin_ != nullptr)
    throw UsageError("attach_cuda: must be called once per engine, got a second call");
  cuda_plugin_ = plugin;
  wanted_cuda_path_ = wanted_path;
}

std::shared_ptr<DeviceCalls> Engine::device_calls(int process_set) {
  auto set = find(process_set);
  const std::lock_guard lock(mutex_);
  if (cuda_plugin_ == nullptr)
    throw UsageError("CUDA tensors need the module _cuda: attach_cuda was not called");
  std::shared_ptr<DeviceCalls>& calls = device_calls_[process_set];
  if (calls == nullptr)
    calls = std::make_shared<DeviceCalls>(
        *cuda_plugin_, wanted_cuda_path_, std::move(set), settings_,
        layout_.processes[static_cast<std::size_t>(layout_.rank)].host, wakeup_);
  return calls;
}

std::vector<std::shared_ptr<DeviceCalls>> Engine::all_device_calls() {
  const std::lock_guard lock(mutex_);
  std::vector<std::shared_ptr<DeviceCalls>> all;
  for (const auto& [id, calls] : device_calls_) all.push_back(calls);
  return all;
}

void Engine::reject(int process_set, bool is_barrier, const std::string& reason) {
  Request request;
  request.collective = is_barrier ? Collective::barrier : Collective::allreduce;
  request.flags = kRejected;
  request.reason = reason;
  try {
    find(process_set)->submit(std::move(request));
  } catch (const Error&) {
    return;  // the caller is about to hear of a nearer mistake
  }
  wakeup_.wake();
}

std::vector<std::shared_ptr<Handle>> Engine::leave(const std::string& reason, bool is_orderly,
                                                   const DeviceCalls::Poll& poll) {
  // When all ranks have done so, no GPU needs another's memory any more.
  if (is_orderly)
    for (const auto& calls : all_device_calls()) calls->wait_for_gpu(poll);
  std::vector<std::shared_ptr<Handle>> handles;
  for (const auto& set : snapshot()) {
    auto of_set = set->submit_departure(reason, is_orderly);
    handles.insert(handles.end(), of_set.begin(), of_set.end());
  }
  wakeup_.wake();
  return handles;
}

std::string Engine::breakage() {
  for (const auto& set : snapshot())
    if (set->is_broken()) return set->problem().value_or("");
  return "";
}

Engine::Sets Engine::snapshot() {
  const std::lock_guard lock(mutex_);
  Sets sets;
  std::copy_if(sets_.begin(), sets_.end(), std::back_inserter(sets),
               [](const auto& set) { return set != nullptr; });
  return sets;
}

// ---- the worker ---------------------------------------------------------------------------------

void Engine::run() {
  Clock::time_point last_move = Clock::now();
  Clock::time_point last_service = last_move;
  Seconds nap = kFirstSleep;
  std::ptrdiff_t num_busy = 0;
  while (!must_stop_.load(std::memory_order_acquire)) {
    const Sets sets = snapshot();
    const Clock::time_point now = Clock::now();
    bool has_moved = false, has_slept = false, is_moving_bytes = false;
    for (const auto& set : sets)
      has_moved |= guarded(*set, [&] {
        // Whoever sleeps in one set must have nothing to do in another.
        set->set_waiter(num_busy == 1 && set->is_busy() ? settings_.longest_sleep : Seconds{0},
                        false);
        const bool moves = set->progress(now);
        has_slept |= set->has_slept();
        is_moving_bytes |= set->is_moving_bytes();
        return moves;
      });
    num_busy =
        std::count_if(sets.begin(), sets.end(), [](const auto& set) { return set->is_busy(); });
    const bool is_busy = num_busy > 0;
    // Also in the middle of long transfers: peers that wait for another set want to know.
    const bool is_time_to_serve = now - last_service >= settings_.idle_tick;
    if (is_time_to_serve) {
      report_deaths(sets, now);
      bool are_all_served = true;
      for (const auto& set : sets)
        are_all_served &= guarded(*set, [&] {
          set->serve_peers(now);
          set->watch_device(now);
          return true;
        });
      if (are_all_served) last_service = now;  // else soon again
    }
    if (has_moved) {
      last_move = now;
      nap = kFirstSleep;
      continue;
    }
    if (is_busy && now - last_move < (is_moving_bytes ? kSpinForBytes : settings_.spin_for)) {
      sched_yield();  // ranks may outnumber the cores
      continue;
    }
    report_deaths(sets, now);
    if (has_slept) continue;
    if (is_busy) {
      wakeup_.sleep(nap, {});
      nap = std::min(2 * nap, settings_.longest_sleep);
      continue;
    }
    // The descriptor of a process that has ended stays readable: no sleep would last.
    if (death_seen_ == Clock::time_point{})
      wakeup_.sleep(settings_.idle_tick, liveness_.descriptors());
    else
      wakeup_.sleep(std::min(settings_.idle_tick, kGraceAfterDeath / 2), {});
    last_move = Clock::now();
    nap = kFirstSleep;
  }
}

void Engine::report_deaths(const Sets& sets, Clock::time_point now) {
  const std::vector<Rank> dead = liveness_.dead();
  if (dead.empty()) return;
  if (death_seen_ == Clock::time_point{}) death_seen_ = now;
  if (now - death_seen_ < kGraceAfterDeath) return;
  for (const auto& set : sets) {
    std::vector<Rank> lost;
    for (const Rank rank : set->ranks())
      if (std::find(dead.begin(), dead.end(), rank) != dead.end()) lost.push_back(rank);
    if (lost.empty() || set->is_over()) continue;
    const std::unique_lock driver(set->driving(), std::try_to_lock);
    if (!driver) continue;  // next time
    std::string who;
    for (const Rank rank : lost) {
      const ProcessInfo& process = layout_.processes[static_cast<std::size_t>(rank)];
      who += concat(who.empty() ? "" : ", ", "rank ", rank, " (process ", process.pid, " on ",
                    process.host.substr(0, process.host.find(' ')), ")");
    }
    set->break_down(concat(who, lost.size() == 1 ? " has died" : " have died"));
  }
}

}  // namespace adareduce
