"""The page of a run as a file: its data, its policy, and what it shows in a browser."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from learner.monitors.run_page import CHARTS, RunView, render
from learner.utils.atomic import write_atomically
from tests.support.browser import Page, browser_page, find_browser
from tests.support.made_up_run import HOSTILE, made_up_run, row_of

FILES = resources.files("learner.monitors").joinpath("page")


class _Reader(HTMLParser):
    """Collects elements and their texts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append((self.found[-1][0] if self.found else "", data))


def _data(page: str) -> Any:
    return json.loads(next(text for tag, text in _Reader(page).texts if tag == "script"))


def _written(folder: Path, view: RunView) -> Path:
    path = folder / "run.html"
    write_atomically(path, render({"gsm8k": view}))
    return path


# ---- the file, without a browser


def test_the_data_is_in_the_file() -> None:
    view = made_up_run()
    (message,) = _data(render({"gsm8k": view}))["messages"]
    assert message["head"]["last"]["step"] == 120
    assert message["head"]["totals"]["seconds"] == pytest.approx(sum(row_of(s, 120)["seconds"] for s in range(1, 121)))
    reward = message["table"]["columns"].index("reward") + 1
    assert [row[reward] for row in message["table"]["rows"]] == [
        pytest.approx(row_of(step, 120)["reward"], rel=1e-5) for step in range(1, 121)
    ]
    assert message["batches"]["new"] == json.loads(json.dumps(view.batches))


def test_every_column_of_a_chart_is_one_that_a_training_writes() -> None:
    columns = {"step", *made_up_run(40).table.changes()[1]["columns"]}
    named = {column for chart in CHARTS if chart["series"] != "functions" for column, _, _ in chart["series"]}
    assert named <= columns


def test_text_of_a_run_stays_in_the_data() -> None:
    page = render({HOSTILE[0]: made_up_run(run_id="</title>" + HOSTILE[0])})
    read = _Reader(page)
    assert [tag for tag, _ in read.found].count("script") == 3
    assert not {tag for tag, _ in read.found} & {"img", "iframe", "object", "form", "base", "svg"}
    assert not [attributes for _, attributes in read.found if any(name.startswith("on") for name in attributes)]
    shown = json.dumps(_data(page), ensure_ascii=False)
    for text in HOSTILE:
        assert json.dumps(text, ensure_ascii=False)[1:-1] in shown
    assert not re.search("[\u2028\u2029\ud800-\udfff]", render({"r": made_up_run(model="a\u2028b\u2029c\ud800")}))


def test_numbers_that_json_has_not(tmp_path: Path) -> None:
    """Somebody else's run directory may hold NaN, which no browser reads."""
    batch = {"step": 1, "kind": "training", "completions": 1, "groups": [{"samples": [{"reward": float("nan")}]}]}
    page = render({"r": RunView("r", batches=[batch], servers=[{"tokens": float("inf")}])})
    (message,) = _data(page)["messages"]
    assert message["batches"]["new"][0]["groups"][0]["samples"] == [{"reward": None}]


def test_only_its_own_scripts_and_style_run() -> None:
    page = render({"r": made_up_run()})
    policy = next(a["content"] for tag, a in _Reader(page).found if tag == "meta" and "http-equiv" in a)
    assert policy is not None
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy
    assert "connect-src" not in policy
    scripts = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    pinned = {f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}" for text in scripts}
    assert pinned == set(re.findall("sha256-[^']+", policy.split(";")[1]))
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    for name in ("page.js", "uplot/uPlot.iife.min.js"):
        assert not re.search(
            "innerHTML|outerHTML|insertAdjacentHTML|document.write|eval\\(", FILES.joinpath(name).read_text()
        )


def test_the_charting_library_is_the_pinned_one() -> None:
    sums = FILES.joinpath("uplot/SHA256SUMS").read_text().splitlines()
    assert len(sums) == 3
    for pinned, name in map(str.split, sums):
        assert hashlib.sha256(FILES.joinpath("uplot", name).read_bytes()).hexdigest() == pinned, name


# ---- in a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Page]:
    found = find_browser()
    with browser_page(found) as page:
        yield page


