#pragma once
// The only file that includes MPI's headers; part of mpi_plugin.cpp and of nothing else.
#define OMPI_SKIP_MPICXX 1
#define MPICH_SKIP_MPICXX 1
#include <mpi.h>
#if defined(OPEN_MPI) && __has_include(<mpi-ext.h>)
#include <mpi-ext.h>
#endif

// Both took ULFM's error classes before they took this function.
#if defined(OMPI_HAVE_MPIX_COMM_GET_FAILED) || \
    (defined(MPICH_NUMVERSION) && defined(MPIX_ERR_PROC_FAILED) && MPICH_NUMVERSION >= 40100000)
#define ADAREDUCE_HAS_GET_FAILED 1
#endif

#include <cstdio>
#include <exception>
#include <string>

#include "base/mpi_plugin.h"

/// A communicator of ours, and what every error says of it.
struct adareduce_comm {
  MPI_Comm native = MPI_COMM_NULL;
  int rank = 0;
  int size = 1;
  bool is_borrowed = false;  // the user's: never freed, its error handler never changed
};

namespace adareduce::mpi {

/// What a failed call throws; it never leaves the plugin.
struct Failure {
  int code;  // MPI's, or MPI_SUCCESS where MPI itself found nothing wrong
  int peer;
  std::string text;
};

/// MPI's text for an error code.
inline std::string words_of(int code) {
  char words[MPI_MAX_ERROR_STRING] = "";
  int length = 0;
  MPI_Error_string(code, words, &length);
  return words;
}

/// Throws Failure unless `code` is MPI_SUCCESS. `peer`: whose message the call was about.
inline void check(int code, const char* call, int line, int peer = -1) {
  if (code == MPI_SUCCESS) return;
  std::string text = std::string(call) + " at mpi_plugin.cpp:" + std::to_string(line);
  if (peer >= 0) text += ", message of rank " + std::to_string(peer);
  throw Failure{code, peer, text + ": " + words_of(code)};
}
#define CHECK_MPI(call) check((call), #call, __LINE__)
#define CHECK_MPI_PEER(call, peer) check((call), #call, __LINE__, (peer))

/// Throws Failure with `text` unless `condition` holds.
inline void require(bool condition, const std::string& text, int peer = -1) {
  if (!condition) throw Failure{MPI_SUCCESS, peer, text};
}

/// MPI may be called: it is initialised and not finalised.
inline int32_t is_usable() {
  int initialized = 0, finalized = 0;
  MPI_Initialized(&initialized);
  MPI_Finalized(&finalized);
  return initialized && !finalized;
}

/// MPI's class of an error code.
inline int class_of(int code) {
  int error_class = code;
  MPI_Error_class(code, &error_class);
  return error_class;
}

/// MPI says that a process has died (ULFM).
inline bool means_dead_process(int code) {
  if (code == MPI_SUCCESS) return false;
#ifdef MPIX_ERR_PROC_FAILED
  const int error_class = class_of(code);
  return error_class == MPIX_ERR_PROC_FAILED || error_class == MPIX_ERR_PROC_FAILED_PENDING;
#else
  // Built for an older Open MPI, perhaps running with one that knows (the SONAME is the same).
  return words_of(code).find("PROC_FAILED") != std::string::npos;
#endif
}

/// A rank that MPI knows to be dead: `suspect` if it is one of them or if MPI cannot tell.
inline int dead_rank([[maybe_unused]] const adareduce_comm& comm, int suspect) {
#ifdef ADAREDUCE_HAS_GET_FAILED
  MPI_Group everyone = MPI_GROUP_NULL, failed = MPI_GROUP_NULL;
  if (MPIX_Comm_get_failed(comm.native, &failed) != MPI_SUCCESS) return suspect;
  int first = suspect, count = 0;
  MPI_Group_size(failed, &count);
  MPI_Comm_group(comm.native, &everyone);
  for (int i = 0; i < count; ++i) {
    int rank = MPI_UNDEFINED;
    MPI_Group_translate_ranks(failed, 1, &i, everyone, &rank);
    if (i == 0 || rank == suspect) first = rank;
  }
  MPI_Group_free(&everyone);
  // An empty result may be the constant MPI_GROUP_EMPTY.
  if (failed != MPI_GROUP_EMPTY) MPI_Group_free(&failed);
  return first;
#else
  return suspect;
#endif
}

/// Writes the error, if the caller wants one. Allocates nothing.
inline void fill(adareduce_error* error, int status, int peer, const adareduce_comm* comm,
                 const char* text) {
  if (error == nullptr) return;
  error->status = status;
  error->peer = peer;
  if (comm != nullptr) {
    std::snprintf(error->text, sizeof error->text, "rank %d of a group of %d: %s", comm->rank,
                  comm->size, text);
  } else {
    std::snprintf(error->text, sizeof error->text, "%s", text);
  }
}

/// Runs `body` where MPI may be called and returns a status; `comm` (or null) is the communicator
/// that errors belong to.
template <typename Body>
int32_t guarded(const adareduce_comm* comm, adareduce_error* error, Body body) noexcept {
  try {
    require(is_usable(), "MPI is not initialised, or finalised already");
    body();
    return ADAREDUCE_OK;
  } catch (const Failure& failure) {
    const bool dead = means_dead_process(failure.code);
    const int peer = dead && comm != nullptr ? dead_rank(*comm, failure.peer) : failure.peer;
    const int status = dead ? ADAREDUCE_PEER_DEAD : ADAREDUCE_ERROR;
    fill(error, status, peer, comm, failure.text.c_str());
    return status;
  } catch (const std::exception& exception) {
    fill(error, ADAREDUCE_ERROR, -1, comm, exception.what());
    return ADAREDUCE_ERROR;
  }
}

}  // namespace adareduce::mpi
