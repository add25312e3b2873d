// P engines as threads of one process, for the sanitizers: random requests with fixed seeds,
// disagreements, rejections, overlapping process sets, departures, engines destroyed in the middle
// of their work, ranks that never answer. Every result is checked against exact numbers. Memory is
// exactly as large as the tensors and is given back as soon as a handle has ended.
//
// engine_stress         the ranks exchange messages
// engine_stress shared  the ranks meet in shared memory
// engine_stress shared workers  and have one to three workers each
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <future>
#include <limits>
#include <numeric>
#include <optional>
#include <string>

#include "engine/shared_node.h"
#include "stress_ranks.h"

using namespace adareduce;

namespace {

// ---- requests with known results
// -----------------------------------------------------------------

// Exactly as many bytes as a tensor has.
struct Memory {
  explicit Memory(std::int64_t bytes, int fill = 0) : size(static_cast<std::size_t>(bytes)) {
    if (size > 0) data.reset(new unsigned char[size]);
    if (size > 0) std::memset(data.get(), fill, size);
  }
  std::size_t size;
  std::unique_ptr<unsigned char[]> data;
};

constexpr int kUntouched = 0x5A;

bool is_untouched(const Memory& memory) {
  for (std::size_t i = 0; i < memory.size; ++i)
    if (memory.data[i] != kUntouched) return false;
  return true;
}

// What one rank has submitted, and how to check it once it has ended.
struct Job {
  HandlePtr handle;
  std::vector<std::shared_ptr<Memory>> memory;
  std::function<void(const Job&)> check;

  void finish() {
    await(handle);
    check(*this);
    memory.clear();
  }
};

double element(int step, Rank rank, std::int64_t i) {
  return static_cast<double>((i * (3 + rank) + step) % 41 - 20);
}

template <typename T>
void fill(Memory& memory, const std::function<double(std::int64_t)>& value) {
  T* data = reinterpret_cast<T*>(memory.data.get());
  for (std::size_t i = 0; i < memory.size / sizeof(T); ++i)
    data[i] = static_cast<T>(value(static_cast<std::int64_t>(i)));
}

template <typename T>
void check_equal(const Memory& memory, const std::function<double(std::int64_t)>& value) {
  const T* data = reinterpret_cast<const T*>(memory.data.get());
  for (std::size_t i = 0; i < memory.size / sizeof(T); ++i)
    CHECK(data[i] == static_cast<T>(value(static_cast<std::int64_t>(i))));
}

std::vector<std::int64_t> random_numels(Random& random) {
  constexpr std::int64_t kNumels[] = {0, 1, 5, 15, 16, 17, 40, 257, 1000, 4099};
  std::vector<std::int64_t> numels;
  for (int count = below(random, 5); count >= 0; --count)
    numels.push_back(kNumels[below(random, std::size(kNumels))]);
  // More than goes with the headers, and more than one tile.
  if (uses_shared_memory && below(random, 3) == 0) numels.push_back(20'000 + below(random, 80'000));
  return numels;
}

// Reductions of whole numbers, products rounded after each factor; Adasum of vectors with disjoint
// supports, which is their sum.
template <typename T>
Job submit_allreduce(Engine& engine, int process_set, int step, ReduceOp op, Rank rank, int size,
                     const std::vector<std::int64_t>& numels) {
  Job job;
  Request request;
  request.collective = Collective::allreduce;
  request.name = concat("step ", step);
  const DType dtype = sizeof(T) == 4 ? DType::f32 : DType::f64;
  request.op = op;
  const auto value = [=](Rank owner, std::int64_t i) {
    if (op == ReduceOp::adasum && i % size != owner) return 0.0;
    return element(step, owner, i);
  };
  for (const std::int64_t numel : numels) {
    const auto bytes = numel * static_cast<std::int64_t>(sizeof(T));
    const auto in = job.memory.emplace_back(std::make_shared<Memory>(bytes));
    // Every other step works in place.
    const auto out = step % 2 == 0 ? in : std::make_shared<Memory>(bytes, kUntouched);
    job.memory.push_back(out);
    fill<T>(*in, [&](std::int64_t i) { return value(rank, i); });
    request.tensors.push_back({{numel}, dtype, in->data.get(), out->data.get()});
  }
  job.handle = engine.submit(process_set, std::move(request));
  job.check = [=](const Job& self) {
    self.handle->rethrow();
    for (std::size_t t = 1; t < self.memory.size(); t += 2)
      check_equal<T>(*self.memory[t], [&](std::int64_t i) {
        double result = value(0, i);
        for (Rank owner = 1; owner < size; ++owner) {
          const double next = value(owner, i);
          result = op == ReduceOp::min       ? std::min(result, next)
                   : op == ReduceOp::max     ? std::max(result, next)
                   : op == ReduceOp::product ? static_cast<double>(static_cast<T>(result * next))
                                             : result + next;
        }
        return op == ReduceOp::average ? result / size : result;
      });
  };
  return job;
}

