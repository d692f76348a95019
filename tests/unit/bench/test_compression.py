from __future__ import annotations

import os

import pytest

from bench.compression import codecs, elements, measure, planes


def test_planes_and_back() -> None:
    assert planes(b"aAbBcC", 2) == b"abcABC"
    assert elements(b"abcABC", 2) == b"aAbBcC"


@pytest.mark.parametrize("name", codecs())
@pytest.mark.parametrize("width", [None, 4])
def test_noise_never_pays_and_zeros_do(name: str, width: int | None) -> None:
    noise = measure(os.urandom(1 << 18), codecs()[name], width)
    zeros = measure(bytes(1 << 18), codecs()[name], width)
    assert noise["ratio"] < 1.01
    assert noise["pays_below_gbit_s"] < 0.02
    assert noise["time_at_1_gbit_s"] > 1
    assert zeros["ratio"] > 50
    assert zeros["pays_below_gbit_s"] > 0.1
    assert zeros["time_at_25_gbit_s"] > zeros["time_at_1_gbit_s"]
