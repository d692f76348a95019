#!/bin/sh
# first-start.sh COMMAND...: makes the tokens of the services, unless they exist, then runs COMMAND, which makes or
# fetches the model.
set -eu

/opt/lockstep/make-tokens.sh /run/secrets
# Prometheus runs as another user, with a volume that holds only this token.
install -m 444 /run/secrets/metrics_token /run/metrics/metrics_token
exec "$@"
