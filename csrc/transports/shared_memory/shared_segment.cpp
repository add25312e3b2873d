#include "transports/shared_memory/shared_segment.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/resource.h>
#include <sys/stat.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <limits>
#include <map>
#include <mutex>
#include <system_error>

#include "transports/shared_memory/memory_room.h"

namespace adareduce {
namespace {

constexpr unsigned kNoExecution = 8;  // MFD_NOEXEC_SEAL, which older headers lack
constexpr int kPopulate = 23;         // MADV_POPULATE_WRITE, likewise
constexpr int kCollapse = 25;         // MADV_COLLAPSE, likewise
constexpr std::int64_t kHugePageBytes = std::int64_t{2} << 20;  // of x86, and of most others
constexpr int kSeals = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL;
// Between two looks at the room that is left: others allocate, too.
constexpr std::int64_t kStepBytes = std::int64_t{32} << 20;

std::int64_t page_bytes() { return sysconf(_SC_PAGESIZE); }

std::int64_t whole_pages(std::int64_t bytes) {
  return (bytes + page_bytes() - 1) / page_bytes() * page_bytes();
}

void check_room(std::int64_t bytes) {
  if (const std::int64_t room = room_for_shared_memory(); bytes > room)
    throw SharedMemoryError(concat("allocating ", bytes, " bytes, of which ", room,
                                   " are left of the machine's memory or this cgroup's limit"));
}

Descriptor make_memfd() {
  // Kernels from 6.3 want to be told that it is no program, and may refuse it otherwise.
  int number = memfd_create("adareduce", MFD_CLOEXEC | MFD_ALLOW_SEALING | kNoExecution);
  if (number < 0 && errno == EINVAL)
    number = memfd_create("adareduce", MFD_CLOEXEC | MFD_ALLOW_SEALING);
  if (number < 0) throw_shared_memory_error("making a memfd", errno);
  return Descriptor(number);
}

void set_size(int descriptor, std::int64_t bytes) {
  // Growing a file beyond this limit sends a signal that ends the process.
  rlimit limit{};
  if (getrlimit(RLIMIT_FSIZE, &limit) == 0 && limit.rlim_cur != RLIM_INFINITY &&
      static_cast<rlim_t>(bytes) > limit.rlim_cur)
    throw_shared_memory_error(concat("allocating ", bytes,
                                     " bytes, where the limit of file sizes "
                                     "(ulimit -f) is ",
                                     limit.rlim_cur),
                              EFBIG);
  while (ftruncate(descriptor, bytes) != 0)
    if (errno != EINTR)
      throw_shared_memory_error(concat("making room for ", bytes, " bytes"), errno);
}

// Fills whole blocks of 2 MiB of [begin, end) of a file by huge pages, as far as the kernel has any
// and does this (from 6.1 on). It wants one page in a block and adds the others. What is not filled
// stays for allocate(), and so do errors.
void allocate_huge_pages(int descriptor, char* data, std::int64_t begin, std::int64_t end) {
  const std::int64_t last = end / kHugePageBytes * kHugePageBytes;
  for (std::int64_t block = begin; block < last; block += kHugePageBytes)
    while (fallocate(descriptor, 0, block, page_bytes()) != 0)
      if (errno != EINTR) return;
  if (begin < last) (void)madvise(data + begin, static_cast<std::size_t>(last - begin), kCollapse);
}

// All pages of a file that is mapped at `data`.
void allocate(int descriptor, char* data, std::int64_t bytes) {
  static_assert(kStepBytes % kHugePageBytes == 0);
  std::int64_t step = kStepBytes;
  std::int64_t checked = 0;  // room, up to here
  for (std::int64_t done = 0; done < bytes;) {
    if (done == checked) {
      check_room(bytes - done);
      checked = std::min(done + kStepBytes, bytes);
      allocate_huge_pages(descriptor, data, done, checked);
    }
    const std::int64_t now = std::min(step, checked - done);
    if (fallocate(descriptor, 0, done, now) == 0) {
      done += now;
      step = std::min(step * 2, kStepBytes);
    } else if (errno == EINTR) {
      // The kernel has given back what it had of this step: where signals come in close order,
      // only shorter ones get through.
      step = std::max(step / 2, page_bytes());
    } else {
      throw_shared_memory_error(concat("allocating ", bytes, " bytes"), errno);
    }
  }
}

// Large memory at a multiple of a huge page, since the kernel maps huge pages nowhere else, if the
// address that was found stays free; it is no more than a wish. MAP_FAILED: errno says why.
void* map_aligned(int descriptor, std::int64_t bytes) {
  const auto length = static_cast<std::size_t>(bytes);
  constexpr std::size_t kHuge = kHugePageBytes;
  void* wish = nullptr;
  if (bytes >= kHugePageBytes) {
    constexpr int kNothing = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    void* const free = mmap(nullptr, length + kHuge, PROT_NONE, kNothing, -1, 0);
    if (free != MAP_FAILED) {
      munmap(free, length + kHuge);
      const auto address = reinterpret_cast<std::uintptr_t>(free);
      wish = reinterpret_cast<void*>((address + kHuge - 1) / kHuge * kHuge);
    }
  }
  return mmap(wish, length, PROT_READ | PROT_WRITE, MAP_SHARED, descriptor, 0);
}

struct stat status_of(int descriptor) {
  struct stat status{};
  if (fstat(descriptor, &status) != 0)
    throw_shared_memory_error("asking for a memfd's size", errno);
  return status;
}

// The segments of this process. Ranks may be threads of it.
using Key = std::array<std::uint64_t, 2>;
struct Mapped {
  std::mutex mutex;
  std::map<Key, std::weak_ptr<SharedSegment>> segments;  // guarded by mutex
};
Mapped& mapped() {
  static auto* const all = new Mapped;  // never destroyed: segments may end after statics have
  return *all;
}
Key key_of(const SegmentIdentity& identity) { return {identity.random[0], identity.random[1]}; }

}  // namespace

void fill_with_random(std::uint64_t (&words)[2]) {
  while (getrandom(words, sizeof words, 0) != sizeof words)
    if (errno != EINTR) throw_shared_memory_error("drawing random numbers", errno);
}

void throw_shared_memory_error(const std::string& what, int error) {
  throw SharedMemoryError(concat(what, ": ", std::generic_category().message(error)));
}

SharedSegment::SharedSegment(Descriptor descriptor, const SegmentIdentity& identity)
    : descriptor_(std::move(descriptor)), identity_(identity) {
  void* const data = map_aligned(descriptor_.number(), whole_pages(identity.bytes));
  if (data == MAP_FAILED)
    throw_shared_memory_error(concat("mapping ", identity.bytes, " bytes"), errno);
  data_ = static_cast<char*>(data);
}

SharedSegment::~SharedSegment() {
  if (data_ == nullptr) return;
  {
    const std::lock_guard lock(mapped().mutex);
    // Another thread may have opened it anew since the last reference went.
    const auto known = mapped().segments.find(key_of(identity_));
    if (known != mapped().segments.end() && known->second.expired()) mapped().segments.erase(known);
  }
  munmap(data_, static_cast<std::size_t>(whole_pages(identity_.bytes)));
}

// Page faults cost the first collective more than its data do: 100 MB 58 ms, where this takes 32
// (2 cores of a Xeon with AVX-512). Kernels before 5.14 refuse, and their faults come one by one.
void SharedSegment::map_pages() {
  (void)madvise(data_, static_cast<std::size_t>(whole_pages(identity_.bytes)), kPopulate);
}

std::shared_ptr<SharedSegment> SharedSegment::create(std::int64_t bytes) {
  if (bytes < 1 || bytes > std::numeric_limits<std::int64_t>::max() - page_bytes())
    throw SharedMemoryError(concat("SharedSegment: bytes must be 1 or more, got ", bytes));
  const std::int64_t whole = whole_pages(bytes);
  check_room(whole);
  Descriptor descriptor = make_memfd();
  const int number = descriptor.number();
  set_size(number, whole);
  const struct stat status = status_of(number);
  SegmentIdentity identity{{}, status.st_dev, status.st_ino, bytes};
  fill_with_random(identity.random);
  // Mapped first: that costs nothing where it fails.
  const std::shared_ptr<SharedSegment> segment(new SharedSegment(std::move(descriptor), identity));
  allocate(number, segment->data(), whole);
  if (fcntl(number, F_ADD_SEALS, kSeals) != 0) throw_shared_memory_error("sealing a memfd", errno);
  segment->map_pages();
  const std::lock_guard lock(mapped().mutex);
  mapped().segments[key_of(identity)] = segment;
  return segment;
}

std::shared_ptr<SharedSegment> SharedSegment::open(Descriptor descriptor,
                                                   const SegmentIdentity& identity) {
  // What has been opened is compared before it is used; a size that nobody can change means that
  // no access to it can fail.
  const struct stat status = status_of(descriptor.number());
  const int seals = fcntl(descriptor.number(), F_GET_SEALS);
  const bool is_sealed = seals >= 0 && (seals & kSeals) == kSeals;
  if (status.st_dev != identity.device || status.st_ino != identity.inode || identity.bytes < 1 ||
      status.st_size != whole_pages(identity.bytes) || !is_sealed)
    throw SharedMemoryError(concat("what was to be ", identity.bytes,
                                   " bytes of shared memory is something else: ", status.st_size,
                                   " bytes, ", is_sealed ? "sealed" : "not sealed"));
  std::shared_ptr<SharedSegment> segment;
  {
    // Two ranks of this process may open a third one's at the same time.
    const std::lock_guard lock(mapped().mutex);
    const auto known = mapped().segments.find(key_of(identity));
    if (known != mapped().segments.end()) segment = known->second.lock();
    if (segment != nullptr) return segment;
    segment.reset(new SharedSegment(std::move(descriptor), identity));
    mapped().segments[key_of(identity)] = segment;
  }
  segment->close_descriptor();
  segment->map_pages();
  return segment;
}

}  // namespace adareduce
