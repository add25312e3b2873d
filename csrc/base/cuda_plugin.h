#ifndef ADAREDUCE_BASE_CUDA_PLUGIN_H_
#define ADAREDUCE_BASE_CUDA_PLUGIN_H_
/*
 * The border between `_core`, which links no CUDA, and `_cuda`, which does. `_cuda` hands `_core`
 * one adareduce_cuda_plugin in a PyCapsule of the name below. C only: status codes and message
 * buffers cross; no C++ object, exception or static does.
 *
 * Functions return 0, or a status and a text in *error. None waits for a GPU, except where said.
 * "Collective": over the ranks of the group, in the same order on each. Any thread may call; calls
 * of one group are made by one thread at a time, except `check` and `abort`.
 */
#include <stdint.h>

#include "base/plugin.h"

#ifdef __cplusplus
extern "C" {
#endif

#define ADAREDUCE_CUDA_PLUGIN_NAME "adareduce.cuda_plugin"
#define ADAREDUCE_CUDA_PLUGIN_VERSION 1u

/* Ranks with a GPU each (or sharing one) and the memory, communicators and stream between them. */
typedef struct adareduce_cuda_group adareduce_cuda_group;
/* All about a request that does not depend on its data, on the device; owned by its group. */
typedef struct adareduce_cuda_plan adareduce_cuda_plan;
/* A launched request: the event behind its last kernel. */
typedef struct adareduce_cuda_ticket adareduce_cuda_ticket;

enum adareduce_cuda_path {
  ADAREDUCE_CUDA_AUTO = 0,
  ADAREDUCE_CUDA_NCCL = 1,   /* NCCL moves the data */
  ADAREDUCE_CUDA_PEER = 2,   /* kernels read each other's memory; one node */
  ADAREDUCE_CUDA_STAGED = 3, /* nothing here works: tensors go through the host (Python does it) */
  ADAREDUCE_CUDA_SINGLE = 4  /* one rank */
};

/* Collective. Gathers `bytes` from every rank into `all` (size * bytes) in rank order; blocks. */
typedef struct {
  void* context;
  int32_t (*allgather)(void* context, const void* mine, int64_t bytes, void* all,
                       adareduce_error* error);
} adareduce_cuda_exchange;

typedef struct {
  int32_t rank;
  int32_t size;
  int32_t device;                   /* CUDA's index of this rank's GPU */
  int32_t path;                     /* wanted; adareduce_cuda_path */
  double deadline_seconds;          /* of every wait, on the device as well */
  const char* host;                 /* equal for ranks of one node */
  adareduce_cuda_exchange exchange; /* its context stays valid as long as the group */
} adareduce_cuda_group_args;

typedef struct {
  int64_t rows;      /* first dimension; 1 for a scalar */
  int64_t row_numel; /* elements of one row, also where there are no rows */
  int32_t dtype;
  int32_t group; /* of its statistics */
} adareduce_cuda_tensor;

/* Codes are those of engine/request.h and base/types.h. Equal on all ranks. */
typedef struct {
  int32_t collective;
  int32_t op;
  int32_t root;
  int32_t has_statistics;
  int32_t has_local_squares;
  const adareduce_cuda_tensor* tensors; /* allgather, alltoall: this rank's, which may differ */
  int64_t num_tensors;
  /* Rows from every rank; equal on all ranks. allgather: [tensors][size]; alltoall, of one tensor:
   * [size][size], row r what rank r sends to each. Null for the others. */
  const int64_t* rows;
} adareduce_cuda_request;

/* Arrays of pointers lie on the host, what they point to on the device. */
typedef struct {
  const void* const* inputs; /* [tensors] */
  void* const* outputs;      /* [tensors]; may be the inputs */
  double prescale;
  double postscale;
  const double* local_squares; /* [groups] or null */
  double* group_stats;         /* [groups][4]: sum |g_i|^2, |mean|^2, sigma^2, mu^2; or null */
  double* orthogonality;       /* [tensors], of Adasum; or null */
  double* cancellation;        /* [tensors], of one-shot Adasum; or null */
  int64_t* nonfinite;          /* [tensors]; or null */
  void* stream;                /* the caller's: what is on it comes first */
} adareduce_cuda_launch_args;

typedef struct {
  uint32_t version; /* ADAREDUCE_CUDA_PLUGIN_VERSION */
  uint32_t bytes;   /* sizeof(adareduce_cuda_plugin) */

  /* Collective; blocks. Chooses the path, the same on all ranks, and makes what it needs. */
  int32_t (*create_group)(const adareduce_cuda_group_args* args, adareduce_cuda_group** out,
                          adareduce_error* error);
  /* Waits for the GPU, unless the group was aborted: then it only forgets. Local. */
  void (*destroy_group)(adareduce_cuda_group* group);
  /* The path and why it was chosen, in one line; both live as long as the group. */
  int32_t (*path)(adareduce_cuda_group* group, const char** why);
  /* cudaStream_t on which the group works. */
  void* (*stream)(adareduce_cuda_group* group);

  /* Collective; blocks, may wait for the GPU. Fails on all ranks or on none. A captured stream
   * stays as it is, but the first plan that needs more memory than any before must not be made
   * then. */
  int32_t (*prepare)(adareduce_cuda_group* group, const adareduce_cuda_request* request,
                     adareduce_cuda_plan** out, adareduce_error* error);
  /* Collective. Enqueues the request; nothing is uploaded and nobody waits. */
  int32_t (*launch)(adareduce_cuda_group* group, adareduce_cuda_plan* plan,
                    const adareduce_cuda_launch_args* args, adareduce_cuda_ticket** out,
                    adareduce_error* error);
  /* What is enqueued on `stream` from now on comes after the request. */
  int32_t (*order)(adareduce_cuda_ticket* ticket, void* stream, adareduce_error* error);
  /* The request has been worked off; 1 as well for one that was captured or has failed. */
  int32_t (*is_done)(adareduce_cuda_ticket* ticket);
  void (*release)(adareduce_cuda_ticket* ticket);

  /* 0, or what has gone wrong on the device since: an asynchronous error of NCCL, a wait on the
   * device that has passed the deadline, a fault. Cheap; called every half second by a thread that
   * is not the caller's. */
  int32_t (*check)(adareduce_cuda_group* group, adareduce_error* error);
  /* Ends everything that waits for a peer; every later call fails with `text`. */
  void (*abort)(adareduce_cuda_group* group, const char* text);
} adareduce_cuda_plugin;

#ifdef __cplusplus
}
#endif
#endif /* ADAREDUCE_BASE_CUDA_PLUGIN_H_ */
