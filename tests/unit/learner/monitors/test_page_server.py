"""The live page: who may read it, what is sent, and a browser that watches a run directory being written."""

from __future__ import annotations

import http.client
import json
import shutil
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from learner.monitors import page_server
from learner.monitors.http_server import local_only, start_http_server
from learner.monitors.page_server import PageApp, page_url
from tests.support.browser import browser_page, find_browser
from tests.support.made_up_run import RunWriter

SECRET = "a-secret-of-the-url-1234"  # pragma: allowlist secret


@contextmanager
def serving(folder: Path, secret: str | None = None) -> Iterator[int]:
    """Serve the page of `folder` as `serve_page` does; yields the port."""
    server = start_http_server(local_only(PageApp(folder, secret), "127.0.0.1"), "127.0.0.1", 0, "page_port")
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()


def ask(port: int, path: str = "/", method: str = "GET", **headers: str) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.putrequest(method, path, skip_host="Host" in headers)
    for name, value in headers.items():
        connection.putheader(name.replace("_", "-"), value)
    connection.endheaders()
    answer = connection.getresponse()
    body = b"" if answer.headers.get_content_type() == "text/event-stream" else answer.read()
    connection.close()
    return answer.status, dict(answer.headers), body


class Stream:
    """The events that a page gets."""

    def __init__(self, port: int, query: str = "", headers: dict[str, str] | None = None) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        self._connection.request("GET", f"/events{query}", headers=headers or {})
        self._answer = self._connection.getresponse()
        assert self._answer.status == 200

    def next(self) -> tuple[str, Any]:
        kind = ""
        while True:
            name, _, value = self._answer.readline().decode().rstrip("\n").partition(": ")
            if name == "event":
                kind = value
            elif name == "data":
                return kind, json.loads(value)

    def next_run(self) -> dict[str, Any]:
        while True:
            kind, data = self.next()
            if kind == "run":
                return data

    def ended(self) -> bool:
        """Return whether the server has closed the stream after what was read."""
        return not self._answer.read().strip()

    def close(self) -> None:
        self._answer.close()
        self._connection.close()


@contextmanager
def stream(port: int, query: str = "") -> Iterator[Stream]:
    opened = Stream(port, query)
    try:
        yield opened
    finally:
        opened.close()


def rows(message: dict[str, Any]) -> list[int]:
    return [row[0] for row in message["table"]["rows"]]


def test_new_steps_are_sent_as_they_are_written(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path / "gsm8k")
    writer.go_on(3)
    with serving(tmp_path / "gsm8k") as port, stream(port) as events:
        assert events.next() == ("runs", ["gsm8k"])
        first = events.next_run()
        assert rows(first) == [1, 2, 3]
        assert first["table"]["anew"]
        assert first["head"]["run_id"] == "gsm8k-3f2a1c"
        assert [batch["step"] for batch in first["batches"]["new"]] == [1, 2, 3]
        writer.go_on(2)
        got: list[int] = []
        steps: list[int] = []
        while got != [4, 5] or steps != [4, 5]:
            more = events.next_run()
            assert not more.get("table", {}).get("anew"), "only what is new is sent"
            got += rows(more) if "table" in more else []
            steps += [batch["step"] for batch in more.get("batches", {}).get("new", ())]
            got = sorted(set(got))
        assert got == [4, 5]
        writer.write_state("finished")
        while (more := events.next_run()).get("head", {}).get("state") != "finished":
            pass
        assert "table" not in more


def test_a_training_that_begins_anew(tmp_path: Path) -> None:
    RunWriter(tmp_path / "run").go_on(5)
    with serving(tmp_path / "run") as port, stream(port) as events:
        assert rows(events.next_run()) == [1, 2, 3, 4, 5]
        RunWriter(tmp_path / "run").go_on(2)
        last: list[int] = []
        while last != [1, 2]:
            more = events.next_run()
            if "table" in more:
                last = rows(more) if more["table"]["anew"] else last + rows(more)
        assert last == [1, 2]


def test_runs_of_a_folder(tmp_path: Path) -> None:
    for name, steps in (("a", 3), ("b", 4)):
        RunWriter(tmp_path / name, run_id=name).go_on(steps)
    (tmp_path / "no run").mkdir()
    with serving(tmp_path) as port, stream(port, "?run=a&run=b") as events:
        assert events.next() == ("runs", ["a", "b"])
        assert rows(events.next_run()) == [1, 2, 3]
        assert rows(events.next_run()) == [1, 2, 3, 4]
        RunWriter(tmp_path / "c")
        while (event := events.next())[0] != "runs":
            pass
        assert event == ("runs", ["a", "b", "c"])


