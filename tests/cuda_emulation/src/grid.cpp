// Runs a grid on the calling OS thread: blocks one after the other, the threads of a block as
// fibers. A fiber runs thread after thread until one has to wait, then the next fiber takes over;
// so threads that never wait cost no switch.
#undef _FORTIFY_SOURCE  // its longjmp refuses to go to another stack
#include "grid.h"

#include <sched.h>
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <mutex>
#include <vector>

#include "cuda_emulation/device_language.h"

constinit thread_local uint3 threadIdx{};
constinit thread_local uint3 blockIdx{};
constinit thread_local dim3 blockDim{};
constinit thread_local dim3 gridDim{};

namespace cuda_emulation {
namespace {

constexpr std::size_t kStackBytes = 256 << 10, kGuardBytes = 4096;
constexpr int kWarp = 32;

class Runner;

struct Fiber {
  jmp_buf context;
  Runner* runner = nullptr;  // of the block it works for
  int thread = -1;           // that it runs; -1: none
  ucontext_t start;
};

struct Thread {
  enum State { unstarted, ready, at_barrier, in_warp, done } state = unstarted;
  Fiber* fiber = nullptr;
  uint3 index{};
  unsigned gathered = 0;  // warp operations so far
};

/// Values are kept twice, in turns: a lane is never further ahead than one operation.
struct Warp {
  std::uint64_t values[2][kWarp] = {};
  WarpOperation operation = WarpOperation::none;
  int arrived = 0;
};

/// Fibers that no block uses, of all OS threads.
struct Pool {
  std::mutex mutex;
  std::vector<Fiber*> idle;
};
Pool& pool() {
  static Pool& pool = *new Pool;  // outlives every stream
  return pool;
}

class Runner {
 public:
  explicit Runner(const std::function<void()>& body) : body_(body) {}
  ~Runner();
  void run_block();
  void run_threads(Fiber* fiber);
  void sync_block();
  const std::uint64_t* gather_warp(WarpOperation operation, unsigned mask, std::uint64_t value);
  void yield();
  int current() const { return current_; }
  int lanes(int warp) const { return std::min(kWarp, size_ - warp * kWarp); }
  [[noreturn]] void fail(const std::string& text) const;

 private:
  void resume(Fiber* fiber);
  void suspend(Thread::State state);
  Fiber* next_fiber();
  [[noreturn]] void fail_stuck() const;

