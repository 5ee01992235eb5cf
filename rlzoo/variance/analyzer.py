"""The analyzer: the variance of several objectives' gradients for one policy and one buffer, and its sources."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from rlzoo.buffers import Buffer
from rlzoo.config import LEAST_DRAWS, TokenBudget
from rlzoo.errors import UserError
from rlzoo.jobs.memory import release_memory
from rlzoo.jobs.ranks import is_sharded
from rlzoo.objective import Objective
from rlzoo.policy import Assembler, MicroBatches, Models, Policy
from rlzoo.policy.defaults import token_budget_of
from rlzoo.policy.quantised import is_in_4_bits
from rlzoo.policy.sequences import learned_tokens
from rlzoo.training import check_buffer
from rlzoo.types import name_of_view
from rlzoo.variance import moments
from rlzoo.variance.classes import Classify, TokenClasses, class_noise
from rlzoo.variance.coefficients import coefficient_statistics, ess_fraction
from rlzoo.variance.gradients import GradientMeter
from rlzoo.variance.over_data import Comparison, default_held, portions, proxies
from rlzoo.variance.scoring import BLOCKS, Scored, score
from rlzoo.variance.subjects import (
    BASELINE,
    LearnsFrom,
    Subject,
    SubjectWeights,
    baseline,
    named_objectives,
    rows_of,
    subjects_of,
    tokens_of,
    weights_of,
)
from rlzoo.variance.tasks import UnitGradients

HISTOGRAM_BINS = 40


def analyze_variance(
    policy: Policy,
    objectives: Sequence[str | Objective] | Mapping[str, Objective],
    buffer: Buffer,
    *,
    rows: int = 1000,
    draws: int = 4096,
    seed: int = 0,
    gradients: bool = True,
    token_classes: str | Classify = "default",
    class_gradients: bool = False,
    learns_from: LearnsFrom = None,
    reference: Policy | None = None,
    models: Models | None = None,
    token_budget: TokenBudget = 2048,
    means_held: int | None = None,
    progress: Callable[[float, str], None] | None = None,
    trained: float = 0.0,
) -> dict[str, Any]:
    """Measure the variance of the objectives' gradients at a policy; returns the content of variance.json.

    docs/variance.md has the formulas, docs/measuring-variance.md the keys. Each objective is measured on all rows that
    its view of the buffer has for some prompts, ``rows`` rows or slightly more; ``seed`` selects the prompts.
    ``learns_from``, one view or one per name, replaces the views of objectives that learn from single rows. Estimates
    are for new prompts of the same kind; if noise hides a gradient there are none. ``draws`` samples per token check
    the exact moments; ``gradients=False`` omits everything that needs a backward pass. ``token_classes`` is a function
    from a token's text to its class, or its name; with ``class_gradients``, what each class contributes to the variance
    is measured, which takes a backward pass per objective and class. Log-probs of the initial policy are taken from the
    buffer, else from ``reference``, else from the policy itself, as at the start of a run; ``models`` are those of a
    run in progress, of which the fraction ``trained`` is done. Modules of inputs that the policy lacks, such as a
    critic, are initialised as at the start of a run.

    Memory: the policy, the activations of ``token_budget`` padded tokens, and one mean gradient per objective, at most
    ``means_held`` at a time (None: all up to 2 GB, else 3). More objectives take further passes over the data, and
    cosines between objectives of different passes are left out, except those with SFT.

    Raises UserError for a model whose gradients per row cannot be computed, and if no objective can be measured. If
    only some objectives have no rows, or fail on them, they are listed under ``skipped``.
    """
    _check(rows, draws, seed, means_held)
    if is_sharded(policy.model):
        raise UserError(
            "the analyzer needs whole models: load the policy in a process of its own, without --use_fsdp, on a CPU if "
            "no GPU holds it (16 bytes per parameter)"
        )
    if is_in_4_bits(policy.model):
        raise UserError("weights in 4 bits have no gradient to measure: leave out training.lora.load_in_4bit")
    check_buffer(policy, buffer)
    tell = progress or (lambda share, what: None)
    named = named_objectives(objectives)
    meter = GradientMeter(policy) if gradients else None
    picked, subjects, skipped = subjects_of(named, buffer, rows, seed, learns_from)
    requires = list(dict.fromkeys(one for s in subjects.values() for one in s.objective.requires))
    models = models or Models.load(policy, requires, reference or policy, moving=False)
    micro = MicroBatches(token_budget_of(policy, token_budget))
    assembler = Assembler(policy, models, micro, remember=True, progress=lambda: trained)
    with policy.attached_for([one for one in requires if one.initial is None]):
        tell(0.0, "scoring")
        experts = {name: set(s.rows) for name, s in subjects.items() if s.weights_expert_tokens and name in named}
        statistics = [one for one in requires if one.is_statistic]
        scored = score(assembler, rows_of(buffer, picked, subjects), statistics, experts, draws, seed)
        weighted: dict[str, SubjectWeights] = {}
        for name, subject in subjects.items():
            try:
                weighted[name] = weights_of(assembler, subject, scored)
            except UserError as error:
                skipped[name] = str(error)
        if not set(weighted) & set(named):
            raise UserError(next(iter(skipped.values())))
        subjects = {name: subjects[name] for name in weighted}
        classes = TokenClasses.of(policy.tokenizer, scored.rows, token_classes)
        found: dict[str, Any] = {"objectives": {}, "skipped": skipped, "bins": []}
        for name in [name for name in named if name in subjects]:
            found["objectives"][name] = _described(
                name, subjects[name], weighted[name], scored, draws, seed, found["bins"]
            ) | {"token_classes": classes.shares(subjects[name], weighted[name], scored)}
        found["token_probabilities"] = _probabilities(scored, experts)
        if meter is not None:
            split = classes if class_gradients else None
            _measure_gradients(found, meter, subjects, weighted, scored, means_held, micro, split, tell)
    return found


def _described(
    name: str,
    subject: Subject,
    weighted: SubjectWeights,
    scored: Scored,
    draws: int,
    seed: int,
    bins: list[dict[str, Any]],
) -> dict[str, Any]:
    """Everything that needs no backward pass; adds the objective's bins to ``bins``."""
    c = tokens_of(weighted.coefficients.values, weighted.batch)
    return {
        "rows": len(subject.rows),
        "units": len(subject.units),
        "prompts": len(subject.prompts),
        "median_p": float(np.exp(np.median(tokens_of(weighted.batch.logp, weighted.batch)))),
        "coefficients": coefficient_statistics(c),
        "coefficient_histogram": _histogram(c),
        **_moments(name, subject, weighted, scored, draws, seed, bins),
    }


