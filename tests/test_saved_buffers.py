"""The commands for saved buffers: import, rescore, show, and the files of an evaluation harness."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import datasets
import logs
import pytest
from buffer_rows import sample, samples
from chat_templates import policy_of, tokenizer_of

from rlzoo.buffers import OfflineBuffer, get_importer, import_log, overview
from rlzoo.buffers.importers.lm_eval import KEYS
from rlzoo.buffers.storage import notes_of
from rlzoo.cli import main
from rlzoo.comparison.lm_eval import export_samples
from rlzoo.comparison.studies import read_study
from rlzoo.errors import UserError
from rlzoo.policy.loading import load_policy, save_policy
from rlzoo.reward.isolation import Limits, isolated
from rlzoo.rollout.rescoring import rescored
from rlzoo.training.uses import uses_of

DOCS = Path(__file__).parent.parent / "docs" / "importing.md"


def lengths(completions: list[str], log_metric: Any, log_extra: Any, **_: Any) -> list[float]:
    log_metric("calls", 1.0)
    log_extra("batch", [len(completions)] * len(completions))
    return [float(len(text)) for text in completions]


def mixed() -> OfflineBuffer:
    """Two prompts whose samples alternate, and a third of many."""
    rows = [sample(n % 2, 0.0, "x" * n) for n in range(1, 5)]
    return samples(*rows, *(sample(2, None, "y") for _ in range(70)))


# Rescoring


def test_rescoring_calls_the_reward_with_whole_groups_and_keeps_everything_else() -> None:
    old = mixed()
    new = rescored(old, lengths)
    assert new.column("reward") == [float(len(row.completion)) for row in old]
    assert new[0].reward_components == {"calls": 1.0, "lengths": 1.0} and new[0].columns == {"batch": 74}
    assert [row.behaviour_logp for row in new] == [row.behaviour_logp for row in old]
    again = rescored(samples(*(sample(n, 0.0) for n in range(130))), lengths)
    assert {row.columns["batch"] for row in again} == {2, 64}
    assert rescored(new, lengths)[0].columns == {"batch": 74, "logged_batch": 74}  # a column is never overwritten


def test_rescoring_gives_columns_other_names_and_names_the_row(tmp_path: Path) -> None:
    rows = [sample(n, None, f"#### {n}", columns={"gts": str(n), "meta": {"gold": "3"}}) for n in range(4)]
    assert rescored(samples(*rows), "exact-match", {"answer": "gts"}).column("reward") == [1.0] * 4
    nested = rescored(samples(*rows), "exact-match", {"answer": "meta.gold"})
    assert nested.column("reward") == [0.0, 0.0, 0.0, 1.0] and nested[0].columns == rows[0].columns
    with pytest.raises(UserError, match=r"row 1 of the buffer: no column 'gold'; it has: gts, meta"):
        rescored(samples(*rows), "exact-match", {"answer": "gold"})


@pytest.mark.slow
def test_a_reward_that_fails_names_the_row_of_the_buffer(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("def own(completions, **_):\n    return [float(text) for text in completions]\n")
    rows = samples(*(sample(n, 0.0, text) for n, text in enumerate(("1", "2", "three"))))
    spec = f"{tmp_path}/own.py:own"
    message = r"reward 'own' raised on row 3: ValueError: could not convert string to float: 'three'"
    with pytest.raises(UserError, match=message):
        rescored(rows, spec)
    apart = isolated(spec, Limits())
    with pytest.raises(UserError, match=message):
        rescored(rows, apart)
    with pytest.warns(RuntimeWarning, match="row 3"):
        found = rescored(rows, isolated(spec, Limits(), "null", 2)).column("reward")
    assert found == [1.0, 2.0, None]


# What a buffer holds


def test_the_overview_of_a_buffer() -> None:
    groups = [sample(0, 1.0), sample(0, 0.0), sample(1, 1.0), sample(1, 1.0), sample(1, 1.0, version=1)]
    found = overview(samples(*groups, sample(2, None, behaviour_logp=None, truncated=True)))
    assert found["rows"] == 6 and found["prompts"] == 3 and found["sources"] == {"policy": 6}
    assert found["truncated"] == 1 and found["policy_versions"] == [0, 1]
    assert found["completion_tokens"] == {"min": 1, "10%": 1, "median": 1, "90%": 1, "max": 1, "sum": 6}
    assert found["rewards"] == {
        "count": 5, "mean": 0.8, "std": pytest.approx(0.4), "min": 0.0, "max": 1.0,
        "values": {0.0: 1, 1.0: 4}, "components": [],
    }  # fmt: skip
    assert found["groups"]["count"] == 4 and found["groups"]["single"] == 2 and found["groups"]["equal_rewards"] == 1
    assert found["log_probs"]["behaviour_logp"] == 5
    many = overview(samples(*(sample(0, n / 10) for n in range(20))))["rewards"]["histogram"]
    assert sum(many["counts"]) == 20 and len(many["edges"]) == 9


def test_which_objectives_a_buffer_can_serve() -> None:
    def of(*rows: Any) -> dict[str, str | None]:
        return {use.objective: use.lacks for use in uses_of(samples(*rows))}

    whole = of(sample(0, 1.0), sample(0, 0.0))
    assert whole["rft"] is whole["dpo"] is whole["grpo"] is whole["kto"] is None
    assert whole["sft"] == "no demonstrations (0 of 2 rows have the source 'demonstration')"
    assert whole["mixture"] == "needs the option 'weights', which has no default"
    bare = of(sample(0, 1.0, behaviour_logp=None), sample(0, 0.0, behaviour_logp=None))
    assert bare["rft"] is bare["dpo"] is None
    assert bare["grpo"] == (
        "no groups (2 samples have a reward but no behaviour log-probs, for which --set training.behaviour=current "
        "takes the initial policy's)"
    )
    unscored = of(sample(0, None), sample(0, None))
    assert {unscored[name] for name in ("rft", "dpo", "grpo", "kto")} >= {"no rewards (none of its 2 rows has one)"}
    demonstrated = {
        use.objective: use for use in uses_of(samples(sample(0, None, source="demonstration", behaviour_logp=None)))
    }
    assert demonstrated["dft"].lacks is None and demonstrated["dft"].units == 1
    assert str(demonstrated["pear"].lacks).startswith("a demonstration of prompt '0' has no log-probs of its author")


# The commands


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a chat template, in a folder."""
    folder = tmp_path_factory.mktemp("models") / "chat"
    save_policy(policy_of(tokenizer_of("chatml")), folder)
    return folder


