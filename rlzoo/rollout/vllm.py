"""Sampling with vLLM, in this process or on a server, whose weights are updated when the policy's change."""

from __future__ import annotations

import json
import os
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from http.client import HTTPException
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar
from urllib import error, request

import numpy as np
import torch

from rlzoo.config import Sampling
from rlzoo.errors import UserError
from rlzoo.jobs.ranks import barrier, gathered, is_main, on_leaving, shared, world_size
from rlzoo.policy import Policy
from rlzoo.policy.adapters import merged
from rlzoo.policy.loading import EMBEDDED, save_policy, trusts_remote_code
from rlzoo.policy.sharding import whole_weights
from rlzoo.rollout.sampler import Sample, Sampler, register_sampler, room_after, text_of
from rlzoo.worlds import EMBEDDED_BASE

ENGINE_BATCHES = 16
"""The number of batches of prompts per call of an engine, which forms its own batches."""
AT_A_TIME = 64
"""The number of concurrent requests to a server, which forms its own batches."""
TIMEOUT = 3600.0
"""Timeout of requests in seconds."""

Prompts = Sequence[Sequence[int]]
Asked = Sequence[Mapping[str, Any]]
"""vLLM's sampling parameters for each prompt: see `_asked`."""
Progress = Callable[[int], None]


class _Handed:
    """Which model's weights an engine holds, at which version."""

    def __init__(self) -> None:
        self._model: weakref.ref[Any] | None = None
        self._version = -1

    def holds(self, policy: Policy) -> bool:
        """Whether the engine has the policy's current weights; the same on all processes."""
        same = self._model is not None and self._model() is policy.model  # ids are reused
        return all(gathered(same and self._version == policy.weights_version))

    def forget(self) -> None:
        """Mark the engine's weights as unknown."""
        self._model = None

    @contextmanager
    def taking(self, policy: Policy) -> Iterator[None]:
        """In this context, the engine gets the policy's weights; if it fails, they are marked as unknown."""
        self.forget()
        yield
        self._model, self._version = weakref.ref(policy.model), policy.weights_version


@dataclass
class _Engine:
    """An engine in this process, and its state."""

    llm: Any
    handed: _Handed
    sleeps: bool
    """Whether it can free its memory while it is not needed (vLLM's sleep mode)."""
    asleep: set[str] = field(default_factory=set)
    """The memory that it has freed: ``weights``, ``kv_cache``."""


_engines: dict[str, _Engine] = {}
"""Engines of this process by configuration and options, for reuse: starting one takes most of a minute."""
_servers: dict[str, _Handed] = {}
"""The weights of servers by URL, because several samplers of this process may use a server in turn."""


class _VLLM(Sampler):
    """The base of both samplers: changed weights are sent before sampling, and every prompt has its own seed."""

    name: ClassVar[str] = "vllm"
    gives_logp: ClassVar[bool] = True
    bound_by_context: ClassVar[bool] = True
    policy: Policy

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
        self._take_weights()
        streams = range(len(prompts)) if numbers is None else numbers
        rooms = [room_after(self.policy, len(prompt), settings) for prompt in prompts]
        asked = [_asked(self.policy, settings, seed, n, greedy, room) for n, room in zip(streams, rooms, strict=True)]
        return self._completed(prompts, asked, progress or (lambda done: None))

    def _take_weights(self) -> None:
        """Make the engine or the servers use the policy's current weights."""
        raise NotImplementedError(f"{type(self).__name__} must define _take_weights()")

    def _completed(self, prompts: Prompts, asked: Asked, progress: Progress) -> list[list[Sample]]:
        """The samples of each prompt with the sampling parameters ``asked``."""
        raise NotImplementedError(f"{type(self).__name__} must define _completed(prompts, asked, progress)")


