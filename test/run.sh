#!/bin/sh
# Builds and runs all tests; `make test` calls it. CC and FLAGS come from the
# Makefile; SANITIZE=1 adds the address and undefined-behaviour sanitizers;
# TBR_REAL names the folder of real data (../shared/real if left out).
# ONLY="math train" runs just those. Prints a line for each failure, and last
# `N passed, N failed`.
cd "$(dirname "$0")" || exit 2
: "${CC:=cc}" "${FLAGS:=-O2 -ffp-contract=off -fno-math-errno}"
: "${TBR_REAL:=$PWD/../../shared/real}"
case $TBR_REAL in /*) ;; *) TBR_REAL=$OLDPWD/$TBR_REAL ;; esac
C_TESTS='math gradient model train judge files data world ablation rows'
SH_TESTS='digest cli real readme world.sh ablation.sh'
here=$PWD
out=$PWD/out
TBR=$out/tbr WORLD=$out/world ABLATION=$out/ablation
rm -rf "$out"
mkdir -p "$out" || exit 2
# Copies, so that a build during the tests changes nothing.
cp ../tbr ../out/world ../out/ablation "$out" || exit 2
OMP_WAIT_POLICY=passive # the tests of this run share the processors
if [ -n "$SANITIZE" ]; then
  FLAGS="$FLAGS -g -O1 -fsanitize=address,undefined -fno-sanitize-recover=all"
  ASAN_OPTIONS=detect_leaks=0 # what fails doesn't free
  for source in ../tbr.c ../data/world/world.c ../data/ablation/ablation.c; do
    program=${source##*/}
    # shellcheck disable=SC2086
    $CC $FLAGS "$source" -o "$out/${program%.c}" -lm $LDFLAGS || exit 2
  done
  C_TESTS=$(echo "$C_TESTS" | sed 's/gradient //')
  echo 'gradients are not compared under the sanitizers: it would take long'
fi
export CC FLAGS TBR WORLD ABLATION TBR_REAL ASAN_OPTIONS OMP_WAIT_POLICY
[ -d "$TBR_REAL" ] || echo "no $TBR_REAL here: nothing is tried on real data"

wanted() { [ -z "$ONLY" ] || case " $ONLY " in *" $1 "*) ;; *) false ;; esac; }

# The folder of a test: those of the experiment stand beside what they test.
folder_of() {
  case ${1%.sh} in
  world | ablation | rows) echo "$here/../data/${1%.sh}" ;;
  *) echo "$here" ;;
  esac
}

# Builds one test program; the gradients are compared in double precision.
build() {
  extra=-O1
  [ "$1" = gradient ] && extra='-O2 -DTBR_DOUBLE'
  # shellcheck disable=SC2086
  $CC $FLAGS $extra -DTBR_NO_MAIN "$(folder_of "$1")/test_$1.c" \
    -o "$out/test_$1" -lm $LDFLAGS 2>"$out/$1.build"
}

# Runs a test; its output goes to out/NAME.txt.
one() {
  folder=$(folder_of "$1")
  if [ -f "$folder/test_$1.c" ]; then
    build "$1" && "$out/test_$1" "$out/scratch-$1" golden 2>"$out/$1.stderr"
  else
    (cd "$folder" && sh "test_${1%.sh}.sh" "$out/scratch-$1") \
      2>"$out/$1.stderr"
  fi >"$out/$1.txt"
  echo $? >"$out/$1.status"
}

# The programs one after another, and the scripts beside them.
(for t in $C_TESTS; do wanted "$t" && one "$t"; done) &
for t in $SH_TESTS; do wanted "$t" && one "$t"; done
wait

passed=0 failed=0
for t in $C_TESTS $SH_TESTS; do
  wanted "$t" || continue
  last=$(tail -n 1 "$out/$t.txt")
  sed '$d' "$out/$t.txt"
  case $last in
  *' passed, '*' failed')
    passed=$((passed + ${last%% *}))
    last=${last#* passed, }
    failed=$((failed + ${last%% *})) ;;
  *)
    echo "$last"
    echo "test_$t: stopped before its end, with status $(cat "$out/$t.status")"
    cat "$out/$t.build" "$out/$t.stderr" 2>/dev/null | tail -n 20
    failed=$((failed + 1)) ;;
  esac
done
echo "$passed passed, $failed failed"
[ "$failed" = 0 ]
