"""Which classes of tokens carry a gradient's noise: against every token's gradient by autograd, and as reported."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from chat_templates import policy_of
from comparisons import inline_pool

from rlzoo import OfflineBuffer, analyze_variance, load_policy
from rlzoo.buffers import Buffer
from rlzoo.cli import main
from rlzoo.document.estimates import number
from rlzoo.errors import UserError
from rlzoo.policy import Policy
from rlzoo.types import Trajectory
from rlzoo.variance.class_report import class_blocks, class_table
from rlzoo.variance.classes import default_classes, shares
from rlzoo.variance.noise import Units

TEXTS = [f"{a}+{b}={a + b} so it is\n#### {a + b}" for a, b in ((3, 4), (17, 25), (8, 9), (40, 2), (6, 60), (7, 7))]


@pytest.fixture(scope="module")
def policy() -> Policy:
    found = policy_of(load_policy("embedded").tokenizer)
    for parameter in found.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, 1.0, 0.2)
    found.model.double()
    return found


@pytest.fixture(scope="module")
def buffer(policy: Policy) -> Buffer:
    """Two demonstrations per prompt, of which the first's middle is not learned from."""
    rows = []
    for i, text in enumerate(TEXTS * 2):
        prompt = policy.tokenizer(f"{i % len(TEXTS)}?", add_special_tokens=False)["input_ids"]
        ids = [*policy.tokenizer(text, add_special_tokens=False)["input_ids"], policy.tokenizer.eos_token_id]
        mask = [not 2 <= place < 4 for place in range(len(ids))] if i < len(TEXTS) else None
        row = Trajectory("", text, prompt, ids[: len(ids) - i % 3], str(i % len(TEXTS)), truncated=i % 3 > 0)
        rows.append(replace(row, completion_mask=mask and mask[: len(row.completion_ids)]))
    return OfflineBuffer.from_trajectories(rows)


def token_log_probs(policy: Policy, row: Trajectory) -> torch.Tensor:
    """log π of every completion token, with its graph, from the model's own logits."""
    ids, before = torch.tensor([row.prompt_ids + row.completion_ids]), len(row.prompt_ids)
    logp = policy.model(ids).logits[0, before - 1 : -1].log_softmax(1)
    found: torch.Tensor = logp.gather(1, ids[0, before:, None])[:, 0]
    return found


def brute_force(policy: Policy, buffer: Buffer, weight: Any) -> dict[str, torch.Tensor]:
    """Each prompt's gradient by class [P, N], of the loss Σ_t -weight(p_t) log π_t / learned tokens · prompts."""
    ends = {policy.tokenizer.eos_token_id}
    prompts = sorted({row.prompt_id for row in buffer})
    tokens = sum(sum(row.completion_mask or [True] * len(row.completion_ids)) for row in buffer)
    found: dict[str, torch.Tensor] = {}
    for row in buffer:
        logp = token_log_probs(policy, row)
        for place, token in enumerate(row.completion_ids):
            parts = torch.autograd.grad(logp[place], list(policy.model.parameters()), retain_graph=True)
            gradient, p = torch.cat([part.flatten() for part in parts]), logp[place].exp().detach()
            if row.completion_mask is not None and not row.completion_mask[place]:
                continue
            text = policy.tokenizer.decode([token])
            name = "end of sequence" if token in ends else default_classes(text)
            whole = found.setdefault(name, torch.zeros(len(prompts), len(gradient), dtype=torch.float64))
            whole[prompts.index(row.prompt_id)] -= weight(p) * gradient * len(prompts) / tokens
    return found


def trace(one: torch.Tensor, other: torch.Tensor) -> float:
    return float(((one - one.mean(0)) * (other - other.mean(0))).sum()) / (len(one) - 1)


def inner(one: torch.Tensor, other: torch.Tensor) -> float:
    products = one @ other.mT
    return float(products.sum() - products.diagonal().sum()) / (len(one) * (len(one) - 1))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "weight", "held"), [("sft", lambda p: 1.0, 2), ("dft", lambda p: p, None)])
def test_classes_have_the_noise_of_their_tokens_gradients(
    policy: Policy, buffer: Buffer, name: str, weight: Any, held: int | None
) -> None:
    exact = brute_force(policy, buffer, weight)
    whole = torch.stack(list(exact.values())).sum(0)
    found = analyze_variance(policy, [name], buffer, draws=0, class_gradients=True, means_held=held)
    entry = found["objectives"][name]
    classes = entry["token_classes"]
    assert classes.keys() == exact.keys() >= {"digits", "operators", "end of sequence", "format"}
    assert entry["data_noise"]["trace_cov"]["value"] == pytest.approx(trace(whole, whole), rel=1e-6)
    for one, part in exact.items():
        own = classes[one]
        assert own["trace_cov"]["value"] == pytest.approx(trace(part, part), rel=1e-6)
        assert own["grad_norm_sq"]["value"] == pytest.approx(inner(part, part), rel=1e-5, abs=1e-9)
        share = trace(part, whole) / trace(whole, whole)
        assert own["variance_share"]["value"] == pytest.approx(share, abs=0.03)
        assert own["variance_share"]["ci_low"] < share < own["variance_share"]["ci_high"]
    assert sum(own["variance_share"]["value"] for own in classes.values()) == pytest.approx(1, abs=1e-6)


