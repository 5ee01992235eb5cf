"""The policy: log-probs of completions with the head on completion positions only, and a critic where asked for."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from rlzoo.chat import turn_of
from rlzoo.errors import UserError
from rlzoo.policy.adapters import adapters, add_lora, switched_off
from rlzoo.policy.head import Head, LogitTerm, score_tokens
from rlzoo.policy.weights import changes_of
from rlzoo.ranks import shared
from rlzoo.types import Need, Trajectory

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

T = TypeVar("T")


@dataclass(frozen=True)
class Sequences:
    """Prompts and completions as model input: rows padded on the right, so causal attention needs no mask."""

    ids: Int[Tensor, "B L"]
    predicts: Bool[Tensor, "B L"]
    """True where the next token is a completion token."""
    mask: Bool[Tensor, "B T"]
    """True at completion tokens, in the frame where the prompt is cut away."""
    tokens: int
    """Prompt and completion tokens, padding left out."""
    temperature: Float[Tensor, " B"] | None = None
    """What each row's logits are divided by; None: nothing, 1."""

    @classmethod
    def of(cls, rows: Sequence[Trajectory], device: torch.device) -> Sequences:
        """Rows of a buffer, each at its temperature."""
        prompts, completions = [row.prompt_ids for row in rows], [row.completion_ids for row in rows]
        return cls.collate(prompts, completions, device, [row.temperature for row in rows])

    @classmethod
    def collate(
        cls,
        prompts: Sequence[Sequence[int]],
        completions: Sequence[Sequence[int]],
        device: torch.device,
        temperature: Sequence[float] | None = None,
    ) -> Sequences:
        """Join each prompt with its completion. A prompt must have at least one token."""
        rows, longest = len(prompts), max(len(p) + len(c) for p, c in zip(prompts, completions, strict=True))
        ids = torch.zeros(rows, longest, dtype=torch.long)
        predicts = torch.zeros(rows, longest, dtype=torch.bool)
        mask = torch.zeros(rows, max(map(len, completions)), dtype=torch.bool)
        for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            ids[row, : len(prompt) + len(completion)] = torch.as_tensor([*prompt, *completion])
            predicts[row, len(prompt) - 1 : len(prompt) + len(completion) - 1] = True
            mask[row, : len(completion)] = True
        tokens = sum(map(len, prompts)) + sum(map(len, completions))
        heat = None
        if temperature is not None and any(t != 1.0 for t in temperature):
            heat = torch.tensor(temperature, dtype=torch.float64, device=device)
        return cls(ids.to(device), predicts.to(device), mask.to(device), tokens, heat)

    def at(self, temperature: float) -> Sequences:
        """The same rows, all at one temperature."""
        heat = torch.full(self.mask.shape[:1], temperature, dtype=torch.float64, device=self.ids.device)
        return replace(self, temperature=None if temperature == 1.0 else heat)

    @property
    def targets(self) -> Int[Tensor, " N"]:
        """The completion tokens of all rows, one after the other."""
        return self.ids.roll(-1, dims=1)[self.predicts]

    @property
    def temperatures(self) -> Float[Tensor, " N"] | None:
        """The temperature of each completion token."""
        if self.temperature is None:
            return None
        return self.temperature[:, None].expand(self.mask.shape)[self.mask]

    def spread(self, flat: Float[Tensor, " N"]) -> Float[Tensor, "B T"]:
        """Values per completion token, in rows; 0 at padding."""
        return flat.new_zeros(self.mask.shape).masked_scatter(self.mask, flat)


@dataclass(frozen=True)
class TokenScores:
    """What one forward pass says about completion tokens; everything is 0 at padding."""

    logp: Float[Tensor, "B T"]
    statistics: dict[str, Float[Tensor, "B T"]]
    value: Float[Tensor, "B T"] | None = None
    term: Float[Tensor, "B T"] | None = None


