"""Distillation on own samples: its expectation is the gradient of a divergence, and whose weights a teacher has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from batches import hand_batch
from comparisons import small
from test_checkpoints import EVERY, rows_of

from rlzoo import Collector, compare
from rlzoo.buffers import OfflineBuffer
from rlzoo.buffers.problems import load_problems
from rlzoo.config import ProblemSource, Sampling
from rlzoo.errors import UserError
from rlzoo.inputs import Behaviour, Privileged, Reference
from rlzoo.objective import get_objective, surrogate
from rlzoo.policy import Policy, load_policy
from rlzoo.policy.loading import save_policy
from rlzoo.rollout import TransformersSampler
from rlzoo.testing.batches import gradients
from rlzoo.training import Trainer, train
from rlzoo.types import TokenBatch

MakePolicy = Callable[..., Policy]
AGAIN = "{prompt}Once more: {prompt}"


def test_by_hand() -> None:
    # log π = ln ½, log π_T = ln ¼ and ln 1, log μ = ln ½ and ln ⅛: gaps -ln 2 and ln 2, ratios 1 and 4, capped at 2
    batch = hand_batch([[0.5, 0.5]]).detach()
    teacher = torch.tensor([[0.25, 1.0]], dtype=torch.float64).log()
    behaviour = torch.tensor([[0.5, 0.125]], dtype=torch.float64).log()
    ln2 = torch.log(torch.tensor(2.0, dtype=torch.float64))
    for name, key, options in (("opd", "teacher_logp", {"teacher": "x"}), ("sdft", "privileged_logp", {})):
        given = batch.replace(behaviour_logp=behaviour, **{key: teacher})
        found = get_objective(name, **options).coefficients(given)
        torch.testing.assert_close(found.values, torch.stack([-ln2, 2 * ln2])[None])
        torch.testing.assert_close(found.metrics["reverse_kl"], torch.stack([ln2, -ln2])[None])
        free = get_objective(name, ratio_max=None, **options).coefficients(given)
        torch.testing.assert_close(free.values, torch.stack([-ln2, ln2])[None])


def test_the_expectation_over_samples_is_the_gradient_of_the_reverse_kl() -> None:
    draw = torch.Generator().manual_seed(0)
    logits, wanted = (torch.randn(7, dtype=torch.float64, generator=draw) for _ in range(2))
    logits.requires_grad_()
    logp, teacher = logits.log_softmax(0), wanted.log_softmax(0)
    (expected,) = torch.autograd.grad((logp.exp() * (logp - teacher)).sum(), logits, retain_graph=True)
    rows = TokenBatch(logp[:, None], torch.ones(7, 1, dtype=torch.bool), teacher_logp=teacher[:, None])
    rows = rows.replace(behaviour_logp=logp[:, None].detach())
    found = get_objective("opd", teacher="x").coefficients(rows.detach()).values[:, 0]
    (ours,) = torch.autograd.grad(-(logp.detach().exp() * found * logp).sum(), logits)
    torch.testing.assert_close(ours, expected)


def test_completions_count_equally_in_sdft_and_tokens_in_opd() -> None:
    batch = hand_batch([[0.5, 0.5, 0.5], [0.5]])
    teacher = batch.logp.detach() - 1.0
    batch = batch.replace(teacher_logp=teacher, privileged_logp=teacher, behaviour_logp=batch.logp.detach())
    by_token = gradients(surrogate(get_objective("opd", teacher="x"), batch), batch)
    by_row = gradients(surrogate(get_objective("sdft"), batch), batch)
    assert by_token[batch.mask.flatten()].tolist() == pytest.approx([1 / 4] * 4)
    assert by_row[batch.mask.flatten()].tolist() == pytest.approx([1 / 6] * 3 + [1 / 2])


@pytest.mark.parametrize(("teacher", "decay"), [("moving", 0.75), ("initial", 1.0), ("live", 0.0)])
def test_what_is_requested(teacher: str, decay: float) -> None:
    template = "{prompt} {hint}"
    asked = get_objective("sdft", template=template, teacher=teacher, teacher_decay=0.75).requires
    assert asked == (Privileged(template, decay=decay), Behaviour())
    assert get_objective("opd", teacher="t", ratio_max=None).requires == (Reference("t", as_key="teacher_logp"),)
    with pytest.raises(UserError, match="objective 'opd' needs the option 'teacher', which has no default"):
        get_objective("opd")
    with pytest.raises(UserError, match=r"a teacher's weights need a decay between 0 and 1, got 1\.5"):
        get_objective("sdft", teacher_decay=1.5)


def gaps(policy: Policy, buffer: OfflineBuffer, reference: Policy | None = None, **options: Any) -> list[float]:
    """The reverse KL that each step reports."""
    if reference is None:
        record = train(policy, get_objective("sdft", **options), buffer, EVERY, seed=3)
    else:
        objective = get_objective("sdft", **options)
        source = [row for row in buffer if row.source == "policy"][:4]
        record = Trainer(policy, objective, Fixed(source), EVERY, reference=reference).run()
    return [step["reverse_kl"] for step in record.steps]


class Fixed:
    """The same rows at every draw."""

    def __init__(self, rows: list[Any]) -> None:
        self.rows = rows

    def draw(self) -> tuple[list[Any], list[tuple[int, ...]]]:
        return self.rows, [(i,) for i in range(len(self.rows))]


def test_a_teacher_that_knows_no_more_teaches_what_its_weights_know(make_policy: MakePolicy) -> None:
    """Without anything privileged the live policy has nothing to say, and the initial one pulls the policy back."""
    buffer = rows_of(make_policy())
    assert gaps(make_policy(), buffer, template="{prompt}", teacher="live") == pytest.approx([0.0] * 7, abs=1e-12)
    away = gaps(make_policy(seed=1), buffer, reference=make_policy(), template="{prompt}", teacher="initial")
    assert abs(away[0]) > 1e-3 and max(map(abs, away)) > 0


@pytest.mark.slow
def test_the_moving_teacher_is_between_the_initial_and_the_live_one(make_policy: MakePolicy) -> None:
    buffer = rows_of(make_policy())

    def taught(teacher: str, decay: float = 0.5) -> list[float]:
        return gaps(make_policy(), buffer, template=AGAIN, teacher=teacher, teacher_decay=decay)

    live, initial, moving = taught("live"), taught("initial"), taught("moving")
    assert live[0] == initial[0] == moving[0] and len({live[2], initial[2], moving[2]}) == 3
    assert taught("moving", 1.0) == initial and taught("moving", 0.0) == live


@pytest.mark.slow
def test_self_distillation_from_the_initial_policy_is_distillation_from_it(
    make_policy: MakePolicy, tmp_path: Path
) -> None:
    policy = load_policy("embedded")
    save_policy(policy, tmp_path / "base")
    buffer = one_length(rows_of(policy))
    weights = []
    for name, options in (
        ("sdft", {"teacher": "initial", "template": "{prompt}"}),
        ("opd", {"teacher": str(tmp_path / "base")}),
    ):
        policy = load_policy("embedded")
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter.mul_(0.97)
        base = load_policy("embedded", frozen=True)
        source = Fixed([row for row in buffer if row.source == "policy"][:4])
        record = Trainer(policy, get_objective(name, **options), source, EVERY, reference=base).run()
        assert record.steps[0]["reverse_kl"] != 0
        weights.append(torch.cat([p.detach().flatten() for p in policy.parameters()]))
    torch.testing.assert_close(*weights, rtol=0, atol=1e-5)


def one_length(buffer: OfflineBuffer) -> OfflineBuffer:
    """The same rows, with completions cut to a common length."""
    size = min(len(row.completion_ids) for row in buffer)
    rows = [
        replace(row, completion_ids=row.completion_ids[:size], behaviour_logp=(row.behaviour_logp or [])[:size] or None)
        for row in buffer
    ]
    return OfflineBuffer.from_trajectories(rows)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["opd", "sdft"])
def test_it_learns_online_from_fresh_samples(name: str, tmp_path: Path) -> None:
    policy = load_policy("embedded")
    teacher: dict[str, Any] = {}
    if name == "opd":
        other = load_policy("embedded")
        with torch.no_grad():
            other.model.get_output_embeddings().weight.mul_(0.8)  # a teacher that is less certain
        save_policy(other, tmp_path / "teacher")
        teacher = {"teacher": str(tmp_path / "teacher")}
    problems = load_problems(ProblemSource(source="world:arithmetic/train", limit=4))
    sampling = Sampling(samples=2, max_new_tokens=8)
    settings = EVERY.model_copy(update={"steps": 2, "batch_size": 4, "learning_rate": 1e-4})
    collector = Collector(policy, TransformersSampler(policy), problems, nothing, sampling, settings)
    steps = train(policy, get_objective(name, **teacher), collector, settings).steps
    assert [step["ratio"] for step in steps] == pytest.approx([1.0, 1.0], abs=1e-4)
    assert all(step["gradient_norm"] > 0 and step["reverse_kl"] != 0 for step in steps)


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_a_comparison_distils_online_and_offline(tmp_path: Path) -> None:
    other = load_policy("embedded")
    with torch.no_grad():
        other.model.get_output_embeddings().weight.mul_(0.8)
    save_policy(other, tmp_path / "teacher")
    rows = {
        "opd": {"options": {"teacher": str(tmp_path / "teacher")}},
        "sdft": {"mode": "online", "options": {"template": "{prompt}The answer is {answer}.\n"}},
    }
    found = compare(small(rows, seeds=[1]), tmp_path / "out")
    assert found["failed"] == [] and len(found["cells"]) == 2
    for cell in found["cells"]:
        assert all(step["reverse_kl"] != 0 and step["gradient_norm"] > 0 for step in cell["training"])
        assert cell["training"][0]["ratio"] == pytest.approx(1, abs=1e-4)


def nothing(completions: list[str], **_: Any) -> list[float]:
    """A reward that says nothing: distillation does not read it."""
    return [0.0] * len(completions)
