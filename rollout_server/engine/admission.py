"""Binding of a request to one slot, and the version of each of its tokens."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractContextManager, aclosing
from typing import Any, Literal

from rollout_server.runs.slots import Recall, Run, Slot
from rollout_server.vllm_compat import versions
from shared.errors import EngineDead, InvalidRequest, Overloaded
from shared.messages import one_line
from shared.rollouts import VersionSpan
from shared.weights import WeightVersion

KV = Literal["fresh", "carried"]
#: Tokens so far of every output under way, by request id and output index; an output that is missing has ended.
OutputTokens = dict[tuple[str, int], int]


class Admission(AbstractContextManager["Admission"]):
    """A request bound to one slot, from which all its tokens are sampled, however long it runs.

    It holds its slot from the moment it exists until `release`, so that no push can refill the slot in between. Unless
    a push moves running requests to its own version, one slot is also one version.

    Args:
        engine: vLLM's AsyncLLM.
        on_output: called at every output of the engine.
    """

    def __init__(self, engine: Any, run: Run | None, slot: Slot | None, on_output: Callable[[], None]) -> None:
        self._engine, self._run, self._slot, self._on_output = engine, run, slot, on_output
        self.version: WeightVersion | None = slot.version if slot else None
        self._submitted: dict[str, WeightVersion | None] = {}
        self._moves: defaultdict[str, list[tuple[OutputTokens, WeightVersion, KV]]] = defaultdict(list)
        if run and slot:
            run.acquire(slot, self)

    @property
    def moved(self) -> bool:
        """Whether any of its requests lived through a push."""
        return bool(self._moves)

    def release(self) -> None:
        """Release the slot; calling it again does nothing."""
        run, self._run = self._run, None
        if run and self._slot:
            run.release(self._slot, self)

    async def settled(self) -> None:
        """Wait until no push is moving running requests."""
        if self._run is not None:
            await self._run.not_moving.wait()

    def __exit__(self, *exc: object) -> None:
        self.release()

    def move(self, tokens: OutputTokens, version: WeightVersion, kv: KV) -> None:
        """Sample from `version` from now on; `tokens` is the state at the push."""
        self.version = version
        for request_id in self._submitted:
            self._moves[request_id].append((tokens, version, kv))

    def spans(self, request_id: str, index: int, tokens: int) -> list[VersionSpan]:
        """Return the spans of a finished output of `tokens` tokens; without a push in between, one."""
        version, start, kv = self._submitted[request_id], 0, "fresh"
        spans = []
        for tokens_before, next_version, next_kv in self._moves.get(request_id, ()):
            end = tokens_before.get((request_id, index))
            if end is None:  # it had ended
                break
            if end > start:
                spans.append(VersionSpan(version=version, start=start, end=end, kv=kv))
            version, start, kv = next_version, end, next_kv
        if tokens > start:
            spans.append(VersionSpan(version=version, start=start, end=tokens, kv=kv))
        return spans

    async def generate(
        self, prompt: Any, sampling_params: Any, request_id: str, **kwargs: Any
    ) -> AsyncGenerator[Any, None]:
        """Generate on this version with vLLM. `prompt`: one of vLLM's prompt dicts.

        Raises:
            LockstepError: `invalid_request`, `overloaded`, `engine_dead`.
        """
        import msgspec  # vLLM's

        try:  # vLLM would keep the request's state for ever if it could not send it to its engine
            msgspec.msgpack.encode((sampling_params, request_id), enc_hook=repr)
        except OverflowError as error:
            raise InvalidRequest(f"a sampling parameter has over 64 bits: {error}") from error
        except UnicodeEncodeError as error:
            raise InvalidRequest(f"half a character in a sampling parameter or the request's id: {error}") from error
        _check_seeds(sampling_params)
        allowed_ids = getattr(sampling_params, "allowed_token_ids", None)
        allowed = None if allowed_ids is None else frozenset(allowed_ids)
        await self.settled()
        if self._run is not None and self._slot is not None:
            if not isinstance(prompt, dict):
                raise TypeError(f"the policy is reached with vLLM's prompt dicts, got {type(prompt).__name__}")
            salt, own = self._slot.salt, prompt.get("cache_salt")
            prompt = {**prompt, "cache_salt": f"{salt}:{own}" if own else salt}
            if self._slot.slot_id:
                # Name and id of a slot never change; the salt tells installs apart.
                kwargs["lora_request"] = versions.lora_request(f"slot-{self._slot.slot_id}", self._slot.slot_id)
        self._submitted[request_id] = self._slot.version if self._slot else None
        begun = False
        async with aclosing(self._engine.generate(prompt, sampling_params, request_id, **kwargs)) as stream:
            try:
                async for output in stream:
                    begun = True
                    self._on_output()
                    if any(completion.finish_reason == "error" for completion in output.outputs):
                        raise InvalidRequest(
                            "the engine gave a completion up: nothing that its structured_outputs ask for may be "
                            "sampled; they contradict the other sampling parameters"
                        )
                    if allowed is not None and not all(allowed.issuperset(each.token_ids) for each in output.outputs):
                        raise InvalidRequest(
                            "none of allowed_token_ids could be sampled: other sampling parameters exclude all of them "
                            "(bad_words; min_tokens, which holds tokens back that end a completion; "
                            "structured_outputs, whose end is a token, too); allow more, or leave those out"
                        )
                    yield output
            except versions.engine_dead_error() as error:
                raise EngineDead(
                    "the engine died while this request was running; ask a server that is ready"
                ) from error
            except versions.overload_errors() as error:
                raise overloaded(error) from error
            except Exception as error:
                # An engine that is dead has refused nothing, whatever its last error was.
                if begun or self._engine.errored or (reason := versions.refused(error)) is None:
                    raise
                raise InvalidRequest(one_line(reason)) from error


def overloaded(error: Exception) -> Overloaded:
    """Return our error for one of `versions.overload_errors`."""
    return Overloaded(f"{error} Its limits are --max-num-queued-reqs and --max-num-queued-tokens")


def _check_seeds(sampling_params: Any) -> None:
    """Refuse a seed from which one of n completions would get -1, which is none to vLLM."""
    seed, n = getattr(sampling_params, "seed", None), getattr(sampling_params, "n", 1)
    if seed is not None and seed < -1 < seed + n:
        raise InvalidRequest(
            f"seed={seed} with n={n}: completion i is drawn with seed + i, and -1 is no seed; send one that is not "
            "negative"
        )


class SessionHold:
    """A version that all calls of a session sample from: its slot is not refilled until `release`.

    A push that moves running requests to its own version moves the session, too. With `--apply merge` the weights of
    the one slot change in place: `version` is then no longer that of the slot.

    Args:
        on_recall: called when the run ends, its learner has started again, or a push needs the slot.
    """

    def __init__(self, run: Run, slot: Slot, on_recall: Callable[[Recall], None]) -> None:
        self.run, self.slot, self._on_recall = run, slot, on_recall
        self.version = slot.version
        self._held = True
        run.acquire_for_session(slot, self)

    def move(self, tokens: OutputTokens, version: WeightVersion, kv: KV) -> None:
        """Sample from `version` from now on."""
        self.version = version

    def recall(self, reason: Recall) -> None:
        """Tell the session to end."""
        self._on_recall(reason)

    def release(self) -> None:
        """Release the slot; calling it again does nothing."""
        if self._held:
            self._held = False
            self.run.release_by_session(self.slot, self)
