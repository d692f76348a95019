"""Where the workers of one engine run on a Ray cluster, if somebody has reserved room for them."""

from __future__ import annotations

#: Environment variable of a server: NAMESPACE/NAME of a placement group of Ray with a bundle for each worker.
PLACEMENT_VARIABLE = "LOCKSTEP_PLACEMENT_GROUP"
