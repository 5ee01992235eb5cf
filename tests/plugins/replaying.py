"""A sampler that repeats: the first sample of a prompt is the last one that the prompt got before."""

from typing import Any, ClassVar

from rlzoo.rollout import Sample, TransformersSampler


class Replaying(TransformersSampler):
    """The policy's own samples, but for one of each prompt, which comes from the time before."""

    name: ClassVar[str] = "replaying"

    def __init__(self, policy: Any, after: int = 0) -> None:
        super().__init__(policy)
        self.calls, self.after = 0, after
        self.memory: dict[str, list[Any]] = {}

    def sample(
        self, prompts: Any, settings: Any, seed: int, greedy: bool = False, progress: Any = None, numbers: Any = None
    ) -> list[list[Sample]]:
        """What the policy says; ``after`` so many calls, with a replayed sample in front."""
        found = super().sample(prompts, settings, seed, greedy, progress, numbers)
        if greedy:
            return found
        self.calls += 1
        for prompt, samples in zip(map(str, prompts), found, strict=True):
            if self.calls > self.after and prompt in self.memory:
                samples[0] = Sample(*self.memory[prompt])
            last = samples[-1]
            self.memory[prompt] = [last.ids, last.text, last.truncated]
        return found

    def state(self) -> Any:
        return {"calls": self.calls, "memory": self.memory}

    def restore(self, state: Any) -> None:
        self.calls, self.memory = state["calls"], dict(state["memory"])
