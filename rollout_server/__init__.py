"""The process on the rollout GPU: vLLM behind HTTP, serving a policy while it is being trained."""

import sys
from pathlib import Path

# Ours lies beside this package, whatever is called `shared` in the working directory.
sys.path.insert(0, _beside := str(Path(__file__).parents[1]))
import shared  # noqa: F401

sys.path.remove(_beside)
