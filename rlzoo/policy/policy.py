"""The policy: log-probs of completions with the head on completion positions only, and inputs of its forward pass."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rlzoo.errors import UserError
from rlzoo.inputs import Input, Stage
from rlzoo.policy.adapters import adapters, add_lora, switched_off
from rlzoo.policy.attention import rows_apart, use
from rlzoo.policy.chat import turn_of
from rlzoo.policy.head import Head, LogitTerm, computing_in, score_tokens
from rlzoo.policy.sequences import Sequences
from rlzoo.policy.weights import changes_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

T = TypeVar("T")


@dataclass(frozen=True)
class TokenScores:
    """What one forward pass says about completion tokens; everything is 0 at padding."""

    logp: Float[Tensor, "B T"]
    inputs: dict[str, Float[Tensor, "B T"]]
    """FORWARD inputs by key: statistics, with no graph, and what modules make of hidden states, with theirs. Where
    ``top_p`` is below 1, also the log-prob of the ``nucleus``."""
    term: Float[Tensor, "B T"] | None = None

    def of(self, requires: Iterable[Input]) -> dict[str, Float[Tensor, "B T"]]:
        """Those inputs that an objective lists."""
        keys = [one.key for one in requires if one.stage is Stage.FORWARD]
        return {key: self.inputs[key] for key in keys if key in self.inputs}

    def values(self) -> dict[str, Float[Tensor, "B T"]]:
        """``logp`` and all inputs."""
        return {"logp": self.logp, **self.inputs}


class Policy(nn.Module):
    """Any transformers causal LM with its tokenizer, and the modules that inputs bring."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        name: str = "",
        compute: torch.dtype | None = None,
    ) -> None:
        """``compute`` is the dtype of matrix products where it is not that of the weights."""
        super().__init__()
        use(model)
        self.model = model
        self.tokenizer = tokenizer
        self.name = name
        self.compute = compute
        self.modules_of_inputs = nn.ModuleDict()
        """By key: modules that inputs own, such as a critic; they train and are checkpointed with the policy."""
        self.attached: dict[str, Input] = {}
        self.train(model.training)  # a fresh module says that it trains, whatever its parts do

    @property
    def device(self) -> torch.device:
        device: torch.device = self.model.device
        return device

    @property
    def eos_ids(self) -> set[int]:
        """Every token that ends a completion: the tokenizer's, the generation configuration's, and the one that ends an
        assistant's turn in the chat template."""
        configured = getattr(self.model.generation_config, "eos_token_id", None)
        ids = configured if isinstance(configured, list) else [configured]
        return {i for i in [*ids, self.tokenizer.eos_token_id, turn_of(self.tokenizer).stop] if i is not None}

    @property
    def vocabulary(self) -> int:
        """Tokens that the model has an embedding of, which may be fewer than the tokenizer's or more."""
        layer: Any = self.model.get_input_embeddings()
        return int(getattr(layer, "num_embeddings", 0) or layer.weight.shape[0])

    @property
    def positions(self) -> int | None:
        """Tokens that a sequence may have where the model looks its positions up in a table (GPT-2, OPT, GPT-J).

        None for one that computes them (rotary embeddings, ALiBi): it runs past ``max_position_embeddings`` as well.
        """
        size = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if not isinstance(size, int):
            return None
        words = self.model.get_input_embeddings()
        learned = (m.num_embeddings for m in self.model.modules() if isinstance(m, nn.Embedding) and m is not words)
        # OPT and its kin have two rows more than positions; GPT-J's table is no parameter
        fixed = (len(b) for name, b in self.model.named_buffers() if name.endswith("embed_positions"))
        return size if any(0 <= rows - size <= 2 for rows in (*learned, *fixed)) else None

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

    def row_check(self) -> Callable[[Sequence[int], Sequence[int]], None]:
        """Takes the ids of a prompt and a completion; raises UserError for those that the model cannot take."""
        positions, vocabulary = self.positions, self.vocabulary

        def check(prompt: Sequence[int], completion: Sequence[int]) -> None:
            ids = (*prompt, *completion)
            if not prompt or not completion:
                raise UserError(f"has no tokens in its {'completion' if prompt else 'prompt'}: drop the row")
            if not 0 <= min(ids) <= max(ids) < vocabulary:
                self.check_range(max(ids), min(ids))
            if positions is not None and len(ids) > positions:
                raise UserError(
                    f"has {len(ids)} tokens, and the model has {positions} positions: "
                    "drop the row, or cut it (max_completion_tokens, from_trl's max_length)"
                )

        return check

    @property
    def weights_version(self) -> int:
        """A number that rises with every change of the model's weights, however it came about.

        An optimizer's step, a loaded state dict, a change in place and a change of modules all count. A change through
        ``.data`` goes unseen: call `weights_changed` after it.
        """
        return changes_of(self.model).count(self.model)

    def weights_changed(self) -> None:
        """Tell whoever samples with a copy of the weights that they are other ones now."""
        changes_of(self.model).add()

    @property
    def hidden_size(self) -> int:
        """Entries of the last hidden states."""
        return int(self.model.get_output_embeddings().weight.shape[1])

    def attach(self, inputs: Iterable[Input]) -> None:
        """Give inputs the modules that they own, on this device and in this dtype, float32 at least, as they train.

        Those that have theirs keep them.

        Raises UserError for two different inputs with one key.
        """
        like = self.model.get_output_embeddings().weight
        for one in inputs:
            if one in self.attached.values() or one.stage is not Stage.FORWARD:
                continue
            if (module := one.module(self)) is not None:
                if (other := self.attached.get(one.key)) is not None:
                    raise UserError(f"two inputs have the key {one.key!r}, {other} and {one}: a run has one of them")
                dtype = torch.promote_types(like.dtype, torch.float32)
                self.modules_of_inputs[one.key] = module.to(like.device, dtype)
                self.attached[one.key] = one

    def untrained_state(self) -> list[tuple[str, Tensor]]:
        """What inputs' modules hold beside the parameters that train, such as running means."""
        trained = {name for name, p in self.modules_of_inputs.named_parameters() if p.requires_grad}
        state = self.modules_of_inputs.state_dict(keep_vars=True)
        return [(name, value) for name, value in state.items() if name not in trained]

    @contextmanager
    def attached_for(self, inputs: Iterable[Input]) -> Iterator[None]:
        """While this lasts, inputs without a module have one as at the start of training."""
        before = dict(self.attached)
        self.attach(inputs)
        try:
            yield
        finally:
            for key in self.attached.keys() - before.keys():
                del self.attached[key], self.modules_of_inputs[key]

    def frozen_copy(self) -> Policy:
        """A copy in eval mode whose parameters take no gradient: a reference."""
        frozen = Policy(copy.deepcopy(self.model), self.tokenizer, self.name, self.compute)
        return frozen.eval().requires_grad_(False)

    def reference(self) -> Policy:
        """The policy as it was before training: itself without its adapter, or else a frozen copy."""
        return _WithoutAdapter(self) if adapters(self.model) else self.frozen_copy()

    def add_lora(self, rank: int = 8, alpha: float = 16.0, target_modules: str | Sequence[str] = "all-linear") -> None:
        """Freeze the model and put low-rank adapters beside its linear layers, which start with no effect (LoRA).

        Source: arXiv 2106.09685, by peft. The output layer has none, unless named. Raises UserError without peft.
        """
        add_lora(self.model, rank, alpha, target_modules)

    @property
    def _no_split_modules(self) -> Any:
        """For Accelerate, which shards a model by these."""
        return self.model._no_split_modules

    def run(self, work: Callable[[], T]) -> T:
        """Call modules of the model in ``work`` as one forward pass, for which a sharded model gathers its weights."""
        found: T = self(work=work)
        return found

    def forward(
        self,
        sequences: Sequences | None = None,
        *,
        work: Callable[[], Any] | None = None,
        **options: Any,
    ) -> Any:
        """Score the completion tokens (the options are those of `_score`), or do some other ``work`` with the model."""
        with computing_in(self.compute, self.device):
            if work is not None:
                return work()
            assert sequences is not None
            return self._score(sequences, **options)

    def _score(
        self,
        sequences: Sequences,
        *,
        statistics: Collection[Input] = (),
        temperature: float | None = None,
        top_p: float = 1.0,
        term: LogitTerm | None = None,
        reference: Policy | None = None,
    ) -> TokenScores:
        """``reference`` gives ``term`` its reference logits; ``temperature`` takes the place of the sequences' own."""
        if temperature is not None:
            sequences = sequences.at(temperature)
        hidden = self.hidden(sequences)
        other = None
        if reference is not None and term is not None:
            with torch.no_grad():
                other = (reference.head, reference.hidden(sequences))
        scores = score_tokens(
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
            scores[key] = found.to(scores["logp"].dtype)
        spread = {name: sequences.spread(flat) for name, flat in scores.items()}
        logp, extra = spread.pop("logp"), spread.pop("term", None)
        return TokenScores(logp, spread, extra)

    def of_hidden(self, key: str, hidden: Float[Tensor, "N H"]) -> Float[Tensor, " N"]:
        """What an input's module makes of hidden states, in the module's own dtype, whatever matrices take."""
        module, one = self.modules_of_inputs[key], self.attached[key]
        dtype = next((p.dtype for p in module.parameters()), hidden.dtype)
        with torch.autocast(self.device.type, enabled=False):
            return one.of_hidden(module, hidden.to(dtype))

    @property
    def head(self) -> Head:
        """The output layer."""
        return replace(Head.of(self.model), compute=self.compute)

    def hidden(self, sequences: Sequences, **extra: Any) -> Float[Tensor, "N H"]:
        """The trunk's last hidden states where the next token is a completion token; ``extra`` goes to the trunk."""
        with computing_in(self.compute, self.device):
            return self._trunk(self.model.base_model, sequences, **extra)

    @staticmethod
    def _trunk(trunk: nn.Module, sequences: Sequences, **extra: Any) -> Float[Tensor, "N H"]:
        with rows_apart():
            states = trunk(input_ids=sequences.ids, use_cache=False, **extra).last_hidden_state
        return sequences.predicting(states)

    def flops(self, tokens: int, completion_tokens: int, modules: bool = True) -> float:
        """FLOPs of a forward pass: 2 a parameter and token, the head on completion tokens only.

        Embedding look-ups and attention scores are left out (the usual 6N convention); a backward costs twice this.
        ``modules`` counts those of inputs too.
        """
        head = self.model.get_output_embeddings().weight.numel()
        trunk = sum(p.numel() for p in self.model.base_model.parameters())
        trunk -= self.model.get_input_embeddings().weight.numel()
        total: float = 2.0 * (trunk * tokens + head * completion_tokens)
        for key, one in self.attached.items() if modules else ():
            total += one.flops(self.modules_of_inputs[key], tokens, completion_tokens)
        return total


class _WithoutAdapter(Policy):
    """A policy with its adapter off, while this is called: the weights are the policy's own."""

    def __init__(self, policy: Policy) -> None:
        super().__init__(policy.model, policy.tokenizer, policy.name, policy.compute)

    @property
    def head(self) -> Head:
        head = super().head
        layer: Any = head.layer
        return replace(head, layer=layer.get_base_layer()) if hasattr(layer, "lora_A") else head

    def hidden(self, sequences: Sequences, **extra: Any) -> Float[Tensor, "N H"]:
        with switched_off(self.model):
            return super().hidden(sequences, **extra)
