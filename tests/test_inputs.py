"""What an objective's inputs are worth: other prompts, columns of the data, models beside the policy, kept scores."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import pytest
import torch
from chat_templates import assistant, built, policy_of, tokenizer_of, turn, user
from torch import Tensor, nn

from rlzoo.advantages import group_centred
from rlzoo.config import Training
from rlzoo.errors import UserError
from rlzoo.inputs import (
    Column,
    Context,
    Critic,
    Input,
    Mismatched,
    MovingReference,
    Outcome,
    Privileged,
    Reference,
    ReferenceLogits,
    Snapshot,
    Stage,
    Statistic,
)
from rlzoo.inputs.references import mismatched
from rlzoo.objective import Component, Objective
from rlzoo.policy import Assembler, MicroBatches, Models, Policy, Sequences, load_policy, log_probs
from rlzoo.policy.loading import save_policy
from rlzoo.training import Trainer
from rlzoo.training.state import restore, state_of
from rlzoo.types import Coefficients, Coupling, TokenBatch, Trajectory

MakePolicy = Callable[..., Policy]


@dataclass(frozen=True)
class Asking(Objective):
    """SFT that asks for some inputs and does nothing with them."""

    name: ClassVar[str] = "asking"

    asks: tuple[Input, ...] = ()
    whole: bool = field(default=False, kw_only=True)
    """Whether it looks at the whole batch at once."""

    @property
    def requires(self) -> tuple[Input, ...]:
        return self.asks

    @property
    def couples(self) -> Coupling:  # type: ignore[override]
        return Coupling.BATCH if self.whole else Coupling.NONE

    def coefficients(self, batch: TokenBatch) -> Coefficients:
        return Coefficients(torch.ones_like(batch.logp))


def row(prompt: Sequence[int], completion: Sequence[int], **known: Any) -> Trajectory:
    return Trajectory("", "", [*prompt], [*completion], str(prompt), **known)


def assembled(policy: Policy, rows: Sequence[Trajectory], *asks: Input, models: Models | None = None) -> TokenBatch:
    return Assembler(policy, models).assemble(rows, [(i,) for i in range(len(rows))], Asking(asks))


def scored(policy: Policy, rows: Sequence[Trajectory], prompts: Sequence[list[int]] | None = None) -> Any:
    """The log-probs of all completion tokens in a row, after other prompts where there are any; nearly."""
    shown = prompts or [r.prompt_ids for r in rows]
    found = log_probs(policy, [(prompt, r.completion_ids) for prompt, r in zip(shown, rows, strict=True)])
    return pytest.approx([x for one in found for x in one], rel=1e-6)


def flat(table: Tensor, rows: Sequence[Trajectory]) -> list[float]:
    return [x for values, r in zip(table, rows, strict=True) for x in values[: len(r.completion_ids)].tolist()]


ROWS = [row([5, 6], [20, 21, 2]), row([7], [22, 2])]


# The same completion after another prompt


def test_a_privileged_prompt_is_filled_from_the_row(make_policy: MakePolicy) -> None:
    policy, teacher = make_policy(), make_policy(seed=1)
    columns: dict[str, object] = {"answer": "24", "steps": [1, True], "prompt": "not this"}
    rows = [replace(r, prompt=text, columns=columns) for r, text in zip(ROWS, ("12+12=?\n", "3*8=?\n"), strict=True)]
    told = [policy.tokenizer.encode(f"{r.prompt}Hint: 24, [1, true]\n") for r in rows]
    for model, name in ((policy, None), (teacher, "teacher")):
        one = Privileged("{prompt}Hint: {answer}, {steps}\n", model=name)
        batch = assembled(policy, rows, one, models=Models(policy, {"teacher": teacher}))
        assert flat(batch["privileged_logp"], rows) == scored(model, rows, told)
        assert one.models() == (() if name is None else (name,))


def test_a_privileged_conversation_is_told_in_its_last_user_turn() -> None:
    tokenizer = tokenizer_of("chatml")
    policy = policy_of(tokenizer)
    turns = [user("{x}"), assistant("4"), user("2+3?"), turn("tool", "<5")]
    rows = [replace(ROWS[0], messages=turns, columns={"answer": "5"})]
    told = [user("{x}"), assistant("4"), user("2+3? (5)"), turn("tool", "<5")]
    text = tokenizer.apply_chat_template(told, tokenize=False, add_generation_prompt=True)
    expected = scored(policy, rows, [tokenizer.encode(text)])
    found = assembled(policy, rows, Privileged("{prompt} ({answer})"))
    assert flat(found["privileged_logp"], rows) == expected
    assert turns[2] == user("2+3?"), "the row is left as it is"


@pytest.mark.parametrize(
    ("template", "told"),
    [
        ("{hint}", r"needs 'hint', and a row of prompt 'first' has prompt, answer, none$"),
        ("{none}", r"asks for 'none', which is null in a row of prompt 'first': fill it in, or drop the row$"),
        ("{answer.a}", r"does not fit a row of prompt 'first': 'str' object has no attribute 'a'$"),
        ("{answer:d}", r"does not fit a row of prompt 'first': Unknown format code 'd'"),
        ("{prompt} {}", r"'\{prompt\} \{\}' has \{\}: name a column in it, or write \{\{\}\} for text$"),
        ("{0}", r"has \{0\}: name a column in it"),
        ("{prompt", r"expected '\}' before end of string: write \{\{ and \}\} for braces that are text$"),
    ],
)
def test_a_template_that_does_not_fit_is_one_line(template: str, told: str, make_policy: MakePolicy) -> None:
    columns: dict[str, object] = {"answer": "2", "none": None}
    rows = [replace(ROWS[0], prompt="1+1?", prompt_id="first", columns=columns)]
    with pytest.raises(UserError, match=told):
        assembled(make_policy(), rows, Privileged(template))


# Columns of the data


def test_a_column_is_one_number_per_token_or_per_row(make_policy: MakePolicy) -> None:
    def column(*values: Any, rows: Sequence[Trajectory] = ROWS) -> Any:
        some = [replace(r, columns={"other": "x", "it": value}) for r, value in zip(rows, values, strict=True)]
        return assembled(make_policy(), some, Column("it"))["it"].tolist()

    short = [row([5], [2]), row([6], [2])]
    assert column([0.5, 1, 2.0], [3, 0.25]) == [[0.5, 1.0, 2.0], [3.0, 0.25, 0.0]]
    assert column(1, 0.5) == [1.0, 0.5] == column([1], [0.5])
    assert column([1], [0.5], rows=short) == [[1.0], [0.5]] and column(1, 0.5, rows=short) == [1.0, 0.5]
    with pytest.raises(UserError, match=r"'it' has 2 values in a row .* has 3 tokens, its end included: give one per"):
        column([1, 2], [3, 4])
    with pytest.raises(UserError, match=r"'it' has one value in a row of prompt '\[7\]' whose completion has 2 tokens"):
        column([1, 2, 3], 4)
    for wrong in (None, "high", ["1", "2"], "12"):
        with pytest.raises(
            UserError, match=r"prompt '\[7\]' has no numbers in the column 'it'; its columns: other, it"
        ):
            column([1, 2, 3], wrong)
    with pytest.raises(UserError, match="no numbers in the column 'it'; its columns: none"):
        assembled(make_policy(), ROWS, Column("it"))


# Models beside the policy


@pytest.fixture
def teacher(tmp_path: Path) -> Policy:
    """The embedded model with other weights; its ``name`` is a folder."""
    found = load_policy("embedded")
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.mul_(0.9)
    found.name = str(tmp_path / "teacher")
    save_policy(found, tmp_path / "teacher")
    return found


@pytest.mark.slow
def test_a_teacher_is_loaded_once_frozen_and_as_the_policy_computes(teacher: Policy) -> None:
    policy = load_policy("embedded", "bfloat16-mixed")
    asks = (Reference(teacher.name, as_key="teacher_logp"), Privileged("{prompt}", model=teacher.name), Reference())
    start = policy.frozen_copy()
    models = Models.load(policy, asks, initial=start)
    assert models.frozen.keys() == {teacher.name, None} and models.initial is start
    loaded = models.of(teacher.name)
    assert loaded.compute is torch.bfloat16 and not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    plain = load_policy("embedded")
    batch = assembled(plain, ROWS, *asks[::2], models=Models.load(plain, asks))
    assert flat(batch["teacher_logp"], ROWS) == scored(teacher, ROWS) != scored(plain, ROWS)
    assert flat(batch["reference_logp"], ROWS) == scored(plain, ROWS)
    with pytest.raises(UserError, match=r"'elsewhere' is not loaded: an input .* must list it in models\(\)"):
        models.of("elsewhere")
    with pytest.raises(UserError, match="the initial policy is not loaded"):
        Models(policy).of(None)


def test_a_teacher_of_another_vocabulary_is_refused(tmp_path: Path) -> None:
    save_policy(policy_of(built(None)), tmp_path)
    with pytest.raises(UserError, match=r"has another vocabulary than the policy: use one with the same tokenizer$"):
        Models.load(load_policy("embedded"), [Reference(str(tmp_path))])
    swapped = load_policy("embedded")
    save_policy(swapped, tmp_path / "swapped")
    file = tmp_path / "swapped" / "tokenizer.json"
    content = json.loads(file.read_text())
    words = content["model"]["vocab"]
    one, other = list(words)[-2:]
    words[one], words[other] = words[other], words[one]
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match="has another vocabulary"):
        Models.load(swapped, [Reference(str(tmp_path / "swapped"))])


def test_two_that_are_equal_share_a_moving_model(make_policy: MakePolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    policy, made, copied = make_policy(), list[Policy](), Policy.frozen_copy

    def counting(policy: Policy, **options: Any) -> Policy:
        made.append(copied(policy, **options))
        return made[-1]

    monkeypatch.setattr(Policy, "frozen_copy", counting)
    models = Models.load(policy, [MovingReference(0.9), MovingReference(0.9), MovingReference(0.5)])
    assert len(made) == len(models.moving) == 2


def test_two_teachers_have_columns_of_their_own() -> None:
    """Or a buffer would hold one's log-probs for the other's."""
    columns = [Reference(name, as_key="teacher_logp").column for name in ("a", "b", None)]
    assert len({*columns}) == 3 and columns[2] == "reference_logp"


@dataclass(frozen=True)
class Drawn(Asking):
    """SFT with the distance to a teacher's logits."""

    def logit_term(self, policy_logits: Tensor, reference_logits: Tensor | None, target: Tensor) -> Tensor:
        assert reference_logits is not None
        return (policy_logits - reference_logits).square().sum(1)


