#!/bin/sh
# Every command that README.md shows, run as it is printed, in a folder in
# which ./run.sh has run on a small scale. What takes long is left out here,
# but must be something that .ci/run or `make` knows.
. ./check.sh
root=$PWD/..
cd "$scratch" || exit 2
ln -s "$root/data" data
ln -s "$TBR" tbr
mkdir out
ln -s "$WORLD" out/world
ln -s "$ABLATION" out/ablation
if [ -d "$TBR_REAL" ]; then
  for file in "$TBR_REAL"/*; do ln -s "$file" "${file##*/}"; done
fi
small='--documents 3000 --vocab 500 --dim 16 --layers 1 --heads 2 --kv-heads 2 --hidden 24
  --pretrain.steps 5 --train.steps 3 --limit 40 --tokens 8'
# shellcheck disable=SC2086
status 0 '' out/ablation data/ablation/main.grid $small --out out

# The lines of all blocks of sh, continued ones joined, without comments.
commands() {
  awk '/^```sh$/ { on = 1; next } /^```/ { on = 0 } on' "$1" |
    sed -e ':a' -e '/\\$/{N;s/\\\n//;ba' -e '}' -e 's/  *#.*//' | grep .
}
tried=0
for page in README.md data/README.md data/world/README.md data/ablation/README.md; do
  [ -f "$root/$page" ] || { fail "there is no $page"; continue; }
  commands "$root/$page" >commands.txt
  while IFS= read -r line; do
    case $line in
    './run.sh' | './run.sh full' | 'SEEDS=5 ./run.sh') continue ;; # minutes
    'make' | 'make '*) # its target is there
      target=$(echo "$line" | sed 's/^make *//; s/ .*//; s/^[A-Z]*=.*//')
      grep -q "^${target:-all}:" "$root/Makefile" && pass ||
        fail "$page: Makefile has no $target: $line"
      continue ;;
    *'tbr.c -o tbr'*) (cd "$root" && eval "${line%-o tbr*}-o $scratch/built${line##*-o tbr}") &&
        pass || fail "$page: $line"
      continue ;;
    esac
    missing=
    for word in $line; do
      case $word in
      alpaca_en_demo.json | STAR-1.json | xstest_prompts.csv | stories260K.bin | tok512.bin | \
        smollm2 | out/adapter)
        case $line in *"--out $word"*) continue ;; esac # this makes it
        [ -e "$word" ] || missing=$word ;;
      esac
    done
    [ -z "$missing" ] || { echo "no $missing here: not tried: $line"; continue; }
    tried=$((tried + 1))
    if sh -c "$line" >one.txt 2>&1 </dev/null; then pass
    else fail "$page: $line: $(tail -n 1 one.txt)"; fi
  done <commands.txt
done
[ $tried -gt 5 ] && pass || fail "only $tried commands were found"
cd "$here" || exit 2
finish
