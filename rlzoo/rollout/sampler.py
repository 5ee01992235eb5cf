"""The interface of samplers, their registry, and the sampler of transformers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import numpy as np
import torch
from jaxtyping import Float

from rlzoo.config import Sampling
from rlzoo.errors import UserError
from rlzoo.jobs.memory import is_out_of_memory, release_memory
from rlzoo.jobs.ranks import is_sharded, shared, world_size
from rlzoo.policy import Policy
from rlzoo.registry import Registry
from rlzoo.rollout.decoding import Decoder, can_decode, padded

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Sample:
    """One sampled completion."""

    ids: list[int]
    """Its tokens, including the end of sequence unless truncated."""
    text: str
    """The tokens as text, without special tokens and the end."""
    truncated: bool
    """True if ``max_new_tokens`` was reached before an end of sequence."""
    logp: list[float] | None = None
    """The engine's own log-prob per token, in nats, under the distribution that it sampled from."""


Finished = Callable[[int, list[Sample]], None]
"""Called with a prompt's index and its samples."""


class Sampler:
    """Anything that continues prompts.

    A subclass defines `sample`. The setting ``engine`` names it; it is built as ``Class(policy, **engine_options)``.
    """

    name: ClassVar[str]
    """Its name for ``engine``."""
    gives_logp: ClassVar[bool] = False
    """Whether samples have the engine's own log-probs, which ``rollouts.behaviour: sampler`` needs."""
    bound_by_positions: ClassVar[bool] = False
    """Whether ``max_new_tokens`` must fit the model's positions too; an engine may have its own limits."""
    of_server: ClassVar[type[Sampler] | None] = None
    """The sampler that replaces it if the settings have a ``url``, built with that."""
    _listener: Finished | None = None

    def portion(self, settings: Sampling) -> int:
        """The number of prompts per call when finished samples are cached in between: one batch."""
        return max(1, settings.batch_size // settings.samples) * world_size()

    def state(self) -> Any:
        """The state that determines the next samples, as plain data; None: there is none."""
        return None

    def restore(self, state: Any) -> None:
        """Resume from a ``state``, as JSON gives it back."""

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        settings: Sampling,
        seed: int,
        greedy: bool = False,
        progress: Callable[[int], None] | None = None,
        numbers: Sequence[int] | None = None,
    ) -> list[list[Sample]]:
        """``settings.samples`` completions per prompt, one if ``greedy``; the same for the same seed.

        ``progress`` is called with the number of prompts done. ``numbers`` identify the prompts' random streams if they
        are part of a larger set; None: their indices.
        """
        raise NotImplementedError(f"{type(self).__name__} must define sample(prompts, settings, seed, ...)")

    def rest(self) -> None:
        """Free what only sampling needs, until the next call of `sample`: training or scoring follows."""

    def finished(self, place: int, samples: list[Sample]) -> None:
        """What `sample` may call, in its thread, with a prompt's index and samples, to have them scored meanwhile."""
        if self._listener is not None:
            self._listener(place, samples)

    @contextmanager
    def heard_by(self, listener: Finished) -> Iterator[None]:
        """In this context ``listener`` is told what is `finished`."""
        self._listener = listener
        try:
            yield
        finally:
            self._listener = None


_samplers: Registry[type[Sampler]] = Registry("sampler", "rlzoo.rollout", "rlzoo.samplers")
_Class = TypeVar("_Class", bound=type[Sampler])


def register_sampler(sampler: _Class) -> _Class:
    """Class decorator: register a `Sampler` under its ``name``. A name taken by another class is an error."""
    _samplers.add(sampler.name, sampler)
    return sampler


def list_samplers() -> list[str]:
    """The names of all registered samplers: built-ins and those of installed packages' entry points."""
    return _samplers.names()


def engine_of(settings: Sampling, policy: Policy | None = None) -> str:
    """The name of what samples; ``auto`` is vLLM where it is installed and the ``policy`` on a GPU, or with a url.

    Without a policy, before one is loaded, nobody knows: then it is taken for what can do all that the settings ask.
    """
    if settings.engine != "auto":
        return settings.engine
    fits = settings.url is not None
    if not fits and find_spec("vllm") is not None:
        asked = bool(settings.engine_options) or settings.wants_sampler_logp
        fits = asked if policy is None else policy.device.type == "cuda" and world_size() == 1
    return "vllm" if fits else "transformers"


