// The kernel table as C functions, for tests/cuda_kernels.py. Each call runs to its end. It returns
// 0, or 1 and a text in last_error(). The caller vouches for the sizes of arrays.
#include <cuda_runtime.h>

#include <limits>
#include <string>
#include <vector>

#include "cuda_emulation/control.h"
#include "kernels/cuda/cuda_kernels.h"
#include "kernels/cuda/launch.h"

using namespace adareduce;

namespace {

std::string error_text;

// A fused buffer's tables. Memory of the emulated device is that of the host.
struct Table {
  std::vector<TensorSegment> segments;
  cuda::Items items;
  std::vector<double> slots;
  ItemTable item_table;
  SegmentTable table;

  Table(const std::int64_t* rows, std::int64_t count) {
    for (std::int64_t s = 0; s < count; ++s) segments.push_back({rows[2 * s], rows[2 * s + 1]});
    items = cuda::make_items(segments.data(), count);
    slots.resize(items.items.size() * kSlotsPerItem);
    item_table = {items.items.data(),
                  items.items.data(),
                  items.first.data(),
                  items.first.data(),
                  static_cast<std::int64_t>(items.items.size()),
                  slots.data()};
    table = {segments.data(), segments.data(), count, &item_table};
  }
};

// Slots are poisoned: a sum over one that no warp has written is NaN.
template <typename Body>
int run(Table* table, Body&& body) {
  cudaStream_t stream = nullptr;
  try {
    if (table != nullptr)
      table->slots.assign(table->slots.size(), std::numeric_limits<double>::quiet_NaN());
    ADAREDUCE_CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    body(Stream{stream});
    ADAREDUCE_CUDA(cudaStreamSynchronize(stream));
    ADAREDUCE_CUDA(cudaStreamDestroy(stream));
    return 0;
  } catch (const Error& error) {
    error_text = error.what();
    if (stream != nullptr) (void)cudaStreamDestroy(stream);
    return 1;
  }
}

const KernelTable& kernels(int accumulator) {
  return cuda::cuda_kernels(static_cast<cuda::Accumulator>(accumulator));
}

VectorPair pair_of(const Table* table, int dtype, const void* lower, const void* upper,
                   std::int64_t begin, std::int64_t end) {
  return {lower, upper, {begin, end}, static_cast<DType>(dtype), &table->table};
}

}  // namespace

extern "C" {

const char* last_error() { return error_text.c_str(); }
std::int64_t kernel_runs() { return cuda_emulation::kernel_runs(); }
std::int64_t host_waits() { return cuda_emulation::host_waits(); }

Table* make_table(const std::int64_t* segments, std::int64_t count) {
  return new Table(segments, count);
}
void free_table(Table* table) { delete table; }
std::int64_t num_items(const Table* table) { return table->item_table.count; }
void get_items(const Table* table, std::int64_t* rows) {
  for (const Item& item : table->items.items) {
    *rows++ = item.begin;
    *rows++ = item.numel;
    *rows++ = item.segment;
  }
}
void get_items_in(const Table* table, std::int64_t begin, std::int64_t end, std::int64_t* range) {
  const Range items = cuda::items_in(table->item_table, {begin, end});
  range[0] = items.begin;
  range[1] = items.end;
}

int pair_stats(Table* table, int accumulator, int dtype, const void* lower, const void* upper,
               std::int64_t begin, std::int64_t end, double* stats) {
  return run(table, [&](Stream stream) {
    kernels(accumulator)
        .pair_stats({pair_of(table, dtype, lower, upper, begin, end), stats}, stream);
  });
}

int pair_combine(Table* table, int dtype, const void* lower, const void* upper, std::int64_t begin,
                 std::int64_t end, const double* stats, void* out) {
  return run(table, [&](Stream stream) {
    kernels(0).pair_combine({pair_of(table, dtype, lower, upper, begin, end), stats, out}, stream);
  });
}

int pack(Table* table, int accumulator, int dtype, const void* const* tensors, double scale,
         void* fused, std::int64_t numel, double* squares) {
  return run(table, [&](Stream stream) {
    kernels(accumulator)
        .pack({tensors, fused, numel, static_cast<DType>(dtype), &table->table, scale, squares},
              stream);
  });
}

int unpack(Table* table, int accumulator, int dtype, const void* fused, void* const* tensors,
           double scale, std::int64_t* nonfinite, double* squares) {
  return run(table, [&](Stream stream) {
    kernels(accumulator)
        .unpack(
            {fused, tensors, static_cast<DType>(dtype), &table->table, scale, nonfinite, squares},
            stream);
  });
}

int reduce(int dtype, int op, const void* const* inputs, int num_inputs, double divisor, void* out,
           std::int64_t numel) {
  return run(nullptr, [&](Stream stream) {
    kernels(0).reduce({static_cast<Elementwise>(op), inputs, num_inputs, out, numel,
                       static_cast<DType>(dtype), divisor},
                      stream);
  });
}

int reduce_squares(Table* table, int dtype, const void* const* inputs, int num_inputs,
                   double divisor, void* out, std::int64_t begin, std::int64_t end,
                   const std::int32_t* group_of, double* squares) {
  return run(table, [&](Stream stream) {
    kernels(0).reduce_squares({{Elementwise::sum, inputs, num_inputs, out, end - begin,
                                static_cast<DType>(dtype), divisor},
                               begin,
                               &table->table,
                               group_of,
                               squares},
                              stream);
  });
}

int contribute_leaf_squares(std::int64_t num_segments, double* of_node, double* carried,
                            int contributes) {
  return run(nullptr, [&](Stream stream) {
    LeafSquaresArgs args;
    args.num_segments = num_segments;
    args.of_node = of_node;
    args.carried = carried;
    args.contributes = contributes != 0;
    kernels(0).contribute_leaf_squares(args, stream);
  });
}

int collect_leaf_squares(std::int64_t num_segments, double* of_node, double* carried,
                         const double* pair_stats, int lower_is_leaf, int upper_is_leaf,
                         double* orthogonality) {
  return run(nullptr, [&](Stream stream) {
    kernels(0).collect_leaf_squares({num_segments, of_node, carried, false, pair_stats,
                                     lower_is_leaf != 0, upper_is_leaf != 0, orthogonality},
                                    stream);
  });
}

int copy(const void* from, std::int64_t bytes, void* to) {
  return run(nullptr, [&](Stream stream) { kernels(0).copy(from, bytes, to, stream); });
}

int group_stats(std::int64_t num_segments, const std::int32_t* group_of, std::int64_t num_groups,
                int num_ranks, const double* squares, int squares_are_of_groups,
                const double* result_squares, double result_is_mean_times, int has_estimates,
                double* out) {
  return run(nullptr, [&](Stream stream) {
    cuda::group_stats(
        {num_segments, group_of, num_groups, num_ranks, num_ranks, squares,
         squares_are_of_groups != 0, result_squares, result_is_mean_times, has_estimates != 0, out},
        stream);
  });
}

}  // extern "C"
