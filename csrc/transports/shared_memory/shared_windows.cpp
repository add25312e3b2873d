#include "transports/shared_memory/shared_windows.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <optional>
#include <sstream>

#include "transports/shared_memory/descriptor_socket.h"
#include "transports/shared_memory/memory_room.h"

namespace adareduce {
namespace {

using SteadyClock = std::chrono::steady_clock;

constexpr double kBytesPerSecond = 128.0 * (1 << 20);  // that a slow machine allocates
constexpr std::chrono::milliseconds kLookAround{100};  // for peers that have died
constexpr std::chrono::milliseconds kTryAgain{2};      // where a peer's queue was full

// What a rank says before anything is allocated. `problem`: it cannot take part.
struct Offer {
  std::string problem;
  std::int64_t bytes = 0;
  std::int64_t room = 0;
  std::uint64_t token[2] = {};  // which this rank alone puts into its letters
  std::string socket;
};

constexpr std::string_view kVersion = "windows-1";

std::string encode(const Offer& offer) {
  if (!offer.problem.empty()) return "!" + offer.problem;
  return concat(kVersion, " ", offer.bytes, " ", offer.room, " ", offer.token[0], " ",
                offer.token[1], " ", offer.socket);
}

Offer decode(const std::string& text) {
  Offer offer;
  std::string version;
  std::istringstream words(text);
  if (text.starts_with("!"))
    offer.problem = text.substr(1);
  else if (!(words >> version >> offer.bytes >> offer.room >> offer.token[0] >> offer.token[1] >>
             offer.socket) ||
           version != kVersion || offer.bytes < 0)
    offer.problem = "described its memory in a way that this version does not understand";
  return offer;
}

// What comes with a descriptor, or without one where there was no memory to be had. Bytes: the
// version has been compared.
struct Note {
  std::uint64_t token[2] = {};
  std::uint64_t has_memory = 0;  // no padding: nothing travels that was not written
  SegmentIdentity identity;
};

[[noreturn]] void fail(const std::string& text) {
  throw SharedMemoryError("SharedWindows: the ranks of this node cannot share memory, " + text);
}

// Throws where any rank has a problem, which is the same text on all ranks.
void fail_of(const std::vector<std::string>& problems) {
  std::string text;
  for (std::size_t rank = 0; rank < problems.size(); ++rank)
    if (!problems[rank].empty())
      text += concat(text.empty() ? "" : "; ", "rank ", rank, ": ", problems[rank]);
  if (!text.empty()) fail(text);
}

// The machine's room counts for all together, before any of them has begun.
void check_room(std::int64_t bytes, const std::vector<Offer>& offers) {
  for (std::size_t rank = 0; rank < offers.size(); ++rank)
    if (bytes > offers[rank].room)
      fail(concat("rank ", rank, ": allocating ", bytes, " bytes for all ranks, of which ",
                  offers[rank].room, " are left of the machine's memory or this cgroup's limit"));
}

std::int64_t sum_of_bytes(const std::vector<Offer>& offers) {
  std::int64_t sum = 0;
  for (const Offer& offer : offers)
    sum += std::min(offer.bytes, std::numeric_limits<std::int64_t>::max() - sum);
  return sum;
}

// Every rank's letters to all others: who has sent, who has received.
class Exchange {
 public:
  Exchange(Rank rank, const std::vector<Offer>& offers, const DescriptorSocket& socket)
      : rank_(rank), offers_(offers), socket_(socket), peers_(offers.size()) {
    for (std::size_t peer = 0; peer < offers.size(); ++peer) {
      if (static_cast<Rank>(peer) == rank) continue;
      peers_[peer].must_send = mine().bytes > 0;
      peers_[peer].must_receive = offers[peer].bytes > 0;
    }
  }

  // Sends `own` (null: there was no memory) to all and takes what they send. A rank that fails
  // goes through it all the same, because the others wait for its letters.
  void run(const SharedSegment* own, Seconds patience) {
    Note note{{mine().token[0], mine().token[1]}, own != nullptr ? 1u : 0u, {}};
    if (own != nullptr) note.identity = own->identity();
    const std::string bytes(reinterpret_cast<const char*>(&note), sizeof note);
    const auto start = SteadyClock::now();
    auto looked_around = start;
    while (true) {
      bool has_moved = send(bytes, own == nullptr ? -1 : own->descriptor());
      while (receive()) has_moved = true;
      if (has_moved) continue;
      if (!is_waiting(&Peer::must_send) && !is_waiting(&Peer::must_receive)) return;
      const auto now = SteadyClock::now();
      if (now - start > patience) return give_up(patience);
      if (now - looked_around > kLookAround) {
        looked_around = now;
        look_around();
      }
      socket_.wait(is_waiting(&Peer::must_send) ? kTryAgain : kLookAround);
    }
  }

  // Every rank's memory, in this process; incomplete where a rank has none and will say why.
  std::vector<std::shared_ptr<SharedSegment>> open(std::shared_ptr<SharedSegment> own) {
    std::vector<std::shared_ptr<SharedSegment>> segments(peers_.size());
    for (std::size_t peer = 0; peer < peers_.size(); ++peer) {
      if (!peers_[peer].problem.empty())
        throw SharedMemoryError(concat("rank ", peer, " ", peers_[peer].problem));
      if (static_cast<Rank>(peer) == rank_ || offers_[peer].bytes == 0) continue;
      if (!peers_[peer].has_memory) continue;
      if (peers_[peer].identity.bytes != offers_[peer].bytes)
        throw SharedMemoryError(concat("rank ", peer, " offered ", offers_[peer].bytes,
                                       " bytes and sent ", peers_[peer].identity.bytes));
      try {
        segments[peer] =
            SharedSegment::open(std::move(peers_[peer].descriptor), peers_[peer].identity);
      } catch (const SharedMemoryError& error) {
        throw SharedMemoryError(concat("opening the memory of rank ", peer, ": ", error.what()));
      }
    }
    segments[static_cast<std::size_t>(rank_)] = std::move(own);
    return segments;
  }

