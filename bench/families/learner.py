"""`learner train` with the flags that follow OUT.json, which gets its summary and the memory that it needed.

python -m bench.families.learner OUT.json --model_name_or_path MODEL --rollout_url URL ...
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from learner.commands.train import parse, run

if __name__ == "__main__":
    summary = run(*parse(sys.argv[2:]))
    gib = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None
    known = {name: summary[name] for name in ("max_logprob_gap", "logprob_tolerance")}
    Path(sys.argv[1]).write_text(json.dumps({"learner_gib": gib, **known}))