def sampler_class(settings: Sampling, policy: Policy | None = None) -> type[Sampler]:
    """The sampler class of the settings. Raises UserError for an unknown or unsuitable ``engine``."""
    engine = engine_of(settings, policy)
    found = _samplers.get(engine)
    if not (isinstance(found, type) and issubclass(found, Sampler)):
        raise UserError(f"sampler {engine!r} is not a subclass of rlzoo.rollout.Sampler")
    if settings.url is not None:
        if found.of_server is None:
            raise UserError(f"engine {engine!r} has no server: url is for engines with one, such as vllm")
        found = found.of_server
    if settings.wants_sampler_logp and not found.gives_logp:
        raise UserError("rollouts.behaviour: sampler needs an engine with its own log-probs, such as engine: vllm")
    try:
        inspect.signature(found).bind(None, **_options(settings))
    except TypeError as error:
        raise UserError(f"engine {engine!r} cannot take these engine_options: {error}") from None
    return found


def _options(settings: Sampling) -> Mapping[str, Any]:
    """The constructor arguments of the sampler besides the policy."""
    return settings.engine_options if settings.url is None else {"url": settings.url}


def sampler_of(policy: Policy, settings: Sampling) -> Sampler:
    """The sampler of the settings. Raises UserError if it is not available."""
    build: Callable[..., Sampler] = sampler_class(settings, policy)
    return build(policy, **_options(settings))


