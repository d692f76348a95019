#!/bin/sh
# make-tokens.sh DIR: random tokens in DIR, weights_token and metrics_token, unless they are there.
set -eu

mkdir -p "$1"
for token in "$1/weights_token" "$1/metrics_token"; do
  if [ ! -s "$token" ]; then
    (umask 077 && od -An -v -tx1 -N32 /dev/urandom | tr -d ' \n' > "$token.new")
    mv "$token.new" "$token"
  fi
done
