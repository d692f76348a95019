"""What holds for all tests."""

from __future__ import annotations

import gc


def pytest_collection_finish() -> None:
    """Take what the imports left behind out of every later collection: the end of each training asks for one."""
    gc.collect()
    gc.freeze()
