"""How completions are sampled, and how they are scored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field

from rlzoo.config.validation import Positive, Strict, named_null

Share = Annotated[float, Field(gt=0, le=1)]


class Sampling(Strict):
    """How completions are sampled."""

    samples: Positive = 4
    """Completions per prompt."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """The logits are divided by this."""
    top_p: Share = 1.0
    """Sample from the most likely tokens that together have this probability; 1: from all."""
    max_new_tokens: Positive = 256
    """The length limit of a completion, in tokens."""
    batch_size: Positive = 256
    """Sequences per sampling batch."""
    engine: str = "auto"
    """The sampler: ``transformers``, ``vllm``, another registered name, ``module:Name`` or ``file.py:Name``. ``auto``
    is vllm if it is installed and the policy is on a GPU (or if a url is given), else transformers."""
    url: str | tuple[str, ...] | None = None
    """The URL of a vLLM server, or several, which share the prompts; without one, vLLM runs in the sampling process."""
    engine_options: Mapping[str, Any] = {}
    """Arguments of the sampler's constructor; for vllm, those of ``vllm.LLM`` (max_model_len, ...)."""

    @pydantic.model_validator(mode="after")
    def _is_of_one_engine(self) -> Sampling:
        if self.url == ():
            raise ValueError("url is an empty list: give at least one server, or leave it out")
        if self.url is not None and self.engine_options:
            raise ValueError("a server has its own options: give url or engine_options")
        if "trust_remote_code" in self.engine_options:
            raise ValueError("engine_options: a file cannot set trust_remote_code: use the flag --trust-remote-code")
        return self

    @property
    def wants_sampler_logp(self) -> bool:
        """Whether the sampler's own log-probs serve as behaviour log-probs."""
        return False


class Rollouts(Sampling):
    """The samples of the base policy that fill the shared buffer."""

    prompts: Positive | None = None
    """Number of training problems to sample; None: all."""
    behaviour: Literal["recompute", "sampler"] = "recompute"
    """Behaviour log-probs: recomputed by the trainer, or as reported by the engine that sampled."""
    per_seed: bool = False
    """Whether each seed has its own buffer of samples, so that intervals cover the sampling too."""

    @property
    def wants_sampler_logp(self) -> bool:
        """Whether the sampler's own log-probs serve as behaviour log-probs."""
        return self.behaviour == "sampler"


class Scoring(Strict):
    """How the reward is called: in separate processes, unless both limits are null."""

    seconds: Annotated[float, Field(gt=0)] | None = 60.0
    """The time limit of a call; a call that exceeds it is repeated completion by completion."""
    memory_gb: Annotated[float, Field(gt=0)] | None = 4.0
    """The memory limit of a process, in 2³⁰ bytes."""
    processes: Positive = 1
    """The number of processes that score completions while others are sampled, per worker of a comparison."""
    on_error: Annotated[Literal["fail", "null"], pydantic.BeforeValidator(named_null)] = "fail"
    """If the reward raises, hangs or returns no number: ``fail`` stops the run, ``null`` gives no reward."""
