#include "transports/nccl/nccl_communicator.h"

#include <algorithm>
#include <condition_variable>
#include <cstring>
#include <mutex>
#include <thread>

#include "base/errors.h"
#include "transports/nccl/nccl_call.h"
#include "transports/nccl/nccl_library.h"

namespace adareduce::cuda {
namespace {

// Whoever uses the stream finds the messages complete.
class EnqueuedExchange final : public Exchange {
 public:
  bool test() override { return true; }
};

class Communicator final : public NcclCommunicator {
 public:
  Communicator(const nccl::NcclFunctions& functions, Rank rank, int size, Stream stream,
               nccl::ncclComm_t comm)
      : nccl_(functions),
        rank_(rank),
        size_(size),
        stream_(static_cast<cudaStream_t>(stream.native)),
        comm_(comm) {}
  ~Communicator() override;

  Rank rank() const override { return rank_; }
  int size() const override { return size_; }
  std::string_view kind() const override { return "nccl"; }
  std::unique_ptr<Exchange> start(int tag, std::span<const SendPart> sends,
                                  std::span<const RecvPart> receives) override;
  Rank try_receive(int, std::span<std::byte>, std::int64_t&) override {
    throw UsageError("try_receive: NCCL carries no message that nobody has announced");
  }
  void abandon() override {
    const std::lock_guard lock(mutex_);
    is_abandoned_ = true;
  }

  void begin_group() override;
  void end_group() override;
  void drop_group() noexcept override;
  void all_reduce(const void* in, void* out, std::int64_t numel, DType dtype, ReduceOp op) override;
  void all_gather(const void* in, void* out, std::int64_t numel, DType dtype) override;
  void reduce_scatter(const void* in, void* out, std::int64_t numel, DType dtype,
                      ReduceOp op) override;
  void broadcast(const void* in, void* out, std::int64_t bytes, Rank root) override;
  std::string async_error() override;
  void abort(std::string_view why) override;

 private:
  // The time in which this thread needs the communicator to stay. Throws if it has ended.
  class Use {
   public:
    explicit Use(Communicator& of) : of_(of), comm_(of.enter()) {}
    Use(const Use&) = delete;
    ~Use() { of_.leave(); }
    nccl::ncclComm_t comm() const { return comm_; }

   private:
    Communicator& of_;
    nccl::ncclComm_t comm_;
  };

  nccl::ncclComm_t enter();
  void retain();
  void leave();
  void require_size(const char* function, const char* what, std::int64_t number) const;
  void require_peer(const char* function, const char* what, Rank peer, bool may_be_own) const;
  void require_reduction(const char* function, ReduceOp op, DType dtype) const;
  template <typename Body>
  void call(Body body);
  std::string asynchronous(nccl::ncclComm_t comm) const;
  std::string who() const { return concat("rank ", rank_, " of ", size_); }

  const nccl::NcclFunctions& nccl_;
  const Rank rank_;
  const int size_;
  const cudaStream_t stream_;
  int group_depth_ = 0;  // of the thread that uses the communicator

