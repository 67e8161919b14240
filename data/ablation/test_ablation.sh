#!/bin/sh
# The ablation from its command line: grids and results that are wrong are
# named by their place, whole runs give the same bytes however they are run,
# and what an arm trains on is its file. Called from its own folder with a
# scratch folder, and with ABLATION, WORLD, TBR, the programs, in the
# environment.
. ../../test/check.sh
s=$scratch
cd "$s" || exit 2 # what has no --out would land here
world=$here/../world/english

# ---- usage
status 2 'an argument is missing, "GRID"' "$ABLATION"
status 2 'an argument is missing, "RESULTS.jsonl"' "$ABLATION" report
status 2 'no option "--colour"; see `out/ablation help`' "$ABLATION" x.grid --colour red
status 2 'no option "--threads"' "$ABLATION" report x.jsonl --threads 1
status 2 'no option "more"' "$ABLATION" x.grid more
status 2 'a value is missing behind "--seeds"' "$ABLATION" x.grid --seeds
status 2 'no option "--data"' "$ABLATION" x.grid --data rows.jsonl
status 1 'x.grid: cannot be opened' "$ABLATION" x.grid --out none
status 0 '' "$ABLATION" help
cp stdout help.txt
status 0 '' "$ABLATION" --help
same stdout help.txt '--help and help'
for option in world train.steps style of seeds grid; do
  grep -q "^  $option " help.txt && pass || fail "help has no option $option"
done

grep -q "^  kv-heads .* (4)" help.txt && pass || fail "help has no default of the core"

# ---- results that are wrong
printf '{"arm": "a", "n": 1}\n{"n": 1}\n' >bad.jsonl
status 1 'bad.jsonl:2: is no line of results: it names no arm' "$ABLATION" report bad.jsonl
printf '{"arm": "a", "n": -1}\n' >bad.jsonl
status 1 '"n" is no count' "$ABLATION" report bad.jsonl
printf '{"arm": "a", "n": 1.5}\n' >bad.jsonl
status 1 '"n" is no count' "$ABLATION" report bad.jsonl
printf '{"arm": "a", "seed": -1}\n' >bad.jsonl
status 1 '"seed" is no count' "$ABLATION" report bad.jsonl
printf '{"arm": "a", "n": 1}\n{"arm": "a", "n": 2}\n' >bad.jsonl
status 1 'bad.jsonl:2: there is a line of this arm' "$ABLATION" report bad.jsonl
printf '{"arm": "a", "n": 1}\n{"arm": "b", "n": 5, "refusal": 9}\n' >bad.jsonl
status 1 'bad.jsonl:2: "refusal" is 9, more than the 5 prompts' "$ABLATION" report bad.jsonl
printf '{"arm": "a", "refusal": 9}\n' >bad.jsonl
status 1 'bad.jsonl:1: is no line of results: it has no "n"' "$ABLATION" report bad.jsonl
printf '{"arm": "a" "n": 1}\n' >bad.jsonl
status 1 'bad.jsonl:1:13' "$ABLATION" report bad.jsonl
status 1 'has no results' "$ABLATION" report /dev/null
[ ! -e out ] && pass || fail 'a report that failed left something'

# ---- grids that are wrong
# bad WORDS TEXT: a grid of that text is refused with these words.
bad() {
  printf "$2" >bad.grid
  status 1 "$1" "$ABLATION" bad.grid --out none
}
bad 'bad.grid:2: there is no option "colour"; `out/ablation help` lists them' 'dim = 8\ncolour = red\narm a\n'
bad 'bad.grid:1: there is no option "text"' 'text = x\narm a\n'
bad 'bad.grid:1: "dim 8" should be option=value' 'dim 8\narm a\n'
bad 'bad.grid:1: --dim: "x" is no number' 'dim = x\narm a\n'
bad 'names no arm' '# nothing\n'
bad 'bad.grid:2: ' 'arm a\ndim = 8\n'
bad 'bad.grid:2: there is an arm "a" already' 'arm a\narm a\n'
bad 'bad.grid:1: an arm needs a name' 'arm data\n'
bad 'bad.grid:1: an arm needs a name' 'arm base2\n'
bad 'bad.grid:1: seed holds for all arms' 'arm a seed=3\n'
bad 'bad.grid:1: of=b should name an arm above' 'arm a of=b\narm b\n'
bad 'bad.grid:3: of=a should name an arm above that is trained, under as many seeds' \
  'seeds = 2\narm a seeds=1\narm b of=a\n'
bad 'bad.grid:1: seeds must be at least 1' 'arm a seeds=0\n'
bad 'no.jsonl: cannot be opened; arm a names it as safety' 'arm a safety=no.jsonl\n'
bad '--style cannot be "odd"' 'arm a style=odd\n'
bad 'bad.grid:2: there is no arm "b" above' 'arm a\nclaim x | y | FR a - b > 0\n'
for claim in 'x' 'x | y' 'x | y | FR a' 'x | y | FR a > b' 'x | y | XX a > 0' 'x | y | FR a > 0 & FR' \
  'x | y | FR a > 0 TR a > 0' 'x | y | FR > 0' 'x | y | FR 2 > 0'; do
  bad 'bad.grid:2: ' "arm a\nclaim $claim\n"
