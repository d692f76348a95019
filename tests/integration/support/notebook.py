"""Run the code cells of a notebook in order, as a kernel does: one namespace, `__main__`.

python -m tests.integration.support.notebook FILE.ipynb
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def run(path: Path, namespace: dict[str, Any]) -> None:
    """Execute all code cells; an error ends them, and its traceback names the cell."""
    for cell in json.loads(path.read_text())["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"{path.name}: {cell['id']}", "exec"), namespace)


if __name__ == "__main__":
    run(Path(sys.argv[1]), vars(sys.modules["__main__"]))