def _check(rows: int, draws: int, seed: int, means_held: int | None) -> None:
    if means_held is not None and means_held < 2:
        raise UserError(f"means_held = {means_held}: at least 2 are needed, an objective's and the baseline's")
    if rows < 1 or 0 < draws < LEAST_DRAWS or draws < 0:
        raise UserError(f"rows must be at least 1 and draws 0 or at least {LEAST_DRAWS}, got {rows} and {draws}")
    if seed < 0:
        raise UserError(f"seed = {seed}: give 0 or more")


def _histogram(c: Float[np.ndarray, " N"]) -> dict[str, list[float]]:
    constant = np.ptp(c) <= 1e-5 * np.abs(c).max()  # rounding in float32
    around = (float(c.mean()) - 0.5, float(c.mean()) + 0.5) if constant else None
    counts, edges = np.histogram(c, HISTOGRAM_BINS, around)
    return {"edges": edges.tolist(), "counts": counts.tolist()}


def _measure_gradients(
    found: dict[str, Any],
    meter: GradientMeter,
    subjects: Mapping[str, Subject],
    weighted: Mapping[str, SubjectWeights],
    scored: Scored,
    means_held: int | None,
    micro: MicroBatches,
    classes: TokenClasses | None,
    tell: Callable[[float, str], None],
) -> None:
    """Add data_noise, layers and proxies of each objective, the cosines between objectives of one pass, and what the
    classes of tokens contribute, if they are given."""
    base = baseline(weighted)
    if base != BASELINE:
        subjects = {name: subject for name, subject in subjects.items() if name != BASELINE}
    held = means_held or default_held(meter.modules.trainable.values(), len(subjects))
    passes = portions(list(subjects), base, held)
    total = sum(len({row for name in names for row in subjects[name].rows}) for names in passes)
    if classes is not None:
        total += sum(len(set(subjects[name].rows)) for name in found["objectives"])
    done = 0.0

    def count(more: float) -> None:
        nonlocal done
        done += more
        tell(0.1 + 0.9 * done / total, f"gradients of {done:.0f}/{total} rows")

    found["layers"], found["cosines"] = meter.modules.layers, {}
    kept: dict[str, UnitGradients] = {}
    for names in passes:
        tasks = {name: weighted[name].task for name in names}
        measured = kept | meter.measure(scored.rows, tasks, micro, count)
        kept = {base: measured[base]} if base is not None else {}
        prompts = {name: list(subjects[name].prompts) for name in measured}
        compared = Comparison(measured, prompts, meter.modules.layer_of, meter.modules.layers, base)
        for name in [name for name in names if name in found["objectives"]]:
            found["cosines"][name] = compared.cosines(name)
            found["objectives"][name] |= {
                "data_noise": compared.noise(name),
                "layers": compared.by_layer(name),
                "proxies": proxies(subjects[name], weighted[name], scored, measured[name]),
            }
        del measured, compared  # before the next pass allocates its own
        release_memory()
    del kept
    if classes is None:
        return
    for name, entry in found["objectives"].items():
        noise = class_noise(meter, scored, subjects[name], weighted[name].task, classes, means_held, micro, count)
        for each, own in noise.items():
            entry["token_classes"][each] |= own


