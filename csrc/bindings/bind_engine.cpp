#include <pybind11/stl.h>

#include "base/errors.h"
#include "bindings/bindings.h"
#include "bindings/counting_kernels.h"
#include "bindings/engine_holder.h"
#include "bootstrap/mpi_bootstrap.h"
#include "bootstrap/thread_bootstrap.h"
#include "collectives/workers.h"
#include "engine/shared_tuning.h"
#include "transports/plugin_transport.h"
#include "transports/thread_transport.h"

namespace py = pybind11;

namespace adareduce {
namespace {

using NoGil = py::call_guard<py::gil_scoped_release>;

struct EventLevelNames {
  static const char* of(EventLog::Level level) {
    constexpr const char* kNames[] = {"DEBUG", "INFO", "WARNING", "ERROR", "FATAL"};
    return kNames[static_cast<int>(level)];
  }
};

EngineHolder over_threads(const std::shared_ptr<ThreadWorld>& world, Rank rank,
                          const Settings& settings, bool counts_work) {
  auto bootstrap = std::make_shared<ThreadBootstrap>(world, rank);
  auto transports = std::make_shared<ThreadTransportProvider>(*bootstrap);
  return {std::make_unique<Engine>(std::move(bootstrap), std::move(transports), settings,
                                   counts_work ? counting_kernels() : cpu_kernels())};
}

EngineHolder over_mpi(const py::capsule& plugin, std::uint64_t handle,
                      const std::vector<Rank>& ranks, const Settings& settings) {
  const auto* table = plugin.get_pointer<adareduce_mpi_plugin>();
  const py::gil_scoped_release no_gil;
  auto bootstrap = MpiBootstrap::make(table, handle, ranks, settings.fail_after);
  auto transports = std::make_shared<MpiTransportProvider>(bootstrap, settings.fail_after);
  return {std::make_unique<Engine>(std::move(bootstrap), std::move(transports), settings)};
}

// One call of one rank. `drives`: it is done on this thread as far as it goes.
template <bool drives>
std::shared_ptr<Handle> submit(EngineHolder& self, int process_set, int collective,
                               std::string name, int op, Rank root, double prescale,
                               double postscale, const py::sequence& tensors,
                               std::vector<std::int64_t> splits, bool has_statistics,
                               std::vector<double> local_squares) {
  Request request{.collective = static_cast<Collective>(collective),
                  .name = std::move(name),
                  .op = static_cast<ReduceOp>(op),
                  .root = root,
                  .prescale = prescale,
                  .postscale = postscale,
                  .tensors = tensors_of(tensors),
                  .splits = std::move(splits),
                  .has_statistics = has_statistics,
                  .local_squares = std::move(local_squares)};
  if constexpr (!drives) return self.get().submit(process_set, std::move(request));
  const py::gil_scoped_release no_gil;
  const std::shared_lock use(*self.in_use);
  return self.get().submit(process_set, std::move(request), true);
}

// An all-reduce of one contiguous tensor without a name, factors or statistics. None: it has ended
// well; one that has ended with an error throws it.
std::shared_ptr<Handle> allreduce_at_once(EngineHolder& self, int process_set, int op,
                                          const py::tuple& shape, int dtype, std::uintptr_t input,
                                          std::uintptr_t output) {
  thread_local Request request{.collective = Collective::allreduce, .tensors = {TensorArg{}}};
  TensorArg& tensor = request.tensors.front();
  request.op = static_cast<ReduceOp>(op);
  tensor.shape.clear();
  for (const py::handle& extent : shape) tensor.shape.push_back(PyLong_AsLongLong(extent.ptr()));
  if (PyErr_Occurred() != nullptr) throw py::error_already_set();
  tensor.dtype = static_cast<DType>(dtype);
  tensor.input = reinterpret_cast<const void*>(input);
  tensor.output = reinterpret_cast<void*>(output);
  const py::gil_scoped_release no_gil;
  const std::shared_lock use(*self.in_use);
  return self.get().run_at_once(process_set, request);
}

// How a set shares memory.
Engine::SharedFacts shared_facts(EngineHolder& self, int process_set) {
  const py::gil_scoped_release no_gil;
  return self.get().shared_facts(process_set);
}

#define ADAREDUCE_SUBMIT_ARGUMENTS                                                              \
  py::kw_only(), py::arg("process_set"), py::arg("collective"), py::arg("name"), py::arg("op"), \
      py::arg("root"), py::arg("prescale"), py::arg("postscale"), py::arg("tensors"),           \
      py::arg("splits") = std::vector<std::int64_t>(), py::arg("has_statistics") = false,       \
      py::arg("local_squares") = std::vector<double>()

void bind_handle(py::module_& module) {
  py::class_<Buffer, std::shared_ptr<Buffer>>(module, "Memory", py::buffer_protocol())
      .def_buffer([](Buffer& memory) {
        return py::buffer_info(static_cast<std::uint8_t*>(memory.data()),
                               static_cast<py::ssize_t>(memory.bytes()));
      });
  py::class_<Handle, std::shared_ptr<Handle>>(module, "Handle")
      .def("is_finished", &Handle::is_finished)
      .def(
          "wait_for",
          [](const Handle& handle, double seconds) { return handle.wait_for(Seconds{seconds}); },
          py::arg("seconds"), NoGil())
      .def("rethrow", &Handle::rethrow)
      .def("gathered",
           [](const Handle& handle) {
             std::vector<std::tuple<std::shared_ptr<Buffer>, std::vector<std::int64_t>,
                                    std::vector<std::int64_t>>>
                 results;
             for (const GatheredTensor& tensor : handle.result().gathered)
               results.emplace_back(tensor.memory, tensor.shape, tensor.rows_from);
             return results;
           })
      .def("statistics", [](const Handle& handle) {
        const ReductionStatistics& statistics = handle.result().statistics;
        return std::tuple(statistics.groups, statistics.orthogonality, statistics.nonfinite);
      });
}

}  // namespace

void bind_engine(py::module_& module) {
  py::class_<Settings>(module, "Settings")
      .def(py::init([](double warn_after, double fail_after, bool shared_memory,
                       std::optional<std::uint32_t> shared_choice, int workers) {
             Settings settings;
             settings.warn_after = Seconds{warn_after};
             settings.fail_after = Seconds{fail_after};
             settings.shared_memory = shared_memory;
             const std::size_t count = SharedTuning::choices().size();
             if (shared_choice >= count)  // none is less than any
               throw UsageError(concat("Settings: shared_choice must be below ", count, ", got ",
                                       *shared_choice));
             settings.shared_choice = shared_choice;
             if (workers < 1 || workers > Workers::kMost)
               throw UsageError(
                   concat("Settings: workers must be 1 ... ", Workers::kMost, ", got ", workers));
             settings.workers = workers;
             return settings;
           }),
           py::kw_only(), py::arg("warn_after"), py::arg("fail_after"),
           py::arg("shared_memory") = false, py::arg("shared_choice") = py::none(),
           py::arg("workers") = 1);
  py::class_<ThreadWorld, std::shared_ptr<ThreadWorld>>(module, "ThreadWorld")
      .def(py::init<int>(), py::arg("size"))
      .def("traffic", [](ThreadWorld& world) {
        const ThreadWorld::Traffic traffic = world.traffic();
        return std::pair(traffic.messages, traffic.bytes);
      });
  bind_handle(module);

  using Facts = Engine::SharedFacts;
  py::class_<Facts>(module, "SharedFacts")
      .def_readonly("is_used", &Facts::is_used)
      .def_readonly("why_not", &Facts::why_not)
      .def_readonly("workers", &Facts::workers)
      .def_property_readonly("choices",
                             [](const Facts& facts) {
                               std::vector<std::tuple<std::string, std::string, std::int64_t>> rows;
                               for (const SharedTuning::Row& row : facts.choices)
                                 rows.emplace_back(row.what, row.choice, row.requests);
                               return rows;
                             })
      .def_readonly("requests", &Facts::requests)
      .def_readonly("long_looks", &Facts::long_looks);
  py::class_<EngineHolder> engine(module, "Engine");
  bind_device(module, engine);
  engine
      .def_static("over_threads", &over_threads, py::arg("world"), py::arg("rank"),
                  py::arg("settings"), py::arg("counts_work") = false, NoGil())
      .def_static("over_mpi", &over_mpi, py::arg("plugin"), py::arg("handle"), py::arg("ranks"),
                  py::arg("settings"))
      .def("submit", &submit<false>, ADAREDUCE_SUBMIT_ARGUMENTS)
      .def("run", &submit<true>, ADAREDUCE_SUBMIT_ARGUMENTS)
      .def("allreduce_at_once", &allreduce_at_once, py::arg("process_set"), py::arg("op"),
           py::arg("shape"), py::arg("dtype"), py::arg("input"), py::arg("output"))
      .def("shared_memory", &shared_facts, py::arg("process_set"))
      .def(
          "empty_shared",
          [](EngineHolder& self, int process_set, std::int64_t bytes) {
            return self.get().empty_shared(process_set, bytes, throw_if_interrupted);
          },
          py::kw_only(), py::arg("process_set"), py::arg("bytes"), NoGil())
      .def(
          "reject",
          [](EngineHolder& self, int process_set, bool is_barrier, const std::string& reason) {
            self.get().reject(process_set, is_barrier, reason);
          },
          py::kw_only(), py::arg("process_set"), py::arg("is_barrier"), py::arg("reason"))
      .def(
          "add_process_set",
          [](EngineHolder& self, const std::vector<Rank>& ranks) {
            return self.get().add_process_set(ranks);
          },
          py::arg("ranks"), NoGil())
      .def(
          "leave",
          [](EngineHolder& self, const std::string& reason, bool is_orderly) {
            return self.get().leave(reason, is_orderly, throw_if_interrupted);
          },
          py::kw_only(), py::arg("reason"), py::arg("is_orderly"), NoGil())
      .def("breakage", [](EngineHolder& self) { return self.get().breakage(); })
      .def(
          "stop",
          [](EngineHolder& self) {
            const std::unique_lock alone(*self.in_use);
            self.engine.reset();
          },
          NoGil())
      .def("forget", [](EngineHolder& self) { (void)self.engine.release(); })
      .def(
          "next_event",
          [](EngineHolder& self,
             double seconds) -> std::optional<std::pair<std::string, std::string>> {
            const auto event = self.get().log().next(Seconds{seconds});
            if (!event) return std::nullopt;
            return {{EventLevelNames::of(event->level), event->text}};
          },
          py::arg("seconds"), NoGil())
      .def("close_log", [](EngineHolder& self) { self.get().log().close(); })
      .def("is_log_closed", [](EngineHolder& self) { return self.get().log().is_closed(); })
      .def_property_readonly("rank", [](EngineHolder& self) { return self.get().layout().rank; })
      .def_property_readonly("size", [](EngineHolder& self) { return self.get().layout().size; })
      .def_property_readonly("local_rank",
                             [](EngineHolder& self) { return self.get().layout().local_rank; })
      .def_property_readonly("local_size",
                             [](EngineHolder& self) { return self.get().layout().local_size; })
      .def_property_readonly("cross_rank",
                             [](EngineHolder& self) { return self.get().layout().cross_rank; })
      .def_property_readonly("cross_size",
                             [](EngineHolder& self) { return self.get().layout().cross_size; })
      .def_property_readonly("is_homogeneous",
                             [](EngineHolder& self) { return self.get().layout().homogeneous; });
}

}  // namespace adareduce
