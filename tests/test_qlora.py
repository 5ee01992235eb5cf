"""QLoRA: adapters over weights in 4 bits. Without bitsandbytes most of this is skipped."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from comparisons import inline_pool, small

from rlzoo import analyze_variance, compare
from rlzoo.buffers import OfflineBuffer
from rlzoo.config import Sampling, Training, load_experiment
from rlzoo.errors import UserError
from rlzoo.objective import get_objective
from rlzoo.policy import Policy, load_policy, log_probs
from rlzoo.policy.adapters import adapters
from rlzoo.policy.loading import load_for, save_policy
from rlzoo.policy.sequences import Row
from rlzoo.rollout import TransformersSampler
from rlzoo.testing.engine import SameRows, rows_of, units_of
from rlzoo.training import Trainer

needs_bitsandbytes = pytest.mark.skipif(
    find_spec("bitsandbytes") is None, reason="needs bitsandbytes: pip install 'rlzoo[qlora]'"
)
ROWS = [([20, 21, 22], [23, 24, 25]), ([30], [31, 32])]


def settings_of(**changes: Any) -> Training:
    given = {"steps": 3, "learning_rate": 1e-2, "warmup_ratio": 0.0, "device": "cpu", **changes}
    return Training.model_validate({"lora": {"rank": 4, "load_in_4bit": True}, **given})


@pytest.fixture
def policy() -> Iterator[Policy]:
    yield load_for("embedded", settings_of())


def scored(policy: Policy) -> torch.Tensor:
    return torch.tensor([logp for row in log_probs(policy, ROWS) for logp in row])


def trained(policy: Policy, name: str, **options: Any) -> Trainer:
    objective = get_objective(name, **options)
    trainer = Trainer(policy, objective, SameRows(rows_of(policy, objective), units_of(objective)), settings_of())
    trainer.run()
    return trainer


@needs_bitsandbytes
def test_weights_take_less_memory_and_give_nearly_the_same_log_probs(policy: Policy) -> None:
    plain = load_policy("embedded", device="cpu")
    layers, wide = (
        sum(p.numel() * p.element_size() for p in one.model.base_model.layers.parameters()) for one in (policy, plain)
    )
    assert layers < wide / 7
    assert policy.flops(10, 5) == plain.flops(10, 5)
    found, expected = (scored(one) for one in (policy, plain))
    gap = (found - expected).abs().max()
    assert 1e-3 < gap < 0.25 * expected.abs().max()


@pytest.mark.slow
@needs_bitsandbytes
@pytest.mark.parametrize(("name", "options"), [("dft", {}), ("dpo", {}), ("ppo", {}), ("iw-sft", {"variant": "ema"})])
def test_training_moves_adapters_alone(policy: Policy, name: str, options: dict[str, Any]) -> None:
    before = {key: p.detach().clone() for key, p in policy.model.named_parameters()}
    base = log_probs(policy, ROWS)
    trainer = trained(policy, name, **options)
    assert len(trainer.record.steps) == 3 and all(row["gradient_norm"] > 0 for row in trainer.record.steps)
    after = dict(policy.model.named_parameters())
    for key, value in before.items():
        place = key if key in after else key.replace(".weight", ".base_layer.weight")
        assert torch.equal(after[place], value), key
    assert any(p.abs().sum() > 0 for key, p in after.items() if ".lora_B." in key)
    with_graph = policy(policy.collate([Row(*row) for row in ROWS])).logp
    assert with_graph.requires_grad
    moved = log_probs(policy, ROWS)
    assert [row[: len(one)] for row, one in zip(with_graph.tolist(), moved, strict=True)] == moved
    assert moved != base and scored(policy).isfinite().all()
    assert log_probs(policy.reference(), ROWS) == base


@pytest.mark.slow
@needs_bitsandbytes
def test_what_is_saved_is_whole_and_samples_alike(policy: Policy, tmp_path: Path) -> None:
    trained(policy, "dft")
    kept = policy.model.config.quantization_config
    save_policy(policy, tmp_path)
    assert policy.model.config.quantization_config is kept
    assert policy.model.hf_quantizer is not None  # as before
    assert "quant" not in (tmp_path / "config.json").read_text()
    saved = load_policy(str(tmp_path), device="cpu")
    assert {p.dtype for p in saved.model.parameters()} == {torch.float32}
    found, expected = (scored(one) for one in (saved, policy))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    settings = Sampling(samples=4, max_new_tokens=12)
    first, second = (TransformersSampler(one).sample([row[0] for row in ROWS], settings, 0) for one in (saved, policy))
    assert first == second

    from peft import PeftModel

    assert isinstance(PeftModel.from_pretrained(load_policy("embedded").model, tmp_path / "adapter"), PeftModel)


@pytest.mark.slow
@needs_bitsandbytes
def test_an_interrupted_run_ends_with_the_same_bits(tmp_path: Path) -> None:
    def run(folder: Path, steps: int) -> list[torch.Tensor]:
        torch.manual_seed(0)
        policy, objective = load_for("embedded", settings_of()), get_objective("grpo")
        settings = settings_of(steps=4, checkpoint_seconds=0.0)
        source = Stopping(rows_of(policy, objective), units_of(objective), steps)
        trainer = Trainer(policy, objective, source, settings, checkpoints=folder)
        with suppress(StopIteration):
            trainer.run()
        return [p.detach().clone() for p in policy.parameters() if p.requires_grad]

    run(tmp_path / "stopped", 2)
    for resumed, whole in zip(run(tmp_path / "stopped", 9), run(tmp_path / "whole", 9), strict=True):
        assert torch.equal(resumed, whole)


class Stopping(SameRows):
    """The same rows, and after some draws an interruption."""

    def __init__(self, rows: Any, units: Any, steps: int) -> None:
        super().__init__(rows, units)
        self.left = steps

    def draw(self) -> Any:
        self.left -= 1
        if self.left < 0:
            raise StopIteration
        return super().draw()

    def state(self) -> Any:
        return None

    def restore(self, state: Any) -> None:
        pass


@pytest.mark.slow
@needs_bitsandbytes
def test_a_comparison_of_adapters_over_4_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a choice of learning rates: what was chosen is read again, whole."""
    monkeypatch.setattr("rlzoo.comparison.runner.pool", inline_pool)
    monkeypatch.setattr("rlzoo.comparison.runner.write_report", lambda *_: None)
    rows = {"sft": {"learning_rates": [1e-3, 1e-2]}, "dft": {}}
    experiment = small(rows, training__lora={"rank": 2, "load_in_4bit": True})
    results = compare(experiment, tmp_path)
    assert not results["failed"] and {cell["algorithm"] for cell in results["cells"]} == {"sft", "dft"}


