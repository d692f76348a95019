"""Imported before large packages, whose import takes a fifth longer with the garbage collector."""

from __future__ import annotations

import gc

gc.disable()
