// Calls on CUDA tensors over device_plugin.c, for the sanitizers: ranks as threads that launch,
// wait, capture and disagree, while other threads ask their handles and workers look after the
// groups. The plugin counts; memory is given back as soon as it may be.
#include <algorithm>
#include <atomic>
#include <cstdio>
#include <string>

#include "stress_ranks.h"

extern "C" {
void* test_device(int device);
extern adareduce_cuda_plugin test_plugin;
}

using namespace adareduce;

namespace {

constexpr int kMostDevices = 8;

// The first fields of device_state in device_plugin.c.
enum Count { kCreated, kPrepared, kLaunches, kOrdered, kChecked, kAborted, kDestroyed, kReleased };
enum { kOverlaps = 17, kNumCounts = 18 };  // as Gpu in tests/device_ranks.py

std::atomic<int>& count(Rank rank, int which) {
  return static_cast<std::atomic<int>*>(test_device(rank))[which];
}

void forget_counts() {
  for (Rank rank = 0; rank < kMostDevices; ++rank)
    for (int which = 0; which < kNumCounts; ++which) count(rank, which) = 0;
}

using DeviceHandlePtr = std::shared_ptr<DeviceHandle>;

// Float32 tensors that live as long as this does.
struct Call {
  std::vector<std::vector<float>> memory;
  Request request;
  DeviceArguments arguments;

  Call(Rank rank, int num_tensors, int numel, ReduceOp op) {
    request.collective = Collective::allreduce;
    request.name = "stress";
    request.device = {DeviceKind::cuda, rank};
    request.op = op;
    for (int t = 0; t < num_tensors; ++t) {
      memory.emplace_back(static_cast<std::size_t>(numel), 1.0F);
      float* data = memory.back().data();
      request.tensors.push_back({{numel}, DType::f32, data, data});
    }
  }

  DeviceHandlePtr launch(Engine& engine, int set = Engine::kGlobalSet) const {
    return engine.device_calls(set)->launch(request, arguments, {});
  }
};

Call random_call(Random& random, Rank rank) {
  const int num_tensors = below(random, 4);
  const int numel = below(random, 5);
  Call call(rank, num_tensors, numel, below(random, 2) == 0 ? ReduceOp::sum : ReduceOp::max);
  call.arguments.is_capturing = below(random, 8) == 0;
  return call;
}

HandlePtr on_cpu(Engine& engine, std::vector<float>& memory) {
  Request request;
  request.collective = Collective::allreduce;
  request.tensors.push_back(
      {{static_cast<std::int64_t>(memory.size())}, DType::f32, memory.data(), memory.data()});
  return engine.submit(Engine::kGlobalSet, std::move(request));
}

// A thread that asks the newest handle what it can be asked, and sometimes drops it.
class Asker {
 public:
  Asker() : thread_([this] { run(); }) {}
  ~Asker() {
    must_stop_ = true;
    thread_.join();
  }
  void give(DeviceHandlePtr handle) {
    const std::lock_guard lock(mutex_);
    newest_ = std::move(handle);
  }

 private:
  void run() {
    for (int turn = 0; !must_stop_; ++turn) {
      DeviceHandlePtr handle;
      {
        const std::lock_guard lock(mutex_);
        handle = newest_;
        if (turn % 3 == 0) newest_.reset();
      }
      if (handle == nullptr) {
        std::this_thread::yield();
        continue;
      }
      (void)handle->is_finished();
      (void)handle->stream();
      try {
        handle->order(nullptr);
      } catch (const TransportError&) {
        // the set is broken, which the caller hears as well
      }
    }
  }

