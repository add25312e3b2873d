#include "arithmetic.h"

#include <cuda_emulation/half_types.h>

#include <array>
#include <cmath>
#include <type_traits>

namespace fake_nccl {
namespace {

struct Half {
  std::uint16_t bits;
  operator float() const { return cuda_emulation::float_of_half(bits); }
  static Half of(float x) { return {cuda_emulation::half_of_float(x)}; }
};
struct BFloat16 {
  std::uint16_t bits;
  operator float() const { return std::bit_cast<float>(std::uint32_t{bits} << 16); }
  static BFloat16 of(float x) { return {cuda_emulation::bfloat16_of_float(x)}; }
};

template <typename T>
constexpr bool kIsHalf = std::is_same_v<T, Half> || std::is_same_v<T, BFloat16>;

template <typename T>
T step(nccl::ncclRedOp_t op, T a, T b) {
  if constexpr (kIsHalf<T>) {
    return T::of(step<float>(op, a, b));
  } else if constexpr (std::is_integral_v<T>) {
    using U = std::make_unsigned_t<T>;  // wraps without being undefined
    switch (op) {
      case nccl::ncclProd:
        return static_cast<T>(static_cast<std::uint64_t>(U(a)) * U(b));
      case nccl::ncclMax:
        return a > b ? a : b;
      case nccl::ncclMin:
        return a < b ? a : b;
      default:
        return static_cast<T>(static_cast<U>(U(a) + U(b)));
    }
  } else {
    switch (op) {
      case nccl::ncclProd:
        return a * b;
      case nccl::ncclMax:
        return std::fmax(a, b);
      case nccl::ncclMin:
        return std::fmin(a, b);
      default:
        return a + b;
    }
  }
}

template <typename T>
T scaled(T x, std::size_t ranks) {
  if constexpr (kIsHalf<T>)
    return T::of(static_cast<float>(x) *
                 static_cast<float>(T::of(1.0f / static_cast<float>(ranks))));
  else if constexpr (std::is_floating_point_v<T>)
    return x * (T{1} / static_cast<T>(ranks));
  else
    return x;
}

template <typename T>
void reduce_as(nccl::ncclRedOp_t op, const std::vector<const void*>& inputs, std::size_t count,
               void* out) {
  const bool is_average = op == nccl::ncclAvg;
  const std::size_t ranks = inputs.size();
  for (std::size_t i = 0; i < count; ++i) {
    const auto value = [&](std::size_t rank) {
      const T x = static_cast<const T*>(inputs[rank])[i];
      return is_average ? scaled(x, ranks) : x;
    };
    T result = value(0);
    for (std::size_t rank = 1; rank < ranks; ++rank) result = step<T>(op, result, value(rank));
    if constexpr (std::is_integral_v<T>)
      if (is_average) result = static_cast<T>(result / static_cast<T>(ranks));
    static_cast<T*>(out)[i] = result;
  }
}

struct Type {
  const char* name;
  std::size_t bytes;
  void (*reduce)(nccl::ncclRedOp_t, const std::vector<const void*>&, std::size_t, void*);
};
constexpr std::array<Type, 10> kTypes{{
    {"int8", 1, reduce_as<std::int8_t>},
    {"uint8", 1, reduce_as<std::uint8_t>},
    {"int32", 4, reduce_as<std::int32_t>},
    {"uint32", 4, reduce_as<std::uint32_t>},
    {"int64", 8, reduce_as<std::int64_t>},
    {"uint64", 8, reduce_as<std::uint64_t>},
    {"float16", 2, reduce_as<Half>},
    {"float32", 4, reduce_as<float>},
    {"float64", 8, reduce_as<double>},
    {"bfloat16", 2, reduce_as<BFloat16>},
}};

}  // namespace

std::size_t size_of(nccl::ncclDataType_t type) {
  return type < kTypes.size() ? kTypes[type].bytes : 0;
}

std::string name_of(nccl::ncclDataType_t type) {
  return type < kTypes.size() ? kTypes[type].name : "type " + std::to_string(type);
}

std::string name_of(nccl::ncclRedOp_t op) {
  constexpr std::array<const char*, 5> kNames{"Sum", "Prod", "Max", "Min", "Avg"};
  return op < kNames.size() ? kNames[op] : "op " + std::to_string(op);
}

void reduce(nccl::ncclRedOp_t op, nccl::ncclDataType_t type, const std::vector<const void*>& inputs,
            std::size_t count, void* out) {
  kTypes[type].reduce(op, inputs, count, out);
}

}  // namespace fake_nccl
