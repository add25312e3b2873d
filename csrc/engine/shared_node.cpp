#include "engine/shared_node.h"

#include <sched.h>

#include <algorithm>
#include <cstring>

#include "base/errors.h"
#include "bootstrap/backoff.h"
#include "collectives/allgather.h"
#include "collectives/reduce_scatter.h"
#include "engine/packing.h"

namespace adareduce {
namespace {

// The CPUs that this process may use, a character each.
std::string allowed_cpus() {
  cpu_set_t set;
  CPU_ZERO(&set);
  std::string cpus(CPU_SETSIZE, '0');
  if (sched_getaffinity(0, sizeof set, &set) != 0) return cpus;
  for (std::size_t cpu = 0; cpu < cpus.size(); ++cpu)
    if (CPU_ISSET(cpu, &set)) cpus[cpu] = '1';
  return cpus;
}

bool is_one_node(std::span<const Rank> ranks, const Layout& layout) {
  const auto host = [&](Rank rank) -> const std::string& {
    return layout.processes[static_cast<std::size_t>(rank)].host;
  };
  return std::all_of(ranks.begin(), ranks.end(),
                     [&](Rank rank) { return host(rank) == host(ranks.front()); });
}

int ranks_of_this_node(const Layout& layout) {
  const auto& here = layout.processes[static_cast<std::size_t>(layout.rank)];
  return static_cast<int>(
      std::count_if(layout.processes.begin(), layout.processes.end(),
                    [&](const ProcessInfo& process) { return process.host == here.host; }));
}

// What a rank tells the others of its set before they share memory.
struct Setup {
  bool wants_to = false;
  int workers = 1;
  std::string cpus;  // as allowed_cpus()

