"""Fresh samples of the current policy, for online training."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from rlzoo.buffers import OfflineBuffer
from rlzoo.buffers.bad_rows import BadRows
from rlzoo.buffers.problems import EncodedProblem, Problem, demonstrations, encode_problems
from rlzoo.config import Sampling, Training
from rlzoo.errors import UserError
from rlzoo.jobs.cached_results import random_state
from rlzoo.policy import Policy
from rlzoo.policy.sequences import learned_tokens, length
from rlzoo.reward import get_reward
from rlzoo.rollout.rollouts import collect_rollouts, scorable, within_limits
from rlzoo.rollout.sampler import Sampler
from rlzoo.types import Trajectory


class Collector:
    """A function that samples a buffer of fresh groups per batch, from the current policy and the next prompts.

    The buffer also has the demonstrations of these prompts, for views that put them beside the samples. Prompts are
    shuffled by ``seed`` in every epoch. It can be the source of `rlzoo.train`; checkpoints hold its state.
    """

    def __init__(
        self,
        policy: Policy,
        sampler: Sampler,
        problems: Sequence[Problem],
        reward: Any,
        settings: Sampling | None = None,
        training: Training | None = None,
        seed: int = 0,
        batch_size: int | None = None,
        bad: BadRows | None = None,
    ) -> None:
        """``reward`` is what `get_reward` takes; it receives the progress of ``training`` as ``trainer_state``.

        A batch has ``batch_size`` sequences (None: that of ``training``), ``settings.samples`` per prompt. Raises
        UserError if there are no problems, and for a problem that the model cannot take, unless ``bad`` drops it.
        """
        self._policy, self._sampler, self._reward = policy, sampler, get_reward(reward)
        self._settings, self._training = settings or Sampling(), training or Training()
        self._prompts = max(1, (batch_size or self._training.batch_size) // self._settings.samples)
        if not problems:
            raise UserError("there are no problems to sample completions for: give at least one")
        bad = BadRows() if bad is None else bad
        encoded = encode_problems(policy.tokenizer, problems, bad)
        encoded = within_limits(policy, sampler, encoded, self._settings, bad)
        self._encoded = scorable(self._reward, encoded, bad)
        self._training = self._training.in_steps(self.batches)
        self._order, self._queue = random.Random(seed), list[int]()
        self._sampled_tokens, self._flops = 0, 0.0

    @property
    def batches(self) -> float:
        """The number of batches in an epoch over the problems."""
        return len(self._encoded) / self._prompts

    def __call__(self, version: int) -> OfflineBuffer:
        """A buffer of samples of policy version ``version``, the number of batches so far. Raises UserError as the
        sampler and the reward do."""
        policy, settings, training = self._policy, self._settings, self._training
        prompts: list[EncodedProblem] = []
        while len(prompts) < self._prompts:
            if not self._queue:
                self._queue = self._order.sample(range(len(self._encoded)), len(self._encoded))
            prompts.append(self._encoded[self._queue.pop()])
        epoch = version * self._prompts / len(self._encoded)
        rows = collect_rollouts(
            policy,
            self._sampler,
            prompts,
            self._reward.at(version * training.steps_per_batch, training.steps, epoch),
            settings,
            seed=self._order.randrange(2**31),
            version=version,
            token_budget=training.token_budget,
            recompute=not settings.wants_sampler_logp,
        )
        sampled, tokens = sum(map(learned_tokens, rows)), sum(map(length, rows))
        self._sampled_tokens += sampled
        self._flops += policy.flops(tokens, sampled, modules=False) + policy.flops(tokens, sampled)
        return OfflineBuffer.from_trajectories([*rows, *self._demonstrations(prompts)])

    def _demonstrations(self, prompts: Sequence[EncodedProblem]) -> Sequence[Trajectory]:
        """The worked solutions of these problems, without those that the model cannot take."""
        solved = [one.problem for one in prompts if one.problem.solutions]
        if not solved:
            return []
        policy, training = self._policy, self._training
        limits = training.max_completion_tokens, BadRows("drop"), policy.row_check(), training.max_length
        return demonstrations(policy.tokenizer, solved, *limits)

    def spent(self) -> dict[str, float]:
        """The costs of sampling since the last call: ``sampled_tokens``, and ``flops`` (see `Policy.flops`)."""
        found = {"sampled_tokens": self._sampled_tokens, "flops": self._flops}
        self._sampled_tokens, self._flops = 0, 0.0
        return found

    def state(self) -> Any:
        """The position in the prompts and the state of the sampler, as plain data."""
        return {"order": self._order.getstate(), "queue": self._queue, "sampler": self._sampler.state()}

    def restore(self, state: Any) -> None:
        """Resume from a ``state``."""
        self._order.setstate(random_state(state["order"]))
        self._queue = list(state["queue"])
        self._sampler.restore(state["sampler"])
