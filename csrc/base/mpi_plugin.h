#ifndef ADAREDUCE_BASE_MPI_PLUGIN_H_
#define ADAREDUCE_BASE_MPI_PLUGIN_H_
/*
 * The border between `_core`, which links no MPI, and `_mpi`, which does. `_mpi` hands `_core` one
 * adareduce_mpi_plugin in a PyCapsule of the name below. C only: status codes and message buffers
 * cross; no C++ object, exception or static does.
 *
 * Every function returns 0, or a status and a text in *error. No function blocks, except `create`
 * and `free`, which the caller precedes by a timed barrier. Any thread may call (MPI must have
 * MPI_THREAD_MULTIPLE), but one operation is tested by one thread at a time.
 */
#include <stdint.h>

#include "base/plugin.h"

#ifdef __cplusplus
extern "C" {
#endif

#define ADAREDUCE_MPI_PLUGIN_NAME "adareduce.mpi_plugin"
#define ADAREDUCE_MPI_PLUGIN_VERSION 1u

typedef struct adareduce_comm adareduce_comm; /* a communicator that the plugin owns */
typedef struct adareduce_op adareduce_op;     /* messages under way */

/* One message of a group. `bytes` may exceed 2^31: the plugin splits it. */
typedef struct {
  void* data; /* read only when sent */
  int64_t bytes;
  int32_t peer;
} adareduce_message;

typedef struct {
  uint32_t version; /* ADAREDUCE_MPI_PLUGIN_VERSION */
  uint32_t bytes;   /* sizeof(adareduce_mpi_plugin) */

  /* One line: the vendor and version of the MPI library in use. */
  const char* (*library_version)(void);
  /* 1 while MPI is initialised and not finalised. */
  int32_t (*is_usable)(void);
  /* MPI_THREAD_MULTIPLE is provided. */
  int32_t (*has_thread_multiple)(void);

  /* The communicator behind mpi4py's handle (MPI._handleof), which stays the user's: good for being
   * a parent and for messages on tags of ours. Local.
   * The handle is unsigned because mpi4py sign-extends MPICH's ints: a duplicate exceeds 2^63. */
  int32_t (*borrow)(uint64_t handle, adareduce_comm** out, adareduce_error* error);
  /* A communicator over `ranks` of `parent`, in that order. Collective over those ranks only,
   * blocks. Concurrent calls need different tags. */
  int32_t (*create)(adareduce_comm* parent, const int32_t* ranks, int32_t count, int32_t tag,
                    adareduce_comm** out, adareduce_error* error);
  /* Collective, blocks. `abandon` != 0: only forgets it (a dead peer could not join in). */
  int32_t (*free)(adareduce_comm* comm, int32_t abandon, adareduce_error* error);
  int32_t (*rank)(adareduce_comm* comm);
  int32_t (*size)(adareduce_comm* comm);

  /* Starts a group of sends and receives on one tag. The arrays may go at once, the data stay until
   * the operation is complete. Zero-byte messages are legal and are delivered. */
  int32_t (*start)(adareduce_comm* comm, int32_t tag, const adareduce_message* sends,
                   int32_t num_sends, const adareduce_message* receives, int32_t num_receives,
                   adareduce_op** out, adareduce_error* error);
  /* Collective over comm: gathers `bytes` from every rank into `all` (size * bytes), rank order. */
  int32_t (*start_allgather)(adareduce_comm* comm, const void* mine, void* all, int64_t bytes,
                             adareduce_op** out, adareduce_error* error);
  /* *done = 1 when every message of the group is complete and as long as announced. After an error
   * or done the operation is only good for `release`. */
  int32_t (*test)(adareduce_op* op, int32_t* done, adareduce_error* error);
  /* Frees an operation. One that is not complete is cancelled where MPI can, else leaked together
   * with what it needs: its buffers must not be reused before the process ends. */
  void (*release)(adareduce_op* op);

  /* If a message on `tag` has arrived: receives up to `capacity` bytes, *source and *bytes are set.
   * Otherwise *source = -1. Meant for short, unexpected messages. */
  int32_t (*try_receive)(adareduce_comm* comm, int32_t tag, void* data, int64_t capacity,
                         int32_t* source, int64_t* bytes, adareduce_error* error);

  /* Largest single MPI message in bytes (default 1 GiB); smaller values exist for tests. */
  void (*set_max_message_bytes)(int64_t bytes);
  /* Ends every process of the job with `exit_code`. */
  void (*abort)(int32_t exit_code);
} adareduce_mpi_plugin;

#ifdef __cplusplus
}
#endif
#endif /* ADAREDUCE_BASE_MPI_PLUGIN_H_ */
