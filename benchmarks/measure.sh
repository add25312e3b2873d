#!/usr/bin/env bash
# Measures what docs/performance.md shows, on this machine and with this environment's MPI; adds
# JSON lines to benchmarks/results. Takes some minutes; nothing else should run meanwhile.
#   bash benchmarks/measure.sh [kernels] [collectives] [steps] [peers] [traffic]
#   then: python benchmarks/tables.py
# peers: ADAREDUCE_ENVIRONMENTS names the environments, one for each MPI; this one where it is unset.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
results=benchmarks/results
export OMP_NUM_THREADS=1

steps() {
  for ranks in 2 4; do
    mpirun -n $ranks python benchmarks/training_step.py --iters 40 --json $results/training_step.jsonl
  done
}

peers() {
  local environments=()
  for folder in ${ADAREDUCE_ENVIRONMENTS:-}; do environments+=(--environment "$folder"); done
  python benchmarks/compare_peers.py ${environments[@]+"${environments[@]}"} \
    --json $results/peers.jsonl
}

traffic() { mpirun -n 2 python benchmarks/memory_traffic.py --json $results/memory_traffic.jsonl; }

kernels() {
  python benchmarks/kernels.py --json $results/kernels.jsonl
  for isa in avx2 baseline; do
    python benchmarks/kernels.py --isa $isa --json $results/kernels.jsonl
  done
}

collectives() {
  for ranks in 2 4; do
    bench() { mpirun -n $ranks python -m adareduce.bench "$@" --json $results/collectives.jsonl; }
    bench allreduce --op sum -b 4K -e 64M -f 16 --peers
    bench allreduce --op adasum -b 4K -e 64M -f 16 --peers
    bench allreduce --op adasum -d bfloat16 -b 16M --peers
    bench allreduce --op adasum --layers resnet50 --peers -n 10
    bench allreduce --op avg --layers resnet50 --stats -n 20
    bench allreduce --op adasum --layers tiny2000 --peers
    for collective in reducescatter allgather alltoall broadcast; do
      bench $collective -b 4M --peers
    done
  done
}

if [ $# -eq 0 ]; then set -- kernels collectives steps peers traffic; fi
for part in "$@"; do $part; done
