#include "communicator.h"

#include <unistd.h>

#include <chrono>
#include <cstdlib>
#include <cstring>

namespace fake_nccl {
namespace {

constexpr double kGoodbyeSeconds = 20.0;

struct Hello {
  char host[96] = {};
  char gpu[32] = {};
  std::int32_t size = 0;
  std::int32_t version = 0;
};

std::size_t index(int rank) { return static_cast<std::size_t>(rank); }

std::string words_of(const Header& header) {
  const auto type = name_of(static_cast<nccl::ncclDataType_t>(header.type));
  const std::string what = std::to_string(header.count) + " " + type;
  const std::string captured = header.is_captured != 0 ? ", captured" : "";
  switch (static_cast<Kind>(header.kind)) {
    case Kind::hello:
      return "the beginning";
    case Kind::connect:
      return "its first operation with this rank";
    case Kind::goodbye:
      return "the end of the communicator";
    case Kind::all_reduce:
      return "AllReduce of " + what + ", " + name_of(static_cast<nccl::ncclRedOp_t>(header.op)) +
             captured;
    case Kind::reduce_scatter:
      return "ReduceScatter of " + what + ", " +
             name_of(static_cast<nccl::ncclRedOp_t>(header.op)) + captured;
    case Kind::all_gather:
      return "AllGather of " + what + captured;
    case Kind::broadcast:
      return "Broadcast of " + what + " from " + std::to_string(header.root) + captured;
    case Kind::send:
    case Kind::receive:
      return "a message of " + what + captured;
  }
  return "nonsense";
}

Header header_of(const Op& op, bool is_captured, std::uint64_t sequence) {
  Header header;
  // A message is the same thing on both sides.
  header.kind = static_cast<std::uint32_t>(op.kind == Kind::receive ? Kind::send : op.kind);
  header.count = op.count;
  header.type = op.type;
  if (op.kind == Kind::all_reduce || op.kind == Kind::reduce_scatter) header.op = op.op;
  if (op.kind == Kind::broadcast) header.root = op.root;
  header.is_captured = is_captured ? 1 : 0;
  header.sequence = sequence;
  return header;
}

Header header_of(Kind kind) {
  Header header;
  header.kind = static_cast<std::uint32_t>(kind);
  return header;
}

}  // namespace

Span read_by(const Op& op, int rank, int size) {
  const std::size_t bytes = op.bytes();
  switch (op.kind) {
    case Kind::reduce_scatter:
      return {static_cast<const char*>(op.in), bytes * index(size)};
    case Kind::broadcast:
      return {static_cast<const char*>(op.in), rank == op.root ? bytes : 0};
    case Kind::receive:
      return {};
    default:
      return {static_cast<const char*>(op.in), bytes};
  }
}

Span written_by(const Op& op, int, int size) {
  const auto* out = static_cast<const char*>(op.out);
  if (op.kind == Kind::send) return {};
  return {out, op.kind == Kind::all_gather ? op.bytes() * index(size) : op.bytes()};
}

Communicator::Communicator(const std::string& name, int rank, int size, int version)
    : mesh_(name, rank, size), is_connected_(index(size), false) {
  cudaEventCreateWithFlags(&event_, cudaEventDisableTiming);
  use_device("init");
  say_hello(version);
}

Communicator::~Communicator() { cudaEventDestroy(event_); }

void Communicator::use_device(const char* when) {
  const cudaError_t status = cudaEventQuery(event_);
  if (status != cudaSuccess)
    fail(nccl::ncclUnhandledCudaError, std::string(when) + ": " + cudaGetErrorName(status), true);
}

void Communicator::say_hello(int version) {
  Hello mine;
  const char* host = std::getenv("NCCL_HOSTID");
  if (host != nullptr)
    std::strncpy(mine.host, host, sizeof mine.host - 1);
  else
    gethostname(mine.host, sizeof mine.host - 1);
  int device = 0;
  cudaGetDevice(&device);
  cudaDeviceGetPCIBusId(mine.gpu, sizeof mine.gpu, device);
  mine.size = size();
  mine.version = version;
  std::vector<Hello> all(index(size()), mine);
  Traffic traffic(size());
  Header header = header_of(Kind::hello);
  header.bytes = sizeof(Hello);
  for (std::size_t peer = 0; peer < all.size(); ++peer) {
    if (peer == index(rank())) continue;
    traffic.out[peer].push_back({header, &mine});
    traffic.in[peer].push_back({header, &all[peer]});
  }
  const auto describe_any = [this](const Header& expected, const Header& got, int peer) {
    return describe(expected, got, peer);
  };
  mesh_.exchange(traffic, describe_any, 60.0);
  const char* may_share = std::getenv("NCCL_MULTI_RANK_GPU_ENABLE");
  const bool knows_sharing = version >= 23003;
  const bool shares = knows_sharing && may_share != nullptr && std::strcmp(may_share, "1") == 0;
  for (std::size_t a = 0; a < all.size(); ++a) {
    if (all[a].version != version || all[a].size != size())
      throw Mismatch{"rank " + std::to_string(a) + " has another version or another size"};
    for (std::size_t b = 0; b < a && !shares; ++b)
      if (std::strcmp(all[a].host, all[b].host) == 0 && std::strcmp(all[a].gpu, all[b].gpu) == 0)
        // The words that callers look for.
        throw Mismatch{knows_sharing ? "Multiple Ranks are using the same GPU/Partition."
                                     : "Duplicate GPU detected : rank " + std::to_string(b) +
                                           " and rank " + std::to_string(a)};
  }
}

std::string Communicator::describe(const Header& expected, const Header& got, int peer) const {
  if (got.magic != expected.magic) return "rank " + std::to_string(peer) + " talks nonsense";
  std::string text = "rank " + std::to_string(rank()) + " is at " + words_of(expected) +
                     ", but rank " + std::to_string(peer) + " is at " + words_of(got);
  if (got.sequence != expected.sequence)
    text += " (collectives " + std::to_string(expected.sequence) + " and " +
            std::to_string(got.sequence) + ")";
  return text;
}

nccl::ncclResult_t Communicator::connect(const std::vector<Op>& ops) {
  Traffic traffic(size());
  const auto meet = [&](std::size_t peer) {
    if (peer == index(rank()) || is_connected_[peer]) return;
    is_connected_[peer] = true;
    traffic.out[peer].push_back({header_of(Kind::connect), nullptr});
    traffic.in[peer].push_back({header_of(Kind::connect), nullptr});
  };
  for (const Op& op : ops) {
    if (!op.is_collective()) meet(index(op.root));
    for (std::size_t peer = 0; op.is_collective() && peer < index(size()); ++peer) meet(peer);
  }
  try {
    mesh_.exchange(traffic, [this](const Header& expected, const Header& got, int peer) {
      return describe(expected, got, peer);
    });
    return nccl::ncclSuccess;
  } catch (const Mismatch& mismatch) {
    fail(nccl::ncclInvalidUsage, mismatch.text, true);
  } catch (const PeerGone& gone) {
    fail(nccl::ncclRemoteError, "rank " + std::to_string(gone.peer) + " is gone", false);
  } catch (const Interrupted&) {
    return nccl::ncclInternalError;
  }
  return result_;
}

void Communicator::move(const std::vector<Op>& ops, bool is_captured) {
  const auto ranks = index(size()), self = index(rank());
  Traffic traffic(size());
  std::vector<std::vector<char>> received;  // for reductions
  std::vector<std::vector<const void*>> inputs(ops.size());
  const auto each_peer = [&](const auto& body) {
    for (std::size_t peer = 0; peer < ranks; ++peer)
      if (peer != self) body(peer);
  };
  for (std::size_t i = 0; i < ops.size(); ++i) {
    const Op& op = ops[i];
    if (!op.is_collective()) continue;
    const Header plain = header_of(op, is_captured, ++sequence_);
    const std::size_t bytes = op.bytes();
    const auto* in = static_cast<const char*>(op.in);
    inputs[i].resize(ranks);
    inputs[i][self] = op.kind == Kind::reduce_scatter ? in + self * bytes : in;
    each_peer([&](std::size_t peer) {
      Outgoing give{plain, in};
      Incoming take{plain, nullptr};
      give.header.bytes = take.header.bytes = bytes;
      if (op.kind == Kind::broadcast) {
        give.header.bytes = self == index(op.root) ? bytes : 0;
        take.header.bytes = peer == index(op.root) ? bytes : 0;
        take.data = op.out;
      } else if (op.kind == Kind::all_gather) {
        take.data = static_cast<char*>(op.out) + peer * bytes;
      } else {
        received.emplace_back(bytes);
        inputs[i][peer] = take.data = received.back().data();
        if (op.kind == Kind::reduce_scatter) give.data = in + peer * bytes;
      }
      traffic.out[peer].push_back(give);
      traffic.in[peer].push_back(take);
    });
  }
  // NCCL keeps messages apart from collectives.
  std::deque<const Op*> to_self;
  for (const Op& op : ops) {
    if (op.is_collective()) continue;
    Header header = header_of(op, is_captured, 0);
    header.bytes = op.bytes();
    if (op.root == rank() && op.kind == Kind::send) to_self.push_back(&op);
    if (op.root == rank()) continue;
    if (op.kind == Kind::send)
      traffic.out[index(op.root)].push_back({header, op.in});
    else
      traffic.in[index(op.root)].push_back({header, op.out});
  }
  mesh_.exchange(traffic, [this](const Header& expected, const Header& got, int peer) {
    return describe(expected, got, peer);
  });
  for (std::size_t i = 0; i < ops.size(); ++i) {
    const Op& op = ops[i];
    if (op.kind == Kind::all_reduce || op.kind == Kind::reduce_scatter) {
      reduce(op.op, op.type, inputs[i], op.count, op.out);
    } else if (op.kind == Kind::all_gather) {
      std::memmove(static_cast<char*>(op.out) + self * op.bytes(), op.in, op.bytes());
    } else if (op.kind == Kind::broadcast && self == index(op.root)) {
      std::memmove(op.out, op.in, op.bytes());
    } else if (op.kind == Kind::receive && op.root == rank()) {
      if (to_self.empty() || to_self.front()->bytes() != op.bytes())
        throw Mismatch{"a message to oneself that is not sent in the same group"};
      std::memmove(op.out, to_self.front()->in, op.bytes());
      to_self.pop_front();
    }
  }
  if (!to_self.empty()) throw Mismatch{"a message to oneself that is not received in the group"};
}

void Communicator::run(const std::vector<Op>& ops, bool is_captured) {
  const std::lock_guard lock(running_);
  try {
    if (is_gone_ && result_ == nccl::ncclSuccess)
      throw Mismatch{"a launch of a communicator that is destroyed"};
    if (result_ != nccl::ncclSuccess) throw Interrupted{};
    move(ops, is_captured);
    return;
  } catch (const Mismatch& mismatch) {
    fail(nccl::ncclInvalidUsage, mismatch.text, true);
  } catch (const PeerGone& gone) {
    fail(nccl::ncclRemoteError,
         "rank " + std::to_string(gone.peer) + " is gone, rank " + std::to_string(rank()) +
             " is at " + words_of(header_of(ops[0], is_captured, sequence_)),
         false);
  } catch (const Interrupted&) {
  }
  for (const Op& op : ops) {
    const Span span = written_by(op, rank(), size());
    std::memset(const_cast<char*>(span.begin), 0xff, span.bytes);
  }
}

void Communicator::launched(int change) {
  const std::lock_guard lock(mutex_);
  launches_ += change;
  changed_.notify_all();
}

void Communicator::fail(nccl::ncclResult_t result, const std::string& text, bool is_loud) {
  auto none = nccl::ncclSuccess;
  if (!result_.compare_exchange_strong(none, result)) return;
  say(text, is_loud);
  mesh_.hang_up();
}

void Communicator::wait_for_graphs() {
  if (!is_in_graph_ || std::getenv("FAKE_NCCL_GRAPHS_STAY") == nullptr) return;
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [] { return false; });
}

