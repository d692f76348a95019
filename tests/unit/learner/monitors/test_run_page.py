"""The run's page: its content, escaping, and layout in a browser."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest

from learner.monitors.charts import trailing_mean
from learner.monitors.run_page import RunData, render
from learner.utils.atomic import write_atomically
from tests.support.browser import Page, browser_page, find_browser
from tests.support.made_up_run import HOSTILE, made_up_run

VOID = {"meta", "link"}


class _Reader(HTMLParser):
    """Counts elements, collects text, and fails where tags do not match."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.texts: dict[str, list[str]] = {}

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open:
            self.texts.setdefault(self.open[-1], []).append(data)


def _read(page: str) -> _Reader:
    reader = _Reader()
    reader.feed(page)
    reader.close()
    assert reader.open == []
    return reader


def test_all_of_a_run_is_there() -> None:
    run = made_up_run()
    page = _read(render(run))
    titles = [text for text in page.texts["h3"] if text.strip() and text[0].isupper()]
    assert len(titles) == 11
    assert {"Reward", "Lag", "Push", "Training-inference mismatch"} <= set(titles)
    assert len([1 for tag, _ in page.tags if tag == "article"]) == sum(len(b["samples"]) for b in run.batches)
    assert {"step 4 to token 131, step 5 (carried KV)", "212, cut off", "1.000", "-0.71"} <= set(page.texts["b"])
    shown = "".join(page.texts["li"] + page.texts["b"] + page.texts["span"] + page.texts["dd"])
    for text in ("120 / 120", "1 of 2", "serving", "away", "1,234,567 tokens", "openai/gsm8k:main", "training"):
        assert text in shown


def test_text_stays_text() -> None:
    page = _read(render(made_up_run()))
    assert not {tag for tag, _ in page.tags} & {"script", "img", "iframe", "object", "form", "base"}
    assert not [attributes for _, attributes in page.tags if any(name.startswith("on") for name in attributes)]
    assert [name for name, _ in page.tags].count("style") == 1
    shown = "".join(page.texts["pre"])
    for text in HOSTILE[:3] + HOSTILE[4:5] + HOSTILE[6:]:
        assert text in shown
    assert r"\u202egnirts desrever\u202c \u0000\u001b[31m" in shown
    assert r"\ud800 a lone" in shown
    assert not re.search("[\0-\x08\x0b-\x1f\u202e\ud800]", "".join(map("".join, page.texts.values())))


def test_nothing_comes_from_elsewhere() -> None:
    page = render(made_up_run())
    policy = next(a["content"] for tag, a in _read(page).tags if tag == "meta" and "http-equiv" in a)
    assert policy.startswith("default-src 'none'")
    assert "script" not in policy
    assert not re.findall(r'(?:src|href)="(?!data:)[^"]*"', page.replace("&quot;", ""))
    assert "url(" not in page


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_a_run_that_has_just_begun(steps: int) -> None:
    page = _read(render(made_up_run(steps) if steps else RunData("r", "m")))
    assert [tag for tag, _ in page.tags].count("svg") == (11 if steps else 0)
    assert ("The first step has not ended yet." in page.texts["p"]) is not bool(steps)
    assert not re.search("nan|inf", "".join(str(a) for tag, a in page.tags if tag in ("path", "circle", "text")))


def test_a_long_run_has_a_page_of_the_same_size() -> None:
    short, long = render(made_up_run(400)), render(made_up_run(4000))
    assert len(long) < 1.2 * len(short) < 1.2e6


def test_trailing_mean_never_looks_ahead() -> None:
    assert trailing_mean([1.0, 0.0, 0.0, 9.0], 2) == [1.0, 0.5, 0.0, 4.5]


@pytest.fixture(scope="module")
def browser() -> Iterator[Page]:
    found = find_browser()
    if found is None:
        pytest.skip("no Chromium here")
    with browser_page(found) as page:
        yield page


