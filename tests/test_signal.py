"""Data without a gradient is reported once, with counts; what happens to truncated completions is the user's choice."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from batches import hand_batch
from comparisons import small
from test_training import RAW, Batch, Fixed, distance, make_batch, trained

from rlzoo import analyze_variance
from rlzoo.buffers import Buffer, OfflineBuffer
from rlzoo.cli import main
from rlzoo.comparison.resolve import views_of
from rlzoo.errors import UserError
from rlzoo.inputs import Input, Truncated
from rlzoo.objective import Objective, get_objective
from rlzoo.policy import Assembler, Policy
from rlzoo.training import Trainer, train
from rlzoo.training.batches import Drawn, FreshSource
from rlzoo.training.tally import with_gradient
from rlzoo.types import Coefficients, Selection, TokenBatch, Trajectory

MakePolicy = Callable[..., Policy]
SINGLE = "a single sample and therefore no gradient"
FLAT = "groups drawn have equal rewards and therefore no gradient"
SILENT = "batches have no nonzero advantage"

SINGLES: list[tuple[int, ...]] = [(i,) for i in range(8)]
PAIRED: list[tuple[int, ...]] = [(i, i + 1) for i in range(0, 8, 2)]


def events_of(policy: Policy, name: str, batch: Batch, **options: Any) -> list[str]:
    return Trainer(policy, get_objective(name, **options), Fixed(batch), RAW).run().events


def whole_rows(policy: Policy) -> list[Trajectory]:
    """Four groups of two, of which none is empty: training takes no such row from a buffer."""
    one: dict[str, Any] = {"completion_ids": [5], "behaviour_logp": [-1.0], "reference_logp": [-1.0]}
    return [r if r.completion_ids else replace(r, **one) for r in make_batch(policy, Selection.GROUPS)[0]]


def groups_of(policy: Policy, *rewards: float, size: int = 2) -> Batch:
    """Groups of ``size`` rows with these rewards."""
    rows = [replace(row, reward=reward) for row, reward in zip(whole_rows(policy), rewards, strict=False)]
    return rows, [tuple(range(i, i + size)) for i in range(0, len(rows), size)]


# Groups and batches without a gradient


@pytest.mark.parametrize("name", ["grpo", "dr-grpo", "gspo", "cispo", "rloo", "otb"])
def test_flat_groups_are_told_once_with_their_number(name: str, make_policy: MakePolicy) -> None:
    policy = make_policy()
    events = events_of(policy, name, groups_of(policy, 1.0, 0.0, 1000.1, 1000.1, 1.0, 0.0, 0.3, 0.3))
    assert events == [f"{name}: 4 of 8 {FLAT}"]  # two steps, on the same four groups


def test_a_batch_is_counted_once_however_many_updates_it_has(make_policy: MakePolicy) -> None:
    policy = make_policy()
    source = Fixed(groups_of(policy, 1.0, 0.0, 0.3, 0.3))
    settings = RAW.model_copy(update={"updates_per_batch": 2})
    events = Trainer(policy, get_objective("grpo"), source, settings).run().events
    assert events == [f"grpo: 1 of 2 {FLAT}"]


def test_a_masked_token_gives_no_gradient_whatever_its_advantage() -> None:
    batch = hand_batch([[0.5, 0.5], [0.5]])
    batch = batch.replace(mask=torch.tensor([[False, True], [False, False]]), advantage=torch.ones(2, 2))
    (component,) = get_objective("grpo").components
    assert with_gradient(Drawn(component, [], [], batch)).tolist() == [True, False]


def test_groups_of_one_are_told_once_and_say_what_to_do(make_policy: MakePolicy) -> None:
    policy = make_policy()
    events = events_of(policy, "grpo", groups_of(policy, 1.0, 0.0, 1.0, 0.0, size=1))
    assert [event.split(": ")[0] for event in events] == ["grpo", "grpo"]
    assert f"all 8 groups drawn have {SINGLE}" in events[0] and "sample more per prompt (rollouts.samples)" in events[0]
    assert f"all 2 {SILENT}" in events[1]


@pytest.mark.parametrize("name", ["reinforce", "ppo"])
def test_an_objective_that_learns_from_flat_groups_says_nothing_of_them(name: str, make_policy: MakePolicy) -> None:
    policy = make_policy()
    assert events_of(policy, name, groups_of(policy, 1.0, 1.0, 0.0, 0.0)) == []


def test_a_batch_of_equal_rewards_is_told(make_policy: MakePolicy) -> None:
    policy = make_policy()
    events = events_of(policy, "reinforce", groups_of(policy, 0.1, 0.1, 0.1, size=3))
    assert f"reinforce: all 2 {SILENT}: their rewards give no gradient" in events
    source, once = Fixed(groups_of(policy, 0.1, 0.1, 0.1, size=3)), RAW.model_copy(update={"steps": 1})
    (*_, event) = Trainer(policy, get_objective("reinforce"), source, once).run().events
    assert event.startswith(f"reinforce: 1 of 1 {SILENT}"), "one is not all"


def test_the_parts_of_a_mixture_are_told_apart(make_policy: MakePolicy) -> None:
    policy = make_policy()
    flat, demonstrations = groups_of(policy, 1.0, 1.0, 1.0, 0.0), make_batch(policy, Selection.DEMONSTRATIONS)
    objective = get_objective("mixture", weights={"sft": 1.0, "grpo": 1.0})
    events = Trainer(policy, objective, [Fixed(demonstrations), Fixed(flat)], RAW).run().events
    assert events == [f"grpo: 2 of 4 {FLAT}"]


def test_counts_go_on_with_the_run(make_policy: MakePolicy, tmp_path: Path) -> None:
    rows, _ = groups_of(make_policy(), 1.0, 0.0, 0.5, 0.5)
    buffer = OfflineBuffer.from_trajectories(rows)
    settings = RAW.model_copy(update={"steps": 4, "batch_size": 4, "checkpoint_seconds": 0.0})
    objective = get_objective("grpo")

    def stop(trainer: Trainer, step: int) -> None:
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(make_policy(), objective, buffer, settings, callbacks=[stop], checkpoints=tmp_path)
    assert train(make_policy(), objective, buffer, settings, checkpoints=tmp_path).events == [f"grpo: 4 of 8 {FLAT}"]


def test_groups_that_dapo_leaves_out_are_told(make_policy: MakePolicy) -> None:
    rows, _ = groups_of(make_policy(), 1.0, 0.0, 0.5, 0.5, 0.0, 0.0)
    events = train(make_policy(), get_objective("dapo"), OfflineBuffer.from_trajectories(rows), RAW).events
    assert events == ["dapo: left out 2 groups of equal rewards"]


def test_fresh_batches_that_are_sampled_again_are_told(make_policy: MakePolicy) -> None:
    rows, _ = groups_of(make_policy(), 1.0, 0.0, 0.5, 0.5)
    asked: list[int] = []

    def collect(version: int) -> Buffer:
        asked.append(version)
        flat = [replace(row, reward=1.0) for row in rows]
        return OfflineBuffer.from_trajectories(flat if len(asked) == 1 else rows)

    objective = get_objective("dapo")
    source = FreshSource(collect, objective.learns_from, **objective.view_options)
    events = Trainer(make_policy(), objective, source, RAW).run().events
    assert events == [
        "dapo: left out 1 fresh batches with nothing to learn from",
        "dapo: left out 2 groups of equal rewards",
    ]


@pytest.mark.slow
def test_the_command_tells(make_policy: MakePolicy, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows, _ = groups_of(make_policy(), 1.0, 0.0, 1.0, 1.0)
    bare = [replace(row, reference_logp=None) for row in rows]
    OfflineBuffer.from_trajectories(bare).save(tmp_path / "buffer")
    out = tmp_path / "out"
    assert main(["train", "grpo", "--buffer", str(tmp_path / "buffer"), "--steps", "3", "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    events = json.loads((out / "training.json").read_text())["events"]
    assert len(events) == 1 and FLAT in events[0] and shown.count(events[0]) == 1


# Rewards of any scale reach the advantages


def test_small_differences_on_a_large_offset_are_learned_from(make_policy: MakePolicy) -> None:
    """Rewards of 10⁹ and 10⁹ + 1, which are one number in float32, teach what 0 and 1 teach."""
    policy = make_policy()
    plain, offset = (groups_of(policy, *(base + bit for bit in (1.0, 0.0, 0.0, 1.0))) for base in (0.0, 1e9))
    for name in ("grpo", "rloo", "otb", "reinforce"):
        options = {"kl_coefficient": 0.0} if name == "grpo" else {}
        one, other = (trained(make_policy(), get_objective(name, **options), batch, RAW) for batch in (plain, offset))
        assert distance(one, other) < 1e-6, name


# Truncated completions


def truncated_rows(policy: Policy, *places: int, source: str = "policy") -> list[Trajectory]:
    rows = whole_rows(policy)
    return [replace(row, truncated=i in places, source=source, completion=str(i)) for i, row in enumerate(rows)]


def test_the_batch_says_which_completions_are_truncated(make_policy: MakePolicy) -> None:
    rows = truncated_rows(make_policy(), 1, 6)
    batch = Assembler(make_policy()).assemble(rows, SINGLES, Whole())
    assert batch.truncated.tolist() == [i in (1, 6) for i in range(8)]
    part = batch.rows(torch.tensor([6, 0]), 3)
    assert part.truncated.tolist() == [True, False]


@dataclass(frozen=True)
class Whole(Objective):
    """SFT that skips truncated rows, as a user would write it."""

    name: ClassVar[str] = "whole"

    @property
    def requires(self) -> tuple[Input, ...]:
        return (Truncated(),)

    def coefficients(self, batch: TokenBatch) -> Coefficients:
        return Coefficients((~batch.truncated).to(batch.logp.dtype)[:, None].expand_as(batch.logp))


def test_an_objective_of_ones_own_can_skip_truncated_rows(make_policy: MakePolicy) -> None:
    policy = make_policy()
    rows, units = truncated_rows(policy, 0, 3), SINGLES
    changed = [replace(row, completion_ids=[9, 9]) if row.truncated else row for row in rows]
    one, other = (
        [g[0] for g in trained(make_policy(), Whole(), (some, units), RAW).values()] for some in (rows, changed)
    )
    lengths = [sum(len(row.completion_ids) for row in some) for some in (rows, changed)]
    for a, b in zip(one, other, strict=True):  # their tokens count, and nothing else of them
        torch.testing.assert_close(a * lengths[0], b * lengths[1])


def test_masked_completions_teach_nothing_but_their_rewards_count(make_policy: MakePolicy) -> None:
    policy = make_policy()
    rows, units = truncated_rows(policy, 0), PAIRED
    other = [replace(rows[0], completion_ids=[9] * 3, behaviour_logp=[-1.0] * 3, reference_logp=[-1.0] * 3), *rows[1:]]
    objective = get_objective("grpo", truncated="mask")
    one = trained(make_policy(), objective, (rows, units), RAW)
    assert distance(one, trained(make_policy(), objective, (other, units), RAW)) < 1e-6
    rewarded = [replace(rows[0], reward=rows[1].reward), *rows[1:]]
    assert distance(one, trained(make_policy(), objective, (rewarded, units), RAW)) > 1e-3
    assert distance(one, trained(make_policy(), get_objective("grpo"), (rows, units), RAW)) > 1e-3
    events = events_of(make_policy(), "grpo", (rows, units), truncated="mask")
    assert "grpo: 2 of 16 completions drawn are truncated and masked" in events
    none_left = [replace(row, truncated=True) for row in rows]
    assert events_of(make_policy(), "grpo", (none_left, units), truncated="mask") == [
        f"grpo: 2 of 8 {FLAT}",  # the others' advantages are not 0, and meet no token
        f"grpo: all 2 {SILENT}: their rewards give no gradient",
        "grpo: all 16 completions drawn are truncated and masked",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sft", "rft", "dft", "grpo", "kto", "dpo"])
def test_dropped_completions_leave_the_view_and_are_told(name: str, make_policy: MakePolicy) -> None:
    source = "demonstration" if name in ("sft", "dft") else "policy"
    rows = truncated_rows(make_policy(), 0, 4, source=source)  # both correct
    options = {"samples_per_prompt": 1} if name == "rft" else {}

    def run(some: list[Trajectory], **more: Any) -> tuple[list[dict[str, float]], list[str]]:
        objective = get_objective(name, **options, **more)
        record = train(make_policy(), objective, OfflineBuffer.from_trajectories(some), RAW)
        return record.steps, record.events

    steps, events = run(rows, truncated="drop")
    assert steps == run([row for row in rows if not row.truncated])[0] != run(rows)[0]
    assert f"{name}: left out 2 truncated completions" in events
    assert not any("truncated" in event for event in run(rows)[1])


def test_a_comparison_drops_them_from_whatever_the_algorithm_learns_from() -> None:
    rows: dict[str, dict[str, Any]] = {
        "sft": {},
        "own": {"objective": "sft", "learns_from": "correct"},
        "both": {"objective": "mixture", "options": {"weights": {"sft": 1.0, "dpo": 1.0}}},
    }
    for name in ("sft", "own"):
        rows[name]["options"] = {"truncated": "drop"}
    rows["both"]["options"]["options"] = {"dpo": {"truncated": "drop"}}
    experiment = small(rows)
    views = {name: [options.get("truncated") for _, options in views_of(experiment, name)] for name in rows}
    assert views == {"sft": ["drop"], "own": ["drop"], "both": [None, "drop"]}


@pytest.mark.slow
def test_the_analyzer_measures_what_training_learns_from(make_policy: MakePolicy) -> None:
    policy = make_policy("llama")
    rows = truncated_rows(policy, 0, 4, source="demonstration")
    whole = [row for row in rows if not row.truncated]
    means = []
    for truncated, some in (("drop", rows), ("keep", whole), ("keep", rows)):
        named = {"dft": get_objective("dft", truncated=truncated)}
        found = analyze_variance(policy, named, OfflineBuffer.from_trajectories(some), rows=8, draws=0)
        means.append(found["objectives"]["dft"]["coefficients"]["mean"])
    assert means[0] == pytest.approx(means[1]) and means[2] != pytest.approx(means[1])
    whole = [replace(row, truncated=False) for row in truncated_rows(policy)]
    norms = []
    for truncated, some in (("mask", rows), ("keep", rows), ("keep", whole)):
        named = {"grpo": get_objective("grpo", truncated=truncated, kl_coefficient=0.0)}
        sampled = [replace(row, source="policy") for row in some]
        found = analyze_variance(policy, named, OfflineBuffer.from_trajectories(sampled), rows=8, draws=0)
        norms.append(found["objectives"]["grpo"]["data_noise"]["grad_norm_sq"]["value"])
    assert norms[1] == pytest.approx(norms[2]) and norms[0] != pytest.approx(norms[1])


@dataclass(frozen=True)
class Later(Objective):
    """SFT on all tokens of a demonstration but its first."""

    name: ClassVar[str] = "later"
    masks: bool = True

    def prepare(self, batch: TokenBatch) -> TokenBatch:
        mask = batch.mask.clone()
        mask[:, 0] = False
        return batch.replace(mask=mask, advantage=torch.zeros(mask.shape, dtype=batch.dtype)) if self.masks else batch

    def coefficients(self, batch: TokenBatch) -> Coefficients:
        return Coefficients((torch.arange(batch.logp.shape[1]) > 0).to(batch.logp.dtype).expand_as(batch.logp))


def test_the_analyzer_reads_an_objective_that_masks_tokens_of_demonstrations(make_policy: MakePolicy) -> None:
    policy = make_policy("llama")
    buffer = OfflineBuffer.from_trajectories(truncated_rows(policy, source="demonstration"))
    named = {"masked": Later(), "weighted": Later(masks=False)}
    found = analyze_variance(policy, named, buffer, rows=8, draws=256)["objectives"]
    masked, weighted = (found[name]["token_moments"]["predicted_trace_cov"] for name in named)
    assert masked == pytest.approx(weighted) and masked > 0


def test_what_cannot_be_done_with_truncated_completions_is_refused(make_policy: MakePolicy) -> None:
    with pytest.raises(UserError, match=r"'dpo' does not learn from groups, .*: use truncated=drop"):
        get_objective("dpo", truncated="mask")
    with pytest.raises(UserError, match="'mixture' is a composite: give truncated to its components"):
        get_objective("mixture", weights={"sft": 1.0}, truncated="drop")
    with pytest.raises(UserError, match="objective 'sft': option 'truncated' = 'skip'"):
        get_objective("sft", truncated="skip")
    rows = truncated_rows(make_policy(), *range(8), source="demonstration")
    with pytest.raises(UserError, match=r"have the source 'demonstration', truncated rows left out"):
        train(make_policy(), get_objective("sft", truncated="drop"), OfflineBuffer.from_trajectories(rows), RAW)


# Rejection sampling with the demonstrations


def test_rft_with_demonstrations_is_sft_on_both(make_policy: MakePolicy) -> None:
    rows = truncated_rows(make_policy())  # rewards 1, 0, 1, 0, 1, 0, 1, 1
    experts = [replace(row, source="demonstration", reward=None) for row in rows[:3]]
    buffer = OfflineBuffer.from_trajectories([*experts, *rows[3:]])
    record = train(make_policy(), get_objective("rft", with_demonstrations=True), buffer, RAW)
    both = [*experts, *(replace(row, source="demonstration") for row in rows[3:] if row.reward)]
    assert record.steps == [
        {**step, "reward": pytest.approx(step["reward"])} if "reward" in step else step
        for step in train(make_policy(), get_objective("sft"), OfflineBuffer.from_trajectories(both), RAW).steps
    ]
    with pytest.raises(UserError, match="the buffer has no demonstrations"):
        train(make_policy(), get_objective("rft", with_demonstrations=True), OfflineBuffer.from_trajectories(rows), RAW)
