"""The policy: log-probs of completions, with the head on completion positions only, and FORWARD inputs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rlzoo.config import Packing, Training
from rlzoo.errors import UserError
from rlzoo.inputs import Input, Stage
from rlzoo.jobs.memory import pins
from rlzoo.jobs.ranks import gathered, is_sharded, world_size
from rlzoo.policy import sharding
from rlzoo.policy.adapters import adapters, add_lora, copy_adapters, switched_off
from rlzoo.policy.attention import use, without_packing_detection
from rlzoo.policy.chat import turn_of
from rlzoo.policy.compiled import miscompiled, set_compiled
from rlzoo.policy.encoding import RowCheck
from rlzoo.policy.head import Head, LogitTerm, computing_in, token_log_probs
from rlzoo.policy.packing import packs, running
from rlzoo.policy.quantised import entries
from rlzoo.policy.sequences import Sequences, Tokens
from rlzoo.policy.weights import changes_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

T = TypeVar("T")
WORTH = 4e13
"""Parameters × sequences of a run above which compiling is expected to save more time than it takes: some minutes of
training at 400 tokens per sequence on an H100, of which compiled operations take a sixth. Estimated, not measured."""


@dataclass(frozen=True)
class ForwardPass:
    """The output of a forward pass per completion token; 0 at padding."""

    logp: Float[Tensor, "B T"]
    inputs: dict[str, Float[Tensor, "B T ..."]]
    """FORWARD inputs by key: statistics, without a graph, and outputs of modules, with their graphs. With ``top_p``
    below 1, also the log-probability of the ``nucleus``."""
    term: Float[Tensor, "B T"] | None = None
    """The logit term of an objective, if it has one."""

    def of(self, requires: Iterable[Input]) -> dict[str, Float[Tensor, "B T ..."]]:
        """The FORWARD inputs by key that ``requires`` lists."""
        keys = [one.key for one in requires if one.stage is Stage.FORWARD]
        return {key: self.inputs[key] for key in keys if key in self.inputs}

    def values(self) -> dict[str, Float[Tensor, "B T ..."]]:
        """``logp`` and all FORWARD inputs, by key."""
        return {"logp": self.logp, **self.inputs}


class Policy(nn.Module):
    """A transformers causal LM with its tokenizer, and the modules of inputs such as a critic."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        name: str = "",
        compute: torch.dtype | None = None,
    ) -> None:
        """``compute`` is the dtype of matrix products; None: that of the weights."""
        super().__init__()
        use(model)
        self.model = model
        self.tokenizer = tokenizer
        self.name = name
        self.compute = compute
        self.packs = False
        """Whether micro-batches are packed: rows are concatenated without padding (see `pack`)."""
        self.compiles = False
        """Whether the model's layers are compiled (see `compile_layers`)."""
        self.modules_of_inputs = nn.ModuleDict()
        """Modules of inputs by key, such as a critic; they are trained and checkpointed with the policy."""
        self.attached: dict[str, Input] = {}
        self.train(model.training)  # a new nn.Module is in training mode

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        device: torch.device = self.model.device
        return device

    @property
    def eos_ids(self) -> set[int]:
        """The tokens that end a completion: those of the tokenizer, the generation config, and the chat template."""
        configured = getattr(self.model.generation_config, "eos_token_id", None)
        ids = configured if isinstance(configured, list) else [configured]
        return {i for i in [*ids, self.tokenizer.eos_token_id, turn_of(self.tokenizer).stop] if i is not None}

    @property
    def vocabulary(self) -> int:
        """The number of token embeddings, which may differ from the tokenizer's number of tokens."""
        layer: Any = self.model.get_input_embeddings()
        return int(getattr(layer, "num_embeddings", 0) or layer.weight.shape[0])

    @property
    def positions(self) -> int | None:
        """The maximum length of a sequence in a model with a table of positions (GPT-2, OPT, GPT-J).

        None for rotary embeddings and ALiBi, for which ``max_position_embeddings`` is not a hard limit.
        """
        size = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if not isinstance(size, int):
            return None
        words = self.model.get_input_embeddings()
        learned = (m.num_embeddings for m in self.model.modules() if isinstance(m, nn.Embedding) and m is not words)
        # tables like OPT's have two extra rows; GPT-J's table is a buffer
        fixed = (len(b) for name, b in self.model.named_buffers() if name.endswith("embed_positions"))
        return size if any(0 <= rows - size <= 2 for rows in (*learned, *fixed)) else None

    @property
    def context(self) -> int | None:
        """The length up to which the model was made to continue a text, in tokens: its ``max_position_embeddings``.

        None if its configuration has none, or scales rotary embeddings to another length.
        """
        config = self.model.config.get_text_config()
        rope = getattr(config, "rope_parameters", None) or {}
        scaled = rope.get("rope_type", "default") not in ("default", "llama3")
        size = getattr(config, "max_position_embeddings", None)
        return size if isinstance(size, int) and not scaled else None

    def check_range(self, *ids: int) -> None:
        """Raise UserError for a token id that has no embedding."""
        for token in ids:
            if not 0 <= token < self.vocabulary:
                text = self.tokenizer.convert_ids_to_tokens(token) if 0 <= token < len(self.tokenizer) else None
                name = f" ({text!r})" if text is not None else ""
                raise UserError(
                    f"token {token}{name} is not one of the model's {self.vocabulary} embeddings: use the tokenizer "
                    "that the model was trained with, or save the model after model.resize_token_embeddings(...)"
                )

    def row_check(self) -> RowCheck:
        """A function of prompt and completion ids that raises UserError if the row does not fit the model."""
        return RowCheck(self.positions, self.vocabulary, self.check_range)

    def pack(self, packing: Packing) -> None:
        """Set whether micro-batches are packed; ``auto``: if a GPU attends to all of their rows in one kernel call.

        Raises UserError for ``packed`` if the model does not support it.
        """
        with without_packing_detection():
            self.packs = self.beside(lambda: packs(self.model, self.compute, packing))

    def compile_layers(self, training: Training) -> None:
        """Compile the model's layers as ``training.compile`` says; ``auto``: on a GPU, if the run is long enough.

        All processes must call this. Raises UserError for ``compile: true`` if the model cannot be compiled.
        """
        wanted = training.compile
        if wanted == "auto":
            work = sum(map(entries, self.parameters())) * training.steps * training.batch_size
            suits = pins(self.device) and world_size() == 1 and not training.deterministic
            wanted = suits and work >= WORTH
        set_compiled(self.model, wanted)
        self.compiles = wanted
        reasons = [reason for reason in gathered(miscompiled(self)) if reason is not None] if wanted else []
        if reasons:
            set_compiled(self.model, False)
            self.compiles = False
            if training.compile is True:
                raise UserError(f"training.compile: true: {reasons[0]}: set false, or auto")

    def collate(self, rows: Sequence[Tokens]) -> Sequences:
        """Rows as a micro-batch of this model."""
        sequences = Sequences.of(rows, self.device)
        return sequences.packed() if self.packs else sequences

    @property
    def weights_version(self) -> int:
        """A number that increases whenever the model's weights change.

        Optimizer steps, loaded state dicts, in-place changes and replaced modules all count. Changes through ``.data``
        are not detected: call `weights_changed` after them.
        """
        return changes_of(self.model).count(self.model)

    def weights_changed(self) -> None:
        """Increase `weights_version`, so that samplers update their copies of the weights."""
        changes_of(self.model).add()

    @property
    def hidden_size(self) -> int:
        """The size of hidden states."""
        return int(self.model.get_output_embeddings().weight.shape[1])

    def attach(self, inputs: Iterable[Input]) -> None:
        """Create the modules of inputs that have none yet: on the model's device, in at least float32.

        Raises UserError for two different inputs with the same key.
        """
        like = self.model.get_output_embeddings().weight
        for one in inputs:
            if one in self.attached.values() or one.stage is not Stage.FORWARD:
                continue
            if (module := one.module(self)) is not None:
                if (other := self.attached.get(one.key)) is not None:
                    raise UserError(f"two inputs have the key {one.key!r}, {other} and {one}: use one of them per run")
                dtype = torch.promote_types(like.dtype, torch.float32)
                self.modules_of_inputs[one.key] = module.to(like.device, dtype)
                self.attached[one.key] = one

    def untrained_state(self) -> list[tuple[str, Tensor]]:
        """The state of inputs' modules other than trained parameters, such as running means."""
        trained = {name for name, p in self.modules_of_inputs.named_parameters() if p.requires_grad}
        state = self.modules_of_inputs.state_dict(keep_vars=True)
        return [(name, value) for name, value in state.items() if name not in trained]

    @contextmanager
    def attached_for(self, inputs: Iterable[Input]) -> Iterator[None]:
        """In this context, inputs without a module have an untrained one. Raises UserError as `attach` does."""
        before = dict(self.attached)
        self.attach(inputs)
        try:
            yield
        finally:
            for key in self.attached.keys() - before.keys():
                del self.attached[key], self.modules_of_inputs[key]

    def frozen_copy(self, moving: bool = False) -> Policy:
        """A frozen copy in evaluation mode, sharded like the policy.

        Unless it is ``moving``, its weights are in the dtype of matrix products, which does not change log-probs.
        """
        narrow, parts = None if moving else self.compute, is_sharded(self.model)
        model = sharding.skeleton(self.model) if parts else copy.deepcopy(self.model)
        frozen = Policy(model, self.tokenizer, self.name, self.compute)
        frozen.packs, frozen.compiles = self.packs, self.compiles
        if parts:
            names = () if narrow is None else sharding.of_products(self.model)
            sharding.shard(frozen, frozen.model, sharding.of_model(self.model, narrow, names))
            copy_adapters(self.model, frozen.model)
        else:
            sharding.narrow(model, narrow)
        set_compiled(frozen.model, self.compiles)
        return frozen.eval().requires_grad_(False)

    def copy_of_trunk(self) -> nn.Module:
        """`sharding.copy_of_trunk`, compiled if the policy is."""
        trunk = sharding.copy_of_trunk(self.model)
        set_compiled(trunk, self.compiles)
        return trunk

    def reference(self) -> Policy:
        """The initial policy as a frozen reference, before training: the policy without its adapter, or else a copy."""
        return _WithoutAdapter(self) if adapters(self.model) else self.frozen_copy()

    def add_lora(self, rank: int = 8, alpha: float = 16.0, target_modules: str | Sequence[str] = "all-linear") -> None:
        """Freeze the model and add low-rank adapters to its linear layers (LoRA): W + (alpha / rank) B A.

        B is 0 at first, so the policy does not change. ``all-linear`` excludes the output layer. Raises UserError
        without peft, for a model with adapters, and for ``target_modules`` that match no layer. Source: arXiv
        2106.09685.
        """
        add_lora(self.model, rank, alpha, target_modules)

    def run(self, work: Callable[[], T]) -> T:
        """Run ``work``, which calls modules of the model, in a forward pass: a sharded model gathers its weights."""
        found: T = self(work=work)
        return found

    def beside(self, work: Callable[[], T]) -> T:
        """`run` without a graph, even within the forward pass of another policy."""
        with torch.no_grad():
            return self.run(work)

    def forward(
        self,
        sequences: Sequences | None = None,
        *,
        work: Callable[[], Any] | None = None,
        **options: Any,
    ) -> Any:
        """The `ForwardPass` of ``sequences`` (options: see `_log_probs`), or the result of ``work``."""
        with computing_in(self.compute, self.device):
            if work is not None:
                return work()
            assert sequences is not None
            return self._log_probs(sequences, **options)

    def _log_probs(
        self,
        sequences: Sequences,
        *,
        statistics: Collection[Input] = (),
        temperature: float | None = None,
        top_p: float = 1.0,
        term: LogitTerm | None = None,
        reference: Policy | None = None,
    ) -> ForwardPass:
        """``reference`` provides the reference logits of ``term``; ``temperature`` overrides that of ``sequences``."""
        if temperature is not None:
            sequences = sequences.at(temperature)
        hidden = self.hidden(sequences)
        other = None
        if reference is not None and term is not None:
            model = reference
            states = model.beside(lambda: model.hidden(sequences))
            other = (lambda part: model.beside(lambda: model.head.logits(part)), states)
        values = token_log_probs(
            self.head,
            hidden,
            sequences.targets,
            temperature=sequences.temperatures,
            top_p=top_p,
            statistics=statistics,
            term=term,
            reference=other,
        )
        for key, one in self.attached.items():
            trunk = one.trunk(self.modules_of_inputs[key])
            found = self.of_hidden(key, hidden if trunk is None else self._trunk(trunk, sequences))
            values[key] = found.to(values["logp"].dtype)
        spread = {name: sequences.spread(flat) for name, flat in values.items()}
        logp, extra = spread.pop("logp"), spread.pop("term", None)
        return ForwardPass(logp, spread, extra)

    def of_hidden(self, key: str, hidden: Float[Tensor, "N H"]) -> Float[Tensor, "N ..."]:
        """The output of the input ``key``'s module for these hidden states, in the module's dtype without autocast."""
        module, one = self.modules_of_inputs[key], self.attached[key]
        dtype = next((p.dtype for p in module.parameters()), hidden.dtype)
        with torch.autocast(self.device.type, enabled=False):
            return one.of_hidden(module, hidden.to(dtype))

    @property
    def head(self) -> Head:
        """The output layer."""
        return replace(Head.of(self.model), compute=self.compute, compiled=self.compiles)

    def hidden(self, sequences: Sequences, **extra: Any) -> Float[Tensor, "N H"]:
        """The last hidden states at positions that predict completion tokens; ``extra`` is passed to the trunk."""
        with computing_in(self.compute, self.device):
            return self._trunk(self.model.base_model, sequences, **extra)

    def _trunk(self, trunk: nn.Module, sequences: Sequences, **extra: Any) -> Float[Tensor, "N H"]:
        own: Any = self.model.base_model
        if not self.packs or type(getattr(trunk, "config", None)) is not type(own.config):
            sequences = sequences.padded()  # a trunk of another architecture may not support packs
        with without_packing_detection(), running(sequences.pack) as more:
            states = trunk(input_ids=sequences.ids, use_cache=False, **more, **extra).last_hidden_state
        return sequences.predicting(states)

    def flops(self, tokens: int, completion_tokens: int, modules: bool = True) -> float:
        """FLOPs of a forward pass: 2 N_trunk × ``tokens`` + 2 N_head × ``completion_tokens``, for N parameters.

        Embedding look-ups and attention scores are not counted (as in 6N D, arXiv 2001.08361); a backward pass takes
        twice as many. With ``modules``, those of inputs are included.
        """
        head = self.model.get_output_embeddings().weight.numel()
        trunk = sum(map(entries, self.model.base_model.parameters()))
        trunk -= self.model.get_input_embeddings().weight.numel()
        total: float = 2.0 * (trunk * tokens + head * completion_tokens)
        for key, one in self.attached.items() if modules else ():
            total += one.flops(self.modules_of_inputs[key], tokens, completion_tokens)
        return total


class _WithoutAdapter(Policy):
    """A policy with its adapter disabled, sharing the weights of the policy."""

    def __init__(self, policy: Policy) -> None:
        super().__init__(policy.model, policy.tokenizer, policy.name, policy.compute)
        self.packs, self.compiles = policy.packs, policy.compiles
        self._whole = [policy]  # not a module of its own

    def forward(
        self, sequences: Sequences | None = None, *, work: Callable[[], Any] | None = None, **options: Any
    ) -> Any:
        """Run within the policy's forward pass, which gathers the weights if they are sharded."""
        plain = super().forward
        return self._whole[0].run(lambda: plain(sequences, work=work, **options))

    def beside(self, work: Callable[[], T]) -> T:
        """``work`` without a graph: the policy's forward pass is already running."""
        with torch.no_grad():
            return work()

    @property
    def head(self) -> Head:
        head = super().head
        layer: Any = head.layer
        return replace(head, layer=layer.get_base_layer()) if hasattr(layer, "lora_A") else head

    def hidden(self, sequences: Sequences, **extra: Any) -> Float[Tensor, "N H"]:
        with switched_off(self.model):
            return super().hidden(sequences, **extra)
