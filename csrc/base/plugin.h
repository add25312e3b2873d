#ifndef ADAREDUCE_BASE_PLUGIN_H_
#define ADAREDUCE_BASE_PLUGIN_H_
/* What every border between two compiled modules shares. C only. */
#include <stdint.h>

enum adareduce_status {
  ADAREDUCE_OK = 0,
  ADAREDUCE_ERROR = 1,    /* the library refused: see the text */
  ADAREDUCE_PEER_DEAD = 2 /* MPI says that a process of the communicator died (ULFM) */
};

typedef struct {
  int32_t status;
  int32_t peer;    /* rank of this communicator whose message failed or who died; -1: unknown */
  char text[1000]; /* the call, the library's own words, file and line; ends in 0 */
} adareduce_error;

#endif /* ADAREDUCE_BASE_PLUGIN_H_ */
