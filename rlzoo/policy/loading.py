"""Loading and saving policies: the embedded base, a local folder, or a Hub id; safetensors only."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.errors import LocalEntryNotFoundError

from rlzoo.config import Packing, Training, read_yaml
from rlzoo.errors import UnreachableError, UserError
from rlzoo.jobs.ranks import agreed, by_main, rank
from rlzoo.jobs.sources import path_of
from rlzoo.policy import sharding
from rlzoo.policy.adapters import adapters, merged, save_adapter
from rlzoo.policy.defaults import device_of, dtype_of, make_deterministic
from rlzoo.policy.head import Head
from rlzoo.policy.policy import Policy
from rlzoo.policy.quantised import UNSHARDED, in_4_bits, saved_as_whole, with_one_numerics
from rlzoo.worlds import EMBEDDED_BASE

if TYPE_CHECKING:
    from transformers import PreTrainedModel

EMBEDDED = "embedded"
ADAPTER = "adapter"
"""The folder within that of a saved policy that has its adapter by itself."""
REMOTE_CODE = "RLZOO_TRUST_REMOTE_CODE"
"""Set by the command-line flag, for this process and its children. A file cannot set it."""
FIX = "give 'embedded', a folder that save_pretrained wrote, or a Hub id that this machine can reach"
SHAPES = Path(__file__).parent / "shapes.yaml"
"""Configurations of models, as far as costs depend on them."""
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bfloat16-mixed": torch.float32,
    "float64": torch.float64,
}


def trusts_remote_code() -> bool:
    """Whether the user allows models that bring code of their own."""
    return os.environ.get(REMOTE_CODE) == "1"


def load_for(name: str, training: Training) -> Policy:
    """`load_policy` with the device, dtype, determinism, packing, quantisation and chat template of the settings."""
    device = device_of(training.device)
    if training.deterministic:
        make_deterministic(device)
    lora = training.lora
    policy = load_policy(name, training.dtype, device, training.packing, lora is not None and lora.load_in_4bit)
    if training.chat_template is not None:
        policy.tokenizer.chat_template = training.chat_template
    return policy


def load_policy(
    name: str,
    dtype: str = "auto",
    device: str | torch.device | None = None,
    packing: Packing = "auto",
    load_in_4bit: bool = False,
    frozen: bool = False,
) -> Policy:
    """The policy ``name``: ``embedded``, a folder, or a Hub id.

    ``bfloat16-mixed`` has float32 weights and bfloat16 matrix products; ``auto`` is that on a GPU, float32 on a CPU.
    ``device``: ``auto`` and None are a GPU if there is one. ``packing``: see `Policy.pack`. ``load_in_4bit`` quantises
    the weights of linear layers except the head, for training adapters (QLoRA, arXiv 2305.14314). ``frozen`` is for a
    model that is not trained: its weights are stored in the dtype of matrix products. With sharding, only the main
    process reads the weights. Raises UserError for a model that cannot be loaded, lacks weights or an end of sequence,
    and for one that brings code of its own without ``rlzoo --trust-remote-code``.
    """
    device = device_of(device)
    dtype = dtype_of(dtype, device)
    compute = torch.bfloat16 if dtype == "bfloat16-mixed" else None
    where, shards = _place(name), sharding.is_asked()
    if load_in_4bit and shards:
        raise UserError(UNSHARDED)
    quantised = in_4_bits(compute or DTYPES[dtype], device) if load_in_4bit else {}
    tokenizer = load_tokenizer(name)
    narrow = compute if frozen else None
    if shards:
        source = by_main(lambda: _weights(name, where, DTYPES[dtype]))
        policy = Policy(_empty(name, where, DTYPES[dtype], source), tokenizer, name, compute)
        sharding.shard(policy, policy.model, sharding.from_main(source, policy.model, device, narrow))
        del source
    else:
        model = _weights(name, where, DTYPES[dtype], **quantised)
        sharding.narrow(model, narrow)
        policy = Policy(model.to(device), tokenizer, name, compute)
    if frozen:
        policy.eval().requires_grad_(False)
    _check_head(policy)
    policy.pack(packing)
    return policy


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a model: ``embedded``, a folder, or a Hub id.

    Raises UserError as `load_policy` does for one that cannot be loaded or has no end of sequence.
    """
    from transformers import AutoTokenizer

    where = _place(name)
    with _explained(name):
        tokenizer = AutoTokenizer.from_pretrained(where, trust_remote_code=trusts_remote_code())
    if tokenizer.eos_token_id is None:
        raise UserError(f"model {name!r}: its tokenizer has no end-of-sequence token, so completions cannot end")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # padding is masked by position, never by id
    return tokenizer


