#include "engine/cuda/device_group.h"

#include <algorithm>
#include <cstring>

#include "base/cuda_plugin.h"
#include "base/errors.h"
#include "engine/cuda/layout256.h"

namespace adareduce::cuda {
namespace {

constexpr std::size_t kMostWatched = 4096;

// Memory that other processes have mapped may be freed when they have unmapped it. At the end of a
// job nobody can be asked; when the next one makes a group, all ranks have ended the former one.
// Guarded by the mutex.
std::mutex graveyard_mutex;
std::vector<std::unique_ptr<PeerWindows>>& graveyard() {
  static auto& windows = *new std::vector<std::unique_ptr<PeerWindows>>;  // outlives the driver
  return windows;
}

void upload(const OwnStream& stream, void* to, const void* from, std::int64_t bytes) {
  if (bytes == 0) return;
  ADAREDUCE_CUDA(cudaMemcpyAsync(to, from, static_cast<std::size_t>(bytes), cudaMemcpyHostToDevice,
                                 stream.native()));
  ADAREDUCE_CUDA(cudaStreamSynchronize(stream.native()));
}

}  // namespace

// The window of a rank: flags, scalars, inputs, results.
struct DeviceGroup::Generation {
  std::unique_ptr<PeerWindows> windows;
  DeviceBuffer epochs;
  PeerMemory memory;
  std::int64_t data_bytes = 0;
  std::int64_t scalars_numel = 0;