@pytest.mark.parametrize("left", [(), ("run.json",), ("run.json", "logs.jsonl", "completions.jsonl")])
def test_somebody_elses_run(tmp_path: Path, left: tuple[str, ...]) -> None:
    """Directories of other versions, and files with lines that are none, are shown as far as they go."""
    folder = tmp_path / "run"
    RunWriter(folder).go_on(3)
    for name in left:
        (folder / name).unlink()
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('nonsense\n[1]\n{"step": "x"}\n{"step": -1}\n{"step": 4, "reward": NaN, "seconds": "2"}\n{"step": 5')
    with (folder / "completions.jsonl").open("a") as file:
        file.write('{"step": 1, "samples": []}\n{"step": 1, "kind": "training", "groups": [{"samples": [3]}]}\n')
    with serving(folder) as port, stream(port) as events:
        message = events.next_run()
        assert rows(message) == [1, 2, 3]
        assert message["head"]["run_id"] == ("run" if left else "gsm8k-3f2a1c")
        assert len(message["batches"]["new"]) == (0 if len(left) > 1 else 3)


def test_nothing_but_reading(tmp_path: Path) -> None:
    RunWriter(tmp_path / "run").go_on(1)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with serving(tmp_path) as port:
        for method in ("POST", "PUT", "DELETE", "PATCH", "OPTIONS"):
            assert ask(port, "/", method)[0] == 405, method
        for path in ("/run.html", "/../lease.json", "/run/lease.json", "/events/x", "//etc/passwd"):
            assert ask(port, path)[0] == 404, path
        for name in ("..", "../run", "run/", "%2e%2e", "no", "/etc"):
            assert ask(port, f"/events?run={name}")[0] == 404, name
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_pages_of_other_sites_read_nothing(tmp_path: Path) -> None:
    RunWriter(tmp_path / "run", run_id="a-secret-run").go_on(1)
    with serving(tmp_path / "run") as port:
        for headers in (
            {"Host": "evil.example"},
            {"Host": f"evil.example:{port}", "Origin": f"http://evil.example:{port}"},
            {"Origin": "http://evil.example"},
            {"Origin": "null"},
            {"Sec_Fetch_Site": "cross-site"},
            {"Sec_Fetch_Site": "same-site"},
        ):
            for path in ("/", "/events"):
                assert ask(port, path, **headers)[0] == 403, (headers, path)
        for headers in ({}, {"Host": f"localhost:{port}"}, {"Sec_Fetch_Site": "same-origin"}):
            for path in ("/", "/events"):
                assert ask(port, path, **headers)[0] == 200, (headers, path)
        policy = ask(port)[1]
    assert policy["X-Frame-Options"] == "DENY"
    assert policy["Cache-Control"] == "no-store"
    assert "Access-Control-Allow-Origin" not in policy
    assert policy["Content-Security-Policy"].startswith("default-src 'none'; script-src 'sha256-")
    assert "connect-src 'self'" in policy["Content-Security-Policy"]


def test_beyond_the_loopback_the_url_has_a_token(tmp_path: Path) -> None:
    RunWriter(tmp_path / "run").go_on(1)
    server = start_http_server(PageApp(tmp_path, SECRET), "127.0.0.1", 0, "page_port")
    port = server.server_port
    for path in ("/", "/events", "/?token=", "/?token=wrong", "/events?token=" + SECRET, "/anything"):
        assert ask(port, path)[0] == 401, path
    assert ask(port, "/", Cookie=f"lockstep_page_{port}=wrong")[0] == 401
    status, headers, _ = ask(port, f"/?token={SECRET}")
    assert (status, headers["Location"]) == (303, "/")
    assert headers["Set-Cookie"].endswith("; HttpOnly; SameSite=Lax")
    cookie = headers["Set-Cookie"].split(";")[0]
    assert cookie.startswith(f"lockstep_page_{port}="), "a browser sends it to the host's other pages, too"
    assert ask(port, "/", Cookie=f"lockstep_page_{port + 1}=other; {cookie}")[0] == 200
    assert ask(port, "/events", Cookie=cookie)[0] == 200
    server.shutdown()
    server.server_close()
    assert page_url("10.0.0.7", 8700, SECRET) == f"http://10.0.0.7:8700/?token={SECRET}"
    assert page_url("::1", 8700) == "http://[::1]:8700/"


