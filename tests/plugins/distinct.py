"""Distinct answers: how many different texts the samples of a problem hold, as a share of the samples."""

from rlzoo.evaluation import Metric, ProblemSamples


def distinct_share(problem: ProblemSamples) -> float:
    """Different texts / samples."""
    return len({sample["text"] for sample in problem.samples}) / len(problem.samples)


distinct = Metric("distinct", distinct_share, label="distinct answers")