@pytest.mark.parametrize("width", [320, 390, 768, 1280])
def test_it_fits(browser: Page, tmp_path: Path, width: int) -> None:
    browser.console.clear()
    browser.open(_written(tmp_path, made_up_run()), width)
    browser.evaluate("document.querySelectorAll('details').forEach(part => { part.open = true; })")
    browser.until("document.querySelectorAll('table').length === 15")
    assert browser.evaluate("[document.documentElement.scrollWidth, document.body.scrollWidth]") == [width, width]
    # Elements that overflow to the right or are cut off inside their box, except scrollable ones.
    out = browser.evaluate(
        "[...document.querySelectorAll('body *')].filter(e => !e.closest('.scroll, .uplot, .hidden'))"
        ".filter(e => e.getBoundingClientRect().right > innerWidth + 0.5"
        " || (e.scrollWidth > e.clientWidth + 1 && getComputedStyle(e).display !== 'inline'))"
        ".map(e => e.outerHTML.slice(0, 90))"
    )
    assert out == []
    sizes = browser.evaluate("[...document.querySelectorAll('.plot canvas')].map(e => [e.clientWidth, e.clientHeight])")
    assert len(sizes) == 15
    assert all(across > 200 and height == 190 for across, height in sizes)
    assert browser.evaluate("document.title") == "gsm8k-3f2a1c · Lockstep"
    assert browser.console == []


def test_it_runs_no_text(browser: Page, tmp_path: Path) -> None:
    browser.open(_written(tmp_path, made_up_run(model=HOSTILE[1], servers=[{"url": HOSTILE[0]}])), 1280)
    browser.evaluate("document.querySelector('#everywhere').click()")
    browser.evaluate("for (let i = 0; i < 9; i++) [...document.querySelectorAll('button')].at(-1).click()")
    shown = browser.until(
        "document.querySelectorAll('.group').length === 60 && document.querySelector('main').textContent"
    )
    for text in HOSTILE[:3] + HOSTILE[4:5] + HOSTILE[6:]:
        assert text in shown
    assert r"\u202egnirts desrever\u202c \u0000\u001b[31m" in shown
    assert r"\ud800 a lone" in shown
    assert browser.evaluate("document.title") == "gsm8k-3f2a1c · Lockstep"
    assert browser.evaluate("document.querySelectorAll('main img, main script, main style, main svg').length") == 0


def test_what_the_policy_of_the_page_would_block(browser: Page, tmp_path: Path) -> None:
    """The content security policy blocks scripts even without escaping, and the console check above notices."""
    path = tmp_path / "run.html"
    write_atomically(
        path, render({"r": made_up_run(1)}).replace("</body>", "<script>document.title = 'owned'</script>")
    )
    browser.console.clear()
    browser.open(path, 390)
    assert browser.evaluate("document.title") != "owned"
    assert any("script" in text for text in browser.console)


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_a_run_that_has_just_begun(browser: Page, tmp_path: Path, steps: int) -> None:
    browser.console.clear()
    browser.open(_written(tmp_path, made_up_run(steps)), 1280)
    assert browser.evaluate("document.querySelectorAll('.chart:not([hidden]) canvas').length") == (15 if steps else 0)
    assert "NaN" not in browser.evaluate("document.querySelector('main').textContent")
    assert browser.console == []


@pytest.mark.parametrize("dark", [False, True])
def test_text_can_be_read(browser: Page, tmp_path: Path, dark: bool) -> None:
    """Text has WCAG's contrast of at least 4.5 against its background."""
    browser.open(_written(tmp_path, made_up_run()), 1280, dark=dark)
    worst = browser.evaluate(
        "(() => { const rgb = c => c.match(/[\\d.]+/g).map(Number);"
        " const light = c => { const [r, g, b] = rgb(c).map(v => (v /= 255) <= 0.03928 ? v / 12.92"
        "  : ((v + 0.055) / 1.055) ** 2.4); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };"
        " const behind = e => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor;"
        "  if ((rgb(c)[3] ?? 1) > 0) return c; } return 'rgb(255,255,255)'; };"
        " return Math.min(...[...document.querySelectorAll('main *')].filter(e => [...e.childNodes].some(n =>"
        "  n.nodeType === 3 && n.data.trim())).map(e => { const s = getComputedStyle(e);"
        "  const a = light(s.color), b = light(behind(e));"
        "  return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05); })); })()"
    )
    assert worst >= 4.5


