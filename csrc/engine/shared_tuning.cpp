#include "engine/shared_tuning.h"

#include <algorithm>
#include <bit>
#include <utility>

#include "base/errors.h"

namespace adareduce {
namespace {

constexpr std::int64_t kLeastSize = 256 << 10;
constexpr std::array<const char*, 4> kKindNames{"element by element", "Adasum", "reduce-scatter",
                                                "moved as it is"};
// The first candidate is what most machines like. One of so many requests tries another; more of
// them until each has been tried so often, then for a round, and for a round when all of the best
// one's last times have changed by so much: what is true of the others may have changed, too.
constexpr int kFirstTrials = 2;
constexpr std::int64_t kTryEvery = 23;
constexpr std::int64_t kTrySoon = 5;
constexpr double kChanged = 0.15;
// Those of choices() that the engine's thread, which never looks for long, can tell apart.
constexpr std::size_t kChoicesOfEngine = 4;
static_assert(kChoicesOfEngine > 1);  // there is another one to try

}  // namespace

void SharedTuning::Candidate::add(double sample) {
  seconds_per_byte[static_cast<std::size_t>(samples++) % kWindow] = sample;
}

double SharedTuning::Candidate::median() const {
  std::array<double, kWindow> sorted = seconds_per_byte;
  const auto known = std::min<std::int64_t>(samples, kWindow);
  const auto middle = sorted.begin() + (known - 1) / 2;
  std::nth_element(sorted.begin(), middle, sorted.begin() + known);
  return *middle;
}

bool SharedTuning::Candidate::has_moved(double before, double share) const {
  const auto known = std::min<std::int64_t>(samples, kWindow);
  const auto [least, most] =
      std::minmax_element(seconds_per_byte.begin(), seconds_per_byte.begin() + known);
  return *least > before * (1 + share) || *most < before / (1 + share);
}

std::string SharedChoice::text() const {
  return concat("chunks of ", chunk_bytes >> 10, " KiB, ",
                streams ? "streaming stores" : "ordinary stores",
                looks_long ? ", long looks" : ", short looks");
}

const std::vector<SharedChoice>& SharedTuning::choices() {
  static const std::vector<SharedChoice> kChoices{{512 << 10, false, true},
                                                  {2048 << 10, false, true},
                                                  {512 << 10, true, true},
                                                  {2048 << 10, true, true},
                                                  {512 << 10, false, false}};
  return kChoices;
}

int SharedTuning::size_class(std::int64_t bytes) {
  const auto times_least = static_cast<std::uint64_t>(bytes / kLeastSize);
  return std::min(static_cast<int>(std::bit_width(times_least)), kSizes - 1);
}

// The works of which a call consists differ: pack, Gram, combine, unpack.
int SharedTuning::kind_of(const Request& request) {
  switch (request.collective) {
    case Collective::allreduce:
      return request.op == ReduceOp::adasum ? 1 : 0;
    case Collective::reducescatter:
      return 2;
    default:
      return 3;
  }
}

SharedTuning::Class& SharedTuning::class_of(const Request& request, std::int64_t bytes,
                                            bool is_caller) {
  Class& of = classes_[is_caller ? 0 : 1][static_cast<std::size_t>(kind_of(request))]
                      [static_cast<std::size_t>(size_class(bytes))];
  if (of.candidates.empty()) of.candidates.resize(is_caller ? choices().size() : kChoicesOfEngine);
  return of;
}

std::uint32_t SharedTuning::best(const Class& of) {
  // One that has been tried once may have paid for pages that are touched for the first time.
  const auto is_known = [](const Candidate& c) { return c.samples >= kFirstTrials; };
  const auto least = std::min_element(
      of.candidates.begin(), of.candidates.end(), [&](const Candidate& a, const Candidate& b) {
        return is_known(a) && (!is_known(b) || a.median() < b.median());
      });
  return is_known(*least) ? static_cast<std::uint32_t>(least - of.candidates.begin()) : 0;
}

std::uint32_t SharedTuning::propose(const Request& request, std::int64_t bytes, bool is_caller) {
  const std::lock_guard lock(mutex_);
  Class& of = class_of(request, bytes, is_caller);
  ++of.requests;
  if (of.again) return *std::exchange(of.again, std::nullopt);
  const auto fewest = std::min_element(
      of.candidates.begin(), of.candidates.end(),
      [](const Candidate& a, const Candidate& b) { return a.samples < b.samples; });
  const bool knows_all = fewest->samples >= kFirstTrials;
  const std::uint32_t leader = best(of);
  if (++of.since_trial < (knows_all && of.due == 0 ? kTryEvery : kTrySoon)) return leader;
  of.since_trial = 0;
  if (!knows_all) return static_cast<std::uint32_t>(fewest - of.candidates.begin());
  if (of.due > 0) --of.due;
  do of.tried = (of.tried + 1) % of.candidates.size();
  while (of.tried == leader);
  return static_cast<std::uint32_t>(of.tried);
}

void SharedTuning::record(const Request& request, std::int64_t bytes, bool is_caller,
                          std::uint32_t choice, Seconds took) {
  const std::lock_guard lock(mutex_);
  Class& of = class_of(request, bytes, is_caller);
  if (bytes <= 0 || choice >= of.candidates.size()) return;
  const double sample = took.count() / static_cast<double>(bytes);
  const Candidate& leader = of.candidates[best(of)];
  const bool is_better = leader.samples > 0 && sample < leader.median();
  Candidate& candidate = of.candidates[choice];
  candidate.add(sample);
  if (&candidate != &leader) {
    if (is_better) of.again = choice;
  } else if (leader.has_moved(of.settled, kChanged)) {
    of.settled = leader.median();
    of.due = of.candidates.size() - 1;
  }
}

std::vector<SharedTuning::Row> SharedTuning::rows() const {
  const std::lock_guard lock(mutex_);
  std::vector<Row> rows;
  const auto limit = [](int index) {
    const std::int64_t kibs = (kLeastSize >> 10) << index;
    return kibs < 1024 ? concat(kibs, " KiB") : concat(kibs >> 10, " MiB");
  };
  for (const Classes& classes : classes_)
    for (int kind = 0; kind < kKinds; ++kind)
      for (int size = 0; size < kSizes; ++size) {
        const Class& of = classes[static_cast<std::size_t>(kind)][static_cast<std::size_t>(size)];
        if (of.requests == 0) continue;
        rows.push_back({concat(kKindNames[static_cast<std::size_t>(kind)], ", ",
                               size == 0            ? concat("below ", limit(0))
                               : size == kSizes - 1 ? concat("from ", limit(size - 1))
                                                    : concat(limit(size - 1), " to ", limit(size)),
                               &classes == &classes_[0] ? "" : ", in the background"),
                        choices()[best(of)].text(), of.requests});
      }
  return rows;
}

}  // namespace adareduce
