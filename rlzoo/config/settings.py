"""The schema of an experiment file: strict and typed, with one-line errors and defaults that were tested."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field

from rlzoo.config.reading import lay
from rlzoo.config.sampling import Rollouts, Sampling, Scoring
from rlzoo.config.sources import Benchmark, ProblemSource, Reported, TableSource, benchmarks_by_name
from rlzoo.config.stages import WARM_UP, WarmUp, check_stages
from rlzoo.config.validation import Positive, Seed, Strict, one_or_several, valid_token_budget, validated

Packing = Literal["auto", "packed", "padded"]
"""How the rows of a micro-batch are laid out: see `Training.packing`."""

BASE = "base"
"""The name, in outcomes, of the model that every cell starts from."""

Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Amount = Annotated[float, Field(gt=0, allow_inf_nan=False)]
TokenBudget = int | str
"""Tokens per micro-batch, padding included: a number, ``auto`` for what fits, or ``auto/4`` for a quarter of that."""


def _less(budget: TokenBudget, parts: int) -> TokenBudget:
    """A token budget divided into so many parts."""
    if isinstance(budget, int):
        return max(1, budget // parts)
    return f"auto/{parts * int(budget.partition('/')[2] or 1)}"


class EvaluationSettings(Sampling):
    """How policies are evaluated: ``samples`` per problem at ``temperature`` for avg@k and pass@k, and one greedily."""

    k: Annotated[Positive | tuple[Positive, ...] | None, pydantic.WrapValidator(one_or_several)] = None
    """The k of pass@k and maj@k, at most ``samples`` (None), or several, of which the main tables show the first."""
    metrics: tuple[str, ...] = ()
    """Metrics besides the built-in ones, or lists of them: registered names, ``module:Name`` or ``file.py:Name``."""
    correct_at: float = 0.5
    """The smallest reward of a correct completion."""
    curve_points: Annotated[int, Field(ge=0)] = 4
    """The number of evaluations in the course of training, including the last; 0: none."""
    curve_problems: Positive = 48
    """How many problems of each benchmark these use."""
    curve_samples: Positive = 2
    """How many samples per problem these use."""
    until_flat: Positive | None = None
    """End a cell once its avg@k on ``validation`` (the first ``curve_problems``) has not exceeded its earlier best by
    more than one standard error for this many curve points in a row; None: never."""

    @pydantic.model_validator(mode="after")
    def _k_fits(self) -> EvaluationSettings:
        if self.k is not None and (most := max(self.pass_ks)) > self.samples:
            raise ValueError(f"k = {most} needs at least {most} samples, and samples = {self.samples}")
        if self.until_flat is not None and self.until_flat + 1 >= self.curve_points:
            raise ValueError(
                f"until_flat = {self.until_flat} would end no cell early: the first curve point has none to compare "
                f"with, so curve_points = {self.curve_points} must be at least {self.until_flat + 2}"
            )
        return self

    @property
    def pass_ks(self) -> tuple[int, ...]:
        """All values of k for pass@k."""
        k = self.samples if self.k is None else self.k
        return k if isinstance(k, tuple) else (k,)

    @property
    def pass_k(self) -> int:
        """The k of pass@k that the main tables show."""
        return self.pass_ks[0]


class Lora(Strict):
    """Low-rank adapters (arXiv 2106.09685; rank and scale as in arXiv 2508.05629)."""

    rank: Positive = 8
    """The rank of each adapter."""
    alpha: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 16.0
    """An adapter's product is multiplied by alpha / rank."""
    target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """Names of the layers that get adapters; ``all-linear``: all linear layers but the output layer."""
    load_in_4bit: bool = False
    """Load the frozen weights of linear layers in 4 bits (QLoRA, arXiv 2305.14314): NF4 with double quantisation. They
    are multiplied in ``dtype``, and dequantised when the model is saved."""


