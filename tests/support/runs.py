"""A run in a server's table without a push."""

from __future__ import annotations

from rollout_server.runs.slots import Run
from rollout_server.runs.table import RunTable


def open_run(table: RunTable, run_id: str = "r", lease: str = "lease") -> Run:
    """Return the run of that name; a new one belongs to the learner of `lease`, and serves nothing yet."""
    ring = table.places(run_id, lease, takeover=False)[0]
    run = table.runs.get(run_id) or Run(run_id, lease, ring)
    table.own(run, lease)
    return run
