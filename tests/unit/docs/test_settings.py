"""The pages for those who come from other tools name options that exist, and all that are refused."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from learner.commands.training import options
from learner.foreign_options import REFUSED, unknown_option
from rollout_server.settings import ServerSettings

DOCS = Path(__file__).parents[3] / "docs"
PAGES = ("from-unsloth.md", "from-trl.md")


def code_of_ours(page):
    """Return the code in all columns but the first, whose words are the other tool's."""
    text = (DOCS / page).read_text()
    rows = [line.split("|")[2:] for line in text.splitlines() if line.startswith("| ")]
    return [code for row in rows for cell in row for code in re.findall(r"`([^`]+)`", cell)]


@pytest.mark.parametrize("page", PAGES)
def test_options_of_ours_exist(page):
    flags = [
        flag for code in code_of_ours(page) if code.startswith("--") for flag in re.findall(r"--([a-z0-9_]+)", code)
    ]
    assert len(flags) > 10
    servers = {name.partition("_")[0] for name in ServerSettings.__dataclass_fields__}
    assert [flag for flag in flags if flag not in options() and flag not in servers | {"max", "config"}] == []


def test_options_of_trl_that_are_named_exist():
    text = (DOCS / "from-trl.md").read_text().partition("## GRPOConfig")[2].partition("\n## ")[0]
    text += (DOCS / "from-unsloth.md").read_text().partition("## GRPOConfig")[2].partition("\n## ")[0]
    first = [line.split("|")[1] for line in text.splitlines() if line.startswith("| ")]
    names = {name for cell in first for name in re.findall(r"`([a-z_]+)[=\"a-z0-9> .()A-Z]*`", cell)}
    unsloth = {"vllm_sampling_params", "max_prompt_length", "warmup_ratio"}
    assert {name for name in names - options().keys() - unsloth if not name.startswith("unsloth_")} == set()


def test_every_refused_option_of_trl_is_on_its_page():
    text = (DOCS / "from-trl.md").read_text()
    assert [name for name in REFUSED if name not in text and name != "transformers_continuous_batching_config"] == []


@pytest.mark.parametrize(
    ("page", "sections"), [("from-unsloth.md", ("FastLanguageModel", "GRPOConfig")), ("from-trl.md", ("The script's",))]
)
def test_every_word_of_theirs_is_answered_with_a_remedy(page, sections):
    """Also those that are not exactly options; a guess at a misspelling is no answer."""
    parts = [part for part in (DOCS / page).read_text().split("\n## ") if part.startswith(sections)]
    first = [line.split("|")[1] for part in parts for line in part.splitlines() if line.startswith("| `")]
    words = {word for cell in first for word in re.findall(r"`(?:--)?([a-z][a-z0-9_]+)", cell)} - options().keys()
    assert len(words) > 5
    answers = {word: unknown_option(word, None, options()) for word in words}
    assert [word for word, answer in answers.items() if ": " not in answer or "did you mean" in answer] == []