class VLLMServerSampler(_VLLM):
    """Samples on one or several servers started with ``vllm serve``, which share the prompts.

    Weights are sent through a folder that all servers can read, which needs VLLM_SERVER_DEV_MODE=1 in a server's
    environment. Samples have log-probs only at temperature 1 and top-p 1, because a server reports those of the
    unmodified distribution unless it runs with ``--logprobs-mode processed_logprobs``. Raises UserError if a server
    cannot be reached or rejects a request.
    """

    def __init__(self, policy: Policy, url: str | Sequence[str]) -> None:
        self.policy = policy
        self.servers = [_Server(one) for one in ([url] if isinstance(url, str) else url)]

    def _completed(self, prompts: Prompts, asked: Asked, progress: Progress) -> list[list[Sample]]:
        def one(place: int) -> list[Sample]:
            found = self.servers[place % len(self.servers)].complete(prompts[place], asked[place])
            progress(1)
            own = (asked[place]["temperature"], asked[place]["top_p"]) == (1.0, 1.0)
            return [_sample(self.policy, ids, logp if own else None) for ids, logp in found]

        def several(places: list[int]) -> list[list[Sample]]:
            made = []
            with ThreadPoolExecutor(AT_A_TIME * len(self.servers)) as threads:
                try:
                    for place, samples in zip(places, threads.map(one, places), strict=True):
                        self.finished(place, samples)
                        made.append(samples)
                except BaseException:
                    threads.shutdown(wait=False, cancel_futures=True)
                    raise
            return made

        return shared(prompts, several)

    def _take_weights(self) -> None:
        lacking = [server for server in self.servers if not server.handed.holds(self.policy)]
        if not lacking:
            return
        with ExitStack() as stack:
            for server in lacking:
                stack.enter_context(server.handed.taking(self.policy))
            folder = Path(stack.enter_context(_saved(self.policy)))
            if is_main():
                for server in lacking:
                    server.take(folder)
            barrier()


class _Server:
    """A vLLM server, by its URL."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        if not self.url.startswith(("http://", "https://")):
            raise UserError(f"url {url!r} of a vLLM server must start with http:// or https://")
        models = self._ask("/v1/models")
        try:
            self.model = str(models["data"][0]["id"])
        except (KeyError, IndexError, TypeError):
            raise self._no_server() from None
        self.handed = _servers.setdefault(self.url, _Handed())
        self.handed.forget()  # it may have been restarted since its last use

    def complete(self, prompt: Sequence[int], asked: Mapping[str, Any]) -> list[tuple[list[int], list[float]]]:
        """The tokens and log-probs of each completion of a prompt."""
        content = {"model": self.model, "prompt": list(prompt), "logprobs": 0, "return_token_ids": True}
        choices = self._ask("/v1/completions", {**content, **asked})["choices"]
        ordered = sorted(choices, key=lambda choice: choice["index"])
        return [(choice["token_ids"], choice["logprobs"]["token_logprobs"]) for choice in ordered]

    def take(self, folder: Path) -> None:
        """Make the server load the weights in a folder."""
        self._ask("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}})
        self._ask("/reset_prefix_cache", {})

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
            told = wrong.read().decode(errors="replace").strip()[:200]
            if wrong.code == 404 and path in ("/collective_rpc", "/reset_prefix_cache"):
                told = "start it with VLLM_SERVER_DEV_MODE=1 in its environment, so that it accepts weights"
            raise UserError(f"the vLLM server at {self.url} answered {wrong.code} to {path}: {told}") from None
        except ValueError:  # for an answer that is not JSON
            raise self._no_server() from None
        except (OSError, HTTPException) as wrong:
            reason = getattr(wrong, "reason", wrong)
            raise UserError(f"the vLLM server at {self.url} cannot be reached ({reason}): is it running?") from None


@contextmanager
def _saved(policy: Policy) -> Iterator[str]:
    """A temporary folder with the policy's weights, written by the main process, for another process to read."""
    with tempfile.TemporaryDirectory(prefix="rlzoo-weights-") as folder:
        Path(folder).chmod(0o755)  # the server may be another user's
        save_policy(policy, Path(folder))
        yield folder