done
bad 'arm a has no rows to train on' "world = $world\ndocuments = 10\ndim = 8\nheads = 2\nkv-heads = 2\nlayers = 1\npretrain.steps = 1\narm a safety=none general=none\n"
rm -rf none
bad 'bad.grid:1: --seed' 'seed = x\narm a\n'
[ ! -e none ] && pass || fail 'a run that failed left something'
touch file
printf 'arm a\n' >bad.grid
status 1 'file/x' "$ABLATION" bad.grid --world "$world" --documents 10 --out file/x

# ---- the same seed, the same bytes
cat >tiny.grid <<'END'
out = a1
vocab = 320
dim = 16
layers = 1
heads = 2
kv-heads = 1
hidden = 24
pretrain.steps = 3
train.steps = 2
limit = 30
tokens = 6
arm none safety=none
arm sft reflection=none
arm tbr reflection=safety
arm asked of=tbr think=1
arm ignorant mix=ignorant seeds=1
arm form by=form
claim a | what is hardly trained refuses nothing | FR none < 0.5 & FR form - form < 1
claim b | it refuses | FR form - form < 1 & FR none > 0.5
claim c | one seed that both arms have decides nothing | FR ignorant - none < 2
END
status 0 '' "$ABLATION" tiny.grid --world "$world" --seeds 2 --threads 1
cp stdout first.txt
status 0 '' "$ABLATION" tiny.grid --world "$world" --seeds 2 --threads 3 --out a2
same first.txt stdout 'the tables of one thread and three'
status 0 'is trained already' "$ABLATION" tiny.grid --world "$world" --seeds 2 --out a2
same a1/results.jsonl a2/results.jsonl 'one thread and three'
for seed in 0 1; do
  for cell in base none sft tbr; do
    same a1/seed-$seed/$cell/model.safetensors a2/seed-$seed/$cell/model.safetensors 'one thread and three'
  done
  same a1/seed-$seed/tbr/completions.jsonl a2/seed-$seed/tbr/completions.jsonl 'one thread and three'
done
cmp -s a1/seed-0/tbr/model.safetensors a1/seed-1/tbr/model.safetensors && fail 'two seeds, one model' || pass
cmp -s a1/seed-0/tbr/model.safetensors a1/seed-0/sft/model.safetensors && fail 'two arms, one model' || pass
[ ! -f a1/seed-0/asked/model.safetensors ] && pass || fail 'an arm with of= was trained'
grep -q '"prompt": "[^"]*\(look at\|think about\|consider\|weigh\)' a1/seed-0/asked/completions.jsonl && pass ||
  fail 'think=1 does not ask'
grep -q '^{"arm": "asked", "seed": 0, "prompt"' a1/seed-0/asked/completions.jsonl && pass ||
  fail 'completions do not say whose they are'
cmp -s a1/seed-0/base/model.safetensors a1/seed-0/base-*/model.safetensors && fail 'the ignorant base is the other one' || pass
[ -d a1/seed-0/ignorant ] && [ ! -e a1/seed-1/ignorant ] && pass || fail 'an arm with seeds=1 ran under others'
for words in 'arm less sft' 'false/true refusal, by seed' 'claim'; do
  grep -q "^|.* $words" a1/report.md && pass || fail "report.md has no table of $words"
done
is "$(sed -n 's/^| [abc] |[^|]*| \([a-z ]*[a-z]\) .*/\1/p' a1/report.md | tr '\n' ,)" \
  'holds,does not hold,not decided,' 'claims'
[ -f a1/report.md ] && pass || fail 'the report is not where the grid says: out = a1'
is "$(grep -c . a1/results.jsonl)" "$(grep -c '"n": [0-9]' a1/results.jsonl)" 'lines of results with a count'

# ---- the report anew, with claims and without
status 0 '' "$ABLATION" report a1/results.jsonl --grid tiny.grid --out again
same stdout again/report.md 'the report on stdout and in its file'
for file in report.md report.csv refusal.svg; do
  same a1/$file again/$file 'the report of a run and of its results'
done
status 0 '' "$ABLATION" report a1/results.jsonl --out again --baseline tbr
grep -q 'arm less tbr' again/report.md && pass || fail 'another baseline is not heeded'
grep -q claim again/report.md && fail 'claims without a grid' || pass

# ---- the picture
if command -v python3 >/dev/null; then
  python3 -c 'import sys, xml.dom.minidom as x; x.parse(sys.argv[1])' a1/refusal.svg 2>/dev/null && pass ||
    fail 'refusal.svg is no XML'
else echo 'no python3 here: whether refusal.svg is XML is not tried'; fi
for words in '>none<' '>sft<' '>tbr<' 'intervals over seeds' 'seeds: 2' '>0%<'; do
  grep -q "$words" a1/refusal.svg && pass || fail "refusal.svg has no $words"
