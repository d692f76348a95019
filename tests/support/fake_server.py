"""A rollout server in this process: real schemas and pushes, a Hugging Face model instead of vLLM."""

from __future__ import annotations

import base64
import io
import json
import threading
from typing import Any

import httpx
import torch
from PIL import Image as Pillow
from safetensors.torch import load

from shared.adapter_file import LORA_A, LORA_B, header_length, parse_header
from shared.errors import BaseNotServed, LockstepError, StaleVersion, UnknownRun, VersionNotActive
from shared.images import Image, pixel_digest
from shared.rollouts import (
    Completion,
    GenerateRequest,
    GenerateResponse,
    RolloutGroup,
    ScoreRequest,
    ScoreResponse,
    VersionSpan,
)
from shared.weights import PushReceipt, RunState, ServerState, TrainingEnd, WeightVersion


class FakeServer:
    """A server behind an httpx transport. While asleep it takes only `/v1/wake` and pushes, which wake it.

    Attributes:
        transport: for a RolloutClient.
        processor: of a model that sees images.
        ignore_pushes: acknowledge pushes without using them.
        log_kept_mass: reported for every token where sampling truncates.
        naps: how often it fell asleep.
        finished: runs that were said to have ended, and not pushed to since.
    """

    def __init__(self, model: torch.nn.Module, state: ServerState, processor: Any = None) -> None:
        self.model, self.state, self.processor = model.eval(), state, processor
        self.base = {name: p.detach().clone() for name, p in model.named_parameters()}
        self.deltas: dict[str, dict[str, torch.Tensor]] = {}
        self.served: dict[str, tuple[WeightVersion, str]] = {}
        self.pushed: list[WeightVersion] = []
        self.generated: list[GenerateRequest] = []
        self.finished: dict[str, TrainingEnd] = {}
        self.ignore_pushes = False
        self.scale = 1.0
        self.log_kept_mass = -0.3
        self.naps = 0
        self.transport = httpx.MockTransport(self._handle)
        self.drawn = torch.Generator().manual_seed(0)  # not the training's random numbers
        self._lock = threading.Lock()

    def restart(self) -> None:
        """Forget everything, as a new process would."""
        self.deltas.clear()
        self.served.clear()
        self.state = self.state.model_copy(update={"epoch": self.state.epoch + "x"})

    def _handle(self, request: httpx.Request) -> httpx.Response:
        try:
            with self._lock:
                return self._route(request)
        except LockstepError as error:
            return httpx.Response(error.status, json=error.body().model_dump())

    def _route(self, request: httpx.Request) -> httpx.Response:
        method, path = request.method, request.url.path
        if path == "/ready":
            return httpx.Response(200)
        if path == "/v1/state":
            runs = [
                RunState(run_id=r, version=v, checksum=c, install_seq=1, slots=[], running_requests=0)
                for r, (v, c) in self.served.items()
            ]
            return _json(self.state.model_copy(update={"runs": runs}))
        if path in ("/v1/sleep", "/v1/wake"):
            return _json(self._turn(asleep=path == "/v1/sleep"))
        if method == "PUT":
            self._turn(asleep=False)
            return _json(self._push(path.split("/")[3], request))
        if path.endswith("/finish"):
            return _json(self._finish(path.split("/")[3], TrainingEnd.model_validate_json(request.content)))
        if method == "DELETE":
            if self.served.pop(path.split("/")[3], None) is None:
                raise UnknownRun("no such run")
            return httpx.Response(200, json={})
        assert not self.state.asleep, f"{path} would wait"
        body = json.loads(request.content)
        if path == "/v1/score":
            asked = ScoreRequest.model_validate(body)
            version = self._resolve(asked.policy, asked.run_id)
            images = asked.images or [[]] * len(asked.sequences)
            logprobs = [self._logprobs(*pair, version) for pair in zip(asked.sequences, images, strict=True)]
            digests = [[_digest(image) for image in own] for own in asked.images]
            return _json(
                ScoreResponse(epoch=self.state.epoch, version=version, logprobs=logprobs, image_digests=digests)
            )
        generate = GenerateRequest.model_validate(body)
        self.generated.append(generate)
        answer = self._generate(generate)
        if not generate.stream:
            return _json(answer)
        lines = [group.model_dump_json() for group in reversed(answer.groups)]  # in the order in which they finish
        return httpx.Response(200, content="\n".join([*lines, '{"done":true}']))

    def _turn(self, *, asleep: bool) -> ServerState:
        assert not asleep or self.state.shares_gpu
        self.naps += asleep and not self.state.asleep
        self.state = self.state.model_copy(update={"asleep": asleep})
        return self.state

    def _finish(self, run_id: str, ended: TrainingEnd) -> RunState:
        if run_id not in self.served:
            raise UnknownRun("no such run")
        version, checksum = self.served[run_id]
        if version != ended.version:
            raise VersionNotActive(f"serving {version}")
        self.finished[run_id] = ended
        seen: dict[str, Any] = {"install_seq": 1, "slots": [], "running_requests": 0}
        return RunState(run_id=run_id, version=version, checksum=checksum, finished=True, **seen)

    def _push(self, run_id: str, request: httpx.Request) -> PushReceipt:
        assert request.headers["Lockstep-Lease"]
        assert request.headers["content-length"]
        blob = request.content
        length = header_length(blob)
        header = parse_header(blob[8 : 8 + length])
        manifest = header.manifest
        if run_id in self.served and manifest.version < self.served[run_id][0]:
            raise StaleVersion(f"{manifest.version} is not after {self.served[run_id][0]}")
        tensors = load(blob)
        deltas = {
            name: tensors[name + LORA_B].float() @ tensors[name + LORA_A].float() * self.scale
            for name in manifest.modules
        }
        if not self.ignore_pushes or run_id not in self.served:
            self.deltas[run_id] = deltas
        self.served[run_id] = (manifest.version, manifest.checksum)
        self.finished.pop(run_id, None)
        self.pushed.append(manifest.version)
        return PushReceipt(
            epoch=self.state.epoch,
            version=manifest.version,
            install_seq=len(self.pushed),
            checksum=manifest.checksum,
            bytes=len(blob),
            workers=self.state.workers,
            modules=len(deltas),
            transfer_seconds=0.0,
            install_seconds=0.0,
            flip_seconds=0.0,
            wait_seconds=0.0,
        )

    def _resolve(self, policy: Any, run_id: str | None) -> WeightVersion | None:
        if policy == "base":
            if self.state.apply == "merge" and self.served:
                raise BaseNotServed("a run is merged")
            return None
        if policy == "latest":
            return self.served[run_id or next(iter(self.served))][0]
        if policy.run_id not in self.served:
            raise UnknownRun(f"no run {policy.run_id}")
        if self.served[policy.run_id][0] != policy:
            raise VersionNotActive(f"serving {self.served[policy.run_id][0]}")
        return policy

    @torch.no_grad()
    def _logprobs(self, sequence: list[int], images: list[Image], version: WeightVersion | None) -> list[float]:
        deltas = self.deltas[version.run_id] if version else {}
        for name, parameter in self.model.named_parameters():
            delta = deltas.get(name.removesuffix(".weight"))
            parameter.copy_(self.base[name] if delta is None else self.base[name] + delta)
        ids, seen = torch.tensor([sequence]), {}
        if images:
            seen = dict(self.processor.image_processor([[_picture(image) for image in images]], return_tensors="pt"))
            if "image_grid_thw" in seen:
                seen["mm_token_type_ids"] = (ids == self.processor.image_token_id).long()
        logits = self.model(input_ids=ids, **seen).logits[0, :-1].float()
        picked = torch.log_softmax(logits, -1).gather(-1, torch.tensor(sequence[1:])[:, None])
        return picked[:, 0].tolist()

    def _generate(self, request: GenerateRequest) -> GenerateResponse:
        version = self._resolve(request.policy, request.run_id)
        vocabulary, groups = self.model.config.get_text_config().vocab_size, []
        if self.processor:  # its specials come last
            vocabulary = self.processor.tokenizer.vocab_size
        for index, prompt in enumerate(request.prompts):
            ids = prompt.token_ids or [1, 2, 3]
            completions = []
            drawn = self.drawn if prompt.seed is None else torch.Generator().manual_seed(prompt.seed)
            for _ in range(request.sampling.n):
                length = int(torch.randint(1, (request.sampling.max_tokens or 4) + 1, (), generator=drawn))
                tokens = torch.randint(3, vocabulary, (length,), generator=drawn).tolist()
                logprobs = self._logprobs([*ids, *tokens], prompt.images, version)[-length:]
                spans = [VersionSpan(version=version, start=0, end=length)]
                kept = [self.log_kept_mass] * length if request.sampling.truncates else None
                if kept is not None:
                    logprobs = [logprob - self.log_kept_mass for logprob in logprobs]
                completions.append(
                    Completion(
                        token_ids=tokens,
                        logprobs=logprobs,
                        log_kept_mass=kept,
                        finish_reason="length",
                        spans=spans,
                        text="7",
                    )
                )
            digests = [_digest(image) for image in prompt.images]
            groups.append(
                RolloutGroup(prompt_index=index, prompt_token_ids=ids, image_digests=digests, completions=completions)
            )
        return GenerateResponse(epoch=self.state.epoch, groups=groups)


def _picture(image: Image) -> Pillow.Image:
    return Pillow.open(io.BytesIO(base64.b64decode(image.data)))


def _digest(image: Image) -> str:
    picture = _picture(image)
    return pixel_digest(*picture.size, picture.tobytes())


def _json(model: Any) -> httpx.Response:
    return httpx.Response(200, content=model.model_dump_json(), headers={"content-type": "application/json"})