Job submit_broadcast(Engine& engine, int process_set, int step, Rank root, Rank rank,
                     const std::vector<std::int64_t>& numels) {
  Job job;
  Request request;
  request.collective = Collective::broadcast;
  request.name = concat("step ", step);
  request.root = root;
  for (const std::int64_t numel : numels) {
    const bool is_wide = request.tensors.size() % 2 == 0;
    const std::int64_t bytes = is_wide ? 4 * numel : numel;
    const auto in = job.memory.emplace_back(std::make_shared<Memory>(bytes));
    const auto out = job.memory.emplace_back(std::make_shared<Memory>(bytes));
    const auto value = [&](std::int64_t i) { return 20 + element(step, rank, i); };
    if (is_wide) {
      fill<std::int32_t>(*in, value);
    } else {
      fill<std::uint8_t>(*in, value);
    }
    request.tensors.push_back(
        {{numel}, is_wide ? DType::i32 : DType::u8, in->data.get(), out->data.get()});
  }
  job.handle = engine.submit(process_set, std::move(request));
  job.check = [=](const Job& self) {
    self.handle->rethrow();
    const auto value = [&](std::int64_t i) { return 20 + element(step, root, i); };
    for (std::size_t t = 1; t < self.memory.size(); t += 4)
      check_equal<std::int32_t>(*self.memory[t], value);
    for (std::size_t t = 3; t < self.memory.size(); t += 4)
      check_equal<std::uint8_t>(*self.memory[t], value);
  };
  return job;
}

Job submit_allgather(Engine& engine, int process_set, int step, Rank rank, int size) {
  const auto rows_of = [=](Rank owner) { return std::int64_t{(owner * 7 + step) % 5}; };
  constexpr std::int64_t kColumns = 33;
  Job job;
  Request request;
  request.collective = Collective::allgather;
  request.name = concat("step ", step);
  for (int t = 0; t < 1 + step % 2; ++t) {
    const auto in = job.memory.emplace_back(std::make_shared<Memory>(rows_of(rank) * kColumns * 8));
    fill<double>(*in, [&](std::int64_t i) { return element(step + t, rank, i); });
    request.tensors.push_back({{rows_of(rank), kColumns}, DType::f64, in->data.get(), nullptr});
  }
  job.handle = engine.submit(process_set, std::move(request));
  job.check = [=](const Job& self) {
    self.handle->rethrow();
    CHECK(self.handle->result().gathered.size() == self.memory.size());
    for (std::size_t t = 0; t < self.memory.size(); ++t) {
      const GatheredTensor& gathered = self.handle->result().gathered[t];
      const double* data = static_cast<const double*>(gathered.memory->data());
      std::int64_t place = 0;
      for (Rank owner = 0; owner < size; ++owner)
        for (std::int64_t i = 0; i < rows_of(owner) * kColumns; ++i)
          CHECK(data[place++] == element(step + static_cast<int>(t), owner, i));
      CHECK((gathered.shape == std::vector<std::int64_t>{place / kColumns, kColumns}));
    }
  };
  return job;
}