def test_a_teacher_gives_its_logits(teacher: Policy) -> None:
    policy, settings = load_policy("embedded"), Training(steps=1)
    logits = [one.head.logits(one.hidden(Sequences.of(ROWS, one.device))) for one in (policy, teacher)]
    expected = float((logits[0] - logits[1]).square().sum(1).mean().detach())
    (step,) = Trainer(policy, Drawn((ReferenceLogits(teacher.name),)), Fixed(), settings).run().steps
    assert step["logit_term"] == pytest.approx(expected, rel=1e-5) and expected > 1e-3


def test_the_mismatch_is_the_mean_of_the_completions_that_have_another_prompt(make_policy: MakePolicy) -> None:
    policy, start = make_policy(), make_policy(seed=1)
    rows = [row([5], [20, 2]), row([5], [21, 2]), row([5], [22, 23, 2]), row([6], [24, 2])]
    others = mismatched(rows)
    assert len(others) == 2, "of three of one prompt, one has a counterpart"
    gaps = [sum(scored(model, others).expected) for model in (policy, start)]
    found = assembled(policy, rows, Mismatched(), models=Models(policy, {None: start}))
    assert found["mismatched"].tolist() == pytest.approx([(gaps[0] - gaps[1]) / 2] * 4, rel=1e-6)