def test_shares_of_a_visible_gradient_are_exact_and_sum_to_one() -> None:
    draw = np.random.default_rng(0)
    means = np.array([[3.0, 0, 0, 0], [0, 2.0, 0, 0], [-0.5, 0, 0, 1.0]])
    prompts, names = 200, range(3)
    parts = [draw.normal(mean, 1 + 0.5 * k, (prompts, 4)) for k, mean in enumerate(means)]
    whole = np.sum(parts, axis=0)
    units = [Units((g**2).sum(1), g, float(g.mean(0) @ g.mean(0)), np.arange(prompts)) for g in (*parts, whole)]
    found = [shares(units[k], units[3], float(parts[k].mean(0) @ whole.mean(0))) for k in names]
    for which in (0, 1):
        assert sum(pair[which]["value"] for pair in found) == pytest.approx(1)
    true = [1 / (1 + 1.5**2 + 4), 1.5**2 / (1 + 1.5**2 + 4), 4 / (1 + 1.5**2 + 4)]
    total = means.sum(0)
    for k in names:
        assert found[k][0]["ci_low"] < true[k] < found[k][0]["ci_high"]
        assert found[k][1]["ci_low"] < means[k] @ total / (total @ total) < found[k][1]["ci_high"]


def test_shares_of_a_hidden_gradient_are_not_told() -> None:
    g = np.random.default_rng(0).normal(size=(50, 3))
    units = Units((g**2).sum(1), g, float(g.mean(0) @ g.mean(0)), np.arange(50))
    variance, gradient = shares(units, units, units.mean_squared_norm)
    assert variance["value"] == pytest.approx(1) and "noise hides" in gradient["reason"]
    few = Units(units.squared_norm[:2], g[:2], 1.0, np.arange(2))
    assert "fewer than" in shares(few, few, 1.0)[0]["reason"]


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("17", "digits"), (" 5", "digits"), ("3.5", "digits"), ("+", "operators"), (" =", "operators"),
        ("×", "operators"), ("####", "format"), ("**", "format"), ("\n\n", "format"), (":", "format"),
        ("<think>", "format"), ("\\frac", "format"), (" Therefore", "connectives"), ("then", "connectives"),
        ("apples", "words"), ("x2", "words"),
    ],
)  # fmt: skip
def test_what_a_token_is(text: str, name: str) -> None:
    assert default_classes(text) == name


def test_any_function_may_say_what_a_token_is(policy: Policy, buffer: Buffer, tmp_path: Any) -> None:
    (tmp_path / "mine.py").write_text("def parity(text):\n    return 'even' if len(text) % 2 == 0 else 'odd'\n")
    found = analyze_variance(
        policy, ["sft"], buffer, draws=0, gradients=False, token_classes=f"{tmp_path / 'mine.py'}:parity"
    )
    own = found["objectives"]["sft"]["token_classes"]
    assert own.keys() <= {"even", "odd", "end of sequence"} and "variance_share" not in own["odd"]
    assert sum(one["tokens"] for one in own.values()) == pytest.approx(1)
    assert sum(one["proxy"] for one in own.values()) == pytest.approx(1)
    wrong: Any
    for wrong, told in ((lambda text: 3, "gives 3 for the token"), (lambda text: text.x, "failed on the token")):
        with pytest.raises(UserError, match=told):
            analyze_variance(policy, ["sft"], buffer, draws=0, gradients=False, token_classes=wrong)
    with pytest.raises(UserError, match="classes of tokens 'nothing'"):
        analyze_variance(policy, ["sft"], buffer, draws=0, gradients=False, token_classes="nothing")


@pytest.mark.slow
def test_the_command_measures_classes_of_a_file(
    buffer: Buffer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("rlzoo.variance.run.pool", inline_pool)
    buffer.save(tmp_path / "rows")
    (tmp_path / "mine.py").write_text("def kind(text):\n    return 'even' if len(text) % 2 == 0 else 'odd'\n")
    options = ["--objectives", "sft", "--draws", "0", "--every", "0", "--rows", "8", "--class-gradients"]
    options += ["--token-classes", f"{tmp_path / 'mine.py'}:kind", "--buffer", str(tmp_path / "rows")]
    assert main(["variance", *options, "--out", str(tmp_path / "out")]) == 0
    assert "classes of tokens: % of tr Σ" in capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "variance.json").read_text())
    own = found["objectives"]["sft"]["token_classes"]
    assert "odd" in own and sum(one["variance_share"]["value"] for one in own.values()) == pytest.approx(1, abs=1e-6)
    assert "By class of token" in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.slow
def test_full_vocabulary_terms_belong_to_the_class_of_their_position(policy: Policy, buffer: Buffer) -> None:
    found = analyze_variance(policy, ["gift"], buffer, draws=0, class_gradients=True)
    own = found["objectives"]["gift"]["token_classes"]
    assert sum(one["variance_share"]["value"] for one in own.values()) == pytest.approx(1, abs=1e-6)


@pytest.mark.slow
def test_the_report_has_them(policy: Policy, buffer: Buffer) -> None:
    for measured in (False, True):
        found = analyze_variance(policy, ["sft", "dft"], buffer, draws=0, class_gradients=measured)
        shares = class_table(found)
        assert shares is not None
        table, what = shares
        assert len(table.rows) == 2 and ("tr Σ" in what) is measured
        text = " ".join(str(block) for block in class_blocks(found))
        one = found["objectives"]["dft"]["token_classes"]["digits"]
        shown = number(100 * (one["variance_share"]["value"] if measured else one["proxy"]))
        assert shown in text and ("alone" in text) is measured
    assert not list(class_blocks({"objectives": {"sft": {}}})) and class_table({"objectives": {"sft": {}}}) is None
