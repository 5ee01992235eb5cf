"""The contract of objectives and rewards, in one call each, for whoever writes one: an AssertionError says what failed.

from rlzoo.testing import check_objective

def test_mine() -> None:
    check_objective("mine.py:Mine", loss)
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rlzoo.buffers import OfflineBuffer
from rlzoo.config import Training
from rlzoo.errors import UserError
from rlzoo.inputs import Input, Snapshot, Stage
from rlzoo.objective import Objective, get_objective, is_composite, reduce, surrogate, surrogate_of
from rlzoo.policy import Policy, load_policy, score_rows
from rlzoo.reward import get_reward
from rlzoo.training import Trainer
from rlzoo.types import Coefficients, TokenBatch, Trajectory, Unit, selector_of
from rlzoo.variance import analyze_variance

Loss = Callable[[TokenBatch], Tensor]
"""A loss as its paper writes it, of a batch without advantages: a scalar that autograd differentiates."""

GROUPS = (4, 4, 3, 2, 1)
FLAT_GROUP = slice(4, 8)
SINGLE_TOKEN, EMPTY = (1, 6, 9), (3, 7)
ROWS, LENGTH = sum(GROUPS), 11
PADDING = (math.nan, math.inf, -math.inf, 1e9, 0.0)


def check_objective(objective: Objective | str, loss: Loss | None = None, *, through_trainer: bool = True) -> None:
    """Check an objective against the ``loss`` of its paper, and against what the trainer and the analyzer rely on.

    ``loss`` gets a batch [B, T] with everything that ``requires`` lists, in float64, and rubbish at masked positions.
    Without one, its gradient and value go unchecked. Checked are, by name in the message: the gradient in log-probs
    and module inputs, the reported loss, masked positions, coefficients without a graph, any split into micro-batches
    and order of rows, batches with every token masked, float32 and bfloat16, and steps of the real trainer and the
    variance analyzer on the embedded model (skipped without ``through_trainer``). Raises AssertionError, and UserError
    for an objective that cannot be found or built.
    """
    found = get_objective(objective) if isinstance(objective, str) else objective
    for check in (_gradient, _reported, _masked, _graph, _split, _order, _nothing, _precision):
        check(found, loss)
    if through_trainer:
        _trained(found)
        if not is_composite(type(found)):
            _analysed(found)


def check_reward(reward: Any, prompts: Sequence[Any], completions: Sequence[Any], **columns: Sequence[Any]) -> None:
    """Check that a reward gives one number or None per completion, the same whatever else is in its batch.

    ``reward`` is what `get_reward` takes; ``columns`` are what it asks for, one value per completion. Also checked:
    twice the same answer, completions in another order, each alone, and completions that no model's author thought
    of (empty, very long, not text in any language). Raises AssertionError, and UserError for a reward that raises.
    """
    found = get_reward(reward)

    def of(places: Sequence[int]) -> list[float | None]:
        given = {name: [values[i] for i in places] for name, values in columns.items()}
        scores = found.score([prompts[i] for i in places], [completions[i] for i in places], given)
        return [score.value for score in scores]

    everyone = list(range(len(completions)))
    values = of(everyone)
    _demand(found.name, len(values) == len(everyone), f"gives {len(values)} values for {len(everyone)} completions")
    for value in values:
        _demand(
            found.name, value is None or math.isfinite(value), f"gives {value}: a reward is a finite number or None"
        )
    _demand(found.name, of(everyone) == values, "gives the same completions other values the second time")
    _demand(found.name, of(everyone[::-1]) == values[::-1], "depends on the order of the completions")
    _demand(found.name, [of([i])[0] for i in everyone] == values, "depends on the other completions of its batch")
    for text in ("", " \n", "\\boxed{" * 50, "x" * 20_000, "\u202e\u0000\ufffd 答案"):
        odd = text if isinstance(completions[0], str) else [{"role": "assistant", "content": text}]
        found.score([prompts[0]], [odd], {name: [values[0]] for name, values in columns.items()})


def random_batch(objective: Objective, seed: int = 0, padding: tuple[float, ...] = PADDING) -> TokenBatch:
    """Fourteen rows with all that an objective asks for, in float64, and rubbish at masked positions.

    Among them: a group of equal rewards, a group of one, rows of one token or none. Pairs are consecutive.
    """
    draw = torch.Generator().manual_seed(seed)
    length = torch.randint(2, LENGTH + 1, (ROWS,), generator=draw)
    length[list(SINGLE_TOKEN)], length[list(EMPTY)] = 1, 0
    mask = torch.arange(LENGTH) < length[:, None]
    rubbish = torch.tensor(padding, dtype=torch.float64).repeat(ROWS * LENGTH)[: ROWS * LENGTH]

    def padded(values: Tensor) -> Tensor:
        if values.ndim < 2:
            return values
        return torch.where(mask, values, rubbish.view(ROWS, LENGTH))

    logp = -torch.randn(ROWS, LENGTH, dtype=torch.float64, generator=draw).abs() - 0.01
    reward = torch.rand(ROWS, dtype=torch.float64, generator=draw).round(decimals=1)
    reward[FLAT_GROUP] = 1.0
    better = torch.arange(0, ROWS, 2) + torch.randint(0, 2, (ROWS // 2,), generator=draw)
    inputs: dict[str, Tensor] = {}
    for one in sorted(_inputs(objective), key=lambda one: one.is_statistic):
        if not one.gives_logits:  # statistics are those of the policy at the start of the batch, where that is there
            inputs[one.key] = one.example(inputs.get("snapshot_logp", logp), draw)
    inputs = {key: padded(value) for key, value in inputs.items()}
    for key in _with_graph(objective):
        inputs[key].requires_grad_()
    return TokenBatch(
        padded(logp).requires_grad_(),
        mask,
        reward=reward,
        group=torch.arange(len(GROUPS)).repeat_interleave(torch.tensor(GROUPS)),
        partner=torch.arange(ROWS).view(-1, 2).flip(1).flatten(),
        chosen=torch.zeros(ROWS, dtype=torch.bool).index_fill(0, better, True),
        inputs=inputs,
    )


def _inputs(objective: Objective) -> list[Input]:
    return list(dict.fromkeys(one for part in objective.parts for one in part.objective.requires))


def _with_graph(objective: Objective) -> list[str]:
    """The keys of inputs that come with a graph."""
    return [
        one.key
        for one in _inputs(objective)
        if one.stage is Stage.FORWARD and not one.is_statistic and not one.gives_logits
    ]


def _prepared(objective: Objective, batch: TokenBatch) -> TokenBatch:
    """Prepared as the trainer does it: without log-probs unless something has the policy scored."""
    if is_composite(type(objective)):
        return batch
    scored = objective.is_coupled or any(isinstance(one, Snapshot) for one in objective.requires)
    known = batch.detach() if scored else batch.detach().replace(logp=None)
    default = torch.get_default_dtype()
    torch.set_default_dtype(batch.dtype)  # that of log-probs which are not there yet
    try:
        with torch.no_grad():
            fixed = objective.prepare(known)
    finally:
        torch.set_default_dtype(default)
    return fixed.replace(logp=batch.logp, inputs={**fixed.inputs, **batch.inputs})


def _leaves(batch: TokenBatch) -> list[Tensor]:
    return [batch.logp, *(value for value in batch.inputs.values() if value.requires_grad)]


def _gradients(loss: Tensor, leaves: Sequence[Tensor]) -> Tensor:
    """The gradient over log-probs and inputs with a graph, as one vector; 0 where the loss does not look."""
    found = torch.autograd.grad(loss, leaves, allow_unused=True, retain_graph=True)
    pairs = zip(leaves, found, strict=True)
    return torch.cat([(torch.zeros_like(leaf) if g is None else g).flatten() for leaf, g in pairs])


def _demand(name: str, holds: bool, message: str) -> None:
    if not holds:
        raise AssertionError(f"{name!r} {message}")


def _close(objective: Objective, ours: Tensor, theirs: Tensor, tolerance: float, what: str) -> None:
    _demand(objective.name, bool(torch.isfinite(ours).all()), f"{what}: not finite")
    ours, theirs = ours.detach(), theirs.detach()
    size = max(float(theirs.norm()), 1e-30)
    error = float((ours - theirs).norm()) / size
    _demand(objective.name, error <= tolerance, f"{what}: off by {error:.2g} relative, more than {tolerance:g}")


def _gradient(objective: Objective, loss: Loss | None) -> None:
    for seed in range(2):
        batch = random_batch(objective, seed)
        ours = _gradients(surrogate(objective, _prepared(objective, batch)), _leaves(batch))
        unprepared = _gradients(surrogate(objective, batch), _leaves(batch))
        _close(objective, unprepared, ours, 1e-12, "the gradient of a batch that is prepared on the way")
        if loss is not None:
            theirs = _gradients(loss(batch), _leaves(batch))
            if not objective.has_logit_term:
                _demand(objective.name, bool(theirs.norm() > 0), "the gradient: its loss has none on a random batch")
            _close(objective, ours, theirs, 1e-10, "the gradient is not that of its loss")


def _reported(objective: Objective, loss: Loss | None) -> None:
    if loss is None or is_composite(type(objective)):
        return
    batch = random_batch(objective)
    batch = batch.replace(**dict.fromkeys(_with_graph(objective)))  # auxiliary losses are reported apart
    ready = _prepared(objective, batch)
    reported = objective.coefficients(ready.detach()).loss
    if reported is None:
        ours = surrogate(objective, ready)
    else:
        ours = reduce(reported, ready, objective.normaliser, objective.normaliser.denominator(ready))
    theirs = loss(batch)
    ours, theirs = ours.detach(), theirs.detach()
    gap = abs(float(ours - theirs))
    _demand(
        objective.name, gap <= 1e-10 * max(1.0, abs(float(theirs))),
        f"reports the loss {float(ours):.6g} for {float(theirs):.6g}: set Coefficients.loss where it is not -c log p",
    )  # fmt: skip


def _masked(objective: Objective, _: Loss | None) -> None:
    clean, *dirty = (random_batch(objective, 0, padding) for padding in ((0.0,), (math.nan,), (math.inf,), (-1e9,)))
    loss = surrogate(objective, _prepared(objective, clean))
    gradient = _gradients(loss, _leaves(clean))
    for batch in dirty:
        other = surrogate(objective, _prepared(objective, batch))
        same = torch.equal(other, loss) and torch.equal(_gradients(other, _leaves(batch)), gradient)
        _demand(objective.name, same, "looks at what stands at masked positions")
    for leaf in torch.split(gradient, ROWS * LENGTH):
        _demand(objective.name, not leaf.view(ROWS, LENGTH)[~clean.mask].any(), "has a gradient at masked positions")


def _graph(objective: Objective, _: Loss | None) -> None:
    if is_composite(type(objective)):
        return
    batch = random_batch(objective)
    fixed = {
        one.key: batch[one.key].clone().requires_grad_()
        for one in objective.requires
        if one.stage is not Stage.FORWARD and batch[one.key].is_floating_point()
    }
    with_leaves = batch.replace(**fixed)
    ready = objective.prepare(with_leaves.replace(reward=None if batch.reward is None else batch.reward.clone()))
    found = objective.coefficients(ready)
    tensors = [found.values, *found.metrics.values(), *([] if found.loss is None else [found.loss])]
    _demand(objective.name, not any(tensor.requires_grad for tensor in tensors), "gives coefficients with a graph")
    shape = tuple(found.values.shape)
    _demand(objective.name, shape == (ROWS, LENGTH), f"gives coefficients of shape {shape}, not [B, T]")


def _parts(objective: Objective, ready: TokenBatch, indices: Sequence[Tensor]) -> Tensor:
    """The surrogate as a sum over micro-batches."""
    denominator = objective.normaliser.denominator(ready)
    coefficients = objective.coefficients(ready.detach()).values if objective.is_coupled else None
    total = torch.zeros((), dtype=ready.dtype)
    for index in indices:
        width = max(int(ready.mask[index].sum(1).max()), 1)
        part = ready.rows(index, width)
        if coefficients is None:
            total = total + surrogate(objective, part, denominator)
        else:  # they look at the whole batch, and are known before the first backward pass
            total = total + surrogate_of(Coefficients(coefficients[index, :width]), objective, part, denominator)
    return total


def _split(objective: Objective, _: Loss | None) -> None:
    if is_composite(type(objective)):
        return
    batch = random_batch(objective, 1)
    ready = _prepared(objective, batch)
    whole = surrogate(objective, ready)
    gradient = _gradients(whole, _leaves(batch))
    pairs = torch.arange(ROWS).view(-1, 2)[torch.randperm(ROWS // 2, generator=torch.Generator().manual_seed(0))]
    for rows in (2, 4, 10):
        total = _parts(objective, ready, torch.split(pairs.flatten(), rows))
        what = f"in micro-batches of {rows} rows (does its coefficient look at other rows? set couples)"
        _close(objective, total, whole, 1e-11, f"the loss {what}")
        _close(objective, _gradients(total, _leaves(batch)), gradient, 1e-11, f"the gradient {what}")


def _order(objective: Objective, _: Loss | None) -> None:
    batch = random_batch(objective, 2)
    order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(0))
    loss = surrogate(objective, _prepared(objective, batch))
    other = surrogate(objective, _prepared(objective, batch.rows(order, LENGTH)))
    ours, theirs = (_gradients(x, _leaves(batch)) for x in (other, loss))
    _close(objective, ours, theirs, 1e-11, "the gradient with rows in another order")


def _nothing(objective: Objective, _: Loss | None) -> None:
    batch = random_batch(objective).replace(mask=torch.zeros(ROWS, LENGTH, dtype=torch.bool))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loss = surrogate(objective, _prepared(objective, batch))
    none = float(loss) == 0 and not _gradients(loss, _leaves(batch)).any()
    _demand(objective.name, none, "has a loss or a gradient where every token is masked")


def _precision(objective: Objective, _: Loss | None) -> None:
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        low = _cast(random_batch(objective), dtype)
        high = _cast(low, torch.float64)  # the same rounded numbers
        loss = surrogate(objective, _prepared(objective, low))
        _demand(objective.name, loss.dtype == dtype, f"has a loss in {loss.dtype} from log-probs in {dtype}")
        exact = _gradients(surrogate(objective, _prepared(objective, high)), _leaves(high))
        _close(objective, _gradients(loss, _leaves(low)).double(), exact, tolerance, f"the gradient in {dtype}")


def _cast(batch: TokenBatch, dtype: torch.dtype) -> TokenBatch:
    """The batch with all its floating-point tensors rounded to ``dtype``, as fresh leaves."""

    def rounded(value: Tensor) -> Tensor:
        if not value.is_floating_point():
            return value
        return value.detach().to(dtype).requires_grad_(value.requires_grad)

    inputs = {key: rounded(value) for key, value in batch.inputs.items()}
    reward = None if batch.reward is None else rounded(batch.reward)
    return batch.replace(logp=rounded(batch.logp), reward=reward, inputs=inputs)


class _Fixed:
    """The same rows at every draw."""

    def __init__(self, rows: Sequence[Trajectory], units: Sequence[tuple[int, ...]]) -> None:
        self.rows, self.units = list(rows), list(units)

    def draw(self) -> tuple[list[Trajectory], list[tuple[int, ...]]]:
        return self.rows, self.units


def _rows(policy: Policy, objective: Objective) -> list[Trajectory]:
    """Eight rows of four prompts with everything that rows can have stored."""
    draw, rows = torch.Generator().manual_seed(0), []
    texts = [(f"{i // 2 + 1}+{i // 2 + 2}=?\n", f"#### {i + 3}" * (1 + i % 3)) for i in range(8)]
    ids = [tuple(policy.tokenizer(text, add_special_tokens=False)["input_ids"] for text in pair) for pair in texts]
    stored = [one for one in _inputs(objective) if one.stage is Stage.STORED]
    for i, ((prompt, completion), logp) in enumerate(zip(ids, score_rows(policy, ids), strict=True)):
        held = {}
        for one in stored:
            value = one.example(torch.tensor([logp], dtype=torch.float64), draw)[0]
            held[one.column] = value.tolist()
        own = {name: held[name] for name in ("behaviour_logp", "reference_logp") if name in held}
        rows.append(
            Trajectory(
                texts[i][0], texts[i][1], prompt, completion, str(i // 2), source="policy", reward=float(i % 2),
                behaviour_logp=own.get("behaviour_logp"), reference_logp=own.get("reference_logp"),
                columns=dict(held), inputs={k: v for k, v in held.items() if isinstance(v, list)},
            )
        )  # fmt: skip
    return rows


def _units(objective: Objective) -> list[tuple[int, ...]]:
    together = selector_of(objective.learns_from).unit is not Unit.ROW
    return [(i + 1, i) for i in range(0, 8, 2)] if together else [(i,) for i in range(8)]


def _trained(objective: Objective) -> None:
    settings = Training(steps=2, updates_per_batch=2, learning_rate=1e-4, warmup_ratio=0.0, on_nonfinite="stop")
    weights = []
    for budget in (1, 8192):
        torch.manual_seed(0)  # of modules that start at random
        policy = load_policy("embedded", "float64")
        rows = _rows(policy, objective)
        sources = [_Fixed(rows, _units(part.objective)) for part in objective.parts]
        try:
            Trainer(policy, objective, sources, settings.model_copy(update={"token_budget": budget})).run()
        except UserError as error:
            raise AssertionError(f"{objective.name!r} does not train: {error}") from error
        weights.append(torch.cat([p.detach().flatten() for p in policy.parameters()]))
    _close(objective, weights[0], weights[1], 1e-7, "trained in micro-batches of one row: the weights")


def _analysed(objective: Objective) -> None:
    policy = load_policy("embedded", "float64")
    rows = _rows(policy, objective)
    if not selector_of(objective.learns_from).is_sampled:
        rows = [Trajectory(**{**vars(row), "source": "demonstration"}) for row in rows]
    buffer = OfflineBuffer.from_trajectories(rows)
    found: Mapping[str, Any] = analyze_variance(policy, [objective], buffer, rows=8, draws=0)
    noise = found["objectives"][objective.name]["data_noise"]["trace_cov"]
    _demand(objective.name, noise is not None, "has no gradient noise in the analyzer")
