"""The interface of samplers, their registry, and the built-in sampler with transformers."""

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
from rlzoo.jobs.ranks import gathered, is_sharded, shared, world_size
from rlzoo.jobs.restarts import restart_with, within_limit
from rlzoo.policy import Policy
from rlzoo.registry import Registry
from rlzoo.rollout.decoding import Decoder, can_decode, padded

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Sample:
    """One sampled completion."""

    ids: list[int]
    """The tokens, including the end of sequence unless truncated."""
    text: str
    """The tokens as text, without special tokens and the token that ends it."""
    truncated: bool
    """True if ``max_new_tokens``, or the end of the model's context, was reached before an end of sequence."""
    logp: list[float] | None = None
    """The engine's own log-prob per token, in nats, under the distribution that it sampled from; any number for tokens
    that ``mask`` leaves out."""
    mask: list[bool] | None = None
    """Which tokens the policy sampled, and are learned from: False for a tool's result or a user's turn between two
    turns of the assistant. None: all."""
    messages: list[dict[str, Any]] | None = None
    """The turns of a completion of several, which rewards of conversations get in place of ``text`` as one turn."""

    @property
    def length(self) -> int:
        """The number of tokens that the policy sampled."""
        return len(self.ids) if self.mask is None else sum(self.mask)


Finished = Callable[[int, list[Sample]], None]
"""Called with a prompt's index and its samples."""


class Sampler:
    """The base class of samplers, which continue prompts.

    A subclass defines `sample`. The setting ``engine`` names it; it is built as ``Class(policy, **engine_options)``.
    """

    name: ClassVar[str]
    """The name for the setting ``engine``."""
    gives_logp: ClassVar[bool] = False
    """Whether samples have the engine's own log-probs, which ``rollouts.behaviour: sampler`` needs."""
    bound_by_context: ClassVar[bool] = False
    """Whether completions end where the model's context does (see `room_after`); other engines have limits of their
    own."""
    of_server: ClassVar[type[Sampler] | None] = None
    """The sampler to use instead if the settings have a ``url``; it is built as ``Class(policy, url=...)``."""
    _listener: Finished | None = None

    @classmethod
    def check_installed(cls) -> None:
        """Raise UserError if a package that it needs is missing; called before a model is loaded."""

    def portion(self, settings: Sampling) -> int:
        """The number of prompts per call of `sample` if samples are cached between calls; by default one batch."""
        return max(1, settings.batch_size // settings.samples) * world_size()

    def state(self) -> Any:
        """The state that determines the next samples, as plain data; None if it has none."""
        return None

    def restore(self, state: Any) -> None:
        """Resume from a ``state`` that has been through JSON: tuples are lists."""

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        settings: Sampling,
        seed: int,
        greedy: bool = False,
        progress: Callable[[int], None] | None = None,
        numbers: Sequence[int] | None = None,
    ) -> list[list[Sample]]:
        """``settings.samples`` completions per prompt, or one if ``greedy``; the same for the same ``seed``.

        ``progress`` is called with the number of prompts just done. ``numbers`` identify the prompts' random streams if
        they are part of a larger set; None: their indices.
        """
        raise NotImplementedError(f"{type(self).__name__} must define sample(prompts, settings, seed, ...)")

    def rest(self) -> None:
        """Free resources that only sampling needs, until the next call of `sample`."""

    def finished(self, place: int, samples: list[Sample]) -> None:
        """`sample` may call this in its thread with a prompt's index and samples, so that scoring starts at once."""
        if self._listener is not None:
            self._listener(place, samples)

    @contextmanager
    def reporting_to(self, listener: Finished) -> Iterator[None]:
        """In this context, ``listener`` is called with the arguments of `finished`."""
        self._listener = listener
        try:
            yield
        finally:
            self._listener = None


_samplers: Registry[type[Sampler]] = Registry("sampler", "rlzoo.rollout", "rlzoo.samplers")
_Class = TypeVar("_Class", bound=type[Sampler])


