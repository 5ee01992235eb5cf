"""The state of a training run: everything needed to resume exactly, as tensors and plain data."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from rlzoo.errors import UserError
from rlzoo.jobs.cached_results import random_state
from rlzoo.jobs.ranks import gathered, rank
from rlzoo.objective import options_of
from rlzoo.policy import Policy
from rlzoo.training.checkpoints import Like, on_cpu

if TYPE_CHECKING:
    from rlzoo.training.trainer import Trainer


LAYOUT = 4
"""The version of the state's layout; checkpoints of other versions are refused."""


@runtime_checkable
class Resumable(Protocol):
    """An object whose state a checkpoint can hold: a source, or a source's collector."""

    def state(self) -> Any:
        """The state as plain data."""
        ...

    def restore(self, state: Any) -> None:
        """Resume from a ``state`` that has been through JSON: tuples are lists."""
        ...


def resumable(part: object) -> Resumable:
    """The object itself. Raises UserError if it has no ``state`` and ``restore``."""
    if not isinstance(part, Resumable):
        kind = type(part).__name__
        raise UserError(
            f"a checkpoint cannot hold a {kind}: give it the methods state and restore, or train without checkpoints"
        )
    return part


def state_of(trainer: Trainer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state between two batches; the tensors are the trainer's own, not copies. All processes must call this."""
    named = trainer.named_parameters()
    tensors = _tensors(trainer) | optimizer_tensors(trainer.optimizer, named)
    random_tensors, random_plain = random_states(trainer.policy.device)
    record = trainer.record
    state = {
        "run": _run_of(trainer),
        "steps": record.steps,
        "costs": record.costs.as_dict(),
        "events": record.events,
        "counts": record.counts,
        "kept": record.kept,
        "ended": record.ended,
        "sources": [resumable(source).state() for source in trainer.sources],
        "token_budget": trainer.micro.token_budget,
        "random": random_plain,
    }
    return tensors | random_tensors, state


def _tensors(trainer: Trainer) -> dict[str, Tensor]:
    """All tensors except those of the optimizer and of random generators."""
    found = {f"policy/{name}": parameter.detach() for name, parameter in trainer.named_parameters()}
    for number, model in enumerate(trainer.models.moving.values()):  # two may have one key, in two parts
        found |= {f"model/{number}/{name}": p.detach() for name, p in model.model.named_parameters()}
    return found | {f"module/{name}": value.detach() for name, value in trainer.policy.untrained_state()}


def like_of(trainer: Trainer) -> Like:
    """A function for reading a checkpoint into tensors that are sharded like the trainer's own."""
    known = _tensors(trainer)

    def like(name: str, size: torch.Size, dtype: torch.dtype) -> Tensor:
        """An empty tensor; the optimizer's moments are sharded like their parameter."""
        kind, _, rest = name.partition("/")
        own = known.get(f"policy/{rest.partition('/')[2]}" if kind == "optimizer" else name)
        if own is None or own.shape != size:
            return on_cpu(name, size, dtype)
        return torch.empty_like(own, dtype=dtype)

    return like


def restore(trainer: Trainer, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """The inverse of `state_of`, on a new trainer; the plain data may have been through JSON.

    Raises UserError for the state of another run.
    """
    run = _run_of(trainer)
    if other := [name for name in run if state["run"].get(name) != run[name]]:
        there, here = state["run"].get(other[0]), run[other[0]]
        raise UserError(f"the checkpoints are of another run ({other[0]}: {there!r} there, {here!r} here): remove them")
    for name, tensor in _tensors(trainer).items():
        put(tensor, tensors[name])
    trainer.policy.weights_changed()
    restore_optimizer(trainer.optimizer, trainer.named_parameters(), tensors)
    record = trainer.record
    record.steps[:], record.events[:] = state["steps"], state["events"]
    record.counts |= state.get("counts", {})
    for name, rows in state["kept"].items():
        record.kept.setdefault(name, [])[:] = rows  # in place: a callback may hold the list
    for name, value in state["costs"].items():
        setattr(record.costs, name, value)
    trainer.progress.move_to(trainer.step, record.costs)
    record.ended = state.get("ended") or trainer.progress.ended
    for source, where in zip(trainer.sources, state["sources"], strict=True):
        resumable(source).restore(where)
    trainer.micro.token_budget = min(trainer.micro.token_budget, state["token_budget"])
    restore_random_states(tensors, state["random"], trainer.policy.device)


def _run_of(trainer: Trainer) -> dict[str, Any]:
    """What must be the same for training to resume."""
    settings = trainer.settings.model_dump(mode="json", exclude={"token_budget", "checkpoint_seconds", "trackers"})
    objective = {name: repr(getattr(trainer.objective, name)) for name in options_of(type(trainer.objective))}
    named = {f"objective.{name}": value for name, value in objective.items()}
    settings["computed"] = computed(trainer.policy)  # not determined by the settings if they are auto
    return {"layout": LAYOUT, **settings, "objective": trainer.objective.name, **named}


def computed(policy: Policy) -> str:
    """The kind of device that a policy runs on, and the dtype of its matrix products."""
    return f"{policy.device.type}, {policy.compute or policy.model.dtype}"


@torch.no_grad()
def is_finite(tensor: Tensor) -> bool:
    """Whether all values are finite, in one pass; of a sharded tensor, the values of this process's shard."""
    here = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return not here.numel() or all(bool(extreme.isfinite()) for extreme in here.aminmax())


@torch.no_grad()
def put(into: Tensor, value: Tensor) -> None:
    """Copy a tensor that is whole or sharded like ``into``; a sharded ``into`` takes its shard of a whole one."""
    if hasattr(into, "device_mesh") and not hasattr(value, "device_mesh"):
        from torch.distributed.tensor import DTensor, distribute_tensor

        assert isinstance(into, DTensor)
        value = distribute_tensor(value.to(into.device), into.device_mesh, into.placements)
    into.copy_(value)


def optimizer_tensors(optimizer: torch.optim.Optimizer, named: Iterable[tuple[str, nn.Parameter]]) -> dict[str, Tensor]:
    """The optimizer's state, as ``optimizer/<entry>/<parameter>``."""
    return {
        f"optimizer/{entry}/{name}": value
        for name, parameter in named
        for entry, value in optimizer.state.get(parameter, {}).items()
    }


@torch.no_grad()
def restore_optimizer(
    optimizer: torch.optim.Optimizer, named: Iterable[tuple[str, nn.Parameter]], tensors: Mapping[str, Tensor]
) -> None:
    """The inverse of `optimizer_tensors`, on a new optimizer."""
    parameters = dict(named)
    for key, value in tensors.items():
        kind, _, rest = key.partition("/")
        if kind != "optimizer":
            continue
        entry, _, name = rest.partition("/")
        parameter = parameters[name]
        if hasattr(value, "device_mesh"):  # sharded like the parameter, and newly allocated
            optimizer.state[parameter][entry] = value
        elif value.shape == parameter.shape:
            optimizer.state[parameter][entry] = torch.zeros_like(parameter, requires_grad=False)
            put(optimizer.state[parameter][entry], value)
        else:  # a count of steps
            optimizer.state[parameter][entry] = value.to(parameter.device)


def random_states(device: torch.device) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The states of the random generators of torch, NumPy and Python: as tensors, and as plain data.

    Each process has its own, on the CPU and on the GPU that it trains on, and all must call this.
    """
    kind, keys, *rest = np.random.get_state(legacy=True)
    on_gpu = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    plain = {"python": random.getstate(), "numpy": [kind, np.asarray(keys).tolist(), *rest]}
    tensors: dict[str, Tensor] = {}
    own = gathered((torch.get_rng_state(), on_gpu, plain))
    for number, (cpu, cuda, _) in enumerate(own):
        tensors |= {f"random/cpu/{number}": cpu} | ({} if cuda is None else {f"random/cuda/{number}": cuda})
    return tensors, {"by_rank": [plain for _, _, plain in own]}


def restore_random_states(tensors: Mapping[str, Tensor], plain: Mapping[str, Any], device: torch.device) -> None:
    """The inverse of `random_states`. An additional process takes the states of the main one."""
    number = rank() if rank() < len(plain["by_rank"]) else 0
    torch.set_rng_state(tensors[f"random/cpu/{number}"])
    if device.type == "cuda" and (state := tensors.get(f"random/cuda/{number}")) is not None:
        torch.cuda.set_rng_state(state, device)
    own = plain["by_rank"][number]
    random.setstate(random_state(own["python"]))
    kind, keys, *rest = own["numpy"]
    np.random.set_state((kind, np.asarray(keys, np.uint32), *rest))