# Values of rows, and what is computed where they lack them


def test_rows_that_have_no_value_have_all_computed(make_policy: MakePolicy) -> None:
    """Those of one batch are of one model."""
    policy, start = make_policy(), make_policy(seed=1)
    some = [replace(ROWS[0], reference_logp=[-9.0] * 3), ROWS[1]]
    batch = assembled(policy, some, Reference(), models=Models(policy, {None: start}))
    assert flat(batch["reference_logp"], ROWS) == scored(start, ROWS)


@dataclass(frozen=True)
class Lengths(Input):
    """A stored number of each row, from a context with everything that a context has."""

    stage: ClassVar[Stage] = Stage.STORED
    key: ClassVar[str] = "lengths"

    def compute(self, context: Context) -> Tensor:
        assert context.own is context.policy and context.mask.device == context.policy.device
        return context.mask.sum(1).float()


def test_stored_values_are_those_of_the_rows_tokens(make_policy: MakePolicy) -> None:
    policy = make_policy()
    assembler = Assembler(policy, Models(policy, {None: policy}))
    per_token = assembler.values(Reference(), ROWS)
    assert [len(value) for value in per_token] == [3, 2] and np.concatenate(per_token).tolist() == scored(policy, ROWS)
    assert [value.tolist() for value in assembler.values(Lengths(), ROWS)] == [[3.0], [2.0]]
    assert assembler.values(Reference(), []) == []
    assert {value.dtype for value in per_token} == {np.dtype(np.float32)}, "whatever the model's"


