"""Loading and saving policies: the embedded base, a local folder, or a Hub id; safetensors only."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlzoo.config import Packing, Training
from rlzoo.errors import UserError
from rlzoo.jobs.ranks import rank
from rlzoo.policy.adapters import adapters, merged, save_adapter
from rlzoo.policy.defaults import device_of, dtype_of, make_deterministic
from rlzoo.policy.head import Head
from rlzoo.policy.policy import Policy
from rlzoo.policy.quantised import in_4_bits, saved_as_whole, with_one_numerics
from rlzoo.worlds import EMBEDDED_BASE

EMBEDDED = "embedded"
REMOTE_CODE = "RLZOO_TRUST_REMOTE_CODE"
"""Set by the flag of the command line, for this process and its children. No file can set it."""
FIX = "give 'embedded', a folder that save_pretrained wrote, or a Hub id that this machine can reach"
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bfloat16-mixed": torch.float32,
    "float64": torch.float64,
}


def trusts_remote_code() -> bool:
    """Whether the user allows models with their own code."""
    return os.environ.get(REMOTE_CODE) == "1"


def load_for(name: str, training: Training) -> Policy:
    """`load_policy` with the device, the dtype, the determinism and the packing that settings of training ask for."""
    device = device_of(training.device)
    if training.deterministic:
        make_deterministic(device)
    lora = training.lora
    return load_policy(name, training.dtype, device, training.packing, lora is not None and lora.load_in_4bit)


def load_policy(
    name: str,
    dtype: str = "auto",
    device: str | torch.device | None = None,
    packing: Packing = "auto",
    load_in_4bit: bool = False,
) -> Policy:
    """The policy behind ``embedded``, a folder, or a Hub id. Raises UserError if it cannot be loaded.

    ``bfloat16-mixed`` has float32 weights and bfloat16 matrix products; ``auto`` is that on a GPU, float32 on a CPU.
    ``device``: ``auto`` and None are a GPU if there is one. ``packing`` is for `Policy.pack`. ``load_in_4bit``
    holds the weights of linear layers but the head in 4 bits, for adapters alone. A model with its own code is refused,
    except under ``rlzoo --trust-remote-code``.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = device_of(device)
    dtype = dtype_of(dtype, device)
    compute = torch.bfloat16 if dtype == "bfloat16-mixed" else None
    quantised = in_4_bits(compute or DTYPES[dtype], device) if load_in_4bit else {}
    where, trusted = _place(name), trusts_remote_code()
    try:
        tokenizer = AutoTokenizer.from_pretrained(where, trust_remote_code=trusted)
        model, found = AutoModelForCausalLM.from_pretrained(
            where,
            dtype=DTYPES[dtype],
            use_safetensors=True,
            output_loading_info=True,
            trust_remote_code=trusted,
            **quantised,
        )
    except Exception as error:
        raise _not_loaded(name, error) from error
    if lacking := sorted(map(str, [*found["missing_keys"], *found["mismatched_keys"]])):
        # transformers would initialise them at random, with a warning only
        raise UserError(
            f"model {name!r} has no weights for {lacking[0]} ({len(lacking)} in all): is its folder complete?"
        )
    if tokenizer.eos_token_id is None:
        raise UserError(f"model {name!r}: its tokenizer has no end-of-sequence token, so completions cannot end")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # padding is masked by position, never by id
    with_one_numerics(model)
    policy = Policy(model.to(device), tokenizer, name, compute)
    _check_head(policy)
    policy.pack(packing)
    return policy


def load_shape(name: str) -> Policy:
    """The policy without its weights, to count with: on the meta device, from its configuration and tokenizer alone.

    Raises UserError as `load_policy` does.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    where, trusted = _place(name), trusts_remote_code()
    try:
        tokenizer = AutoTokenizer.from_pretrained(where, trust_remote_code=trusted)
        config = AutoConfig.from_pretrained(where, trust_remote_code=trusted)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=trusted)
    except Exception as error:
        raise _not_loaded(name, error) from error
    return Policy(model, tokenizer, name)


def _place(name: str) -> str:
    """The folder or Hub id of a model. Raises UserError for a folder that is none of a model's."""
    where = str(EMBEDDED_BASE) if name == EMBEDDED else name
    folder = Path(where).expanduser()
    if folder.is_dir() or name.startswith((".", "/", "~")):
        if not (folder / "config.json").is_file():
            what = "has no config.json" if folder.is_dir() else "does not exist"
            raise UserError(f"model {name!r} cannot be loaded: that folder {what}; {FIX}")
        where = str(folder)
    return where


def _not_loaded(name: str, error: Exception) -> UserError:
    """What to tell when a library could not load a model."""
    if "trust_remote_code" in str(error) and not trusts_remote_code():
        return UserError(f"model {name!r} has its own code: add --trust-remote-code if you trust its source")
    reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return UserError(f"model {name!r} cannot be loaded ({reason.strip()[:160]}): {FIX}")


@torch.no_grad()
def _check_head(policy: Policy) -> None:
    """Raise UserError if the model's logits are not those of `Head`: its log-probs would be silently wrong."""
    model = policy.model.eval()
    try:
        policy.check_range(policy.tokenizer.eos_token_id)
    except UserError as error:
        raise UserError(f"model {policy.name!r} has no embedding of its end of sequence: {error}") from None
    ids = torch.tensor([[policy.tokenizer.eos_token_id] * 2], device=policy.device)
    try:
        expected = model(input_ids=ids, use_cache=False).logits[0].float()
    except Exception as error:  # a configuration can disagree with the weights in any way
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"model {policy.name!r} does not run ({reason:.160}): is its folder complete?") from error
    scale, kind = float(expected.abs().max()), model.config.model_type
    unknown = UserError(
        f"model {policy.name!r}: rlzoo does not know how a {kind!r} computes its logits: use another model"
    )
    try:
        found = Head.of(model).logits(model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]).float()
    except Exception as error:  # a model's own code need not follow transformers' conventions
        raise unknown from error
    if found.shape != expected.shape or not torch.allclose(found, expected, rtol=0.02, atol=0.02 * scale + 1e-6):
        raise unknown


def save_policy(policy: Policy, folder: Path) -> None:
    """Write a folder for ``from_pretrained``: safetensors, configuration and tokenizer, without a critic.

    An adapter is merged into the weights, which are whole where they were in 4 bits, and also written to the folder
    ``adapter``. All processes must call this; the
    main one writes.
    """
    weights = _gathered(policy.model)
    if rank() == 0:
        with saved_as_whole(policy.model):
            policy.model.save_pretrained(folder, state_dict=merged(policy.model, weights))
        policy.tokenizer.save_pretrained(folder)
        if adapters(policy.model):
            save_adapter(policy.model, weights, folder / "adapter", policy.name)


def _gathered(model: Any) -> dict[str, Tensor]:
    """The tensors of a model, gathered if it is sharded; tied weights stay one tensor."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    found, whole = {}, dict[int, Tensor]()
    for name, value in model.state_dict().items():
        if hasattr(value, "full_tensor"):
            key = id(parameters.get(name, value))
            if key not in whole:
                whole[key] = value.full_tensor()
            value = whole[key]
        found[name] = value
    return found