def _legend(browser: Page, chart: str) -> str:
    return browser.evaluate(f"document.querySelector('[aria-label=\"{chart}\"] .legend').textContent")


def test_values_under_the_pointer(browser: Page, tmp_path: Path) -> None:
    browser.open(_written(tmp_path, made_up_run()), 1280)
    browser.point_at('[aria-label="Loss"] .u-over', across=0.5)
    step = browser.until("document.querySelector('[aria-label=\"Loss\"] .at').textContent.match(/^step (\\d+)$/)?.[1]")
    assert 55 <= int(step) <= 65
    loss = browser.evaluate("document.querySelector('[aria-label=\"Loss\"] .legend b').textContent")
    assert float(loss) == pytest.approx(0.01 * math.sin(int(step)), rel=0.01)
    # All charts show the same step.
    assert browser.evaluate("document.querySelector('[aria-label=\"Reward\"] .at').textContent") == f"step {step}"


def test_keys_and_a_screen_reader_follow_a_chart(browser: Page, tmp_path: Path) -> None:
    browser.open(_written(tmp_path, made_up_run()), 390)
    plot = "document.querySelector('[aria-label=\"Learning rate\"] .plot')"
    browser.evaluate(f"{plot}.focus()")
    browser.press("Home")
    assert browser.evaluate(f"{plot}.getAttribute('aria-valuetext')") == "step 1: learning rate 9.9e-6"
    browser.press("ArrowRight")
    assert browser.evaluate(f"{plot}.getAttribute('aria-valuenow')") == "2"
    browser.press("Escape")
    assert browser.evaluate(f"{plot}.getAttribute('aria-valuetext')").startswith("last value")
    tree = browser.ask("Accessibility.getFullAXTree")["nodes"]
    # Some versions keep a space at the beginning of a name.
    names = [(node["role"]["value"], node.get("name", {}).get("value", "")) for node in tree if not node["ignored"]]
    named = {(role, name.strip()) for role, name in names}
    assert {
        ("slider", "Learning rate: step under the cursor"),
        ("slider", "Step"),
        ("combobox", "Show"),
        ("combobox", "Scale"),
        ("checkbox", "of all steps kept"),
        ("heading", "gsm8k-3f2a1c training"),
        ("progressbar", "steps done"),
        ("button", "Download all as CSV"),
    } <= named
    roles = ("slider", "combobox", "checkbox", "button", "region", "progressbar", "figure")
    assert not [
        node for node in tree if not node["ignored"] and node["role"]["value"] in roles and not node["name"]["value"]
    ]


def test_focus_goes_down_the_page(browser: Page, tmp_path: Path) -> None:
    browser.open(_written(tmp_path, made_up_run(8)), 1280)
    seen = []
    for _ in range(100):
        browser.press("Tab")
        at = browser.evaluate(
            "(() => { const e = document.activeElement; if (e === document.body) return null;"
            " const s = getComputedStyle(e); return [e.getBoundingClientRect().top + scrollY, s.outlineStyle]; })()"
        )
        if at is None:
            break
        seen.append(at)
    assert len(seen) > 40
    assert {outline for _, outline in seen} <= {"solid", "auto"}
    rows = [round(top / 400) for top, _ in seen]
    assert all(b >= a - 1 for a, b in pairwise(rows))


def test_a_table_stands_behind_each_chart(browser: Page, tmp_path: Path) -> None:
    browser.open(_written(tmp_path, made_up_run()), 1280)
    browser.evaluate("document.querySelector('[aria-label=\"Policy\"] summary').click()")
    rows = browser.until(
        "[...document.querySelectorAll('[aria-label=\"Policy\"] tr')].map(r => [...r.children].map(c => c.textContent))"
    )
    assert rows[0] == ["step", "entropy", "KL"]
    assert rows[1] == ["120", "0.4", "0.12"]
    assert len(rows) == 121