  std::string text() const { return concat(wants_to ? "1" : "0", cpus, workers); }
  static Setup of(const std::string& text) {
    return {text.front() == '1', std::stoi(text.substr(1 + CPU_SETSIZE)),
            text.substr(1, CPU_SETSIZE)};
  }
};

std::ptrdiff_t count_cpus(const std::string& cpus) {
  return std::count(cpus.begin(), cpus.end(), '1');
}

// Where threads outnumber cores: on a rank that has been given less than it was told to use, or on
// all together, which the first rank with workers says.
std::string crowding_of(const std::vector<Setup>& setups, std::size_t self, std::ptrdiff_t cpus,
                        std::ptrdiff_t workers) {
  const auto words = [](std::ptrdiff_t many, std::ptrdiff_t cores) {
    return concat(many, " workers (ADAREDUCE_WORKERS) and may use ", cores,
                  cores == 1 ? " core" : " cores", ": they take turns");
  };
  const Setup& mine = setups[self];
  const std::ptrdiff_t my_cpus = count_cpus(mine.cpus);
  if (mine.workers > 1 && mine.workers > my_cpus)
    return concat("this rank has ", words(mine.workers, my_cpus));
  const auto first = std::find_if(setups.begin(), setups.end(),
                                  [](const Setup& setup) { return setup.workers > 1; });
  if (workers > cpus && first - setups.begin() == static_cast<std::ptrdiff_t>(self))
    return concat("the ", setups.size(), " ranks of this node have ", words(workers, cpus));
  return "";
}

// Which of the two channels a board belongs to.
constexpr SharedMemory::Signal signal_of(int board) {
  return board == 0 ? SharedMemory::kRequestBoard : SharedMemory::kBarrierBoard;
}

}  // namespace

std::vector<std::string> gather_strings(Transport& transport, int tag, const std::string& mine,
                                        Seconds timeout, const std::function<void()>& poll) {
  const Context context{transport, cpu_kernels()};
  const auto size = static_cast<std::size_t>(transport.size());
  const auto self = static_cast<std::size_t>(transport.rank());
  auto bytes_of = std::make_unique<std::vector<std::int64_t>>(size, 0);
  auto all = std::make_unique<std::string>();
  const auto run = [&](Task task) {
    const auto deadline = std::chrono::steady_clock::now() +
                          std::chrono::duration_cast<std::chrono::nanoseconds>(timeout);
    Backoff backoff;
    try {
      while (!task.progress()) {
        poll();
        if (std::chrono::steady_clock::now() > deadline)
          throw TransportError(concat("shared memory: not all ranks of the node have come within ",
                                      timeout.count(), " s"));
        backoff.pause();
      }
    } catch (...) {
      if (transport.may_write_late()) {  // neither the task nor its memory can be given back
        task.leak();
        (void)bytes_of.release();
        (void)all.release();
      }
      throw;
    }
  };
  (*bytes_of)[self] = static_cast<std::int64_t>(mine.size());
  run(allgather_numbers(context, tag, *bytes_of, 1));
  std::int64_t begin = 0, total = 0;
  for (std::size_t rank = 0; rank < size; ++rank) {
    if (rank == self) begin = total;
    total += (*bytes_of)[rank];
  }
  all->resize(static_cast<std::size_t>(total));
  std::copy(mine.begin(), mine.end(), all->begin() + begin);
  run(allgather(context, tag, all->data(), *bytes_of));
  std::vector<std::string> texts;
  std::size_t at = 0;
  for (const std::int64_t bytes : *bytes_of) {
    texts.push_back(all->substr(at, static_cast<std::size_t>(bytes)));
    at += static_cast<std::size_t>(bytes);
  }
  return texts;
}

std::unique_ptr<SharedNode> SharedNode::make(Transport& control, std::span<const Rank> ranks,
                                             const Layout& layout, const Settings& settings,
                                             const KernelTable& kernels,
                                             std::shared_ptr<Workers> workers,
                                             std::string& why_not) {
  constexpr int kTag = 9;
  why_not.clear();
  if (ranks.size() < 2) why_not = "there is one rank";
  if (ranks.size() > kMaxSharedRanks)
    why_not = concat("there are more than ", kMaxSharedRanks, " ranks");
  if (!is_one_node(ranks, layout)) why_not = "the ranks are on several nodes";
  if (!why_not.empty()) return nullptr;

  const GatherStrings gather = [&](const std::string& mine) {
    return gather_strings(control, kTag, mine, settings.fail_after, [] {});
  };
  // Ranks may have been given different settings.
  std::vector<Setup> setups;
  for (const std::string& text :
       gather(Setup{settings.shared_memory, settings.workers, allowed_cpus()}.text()))
    setups.push_back(Setup::of(text));
  std::string cpus(CPU_SETSIZE, '0');  // of any of them
  std::ptrdiff_t num_workers = 0;
  for (std::size_t place = 0; place < setups.size(); ++place) {
    if (!setups[place].wants_to && why_not.empty())
      why_not = concat("it is turned off on rank ", ranks[place]);
    for (std::size_t cpu = 0; cpu < cpus.size(); ++cpu)
      if (setups[place].cpus[cpu] == '1') cpus[cpu] = '1';
    num_workers += setups[place].workers;
  }
  if (!why_not.empty()) return nullptr;
  try {
    auto windows =
        SharedWindows::make(control.rank(), control.size(), SharedMemory::segment_bytes(), gather);
    const std::ptrdiff_t num_cpus = count_cpus(cpus);
    const bool may_spin = num_cpus >= ranks_of_this_node(layout);
    const bool may_look_long = may_spin && num_cpus >= num_workers;
    const auto self = static_cast<std::size_t>(control.rank());
    if (workers != nullptr &&
        (num_cpus < num_workers || count_cpus(setups[self].cpus) < settings.workers))
      workers->stop_spinning();
    return std::unique_ptr<SharedNode>(
        new SharedNode(std::move(windows), may_spin, may_look_long, kernels, std::move(workers),
                       crowding_of(setups, self, num_cpus, num_workers)));
  } catch (const SharedMemoryError& error) {
    why_not = error.what();
    return nullptr;
  }
}

bool SharedNode::takes(const Request& request, const Plan& plan) const {
  const int size = memory_.size();
  const auto num_tensors = static_cast<std::int64_t>(request.tensors.size());
  switch (request.collective) {
    case Collective::allreduce:
      if (request.op == ReduceOp::adasum && size > GramTree::kMaxLeaves) return false;
      return plan.is_small ||
             request.num_groups() * kSquaresPerGroup + (request.has_statistics ? num_tensors : 0) <=
                 SharedMemory::kTotalsNumel;
    case Collective::reducescatter:
    case Collective::broadcast:
      return true;
    case Collective::allgather:
      return num_tensors * static_cast<std::int64_t>(sizeof(std::int64_t)) <=
             SharedMemory::kPayloadBytes;
    default:
      return false;
  }
}

void SharedNode::post_payload(const Request& request, const Plan& plan, std::uint64_t sequence) {
  char* const payload = memory_.payload(sequence, memory_.rank());
  if (request.collective == Collective::allgather) {
    for (std::size_t t = 0; t < request.tensors.size(); ++t)
      std::memcpy(payload + t * sizeof(std::int64_t), &request.tensors[t].shape.front(),
                  sizeof(std::int64_t));
  } else if (plan.is_small) {
    if (request.collective == Collective::broadcast && memory_.rank() != request.root) return;
    pack(kernels_, request, plan, payload);
    const std::vector<double>& squares = request.local_squares;
    if (!squares.empty())
      std::memcpy(payload + plan.fused_bytes, squares.data(), squares.size() * sizeof(double));
  }
}

void SharedNode::post(int board, const Header& header) {
  static_assert(sizeof(Header) <= SharedMemory::kHeaderBytes);
  std::memcpy(memory_.header(board, header.sequence, memory_.rank()), &header, sizeof header);
  memory_.signal(signal_of(board), static_cast<std::uint32_t>(header.sequence + 1));
}

SharedMemory::Wait SharedNode::wait_for_posts(int board, std::uint64_t sequence) {
  return memory_.wait(signal_of(board), static_cast<std::uint32_t>(sequence + 1), true);
}

void SharedNode::merge_posts(int board, Header& header) const {
  for (Rank rank = 0; rank < memory_.size(); ++rank) {
    Header theirs;
    std::memcpy(&theirs, memory_.header(board, header.sequence, rank), sizeof theirs);
    if (rank == 0) header.choice = theirs.choice;
    if (rank != memory_.rank()) merge(header, theirs);
  }
}

std::uint64_t SharedNode::placement_of(const Request& request) const {
  if (request.collective != Collective::allreduce || request.prescale != 1.0 ||
      request.tensors.empty())
    return 0;
  Hasher hasher;
  for (const TensorArg& tensor : request.tensors) {
    if (tensor.input != tensor.output) return 0;
    const std::int64_t bytes = tensor.numel() * size_of(tensor.dtype);
    if (bytes == 0) continue;
    const auto place = regions_->find(tensor.input, bytes);
    if (!place) return 0;
    hasher.add(place->region->id()).add(static_cast<std::uint64_t>(place->offset));
  }
  const Signature signature = hasher.finish();
  return signature.low | 1;  // never 0
}

std::vector<void*> SharedNode::addresses_of(const Request& request) const {
  const auto size = static_cast<std::size_t>(memory_.size());
  std::vector<void*> addresses(request.tensors.size() * size, nullptr);
  for (std::size_t t = 0; t < request.tensors.size(); ++t) {
    const TensorArg& tensor = request.tensors[t];
    const std::int64_t bytes = tensor.numel() * size_of(tensor.dtype);
    if (bytes == 0) continue;
    const auto place = regions_->find(tensor.input, bytes);
    for (std::size_t rank = 0; rank < size; ++rank)
      addresses[t * size + rank] =
          place->region->windows().of(static_cast<Rank>(rank)) + place->offset;
  }
  return addresses;
}

bool has_overlap(const Request& request, Rank rank, int size) {
  struct Use {
    const char* begin;
    const char* end;
    std::size_t tensor;
    bool is_output;
  };
  // Most callers' tensors lie apart and in some order: look first, sort then.
  const auto bytes_of = [](const TensorArg& tensor) {
    return tensor.numel() * size_of(tensor.dtype);
  };
  // A rank's rows of a reduce-scatter are not where its output begins.
  const bool keeps_places = request.collective != Collective::reducescatter;
  const auto bytes_out_of = [&](const TensorArg& tensor) {
    const std::int64_t rows = keeps_places ? 0 : tensor.shape.front();
    return rows == 0 ? bytes_of(tensor) : bytes_of(tensor) / rows * rows_of(rows, rank, size);
  };
  bool is_sorted = true, is_in_place = keeps_places;
  const char* end = nullptr;
  for (const TensorArg& tensor : request.tensors) {
    const char* const begin = static_cast<const char*>(tensor.input);
    is_in_place = is_in_place && (tensor.output == tensor.input || tensor.output == nullptr);
    is_sorted = is_sorted && begin >= end;
    end = begin + bytes_of(tensor);
  }
  if (is_sorted && is_in_place) return false;
  std::vector<Use> uses;
  for (std::size_t t = 0; t < request.tensors.size(); ++t) {
    const TensorArg& tensor = request.tensors[t];
    const auto add = [&](const void* memory, std::int64_t bytes, bool is_output) {
      const char* const begin = static_cast<const char*>(memory);
      if (memory != nullptr && bytes > 0) uses.push_back({begin, begin + bytes, t, is_output});
    };
    const bool is_same = keeps_places && tensor.output == tensor.input;
    add(tensor.input, bytes_of(tensor), is_same);
    if (!is_same) add(tensor.output, bytes_out_of(tensor), true);
  }
  std::sort(uses.begin(), uses.end(),
            [](const Use& a, const Use& b) { return std::less<const char*>()(a.begin, b.begin); });
  // Two inputs may share memory. What ends last among those before, and what of them is written.
  const char* last = nullptr;
  const char* last_written = nullptr;
  for (const Use& use : uses) {
    if (use.begin < last_written || (use.is_output && use.begin < last)) return true;
    last = std::max(last, use.end);
    if (use.is_output) last_written = std::max(last_written, use.end);
  }
  return false;
}

}  // namespace adareduce
