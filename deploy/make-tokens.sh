#!/bin/sh
# make-tokens.sh DIR: makes random tokens DIR/weights_token and DIR/metrics_token, unless they exist.
set -eu

mkdir -p "$1"
for token in "$1/weights_token" "$1/metrics_token"; do
  if [ ! -s "$token" ]; then
    (umask 077 && od -An -v -tx1 -N32 /dev/urandom | tr -d ' \n' > "$token.new")
    mv "$token.new" "$token"
  fi
done
