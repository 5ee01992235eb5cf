"""Tokenizers with the chat templates that models have, and tiny models that speak them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rlzoo.policy import Policy

SPECIAL = [
    "<pad>", "<eos>", "<bos>", "<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>", "<User>",
    "<Assistant>", "<think>", "</think>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "[INST]", "[/INST]",
    "<|user|>", "<|assistant|>", "<|system|>", "<|end|>",
]  # fmt: skip
TURNS = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
OPENS = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
TEMPLATES = {
    "chatml": TURNS + OPENS,
    "nogen": TURNS,
    "default-system": "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are Q.<|im_end|>\n' }}"
    "{% endif %}" + TURNS + OPENS,
    "needsys": "{% if messages[0]['role'] != 'system' %}{{ raise_exception('A system message is required') }}"
    "{% endif %}" + TURNS + OPENS,
    "gemma": "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
    "r1": "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '<User>' + m['content'] }}{% endif %}"
    "{% if m['role'] == 'assistant' %}{% set c = m['content'] %}{% if '</think>' in c %}"
    "{% set c = c.split('</think>')[-1] %}{% endif %}{{ '<Assistant>' + c + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<Assistant><think>\n' }}{% endif %}",
    "llama3": "{% for m in messages %}{% set c = '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' "
    "+ m['content'] | trim + '<|eot_id|>' %}{{ bos_token + c if loop.first else c }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
    # the last answer has its thinking, or an empty one; those before have lost it
    "qwen3": "{% for m in messages %}{% set c = m['content'] %}{% if m['role'] == 'assistant' %}"
    "{% set think = c.split('</think>')[0].split('<think>')[-1].strip('\n') if '</think>' in c else '' %}"
    "{% set c = c.split('</think>')[-1].lstrip('\n') %}"
    "{% if loop.last %}{% set c = '<think>\n' + think + '\n</think>\n\n' + c %}{% endif %}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + c + '<|im_end|>\n' }}{% endfor %}" + OPENS,
    "qwen3-thinking": "{% for m in messages %}{% set c = m['content'] %}{% if m['role'] == 'assistant' %}"
    "{% set think = c.split('</think>')[0].split('<think>')[-1].strip('\n') if '</think>' in c else '' %}"
    "{% set c = c.split('</think>')[-1].lstrip('\n') %}"
    "{% if loop.last %}{% set c = '<think>\n' + think + '\n</think>\n\n' + c %}{% endif %}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + c + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}",
    "mistral": "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{{ '[INST] ' + m['content'] + ' [/INST]' }}{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}",
    # closes the whole, and not only the turn, when it does not open the next
    "phi": "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
}
ADDS_BOS = ("gemma", "r1", "llama3", "mistral")
STOPS = {"gemma": "<end_of_turn>", "r1": "<eos>", "mistral": "<eos>", "llama3": "<|eot_id|>", "phi": "<|end|>"}


def built(template: str | None, bos: bool = False, merges: Sequence[tuple[str, str]] = ()) -> Any:
    """A tokenizer of bytes whose end of sequence, ``<eos>``, ends no turn but R1's and Mistral's."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    known = [*alphabet, *(a + b for a, b in merges)]
    inner = Tokenizer(models.BPE({token: i for i, token in enumerate(known)}, list(merges)))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(s, normalized=False, special=True) for s in SPECIAL])
    if bos:
        inner.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", inner.token_to_id("<bos>"))]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<eos>", bos_token="<bos>", pad_token="<pad>",
        clean_up_tokenization_spaces=False,
    )  # fmt: skip
    tokenizer.chat_template = template
    return tokenizer


def tokenizer_of(name: str) -> Any:
    return built(TEMPLATES[name], name in ADDS_BOS)


def policy_of(tokenizer: Any, vocabulary: int | None = None) -> Policy:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary or len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=512, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    return Policy(LlamaForCausalLM(config).eval(), tokenizer, "tiny")


def turn(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def user(content: Any) -> dict[str, Any]:
    return turn("user", content)


def assistant(content: Any) -> dict[str, Any]:
    return turn("assistant", content)


WITH_TOOLS = [
    turn("system", "S"),
    user("1+1?"),
    {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "add"}}]},
    turn("tool", "2"),
    assistant("It is 2."),
    user("2+2?"),
    assistant("4"),
]
CALLS = built(
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
    "{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}" + OPENS
)
