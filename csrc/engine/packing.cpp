#include "engine/packing.h"

#include <limits>

#include "collectives/context.h"
#include "kernels/coefficients.h"

namespace adareduce {

void pack(const KernelTable& kernels, const Request& request, const Plan& plan, void* fused) {
  for (const Plan::Part& part : plan.parts) {
    const std::int64_t width = size_of(part.dtype);
    std::vector<const void*> inputs;
    for (const Plan::Piece& piece : part.pieces)
      inputs.push_back(at(request.tensors[piece.tensor].input, piece.begin, width));
    const SegmentTable table = part.table();
    kernels.pack({.tensors = inputs.data(),
                  .fused = at(fused, part.offset, 1),
                  .numel = part.numel,
                  .dtype = part.dtype,
                  .segments = &table,
                  .scale = request.prescale},
                 {});
  }
}

void unpack(const KernelTable& kernels, const Request& request, const Plan& plan, const void* fused,
            std::int64_t* nonfinite) {
  for (const Plan::Part& part : plan.parts) {
    const std::int64_t width = size_of(part.dtype);
    const bool owns_rows = request.collective == Collective::reducescatter;
    std::vector<void*> outputs;
    for (std::int64_t p = part.own_pieces.begin; p < part.own_pieces.end; ++p) {
      const Plan::Piece& piece = part.pieces[static_cast<std::size_t>(p)];
      outputs.push_back(
          at(request.tensors[piece.tensor].output, owns_rows ? 0 : piece.begin, width));
    }
    const SegmentTable table = part.own_table();
    std::vector<std::int64_t> counts(nonfinite == nullptr ? 0 : outputs.size());
    kernels.unpack({.fused = at(fused, part.offset, 1),
                    .tensors = outputs.data(),
                    .dtype = part.dtype,
                    .segments = &table,
                    .scale = request.postscale,
                    .nonfinite = nonfinite == nullptr ? nullptr : counts.data()},
                   {});
    for (std::size_t p = 0; p < counts.size(); ++p)
      nonfinite[part.pieces[static_cast<std::size_t>(part.own_pieces.begin) + p].tensor] +=
          counts[p];
  }
}

std::vector<double> group_statistics(std::span<const double> squares, int num_ranks,
                                     bool are_given) {
  constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
  constexpr VarianceAndNorm kUnknown{kNan, kNan};
  std::vector<double> rows;
  for (std::size_t i = 0; i < squares.size(); i += kSquaresPerGroup) {
    const double scale = num_ranks;
    const double of_mean = squares[i + 1] / (scale * scale);
    const VarianceAndNorm estimate =
        are_given ? kUnknown : variance_and_norm(squares[i], of_mean, scale);
    rows.insert(rows.end(), {squares[i], of_mean, estimate.variance, estimate.squared_norm});
  }
  return rows;
}

std::int64_t row_bytes(const TensorArg& tensor) {
  TensorArg row{.shape = tensor.shape};
  row.shape.front() = 1;
  return row.numel() * size_of(tensor.dtype);
}

}  // namespace adareduce
