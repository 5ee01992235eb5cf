"""Objectives in transformers' and TRL's real trainers have the gradient of rlzoo's own trainer on the same rows."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from trl_rows import (
    Fixed,
    gap,
    last_step,
    own_gradient,
    small_model,
    small_rows,
    step_arguments,
    step_gradient,
    tokenizer,
)

trl = pytest.importorskip("trl", reason="objectives in TRL's trainers are tested with TRL 1.16")

from datasets import Dataset  # noqa: E402 - only once trl is known to be there
from transformers import Trainer, TrainingArguments  # noqa: E402
from trl import (  # noqa: E402
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling  # noqa: E402

from rlzoo.errors import UserError  # noqa: E402
from rlzoo.integrations import compute_loss_func, with_objective  # noqa: E402
from rlzoo.integrations.frozen import FrozenModels  # noqa: E402
from rlzoo.integrations.rows import rows_of_labels  # noqa: E402
from rlzoo.objective import get_objective  # noqa: E402
from rlzoo.policy import Policy, log_probs  # noqa: E402
from rlzoo.types import Trajectory  # noqa: E402

CLOSE = 1e-5
SQUARED = """\
from dataclasses import dataclass
import rlzoo

@dataclass(frozen=True)
class Squared(rlzoo.Objective):
    name = "squared"

    def coefficients(self, batch):
        return rlzoo.Coefficients((2 * batch.logp).exp())
"""
WEIGHTED = """\
from dataclasses import dataclass
import rlzoo
from rlzoo.inputs import Column

@dataclass(frozen=True)
class Weighted(rlzoo.Objective):
    name = "weighted"

    @property
    def requires(self):
        return Column("weight"), Column("quality")

    def coefficients(self, batch):
        return rlzoo.Coefficients(batch["weight"] * batch["quality"][:, None])
