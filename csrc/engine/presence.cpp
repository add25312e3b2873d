#include "engine/presence.h"

#include <algorithm>
#include <cstring>

#include "base/errors.h"
#include "engine/agreement.h"

namespace adareduce {
namespace {

enum Kind : std::uint32_t { kQuestion = 0, kAnswer = 1, kFailure = 2 };

// An engine that sleeps in between gives MPI no other chance to move a message a step further: with
// one look for each sleep MPICH took 3 s to deliver one.
constexpr int kLooks = 16;

}  // namespace

// Short enough to be sent eagerly by every transport: a stopped peer must not stop the sender.
struct Presence::Message {
  std::uint32_t kind = kQuestion;
  std::uint32_t text_bytes = 0;
  std::array<std::uint64_t, kNumChannels> submitted{};
  std::array<char, 960> text{};
};

struct Presence::Outgoing {
  Message message;
  std::unique_ptr<Exchange> exchange;
};

Presence::Presence(Transport& transport, int tag, std::vector<Rank> ranks)
    : transport_(transport), tag_(tag), ranks_(std::move(ranks)), peers_(ranks_.size()) {}

Presence::~Presence() {
  // A message that is still under way may be read later.
  if (transport_.may_write_late())
    for (auto& outgoing : outgoing_) (void)outgoing.release();
}

void Presence::send(Rank peer, std::uint32_t kind, const Progress& progress,
                    const std::string& text) {
  auto outgoing = std::make_unique<Outgoing>();
  Message& message = outgoing->message;
  message.kind = kind;
  message.submitted = progress.submitted;
  std::size_t length = std::min(text.size(), message.text.size());
  // Half a character of UTF-8 would be no text for Python.
  if (length < text.size())
    while (length > 0 && (static_cast<unsigned char>(text[length]) & 0xC0) == 0x80) --length;
  message.text_bytes = static_cast<std::uint32_t>(length);
  std::copy_n(text.begin(), length, message.text.begin());
  const std::array part{SendPart{peer, &message, sizeof message}};
  try {
    outgoing->exchange = transport_.start(tag_, part, {});
  } catch (const TransportError&) {
    return;  // this one is gone, the next must still be told
  }
  outgoing_.push_back(std::move(outgoing));
}

void Presence::ask() {
  for (Rank peer = 0; peer < transport_.size(); ++peer)
    if (peer != transport_.rank()) send(peer, kQuestion, {}, "");
}

void Presence::announce_failure(const std::string& text) {
  for (Rank peer = 0; peer < transport_.size(); ++peer)
    if (peer != transport_.rank()) send(peer, kFailure, {}, text);
}

std::optional<std::string> Presence::serve(const Progress& mine, Clock::time_point now) {
  std::optional<std::string> failure;
  Message message;
  std::int64_t bytes = 0;
  const auto buffer = std::as_writable_bytes(std::span(&message, 1));
  for (int looks = 0; looks < kLooks; ++looks) {
    const Rank from = transport_.try_receive(tag_, buffer, bytes);
    if (from < 0) continue;
    looks = 0;
    Peer& peer = peers_[static_cast<std::size_t>(from)];
    const std::string text(message.text.data(),
                           std::min<std::size_t>(message.text_bytes, message.text.size()));
    peer.heard = now;
    if (message.kind == kQuestion) send(from, kAnswer, mine, mine.last_call);
    if (message.kind == kAnswer) peer.progress = {message.submitted, text};
    if (message.kind == kFailure)
      failure = concat("rank ", ranks_[static_cast<std::size_t>(from)], " reports: ", text);
  }
  std::erase_if(outgoing_, [](const auto& outgoing) {
    try {
      return outgoing->exchange->test();
    } catch (const TransportError&) {
      return true;  // its receiver is gone: whoever waits for that rank will hear of it
    }
  });
  return failure;
}

Presence::Missing Presence::find_missing(int channel, std::uint64_t sequence,
                                         Clock::time_point since) const {
  Missing missing;
  std::string late;
  for (Rank peer = 0; peer < transport_.size(); ++peer) {
    if (peer == transport_.rank()) continue;
    const Peer& state = peers_[static_cast<std::size_t>(peer)];
    const Rank global = ranks_[static_cast<std::size_t>(peer)];
    if (state.heard < since) {
      missing.silent.push_back(global);
    } else if (state.progress.submitted[static_cast<std::size_t>(channel)] <= sequence) {
      missing.late.push_back(global);
      late +=
          concat(late.empty() ? "" : "; ", "rank ", global, " is alive and has not made this call",
                 state.progress.last_call.empty() ? " or any before it" : ", its last one was ",
                 state.progress.last_call);
    }
  }
  if (!missing.silent.empty())
    missing.text = concat(rank_list(missing.silent), missing.silent.size() == 1 ? " does" : " do",
                          " not answer (dead, stopped or cut off)");
  if (!late.empty()) missing.text += concat(missing.text.empty() ? "" : "; ", late);
  if (missing.text.empty()) missing.text = "every rank has made this call; the data do not arrive";
  return missing;
}

}  // namespace adareduce
