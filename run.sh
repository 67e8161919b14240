#!/bin/sh
# Builds tbr, trains and evaluates the arms of the built-in experiment, and
# prints the table; everything lands in out/. SEEDS=5 ./run.sh repeats it with
# five seeds. Whatever was finished before is not done again.
set -eu
cd "$(dirname "$0")"
make --silent tbr
exec ./tbr ablate data/main.grid --seeds "${SEEDS:-1}" --out out "$@"
