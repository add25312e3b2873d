// Memory lies in one memfd, so that other processes can map its parts. Every block has a page
// before it and at least kTail bytes behind it that nobody may write; both are checked when it is
// freed. Addresses and offsets are never used twice: who touches freed memory gets a fault.
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <map>

#include "runtime.h"

namespace cuda_emulation {
namespace {

constexpr std::size_t kPage = 4096, kTail = 256;
constexpr std::uint64_t kMagic = 0x7469676562415543;
constexpr int kPoison = 0xff;  // NaN in every floating-point type, -1 in every integer
constexpr int kGuard = 0xa7;
constexpr std::size_t kTotal = std::size_t{16} << 30;  // of each device

struct Header {  // at the start of a block's first page
  std::uint64_t magic, bytes;
};
struct Block {
  char* map = nullptr;
  std::size_t map_bytes = 0, bytes = 0, offset = 0;
  bool host = false;
  int device = 0;
  char* data() const { return map + kPage; }
};
struct Import {
  cudaIpcMemHandle_t handle;
  Block block;
  int opened = 1;
};
struct Handle {  // what is in a cudaIpcMemHandle_t
  std::uint64_t magic, offset, map_bytes, bytes;
  int process, file;
};
static_assert(sizeof(Handle) <= sizeof(cudaIpcMemHandle_t));

struct Memory {
  std::mutex mutex;
  int file = -1;
  std::size_t file_bytes = 0;
  std::map<const char*, Block> blocks;  // by data()
  std::map<const char*, Import> imports;
  std::int64_t device_bytes = 0, pinned_bytes = 0;
};
Memory& memory() {
  static Memory& memory = *new Memory;
  return memory;
}

std::int64_t first_failure() {
  const char* text = std::getenv("CUDA_EMULATION_FAIL_ALLOCATION");
  return text == nullptr ? -1 : std::atoll(text);
}
std::atomic<std::int64_t> successes_left{first_failure()};

bool fails_now() {
  std::int64_t left = successes_left;
  while (left >= 0)
    if (successes_left.compare_exchange_weak(left, left - 1)) return left == 0;
  return false;
}

std::size_t rounded(std::size_t bytes) { return (bytes + kPage - 1) / kPage * kPage; }

cudaError_t allocate(void** pointer, std::size_t bytes, bool host) {
  if (pointer == nullptr) return note(cudaErrorInvalidValue);
  const cudaError_t refusal = check_unsafe_call();
  if (refusal != cudaSuccess) return note(refusal);
  *pointer = nullptr;
  if (bytes == 0) return cudaSuccess;
  Memory& all = memory();
  std::lock_guard lock(all.mutex);
  if (fails_now() || bytes > kTotal - static_cast<std::size_t>(all.device_bytes))
    return note(cudaErrorMemoryAllocation);
  if (all.file < 0) all.file = memfd_create("cuda_emulation", MFD_CLOEXEC);
  Block block;
  block.bytes = bytes;
  block.map_bytes = kPage + rounded(bytes + kTail);
  block.offset = all.file_bytes;
  block.host = host;
  block.device = current_device();
  const std::size_t file_bytes = all.file_bytes + block.map_bytes;
  if (all.file < 0 || ftruncate(all.file, static_cast<off_t>(file_bytes)) != 0)
    return note(cudaErrorMemoryAllocation);
  void* map = mmap(nullptr, block.map_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, all.file,
                   static_cast<off_t>(block.offset));
  if (map == MAP_FAILED) return note(cudaErrorMemoryAllocation);
  all.file_bytes = file_bytes;
  block.map = static_cast<char*>(map);
  std::memset(block.map, kGuard, kPage);
  const Header header{kMagic, bytes};
  std::memcpy(block.map, &header, sizeof header);
  std::memset(block.data(), kPoison, bytes);
  std::memset(block.data() + bytes, kGuard, block.map_bytes - kPage - bytes);
  all.blocks[block.data()] = block;
  (host ? all.pinned_bytes : all.device_bytes) += static_cast<std::int64_t>(bytes);
  *pointer = block.data();
  return cudaSuccess;
}

void check_guards(const Block& block) {
  const auto check = [&](const char* from, const char* to) {
    for (const char* at = from; at < to; ++at)
      if (*at != static_cast<char>(kGuard))
        fail("memory was written outside of a block of " + std::to_string(block.bytes) +
             " bytes, at byte " + std::to_string(at - block.data()));
  };
  check(block.map + sizeof(Header), block.data());
  check(block.data() + block.bytes, block.map + block.map_bytes);
}

cudaError_t release(void* pointer, bool host) {
  const cudaError_t refusal = check_unsafe_call();
  if (refusal != cudaSuccess) return note(refusal);
  if (pointer == nullptr) return cudaSuccess;
  Memory& all = memory();
  int device = 0;
  {
    std::lock_guard lock(all.mutex);
    const auto found = all.blocks.find(static_cast<char*>(pointer));
    if (found == all.blocks.end() || found->second.host != host) return note(cudaErrorInvalidValue);
    device = found->second.device;
  }
  count_host_wait();
  wait_for_all_streams(device);
  std::lock_guard lock(all.mutex);
  const auto found = all.blocks.find(static_cast<char*>(pointer));
  if (found == all.blocks.end()) return note(cudaErrorInvalidValue);
  const Block block = found->second;
  check_guards(block);
  all.blocks.erase(found);
  (host ? all.pinned_bytes : all.device_bytes) -= static_cast<std::int64_t>(block.bytes);
  // Addresses stay reserved: nothing else comes to lie there.
  mmap(block.map, block.map_bytes, PROT_NONE,
       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
  fallocate(all.file, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, static_cast<off_t>(block.offset),
            static_cast<off_t>(block.map_bytes));
  return cudaSuccess;
}

/// The block in which `pointer` is; false where it is not the emulation's memory.
bool find_block(const void* pointer, Block* block) {
  Memory& all = memory();
  std::lock_guard lock(all.mutex);
  const char* at = static_cast<const char*>(pointer);
  const auto after = all.blocks.upper_bound(at);
  if (after != all.blocks.begin()) {
    *block = std::prev(after)->second;
    if (at < block->data() + block->bytes) return true;
  }
  const auto import = all.imports.upper_bound(at);
  if (import == all.imports.begin()) return false;
  *block = std::prev(import)->second.block;
  return at < block->data() + block->bytes;
}

enum class Place { pageable, pinned, device };

/// False where the range begins inside a block and leaves it.
bool find_place(const void* pointer, std::size_t bytes, Place* place) {
  Block block;
  *place = Place::pageable;
  if (!find_block(pointer, &block)) return true;
  *place = block.host ? Place::pinned : Place::device;
  return static_cast<const char*>(pointer) + bytes <= block.data() + block.bytes;
}

bool is_captured(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  return cudaStreamIsCapturing(stream, &status) == cudaSuccess &&
         status != cudaStreamCaptureStatusNone;
}

cudaError_t copy(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind,
                 cudaStream_t stream) {
  Place target{}, source{};
  if (kind < cudaMemcpyHostToHost || kind > cudaMemcpyDefault)
    return note(cudaErrorInvalidMemcpyDirection);
  if (bytes == 0) return cudaSuccess;
  if (!find_place(to, bytes, &target) || !find_place(from, bytes, &source))
    return note(cudaErrorInvalidValue);
  const bool to_host = kind == cudaMemcpyHostToHost || kind == cudaMemcpyDeviceToHost;
  const bool from_host = kind == cudaMemcpyHostToHost || kind == cudaMemcpyHostToDevice;
  if (kind != cudaMemcpyDefault &&
      ((to_host && target == Place::device) || (from_host && source == Place::device)))
    return note(cudaErrorInvalidValue);
  // As CUDA does: pageable memory is read before the call returns, and written before it, too.
  if (source == Place::pageable && from_host && !is_captured(stream)) {
    const char* bytes_of_source = static_cast<const char*>(from);
    return submit(stream,
                  [to, staged = std::vector<char>(bytes_of_source, bytes_of_source + bytes)] {
                    std::memcpy(to, staged.data(), staged.size());
                  });
  }
  const cudaError_t result = submit(stream, [=] { std::memmove(to, from, bytes); });
  if (result == cudaSuccess && target == Place::pageable && to_host && !is_captured(stream))
    return cudaStreamSynchronize(stream);
  return result;
}

}  // namespace

void fail_allocation_after(std::int64_t successes) { successes_left = successes; }

std::int64_t device_bytes() {
  std::lock_guard lock(memory().mutex);
  return memory().device_bytes;
}
std::int64_t pinned_bytes() {
  std::lock_guard lock(memory().mutex);
  return memory().pinned_bytes;
}

}  // namespace cuda_emulation

using namespace cuda_emulation;

cudaError_t cudaMalloc(void** pointer, size_t bytes) { return allocate(pointer, bytes, false); }
cudaError_t cudaMallocHost(void** pointer, size_t bytes) { return allocate(pointer, bytes, true); }
cudaError_t cudaHostAlloc(void** pointer, size_t bytes, unsigned flags) {
  return flags > 7 ? note(cudaErrorInvalidValue) : allocate(pointer, bytes, true);
}
cudaError_t cudaFree(void* pointer) { return release(pointer, false); }
cudaError_t cudaFreeHost(void* pointer) { return release(pointer, true); }

cudaError_t cudaHostGetDevicePointer(void** device, void* host, unsigned flags) {
  Block block;
  if (device == nullptr || flags != 0 || !find_block(host, &block) || !block.host)
    return note(cudaErrorInvalidValue);
  *device = host;
  return cudaSuccess;
}

cudaError_t cudaMemGetInfo(size_t* available, size_t* total) {
  *total = kTotal;
  *available = kTotal - static_cast<std::size_t>(device_bytes());
  return cudaSuccess;
}

cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* pointer) {
  Block block;
  *attributes = {cudaMemoryTypeUnregistered, -2, nullptr, const_cast<void*>(pointer)};
  if (!find_block(pointer, &block)) return cudaSuccess;
  void* address = const_cast<void*>(pointer);
  *attributes = {block.host ? cudaMemoryTypeHost : cudaMemoryTypeDevice, block.device, address,
                 block.host ? address : nullptr};
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t stream) {
  return copy(to, from, bytes, kind, stream);
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
  const cudaError_t result = copy(to, from, bytes, kind, nullptr);
  return result == cudaSuccess ? cudaStreamSynchronize(nullptr) : result;
}
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream) {
  Place place{};
  if (!find_place(to, bytes, &place)) return note(cudaErrorInvalidValue);
  return submit(stream, [=] { std::memset(to, value, bytes); });
}
cudaError_t cudaMemset(void* to, int value, size_t bytes) {
  return cudaMemsetAsync(to, value, bytes, nullptr);
}