def test_a_batch_has_rewards_if_all_of_its_rows_do(make_policy: MakePolicy) -> None:
    policy, rows = make_policy(), [replace(r, reward=value) for r, value in zip(ROWS, (0.0, -2.0), strict=True)]
    found = assembled(policy, rows).reward
    assert found is not None and found.tolist() == [0.0, -2.0]
    assert assembled(policy, [rows[0], ROWS[1]]).reward is None, "a reward that is not known is not 0"


def test_numbers_of_rows_are_as_exact_as_rewards(make_policy: MakePolicy) -> None:
    """Groups with demonstrations: rewards that differ by less than float32 resolves beside a common offset."""
    values = (1e6 + 0.01, 1e6 + 0.02)  # float32 has steps of 1/16 there
    rows = [replace(r, reward=value, columns={"it": value}) for r, value in zip(ROWS, values, strict=True)]
    found = assembled(make_policy(), rows, Outcome(), Column("it"))
    assert found["outcome"].tolist() == found["it"].tolist() == list(values)
    apart = group_centred(found["outcome"], torch.zeros(2, dtype=torch.long), torch.float32)
    assert apart.tolist() == pytest.approx([-0.005, 0.005], rel=1e-4)


@dataclass(frozen=True)
class Bare(Input):
    """A stored value that only a buffer can know."""

    stage: ClassVar[Stage] = Stage.STORED
    key: ClassVar[str] = "bare_value"


def test_what_nothing_can_compute_is_one_line(make_policy: MakePolicy) -> None:
    with pytest.raises(UserError, match=r"^the buffer has no bare_value: add it to every row$"):
        assembled(make_policy(), ROWS, Bare())
    with pytest.raises(UserError, match="needs a FORWARD input with this key"):
        assembled(make_policy(), ROWS, Snapshot("value"))
    with pytest.raises(UserError, match=r"unknown statistic 'entorpy': did you mean 'entropy'\?"):
        Statistic("entorpy")
    assert assembled(make_policy(), ROWS, Critic(), Snapshot("value"))["old_value"].eq(0).all()


# Forward passes that are not made twice


@pytest.fixture
def counted(make_policy: MakePolicy) -> tuple[Policy, list[int]]:
    """A policy, and the rows of each of its forward passes."""
    policy, passes = make_policy(), list[int]()
    policy.register_forward_pre_hook(lambda _, inputs: passes.append(len(inputs[0].ids)))
    return policy, passes


