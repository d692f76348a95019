"""The reference pages say what the code says, and the documents' links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from docs.reference import FOLDER, PAGES

DOCUMENTS = [FOLDER.parent / "README.md", *sorted(FOLDER.glob("*.md"))]


@pytest.mark.parametrize("name", PAGES)
def test_reference_pages_are_those_of_the_code(name: str) -> None:
    assert (FOLDER / name).read_text() == PAGES[name](), "run `make reference`"


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