class Budget(Strict):
    """The cost at which training ends: exactly one of three."""

    gradient_tokens: Amount | None = None
    """Prompt and completion tokens in backward passes."""
    tokens: Amount | None = None
    """Gradient tokens and sampled tokens; those of a shared buffer count for each cell that learns from it."""
    flops: Amount | None = None
    """FLOPs of training and of sampling for it; those of a shared buffer count likewise."""

    @pydantic.model_validator(mode="after")
    def _is_one(self) -> Budget:
        if len(self.model_dump(exclude_none=True)) != 1:
            raise ValueError("budget: give exactly one of gradient_tokens, tokens and flops")
        return self

    @property
    def cost(self) -> str:
        """The cost that is bounded, by the name it has in costs."""
        return next(iter(self.model_dump(exclude_none=True)))

    @property
    def amount(self) -> float:
        """Its bound."""
        return float(getattr(self, self.cost))


class Training(Strict):
    """Optimisation: AdamW with linear warm-up, then cosine decay to zero (the settings of arXiv 2508.05629)."""

    steps: Positive = 100
    """Optimizer steps; with a ``budget``, at most this many."""
    epochs: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Passes over the rows that a row of the comparison learns from, in place of ``steps``; online, over the problems:
    steps = ⌈epochs · rows / batch_size⌉ · mini_batches · updates_per_batch."""
    budget: Budget | None = None
    """Training ends after the step at which its cost reaches this. The learning rate then follows the fraction that is
    spent, in place of the fraction of ``steps``. Evaluation does not count."""
    batch_size: Positive = 64
    """Sequences per batch: a pair counts as two, a group as its samples."""
    mini_batches: Positive = 1
    """Optimizer steps per pass over a batch, each on other rows of it: whole pairs and groups. Advantages are taken
    over the batch, and π_old is the policy at its start."""
    updates_per_batch: Positive = 1
    """Passes over each batch. With more than one step per batch, ratios and value clipping take effect."""
    token_budget: Annotated[TokenBudget, pydantic.PlainValidator(valid_token_budget)] = "auto"
    """Tokens per micro-batch, padding included; the gradient does not depend on it. ``auto``: as many as fit into the
    GPU's memory, or 4096 on a CPU."""
    packing: Packing = "auto"
    """``packed``: the rows of a micro-batch are concatenated, without padding; ``auto``: where a GPU attends to all of
    them in one call, in bfloat16; else ``padded``."""
    learning_rate: Rate = 5e-5
    """The peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's β₁ and β₂."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """AdamW's decoupled weight decay."""
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """The fraction of steps with linear warm-up."""
    max_gradient_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradients are scaled down to this norm."""
    importance_cap: Annotated[float, Field(gt=0)] | None = None
    """Truncated importance sampling for samples of another engine: each token has weight min(π/π_engine, this)."""
    max_completion_tokens: Positive = 2048
    """Longer demonstrations, and longer completions of a table, are cut on the right: they have no end of sequence, and
    are marked as truncated."""
    max_length: Positive | None = None
    """The same for prompt and completion together, in tokens; None: no such limit."""
    chat_template: str | None = None
    """A Jinja template of conversations in place of the tokenizer's, for models that have none or another."""
    special_tokens: Literal["reject", "allow"] = "reject"
    """Text in a table of demonstrations that spells a special token, as in `ProblemSource`."""
    turns: Annotated[str, Field(min_length=1)] = "last"
    """Which of the assistant's turns are learned from: the ``last``, ``all``, or those in which a key of the message,
    such as ``weight`` or ``train``, is not 0."""
    behaviour: Literal["recorded", "current"] = "recorded"
    """Samples without behaviour log-probs are left out, or get those of the initial policy (``current``)."""
    device: str = "auto"
    """``auto``, ``cpu``, ``cuda``, or one GPU, as in ``cuda:1``. ``auto`` is a GPU if there is one."""
    dtype: Literal["auto", "float32", "bfloat16", "bfloat16-mixed", "float64"] = "auto"
    """``bfloat16-mixed`` keeps the weights in float32 and multiplies matrices in bfloat16; ``bfloat16`` is for adapters
    (``lora``), because it loses small updates of weights. ``auto``: bfloat16-mixed on a GPU, float32 on a CPU."""
    compile: Literal["auto"] | bool = "auto"
    """Compile the model's layers (``true``), which fuses norms, rotary embeddings and gates. ``auto``: on a GPU, in one
    process, if the run is long enough to make up for it, unless ``deterministic``."""
    deterministic: bool = False
    """Make a GPU give the same bits in every run, with slower kernels. A CPU always does."""
    lora: Lora | None = None
    """Train low-rank adapters in place of the weights."""
    gradient_checkpointing: bool = False
    """Keep one activation per layer and recompute the rest in the backward pass: a third slower, with less memory."""
    checkpoint_seconds: Annotated[float, Field(ge=0)] | None = 300.0
    """Seconds between the checkpoints that an interrupted run resumes from; 0: after every batch; None: none."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """What to do at a step whose loss or gradient is not finite: stop the run, or skip and count the step."""
    trackers: tuple[Literal["tensorboard", "trackio", "wandb"], ...] = ()
    """Trackers that receive the metrics of each step."""

    @pydantic.model_validator(mode="before")
    @classmethod
    def _has_one_length(cls, given: Any) -> Any:
        if isinstance(given, Mapping) and None not in (given.get("steps"), given.get("epochs")):
            raise ValueError("steps and epochs both say how long to train: give one of them")
        return given

    @pydantic.model_serializer(mode="wrap")
    def _without_steps(self, dump: pydantic.SerializerFunctionWrapHandler) -> dict[str, Any]:
        found: dict[str, Any] = dump(self)
        if self.epochs is not None:
            found.pop("steps", None)  # they are not known yet, and a file must not give both
        return found

    @property
    def steps_per_batch(self) -> int:
        """Optimizer steps per batch."""
        return self.mini_batches * self.updates_per_batch

    def in_steps(self, batches: float) -> Training:
        """The settings with ``epochs`` in steps, for a source with so many ``batches`` in an epoch."""
        if self.epochs is None:
            return self
        steps = max(1, math.ceil(self.epochs * batches - 1e-9)) * self.steps_per_batch
        return self.model_copy(update={"steps": steps, "epochs": None})


OF_THE_BUFFER = (
    "behaviour", "max_completion_tokens", "max_length", "chat_template", "special_tokens", "turns", "device",
    "deterministic",
)  # fmt: skip
"""Training settings that determine the buffer of a comparison, and so must be the same for all algorithms."""


def _in_4_bits(lora: Any) -> bool:
    """Whether adapters, as a file gives them or checked, are over weights in 4 bits."""
    given = lora.model_dump() if isinstance(lora, Lora) else lora
    return isinstance(given, Mapping) and bool(given.get("load_in_4bit"))


class Algorithm(Strict):
    """One row of a comparison: an objective, its options, and how it is trained."""

    objective: str | None = None
    """A registered name, ``module:Name`` or ``file.py:Name``; None: the row's own name."""
    options: Mapping[str, Any] = {}
    """The objective's hyper-parameters."""
    learning_rates: tuple[Rate, ...] = ()
    """Each is tried on all seeds, and the best on validation is reported; empty: that of ``training``, or that of
    the last of ``stages``, whose rates these are."""
    mode: Literal["offline", "online"] = "offline"
    """``online`` samples each batch from the current policy; ``offline`` reads the shared buffer."""
    learns_from: str | None = None
    """A view in place of the objective's own, with as many rows per unit: ``correct`` trains SFT or DFT on the base's
    correct samples. A registered name, ``module:Name`` or ``file.py:Name``."""
    training: Mapping[str, Any] = {}
    """Fields of `Training` that differ for this row."""
    stages: tuple[str, ...] = ()
    """Other rows, in place of an objective: each is trained from the weights of the one before, as in its own row."""
    online_counterpart: str | None = None
    """The row of another experiment, as ``experiment/row``, in which this objective trains online."""