def test_download_as_csv(browser: Page, tmp_path: Path) -> None:
    browser.open(_written(tmp_path, made_up_run()), 1280)
    browser.ask("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path), eventsEnabled=True)
    browser.evaluate(
        "[...document.querySelectorAll('button')].find(b => b.textContent === 'Download all as CSV').click()"
    )
    browser.until("true")
    file = tmp_path / "gsm8k-3f2a1c.csv"
    for _ in range(1000):
        if file.exists() and file.stat().st_size:
            break
        browser.evaluate("new Promise(r => setTimeout(r, 20))")
    head, *rows = [line.split(",") for line in file.read_text().splitlines()]
    assert len(rows) == 120
    assert float(rows[-1][head.index("reward")]) == pytest.approx(row_of(120, 120)["reward"], rel=1e-5)


def test_one_stall_does_not_flatten_a_chart(browser: Page, tmp_path: Path) -> None:
    view = made_up_run(60)
    view.table.add_step({**row_of(61, 61), "seconds": 900.0})
    browser.open(_written(tmp_path, view), 1280)
    chart = "document.querySelector('[aria-label=\"Seconds per step\"]')"
    assert browser.evaluate(f"{chart}.querySelector('.cut').textContent").startswith("1 value is outside, up to 900")
    _set(browser, "#scale", "full", "change")
    assert browser.evaluate(f"{chart}.querySelector('.cut').textContent") == ""
    _set(browser, "#scale", "log", "change")
    assert browser.evaluate(f"{chart}.querySelector('.legend').textContent").startswith("step 900")


def _groups(browser: Page) -> list[str]:
    return browser.evaluate("[...document.querySelectorAll('.group')].map(e => e.innerText)")


def _set(browser: Page, selector: str, value: Any, event: str) -> None:
    browser.evaluate(
        f"(() => {{ const e = document.querySelector('{selector}'); e.value = {json.dumps(value)};"
        f" e.dispatchEvent(new Event('{event}')); }})()"
    )


def test_the_step_slider_and_the_filters(browser: Page, tmp_path: Path) -> None:
    browser.open(_written(tmp_path, made_up_run()), 1280)
    assert len(_groups(browser)) == 3
    assert "attempt 115" in _groups(browser)[1]
    browser.evaluate("document.querySelector('#step').focus()")
    browser.press("Home")
    assert browser.evaluate("document.querySelector('#step').getAttribute('aria-valuetext')") == "step 1 (1 of 20)"
    first = _groups(browser)
    assert "attempt 1" in first[1]
    assert "answer\n7" in first[0], "the right answer stands beside completions"
    assert first[0].count("math_answer") == 2, "every completion of a group is there"
    _set(browser, "#filter", "flat", "change")
    assert [text.count("zero variance") for text in _groups(browser)] == [1]
    _set(browser, "#filter", "best", "change")
    assert len(_groups(browser)) == 6
    assert "reward 1.000" in _groups(browser)[0]
    _set(browser, "#filter", "worst", "change")
    assert "reward 0.000" in _groups(browser)[0]
    _set(browser, "#filter", "cut", "change")
    assert len(_groups(browser)) == 5
    _set(browser, "#filter", "longest", "change")
    assert "tokens 212" in _groups(browser)[0]
    assert "tokens 9" in _groups(browser)[-1]
    browser.evaluate("document.querySelector('#everywhere').click()")
    assert browser.evaluate("document.querySelector('.tools + .soft').textContent") == "120 completions"


def test_one_prompt_over_time(browser: Page, tmp_path: Path) -> None:
    browser.open(_written(tmp_path, made_up_run()), 1280)
    browser.evaluate("document.querySelector('.same').click()")
    side = browser.evaluate("[...document.querySelectorAll('.side .group')].map(e => e.innerText)")
    assert len(side) == 20
    assert "attempt 1\n" in side[0] + "\n"
    assert "attempt 115" in side[-1]
    assert browser.evaluate("document.activeElement.textContent") == "Back to all prompts"
    browser.press("Enter")
    assert len(_groups(browser)) == 3


def test_runs_over_one_another(browser: Page, tmp_path: Path) -> None:
    path = tmp_path / "runs.html"
    write_atomically(path, render({"first": made_up_run(), "other": made_up_run(500)}))
    browser.open(path, 1280)
    browser.evaluate("document.querySelector('input[value=other]').focus()")
    browser.press(" ")
    assert re.fullmatch(r"first: trailing mean [\d.]+other: trailing mean [\d.]+", _legend(browser, "Reward"))
    assert browser.evaluate("document.activeElement.value") == "other", "focus stays on the box that was ticked"