class Policy(nn.Module):
    """Any transformers causal LM with its tokenizer, and optionally a critic."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        name: str = "",
        compute: torch.dtype | None = None,
    ) -> None:
        """``compute`` is the dtype of matrix products where it is not that of the weights."""
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.name = name
        self.compute = compute
        self.critic: nn.Module | None = None
        self.value_head: nn.Linear | None = None
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

    def add_critic(self, shared: bool) -> None:
        """A value head that starts at 0, on the policy's trunk or on a copy of it that trains by itself."""
        self.critic = None if shared else copy.deepcopy(self.model.base_model)
        weight = self.model.get_output_embeddings().weight
        self.value_head = nn.Linear(weight.shape[1], 1, device=self.device, dtype=weight.dtype)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)

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
        with torch.autocast(self.device.type, self.compute, enabled=self.compute is not None):
            if work is not None:
                return work()
            assert sequences is not None
            return self._score(sequences, **options)

    def _score(
        self,
        sequences: Sequences,
        *,
        statistics: Collection[Need] = (),
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
        value = None
        if self.value_head is not None:
            trunk = hidden if self.critic is None else self._trunk(self.critic, sequences)
            value = sequences.spread(self.value_head(trunk)[:, 0].to(scores["logp"].dtype))
        spread = {name: sequences.spread(flat) for name, flat in scores.items()}
        logp, extra = spread.pop("logp"), spread.pop("term", None)
        return TokenScores(logp, spread, value, extra)

    @property
    def head(self) -> Head:
        """The output layer."""
        return Head.of(self.model)

    def hidden(self, sequences: Sequences, **extra: Any) -> Float[Tensor, "N H"]:
        """The trunk's last hidden states where the next token is a completion token; ``extra`` goes to the trunk."""
        return self._trunk(self.model.base_model, sequences, **extra)

    @staticmethod
    def _trunk(trunk: nn.Module, sequences: Sequences, **extra: Any) -> Float[Tensor, "N H"]:
        states = trunk(input_ids=sequences.ids, use_cache=False, **extra).last_hidden_state
        selected: Tensor = states[sequences.predicts]
        return selected

    def flops(self, tokens: int, completion_tokens: int, critic: bool = True) -> float:
        """FLOPs of a forward pass: 2 a parameter and token, the head on completion tokens only.

        Embedding look-ups and attention scores are left out (the usual 6N convention); a backward costs twice this.
        """
        head = self.model.get_output_embeddings().weight.numel()
        trunk = sum(p.numel() for p in self.model.base_model.parameters())
        trunk -= self.model.get_input_embeddings().weight.numel()
        critics = 1 if critic and self.critic is not None else 0
        total: float = 2.0 * ((1 + critics) * trunk * tokens + head * completion_tokens)
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


Row = tuple[Sequence[int], Sequence[int]]
"""Prompt ids and completion ids."""


def token_batches(atoms: Sequence[Sequence[int]], lengths: Sequence[int], token_budget: int) -> Iterable[list[int]]:
    """Rows in micro-batches of at most ``token_budget`` padded tokens, rows of like length together.

    An atom is a set of rows that must not be separated; one that is over the budget goes alone.
    """
    order = sorted(range(len(atoms)), key=lambda a: (max(lengths[r] for r in atoms[a]), a))
    batch: list[int] = []
    longest = 0
    for index in order:
        atom = atoms[index]
        widest = max(longest, *(lengths[r] for r in atom))
        if batch and widest * (len(batch) + len(atom)) > token_budget:
            yield batch
            batch, widest = [], max(lengths[r] for r in atom)
        batch, longest = [*batch, *atom], widest
    if batch:
        yield batch


def score_rows(
    policy: Policy,
    rows: Sequence[Row],
    token_budget: int = 8192,
    temperature: float | Sequence[float] = 1.0,
    top_p: float = 1.0,
    progress: Callable[[int], None] | None = None,
) -> list[list[float]]:
    """Log-probs of each row's completion tokens in nats, in the trainer's numerics.

    ``temperature`` may be one per row. Of several processes each scores a part, and all get the whole.
    """
    return [logp for logp, _ in _scored_rows(policy, rows, token_budget, temperature, top_p, progress)]


def score_rows_and_nuclei(
    policy: Policy, rows: Sequence[Row], token_budget: int, temperature: float, top_p: float
) -> list[tuple[list[float], list[float]]]:
    """Of each completion token its log-prob at ``temperature``, and that of the nucleus of ``top_p`` it came from.

    Their difference is the log-prob of a sampler that draws from the nucleus alone.
    """
    found = _scored_rows(policy, rows, token_budget, temperature, top_p, None)
    return [([a + b for a, b in zip(logp, nucleus, strict=True)], nucleus) for logp, nucleus in found]


@torch.no_grad()
def _scored_rows(
    policy: Policy,
    rows: Sequence[Row],
    token_budget: int,
    temperature: float | Sequence[float],
    top_p: float,
    progress: Callable[[int], None] | None,
) -> list[tuple[list[float], list[float]]]:
    """Log-probs of each row's tokens, and of their nuclei: none where ``top_p`` is 1."""
    heats = [temperature] * len(rows) if isinstance(temperature, (int, float)) else temperature

    def own(numbers: list[int]) -> list[tuple[list[float], list[float]]]:
        lengths = [len(rows[i][0]) + len(rows[i][1]) for i in numbers]
        out: list[tuple[list[float], list[float]]] = [([], []) for _ in numbers]
        for batch in token_batches([[place] for place in range(len(numbers))], lengths, token_budget):
            some = [rows[numbers[place]] for place in batch]
            prompts, completions = [prompt for prompt, _ in some], [ids for _, ids in some]
            heat = [heats[numbers[place]] for place in batch]
            scores = policy(Sequences.collate(prompts, completions, policy.device, heat), top_p=top_p)
            both = [scores.logp, *([scores.statistics["nucleus"]] if top_p < 1.0 else [])]
            for column, values in enumerate(values.float().cpu() for values in both):
                for row, place in enumerate(batch):
                    out[place][column].extend(values[row, : len(some[row][1])].tolist())
            if progress is not None:
                progress(len(batch))
        return out

    training = policy.training
    policy.eval()
    found = shared(rows, own, policy)
    policy.train(training)
    return found