class Experiment(Strict):
    """A comparison: algorithms × seeds × learning rates from one base, one buffer and one budget."""

    name: str
    """The name of its report, and of its folder under runs/."""
    description: str = ""
    """What it compares, for its report."""
    model: str
    """The base model: ``embedded``, a Hub id, or a folder."""
    warm_up: WarmUp | None = None
    """A first stage that is trained once: its result is the base model of everything that follows."""
    train: ProblemSource
    """The training problems: prompts to sample, and worked solutions as demonstrations."""
    demonstrations: str | TableSource | None = None
    """A saved buffer, or a table in one of TRL's formats, in place of the training problems' solutions. Given by name
    alone, it takes ``bad_rows`` from ``train``."""
    validation: ProblemSource | None = None
    """The problems on which learning rates are chosen."""
    benchmarks: Annotated[Mapping[str, Benchmark], Field(min_length=1), pydantic.BeforeValidator(benchmarks_by_name)]
    """The problem sets that results are reported on, by name; or a list of suites (see ``rlzoo list``)."""
    retention: Annotated[Mapping[str, Benchmark], pydantic.BeforeValidator(benchmarks_by_name)] = {}
    """Problem sets from before fine-tuning, by name, which show what fine-tuning costs: they are reported separately,
    with the KL divergence from the base model (`rlzoo.comparison.retention`)."""
    reward: Any
    """What `get_reward` takes: a name, a mapping with options, or a list for a weighted sum."""
    scoring: Scoring = Scoring()
    rollouts: Rollouts = Rollouts()
    evaluation: EvaluationSettings = EvaluationSettings()
    training: Training = Training()
    algorithms: Annotated[Mapping[str, Algorithm], Field(min_length=1)]
    """The rows of the comparison, by name."""
    baseline: str | None = None
    """The algorithm that the report compares the others with; None: the first."""
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)] = (0, 1, 2)
    """Each algorithm is trained once per seed."""
    reported: Reported | None = None
    """Published results, which the report shows beside the measured ones."""

    @pydantic.model_validator(mode="after")
    def _is_a_grid(self) -> Experiment:
        for name in self.algorithms:
            check_stages(name, self.algorithms)
        sampling, problem = self.rollouts, None
        if sampling.wants_sampler_logp:
            problem = "importance_cap bounds π/π_engine, which needs rollouts.behaviour: recompute"
        elif sampling.url is not None and (sampling.temperature, sampling.top_p) != (1.0, 1.0):
            problem = "importance_cap needs the server's log-probs, which are known only at temperature 1 and top_p 1"
        if problem and any(self.training_of(name).importance_cap is not None for name in self.algorithms):
            raise ValueError(problem)
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds repeat: {list(self.seeds)}")
        if self.evaluation.until_flat is not None and self.validation is None:
            raise ValueError("evaluation.until_flat needs a validation problem set: add `validation`")
        for name, row in self.algorithms.items():
            for setting in OF_THE_BUFFER:
                shared = getattr(self.training, setting)
                if row.training.get(setting, shared) != shared:
                    raise ValueError(
                        f"{setting} of {name!r} would change the buffer that all rows share: set it for all of them"
                    )
            if _in_4_bits(row.training.get("lora", self.training.lora)) != _in_4_bits(self.training.lora):
                raise ValueError(
                    f"lora.load_in_4bit of {name!r} would change the base that all rows share: set it for all of them"
                )
            if len(row.learning_rates) > 1 and self.validation is None:
                raise ValueError("choosing among learning rates needs a validation problem set: add `validation`")
            if len({f"{rate:g}" for rate in row.learning_rates}) < len(row.learning_rates):
                raise ValueError(f"learning rates of {name!r} repeat: {list(row.learning_rates)}")
        return self

    @pydantic.model_validator(mode="after")
    def _has_distinct_problem_sets(self) -> Experiment:
        if both := sorted(self.benchmarks.keys() & self.retention.keys()):
            raise ValueError(f"{both[0]!r} is the name of a benchmark and of a retention set: rename one")
        if unscored := [name for name, one in self.benchmarks.items() if not one.is_scored]:
            raise ValueError(f"the benchmark {unscored[0]!r} needs a reward: only a retention set can have none")
        return self

    @property
    def scored_sets(self) -> dict[str, Benchmark]:
        """The benchmarks, and the retention sets that have a reward, by name."""
        return {**self.benchmarks, **{name: one for name, one in self.retention.items() if one.is_scored}}

    def evaluation_on(self, source: ProblemSource) -> EvaluationSettings:
        """How policies are evaluated on a problem set: ``evaluation``, with the set's length limit if it has one."""
        own = source.max_new_tokens if isinstance(source, Benchmark) else None
        return self.evaluation if own is None else self.evaluation.model_copy(update={"max_new_tokens": own})

    @property
    def demonstrations_table(self) -> TableSource | None:
        """The table of demonstrations, if there is one."""
        given = self.demonstrations
        return TableSource(source=given, bad_rows=self.train.bad_rows) if isinstance(given, str) else given

    @property
    def of_warm_up(self) -> Experiment | None:
        """The warm-up, if there is one, as an experiment with a single row, `WARM_UP`."""
        if (one := self.warm_up) is None:
            return None
        training = {"lora": None, "importance_cap": None, "budget": None, **one.training}
        row = Algorithm(objective=one.objective, options=one.options, training=training)
        alone = {"algorithms": {WARM_UP: row}, "train": one.train or self.train, "warm_up": None}
        return self.model_copy(update=alone)

    def with_smaller_batches(self, divisor: int) -> Experiment:
        """The experiment with batches ``divisor`` times smaller in memory, and the same results up to rounding."""
        if divisor == 1:
            return self

        def fewer(settings: Any, field: str) -> Any:
            return settings.model_copy(update={field: _less(getattr(settings, field), divisor)})

        rows = {}
        for name, row in self.single_rows.items():
            budget = _less(self.training_of(name).token_budget, divisor)
            rows[name] = row.model_copy(update={"training": {**row.training, "token_budget": budget}})
        return self.model_copy(
            update={
                "training": fewer(self.training, "token_budget"),
                "rollouts": fewer(self.rollouts, "batch_size"),
                "evaluation": fewer(self.evaluation, "batch_size"),
                "algorithms": {**self.algorithms, **rows},
            }
        )

    @property
    def single_rows(self) -> dict[str, Algorithm]:
        """The rows with an objective of their own, which are all but those with stages."""
        return {name: row for name, row in self.algorithms.items() if not row.stages}

    def stages_of(self, name: str) -> tuple[str, ...]:
        """The rows that an algorithm trains one after another: its stages, or itself."""
        return self.algorithms[name].stages or (name,)

    def training_of(self, name: str) -> Training:
        """The training settings of one algorithm, in its last stage. Raises UserError naming a wrong one."""
        last = self.stages_of(name)[-1]
        data: dict[str, Any] = {"training": self.training.model_dump()}
        for setting, value in self.algorithms[last].training.items():
            lay(data, f"training.{setting}", value)
        return validated(Training, data["training"], f"{last}.training")

    def learning_rates_of(self, name: str) -> tuple[float, ...]:
        """The learning rates that one algorithm is trained with, in its last stage."""
        last = self.stages_of(name)[-1]
        rates = self.algorithms[name].learning_rates or self.algorithms[last].learning_rates
        return rates or (self.training_of(last).learning_rate,)