def test_strangers_close_no_page_that_is_watched(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path / "run")
    writer.go_on(1)
    server = start_http_server(PageApp(tmp_path / "run", SECRET), "127.0.0.1", 0, "page_port")
    port = server.server_port
    cookie = ask(port, f"/?token={SECRET}")[1]["Set-Cookie"].split(";")[0]
    events = Stream(port, headers={"Cookie": cookie})
    assert rows(events.next_run()) == [1]
    with ExitStack() as strangers:
        for _ in range(40):
            strangers.enter_context(socket.create_connection(("127.0.0.1", port), timeout=30))
        assert ask(port)[0] == 401  # so all of them have been taken up
        writer.go_on(1)
        while "table" not in (more := events.next_run()):
            pass
    assert rows(more) == [2]
    events.close()
    server.shutdown()
    server.server_close()


def test_a_page_hears_of_the_end_before_its_server_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_server, "_LOOK", 100_000.0)
    writer = RunWriter(tmp_path / "run")
    writer.go_on(1)
    app = PageApp(tmp_path / "run")
    server = start_http_server(app, "127.0.0.1", 0, "page_port")
    with stream(server.server_port) as events:
        events.next_run()
        writer.write_state("finished")
        app.send_last(within_s=60.0)
        assert events.next_run()["head"]["state"] == "finished"
        assert events.ended()
    server.shutdown()
    server.server_close()


def test_one_who_has_left_takes_no_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_server, "_LOOK", 0.01)
    monkeypatch.setattr(page_server, "_ALIVE", 0.02)
    RunWriter(tmp_path / "run").go_on(1)
    with serving(tmp_path / "run") as port:
        before = threading.active_count()
        with stream(port) as events:
            events.next_run()
            assert threading.active_count() == before + 1
        for _ in range(1000):
            if threading.active_count() == before:
                break
            threading.Event().wait(0.02)
        assert threading.active_count() == before


def test_in_a_browser_while_the_run_goes_on(tmp_path: Path) -> None:
    """Hover, slider and filter on a page whose run is being written; then a second run laid over the first."""
    found = find_browser()
    writer = RunWriter(tmp_path / "run", steps=60)
    with serving(tmp_path) as port, browser_page(found) as page:
        page.open(f"http://127.0.0.1:{port}/", 1280)
        page.until("document.querySelector('h1').textContent === 'gsm8k-3f2a1c training'")
        page.until("document.querySelector('.link').textContent === 'live'")
        writer.go_on(5)
        page.until("document.querySelector('.tiles').textContent.includes('5 / 60')")
        page.point_at('[aria-label="Loss"] .u-over', across=0.99)
        page.until("document.querySelector('[aria-label=\"Loss\"] .at').textContent === 'step 5'")
        page.until("document.querySelector('#step').getAttribute('aria-valuetext') === 'step 5 (5 of 5, newest)'")
        writer.go_on()
        page.until("document.querySelector('#step').getAttribute('aria-valuetext') === 'step 6 (6 of 6, newest)'")
        page.evaluate("document.querySelector('#step').focus()")
        page.press("Home")
        page.evaluate(
            "(() => { const f = document.querySelector('#filter'); f.value = 'best';"
            " f.dispatchEvent(new Event('change')); document.querySelector('.group').marked = true; })()"
        )
        writer.go_on(4)
        page.until("document.querySelector('.tiles').textContent.includes('10 / 60')")
        page.until("document.querySelector('#step').max === '9'")
        assert page.evaluate("document.querySelector('#step').getAttribute('aria-valuetext')") == "step 1 (1 of 10)"
        assert "reward 1.000" in page.evaluate("document.querySelector('.group').innerText")
        assert page.evaluate("document.querySelector('.group').marked"), "what is being read stays as it is"

        shutil.copytree(tmp_path / "run", tmp_path / "second")
        page.until("document.querySelector('input[value=second]') !== null")
        page.evaluate("document.querySelector('input[value=second]').click()")
        page.until(
            "document.querySelector('[aria-label=\"Reward\"] .legend').textContent.includes('second: trailing mean')"
        )
        page.evaluate("document.querySelector('#run').marked = true")
        page.drag('[aria-label="Loss"] .u-over', 0.5, 0.9)
        writer.go_on()
        page.until("document.querySelector('.tiles').textContent.includes('11 / 60')")
        assert page.evaluate("document.querySelector('#run').marked"), "a list that is open stays open"
        page.point_at('[aria-label="Loss"] .u-over', across=0.02)
        page.until("document.querySelector('[aria-label=\"Loss\"] .at').textContent.match(/^step [67]$/) !== null")
        assert page.console == []