@dataclass(frozen=True)
class Half(Critic):
    """A critic that begins at 1/2."""

    key: ClassVar[str] = "half"
    initial: ClassVar[float | None] = 0.5


def test_what_asks_for_the_policys_log_probs_shares_one_forward_pass(counted: tuple[Policy, list[int]]) -> None:
    policy, passes = counted
    paid: list[tuple[Policy, int]] = []
    other = policy.frozen_copy()
    assembler = Assembler(
        policy, Models(policy, {None: other}), on_forward=lambda model, rows: paid.append((model, len(rows)))
    )
    asks = (Snapshot(), Critic(), Snapshot("value"), Reference())
    batch = assembler.assemble(ROWS, [(0,), (1,)], Asking(asks, whole=True))
    assert torch.equal(batch.logp, batch.snapshot_logp) and torch.equal(batch.snapshot_logp, batch.reference_logp)
    assert passes == [2] and paid == [(policy, 2), (other, 2)]
    half = assembler.assemble(ROWS, [(0,), (1,)], Asking((Half(), Snapshot("half"))))
    assert set(half["old_half"].flatten().tolist()) == {0.5}, "what it is before there is a module"
    policy.attach([Critic()])  # for another objective
    assert assembler.assemble(ROWS, [(0,), (1,)], Asking((Snapshot(),))).inputs.keys() == {"snapshot_logp"}


@dataclass(frozen=True)
class Shape(Input):
    """How many rows and tokens there are."""

    stage: ClassVar[Stage] = Stage.STEP
    key: ClassVar[str] = "shape"

    def compute(self, context: Context) -> Tensor:
        return context.mask * 10.0 + context.mask.sum()


def test_what_is_computed_at_every_step_sees_the_mask(make_policy: MakePolicy) -> None:
    assembler, units, asking = Assembler(make_policy()), [(0,), (1,)], Asking((Shape(),))
    first = assembler.assemble(ROWS, units, asking)
    second = assembler.renew(first, ROWS, units, asking)
    assert first["shape"].tolist() == second["shape"].tolist() == [[15.0, 15.0, 15.0], [15.0, 15.0, 5.0]]


def test_models_that_do_not_change_score_a_row_once(counted: tuple[Policy, list[int]], make_policy: MakePolicy) -> None:
    policy, passes = counted
    start = make_policy(seed=1)
    assembler = Assembler(policy, Models(policy, {None: start}), remember=True)
    first = assembler.log_probs(policy, ROWS)
    again = assembler.log_probs(policy, ROWS[::-1])
    assert torch.equal(again["logp"], first["logp"].flip(0))
    (short,) = assembler.log_probs(policy, ROWS[1:])["logp"]
    assert torch.equal(short, first["logp"][1, :2]) and passes == [2], "no wider than its rows"
    passes.clear()
    assert flat(assembler.log_probs(start, ROWS)["logp"], ROWS) == scored(start, ROWS), "another model's are its own"
    policy.attach([Critic()])
    assert assembler.log_probs(policy, ROWS).keys() == {"logp", "value"} and passes == [2], "more is asked for"
    assert assembler.log_probs(policy, ROWS).keys() == {"logp", "value"} and passes == [2]
    known = row([5], [20, 2])
    assembler.log_probs(policy, [known])
    alive = weakref.ref(known)
    del known
    assert alive() is not None, "or another row might have its id, and then its log-probs"


# Steps, and what a checkpoint holds


class Counting(nn.Linear):
    """A head that counts steps."""

    def __init__(self, size: int) -> None:
        super().__init__(size, 1)
        self.register_buffer("steps", torch.zeros(()))


@dataclass(frozen=True)
class Telling(MovingReference):
    """A moving reference with a head, which counts how often it is told of a step."""

    stage: ClassVar[Stage] = Stage.FORWARD

    def module(self, policy: Policy) -> nn.Module:
        return Counting(policy.hidden_size)

    def of_hidden(self, module: Any, hidden: Tensor) -> Tensor:
        found: Tensor = module(hidden)[:, 0]
        return found

    def after_step(self, context: Context) -> None:
        super().after_step(context)
        context.policy.modules_of_inputs[self.key].steps += 1  # type: ignore[assignment, operator]