  std::mutex mutex_;  // of everything below
  std::condition_variable changed_;
  nccl::ncclComm_t comm_;  // null once it is aborted
  int uses_ = 0;           // calls under way, and one for an open group
  std::thread::id user_;
  std::string ended_;  // why no call is possible any more
  bool is_aborting_ = false;
  bool is_abandoned_ = false;
  bool is_in_graph_ = false;  // something was captured
};

nccl::ncclComm_t Communicator::enter() {
  const std::lock_guard lock(mutex_);
  if (!ended_.empty()) throw DeviceError(concat(who(), ": NCCL's communicator is gone: ", ended_));
  auto capture = cudaStreamCaptureStatusNone;
  if (cudaStreamIsCapturing(stream_, &capture) == cudaSuccess)
    is_in_graph_ = is_in_graph_ || capture != cudaStreamCaptureStatusNone;
  ++uses_;
  user_ = std::this_thread::get_id();
  return comm_;
}

void Communicator::retain() {
  const std::lock_guard lock(mutex_);
  ++uses_;
}

void Communicator::leave() {
  const std::lock_guard lock(mutex_);
  --uses_;
  changed_.notify_all();
}

template <typename Body>
void Communicator::call(Body body) {
  try {
    const Use use(*this);
    body(use.comm());
  } catch (const nccl::Failure& failure) {
    drop_group();
    const std::string text = concat(who(), ": ", failure.text);
    // After any other error NCCL allows nothing but an abort.
    if (failure.result != nccl::ncclInvalidArgument) {
      const std::lock_guard lock(mutex_);
      if (ended_.empty()) ended_ = text;
    }
    throw DeviceError(text);
  } catch (...) {
    drop_group();
    throw;
  }
}

void Communicator::begin_group() {
  call([&](nccl::ncclComm_t) {
    ADAREDUCE_NCCL(nccl_, ncclGroupStart());
    if (group_depth_++ == 0) retain();
  });
}

void Communicator::end_group() {
  if (group_depth_ == 0) throw UsageError("end_group: no group is open");
  call([&](nccl::ncclComm_t) {
    const bool is_last = --group_depth_ == 0;
    const nccl::ncclResult_t result = nccl_.ncclGroupEnd();
    if (is_last) leave();
    nccl::check(nccl_, result, "ncclGroupEnd()", __FILE__, __LINE__);
  });
}

void Communicator::drop_group() noexcept {
  if (group_depth_ == 0) return;
  // A refused call makes NCCL forget the group when it ends.
  (void)nccl_.ncclSend(nullptr, 0, nccl::ncclInt8, 0, nullptr, stream_);
  for (; group_depth_ > 0; --group_depth_) (void)nccl_.ncclGroupEnd();
  leave();
}

void Communicator::require_size(const char* function, const char* what, std::int64_t number) const {
  if (number < 0) throw UsageError(concat(function, ": ", what, " must be >= 0, got ", number));
}

void Communicator::require_peer(const char* function, const char* what, Rank peer,
                                bool may_be_own) const {
  if (peer >= 0 && peer < size_ && (may_be_own || peer != rank_)) return;
  throw UsageError(concat(function, ": ", what, " must be one of the ", size_, " ranks",
                          may_be_own ? "" : " and not this one", ", got ", peer));
}

void Communicator::require_reduction(const char* function, ReduceOp op, DType dtype) const {
  if (nccl_can_reduce(op, dtype)) return;
  throw UsageError(concat(function, ": dtype must be one that NCCL reduces by ", name_of(op),
                          ", got ", name_of(dtype)));
}

std::unique_ptr<Exchange> Communicator::start(int, std::span<const SendPart> sends,
                                              std::span<const RecvPart> receives) {
  bool has_bytes = false;
  const auto look_at = [&](const auto& part) {
    require_peer("start", "peer", part.peer, false);
    require_size("start", "bytes", part.bytes);
    has_bytes = has_bytes || part.bytes > 0;
  };
  call([&](nccl::ncclComm_t) {
    std::for_each(sends.begin(), sends.end(), look_at);
    std::for_each(receives.begin(), receives.end(), look_at);
  });
  if (!has_bytes) return std::make_unique<EnqueuedExchange>();
  begin_group();
  call([&](nccl::ncclComm_t comm) {
    // Sizes agree, so both sides leave out the same messages.
    for (const SendPart& part : sends) {
      const auto bytes = static_cast<std::size_t>(part.bytes);
      if (bytes > 0)
        ADAREDUCE_NCCL(nccl_, ncclSend(part.data, bytes, nccl::ncclInt8, part.peer, comm, stream_));
    }
    for (const RecvPart& part : receives) {
      const auto bytes = static_cast<std::size_t>(part.bytes);
      if (bytes > 0)
        ADAREDUCE_NCCL(nccl_, ncclRecv(part.data, bytes, nccl::ncclInt8, part.peer, comm, stream_));
    }
  });
  end_group();
  return std::make_unique<EnqueuedExchange>();
}

void Communicator::all_reduce(const void* in, void* out, std::int64_t numel, DType dtype,
                              ReduceOp op) {
  call([&](nccl::ncclComm_t comm) {
    require_size("all_reduce", "numel", numel);
    require_reduction("all_reduce", op, dtype);
    if (numel == 0) return;
    ADAREDUCE_NCCL(nccl_, ncclAllReduce(in, out, static_cast<std::size_t>(numel),
                                        nccl::type_of(dtype), nccl::op_of(op), comm, stream_));
  });
}

void Communicator::all_gather(const void* in, void* out, std::int64_t numel, DType dtype) {
  call([&](nccl::ncclComm_t comm) {
    require_size("all_gather", "numel", numel);
    if (numel == 0) return;
    const auto bytes = static_cast<std::size_t>(numel * size_of(dtype));
    ADAREDUCE_NCCL(nccl_, ncclAllGather(in, out, bytes, nccl::ncclInt8, comm, stream_));
  });
}

void Communicator::reduce_scatter(const void* in, void* out, std::int64_t numel, DType dtype,
                                  ReduceOp op) {
  call([&](nccl::ncclComm_t comm) {
    require_size("reduce_scatter", "numel", numel);
    require_reduction("reduce_scatter", op, dtype);
    if (numel == 0) return;
    ADAREDUCE_NCCL(nccl_, ncclReduceScatter(in, out, static_cast<std::size_t>(numel),
                                            nccl::type_of(dtype), nccl::op_of(op), comm, stream_));
  });
}

void Communicator::broadcast(const void* in, void* out, std::int64_t bytes, Rank root) {
  call([&](nccl::ncclComm_t comm) {
    require_size("broadcast", "bytes", bytes);
    require_peer("broadcast", "root", root, true);
    if (bytes == 0) return;
    ADAREDUCE_NCCL(nccl_, ncclBroadcast(in, out, static_cast<std::size_t>(bytes), nccl::ncclInt8,
                                        root, comm, stream_));
  });
}

std::string Communicator::asynchronous(nccl::ncclComm_t comm) const {
  auto error = nccl::ncclSuccess;
  const nccl::ncclResult_t result = nccl_.ncclCommGetAsyncError(comm, &error);
  if (result != nccl::ncclSuccess) error = result;
  if (error == nccl::ncclSuccess || error == nccl::ncclInProgress) return {};
  return concat(who(), ": ", nccl::words_of(nccl_, error));
}

std::string Communicator::async_error() {
  const nccl::RelaxedCapture relaxed;
  const std::lock_guard lock(mutex_);
  return comm_ == nullptr ? ended_ : asynchronous(comm_);
}

void Communicator::abort(std::string_view why) {
  const nccl::RelaxedCapture relaxed;
  nccl::ncclComm_t comm = nullptr;
  bool is_in_graph = false;
  {
    std::unique_lock lock(mutex_);
    if (comm_ == nullptr || is_aborting_) return;
    is_aborting_ = true;
    if (ended_.empty()) ended_ = !why.empty() ? why : asynchronous(comm_);
    if (ended_.empty()) ended_ = "it was aborted";
    if (uses_ > 0 && user_ == std::this_thread::get_id()) {
      lock.unlock();
      drop_group();
      lock.lock();
    }
    // ncclCommAbort frees what a call that is under way works on.
    changed_.wait_for(lock, nccl::kGrace, [&] { return uses_ == 0; });
    comm = std::exchange(comm_, nullptr);
    is_in_graph = is_in_graph_;
  }
  nccl::end_communicator(nccl_.ncclCommAbort, comm, is_in_graph);
  const std::lock_guard lock(mutex_);
  is_aborting_ = false;
  changed_.notify_all();
}

Communicator::~Communicator() {
  drop_group();
  const nccl::RelaxedCapture relaxed;
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [&] { return !is_aborting_; });
  if (comm_ == nullptr) return;
  // ncclCommDestroy waits for the ranks of the node, of which one may be dead.
  const bool is_healthy = !is_abandoned_ && ended_.empty() && asynchronous(comm_).empty();
  nccl::end_communicator(is_healthy ? nccl_.ncclCommDestroy : nccl_.ncclCommAbort, comm_,
                         is_in_graph_);
}

}  // namespace

