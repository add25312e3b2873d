#include "engine/agreement.h"

#include <algorithm>
#include <array>
#include <cstring>

#include "base/errors.h"
#include "collectives/allgather.h"

namespace adareduce {
namespace {

constexpr std::size_t kDifferencesToList = 3;

// Strings one after the other, each behind its length.
class Writer {
 public:
  void add(std::string_view text) {
    const std::uint64_t length = text.size();
    bytes_.append(reinterpret_cast<const char*>(&length), sizeof length);
    bytes_.append(text);
  }
  std::string take() { return std::move(bytes_); }

 private:
  std::string bytes_;
};

class Reader {
 public:
  explicit Reader(std::string_view bytes) : bytes_(bytes) {}
  bool is_at_end() const { return bytes_.empty(); }
  std::string next() {
    std::uint64_t length = 0;
    if (bytes_.size() < sizeof length) throw TransportError("a record of a peer is cut off");
    std::memcpy(&length, bytes_.data(), sizeof length);
    bytes_.remove_prefix(sizeof length);
    if (bytes_.size() < length) throw TransportError("a record of a peer is cut off");
    std::string text(bytes_.substr(0, length));
    bytes_.remove_prefix(length);
    return text;
  }

 private:
  std::string_view bytes_;
};

std::string to_bytes(const Record& record) {
  Writer writer;
  writer.add(std::to_string(record.flags));
  writer.add(record.description);
  writer.add(record.reason);
  for (const auto& [key, value] : record.fields) {
    writer.add(key);
    writer.add(value);
  }
  return writer.take();
}

Record from_bytes(std::string_view bytes) {
  Reader reader(bytes);
  Record record;
  record.flags = static_cast<std::uint32_t>(std::stoul(reader.next()));
  record.description = reader.next();
  record.reason = reader.next();
  while (!reader.is_at_end()) {
    std::string key = reader.next();
    record.fields.emplace_back(std::move(key), reader.next());
  }
  return record;
}

// Values in the order in which the ranks hold them first, with those ranks.
using Sides = std::vector<std::pair<std::string, std::vector<Rank>>>;

void add_to_side(Sides& sides, const std::string& value, Rank rank) {
  const auto side =
      std::find_if(sides.begin(), sides.end(), [&](const auto& s) { return s.first == value; });
  if (side == sides.end())
    sides.push_back({value, {rank}});
  else
    side->second.push_back(rank);
}

std::string side_list(const Sides& sides, std::string_view between) {
  std::string text;
  for (const auto& [value, ranks] : sides)
    text += concat(text.empty() ? "" : "; ", rank_list(ranks), between, value);
  return text;
}

}  // namespace

void merge(Header& into, const Header& other) {
  if (into.sequence != other.sequence || !(into.signature == other.signature))
    into.flags |= kDiffers;
  into.flags |= other.flags;
  if (into.placement != other.placement) into.placement = 0;
}

Task agree(Transport& transport, int tag, Header& header) {
  // Dissemination (Hensgen, Finkel, Manber 1988): after round k a rank knows the 2^k ranks up to
  // itself. Merging is idempotent, so it does not matter that some are counted twice.
  const Rank self = transport.rank();
  const int size = transport.size();
  for (int distance = 1; distance < size; distance *= 2) {
    const Header mine = header;
    Header theirs;
    const std::array send{SendPart{(self + distance) % size, &mine, sizeof mine}};
    const std::array receive{RecvPart{(self - distance + size) % size, &theirs, sizeof theirs}};
    co_await transport.start(tag, send, receive);
    merge(header, theirs);
  }
}

Record make_record(const Request& request) {
  return {request.flags, describe(request), request.reason, fields_of(request)};
}

Task exchange_records(Transport& transport, int tag, Record mine, std::vector<Record>& records) {
  const auto size = static_cast<std::size_t>(transport.size());
  const auto self = static_cast<std::size_t>(transport.rank());
  const Context context{transport, cpu_kernels()};
  const std::string text = to_bytes(mine);

  std::vector<std::int64_t> bytes_of(size, 0);
  bytes_of[self] = static_cast<std::int64_t>(text.size());
  co_await allgather_numbers(context, tag, bytes_of, 1);

  std::vector<std::size_t> begin_of{0};
  for (const std::int64_t bytes : bytes_of)
    begin_of.push_back(begin_of.back() + static_cast<std::size_t>(bytes));
  std::string all(begin_of.back(), '\0');
  std::copy(text.begin(), text.end(), all.begin() + static_cast<std::ptrdiff_t>(begin_of[self]));
  co_await allgather(context, tag, all.data(), bytes_of);

  records.clear();
  for (std::size_t rank = 0; rank < size; ++rank)
    records.push_back(from_bytes(
        std::string_view(all).substr(begin_of[rank], begin_of[rank + 1] - begin_of[rank])));
}

std::string rank_list(const std::vector<Rank>& ranks) {
  return concat(ranks.size() == 1 ? "rank " : "ranks ", join_words(ranks));
}

std::string explain_difference(const std::vector<Record>& records, const std::vector<Rank>& ranks) {
  // Fields by first appearance; a rank that lacks one says so.
  std::vector<std::string> keys;
  for (const Record& record : records)
    for (const auto& [key, value] : record.fields)
      if (std::find(keys.begin(), keys.end(), key) == keys.end()) keys.push_back(key);

  std::string differences;
  std::size_t listed = 0;
  for (const std::string& key : keys) {
    Sides sides;
    for (std::size_t i = 0; i < records.size(); ++i) {
      const auto& fields = records[i].fields;
      const auto field =
          std::find_if(fields.begin(), fields.end(), [&](const auto& f) { return f.first == key; });
      add_to_side(sides, field == fields.end() ? "none" : field->second, ranks[i]);
    }
    if (sides.size() == 1) continue;
    if (++listed > kDifferencesToList) continue;
    differences += concat(differences.empty() ? "" : "; ", key, " (", side_list(sides, ": "), ")");
  }
  if (listed > kDifferencesToList)
    differences += concat(" and ", listed - kDifferencesToList, " more");
  if (listed == 0) differences = "the order of their calls";

  Sides calls;
  for (std::size_t i = 0; i < records.size(); ++i)
    add_to_side(calls, records[i].description, ranks[i]);
  return concat("the ranks disagree on ", differences, ". Calls: ", side_list(calls, " called "),
                ". Every rank of a process set must make the same calls in the same order.");
}

std::string explain_flags(const std::vector<Record>& records, const std::vector<Rank>& ranks,
                          std::uint32_t flags) {
  std::string text;
  for (std::size_t i = 0; i < records.size(); ++i) {
    const std::uint32_t raised = records[i].flags & flags;
    if (raised == 0) continue;
    const char* what = raised & kLeaving    ? " has left"
                       : raised & kRejected ? " rejected its own call"
                       : raised & kFailed   ? " could not prepare its call"
                                            : " has joined";
    text += concat(text.empty() ? "" : "; ", "rank ", ranks[i], what, ": ", records[i].reason);
  }
  return text;
}

}  // namespace adareduce
