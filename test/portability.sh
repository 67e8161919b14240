#!/bin/sh
# Builds tbr for other platforms, and runs it there: under qemu-user, wine or
# node where that is needed. On each, the self-test must give the digest, a
# tokenizer and a model trained there must have the bytes of those trained
# here, and the model trained here must say the same there. `make portability`
# calls it; a platform whose compiler or runner isn't here is named and skipped.
# On Debian: apt-get install qemu-user musl-tools tcc gcc-ARCH-linux-gnu,
# clang lld wasi-libc libclang-rt-dev-wasm32 nodejs, gcc-mingw-w64-x86-64 wine.
cd "$(dirname "$0")" || exit 2
: "${TBR:=$PWD/../tbr}"
out=$PWD/out/portability
want=$(cat digest.txt) passed=0 failed=0
rm -rf "$out"
mkdir -p "$out" || exit 2
flags='-std=c99 -O2 -ffp-contract=off -fno-math-errno'
fast=-fexcess-precision=fast # gcc only
export WINEPREFIX="$out/wine" WINEDEBUG=-all

check() { # WHAT GOT WANTED
  if [ "$2" = "$3" ]; then passed=$((passed + 1))
  else failed=$((failed + 1)); echo "$1: \"$2\", should be \"$3\""; fi
}
learn() { # DIRECTORY [RUNNER] TBR
  model=$1
  shift
  "$@" tokenizer --text "$out/text.txt" --vocab 400 --out "$model" &&
    "$@" pretrain --text "$out/text.txt" --tokenizer "$model" --dim 32 \
      --layers 2 --heads 2 --kv-heads 1 --hidden 48 --context 64 --window 32 \
      --steps 20 --batch 2 --warmup 4 --lr 0.02 --threads 1 --out "$model"
}
say() { # [RUNNER] TBR
  "$@" generate --model "$out/model" --prompt 'The user wants' --tokens 24 \
    --temperature 1 --threads 1 | tr -d '\r'
}

head -c 20000 ../data/world/english/templates.txt >"$out/text.txt"
learn "$out/model" "$TBR" || exit 1
here=$(say "$TBR")
printf '#include <stdio.h>\nint main(void) { return puts("hello") < 0; }\n' \
  >"$out/hello.c"
cat >"$out/wasi.js" <<'END'
const { WASI } = require("wasi"), program = process.argv[2];
const wasi = new WASI({ version: "preview1", args: process.argv.slice(2),
                        preopens: { "/": "/" } });
WebAssembly.instantiate(require("fs").readFileSync(program),
                        { wasi_snapshot_preview1: wasi.wasiImport })
  .then(m => process.exit(wasi.start(m.instance)));
END

# platform NAME RUNNER COMPILER [FLAG...]
platform() {
  name=$1 runner=$2 compiler=$3 program=$out/$1.exe log=$out/$1.log
  shift 3
  # shellcheck disable=SC2086
  {
    $compiler "$@" "$out/hello.c" -o "$program" -lm 2>"$log" &&
      hello=$($runner "$program" 2>>"$log" | tr -d '\r') || hello=
    [ "$hello" = hello ] || { echo "$name: cannot be tried here"; return; }
    if ! $compiler $flags "$@" ../tbr.c -o "$program" -lm 2>"$log"; then
      check "$name builds" "$(head -n 1 "$log")" ''
      return
    fi
    got=$($runner "$program" selftest --threads 1 2>/dev/null | tr -d '\r')
    echo "$name: $got"
    check "$name" "${got#digest }" "$want"
    learn "$out/$name" $runner "$program" >/dev/null 2>&1
    check "$name trains" "$(diff -rq "$out/model" "$out/$name" 2>&1)" ''
    check "$name reads a model" "$(say $runner "$program")" "$here"
  }
}

platform musl '' musl-gcc -static $fast
platform tcc '' tcc
platform i686 '' i686-linux-gnu-gcc -static $fast -msse2 -mfpmath=sse
platform x87 '' i686-linux-gnu-gcc -static $fast -march=i686 -mno-sse -mpc64 \
  -ffloat-store -DTBR_ROUNDED
command -v i686-linux-gnu-gcc >/dev/null &&
  check 'x87 without these flags' "$(i686-linux-gnu-gcc -fsyntax-only \
    -march=i686 -mno-sse ../tbr.c 2>&1 | grep -o 'Floats keep excess' |
    head -n 1)" 'Floats keep excess'
platform windows.x86_64 wine x86_64-w64-mingw32-gcc $fast
platform wasm "node --no-warnings $out/wasi.js" clang --target=wasm32-wasi
platform aarch64 qemu-aarch64 aarch64-linux-gnu-gcc -static $fast
platform armhf qemu-arm arm-linux-gnueabihf-gcc -static $fast
platform riscv64 qemu-riscv64 riscv64-linux-gnu-gcc -static $fast
platform ppc64le qemu-ppc64le powerpc64le-linux-gnu-gcc -static $fast
platform mips64el qemu-mips64el mips64el-linux-gnuabi64-gcc -static $fast
# Big-endian:
platform s390x qemu-s390x s390x-linux-gnu-gcc -static $fast
platform powerpc qemu-ppc powerpc-linux-gnu-gcc -static $fast
platform mips qemu-mips mips-linux-gnu-gcc -static $fast
platform sparc64 qemu-sparc64 sparc64-linux-gnu-gcc -static $fast
platform hppa qemu-hppa hppa-linux-gnu-gcc -static $fast
platform m68k qemu-m68k m68k-linux-gnu-gcc -static $fast -m68040
# What Debian links statically for alpha crashes before main.
platform alpha 'qemu-alpha -L /usr/alpha-linux-gnu' alpha-linux-gnu-gcc $fast \
  -mieee
rm -rf "$WINEPREFIX" # 700 MB
echo "$passed passed, $failed failed"
[ "$failed" = 0 ]