cudaError_t cudaIpcGetMemHandle(cudaIpcMemHandle_t* handle, void* pointer) {
  Block block;
  if (!find_block(pointer, &block) || block.data() != pointer || block.host)
    return note(cudaErrorInvalidValue);
  const Handle content{kMagic, block.offset, block.map_bytes, block.bytes, getpid(), memory().file};
  *handle = {};
  std::memcpy(handle->reserved, &content, sizeof content);
  return cudaSuccess;
}

cudaError_t cudaIpcOpenMemHandle(void** pointer, cudaIpcMemHandle_t handle, unsigned flags) {
  const cudaError_t refusal = check_unsafe_call();
  if (refusal != cudaSuccess) return note(refusal);
  Handle content;
  std::memcpy(&content, handle.reserved, sizeof content);
  if (content.magic != kMagic || flags != cudaIpcMemLazyEnablePeerAccess)
    return note(cudaErrorInvalidValue);
  if (content.process == getpid()) return note(cudaErrorDeviceUninitialized);
  Memory& all = memory();
  std::lock_guard lock(all.mutex);
  for (auto& [data, import] : all.imports)
    if (std::memcmp(&import.handle, &handle, sizeof handle) == 0) {
      ++import.opened;
      *pointer = import.block.data();
      return cudaSuccess;
    }
  const std::string path =
      "/proc/" + std::to_string(content.process) + "/fd/" + std::to_string(content.file);
  const int file = open(path.c_str(), O_RDWR | O_CLOEXEC);
  if (file < 0) return note(cudaErrorMapBufferObjectFailed);
  void* map = mmap(nullptr, content.map_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file,
                   static_cast<off_t>(content.offset));
  close(file);
  if (map == MAP_FAILED) return note(cudaErrorMapBufferObjectFailed);
  Header header;
  std::memcpy(&header, map, sizeof header);
  if (header.magic != kMagic || header.bytes != content.bytes) {  // freed meanwhile
    munmap(map, content.map_bytes);
    return note(cudaErrorMapBufferObjectFailed);
  }
  Import import{handle, {}};
  import.block.map = static_cast<char*>(map);
  import.block.map_bytes = content.map_bytes;
  import.block.bytes = content.bytes;
  import.block.device = current_device();
  *pointer = import.block.data();
  all.imports[import.block.data()] = import;
  return cudaSuccess;
}

cudaError_t cudaIpcCloseMemHandle(void* pointer) {
  const cudaError_t refusal = check_unsafe_call();
  if (refusal != cudaSuccess) return note(refusal);
  Memory& all = memory();
  {
    std::lock_guard lock(all.mutex);
    const auto found = all.imports.find(static_cast<char*>(pointer));
    if (found == all.imports.end()) return note(cudaErrorInvalidValue);
    if (--found->second.opened > 0) return cudaSuccess;
  }
  count_host_wait();
  wait_for_all_streams(current_device());
  std::lock_guard lock(all.mutex);
  const auto found = all.imports.find(static_cast<char*>(pointer));
  munmap(found->second.block.map, found->second.block.map_bytes);
  all.imports.erase(found);
  return cudaSuccess;
}
