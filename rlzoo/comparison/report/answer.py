"""The answer to the question of a comparison, in sentences generated from its data."""

from __future__ import annotations

from collections.abc import Mapping

from rlzoo.comparison.outcomes import METRICS, ResultKey, ResultMatrix, compare_pairs, difference_of
from rlzoo.comparison.report.schema import Results
from rlzoo.comparison.report.tables import listed, on, percent, points, significance
from rlzoo.comparison.statistics import SIGNIFICANT, crossed_interval
from rlzoo.config import BASE


def answer(results: Results, matrices: Mapping[ResultKey, ResultMatrix], benchmark: str, brief: bool = False) -> str:
    """Which algorithm is best on a benchmark, whether distinguishably so, and (not ``brief``) if the metrics agree."""
    means = {metric: _means(results, benchmark, metric) for metric in METRICS}
    ranked = _ranking(means["avg_at_k"])
    if not ranked:
        return f"{_capital(on(benchmark))}, no algorithm has a result."
    if _is_nothing_right(results, benchmark, means):
        return (
            f"{_capital(on(benchmark))}, not one answer is correct, of the base model or of any algorithm: the "
            "problems are too hard for it, or the reward expects another format."
        )
    label, best = results.label("avg_at_k", benchmark), means["avg_at_k"][ranked[0]]
    is_tie = len(ranked) > 1 and len(set(means["avg_at_k"].values())) == 1
    if is_tie:
        sentences = [f"{_capital(on(benchmark))}, all algorithms have the same {label}, {percent(best)} %"]
    else:
        sentences = [f"{_capital(on(benchmark))}, {ranked[0]} has the best {label}: {percent(best)} %"]
        if len(ranked) > 1:
            sentences[0] += _margin(matrices, benchmark, ranked[0], ranked[1])
    base = results.row(BASE, benchmark, "avg_at_k")
    if base is not None and base.mean >= best:
        sentences.append(f"The base model, at {percent(base.mean)} %, is not below {'them' if is_tie else 'it'}")
    if len(ranked) > 1 and not brief:
        sentences += [_agreement(results, benchmark, means, metric) for metric in METRICS[1:] if means[metric]]
    return " ".join(f"{sentence}." for sentence in sentences)


def headline(results: Results, matrices: Mapping[ResultKey, ResultMatrix], benchmark: str) -> str:
    """The answer in two sentences: which algorithm is best, and what the other metrics say."""
    means = {metric: _means(results, benchmark, metric) for metric in METRICS}
    ranked = _ranking(means["avg_at_k"])
    if not ranked:
        return answer(results, matrices, benchmark)
    first = answer(results, matrices, benchmark, brief=True)
    best, others = ranked[0], [metric for metric in METRICS[1:] if means[metric]]
    if len(ranked) == 1 or not others or _is_nothing_right(results, benchmark, means):
        return first
    leaders = {metric: _leaders(means[metric]) for metric in others}
    if all(own == [best] for own in leaders.values()):
        return f"{first} It also leads in {' and '.join(_called(results, m, benchmark) for m in others)}."
    told = []
    for metric, own in leaders.items():
        who = "all are equal" if len(own) == len(means[metric]) else f"{listed(own)} lead{'s' * (len(own) == 1)}"
        told.append(f"in {_called(results, metric, benchmark)} {who}")
    return f"{first} {_capital(', and '.join(told))}."


def unfinished(results: Results) -> str | None:
    """How many cells failed, and which algorithms therefore have no result; None if all finished."""
    failed = results.failed or []
    if not failed:
        return None
    missing = list(dict.fromkeys(one.algorithm for one in failed if one.algorithm not in results.algorithms))
    lacking = f", so {listed(missing)} {'has' if len(missing) == 1 else 'have'} no result" if missing else ""
    return f"{len(failed)} of {len(failed) + len(results.cells)} cells failed{lacking}: see Failed cells below."


def _is_nothing_right(results: Results, benchmark: str, means: Mapping[str, Mapping[str, float]]) -> bool:
    """Whether no policy, the base model included, has a correct answer."""
    base = [results.row(BASE, benchmark, metric) for metric in METRICS]
    return not any(mean for own in means.values() for mean in own.values()) and not any(
        row and row.mean for row in base
    )


def _leaders(means: Mapping[str, float]) -> list[str]:
    return [name for name, mean in means.items() if mean == max(means.values())]


def _called(results: Results, metric: str, benchmark: str) -> str:
    return "greedy decoding" if metric == "greedy" else results.label(metric, benchmark)


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _means(results: Results, benchmark: str, metric: str) -> dict[str, float]:
    rows = {name: results.row(name, benchmark, metric) for name in results.algorithms}
    return {name: row.mean for name, row in rows.items() if row}


def _ranking(means: Mapping[str, float]) -> list[str]:
    return sorted(means, key=lambda name: -means[name])


def _margin(matrices: Mapping[ResultKey, ResultMatrix], benchmark: str, best: str, second: str) -> str:
    """Best against second, corrected for all pairs: which two they are is known only from the results."""
    a, b = (matrices.get((name, benchmark, "avg_at_k")) for name in (best, second))
    shared = difference_of(a, b) if a and b else None
    if shared is None:
        return f", ahead of {second}, with which it has no seed in common, so the two are not compared"
    difference = crossed_interval(shared.values, benchmarks=shared.benchmarks)
    pairs = compare_pairs(matrices, benchmark, "avg_at_k")
    p, number = pairs[best, second], len(pairs) // 2
    verdict = "distinguishable" if p < SIGNIFICANT else "not distinguishable"
    corrected = f", Holm-corrected for {number} pairs" if number > 1 else ""
    return (
        f", {points(difference.mean)} points over {second}, the runner-up (paired 95 % interval "
        f"{points(difference.low)} to {points(difference.high)}; {significance(p)}{corrected}): "
        f"the two are {verdict} here"
    )


def _agreement(results: Results, benchmark: str, means: Mapping[str, Mapping[str, float]], metric: str) -> str:
    own = means[metric]
    by = _called(results, metric, benchmark)
    if len(set(own.values())) == 1:
        return f"In {by} all are equal, at {percent(max(own.values()))} %"
    leaders = _leaders(own)
    verb, top = "leads" if len(leaders) == 1 else "lead", percent(max(own.values()))
    first = f"In {by} {listed(leaders)} {verb} with {top} %"
    ranked = _ranking(means["avg_at_k"])
    if ranked == _ranking(own):
        return f"{first}: the ranking is the same"
    return f"{first}: {'only the ranking behind it differs' if leaders == ranked[:1] else 'the ranking differs'}"
