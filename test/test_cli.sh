#!/bin/sh
# The command line: exit statuses, messages that name the place, nothing half
# written, and whole runs that give the same bytes however they are run.
. ./check.sh
s=$scratch
cd "$s" || exit 2 # what has no --out would land here

# ---- verbs and options
status 2 'which verb' "$TBR"
status 2 'no verb "frobnicate"' "$TBR" frobnicate
status 2 'no verb "frobnicate"' "$TBR" help frobnicate
status 2 'needs an argument' "$TBR" judge
status 2 'needs an argument' "$TBR" info --threads 1
status 2 'no option "--colour"' "$TBR" generate --colour red
status 2 'no option "--steps"' "$TBR" generate --steps 1
status 2 'a value is missing behind "--threads"' "$TBR" selftest --threads
status 0 '' "$TBR" help
verbs=$("$TBR" help | sed -n 's/^  \([a-z]*\) .*/\1/p')
is "$(echo $verbs)" 'selftest data show tokenizer pretrain train reflect generate eval judge info import' 'the verbs'
for verb in $verbs; do
  "$TBR" help "$verb" >help.txt 2>&1
  is $? 0 "status of tbr help $verb"
  grep -q "^usage: tbr $verb" help.txt && pass || fail "help of $verb has no usage"
  case $verb in
  judge | show | info | reflect) "$TBR" "$verb" x --help ;;
  *) "$TBR" "$verb" --help ;;
  esac >help2.txt 2>&1
  same help.txt help2.txt "$verb --help and help $verb"
done
status 1 '--seed: "x"' "$TBR" data --seed x
status 1 '--seed: "-1"' "$TBR" data --seed -1
status 1 'no whole number' "$TBR" data --seed 1.5
status 1 '--form cannot be "xml"' "$TBR" data --form xml
status 1 '--rule cannot be "mine"' "$TBR" judge x.csv --rule mine
status 1 'from 0 to 1' "$TBR" generate --top-p 1.5
for bad in two '' -3 1.5; do # a number of threads that is none
  "$TBR" selftest --threads "$bad" >/dev/null 2>message.txt
  got=$?
  if [ $got != 0 ] && grep -q -e '--threads' message.txt; then pass
  else fail "--threads \"$bad\": no error names the option (status $got)"; fi
done

# ---- something small to work with
"$WORLD" --show 0 --world "$here/../data/world/english" --out world 2>/dev/null
head -n 300 world/pretrain.txt >text.txt
head -n 40 world/general.jsonl >general.jsonl
head -n 20 world/safety.jsonl >safety.jsonl
sed -n '1~60p' world/eval.jsonl >eval.jsonl 2>/dev/null || head -n 12 world/eval.jsonl >eval.jsonl
status 0 '' "$TBR" tokenizer --text text.txt --vocab 300 --out base
shape='--dim 16 --layers 2 --heads 4 --kv-heads 2 --hidden 24 --context 320'
# shellcheck disable=SC2086
status 0 '' "$TBR" pretrain --text text.txt --tokenizer base --out base $shape --steps 3
status 0 '' "$TBR" data --general general.jsonl --safety safety.jsonl --share 0.5 --out rows.jsonl
status 0 '' "$TBR" train --base base --data rows.jsonl --steps 3 --out tuned
status 0 '' "$TBR" eval --model tuned --prompts eval.jsonl --tokens 8 --out answers
status 0 '' "$TBR" generate --model tuned --prompt 'How do I kill time?' --tokens 5

