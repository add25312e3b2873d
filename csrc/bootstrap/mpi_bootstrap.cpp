#include "bootstrap/mpi_bootstrap.h"

#include <algorithm>
#include <cstring>
#include <numeric>

#include "base/errors.h"
#include "bootstrap/backoff.h"

namespace adareduce {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int kWordsTag = 0;  // barrier_among() is called with other tags
// On the user's communicator, where they are unlikely to be anyone else's.
constexpr int kMeetingTag = 19162;
constexpr int kCreationTag = 19163;
// One round of an all-gather. Bounds what a rank with a long text costs the others.
constexpr std::int64_t kBlockBytes = 1 << 20;

// Operations that are given up if this scope is left early, together with the memory they use.
// MPI may still write into that memory, so it must outlive them: it is leaked.
template <typename Memory>
class Flight {
 public:
  explicit Flight(const adareduce_mpi_plugin& plugin) : plugin_(plugin) {}
  ~Flight() {
    for (adareduce_op* op : ops) plugin_.release(op);
    if (!landed) memory.release();
  }
  Flight(const Flight&) = delete;
  Flight& operator=(const Flight&) = delete;

  std::unique_ptr<Memory> memory = std::make_unique<Memory>();
  std::vector<adareduce_op*> ops;
  bool landed = false;

 private:
  const adareduce_mpi_plugin& plugin_;
};

bool is_done(const adareduce_mpi_plugin& plugin, adareduce_op* op) {
  std::int32_t done = 0;
  adareduce_error error{};
  check_plugin(plugin.test(op, &done, &error), error);
  return done != 0;
}

}  // namespace

void check_plugin(int status, const adareduce_error& error) {
  if (status != ADAREDUCE_OK) throw TransportError(error.text, error.peer);
}

std::shared_ptr<MpiBootstrap> MpiBootstrap::make(const adareduce_mpi_plugin* plugin,
                                                 std::uint64_t handle,
                                                 const std::vector<Rank>& ranks, Seconds timeout) {
  if (plugin->version != ADAREDUCE_MPI_PLUGIN_VERSION || plugin->bytes != sizeof *plugin)
    throw UsageError(concat("init: adareduce._mpi must be of the same build as adareduce._core (",
                            "plugin version ", ADAREDUCE_MPI_PLUGIN_VERSION, "), got version ",
                            plugin->version, "; reinstall adareduce"));
  if (!plugin->is_usable())
    throw UsageError("init: MPI must be initialised and not finalised; import mpi4py.MPI first");
  if (!plugin->has_thread_multiple())
    throw UsageError(concat("init: MPI must provide MPI_THREAD_MULTIPLE, ",
                            plugin->library_version(), " was initialised with less"));
  adareduce_error error{};
  adareduce_comm* borrowed = nullptr;
  check_plugin(plugin->borrow(handle, &borrowed, &error), error);
  MpiBootstrap theirs(plugin, borrowed);
  std::vector<Rank> members = ranks;
  if (members.empty()) {
    members.resize(static_cast<std::size_t>(theirs.size()));
    std::iota(members.begin(), members.end(), 0);
  }
  // MPI's creation of a communicator cannot be timed out, so everyone is awaited first.
  theirs.gather_words(0, members, kMeetingTag, "init", timeout);
  const std::vector<std::int32_t> chosen(members.begin(), members.end());
  adareduce_comm* own = nullptr;
  check_plugin(plugin->create(borrowed, chosen.data(), static_cast<std::int32_t>(chosen.size()),
                              kCreationTag, &own, &error),
               error);
  return std::shared_ptr<MpiBootstrap>(new MpiBootstrap(plugin, own));
}

MpiBootstrap::MpiBootstrap(const adareduce_mpi_plugin* plugin, adareduce_comm* comm)
    : plugin_(plugin), comm_(comm) {}

MpiBootstrap::~MpiBootstrap() {
  adareduce_error error{};
  plugin_->free(comm_, abandoned_, &error);
}

Rank MpiBootstrap::rank() const { return plugin_->rank(comm_); }
int MpiBootstrap::size() const { return plugin_->size(comm_); }