"""
PACKED = {"packing": True, "max_length": 48, "packing_strategy": "bfd"}
PADDING_FREE = {"padding_free": True, "max_length": None}
PADDED: dict[str, Any] = {}
ROWS = small_rows()


def labelled(rows: list[Trajectory], **columns: list[Any]) -> Dataset:
    """The rows as TRL has them once they are tokenised."""
    ids = [[*row.prompt_ids, *row.completion_ids] for row in rows]
    labels = [[-100] * len(row.prompt_ids) + labels_of(row) for row in rows]
    return Dataset.from_dict({"input_ids": ids, "labels": labels, **columns})


def labels_of(row: Trajectory) -> list[int]:
    """The learned tokens of a completion, and -100 for the others."""
    learned = row.completion_mask or [True] * len(row.completion_ids)
    return [token if own else -100 for token, own in zip(row.completion_ids, learned, strict=True)]


def sft(trainer: Any, folder: Path, model: Any, layout: dict[str, Any], data: Dataset, batch: int, **more: Any) -> Any:
    args = SFTConfig(**step_arguments(folder, batch, -(-8 // batch)), **layout)
    return trainer(model=model, args=args, train_dataset=data, processing_class=tokenizer(), **more)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "layout", "batch"),
    [
        ("dft", PADDED, 2),
        ("dft", PADDING_FREE, 4),
        ("dft", PACKED, 1),
        ("iw-sft", PADDED, 3),
        ("iw-sft", PACKED, 1),
        ("asft", PADDING_FREE, 4),
        ("eaft", PACKED, 1),
        ("psft", PADDED, 8),
    ],
)
def test_sft_trainer_has_the_gradient_of_rlzoo(name: str, layout: dict[str, Any], batch: int, tmp_path: Path) -> None:
    model, reference, objective = small_model(0), small_model(1), get_objective(name)
    wanted = own_gradient(model, objective, Fixed(ROWS), reference)
    loss = compute_loss_func(name, own := copy.deepcopy(model), reference=reference)
    with pytest.warns(FutureWarning, match="compute_loss_func"):
        trainer = sft(SFTTrainer, tmp_path, own, layout, labelled(ROWS), batch, compute_loss_func=loss)
    assert gap(step_gradient(trainer), wanted) < CLOSE
    own = copy.deepcopy(model)
    trainer = sft(with_objective(SFTTrainer, name), tmp_path, own, layout, labelled(ROWS), batch, ref_model=reference)
    assert gap(step_gradient(trainer), wanted) < CLOSE
    logged = trainer.state.log_history[0]
    assert logged["objective/logp"] < 0 and logged["loss"] != 0
    assert name not in ("dft", "iw-sft", "psft") or logged["objective/entropy"] > 0


@pytest.mark.slow
def test_averages_over_sequences_are_exact_under_accumulation(tmp_path: Path) -> None:
    options = {"aggregation": "sequence"}
    model, objective = small_model(), get_objective("dft", **options)
    wanted = own_gradient(model, objective, Fixed(ROWS))
    for layout, batch in ((PADDED, 3), (PACKED, 1)):
        trainer = with_objective(SFTTrainer, "dft", **options)
        trainer = sft(trainer, tmp_path, copy.deepcopy(model), layout, labelled(ROWS), batch)
        assert gap(step_gradient(trainer), wanted) < CLOSE
    with pytest.raises(UserError, match=r"averages over sequences.*sequences_per_step"):
        compute_loss_func(objective)


@pytest.mark.slow
def test_tokens_between_turns_are_left_out_as_by_rlzoo(tmp_path: Path) -> None:
    """An answer, the words of a tool or a user, and another answer."""
    rows = [
        replace(row, completion_mask=[place < 2 or place > 4 for place in range(len(row.completion_ids))])
        for row in ROWS
    ]
    model, reference = small_model(0), small_model(1)
    wanted = own_gradient(model, get_objective("iw-sft"), Fixed(rows), reference)
    for layout, batch in ((PADDED, 3), (PACKED, 1)):
        trainer = with_objective(SFTTrainer, "iw-sft")
        own = sft(trainer, tmp_path, copy.deepcopy(model), layout, labelled(rows), batch, ref_model=reference)
        assert gap(step_gradient(own), wanted) < CLOSE


@pytest.mark.slow
def test_transformers_trainer_with_an_objective_from_a_file(tmp_path: Path) -> None:
    (file := tmp_path / "squared.py").write_text(SQUARED)
    model, name = small_model(), f"{file}:Squared"
    wanted = own_gradient(model, get_objective(name), Fixed(ROWS))
    collator = DataCollatorForLanguageModeling(tokenizer().pad_token_id)
    args = TrainingArguments(**step_arguments(tmp_path, 3, 3))
    for trainer, more in (
        (Trainer, {"compute_loss_func": compute_loss_func(name)}),
        (with_objective(Trainer, name), {}),
    ):
        own = trainer(
            model=copy.deepcopy(model), args=args, train_dataset=labelled(ROWS), data_collator=collator, **more
        )
        assert gap(step_gradient(own), wanted) < CLOSE


@pytest.mark.slow
def test_columns_of_the_data_reach_the_objective(tmp_path: Path) -> None:
    (file := tmp_path / "weighted.py").write_text(WEIGHTED)
    weight = [[0.5 + (n % 3) for n in range(len(row.completion_ids))] for row in ROWS]
    quality = [1.0 + number for number in range(len(ROWS))]
    rows = [
        replace(row, columns={"weight": own, "quality": one})
        for row, own, one in zip(ROWS, weight, quality, strict=True)
    ]
    model, trainer = small_model(), with_objective(SFTTrainer, f"{file}:Weighted")
    wanted = own_gradient(model, get_objective(f"{file}:Weighted"), Fixed(rows))
    data = labelled(ROWS, weight=weight, quality=quality)
    for layout in (PADDED, PADDING_FREE):
        own = sft(trainer, tmp_path, copy.deepcopy(model), layout, data, 4)
        assert gap(step_gradient(own), wanted) < CLOSE
    with pytest.raises(UserError, match="needs a column 'weight', and the prepared data has input_ids, labels"):
        sft(trainer, tmp_path, model, PADDED, labelled(ROWS), 4)
    wrong = labelled(ROWS, weight=[*weight[:-1], [1.0, 2.0]], quality=quality)
    with pytest.raises(
        UserError, match=r"column 'weight' has 2 values in row \d of a batch, whose input_ids are 11, 5 of"
    ):
        sft(trainer, tmp_path, model, PADDED, wrong, 8).train()


def words(*lines: str) -> list[tuple[str, str]]:
    """Prompts and completions of a character tokenizer."""
    pairs = [line.split("|") for line in lines]
    return [(before, after) for before, after in pairs]


CHOSEN = words("1+1=|2", "2+3=|5", "7+5=|12", "9-4=|5")
REJECTED = words("1+1=|3 or so", "2+3=|4", "7+5=|13", "9-4=|13")


def pairs_of_texts() -> Dataset:
    texts = zip(CHOSEN, REJECTED, strict=True)
    return Dataset.from_list([{"prompt": prompt, "chosen": c, "rejected": r} for (prompt, c), (_, r) in texts])


def trajectories(pairs: list[tuple[str, str]], **fields: Any) -> list[Trajectory]:
    """As TRL tokenises them."""
    encode, rows = tokenizer(), []
    for prompt, completion in pairs:
        ids, whole = encode(prompt)["input_ids"], encode(prompt + completion + encode.eos_token)["input_ids"]
        rows.append(Trajectory(prompt, completion, ids, whole[len(ids) :], str(ids), **fields))
    return rows


@pytest.mark.slow
@pytest.mark.parametrize("name", ["simpo", "dpo", "orpo"])
def test_dpo_trainer_has_the_gradient_of_rlzoo(name: str, tmp_path: Path) -> None:
    model, reference = small_model(0), small_model(1)
    rows = [row for pair in zip(trajectories(CHOSEN), trajectories(REJECTED), strict=True) for row in pair]
    source = Fixed(rows, [(0, 1), (2, 3), (4, 5), (6, 7)])
    wanted = own_gradient(model, get_objective(name), source, reference)
    for batch, accumulation in ((4, 1), (1, 4)):
        trainer = with_objective(DPOTrainer, name)(
            model=copy.deepcopy(model),
            ref_model=copy.deepcopy(reference),
            args=DPOConfig(**step_arguments(tmp_path, batch, accumulation)),
            train_dataset=pairs_of_texts(),
            processing_class=tokenizer(),
        )
        assert (trainer.ref_model is None) == (name != "dpo"), "a reference that is not needed takes no memory"
        assert gap(step_gradient(trainer), wanted) < CLOSE
        assert 0 <= trainer.state.log_history[0]["objective/accuracy"] <= 1


@pytest.mark.slow
def test_the_reference_of_an_adapter_in_dpo_trainer_is_the_model_without_it(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    trainer = with_objective(DPOTrainer, "dpo")(
        model=small_model(),
        args=DPOConfig(**step_arguments(tmp_path, 4, 1, max_steps=2)),
        train_dataset=pairs_of_texts(),
        processing_class=tokenizer(),
        peft_config=peft.LoraConfig(r=2, target_modules="all-linear"),
    )
    trainer.train()
    first, second = (entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    assert first == pytest.approx(math.log(2), abs=1e-5) and second < first - 1e-3


@pytest.mark.slow
def test_kto_trainer_has_the_gradient_of_rlzoo(tmp_path: Path) -> None:
    model, reference = small_model(0), small_model(1)
    pairs, label = [*CHOSEN, *REJECTED], [True] * 4 + [False] * 4
    rows = [replace(row, reward=float(own)) for row, own in zip(trajectories(pairs), label, strict=True)]
    wanted = own_gradient(model, get_objective("kto", beta=0.02), Fixed(rows), reference)
    columns = {"prompt": [p for p, _ in pairs], "completion": [c for _, c in pairs], "label": label}
    for batch, accumulation in ((8, 1), (2, 4)):
        trainer = with_objective(KTOTrainer, "kto", beta=0.02)(
            model=copy.deepcopy(model),
            ref_model=copy.deepcopy(reference),
            args=KTOConfig(**step_arguments(tmp_path, batch, accumulation)),
            train_dataset=Dataset.from_dict(columns),
            processing_class=tokenizer(),
        )
        assert gap(step_gradient(trainer), wanted) < CLOSE


def share_of_fives(completions: list[str], **_: Any) -> list[float]:
    return [sum(x in "5aeio" for x in text) / max(len(text), 1) for text in completions]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options", "iterations"),
    [
        ("grpo", {"kl_coefficient": 0.1}, 1),
        ("rloo", {}, 1),
        ("dapo", {}, 1),
        ("cispo", {}, 2),
        ("opd", {"teacher": "embedded"}, 1),
        ("otb", {}, 1),
    ],
)
def test_grpo_trainer_has_the_gradient_of_rlzoo(
    name: str, options: dict[str, Any], iterations: int, tmp_path: Path
) -> None:
    model, kept = small_model(0), dict[str, Any]()
    folder = tmp_path / "model"
    small_model(1).save_pretrained(folder)  # TRL loads the reference by the policy's name
    model.config._name_or_path = str(folder)

    class Watched(GRPOTrainer):  # type: ignore[misc]
        def _generate_and_score_completions(self, inputs: Any) -> Any:
            kept.update(super()._generate_and_score_completions(inputs))
            return dict(kept)

    args = GRPOConfig(
        **step_arguments(tmp_path, 2, 4, max_steps=iterations, learning_rate=20.0),
        num_generations=4,
        num_iterations=iterations,
        max_completion_length=6,
        temperature=0.8,
        beta=0.1 if name == "grpo" else 0.0,
    )
    trainer = with_objective(Watched, name, **options)(
        model=copy.deepcopy(model),
        reward_funcs=share_of_fives,
        args=args,
        train_dataset=Dataset.from_dict({"prompt": ["1+1=", "2+3="]}),
        processing_class=tokenizer(),
    )
    last, rows = last_step(trainer), rows_of_samples(kept, model)
    source = Fixed(rows, [tuple(range(4)), tuple(range(4, 8))])
    reference = small_model(1) if name == "grpo" else None
    wanted = own_gradient(last.model, get_objective(name, **options), source, reference)
    assert len({row.reward for row in rows}) > 2
    assert gap(last.gradient, wanted) < CLOSE
    if iterations > 1:
        assert trainer.state.log_history[1]["objective/ratio_deviation"] > 0.01


def rows_of_samples(samples: dict[str, Any], model: Any) -> list[Trajectory]:
    """TRL's samples as rows of a buffer."""
    policy, rows = Policy(copy.deepcopy(model), tokenizer()), []
    for place in range(len(samples["prompt_ids"])):
        prompt = samples["prompt_ids"][place][samples["prompt_mask"][place].bool()].tolist()
        completion = samples["completion_ids"][place][samples["completion_mask"][place].bool()].tolist()
        text = tokenizer().decode(completion, skip_special_tokens=True)
        row = Trajectory("", text, prompt, completion, str(prompt), source="policy", temperature=0.8)
        rows.append(replace(row, reward=share_of_fives([text])[0]))
    logp = log_probs(policy, [(row.prompt_ids, row.completion_ids) for row in rows], temperature=0.8)
    return [replace(row, behaviour_logp=own) for row, own in zip(rows, logp, strict=True)]


