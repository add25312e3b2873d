// P virtual ranks of one process, each with a stream and buffers of its own, that run the kernels
// over peers' memory. A C library for tests/peer_ranks.py: functions return null or an error's
// text, which stays until the thread's next call.
#include <cuda_runtime.h>

#include <atomic>
#include <deque>
#include <functional>
#include <utility>
#include <vector>

#include "guarded.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/peer_kernels.h"

namespace adareduce::cuda {
namespace {

// Device memory that is zero at first.
template <typename T>
class Memory {
 public:
  explicit Memory(std::int64_t numel = 0) : bytes_(numel * static_cast<std::int64_t>(sizeof(T))) {
    if (bytes_ == 0) return;
    ADAREDUCE_CUDA(cudaMalloc(&data_, static_cast<std::size_t>(bytes_)));
    ADAREDUCE_CUDA(cudaMemset(data_, 0, static_cast<std::size_t>(bytes_)));
    ADAREDUCE_CUDA(cudaStreamSynchronize(nullptr));
  }
  explicit Memory(const std::vector<T>& values) : Memory(static_cast<std::int64_t>(values.size())) {
    if (bytes_ > 0)
      ADAREDUCE_CUDA(cudaMemcpy(data_, values.data(), static_cast<std::size_t>(bytes_),
                                cudaMemcpyHostToDevice));
    ADAREDUCE_CUDA(
        cudaStreamSynchronize(nullptr));  // streams that do not block would not wait for it
  }
  Memory(Memory&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), bytes_(other.bytes_) {}
  Memory& operator=(Memory&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }
  ~Memory() {
    if (data_ != nullptr) (void)cudaFree(data_);
  }
  T* get() const { return static_cast<T*>(data_); }
  std::int64_t bytes() const { return bytes_; }

 private:
  void* data_ = nullptr;
  std::int64_t bytes_ = 0;
};

struct VirtualRank {
  cudaStream_t stream = nullptr;
  cudaGraphExec_t graph = nullptr;
  Memory<char> in, out, stage;
  Memory<double> scalars, work, orthogonality, cancellation, squares;
  Memory<std::uint32_t> flags, epochs;
  Memory<PeerPiece> pieces;
  std::int64_t num_pieces = 0;
  std::uint32_t* error = nullptr;  // mapped host memory
  std::atomic<bool> is_released{true};
  PeerView view;
  PeerSync sync;
};

struct Ranks {
  int size;
  DType dtype;
  std::int64_t numel;
  std::vector<TensorSegment> segments;
  Items items;
  Memory<TensorSegment> segments_on_device;
  Memory<Item> items_on_device;
  Memory<std::int64_t> first_on_device;
  ItemTable item_table;
  SegmentTable table;
  std::deque<VirtualRank> ranks;  // they stay where they are
  std::vector<const void*> in;
  std::vector<void*> out;
  std::vector<double*> scalars;
  std::vector<std::uint32_t*> flags;
  GramTree tree;

  Ranks(int size, int num_blocks, DType dtype, std::int64_t numel,
        std::vector<TensorSegment> all_segments, std::uint64_t deadline_ns, bool in_place)
      : size(size),
        dtype(dtype),
        numel(numel),
        segments(std::move(all_segments)),
        items(make_items(segments.data(), count())),
        segments_on_device(segments),
        items_on_device(items.items),
        first_on_device(items.first) {
    const auto num_items = static_cast<std::int64_t>(items.items.size());
    item_table = {.on_host = items.items.data(),
                  .on_device = items_on_device.get(),
                  .first_on_host = items.first.data(),
                  .first_on_device = first_on_device.get(),
                  .count = num_items};
    table = {segments.data(), segments_on_device.get(), count(), &item_table};
    const std::int64_t bytes = numel * size_of(dtype);
    for (int r = 0; r < size; ++r) {
      VirtualRank& rank = ranks.emplace_back();
      ADAREDUCE_CUDA(cudaStreamCreateWithFlags(&rank.stream, cudaStreamNonBlocking));
      rank.in = Memory<char>(bytes);
      rank.out = Memory<char>(bytes);
      rank.stage = Memory<char>(peer_stage_bytes(numel, dtype, size));
      rank.scalars = Memory<double>(peer_scalars_numel(count(), size));
      rank.work = Memory<double>(peer_work_numel(count(), num_items, size));
      rank.orthogonality = Memory<double>(count());
      rank.cancellation = Memory<double>(count());
      rank.squares = Memory<double>(kSquaresPerGroup * count());
      rank.flags = Memory<std::uint32_t>(peer_flags_numel(num_blocks));
      rank.epochs = Memory<std::uint32_t>(num_blocks);
      ADAREDUCE_CUDA(cudaHostAlloc(reinterpret_cast<void**>(&rank.error), sizeof *rank.error,
                                   cudaHostAllocMapped));
      *rank.error = 0;
    }
    for (VirtualRank& rank : ranks) {
      in.push_back(rank.in.get());
      out.push_back(in_place ? rank.in.get() : rank.out.get());
      scalars.push_back(rank.scalars.get());
      flags.push_back(rank.flags.get());
    }
    for (int r = 0; r < size; ++r) {
      VirtualRank& rank = ranks[static_cast<std::size_t>(r)];
      rank.view = {r, size, in.data(), out.data(), scalars.data(), flags.data()};
      void* error = nullptr;
      ADAREDUCE_CUDA(cudaHostGetDevicePointer(&error, rank.error, 0));
      rank.sync = {num_blocks, rank.epochs.get(), static_cast<std::uint32_t*>(error), deadline_ns};
    }
  }
  ~Ranks() {
    (void)cudaDeviceSynchronize();
    for (VirtualRank& rank : ranks) {
      if (rank.graph != nullptr) (void)cudaGraphExecDestroy(rank.graph);
      (void)cudaStreamDestroy(rank.stream);
      (void)cudaFreeHost(rank.error);
    }
  }
  Ranks(const Ranks&) = delete;

