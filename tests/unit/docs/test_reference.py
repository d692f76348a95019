"""The reference pages say what the code says, and the documents' links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from docs.reference import FOLDER, PAGES, cli_page, http_page

DOCUMENTS = [FOLDER.parent / "README.md", *sorted(FOLDER.glob("*.md"))]


@pytest.mark.parametrize("name", PAGES)
def test_reference_pages_are_those_of_the_code(name: str) -> None:
    assert (FOLDER / name).read_text() == PAGES[name](), "run `make reference`"


def test_defaults_are_filled_in_and_none_is_left_out() -> None:
    assert "%(" not in cli_page()
    assert "| `--temperature` | `0.0` | 0 is greedy |" in cli_page()


def test_what_may_be_null_says_so() -> None:
    state = http_page().partition("### RunState\n")[2].partition("### ")[0]
    assert "| `version` | [WeightVersion](#weightversion) or null | required |" in state
    assert "| `run_id` | string | required |" in state
    assert "| `devices` | list of (string or null) |" in http_page()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_to_files_and_headings(document: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        file = (document.parent / path) if path else document
        assert file.exists(), f"{document.name}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", file.read_text(), re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", h).strip().lower().replace(" ", "-") for h in headings}
            assert anchor in anchors, f"{document.name}: {target}"