@dataclass(frozen=True)
class Heard(Telling):
    """One with a head and no model."""

    key: ClassVar[str] = "heard"

    def moving_model(self, policy: Policy) -> None:  # type: ignore[override]
        return None


@dataclass(frozen=True)
class Both(Objective):
    """Two parts with a moving reference each, both of one key."""

    name: ClassVar[str] = "both"

    @property
    def requires(self) -> tuple[Input, ...]:
        return tuple(one for component in self.components for one in component.objective.requires)

    @property
    def components(self) -> tuple[Component, ...]:
        return Component(Asking((Telling(0.5), Heard(0.5))), 0.5, "a"), Component(
            Asking((MovingReference(0.9),)), 0.5, "b"
        )


class Fixed:
    """The same rows at every draw."""

    def draw(self) -> tuple[list[Trajectory], list[tuple[int, ...]]]:
        return ROWS, [(0,), (1,)]

    def state(self) -> None:
        """There is none."""

    def restore(self, state: None) -> None:
        """There is none."""


def test_what_belongs_to_inputs_is_told_of_steps_once_and_restored(make_policy: MakePolicy) -> None:
    def trainer(seed: int) -> Trainer:
        return Trainer(make_policy(seed=seed), Both(), [Fixed(), Fixed()], Training(steps=3, learning_rate=0.1))

    first, second = trainer(0), trainer(1)
    first.run()
    assert [float(cast(Tensor, first.policy.modules_of_inputs[key].steps)) for key in ("reference_logp", "heard")] == [
        3.0,
        3.0,
    ]
    untrained = [name for name, _ in first.policy.untrained_state()]
    assert untrained == ["reference_logp.steps", "heard.steps"], "what is trained is stored with the weights"
    tensors, state = state_of(first)
    restore(second, tensors, json.loads(json.dumps(state)))
    models = [[one.policy, *one.models.moving.values()] for one in (first, second)]
    assert len(models[0]) == 3 and not any(p.requires_grad for one in models[0][1:] for p in one.parameters())
    for before, after in zip(*models, strict=True):
        assert before is not after and before.state_dict().keys() == after.state_dict().keys()
        assert all(map(torch.equal, before.state_dict().values(), after.state_dict().values()))
    slow, fast = (next(one.parameters()) for one in (models[0][2], models[0][1]))
    assert not torch.equal(slow, fast), "each moves by its own decay"


def test_a_head_is_paid_for_by_the_completion_token(make_policy: MakePolicy) -> None:
    policy = make_policy()
    before = policy.flops(10, 4)
    policy.attach([Heard(0.5)])
    assert policy.flops(10, 4) - before == 2 * (policy.hidden_size + 1) * 4


# Memory


def test_an_error_that_is_not_of_memory_is_raised_at_once(make_policy: MakePolicy) -> None:
    policy, tries = make_policy(), list[int]()

    def fails(*_: Any) -> None:
        tries.append(1)
        raise RuntimeError("a bug")

    policy.register_forward_pre_hook(fails)
    told: list[tuple[int, int]] = []
    with pytest.raises(RuntimeError, match="a bug"):
        MicroBatches(1000, lambda before, now: told.append((before, now))).log_probs(policy, ROWS)
    assert tries == [1] and told == []


def test_memory_that_runs_out_halves_micro_batches_down_to_one_row() -> None:
    """Of 36 tokens 18, then 9, which is a row alone; fewer would change nothing."""
    rows, told = [row([5] * 7, [20, 2])] * 4, list[tuple[int, int]]()

    def work() -> None:
        raise MemoryError

    with pytest.raises(UserError, match="out of memory with one sequence per micro-batch"):
        MicroBatches(64, lambda before, now: told.append((before, now))).within_memory(rows, work)
    assert told == [(64, 18), (18, 9)]
