#pragma once
#include <atomic>
#include <functional>
#include <memory>
#include <span>
#include <string>

#include "bootstrap/bootstrap.h"
#include "collectives/adasum_tree.h"
#include "collectives/shared_walk.h"
#include "engine/agreement.h"
#include "engine/plan.h"
#include "engine/settings.h"
#include "engine/shared_tuning.h"
#include "transports/shared_memory/shared_regions.h"

namespace adareduce {

/// How many requests that move data have gone which way. Read by any thread.
struct SharedRoutes {
  std::atomic<std::int64_t> on_boards{0};      ///< with the header
  std::atomic<std::int64_t> through_slots{0};  ///< copied into slots and out of them
  std::atomic<std::int64_t> in_place{0};       ///< where the tensors lie: nothing was copied
  std::atomic<std::int64_t> as_messages{0};    ///< as between nodes
};

/// The shared memory of a process set whose ranks sit on one node: agreement, and what data need.
/// Used by whoever drives the process set, but for regions().
class SharedNode {
 public:
  /// Collective over the ranks of `control`; blocks. Null, with the reason in `why_not`, the same
  /// on all ranks, where they cannot share memory or one of them does not want to. `workers`: those
  /// of this rank; null: one.
  static std::unique_ptr<SharedNode> make(Transport& control, std::span<const Rank> ranks,
                                          const Layout& layout, const Settings& settings,
                                          const KernelTable& kernels,
                                          std::shared_ptr<Workers> workers, std::string& why_not);

  SharedMemory& memory() { return memory_; }
  const std::shared_ptr<SharedRegions>& regions() const { return regions_; }
  SharedTuning& tuning() { return tuning_; }
  SharedRoutes& routes() { return routes_; }
  const GramTree& tree() const { return tree_; }  ///< of at most GramTree::kMaxLeaves ranks
  SharedContext context(const SharedChoice& choice) {
    return {memory_,        kernels_,          cpu_peer_kernels(),
            choice.streams, choice.looks_long, workers_.get()};
  }
  /// Threads that walk a large request on this rank.
  int num_workers() const { return workers_ == nullptr ? 1 : workers_->count(); }
  /// What this rank has to say about workers without cores of their own; else empty.
  const std::string& crowding() const { return crowding_; }

  /// Whether a request goes this way: the same on all ranks that agree on it.
  bool takes(const Request& request, const Plan& plan) const;
  /// The part of a request's data that goes with the header; before post().
  void post_payload(const Request& request, const Plan& plan, std::uint64_t sequence);
  /// As adareduce::agree, over a board: post, wait, merge what all have posted.
  void post(int board, const Header& header);
  SharedMemory::Wait wait_for_posts(int board, std::uint64_t sequence);
  void merge_posts(int board, Header& header) const;
  /// A rank has given up. What it had posted before must not make a success of a request that has
  /// failed there; its news come as a message and break the set.
  bool has_lost_any() const { return memory_.has_any(SharedMemory::kGone, 1); }

  /// A hash of where a request's tensors lie in shared memory; 0 where not all do, or where results
  /// would not go to the same places.
  std::uint64_t placement_of(const Request& request) const;
  /// Where every rank's tensors lie, [tensor * ranks + rank], of a request with a placement.
  std::vector<void*> addresses_of(const Request& request) const;

 private:
  SharedNode(std::shared_ptr<SharedWindows> windows, bool may_spin, bool may_look_long,
             const KernelTable& kernels, std::shared_ptr<Workers> workers, std::string crowding)
      : memory_(std::move(windows), may_spin, may_look_long),
        kernels_(kernels),
        workers_(std::move(workers)),
        crowding_(std::move(crowding)) {
    if (memory_.size() <= GramTree::kMaxLeaves) tree_ = gram_tree(make_adasum_tree(memory_.size()));
  }

  SharedMemory memory_;
  const KernelTable& kernels_;
  const std::shared_ptr<Workers> workers_;
  const std::string crowding_;
  const std::shared_ptr<SharedRegions> regions_ = std::make_shared<SharedRegions>();
  SharedTuning tuning_;
  SharedRoutes routes_;
  GramTree tree_;
};

/// Whether a tensor of the request would be read after a result was written there: another one's,
/// or its own where that lies elsewhere in it. `rank` and `size` tell what a reduce-scatter writes.
bool has_overlap(const Request& request, Rank rank, int size);

/// Every rank's text, in rank order. Collective on `transport`; blocks, at most `timeout`. Throws
/// what `poll` throws, which it calls now and then.
std::vector<std::string> gather_strings(Transport& transport, int tag, const std::string& mine,
                                        Seconds timeout, const std::function<void()>& poll);

}  // namespace adareduce
