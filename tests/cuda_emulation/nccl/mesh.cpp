#include "mesh.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <thread>

namespace fake_nccl {
namespace {

using Clock = std::chrono::steady_clock;

std::string system_words(const char* call) { return std::string(call) + ": " + strerror(errno); }

// In the abstract namespace: no file is left behind, whoever dies.
socklen_t fill_address(sockaddr_un* address, const std::string& name, int rank) {
  *address = {};
  address->sun_family = AF_UNIX;
  const std::string text = "adareduce-fake-nccl-" + name + "-" + std::to_string(rank);
  std::memcpy(address->sun_path + 1, text.data(), text.size());
  return static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + text.size());
}

std::chrono::duration<double> connect_limit() {
  const char* text = std::getenv("FAKE_NCCL_CONNECT_SECONDS");
  return std::chrono::duration<double>(text == nullptr ? 60.0 : std::atof(text));
}

int connect_to(const std::string& name, int own_rank, int peer, Clock::time_point deadline) {
  sockaddr_un address;
  const socklen_t length = fill_address(&address, name, peer);
  for (;;) {
    const int descriptor = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (descriptor < 0) throw SystemFailure{system_words("socket")};
    if (connect(descriptor, reinterpret_cast<sockaddr*>(&address), length) == 0) {
      if (send(descriptor, &own_rank, sizeof own_rank, MSG_NOSIGNAL) == sizeof own_rank)
        return descriptor;
    }
    close(descriptor);
    if (Clock::now() > deadline)
      throw SystemFailure{"rank " + std::to_string(peer) + " has not come to the communicator"};
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
}

int accept_one(int listener, int* peer, Clock::time_point deadline) {
  const auto left = std::chrono::duration_cast<std::chrono::milliseconds>(deadline - Clock::now());
  pollfd waiting{listener, POLLIN, 0};
  if (poll(&waiting, 1, static_cast<int>(std::max<std::int64_t>(left.count(), 0))) != 1)
    throw SystemFailure{"a rank above this one has not come to the communicator"};
  const int descriptor = accept4(listener, nullptr, nullptr, SOCK_CLOEXEC);
  if (descriptor < 0 || recv(descriptor, peer, sizeof *peer, MSG_WAITALL) != sizeof *peer)
    throw SystemFailure{system_words("accept4")};
  return descriptor;
}

bool same(const Header& a, const Header& b) {
  return a.magic == b.magic && a.kind == b.kind && a.count == b.count && a.type == b.type &&
         a.op == b.op && a.root == b.root && a.is_captured == b.is_captured &&
         a.sequence == b.sequence && a.bytes == b.bytes;
}

// Where one direction of one socket is.
struct Progress {
  Header header;
  std::size_t done = 0;  // of header and data
};

}  // namespace

Mesh::Mesh(const std::string& name, int rank, int size)
    : rank_(rank), size_(size), sockets_(static_cast<std::size_t>(size), -1) {
  const auto deadline = Clock::now() + std::chrono::duration_cast<Clock::duration>(connect_limit());
  wake_ = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
  const int listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
  try {
    sockaddr_un address;
    const socklen_t length = fill_address(&address, name, rank);
    if (wake_ < 0 || listener < 0 ||
        bind(listener, reinterpret_cast<sockaddr*>(&address), length) != 0 ||
        listen(listener, size) != 0)
      throw SystemFailure{system_words("bind")};
    for (int peer = 0; peer < rank; ++peer)
      sockets_[static_cast<std::size_t>(peer)] = connect_to(name, rank, peer, deadline);
    for (int left = size - rank - 1; left > 0; --left) {
      int peer = -1;
      const int descriptor = accept_one(listener, &peer, deadline);
      if (peer <= rank || peer >= size) throw SystemFailure{"a rank comes twice"};
      sockets_[static_cast<std::size_t>(peer)] = descriptor;
    }
    for (const int descriptor : sockets_)
      if (descriptor >= 0) fcntl(descriptor, F_SETFL, fcntl(descriptor, F_GETFL) | O_NONBLOCK);
    ::close(listener);
  } catch (...) {
    if (listener >= 0) ::close(listener);
    close();
    if (wake_ >= 0) ::close(wake_);
    throw;
  }
}

Mesh::~Mesh() {
  close();
  ::close(wake_);
}

void Mesh::interrupt() {
  const std::uint64_t one = 1;
  (void)!write(wake_, &one, sizeof one);
}

void Mesh::hang_up() {
  for (const int descriptor : sockets_)
    if (descriptor >= 0) shutdown(descriptor, SHUT_RDWR);
}

void Mesh::close() {
  for (int& descriptor : sockets_) {
    if (descriptor >= 0) ::close(descriptor);
    descriptor = -1;
  }
}

void Mesh::exchange(Traffic& traffic,
                    const std::function<std::string(const Header&, const Header&, int)>& describe,
                    double seconds) {
  const auto ranks = static_cast<std::size_t>(size_);
  std::vector<Progress> sending(ranks), receiving(ranks);

  // True if it moved anything; pops what is complete.
  const auto send_some = [&](std::size_t peer) {
    auto& queue = traffic.out[peer];
    Progress& at = sending[peer];
    const Outgoing& message = queue.front();
    const bool in_header = at.done < sizeof(Header);
    const auto* from = in_header
                           ? reinterpret_cast<const char*>(&message.header) + at.done
                           : static_cast<const char*>(message.data) + at.done - sizeof(Header);
    const std::size_t left =
        in_header ? sizeof(Header) - at.done : sizeof(Header) + message.header.bytes - at.done;
    const ssize_t moved = left == 0 ? 0 : send(sockets_[peer], from, left, MSG_NOSIGNAL);
    if (moved < 0 && (errno == EAGAIN || errno == EINTR)) return false;
    if (moved < 0) {  // what the peer has said before it went may explain why
      queue.clear();
      if (traffic.in[peer].empty()) throw PeerGone{static_cast<int>(peer)};
      return true;
    }
    at.done += static_cast<std::size_t>(moved);
    if (at.done == sizeof(Header) + message.header.bytes) {
      queue.pop_front();
      at = {};
    }
    return true;
  };
  const auto receive_some = [&](std::size_t peer) {
    auto& queue = traffic.in[peer];
    Progress& at = receiving[peer];
    const Incoming& message = queue.front();
    const bool in_header = at.done < sizeof(Header);
    auto* to = in_header ? reinterpret_cast<char*>(&at.header) + at.done
                         : static_cast<char*>(message.data) + at.done - sizeof(Header);
    const std::size_t left =
        in_header ? sizeof(Header) - at.done : sizeof(Header) + message.header.bytes - at.done;
    const ssize_t moved = left == 0 ? 0 : recv(sockets_[peer], to, left, 0);
    if (moved < 0 && (errno == EAGAIN || errno == EINTR)) return false;
    if (moved < 0 || (moved == 0 && left > 0)) throw PeerGone{static_cast<int>(peer)};
    at.done += static_cast<std::size_t>(moved);
    if (in_header && at.done == sizeof(Header) && !same(at.header, message.header))
      throw Mismatch{describe(message.header, at.header, static_cast<int>(peer))};
    if (at.done == sizeof(Header) + message.header.bytes) {
      queue.pop_front();
      at = {};
    }
    return true;
  };

  std::vector<pollfd> waiting;
  for (;;) {
    bool has_moved = false;
    // All that can be said is said before anything is read: a difference is then seen on all sides.
    for (std::size_t peer = 0; peer < ranks; ++peer)
      while (!traffic.out[peer].empty() && send_some(peer)) has_moved = true;
    for (std::size_t peer = 0; peer < ranks; ++peer)
      while (!traffic.in[peer].empty() && receive_some(peer)) has_moved = true;
    if (has_moved) continue;
    waiting.assign(1, {wake_, POLLIN, 0});
    for (std::size_t peer = 0; peer < ranks; ++peer) {
      const int events =
          (traffic.out[peer].empty() ? 0 : POLLOUT) | (traffic.in[peer].empty() ? 0 : POLLIN);
      if (events != 0) waiting.push_back({sockets_[peer], static_cast<short>(events), 0});
    }
    if (waiting.size() == 1) return;
    const int limit = seconds > 0.0 ? static_cast<int>(seconds * 1000.0) : -1;
    if (poll(waiting.data(), waiting.size(), limit) == 0)
      throw SystemFailure{"a peer has said nothing for " + std::to_string(seconds) + " s"};
    if ((waiting[0].revents & POLLIN) != 0) throw Interrupted{};
  }
}

}  // namespace fake_nccl
