"""Sampling with vLLM, in this process or from a server, with the policy's weights handed over when they change."""

from __future__ import annotations

import json
import os
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.client import HTTPException
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar
from urllib import error, request

import numpy as np

from rlzoo.config import Sampling
from rlzoo.errors import UserError
from rlzoo.jobs.ranks import barrier, gathered, is_main, shared, world_size
from rlzoo.policy import Policy
from rlzoo.policy.adapters import merged
from rlzoo.policy.loading import EMBEDDED, save_policy, trusts_remote_code
from rlzoo.rollout.sampler import Sample, Sampler, register_sampler, text_of
from rlzoo.worlds import EMBEDDED_BASE

ENGINE_BATCHES = 16
"""Batches of prompts per call of an engine, which forms its own batches."""
AT_A_TIME = 64
"""Concurrent requests to a server, which forms its own batches."""
TIMEOUT = 3600.0
"""Timeout of requests in seconds."""

Prompts = Sequence[Sequence[int]]
Asked = Sequence[Mapping[str, Any]]
"""The sampling parameters of each prompt: see `_asked`."""
Progress = Callable[[int], None]


class _Handed:
    """The weights that an engine holds: of which model, at which version."""

    def __init__(self) -> None:
        self._model: weakref.ref[Any] | None = None
        self._version = -1

    def holds(self, policy: Policy) -> bool:
        """Whether the engine has the policy's current weights; the same on all processes."""
        same = self._model is not None and self._model() is policy.model  # an id could be that of an old model
        return all(gathered(same and self._version == policy.weights_version))

    def forget(self) -> None:
        """Count the engine's weights as unknown."""
        self._model = None

    @contextmanager
    def taking(self, policy: Policy) -> Iterator[None]:
        """The context of handing over weights; if that fails, the engine's weights count as unknown."""
        self.forget()
        yield
        self._model, self._version = weakref.ref(policy.model), policy.weights_version


_engines: dict[str, tuple[Any, _Handed]] = {}
"""Engines of this process by model and options: one takes most of a minute to start."""
_servers: dict[str, _Handed] = {}
"""The weights of servers by URL: several samplers of this process may use one in turn."""


class _VLLM(Sampler):
    """The base of both samplers: weights are handed over when they have changed. Every prompt has its own seed."""

    name: ClassVar[str] = "vllm"
    gives_logp: ClassVar[bool] = True
    policy: Policy
    handed: _Handed

    def portion(self, settings: Sampling) -> int:
        """Enough prompts to keep the engine busy."""
        return super().portion(settings) * ENGINE_BATCHES

    def sample(
        self,
        prompts: Prompts,
        settings: Sampling,
        seed: int,
        greedy: bool = False,
        progress: Progress | None = None,
        numbers: Sequence[int] | None = None,
    ) -> list[list[Sample]]:
        if not self.handed.holds(self.policy):
            with self.handed.taking(self.policy):
                self._hand_over()
        streams = range(len(prompts)) if numbers is None else numbers
        asked = [_asked(self.policy, settings, seed, number, greedy) for number in streams]
        return self._completed(prompts, asked, progress or (lambda done: None))

    def _hand_over(self) -> None:
        """Give the engine the policy's weights."""
        raise NotImplementedError(f"{type(self).__name__} must define _hand_over()")

    def _completed(self, prompts: Prompts, asked: Asked, progress: Progress) -> list[list[Sample]]:
        """The samples of each prompt, for which this is ``asked``."""
        raise NotImplementedError(f"{type(self).__name__} must define _completed(prompts, asked, progress)")


class VLLMServerSampler(_VLLM):
    """Samples from a server that ``vllm serve`` started, by its URL.

    Weights are handed over through a folder that both can read, which needs VLLM_SERVER_DEV_MODE=1 in the server's
    environment. Its log-probs are at T = 1 unless it was started with ``--logprobs-mode processed_logprobs``, so
    samples have them only at T = 1 and top-p = 1. Raises UserError if the server cannot be reached or refuses.
    """

    def __init__(self, policy: Policy, url: str) -> None:
        self.policy, self.url = policy, url.rstrip("/")
        if not self.url.startswith(("http://", "https://")):
            raise UserError(f"url {url!r} of a vLLM server: it starts with http:// or https://")
        models = self._ask("/v1/models")
        try:
            self.model = str(models["data"][0]["id"])
        except (KeyError, IndexError, TypeError):
            raise self._no_server() from None
        self.handed = _servers.setdefault(self.url, _Handed())
        self.handed.forget()  # it may have been restarted since its last use

    def _completed(self, prompts: Prompts, asked: Asked, progress: Progress) -> list[list[Sample]]:
        def one(place: int) -> list[Sample]:
            some = asked[place]
            content = {"model": self.model, "prompt": list(prompts[place]), "logprobs": 0, "return_token_ids": True}
            found = self._ask("/v1/completions", {**content, **some})
            progress(1)
            own = (some["temperature"], some["top_p"]) == (1.0, 1.0)
            return [
                _sample(
                    self.policy,
                    choice["token_ids"],
                    choice["logprobs"]["token_logprobs"] if own else None,
                )
                for choice in sorted(found["choices"], key=lambda choice: choice["index"])
            ]

        def several(places: list[int]) -> list[list[Sample]]:
            with ThreadPoolExecutor(AT_A_TIME) as threads:
                return list(threads.map(one, places))

        return shared(prompts, several, self.policy)

    def _hand_over(self) -> None:
        with tempfile.TemporaryDirectory(prefix="rlzoo-weights-") as folder:
            Path(folder).chmod(0o755)  # the server may be another user's
            save_policy(self.policy, Path(folder))  # the main process writes
            if is_main():
                self._ask("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": folder}})
                self._ask("/reset_prefix_cache", {})
        barrier()

    def _no_server(self) -> UserError:
        return UserError(f"the server at {self.url} is not a vLLM server")

    def _ask(self, path: str, content: Mapping[str, Any] | None = None) -> Any:
        data = None if content is None else json.dumps(content).encode()
        question = request.Request(self.url + path, data, {"Content-Type": "application/json"})
        try:
            with request.urlopen(question, timeout=TIMEOUT) as answer:
                text = answer.read()
            return json.loads(text) if text.strip() else None
        except error.HTTPError as wrong:
            fix = ""
            if wrong.code == 404 and path in ("/collective_rpc", "/reset_prefix_cache"):
                fix = ": start it with VLLM_SERVER_DEV_MODE=1 in its environment, so that it accepts weights"
            said = wrong.read().decode(errors="replace").strip()[:200]
            raise UserError(
                f"the vLLM server at {self.url} answered {wrong.code} to {path}{fix or f': {said}'}"
            ) from None
        except ValueError:  # for an answer that is not JSON
            raise self._no_server() from None
        except (OSError, HTTPException) as wrong:
            reason = getattr(wrong, "reason", wrong)
            raise UserError(f"the vLLM server at {self.url} cannot be reached ({reason}): is it running?") from None