@register_sampler
class TransformersSampler(Sampler):
    """Samples with the policy's own transformers model; prompts of similar length share a batch.

    Every sample has its own random stream, from the seed and the indices of its prompt and sample, so that samples do
    not depend on the batch size (up to rounding). A model whose state is more than keys and values (Mamba, say) is
    sampled by transformers' ``generate``. If memory runs out, half as many are sampled together.
    """

    name: ClassVar[str] = "transformers"
    bound_by_positions: ClassVar[bool] = True

    def __init__(self, policy: Policy, static_shapes: bool | None = None) -> None:
        """``static_shapes``: decode with tensors of fixed shapes, on a GPU as CUDA graphs; None: on a GPU alone."""
        self.policy = policy
        self._most: int | None = None
        """Sequences that fit into memory together, after more did not."""
        self.decoder = Decoder(policy, static_shapes) if can_decode(policy.model) else None

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        settings: Sampling,
        seed: int,
        greedy: bool = False,
        progress: Callable[[int], None] | None = None,
        numbers: Sequence[int] | None = None,
    ) -> list[list[Sample]]:
        streams = range(len(prompts)) if numbers is None else numbers

        def own(places: list[int]) -> list[list[Sample]]:
            return self._sample_all(prompts, places, streams, settings, seed, greedy, progress)

        return shared(prompts, own, self.policy)

    def _sample_all(
        self,
        prompts: Sequence[Sequence[int]],
        places: list[int],
        streams: Sequence[int],
        settings: Sampling,
        seed: int,
        greedy: bool,
        progress: Callable[[int], None] | None,
    ) -> list[list[Sample]]:
        """The samples of some of the prompts."""
        copies, left = 1 if greedy else settings.samples, by_length(prompts, places)
        results: dict[int, list[Sample]] = {}
        training = self.policy.training
        self.policy.eval()
        try:
            while left:
                together = min(settings.batch_size, self._most or settings.batch_size)
                batch = left[: max(1, together // copies)]
                try:
                    made = self._batch(prompts, batch, streams, min(copies, together), settings, greedy, seed)
                except (RuntimeError, MemoryError) as error:
                    if not is_out_of_memory(error) or is_sharded(self.policy):
                        raise
                    if together == 1:
                        raise UserError(f"out of memory with one sequence sampled at a time: {error}") from None
                    made = None
                if made is None:  # and the error, which holds on to the tensors that did not fit, is gone
                    release_memory()
                    self._most = max(1, min(together, len(batch) * copies) // 2)
                    continue
                results |= made
                left = left[len(batch) :]
                for place, samples in made.items():
                    self.finished(place, samples)
                if progress is not None:
                    progress(len(batch))
        finally:
            self.policy.train(training)
        return [results[place] for place in places]

    def _batch(
        self,
        prompts: Sequence[Sequence[int]],
        batch: Sequence[int],
        streams: Sequence[int],
        most: int,
        settings: Sampling,
        greedy: bool,
        seed: int,
    ) -> dict[int, list[Sample]]:
        """The samples of the prompts in some places, at most so many of each at a time."""
        copies, found = 1 if greedy else settings.samples, dict[int, list[Sample]]()
        for first in range(0, copies, most):
            some = range(first, min(copies, first + most))
            own_streams = [streams[i] for i in batch]
            rows = self._decoded([prompts[i] for i in batch], own_streams, some, settings, greedy, seed)
            for row, place in enumerate(batch):
                own = rows[row * len(some) : (row + 1) * len(some)]
                found.setdefault(place, []).extend(self._sample(ids) for ids in own)
        return found

    def _decoded(
        self,
        prompts: Sequence[Sequence[int]],
        numbers: Sequence[int],
        copies: range,
        settings: Sampling,
        greedy: bool,
        seed: int,
    ) -> list[list[int]]:
        """The tokens of some copies of some prompts."""
        if self.decoder is None:
            own = int(np.random.SeedSequence([seed, numbers[0], copies.start]).generate_state(1)[0])
            return self._generate(prompts, settings, len(copies), greedy, own)
        draws = None if greedy else uniform_numbers(seed, numbers, copies, settings.max_new_tokens)
        return self.decoder.decode(prompts, len(copies), settings, draws)

    def _generate(
        self, prompts: Sequence[Sequence[int]], settings: Sampling, copies: int, greedy: bool, seed: int
    ) -> list[list[int]]:
        policy = self.policy
        ids, mask = padded(prompts, policy.device)
        # top_k = 0: the library's own default keeps 50 tokens
        how = {"do_sample": False} if greedy else {
            "do_sample": True, "temperature": settings.temperature, "top_p": settings.top_p, "top_k": 0,
            "num_return_sequences": copies,
        }  # fmt: skip
        devices = [policy.device] if policy.device.type == "cuda" else []
        with _no_defaults(policy.model), torch.random.fork_rng(devices):  # the caller's random state is not changed
            torch.manual_seed(seed)
            out = policy.model.generate(
                input_ids=ids,
                attention_mask=mask.long(),
                max_new_tokens=settings.max_new_tokens,
                pad_token_id=policy.tokenizer.pad_token_id,
                eos_token_id=sorted(policy.eos_ids),
                **how,
            )
        rows: list[list[int]] = out[:, ids.shape[1] :].tolist()
        return rows

    def _sample(self, ids: list[int]) -> Sample:
        ends = self.policy.eos_ids
        end = next((i for i, token in enumerate(ids) if token in ends), None)
        kept = ids if end is None else ids[: end + 1]
        return Sample(kept, text_of(self.policy, kept), truncated=end is None)


def text_of(policy: Policy, ids: Sequence[int]) -> str:
    """A completion's tokens as text, without special tokens and without the token that ends it."""
    said = ids[:-1] if ids and ids[-1] in policy.eos_ids else ids
    text: str = policy.tokenizer.decode(said, skip_special_tokens=True)
    return text


def by_length(prompts: Sequence[Sequence[int]], places: Iterable[int]) -> list[int]:
    """Indices sorted by the length of their prompts, for batches."""
    return sorted(places, key=lambda place: (len(prompts[place]), place))


def uniform_numbers(seed: int, prompts: Sequence[int], copies: range, tokens: int) -> Float[np.ndarray, "B T"]:
    """For each copy of each prompt: a token is the one at which the cumulative probability passes its number."""
    return np.stack([np.random.default_rng([seed, p, c]).random(tokens) for p in prompts for c in copies])


@contextmanager
def _no_defaults(model: PreTrainedModel) -> Iterator[None]:
    """Ignore a checkpoint's own generation settings: beams, penalties or min_p would sample from another distribution
    than the one whose log-probs are recorded."""
    from transformers import GenerationConfig

    kept, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = kept
