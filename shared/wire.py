"""Paths, headers and NDJSON markers: what the server and its clients have to spell alike."""

from __future__ import annotations

import json
from typing import Any

HEALTH, READY = "/health", "/ready"
STATE = "/v1/state"
DRAIN, SLEEP, WAKE = "/v1/drain", "/v1/sleep", "/v1/wake"
GENERATE, SCORE = "/v1/generate", "/v1/score"
#: To be formatted with `session_id`. Below `{SESSION}/v1` lie the session's OpenAI and Anthropic routes.
SESSIONS, SESSION = "/v1/sessions", "/v1/sessions/{session_id}"
SESSION_REWARD = f"{SESSION}/reward"
#: To be formatted with `run_id`.
RUN = "/v1/runs/{run_id}"
ADAPTER, GROUP, BROADCAST, FINISH = f"{RUN}/adapter", f"{RUN}/group", f"{RUN}/broadcast", f"{RUN}/finish"

#: The secret of the learner that holds a run.
LEASE_HEADER = "Lockstep-Lease"
TAKEOVER_HEADER = "Lockstep-Takeover"
IN_FLIGHT_HEADER = "Lockstep-In-Flight"
#: Of a response of vLLM's routes: the version it was sampled from, `base` for the base model; several versions where a
#: push landed between several prompts.
VERSION_HEADER = "Lockstep-Version"
#: Of a request to vLLM's routes: the version it must be sampled from, or else 409 `version_not_active`.
POLICY_HEADER = "Lockstep-Policy"

NDJSON_TYPE = "application/x-ndjson"
#: Keys of lines that mark progress: all groups were sent; all workers have joined; all workers receive.
DONE, JOINED, RECEIVING = "done", "joined", "receiving"


def marker(key: str, **fields: Any) -> bytes:
    """Return the NDJSON line that marks `key`, without its line break."""
    return json.dumps({key: True, **fields}, separators=(",", ":")).encode()
