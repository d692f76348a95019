"""`learner export`: write a run's adapter for others to load, alone or merged into its base model."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from learner.adapters.model_card import MARK, model_card
from learner.adapters.stored import CONFIG_FILE, TOKENIZER_FILES, WEIGHTS_FILE, copy_files, fetch_base, open_adapter
from learner.commands.flags import Parser, dtype_name, either_spelling
from learner.utils.atomic import atomic_directory, check_writable, is_missing_or_empty
from shared.adapter_file import DTYPES
from shared.errors import BaseMismatch, InvalidRequest
from shared.fingerprint import fingerprint_checkpoint
from shared.rounding import Arrived

CARD_FILE = "README.md"
MERGED_DTYPE = "bfloat16"


def export(
    source: str | Path,
    out: str | Path,
    *,
    merged: bool = False,
    model: str | None = None,
    revision: str | None = None,
    dtype: str = MERGED_DTYPE,
    force: bool = False,
) -> tuple[Path, Arrived]:
    """Write the adapter in `source` (see `learner.adapters.stored.find_adapter`) to `out`.

    Return its directory, and how much of the update is in merged weights.

    Atomic; a merge holds one shard of the model in memory. Raises `invalid_request`, `unsupported_adapter`,
    `shape_mismatch`, `base_mismatch`, and the errors of `learner.adapters.stored.open_adapter`.

    Args:
        merged: write a model with the adapter in its weights; else the adapter alone, as PEFT reads it.
        model, revision: the base model; by default the one named in the adapter.
        dtype: of a merged model's weights.
        force: replace an earlier export in `out`.
    """
    adapter, target = open_adapter(source), Path(out).resolve()
    check_writable(out, "--out", directory=True)
    adapter.check_finite()
    if not model:
        model, revision = adapter.config.get("base_model_name_or_path"), revision or adapter.config.get("revision")
    if not model:
        raise InvalidRequest(f"{adapter.folder} does not name its base model: name it with --model_name_or_path")
    adapter = replace(adapter, config=adapter.config | {"base_model_name_or_path": model, "revision": revision})
    _check_target(target, force, sources=(adapter.folder, Path(model)))
    arrived = Arrived()
    with atomic_directory(target) as building:
        if merged:
            from learner.adapters.merge import merge  # imports torch

            base = fetch_base(model, revision)
            trained_on, given = adapter.run.get("base_weights"), fingerprint_checkpoint(str(base)).weights
            if trained_on is not None and trained_on != given:
                raise BaseMismatch(
                    f"{base} is not the base that {adapter.folder} was trained on ({str(given)[:12]} and "
                    f"{trained_on[:12]}): name that with --model_name_or_path, and --model_revision"
                )
            arrived = merge(base, adapter, building, dtype)
            # The tokenizer and chat template that the adapter was trained with come before the base's.
            own = (adapter.folder / "tokenizer_config.json").is_file()
            copy_files(adapter.folder if own else base, building, TOKENIZER_FILES)
        else:
            copy_files(adapter.folder, building, (WEIGHTS_FILE, *TOKENIZER_FILES))
            (building / CONFIG_FILE).write_text(json.dumps(adapter.config, indent=2) + "\n")
        (building / CARD_FILE).write_text(model_card(adapter, building, dtype if merged else None))
    return adapter.folder, arrived


def main(argv: Sequence[str]) -> int:
    """Run the command. Return the exit code."""
    options = make_parser().parse_args(argv)
    if options.dtype and not options.merge:
        raise InvalidRequest(
            "--dtype is of a merged model, and an adapter keeps its own: give --merge, too, or leave it out"
        )
    dtype = options.dtype or MERGED_DTYPE
    source, arrived = export(
        options.source,
        options.out,
        merged=options.merge,
        model=options.model_name_or_path,
        revision=options.model_revision,
        dtype=dtype,
        force=options.force,
    )
    what = f"merged in {dtype}" if options.merge else "as it is"
    size = sum(path.stat().st_size for path in Path(options.out).iterdir())
    print(f"{source}, {what}, is in {options.out} ({size / 2**20:,.1f} MiB)")
    if options.merge:
        print(how_much(arrived))
    return 0


def how_much(arrived: Arrived) -> str:
    """Say how much of the update is in merged weights."""
    if arrived.share is None:
        return "the adapter changes no weight"
    return (
        f"share of the update in the weights: {arrived.share:.3f}; rounding changed them by {arrived.error:.3g} of the "
        "update, in no direction"
    )


def _check_target(target: Path, force: bool, sources: Sequence[Path]) -> None:
    for source in sources:  # also through links and `..`: what is replaced is gone
        if source.exists() and source.resolve().is_relative_to(target.resolve()):
            raise InvalidRequest(f"{target} is, or holds, what is to be exported ({source}); choose another --out")
    if is_missing_or_empty(target):
        return
    if not force:
        raise InvalidRequest(f"{target} exists; choose another --out, or replace it with --force")
    if (is_mount := target.is_mount()) or target.samefile("."):
        what = "is a mount point" if is_mount else "is the current directory"
        raise InvalidRequest(f"{target} {what}, which --force cannot replace: choose another --out, such as one in it")
    card = target / CARD_FILE
    if not card.is_file() or MARK not in card.read_text(errors="replace"):
        raise InvalidRequest(f"{target} is no export, so --force does not replace it; choose another --out")


def make_parser() -> argparse.ArgumentParser:
    """Flags of `learner export`."""
    parser = Parser(prog="learner export", description=__doc__)
    add = either_spelling(parser)
    add("source", help="a run's output_dir, one of its checkpoints, or a PEFT LoRA directory")
    add("--out", required=True, help="directory to write")
    add("--merge", action="store_true", help="write a model, W0 + s*B*A computed in float32 (default: the adapter)")
    add(
        "--dtype",
        type=dtype_name,
        choices=tuple(DTYPES),
        help=f"of a merged model (default {MERGED_DTYPE})",
    )
    add("--model-name-or-path", help="the base model (default: the one the adapter names)")
    add("--model-revision", help="of the base model on the hub")
    add("--force", action="store_true", help="replace an earlier export")
    return parser