@pytest.mark.parametrize("width", [320, 390, 768, 1280])
def test_in_a_browser(browser: Page, tmp_path: Path, width: int) -> None:
    path = tmp_path / "run.html"
    write_atomically(path, render(made_up_run()))
    browser.console.clear()
    browser.open(path, width)
    browser.evaluate("document.querySelectorAll('details').forEach(part => { part.open = true; })")
    assert browser.evaluate("[document.documentElement.scrollWidth, document.body.scrollWidth]") == [width, width]
    # Elements that overflow to the right or are cut off inside their box, except scrollable ones.
    out = browser.evaluate(
        "[...document.querySelectorAll('body *')].filter(e => e.getBoundingClientRect().right > innerWidth + 0.5"
        " || (e.scrollWidth > e.clientWidth + 1 && getComputedStyle(e).display !== 'inline' && !e.closest('svg')))"
        ".map(e => e.outerHTML.slice(0, 90))"
    )
    assert out == []
    boxes = browser.evaluate(
        "[...document.querySelectorAll('.chart svg')].map(svg => {"
        " const lines = [...svg.querySelectorAll('.line, .dot')].map(e => e.getBoundingClientRect());"
        " return [Math.max(...lines.map(b => b.right)) - Math.min(...lines.map(b => b.left)), svg.clientHeight]; })"
    )
    assert len(boxes) == 11
    assert all(across > 200 and height > 100 for across, height in boxes)
    # No two texts of a chart overlap, none is cut off, and none is too small to read.
    overlaps = browser.evaluate(
        "[...document.querySelectorAll('.chart svg')].flatMap(svg => { const box = svg.getBoundingClientRect();"
        " const t = [...svg.querySelectorAll('text')].map(e => [e.textContent, e.getBoundingClientRect()]);"
        " return t.flatMap(([a, p], i) => t.slice(i + 1).filter(([b, q]) =>"
        "  p.left < q.right && q.left < p.right && p.top < q.bottom - 2 && q.top < p.bottom - 2)"
        "  .map(([b]) => a + ' on ' + b)).concat(t.filter(([a, p]) => p.height < 9).map(([a]) => a + ' is small'))"
        "  .concat(t.filter(([a, p]) => p.left < box.left || p.right > box.right).map(([a]) => a + ' is cut')); })"
    )
    assert overlaps == []
    assert browser.evaluate("document.title") == "gsm8k-3f2a1c · Lockstep"
    assert browser.console == []


def test_what_the_policy_of_the_page_would_block(browser: Page, tmp_path: Path) -> None:
    """The content security policy blocks scripts even without escaping, and the console check above notices."""
    path = tmp_path / "run.html"
    write_atomically(
        path, render(made_up_run(1)).replace("</main>", "<script>document.title = 'owned'</script></main>")
    )
    browser.console.clear()
    browser.open(path, 390)
    assert browser.evaluate("document.title") != "owned"
    assert any("script" in text for text in browser.console)


@pytest.mark.parametrize("dark", [False, True])
def test_text_can_be_read(browser: Page, tmp_path: Path, dark: bool) -> None:
    """Text has WCAG's contrast of at least 4.5 against its background."""
    path = tmp_path / "run.html"
    write_atomically(path, render(made_up_run()))
    browser.open(path, 1280, dark=dark)
    worst = browser.evaluate(
        "(() => { const rgb = c => c.match(/[\\d.]+/g).map(Number);"
        " const light = c => { const [r, g, b] = rgb(c).map(v => (v /= 255) <= 0.03928 ? v / 12.92"
        "  : ((v + 0.055) / 1.055) ** 2.4); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };"
        " const behind = e => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor;"
        "  if ((rgb(c)[3] ?? 1) > 0) return c; } return 'rgb(255,255,255)'; };"
        " return Math.min(...[...document.querySelectorAll('main *')].filter(e => [...e.childNodes].some(n =>"
        "  n.nodeType === 3 && n.data.trim()) && e.tagName !== 'title').map(e => { const s = getComputedStyle(e);"
        "  const a = light(e.closest('svg') ? s.fill : s.color), b = light(behind(e));"
        "  return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05); })); })()"
    )
    assert worst >= 4.5