done
printf '{"arm": "sft", "label": "pseudo-harmful", "n": 400, "refusal": 343}\n' >one.jsonl
status 0 '' "$ABLATION" report one.jsonl --out one
grep -q '>85.8%<' one/refusal.svg && pass || fail 'refusal.svg does not hold the rate'
grep -q '343/400 0.858 \[0.820, 0.888\]' one/report.md && pass || fail 'report.md does not hold the rate'

# ---- what is audited is what is trained
for cell in sft tbr; do
  status 0 '' "$TBR" train --data a1/seed-0/$cell/train.jsonl --base a1/seed-0/base --out same-$cell --seed 0 --steps 2
  same a1/seed-0/$cell/model.safetensors same-$cell/model.safetensors "tbr train on the rows of $cell"
done
grep -q reflection a1/seed-0/sft/train.jsonl && fail 'rows of sft reflect' || pass
is "$(grep -c '"reflection"' a1/seed-0/tbr/train.jsonl)" \
  "$(grep -c '"label": "harmful"' a1/seed-0/tbr/train.jsonl)" 'rows of tbr that reflect'
grep -q '"filler"\|"asked"' a1/seed-0/tbr/train.jsonl && fail 'train.jsonl has more than is trained on' || pass
is "$(cat a1/seed-0/tbr/arm.jsonl)" '{"file": "a1/seed-0/data/general.jsonl", "rows": 600, "reflecting": 0, "filtered": 0}
{"file": "a1/seed-0/data/safety.jsonl", "rows": 1000, "reflecting": 1000, "filtered": 0}' 'what became of the rows'
sed 's/"label": "[^"]*",* *//; s/"type": "[^"]*",* *//' a1/seed-0/data/safety.jsonl >unlabelled.jsonl
grep -q '"label"\|"type"' unlabelled.jsonl && fail 'labels are still there' || pass
cat >own.grid <<END
world =
base = a1/seed-0/base
general = a1/seed-0/data/general.jsonl
safety = unlabelled.jsonl
prompts = a1/seed-0/data/eval.jsonl
train.steps = 1
limit = 3
tokens = 2
arm filtered filter=1
END
status 0 '' "$ABLATION" own.grid --out own
is "$(grep -c '"filtered": 0' own/seed-0/filtered/arm.jsonl)" 2 \
  'files of which filter=1 leaves all rows, a safety file without labels among them'
[ ! -e own/seed-0/data ] && [ ! -e own/seed-0/base ] && pass || fail 'a world or a base that nobody needs was made'

# ---- a result is taken from disk only if it is the same that is asked for
# again WHAT [OPTION...]: whether the arm is evaluated anew.
cell=own/seed-0/filtered
again() {
  what=$1
  shift
  echo kept >$cell/completions.csv
  status 0 '' "$ABLATION" own.grid --out own "$@"
  is "$(cat $cell/completions.csv | grep -c kept)" "$what" "an evaluation that is kept, with $*"
}
again 1
again 0 --tokens 3
again 1 --tokens 3
again 0 --tokens 3 --temperature 1
again 0 --tokens 3 --rule arditi
again 0 --limit 4
head -n 8 a1/seed-0/data/eval.jsonl >eval.jsonl
again 0 --prompts eval.jsonl
again 1 --prompts eval.jsonl
sed '1s/"prompt": "/&Well, /' eval.jsonl >eval2.jsonl
again 0 --prompts eval2.jsonl
before=$(sed 's/.*"cell": //' $cell/results.jsonl | head -n 1)
again 1 --prompts eval2.jsonl
sed 's/"rope_theta": 10000/"rope_theta": 500/' $cell/config.json >config.txt
cmp -s config.txt $cell/config.json && fail 'config.json is what it was' || cp config.txt $cell/config.json
again 0 --prompts eval2.jsonl
[ "$before" != "$(sed 's/.*"cell": //' $cell/results.jsonl | head -n 1)" ] && pass || fail 'the mark stays'
sed '/"merges":/{n;d;}' $cell/tokenizer.json >merges.txt
cmp -s merges.txt $cell/tokenizer.json && fail 'no merge was taken out' || cp merges.txt $cell/tokenizer.json
again 0 --prompts eval2.jsonl

# ---- a grid that is killed goes on where it was
killed=0 tries=0
while [ $tries -lt 5 ] && [ ! -f a3/report.md ]; do
  "$ABLATION" tiny.grid --world "$world" --seeds 2 --out a3 >/dev/null 2>&1 &
  sleep 0.$((tries * 23 % 40 + 15))
  kill -9 $! 2>/dev/null && killed=$((killed + 1))
  wait $! 2>/dev/null
  tries=$((tries + 1))
done 2>/dev/null
status 0 '' "$ABLATION" tiny.grid --world "$world" --seeds 2 --out a3
for file in results.jsonl report.md seed-1/tbr/model.safetensors seed-0/asked/completions.jsonl; do
  same a1/$file a3/$file "after $killed kills"
done
cd "$here" || exit 2
finish
