/*
 * A plugin of base/cuda_plugin.h without a GPU, for tests/test_device_calls.py. Tensors lie in host
 * memory; a launch copies inputs to outputs and counts. What goes wrong, and on which GPU (which is
 * the rank of the job in these tests), is set from outside. Calls are made by many threads.
 */
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "base/cuda_plugin.h"

#define MOST_DEVICES 8
#define MOST_RANKS 8

/* Mirrored by tests/device_plugin.py. */
typedef struct {
  atomic_int created, prepared, launched, ordered, checked, aborted, destroyed, released;
  atomic_int refuse_create, refuse_prepare, refuse_launch, refuse_check, refuse_order;
  atomic_int block_create;  /* until it is 0 again */
  atomic_int is_blocked;    /* somebody is in there */
  atomic_int is_unfinished; /* the GPU does not get on, until it is 0 again or aborted */
  atomic_int num_exchanges; /* of each create_group */
  atomic_int overlaps;      /* calls of one group at the same time */
  atomic_llong last_numel, last_rows, last_row_numel;
  atomic_int last_path;
  char abort_text[2000];
  char launches[4096]; /* first letters of the collectives, in order */
} device_state;

static device_state states[MOST_DEVICES];

__attribute__((visibility("default"))) device_state* test_device(int device) {
  return &states[device];
}

struct adareduce_cuda_group {
  adareduce_cuda_group_args args;
  device_state* state;
  atomic_int callers;
  atomic_int is_aborted;
  adareduce_cuda_plan* newest; /* plans live as long as their group */
};
struct adareduce_cuda_plan {
  adareduce_cuda_request request;
  int64_t* bytes;
  adareduce_cuda_plan* older;
};
struct adareduce_cuda_ticket {
  adareduce_cuda_group* group;
};

static int32_t refuse(adareduce_error* error, const char* what, int device) {
  error->status = ADAREDUCE_ERROR;
  error->peer = -1;
  snprintf(error->text, sizeof error->text, "%s on GPU %d", what, device);
  return ADAREDUCE_ERROR;
}

static void enter(adareduce_cuda_group* group) {
  if (atomic_fetch_add(&group->callers, 1) != 0) group->state->overlaps++;
}
static void leave(adareduce_cuda_group* group) { atomic_fetch_sub(&group->callers, 1); }

/* Fails on all ranks or on none. */
static int32_t unite(const adareduce_cuda_group_args* args, int has_failed, const char* what,
                     adareduce_error* error) {
  if (args->size == 1) return has_failed ? refuse(error, what, args->device) : ADAREDUCE_OK;
  int32_t all[MOST_RANKS] = {0}, mine = has_failed ? args->device + 1 : 0;
  const int32_t status =
      args->exchange.allgather(args->exchange.context, &mine, sizeof mine, all, error);
  if (status != ADAREDUCE_OK) return status;
  for (int rank = 0; rank < args->size; ++rank)
    if (all[rank] != 0) return refuse(error, what, all[rank] - 1);
  return ADAREDUCE_OK;
}

static int32_t create_group(const adareduce_cuda_group_args* args, adareduce_cuda_group** out,
                            adareduce_error* error) {
  device_state* state = &states[args->device];
  const struct timespec nap = {0, 1000000};
  state->is_blocked = 1;
  while (state->block_create) nanosleep(&nap, NULL);
  state->is_blocked = 0;
  for (int turn = 0; turn < state->num_exchanges; ++turn) {
    /* Lengths that are no multiple of anything, and none at all. */
    unsigned char mine[64], all[64 * MOST_RANKS];
    const int64_t bytes = 7 * turn;
    memset(mine, args->rank + 1, sizeof mine);
    const int32_t status =
        args->exchange.allgather(args->exchange.context, mine, bytes, all, error);
    if (status != ADAREDUCE_OK) return status;
    for (int64_t i = 0; i < bytes * args->size; ++i)
      if (all[i] != i / bytes + 1) return refuse(error, "the exchange mixes ranks up", -1);
  }
  const int32_t status = unite(args, state->refuse_create, "no memory for a group", error);
  if (status != ADAREDUCE_OK) return status;
  adareduce_cuda_group* group = calloc(1, sizeof *group);
  group->args = *args;
  group->state = state;
  state->last_path = args->path;
  state->created++;
  *out = group;
  return ADAREDUCE_OK;
}

static void destroy_group(adareduce_cuda_group* group) {
  group->state->destroyed++;
  while (group->newest != NULL) {
    adareduce_cuda_plan* plan = group->newest;
    group->newest = plan->older;
    free(plan->bytes);
    free(plan);
  }
  free(group);
}

