"""Where the problems, the tables and the published results of an experiment come from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import pydantic

from rlzoo.config.suites import OF_TASKS, settings_of
from rlzoo.config.validation import Positive, Seed, Strict

OnBadRow = Literal["reject", "drop"]
"""What happens to a row that cannot be used: an error, or the row is left out and counted."""


class ProblemSource(Strict):
    """Where problems come from, and how a row becomes a prompt."""

    source: str
    """``world:arithmetic/test``, a file (.jsonl, .json, .parquet, .csv, .tsv, .arrow; text also compressed), a folder
    of shards, a pattern (``data/*.parquet``), a saved data set, a Hub id (``openai/gsm8k:main``), or a task of inspect
    (``inspect:file.py@task``, ``inspect:inspect_evals/gsm8k?fewshot=0``)."""
    split: str = "train"
    """The split of a Hub data set. A file is a single split, and the name of a built-in task includes its split."""
    prompt: str = "prompt"
    """A column, or a template such as ``"{question}\\nShow your work."``; ``extra.question`` is a field within one."""
    solution: str | None = None
    """The column with a worked solution, from which demonstrations are made, or a template over columns, which also
    changes the solutions of a built-in task: ``"<think>{solution}</think>"``."""
    quality: str | None = None
    """The column with a solution's quality score, for objectives that sample demonstrations in proportion to it."""
    columns: Mapping[str, str] = {}
    """Names that a reward expects → columns of the table, or fields such as ``reward_model.ground_truth``."""
    bad_rows: OnBadRow = "reject"
    """A row that cannot become a problem or a demonstration is an error, or is dropped and counted (``drop``)."""
    chat: bool = False
    """Whether to render the prompt as a user turn in the model's chat template."""
    system: str | None = None
    """The text of a system turn before each conversation; ``""``: an empty turn; None: no turn, or the template's
    default if it has one."""
    special_tokens: Literal["reject", "allow"] = "reject"
    """Text that spells a special token (``<|im_end|>`` in a message, text after an end of sequence in a completion): an
    error that names the problem, or read as that token."""
    limit: Positive | None = None
    """Use at most this many problems; None: all."""
    subset_seed: Seed | None = None
    """Draw the ``limit`` rows at random with this seed, and use them in the order of the table; None: the first ones.
    Which rows are drawn depends on the number of rows alone, and bad ones are not replaced."""


NO_REWARD = "none"
"""The reward of a retention set whose completions cannot be scored."""


class Benchmark(ProblemSource):
    """A problem set to evaluate on."""

    suite: str | None = None
    """A benchmark suite (see ``rlzoo list``), whose settings apply where no others are given."""
    reward: Any = None
    """A reward that scores its completions in place of the experiment's. ``none``, in a retention set only: there is no
    reward, and only the likelihood of the base model's text is measured."""
    max_new_tokens: Positive | None = None
    """The length limit of its completions in place of the evaluation's, in tokens."""

    @pydantic.model_validator(mode="before")
    @classmethod
    def _of_problems(cls, given: Any) -> Any:
        """Accept any problem set as a benchmark, and fill in the settings of a suite or a task."""
        if type(given) is ProblemSource:
            return given.model_dump()
        return settings_of(given) if isinstance(given, Mapping) else given

    @property
    def is_scored(self) -> bool:
        """Whether a reward scores its completions."""
        return bool(self.reward != NO_REWARD)


def benchmarks_by_name(given: Any) -> Any:
    """Benchmarks by name, where they may be the name of a suite, a list of such names, or a mapping with such values.

    In a mapping, the name of a task (``inspect:...``) may stand for its benchmark. Anything else is returned unchanged.
    """
    names = [given] if isinstance(given, str) else given
    if isinstance(names, list | tuple) and all(isinstance(name, str) for name in names):
        given = {name: name for name in names}
    if not isinstance(given, Mapping):
        return given
    return {name: {_kind(one): one} if isinstance(one, str) else one for name, one in given.items()}


def _kind(name: str) -> str:
    """The setting that a benchmark's name stands for."""
    return "source" if name.startswith(tuple(OF_TASKS)) else "suite"


class TableSource(Strict):
    """A table of demonstrations, preferences or graded samples, or a saved buffer."""

    source: str
    """A file, a folder of shards, a pattern, a saved data set, a Hub id, or a saved buffer, here or on the Hub."""
    split: str | None = None
    """The split, where there are several; also a slice of one, such as ``train[:1000]``."""
    columns: Mapping[str, str | list[str] | None] = {}
    """Names in the format → columns of the table (or fields in them, or lists of these); null leaves a column out."""
    bad_rows: OnBadRow = "reject"
    """A row that cannot be used is an error, or is dropped and counted (``drop``)."""


class Reported(Strict):
    """Results that others have published for an experiment, which its report shows beside the measured ones."""

    source: str
    """The publication, and the table in it."""
    model: str
    """The model in the publication."""
    metric: str
    """The metric, in words."""
    results: Mapping[str, Mapping[str, float]]
    """Per cent: row of the comparison, or ``base`` → benchmark, or ``mean`` over benchmarks → value."""
    notes: tuple[str, ...] = ()
    """What a reader of the numbers should know."""
