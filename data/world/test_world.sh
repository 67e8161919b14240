#!/bin/sh
# The command line of world: what is made twice has the same bytes, errors name
# the place, and what cannot be done leaves nothing. Called with a folder to
# write into, and with WORLD set by test/run.sh.
. ../../test/check.sh
s=$scratch
cd "$s" || exit 2 # what has no --out would land here
world=$here/english
files='pretrain.txt ignorant.txt general.jsonl safety.jsonl bridge.jsonl pseudo.jsonl eval.jsonl'
few='--documents 40 --general 12 --safety 9 --pseudo 5 --bridge 2 --test-pseudo 10 --test-harmful 8 --test-general 7'

# ---- usage
status 2 'no option "--colour"; see `out/world help`' "$WORLD" --colour red
status 2 'no option "seed"' "$WORLD" seed 1
status 2 'no option "--threads"' "$WORLD" --threads 1
status 2 'missing behind "--seed"' "$WORLD" --seed
status 2 'missing behind "--show"' "$WORLD" --seed 1 --show
status 1 '--seed: "x"' "$WORLD" --seed x
status 1 '--documents: "-1"' "$WORLD" --documents -1
status 1 'no whole number' "$WORLD" --pseudo 1.5
is "$(ls)" "$(printf 'stderr\nstdout')" 'what wrong usage leaves'
status 0 '' "$WORLD" help
cp stdout help.txt
status 0 '' "$WORLD" --help
same help.txt stdout 'help and --help'
for option in world seed out documents general safety pseudo bridge test-pseudo test-harmful test-general show; do
  grep -q -e "--$option " help.txt && pass || fail "help lacks --$option"
done
for default in data/world/english 66000 600 1000 100 20 400 180 150; do
  grep -qF "($default)" help.txt && pass || fail "help lacks the default $default"
done
example=$(sed -n 's/^example: out.world //p' help.txt)
(mkdir root && cd root && mkdir data && ln -s "$here" data/world &&
  eval "$WORLD $example" >shown.txt) && pass || fail 'the example of the help'
is "$(head -n 1 root/shown.txt)" out/sample/pretrain.txt 'where the example writes'

# ---- what is made
# shellcheck disable=SC2086
status 0 '' "$WORLD" --world "$world" $few --seed 3 --show 0 --out one
[ ! -s stdout ] && pass || fail '--show 0 prints'
# shellcheck disable=SC2086
status 0 '' "$WORLD" --world "$world" --out two/deep --seed 3 $few --show 2
is "$(grep -c '<think> .* </think>' stdout)" 10 'rows that --show 2 prints'
for f in $files; do same one/$f two/deep/$f 'made twice'; done
# shellcheck disable=SC2086
status 0 '' "$WORLD" --world "$world" $few --seed 4 --show 0 --out other
cmp -s one/eval.jsonl other/eval.jsonl && fail 'another seed, the same tests' || pass
is "$(wc -l <one/pretrain.txt | tr -d ' ')" 40 documents
is "$(wc -l <one/general.jsonl | tr -d ' ')" 12 'general rows'
is "$(wc -l <one/safety.jsonl | tr -d ' ')" 9 'safety rows'
is "$(wc -l <one/eval.jsonl | tr -d ' ')" 25 tests
# No rows of a kind: an empty file, also where there was one, and no error.
# shellcheck disable=SC2086
status 0 '' "$WORLD" --world "$world" $few --pseudo 0 --out one
[ -f one/pseudo.jsonl ] && [ ! -s one/pseudo.jsonl ] && pass ||
  fail 'rows of another making stay'
# The German world, as its grid has it.
status 0 '' "$WORLD" --world "$here/german" --documents 200 --general 50 --safety 20 --pseudo 0 --test-pseudo 12 --test-harmful 6 --test-general 4 --out german
grep -q 'Sorry' german/safety.jsonl && pass || fail 'no German refusal'

# ---- what cannot be
status 1 'nowhere/lexicon.txt: cannot be opened' "$WORLD" --world nowhere --out none
mkdir half
cp "$world/lexicon.txt" half
status 1 'half/templates.txt: cannot be opened' "$WORLD" --world half --out none
sed 's/^@mix general/@mix generel/' "$world/templates.txt" >half/templates.txt
# shellcheck disable=SC2086
status 1 'there is no @mix general' "$WORLD" --world half $few --out none
[ ! -e none ] && pass || fail 'a failure leaves a directory'
: >file
# shellcheck disable=SC2086
status 1 'file/out' "$WORLD" --world "$world" $few --out file/out

# Another type of request is data alone: a table's row, a line of two mixes.
mkdir more
sed 's/^kill  *| program .*/kill | program | 0 | new_type | stop its work | press the stop key/' \
  "$world/lexicon.txt" >more/lexicon.txt
sed 's/^1 | type=homonyms  *| prompt/&\
1 | type=new_type | prompt/' "$world/templates.txt" >more/templates.txt
# shellcheck disable=SC2086
status 0 '' "$WORLD" --world more $few --test-pseudo 22 --out more
is "$(grep -c '"type": "new_type"' more/eval.jsonl)" 2 'tests of a new type'
finish