  ~Generation() {
    if (windows == nullptr) return;
    windows->close();
    const std::lock_guard lock(graveyard_mutex);
    graveyard().push_back(std::move(windows));
  }
};

DeviceGroup::DeviceGroup(Args args) : args_(std::move(args)) {
  std::string error;
  DeviceFacts mine;
  try {
    const DeviceGuard guard(args_.device);
    mine = describe_device(args_.device);
    stream_ = std::make_unique<OwnStream>();
    events_ = std::make_shared<EventPool>(args_.device);
    fork_ = std::make_unique<Event>(events_);
    error_ = std::make_unique<MappedWord>();
  } catch (const std::exception& problem) {
    error = problem.what();
  }
  agree_on("the GPU of each rank", error);
  {
    // Every rank is here, so nobody uses the windows of a former group any more.
    const std::lock_guard lock(graveyard_mutex);
    graveyard().clear();
  }
  const DeviceGuard guard(args_.device);
  const NcclStatus& nccl = nccl_status();
  mine.host = args_.host;
  mine.nccl_version = nccl.version;
  mine.nccl_why_not = nccl.why_not;
  mine.wanted_path = args_.path;
  for (const std::string& bytes : args_.allgather(mine.to_bytes()))
    facts_.push_back(DeviceFacts::from_bytes(bytes));
  if (args_.size == 1) {
    choice_.path = ADAREDUCE_CUDA_SINGLE;
    choice_.why = "one rank: nothing has to move";
  } else {
    choice_ = choose_path(facts_);
  }
  if (choice_.path != ADAREDUCE_CUDA_NCCL) return;
  nccl_ = NcclCommunicator::make(
      args_.rank, args_.size, stream_->stream(),
      [&](const std::string& bytes) { return args_.allgather(bytes).front(); });
}

DeviceGroup::~DeviceGroup() {
  const bool is_aborted = [&] {
    const std::lock_guard lock(mutex_);
    return aborted_.has_value();
  }();
  try {
    const DeviceGuard guard(args_.device);
    if (is_aborted) {
      // What waits on the device has been told to end, but nobody knows when it does.
      for (DeviceBuffer& buffer : tables_) buffer.leak();
      for (DeviceBuffer& buffer : kept_buffers_) buffer.leak();
      for (DeviceBuffer* buffer : {&data_, &scratch_, &numbers_}) buffer->leak();
      if (generation_) generation_->epochs.leak();
      (void)error_.release();
      (void)stream_.release();
    } else if (stream_) {
      ADAREDUCE_CUDA(cudaStreamSynchronize(stream_->native()));
    }
    nccl_.reset();
    generation_.reset();
    kept_generations_.clear();
    const std::lock_guard lock(mutex_);
    watched_.clear();
  } catch (const std::exception&) {
    // The GPU is lost, and with it all that could be given back.
  }
}

// Collective. An error of one rank becomes one of all.
void DeviceGroup::agree_on(const std::string& what, const std::string& error) {
  const std::vector<std::string> errors = args_.allgather(error);
  std::string text;
  for (std::size_t rank = 0; rank < errors.size(); ++rank)
    if (!errors[rank].empty())
      text += concat(text.empty() ? "" : "; ", "rank ", rank, ": ", errors[rank]);
  if (!text.empty()) throw DeviceError(concat(what, ": ", text));
}

// ---- plans --------------------------------------------------------------------------------------

DevicePlan& DeviceGroup::prepare(Request request, std::vector<std::int64_t> rows) {
  throw_if_aborted();
  const RelaxedCapture relaxed;
  std::string error;
  std::unique_ptr<DevicePlan> plan;
  bool needs_windows = false;
  try {
    const DeviceGuard guard(args_.device);
    const Abilities abilities{
        .has_nccl = nccl_ != nullptr,
        // Where NCCL was asked for, it moves everything.
        .has_peers = choice_.path == ADAREDUCE_CUDA_PEER ||
                     (choice_.peer_memory_is_possible && args_.path == ADAREDUCE_CUDA_AUTO),
        .prefers_peers = choice_.path == ADAREDUCE_CUDA_PEER};
    plan = std::make_unique<DevicePlan>(
        make_device_plan(std::move(request), std::move(rows), args_.rank, args_.size, abilities));
    reserve(*plan);
    DeviceBuffer tables(plan->table_bytes);
    const std::vector<char> image = table_image(*plan);
    // A stream of its own: the group's may be captured.
    const OwnStream uploads;
    upload(uploads, tables.data(), image.data(), plan->table_bytes);
    plan->tables = tables.data();
    tables_.push_back(std::move(tables));
    needs_windows = windows_are_too_small(*plan);
  } catch (const std::exception& problem) {
    error = problem.what();
  }
  agree_on(concat("preparing ", name_of(plan ? plan->request.collective : Collective::allreduce)),
           error);
  const DeviceGuard guard(args_.device);
  if (needs_windows) make_windows(*plan);  // the same sizes, so the same on all ranks
  plans_.push_back(std::move(plan));
  return *plans_.back();
}

void DeviceGroup::reserve(const DevicePlan& plan) {
  if (!plan.uses_peers()) grow(data_, plan.data_bytes);
  grow(scratch_, plan.scratch_bytes);
  grow(numbers_, plan.number_bytes);
}

void DeviceGroup::grow(DeviceBuffer& buffer, std::int64_t bytes) {
  if (bytes <= buffer.bytes()) return;
  if (has_captured_) {
    kept_buffers_.push_back(std::move(buffer));
  } else {
    ADAREDUCE_CUDA(cudaStreamSynchronize(stream_->native()));
  }
  buffer = DeviceBuffer();  // first give back, then ask
  buffer = DeviceBuffer(bytes);
}

bool DeviceGroup::windows_are_too_small(const DevicePlan& plan) const {
  return plan.uses_peers() &&
         (generation_ == nullptr || plan.data_bytes > generation_->data_bytes ||
          plan.scalars_numel > generation_->scalars_numel);
}

// Collective.
void DeviceGroup::make_windows(const DevicePlan& plan) {
  auto next = std::make_unique<Generation>();
  next->data_bytes = plan.data_bytes;
  next->scalars_numel = plan.scalars_numel;
  if (generation_ != nullptr) {
    next->data_bytes = std::max(next->data_bytes, generation_->data_bytes);
    next->scalars_numel = std::max(next->scalars_numel, generation_->scalars_numel);
    // Own work first, then that of the others, who read these windows.
    std::string error;
    try {
      ADAREDUCE_CUDA(cudaStreamSynchronize(stream_->native()));
    } catch (const std::exception& problem) {
      error = problem.what();
    }
    agree_on("the end of earlier work", error);
    if (has_captured_) {
      kept_generations_.push_back(std::move(generation_));
    } else {
      generation_->windows->close();
      agree_on("the end of windows that are too small", "");
      generation_->windows.reset();
    }
    generation_.reset();
  }

  Layout256 layout;
  const std::int64_t flags = layout.add(peer_flags_numel(choice_.num_blocks) * 4);
  const std::int64_t scalars = layout.add(next->scalars_numel * 8);
  const std::int64_t in = layout.add(next->data_bytes);
  const std::int64_t out = layout.add(next->data_bytes);
  next->windows = PeerWindows::make(args_.rank, facts_, layout.bytes(), args_.allgather);

  std::string error;
  try {
    const OwnStream setup;
    next->epochs = DeviceBuffer(std::int64_t{choice_.num_blocks} * 4);
    ADAREDUCE_CUDA(cudaMemsetAsync(next->epochs.data(), 0,
                                   static_cast<std::size_t>(next->epochs.bytes()), setup.native()));
    ADAREDUCE_CUDA(cudaStreamSynchronize(setup.native()));
  } catch (const std::exception& problem) {
    error = problem.what();
  }
  agree_on("the windows of the ranks", error);
  PeerMemory& memory = next->memory;
  for (Rank rank = 0; rank < args_.size; ++rank) {
    char* const window = static_cast<char*>(next->windows->of(rank));
    memory.flags.push_back(reinterpret_cast<std::uint32_t*>(window + flags));
    memory.scalars.push_back(reinterpret_cast<double*>(window + scalars));
    memory.in.push_back(window + in);
    memory.out.push_back(window + out);
  }
  memory.sync.num_blocks = choice_.num_blocks;
  memory.sync.epochs = next->epochs.at<std::uint32_t>(0);
  memory.sync.error = error_->on_device();
  memory.sync.deadline_ns = static_cast<std::uint64_t>(args_.deadline.count() * 1e9);
  generation_ = std::move(next);
}

// ---- launches -----------------------------------------------------------------------------------

Machinery DeviceGroup::machinery_for(const DevicePlan& plan) {
  Machinery machinery{.rank = args_.rank,
                      .size = args_.size,
                      .kernels = &cuda_kernels(),
                      .nccl = nccl_.get(),
                      .peers = nullptr,
                      .stream = stream_->stream(),
                      .data = static_cast<char*>(data_.data()),
                      .scratch = static_cast<char*>(scratch_.data()),
                      .numbers = static_cast<char*>(numbers_.data())};
  if (plan.uses_peers()) {
    machinery.peers = &generation_->memory;
    machinery.data = generation_->memory.in[static_cast<std::size_t>(args_.rank)];
  }
  return machinery;
}

std::unique_ptr<adareduce_cuda_ticket> DeviceGroup::launch(const DevicePlan& plan,
                                                           const LaunchArgs& args,
                                                           cudaStream_t caller) {
  throw_if_aborted();
  const DeviceGuard guard(args_.device);
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  ADAREDUCE_CUDA(cudaStreamIsCapturing(caller, &capture));
  const bool is_captured = capture != cudaStreamCaptureStatusNone;
  has_captured_ |= is_captured;

  ADAREDUCE_CUDA(cudaEventRecord(fork_->get(), caller));
  ADAREDUCE_CUDA(cudaStreamWaitEvent(stream_->native(), fork_->get(), 0));
  Watched watched;
  if (!is_captured) {
    watched.begin = std::make_shared<Event>(events_);
    ADAREDUCE_CUDA(cudaEventRecord(watched.begin->get(), stream_->native()));
  }
  enqueue(machinery_for(plan), plan, args);
  auto ticket = std::make_unique<adareduce_cuda_ticket>();
  ticket->end = std::make_shared<Event>(events_);
  ticket->was_captured = is_captured;
  ADAREDUCE_CUDA(cudaEventRecord(ticket->end->get(), stream_->native()));
  if (!is_captured) {
    watched.end = ticket->end;
    watched.what = name_of(plan.request.collective);
    const std::lock_guard lock(mutex_);
    if (watched_.size() < kMostWatched) watched_.push_back(std::move(watched));
  }
  return ticket;
}

void DeviceGroup::throw_if_aborted() {
  const std::lock_guard lock(mutex_);
  if (aborted_) throw DeviceError(*aborted_);
}

// ---- the watchdog's side ------------------------------------------------------------------------

std::optional<std::string> DeviceGroup::problem() {
  {
    const std::lock_guard lock(mutex_);
    if (aborted_) return std::nullopt;  // it is known
  }
  // Not a DeviceGuard: the thread that watches has no GPU of its own, and going back to the first
  // one would make a context there.
  (void)cudaSetDevice(args_.device);
  const RelaxedCapture relaxed;
  const auto while_running = [&] {
    const std::lock_guard lock(mutex_);
    return watched_.empty() ? std::string(" (in a captured call)")
                            : concat(" (in ", watched_.front().what, ")");
  };
  if (const std::uint32_t late = error_->read(); late != 0)
    return concat("rank ", late - 1, " of the group did not come on the device within ",
                  args_.deadline.count(), " s", while_running());
  if (nccl_ != nullptr) {
    std::string error = nccl_->async_error();
    if (!error.empty()) return concat("NCCL: ", error, while_running());
  }
  const auto now = std::chrono::steady_clock::now();
  const std::lock_guard lock(mutex_);
  const auto has_come = [](const std::shared_ptr<Event>& event, const std::string& what) {
    const cudaError_t status = cudaEventQuery(event->get());
    if (status == cudaErrorNotReady) return false;
    if (status != cudaSuccess)
      throw DeviceError(concat(what, ": ", cudaGetErrorString(status), " (reported by an event)"));
    return true;
  };
  try {
    while (!watched_.empty() && has_come(watched_.front().end, watched_.front().what))
      watched_.pop_front();
    if (watched_.empty() || !has_come(watched_.front().begin, watched_.front().what))
      return std::nullopt;
  } catch (const DeviceError& error) {
    return error.what();
  }
  Watched& first = watched_.front();
  if (first.seen == std::chrono::steady_clock::time_point{}) first.seen = now;
  if (now - first.seen < args_.deadline) return std::nullopt;
  return concat(first.what, " has run on the device for ", args_.deadline.count(), " s");
}

void DeviceGroup::abort(const std::string& text) {
  {
    const std::lock_guard lock(mutex_);
    if (aborted_) return;
    aborted_ = text;
  }
  (void)cudaSetDevice(args_.device);
  const RelaxedCapture relaxed;
  error_->write(UINT32_MAX);  // whoever waits for a peer goes on
  if (nccl_ != nullptr) nccl_->abort(text);
}

}  // namespace adareduce::cuda
