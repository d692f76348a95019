"""Trials of the proof of sync on a CPU in bfloat16: healthy trainings, servers behind or stuck, silent modules.

python -m tests.support.proof_trials --healthy 5 --steps 20    # 20 trainings: 4 kinds, 5 seeds
python -m tests.support.proof_trials --faulty 5                # 20 trainings: 2 kinds, 2 faults, 5 seeds
python -m tests.support.proof_trials --modules 203             # one silent module, and one silent layer, of so many
"""

from __future__ import annotations

import argparse
import re
import time

import torch

from learner.sync.canary import prove_modules
from shared.errors import InstallFailed
from tests.support.rounding_server import RATIOS, Pair


def healthy(seed: int, kind: str, steps: int) -> str:
    """Train with a server that serves what is pushed, a proof after every step; return how it ended."""
    quantized = kind == "quantized"
    pair = Pair(seed=seed, quantized=0.3 if quantized else 0.0)
    try:
        pair.begin(RATIOS[1e-5 if quantized else float(kind)])
        pair.train(1, steps)
    except InstallFailed as error:
        return f"ALARM: {error}"
    found = pair.proof.step_share
    return f"no alarm; share of the last step {found.value:.2f} ({found.error:.2f})" if found else "no alarm"


def faulty(seed: int, rate: float, fault: dict[str, int], most: int) -> str:
    """Train with a server that is behind or stuck; return the step after which it is named."""
    pair = Pair(seed=seed)
    pair.begin(RATIOS[rate])
    vars(pair.server).update(fault)
    for step in range(1, most + 1):
        try:
            pair.train(step, step)
        except InstallFailed as error:
            named = re.search(r"closest to those of (.*?)\. Restart", str(error))
            return f"step {step}: {named[1] if named else error}"
    return f"not within {most} steps"


def silent(modules: int) -> None:
    """Leave out one module, and one layer, of a model of `modules` modules."""
    pair = Pair(layers=modules // 7)
    names = pair.proof.weights.modules
    layer = modules // 14
    one = [name for name in names if f".{layer}.mlp.up_proj" in name]
    whole = [name for name in names if f".layers.{layer}." in name]
    for what, left_out in (("none", []), ("one module", one), ("one layer", whole)):
        pair.server.silent, started = frozenset(left_out), time.process_time()
        try:
            result = prove_modules(pair.proof, lambda step: pair.publisher.push(step).version)
            found = f"passes, slope {result.slope:.3f}, {result.proven} of {result.modules} modules proven one by one"
        except InstallFailed as error:
            found = str(error)
        pair.publisher.delete_run()
        pair.server.history.clear()
        print(f"silent: {what}: {found} [{time.process_time() - started:.0f} s of CPU]", flush=True)


def main() -> None:
    """Run the trials that are asked for, and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--healthy", type=int, default=0)
    parser.add_argument("--faulty", type=int, default=0)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--modules", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.modules:
        silent(args.modules)
    for seed in range(args.healthy):
        for kind in ("1e-6", "1e-5", "1e-4", "quantized"):
            print(f"healthy, {kind}, seed {seed}: {healthy(seed, kind, args.steps)}", flush=True)
    for seed in range(args.faulty):
        for rate, most in ((1e-5, 3), (1e-6, 20)):
            for fault in ({"behind": 1}, {"stuck_at": 0}):
                print(f"{fault}, {rate:g}, seed {seed}: {faulty(seed, rate, fault, most)}", flush=True)


if __name__ == "__main__":
    main()
