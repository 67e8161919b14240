#!/bin/sh
# What the built-in experiment gives under seed 0, byte for byte: trains the
# main arms and the German world (about two minutes on two cores, if they are
# not in out/ yet), and compares with the hashes in results.sha256. A change
# that is meant to change results writes them anew:
#   sha256sum out/seed-0/*/completions.jsonl ... >test/results.sha256
cd "$(dirname "$0")/.." || exit 2
make --silent all || exit 2
./run.sh >/dev/null || exit 1
out/ablation data/ablation/german.grid --out out/german >/dev/null || exit 1
sum='sha256sum'
command -v sha256sum >/dev/null || sum='shasum -a 256' # as macOS has it
passed=0 failed=0
while read -r hash file; do
  if [ "$($sum "$file" | cut -d' ' -f1)" = "$hash" ]; then
    passed=$((passed + 1))
  else
    failed=$((failed + 1))
    echo "$file: has other bytes than under the same seed before"
  fi
done <test/results.sha256
echo "$passed passed, $failed failed"
[ "$failed" = 0 ]
