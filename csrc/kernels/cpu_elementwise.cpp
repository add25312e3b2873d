// Numerics: sums run in the element type, in the order of the inputs. Scaling multiplies in double
// and rounds once; an average divides the rounded sum in double and rounds once more.
#include <cstring>

#include "kernels/cpu_kernels.h"
#include "kernels/dispatch.h"

namespace adareduce::cpu {
namespace {

template <typename T>
void scale_into(const T* in, std::int64_t numel, double scale, T* out) {
  for (std::int64_t i = 0; i < numel; ++i)
    out[i] = static_cast<T>(static_cast<double>(in[i]) * scale);
}

void copy_or_scale(const void* in, std::int64_t numel, DType dtype, double scale, void* out,
                   const char* kernel) {
  if (numel == 0) return;  // a null pointer is legal for an empty tensor, not for memcpy
  if (scale == 1.0) {
    std::memcpy(out, in, static_cast<std::size_t>(numel * size_of(dtype)));
    return;
  }
  for_arithmetic_type(dtype, kernel, [&]<typename T>(T) {
    scale_into(static_cast<const T*>(in), numel, scale, static_cast<T*>(out));
  });
}

// Blocks that stay in the first-level cache while one input after the other is added.
constexpr std::int64_t kSumBlock = 1024;

template <typename T>
void sum_into(const SumArgs& args) {
  T block[kSumBlock];
  T* out = static_cast<T*>(args.out);
  for (std::int64_t begin = 0; begin < args.numel; begin += kSumBlock) {
    const std::int64_t numel = clip({begin, begin + kSumBlock}, {0, args.numel}).size();
    std::memcpy(block, static_cast<const T*>(args.inputs[0]) + begin,
                static_cast<std::size_t>(numel) * sizeof(T));
    for (int k = 1; k < args.num_inputs; ++k) {
      const T* in = static_cast<const T*>(args.inputs[k]) + begin;
      for (std::int64_t i = 0; i < numel; ++i) block[i] += in[i];
    }
    if (args.divisor != 1.0)
      for (std::int64_t i = 0; i < numel; ++i)
        block[i] = static_cast<T>(static_cast<double>(block[i]) / args.divisor);
    std::memcpy(out + begin, block, static_cast<std::size_t>(numel) * sizeof(T));
  }
}

}  // namespace

void pack(const PackArgs& args, Stream) {
  const std::int64_t width = size_of(args.dtype);
  char* fused = static_cast<char*>(args.fused);
  std::int64_t filled = 0;
  const auto zero_until = [&](std::int64_t end) {
    if (end > filled)
      std::memset(fused + filled * width, 0, static_cast<std::size_t>((end - filled) * width));
  };
  for (std::int64_t s = 0; s < args.segments->count; ++s) {
    const TensorSegment& segment = args.segments->on_host[s];
    zero_until(segment.offset);
    copy_or_scale(args.tensors[s], segment.numel, args.dtype, args.scale,
                  fused + segment.offset * width, "pack");
    filled = segment.range().end;
  }
  zero_until(args.numel);
}

void unpack(const UnpackArgs& args, Stream) {
  const std::int64_t width = size_of(args.dtype);
  const char* fused = static_cast<const char*>(args.fused);
  for (std::int64_t s = 0; s < args.segments->count; ++s) {
    const TensorSegment& segment = args.segments->on_host[s];
    copy_or_scale(fused + segment.offset * width, segment.numel, args.dtype, args.scale,
                  args.tensors[s], "unpack");
  }
}

void sum(const SumArgs& args, Stream) {
  if (args.numel == 0 || args.num_inputs == 0) return;
  for_arithmetic_type(args.dtype, "sum", [&]<typename T>(T) { sum_into<T>(args); });
}

}  // namespace adareduce::cpu
