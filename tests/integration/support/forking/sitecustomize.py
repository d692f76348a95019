"""Python runs this at its start: a rollout server forks vLLM's engine and workers, as those of `forked` do.

That the garbage is collected less often makes imports of whatever is started a fifth quicker.
"""

from __future__ import annotations

import gc
import sys

gc.set_threshold(100_000, 20, 20)

if "rollout_server.cli" in sys.orig_argv:
    from tests.integration.support.forked import fork_instead_of_spawn

    fork_instead_of_spawn()
