#include "engine/process_set.h"

#include <algorithm>

#include "base/errors.h"
#include "engine/shared_execution.h"

namespace adareduce {
namespace {

// Control transport. Two tags per channel, one for presence.
constexpr int kPresenceTag = 10;
constexpr int kShareTag = 8;
constexpr int tag_of(int channel, int offset) { return 20 + 2 * channel + offset; }

// What moves no tensors overtakes what does.
int channel_of(Collective collective) {
  return collective == Collective::barrier || collective == Collective::add_process_set ||
                 collective == Collective::empty_shared
             ? 1
             : 0;
}

// Why a mistake that is harmless on the CPU is not.
constexpr std::string_view kLaunchedWords =
    " Work that was enqueued on GPUs before the ranks were compared cannot be finished.";
// Of descriptors between ranks that have all come.
constexpr Seconds kLongestExchange{60};
constexpr Seconds kPollEvery{0.2};
constexpr std::string_view kAdvice = ". Call shutdown() and init() on every rank.";

// What the choice for a large request goes by. Of an allgather as many from each rank as from here.
std::int64_t bytes_moved(const Request& request, const Plan& plan, int size) {
  if (request.collective != Collective::allgather) return plan.fused_bytes;
  std::int64_t bytes = 0;
  for (const TensorArg& tensor : request.tensors) bytes += tensor.numel() * size_of(tensor.dtype);
  return bytes * size;
}

// What a call that cannot be finished tells its caller.
std::exception_ptr failure_of(const Request& request, const std::string& text) {
  const std::string call = describe(request);
  return std::make_exception_ptr(
      TransportError(text.starts_with(call) ? text : concat(call, ": ", text)));
}

}  // namespace

ProcessSet::ProcessSet(std::string name, std::vector<Rank> ranks, TransportPair transports,
                       const KernelTable& kernels, const Settings& settings, EventLog& log,
                       std::unique_ptr<SharedNode> shared)
    : name_(std::move(name)),
      ranks_(std::move(ranks)),
      transports_(std::move(transports)),
      kernels_(kernels),
      settings_(settings),
      log_(log),
      plans_(transports_.data->rank(), transports_.data->size()),
      presence_(*transports_.control, kPresenceTag, ranks_),
      shared_(std::move(shared)) {
  for (int index = 0; index < kNumChannels; ++index) {
    channels_[static_cast<std::size_t>(index)].header_tag = tag_of(index, 0);
    channels_[static_cast<std::size_t>(index)].record_tag = tag_of(index, 1);
  }
}

ProcessSet::~ProcessSet() {
  if (!is_over()) break_down("the engine was destroyed before shutdown()");
}

// ---- any thread ---------------------------------------------------------------------------------

// Sequence numbers are equal on all ranks, also where some have made mistakes or used names.
void ProcessSet::name_if_nameless(Request& request, std::uint64_t sequence) {
  if (request.name.empty())
    request.name.append(name_of(request.collective))
        .append(".noname.")
        .append(std::to_string(sequence));
}

void ProcessSet::throw_if_unusable(const Request& request) const {
  if (problem_)
    throw TransportError(
        concat(describe(request), ": ", name_, " cannot be used any more: ", *problem_, kAdvice));
}

std::shared_ptr<Handle> ProcessSet::submit(Request request) {
  const int index = channel_of(request.collective);
  const std::lock_guard lock(mutex_);
  throw_if_unusable(request);
  return enqueue(index, std::move(request));
}

void ProcessSet::fail(const std::string& text) {
  const std::lock_guard lock(mutex_);
  if (is_broken_ || has_failure_) return;
  failure_ = text;
  if (!problem_) problem_ = text;
  has_failure_ = true;
}

std::vector<std::shared_ptr<Handle>> ProcessSet::submit_departure(const std::string& reason,
                                                                  bool is_orderly) {
  const std::lock_guard lock(mutex_);
  std::vector<std::shared_ptr<Handle>> handles;
  if (is_broken_) return handles;
  for (int index = 0; index < kNumChannels; ++index) {
    Channel& channel = channels_[static_cast<std::size_t>(index)];
    if (channel.is_closed) continue;
    Request request;
    request.collective = index == kBarriers ? Collective::barrier : Collective::allreduce;
    request.flags = kLeaving;
    request.reason = reason;
    request.is_orderly = is_orderly;
    handles.push_back(enqueue(index, std::move(request)));
  }
  if (!problem_) problem_ = "this rank has called shutdown()";
  return handles;
}

std::shared_ptr<Handle> ProcessSet::enqueue(int index, Request request) {
  Channel& channel = channels_[static_cast<std::size_t>(index)];
  Work work;
  const bool is_call = (request.flags & ~kLaunched) == kNormal;
  const Signature signature = is_call ? signature_of(request) : Signature{};
  name_if_nameless(request, channel.submitted);
  work.header = {.sequence = channel.submitted++, .signature = signature, .flags = request.flags};
  if (is_call) last_call_ = {index, work.header.sequence, std::nullopt};
  work.request = std::move(request);
  work.handle = std::make_shared<Handle>();
  channel.queue.push_back(std::move(work));
  return channel.queue.back().handle;
}

std::optional<std::string> ProcessSet::problem() {
  const std::lock_guard lock(mutex_);
  return problem_;
}

bool ProcessSet::is_broken() {
  const std::lock_guard lock(mutex_);
  return is_broken_;
}

bool ProcessSet::is_over() {
  const std::lock_guard lock(mutex_);
  return is_broken_ || std::all_of(channels_.begin(), channels_.end(),
                                   [](const Channel& channel) { return channel.is_closed; });
}

bool ProcessSet::is_busy() {
  const std::lock_guard lock(mutex_);
  return std::any_of(channels_.begin(), channels_.end(), [](const Channel& channel) {
    return channel.current || !channel.queue.empty();
  });
}

std::shared_ptr<SharedRegion> ProcessSet::share(std::int64_t bytes,
                                                const std::function<void()>& poll) {
  // Peers have agreed to come; one that dies or stops on the way breaks the set.
  const std::string call = concat("empty_shared(", bytes, " bytes)");
  Clock::time_point polled_at = Clock::now();
  const GatherStrings gather = [&](const std::string& mine) {
    ShareWait wait{.since = Clock::now()};
    return gather_strings(*transports_.control, kShareTag, mine, 2 * settings_.fail_after, [&] {
      if (const Clock::time_point now = Clock::now(); now - polled_at > kPollEvery) {
        polled_at = now;
        poll();
      }
      watch_share(call, wait);
      if (is_broken()) throw TransportError(concat(call, ": ", *problem(), kAdvice));
    });
  };
  return shared_->regions()->add(SharedWindows::make(
      rank(), size(), bytes, gather, std::min(kLongestExchange, settings_.fail_after)));
}

// ---- the driver ---------------------------------------------------------------------------------

void ProcessSet::set_waiter(Seconds longest_sleep, bool is_caller) {
  if (shared_ != nullptr) shared_->memory().set_waiter(longest_sleep, is_caller);
}

bool ProcessSet::has_slept() { return shared_ != nullptr && shared_->memory().has_slept(); }

bool ProcessSet::is_moving_bytes() const {
  return std::any_of(channels_.begin(), channels_.end(),
                     [](const Channel& channel) { return channel.task && channel.is_agreed; });
}

bool ProcessSet::progress(Clock::time_point now) {
  if (has_failure_.load(std::memory_order_acquire) && !is_broken()) {
    std::string text;
    {
      const std::lock_guard lock(mutex_);
      text = failure_;
    }
    break_down(text);
    return true;
  }
  bool has_moved = false;
  for (int index = 0; index < kNumChannels; ++index) has_moved |= progress_channel(index, now);
  return has_moved;
}

bool ProcessSet::progress_channel(int index, Clock::time_point now) {
  Channel& channel = channels_[static_cast<std::size_t>(index)];
  if (!channel.task && !start_next(channel, now)) return false;
  std::exception_ptr verdict;
  try {
    if (channel.task->progress()) {
      end_current(channel);
      return true;
    }
  } catch (const DisagreementError&) {
    verdict = std::current_exception();
  } catch (const std::exception& error) {
    break_down(concat(describe(channel.current->request), ": ", explain(error)));
    return true;
  }
  if (verdict) {
    // Every rank has the same verdict and has written nothing: the next request is sound.
    // The caller gets the only reference, so that no two threads share an exception.
    const std::shared_ptr<Handle> handle = channel.current->handle;
    end_current(channel);
    handle->fail(std::move(verdict));
    return true;
  }
  if (channel.task->completed_exchanges() != channel.seen_exchanges) {
    channel.seen_exchanges = channel.task->completed_exchanges();
    channel.waiting_since = now;
    channel.reported = Seconds{0};
    return true;
  }
  watch(index, now);
  return false;
}

bool ProcessSet::start_next(Channel& channel, Clock::time_point now) {
  {
    const std::lock_guard lock(mutex_);
    if (channel.queue.empty()) return false;
    channel.current = std::move(channel.queue.front());
    channel.queue.pop_front();
  }
  prepare(*channel.current);
  start(channel, now);
  return true;
}

void ProcessSet::start(Channel& channel, Clock::time_point now) {
  channel.is_agreed = false;
  channel.seen_exchanges = 0;
  channel.waiting_since = now;
  channel.reported = Seconds{0};
  channel.task.emplace(run(channel));
}

void ProcessSet::end_current(Channel& channel) {
  channel.task.reset();
  channel.current->plan.reset();
  channel.current->handle.reset();
  {
    const std::lock_guard lock(mutex_);
    channel.ended = std::exchange(channel.current, std::nullopt);
  }
  if (&channel != &channels_[kRequests]) return;  // a barrier must not touch a request's buffers
  if (workspace_.bytes() > settings_.keep_buffer_bytes) workspace_ = Workspace();
}

// What can fail on one rank alone happens here, before the others are kept waiting for it.
void ProcessSet::prepare(Work& work) {
  const Request& request = work.request;
  if (request.flags != kNormal || channel_of(request.collective) == kBarriers) return;
  if (request.device.kind != DeviceKind::cpu) return;  // its caller enqueues it
  try {
    // What an allgather needs depends on the other ranks' rows.
    work.plan = request.collective == Collective::allgather ? std::make_shared<const Plan>()
                                                            : plans_.get(request);
    work.is_shared = shared_ != nullptr && shared_->takes(request, *work.plan);
    // Large ones go through slots, and write results before the last inputs have been read.
    const bool is_large = work.is_shared && !work.plan->is_small;
    if (!is_large) workspace_.reserve(*work.plan);
    if (!is_large) return;
    if (has_overlap(request, rank(), size())) work.header.flags |= kOverlaps;
    work.header.placement = shared_->placement_of(request);
    if (rank() != 0) return;
    // In place nothing goes through slots, and nothing is to be chosen.
    work.has_proposal = !settings_.shared_choice && work.header.placement == 0;
    work.is_callers = shared_->memory().is_caller();
    work.header.choice =
        work.has_proposal ? shared_->tuning().propose(
                                request, bytes_moved(request, *work.plan, size()), work.is_callers)
                          : settings_.shared_choice.value_or(0);
  } catch (const std::bad_alloc&) {
    work.header.flags |= kFailed;
    work.request.flags |= kFailed;
    work.request.reason = "not enough memory for its fused buffers";
  }
}

Task ProcessSet::run(Channel& channel) {
  Work& work = *channel.current;
  if (shared_ == nullptr) {
    co_await agree(*transports_.control, channel.header_tag, work.header);
  } else {
    const int board = static_cast<int>(&channel - channels_.data());
    if (!work.is_posted) {
      if (work.is_shared) shared_->post_payload(work.request, *work.plan, work.header.sequence);
      shared_->post(board, work.header);
    }
    co_await shared_->wait_for_posts(board, work.header.sequence);
    if (shared_->has_lost_any()) co_await Never();
    shared_->merge_posts(board, work.header);
  }
  if (!work.header.is_agreed()) {
    std::vector<Record> records;
    co_await exchange_records(*transports_.control, channel.record_tag, make_record(work.request),
                              records);
    settle(channel, records);
    co_return;
  }
  channel.is_agreed = true;
  Result result;
  if (work.plan) co_await execute_agreed(work, result);  // else the agreement was all
  work.handle->finish(std::move(result));
}

Task ProcessSet::execute_agreed(Work& work, Result& result) {
  if (!work.is_shared || work.header.flags & kOverlaps) {
    if (shared_ != nullptr) ++shared_->routes().as_messages;
    workspace_.reserve(*work.plan);
    co_await execute({*transports_.data, kernels_}, work.request, *work.plan, workspace_, result);
    co_return;
  }
  SharedRoutes& routes = shared_->routes();
  ++(work.plan->is_small          ? routes.on_boards
     : work.header.placement != 0 ? routes.in_place
                                  : routes.through_slots);
  const Clock::time_point begin = Clock::now();
  co_await execute_shared(*shared_, work.request, *work.plan, workspace_, work.header, result);
  if (work.has_proposal)
    shared_->tuning().record(work.request, bytes_moved(work.request, *work.plan, size()),
                             work.is_callers, work.header.choice, Clock::now() - begin);
}

// The ranks do not all want the same. Throws for a rank whose caller waits for a result.
void ProcessSet::settle(Channel& channel, const std::vector<Record>& records) {
  const Work& work = *channel.current;
  const std::string leavers = explain_flags(records, ranks_, kLeaving);
  if (work.header.flags & kLaunched) {
    std::string text = explain_flags(records, ranks_, kLeaving | kRejected | kFailed);
    if (text.empty()) text = explain_difference(records, ranks_);
    throw TransportError(concat(text, kLaunchedWords));
  }
  if (!leavers.empty()) close(channel, leavers);
  if (work.request.flags & (kLeaving | kRejected)) {
    work.handle->finish();
    return;
  }
  const std::string call = describe(work.request);
  if (!leavers.empty()) {
    work.handle->fail(failure_of(work.request, leavers));
    return;
  }
  std::string why = explain_flags(records, ranks_, kRejected | kFailed);
  if (why.empty()) why = explain_difference(records, ranks_);
  throw DisagreementError(concat(call, ": ", why));
}

// A rank is gone for good: what is queued behind it can never run.
void ProcessSet::close(Channel& channel, const std::string& why) {
  std::deque<Work> orphans;
  {
    const std::lock_guard lock(mutex_);
    for (const Work& work : channel.queue)
      if (work.request.flags & kLaunched) throw TransportError(concat(why, kLaunchedWords));
    channel.is_closed = true;
    if (!problem_) problem_ = why;
    orphans.swap(channel.queue);
  }
  for (const Work& work : orphans) {
    if (work.request.flags & (kLeaving | kRejected)) {
      work.handle->finish();
    } else {
      work.handle->fail(failure_of(work.request, why));
    }
  }
}

// A transport counts the ranks of its group, people count those of the job.
std::string ProcessSet::explain(const std::exception& error) const {
  const auto* transport = dynamic_cast<const TransportError*>(&error);
  const int peer = transport == nullptr ? -1 : transport->peer();
  if (peer < 0 || peer >= size()) return error.what();
  return concat("rank ", ranks_[static_cast<std::size_t>(peer)], " is lost (", error.what(), ")");
}

// ---- the end ------------------------------------------------------------------------------------

void ProcessSet::break_down(const std::string& text, bool tell_peers) {
  if (is_broken()) return;
  // First: who sees that the set is broken must hear of it from his launches, too.
  const std::string advice = concat(text, kAdvice);
  cuda_group_->abort(advice);
  std::deque<Work> orphans;
  {
    const std::lock_guard lock(mutex_);
    is_broken_ = true;
    problem_ = text;
    for (Channel& channel : channels_) {
      if (channel.current) orphans.push_back(std::move(*channel.current));
      channel.current.reset();
      for (Work& work : channel.queue) orphans.push_back(std::move(work));
      channel.queue.clear();
      channel.is_closed = true;
    }
  }
  if (shared_ != nullptr) shared_->memory().signal(SharedMemory::kGone, 1);
  if (tell_peers) presence_.announce_failure(text);
  // What is under way may still be written to: neither it nor its memory can be given back.
  const bool may_write_late = transports_.data->may_write_late();
  for (Channel& channel : channels_) {
    if (channel.task && may_write_late) channel.task->leak();
    channel.task.reset();
  }
  if (may_write_late) workspace_.leak();
  transports_.control->abandon();
  transports_.data->abandon();
  broken_at_ = Clock::now();
  for (const Work& work : orphans) work.handle->fail(failure_of(work.request, advice));
}

}  // namespace adareduce
