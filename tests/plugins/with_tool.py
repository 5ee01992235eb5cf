"""A sampler of completions with a tool's result inside: the policy writes, a tool counts its letters, it writes on."""

from typing import Any, ClassVar

from rlzoo.rollout import Sample, Sampler, TransformersSampler


class WithTool(Sampler):
    """Two turns of the policy with the tool's between them, which is not learned from."""

    name: ClassVar[str] = "with-tool"

    def __init__(self, policy: Any) -> None:
        self.tokenizer, self.inner = policy.tokenizer, TransformersSampler(policy)

    def sample(
        self, prompts: Any, settings: Any, seed: int, greedy: bool = False, progress: Any = None, numbers: Any = None
    ) -> list[list[Sample]]:
        """The policy continues each of its first turns after the tool's result."""
        once, found = settings.model_copy(update={"samples": 1}), []
        begun = self.inner.sample(prompts, settings, seed, greedy, progress, numbers)
        for prompt, firsts in zip(prompts, begun, strict=True):
            told = [f"={len(one.text)};" for one in firsts]
            tool = [self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in told]
            so_far = [[*prompt, *one.ids, *ids] for one, ids in zip(firsts, tool, strict=True)]
            lasts = [one for (one,) in self.inner.sample(so_far, once, seed + 1, greedy)]
            found.append([self.joined(*parts) for parts in zip(firsts, told, tool, lasts, strict=True)])
        return found

    @staticmethod
    def joined(first: Sample, told: str, tool: list[int], last: Sample) -> Sample:
        """The three turns as one completion."""
        mask = [True] * len(first.ids) + [False] * len(tool) + [True] * len(last.ids)
        turns = [("assistant", first.text), ("tool", told), ("assistant", last.text)]
        messages = [{"role": role, "content": content} for role, content in turns]
        text = first.text + told + last.text
        return Sample([*first.ids, *tool, *last.ids], text, last.truncated, mask=mask, messages=messages)
