"""Would compressing an adapter pay? Ratio and speed of lossless codecs on a trained adapter's bytes, on one core.

python -m bench.compression --json compression.json          # needs no GPU, a minute
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from bench.common.policy import Policy, trained
from bench.common.report import aligned, cpu_name, machine
from bench.common.shapes import Shape
from learner.adapters.exporter import AdapterExporter
from shared.weights import WeightVersion

SMALL = Shape("small", 512, 8, 8, 4, 64, 1536, vocab=512)
RANK, LEARNING_RATE, REPEATS = 32, 1e-4, 3
#: Of optimizer steps: after the first one every B is about plus or minus the learning rate.
STEPS = (1, 50)
GBITS = (1, 10, 25)
COLUMNS = ("dtype", "steps", "codec", "ratio", "MB/s in", "MB/s out", "pays below Gbit/s")

Codec = tuple[Callable[[bytes], Any], Callable[[Any, int], Any]]


def codecs() -> dict[str, Codec]:
    """Compress, and decompress to a known size, by name."""
    arrow = {
        "lz4": pyarrow.Codec("lz4_raw"),
        "zstd -1": pyarrow.Codec("zstd", compression_level=1),
        "zstd -3": pyarrow.Codec("zstd", compression_level=3),
    }
    return {
        "zlib -1": (lambda data: zlib.compress(data, 1), lambda data, size: zlib.decompress(data, bufsize=size)),
        **{name: (codec.compress, codec.decompress) for name, codec in arrow.items()},
    }


def train(model: PeftModel, steps: int) -> None:
    """AdamW on next tokens of random sequences: the adapter learns their bigrams."""
    torch.manual_seed(0)
    following = torch.randperm(SMALL.vocab)
    optimizer = torch.optim.AdamW(trained(model), lr=LEARNING_RATE)
    for _ in range(steps):
        ids = torch.randint(SMALL.vocab, (8, 1))
        for _ in range(15):
            ids = torch.cat([ids, following[ids[:, -1:]]], dim=1)
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()


def adapter_bytes(steps: int, dtypes: Sequence[str]) -> dict[str, bytes]:
    """What a push sends after so many optimizer steps, without its header, by dtype."""
    with tempfile.TemporaryDirectory() as folder:
        policy = Policy(SMALL.write(Path(folder), "float32"), torch.device("cpu"), "float32")
    lora = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(policy.base, lora)
    train(model, steps)
    version = WeightVersion(run_id="bench", fence=0, step=steps)
    return {dtype: bytes(AdapterExporter(model, dtype=dtype).export(version).pieces()[1]) for dtype in dtypes}


def measure(data: bytes, codec: Codec, width: int | None) -> dict[str, float]:
    """Best of a few rounds, in seconds of the core: other processes do not count.

    Args:
        width: bytes of an element, if its bytes are to be sorted into planes first; that is part of the time.
    """
    compress, decompress = codec
    best_in = best_out = float("inf")
    for _ in range(REPEATS):
        started = time.process_time()
        packed = compress(data if width is None else planes(data, width))
        taken = time.process_time()
        back = bytes(decompress(packed, len(data)))
        back = back if width is None else elements(back, width)
        best_in, best_out = min(best_in, taken - started), min(best_out, time.process_time() - taken)
        if back != data:
            raise RuntimeError("what came back is not what was compressed")
    saved = 1 - len(packed) / len(data)
    rates = len(data) / best_in, len(data) / best_out
    breakeven = max(saved, 0) / (1 / rates[0] + 1 / rates[1])  # bytes a second
    return {
        "ratio": 1 / (1 - saved),
        "in_mb_s": rates[0] / 1e6,
        "out_mb_s": rates[1] / 1e6,
        "pays_below_gbit_s": breakeven * 8 / 1e9,
        **{f"time_at_{gbit}_gbit_s": (1 - saved) + gbit / 8e-9 * (1 / rates[0] + 1 / rates[1]) for gbit in GBITS},
    }


def planes(data: bytes, width: int) -> bytes:
    """First bytes of all elements, then all second ones, and so on."""
    return np.ascontiguousarray(np.frombuffer(data, np.uint8).reshape(-1, width).T).tobytes()


def elements(data: bytes, width: int) -> bytes:
    """The bytes that `planes` made `data` of."""
    joined = np.empty((len(data) // width, width), np.uint8)
    for i, plane in enumerate(np.frombuffer(data, np.uint8).reshape(width, -1)):
        joined[:, i] = plane  # many times faster than transposing
    return joined.tobytes()


def main(argv: Sequence[str] | None = None) -> int:
    """Measure. Answers the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.compression", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for steps in STEPS:
        for dtype, data in adapter_bytes(steps, ("bfloat16", "float32")).items():
            for name, codec in codecs().items():
                for width in (None, 2 if dtype == "bfloat16" else 4):
                    about = {"row": name + (", planes" if width else ""), "dtype": dtype, "steps": steps}
                    rows.append({**about, "ok": True, "bytes": len(data), **measure(data, codec, width)})
    best = max(
        (row for row in rows if row["steps"] == STEPS[-1] and row["dtype"] == "bfloat16"),
        key=lambda row: row["pays_below_gbit_s"],
    )
    headline = (
        f"bfloat16 adapter after {best['steps']} AdamW steps on {cpu_name()}: the codec that pays longest is "
        f"{best['row']}, ratio {best['ratio']:.2f}, {best['in_mb_s']:.0f} MB/s in and {best['out_mb_s']:.0f} MB/s out, "
        f"below {best['pays_below_gbit_s']:.2f} Gbit/s; at 1 Gbit/s a push takes {best['time_at_1_gbit_s']:.2f} of its "
        f"time without, at 10 Gbit/s {best['time_at_10_gbit_s']:.1f} times as long"
    )
    command = shlex.join(["python", "-m", "bench.compression", *(sys.argv[1:] if argv is None else argv)])
    document = {"headline": headline, "ok": True, "machine": machine([cpu_name()], command), "rows": rows}
    if options.json:
        options.json.write_text(json.dumps(document, indent=1))
    lines = [
        (
            row["dtype"],
            str(row["steps"]),
            row["row"],
            f"{row['ratio']:.3f}",
            f"{row['in_mb_s']:.0f}",
            f"{row['out_mb_s']:.0f}",
            f"{row['pays_below_gbit_s']:.2f}",
        )
        for row in rows
    ]
    print(aligned([COLUMNS, *lines], right={1, 3, 4, 5, 6}) + "\n\n" + headline)
    return 0


if __name__ == "__main__":
    sys.exit(main())
