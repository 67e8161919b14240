#!/bin/sh
# The self-test gives one digest, whatever the threads, compiler, optimizer,
# block sizes and the machine's multiply-add.
. ./check.sh

digest() { "$@" selftest 2>/dev/null | sed -n '$s/^digest //p'; }

want=$(digest "$TBR" | grep -E '^[0-9a-f]{16}$')
[ -n "$want" ] && pass || fail "tbr selftest prints no digest"
[ -f digest.txt ] && is "$want" "$(cat digest.txt)" 'the digest of this build'
"$TBR" selftest >/dev/null 2>&1
is $? 0 'exit status of tbr selftest'
for threads in 1 2 7; do
  is "$("$TBR" selftest --threads $threads 2>/dev/null | tail -n 1)" \
    "digest $want" "$threads threads"
done

# variant NAME COMPILER FLAGS...: builds tbr that way; its digest is the same.
variant() {
  name=$1
  shift
  if "$@" ../tbr.c -o "$scratch/$name" -lm $LDFLAGS 2>"$scratch/$name.build"; then
    is "$(digest "$scratch/$name")" "$want" "digest of the build \"$name\""
  else
    fail "the build \"$name\" fails: $(head -n 3 "$scratch/$name.build")"
  fi
}

exact='-std=c99 -ffp-contract=off'
if [ -z "$SANITIZE" ]; then
  for cc in gcc clang tcc; do
    command -v $cc >/dev/null || { echo "no $cc here: not tried"; continue; }
    simd='-fno-math-errno -fopenmp-simd'
    [ $cc = tcc ] && { variant tcc tcc; continue; }
    [ "$cc" = "${CC##*/}" ] && other='' || other=yes
    # shellcheck disable=SC2086
    {
      variant $cc-O0 $cc $exact -O0
      variant $cc-O2 $cc $exact -O2 -march=native # no OpenMP at all
      [ -n "$other" ] && variant $cc-O3 $cc $exact $simd -O3 -march=native
    }
  done
  # shellcheck disable=SC2086
  {
    variant soft $CC $exact -O2 -fno-math-errno # no hardware is promised
    variant blocks $CC $FLAGS -O1 -DTBR_KC=64 -DTBR_MC=12 -DTBR_NC=48
  }
  $CC -DTBR_NC=100 ../tbr.c -c -o "$scratch/nc.o" 2>"$scratch/nc.txt" &&
    fail 'TBR_NC=100, which is no multiple of 16, builds' || pass
  grep -q 'TBR_NC must be' "$scratch/nc.txt" && pass || fail 'no word about TBR_NC'
fi
finish
