#!/bin/sh
# first-start.sh COMMAND...: makes what a composition needs before its services start, then runs COMMAND (which fetches
# the model). Does nothing twice.
set -eu

/opt/lockstep/make-tokens.sh /run/secrets
# Prometheus runs as another user, on a volume of its own that has this one token.
install -m 444 /run/secrets/metrics_token /run/metrics/metrics_token
exec "$@"