def _moments(
    name: str,
    subject: Subject,
    weighted: SubjectWeights,
    scored: Scored,
    draws: int,
    seed: int,
    all_bins: list[dict[str, Any]],
) -> dict[str, Any]:
    """token_moments and importance_weights; adds the objective's bins to ``all_bins``."""
    c = tokens_of(weighted.coefficients.values, weighted.batch)
    if not subject.weights_expert_tokens:
        ratio = weighted.coefficients.metrics.get("ratio")
        weights = None if ratio is None else _ratio(tokens_of(ratio, weighted.batch))
        reason = (
            f"it learns from {name_of_view(subject.selection)}, which a policy sampled: the reading as importance "
            "weights 1[y = y*]/π requires an expert's token that was not sampled"
        )
        return {"token_moments": moments.no_reading(reason), "importance_weights": weights}
    if not c.any():
        reason = "its coefficients are all 0: its gradient, if it has one, is that of a full-vocabulary term"
        return {"token_moments": moments.no_reading(reason), "importance_weights": None}
    masks = zip(subject.rows, weighted.batch.mask.cpu().numpy(), strict=True)
    learned = np.concatenate([mask[: learned_tokens(scored.rows[row])] for row, mask in masks])
    table = scored.table(subject.rows).where(learned)
    estimates = None
    if draws:
        hits = np.concatenate([scored.hits[name][row] for row in subject.rows])[learned]
        estimates = moments.block_variances(table, c, hits, draws // BLOCKS)
    all_bins.extend({"objective": name, **row} for row in moments.bins(table, c, estimates, draws, seed))
    prompt_of = {row: prompt for prompt, rows in subject.prompts.items() for row in rows}
    log_variance = moments.log_trace_cov(table, c)
    by_sequence = np.bincount(table.row, np.exp(log_variance))
    found = {
        "predicted_trace_cov": float(np.exp(log_variance).sum()),
        "per_sequence": moments.quantiles(by_sequence),
        "log10_per_token": moments.quantiles(log_variance / np.log(10)),
        "comparable": moments.comparable(table, c, estimates, seed),
        **moments.slope(table, c, seed, np.array([prompt_of[row] for row in subject.rows])),
        "sequence_level": moments.sequences(table),
    }
    return {"token_moments": found, "importance_weights": moments.importance_weights(table, c)}


def _ratio(ratio: Float[np.ndarray, " N"]) -> dict[str, Any]:
    """The ratio π/μ on tokens that μ sampled: E_μ[ρ²] = 1 + χ²(π ‖ μ)."""
    return {
        "kind": "π / μ",
        "mean": float(ratio.mean()),
        "second_moment": float(np.square(ratio).mean()),
        "ess_fraction": ess_fraction(ratio),
    }


def _probabilities(scored: Scored, experts: Mapping[str, set[int]]) -> dict[str, Any] | None:
    """The probabilities of the experts' tokens: quantiles of p and S, and a histogram of log10 p."""
    rows = sorted(set().union(*experts.values()))
    if not rows:
        return None
    table = scored.table(rows)
    edges = moments.bin_edges(table.logp)
    counts, _ = np.histogram(np.clip(table.logp / np.log(10), edges[0], 0), edges)
    return {
        "tokens": len(table.logp),
        "sequences": len(rows),
        "p": moments.quantiles(np.exp(table.logp)),
        "score_norm": moments.quantiles(table.score_norm),
        "log10_p_edges": edges.tolist(),
        "counts": counts.tolist(),
    }
