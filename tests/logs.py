"""Small logs as other stacks write them, with the keys that their code gives them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

Rows = Sequence[Mapping[str, Any]]
QUESTIONS = {"1+1=?": "2", "2+3=?": "5", "4-1=?": "3"}
ANSWERS = ("#### 2", "#### 5", "#### 3", "#### 5")


def conversation(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}]


def samples() -> Iterable[tuple[str, str, str, float]]:
    """(question, gold answer, completion, reward): four completions per question, of which one or two are right."""
    for question, gold in QUESTIONS.items():
        for answer in ANSWERS:
            yield question, gold, answer, float(answer == f"#### {gold}")


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def trl(folder: Path, step: int = 1, **columns: Sequence[Any]) -> Path:
    """What TRL's GRPOTrainer writes when it logs."""
    rows = list(samples())
    table = {
        "step": [step] * len(rows),
        "prompt": [question for question, *_ in rows],
        "completion": [answer for _, _, answer, _ in rows],
        "exact": [reward for *_, reward in rows],
        "advantage": [reward - 0.25 for *_, reward in rows],
        **columns,
    }
    path = folder / "completions" / f"completions_{step:05d}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(table), path)
    return path


def stripped(tokenizer: Any, question: str) -> str:
    """A rendered prompt as verl dumps it."""
    text = tokenizer.apply_chat_template(conversation(question), tokenize=False, add_generation_prompt=True)
    return str(tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"], skip_special_tokens=True))


def verl(folder: Path, tokenizer: Any, step: int = 1) -> Path:
    rows = [
        {"input": stripped(tokenizer, question), "output": answer, "gts": gold, "score": reward, "step": step}
        | {"acc": bool(reward)}
        for question, gold, answer, reward in samples()
    ]
    return write_lines(folder / f"{step}.jsonl", rows)


def tokens_of(tokenizer: Any, question: str, answer: str, stop: str = "<|im_end|>") -> tuple[list[int], list[int]]:
    """The tokens of a conversation's prompt, and those of a sampled answer."""
    text = tokenizer.apply_chat_template(conversation(question), tokenize=False, add_generation_prompt=True)
    prompt, said = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in (text, answer + stop))
    return prompt, said


def open_instruct(folder: Path, tokenizer: Any, **changes: Any) -> Path:
    rows = []
    for number, (question, gold, answer, reward) in enumerate(samples()):
        prompt, said = tokens_of(tokenizer, question, answer)
        row = {
            "step": 3, "sample_idx": number, "prompt_idx": number // 4, "prompt_tokens": prompt,
            "response_tokens": said, "reward": 10 * reward, "advantage": reward - 0.25, "finish_reason": "stop",
            "dataset": "math", "ground_truth": gold, "request_info": {"num_calls": 0, "tool_calleds": False},
            "logprobs": [-0.5] * len(said),
        }  # fmt: skip
        rows.append(row | changes)
    write_lines(folder / "run_metadata.jsonl", [{"run_name": "run", "git_commit": "0", "model_name": "m"}])
    return write_lines(folder / "run_rollouts_000000.jsonl", rows)


def chat_response(tokenizer: Any, answer: str, end: bool = True, **choice: Any) -> dict[str, Any]:
    """A response of ``chat.completions`` with its log-probs, of the end too, as vLLM gives them."""
    ids = tokenizer(answer + ("<|im_end|>" if end else ""), add_special_tokens=False)["input_ids"]
    content = [{"token": tokenizer.decode([one]), "logprob": -0.25, "bytes": None, "top_logprobs": []} for one in ids]
    message: dict[str, Any] = {"role": "assistant", "content": answer, "refusal": None, "tool_calls": []}
    first = {"index": 0, "message": message, "finish_reason": "stop", "logprobs": {"content": content}}
    return {"id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": "m", "choices": [first | choice]}


def responses(path: Path, tokenizer: Any) -> Path:
    """Responses with their prompts and a score beside them."""
    rows = [
        {**chat_response(tokenizer, answer), "messages": conversation(question), "metadata": {"score": reward}}
        for question, _, answer, reward in samples()
    ]
    return write_lines(path, rows)


def batch(requests: Path, output: Path, tokenizer: Any) -> None:
    """The input and the output of a batch."""
    asked, said = [], []
    for number, (question, _, answer, _) in enumerate(samples()):
        body = {"model": "m", "messages": conversation(question), "logprobs": True}
        own = {"custom_id": f"request-{number}"}
        asked.append({**own, "method": "POST", "url": "/v1/chat/completions", "body": body})
        response = {"status_code": 200, "request_id": "r", "body": chat_response(tokenizer, answer)}
        said.append({"id": f"batch_req_{number}", **own, "response": response, "error": None})
    write_lines(requests, asked)
    write_lines(output, said[::-1])  # in any order


