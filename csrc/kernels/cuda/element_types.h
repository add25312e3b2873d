#pragma once
#include <type_traits>

#include "base/errors.h"
#include "kernels/cuda/device.cuh"

namespace adareduce::cuda {

template <typename T>
struct TypeTag {
  using type = T;
};

[[noreturn]] inline void refuse(const char* kernel, DType dtype) {
  throw UsageError(
      concat(kernel, ": dtype must be one that it is defined for, got ", name_of(dtype)));
}

/// body(TypeTag<T>{}) for the element type of `dtype`; throws UsageError for others.
template <typename Body>
void for_float(DType dtype, const char* kernel, Body&& body) {
  switch (dtype) {
    case DType::f16:
      return body(TypeTag<f16>{});
    case DType::bf16:
      return body(TypeTag<bf16>{});
    case DType::f32:
      return body(TypeTag<float>{});
    case DType::f64:
      return body(TypeTag<double>{});
    default:
      refuse(kernel, dtype);
  }
}
template <typename Body>
void for_number(DType dtype, const char* kernel, Body&& body) {
  switch (dtype) {
    case DType::u8:
      return body(TypeTag<std::uint8_t>{});
    case DType::i8:
      return body(TypeTag<std::int8_t>{});
    case DType::i16:
      return body(TypeTag<std::int16_t>{});
    case DType::i32:
      return body(TypeTag<std::int32_t>{});
    case DType::i64:
      return body(TypeTag<std::int64_t>{});
    default:
      return for_float(dtype, kernel, body);
  }
}

/// A truth value: any bits but zero are true.
struct boolean {
  std::uint8_t bits;
};

/// What T is added up, multiplied or compared in: float for half types, 32 or 64 bits for integers
/// (sums of up to kManyInputs of the shorter ones are exact; products count modulo 2^bits).
template <typename T>
struct Accumulating {
  using type = std::conditional_t<sizeof(T) <= 2, std::int32_t, std::int64_t>;
};
template <>
struct Accumulating<f16> {
  using type = float;
};
template <>
struct Accumulating<bf16> {
  using type = float;
};
template <>
struct Accumulating<float> {
  using type = float;
};
template <>
struct Accumulating<double> {
  using type = double;
};
template <typename T>
using AccumulatorOf = typename Accumulating<T>::type;
template <typename T>
inline constexpr bool kIsFloat = std::is_floating_point_v<AccumulatorOf<T>>;

}  // namespace adareduce::cuda
