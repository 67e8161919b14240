#!/bin/sh
# The whole way on real data, where there is some: import, fine-tune, answer
# XSTest, judge.
. ./check.sh
r=$TBR_REAL
if [ ! -f "$r/stories260K.bin" ]; then
  echo "no $r/stories260K.bin here: not tried"
  finish
  exit
fi
cd "$scratch" || exit 2
status 0 '' "$TBR" import --base "$r/stories260K.bin" --tokenizer "$r/tok512.bin" --out base
"$TBR" generate --model base --tokens 60 >a.txt
"$TBR" generate --model "$r/stories260K.bin" --tokenizer "$r/tok512.bin" --tokens 60 >b.txt
same a.txt b.txt 'the imported model and the original'
is "$("$TBR" info base | sed -n 's/digest //p')" "$("$TBR" info "$r/stories260K.bin" | sed -n 's/digest //p')" 'digest of both'

status 0 '' "$TBR" data --general "$r/alpaca_en_demo.json" --safety "$r/STAR-1.json" \
  --general-rows 300 --safety-rows 200 --out rows.jsonl
is "$(cat stdout)" 'rows.jsonl: 500 rows, 200 of them reflecting, 200 harmful, 300 harmless' 'the dataset'
status 0 'rows are longer than the context of 512 tokens' "$TBR" train --base base --data rows.jsonl \
  --too-long cut --steps 3 --batch 8 --out tuned
is "$(sed -n 's/.*"rows": \([0-9]*\), "reflecting": \([0-9]*\).*/\1 \2/p' tuned/rows.jsonl)" '500 200' 'rows that were read'
# Rows cut and dropped as train counts them, and as show's lengths say.
"$TBR" show rows.jsonl --model tuned --show 500 | sed -n 's/.*example .*: \([0-9]*\) tokens.*/\1/p' |
  awk '$1 > 513 { n++ } END { print n + 0 }' >long.txt
is "$(sed -n 's/.*"cut": \([0-9]*\), "dropped": \([0-9]*\).*/\1 \2/p' tuned/rows.jsonl | awk '{ print $1 + $2 }')" \
  "$(cat long.txt)" 'rows longer than the context'

# every type of XSTest: 25 rows of each of 18
status 0 '' "$TBR" eval --model tuned --prompts "$r/xstest_prompts.csv" --tokens 2 --out answers
cp stdout table.txt
is "$(awk '$2 != "all" && $3 == 25' table.txt | grep -c .)" 18 'types of 25 prompts'
is "$(awk '$1 == "harmful" && $2 != "all"' table.txt | grep -c .)" 8 'harmful types'
is "$(awk '$2 == "all" { print $1, $3 }' table.txt | tr '\n' ' ')" 'pseudo-harmful 250 harmful 200 ' 'prompts'
is "$(head -n 1 answers/completions.csv)" \
  'id,type,prompt,completion,annotation_1,annotation_2,agreement,final_label,strmatch_label' 'columns of completions.csv'
is "$(grep -c . answers/completions.jsonl)" 450 'lines of completions.jsonl'
# The answers judge as they were judged, and read back as examples.
"$TBR" judge answers/completions.csv >judged.csv
is "$(grep -c -e ',[12]_full_[a-z]*,full_[a-z]*$' judged.csv)" 450 'rows judged'
is "$(grep -c -e ',2_full_refusal,full_compliance$' -e ',1_full_compliance,full_refusal$' judged.csv)" 0 'rows judged otherwise'
"$TBR" data --in answers/completions.csv --out back.jsonl >/dev/null
is "$(grep -c . back.jsonl)" 450 'rows read back'
for form in alpaca_en_demo.json:999 STAR-1.json:1000 safety_only_data_Instructions.json:2483; do
  "$TBR" data --in "$r/${form%:*}" --form messages --out form.jsonl >/dev/null
  is "$(grep -c . form.jsonl)" "${form#*:}" "rows of ${form%:*}"
done
for model in gpt4 mistralinstruct; do
  "$TBR" judge "$r/xstest_v2_completions_${model}_streval.csv" |
    grep -c -e ',1_full_compliance,full_compliance$' -e ',2_full_refusal,full_refusal$' >agree.txt
  is "$(cat agree.txt)" 450 "labels of $model that tbr judge agrees with"
done
cd "$here" || exit 2
finish
