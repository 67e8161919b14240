#!/bin/sh
# ./run.sh       builds tbr, trains and evaluates the main arms of the built-in
#                experiment, prints the table (SEEDS=5 ./run.sh: five seeds)
# ./run.sh full  all arms and controls under fresh seeds, and how the effect
#                depends on the size of the model; both with their claims
# Everything lands in out/. What was finished before is not done again.
set -eu
cd "$(dirname "$0")"
make --silent all
# Threads of gcc's OpenMP that wait soon leave the processor to other programs.
export GOMP_SPINCOUNT="${GOMP_SPINCOUNT:-2000}"
case ${1:-main} in
  main) exec out/ablation data/ablation/main.grid --seeds "${SEEDS:-1}" --out out ;;
  full)
    out/ablation data/ablation/full.grid --out out/full
    exec out/ablation data/ablation/sizes.grid --out out/sizes ;;
  *) echo "usage: [SEEDS=N] ./run.sh [full]" >&2; exit 2 ;;
esac