// One rank asks for something else, in one of five ways: an error on all, nothing is written.
Job submit_disagreement(Engine& engine, int process_set, int step, Random& random, Rank rank,
                        int size) {
  const Rank culprit = below(random, size);
  const int way = below(random, 5);
  const bool is_culprit = rank == culprit;
  Job job;
  Request request;
  request.collective = Collective::allreduce;
  request.name = concat("step ", step, is_culprit && way == 0 ? " of another" : "");
  const DType dtype = is_culprit && way == 1 ? DType::f64 : DType::f32;
  request.op = is_culprit && way == 2 ? ReduceOp::adasum : ReduceOp::sum;
  request.prescale = is_culprit && way == 3 ? 0.5 : 1.0;
  const std::int64_t numel = is_culprit && way == 4 ? 17 : 9;
  const auto in = job.memory.emplace_back(std::make_shared<Memory>(8 * numel));
  const auto out = job.memory.emplace_back(std::make_shared<Memory>(8 * numel, kUntouched));
  request.tensors.push_back({{numel}, dtype, in->data.get(), out->data.get()});
  job.handle = engine.submit(process_set, std::move(request));
  job.check = [](const Job& self) {
    check_contains(error_of<DisagreementError>(self.handle), "the ranks disagree on ");
    CHECK(is_untouched(*self.memory[1]));
  };
  return job;
}

// One rank's caller has made a mistake.
Job submit_rejection(Engine& engine, int process_set, int step, Random& random, Rank rank,
                     int size) {
  const Rank culprit = below(random, size);
  Job job;
  if (rank == culprit) {
    engine.reject(process_set, false, concat("mistake ", step));
    job.handle = std::make_shared<Handle>();
    job.handle->finish();
    job.check = [](const Job&) {};
    return job;
  }
  Request request;
  request.collective = Collective::broadcast;
  const auto out = job.memory.emplace_back(std::make_shared<Memory>(9, kUntouched));
  request.tensors.push_back({{9}, DType::u8, out->data.get(), out->data.get()});
  job.handle = engine.submit(process_set, std::move(request));
  job.check = [step](const Job& self) {
    check_contains(error_of<DisagreementError>(self.handle),
                   concat("rejected its own call: mistake ", step));
    CHECK(is_untouched(*self.memory[0]));
  };
  return job;
}

Job submit_barrier(Engine& engine, int process_set) {
  Job job;
  job.handle = engine.submit(process_set, Request{});
  job.check = [](const Job& self) { self.handle->rethrow(); };
  return job;
}

// Step `step` of a script that all ranks of the set follow: `random` is in the same state on all.
Job submit_step(Engine& engine, int process_set, int step, Random& random, Rank rank, int size) {
  const auto op = static_cast<ReduceOp>(below(random, kNumReduceOps));
  const Rank root = below(random, size);
  const std::vector<std::int64_t> numels = random_numels(random);
  switch (below(random, 8)) {
    case 0:
    case 1:
      return submit_allreduce<float>(engine, process_set, step, op, rank, size, numels);
    case 2:
      return submit_allreduce<double>(engine, process_set, step, op, rank, size, numels);
    case 3:
      return submit_broadcast(engine, process_set, step, root, rank, numels);
    case 4:
      return submit_allgather(engine, process_set, step, rank, size);
    case 5:
      if (size == 1) return submit_barrier(engine, process_set);
      return submit_disagreement(engine, process_set, step, random, rank, size);
    case 6:
      if (size == 1) return submit_barrier(engine, process_set);
      return submit_rejection(engine, process_set, step, random, rank, size);
    default:
      return submit_barrier(engine, process_set);
  }
}

// ---- scenarios
// -----------------------------------------------------------------------------------

// One set; every rank waits at moments of its own for requests of its own choice.
void random_requests(int size, int seed) {
  run_ranks("random requests", size, patient(), [&](std::unique_ptr<Engine>& engine) {
    const Rank rank = engine->layout().rank;
    Random script = random_of({seed, size});
    Random own = random_of({seed, size, 100 + rank});
    std::vector<Job> jobs;
    for (int step = 0; step < 60; ++step) {
      jobs.push_back(submit_step(*engine, Engine::kGlobalSet, step, script, rank, size));
      if (below(own, 4) != 0) continue;
      const auto chosen = jobs.begin() + below(own, static_cast<int>(jobs.size()));
      chosen->finish();
      jobs.erase(chosen);
    }
    for (Job& job : jobs) job.finish();
  });
}