@register_sampler
class VLLMSampler(_VLLM):
    """Samples with a vLLM engine in this process (colocated).

    ``options`` are passed to ``vllm.LLM``. Log-probs are those of the distribution that is sampled from. Raises
    UserError if vLLM is not installed, or cannot start with these options.
    """

    of_server: ClassVar[type[Sampler] | None] = VLLMServerSampler

    @classmethod
    def check_installed(cls) -> None:
        if find_spec("vllm") is None:
            raise UserError("engine vllm is not installed: pip install 'rlzoo[vllm]', or give the url of a server")

    def __init__(self, policy: Policy, **options: Any) -> None:
        self.check_installed()
        self.policy, self.together = policy, _parallel(policy, options)
        key = json.dumps([_shape(policy), _dtype(policy), sorted(policy.eos_ids), options], sort_keys=True, default=str)
        if key not in _engines:
            taken = any(engine.sleeps for engine in _engines.values())  # only one engine per process can sleep
            sleeps = bool(options.get("enable_sleep_mode", not taken and _may_sleep(policy)))
            _engines[key] = _Engine(_start(policy, options, sleeps), _Handed(), sleeps)
            if world_size() > 1:
                on_leaving(_engines[key].llm.llm_engine.engine_core.shutdown)
        self._engine = _engines[key]

    @property
    def engine(self) -> Any:
        """The ``vllm.LLM``."""
        return self._engine.llm

    def rest(self) -> None:
        """Free the engine's memory. The next call sends the weights again, unless they are on several GPUs."""
        if self._engine.sleeps and not self._engine.asleep:
            self.engine.sleep(level=1 if self._is_elsewhere else 2)
            self._engine.asleep = {"weights", "kv_cache"}
            if not self._is_elsewhere:
                self._engine.handed.forget()

    @property
    def _is_elsewhere(self) -> bool:
        """Whether the engine's model is in other processes, to which tensors cannot be passed directly."""
        return self.together > 1 and world_size() == 1

    def _take_weights(self) -> None:
        self._wake("weights")
        if not self._engine.handed.holds(self.policy):
            with self._engine.handed.taking(self.policy):
                self._hand_over()
            self._wake("kv_cache")
            self.engine.reset_prefix_cache()
        self._wake("kv_cache")

    def _wake(self, what: str) -> None:
        if what in self._engine.asleep:
            self.engine.wake_up(tags=[what])
            self._engine.asleep.remove(what)

    def _hand_over(self) -> None:
        if self._is_elsewhere:
            with _saved(self.policy) as folder:
                self.engine.collective_rpc("reload_weights", kwargs={"weights_path": folder})
            return
        weights = merged(self.policy.model, whole_weights(self.policy.model))
        self.engine.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights.items())})

    def _completed(self, prompts: Prompts, asked: Asked, progress: Progress) -> list[list[Sample]]:
        from vllm import SamplingParams

        def own(places: list[int]) -> list[list[Sample]]:
            if not places:
                return []
            try:
                found = self.engine.generate(
                    [{"prompt_token_ids": list(prompts[place])} for place in places],
                    [SamplingParams(**asked[place], logprobs=0, detokenize=False) for place in places],
                    use_tqdm=False,
                )
            except ValueError as error:  # for a prompt longer than max_model_len, for instance
                longest = max(len(prompts[place]) for place in places)
                raise UserError(f"vLLM rejects prompts of up to {longest} tokens ({error!s:.200})") from None
            progress(len(places))
            return [[_of_output(self.policy, one) for one in row.outputs] for row in found]

        return shared(prompts, own, together=self.together)


def _dtype(policy: Policy) -> str:
    """The engine's dtype: that of the policy's matrix products."""
    return str(policy.compute or policy.model.dtype).removeprefix("torch.")