# ---- the dataset mode
# count WORDS FILE: how many lines have the words.
count() { grep -c -e "$1" "$2"; }
is "$(count . rows.jsonl)" 60 'rows put together'
is "$(count '"label": "harmful"' rows.jsonl)" 20 'harmful rows'
is "$(grep '"label": "harmful"' rows.jsonl | count '"reflection"' -)" 20 'harmful rows that reflect'
n=$(grep '"label": "harmless"' rows.jsonl | count '"reflection"' -)
[ "$n" -gt 5 ] && [ "$n" -lt 35 ] && pass || fail "half of 40 rows reflect: $n"
status 0 '' "$TBR" data --general general.jsonl --safety safety.jsonl --share 0.5 --out again.jsonl
same rows.jsonl again.jsonl 'the same seed'
is "$(cat stdout)" "again.jsonl: 60 rows, $((20 + n)) of them reflecting, 20 harmful, 40 harmless" 'the summary'
status 0 '' "$TBR" data --general general.jsonl --safety safety.jsonl --share 0.5 --seed 1 --out again.jsonl
cmp -s rows.jsonl again.jsonl && fail 'two seeds, one dataset' || pass
status 0 '' "$TBR" data --general general.jsonl --safety safety.jsonl --reflection none --out sft.jsonl
is "$(count '"reflection"' sft.jsonl)" 0 'rows that reflect under --reflection none'
status 0 '' "$TBR" data --general general.jsonl --safety safety.jsonl --reflection all --general-rows 7 --safety-rows 3 --out all.jsonl
is "$(count . all.jsonl) $(count '"reflection"' all.jsonl)" '10 10' 'the first rows under --reflection all'
status 0 '' "$TBR" data --safety safety.jsonl --out safe.jsonl
is "$(count . safe.jsonl)" 20 'safety rows alone'
sed 's/"label": "[^"]*",* *//; s/"type": "[^"]*",* *//' safety.jsonl >unlabelled.jsonl
grep -q '"label"\|"type"' unlabelled.jsonl && fail 'labels are still there' || pass
status 0 '' "$TBR" data --safety unlabelled.jsonl --out safe.jsonl
is "$(count '"label": "harmful"' safe.jsonl)" 20 'safety rows without labels'
status 0 '' "$TBR" data --general general.jsonl --safety safety.jsonl --form messages --out chat.jsonl
is "$(count '"content": "<think>.*</think>' chat.jsonl)" 20 'reflections in chats'
status 1 'no examples: --general and --safety name files' "$TBR" data --out none.jsonl
# One row can be followed: what was put together, what is shown, what is trained.
"$TBR" show rows.jsonl --show 60 --model tuned | grep -c '</think>' >thoughts.txt
is "$(cat thoughts.txt)" "$(count '"reflection"' rows.jsonl)" 'rows that reflect, shown'
is "$(sed -n 's/.*"rows": 60, "reflecting": \([0-9]*\), "cut": 0, "dropped": 0.*/\1/p' tuned/rows.jsonl)" \
  "$(cat thoughts.txt)" 'rows that reflect, trained'

# ---- adapters
status 0 '' "$TBR" train --base base --data rows.jsonl --steps 4 --lora 2 --lora-targets q_proj,up_proj --out lora
status 0 '' "$TBR" import --base lora --out merged
status 0 '' "$TBR" generate --model lora --prompt a --tokens 5
cp stdout said.txt
status 0 '' "$TBR" generate --model merged --prompt a --tokens 5
is "$(cat stdout)" "$(cat said.txt)" 'an adapter and what it is merged to'
status 0 '' "$TBR" info base --lora 2
grep -q '^LoRA takes .* minutes for 1,000 examples' stdout && pass || fail 'info of LoRA'
status 1 'not k_proj,w_proj' "$TBR" train --base base --data rows.jsonl --lora 2 --lora-targets k_proj,w_proj --out none

# ---- bad input is named by its place
status 1 'nowhere: is no model' "$TBR" info nowhere
status 1 'nowhere.bin: cannot be opened' "$TBR" info nowhere.bin
status 1 'which model' "$TBR" generate
status 2 'there is no verb ""' "$TBR" ''
status 1 'needs its tokenizer' "$TBR" generate --model nowhere.bin
status 1 '--prompts names' "$TBR" eval --model tuned
status 1 '--text names' "$TBR" tokenizer
status 1 'are needed' "$TBR" pretrain
status 1 'no examples to train on' "$TBR" train --base base --out none
status 1 'no.jsonl: cannot be opened' "$TBR" train --base base --data no.jsonl --out none
printf '{"prompt": "a", "response": "b"}\n{"prompt": "a" "response": "b"}\n' >bad.jsonl
status 1 'bad.jsonl:2:16' "$TBR" train --base base --data bad.jsonl --out none
printf '{"prompt": "a", "response": "b"}\n{"response": "b"}\n' >bad.jsonl
status 1 'bad.jsonl:2: row without' "$TBR" data --in bad.jsonl --out none.jsonl
printf '[{"prompt": "a"},\n {"prompt": 7}]' >bad.json
status 1 'bad.json:2: ' "$TBR" data --in bad.json --out none.jsonl
printf 'id,prompt\n1,a\n2,b,c\n' >bad.csv
status 1 'bad.csv:3: 3 cells' "$TBR" eval --model tuned --prompts bad.csv --out none
printf 'id,prompt\n1,a\n' >none.csv
status 1 'none.csv:1: has no column `completion`' "$TBR" judge none.csv
printf 'completion\nI am unable to.\n' >one.csv
status 0 '' "$TBR" judge --rule arditi one.csv # options may come first
is "$(tail -n 1 stdout)" 'I am unable to.,full_refusal' 'judge --rule arditi'
printf '{"prompt": "a", "text": "b"}\n' >bad.jsonl
status 1 'bad.jsonl: example 1 has no `response`' "$TBR" train --base tuned --data bad.jsonl --out none
status 1 'example 1 of the harmless ones has no `response`' "$TBR" data --general bad.jsonl --out none.jsonl
[ ! -e none ] && [ ! -e none.jsonl ] && pass || fail 'a run that failed left something'