@register_sampler
class VLLMSampler(_VLLM):
    """Samples with a vLLM engine in this process (colocated). Raises UserError if vLLM is not installed.

    ``options`` go to ``vllm.LLM``. Log-probs are those of the distribution that is sampled from, with temperature and
    top-p applied.
    """

    of_server: ClassVar[type[Sampler] | None] = VLLMServerSampler

    def __init__(self, policy: Policy, **options: Any) -> None:
        if find_spec("vllm") is None:
            raise UserError("engine vllm is not installed: pip install 'rlzoo[vllm]', or give the url of a server")
        if world_size() > 1:
            raise UserError(
                "a distributed run cannot hold a vLLM engine in each process: start a server, and give its url"
            )
        if policy.device.index:
            raise UserError(
                f"the policy is on {policy.device}, and vLLM's engine takes the first GPU that this process sees: "
                f"start it with CUDA_VISIBLE_DEVICES={policy.device.index}, so that they share one"
            )
        self.policy = policy
        where = str(EMBEDDED_BASE) if policy.name == EMBEDDED else policy.name
        key = json.dumps([where, _dtype(policy), options], sort_keys=True, default=str)
        if key not in _engines:
            _engines[key] = (_start(where, policy, options), _Handed())
        self.engine, self.handed = _engines[key]

    def _hand_over(self) -> None:
        weights = merged(self.policy.model, dict(self.policy.model.state_dict()))
        self.engine.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights.items())})
        self.engine.reset_prefix_cache()

    def _completed(self, prompts: Prompts, asked: Asked, progress: Progress) -> list[list[Sample]]:
        from vllm import SamplingParams

        try:
            found = self.engine.generate(
                [{"prompt_token_ids": list(prompt)} for prompt in prompts],
                [SamplingParams(**some, logprobs=0, detokenize=False) for some in asked],
                use_tqdm=False,
            )
        except ValueError as error:  # for a prompt longer than its max_model_len, say
            raise UserError(f"vLLM refuses prompts of up to {max(map(len, prompts))} tokens ({error!s:.200})") from None
        progress(len(prompts))
        return [
            [
                _sample(
                    self.policy,
                    list(one.token_ids),
                    [step[token].logprob for step, token in zip(one.logprobs, one.token_ids, strict=True)],
                )
                for one in row.outputs
            ]
            for row in found
        ]


def _dtype(policy: Policy) -> str:
    """What the engine computes in: what the policy multiplies matrices in."""
    return str(policy.compute or policy.model.dtype).removeprefix("torch.")


def _start(where: str, policy: Policy, options: Mapping[str, Any]) -> Any:
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # weights pass from model to model, not through a pipe
    os.environ.setdefault("VLLM_CONFIGURE_LOGGING", "0")
    from vllm import LLM

    settings: dict[str, Any] = {
        "dtype": _dtype(policy),
        "logprobs_mode": "processed_logprobs",
        "gpu_memory_utilization": 0.3,  # the rest is for training
        "trust_remote_code": trusts_remote_code(),
        **options,
    }
    if policy.device.type == "cpu":
        settings.setdefault("enforce_eager", True)  # compilation takes longer than it saves there
        settings.setdefault("enable_chunked_prefill", False)  # there, a prompt in two chunks cannot have a seed
    return LLM(where, **settings)


def _asked(policy: Policy, settings: Sampling, seed: int, number: int, greedy: bool) -> dict[str, Any]:
    """The sampling parameters of vLLM, for both kinds of engine."""
    return {
        "n": 1 if greedy else settings.samples,
        "temperature": 0.0 if greedy else settings.temperature,
        "top_p": 1.0 if greedy else settings.top_p,
        "top_k": -1,  # not the checkpoint's default
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "max_tokens": settings.max_new_tokens,
        "seed": int(np.random.SeedSequence([seed, number]).generate_state(1)[0] >> 1),
        "stop_token_ids": sorted(policy.eos_ids),
    }


def _sample(policy: Policy, ids: list[int], logp: list[float] | None) -> Sample:
    return Sample(ids, text_of(policy, ids), truncated=not (ids and ids[-1] in policy.eos_ids), logp=logp)