@pytest.mark.slow
def test_evaluation_gives_the_loss_of_the_objective_and_logits_for_metrics(tmp_path: Path) -> None:
    model, seen = small_model(), list[Any]()

    def metrics(found: Any) -> dict[str, float]:
        seen.append(found.predictions.shape)
        return {}

    args = SFTConfig(**step_arguments(tmp_path, 8, 1), per_device_eval_batch_size=8)
    trainer = with_objective(SFTTrainer, "dft")(
        model=model,
        args=args,
        train_dataset=labelled(ROWS),
        eval_dataset=labelled(ROWS),
        processing_class=tokenizer(),
        compute_metrics=metrics,
    )
    plain = Trainer(
        model=model,
        args=TrainingArguments(**step_arguments(tmp_path, 8, 1), per_device_eval_batch_size=4),
        eval_dataset=labelled(ROWS),
        data_collator=DataCollatorForLanguageModeling(tokenizer().pad_token_id),
        compute_loss_func=compute_loss_func("dft"),
    )
    found, pairs = trainer.evaluate(), [(row.prompt_ids, row.completion_ids) for row in ROWS]
    logp = torch.tensor([x for row in log_probs(Policy(model, tokenizer()), pairs) for x in row])
    assert found["eval_loss"] == pytest.approx(float((-logp.exp() * logp).mean()), rel=1e-5)
    sizes = [sum(len(row.completion_ids) for row in part) for part in (ROWS[:4], ROWS[4:])]
    halves = [float((-x.exp() * x).mean()) for x in torch.split(logp, sizes)]
    assert plain.evaluate()["eval_loss"] == pytest.approx(sum(halves) / 2, rel=1e-5), "a mean of batches, as always"
    assert trainer.state.log_history[-1]["eval_objective/logp"] == pytest.approx(float(logp.mean()), rel=1e-5)
    width = max(len(row.prompt_ids) + len(row.completion_ids) for row in ROWS)
    assert seen == [(8, width, len(tokenizer()))]