def register_sampler(sampler: _Class) -> _Class:
    """Class decorator: register a `Sampler` under its ``name``. Raises UserError if another class has that name."""
    _samplers.add(sampler.name, sampler)
    return sampler


def list_samplers() -> list[str]:
    """The names of all registered samplers: built-ins and those of installed packages' entry points."""
    return _samplers.names()


def engine_of(settings: Sampling, policy: Policy | None = None) -> str:
    """The name of the engine; ``auto`` is vLLM if it is installed and the ``policy`` is on a GPU, or with a url.

    Without a policy, ``auto`` is an engine that supports all settings, so that they can be checked beforehand.
    """
    if settings.engine != "auto":
        return settings.engine
    fits = settings.url is not None
    if not fits and find_spec("vllm") is not None:
        asked = bool(settings.engine_options) or settings.wants_sampler_logp
        fits = asked if policy is None else policy.device.type == "cuda" and world_size() == 1
    return "vllm" if fits else "transformers"


def sampler_class(settings: Sampling, policy: Policy | None = None) -> type[Sampler]:
    """The sampler class for the settings. Raises UserError for an ``engine`` that is unknown or cannot serve them."""
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
    """The sampler for the settings. Raises UserError as `sampler_class` does, and if the engine is not available."""
    build: Callable[..., Sampler] = sampler_class(settings, policy)
    return build(policy, **_options(settings))