def lm_eval(path: Path, filters: Sequence[str] = ("strict-match", "flexible-extract"), **changes: Any) -> Path:
    rows = []
    for name in filters:
        for number, (question, gold) in enumerate(QUESTIONS.items()):
            row = {
                "doc_id": number, "doc": {"question": question, "answer": gold}, "target": gold,
                "arguments": {"gen_args_0": {"arg_0": question, "arg_1": {"until": ["Q:"], "do_sample": False}}},
                "resps": [["#### 2"]], "filtered_resps": ["2"], "filter": name, "metrics": ["exact_match"],
                "doc_hash": "d", "prompt_hash": "p", "target_hash": "t", "exact_match": float(gold == "2"),
            }  # fmt: skip
            rows.append(row | changes)
    return write_lines(path, rows)


def prime_rl(folder: Path, tokenizer: Any) -> Path:
    """Episodes with a trace each, and the scaffold of the answer's turn among the answer's tokens."""
    header = tokenizer("<|im_start|>assistant\n", add_special_tokens=False)["input_ids"]
    rows = []
    for number, (question, gold, answer, reward) in enumerate(samples()):
        prompt, said = tokens_of(tokenizer, question, answer)
        asked = {"role": "user", "content": question}
        nodes = [
            {"message": asked, "sampled": False, "token_ids": prompt[: -len(header)], "logprobs": []}
            | {"mask": [False] * (len(prompt) - len(header))},
            {"parent": 0, "message": {"role": "assistant", "content": answer}, "sampled": True}
            | {"token_ids": header + said, "mask": [False] * len(header) + [True] * len(said)}
            | {"logprobs": [-0.125] * len(said)},
        ]
        trace = {
            "version": 1, "id": str(number), "task": {"type": "Task", "data": {"idx": number // 4, "answer": gold}},
            "agent": {"name": "agent", "trainable": True}, "nodes": nodes,
            "calls": [{"node": 1, "finish_reason": "stop"}],
            "rewards": {"exact": {"score": reward, "weight": 1.0}, "format": {"score": 1.0, "weight": 0.0}},
            "metrics": {"turns": 1.0}, "is_completed": True, "ok": True,
            "stop_condition": "agent_completed", "errors": [],
        }  # fmt: skip
        work = {"type": "train", "step": 7, "policy": {"start": 5, "end": 6}}
        episode = {
            "id": str(number),
            "group": {"id": str(number // 4)},
            "run": {"type": "train", "id": "r", "work": work},
        }
        rows.append({**episode, "ok": True, "errors": [], "traces": [trace]})
    write_lines(folder / "step_7" / "train" / "all" / "traces.jsonl", rows * 2)
    return write_lines(folder / "step_7" / "train" / "effective" / "traces.jsonl", rows)


def verifiers_results(path: Path, tokenizer: Any, **changes: Any) -> Path:
    """Results of the first API of verifiers."""
    rows = []
    for question, gold, answer, reward in samples():
        prompt, said = tokens_of(tokenizer, question, answer)
        tokens = {"prompt_ids": prompt, "completion_ids": said, "completion_logprobs": [-0.125] * len(said)}
        row = {
            "example_id": 0, "prompt": conversation(question), "completion": [{"role": "assistant", "content": answer}],
            "answer": gold, "task": "sums", "reward": reward, "metrics": {"exact": reward}, "is_truncated": False,
            "stop_condition": "max_turns", "trajectory": [{"tokens": tokens}],
        }  # fmt: skip
        rows.append(row | changes)
    return write_lines(path, rows)


def lighteval(folder: Path, **changes: Any) -> Path:
    rows = []
    for number, (question, gold) in enumerate(QUESTIONS.items()):
        doc = {"query": question, "choices": [gold], "gold_index": [0], "id": str(number), "task_name": "sums|0"}
        response = {"input": question, "text": ["#### 2"], "output_tokens": [[1]], "logprobs": []}
        rows.append(
            {"doc": doc, "metric": {"extractive_match": float(gold == "2")}, "model_response": response | changes}
        )
    path = folder / "model" / "2026-11-28T00-00-00" / "details_sums|0_2026-11-28T00-00-00.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path