def test_the_reference_of_an_adapter_is_the_model_without_it() -> None:
    peft = pytest.importorskip("peft")
    base, labels = small_model(), torch.tensor([[-100, 5, 6, 7, 8]])
    config = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    adapted = peft.get_peft_model(copy.deepcopy(base), config).eval()
    inputs, rows = {"input_ids": labels.clamp(min=4)}, rows_of_labels(labels)
    plain = FrozenModels(base, [None]).log_probs(None, inputs, rows)
    found = FrozenModels(adapted, [None])
    assert not found.models, "no copy"
    torch.testing.assert_close(found.log_probs(None, inputs, rows), plain)
    own = adapted(**inputs).logits.log_softmax(-1)[0, :-1].gather(1, labels[0, 1:, None])[:, 0]
    assert (own - plain[0]).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("trainer", "name", "options", "reason"),
    [
        (
            SFTTrainer,
            "dpo",
            {},
            "TRL's SFTTrainer: objective 'dpo' learns from pairs, and batches there consist of single",
        ),
        (
            DPOTrainer,
            "dft",
            {},
            "TRL's DPOTrainer: objective 'dft' learns from single rows, and batches there .* pairs",
        ),
        (
            GRPOTrainer,
            "ppo",
            {},
            "objective 'ppo' needs 'value' .Critic., and a module that is trained with the policy",
        ),
        (
            SFTTrainer,
            "iw-sft",
            {"variant": "ema"},
            "MovingReference., and a moving average of the policy's weights is not",
        ),
        (GRPOTrainer, "sdft", {"template": "{prompt}"}, "Privileged., and the text of rows is not known there"),
        (
            SFTTrainer,
            "mixture",
            {"weights": {"sft": 0.5, "dft": 0.5}},
            "is a composite, whose components learn from rows",
        ),
        (
            GRPOTrainer,
            "grpo",
            {"truncated": "mask"},
            "has the option truncated=mask, which is applied to rows of a buffer",
        ),
        (RewardTrainer, "dft", {}, "RewardTrainer has no loss to replace: use SFTTrainer, DPOTrainer, KTOTrainer"),
        (int, "dft", {}, "is not a trainer class of transformers or TRL"),
        (SFTTrainer, "dfft", {}, "unknown objective 'dfft': did you mean 'dft'"),
    ],
)
def test_what_a_trainer_cannot_serve_is_refused(trainer: Any, name: str, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=reason) as raised:
        with_objective(trainer, name, **options)
    assert "\n" not in str(raised.value)


def test_a_loss_function_without_a_model_is_refused_where_it_needs_one() -> None:
    compute_loss_func("eaft")
    for name in ("iw-sft", "asft"):
        with pytest.raises(UserError, match=rf"load the model first, and give compute_loss_func\('{name}', model\)"):
            compute_loss_func(name)
    with pytest.raises(UserError, match="may depend on all rows of the optimizer batch"):
        compute_loss_func("memft")


@pytest.mark.slow
def test_couplings_are_served_where_nothing_splits_them(tmp_path: Path) -> None:
    model, objective = small_model(), get_objective("memft")
    wanted = own_gradient(model, objective, Fixed(ROWS))
    trainer = sft(with_objective(SFTTrainer, "memft"), tmp_path, copy.deepcopy(model), PADDED, labelled(ROWS), 8)
    assert gap(step_gradient(trainer), wanted) < CLOSE
    with pytest.raises(UserError, match=r"may depend on all rows.*set gradient_accumulation_steps to 1"):
        sft(with_objective(SFTTrainer, "memft"), tmp_path, model, PADDED, labelled(ROWS), 4)