@register_sampler
class TransformersSampler(Sampler):
    """Samples with the policy's own transformers model; prompts of similar length share a batch.

    Every sample has its own random stream, seeded by the seed and the indices of its prompt and sample, so that samples
    do not depend on the batch size (up to rounding). A model whose state is more than keys and values (such as Mamba)
    is sampled with transformers' ``generate``. If memory runs out, the batch is halved.

    Processes share the prompts. Those of a sharded model run equally many forward passes: one that has finished earlier
    runs idle ones.
    """

    name: ClassVar[str] = "transformers"
    bound_by_context: ClassVar[bool] = True

    def __init__(self, policy: Policy, static_shapes: bool | None = None) -> None:
        """``static_shapes``: decode with tensors of fixed shapes, on a GPU as CUDA graphs; None: only on a GPU."""
        self.policy = policy
        self._most: int | None = None
        """The largest batch known to fit into memory, once a larger one did not."""
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

        if is_sharded(self.policy) and self.decoder is None:  # `generate` ends with the samples of its own process
            return own(list(range(len(prompts))))
        return shared(prompts, own)

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
            while self._any(left):
                together = within_limit("sequences", min(settings.batch_size, self._most or settings.batch_size))
                batch = self._of_one_room(prompts, left[: max(1, together // copies)], settings)
                try:
                    made = self._batch(prompts, batch, streams, min(copies, together), settings, greedy, seed)
                except (RuntimeError, MemoryError) as error:
                    if not is_out_of_memory(error):
                        raise
                    if together == 1:
                        raise UserError(f"out of memory while sampling a single sequence: {error}") from None
                    if is_sharded(self.policy):  # the others wait for this one
                        restart_with("sequences", self._halved(together, len(batch) * copies))
                        raise UserError(
                            f"out of memory while sampling {together} sequences at a time in one process of a sharded "
                            "model, which cannot retry on its own: lower batch_size of rollouts or evaluation "
                            f"({error!s:.160})"
                        ) from None
                    made = None
                if made is None:  # only here, because the error keeps the tensors that did not fit alive
                    release_memory()
                    self._most = self._halved(together, len(batch) * copies)
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

    def _any(self, left: Sequence[int]) -> bool:
        """Whether there are prompts left, in any process that must stay in step with this one."""
        in_step = self.decoder is not None and is_sharded(self.policy)
        return any(gathered(bool(left))) if in_step else bool(left)

    @staticmethod
    def _halved(together: int, sampled: int) -> int:
        """Half of a batch of ``sampled`` sequences, of at most ``together``."""
        return max(1, min(together, sampled) // 2)

    def _of_one_room(self, prompts: Sequence[Sequence[int]], batch: Sequence[int], settings: Sampling) -> Sequence[int]:
        """The first of the prompts that can be sampled together: positions of a table end for all rows at once."""
        if self.policy.positions is None or not batch:
            return batch
        rooms = [room_after(self.policy, len(prompts[place]), settings) for place in batch]
        return batch[: rooms.count(rooms[0])]  # they are sorted by length

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
        """The samples of the prompts with indices ``batch``, at most ``most`` of each prompt at a time."""
        copies, found = 1 if greedy else settings.samples, dict[int, list[Sample]]()
        rooms = {place: room_after(self.policy, len(prompts[place]), settings) for place in batch}
        settings = settings.model_copy(update={"max_new_tokens": max(rooms.values(), default=1)})
        for first in range(0, copies, most):
            some = range(first, min(copies, first + most))
            own_streams = [streams[i] for i in batch]
            rows = self._decoded([prompts[i] for i in batch], own_streams, some, settings, greedy, seed)
            for row, place in enumerate(batch):
                own = rows[row * len(some) : (row + 1) * len(some)]
                found.setdefault(place, []).extend(self._sample(ids[: rooms[place]]) for ids in own)
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
        """The tokens of samples number ``copies`` of some prompts."""
        if self.decoder is None:
            own = int(np.random.SeedSequence([seed, numbers[0], copies.start]).generate_state(1)[0])
            return self._generate(prompts, settings, len(copies), greedy, own)
        draws = None if greedy or not prompts else uniform_numbers(seed, numbers, copies, settings.max_new_tokens)
        return self.decoder.decode(prompts, len(copies), settings, draws)

    def _generate(
        self, prompts: Sequence[Sequence[int]], settings: Sampling, copies: int, greedy: bool, seed: int
    ) -> list[list[int]]:
        policy = self.policy
        ids, mask = padded(prompts, policy.device)
        # top_k = 0, because transformers' default is 50
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


def room_after(policy: Policy, prompt: int, settings: Sampling) -> int:
    """The length limit of a completion after ``prompt`` tokens: ``max_new_tokens``, or what the context leaves.

    Raises UserError if it leaves nothing.
    """
    left = settings.max_new_tokens if policy.context is None else policy.context - prompt
    if left < 1:
        raise UserError(
            f"its prompt has {prompt} tokens, and the model has {policy.context} positions, which leaves no room for a "
            "completion: shorten the prompt, or drop the problem"
        )
    return min(settings.max_new_tokens, left)


def text_of(policy: Policy, ids: Sequence[int]) -> str:
    """A completion's tokens as text, without special tokens and without the token that ends it."""
    said = ids[:-1] if ids and ids[-1] in policy.eos_ids else ids
    text: str = policy.tokenizer.decode(said, skip_special_tokens=True)
    return text


def by_length(prompts: Sequence[Sequence[int]], places: Iterable[int]) -> list[int]:
    """Prompt indices sorted by the length of the prompt, so that batches need little padding."""
    return sorted(places, key=lambda place: (len(prompts[place]), place))


def uniform_numbers(seed: int, prompts: Sequence[int], copies: range, tokens: int) -> Float[np.ndarray, "B T"]:
    """Uniform numbers on [0, 1), one random stream per prompt and copy; B = prompts × copies, T = ``tokens``."""
    streams = (np.random.default_rng([seed, prompt, copy]) for prompt in prompts for copy in copies)
    return np.stack([stream.random(tokens) for stream in streams])


@contextmanager
def _no_defaults(model: PreTrainedModel) -> Iterator[None]:
    """In this context, the model's own generation config is ignored: beams, penalties or min_p would change the
    distribution that is sampled from, but not the recorded log-probs."""
    from transformers import GenerationConfig

    kept, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = kept
