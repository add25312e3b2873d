#include "transports/cuda_peer/choose_path.h"

#include <algorithm>
#include <map>
#include <set>

#include "base/cuda_plugin.h"
#include "base/errors.h"

namespace adareduce::cuda {
namespace {

using Ranks = std::vector<DeviceFacts>;

std::string version_text(int version) {
  return concat(version / 10000, ".", version / 100 % 100, ".", version % 100);
}

std::string path_text(int path) {
  switch (path) {
    case ADAREDUCE_CUDA_AUTO:
      return "auto";
    case ADAREDUCE_CUDA_NCCL:
      return "nccl";
    case ADAREDUCE_CUDA_PEER:
      return "peer";
    case ADAREDUCE_CUDA_STAGED:
      return "staged";
    case ADAREDUCE_CUDA_SINGLE:
      return "single";
    default:
      return concat("unknown (", path, ")");
  }
}

std::map<std::string, std::vector<int>> ranks_by_gpu(const Ranks& ranks) {
  std::map<std::string, std::vector<int>> by_gpu;
  for (std::size_t r = 0; r < ranks.size(); ++r)
    by_gpu[ranks[r].gpu].push_back(static_cast<int>(r));
  return by_gpu;
}

// Whether NCCL takes these ranks of one GPU.
bool nccl_shares(const Ranks& ranks, const std::vector<int>& sharing) {
  std::set<std::string> hosts;
  bool was_told = true;
  for (const int rank : sharing) {
    const DeviceFacts& facts = ranks[static_cast<std::size_t>(rank)];
    if (!facts.nccl_host.empty()) hosts.insert(facts.nccl_host);
    was_told =
        was_told && facts.nccl_may_share_gpu && facts.nccl_version >= kOldestNcclForSharedGpus;
  }
  return was_told || hosts.size() == sharing.size();
}

// Why NCCL cannot be used; empty where it can.
std::string why_no_nccl(const Ranks& ranks) {
  for (std::size_t r = 0; r < ranks.size(); ++r) {
    const int version = ranks[r].nccl_version;
    if (version == 0) {
      const std::string& reason = ranks[r].nccl_why_not;
      return concat("rank ", r, " has no NCCL", reason.empty() ? "" : ": ", reason);
    }
    if (version < kOldestNccl)
      return concat("rank ", r, " has NCCL ", version_text(version), ", older than ",
                    version_text(kOldestNccl));
    if (version != ranks[0].nccl_version)
      return concat("rank 0 has NCCL ", version_text(ranks[0].nccl_version), " and rank ", r, " ",
                    version_text(version));
  }
  for (const auto& [gpu, sharing] : ranks_by_gpu(ranks))
    if (sharing.size() > 1 && !nccl_shares(ranks, sharing))
      return concat("ranks ", join_words(sharing), " share a GPU, which NCCL ",
                    version_text(ranks[0].nccl_version), " refuses");
  return "";
}

// Why kernels cannot read the memory of all ranks; empty where they can.
std::string why_no_peer_memory(const Ranks& ranks) {
  if (ranks.size() > kMostPeerRanks)
    return concat("there are ", ranks.size(), " ranks, more than ", kMostPeerRanks);
  for (std::size_t r = 0; r < ranks.size(); ++r) {
    if (ranks[r].host != ranks[0].host)
      return concat("rank ", r, " is on another node than rank 0");
    const bool has_other_process =
        std::any_of(ranks.begin(), ranks.end(),
                    [&](const DeviceFacts& other) { return other.process != ranks[r].process; });
    if (has_other_process && !ranks[r].can_share_memory)
      return concat("the GPU of rank ", r, " cannot share memory with other processes");
    for (std::size_t other = 0; other < ranks.size(); ++other)
      if (std::count(ranks[r].unreachable.begin(), ranks[r].unreachable.end(), ranks[other].gpu) >
          0)
        return concat("the GPU of rank ", r, " cannot read that of rank ", other);
  }
  return "";
}

std::string where(const Ranks& ranks) {
  std::set<std::string> hosts;
  for (const DeviceFacts& facts : ranks) hosts.insert(facts.host);
  const std::size_t gpus = ranks_by_gpu(ranks).size();
  return concat(ranks.size(), " ranks on ", gpus, gpus == 1 ? " GPU of " : " GPUs of ",
                hosts.size(), hosts.size() == 1 ? " node" : " nodes");
}

}  // namespace

PathChoice choose_path(const Ranks& ranks) {
  if (ranks.empty()) throw UsageError("choose_path: ranks must not be empty, got none");
  const int wanted = ranks[0].wanted_path;
  for (std::size_t r = 1; r < ranks.size(); ++r)
    if (ranks[r].wanted_path != wanted)
      throw DisagreementError(
          concat("choose_path: the path must be the same on all ranks, rank 0 wants ",
                 path_text(wanted), " and rank ", r, " wants ", path_text(ranks[r].wanted_path)));
  const auto refuse = [&](const std::string& reason) {
    throw UsageError(concat("choose_path: the path must be one that these ranks can take, got ",
                            path_text(wanted), ", but ", reason));
  };

  PathChoice choice;
  std::size_t most_of_one_gpu = 1;
  int multiprocessors = ranks[0].num_multiprocessors;
  for (const auto& [gpu, sharing] : ranks_by_gpu(ranks))
    most_of_one_gpu = std::max(most_of_one_gpu, sharing.size());
  for (const DeviceFacts& facts : ranks)
    multiprocessors = std::min(multiprocessors, facts.num_multiprocessors);
  choice.num_blocks = std::max(1, multiprocessors / static_cast<int>(most_of_one_gpu));
  choice.why_no_peer_memory = why_no_peer_memory(ranks);
  choice.peer_memory_is_possible = choice.why_no_peer_memory.empty();
  if (most_of_one_gpu > 1)
    choice.warning = concat("up to ", most_of_one_gpu,
                            " ranks share a GPU: their kernels take turns, which is slow");

  if (ranks.size() == 1) {
    if (wanted != ADAREDUCE_CUDA_AUTO && wanted != ADAREDUCE_CUDA_SINGLE)
      choice.why = concat("there is one rank, whatever path is wanted (", path_text(wanted), ")");
    else
      choice.why = "there is one rank";
    choice.path = ADAREDUCE_CUDA_SINGLE;
    return choice;
  }

  const std::string no_nccl = why_no_nccl(ranks);
  const std::string asked = wanted == ADAREDUCE_CUDA_AUTO ? "" : ", as was asked for";
  switch (wanted) {
    case ADAREDUCE_CUDA_AUTO:
      choice.path = no_nccl.empty()                  ? ADAREDUCE_CUDA_NCCL
                    : choice.peer_memory_is_possible ? ADAREDUCE_CUDA_PEER
                                                     : ADAREDUCE_CUDA_STAGED;
      break;
    case ADAREDUCE_CUDA_NCCL:
      if (!no_nccl.empty()) refuse(no_nccl);
      choice.path = wanted;
      break;
    case ADAREDUCE_CUDA_PEER:
      if (!choice.peer_memory_is_possible) refuse(choice.why_no_peer_memory);
      choice.path = wanted;
      break;
    case ADAREDUCE_CUDA_STAGED:
      choice.path = wanted;
      break;
    default:
      refuse(concat("there are ", ranks.size(), " ranks"));
  }

  const std::string because =
      asked.empty() ? concat(", because NCCL cannot be used (", no_nccl, ")") : asked;
  if (choice.path == ADAREDUCE_CUDA_NCCL)
    choice.why =
        concat("NCCL ", version_text(ranks[0].nccl_version), " connects ", where(ranks), asked);
  else if (choice.path == ADAREDUCE_CUDA_PEER)
    choice.why = concat("kernels read each other's memory, ", where(ranks), because);
  else if (asked.empty())
    choice.why = concat("tensors go through the host, ", where(ranks), because, " and ",
                        choice.why_no_peer_memory);
  else
    choice.why = concat("tensors go through the host, ", where(ranks), asked);
  return choice;
}

}  // namespace adareduce::cuda
