#include "engine/process_set.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "base/errors.h"
#include "collectives/allgather.h"

namespace adareduce {
namespace {

// Control transport. Two tags per channel, one for presence.
constexpr int kPresenceTag = 10;
constexpr int tag_of(int channel, int offset) { return 20 + 2 * channel + offset; }

// A peer that is asked must have time to answer before anybody is blamed.
constexpr Seconds kAskEvery{1.0};
constexpr Seconds kAnswerWithin{5.0};
Seconds first_question(const Settings& settings) {
  return std::min(kAskEvery, std::min(settings.warn_after, settings.fail_after) / 4);
}

std::string seconds_text(Seconds seconds) {
  const double tenths = std::round(seconds.count() * 10);
  return concat(tenths / 10, " s");
}

// What moves no tensors overtakes what does.
int channel_of(Collective collective) {
  return collective == Collective::barrier || collective == Collective::add_process_set ? 1 : 0;
}

// What a call that cannot be finished tells its caller.
std::exception_ptr failure_of(const Request& request, const std::string& text) {
  const std::string call = describe(request);
  return std::make_exception_ptr(
      TransportError(text.starts_with(call) ? text : concat(call, ": ", text)));
}

}  // namespace

ProcessSet::ProcessSet(std::string name, std::vector<Rank> ranks, TransportPair transports,
                       const KernelTable& kernels, const Settings& settings, EventLog& log)
    : name_(std::move(name)),
      ranks_(std::move(ranks)),
      transports_(std::move(transports)),
      kernels_(kernels),
      settings_(settings),
      log_(log),
      plans_(transports_.data->rank(), transports_.data->size()),
      presence_(*transports_.control, kPresenceTag, ranks_) {
  for (int index = 0; index < kNumChannels; ++index) {
    channels_[static_cast<std::size_t>(index)].header_tag = tag_of(index, 0);
    channels_[static_cast<std::size_t>(index)].record_tag = tag_of(index, 1);
  }
}

ProcessSet::~ProcessSet() {
  if (!is_over()) break_down("the engine was destroyed before shutdown()");
}

// ---- any thread ---------------------------------------------------------------------------------

std::shared_ptr<Handle> ProcessSet::submit(Request request) {
  const int index = channel_of(request.collective);
  const std::lock_guard lock(mutex_);
  Channel& channel = channels_[static_cast<std::size_t>(index)];
  if (problem_)
    throw TransportError(concat(describe(request), ": ", name_, " cannot be used any more: ",
                                *problem_, ". Call shutdown() and init() on every rank."));
  return enqueue(channel, std::move(request));
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
    handles.push_back(enqueue(channel, std::move(request)));
  }
  if (!problem_) problem_ = "this rank has called shutdown()";
  return handles;
}