@needs_bitsandbytes
def test_what_4_bits_are_not_for(policy: Policy) -> None:
    objective = get_objective("dft")
    rows = rows_of(policy, objective)
    source = SameRows(rows, units_of(objective))
    with pytest.raises(UserError, match="weights in 4 bits cannot be trained: train adapters"):
        Trainer(policy, objective, source, settings_of(lora=None))
    with pytest.raises(UserError, match=r"load_policy\(\.\.\., load_in_4bit=True\)"):
        Trainer(load_policy("embedded", device="cpu"), objective, source, settings_of())
    with pytest.raises(UserError, match="weights in 4 bits have no gradient to measure"):
        analyze_variance(policy, ["sft"], OfflineBuffer.from_trajectories(rows), rows=len(rows))
    assert not adapters(policy.model)


def test_one_base_for_all_rows() -> None:
    given = {"sft": {"training": {"lora": {"load_in_4bit": True}}}}
    with pytest.raises(UserError, match=r"lora\.load_in_4bit of 'sft' would change the base that all rows share"):
        load_experiment("arithmetic", {"algorithms": given})


def test_bitsandbytes_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match=r"lora.load_in_4bit needs bitsandbytes: pip install 'rlzoo\[qlora\]'"):
        load_for("embedded", settings_of())