  std::mutex mutex_;
  DeviceHandlePtr newest_;
  std::atomic<bool> must_stop_{false};
  std::thread thread_;
};

void random_calls(int size, int seed) {
  forget_counts();
  std::vector<int> launches(static_cast<std::size_t>(size));
  run_ranks("random calls", size, patient(), [&](std::unique_ptr<Engine>& engine) {
    const Rank rank = engine->layout().rank;
    engine->attach_cuda(&test_plugin, ADAREDUCE_CUDA_AUTO);
    const std::vector<Rank> members =
        size > 2 ? std::vector<Rank>{0, size - 1} : std::vector<Rank>{0};
    const int some = engine->add_process_set(members);
    const bool is_member = std::find(members.begin(), members.end(), rank) != members.end();
    Random random = random_of({size, seed});
    Random mine = random_of({size, seed, rank});
    std::vector<float> memory(3);
    Asker asker;
    int& count_of_launches = launches[static_cast<std::size_t>(rank)];
    for (const int set : {Engine::kGlobalSet, some})
      if (set == Engine::kGlobalSet || is_member) {
        asker.give(Call(rank, 1, 1, ReduceOp::min).launch(*engine, set));
        ++count_of_launches;
      }
    for (int turn = 0; turn < 300; ++turn) {
      const bool is_for_some = below(random, 3) == 0;
      const Call call = random_call(random, rank);
      const bool waits = below(random, 20) == 0;
      if (!is_for_some || is_member) {
        auto handle = call.launch(*engine, is_for_some ? some : Engine::kGlobalSet);
        ++count_of_launches;
        if (below(mine, 2) == 0) asker.give(std::move(handle));
      }
      if (!waits) continue;
      const HandlePtr handle = on_cpu(*engine, memory);
      await(handle);
      handle->rethrow();
    }
  });
  for (Rank rank = 0; rank < size; ++rank) {
    const int groups = size > 2 ? (rank == 0 || rank == size - 1 ? 2 : 1) : rank == 0 ? 2 : 1;
    CHECK(count(rank, kCreated) == groups && count(rank, kDestroyed) == groups);
    CHECK(count(rank, kAborted) == 0 && count(rank, kOverlaps) == 0);
    CHECK(count(rank, kLaunches) == launches[static_cast<std::size_t>(rank)]);
    CHECK(count(rank, kReleased) == count(rank, kLaunches));
  }
}

// One rank makes another call, a mistake, leaves or is destroyed, while the others launch.
void astray(int size, int seed) {
  forget_counts();
  const Rank culprit = seed % size;
  run_ranks("a rank astray", size, patient(), [&](std::unique_ptr<Engine>& engine) {
    const Rank rank = engine->layout().rank;
    engine->attach_cuda(&test_plugin, ADAREDUCE_CUDA_AUTO);
    const Call known(rank, 2, 3, ReduceOp::sum), other(rank, 2, 3, ReduceOp::max);
    Asker asker;
    Random random = random_of({size, seed});
    const int before = below(random, 40);
    try {
      (void)known.launch(*engine);
      (void)other.launch(*engine);
      for (int turn = 0; turn < before; ++turn) asker.give(known.launch(*engine));
      if (rank == culprit) {
        std::vector<float> memory(4);
        switch (seed % 5) {
          case 0:
            (void)other.launch(*engine);
            break;
          case 1:
            engine->reject(Engine::kGlobalSet, false, "a mistake");
            break;
          case 2:
            await(on_cpu(*engine, memory));
            break;
          case 3:
            for (const HandlePtr& handle : engine->leave("an error", false)) await(handle);
            return;
          default:
            engine.reset();
            return;
        }
      }
      for (;;) asker.give(known.launch(*engine));
    } catch (const TransportError&) {
      // A launch may see it before the engine's thread does.
      while (engine->breakage().empty()) std::this_thread::yield();
    }
  });
  for (Rank rank = 0; rank < size; ++rank) {
    CHECK(count(rank, kAborted) == 1 && count(rank, kDestroyed) == 1);
    CHECK(count(rank, kReleased) == count(rank, kLaunches));
  }
}

// One rank, many threads.
void several_callers(int num_threads) {
  forget_counts();
  constexpr int kTurns = 200;
  run_ranks("several callers", 1, patient(), [&](std::unique_ptr<Engine>& engine) {
    engine->attach_cuda(&test_plugin, ADAREDUCE_CUDA_AUTO);
    std::vector<std::thread> threads;
    for (int t = 0; t < num_threads; ++t)
      threads.emplace_back([&, t] {
        Random random = random_of({t});
        for (int turn = 0; turn < kTurns; ++turn) {
          const Call call(0, below(random, 3), below(random, 3), ReduceOp::sum);
          const auto handle = call.launch(*engine);
          handle->order(nullptr);
          (void)handle->is_finished();
          (void)engine->device_calls(Engine::kGlobalSet)->path(0, {});
        }
      });
    for (std::thread& thread : threads) thread.join();
  });
  CHECK(count(0, kLaunches) == num_threads * kTurns && count(0, kCreated) == 1);
  CHECK(count(0, kOverlaps) == 0 && count(0, kReleased) == count(0, kLaunches));
}

}  // namespace

int main() {
  for (const int size : {1, 2, 3, 5})
    for (int seed = 0; seed < 2; ++seed) random_calls(size, seed);
  for (const int size : {2, 3, 4})
    for (int seed = 0; seed < 10; ++seed) astray(size, seed);
  for (const int num_threads : {1, 2, 5}) several_callers(num_threads);
  std::puts("device_stress: all is well");
  return 0;
}