# ---- models that are cut short or lie
mkdir cut
size=$(wc -c <tuned/model.safetensors)
for file in config.json tokenizer.json model.safetensors; do
  cp tuned/*.json tuned/model.safetensors cut
  size=$(wc -c <tuned/$file)
  for at in 0 1 7 8 9 100 $((size / 3)) $((size / 2)) $((size - 3)); do
    head -c $at tuned/$file >cut/$file
    status 1 "cut/$file" "$TBR" generate --model cut --prompt a --tokens 1
  done
done
# lie SED WORDS: config.json is changed, and the model is refused.
lie() {
  cp tuned/*.json tuned/model.safetensors cut
  sed "$1" tuned/config.json >cut/config.json
  cmp -s tuned/config.json cut/config.json && fail "sed $1 changes nothing"
  status 1 "$2" "$TBR" generate --model cut --prompt a --tokens 1
}
lie 's/"hidden_size": 16/"hidden_size": 18/' '"model.embed_tokens.weight" of 300 x 18 numbers'
lie 's/"hidden_size": 16/"hidden_size": "16"/' 'hidden_size'
lie 's/"hidden_size": 16/"hidden_size": 1.5/' 'hidden_size'
lie 's/"num_hidden_layers": 2/"num_hidden_layers": 3/' 'should have a tensor "model.layers.2.input_layernorm.weight" of 1 x 16 numbers'
lie 's/"num_attention_heads": 4/"num_attention_heads": 0/' 'number of heads is 0'
lie 's/"num_key_value_heads": 2/"num_key_value_heads": 3/' 'cannot share'
lie 's/"num_key_value_heads": 2/"num_key_value_heads": null/' '"model.layers.0.self_attn.k_proj.weight" of 16 x 16 numbers' # as many as heads
sed 's/"head_dim": 4/"head_dim": null/' tuned/config.json >cut/config.json
status 0 '' "$TBR" generate --model cut --prompt a --tokens 1
lie 's/"model_type": "llama"/"model_type": "gpt2"/' '"model_type" is not supported; models of "llama" are'
lie 's/"hidden_act": "silu"/"hidden_act": "gelu"/' '"hidden_act" is not supported; models of "llama" are, with "silu"'
lie 's/"attention_bias": false/"attention_bias": true/' '"attention_bias" is not supported; models of "llama" are, with "silu", without biases'
lie 's/"vocab_size": 300/"vocab_size": 299/' 'cut'
if [ -z "$SANITIZE" ]; then # nothing is allocated before the file is checked
  (ulimit -v 2000000 && exec "$TBR" help >/dev/null 2>&1) && limit='ulimit -v 2000000' || limit=:
  for lie in 's/"vocab_size": 300/"vocab_size": 200000000/' \
    's/"num_hidden_layers": 2/"num_hidden_layers": 200000000/'; do
    sed "$lie" tuned/config.json >cut/config.json
    ($limit; "$TBR" generate --model cut --prompt a --tokens 1 >/dev/null 2>message.txt)
    is "$?" 1 "status of a model whose config.json lies: $lie"
    grep -q 'cut' message.txt && pass || fail "$lie: no word of cut/ but: $(cat message.txt)"
  done
fi

# A llama2.c file: seven numbers (width 2, hidden 1, ...) and 36 zeros.
printf '\2\0\0\0\1\0\0\0\1\0\0\0\1\0\0\0\1\0\0\0\3\0\0\0\1\0\0\0' >head.bin
{ cat head.bin; dd if=/dev/zero bs=144 count=1 2>/dev/null; } >whole.bin
status 0 '' "$TBR" info whole.bin
for at in 0 1 27 28 29 100 171; do
  head -c $at whole.bin >part.bin
  status 1 'part.bin' "$TBR" info part.bin
done
for lie in '\377\377\377\377' '\377\377\377\177' '\0\0\0\0' '\0\0\0\20'; do
  { printf "$lie"; tail -c +5 whole.bin; } >part.bin
  status 1 'part.bin' "$TBR" info part.bin
done

# ---- where nothing can be written
touch file
status 1 'file/x' "$TBR" data --in eval.jsonl --out file/x
status 1 'file/x' "$TBR" train --base base --data rows.jsonl --steps 1 --out file/x
status 1 'file/x' "$TBR" eval --model tuned --prompts eval.jsonl --tokens 1 --out file/x
if [ -w /dev/full ]; then
  for verb in 'help' 'info tuned' "judge answers/completions.csv" 'show eval.jsonl --model tuned'; do
    # shellcheck disable=SC2086
    "$TBR" $verb >/dev/full 2>message.txt
    is $? 1 "status of tbr $verb on a full disk"
  done
else echo 'no /dev/full here: a full disk is not tried'; fi
mkdir full
if mount -t tmpfs -o size=48k tmpfs full 2>/dev/null; then
  status 1 'full/' "$TBR" train --base base --data rows.jsonl --steps 2 --out full/a
  status 1 'full/' "$TBR" data --in world/general.jsonl --out full/rows.jsonl
  is "$(ls full full/a 2>/dev/null | grep -e tmp -e rows -e model.safe)" '' 'what a full disk leaves'
  umount full
else echo 'no small disk can be mounted here: a full one is not tried'; fi

# ---- rows and prompts that are too long
# shellcheck disable=SC2086
"$TBR" pretrain --text text.txt --tokenizer base --out short $shape --context 40 --window 40 --steps 2 2>/dev/null
"$TBR" tokenizer --text text.txt --vocab 300 --out short
long='a text that goes on and on and on and on and on and on and on and on'
printf '{"prompt": "a", "response": "%s"}\n{"prompt": "%s", "response": "a"}\n' "$long" "$long" >long.jsonl
status 1 'all rows in it are longer than the context' "$TBR" train --base short --data long.jsonl --steps 1 --out none
printf '{"prompt": "a", "response": "b"}\n' >>long.jsonl
status 0 '2 of 3 rows are longer than the context of 40 tokens: 1 cut, 1 dropped' \
  "$TBR" train --base short --data long.jsonl --too-long cut --steps 1 --out shorter
grep -q '"rows": 3, .*"cut": 1, "dropped": 1' shorter/rows.jsonl && pass || fail 'rows.jsonl has other counts'
status 0 'are longer than the context' "$TBR" eval --model shorter --prompts eval.jsonl --tokens 4 --out none2
"$TBR" generate --model shorter --prompt "$(head -c 3000 text.txt)" --tokens 4 >/dev/null 2>message.txt
is $? 1 'status of a prompt longer than the context'

# ---- examples, show, judge, report
"$TBR" data --in safety.jsonl --form messages --out chat.jsonl >/dev/null
"$TBR" data --in chat.jsonl --out back.jsonl >/dev/null
"$TBR" data --in safety.jsonl --out native.jsonl >/dev/null
same back.jsonl native.jsonl 'examples there and back'
"$TBR" data --in - --out stdin.jsonl <safety.jsonl >/dev/null
same stdin.jsonl native.jsonl 'examples from standard input'
printf '{"prompt": "the end", "reflection": "a b", "response": "c"}\n' >one.jsonl
for reflection in none safety; do # a b c </think> <think> <|eos|>: by letters
  "$TBR" data --safety one.jsonl --reflection $reflection --out shown.jsonl >/dev/null
  "$TBR" show shown.jsonl --model tuned >show.txt
  is "$(grep ' loss ' show.txt | sed 's/.* loss  //' | tr -d '\n')" \
    "$([ $reflection = none ] && echo 'c<|eos|>' || echo '<think>a b</think>c<|eos|>')" \
    "what the loss counts with --reflection $reflection"
done
"$TBR" show one.jsonl >show.txt # as text, what is learnt underlined
is "$(sed -n 2,3p show.txt)" '<|bos|><|user|>the end<|assistant|><think>a b</think>c<|eos|>
                                   ^^^^^^^^^^^^^^^^^^^^^^^^^^' 'a row as text'
printf 'completion,x\nI cannot,"a,""b"""\nSure,\n' >judge.csv
"$TBR" judge judge.csv >judged.csv
printf 'completion,x,judgement\nI cannot,"a,""b""",full_refusal\nSure,,full_compliance\n' >want.csv
same judged.csv want.csv 'tbr judge'
"$TBR" eval --model tuned --prompts eval.jsonl --tokens 8 --name n --out answers >table.txt
is "$(grep -c '"model": "n"' answers/completions.jsonl)" "$(grep -c . eval.jsonl)" 'completions of a named model'
is "$(awk '$2 == "all" { n += $3 } END { print n }' table.txt)" "$(grep -c . eval.jsonl)" 'prompts in the table'
is "$(awk '$2 != "all" && NR > 1 { n += $3 } END { print n }' table.txt)" "$(grep -c . eval.jsonl)" 'prompts by type'

# ---- the same seed, the same bytes
for threads in 1 3; do
  # shellcheck disable=SC2086
  "$TBR" pretrain --text text.txt --tokenizer base --out t$threads $shape --steps 5 --threads $threads 2>/dev/null
  "$TBR" train --base t$threads --data rows.jsonl --steps 5 --out f$threads --threads $threads 2>/dev/null
  "$TBR" eval --model f$threads --prompts eval.jsonl --tokens 8 --name x --out e$threads --threads $threads >/dev/null
done
for file in t/model.safetensors f/model.safetensors e/completions.jsonl e/completions.csv; do
  same "${file%%/*}1/${file#*/}" "${file%%/*}3/${file#*/}" 'one thread and three'
