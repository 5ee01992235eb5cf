"""Weights in several processes: replicated, or sharded with FSDP2. No other module handles shards.

Sharding is requested by the environment variables of `accelerate launch`. A sharded model gathers one layer after the
other; weights outside layers, such as the head, are whole from a forward pass to its backward pass. Modules that are
added later, such as adapters and the heads of critics, are replicated.
"""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from transformers.pytorch_utils import Conv1D

from rlzoo.errors import UserError
from rlzoo.jobs.ranks import agreed, rank, summed, world_size

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule
    from transformers import PreTrainedModel

_REFUSED = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "FSDP_OFFLOAD_PARAMS": "weights offloaded to the CPU (fsdp_offload_params)",
}
Values = Callable[[str], Tensor]
"""Name → whole tensor on the device. All processes must ask for the same names in the same order."""


def is_asked() -> bool:
    """Whether the launcher requests sharding. Raises UserError for an unsupported way to distribute a model."""
    if world_size() == 1:
        return False
    version = os.environ.get("FSDP_VERSION", "1")
    refused = [what for variable, what in _REFUSED.items() if _is_set(variable)]
    refused += [f"FSDP {version}"] if _is_set("ACCELERATE_USE_FSDP") and version != "2" else []
    if refused:
        raise UserError(
            f"rlzoo does not support {refused[0]}: launch it with --use_fsdp --fsdp_version 2 for sharded models, or "
            "without either for replicated ones"
        )
    return _is_set("ACCELERATE_USE_FSDP")


def _is_set(variable: str, default: str = "false") -> bool:
    return os.environ.get(variable, default).lower() in ("1", "true", "yes")


@dataclass(frozen=True)
class _Slot:
    """A place where a module holds a tensor: a parameter, a buffer, or a plain attribute."""

    name: str
    module: nn.Module
    store: MutableMapping[str, Any]
    key: str

    @property
    def tensor(self) -> Tensor:
        found: Tensor = self.store[self.key]
        return found


def _slots(model: nn.Module) -> Iterator[_Slot]:
    for prefix, module in model.named_modules():
        for store in (module._parameters, module._buffers, vars(module)):
            for key, value in store.items():
                if isinstance(value, Tensor):
                    yield _Slot(f"{prefix}.{key}" if prefix else key, module, store, key)


def _tied(model: nn.Module | None) -> dict[str, str]:
    """The name of each tensor → the first name of the same parameter."""
    slots = [] if model is None else list(_slots(model))
    first = {id(slot.tensor): slot.name for slot in reversed(slots) if isinstance(slot.tensor, nn.Parameter)}
    return {slot.name: first.get(id(slot.tensor), slot.name) for slot in slots}


def skeleton(model: PreTrainedModel) -> PreTrainedModel:
    """A model of the same architecture, with its tensors on the meta device."""
    return on_meta(lambda: type(model)(copy.deepcopy(model.config)))


