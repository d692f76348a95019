"""Which tokens are accepted, from where, and for how long."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from rollout_server.api.security.bearer_tokens import Tokens, configured_tokens
from rollout_server.api.security.roles import Role
from rollout_server.settings import ServerSettings
from shared.bearer_tokens import exposure, is_loopback, parse_tokens
from shared.errors import LockstepError

LEARNER, READER, SCRAPER = "learner-0123456789", "reader-0123456789", "scraper-0123456789"


@pytest.fixture(autouse=True)
def no_token_in_the_environment(monkeypatch) -> None:
    monkeypatch.delenv("LOCKSTEP_TOKEN", raising=False)


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_each_role_from_its_own_file(tmp_path) -> None:
    tokens = configured_tokens(
        ServerSettings(
            token_file=write(tmp_path / "w", f"{LEARNER}\n"),
            generate_token_file=write(tmp_path / "g", f"\n  {READER}  \n{READER}-2\n"),
            metrics_token_file=write(tmp_path / "m", SCRAPER),
        )
    )
    assert tokens is not None
    assert tokens.role_of(LEARNER.encode()) is Role.WEIGHTS
    assert tokens.role_of(READER.encode()) is tokens.role_of(f"{READER}-2".encode()) is Role.GENERATE
    assert tokens.role_of(SCRAPER.encode()) is Role.METRICS
    for unknown in (b"", b"\xff", LEARNER[:-1].encode(), LEARNER.encode() + b"x", LEARNER.upper().encode()):
        assert tokens.role_of(unknown) is None


def test_the_environment_stands_in_for_the_learners_file(tmp_path, monkeypatch) -> None:
    assert configured_tokens(ServerSettings()) is None
    monkeypatch.setenv("LOCKSTEP_TOKEN", LEARNER)
    tokens = configured_tokens(ServerSettings(metrics_token_file=write(tmp_path / "m", SCRAPER)))
    assert tokens is not None
    assert tokens.role_of(LEARNER.encode()) is Role.WEIGHTS
    named = configured_tokens(ServerSettings(token_file=write(tmp_path / "w", f"{LEARNER}-file")))
    assert named is not None
    assert named.role_of(LEARNER.encode()) is None


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("", "holds no token"),
        (" \n\t\n", "holds no token"),
        ("short\n", "16 characters"),
        ("two words that are long", "without spaces"),
        ("sixteen-äöü-letters", "visible ASCII"),
        (f"{LEARNER}\nshort", "token 2 of 2"),
    ],
)
def test_unusable_tokens_are_refused_and_not_shown(tmp_path, monkeypatch, text: str, word: str) -> None:
    with pytest.raises(LockstepError, match=word) as refusal:
        configured_tokens(ServerSettings(token_file=write(tmp_path / "w", text)))
    assert "openssl rand" in refusal.value.message
    assert not any(line.strip() and line.strip() in refusal.value.message for line in text.splitlines())
    monkeypatch.setenv("LOCKSTEP_TOKEN", text)
    with pytest.raises(LockstepError, match=word):
        configured_tokens(ServerSettings())


def test_contradictions_are_refused(tmp_path) -> None:
    reader = write(tmp_path / "g", READER)
    with pytest.raises(LockstepError, match="no learner could push"):
        configured_tokens(ServerSettings(generate_token_file=reader))
    with pytest.raises(LockstepError, match="given twice"):
        configured_tokens(ServerSettings(token_file=reader, generate_token_file=reader))
    with pytest.raises(LockstepError, match="cannot be read"):
        configured_tokens(ServerSettings(token_file=str(tmp_path / "none")))


def test_a_token_is_replaced_while_the_server_runs(tmp_path) -> None:
    """As Kubernetes does it: another file under the same name."""
    path = tmp_path / "token"
    write(path, LEARNER)
    tokens = Tokens({Role.WEIGHTS: path})

    def replace(text: str) -> None:
        write(tmp_path / "new", text)
        os.replace(tmp_path / "new", path)

    replace(f"{LEARNER}-next\n{LEARNER}\n")
    assert tokens.role_of(f"{LEARNER}-next".encode()) is tokens.role_of(LEARNER.encode()) is Role.WEIGHTS
    replace(f"{LEARNER}-next\n")
    assert tokens.role_of(LEARNER.encode()) is None
    replace("\n")
    assert tokens.role_of(f"{LEARNER}-next".encode()) is Role.WEIGHTS, "an empty file must not lock everyone out"
    path.unlink()
    assert tokens.role_of(f"{LEARNER}-next".encode()) is Role.WEIGHTS
    write(path, f"{LEARNER}-last")
    assert tokens.role_of(f"{LEARNER}-last".encode()) is Role.WEIGHTS


@pytest.mark.parametrize(
    ("mode", "said"),
    [
        (0o600, None),
        (0o400, None),
        (0o700, None),
        (0o640, "read by its group"),
        (0o644, "read by every user of this machine"),
        (0o604, "read by every user of this machine"),
        (0o444, "read by every user of this machine"),
        (0o620, "changed by its group"),
        (0o602, "changed by every user of this machine"),
    ],
)
def test_a_file_that_others_can_use_is_said(
    tmp_path, caplog: pytest.LogCaptureFixture, mode: int, said: str | None
) -> None:
    path = Path(write(tmp_path / "w", LEARNER))
    path.chmod(mode)
    tokens = configured_tokens(ServerSettings(token_file=str(path)))
    assert tokens is not None
    assert tokens.role_of(LEARNER.encode()) is Role.WEIGHTS, "it is taken all the same"
    assert LEARNER not in caplog.text
    if said is None:
        assert not caplog.messages
    else:
        (message,) = caplog.messages
        assert f"token file {path} can be {said}" in message
        assert f"chmod go= {path}" in message


@pytest.mark.parametrize(
    ("mode", "said"),
    [(0o440, False), (0o640, False), (0o400, False), (0o444, True), (0o660, True)],
)
def test_a_file_of_root_for_the_group_of_the_server(tmp_path, monkeypatch, mode: int, said: bool) -> None:
    """As Kubernetes mounts it with `fsGroup`: without the group the server could not read it."""
    path = Path(write(tmp_path / "w", LEARNER))
    path.chmod(mode)
    monkeypatch.setattr(os, "geteuid", lambda: os.stat(path).st_uid + 1)
    assert (exposure(path) is not None) == said


def test_secrets_of_containers_are_readable_inside(monkeypatch) -> None:
    """Docker mounts them with mode 0444, where only one container can see them."""
    public = os.stat_result((0o100444, 1, 1, 1, 0, 0, 10, 0, 0, 0))
    monkeypatch.setattr(os, "stat", lambda path: public)
    assert exposure("/run/secrets/weights_token") is None
    assert exposure("/var/run/secrets/weights/token") is None
    assert exposure("/run/secrets/../../home/token") is not None


def test_tokens_of_a_file_in_order() -> None:
    assert parse_tokens(f"\n{LEARNER}\r\n {READER}\n", "x") == [LEARNER, READER]


@pytest.mark.parametrize(
    ("host", "alone"),
    [
        ("127.0.0.1", True),
        ("127.8.9.1", True),
        ("::1", True),
        ("localhost", True),
        ("LOCALHOST", True),
        ("0.0.0.0", False),
        ("::", False),
        ("", False),
        (None, False),
        ("10.0.0.1", False),
        ("fe80::1", False),
        ("localhost.example.org", False),
        ("gpu-1", False),
        ("127.0.0.1.example.org", False),
    ],
)
def test_what_is_this_machine_alone(host: str | None, alone: bool) -> None:
    assert is_loopback(host) is alone
