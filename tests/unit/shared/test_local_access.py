"""Which Host, Origin and Sec-Fetch-Site a server without tokens answers to."""

from __future__ import annotations

import pytest

from shared.local_access import LocalAccess

OWN = ["localhost", "LocalHost:8000", "127.0.0.1:8000", "127.0.0.1", "127.8.9.1:1", "[::1]:8000", "[::1]"]
NOT_OWN = [
    "evil.example",
    "evil.example:8000",
    "localhost.evil.example",
    "127.0.0.1.evil.example:8000",
    "localhost.",
    "evil@localhost",
    "localhost:8000:1",
    "localhost:x",
    "localhost, evil.example",
    "[::1",
    "::1",
    "",
    "0.0.0.0:8000",
    "10.0.0.1:8000",
    "[fe80::1]:8000",
    "gpu-1:8000",
]


@pytest.mark.parametrize("host", OWN)
@pytest.mark.parametrize("bound", ["127.0.0.1", "localhost", "::1"])
def test_names_of_the_loopback(bound: str, host: str) -> None:
    assert LocalAccess(bound).refusal([host], [], []) is None


@pytest.mark.parametrize("host", NOT_OWN)
def test_other_names_are_refused_on_the_loopback(host: str) -> None:
    refusal = LocalAccess("127.0.0.1").refusal([host], [], [])
    assert refusal is not None
    assert host in refusal


def test_one_host_and_no_other_number() -> None:
    assert LocalAccess().refusal([], [], []) is not None
    assert LocalAccess().refusal(["localhost", "localhost"], [], []) is not None


@pytest.mark.parametrize("bound", [None, "", "0.0.0.0", "::", "gpu-1.corp.example"])
def test_beyond_the_loopback_names_that_no_page_can_have(bound: str | None) -> None:
    access = LocalAccess(bound)
    for host in [*OWN, "10.0.0.1:8000", "[fe80::1]:8000", "gpu-1:8000", "rollout"]:
        assert access.refusal([host], [], []) is None, host
    for host in ["evil.example", "10.0.0.1.evil.example", ""]:
        assert access.refusal([host], [], []) is not None, host
    assert (access.refusal(["GPU-1.corp.example:8000"], [], []) is None) == (bound == "gpu-1.corp.example")


@pytest.mark.parametrize("origin", ["http://localhost:8000", "https://localhost:8000", "HTTP://LOCALHOST:8000"])
def test_the_origin_of_the_server_itself(origin: str) -> None:
    assert LocalAccess().refusal(["localhost:8000"], [origin], ["same-origin"]) is None


@pytest.mark.parametrize(
    "origins",
    [
        ["http://evil.example"],
        ["null"],
        [""],
        ["http://localhost"],
        ["http://localhost:3000"],
        ["http://127.0.0.1:8000"],
        ["file://"],
        ["http://localhost:8000.evil.example"],
        ["http://localhost:8000", "http://localhost:8000"],
    ],
)
def test_other_origins_are_refused(origins: list[str]) -> None:
    assert LocalAccess().refusal(["localhost:8000"], origins, []) is not None


@pytest.mark.parametrize(
    ("site", "passes"),
    [("none", True), ("same-origin", True), ("same-site", False), ("cross-site", False), ("", False), ("new", False)],
)
def test_sites(site: str, passes: bool) -> None:
    assert (LocalAccess().refusal(["localhost"], [], [site]) is None) == passes


def test_origins_that_are_trusted() -> None:
    access, page = LocalAccess(), "http://localhost:3000"
    assert access.refusal(["localhost:8000"], [page], ["cross-site"], [page]) is None
    assert access.refusal(["localhost:8000"], ["http://evil.example"], ["cross-site"], [page]) is not None
    assert access.refusal(["localhost:8000"], [], ["cross-site"], [page]) is not None
    assert access.refusal(["localhost:8000"], ["http://evil.example"], ["cross-site"], ["*"]) is None
    assert access.refusal(["evil.example"], [page], [], ["*"]) is not None, "rebinding"


def test_a_long_header_makes_no_long_message() -> None:
    refusal = LocalAccess().refusal(["x" * 10_000], [], [])
    assert refusal is not None
    assert len(refusal) < 300