@pytest.mark.slow
def test_the_commands_of_the_page(
    chat_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    tokenizer = tokenizer_of("chatml")
    logs.trl(tmp_path / "outputs" / "grpo")
    logs.verl(tmp_path / "rollouts", tokenizer)
    logs.prime_rl(tmp_path / "outputs" / "rollouts", tokenizer)
    logs.open_instruct(tmp_path / "traces", tokenizer)
    logs.responses(tmp_path / "responses.jsonl", tokenizer)
    logs.batch(tmp_path / "batch_input.jsonl", tmp_path / "batch_output.jsonl", tokenizer)
    logs.lm_eval(tmp_path / "samples_gsm8k.jsonl")
    logs.lighteval(tmp_path / "details")
    page = DOCS.read_text(encoding="utf-8")
    commands = re.findall(r"^\$ rlzoo (.*)$", page, flags=re.M)
    assert len(commands) > 15
    for command in commands:
        arguments = shlex.split(command.replace("Qwen/Qwen3-0.6B", str(chat_model)))
        assert main(arguments) == 0, command
    out = capsys.readouterr().out
    assert out.count("12 samples of 3 prompts, 12 with a reward, 12 with log-probs; saved to") == 3
    assert "12 samples of 3 prompts, 0 with a reward, 12 with log-probs; saved to runs/from-batch" in out
    assert "no sample has a reward: give them some with rlzoo rescore runs/from-batch --reward REWARD" in out
    assert (
        "12 rows scored with exact-match, 0 rewards changed: mean 0.3333, was 0.3333; saved to runs/from-verl-resc"
        in out
    )
    assert "rft: 3 in correct" in out
    (code,) = re.findall(r"```python\n# mine.py\n(.*?)```", page, flags=re.S)
    (tmp_path / "mine.py").write_text(code)
    logs.write_lines(tmp_path / "log.jsonl", [{"question": "1+1=?", "answer": "2", "points": 5}])
    assert main(["import", "mine.py:Mine", "log.jsonl", "--option", "scale=0.1", "--out", "runs/mine"]) == 0
    assert OfflineBuffer.load("runs/mine")[0].reward == 0.5


@pytest.mark.slow
def test_import_says_what_it_did_and_does_it_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"step": 1, "input": "1+1=?", "output": text, "score": 1.0} for text in ("2", "3")]
    logs.write_lines(tmp_path / "1.jsonl", [*rows, {"step": 1, "input": "1+1=?", "score": 0.0}])
    command = ["import", "verl", "1.jsonl", "--bad-rows", "drop", "--out", "runs/buffer"]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "dropped 1 of 3 rows (bad_rows: drop): 1.jsonl line 3: no column 'output'" in out
    assert "2 samples of 1 prompts, 2 with a reward, 0 with log-probs; saved to runs/buffer" in out
    notes = notes_of("runs/buffer")
    assert notes["imported_from"]["log"] == "1.jsonl" and notes["dropped_rows"]["count"] == 1
    assert main(command) == 0 and "already finished: runs/buffer" in capsys.readouterr().out
    assert main([*command, "--max-completion-tokens", "9"]) == 2
    assert "--out 'runs/buffer' already holds another run, finished (max_completion" in capsys.readouterr().err
    assert main(["import", "verl", "1.jsonl", "--out", "runs/other"]) == 2
    assert "1.jsonl line 3: no column 'output'; it has: step, input, score" in capsys.readouterr().err
    assert not Path("runs/other").exists()
    assert main(["rescore", "runs/buffer", "--reward", "length", "--set", "reward.size=1"]) == 2
    assert main(["rescore", "runs/buffer"]) == 2
    assert "rlzoo rescore: reward is missing" in capsys.readouterr().err
    assert main(["buffer", "show", "runs/buffer", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["rows"] == 2 and {use["objective"] for use in shown["objectives"] if not use["lacks"]} >= {"rft"}


@pytest.mark.slow
def test_imported_samples_train(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And where something is missing, the error says what."""
    monkeypatch.chdir(tmp_path)
    logs.write_lines(tmp_path / "r.jsonl", [{"choices": [{"text": "2"}], "prompt": "1+1=?"}] * 2)
    assert main(["import", "openai", "r.jsonl", "--out", "bare"]) == 0
    for objective in ("rft", "dpo", "grpo"):
        assert main(["train", objective, "--buffer", "bare", "--steps", "1", "--out", "out"]) == 2
        assert "has no rewards (none of its 2 rows has one): score them with rlzoo rescore" in capsys.readouterr().err
    logs.trl(tmp_path / "log")
    assert main(["import", "trl", "log", "--out", "trl"]) == 0
    assert main(["train", "grpo", "--buffer", "trl", "--steps", "1", "--out", "out"]) == 2
    assert "(12 samples have a reward but no behaviour log-probs, for which --set" in capsys.readouterr().err


@pytest.mark.slow
def test_what_trl_logs_can_be_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two optimizer steps of TRL's GRPOTrainer on one batch of completions, which it logs twice."""
    trl = pytest.importorskip("trl")
    monkeypatch.chdir(tmp_path)

    def exact(completions: list[str], answer: list[str], log_extra: Any, **_: Any) -> list[float]:
        log_extra("gold", answer)
        return [float(text.endswith(f"#### {gold}")) for text, gold in zip(completions, answer, strict=True)]

    policy = load_policy("embedded", device="cpu")
    sums = [{"prompt": f"{a}+{b}=?", "answer": str(a + b)} for a, b in ((17, 25), (3, 4), (20, 11), (5, 6))]
    settings = trl.GRPOConfig(
        output_dir="log", max_steps=2, num_iterations=2, per_device_train_batch_size=8, num_generations=4,
        max_completion_length=24, logging_steps=1, log_completions=True, report_to=[], use_cpu=True,
        save_strategy="no", bf16=False, disable_tqdm=True, seed=0,
    )  # fmt: skip
    trained = {"model": policy.model, "processing_class": policy.tokenizer, "args": settings}
    trl.GRPOTrainer(reward_funcs=exact, train_dataset=datasets.Dataset.from_list(sums), **trained).train()
    capsys.readouterr()
    assert main(["import", "trl", "log", "--max-completion-tokens", "24", "--out", "buffer"]) == 0
    out = capsys.readouterr().out
    assert "as no new completions were sampled since: 8 in all (" in out
    assert "8 samples of 2 prompts, 8 with a reward, 0 with log-probs; saved to buffer" in out
    rows = list(OfflineBuffer.load("buffer"))
    assert all(row.reward == float(row.completion.endswith(f"#### {row.columns['gold']}")) for row in rows)
    assert {row.reward for row in rows} == {0.0, 1.0} and {row.policy_version for row in rows} == {1}
    for objective in ("rft", "dpo", "grpo"):
        behaviour = ["--set", "training.behaviour=current"] if objective == "grpo" else []
        assert main(["train", objective, "--buffer", "buffer", "--steps", "1", *behaviour, "--out", objective]) == 0


# lm-eval's files


@pytest.mark.slow
def test_outcomes_as_lm_eval_samples_and_back(tokenizer: Any, tmp_path: Path) -> None:
    files = export_samples("new-format", tmp_path)
    study = read_study("new-format")
    folder = tmp_path / "base"
    (results,) = folder.glob("results_*.json")
    (log,) = (file for file in folder.glob("samples_chain-sums_*.jsonl") if "greedy" not in file.name)
    assert {results, log} <= set(files) and log.name.rpartition("_")[0] == "samples_chain-sums"
    summary, lines = json.loads(results.read_text()), [json.loads(line) for line in log.read_text().splitlines()]
    own = study.results.base["chain-sums"]
    assert summary["results"]["chain-sums"]["correct,none"] == pytest.approx(own.avg_at_k)
    assert summary["configs"]["chain-sums"]["repeats"] == own.samples
    assert summary["n-samples"]["chain-sums"]["effective"] == len(lines)
    assert [line["doc_id"] for line in lines] == list(range(len(lines)))
    keys = (*KEYS, "correct", "rewards", "truncated")
    assert all(set(line) == set(keys) and len(line["resps"][0]) == own.samples for line in lines)
    buffer = import_log(get_importer("lm-eval"), log, tokenizer)
    asked = {"algorithm": "base", "benchmark": "chain-sums", "decoding": "sample"}
    expected = [row for row in study.outcomes.to_pylist() if asked.items() <= row.items()]
    assert sorted((row.prompt, row.completion, bool(row.reward), row.truncated) for row in buffer) == sorted(
        (row["prompt"], row["text"], row["correct"], row["truncated"]) for row in expected
    )
