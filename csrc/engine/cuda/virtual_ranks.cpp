#include "engine/cuda/virtual_ranks.h"

#include <algorithm>

#include "collectives/adasum_tree.h"
#include "engine/cuda/device_memory.h"

namespace adareduce::cuda {
namespace {

// A test needs no more.
constexpr int kMostBlocks = 128;

DeviceBuffer zeros(std::int64_t bytes) {
  DeviceBuffer buffer(std::max<std::int64_t>(bytes, 16));
  ADAREDUCE_CUDA(cudaMemset(buffer.data(), 0, static_cast<std::size_t>(buffer.bytes())));
  return buffer;
}

int blocks_that_fit(int num_ranks) {
  int device = 0, multiprocessors = 0;
  ADAREDUCE_CUDA(cudaGetDevice(&device));
  ADAREDUCE_CUDA(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
  return std::clamp(multiprocessors / num_ranks, 1, kMostBlocks);
}

}  // namespace

struct VirtualRanks::Memory {
  struct OfRank {
    DeviceBuffer in, out, scalars, flags, epochs, stage, work;
  };
  std::vector<OfRank> ranks;
  std::vector<const void*> in;
  std::vector<void*> out;
  std::vector<double*> scalars;
  std::vector<std::uint32_t*> flags;
  std::vector<PeerSync> syncs;
  MappedWord error;
};

VirtualRanks::VirtualRanks(int size, std::int64_t numel, DType dtype,
                           std::vector<TensorSegment> segments, int num_blocks,
                           double deadline_seconds)
    : numel_(numel),
      dtype_(dtype),
      tables_(std::move(segments)),
      tree_(gram_tree(make_adasum_tree(size))),
      memory_(std::make_unique<Memory>()) {
  if (size > kMaxPeers)
    throw UsageError(concat("PeerRanks: size must be at most ", kMaxPeers, ", got ", size));
  if (num_blocks == 0) num_blocks = blocks_that_fit(size);
  const std::int64_t num_segments = tables_.segments().count;
  const std::int64_t bytes = numel * size_of(dtype);
  for (Rank rank = 0; rank < size; ++rank) {
    Memory::OfRank& mine = memory_->ranks.emplace_back();
    mine.in = zeros(bytes);
    mine.out = zeros(bytes);
    mine.scalars = zeros(peer_scalars_numel(num_segments, size) * 8);
    mine.flags = zeros(peer_flags_numel(num_blocks) * 4);
    mine.epochs = zeros(std::int64_t{num_blocks} * 4);
    mine.stage = zeros(peer_stage_bytes(numel, dtype, size));
    mine.work = zeros(peer_work_numel(num_segments, tables_.num_items(), size) * 8);
    memory_->in.push_back(mine.in.data());
    memory_->out.push_back(mine.out.data());
    memory_->scalars.push_back(mine.scalars.at<double>(0));
    memory_->flags.push_back(mine.flags.at<std::uint32_t>(0));
    memory_->syncs.push_back({.num_blocks = num_blocks,
                              .epochs = mine.epochs.at<std::uint32_t>(0),
                              .error = memory_->error.on_device(),
                              .deadline_ns = static_cast<std::uint64_t>(deadline_seconds * 1e9)});
  }
  ADAREDUCE_CUDA(cudaDeviceSynchronize());  // the ranks' streams do not wait for the zeros
}

VirtualRanks::~VirtualRanks() { (void)cudaDeviceSynchronize(); }

int VirtualRanks::size() const { return static_cast<int>(memory_->ranks.size()); }
void* VirtualRanks::input(Rank rank) const {
  return memory_->ranks.at(static_cast<std::size_t>(rank)).in.data();
}
void* VirtualRanks::output(Rank rank) const {
  return memory_->ranks.at(static_cast<std::size_t>(rank)).out.data();
}
std::uint32_t VirtualRanks::error() const { return memory_->error.read(); }

PeerContext VirtualRanks::context(Rank rank, PeerView& view) const {
  view = {rank,
          size(),
          memory_->in.data(),
          memory_->out.data(),
          memory_->scalars.data(),
          memory_->flags.data()};
  return {&view, &memory_->syncs.at(static_cast<std::size_t>(rank)), dtype_, numel_,
          &tables_.segments()};
}

void VirtualRanks::adasum(Rank rank, Stream stream, double* orthogonality, double* cancellation) {
  PeerView view;
  const PeerContext peers = context(rank, view);
  const Memory::OfRank& mine = memory_->ranks[static_cast<std::size_t>(rank)];
  peer_adasum({.peers = peers,
               .tree = tree_,
               .stage = mine.stage.data(),
               .work = mine.work.at<double>(0),
               .orthogonality = orthogonality,
               .cancellation = cancellation},
              stream);
}

void VirtualRanks::reduce(Rank rank, Stream stream, Elementwise op, double divisor,
                          double* squares) {
  PeerView view;
  const PeerContext peers = context(rank, view);
  peer_reduce({.peers = peers,
               .op = op,
               .divisor = divisor,
               .squares = squares,
               .work = memory_->ranks[static_cast<std::size_t>(rank)].work.at<double>(0)},
              stream);
}

void synchronize_device() { ADAREDUCE_CUDA(cudaDeviceSynchronize()); }

void* make_stream() {
  cudaStream_t stream = nullptr;
  ADAREDUCE_CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  return stream;
}

void synchronize_stream(void* stream) {
  ADAREDUCE_CUDA(cudaStreamSynchronize(static_cast<cudaStream_t>(stream)));
}

void begin_capture(void* stream) {
  // Other ranks are threads of this process, and they allocate.
  ADAREDUCE_CUDA(
      cudaStreamBeginCapture(static_cast<cudaStream_t>(stream), cudaStreamCaptureModeThreadLocal));
}

void* end_capture(void* stream) {
  cudaGraph_t graph = nullptr;
  ADAREDUCE_CUDA(cudaStreamEndCapture(static_cast<cudaStream_t>(stream), &graph));
  cudaGraphExec_t executable = nullptr;
  ADAREDUCE_CUDA(cudaGraphInstantiate(&executable, graph, 0));
  return executable;
}

void launch_graph(void* graph, void* stream) {
  ADAREDUCE_CUDA(
      cudaGraphLaunch(static_cast<cudaGraphExec_t>(graph), static_cast<cudaStream_t>(stream)));
}

}  // namespace adareduce::cuda
