from __future__ import annotations

import pytest

from tests.unit.rollout_server.sessions.conversing import Served


@pytest.fixture
async def served() -> Served:
    made = Served()
    await made.flip(0)
    return made
