#!/bin/bash
# Runs one fuzz target: all its corpus, then new inputs.
#
#   tests/fuzz/run.sh PROGRAM DIR NAME [SECONDS [SEED]]      5 seconds, a random seed
#
# DIR is this directory, NAME the target. New inputs go to a temporary directory. One that was found
# stays in the current directory: mend what it shows, then add it to DIR/corpus/NAME. The status is 1 then,
# for the 77 that libFuzzer gives by itself means "skipped" to meson.
set -euo pipefail
program=$1 dir=$2 name=$3 seconds=${4:-5} seed=${5:-$(od -An -N4 -tu4 /dev/urandom | tr -d ' ')}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
words=()
[ ! -f "$dir/$name.dict" ] || words=("-dict=$dir/$name.dict")
echo "seed $seed"
"$program" -seed="$seed" -max_total_time="$seconds" -rss_limit_mb=2048 -timeout=20 -max_len=8192 \
	-error_exitcode=1 -print_final_stats=1 "${words[@]}" "$work" "$dir/corpus/$name"