// Point to point, although MPI has collectives for this: they cannot say who is missing.
std::vector<std::int64_t> MpiBootstrap::gather_words(std::int64_t word, std::span<const Rank> ranks,
                                                     int tag, const char* what, Seconds timeout) {
  struct Memory {
    std::int64_t mine = 0;
    std::vector<std::int64_t> theirs;
  };
  Flight<Memory> flight(*plugin_);
  Memory& memory = *flight.memory;
  memory.mine = word;
  memory.theirs.assign(ranks.size(), word);
  std::vector<std::size_t> awaited;  // by the operation: which of `ranks`
  try {
    adareduce_error error{};
    for (std::size_t i = 0; i < ranks.size(); ++i) {
      if (ranks[i] == rank()) continue;
      const adareduce_message send{&memory.mine, sizeof word, ranks[i]};
      const adareduce_message receive{&memory.theirs[i], sizeof word, ranks[i]};
      adareduce_op* op = nullptr;
      check_plugin(plugin_->start(comm_, tag, &send, 1, &receive, 1, &op, &error), error);
      flight.ops.push_back(op);
      awaited.push_back(i);
    }
    const auto deadline = Clock::now() + timeout;
    for (Backoff backoff; !flight.ops.empty();) {
      for (std::size_t i = flight.ops.size(); i-- > 0;) {
        if (!is_done(*plugin_, flight.ops[i])) continue;
        plugin_->release(flight.ops[i]);
        flight.ops.erase(flight.ops.begin() + static_cast<std::ptrdiff_t>(i));
        awaited.erase(awaited.begin() + static_cast<std::ptrdiff_t>(i));
        backoff.reset();
      }
      if (flight.ops.empty()) break;
      if (Clock::now() > deadline) {
        std::vector<Rank> missing;
        for (const std::size_t i : awaited) missing.push_back(ranks[i]);
        throw TransportError(concat(what, ": no sign of rank", missing.size() > 1 ? "s " : " ",
                                    join_words(missing), " within ", timeout.count(), " s"),
                             missing.front());
      }
      backoff.pause();
    }
  } catch (...) {
    abandon();
    throw;
  }
  flight.landed = true;
  return memory.theirs;
}

std::string MpiBootstrap::gather_blocks(std::string block, Seconds timeout) {
  struct Memory {
    std::string mine;
    std::string all;
  };
  Flight<Memory> flight(*plugin_);
  Memory& memory = *flight.memory;
  memory.mine = std::move(block);
  memory.all.resize(memory.mine.size() * static_cast<std::size_t>(size()));
  try {
    adareduce_error error{};
    adareduce_op* op = nullptr;
    check_plugin(
        plugin_->start_allgather(comm_, memory.mine.data(), memory.all.data(),
                                 static_cast<std::int64_t>(memory.mine.size()), &op, &error),
        error);
    flight.ops.push_back(op);
    const auto deadline = Clock::now() + timeout;
    for (Backoff backoff; !is_done(*plugin_, op); backoff.pause()) {
      if (Clock::now() > deadline)
        throw TransportError(concat("allgather: not complete within ", timeout.count(),
                                    " s, though all ranks came"));
    }
  } catch (...) {
    abandon();
    throw;
  }
  flight.landed = true;
  return std::move(memory.all);
}

void MpiBootstrap::barrier_among(std::span<const Rank> ranks, int tag, Seconds timeout) {
  gather_words(0, ranks, tag, "barrier", timeout);
}

void MpiBootstrap::barrier(Seconds timeout) {
  std::vector<Rank> everyone(static_cast<std::size_t>(size()));
  std::iota(everyone.begin(), everyone.end(), 0);
  barrier_among(everyone, kWordsTag, timeout);
}

std::vector<std::string> MpiBootstrap::allgather(std::string_view mine, Seconds timeout) {
  std::vector<Rank> everyone(static_cast<std::size_t>(size()));
  std::iota(everyone.begin(), everyone.end(), 0);
  const auto lengths = gather_words(static_cast<std::int64_t>(mine.size()), everyone, kWordsTag,
                                    "allgather", timeout);
  const std::int64_t longest = *std::max_element(lengths.begin(), lengths.end());
  std::vector<std::string> all(lengths.size());
  for (std::int64_t offset = 0; offset < longest; offset += kBlockBytes) {
    const auto width = static_cast<std::size_t>(std::min(kBlockBytes, longest - offset));
    std::string block;
    if (offset < static_cast<std::int64_t>(mine.size()))
      block = mine.substr(static_cast<std::size_t>(offset), width);
    block.resize(width);
    const std::string blocks = gather_blocks(std::move(block), timeout);
    for (std::size_t rank = 0; rank < all.size(); ++rank) {
      const std::int64_t left = lengths[rank] - offset;
      if (left > 0)
        all[rank].append(blocks, rank * width, std::min(width, static_cast<std::size_t>(left)));
    }
  }
  return all;
}

}  // namespace adareduce