// Requests that take many chunks, go round the ring, have parts of several dtypes whose slots
// follow each other, and have tensors that nearly cancel; the last three with statistics, one of
// them with infinities. Each rank dawdles where it likes.
void large_requests(int size, int seed) {
  run_ranks("large requests", size, patient(), [&](std::unique_ptr<Engine>& engine) {
    const Rank rank = engine->layout().rank;
    Random script = random_of({seed, size, 7});
    Random own = random_of({seed, size, 400 + rank});
    for (int step = 0; step < 6; ++step) {
      // An average's infinities are counted by who reduces them, one in each block.
      const auto op = step == 4       ? ReduceOp::average
                      : step % 2 == 0 ? ReduceOp::sum
                                      : ReduceOp::adasum;
      Request request;
      request.collective = Collective::allreduce;
      request.name = concat("step ", step);
      request.op = op;
      const bool has_statistics = step >= 3;
      request.has_statistics = has_statistics;
      const bool has_infinities = step == 4;
      std::vector<std::shared_ptr<Memory>> memory;
      const std::int64_t numel = 100'000 + below(script, step == 5 ? 5'000'000 : 400'000);
      const std::int64_t numels[] = {numel, 300, numel / 3};
      const auto is_wide = [](std::size_t t) { return t == 2; };
      // Whole numbers for sums. Adasum: neighbours that point apart by 2^-20 of their length.
      const auto value = [&](Rank owner, std::int64_t i) {
        const double base = element(step, op == ReduceOp::adasum ? owner / 2 : owner, i);
        if (has_infinities && i % 1000 == 7) return std::numeric_limits<double>::infinity();
        if (op != ReduceOp::adasum) return base;
        return (owner % 2 == 0 ? 1 : -1) * (base + (i % size == owner ? 0x1p-20 : 0.0));
      };
      for (std::size_t t = 0; t < std::size(numels); ++t) {
        memory.push_back(std::make_shared<Memory>(numels[t] * (is_wide(t) ? 8 : 4)));
        const auto mine = [&](std::int64_t i) { return value(rank, i); };
        if (is_wide(t))
          fill<double>(*memory[t], mine);
        else
          fill<float>(*memory[t], mine);
        request.tensors.push_back({{numels[t]},
                                   is_wide(t) ? DType::f64 : DType::f32,
                                   memory[t]->data.get(),
                                   memory[t]->data.get()});
      }
      for (int i = below(own, 4); i > 0; --i) std::this_thread::yield();
      const HandlePtr handle = engine->submit(Engine::kGlobalSet, std::move(request));
      await(handle);
      handle->rethrow();
      const std::vector<std::int64_t>& nonfinite = handle->result().statistics.nonfinite;
      CHECK(nonfinite.size() == (has_statistics ? std::size(numels) : 0));
      for (std::size_t t = 0; t < nonfinite.size(); ++t)
        CHECK(nonfinite[t] == (has_infinities ? (numels[t] + 992) / 1000 : 0));
      if (op == ReduceOp::adasum) continue;  // tests/test_shared_collectives.py knows its result
      const auto sum = [&](std::int64_t i) {
        double total = 0;
        for (Rank owner = 0; owner < size; ++owner) total += value(owner, i);
        return op == ReduceOp::average ? total / size : total;
      };
      check_equal<float>(*memory[0], sum);
      check_equal<float>(*memory[1], sum);
      check_equal<double>(*memory[2], sum);
    }
  });
}

