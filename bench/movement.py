"""How much of a small update arrives in logprobs of bfloat16: from a server, however it applies it, and in the learner.

python -m bench.movement --json movement.json     # the demo's model; half an hour on two cores
python -m bench.movement --quick                  # one update, of one step

An adapter is trained in float32 on one-line sums, by cross-entropy. The share of an update is the regression of the
movement of all logprobs of other sums on the true one, which is computed in float32 from the same bfloat16 base. These
sums stand behind pieces of this project's documents: what bfloat16 does to the base would otherwise be alike in all of
them, and move the share of a small update by more than its standard error says.
"""

from __future__ import annotations

import copy
import functools
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from transformers import AutoModelForCausalLM, AutoTokenizer

from bench.common.harness import Bench
from bench.common.models import served_rank, trained
from bench.common.report import Row
from bench.contenders.lockstep import HTTP, Lockstep
from learner.demo.model import ensure_demo_model
from learner.passes.lora_product import use_one_product
from learner.servers.client import RolloutClient
from shared.rollouts import ScoreRequest

Logprobs = list[torch.Tensor]  # a tensor for each sequence
#: Row -> the server's --apply.
SERVED = {f"lockstep --apply {apply}": apply for apply in ("adapter", "columns", "merge")}
PEFT, ONE_PRODUCT = "learner, PEFT under autocast", "learner, one product"
DOCUMENTS, LONGEST_PIECE = Path(__file__).parents[1] / "docs", 32
#: Longest sequence; sequences of a training step; of a forward pass.
LONGEST, BATCH, TOGETHER = 96, 4, 16


@dataclass
class Update:
    """An adapter after so many steps, and the true movement of the probe's logprobs."""

    lr: float
    steps: int
    adapter: dict[str, torch.Tensor]
    moved: Logprobs


class MovementBench(Bench):
    """A row for every way to compute and every update."""

    name = "movement"
    standard = "rank only learner-gpu server-gpu server-flags deadline-s"
    flags = {
        "--rank": (16, "of the adapter"),
        "--model": (Path, "its directory; without it the demo's model"),
        "--updates": ("1e-6:50,1e-5:5,1e-5:20", "learning rate and steps of each"),
        "--sequences": (64, "of the probe"),
    }
    quick = "--updates 1e-5:1 --sequences 4"
    row_names = (*SERVED, PEFT, ONE_PRODUCT)
    same = ("rank",)
    figure = "share"
    about = {"lr": "lr", "steps": "steps", "row": "row"}
    columns = {"share": "{share:.3f}", "standard error": "{share_error:.3f}", "true rms, nats": "{true_rms:.3f}"}
    what = "lr {lr}, {steps} steps, {row}"
    told = "{share:.3f} ({share_error:.3f}) of {true_rms:.3f} nats"

    def check(self) -> None:
        super().check()
        pairs = [pair.split(":") for pair in self.options.updates.split(",")]
        self.options.updates = [(float(lr), int(steps)) for lr, steps in pairs]
        self.at_least(1, "rank", "sequences")

    def run(self) -> None:
        options = self.options
        self.dtype = "bfloat16"
        folder = options.model or ensure_demo_model(dtype="bfloat16")
        trained_on = BATCH * max(steps for _, steps in options.updates)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        sums = list(chats(tokenizer, options.sequences + trained_on))
        before = pieces(tokenizer, options.sequences)
        self.probe = [piece + ids for piece, ids in zip(before, sums, strict=False)]
        self.texts = sums[options.sequences :]
        torch.manual_seed(0)
        model = adapted(folder, options.rank, self.device)
        wide = copy.deepcopy(model).float()
        updates = list(self.train(wide))
        served = [row for row in SERVED if row in options.only]
        # On a GPU side by side, each with a part of its memory.
        for rows in [served] if self.device != "cpu" else [[row] for row in served]:
            if rows:
                self.served(folder, rows, wide, updates)
        for row in (PEFT, ONE_PRODUCT):
            if row == ONE_PRODUCT:
                use_one_product(model, "default")
            if row in options.only:
                self.in_learner(row, model, updates)

    def train(self, model: PeftModel) -> Iterator[Update]:
        """Yield the updates, those of one learning rate from one training."""
        with model.disable_adapter():
            base = logprobs(model, self.probe)
        start = {name: tensor.clone() for name, tensor in get_peft_model_state_dict(model).items()}
        for lr in sorted({lr for lr, _ in self.options.updates}):
            set_peft_model_state_dict(model, start)
            wanted = sorted(steps for each, steps in self.options.updates if each == lr)
            optimizer = torch.optim.AdamW(trained(model), lr=lr, weight_decay=0.0)
            for step in range(1, wanted[-1] + 1):
                # A mean over all tokens of the batch, whose sequences are of one length or nearly so.
                inputs = padded(self.texts[(step - 1) * BATCH : step * BATCH], model.device)
                labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
                model(**inputs, labels=labels, use_cache=False).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                if step in wanted:
                    adapter = {name: tensor.clone() for name, tensor in get_peft_model_state_dict(model).items()}
                    yield Update(lr, step, adapter, difference(logprobs(model, self.probe), base))

    def served(self, folder: Path, rows: Sequence[str], model: PeftModel, updates: Sequence[Update]) -> None:
        """Measure servers, which score the probe before their first push and after each."""
        settings = {row: self.setting(LONGEST, len(self.probe), 1 << 30, "--apply", SERVED[row]) for row in rows}
        rank = served_rank(self.options.rank)
        starts = {row: functools.partial(Lockstep(settings[row]).start, folder, rank) for row in rows}

        def abouts(row: str) -> list[Row]:
            return [self._about(row, update) for update in updates]

        with self.servers(starts, abouts) as servers:
            for row, server in servers.items():
                with self.failure_kept(*abouts(row), server=server), RolloutClient(server.url) as client:
                    base = scored(client, self.probe, "base")
                    with Lockstep(settings[row]).path(HTTP, server, model) as path:
                        for step, update in enumerate(updates, start=1):
                            set_peft_model_state_dict(model, update.adapter)
                            path.push(step)
                            self.compare(row, update, scored(client, self.probe, "latest"), base)

    def in_learner(self, row: str, model: PeftModel, updates: Sequence[Update]) -> None:
        """Measure the learner's passes, under autocast, which keeps what it has cast until it ends: anew each time."""

        def computed() -> Logprobs:
            with torch.autocast(model.device.type, torch.bfloat16):
                return logprobs(model, self.probe)

        with model.disable_adapter():
            base = computed()
        for update in updates:
            set_peft_model_state_dict(model, update.adapter)
            self.compare(row, update, computed(), base)

    def compare(self, row: str, update: Update, after: Logprobs, base: Logprobs) -> None:
        """Add a row."""
        self.add(self._about(row, update), share(difference(after, base), update.moved))

    def _about(self, row: str, update: Update) -> Row:
        return self.about_row(row, lr=update.lr, steps=update.steps)


