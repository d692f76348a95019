"""Serve a stored adapter temporarily, in a run of its own beside any training."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Iterator
from pathlib import Path

from learner.adapters.stored import StoredAdapter
from learner.servers.client import RolloutClient
from shared.adapter_file import LORA_A, LORA_B, Layout, lay_out
from shared.checksum import block_sums, block_weights, checksum
from shared.errors import LockstepError, NoFreeRun
from shared.fingerprint import fingerprint_checkpoint
from shared.weights import AdapterManifest, WeightVersion


@contextlib.contextmanager
def temporary_run(client: RolloutClient, adapter: StoredAdapter) -> Iterator[WeightVersion]:
    """Push `adapter` into a new run of the server, which ends with the block. Yield its version.

    It takes no finished run's place: an evaluation must not end what others may want to ask.

    Raises `no_free_run` if the server has no free place, and the server's other errors.
    """
    version = WeightVersion(run_id=f"eval-{secrets.token_hex(4)}", step=adapter.step or 0)
    lease = secrets.token_hex(16)
    state = client.state()
    no_room = NoFreeRun(
        f"the server at {client.url} has no room for {adapter.folder} beside the runs that it serves: start it with "
        f"--max-runs {state.max_runs + 1}, or end one (`learner runs --rollout-url {client.url} --end RUN_ID`)"
    )
    if len(state.runs) >= state.max_runs:
        raise no_room
    pieces = adapter_blob(adapter, version, state.lora_dtype)
    try:
        try:
            client.push(version.run_id, pieces, lease)
        except NoFreeRun as error:
            raise no_room from error
        yield version
    finally:
        with contextlib.suppress(LockstepError):  # the error of the block says more
            client.delete_run(version.run_id, lease)


def adapter_blob(adapter: StoredAdapter, version: WeightVersion, dtype: str) -> list[bytes | memoryview]:
    """Return the body of a push, as `learner.adapters.exporter` makes it from a model with this adapter."""
    import torch  # `learner eval` of served policies does without

    shapes: dict[str, tuple[int, ...]] = {}
    parts: list[torch.Tensor] = []
    for name, module in adapter.modules.items():
        a_RI, b_OR = adapter.pair(name)
        shapes |= {name + LORA_A: tuple(a_RI.shape), name + LORA_B: tuple(b_OR.shape)}
        parts += [tensor.to(getattr(torch, dtype)).flatten() for tensor in (a_RI, b_OR * module.scaling)]
    # The fingerprint of its base is in its run's summary; else it comes from the base itself, if that is on disk.
    base, base_weights = adapter.config.get("base_model_name_or_path"), adapter.run.get("base_weights")
    if base_weights is None and base and Path(base).is_dir():
        base_weights = fingerprint_checkpoint(base).weights
    flat, layout = torch.cat(parts), Layout(lay_out(shapes, dtype))
    elements = flat.view(torch.int32 if flat.element_size() == 4 else torch.int16)
    sums = torch.cat(list(block_sums(elements, torch.from_numpy(block_weights()))))
    manifest = AdapterManifest(
        version=version,
        base_weights=base_weights,
        dtype=dtype,
        modules=adapter.modules,
        peft_config=adapter.config,
        checksum=checksum(layout.index, sums.numpy().tobytes()),
    )
    return [layout.header(manifest), memoryview(flat.view(torch.uint8).numpy())]
