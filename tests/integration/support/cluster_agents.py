"""Agents on a Ray cluster, a function and a program, some of whose episodes hang or end their processes."""

from __future__ import annotations

import os
import threading
import urllib.request
from collections.abc import Sequence
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from learner.agents.agent_session import AgentSession
from learner.agents.calls import AgentFailed, FunctionAgent, ProgramAgent
from learner.agents.on_cluster import AgentOnCluster, agents_on_cluster
from learner.utils.threads import all_of
from shared.sessions import SessionOpened

HANGING_S = 2.0
#: Of episodes that do not hang, which may have to wait for a core.
TIMEOUT_S = 60.0
#: Above its shell are the supervisor, the leader of its group, and the actor.
PROGRAM = """
case "$(cat "$LOCKSTEP_ROW_FILE")" in
    *dies*)
        read -r _ _ _ leader _ < /proc/$PPID/stat
        read -r _ _ _ actor _ < /proc/$leader/stat
        kill -KILL "$actor"
        sleep 3600;;
    *hangs*) setsid sleep 3600;;
esac
test -z "$LOCKSTEP_TOKEN" && echo 1 > "$LOCKSTEP_REWARD_FILE"
"""


def asks(session: AgentSession, row: dict[str, Any]) -> float:
    if row["prompt"] == "dies":
        os._exit(3)
    while row["prompt"] == "hangs":
        pass
    headers = {"Authorization": f"Bearer {session.api_key}"}
    request = urllib.request.Request(f"{session.base_url}/completions", row["prompt"].encode(), headers)
    with urllib.request.urlopen(request) as response:
        return float(response.read() == b"answer" and "LOCKSTEP_TOKEN" not in os.environ)


class Model(BaseHTTPRequestHandler):
    """Answers the calls of a session."""

    def do_POST(self) -> None:
        known = self.headers["Authorization"] == "Bearer of-the-session"
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200 if known else 401)
        self.end_headers()
        self.wfile.write(b"answer")

    def log_message(self, *args: Any) -> None: ...


class Agents:
    """A function and a program, each of them in one actor."""

    def __init__(self) -> None:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Model)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        found = (FunctionAgent(asks), ProgramAgent(PROGRAM))
        self._agents = [agents_on_cluster(agent, {}, None)(1) for agent in found]

    def run(self, *prompts: str, hanging_s: float = HANGING_S) -> list[list[Any]]:
        """Return what the episodes of each agent come to: rewards, or kinds of failures."""
        return all_of([partial(self._run, agent, prompts, hanging_s) for agent in self._agents], "agents")

    def _run(self, agent: AgentOnCluster, prompts: Sequence[str], hanging_s: float) -> list[Any]:
        found: list[Any] = []
        for prompt in prompts:
            timeout_s = hanging_s if prompt == "hangs" else TIMEOUT_S
            with agent.place() as placed:
                opened = SessionOpened(session_id="s", token="of-the-session", path="/v1/sessions/s/v1", version=None)
                session = AgentSession.of(
                    opened, f"http://127.0.0.1:{self._server.server_port}", timeout_s=timeout_s, is_async=False
                )
                try:
                    found.append(placed.run(session, {"prompt": prompt}))
                except AgentFailed as failure:
                    found.append(failure.kind)
        return found

    def close(self) -> None:
        """End all actors."""
        for agent in self._agents:
            agent.close()