  std::int64_t count() const { return static_cast<std::int64_t>(segments.size()); }
  VirtualRank& rank(int r) { return ranks[static_cast<std::size_t>(r)]; }

  // Every rank's, or all but one's. With `captures`, into a graph that replay() launches.
  void enqueue(bool captures, int absent, const std::function<void(VirtualRank&)>& launch) {
    for (int r = 0; r < size; ++r) {
      if (r == absent) continue;
      VirtualRank& rank = this->rank(r);
      if (captures)
        ADAREDUCE_CUDA(cudaStreamBeginCapture(rank.stream, cudaStreamCaptureModeThreadLocal));
      launch(rank);
      if (!captures) continue;
      cudaGraph_t graph = nullptr;
      ADAREDUCE_CUDA(cudaStreamEndCapture(rank.stream, &graph));
      ADAREDUCE_CUDA(cudaGraphInstantiate(&rank.graph, graph, 0));
      ADAREDUCE_CUDA(cudaGraphDestroy(graph));
    }
  }
  PeerContext context(const VirtualRank& rank) const {
    return {&rank.view, &rank.sync, dtype, numel, &table};
  }
};

}  // namespace

extern "C" {

EXPORT const char* peers_make(int size, int num_blocks, int dtype, std::int64_t numel,
                              std::int64_t num_segments, const std::int64_t* offsets,
                              const std::int64_t* numels, std::uint64_t deadline_ns, int in_place,
                              const signed char* lower, const signed char* upper, Ranks** made) {
  return guarded([&] {
    std::vector<TensorSegment> segments;
    for (std::int64_t s = 0; s < num_segments; ++s) segments.push_back({offsets[s], numels[s]});
    *made = new Ranks(size, num_blocks, static_cast<DType>(dtype), numel, std::move(segments),
                      deadline_ns, in_place != 0);
    (*made)->tree.size = size;
    for (int n = 0; n + 1 < size; ++n) {
      (*made)->tree.lower[n] = lower[n];
      (*made)->tree.upper[n] = upper[n];
    }
  });
}
EXPORT void peers_free(Ranks* ranks) { delete ranks; }

// Of a rank: 0 in, 1 out, 2 orthogonality, 3 cancellation, 4 squares, 5 flags, 6 epochs.
void* place(VirtualRank& rank, int which) {
  switch (which) {
    case 0:
      return rank.in.get();
    case 1:
      return rank.out.get();
    case 2:
      return rank.orthogonality.get();
    case 3:
      return rank.cancellation.get();
    case 4:
      return rank.squares.get();
    case 5:
      return rank.flags.get();
    default:
      return rank.epochs.get();
  }
}
EXPORT const char* peers_write(Ranks* ranks, int rank, int which, const void* from,
                               std::int64_t bytes) {
  return guarded([&] {
    if (bytes == 0) return;
    ADAREDUCE_CUDA(cudaMemcpy(place(ranks->rank(rank), which), from,
                              static_cast<std::size_t>(bytes), cudaMemcpyHostToDevice));
    ADAREDUCE_CUDA(cudaStreamSynchronize(nullptr));
  });
}
EXPORT const char* peers_read(Ranks* ranks, int rank, int which, void* to, std::int64_t bytes) {
  return guarded([&] {
    if (bytes > 0)
      ADAREDUCE_CUDA(cudaMemcpy(to, place(ranks->rank(rank), which),
                                static_cast<std::size_t>(bytes), cudaMemcpyDeviceToHost));
  });
}
// Holds up a rank's stream, puts a new input behind that, and lets the stream go on.
EXPORT const char* peers_hold(Ranks* ranks, int rank) {
  return guarded([&] {
    VirtualRank& held = ranks->rank(rank);
    held.is_released = false;
    ADAREDUCE_CUDA(cudaLaunchHostFunc(
        held.stream, [](void* released) { static_cast<std::atomic<bool>*>(released)->wait(false); },
        &held.is_released));
  });
}
EXPORT const char* peers_write_later(Ranks* ranks, int rank, const void* from, std::int64_t bytes) {
  return guarded([&] {
    VirtualRank& later = ranks->rank(rank);
    ADAREDUCE_CUDA(cudaMemcpyAsync(later.in.get(), from, static_cast<std::size_t>(bytes),
                                   cudaMemcpyHostToDevice, later.stream));
  });
}
EXPORT void peers_release(Ranks* ranks, int rank) {
  ranks->rank(rank).is_released = true;
  ranks->rank(rank).is_released.notify_all();
}
// How many barriers block 0 of `peer` has come to, as `rank` sees it, while kernels run.
EXPORT const char* peers_arrivals(Ranks* ranks, int rank, int peer, std::uint32_t* epoch) {
  return guarded([&] {
    ADAREDUCE_CUDA(cudaMemcpy(epoch, ranks->rank(rank).flags.get() + peer, sizeof *epoch,
                              cudaMemcpyDeviceToHost));
  });
}
EXPORT std::uint32_t peers_error_word(Ranks* ranks, int rank) { return *ranks->rank(rank).error; }
EXPORT void peers_set_error_word(Ranks* ranks, int rank, std::uint32_t word) {
  *static_cast<volatile std::uint32_t*>(ranks->rank(rank).error) = word;
}

EXPORT const char* peers_adasum(Ranks* ranks, int captures, int absent) {
  return guarded([&] {
    ranks->enqueue(captures != 0, absent, [&](VirtualRank& rank) {
      peer_adasum({.peers = ranks->context(rank),
                   .tree = ranks->tree,
                   .stage = rank.stage.get(),
                   .work = rank.work.get(),
                   .orthogonality = rank.orthogonality.get(),
                   .cancellation = rank.cancellation.get()},
                  {rank.stream});
    });
  });
}
// keeps: [size][2], or null where every rank receives everything.
EXPORT const char* peers_reduce(Ranks* ranks, int op, double divisor, const std::int64_t* keeps,
                                int has_squares, int captures, int absent) {
  return guarded([&] {
    ranks->enqueue(captures != 0, absent, [&](VirtualRank& rank) {
      PeerReduceArgs args;
      args.peers = ranks->context(rank);
      args.op = static_cast<Elementwise>(op);
      args.divisor = divisor;
      args.squares = has_squares != 0 ? rank.squares.get() : nullptr;
      args.work = rank.work.get();
      if (keeps != nullptr) {
        args.scatters = true;
        args.keeps = {keeps[2 * rank.view.rank], keeps[2 * rank.view.rank + 1]};
      }
      peer_reduce(args, {rank.stream});
    });
  });
}
// pieces: [num_pieces] of one rank, {from_offset, to_offset, bytes, rank} each.
EXPORT const char* peers_set_pieces(Ranks* ranks, int rank, const std::int64_t* pieces,
                                    std::int64_t num_pieces) {
  return guarded([&] {
    std::vector<PeerPiece> table;
    for (std::int64_t p = 0; p < num_pieces; ++p)
      table.push_back({pieces[4 * p], pieces[4 * p + 1], pieces[4 * p + 2],
                       static_cast<int>(pieces[4 * p + 3]), 0});
    ranks->rank(rank).pieces = Memory<PeerPiece>(table);
    ranks->rank(rank).num_pieces = num_pieces;
  });
}
EXPORT const char* peers_copy(Ranks* ranks, int captures, int absent) {
  return guarded([&] {
    ranks->enqueue(captures != 0, absent, [&](VirtualRank& rank) {
      peer_copy({&rank.view, &rank.sync, rank.pieces.get(), rank.num_pieces}, {rank.stream});
    });
  });
}
EXPORT const char* peers_replay(Ranks* ranks) {
  return guarded([&] {
    for (VirtualRank& rank : ranks->ranks) ADAREDUCE_CUDA(cudaGraphLaunch(rank.graph, rank.stream));
  });
}
EXPORT const char* peers_wait(Ranks* ranks) {
  return guarded([&] {
    for (VirtualRank& rank : ranks->ranks) ADAREDUCE_CUDA(cudaStreamSynchronize(rank.stream));
  });
}
EXPORT const char* peers_wait_for(Ranks* ranks, int rank) {
  return guarded([&] { ADAREDUCE_CUDA(cudaStreamSynchronize(ranks->rank(rank).stream)); });
}
EXPORT void peers_shard(std::int64_t numel, int rank, int size, std::int64_t* bounds) {
  const Range shard = peer_shard(numel, rank, size);
  bounds[0] = shard.begin;
  bounds[1] = shard.end;
}

}  // extern "C"

}  // namespace adareduce::cuda
