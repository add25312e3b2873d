#include "transports/cuda_peer/peer_windows.h"

#include <cstring>

#include "transports/cuda_peer/cuda_call.h"

namespace adareduce::cuda {
namespace {

// Small allocations share a block of the driver's, and a peer that maps one maps its neighbours.
constexpr std::int64_t kBlockBytes = std::int64_t{2} << 20;

// What a rank tells of its window. Bytes: peers run the same build.
struct Offer {
  void* memory = nullptr;
  std::int64_t bytes = 0;
  int device = 0;
  cudaIpcMemHandle_t handle{};
};

class Windows : public PeerWindows {
 public:
  Windows(Rank rank, const std::vector<DeviceFacts>& ranks) : rank_(rank), ranks_(ranks) {
    windows_.resize(ranks.size());
    is_opened_.resize(ranks.size(), false);
  }
  ~Windows() override {
    close();
    if (own_.memory != nullptr) (void)cudaFree(own_.memory);
  }
  Windows(const Windows&) = delete;
  Windows& operator=(const Windows&) = delete;

  void* of(Rank rank) const override { return windows_[static_cast<std::size_t>(rank)]; }
  std::int64_t bytes() const override { return own_.bytes; }

  void allocate(std::int64_t bytes) {
    succeed(cudaGetDevice(&own_.device), "asking for the current GPU");
    if (bytes == 0) return;
    const std::int64_t rounded = (bytes + kBlockBytes - 1) / kBlockBytes * kBlockBytes;
    succeed(cudaMalloc(&own_.memory, static_cast<std::size_t>(rounded)),
            concat("allocating ", rounded, " bytes"));
    own_.bytes = bytes;
    succeed(cudaMemset(own_.memory, 0, static_cast<std::size_t>(rounded)), "writing zeros");
    // Not the whole device: kernels of other ranks on it may be waiting for this one.
    succeed(cudaStreamSynchronize(nullptr), "writing zeros");
    bool is_shared = false;
    for (Rank r = 0; r < size(); ++r) is_shared = is_shared || !is_of_this_process(r);
    if (is_shared)
      succeed(cudaIpcGetMemHandle(&own_.handle, own_.memory),
              "exporting memory for other processes");
  }

  std::string offer() const { return {reinterpret_cast<const char*>(&own_), sizeof own_}; }

  void open(const std::vector<std::string>& offers) {
    for (Rank r = 0; r < size(); ++r) {
      const auto at = static_cast<std::size_t>(r);
      Offer offer;
      std::memcpy(&offer, offers[at].data(), sizeof offer);
      if (offer.bytes == 0) continue;
      if (is_of_this_process(r)) {
        if (offer.device != own_.device) enable_access(offer.device, r);
        windows_[at] = offer.memory;
      } else {
        succeed(cudaIpcOpenMemHandle(&windows_[at], offer.handle, cudaIpcMemLazyEnablePeerAccess),
                concat("opening the memory of rank ", r));
        is_opened_[at] = true;
      }
    }
  }

  void close() override {
    for (std::size_t r = 0; r < windows_.size(); ++r)
      if (is_opened_[r]) {
        (void)cudaIpcCloseMemHandle(windows_[r]);
        is_opened_[r] = false;
      }
  }

 private:
  Rank size() const { return static_cast<Rank>(ranks_.size()); }
  bool is_of_this_process(Rank rank) const {
    const DeviceFacts& mine = ranks_[static_cast<std::size_t>(rank_)];
    const DeviceFacts& theirs = ranks_[static_cast<std::size_t>(rank)];
    return mine.host == theirs.host && mine.pid == theirs.pid && mine.process == theirs.process;
  }
  void enable_access(int device, Rank rank) {
    const cudaError_t status = cudaDeviceEnablePeerAccess(device, 0);
    if (status == cudaErrorPeerAccessAlreadyEnabled)
      (void)cudaGetLastError();
    else
      succeed(status, concat("reading the GPU of rank ", rank));
  }

  Rank rank_;
  std::vector<DeviceFacts> ranks_;
  Offer own_;
  std::vector<void*> windows_;
  std::vector<bool> is_opened_;
};

// What a step has come to: its error's text, or "" and what it has to say.
struct Outcome {
  std::string error;
  std::string result;
};
template <typename Step>
Outcome outcome_of(Step&& step) {
  try {
    return {"", step()};
  } catch (const Error& error) {
    return {error.what(), ""};
  }
}

// Everybody's results, or the error of all ranks that have one, which is the same text on each.
struct Outcomes {
  std::vector<std::string> results;
  std::string error;
};
Outcomes exchange(const Outcome& mine, const Allgather& allgather) {
  Outcomes all;
  const bool failed = !mine.error.empty();
  for (const std::string& bytes : allgather((failed ? "E" + mine.error : "R" + mine.result))) {
    if (!bytes.empty() && bytes[0] == 'R')
      all.results.push_back(bytes.substr(1));
    else {
      all.error += concat(all.error.empty() ? "" : "; ", "rank ", all.results.size(), ": ",
                          bytes.empty() ? "nothing came" : bytes.substr(1));
      all.results.emplace_back();
    }
  }
  return all;
}

}  // namespace

std::unique_ptr<PeerWindows> PeerWindows::make(Rank rank, const std::vector<DeviceFacts>& ranks,
                                               std::int64_t bytes, const Allgather& allgather) {
  auto windows = std::make_unique<Windows>(rank, ranks);
  const auto fail = [](const std::string& text) {
    throw DeviceError(concat("PeerWindows: no memory that all ranks can read, ", text));
  };

  const Outcomes offers = exchange(outcome_of([&] {
                                     windows->allocate(bytes);
                                     return windows->offer();
                                   }),
                                   allgather);
  if (!offers.error.empty()) fail(offers.error);

  const Outcomes opened = exchange(outcome_of([&] {
                                     windows->open(offers.results);
                                     return std::string();
                                   }),
                                   allgather);
  if (!opened.error.empty()) {
    windows->close();
    (void)allgather("");  // nobody frees what a peer still has open
    fail(opened.error);
  }
  return windows;
}

}  // namespace adareduce::cuda