def _shape(policy: Policy) -> dict[str, Any]:
    """The model's configuration. Policies with the same one share an engine, which loads their weights in turn."""
    own = ("_name_or_path", "dtype", "torch_dtype", "transformers_version")
    return {name: value for name, value in policy.model.config.to_dict().items() if name not in own}


def _parallel(policy: Policy, options: Mapping[str, Any]) -> int:
    """The number of GPUs per engine; in a distributed run, each belongs to one of the run's processes.

    Raises UserError for a number that the run or the process does not have, and for a policy on another GPU.
    """
    together, size = int(options.get("tensor_parallel_size", 1)), world_size()
    if size > 1:
        if size % together:
            fix = f"give a number that divides the {size} processes of this run, each of which has one GPU"
            raise UserError(f"engine_options.tensor_parallel_size = {together}: {fix}")
    elif policy.device.index:
        raise UserError(
            f"the policy is on {policy.device}, but vLLM's engine uses the first visible GPU: start rlzoo with "
            f"CUDA_VISIBLE_DEVICES={policy.device.index}, so that they share one"
        )
    elif policy.device.type == "cuda" and together > (seen := torch.cuda.device_count()):
        fix = "give a smaller number, or start a process per GPU with accelerate launch"
        raise UserError(f"engine_options.tensor_parallel_size = {together}, but only {seen} GPU is visible: {fix}")
    return together


def _may_sleep(policy: Policy) -> bool:
    """Whether an engine in the policy's process can sleep: on GPUs, without expandable segments."""
    segments = "".join(os.environ.get(name, "") for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"))
    return policy.device.type == "cuda" and "expandable_segments:True" not in segments


def _start(policy: Policy, options: Mapping[str, Any], sleeps: bool) -> Any:
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # weights are passed within the process
    os.environ.setdefault("VLLM_CONFIGURE_LOGGING", "0")
    from vllm import LLM

    settings: dict[str, Any] = {
        "dtype": _dtype(policy),
        "logprobs_mode": "processed_logprobs",
        "gpu_memory_utilization": 0.3,  # the rest is for training
        "trust_remote_code": trusts_remote_code(),
        **({"enable_sleep_mode": True} if sleeps else {}),
        **({"distributed_executor_backend": "external_launcher"} if world_size() > 1 else {}),  # the run's processes
        **options,
    }
    if policy.device.type == "cpu":  # where compilation does not pay off, and chunked prompts cannot be seeded
        settings = {"enforce_eager": True, "enable_chunked_prefill": False, **settings}
    try:
        return LLM(str(EMBEDDED_BASE) if policy.name == EMBEDDED else policy.name, **settings)
    except (AssertionError, ValueError) as error:  # options that do not fit the model or the machine
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(f"vLLM cannot start with engine_options {dict(options)} ({reason:.300})") from error


def _asked(policy: Policy, settings: Sampling, seed: int, number: int, greedy: bool, room: int) -> dict[str, Any]:
    """The sampling parameters of a prompt, for an engine or a server."""
    return {
        "n": 1 if greedy else settings.samples,
        "temperature": 0.0 if greedy else settings.temperature,
        "top_p": 1.0 if greedy else settings.top_p,
        "top_k": -1,  # not the checkpoint's default
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "max_tokens": room,
        "seed": int(np.random.SeedSequence([seed, number]).generate_state(1)[0] >> 1),
        "stop_token_ids": sorted(policy.eos_ids),
    }


def _of_output(policy: Policy, output: Any) -> Sample:
    """A completion of an engine in this process as a `Sample`."""
    steps = zip(output.logprobs, output.token_ids, strict=True)
    return _sample(policy, list(output.token_ids), [step[token].logprob for step, token in steps])


def _sample(policy: Policy, ids: list[int], logp: list[float] | None) -> Sample:
    return Sample(ids, text_of(policy, ids), truncated=not (ids and ids[-1] in policy.eos_ids), logp=logp)
