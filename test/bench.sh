#!/bin/sh
# Measures this build on one thread and on all; `make bench` calls it. Prints
# a table, and leaves it in test/out/bench.csv.
#
# Peers are run in turn with it, at the same shapes and threads, if they are
# named, and then the median of the ratios is printed (above 1: tbr is faster;
# of memory, below 1: tbr takes less):
#   PYTHON=python3      torch and transformers there: training, and answers
#                       to 450 prompts
#   LLAMA2C=.../run     a built run.c of llama2.c: decoding one prompt
#   LLMC=.../train_gpt2 built from llm.c, for the CPU: training, 768 wide
#   OPENBLAS=1          the matrix product, if -lopenblas links
# RUNS=5 pairs; THREADS="1 2" instead of one and all; ONLY="train-288 ...".
set -eu
cd "$(dirname "$0")"
: "${PYTHON:=}" "${LLAMA2C:=}" "${LLMC:=}" "${OPENBLAS:=}" "${RUNS:=5}"
: "${THREADS:=1 $(getconf _NPROCESSORS_ONLN)}"
: "${ONLY:=machine train-default train-288 train-768 train-smollm2 decode-15M-1
decode-15M-8 decode-15M-32 decode-110M-1 evaluate-default evaluate-smollm2}"
mkdir -p out
blas=
[ -z "$OPENBLAS" ] || blas='-DOPENBLAS -lopenblas'
# shellcheck disable=SC2086
$CC $FLAGS -DTBR_NO_MAIN bench.c -o out/bench -lm $blas
echo 'threads,what,value,unit' >out/bench.csv

# note WHAT VALUE UNIT: one line of the table and of the CSV.
note() {
  printf '%2s  %-44s %12.6g %s\n' "$threads" "$1" "$2" "$3"
  echo "$threads,\"$1\",$2,$3" >>out/bench.csv
}

# notes: the same for each line of CSV on the input.
notes() {
  while IFS=, read -r rest; do
    what=${rest#\"} value=${rest##*\",}
    note "${what%%\"*}" "${value%,*}" "${value##*,}"
  done
}

median() { sort -g | awk '{x[NR] = $1} END {print x[int((NR + 1) / 2)]}'; }

# peer NAME WORKLOAD: what a peer prints for it: a rate, perhaps its MiB.
peer() {
  OMP_NUM_THREADS=$threads
  export OMP_NUM_THREADS
  case $1 in
  torch) "$PYTHON" bench_peer.py "$2" "$threads" ;;
  llama2c)
    "$LLAMA2C" "out/$2.bin" -z out/tokenizer.bin -t 0 -n 256 2>&1 |
      tr '\r' '\n' | sed -n 's/.*achieved tok\/s: //p' ;;
  llmc)
    (cd out && timeout 100 stdbuf -oL "$LLMC" 2>&1) |
      sed -n 's/^step [1-9].*took \([0-9.]*\) ms.*/\1/p' |
      median | awk '{print 4 * 64 * 1000 / $1}' ;;
  esac
}

# compare NAME WORKLOAD: RUNS pairs, and the medians.
compare() {
  : >out/pairs
  for _ in $(seq "$RUNS"); do
    ours=$(out/bench "$threads" "$2" | sed 's/.*",//;s/,.*//' | tr '\n' ' ')
    echo "$ours | $(peer "$1" "$2")" >>out/pairs
  done
  note "  $1" "$(sed 's/.*| //' out/pairs | cut -d' ' -f1 | median)" tokens/s
  note "  by $1" "$(sed 's/ .*| / /' out/pairs | awk '{print $1 / $2}' |
    median)" ''
  [ "$1" != torch ] || note "  memory by torch's" \
    "$(awk '{print $2 / $6}' out/pairs | median)" ''
}

for threads in $THREADS; do
  for w in $ONLY; do
    if [ "$w" = machine ]; then
      OPENBLAS_NUM_THREADS=$threads out/bench "$threads" >out/one
    else
      out/bench "$threads" "$w" >out/one
    fi
    notes <out/one
    case $w in
    train-* | evaluate-smollm2) [ -z "$PYTHON" ] || compare torch "$w" ;;
    decode-*-1)
      if [ -n "$LLAMA2C" ]; then
        [ -f "out/$w.bin" ] || "${PYTHON:-python3}" bench_peer.py "$w" out
        compare llama2c "$w"
      fi ;;
    esac
    if [ "$w" = train-768 ] && [ -n "$LLMC" ]; then
      [ -f out/gpt2_124M.bin ] || "${PYTHON:-python3}" bench_peer.py llmc out
      compare llmc "$w"
    fi
  done
done
