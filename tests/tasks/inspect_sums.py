"""Tasks of inspect, without a network: some that rlzoo can run, and one of each kind that it cannot."""

# mypy: disable-error-code="untyped-decorator"
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from inspect_ai import Task, task
from inspect_ai.agent import react
from inspect_ai.dataset import MemoryDataset, Sample, json_dataset
from inspect_ai.model import ChatMessageSystem, ChatMessageUser, ContentImage, ContentText
from inspect_ai.scorer import Score, accuracy, choice, includes, match, mean, model_graded_qa, scorer
from inspect_ai.solver import generate, multiple_choice, prompt_template, self_critique, system_message, use_tools
from inspect_ai.tool import think

SUMS = [Sample(input="1+1", target="2"), Sample(input="2+3", target=["5", "five"], id="b", metadata={"a": [1]})]


def of_sums(solver: Any = None, scorer: Any = None, **more: Any) -> Any:
    return Task(dataset=SUMS, solver=solver or generate(), scorer=scorer or match(), **more)


@task
def sums(word: str = "Sum", **options: Any) -> Any:
    return of_sums([system_message("Be brief."), prompt_template(word + ": {prompt}"), generate()], **options)


@task
def plain(count: int = 2) -> Any:
    return Task(dataset=SUMS[:count], scorer=includes())


@task
def choices() -> Any:
    return Task(
        dataset=[Sample(input="Even?", choices=["3", "4", "5"], target="B")], solver=multiple_choice(), scorer=choice()
    )


@task
def told() -> Any:
    """A conversation, of which a part is not a text, and a solver before the others."""
    turns = [ChatMessageSystem(content="S"), ChatMessageUser(content=[ContentText(text="1+"), ContentText(text="1")])]
    return Task(
        dataset=[Sample(input=turns, target="2")], setup=system_message("First."), solver=generate(), scorer=match()
    )


@task
def stops() -> Any:
    return of_sums(generate(stop_seqs=["\n"]))


@task
def beside() -> Any:
    return Task(dataset=json_dataset("inspect_sums.jsonl"), scorer=match())


@scorer(metrics={"length": [mean()], "right": [mean()]})
def measured() -> Any:
    async def score(state: Any, target: Any) -> Any:
        return Score(value={"length": len(state.output.completion), "right": "P"}, answer="x")

    return score


@scorer(metrics=[accuracy()])
def strict() -> Any:
    async def score(state: Any, target: Any) -> Any:
        if "2" in state.output.completion:
            return Score.unscored(reason="refusal")
        return Score.unscored(reason="scoring_failed", explanation="no log-probs")

    return score


@task
def several() -> Any:
    return of_sums(scorer=[measured(), match()])


@task
def unscored() -> Any:
    return of_sums(scorer=strict())


# What cannot be used


@task
def graded() -> Any:
    return of_sums(scorer=model_graded_qa())


@task
def judged() -> Any:
    return of_sums(scorer=model_graded_qa(model="mockllm/model", model_role=None), metadata={"why": "another model"})


@task
def critique() -> Any:
    return of_sums([generate(), self_critique()])


@task
def twice() -> Any:
    return of_sums([generate(), generate()])


@task
def silent() -> Any:
    return of_sums(system_message("Be brief."))


@task
def agent() -> Any:
    return of_sums(react())


@task
def tools() -> Any:
    return of_sums([use_tools(think()), generate()])


@task
def boxed() -> Any:
    return of_sums(sandbox="docker")


@task
def unjudged() -> Any:
    return Task(dataset=SUMS)


@task
def pictures() -> Any:
    turn = ChatMessageUser(content=[ContentText(text="1"), ContentImage(image="data:image/png;base64,")])
    return Task(dataset=[Sample(input=[turn])], scorer=match())


@task
def drawn() -> Any:
    samples = [Sample(input="Even?", choices=[str(n) for n in range(20)], target="B")]
    return Task(dataset=samples, solver=multiple_choice(shuffle=True), scorer=choice())


@task
def shuffled(seed: int | None = None) -> Any:
    rows = MemoryDataset([Sample(input=str(n), target="") for n in range(30)])
    rows.shuffle(seed)
    return Task(dataset=rows, scorer=match())


@task
def alike(ids: Sequence[int] = (1, 1)) -> Any:
    return Task(dataset=[Sample(input="1", target="1", id=id) for id in ids], scorer=match())


@task
def broken() -> Any:
    raise FileNotFoundError("no data.json")