  const std::function<void()>& body_;
  std::vector<Thread> threads_;
  std::vector<Warp> warps_;
  std::deque<int> ready_, yielding_;
  std::vector<Fiber*> idle_;
  jmp_buf context_;
  int size_ = 0, started_ = 0, finished_ = 0, at_barrier_ = 0, current_ = -1;
  unsigned yields_ = 0;
};

constinit thread_local Runner* active = nullptr;

// Where a fiber is, the OS thread may change between two blocks: nothing here may keep an address
// of something thread_local.
void fiber_main(unsigned high, unsigned low) {
  auto* fiber =
      reinterpret_cast<Fiber*>(static_cast<std::uintptr_t>(high) << 32 | std::uintptr_t{low});
  for (;;) fiber->runner->run_threads(fiber);
}

Fiber* new_fiber() {
  void* stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_STACK | MAP_NORESERVE, -1, 0);
  if (stack == MAP_FAILED || mprotect(stack, kGuardBytes, PROT_NONE) != 0) {
    std::perror("cuda_emulation: no memory for a thread's stack");
    std::abort();
  }
  auto* fiber = new Fiber;
  getcontext(&fiber->start);
  // Tops of stacks are spread over the sets of the caches.
  static std::atomic<std::size_t> stacks{0};
  fiber->start.uc_stack.ss_sp = stack;
  fiber->start.uc_stack.ss_size = kStackBytes - stacks++ % 60 * 320;
  fiber->start.uc_link = nullptr;
  const auto address = reinterpret_cast<std::uintptr_t>(fiber);
  makecontext(&fiber->start, reinterpret_cast<void (*)()>(fiber_main), 2,
              static_cast<unsigned>(address >> 32), static_cast<unsigned>(address));
  return fiber;
}

Fiber* take_fiber() {
  {
    std::lock_guard lock(pool().mutex);
    if (!pool().idle.empty()) {
      Fiber* fiber = pool().idle.back();
      pool().idle.pop_back();
      return fiber;
    }
  }
  return new_fiber();
}

Runner::~Runner() {
  std::lock_guard lock(pool().mutex);
  pool().idle.insert(pool().idle.end(), idle_.begin(), idle_.end());
}

void Runner::run_block() {
  size_ = static_cast<int>(blockDim.x * blockDim.y * blockDim.z);
  threads_.assign(size_, {});
  warps_.assign((size_ + kWarp - 1) / kWarp, {});
  started_ = finished_ = at_barrier_ = 0;
  while (finished_ < size_) {
    // A warp goes on as far as it can before the next one: its stacks stay in the cache.
    if (Fiber* next = next_fiber()) {
      resume(next);
    } else if (started_ < size_) {
      if (idle_.empty()) idle_.push_back(take_fiber());
      Fiber* fiber = idle_.back();
      idle_.pop_back();
      resume(fiber);
    } else {
      fail_stuck();
    }
  }
}

void Runner::resume(Fiber* fiber) {
  const bool fresh = fiber->runner == nullptr;  // all later switches go by longjmp
  fiber->runner = this;
  if (_setjmp(context_) == 0) {
    if (fresh) setcontext(&fiber->start);
    _longjmp(fiber->context, 1);
  }
}

/// On a fiber: starts threads until one has waited and others have been started meanwhile.
__attribute__((noinline)) void Runner::run_threads(Fiber* fiber) {
  while (started_ < size_) {
    const int number = started_++;
    Thread& thread = threads_[number];
    const auto n = static_cast<unsigned>(number);
    thread.index = {n % blockDim.x, n / blockDim.x % blockDim.y, n / blockDim.x / blockDim.y};
    thread.fiber = fiber;
    thread.state = Thread::ready;
    current_ = number;
    threadIdx = thread.index;
    body_();
    threads_[current_].state = Thread::done;
    ++finished_;
  }
  current_ = -1;
  idle_.push_back(fiber);
  if (_setjmp(fiber->context) == 0) _longjmp(context_, 1);
}

void Runner::suspend(Thread::State state) {
  Thread& thread = threads_[current_];
  thread.state = state;
  if (_setjmp(thread.fiber->context) != 0) return;
  Fiber* next = next_fiber();  // without a detour over run_block
  _longjmp(next != nullptr ? next->context : context_, 1);
}

/// Makes the next thread that can go on the current one; null where there is none.
Fiber* Runner::next_fiber() {
  std::deque<int>& next = !ready_.empty() || started_ < size_ ? ready_ : yielding_;
  if (next.empty()) return nullptr;
  current_ = next.front();
  next.pop_front();
  threadIdx = threads_[current_].index;
  return threads_[current_].fiber;
}

void Runner::sync_block() {
  if (++at_barrier_ < size_) return suspend(Thread::at_barrier);
  at_barrier_ = 0;
  for (int i = 0; i < size_; ++i)
    if (i != current_) ready_.push_back(i);
}

const std::uint64_t* Runner::gather_warp(WarpOperation operation, unsigned mask,
                                         std::uint64_t value) {
  const int index = current_ / kWarp, lanes = this->lanes(index);
  const unsigned whole = lanes == kWarp ? ~0u : (1u << lanes) - 1;
  Warp& warp = warps_[index];
  if (mask != whole && !(operation == WarpOperation::sync && mask == ~0u)) {
    char text[120];
    std::snprintf(text, sizeof text,
                  "a warp operation must name the whole warp, %08x, got the mask %08x", whole,
                  mask);
    fail(text);
  }
  if (warp.arrived == 0) warp.operation = operation;
  if (warp.operation != operation) fail("lanes of a warp are in different warp operations");
  std::uint64_t* values = warp.values[threads_[current_].gathered++ % 2];
  values[current_ % kWarp] = value;
  if (++warp.arrived < lanes) {
    suspend(Thread::in_warp);
  } else {
    warp.arrived = 0;
    for (int i = index * kWarp + lanes - 1; i >= index * kWarp; --i)
      if (i != current_) ready_.push_front(i);
  }
  return values;
}

void Runner::yield() {
  const bool alone = started_ == size_ && ready_.empty() && yielding_.empty();
  if (alone || ++yields_ % 32 == 0) sched_yield();
  if (alone) return;
  yielding_.push_back(current_);
  suspend(Thread::ready);
}

void Runner::fail(const std::string& text) const {
  std::fprintf(stderr, "cuda_emulation: %s (block %u,%u,%u, thread %d of %d)\n", text.c_str(),
               blockIdx.x, blockIdx.y, blockIdx.z, current_, size_);
  std::abort();
}

void Runner::fail_stuck() const {
  int counts[5] = {};
  for (const Thread& thread : threads_) ++counts[thread.state];
  std::fprintf(
      stderr,
      "cuda_emulation: the threads of a block wait for each other: of %d threads, %d are in "
      "__syncthreads, %d in a warp operation, %d have ended (block %u,%u,%u)\n",
      size_, counts[Thread::at_barrier], counts[Thread::in_warp], counts[Thread::done], blockIdx.x,
      blockIdx.y, blockIdx.z);
  std::abort();
}

Runner& running(const char* what) {
  if (active == nullptr) {
    std::fprintf(stderr, "cuda_emulation: %s outside a kernel\n", what);
    std::abort();
  }
  return *active;
}

}  // namespace

void run_grid(dim3 grid, dim3 block, const std::function<void()>& body) {
  Runner runner(body);
  active = &runner;
  gridDim = grid;
  blockDim = block;
  for (blockIdx.z = 0; blockIdx.z < grid.z; ++blockIdx.z)
    for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y)
      for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) runner.run_block();
  active = nullptr;
}

bool in_kernel() { return active != nullptr; }

void sync_block() { running("__syncthreads").sync_block(); }

const std::uint64_t* gather_warp(WarpOperation operation, unsigned mask, std::uint64_t value) {
  return running("a warp operation").gather_warp(operation, mask, value);
}

int lane() { return running("a warp operation").current() % kWarp; }

int lanes() {
  Runner& runner = running("a warp operation");
  return runner.lanes(runner.current() / kWarp);
}

void yield() {
  if (active != nullptr) {
    active->yield();
  } else {
    sched_yield();
  }
}

}  // namespace cuda_emulation
