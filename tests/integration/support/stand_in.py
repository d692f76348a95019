"""A command that is ready at once and runs until it is ended; and a job of two of them, on a Ray cluster.

python -m tests.integration.support.stand_in HOST PORT     # the command
python -m tests.integration.support.stand_in ADDRESS       # the job
"""

from __future__ import annotations

import http.server
import os
import sys

from learner.cluster.connection import connect
from learner.cluster.hosted import Command, place
from learner.cluster.job import ClusterJob, RunningJob
from learner.cluster.resources import Needs


class _Ready(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()


def serve(host: str, port: str) -> None:
    print("has GPUs", os.environ.get("CUDA_VISIBLE_DEVICES"), flush=True)
    http.server.HTTPServer((host, int(port)), _Ready).serve_forever()


def drive(address: str) -> None:
    command = Command(
        "tests.integration.support.stand_in",
        (place("host"), place("port")),
        url=f"http://{place('host')}:{place('port')}",
        again=True,
    )
    job = ClusterJob("stand-in", command, (2, 2), Needs({"CPU": 1.0}), [command], Needs({"CPU": 1.0, "GPU": 2.0}))

    def say(*words: str) -> None:
        print(*words, flush=True)

    RunningJob(connect(address), job, say, say).run()


if __name__ == "__main__":
    drive(*sys.argv[1:]) if len(sys.argv) == 2 else serve(*sys.argv[1:])