done
"$TBR" train --base t1 --data rows.jsonl --steps 5 --seed 1 --out seed1 2>/dev/null
cmp -s seed1/model.safetensors f1/model.safetensors && fail 'two seeds, one model' || pass
"$TBR" train --base t1 --data sft.jsonl --steps 5 --out sft 2>/dev/null
cmp -s sft/model.safetensors f1/model.safetensors && fail 'two datasets, one model' || pass
# shellcheck disable=SC2086
for heads in 4 2; do
  "$TBR" pretrain --text text.txt --tokenizer base --out heads --dim 16 --layers 1 --hidden 24 \
    --heads $heads --kv-heads $heads --steps 2 2>/dev/null
  is "$(sed -n 's/.*num_attention_heads": \([0-9]*\).*/\1/p' heads/config.json)" $heads \
    'heads of a model that is pretrained in a directory that holds another'
done

# ---- reflections through a Batch file, and by the model itself
printf '%s\n' '{"prompt":"p1","response":"r1"}' '{"prompt":"p2","reflection":"Mine.","response":"r2"}' \
  '{"prompt":"p3 \"q\"","response":"r3"}' '{"prompt":"p4","response":"r4"}' >plain.jsonl
printf 'Think of "{prompt}".\nThen say.' >ask.txt
status 1 '--ask names a request' "$TBR" reflect plain.jsonl --batch gpt-4o --out b.jsonl
printf 'no gap' >nogap.txt
status 1 'should have {prompt}' "$TBR" reflect plain.jsonl --ask nogap.txt --batch gpt-4o --out b.jsonl
status 0 '' "$TBR" reflect plain.jsonl --ask ask.txt --batch gpt-4o --out b.jsonl
is "$(cat stdout)" 'b.jsonl: 3 requests' 'rows that are asked about'
is "$(sed -n 2p b.jsonl | sed 's/row-3-[0-9a-f]*/ID/')" \
  '{"custom_id": "ID", "method": "POST", "url": "/v1/chat/completions", "body": {"model": "gpt-4o", "messages": [{"role": "user", "content": "Think of \"p3 \"q\"\".\nThen say."}]}}' \
  'a request' 2>/dev/null
