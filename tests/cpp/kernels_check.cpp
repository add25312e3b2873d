// Every CPU kernel over edge cases, on memory that ends where the tensors end, so that
// AddressSanitizer sees any element too many. Oracle: sums and products of small whole numbers,
// which are exact in whatever order.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#include "base/errors.h"
#include "collectives/shards.h"
#include "engine/plan.h"
#include "kernels/coefficients.h"
#include "kernels/gram.h"
#include "kernels/kernels.h"
#include "kernels/peer_kernels.h"

using namespace adareduce;

namespace {

const KernelTable* table_in_use = nullptr;
const KernelTable& kernels() { return *table_in_use; }

#define CHECK(condition)                                                                 \
  do {                                                                                   \
    if (!(condition)) {                                                                  \
      std::fprintf(stderr, "%s:%d: %s does not hold\n", __FILE__, __LINE__, #condition); \
      std::exit(1);                                                                      \
    }                                                                                    \
  } while (false)

template <typename T>
constexpr DType kDTypeOf = DType::f32;
template <>
constexpr DType kDTypeOf<double> = DType::f64;

// Exactly `numel` elements on the heap; null for none, as an empty tensor may be.
template <typename T>
class Array {
 public:
  explicit Array(std::int64_t numel, int seed = 0) : numel_(numel) {
    if (numel > 0) data_.reset(new T[static_cast<std::size_t>(numel)]);
    for (std::int64_t i = 0; i < numel; ++i) (*this)[i] = value(i, seed);
  }
  static T value(std::int64_t i, int seed) {
    return static_cast<T>((i * (7 + seed) + 3 * seed) % 23 - 11);
  }
  T* data() const { return data_.get(); }
  std::int64_t numel() const { return numel_; }
  T& operator[](std::int64_t i) const { return data_[static_cast<std::size_t>(i)]; }

 private:
  std::int64_t numel_;
  std::unique_ptr<T[]> data_;
};

const std::vector<std::vector<std::int64_t>> kLayouts{
    {}, {0}, {1}, {15}, {16}, {17}, {40}, {0, 0}, {0, 40, 0}, {1, 1, 1}, {31, 0, 33, 5}, {1000, 3}};

// The whole, nothing, single elements and ranges that cut segments.
std::vector<Range> ranges_of(std::int64_t numel) {
  std::vector<Range> ranges{{0, numel}, {0, 0}, {numel, numel}};
  for (const std::int64_t begin : {0, 1, 15, 16, 17, 35})
    for (const std::int64_t length : {0, 1, 16, 29})
      if (begin + length <= numel) ranges.push_back({begin, begin + length});
  return ranges;
}

template <typename T>
void check_pairs() {
  for (const auto& numels : kLayouts) {
    const auto [segments, padded] = lay_out(numels);
    // No padding behind the last element: a kernel has no business there.
    const std::int64_t numel = segments.empty() ? 0 : segments.back().range().end;
    const SegmentTable table{segments.data(), nullptr, static_cast<std::int64_t>(segments.size())};
    const Array<T> lower(numel, 1), upper(numel, 2);
    for (const Range range : ranges_of(numel)) {
      const VectorPair pair{lower.data(), upper.data(), range, kDTypeOf<T>, &table};
      const Array<double> stats(table.count * kStatsPerSegment);
      kernels().pair_stats({pair, stats.data()}, {});
      for (std::int64_t s = 0; s < table.count; ++s) {
        double dot = 0, lower_sq = 0, upper_sq = 0;
        const Range part = clip(segments[static_cast<std::size_t>(s)].range(), range);
        for (std::int64_t i = part.begin; i < part.end; ++i) {
          dot += static_cast<double>(lower[i]) * static_cast<double>(upper[i]);
          lower_sq += static_cast<double>(lower[i]) * static_cast<double>(lower[i]);
          upper_sq += static_cast<double>(upper[i]) * static_cast<double>(upper[i]);
        }
        CHECK(stats[3 * s] == dot);
        CHECK(stats[3 * s + 1] == lower_sq);
        CHECK(stats[3 * s + 2] == upper_sq);
      }
      const Array<T> out(numel, 3);
      kernels().pair_combine({pair, stats.data(), out.data()}, {});
      std::vector<bool> is_written(static_cast<std::size_t>(numel), false);
      for (std::int64_t s = 0; s < table.count; ++s) {
        const Range part = clip(segments[static_cast<std::size_t>(s)].range(), range);
        const double lower_share = adasum_share(stats[3 * s], stats[3 * s + 1]);
        const double upper_share = adasum_share(stats[3 * s], stats[3 * s + 2]);
        for (std::int64_t i = part.begin; i < part.end; ++i) {
          const double exact = lower_share * static_cast<double>(lower[i]) +
                               upper_share * static_cast<double>(upper[i]);
          CHECK(std::abs(static_cast<double>(out[i]) - exact) <= 1e-5 * (1 + std::abs(exact)));
          is_written[static_cast<std::size_t>(i)] = true;
        }
      }
      for (std::int64_t i = 0; i < numel; ++i)
        CHECK(is_written[static_cast<std::size_t>(i)] || out[i] == Array<T>::value(i, 3));
    }
  }
}

// A mover for `width` bytes per element, told to be of type `dtype`.
template <typename T>
void check_moving(DType dtype, double scale) {
  CHECK(size_of(dtype) == static_cast<std::int64_t>(sizeof(T)));
  for (const auto& numels : kLayouts) {
    const auto [segments, padded] = lay_out(numels);
    const SegmentTable table{segments.data(), nullptr, static_cast<std::int64_t>(segments.size())};
    std::vector<Array<T>> tensors, results;
    std::vector<const void*> inputs;
    std::vector<void*> outputs;
    for (const std::int64_t numel : numels) {
      inputs.push_back(tensors.emplace_back(numel, 4).data());
      outputs.push_back(results.emplace_back(numel, 5).data());
    }
    for (const std::int64_t behind : {0, 1, 16}) {
      const Array<T> fused(padded + behind, 6);
      kernels().pack({inputs.data(), fused.data(), fused.numel(), dtype, &table, scale}, {});
      kernels().unpack({fused.data(), outputs.data(), dtype, &table, scale}, {});
      std::int64_t filled = 0;
      for (std::size_t t = 0; t < numels.size(); ++t) {
        for (; filled < segments[t].offset; ++filled) CHECK(fused[filled] == T{});
        for (std::int64_t i = 0; i < numels[t]; ++i) {
          const T once = static_cast<T>(static_cast<double>(tensors[t][i]) * scale);
          CHECK(fused[filled + i] == once);
          CHECK(results[t][i] == static_cast<T>(static_cast<double>(once) * scale));
        }
        filled = segments[t].range().end;
      }
      for (; filled < fused.numel(); ++filled) CHECK(fused[filled] == T{});
    }
  }
}

template <typename T>
void check_sum() {
  for (const std::int64_t numel : {0, 1, 15, 16, 17, 1023, 1024, 1025, 4000})
    for (const int num_inputs : {0, 1, 2, 3, 8})
      for (const double divisor : {1.0, 4.0})
        for (int target = -1; target < num_inputs; ++target) {
          std::vector<Array<T>> arrays;
          std::vector<const void*> inputs;
          for (int k = 0; k < num_inputs; ++k)
            inputs.push_back(arrays.emplace_back(numel, k).data());
          const Array<T> separate(numel, 9);
          const Array<T>& out = target < 0 ? separate : arrays[static_cast<std::size_t>(target)];
          kernels().reduce({Elementwise::sum, inputs.data(), num_inputs, out.data(), numel,
                            kDTypeOf<T>, divisor},
                           {});
          for (std::int64_t i = 0; i < numel; ++i) {
            double total = 0;
            for (int k = 0; k < num_inputs; ++k)
              total += static_cast<double>(Array<T>::value(i, k));
            const T expected =
                num_inputs == 0 ? Array<T>::value(i, 9) : static_cast<T>(total / divisor);
            CHECK(out[i] == expected);
          }
        }
}

// Gram matrices, weighted sums over each of the inputs, and nodes.
template <typename T>
void check_vectors(const PeerKernelTable& peer) {
  for (const std::int64_t numel : {0, 1, 15, 16, 17, 63, 1025})
    for (const int count : {1, 2, 3, 4, 5, 8, 16}) {
      std::vector<Array<T>> arrays;
      std::vector<const void*> inputs;
      std::vector<double> c;
      for (int k = 0; k < count; ++k) {
        inputs.push_back(arrays.emplace_back(numel, k).data());
        c.push_back(k - 2.5);
      }
      const VectorsArgs vectors{inputs.data(), count, numel, kDTypeOf<T>};
      const Array<double> gram(gram_numel(count), 1);
      peer.gram({vectors, gram.data()});
      double stats[kStatsPerSegment] = {1, 2, 3};
      peer.node_stats({vectors, c.data(), 0x5555u & ((1u << count) - 1), 1u, stats});
      double node_sq = 0;
      for (int i = 0; i < count; ++i)
        for (int j = i; j < count; ++j) {
          double product = 0;
          for (std::int64_t e = 0; e < numel; ++e)
            product += static_cast<double>(arrays[static_cast<std::size_t>(i)][e]) *
                       static_cast<double>(arrays[static_cast<std::size_t>(j)][e]);
          const int index = gram_index(i, j, count);
          CHECK(gram[index] == product + Array<double>::value(index, 1));
          if (i % 2 == 0 && j % 2 == 0)
            node_sq += (i == j ? 1 : 2) * product * c[static_cast<std::size_t>(i)] *
                       c[static_cast<std::size_t>(j)];
        }
      CHECK(stats[1] == 2 + node_sq);
      for (int target = 0; target < count; ++target) {
        const Array<T>& out = arrays[static_cast<std::size_t>(target)];
        peer.weighted_sum({vectors, c.data(), out.data()});
        for (std::int64_t e = 0; e < numel; ++e) {
          double total = 0;
          for (int k = 0; k < count; ++k)
            total += c[static_cast<std::size_t>(k)] * static_cast<double>(Array<T>::value(e, k));
          CHECK(out[e] == static_cast<T>(total));
          out[e] = Array<T>::value(e, target);
        }
      }
      const Array<T> copied(numel, 9);
      peer.copy(inputs[0], numel * static_cast<std::int64_t>(sizeof(T)), copied.data(), true);
      for (std::int64_t e = 0; e < numel; ++e) CHECK(copied[e] == arrays[0][e]);
    }
}

// Half types by their bits: 0x4000 is 2 in float16, in bfloat16 too.
void check_halves(DType dtype, const PeerKernelTable& peer) {
  for (const std::int64_t numel : {1, 7, 15, 16, 17, 33, 513}) {
    const Array<std::uint16_t> lower(numel), upper(numel), out(numel);
    for (std::int64_t i = 0; i < numel; ++i) lower[i] = upper[i] = 0x4000;
    const TensorSegment segment{0, numel};
    const SegmentTable table{&segment, nullptr, 1};
    double stats[3];
    const VectorPair pair{lower.data(), upper.data(), {0, numel}, dtype, &table};
    kernels().pair_stats({pair, stats}, {});
    for (const double stat : stats) CHECK(stat == 4.0 * static_cast<double>(numel));
    kernels().pair_combine({pair, stats, out.data()}, {});
    for (std::int64_t i = 0; i < numel; ++i) CHECK(out[i] == 0x4000);
    const void* inputs[] = {lower.data(), upper.data()};
    double gram[3] = {};
    peer.gram({{inputs, 2, numel, dtype}, gram});
    for (const double product : gram) CHECK(product == 4.0 * static_cast<double>(numel));
    const double quarters[] = {0.75, 0.25};
    peer.weighted_sum({{inputs, 2, numel, dtype}, quarters, out.data()});
    for (std::int64_t i = 0; i < numel; ++i) CHECK(out[i] == 0x4000);
    const std::int32_t group = 0;
    double squares[2] = {};
    kernels().reduce_squares(
        {{Elementwise::sum, inputs, 2, out.data(), numel, dtype, 2.0}, 0, &table, &group, squares},
        {});
    CHECK(squares[0] == 8.0 * static_cast<double>(numel));
    CHECK(squares[1] == 16.0 * static_cast<double>(numel));
    for (std::int64_t i = 0; i < numel; ++i) CHECK(out[i] == 0x4000);
    void* outputs[] = {out.data()};
    std::int64_t nonfinite = -1;
    kernels().unpack({lower.data(), outputs, dtype, &table, 0.5, &nonfinite}, {});
    CHECK(nonfinite == 0);
    for (std::int64_t i = 0; i < numel; ++i)
      CHECK(out[i] == (dtype == DType::f16 ? 0x3c00 : 0x3f80));
  }
}

void check_refusals() {
  for (int code = 0; code < kNumDTypes; ++code) {
    const auto dtype = static_cast<DType>(code);
    if (has_arithmetic(ReduceOp::sum, dtype)) continue;
    const Array<double> some(4, 1);
    const void* inputs[] = {some.data()};
    bool is_refused = false;
    try {
      kernels().reduce({Elementwise::sum, inputs, 1, some.data(), 4, dtype, 1.0}, {});
    } catch (const UsageError&) {
      is_refused = true;
    }
    CHECK(is_refused);
  }
}

void check_shards() {
  for (const std::int64_t numel : {0, 1, 16, 17, 1000})
    for (int size = 1; size <= 9; ++size) {
      std::int64_t end = 0;
      for (Rank rank = 0; rank < size; ++rank) {
        const Range shard = shard_of(numel, rank, size);
        CHECK(shard.begin == end);
        end = shard.end;
      }
      CHECK(end == numel);
    }
}

}  // namespace

int main() {
  for (const char* isa : {"baseline", "avx2", "avx512"}) {
    table_in_use = cpu_kernels_for(isa);
    if (table_in_use == nullptr) continue;
    check_pairs<float>();
    check_pairs<double>();
    for (const double scale : {1.0, 0.5, -3.0}) {
      check_moving<float>(DType::f32, scale);
      check_moving<double>(DType::f64, scale);
    }
    check_moving<std::uint8_t>(DType::u8, 1.0);
    check_moving<std::int8_t>(DType::i8, 1.0);
    check_moving<std::int16_t>(DType::i16, 1.0);
    check_moving<std::int32_t>(DType::i32, 1.0);
    check_moving<std::int64_t>(DType::i64, 1.0);
    check_moving<std::uint16_t>(DType::f16, 1.0);
    check_moving<std::uint16_t>(DType::bf16, 1.0);
    check_moving<std::uint8_t>(DType::boolean, 1.0);
    check_sum<float>();
    check_sum<double>();
    check_vectors<float>(*cpu_peer_kernels_for(isa));
    check_vectors<double>(*cpu_peer_kernels_for(isa));
    check_refusals();
    check_halves(DType::f16, *cpu_peer_kernels_for(isa));
    check_halves(DType::bf16, *cpu_peer_kernels_for(isa));
  }
  check_shards();
  std::puts("kernels_check: all is well");
  return 0;
}