 private:
  struct Peer {
    bool must_send = false;     // to it
    bool must_receive = false;  // from it
    std::string problem;
    bool has_memory = false;
    Descriptor descriptor;
    SegmentIdentity identity;
  };

  const Offer& mine() const { return offers_[static_cast<std::size_t>(rank_)]; }

  bool is_waiting(bool Peer::* flag) const {
    for (const Peer& peer : peers_)
      if (peer.*flag) return true;
    return false;
  }

  static void drop(Peer& peer, const std::string& problem) {
    peer.must_send = peer.must_receive = false;
    if (peer.problem.empty()) peer.problem = problem;
  }

  bool send(const std::string& bytes, int descriptor) {
    bool has_moved = false;
    for (std::size_t at = 0; at < peers_.size(); ++at) {
      Peer& peer = peers_[at];
      if (!peer.must_send) continue;
      const DescriptorSocket::Sent sent = socket_.send(offers_[at].socket, bytes, descriptor);
      if (sent == DescriptorSocket::Sent::not_yet) continue;
      peer.must_send = false;
      if (sent == DescriptorSocket::Sent::nobody_there) drop(peer, "has gone");
      has_moved = true;
    }
    return has_moved;
  }

  bool receive() {
    std::optional<DescriptorSocket::Letter> letter = socket_.receive(sizeof(Note) + 1);
    if (!letter) return false;
    Note note;
    if (letter->bytes.size() != sizeof note) return true;  // a stranger's
    std::memcpy(static_cast<void*>(&note), letter->bytes.data(), sizeof note);
    for (std::size_t at = 0; at < peers_.size(); ++at) {
      Peer& peer = peers_[at];
      if (!peer.must_receive || std::memcmp(note.token, offers_[at].token, sizeof note.token) != 0)
        continue;
      peer.must_receive = false;
      peer.has_memory = note.has_memory != 0;
      if (peer.has_memory && (letter->is_cut || !letter->descriptor.is_open()))
        peer.problem = "sent a descriptor that this process could not take (ulimit -n?)";
      peer.identity = note.identity;
      peer.descriptor = std::move(letter->descriptor);
      break;
    }
    return true;
  }

  // A peer that died before it sent sends no more, and one that never reads may have died, too.
  void look_around() {
    for (std::size_t at = 0; at < peers_.size(); ++at)
      if ((peers_[at].must_receive || peers_[at].must_send) &&
          !DescriptorSocket::exists(offers_[at].socket))
        drop(peers_[at], "has gone");
  }

  void give_up(Seconds patience) {
    for (Peer& peer : peers_)
      if (peer.must_receive || peer.must_send)
        drop(peer, concat("was silent for ", patience.count(), " s"));
  }

  const Rank rank_;
  const std::vector<Offer>& offers_;
  const DescriptorSocket& socket_;
  std::vector<Peer> peers_;
};

}  // namespace

std::shared_ptr<SharedWindows> SharedWindows::make(Rank rank, int size, std::int64_t bytes,
                                                   const GatherStrings& gather, Seconds patience) {
  // What goes wrong here is told to all; only what `gather` throws leaves at once.
  std::optional<DescriptorSocket> socket;
  Offer mine;
  try {
    if (bytes < 0) throw SharedMemoryError(concat("bytes must be 0 or more, got ", bytes));
    socket.emplace();
    mine.bytes = bytes;
    mine.room = room_for_shared_memory();
    mine.socket = socket->name();
    fill_with_random(mine.token);
  } catch (const std::exception& error) {
    mine.problem = error.what();
  }
  std::vector<Offer> offers;
  std::vector<std::string> problems;
  for (const std::string& text : gather(encode(mine))) {
    offers.push_back(decode(text));
    problems.push_back(offers.back().problem);
  }
  if (static_cast<int>(offers.size()) != size)
    fail(concat("of ", size, " ranks ", offers.size(), " have answered"));
  fail_of(problems);
  const std::int64_t all_bytes = sum_of_bytes(offers);
  check_room(all_bytes, offers);

  Segments segments;
  std::string problem;
  try {
    Exchange exchange(rank, offers, *socket);
    std::shared_ptr<SharedSegment> own;
    try {
      if (bytes > 0) own = SharedSegment::create(bytes);
    } catch (const std::exception& error) {
      problem = error.what();
    }
    exchange.run(own.get(), patience + Seconds{static_cast<double>(all_bytes) / kBytesPerSecond});
    if (own != nullptr) own->close_descriptor();  // all have it, or it travels
    if (problem.empty()) segments = exchange.open(std::move(own));
  } catch (const std::exception& error) {
    if (problem.empty()) problem = error.what();
  }
  // The socket lives until here: others may still be sending to it. This is the barrier, too, after
  // which every rank has everybody's memory.
  fail_of(gather(problem));
  return std::shared_ptr<SharedWindows>(new SharedWindows(rank, std::move(segments)));
}

char* SharedWindows::of(Rank rank) const {
  const auto& segment = segments_.at(static_cast<std::size_t>(rank));
  return segment == nullptr ? nullptr : segment->data();
}

std::int64_t SharedWindows::bytes_of(Rank rank) const {
  const auto& segment = segments_.at(static_cast<std::size_t>(rank));
  return segment == nullptr ? 0 : segment->bytes();
}

}  // namespace adareduce