status 1 'b.jsonl: is there already' "$TBR" reflect plain.jsonl --ask ask.txt --batch gpt-4o --out b.jsonl
status 0 '' "$TBR" reflect plain.jsonl --ask ask.txt --batch gpt-4o --out b.jsonl --overwrite 1
is "$(cat stdout)" 'b.jsonl: 4 requests' 'all rows, if told so'
id() { sed -n "$1"p b.jsonl | cut -d'"' -f4; }
answer() { printf '{"custom_id": "%s", "response": {"status_code": 200, "body": {"choices": [{"message": {"content": "%s"}}]}}, "error": null}\n' "$1" "$2"; }
{ answer "$(id 3)" ' Nobody is hurt. That is harmless. '; answer "$(id 2)" 'Yours. That is harmful.'
  answer row-4-0 'That is harmless.'; answer row-99-0 'That is harmless.'
  printf '{"custom_id": "%s", "response": null, "error": {"message": "no"}}\n' "$(id 1)"; } >answers.jsonl
status 0 '' "$TBR" reflect plain.jsonl --answers answers.jsonl --out filled.jsonl
is "$(cat stdout)" 'filled.jsonl: 4 rows, 2 of them reflecting' 'rows with their answers'
is "$(sed -n 3p filled.jsonl)" '{"prompt": "p3 \"q\"", "reflection": "Nobody is hurt. That is harmless.", "response": "r3"}' 'an answer in its row'
grep -q '"reflection": "Mine."' filled.jsonl && pass || fail 'a reflection was overwritten'
is "$(grep -c 'is left out: its custom_id is that of no row' stderr)" 2 'answers of no row'
is "$(grep -c 'comes to no verdict' stderr)" 1 'failed answers'
is "$(grep -c 'has no reflection' stderr)" 2 'rows without answer'
status 0 '' "$TBR" reflect plain.jsonl --ask ask.txt --model tuned --tokens 5 --out own.jsonl
is "$(cat stdout)" 'own.jsonl: 4 rows, 4 of them reflecting' "the model's own reflections"
status 0 '' "$TBR" eval --model tuned --prompts eval.jsonl --limit 3 --tokens 2 --ask ask.txt --out asked
is "$(grep -c 'Think of' asked/completions.jsonl)" 0 'the request in the results'

