"""What a push costs before it is known to be allowed."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from rollout_server.engine.sleep import Sleep
from rollout_server.installs.installer import Installer
from rollout_server.installs.slot_install import InstallContext
from rollout_server.runs.table import RunTable
from rollout_server.settings import ServerSettings
from shared.errors import LeaseMismatch, NoFreeRun


async def test_nothing_of_a_push_is_read_without_the_lease() -> None:
    runs = RunTable(2, 1)
    runs.open("r", "the lease", takeover=False)
    proxy = SimpleNamespace(capacity=None)
    context = InstallContext(proxy, SimpleNamespace(), runs, "boot")
    settings = ServerSettings()
    sleep = Sleep(proxy, SimpleNamespace(), enabled=False, level=1)
    installer = Installer(context, SimpleNamespace(), SimpleNamespace(), settings, sleep)

    async def body():
        pytest.fail("it was read")
        yield b""

    with pytest.raises(LeaseMismatch):
        await installer.push("r", "a stranger's lease", False, body())
    with pytest.raises(NoFreeRun):
        await installer.push("another", "a stranger's lease", False, body())
