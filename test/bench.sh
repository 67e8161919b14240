#!/bin/sh
# Builds and runs bench.c on one thread and on all; `make bench` calls it. The
# tables are also left in test/out/bench-1.csv and bench-all.csv.
set -eu
cd "$(dirname "$0")"
mkdir -p out
# shellcheck disable=SC2086
$CC $FLAGS -DTBR_NO_MAIN bench.c -o out/bench -lm
out/bench out/bench-1.csv 1
echo
out/bench out/bench-all.csv 0