def load_shape(name: str) -> Policy:
    """The policy without its weights, on the meta device, from its configuration and tokenizer: for estimates of costs.

    A model that is not on this machine has the configuration of shapes.yaml, if that names it, and no tokenizer. Raises
    UserError as `load_policy` does.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        tokenizer = load_tokenizer(name)
        return Policy(_on_meta(name, _place(name), torch.float32), tokenizer, name)
    except UnreachableError:
        if (known := read_yaml(SHAPES).get(name)) is None:
            raise
    config = AutoConfig.for_model(**known)
    return Policy(sharding.on_meta(lambda: AutoModelForCausalLM.from_config(config, dtype=torch.float32)), None, name)


def _on_meta(name: str, where: str, dtype: torch.dtype, tied: bool | None = None) -> PreTrainedModel:
    """The model without its weights; ``tied``: whether it shares its embedding with the head, if not as configured."""
    from transformers import AutoConfig, AutoModelForCausalLM

    trusted = trusts_remote_code()
    with _explained(name):
        config = AutoConfig.from_pretrained(where, trust_remote_code=trusted)
        if tied is not None:
            config.tie_word_embeddings = tied
        return sharding.on_meta(
            lambda: AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trusted)
        )


def _place(name: str) -> str:
    """The folder or Hub id of a model. Raises UserError for a folder without a model."""
    where = str(EMBEDDED_BASE) if name == EMBEDDED else name
    folder = path_of(where)
    if folder.is_dir() or name.startswith((".", "/", "~")):
        if not (folder / "config.json").is_file():
            what = "has no config.json" if folder.is_dir() else "does not exist"
            raise UserError(f"model {name!r} cannot be loaded: that folder {what}; {FIX}")
        where = str(folder)
    return where


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """In this context, errors of transformers are raised as UserError."""
    try:
        yield
    except Exception as error:
        if "trust_remote_code" in str(error) and not trusts_remote_code():
            problem = "brings code of its own: add --trust-remote-code if you trust its source"
            raise UserError(f"model {name!r} {problem}") from error
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        kind = UnreachableError if isinstance(error.__cause__, LocalEntryNotFoundError) else UserError
        raise kind(f"model {name!r} cannot be loaded ({reason.strip()[:160]}): {FIX}") from error


def _weights(name: str, where: str, dtype: torch.dtype, **quantised: Any) -> PreTrainedModel:
    """The whole model, on the CPU unless it is ``quantised``."""
    from transformers import AutoModelForCausalLM

    with _explained(name):
        model, found = AutoModelForCausalLM.from_pretrained(
            where,
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            trust_remote_code=trusts_remote_code(),
            **quantised,
        )
    if lacking := sorted(map(str, found["missing_keys"])):
        # transformers would initialise them at random, with a warning only
        raise UserError(
            f"model {name!r} has no weights for {lacking[0]} ({len(lacking)} in all): is its folder complete?"
        )
    with_one_numerics(model)
    loaded: PreTrainedModel = model
    return loaded


def _empty(name: str, where: str, dtype: torch.dtype, source: PreTrainedModel | None) -> PreTrainedModel:
    """The main process's model ``source``, without its weights, in every process."""
    known = None if source is None else (source.config.tie_word_embeddings, source.generation_config)
    shared: Any = agreed(known)  # these may depend on the weights
    model = _on_meta(name, where, dtype, shared[0]).eval()
    model.generation_config = shared[1]
    return model


@torch.no_grad()
def _check_head(policy: Policy) -> None:
    """Raise UserError if the model's logits are not those of `Head`: its log-probs would be silently wrong."""
    model: Any = policy.model.eval()
    trunk = model.base_model
    try:
        policy.check_range(policy.tokenizer.eos_token_id)
    except UserError as error:
        raise UserError(f"model {policy.name!r} has no embedding for its end of sequence: {error}") from None
    ids = torch.tensor([[policy.tokenizer.eos_token_id] * 2], device=policy.device)
    try:
        expected = policy.run(lambda: model(input_ids=ids, use_cache=False).logits[0].float())
    except Exception as error:  # a configuration can disagree with the weights in any way
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"model {policy.name!r} does not run ({reason:.160}): is its folder complete?") from error
    scale, kind = float(expected.abs().max()), model.config.model_type
    unknown = UserError(
        f"model {policy.name!r}: rlzoo does not know how a {kind!r} computes its logits: use another model"
    )
    try:
        found = policy.run(lambda: Head.of(model).logits(trunk(input_ids=ids, use_cache=False).last_hidden_state[0]))
    except Exception as error:  # a model's own code need not follow transformers' conventions
        raise unknown from error
    if found.shape != expected.shape or not torch.allclose(
        found.float(), expected, rtol=0.02, atol=0.02 * scale + 1e-6
    ):
        raise unknown


def save_policy(policy: Policy, folder: Path) -> None:
    """Write a folder for ``from_pretrained``: safetensors, configuration and tokenizer, without a critic.

    An adapter is merged into the weights, which are dequantised if they were in 4 bits, and also written by itself to
    the folder `ADAPTER`. All processes must call this; the main one writes.
    """
    weights = sharding.whole_weights(policy.model, everywhere=False)
    if rank() == 0:
        with saved_as_whole(policy.model):
            policy.model.save_pretrained(folder, state_dict=merged(policy.model, weights))
        policy.tokenizer.save_pretrained(folder)
        if adapters(policy.model):
            save_adapter(policy.model, weights, folder / ADAPTER, policy.name)