std::unique_ptr<NcclCommunicator> NcclCommunicator::make(
    Rank rank, int size, Stream stream,
    const std::function<std::string(const std::string&)>& broadcast) {
  // What rank 0 says is what all act on: else the others would wait for a rank that has thrown.
  constexpr char kOk = 'y', kFailed = 'n';
  const nccl::RelaxedCapture relaxed;
  const bool has_nccl = nccl_status().version != 0;
  nccl::ncclUniqueId id{};
  std::string message;
  if (rank == 0 && has_nccl) {
    const nccl::NcclFunctions& nccl = nccl_functions();
    const nccl::ncclResult_t result = nccl.ncclGetUniqueId(&id);
    message = result == nccl::ncclSuccess
                  ? kOk + std::string(id.internal, sizeof id.internal)
                  : kFailed + concat("ncclGetUniqueId(&id): ", nccl::words_of(nccl, result));
  } else if (rank == 0) {
    message = kFailed + nccl_status().why_not;
  }
  message = broadcast(message);
  const nccl::NcclFunctions& nccl_ = nccl_functions();
  if (message.empty() || message[0] != kOk)
    throw DeviceError(concat("rank 0 of ", size, ": ", message.empty() ? "" : message.substr(1)));
  if (message.size() != 1 + sizeof id.internal)
    throw UsageError(concat("make: broadcast must return rank 0's ", 1 + sizeof id.internal,
                            " bytes, got ", message.size()));
  std::memcpy(id.internal, message.data() + 1, sizeof id.internal);

  nccl::ncclComm_t comm = nullptr;
  nccl::ncclConfig_t config;
  config.blocking = 1;
  try {
    const nccl::ncclResult_t result = nccl_.ncclCommInitRankConfig(&comm, size, id, rank, &config);
    if (result == nccl::ncclInProgress) {
      (void)nccl_.ncclCommAbort(comm);
      throw DeviceError("NCCL_COMM_BLOCKING must not be 0: calls would return too early");
    }
    nccl::check(nccl_, result, "ncclCommInitRankConfig(&comm, size, id, rank, &config)", __FILE__,
                __LINE__);
  } catch (const nccl::Failure& failure) {
    throw DeviceError(concat("rank ", rank, " of ", size, ": ", failure.text));
  }
  return std::make_unique<Communicator>(nccl_, rank, size, stream, comm);
}

}  // namespace adareduce::cuda
