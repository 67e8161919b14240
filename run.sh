#!/bin/sh
# ./run.sh       builds tbr, trains and evaluates the main arms of the built-in
#                experiment, prints the table (SEEDS=5 ./run.sh: five seeds)
# ./run.sh full  the same with all controls, under five fresh seeds
# Everything lands in out/. What was finished before is not done again.
set -eu
cd "$(dirname "$0")"
make --silent tbr
case ${1:-main} in
  main) exec ./tbr ablate data/main.grid --seeds "${SEEDS:-1}" --out out ;;
  full) exec ./tbr ablate data/full.grid --out out/full ;;
  *) echo "usage: [SEEDS=N] ./run.sh [full]" >&2; exit 2 ;;
esac