// Sets that overlap in every way; each rank mixes their scripts in an order of its own.
void overlapping_sets(int seed) {
  const std::vector<std::vector<Rank>> members{{0, 1, 2, 3}, {0, 1},    {1, 2},
                                               {0, 2},       {1, 2, 3}, {3}};
  run_ranks("overlapping sets", 4, patient(), [&](std::unique_ptr<Engine>& engine) {
    const Rank self = engine->layout().rank;
    Random own = random_of({seed, 200 + self});
    struct Script {
      int process_set;
      Rank rank;
      int size;
      int step;
      Random random;
    };
    std::vector<Script> scripts;
    for (std::size_t i = 0; i < members.size(); ++i) {
      const int id = i == 0 ? Engine::kGlobalSet : engine->add_process_set(members[i]);
      CHECK(id == static_cast<int>(i));
      const auto place = std::find(members[i].begin(), members[i].end(), self);
      if (place == members[i].end()) continue;
      scripts.push_back({id, static_cast<Rank>(place - members[i].begin()),
                         static_cast<int>(members[i].size()), 0, random_of({seed, 300 + id})});
    }
    std::vector<Job> jobs;
    while (!scripts.empty()) {
      const auto chosen = scripts.begin() + below(own, static_cast<int>(scripts.size()));
      jobs.push_back(submit_step(*engine, chosen->process_set, chosen->step, chosen->random,
                                 chosen->rank, chosen->size));
      if (++chosen->step == 25) scripts.erase(chosen);
    }
    std::shuffle(jobs.begin(), jobs.end(), own);
    for (Job& job : jobs) job.finish();
  });
}

// Requests and barriers from two threads of each rank, and a third that reads the log.
void several_callers(int size) {
  run_ranks("several callers", size, patient(), [&](std::unique_ptr<Engine>& engine) {
    const Rank rank = engine->layout().rank;
    auto barriers = std::async(std::launch::async, [&] {
      for (int i = 0; i < 100; ++i) submit_barrier(*engine, Engine::kGlobalSet).finish();
    });
    auto reader = std::async(std::launch::async, [&] {
      while (!engine->log().is_closed()) (void)engine->log().next(Seconds{0.01});
    });
    for (int step = 0; step < 50; ++step) {
      submit_allreduce<float>(*engine, Engine::kGlobalSet, step, ReduceOp::sum, rank, size,
                              {17, 2000})
          .finish();
      CHECK(engine->breakage().empty());
    }
    barriers.get();
    engine->log().close();
    reader.get();
  });
}

// One rank goes while the others have a queue full of requests.
void departures(int size, int seed) {
  run_ranks("departures", size, patient(), [&](std::unique_ptr<Engine>& engine) {
    const Rank rank = engine->layout().rank;
    Random script = random_of({seed, size, 1});
    const Rank leaver = below(script, size);
    const int last_step = below(script, 20);
    const bool is_orderly = below(script, 2) == 0;
    std::vector<Job> jobs;
    for (int step = 0; step < 20; ++step) {
      if (step == last_step && rank == leaver) {
        for (const HandlePtr& handle : engine->leave("enough", is_orderly)) await(handle);
        for (Job& job : jobs) job.finish();
        return;
      }
      try {
        jobs.push_back(submit_allreduce<double>(*engine, Engine::kGlobalSet, step, ReduceOp::adasum,
                                                rank, size, {5, 0, 700}));
      } catch (const TransportError& error) {
        check_contains(error.what(), concat("rank ", leaver, " has left: enough"));
        break;
      }
    }
    for (std::size_t step = 0; step < jobs.size(); ++step) {
      if (static_cast<int>(step) < last_step) {
        jobs[step].finish();
      } else {
        check_contains(error_of<TransportError>(jobs[step].handle),
                       concat("rank ", leaver, " has left: enough"));
      }
    }
  });
}