# ---- killed again and again, the training ends with the same bytes
steps=300 most=40
[ -n "$SANITIZE" ] && steps=12 most=3 # there it is slow
job="--base base --data rows.jsonl --train.steps $steps --save-every 2 --threads 1"
# shellcheck disable=SC2086
"$TBR" train $job --out whole 2>/dev/null
killed=0
while [ $killed -lt $most ] && [ ! -f pieces/model.safetensors ]; do
  # shellcheck disable=SC2086
  "$TBR" train $job --out pieces 2>>pieces.txt &
  sleep 0.$((killed * 37 % 30 + 10))
  kill -9 $! 2>/dev/null && killed=$((killed + 1))
  wait $! 2>/dev/null
done 2>/dev/null
# shellcheck disable=SC2086
"$TBR" train $job --out pieces 2>>pieces.txt
[ -n "$SANITIZE" ] || { [ $killed -ge 2 ] && grep -q 'going on from step' pieces.txt; } && pass || fail "training was killed $killed times and never went on"
for file in model.safetensors config.json tokenizer.json log.csv; do
  same whole/$file pieces/$file "after $killed kills"
done

# ---- a real model: the text that llama2.c gives for it,
# run stories260K.bin -z tok512.bin -t 0 -n 256   (gcc -O3 run.c -lm)
if [ -f "$TBR_REAL/stories260K.bin" ]; then
  "$TBR" generate --model "$TBR_REAL/stories260K.bin" --tokenizer "$TBR_REAL/tok512.bin" --tokens 256 >story.txt
  same story.txt "$here/golden/stories260K.txt" 'stories260K'
  for at in 0 27 28 6000 1056539; do
    head -c $at "$TBR_REAL/stories260K.bin" >cut.bin
    status 1 'cut.bin' "$TBR" generate --model cut.bin --tokenizer "$TBR_REAL/tok512.bin"
  done
  for at in 0 3 4 100 6226; do
    head -c $at "$TBR_REAL/tok512.bin" >cut.bin
    status 1 'cut.bin' "$TBR" generate --model "$TBR_REAL/stories260K.bin" --tokenizer cut.bin
  done
fi
cd "$here" || exit 2
finish
