"""The model card of a policy that was trained with one objective."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from huggingface_hub import ModelCardData

from rlzoo.buffers import Buffer, overview
from rlzoo.buffers.overview import described
from rlzoo.document import Block, Code, Entry, Heading, Paragraph, Table
from rlzoo.document.cards import TAG, card, data_sets_of, facts, how_it_was_made, metadata_of
from rlzoo.document.estimates import number
from rlzoo.jobs.sharing import FOLDER, hub_id, public
from rlzoo.jobs.sources import path_of
from rlzoo.objective import Objective, is_composite, summary_of
from rlzoo.policy.loading import EMBEDDED
from rlzoo.training.record import TrainingRecord

SHOWN = ("loss", "logp", "gradient_norm")
"""Metrics of the last step that a card gives."""
COSTS = {
    "gradient_tokens": ("gradient tokens", ""),
    "sampled_tokens": ("sampled tokens", ""),
    "flops": ("FLOPs", ""),
    "wall_seconds": ("time in training steps", " s"),
    "peak_memory_bytes": ("peak memory", " bytes"),
}
"""Costs → name and unit."""
ENDS = {"steps": "all steps were done", "budget": "the budget was spent"}


@dataclass(frozen=True)
class Trained:
    """What a model card describes: a policy, how it was trained, and on what."""

    name: str
    """The name of the folder that it is saved in."""
    objective: Objective
    model: str
    """The model that training started from."""
    source: str
    """The data, as the user named it."""
    buffer: Buffer
    """The rows of it that training read."""
    record: TrainingRecord
    configuration: Mapping[str, Any]
    """All settings, as plain data."""
    resolved: Mapping[str, Any]
    """The values of settings that were ``auto``."""
    dropped: str | None = None
    """How many rows of the data could not be used, and why."""


def model_card(trained: Trained) -> str:
    """The card of a saved model: objective, data, training and its costs, and how to repeat it."""
    return card(_metadata(trained), _blocks(trained))


def adapter_card(trained: Trained) -> str:
    """The card of the adapter alone, which `save_policy` writes beside the merged weights."""
    metadata = _metadata(trained)
    metadata.library_name, metadata.tags = "peft", [*(metadata.tags or ()), "lora"]
    return card(metadata, _adapter_blocks(trained))


def objective_table(objectives: Mapping[str, Objective]) -> Table:
    """Names of rows and their objectives: coefficient, options that differ from the defaults, and paper."""
    rows = []
    for name, objective in objectives.items():
        full, coefficient = summary_of(type(objective))
        changed = ", ".join(f"{key} = {value}" for key, (value, _) in changed_options(objective).items())
        rows.append([name, full or objective.name, coefficient, changed or "defaults", paper(objective)])
    header = ["row", "objective", "coefficient", "options", "paper"]
    return Table(header, [[Entry(text) for text in row] for row in rows], words=header[1:])


def changed_options(objective: Objective) -> dict[str, tuple[str, str]]:
    """The options of an objective that differ from their defaults, as text: name → value and default."""
    found = {}
    for field in dataclasses.fields(objective):
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        value = getattr(objective, field.name)
        if value != default:
            shown = str(public(value, field.name))
            found[field.name] = shown, "none" if default is dataclasses.MISSING else str(default)
    return found


def paper(objective: Objective) -> str:
    """The source of an objective, with the addresses of its papers, which the Hub links with the model."""
    text = re.sub(r"arXiv (\d{4}\.\d{5})", r"arXiv \1 (https://arxiv.org/abs/\1)", objective.source)
    return re.sub(r"doi (10\.\d+/[\w.-]*\w)", r"doi \1 (https://doi.org/\1)", text)


def _metadata(trained: Trained) -> ModelCardData:
    """The metadata: what is not known for certain, such as the license of a base without a card, is left out."""
    base = metadata_of(trained.model)
    embedded = trained.model == EMBEDDED
    above = base.get("base_model") if path_of(trained.model).is_dir() else hub_id(trained.model)
    names = [one.objective.name for one in trained.objective.components]
    return ModelCardData(
        base_model=None if embedded else above,
        datasets=data_sets_of(trained.source) or None,
        library_name="transformers",
        license="apache-2.0" if embedded else base.get("license"),
        license_name=base.get("license_name"),
        license_link=base.get("license_link"),
        pipeline_tag="text-generation",
        tags=list(dict.fromkeys([TAG, "offline-rl", trained.objective.name, *names])),
    )


def _blocks(trained: Trained) -> Iterator[Block]:
    model = "the embedded base of rlzoo" if trained.model == EMBEDDED else str(public(trained.model))
    source = str(public(trained.source))
    yield Heading(trained.name, level=1)
    yield Paragraph(f"{model[0].upper()}{model[1:]}, fine-tuned with {trained.objective.name} on {source} by rlzoo.")
    yield from _training_blocks(trained)
    if trained.configuration["training"]["lora"]:
        yield Paragraph(
            "The weights include the adapter, which is also saved by itself, in the folder adapter, for peft."
        )
    yield Heading("Results")
    yield Paragraph(
        "This training measured no results. rlzoo compare trains this objective beside others from one base and one "
        f"buffer, and reports results with 95 % intervals; rlzoo evaluate --model {FOLDER} evaluates this model alone."
    )
    yield from how_it_was_made(trained.configuration)


def _adapter_blocks(trained: Trained) -> Iterator[Block]:
    base = str(public(trained.model))
    yield Heading(f"{trained.name}, adapter", level=1)
    yield Paragraph(
        f"The low-rank adapter of {trained.name}, trained with {trained.objective.name} on "
        f"{public(trained.source)} by rlzoo, for the same base model:"
    )
    yield Code(
        "from peft import PeftModel\nfrom rlzoo import load_policy\n\n"
        f'model = PeftModel.from_pretrained(load_policy("{base}").model, "{FOLDER}")',
        "python",
    )
    yield Paragraph(
        "The folder above has the whole model, with this adapter merged into its weights. In a repository on the Hub, "
        'give its name in place of the folder, and subfolder="adapter".'
    )
    yield from _training_blocks(trained)
    yield from how_it_was_made(trained.configuration)


def _training_blocks(trained: Trained) -> Iterator[Block]:
    """What is the same for a model and its adapter: objective, data, training and costs."""
    objective, record = trained.objective, trained.record
    full, coefficient = summary_of(type(objective))
    source = str(public(trained.source))
    yield Heading("Objective")
    yield facts({"objective": objective.name, "full name": full, "coefficient": coefficient, "paper": paper(objective)})
    yield Paragraph(
        "The coefficient is the factor of ∇ log π_θ(y_t) in the gradient, for each token y_t that is learned from; p_t "
        "is π_θ(y_t), the probability of the token under the policy in training."
    )
    if is_composite(type(objective)):
        yield objective_table({one.label or one.objective.name: one.objective for one in objective.components})
    if changed := changed_options(objective):
        rows = [[Entry(name), Entry(value), Entry(default)] for name, (value, default) in changed.items()]
        yield Table(["option", "value", "default"], rows, words=["value", "default"])
    yield Paragraph(f"{'Other' if changed else 'All'} options have their default values.")
    yield Heading("Data")
    yield facts({"source": source, **dict(described(overview(trained.buffer))), "left out": trained.dropped or ""})
    yield Heading("Training")
    last = record.steps[-1] if record.steps else {}
    yield facts(
        {
            "optimizer steps": f"{len(record.steps):,}; {ENDS.get(record.ended or '', record.ended or '')}",
            **{name.replace("_", " "): str(value) for name, value in trained.resolved.items()},
            **{f"{name.replace('_', ' ')}, last step": number(last[name]) for name in last if name in SHOWN},
        }
    )
    yield Heading("Costs")
    costs = record.costs.as_dict()
    yield facts({label: f"{_exact(costs[name])}{unit}" for name, (label, unit) in COSTS.items()})


def _exact(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else number(value)