// A rank destroys its engine and frees its memory without waiting for anything.
void destroyed_at_work(int size, int seed) {
  run_ranks("destroyed at work", size, patient(), [&](std::unique_ptr<Engine>& engine) {
    const Rank rank = engine->layout().rank;
    Random script = random_of({seed, size, 2});
    const Rank culprit = below(script, size);
    const std::int64_t numel = 1 + below(script, 300'000);
    const auto op = static_cast<ReduceOp>(below(script, kNumReduceOps));
    std::vector<Job> jobs;
    for (int step = 0; step < 3; ++step) {
      try {
        jobs.push_back(
            submit_allreduce<float>(*engine, Engine::kGlobalSet, step, op, rank, size, {numel, 3}));
      } catch (const TransportError&) {
        break;  // the news was faster
      }
    }
    if (rank == culprit) {
      for (int i = below(script, 3); i > 0; --i) await(jobs[static_cast<std::size_t>(i)].handle);
      engine.reset();
    }
    // Each request is either complete and right, or its error says what has happened.
    for (Job& job : jobs) {
      await(job.handle);
      try {
        job.check(job);
      } catch (const TransportError& error) {
        check_contains(error.what(), "step ");
        check_contains(error.what(),
                       rank == culprit ? "destroyed before shutdown()" : concat("rank ", culprit));
      }
      job.memory.clear();
    }
  });
}

// A rank that has taken part in the start, and then never answers.
void silent_rank(int size) {
  Settings settings = patient();
  settings.warn_after = Seconds{0.6};
  settings.fail_after = Seconds{1.2};
  const auto world = std::make_shared<ThreadWorld>(size);
  const Rank silent = size - 1;
  std::string errors;
  std::mutex mutex;
  std::promise<void> is_over;
  std::shared_future<void> over = is_over.get_future();
  std::vector<std::thread> threads;
  threads.emplace_back([&] {
    ThreadBootstrap bootstrap(world, silent);
    const Layout layout = discover_layout(bootstrap, describe_this_process(), settings.fail_after);
    std::optional<TransportPair> transports;
    if (!uses_shared_memory) {  // else it is missed before there is an engine
      std::vector<Rank> ranks(static_cast<std::size_t>(size));
      std::iota(ranks.begin(), ranks.end(), 0);
      transports = ThreadTransportProvider(bootstrap).connect(ranks, Engine::kGlobalSet);
      std::string why_not;
      (void)SharedNode::make(*transports->control, ranks, layout, settings, cpu_kernels(), nullptr,
                             why_not);
    }
    over.wait();
  });
  std::vector<std::thread> others;
  for (Rank rank = 0; rank < silent; ++rank)
    others.emplace_back([&, rank] {
      try {
        std::unique_ptr<Engine> engine;
        try {
          engine = make_engine(world, rank, settings);
        } catch (const TransportError& error) {
          if (!uses_shared_memory) throw;
          check_contains(error.what(), "not all ranks of the node have come within 1.2 s");
          return;
        }
        CHECK(!uses_shared_memory);
        const std::string text =
            error_of<TransportError>(engine->submit(Engine::kGlobalSet, Request{}));
        check_contains(text, "gave up after 1.2 s");
        check_contains(text,
                       concat("rank ", silent, " does not answer (dead, stopped or cut off)"));
        CHECK(!contains(text, "alive"));
        check_contains(engine->breakage(), "does not answer");
        const auto event = engine->log().next(Seconds{0});
        CHECK(event && event->level == EventLog::Level::warning);
        check_contains(event->text,
                       "barrier() (request 0 of the global process set): waiting for ");
        CHECK(engine->leave("broken", false).empty());
      } catch (const std::exception& error) {
        const std::lock_guard lock(mutex);
        errors += concat("rank ", rank, ": ", error.what(), "\n");
      }
    });
  for (std::thread& thread : others) thread.join();
  is_over.set_value();
  threads.front().join();
  if (errors.empty()) return;
  std::fprintf(stderr, "engine_stress: silent rank of %d:\n%s", size, errors.c_str());
  std::exit(1);
}

}  // namespace

int main(int argc, char** argv) {
  uses_shared_memory = argc > 1 && std::string(argv[1]) == "shared";
  uses_workers = argc > 2 && std::string(argv[2]) == "workers";
  if (uses_shared_memory)
    for (const int size : {2, 3, 5})
      for (int seed = 0; seed < 2; ++seed) large_requests(size, seed);
  for (const int size : {1, 2, 3, 5, 8})
    for (int seed = 0; seed < 3; ++seed) random_requests(size, seed);
  for (int seed = 0; seed < 4; ++seed) overlapping_sets(seed);
  for (const int size : {1, 2, 4}) several_callers(size);
  for (const int size : {2, 3, 5})
    for (int seed = 0; seed < 6; ++seed) departures(size, seed);
  for (const int size : {2, 3, 4})
    for (int seed = 0; seed < 4; ++seed) destroyed_at_work(size, seed);
  silent_rank(2);
  silent_rank(3);
  std::puts("engine_stress: all is well");
  return 0;
}
