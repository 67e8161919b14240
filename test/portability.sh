#!/bin/sh
# Builds tbr for other platforms and runs its self-test there, under qemu-user
# where that is needed; the digest must be the same on all. A model and a
# tokenizer written here are read there, and what a model then says must be the
# same. `make portability` calls it; what isn't installed is said and skipped.
# On Debian: apt-get install qemu-user musl-tools and gcc-ARCH-linux-gnu.
cd "$(dirname "$0")" || exit 2
: "${TBR:=$PWD/../tbr}"
out=$PWD/out/portability
want=$(cat digest.txt) passed=0 failed=0
rm -rf "$out"
mkdir -p "$out" || exit 2
flags='-std=c99 -O2 -ffp-contract=off -fno-math-errno -fexcess-precision=fast'

check() { # WHAT GOT WANTED
  if [ "$2" = "$3" ]; then passed=$((passed + 1))
  else failed=$((failed + 1)); echo "$1: \"$2\", should be \"$3\""; fi
}

# A small model to be read everywhere.
head -c 30000 ../data/templates.txt >"$out/text.txt"
"$TBR" tokenizer --text "$out/text.txt" --vocab 400 --out "$out/model" &&
  "$TBR" pretrain --text "$out/text.txt" --tokenizer "$out/model" --dim 32 \
    --layers 2 --heads 2 --kv-heads 1 --hidden 48 --context 64 \
    --window 32 --steps 40 --out "$out/model" || exit 1
says() { # [RUNNER] TBR
  "$@" generate --model "$out/model" --prompt 'The user wants' --tokens 24
}
here=$(says "$TBR")

# platform NAME RUNNER COMPILER [FLAG...]
platform() {
  name=$1 runner=$2 compiler=$3
  shift 3
  for tool in $runner $compiler; do
    command -v "$tool" >/dev/null || { echo "$name: no $tool here"; return; }
  done
  # shellcheck disable=SC2086
  if $compiler $flags "$@" ../tbr.c -o "$out/$name" -lm 2>"$out/$name.log"; then
    got=$($runner "$out/$name" selftest --threads 1 2>/dev/null)
    echo "$name: $got"
    check "$name" "${got#digest }" "$want"
    check "$name reads a model" "$(says $runner "$out/$name")" "$here"
  else
    check "$name builds" "$(head -n 1 "$out/$name.log")" ''
  fi
}

platform musl '' musl-gcc -static
platform tcc '' tcc
platform i686 '' i686-linux-gnu-gcc -static -msse2 -mfpmath=sse
platform aarch64 qemu-aarch64 aarch64-linux-gnu-gcc -static
platform armhf qemu-arm arm-linux-gnueabihf-gcc -static
platform riscv64 qemu-riscv64 riscv64-linux-gnu-gcc -static
platform ppc64le qemu-ppc64le powerpc64le-linux-gnu-gcc -static
platform s390x qemu-s390x s390x-linux-gnu-gcc -static   # big-endian
platform mips qemu-mips mips-linux-gnu-gcc -static      # big-endian
platform mips64el qemu-mips64el mips64el-linux-gnuabi64-gcc -static
platform sparc64 qemu-sparc64 sparc64-linux-gnu-gcc -static # big-endian
platform hppa qemu-hppa hppa-linux-gnu-gcc -static      # big-endian
echo "$passed passed, $failed failed"
[ "$failed" = 0 ]
