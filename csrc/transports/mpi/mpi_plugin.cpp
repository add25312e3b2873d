// Inside: C++20, and a failed call throws Failure. At the border: guarded() turns everything into a
// status and a text.
#include <atomic>
#include <bit>
#include <climits>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <type_traits>
#include <vector>

#include "transports/mpi/mpi_call.h"
#include "transports/mpi/mpi_plugin_table.h"

struct adareduce_op {
  // What one request moves; parallel to `requests`.
  struct Piece {
    int peer = -1;  // -1: a collective
    int bytes = 0;
    bool receives = false;
  };

  adareduce_comm* comm = nullptr;
  std::vector<MPI_Request> requests;
  std::vector<Piece> pieces;
  std::vector<int> finished;  // outputs of MPI_Testsome, kept to allocate once
  std::vector<MPI_Status> statuses;
  std::size_t remaining = 0;

  MPI_Request& add(Piece piece) {
    pieces.push_back(piece);
    return requests.emplace_back(MPI_REQUEST_NULL);
  }
};

namespace {

using namespace adareduce::mpi;

std::atomic<std::int64_t> g_max_message_bytes{std::int64_t{1} << 30};

// A short message has arrived whole once it can be matched; the limit only guards against a sender
// that stopped in the middle of one.
constexpr int kReceiveTests = 1'000'000;

adareduce_comm* own(MPI_Comm native) {
  auto comm = std::make_unique<adareduce_comm>();
  comm->native = native;
  CHECK_MPI(MPI_Comm_set_errhandler(native, MPI_ERRORS_RETURN));
  CHECK_MPI(MPI_Comm_rank(native, &comm->rank));
  CHECK_MPI(MPI_Comm_size(native, &comm->size));
  return comm.release();
}

adareduce_comm* create_group(MPI_Comm parent, const int32_t* ranks, int32_t count, int32_t tag) {
  MPI_Group everyone = MPI_GROUP_NULL, chosen = MPI_GROUP_NULL;
  MPI_Comm created = MPI_COMM_NULL;
  CHECK_MPI(MPI_Comm_group(parent, &everyone));
  int code = MPI_Group_incl(everyone, count, ranks, &chosen);
  MPI_Group_free(&everyone);
  check(code, "MPI_Group_incl(everyone, count, ranks, &chosen)", __LINE__);
  code = MPI_Comm_create_group(parent, chosen, tag, &created);
  MPI_Group_free(&chosen);
  check(code, "MPI_Comm_create_group(parent, chosen, tag, &created)", __LINE__);
  require(created != MPI_COMM_NULL, "MPI_Comm_create_group: this rank is not among the ranks");
  return own(created);
}

int32_t borrow(uint64_t handle, adareduce_comm** out, adareduce_error* error) {
  return guarded(nullptr, error, [&] {
    // mpi4py gives the pointer (Open MPI, MPI's ABI) or the int (MPICH), whose low bits suffice.
    using Bits = std::conditional_t<sizeof(MPI_Comm) == 4, std::uint32_t, std::uint64_t>;
    auto theirs = std::make_unique<adareduce_comm>();
    theirs->native = std::bit_cast<MPI_Comm>(static_cast<Bits>(handle));
    theirs->is_borrowed = true;
    int is_inter = 0;
    CHECK_MPI(MPI_Comm_test_inter(theirs->native, &is_inter));
    require(!is_inter, "communicator must be an intracommunicator, got an intercommunicator");
    CHECK_MPI(MPI_Comm_rank(theirs->native, &theirs->rank));
    CHECK_MPI(MPI_Comm_size(theirs->native, &theirs->size));
    *out = theirs.release();
  });
}

int32_t create(adareduce_comm* parent, const int32_t* ranks, int32_t count, int32_t tag,
               adareduce_comm** out, adareduce_error* error) {
  return guarded(parent, error, [&] { *out = create_group(parent->native, ranks, count, tag); });
}

int32_t free_comm(adareduce_comm* comm, int32_t abandon, adareduce_error* error) {
  const std::unique_ptr<adareduce_comm> owner(comm);
  // MPI_Finalize frees what is left.
  if (abandon || comm->is_borrowed || !is_usable()) return ADAREDUCE_OK;
  return guarded(comm, error, [&] { CHECK_MPI(MPI_Comm_free(&comm->native)); });
}

// Calls post(offset, bytes) for each MPI message of `bytes`; both sides derive the same pieces.
template <typename Post>
void split(std::int64_t bytes, std::int64_t most, Post post) {
  std::int64_t offset = 0;
  do {
    const auto piece = static_cast<int>(bytes - offset < most ? bytes - offset : most);
    post(offset, piece);
    offset += piece;
  } while (offset < bytes);
}

void post(adareduce_op& op, int tag, const adareduce_message& message, bool receives,
          std::int64_t most) {
  require(message.peer >= 0 && message.peer < op.comm->size && message.bytes >= 0,
          "peer must be a rank of the group and bytes >= 0, got peer " +
              std::to_string(message.peer) + " and " + std::to_string(message.bytes) + " bytes");
  auto* data = static_cast<char*>(message.data);
  split(message.bytes, most, [&](std::int64_t offset, int bytes) {
    void* piece = data == nullptr ? nullptr : data + offset;
    MPI_Request& request = op.add({message.peer, bytes, receives});
    if (receives) {
      CHECK_MPI_PEER(
          MPI_Irecv(piece, bytes, MPI_BYTE, message.peer, tag, op.comm->native, &request),
          message.peer);
    } else {
      CHECK_MPI_PEER(
          MPI_Isend(piece, bytes, MPI_BYTE, message.peer, tag, op.comm->native, &request),
          message.peer);
    }
    ++op.remaining;
  });
}

// True when MPI will never touch the operation's memory again.
bool try_cancel(adareduce_op& op) {
  if (!is_usable()) return false;
  for (std::size_t i = 0; i < op.requests.size(); ++i) {
    // Sends cannot be cancelled in Open MPI, collectives nowhere.
    if (op.requests[i] != MPI_REQUEST_NULL && op.pieces[i].receives) MPI_Cancel(&op.requests[i]);
  }
  int done = 0;
  for (int tries = 0; tries < 8 && !done; ++tries) {
    const int code = MPI_Testall(static_cast<int>(op.requests.size()), op.requests.data(), &done,
                                 MPI_STATUSES_IGNORE);
    if (code != MPI_SUCCESS) return false;
  }
  return done != 0;
}

void release(adareduce_op* op) {
  // What MPI may still write to or read from is leaked: freeing it would be worse.
  if (op != nullptr && (op->remaining == 0 || try_cancel(*op))) delete op;
}

// An operation under construction: given up unless it is handed out.
using OpOwner = std::unique_ptr<adareduce_op, decltype([](adareduce_op* op) { release(op); })>;

OpOwner new_op(adareduce_comm* comm) {
  OpOwner op(new adareduce_op);
  op->comm = comm;
  return op;
}

int32_t start(adareduce_comm* comm, int32_t tag, const adareduce_message* sends, int32_t num_sends,
              const adareduce_message* receives, int32_t num_receives, adareduce_op** out,
              adareduce_error* error) {
  return guarded(comm, error, [&] {
    const std::int64_t most = g_max_message_bytes.load(std::memory_order_relaxed);
    OpOwner op = new_op(comm);
    // Receives first: what has its place waiting needs no buffer of MPI's.
    for (int i = 0; i < num_receives; ++i) post(*op, tag, receives[i], true, most);
    for (int i = 0; i < num_sends; ++i) post(*op, tag, sends[i], false, most);
    *out = op.release();
  });
}

int32_t start_allgather(adareduce_comm* comm, const void* mine, void* all, int64_t bytes,
                        adareduce_op** out, adareduce_error* error) {
  return guarded(comm, error, [&] {
    require(bytes >= 0 && bytes <= INT_MAX,
            "allgather: bytes must be in 0 ... 2^31 - 1, got " + std::to_string(bytes));
    const int count = static_cast<int>(bytes);
    OpOwner op = new_op(comm);
    MPI_Request& request = op->add({});
    CHECK_MPI(MPI_Iallgather(mine, count, MPI_BYTE, all, count, MPI_BYTE, comm->native, &request));
    op->remaining = 1;
    *out = op.release();
  });
}

// Throws the first failure among the `count` requests that MPI_Testsome reported.
void check_finished(const adareduce_op& op, int count, bool has_codes) {
  for (int i = 0; i < count; ++i) {
    const auto& piece = op.pieces[op.finished[i]];
    if (has_codes) check(op.statuses[i].MPI_ERROR, "MPI_Testsome", __LINE__, piece.peer);
    if (!piece.receives) continue;
    int bytes = 0;
    CHECK_MPI_PEER(MPI_Get_count(&op.statuses[i], MPI_BYTE, &bytes), piece.peer);
    require(bytes == piece.bytes,
            "rank " + std::to_string(piece.peer) + " sent " + std::to_string(bytes) +
                " bytes where " + std::to_string(piece.bytes) + " were expected",
            piece.peer);
  }
}

// Not MPI_Testall: Open MPI's reports a failed message only once all others are complete too, which
// they never are when their peers wait for the one that failed.
void test_some(adareduce_op& op) {
  const std::size_t pieces = op.requests.size();
  op.finished.resize(pieces);
  op.statuses.resize(pieces);
  int count = 0;
  const int code = MPI_Testsome(static_cast<int>(pieces), op.requests.data(), &count,
                                op.finished.data(), op.statuses.data());
  const bool has_codes = code != MPI_SUCCESS && class_of(code) == MPI_ERR_IN_STATUS;
  if (!has_codes) check(code, "MPI_Testsome", __LINE__);
  if (count == MPI_UNDEFINED) return;
  check_finished(op, count, has_codes);
  op.remaining -= static_cast<std::size_t>(count);
}

int32_t test(adareduce_op* op, int32_t* done, adareduce_error* error) {
  *done = 0;
  return guarded(op->comm, error, [&] {
    // Twice, because Open MPI looks first and makes progress then: what one call finds in the
    // network only the next reports, and between the two the caller would go to sleep.
    for (int look = 0; look < 2 && op->remaining > 0; ++look) test_some(*op);
    *done = op->remaining == 0;
  });
}

int32_t try_receive(adareduce_comm* comm, int32_t tag, void* data, int64_t capacity,
                    int32_t* source, int64_t* bytes, adareduce_error* error) {
  *source = -1;
  *bytes = 0;
  return guarded(comm, error, [&] {
    int arrived = 0, length = 0;
    MPI_Message message = MPI_MESSAGE_NULL;
    MPI_Status status;
    // A matched probe: no other thread can receive between our look and our receive.
    CHECK_MPI(MPI_Improbe(MPI_ANY_SOURCE, tag, comm->native, &arrived, &message, &status));
    if (!arrived) return;
    const int peer = status.MPI_SOURCE;
    CHECK_MPI_PEER(MPI_Get_count(&status, MPI_BYTE, &length), peer);
    // Into memory of ours, which can be leaked if the message never arrives whole.
    auto buffer = std::make_unique<char[]>(static_cast<std::size_t>(length));
    MPI_Request request = MPI_REQUEST_NULL;
    CHECK_MPI_PEER(MPI_Imrecv(buffer.get(), length, MPI_BYTE, &message, &request), peer);
    char* const leaked_unless_whole = buffer.release();
    int whole = 0;
    for (int tests = 0; tests < kReceiveTests && !whole; ++tests) {
      CHECK_MPI_PEER(MPI_Test(&request, &whole, MPI_STATUS_IGNORE), peer);
    }
    require(whole, "rank " + std::to_string(peer) + " began a message and did not finish it", peer);
    buffer.reset(leaked_unless_whole);
    require(length <= capacity,
            "rank " + std::to_string(peer) + " sent " + std::to_string(length) +
                " bytes where at most " + std::to_string(capacity) + " fit",
            peer);
    if (length > 0) std::memcpy(data, buffer.get(), static_cast<std::size_t>(length));
    *bytes = length;
    *source = peer;
  });
}

// "MPICH Version: 5.0.2", "Open MPI v5.0.11": the first line up to a comma, single blanks.
std::string read_library_version() {
  char full[MPI_MAX_LIBRARY_VERSION_STRING] = "";
  int length = 0;
  MPI_Get_library_version(full, &length);
  std::string line;
  for (const char* c = full; *c != 0 && *c != '\n' && *c != ','; ++c) {
    const bool is_blank = *c == ' ' || *c == '\t' || *c == '\r';
    if (!is_blank)
      line += *c;
    else if (!line.empty() && line.back() != ' ')
      line += ' ';
  }
  while (!line.empty() && line.back() == ' ') line.pop_back();
  return line;
}

const char* library_version() {
  static const std::string version = read_library_version();
  return version.c_str();
}

int32_t has_thread_multiple() {
  int provided = MPI_THREAD_SINGLE;
  if (is_usable()) MPI_Query_thread(&provided);
  return provided == MPI_THREAD_MULTIPLE;
}

int32_t rank(adareduce_comm* comm) { return comm->rank; }
int32_t size(adareduce_comm* comm) { return comm->size; }

void set_max_message_bytes(int64_t bytes) {
  g_max_message_bytes = bytes < 1 ? 1 : bytes > INT_MAX ? INT_MAX : bytes;
}

void abort_job(int32_t exit_code) {
  if (is_usable()) MPI_Abort(MPI_COMM_WORLD, exit_code);
  std::_Exit(exit_code);
}

constexpr adareduce_mpi_plugin kTable = {
    .version = ADAREDUCE_MPI_PLUGIN_VERSION,
    .bytes = sizeof(adareduce_mpi_plugin),
    .library_version = library_version,
    .is_usable = is_usable,
    .has_thread_multiple = has_thread_multiple,
    .borrow = borrow,
    .create = create,
    .free = free_comm,
    .rank = rank,
    .size = size,
    .start = start,
    .start_allgather = start_allgather,
    .test = test,
    .release = release,
    .try_receive = try_receive,
    .set_max_message_bytes = set_max_message_bytes,
    .abort = abort_job,
};

}  // namespace

const adareduce_mpi_plugin* adareduce_mpi_plugin_table() { return &kTable; }
