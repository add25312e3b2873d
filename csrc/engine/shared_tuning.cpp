#include "engine/shared_tuning.h"

#include <algorithm>

#include "base/errors.h"

namespace adareduce {
namespace {

constexpr std::int64_t kMiB = std::int64_t{1} << 20;
constexpr std::array<std::int64_t, 4> kSizeLimits{2 * kMiB, 8 * kMiB, 32 * kMiB, 128 * kMiB};
// Every candidate is tried so often before one is preferred, and one of so many requests tries
// another later on.
constexpr int kFirstTrials = 2;
constexpr std::int64_t kTryEvery = 24;
// The part of a new sample in the running mean; the first ones count more.
constexpr double kWeight = 0.25;

}  // namespace

std::string SharedChoice::text() const {
  return concat("chunks of ", chunk_bytes >> 10, " KiB, ",
                streams ? "streaming stores" : "ordinary stores");
}

const std::vector<SharedChoice>& SharedTuning::choices() {
  static const std::vector<SharedChoice> kChoices{
      {512 << 10, false}, {2048 << 10, false}, {512 << 10, true}, {2048 << 10, true}};
  return kChoices;
}

int SharedTuning::size_class(std::int64_t bytes) {
  return static_cast<int>(std::upper_bound(kSizeLimits.begin(), kSizeLimits.end(), bytes) -
                          kSizeLimits.begin());
}

SharedTuning::Class& SharedTuning::class_of(const Request& request, std::int64_t bytes) {
  const bool is_adasum = request.op == ReduceOp::adasum;
  Class& of = classes_[is_adasum ? 1 : 0][static_cast<std::size_t>(size_class(bytes))];
  if (of.candidates.empty()) of.candidates.resize(choices().size());
  return of;
}

std::uint32_t SharedTuning::best(const Class& of) {
  const auto least = std::min_element(
      of.candidates.begin(), of.candidates.end(), [](const Candidate& a, const Candidate& b) {
        return a.samples > 0 && (b.samples == 0 || a.seconds_per_byte < b.seconds_per_byte);
      });
  return static_cast<std::uint32_t>(least - of.candidates.begin());
}

std::uint32_t SharedTuning::propose(const Request& request, std::int64_t bytes) {
  const std::lock_guard lock(mutex_);
  Class& of = class_of(request, bytes);
  const auto count = static_cast<std::int64_t>(of.candidates.size());
  const std::int64_t request_number = of.requests++;
  const auto fewest = std::min_element(
      of.candidates.begin(), of.candidates.end(),
      [](const Candidate& a, const Candidate& b) { return a.samples < b.samples; });
  if (fewest->samples < kFirstTrials)
    return static_cast<std::uint32_t>(fewest - of.candidates.begin());
  if (request_number % kTryEvery == 0)
    return static_cast<std::uint32_t>(request_number / kTryEvery % count);
  return best(of);
}

void SharedTuning::record(const Request& request, std::int64_t bytes, std::uint32_t choice,
                          Seconds took) {
  if (bytes <= 0 || choice >= choices().size()) return;
  const std::lock_guard lock(mutex_);
  Candidate& candidate = class_of(request, bytes).candidates[choice];
  const double sample = took.count() / static_cast<double>(bytes);
  const double weight = std::max(kWeight, 1.0 / ++candidate.samples);
  // The first sample of all pays for pages that are touched for the first time.
  candidate.seconds_per_byte =
      candidate.samples == 2
          ? std::min(candidate.seconds_per_byte, sample)
          : candidate.seconds_per_byte + weight * (sample - candidate.seconds_per_byte);
}

std::vector<SharedTuning::Row> SharedTuning::rows() const {
  const std::lock_guard lock(mutex_);
  std::vector<Row> rows;
  for (int kind = 0; kind < kKinds; ++kind)
    for (int size = 0; size < kSizes; ++size) {
      const Class& of = classes_[static_cast<std::size_t>(kind)][static_cast<std::size_t>(size)];
      if (of.requests == 0) continue;
      const auto limit = [](int index) {
        return concat(kSizeLimits[static_cast<std::size_t>(index)] / kMiB, " MiB");
      };
      rows.push_back({concat(kind == 1 ? "Adasum" : "element by element", ", ",
                             size == 0            ? concat("below ", limit(0))
                             : size == kSizes - 1 ? concat("from ", limit(size - 1))
                                                  : concat(limit(size - 1), " to ", limit(size))),
                      choices()[best(of)].text(), of.requests});
    }
  return rows;
}

}  // namespace adareduce