nccl::ncclResult_t Communicator::destroy() {
  use_device("ncclCommDestroy");
  wait_for_graphs();
  {
    std::unique_lock lock(mutex_);
    const bool done = changed_.wait_for(lock, std::chrono::duration<double>(kGoodbyeSeconds),
                                        [this] { return launches_ == 0; });
    if (!done) fail(nccl::ncclInternalError, "ncclCommDestroy: a launch does not end", true);
  }
  const std::lock_guard lock(running_);
  is_gone_ = true;
  if (result_ != nccl::ncclSuccess) return result_;
  Traffic traffic(size());
  for (std::size_t peer = 0; peer < index(size()); ++peer) {
    if (peer == index(rank())) continue;
    traffic.out[peer].push_back({header_of(Kind::goodbye), nullptr});
    traffic.in[peer].push_back({header_of(Kind::goodbye), nullptr});
  }
  try {
    mesh_.exchange(
        traffic,
        [this](const Header& expected, const Header& got, int peer) {
          return describe(expected, got, peer);
        },
        kGoodbyeSeconds);
  } catch (const Mismatch& mismatch) {
    fail(nccl::ncclInvalidUsage, "ncclCommDestroy: " + mismatch.text, true);
  } catch (const SystemFailure& failure) {
    fail(nccl::ncclSystemError, "ncclCommDestroy: " + failure.text + ": NCCL would hang", true);
  } catch (const PeerGone& gone) {
    fail(nccl::ncclRemoteError, "rank " + std::to_string(gone.peer) + " is gone", false);
  } catch (const Interrupted&) {
  }
  mesh_.hang_up();
  return result_;
}

void Communicator::abort() {
  use_device("ncclCommAbort");
  is_gone_ = true;
  auto none = nccl::ncclSuccess;
  result_.compare_exchange_strong(none, nccl::ncclInternalError);
  mesh_.interrupt();
  mesh_.hang_up();
  {
    const std::lock_guard lock(running_);  // what is on the device comes to an end
  }
  wait_for_graphs();
}

}  // namespace fake_nccl
