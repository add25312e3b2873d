#pragma once
#include <string>
#include <string_view>
#include <vector>

#include "transports/nccl/nccl_api.h"
#include "transports/nccl/nccl_communicator.h"

namespace adareduce::cuda {

/// The oldest NCCL that is used: its ncclConfig_t is the one in nccl_api.h.
inline constexpr int kOldestNccl = 21800;

/// Folders that may hold libnccl.so.2 of a pip wheel, in order; Python knows where they are. Must
/// come before the first nccl_status(): throws UsageError after it. Thread-safe.
void set_nccl_search_path(std::vector<std::string> folders);

/// NCCL's functions. Throws DeviceError with nccl_status().why_not where there is no NCCL to use.
const nccl::NcclFunctions& nccl_functions();

/// "2.28.9" for 22809.
std::string nccl_version_text(int version);

/// The different NCCL libraries among the lines of a /proc/PID/maps, in the order of the file.
std::vector<std::string> nccl_libraries_in(std::string_view maps);

}  // namespace adareduce::cuda
