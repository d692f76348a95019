"""`learner runs`: list the runs that rollout servers serve, and end those whose place is needed."""

from __future__ import annotations

import argparse
import json
import secrets
from collections.abc import Sequence
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path

from learner.commands.flags import Parser, either_spelling
from learner.commands.status import ask_servers, server_lines
from learner.run_dir.files import LEASE_FILE
from learner.run_dir.lease import load_lease
from learner.servers.client import RolloutClient
from learner.servers.credentials import read_token
from learner.servers.discovery import ServerDiscovery
from shared.errors import ErrorCode, InvalidRequest, LeaseMismatch, LockstepError


def main(argv: Sequence[str]) -> int:
    """Run the command. Returns the exit code: 1 if no server could be asked, or a run could not be ended."""
    options = make_parser().parse_args(argv)
    connect = cache(partial(RolloutClient, token=read_token(options.token_file), ca_file=options.ca_file))
    urls = ServerDiscovery(options.rollout_url).urls()
    run_ids, lease = _to_end(options)
    failed = False
    for run_id in run_ids:
        failed |= not _end([connect(url) for url in urls], run_id, lease, takeover=options.takeover)
    servers = ask_servers(urls, connect)
    table = server_lines(servers, options.rollout_url)
    print(json.dumps([asdict(server) for server in servers]) if options.json else "\n".join(table))
    return int(failed or all(server.error for server in servers))


def _to_end(options: argparse.Namespace) -> tuple[list[str], str]:
    """Return the runs to end, and the lease to end them with."""
    if options.end is None:
        return [], ""
    if not options.run_dir:
        if not options.end:
            raise InvalidRequest("--end: name the runs, or give --run-dir, the output_dir of one")
        return options.end, secrets.token_hex(16)
    if not Path(options.run_dir, LEASE_FILE).is_file():
        raise InvalidRequest(f"--run-dir {options.run_dir}: there is no {LEASE_FILE}; give the output_dir of the run")
    lease = load_lease(options.run_dir, None)
    if options.end not in ([], [lease.run_id]):
        raise InvalidRequest(f"--run-dir {options.run_dir} is of run {lease.run_id}: end others with --takeover")
    return [lease.run_id], lease.secret


def _end(clients: Sequence[RolloutClient], run_id: str, lease: str, *, takeover: bool) -> bool:
    """End a run on every server that has it, and say so; return whether it was found, and no server failed.

    Raises `lease_mismatch` where it is another learner's.
    """
    ended, failed = 0, False
    for client in clients:
        try:
            client.delete_run(run_id, lease, takeover=takeover)
            ended += 1
        except LockstepError as error:
            if error.code is ErrorCode.LEASE_MISMATCH:
                raise LeaseMismatch(
                    f"run {run_id} on {client.url} has not finished, or is kept: give --run-dir with its output_dir, "
                    "or, once its learner is stopped for good, --takeover"
                ) from error
            if error.code is not ErrorCode.UNKNOWN_RUN:
                print(f"{client.url}: {error}")
                failed = True
    print(f"run {run_id}: " + (f"ended on {ended} of {len(clients)} servers" if ended else "no server has it"))
    return bool(ended) and not failed


def make_parser() -> argparse.ArgumentParser:
    """Build the parser of `learner runs`."""
    parser = Parser(prog="learner runs", description=__doc__)
    add = either_spelling(parser)
    add(
        "--rollout-url",
        nargs="+",
        required=True,
        help="as for `learner train`: URLs, dns+http://NAME:PORT, file:PATH, ray:NAME",
    )
    add(
        "--end",
        nargs="*",
        metavar="RUN_ID",
        help="end these runs, or that of --run-dir: running requests finish, then the place is free. A learner that "
        "still trains pushes its run again",
    )
    add("--run-dir", help="the output_dir of the run to end, whose lease allows it")
    add("--takeover", action="store_true", help="end runs of other learners, too")
    add("--json", action="store_true", help="print one JSON list of the servers")
    add("--token-file", help="file with the servers' bearer token (default: $LOCKSTEP_TOKEN)")
    add("--ca-file", help="CA certificate (PEM) to verify the servers' certificates with")
    return parser
