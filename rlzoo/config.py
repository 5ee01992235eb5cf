"""What an experiment file says: strict, typed, with one-line errors. Every field's default is the vetted setting."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import pydantic
import yaml
from pydantic import Field

from rlzoo.errors import UserError, unknown

OnBadRow = Literal["reject", "drop"]

BASE = "base"
"""The name under which outcomes carry the samples of the model that every cell started from."""

Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(gt=0, le=1)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
M = TypeVar("M", bound=pydantic.BaseModel)
TokenBudget = int | str
"""Padded tokens per micro-batch: a number, ``auto`` for what fits, or ``auto/4`` for a fourth of that."""
EXPERIMENTS = Path(__file__).parent / "experiments"


def _named_null(value: Any) -> Any:
    """``null`` in YAML is no text; there it is meant as the word."""
    return "null" if value is None else value


def _one_or_several(value: Any, check: pydantic.ValidatorFunctionWrapHandler) -> Any:
    """A whole number, or a list of different ones."""
    try:
        checked = check(value)
    except pydantic.ValidationError:
        checked = ()
    if isinstance(checked, tuple) and (not checked or len(set(checked)) < len(checked)):
        raise ValueError(f"{value!r:.60} is neither a whole number of at least 1 nor a list of different ones")
    return checked


def _token_budget(value: TokenBudget) -> TokenBudget:
    is_number = isinstance(value, int) and not isinstance(value, bool) and value > 0
    if not is_number and not (isinstance(value, str) and re.fullmatch(r"auto(/[1-9]\d*)?", value)):
        raise ValueError(f"{value!r:.60} is neither a whole number of at least 1 nor auto")
    return value


def _less(budget: TokenBudget, parts: int) -> TokenBudget:
    """A token budget in so many parts."""
    if isinstance(budget, int):
        return max(1, budget // parts)
    return f"auto/{parts * int(budget.partition('/')[2] or 1)}"


class _Strict(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)


class ProblemSource(_Strict):
    """Where problems come from and how a row becomes a prompt."""

    source: str
    """``world:arithmetic/test``, a file (.jsonl, .json, .parquet, .csv, .tsv, .arrow; text also compressed), a folder
    of shards, a pattern (``data/*.parquet``), a saved data set, or a Hub id (``openai/gsm8k:main``)."""
    split: str = "train"
    """Of a Hub data set. A file is one split, whatever its name, and a built-in task has its split in its name."""
    prompt: str = "prompt"
    """A column, or a template such as ``"{question}\\nShow your work."``; ``extra.question`` is a field within one."""
    solution: str | None = None
    """The column of a worked solution, for demonstrations."""
    quality: str | None = None
    """The column of a solution's quality score, for objectives that draw demonstrations in proportion to it."""
    columns: Mapping[str, str] = {}
    """Names that a reward asks for → columns of the table, or fields such as ``reward_model.ground_truth``."""
    bad_rows: OnBadRow = "reject"
    """A row that cannot be a problem or a demonstration stops the run, or is dropped and counted (``drop``)."""
    chat: bool = False
    """Whether to put the prompt into the model's chat template as a user's turn."""
    system: str | None = None
    """The text of a system turn before each conversation; ``""``: an empty turn. None: no turn, and so the template's
    default where it has one."""
    special_tokens: Literal["reject", "allow"] = "reject"
    """Text that spells a special token (a message that spells ``<|im_end|>``, a completion that goes on after an end of
    sequence): an error that names the problem, or read as that token."""
    limit: Positive | None = None


class Benchmark(ProblemSource):
    """A problem set to evaluate on."""

    reward: Any = None
    """Scores its answers in place of the experiment's reward."""

    @pydantic.model_validator(mode="before")
    @classmethod
    def _of_problems(cls, given: Any) -> Any:
        """Any problem set can be a benchmark."""
        return given.model_dump() if type(given) is ProblemSource else given


class TableSource(_Strict):
    """A table of demonstrations, preferences or graded samples, or a saved buffer."""

    source: str
    split: str | None = None
    columns: Mapping[str, str | list[str] | None] = {}
    """Names of a format → columns of the table (or fields within them, or lists of both); null leaves a column out."""
    bad_rows: OnBadRow = "reject"


class Sampling(_Strict):
    """How completions are sampled."""

    samples: Positive = 4
    """Completions a prompt."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    top_p: Share = 1.0
    max_new_tokens: Positive = 256
    batch_size: Positive = 256
    """Sequences sampled together."""
    engine: str = "auto"
    """The sampler: ``transformers``, ``vllm``, another registered name, ``module:Name`` or ``file.py:Name``.
    ``auto`` is vllm where it is installed and the policy is on a GPU (or where there is a url), else transformers."""
    url: str | None = None
    """Of a vLLM server; without one, vLLM runs in the process that samples."""
    engine_options: Mapping[str, Any] = {}
    """What the sampler is built with. Of vllm those of ``vllm.LLM``: max_model_len, gpu_memory_utilization, ..."""

    @pydantic.model_validator(mode="after")
    def _is_of_one_engine(self) -> Sampling:
        if self.url is not None and self.engine_options:
            raise ValueError("a server has its own options: give url or engine_options")
        if "trust_remote_code" in self.engine_options:
            raise ValueError("engine_options: no file may ask for trust_remote_code: use the flag --trust-remote-code")
        return self

    @property
    def wants_sampler_logp(self) -> bool:
        """Whether the sampler's own log-probs are the behaviour's."""
        return False


class Rollouts(Sampling):
    """The samples of the base policy that fill the shared buffer."""

    prompts: Positive | None = None
    """How many of the training problems; None: all."""
    behaviour: Literal["recompute", "sampler"] = "recompute"
    """Whose log-probs the buffer holds as the behaviour's: the trainer's own, or those of the engine that sampled."""
    per_seed: bool = False
    """Whether each seed has a buffer of its own samples, so that intervals cover the drawing of the samples too."""

    @property
    def wants_sampler_logp(self) -> bool:
        return self.behaviour == "sampler"


class EvaluationSettings(Sampling):
    """``samples`` at ``temperature`` give avg@k and pass@k; one more, greedy, gives the greedy score."""

    k: Annotated[Positive | tuple[Positive, ...] | None, pydantic.WrapValidator(_one_or_several)] = None
    """pass@k's k, at most ``samples``, or several, the first of which the main tables show; None: ``samples``."""
    metrics: tuple[str, ...] = ()
    """Metrics besides the built-in ones: registered names, ``module:Name`` or ``file.py:Name``."""
    correct_at: float = 0.5
    """A reward of this much or more counts as correct."""
    curve_points: Annotated[int, Field(ge=0)] = 4
    """Evaluations along training, the last one included; 0 for none."""
    curve_problems: Positive = 48
    curve_samples: Positive = 2

    @pydantic.model_validator(mode="after")
    def _k_fits(self) -> EvaluationSettings:
        if self.k is not None and (most := max(self.pass_ks)) > self.samples:
            raise ValueError(f"k = {most} needs at least {most} samples, and samples = {self.samples}")
        return self

    @property
    def pass_ks(self) -> tuple[int, ...]:
        """The k of each pass@k."""
        k = self.samples if self.k is None else self.k
        return k if isinstance(k, tuple) else (k,)

    @property
    def pass_k(self) -> int:
        """The first of them."""
        return self.pass_ks[0]


class Judging(_Strict):
    """How the reward is called: in a process of its own, unless both limits are null."""

    seconds: Annotated[float, Field(gt=0)] | None = 60.0
    """For one call; a call that takes longer is ended, and its completions are scored one by one."""
    memory_gb: Annotated[float, Field(gt=0)] | None = 4.0
    """Memory that its process may ask for, in 2³⁰ bytes."""
    on_error: Annotated[Literal["fail", "null"], pydantic.BeforeValidator(_named_null)] = "fail"
    """A completion on which the reward raises, hangs or gives no number ends the run, or has no reward."""


class Lora(_Strict):
    """Low-rank adapters (arXiv 2106.09685; the rank and scale of arXiv 2508.05629)."""

    rank: Positive = 8
    alpha: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 16.0
    """The adapter's product is multiplied by alpha / rank."""
    target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """Names of layers; ``all-linear`` takes all but the output layer."""


class Training(_Strict):
    """The optimisation: AdamW, linear warm-up, then a cosine to zero (the paper's settings)."""

    steps: Positive = 100
    """Optimizer steps: the budget that all algorithms share."""
    batch_size: Positive = 64
    """Sequences an optimizer step: a pair counts as two, a group as its samples."""
    updates_per_batch: Positive = 1
    """Optimizer steps on each batch before the next is drawn; above 1, ratios and value clipping come to bear."""
    token_budget: Annotated[TokenBudget, pydantic.PlainValidator(_token_budget)] = "auto"
    """Padded tokens per micro-batch; the gradient does not depend on it. ``auto``: as many as fit into a GPU's memory,
    or 4096 on a CPU."""
    learning_rate: Rate = 5e-5
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.1
    max_gradient_norm: Annotated[float, Field(gt=0)] = 1.0
    importance_cap: Annotated[float, Field(gt=0)] | None = None
    """Truncated importance sampling for samples of another engine: each token weighs min(π/π_engine, this) as much."""
    max_completion_tokens: Positive = 2048
    """Longer demonstrations, and any longer completions of a table, are cut on the right, lose their end-of-sequence
    token and are marked truncated."""
    special_tokens: Literal["reject", "allow"] = "reject"
    """Text in a table of demonstrations that spells a special token, as in `ProblemSource`."""
    behaviour: Literal["recorded", "current"] = "recorded"
    """Samples without behaviour log-probs, as other people's: left out, or with those of the policy as it starts."""
    device: str = "auto"
    """``auto``, ``cpu``, ``cuda``, or a GPU's number as in ``cuda:1``. ``auto`` is a GPU where there is one."""
    dtype: Literal["auto", "float32", "bfloat16", "bfloat16-mixed", "float64"] = "auto"
    """``bfloat16-mixed`` keeps the weights in float32 and multiplies matrices in bfloat16; ``bfloat16`` is for adapters
    (``lora``), as small updates of weights in it are lost. ``auto``: bfloat16-mixed on a GPU, float32 on a CPU."""
    deterministic: bool = False
    """Have a GPU give the same bits in every run: slower kernels, and none that add in any order. A CPU does anyway."""
    lora: Lora | None = None
    """Train adapters of low rank in place of the weights."""
    gradient_checkpointing: bool = False
    """Keep one activation per layer and recompute the others in the backward pass: a third more time, less memory."""
    checkpoint_seconds: Annotated[float, Field(ge=0)] | None = 300.0
    """Time between checkpoints, from which a run that was stopped resumes; 0: after every batch; None: none."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """What to do at a step whose loss or gradient is not finite; a step that is skipped is counted."""
    trackers: tuple[Literal["tensorboard", "trackio", "wandb"], ...] = ()
    """Where the metrics of each step go besides the results."""


OF_THE_BUFFER = ("behaviour", "max_completion_tokens", "special_tokens", "device", "deterministic")
"""Settings of training that decide what the buffer of a comparison holds, and so are the same for all of its rows."""


class Algorithm(_Strict):
    """One row of a comparison: an objective, its options, and how it is trained."""

    objective: str | None = None
    """A registered name, ``module:Name`` or ``file.py:Name``; None: the row's own name."""
    options: Mapping[str, Any] = {}
    learning_rates: tuple[Rate, ...] = ()
    """More than one: each is tried on all seeds and the best on the validation problems is reported."""
    mode: Literal["offline", "online"] = "offline"
    """``online`` samples each batch anew from the policy in training; ``offline`` reads the shared buffer."""
    learns_from: Literal["demonstrations", "correct"] | None = None
    """Other single rows than the objective's own: ``correct`` trains SFT or DFT on the base's own correct samples."""
    training: Mapping[str, Any] = {}
    """Settings of `Training` that differ for this row."""


class Experiment(_Strict):
    """A comparison: algorithms × seeds × learning rates from one base, one buffer and one budget."""

    name: str
    description: str = ""
    model: str
    """``embedded``, a Hub id, or a folder."""
    train: ProblemSource
    demonstrations: str | TableSource | None = None
    """A saved buffer, or a table in one of TRL's formats, in place of the training problems' solutions.

    Bad rows of a table that is only named go the way of the training problems' (``train.bad_rows``).
    """
    validation: ProblemSource | None = None
    benchmarks: Annotated[Mapping[str, Benchmark], Field(min_length=1)]
    reward: Any
    judging: Judging = Judging()
    rollouts: Rollouts = Rollouts()
    evaluation: EvaluationSettings = EvaluationSettings()
    training: Training = Training()
    algorithms: Annotated[Mapping[str, Algorithm], Field(min_length=1)]
    baseline: str | None = None
    """The algorithm that the report compares the others with, pairwise."""
    seeds: Annotated[tuple[Annotated[int, Field(ge=0, lt=2**32)], ...], Field(min_length=1)] = (0, 1, 2)

    @pydantic.model_validator(mode="after")
    def _is_a_grid(self) -> Experiment:
        sampling = self.rollouts
        untold = sampling.url is not None and (sampling.temperature, sampling.top_p) != (1.0, 1.0)
        for wrong, told in (
            (
                sampling.wants_sampler_logp,
                "importance_cap weighs π/π_engine, which needs rollouts.behaviour: recompute",
            ),
            (untold, "importance_cap needs log-probs of the server: known at temperature 1 and top_p 1"),
        ):
            if wrong and any(self.training_of(name).importance_cap is not None for name in self.algorithms):
                raise ValueError(told)
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds repeat: {list(self.seeds)}")
        for name, row in self.algorithms.items():
            for setting in OF_THE_BUFFER:
                shared = getattr(self.training, setting)
                if row.training.get(setting, shared) != shared:
                    raise ValueError(
                        f"{setting} of {name!r} would change the buffer that all rows share: set it for all"
                    )
            if len(row.learning_rates) > 1 and self.validation is None:
                raise ValueError("choosing among learning rates needs a validation problem set: add `validation`")
            if len({f"{rate:g}" for rate in row.learning_rates}) < len(row.learning_rates):
                raise ValueError(f"learning rates of {name!r} repeat: {list(row.learning_rates)}")
        return self

    @property
    def demonstrations_table(self) -> TableSource | None:
        """The table of demonstrations, if there is one."""
        given = self.demonstrations
        return TableSource(source=given, bad_rows=self.train.bad_rows) if isinstance(given, str) else given

    def in_parts(self, parts: int) -> Experiment:
        """The same with ``parts`` times fewer tokens per micro-batch and sequences sampled together: results are equal
        but for rounding."""
        if parts == 1:
            return self

        def fewer(settings: Any, field: str) -> Any:
            return settings.model_copy(update={field: _less(getattr(settings, field), parts)})

        rows = {}
        for name, row in self.algorithms.items():
            budget = _less(self.training_of(name).token_budget, parts)
            rows[name] = row.model_copy(update={"training": {**row.training, "token_budget": budget}})
        return self.model_copy(
            update={
                "training": fewer(self.training, "token_budget"),
                "rollouts": fewer(self.rollouts, "batch_size"),
                "evaluation": fewer(self.evaluation, "batch_size"),
                "algorithms": rows,
            }
        )

    def training_of(self, name: str) -> Training:
        """The settings of one algorithm's training."""
        return validated(Training, {**self.training.model_dump(), **self.algorithms[name].training}, f"{name}.training")

    def learning_rates_of(self, name: str) -> tuple[float, ...]:
        return self.algorithms[name].learning_rates or (self.training_of(name).learning_rate,)


def validated(model: type[M], data: Any, where: str) -> M:
    """``data`` as ``model``, or a UserError that names the field."""
    try:
        return model.model_validate(data)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        *parents, last = [str(part) for part in first["loc"]] or [""]
        if first["type"] == "extra_forbidden":
            owner = _owner(model, first["loc"][:-1])
            inside = f"setting of {'.'.join(parents)}" if parents else "setting"
            raise unknown(f"{inside} in {where}", last, owner.model_fields if owner else []) from None
        reason = first["msg"].removeprefix("Value error, ")
        given = "" if first["type"] in ("missing", "value_error") else f" = {first['input']!r:.60}"
        field = f"{'.'.join([*parents, last])}{given}: " if last else ""
        raise UserError(f"{where}: {field}{reason}") from None


def list_experiments() -> dict[str, str]:
    """The experiments that ship with rlzoo: name → description."""
    found = {}
    for path in sorted(EXPERIMENTS.glob("*.yaml")):
        found[path.stem] = str(read_yaml(path).get("description", "")).strip()
    return found


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file that holds a mapping. Raises UserError with the line of a mistake."""
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"experiment file {str(path)!r} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}:" if mark else ""
        raise UserError(f"{path}:{line} not valid YAML: {getattr(error, 'problem', None) or error}") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: an experiment is a mapping of settings, not {type(data).__name__}")
    return data


def load_experiment(name: str, changes: Mapping[str, Any] | None = None) -> Experiment:
    """An experiment by name or file path, with ``changes`` (dotted keys → values) laid over it."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else EXPERIMENTS / f"{name}.yaml"
    if not name.endswith((".yaml", ".yml")) and not path.is_file():
        raise unknown("experiment", name, [p.stem for p in EXPERIMENTS.glob("*.yaml")])
    data = {"name": path.stem, **read_yaml(path)}
    for key, value in (changes or {}).items():
        lay(data, key, value)
    return validated(Experiment, data, str(path.name))


def lay(data: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key in nested mappings; those on the way are copied, or created."""
    *parents, last = key.split(".")
    for parent in parents:
        child = data.get(parent)
        data[parent] = child = dict(child) if isinstance(child, Mapping) else {}
        data = child
    data[last] = value


def _owner(model: type[pydantic.BaseModel], path: tuple[Any, ...]) -> type[pydantic.BaseModel] | None:
    """The model that holds the field at ``path``; None for one of a list."""
    owner: Any = model
    for part in path:
        field = getattr(owner, "model_fields", {}).get(part)
        if field is not None:  # else it is a key of a mapping, and the owner is the model of its values already
            owner = field.annotation if hasattr(field.annotation, "model_fields") else _inner(field.annotation)
    found: type[pydantic.BaseModel] | None = owner
    return found


def _inner(annotation: Any) -> Any:
    for argument in get_args(annotation):
        found = argument if hasattr(argument, "model_fields") else _inner(argument)
        if found is not None:
            return found
    return None