def chats(tokenizer: Any, count: int) -> Iterator[list[int]]:
    """Yield the token ids of chats in which a sum is asked for and given, no two of them alike."""
    pairs = [(i, j) for i in range(10, 100) for j in range(10, 100)]
    random.Random(0).shuffle(pairs)
    for i, j in pairs[:count]:
        messages = [
            {"role": "user", "content": f"What is {i} + {j}?"},
            {"role": "assistant", "content": f"{i} + {j} = {i + j}"},
        ]
        yield tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)


def pieces(tokenizer: Any, count: int) -> list[list[int]]:
    """Return the token ids of so many pieces of this project's documents, of many lengths."""
    text = "".join(path.read_text() for path in sorted(DOCUMENTS.glob("*.md")))
    ids = tokenizer(text, return_attention_mask=False)["input_ids"]
    lengths = random.Random(1).choices(range(8, LONGEST_PIECE + 1), k=count)
    starts = range(0, len(ids) - LONGEST_PIECE, len(ids) // (count + 1))
    return [ids[start : start + length] for start, length in zip(starts, lengths, strict=False)]


def adapted(folder: Path, rank: int, device: str) -> PeftModel:
    """Return the model in bfloat16 with a new adapter in float32 on all linear layers."""
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(device)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(base, config).eval()


def padded(sequences: Sequence[list[int]], device: torch.device) -> dict[str, torch.Tensor]:
    """Return token ids and attention mask [sequences, longest], padded on the right."""
    ids = [torch.tensor(sequence, device=device) for sequence in sequences]
    mask = [torch.ones_like(each) for each in ids]
    names = {"input_ids": ids, "attention_mask": mask}
    return {name: torch.nn.utils.rnn.pad_sequence(each, batch_first=True) for name, each in names.items()}


@torch.no_grad()
def logprobs(model: PeftModel, sequences: Sequence[list[int]]) -> Logprobs:
    """Return the logprobs of all tokens but the first of each sequence."""
    found: Logprobs = []
    for start in range(0, len(sequences), TOGETHER):
        some = sequences[start : start + TOGETHER]
        inputs = padded(some, model.device)
        logprobs_BTV = model(**inputs, use_cache=False).logits[:, :-1].float().log_softmax(-1)
        logprobs_BT = logprobs_BTV.gather(-1, inputs["input_ids"][:, 1:, None])[..., 0].double().cpu()
        found += [row[: len(ids) - 1] for row, ids in zip(logprobs_BT, some, strict=True)]
    return found


def scored(client: RolloutClient, sequences: list[list[int]], policy: Literal["base", "latest"]) -> Logprobs:
    """Return a server's logprobs of all tokens but the first of each sequence."""
    rows = client.score(ScoreRequest(sequences=sequences, policy=policy)).logprobs
    return [torch.tensor(row, dtype=torch.float64) for row in rows]


def difference(after: Logprobs, before: Logprobs) -> Logprobs:
    """Return what moved."""
    return [one - other for one, other in zip(after, before, strict=True)]


def share(moved: Logprobs, true: Logprobs) -> Row:
    """Return the regression of `moved` on `true` over all tokens, with its standard error over sequences."""
    products = torch.stack([(m * t).sum() for m, t in zip(moved, true, strict=True)])
    squares = torch.stack([(t * t).sum() for t in true])
    found = products.sum() / squares.sum()
    error = (products - found * squares).square().sum().sqrt() / squares.sum()
    rms = (squares.sum() / sum(len(t) for t in true)).sqrt()
    return {"share": found.item(), "share_error": error.item(), "true_rms": rms.item()}


if __name__ == "__main__":
    sys.exit(MovementBench().main())