def on_meta(make: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    """A model made on the meta device, without its weights."""
    with torch.device("meta"):
        made = make()
    made.tie_weights()  # transformers 5.0 does so on other devices only
    return made


def shard(root: nn.Module, model: PreTrainedModel, values: Values | None = None) -> None:
    """Shard the weights of ``model`` (FSDP2); ``root`` is the module whose forward pass runs it.

    A model on the meta device is filled with ``values``, one layer at a time.
    """
    from torch.distributed.fsdp import fully_shard

    # log-probs are a view, and nothing changes them in place
    warnings.filterwarnings("ignore", r"FSDP2-wrapped module \(.*\) returned a view tensor")
    empty = [(slot.name, slot.tensor) for slot in _slots(model) if slot.tensor.is_meta]
    names = {id(tensor): name for name, tensor in reversed(empty)}  # of tied tensors the first one
    for unit in _units(model):
        _fill(unit, names, values)
        mesh, again = _mesh(_device_of(unit).type), _is_set("FSDP_RESHARD_AFTER_FORWARD", "true")
        fully_shard(unit, mesh=mesh, reshard_after_forward=again)
    _fill(model, names, values)
    fully_shard(root, mesh=_mesh(_device_of(model).type))
    parts = _parts(root)
    root.register_forward_hook(lambda *_: None if torch.is_grad_enabled() else _free(parts))


def _units(model: PreTrainedModel) -> list[nn.Module]:
    """The modules that are gathered separately: layers, innermost first, and an embedding that is not tied."""
    asked = os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP")
    kinds = asked.split(",") if asked else model._no_split_modules or ()
    named = [m for m in model.modules() if any(kind.__name__ in kinds for kind in type(m).__mro__)]  # sharded or not
    layers = [module for module in named if any(True for _ in module.parameters())]
    words, head = model.get_input_embeddings(), model.get_output_embeddings()
    apart = isinstance(words, nn.Embedding) and (head is None or head.weight is not words.weight)
    return [*reversed(layers), *([words] if apart else [])]


def _fill(unit: nn.Module, names: dict[int, str], values: Values | None) -> None:
    """Fill the tensors of a unit that are on the meta device; tied tensors stay tied."""
    made: dict[int, Tensor] = {}
    for slot in list(_slots(unit)):
        old = slot.tensor
        if not old.is_meta or values is None:
            continue
        if id(old) not in made:
            value = values(names[id(old)])
            made[id(old)] = nn.Parameter(value, old.requires_grad) if isinstance(old, nn.Parameter) else value
        slot.store[slot.key] = made[id(old)]


def _device_of(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


@cache
def _mesh(kind: str) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(kind, (world_size(),))


def reshard(root: nn.Module) -> None:
    """Free gathered weights, which FSDP2 keeps after a forward pass that has no backward pass."""
    _free(_parts(root))


def _parts(root: nn.Module) -> list[FSDPModule]:
    from torch.distributed.fsdp import FSDPModule

    return [module for module in root.modules() if isinstance(module, FSDPModule)]


def _free(parts: Iterable[FSDPModule]) -> None:
    for part in parts:
        part.reshard()


def from_main(
    source: PreTrainedModel | None, model: PreTrainedModel, device: torch.device, narrow: torch.dtype | None = None
) -> Values:
    """The tensors of the main process's ``source``, broadcast for a ``model`` on the meta device in all processes.

    ``narrow`` is the dtype for the weights of matrix products; None: their own. Raises UserError if the two models tie
    different tensors.
    """
    known = {slot.name: slot.tensor for slot in _slots(source)} if source is not None else {}
    narrowed = of_products(model) if narrow is not None else set()
    shapes = agreed({name: (tuple(value.shape), value.dtype) for name, value in known.items()})
    if agreed(_tied(source)) != _tied(model):
        raise UserError(
            "the model's weights do not match its configuration, which sharding needs: save it again with "
            "save_pretrained, or run without --use_fsdp"
        )

    def values(name: str) -> Tensor:
        shape, dtype = shapes[name]
        value = known[name].detach().to(device) if rank() == 0 else torch.empty(shape, dtype=dtype, device=device)
        value = value.contiguous()
        dist.broadcast(value, src=0)
        return value if narrow is None or name not in narrowed else value.to(narrow)

    return values


def of_model(model: nn.Module, dtype: torch.dtype | None = None, names: Iterable[str] = ()) -> Values:
    """Copies of the whole tensors of a sharded model; those in ``names`` are cast to ``dtype``."""
    known = {slot.name.replace(".base_layer.", "."): slot.tensor for slot in _slots(model)}  # as without an adapter
    cast = set(names)

    def values(name: str) -> Tensor:
        own: Any = known[name].detach()
        value: Tensor = own.full_tensor() if is_shard(own) else own.clone()
        return value.to(dtype) if name in cast else value

    return values


def whole_weights(model: nn.Module, everywhere: bool = True) -> dict[str, Tensor]:
    """The tensors of a model by name, gathered if it is sharded; tied tensors stay tied. All processes must call this.

    Unless ``everywhere``, only the main process gets gathered tensors, on the CPU.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    found, whole = {}, dict[int, Tensor]()
    for name, value in model.state_dict().items():
        if is_shard(value):
            key = id(parameters.get(name, value))
            if key not in whole:
                every = value.full_tensor()
                whole[key] = every if everywhere else every.cpu() if rank() == 0 else every.new_empty(0)
            value = whole[key]
        found[name] = value
    return found


def of_products(model: nn.Module) -> set[str]:
    """The names of weights used only in matrix products, whose own dtype does not matter under autocast."""
    kinds = (nn.Linear, Conv1D)
    others = {id(slot.tensor) for slot in _slots(model) if type(slot.module) not in kinds}  # a tied embedding
    return {slot.name for slot in _slots(model) if type(slot.module) in kinds and id(slot.tensor) not in others}


def narrow(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Cast the weights of matrix products of a frozen, replicated model to ``dtype``; None: leave them unchanged."""
    parameters = dict(model.named_parameters())
    for name in of_products(model) & parameters.keys() if dtype is not None else ():
        parameters[name].data = parameters[name].data.to(dtype)


def copy_of_trunk(model: PreTrainedModel) -> nn.Module:
    """A separately trained copy of a model's trunk, sharded like the model; if sharded, in at least float32."""
    trunk: nn.Module = model.base_model
    if not any(map(is_shard, trunk.parameters())):
        return copy.deepcopy(trunk)
    found: Any = skeleton(model).base_model
    wide = torch.promote_types(model.dtype, torch.float32)
    shard(found, found, of_model(trunk, wide, [name for name, _ in trunk.named_parameters()]))
    made: nn.Module = found.train(trunk.training)
    return made


def is_shard(tensor: Tensor) -> bool:
    """Whether a tensor is sharded."""
    return hasattr(tensor, "full_tensor")


def held(tensor: Any) -> int:
    """The number of entries of a tensor that this process holds."""
    own: Tensor = tensor.to_local() if is_shard(tensor) else tensor
    return own.numel()


def gathered_together(model: PreTrainedModel) -> int:
    """The number of a sharded model's weights gathered at the same time: two layers, and all outside layers."""
    units = sorted(sum(p.numel() for p in unit.parameters()) for unit in _units(model))
    return int(sum(p.numel() for p in model.parameters()) - sum(units[:-2]))


def in_groups(parameters: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Parameters grouped into replicated and sharded ones, which one fused operation cannot mix."""
    found = list(parameters)
    groups = [[p for p in found if is_shard(p) == sharded] for sharded in (False, True)]
    return [group for group in groups if group]


@torch.no_grad()
def spread(parameters: Iterable[nn.Parameter]) -> None:
    """Broadcast the main process's replicated parameters: random initial values may differ between processes."""
    if world_size() > 1:
        for parameter in parameters:
            if not is_shard(parameter):
                dist.broadcast(parameter.data, src=0)


@torch.no_grad()
def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Sum gradients over processes: FSDP2 has averaged those of shards, and those of replicated parameters are local.

    A parameter with a gradient in one process gets one in all.
    """
    if world_size() == 1:
        return
    found = list(parameters)
    whole = [p for p in found if not is_shard(p)]
    for parameter in found:
        if is_shard(parameter) and parameter.grad is not None:
            # the loss is not scaled instead: gradients that a model rounds to float32 would round differently
            parameter.grad.mul_(world_size())
    if not whole:
        return
    have = summed(torch.tensor([float(p.grad is not None) for p in whole], device=whole[0].device)).tolist()
    waiting = []
    for parameter, number in zip(whole, have, strict=True):
        if number:
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            waiting.append(dist.all_reduce(parameter.grad, async_op=True))
    for work in waiting:
        work.wait()


def gradients(total: Tensor, model: nn.Module, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """The gradients of a scalar for some parameters of a model that has no ``.grad``; those of shards are whole.

    All processes must call this, with the same scalar.
    """
    if not any(map(is_shard, model.parameters())):
        return list(torch.autograd.grad(total, parameters))
    total.backward()  # type: ignore[no-untyped-call]  # FSDP2 reduces what is accumulated in .grad
    found: list[Any] = [p.grad for p in parameters]
    model.zero_grad()
    return [value.full_tensor() if is_shard(value) else value for value in found]


def clip_gradients(parameters: Iterable[nn.Parameter], most: float) -> Tensor:
    """Scale gradients to a total L2 norm of at most ``most``; returns the norm [] before."""
    groups = in_groups(p for p in parameters if p.grad is not None)
    if not groups:
        return torch.zeros(())
    norms = [get_total_norm([p.grad for p in group if p.grad is not None]) for group in groups]
    whole = [norm.full_tensor() if hasattr(norm, "full_tensor") else norm for norm in norms]
    total = whole[0] if len(whole) == 1 else torch.linalg.vector_norm(torch.stack(whole))
    for group in groups:
        clip_grads_with_norm_(group, most, total)
    return total
