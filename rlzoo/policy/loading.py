"""Loading and saving policies: the embedded base, a local folder, or a Hub id; safetensors only."""

from __future__ import annotations

from pathlib import Path

import torch

from rlzoo.errors import UserError
from rlzoo.policy.head import Head
from rlzoo.policy.policy import Policy
from rlzoo.worlds import EMBEDDED_BASE

EMBEDDED = "embedded"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


def load_policy(name: str, dtype: str = "float32", device: str | torch.device | None = None) -> Policy:
    """The policy behind ``embedded``, a folder, or a Hub id. Raises UserError if it cannot be loaded."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = str(EMBEDDED_BASE) if name == EMBEDDED else name
    mend = "give 'embedded', a folder that save_pretrained wrote, or a Hub id that this machine can reach"
    folder = Path(where).expanduser()
    if folder.is_dir() or name.startswith((".", "/", "~")):
        if not (folder / "config.json").is_file():
            what = "has no config.json" if folder.is_dir() else "does not exist"
            raise UserError(f"model {name!r} cannot be loaded: that folder {what}; {mend}")
        where = str(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(where)
        model = AutoModelForCausalLM.from_pretrained(where, dtype=DTYPES[dtype], use_safetensors=True)
    except Exception as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(f"model {name!r} cannot be loaded ({reason.strip()[:160]}): {mend}") from error
    if tokenizer.eos_token_id is None:
        raise UserError(f"model {name!r}: its tokenizer has no end-of-sequence token, so completions cannot end")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # padding is masked by position, never by id
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    policy = Policy(model.to(device), tokenizer, name)
    _check_head(policy)
    return policy


@torch.no_grad()
def _check_head(policy: Policy) -> None:
    """Raise UserError where the model's logits are not those of `Head`: its log-probs would be wrong, and silently."""
    model = policy.model.eval()
    ids = torch.tensor([[policy.tokenizer.eos_token_id] * 2], device=policy.device)
    expected = model(input_ids=ids, use_cache=False).logits[0].float()
    found = Head.of(model).logits(model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]).float()
    scale = float(expected.abs().max())
    if found.shape != expected.shape or not torch.allclose(found, expected, rtol=0.02, atol=0.02 * scale + 1e-6):
        kind = policy.model.config.model_type
        raise UserError(f"model {policy.name!r}: rlzoo does not know how a {kind!r} makes its logits: use another")


def save_policy(policy: Policy, folder: Path) -> None:
    """Write a folder that ``from_pretrained`` opens: safetensors, configuration and tokenizer. The critic stays out."""
    policy.model.save_pretrained(folder)
    policy.tokenizer.save_pretrained(folder)
