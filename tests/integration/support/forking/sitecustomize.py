"""Python runs this at its start: a rollout server forks vLLM's engine and workers, as those of `forked` do."""

from __future__ import annotations

import sys

if "rollout_server.cli" in sys.orig_argv:
    from tests.integration.support.forked import fork_instead_of_spawn

    fork_instead_of_spawn()