static int32_t path(adareduce_cuda_group* group, const char** why) {
  *why = "memory of one process";
  return group->args.size == 1 ? ADAREDUCE_CUDA_SINGLE : ADAREDUCE_CUDA_PEER;
}

static void* stream(adareduce_cuda_group* group) {
  return (void*)(intptr_t)(1000 + group->args.device);
}

static int32_t prepare(adareduce_cuda_group* group, const adareduce_cuda_request* request,
                       adareduce_cuda_plan** out, adareduce_error* error) {
  enter(group);
  const int32_t status =
      unite(&group->args, group->state->refuse_prepare, "no memory for a plan", error);
  if (status == ADAREDUCE_OK) {
    static const int64_t kWidths[] = {1, 1, 2, 4, 8, 2, 2, 4, 8, 1};
    adareduce_cuda_plan* plan = calloc(1, sizeof *plan);
    plan->older = group->newest;
    group->newest = plan;
    plan->request = *request;
    plan->bytes = calloc((size_t)request->num_tensors + 1, sizeof *plan->bytes);
    for (int64_t t = 0; t < request->num_tensors; ++t) {
      const adareduce_cuda_tensor* tensor = &request->tensors[t];
      plan->bytes[t] = tensor->rows * tensor->row_numel * kWidths[tensor->dtype];
      group->state->last_numel = tensor->rows * tensor->row_numel;
      group->state->last_rows = tensor->rows;
      group->state->last_row_numel = tensor->row_numel;
    }
    group->state->prepared++;
    *out = plan;
  }
  leave(group);
  return status;
}

static int32_t launch(adareduce_cuda_group* group, adareduce_cuda_plan* plan,
                      const adareduce_cuda_launch_args* args, adareduce_cuda_ticket** out,
                      adareduce_error* error) {
  device_state* state = group->state;
  if (group->is_aborted) return refuse(error, "aborted", group->args.device);
  if (state->refuse_launch) return refuse(error, "an illegal address", group->args.device);
  enter(group);
  for (int64_t t = 0; t < plan->request.num_tensors; ++t)
    if (plan->request.collective <= 1 && plan->bytes[t] > 0) /* results of the same shape */
      memmove(args->outputs[t], args->inputs[t], (size_t)plan->bytes[t]);
  for (int64_t t = 0; args->nonfinite != NULL && t < plan->request.num_tensors; ++t)
    args->nonfinite[t] = t;
  if (args->group_stats != NULL)
    args->group_stats[0] = args->local_squares == NULL ? -1.0 : args->local_squares[0];
  if (args->orthogonality != NULL) args->orthogonality[0] = args->prescale;
  if (args->cancellation != NULL) args->cancellation[0] = args->postscale;
  const int count = state->launched++;
  if (count + 1 < (int)sizeof state->launches)
    state->launches[count] = "abg..rt"[plan->request.collective];
  adareduce_cuda_ticket* ticket = calloc(1, sizeof *ticket);
  ticket->group = group;
  *out = ticket;
  leave(group);
  return ADAREDUCE_OK;
}

static int32_t order(adareduce_cuda_ticket* ticket, void* on, adareduce_error* error) {
  enter(ticket->group);
  (void)on;
  ticket->group->state->ordered++;
  leave(ticket->group);
  if (ticket->group->state->refuse_order) return refuse(error, "a bad stream", 0);
  return ADAREDUCE_OK;
}

static int32_t is_done(adareduce_cuda_ticket* ticket) {
  return !ticket->group->state->is_unfinished || ticket->group->is_aborted;
}

static void release(adareduce_cuda_ticket* ticket) {
  ticket->group->state->released++;
  free(ticket);
}

static int32_t check(adareduce_cuda_group* group, adareduce_error* error) {
  group->state->checked++;
  if (group->state->refuse_check) return refuse(error, "an asynchronous error", group->args.device);
  return ADAREDUCE_OK;
}

static void abort_group(adareduce_cuda_group* group, const char* text) {
  snprintf(group->state->abort_text, sizeof group->state->abort_text, "%s", text);
  group->is_aborted = 1;
  group->state->aborted++;
}

__attribute__((visibility("default"))) adareduce_cuda_plugin test_plugin = {
    ADAREDUCE_CUDA_PLUGIN_VERSION,
    sizeof(adareduce_cuda_plugin),
    create_group,
    destroy_group,
    path,
    stream,
    prepare,
    launch,
    order,
    is_done,
    release,
    check,
    abort_group,
};
