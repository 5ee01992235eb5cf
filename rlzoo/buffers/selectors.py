"""The five built-in views: demonstrations, correct samples, pairs, groups and unpaired rows.

A view is computed from columns, and depends on nothing else: wherever rows have to be chosen, earlier ones win.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable
from itertools import pairwise
from typing import ClassVar, Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool, Float, Int

from rlzoo.errors import EmptyViewError, UnscoredError, UserError, unknown
from rlzoo.types import Selector, Unit, Units, register_view

Mask = Bool[np.ndarray, " N"]
Indices = Int[np.ndarray, " R"]
THRESHOLD = 0.5
"""The smallest reward of a correct completion."""
RELEASED = 64
"""How many chunks of texts, of a thousand rows each, stay mapped at a time."""
Truncated = Literal["keep", "drop"]
Pairing = Literal["threshold", "best_worst"]
Distinct = Literal["text", "equations"]


def demonstrations(rows: pa.Table, truncated: Truncated = "keep") -> Units:
    """Rows with source ``demonstration``, one per unit. Raises UserError if there are none."""
    chosen = np.flatnonzero(_has_source(rows, "demonstration") & _whole(rows, truncated))
    if not len(chosen):
        raise EmptyViewError(
            f"the buffer has no demonstrations (0 of {len(rows):,} rows have the source 'demonstration'"
            f"{_and_whole(truncated)}): "
            "say which column of the problems holds worked solutions (--column solution=COLUMN, or `solution:`), or "
            "import some with from_trl (a table with the column 'reward' holds samples: rft learns from correct ones)"
        )
    return _singles(chosen)


def correct(
    rows: pa.Table,
    threshold: float = THRESHOLD,
    per_prompt: int = 4,
    with_demonstrations: bool = False,
    distinct: Distinct = "text",
    truncated: Truncated = "keep",
    release: Callable[[], None] | None = None,
) -> Units:
    """Sampled rows with reward ≥ ``threshold``, one per unit: at most ``per_prompt`` distinct ones per prompt.

    They differ in their ``text``, or in their `equations`, where one without any is told apart by its text. With
    ``with_demonstrations`` all demonstrations are included, whatever their reward. Raises UserError if no sample is
    correct.
    """
    if distinct not in get_args(Distinct):
        raise unknown("value of the view's option distinct", str(distinct), get_args(Distinct))
    mask = ~_has_source(rows, "demonstration") & (rewards(rows) >= threshold) & _whole(rows, truncated)
    chosen = np.flatnonzero(mask)
    if not len(chosen):
        _require_rewards(rows)
        raise EmptyViewError(
            f"the buffer has no correct samples (0 of {len(rows):,} rows reach reward {threshold:g}"
            f"{_and_whole(truncated)}): sample more per prompt (rollouts.samples), warm the base up first (warm_up), "
            "or lower the objective's option threshold"
        )
    prompt = _codes(rows["prompt_id"])[mask]
    key = (lambda text: equations(text) or text) if distinct == "equations" else str
    first = _first_of_equals(prompt, _hashes(rows["completion"], mask, key, release))
    chosen, prompt = chosen[first], prompt[first]
    chosen = chosen[_rank(prompt) < per_prompt]
    if with_demonstrations:
        experts = np.asarray(demonstrations(rows, truncated))[:, 0]
        chosen = np.sort(np.concatenate([chosen, experts]))
    return _singles(chosen)


def equations(text: str) -> tuple[str, ...]:
    """The equations of a worked solution, without spaces: those in ``<<48/2=24>>``, or else all runs with an =.

    Source: RFT, arXiv 2308.01825, whose solutions are GSM8K's and have the former.
    """
    found = re.findall(r"<<([^<>]*)>>", text) or re.findall(r"[\d.+*/×÷()= -]+", text)
    return tuple(one.replace(" ", "") for one in found if "=" in one)


def pairs(
    rows: pa.Table,
    threshold: float = THRESHOLD,
    per_prompt: int = 4,
    pairing: Pairing = "threshold",
    truncated: Truncated = "keep",
) -> Units:
    """Units (better, worse) of one prompt, at most ``per_prompt`` per prompt. No row is used twice.

    ``threshold`` pairs the i-th row that reaches the threshold with the i-th that does not. ``best_worst`` pairs the
    row of the i-th highest reward with that of the i-th lowest, if it is lower, whatever the threshold. With either,
    imported pairs stay pairs. Raises UserError if there are none.
    """
    if pairing not in get_args(Pairing):
        raise unknown("value of the view's option pairing", str(pairing), get_args(Pairing))
    reward = rewards(rows)
    mask = _has_source(rows, "policy", "preference") & ~np.isnan(reward) & _whole(rows, truncated)
    prompt = _codes(rows["prompt_id"])
    known = np.flatnonzero(mask)
    if pairing == "best_worst":
        orders = tuple(known[np.argsort(sign * reward[known], kind="stable")] for sign in (-1, 1))
    else:
        orders = known[reward[known] >= threshold], known[reward[known] < threshold]
    sides = []
    for index in orders:
        rank = _rank(prompt[index])
        kept = rank < per_prompt
        sides.append((index[kept], prompt[index[kept]] * per_prompt + rank[kept]))
    (better, better_key), (worse, worse_key) = sides
    _, left, right = np.intersect1d(better_key, worse_key, assume_unique=True, return_indices=True)
    differ = reward[better[left]] > reward[worse[right]]
    left, right = left[differ], right[differ]
    if not len(left):
        prompts = len(np.unique(prompt[mask]))
        if not prompts:
            _require_rewards(rows)
            raise EmptyViewError(
                f"the buffer has no pairs (none of its {len(rows):,} rows is a sample or a preference with a reward"
                f"{_and_whole(truncated)}): give a table with 'chosen' and 'rejected', or sample with rlzoo rollout"
            )
        if pairing == "best_worst":
            raise EmptyViewError(
                f"the buffer has no pairs (in all its {prompts:,} sampled prompts, completions have equal rewards"
                f"{_and_whole(truncated)}): sample more per prompt with rlzoo rollout"
            )
        raise EmptyViewError(
            f"the buffer has no pairs (0 of {prompts:,} sampled prompts have both a completion that reaches "
            f"reward {threshold:g} and one that does not{_and_whole(truncated)}): sample more per prompt with rlzoo "
            "rollout, or move the threshold"
        )
    return tuple(zip(better[left].tolist(), worse[right].tolist(), strict=True))


def groups(
    rows: pa.Table,
    size: int | None = None,
    varied: bool = False,
    demonstrations: int = 0,
    truncated: Truncated = "keep",
) -> Units:
    """Units of all samples of one prompt by one policy version that have a reward and behaviour log-probs.

    With ``size``, only the first ``size`` samples of each group are taken, and smaller groups are left out. With
    ``varied``, groups of equal rewards are left out. The first ``demonstrations`` demonstrations of its prompt follow
    the samples of each group, as far as there are any. Raises UserError if no group is left, and if no prompt of a
    group has the demonstrations that were asked for.
    """
    reward = rewards(rows)
    samples = _has_source(rows, "policy") & ~np.isnan(reward) & _whole(rows, truncated)
    chosen = np.flatnonzero(samples & rows["behaviour_logp"].is_valid().to_numpy())
    if not len(chosen):
        _require_rewards(rows)
        if samples.any():
            raise UserError(
                f"the buffer has no groups ({samples.sum():,} samples have a reward but no behaviour log-probs, for "
                "which --set training.behaviour=current takes the initial policy's): set it, or training.behaviour: "
                "current in an experiment's file"
            )
        raise EmptyViewError(
            f"the buffer has no groups (0 of {len(rows):,} rows have the source 'policy', a reward and "
            f"behaviour log-probs{_and_whole(truncated)}): sample some with rlzoo rollout"
        )
    versions, version = np.unique(rows["policy_version"].to_numpy()[chosen], return_inverse=True)
    key = _codes(rows["prompt_id"])[chosen] * len(versions) + version
    order = np.argsort(key, kind="stable")
    bounds = [*_run_starts(key[order]).tolist(), len(chosen)]
    ordered = chosen[order].tolist()
    units = tuple(tuple(ordered[a:b]) for a, b in pairwise(bounds))
    if size is not None:
        whole = tuple(unit[:size] for unit in units if len(unit) >= size)
        if not whole:
            drawn = np.bincount(_codes(rows["prompt_id"])[_has_source(rows, "policy")]).max()
            kind = EmptyViewError if drawn >= size else UserError  # as many of other samples may be usable, or never
            raise kind(
                f"the buffer has no groups of {size} samples (the largest of its {len(units):,} has "
                f"{max(map(len, units))}): sample more per prompt with rlzoo rollout, or lower size"
            )
        units = whole
    if varied:
        values = reward.tolist()
        mixed = tuple(unit for unit in units if len({values[i] for i in unit}) > 1)
        if not mixed:
            raise EmptyViewError(
                f"the buffer has no groups of unequal rewards (in all its {len(units):,} the samples have the same): "
                "sample more per prompt with rlzoo rollout, or take prompts of another difficulty"
            )
        units = mixed
    return _guided(rows, units, demonstrations, truncated) if demonstrations else units


def _guided(rows: pa.Table, units: Units, most: int, truncated: Truncated) -> Units:
    """Groups, each followed by at most so many demonstrations of its prompt."""
    prompt, of_prompt = _codes(rows["prompt_id"]), dict[int, list[int]]()
    for index in np.flatnonzero(_has_source(rows, "demonstration") & _whole(rows, truncated)):
        of_prompt.setdefault(int(prompt[index]), []).append(int(index))
    guided = tuple((*unit, *of_prompt.get(int(prompt[unit[0]]), [])[:most]) for unit in units)
    if guided == units:
        raise EmptyViewError(
            f"the buffer has no demonstrations of the prompts of its {len(units):,} groups{_and_whole(truncated)}: "
            "import some with the same prompts"
        )
    return guided


def unpaired(rows: pa.Table, truncated: Truncated = "keep") -> Units:
    """Rows of any source but ``demonstration`` that have a reward, one per unit. Raises UserError if there are none."""
    chosen = np.flatnonzero(~_has_source(rows, "demonstration") & ~np.isnan(rewards(rows)) & _whole(rows, truncated))
    if not len(chosen):
        _require_rewards(rows)
        raise EmptyViewError(
            f"the buffer has no rewarded rows (0 of {len(rows):,} rows have a reward and are not demonstrations"
            f"{_and_whole(truncated)}): sample some with rlzoo rollout, or import unpaired preferences with from_trl"
        )
    return _singles(chosen)


@register_view
class Demonstrations(Selector):
    """Single rows written by an expert."""

    name: ClassVar[str] = "demonstrations"
    is_sampled: ClassVar[bool] = False
    is_imitated: ClassVar[bool] = True
    units = staticmethod(demonstrations)


@register_view
class Correct(Selector):
    """Single rows sampled by a policy and rewarded as correct."""

    name: ClassVar[str] = "correct"
    is_imitated: ClassVar[bool] = True
    units = staticmethod(correct)


@register_view
class Pairs(Selector):
    """A better and a worse completion of one prompt."""

    name: ClassVar[str] = "pairs"
    unit: ClassVar[Unit] = Unit.PAIR
    units = staticmethod(pairs)


@register_view
class Groups(Selector):
    """All samples of one prompt."""

    name: ClassVar[str] = "groups"
    unit: ClassVar[Unit] = Unit.GROUP
    units = staticmethod(groups)


@register_view
class Unpaired(Selector):
    """Single rows that have a reward, good and bad ones."""

    name: ClassVar[str] = "unpaired"
    units = staticmethod(unpaired)


def _singles(index: Indices) -> Units:
    return tuple(zip(index.tolist(), strict=True))


def _has_source(rows: pa.Table, *sources: str) -> Mask:
    mask: Mask = pc.is_in(rows["source"], pa.array(sources)).to_numpy()
    return mask


def _whole(rows: pa.Table, truncated: Truncated) -> Mask:
    """True for rows that may be in a view: all, or those that are not truncated."""
    return ~rows["truncated"].to_numpy() if truncated == "drop" else np.ones(len(rows), bool)


def _and_whole(truncated: Truncated) -> str:
    """The part of an error that says that truncated rows were left out."""
    return ", truncated rows left out" if truncated == "drop" else ""


def rewards(rows: pa.Table) -> Float[np.ndarray, " N"]:
    """The reward of each row, [N]; NaN where it has none."""
    reward: Float[np.ndarray, " N"] = rows["reward"].to_numpy()
    return reward


def _require_rewards(rows: pa.Table) -> None:
    """Raise UnscoredError if there are samples, and no row has a reward."""
    if _has_source(rows, "policy", "preference").any() and np.isnan(rewards(rows)).all():
        raise UnscoredError(
            f"the buffer has no rewards (none of its {len(rows):,} rows has one): score them with rlzoo rescore"
        )


def _codes(strings: pa.ChunkedArray) -> Int[np.ndarray, " N"]:
    """Integer codes of strings, in order of first appearance."""
    # as one array: a dictionary per chunk, and one to unify them, would take a thousand times the memory
    whole = strings.cast(pa.large_string()).combine_chunks()
    codes: Int[np.ndarray, " N"] = whole.dictionary_encode().indices.to_numpy().astype(np.int64)
    return codes


def _hashes(
    texts: pa.ChunkedArray, mask: Mask, key: Callable[[str], Hashable], release: Callable[[], None] | None
) -> Int[np.ndarray, " R"]:
    """Hashes of the keys of the texts under the mask; only one chunk's texts are Python objects at a time."""
    hashes, start = [np.zeros(0, np.int64)], 0
    for number, chunk in enumerate(texts.chunks):
        if release is not None and number % RELEASED == RELEASED - 1:
            release()
        kept = chunk.filter(pa.array(mask[start : start + len(chunk)])).to_pylist()
        hashes.append(np.fromiter((hash(key(text)) for text in kept), np.int64, len(kept)))
        start += len(chunk)
    return np.concatenate(hashes)


def _run_starts(ordered: Int[np.ndarray, " R"]) -> Indices:
    """Where each run of equal values begins."""
    return np.flatnonzero(np.diff(ordered, prepend=ordered[:1] - 1))


def _rank(keys: Int[np.ndarray, " R"]) -> Int[np.ndarray, " R"]:
    """How many earlier elements have the same key."""
    order = np.argsort(keys, kind="stable")
    starts = _run_starts(keys[order])
    rank = np.empty(len(keys), np.int64)
    rank[order] = np.arange(len(keys)) - np.repeat(starts, np.diff(starts, append=len(keys)))
    return rank


def _first_of_equals(first: Int[np.ndarray, " R"], second: Int[np.ndarray, " R"]) -> Bool[np.ndarray, " R"]:
    """True where no earlier element has both the same ``first`` and the same ``second``."""
    order = np.lexsort((second, first))  # stable: among equals the earliest comes first
    a, b = first[order], second[order]
    new = np.ones(len(order), bool)
    new[1:] = (a[1:] != a[:-1]) | (b[1:] != b[:-1])
    mask = np.empty(len(order), bool)
    mask[order] = new
    return mask
