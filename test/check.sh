# check.sh: what the test scripts share. They are called with a folder to
# write into, and with TBR, CC, FLAGS and TBR_REAL set by run.sh.
passed=0 failed=0
scratch=$1
here=$PWD
rm -rf "$scratch"
mkdir -p "$scratch" || exit 2

pass() { passed=$((passed + 1)); }
fail() {
  failed=$((failed + 1))
  echo "${0##*/}: $*"
}

# same FILE FILE WHAT: the two have the same bytes.
same() {
  if cmp -s "$1" "$2"; then pass; else fail "$3: $1 and $2 differ"; fi
}

# is GOT WANTED WHAT
is() {
  if [ "$1" = "$2" ]; then pass; else fail "$3: is \"$1\", should be \"$2\""; fi
}

# status N WORDS COMMAND...: it ends with status N, and its error output has
# the WORDS in it. What it says stays in $scratch/stdout and $scratch/stderr.
status() {
  want=$1 words=$2
  shift 2
  "$@" >"$scratch/stdout" 2>"$scratch/stderr" </dev/null
  got=$?
  if [ "$got" != "$want" ]; then
    fail "$*: ends with status $got, should be $want: $(tail -n 3 "$scratch/stderr")"
  elif [ -n "$words" ] && ! grep -qF -e "$words" "$scratch/stderr"; then
    fail "$*: doesn't say \"$words\" but: $(head -n 1 "$scratch/stderr")"
  else
    pass
  fi
}

finish() {
  echo "$passed passed, $failed failed"
  [ "$failed" = 0 ]
}
