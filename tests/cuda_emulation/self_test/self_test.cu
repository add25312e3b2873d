// Runs one case by its name; without one, prints all names. tests/test_cuda_emulation.py runs them.
#include <cstring>

#include "self_test.h"

std::string program;

int main(int argc, char** argv) {
  program = argv[0];
  for (const Case* cases : {device_cases, stream_cases, graph_cases, memory_cases})
    for (; cases->name != nullptr; ++cases) {
      if (argc < 2) std::puts(cases->name);
      if (argc < 2 || std::strcmp(argv[1], cases->name) != 0) continue;
      if (argc == 3) setenv("SELF_TEST_ARGUMENT", argv[2], 1);
      cases->run();
      std::puts("all is well");
      return 0;
    }
  return argc < 2 ? 0 : 2;
}