std::shared_ptr<Handle> ProcessSet::enqueue(Channel& channel, Request request) {
  Work work;
  // Sequence numbers are equal on all ranks, also where some have made mistakes or used names.
  if (request.name.empty())
    request.name = concat(name_of(request.collective), ".noname.", channel.submitted);
  work.header = {.sequence = channel.submitted++,
                 .signature = request.flags == kNormal ? signature_of(request) : Signature{},
                 .flags = request.flags};
  if (request.flags == kNormal) last_call_ = describe(request);
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

Presence::Progress ProcessSet::my_progress() {
  const std::lock_guard lock(mutex_);
  return {{channels_[kRequests].submitted, channels_[kBarriers].submitted}, last_call_};
}

// ---- the worker ---------------------------------------------------------------------------------

bool ProcessSet::is_moving_bytes() const {
  return std::any_of(channels_.begin(), channels_.end(),
                     [](const Channel& channel) { return channel.task && channel.is_agreed; });
}

bool ProcessSet::progress(Clock::time_point now) {
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
  channel.is_agreed = false;
  channel.seen_exchanges = 0;
  channel.waiting_since = now;
  channel.reported = Seconds{0};
  channel.task.emplace(run(channel));
  return true;
}

void ProcessSet::end_current(Channel& channel) {
  channel.task.reset();
  channel.current.reset();
  if (&channel != &channels_[kRequests]) return;  // a barrier must not touch a request's buffers
  if (static_cast<std::int64_t>(data_.bytes() + scratch_.bytes()) > settings_.keep_buffer_bytes) {
    data_ = Buffer();
    scratch_ = Buffer();
  }
}

// What can fail on one rank alone happens here, before the others are kept waiting for it.
void ProcessSet::prepare(Work& work) {
  if (work.request.flags != kNormal || channel_of(work.request.collective) == kBarriers) return;
  try {
    if (work.request.collective == Collective::allgather) return;
    work.plan = plans_.get(work.request);
    data_.reserve(static_cast<std::size_t>(work.plan->fused_bytes));
    scratch_.reserve(static_cast<std::size_t>(work.plan->scratch_bytes));
    stats_.reserve(static_cast<std::size_t>(work.plan->stats_numel) * sizeof(double));
  } catch (const std::bad_alloc&) {
    work.header.flags |= kFailed;
    work.request.flags |= kFailed;
    work.request.reason = "not enough memory for its fused buffers";
  }
}

Task ProcessSet::run(Channel& channel) {
  Work& work = *channel.current;
  co_await agree(*transports_.control, channel.header_tag, work.header);
  if (!work.header.is_agreed()) {
    std::vector<Record> records;
    co_await exchange_records(*transports_.control, channel.record_tag, make_record(work.request),
                              records);
    settle(channel, records);
    co_return;
  }
  channel.is_agreed = true;
  co_await perform(work);
}

// The ranks do not all want the same. Throws for a rank whose caller waits for a result.
void ProcessSet::settle(Channel& channel, const std::vector<Record>& records) {
  const Work& work = *channel.current;
  const std::string leavers = explain_flags(records, ranks_, kLeaving);
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

Task ProcessSet::perform(Work& work) {
  switch (work.request.collective) {
    case Collective::allreduce:
      return perform_allreduce(work);
    case Collective::broadcast:
      return perform_broadcast(work);
    case Collective::allgather:
      return perform_allgather(work);
    case Collective::barrier:
    case Collective::add_process_set:
      break;
  }
  return [](Work& agreed) -> Task {  // the agreement was all
    agreed.handle->finish();
    co_return;
  }(work);
}

void ProcessSet::pack(const Work& work, double scale) {
  for (const Plan::Part& part : work.plan->parts) {
    std::vector<const void*> inputs;
    for (const std::size_t i : part.tensors) inputs.push_back(work.request.tensors[i].input);
    const SegmentTable table = part.table();
    kernels_.pack({.tensors = inputs.data(),
                   .fused = at(data_.data(), part.offset, 1),
                   .numel = part.numel,
                   .dtype = part.dtype,
                   .segments = &table,
                   .scale = scale},
                  {});
  }
}

void ProcessSet::unpack(const Work& work, double scale) {
  for (const Plan::Part& part : work.plan->parts) {
    std::vector<void*> outputs;
    for (const std::size_t i : part.tensors) outputs.push_back(work.request.tensors[i].output);
    const SegmentTable table = part.table();
    kernels_.unpack({.fused = at(data_.data(), part.offset, 1),
                     .tensors = outputs.data(),
                     .dtype = part.dtype,
                     .segments = &table,
                     .scale = scale},
                    {});
  }
}

Task ProcessSet::perform_allreduce(Work& work) {
  const Context context{*transports_.data, kernels_};
  pack(work, work.request.prescale);
  for (const Plan::Part& part : work.plan->parts) {
    const FusedBuffer fused{at(data_.data(), part.offset, 1), scratch_.data(), part.numel,
                            part.dtype, part.table()};
    co_await allreduce(context, part.allreduce, fused,
                       {static_cast<double*>(stats_.data()),
                        static_cast<std::size_t>(part.allreduce.stats_numel)});
  }
  unpack(work, work.request.postscale);  // only now: all tensors are written, or none
  work.handle->finish();
}

Task ProcessSet::perform_broadcast(Work& work) {
  const Context context{*transports_.data, kernels_};
  if (rank() == work.request.root) pack(work, 1.0);
  co_await broadcast(context, work.plan->broadcast, data_.data(), work.plan->fused_bytes);
  unpack(work, 1.0);
  work.handle->finish();
}

Task ProcessSet::perform_allgather(Work& work) {
  const Request& request = work.request;
  const Context context{*transports_.data, kernels_};
  const std::size_t num_tensors = request.tensors.size();
  const auto num_ranks = static_cast<std::size_t>(size());
  const auto self = static_cast<std::size_t>(rank());

  // How many rows every rank brings to each tensor.
  std::vector<std::int64_t> rows(num_ranks * num_tensors);
  std::vector<std::int64_t> row_bytes;
  for (std::size_t t = 0; t < num_tensors; ++t) {
    std::vector<std::int64_t> row_shape = request.tensors[t].shape;
    rows[self * num_tensors + t] = row_shape.front();
    row_shape.front() = 1;
    row_bytes.push_back(TensorArg{row_shape}.numel() * size_of(request.tensors[t].dtype));
  }
  co_await allgather_numbers(context, kDataTag, rows, static_cast<std::int64_t>(num_tensors));

  const auto bytes_from = [&](std::size_t from, std::size_t t) {
    return rows[from * num_tensors + t] * row_bytes[t];
  };
  std::vector<std::int64_t> bytes_of(num_ranks, 0);
  std::vector<std::int64_t> begin_of{0};
  for (std::size_t from = 0; from < num_ranks; ++from) {
    for (std::size_t t = 0; t < num_tensors; ++t) bytes_of[from] += bytes_from(from, t);
    begin_of.push_back(begin_of.back() + bytes_of[from]);
  }

  const auto all = std::make_shared<Buffer>(static_cast<std::size_t>(begin_of.back()));
  const auto copy = [](void* to, const void* from, std::int64_t bytes) {
    if (bytes > 0) std::memcpy(to, from, static_cast<std::size_t>(bytes));
  };
  std::int64_t place = begin_of[self];
  for (std::size_t t = 0; t < num_tensors; ++t) {
    copy(at(all->data(), place, 1), request.tensors[t].input, bytes_from(self, t));
    place += bytes_from(self, t);
  }
  co_await allgather(context, kDataTag, all->data(), bytes_of);

  // Blocks came by rank, results are wanted by tensor; for one tensor these are the same.
  std::vector<GatheredTensor> gathered;
  for (std::size_t t = 0; t < num_tensors; ++t) {
    std::vector<std::int64_t> shape = request.tensors[t].shape;
    shape.front() = 0;
    std::int64_t bytes = 0;
    for (std::size_t from = 0; from < num_ranks; ++from) {
      shape.front() += rows[from * num_tensors + t];
      bytes += bytes_from(from, t);
    }
    if (num_tensors == 1) {
      gathered.push_back({all, shape});
      break;
    }
    auto memory = std::make_shared<Buffer>(static_cast<std::size_t>(bytes));
    std::int64_t filled = 0;
    for (std::size_t from = 0; from < num_ranks; ++from) {
      copy(at(memory->data(), filled, 1), at(all->data(), begin_of[from], 1), bytes_from(from, t));
      filled += bytes_from(from, t);
      begin_of[from] += bytes_from(from, t);
    }
    gathered.push_back({std::move(memory), shape});
  }
  work.handle->finish(std::move(gathered));
}

// A transport counts the ranks of its group, people count those of the job.
std::string ProcessSet::explain(const std::exception& error) const {
  const auto* transport = dynamic_cast<const TransportError*>(&error);
  const int peer = transport == nullptr ? -1 : transport->peer();
  if (peer < 0 || peer >= size()) return error.what();
  return concat("rank ", ranks_[static_cast<std::size_t>(peer)], " is lost (", error.what(), ")");
}

// ---- waits that become long
// ----------------------------------------------------------------------

void ProcessSet::watch(int index, Clock::time_point now) {
  Channel& channel = channels_[static_cast<std::size_t>(index)];
  const Seconds waited = now - channel.waiting_since;
  if (waited < first_question(settings_)) return;
  if (channel.asked_at < channel.waiting_since || now - channel.asked_at >= kAskEvery) {
    channel.asked_at = now;
    try {
      presence_.ask();
    } catch (const std::exception& error) {
      break_down(concat(describe(channel.current->request), ": ", explain(error)));
      return;
    }
  }
  serve_peers(now);
  if (!channel.task) return;  // a peer's failure has ended it

  const Seconds next_warning = channel.reported + settings_.warn_after;
  if (waited < std::min(next_warning, settings_.fail_after)) return;
  const Work& work = *channel.current;
  const Clock::time_point lately = now - std::chrono::duration_cast<Clock::duration>(kAnswerWithin);
  const Presence::Missing missing =
      presence_.find_missing(index, work.header.sequence, std::max(channel.waiting_since, lately));
  const std::string call =
      concat(describe(work.request), " (request ", work.header.sequence, " of ", name_, ")");
  // A rank that has finished may wait for as long as the others are alive: they may be evaluating.
  const bool may_fail =
      !(work.request.flags & kLeaving) || !work.request.is_orderly || !missing.silent.empty();
  if (waited >= settings_.fail_after && may_fail) {
    break_down(
        concat(call, ": gave up after ", seconds_text(settings_.fail_after), ": ", missing.text));
    return;
  }
  if (waited >= next_warning) {
    channel.reported = waited;
    if (index == kBarriers && work.request.flags & kLeaving) return;  // the other channel says it
    log_.add(EventLog::Level::warning,
             concat(call, ": waiting for ", seconds_text(waited), ": ", missing.text,
                    may_fail ? concat(". Gives up after ", seconds_text(settings_.fail_after)) : "",
                    "."));
  }
}

void ProcessSet::serve_peers(Clock::time_point now) {
  if (size() == 1 || is_over()) return;
  try {
    const std::optional<std::string> failure = presence_.serve(my_progress(), now);
    if (failure) break_down(*failure, false);
  } catch (const std::exception& error) {  // ULFM reports a death to whoever looks for messages
    break_down(explain(error));
  }
}

void ProcessSet::break_down(const std::string& text, bool tell_peers) {
  std::deque<Work> orphans;
  {
    const std::lock_guard lock(mutex_);
    if (is_broken_) return;
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
  if (tell_peers) presence_.announce_failure(text);
  // What is under way may still be written to: neither it nor its memory can be given back.
  const bool may_write_late = transports_.data->may_write_late();
  for (Channel& channel : channels_) {
    if (channel.task && may_write_late) channel.task->leak();
    channel.task.reset();
  }
  if (may_write_late) {
    data_.leak();
    scratch_.leak();
    stats_.leak();
  }
  transports_.control->abandon();
  transports_.data->abandon();
  for (const Work& work : orphans)
    work.handle->fail(
        failure_of(work.request, text + ". Call shutdown() and init() on every rank."));
}

}  // namespace adareduce
