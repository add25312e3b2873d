#pragma once
#include <memory>
#include <vector>

#include "engine/cuda/standalone_tables.h"
#include "kernels/cuda/peer_kernels.h"

namespace adareduce::cuda {

/// Ranks of one process that share the current GPU: kernels on peer memory over plain buffers, a
/// stream for each rank. For tests and benchmarks. Destroying it waits for the GPU.
class VirtualRanks {
 public:
  /// `num_blocks` 0: as many as fit beside each other for all ranks.
  VirtualRanks(int size, std::int64_t numel, DType dtype, std::vector<TensorSegment> segments,
               int num_blocks, double deadline_seconds);
  ~VirtualRanks();
  VirtualRanks(const VirtualRanks&) = delete;
  VirtualRanks& operator=(const VirtualRanks&) = delete;

  int size() const;
  void* input(Rank rank) const;
  void* output(Rank rank) const;
  /// Null pointers: not wanted. Enqueues the part of one rank.
  void adasum(Rank rank, Stream stream, double* orthogonality, double* cancellation);
  void reduce(Rank rank, Stream stream, Elementwise op, double divisor, double* squares);
  /// 0, or 1 + the rank that did not come.
  std::uint32_t error() const;

 private:
  struct Memory;
  PeerContext context(Rank rank, PeerView& view) const;

  const std::int64_t numel_;
  const DType dtype_;
  StandaloneTables tables_;
  GramTree tree_;
  std::unique_ptr<Memory> memory_;
};

void synchronize_device();
/// A stream for as long as the process lives.
void* make_stream();
void synchronize_stream(void* stream);
/// Captures what this thread enqueues on `stream` and what joins it; the graph lives as long as the
/// process.
void begin_capture(void* stream);
void* end_capture(void* stream);
void launch_graph(void* graph, void* stream);

}  // namespace adareduce::cuda
