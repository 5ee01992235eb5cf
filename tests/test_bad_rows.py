"""Rows that cannot be used: refused by name, or dropped and counted, on every way into a run."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
import yaml
from comparisons import small

from rlzoo.buffers import OfflineBuffer, from_trl, read_buffer
from rlzoo.buffers.bad_rows import BadRows, dropped_line
from rlzoo.buffers.problems import Problem, demonstrations, encode_problems, load_problems
from rlzoo.buffers.schema import ADDED, SCHEMA, unchecked_row
from rlzoo.cli import main
from rlzoo.comparison import shared_buffer
from rlzoo.comparison.runner import compare
from rlzoo.config import ProblemSource, Training
from rlzoo.errors import UserError
from rlzoo.objective import get_objective
from rlzoo.policy import Policy
from rlzoo.policy.loading import save_policy
from rlzoo.training import train
from rlzoo.types import Trajectory
from rlzoo.variance.run import fill

LINES = [
    '{"prompt": "1+1=", "completion": "2"}',
    '{"prompt": "1+2=", "completion": ""}',
    '{"prompt": "1+3=", "completion": null}',
    '{"prompt": "1+4=", "comp',
    '{"prompt": "1+5=", "completion": "6"}',
]
PLACES = [
    "rows.jsonl line 2: column 'completion' is empty",
    "rows.jsonl line 3: no value",
    "rows.jsonl line 4 is not JSON",
]


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text("\n".join(LINES))
    return "rows.jsonl"


def test_bad_rows_are_refused_by_name_and_the_setting_is_named(table: str, tokenizer: Any) -> None:
    with pytest.raises(UserError, match=r"rows\.jsonl line 2: column 'completion' is empty .*bad_rows: drop"):
        read_buffer(table, tokenizer)


def test_dropped_rows_are_counted_with_their_reasons(table: str, tokenizer: Any) -> None:
    bad = BadRows("drop")
    assert read_buffer(table, tokenizer, bad=bad).column("prompt") == ["1+1=", "1+5="]
    summary = bad.summary()
    assert summary is not None and (summary["count"], summary["of"]) == (3, 5)
    assert all(found.startswith(place) for found, place in zip(summary["first"], PLACES, strict=True))
    line = dropped_line(summary)
    assert line is not None and line.startswith("dropped 3 of 5 rows (bad_rows: drop): rows.jsonl line 2")
    assert dropped_line(BadRows("drop").summary()) is None


def test_the_first_good_row_gives_the_format(tokenizer: Any) -> None:
    rows = [{"prompt": "1", "label": None}, {"prompt": "1", "completion": "2"}, {"text": "3"}]
    assert len(from_trl(rows, tokenizer, bad=BadRows("drop"))) == 1


def test_a_table_of_bad_rows_alone_is_an_error(tokenizer: Any) -> None:
    with pytest.raises(UserError, match="all 2 rows are bad and were dropped; the first, row 1: column 'completion'"):
        from_trl([{"prompt": "1", "completion": " "}] * 2, tokenizer, bad=BadRows("drop"))


def test_problems_that_cannot_be_read_or_encoded_are_dropped(table: str, tokenizer: Any) -> None:
    source = ProblemSource(source=table, solution="completion", bad_rows="drop")
    bad = BadRows("drop")
    problems = load_problems(source, bad)
    assert [problem.id for problem in problems] == ["train-0", "train-2", "train-4"]  # no solution is no mistake
    assert len(load_problems(source)) == 3, "what the source says goes where nobody counts"
    assert bad.dropped == 2
    conversation = Problem("talk", [{"role": "user", "content": "1"}], {})  # for which there is no chat template
    assert len(encode_problems(tokenizer, [*problems, conversation], bad)) == 3
    assert len(demonstrations(tokenizer, [*problems, conversation], bad=bad)) == 2
    assert bad.dropped == 3, "a row is counted once"
    with pytest.raises(UserError, match="problem 'talk'"):
        encode_problems(tokenizer, [conversation])


def test_the_limit_is_of_good_rows(table: str) -> None:
    source = ProblemSource(source=table, solution="completion", bad_rows="drop", limit=2)
    assert [problem.prompt for problem in load_problems(source)] == ["1+1=", "1+3="]


@pytest.mark.slow
def test_train_reports_and_records_what_it_dropped(table: str, capsys: pytest.CaptureFixture[str]) -> None:
    train = ["train", "sft", "--buffer", table, "--steps", "1", "--set", "batch_size=2"]
    assert main([*train, "--out", "refused"]) == 2
    assert main([*train, "--bad-rows", "drop", "--out", "done"]) == 0
    assert "dropped 3 of 5 rows" in capsys.readouterr().out
    recorded = json.loads(Path("done/training.json").read_text())["dropped_rows"]
    assert (recorded["count"], recorded["of"]) == (3, 5)


@pytest.mark.slow
def test_rollout_reports_and_records_what_it_dropped(table: str, capsys: pytest.CaptureFixture[str]) -> None:
    sample = ["rollout", "arithmetic", "--data", table, "--reward", "length", "--rollout-samples", "1"]
    sample += ["--set", "train.solution=completion", "--set", "rollouts.max_new_tokens=2"]
    assert main([*sample, "--out", "refused"]) == 2
    assert main([*sample, "--bad-rows", "drop", "--out", "buffer"]) == 0
    out = capsys.readouterr().out
    assert "dropped 2 of 5 rows" in out and "3 samples of 3 prompts" in out
    assert json.loads(Path("buffer/buffer.json").read_text())["dropped_rows"]["count"] == 2
    assert len(read_buffer("buffer", None)) == 3


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_compare_records_what_it_dropped_of_every_set(table: str) -> None:
    benchmark = {"source": table, "solution": "completion", "bad_rows": "drop"}
    changes: dict[str, Any] = {"reward": "length", "train__bad_rows": "drop", "demonstrations": table}
    experiment = small({"sft": {}}, validation=None, benchmarks={"own": benchmark}, **changes)
    results = compare(experiment, out=Path("out"))
    assert {name: found["count"] for name, found in results["dropped_rows"].items()} == {
        "demonstrations": 3,
        "benchmark own": 2,
    }
    assert results["buffer"]["rows"] == 2


def test_variance_tells_what_it_dropped(table: str) -> None:
    filled = fill(small({"sft": {}}, train__bad_rows="drop"), Path("buffer"), Path("state"), table, lambda *_: None)
    assert (filled["rows"], filled["dropped_rows"]["buffer"]["count"]) == (2, 3)


@pytest.mark.slow
def test_evaluate_tells_what_it_dropped(table: str, capsys: pytest.CaptureFixture[str]) -> None:
    benchmark = f"benchmarks={{own: {{source: {table}, solution: completion, bad_rows: drop}}}}"
    evaluation = ["evaluate", "arithmetic", "--reward", "length", "--limit", "2", "--samples", "1", "--k", "1"]
    assert main([*evaluation, "--set", "evaluation.max_new_tokens=2", "--json", "--set", benchmark]) == 0
    out, err = capsys.readouterr()
    assert list(json.loads(out)) == ["own", "facts"], "its benchmark, and what the experiment measures as retention"
    assert "own: dropped 1 of 3 rows" in err, "no more rows are read than make two problems"


# What is known only with a model: rows that it cannot take, and completions that are cut

TOO_LONG = "1" * 70


@pytest.fixture
def short(make_policy: Callable[..., Policy], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Policy:
    """A model of 64 positions, saved as ``model``, and tables and a buffer of which it can take some rows."""
    monkeypatch.chdir(tmp_path)
    policy = make_policy("gpt2", dtype=torch.float32)
    save_policy(policy, tmp_path / "model")
    rows = [{"prompt": prompt, "completion": "2", "answer": "2"} for prompt in ("1+1=", TOO_LONG, "3-1=")]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    buffer = from_trl(rows, policy.tokenizer)
    buffer.save("folder")
    buffer.to_jsonl("buffer.jsonl")
    lines = Path("buffer.jsonl").read_text().splitlines()
    Path("broken.jsonl").write_text("\n".join(["{", lines[0], '{"prompt": 3}', *lines[1:], "[]"]))
    return policy


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "count", "reason"),
    [
        ("rows.jsonl", "1 of 3", "rows.jsonl line 2 has 72 tokens, and the model has 64 positions"),
        ("folder", "1 of 3", "row 2 of the buffer has 72 tokens"),
        ("broken.jsonl", "4 of 6", "broken.jsonl line 1 is not JSON"),
    ],
)
def test_train_drops_rows_that_its_model_cannot_take(
    short: Policy, where: str, count: str, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    train = ["train", "sft", "--buffer", where, "--model", "model", "--steps", "1", "--set", "batch_size=2"]
    assert main([*train, "--out", "refused"]) == 2
    assert main([*train, "--bad-rows", "drop", "--out", "done"]) == 0
    assert f"dropped {count} rows (bad_rows: drop): {reason}" in capsys.readouterr().out


def test_a_saved_buffer_opens_without_its_bad_lines(short: Policy) -> None:
    with pytest.raises(UserError, match=r"^broken\.jsonl line 1 is not JSON"):
        OfflineBuffer.load("broken.jsonl")
    bad = BadRows("drop")
    assert len(OfflineBuffer.load("broken.jsonl", bad)) == 3
    summary = bad.summary()
    assert summary is not None and (summary["count"], summary["of"]) == (3, 6)
    assert summary["first"][1].startswith("broken.jsonl line 3: ")
    Path("none.jsonl").write_text("{\n[]\n")
    with pytest.raises(UserError, match="all 2 rows are bad"):
        OfflineBuffer.load("none.jsonl", BadRows("drop"))


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_problems_that_the_model_cannot_take_are_dropped_everywhere(
    short: Policy, capsys: pytest.CaptureFixture[str]
) -> None:
    few = {"samples": 2, "max_new_tokens": 4}
    source = {"source": "rows.jsonl", "solution": "completion", "bad_rows": "drop"}
    algorithms = {"sft": {}, "rft": {}, "grpo": {"mode": "online"}}
    changes: dict[str, Any] = {"train": source, "rollouts": few, "evaluation": {**few, "curve_points": 1}}
    experiment = small(
        algorithms, model="model", reward="length", validation=source, benchmarks={"own": source}, **changes
    )
    results = compare(experiment, out=Path("out"))
    assert results["failed"] == []
    reasons = {name: (found["count"], found["of"]) for name, found in results["dropped_rows"].items()}
    assert reasons == dict.fromkeys(("train", "benchmark own", "validation"), (1, 3))
    Path("x.yaml").write_text(yaml.safe_dump(experiment.model_dump(mode="json")))
    assert main(["evaluate", "x.yaml", "--json"]) == 0
    out, err = capsys.readouterr()
    assert "own: dropped 1 of 3 rows" in err and list(json.loads(out)) == ["own"]
    assert main(["rollout", "x.yaml", "--out", "sampled"]) == 0
    assert "4 samples of 2 prompts" in capsys.readouterr().out


@pytest.mark.slow
def test_cut_completions_are_counted(table: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("long.jsonl").write_text('{"prompt": "1+1=", "completion": "222222"}\n' * 3 + LINES[0] + "\n")
    told = "completions cut at the length limit, without an end of sequence: 3 in all"
    train = ["train", "sft", "--buffer", "long.jsonl", "--steps", "1", "--set", "max_completion_tokens=4"]
    assert main([*train, "--out", "done"]) == 0
    assert f"{told} (long.jsonl line 1: 4 of 7 tokens are kept)" in capsys.readouterr().out
    assert told in json.loads(Path("done/training.json").read_text())["events"][0]
    changes = {"demonstrations": "long.jsonl", "training__max_completion_tokens": 4}
    sampled = small({"rft": {}}, rollouts={"samples": 2, "max_new_tokens": 2}, **changes)
    events = shared_buffer.fill_buffer(sampled, Path("buffer"), Path("state"), 0, lambda *_: None)["events"]
    assert events[0].startswith(f"demonstrations: {told}")
    assert "samples were truncated at max_new_tokens (2)" in events[1]
    rollout = ["rollout", "arithmetic", "--limit", "2", "--rollout-samples", "1", "--set", "rollouts.max_new_tokens=2"]
    assert main([*rollout, "--out", "sampled"]) == 0
    assert "2 of 2 samples were truncated at max_new_tokens (2)" in capsys.readouterr().out
    assert "2 of 2 samples" in json.loads(Path("sampled/buffer.json").read_text())["events"][0]


def test_without_a_place_for_the_counts_they_are_warnings(tokenizer: Any) -> None:
    rows, bad = [{"prompt": "1", "completion": "22"}] * 2, BadRows()
    with pytest.warns(UserWarning, match=r"2 in all \(row 1: 1 of 3 tokens are kept\)"):
        from_trl(rows, tokenizer, max_completion_tokens=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        from_trl(rows, tokenizer, max_completion_tokens=1, bad=bad)
    assert len(bad.events()) == 1 and bad.lines() == bad.events()


NO_ROWS: list[tuple[str, Any, str]] = [
    ("behaviour_logp", [-0.1], "behaviour_logp has 1 values for 2 completion tokens"),
    ("reference_logp", [-0.1, float("nan")], "reference_logp holds nan, which is not a log-prob"),
    ("sampler_logp", [float("inf"), -0.1], "sampler_logp holds inf, which is not a log-prob"),
    ("prompt_ids", [], "prompt_ids is empty"),
    ("completion_ids", [], "completion_ids is empty"),
    ("completion_ids", [7, -1], "completion_ids holds -1, which is not a token id"),
    ("reward", float("inf"), "reward is inf: it must be a finite number"),
    ("reward", float("nan"), "reward is nan: it must be a finite number"),
    ("source", "human", "source is 'human': it must be one of demonstration, policy, preference"),
    ("temperature", 0.0, "temperature is 0.0: it must be above 0"),
    ("temperature", float("nan"), "temperature is nan: it must be above 0"),
    ("top_p", 1.5, "top_p is 1.5: it must be above 0 and at most 1"),
    ("inputs", {"teacher": [0.1] * 3}, "the input teacher has 3 values for 2 completion tokens"),
]
GOOD = vars(
    Trajectory("p", "c", [5, 6], [7, 1], "q", behaviour_logp=[-0.5, -0.25], inputs={"a": [1.0], "b": [1.0, 2.0]})
)


@pytest.mark.parametrize(("field", "value", "reason"), NO_ROWS)
def test_a_value_that_no_row_has_is_refused_whatever_it_is_read_from(
    tmp_path: Path, field: str, value: Any, reason: str
) -> None:
    lines = tmp_path / "b.jsonl"
    lines.write_text("".join(json.dumps(one) + "\n" for one in (GOOD, {**GOOD, field: value}, GOOD)))
    good, bad = (unchecked_row(Trajectory(**one)) for one in (GOOD, {**GOOD, field: value}))
    rows = datasets.Dataset.from_list([good, bad, good], features=SCHEMA)
    rows.to_parquet(tmp_path / "b.parquet")
    rows.save_to_disk(tmp_path / "b")
    for name, place in (
        ("b.jsonl", f"{lines} line 2"),
        ("b.parquet", f"row 2 of {tmp_path / 'b.parquet'}"),
        ("b", f"row 2 of {tmp_path / 'b'}"),
    ):
        with pytest.raises(UserError) as error:
            OfflineBuffer.load(tmp_path / name)
        assert str(error.value).startswith(f"{place}: {reason}")
        drop = BadRows("drop")
        assert [vars(row) for row in OfflineBuffer.load(tmp_path / name, drop)] == [GOOD, GOOD]
        assert (drop.rows, drop.dropped) == (3, 1)
    with pytest.raises(UserError, match=r"^row 2 of the data set: ") as error:
        OfflineBuffer(rows)
    assert "bad_rows" not in str(error.value), "no setting drops rows of what is no file"


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("completion_ids", [2**40, 1], "completion_ids holds 1099511627776, which is not a token id"),
        ("policy_version", 2**40, "policy_version is 1099511627776"),
        ("policy_version", 10**30, "policy_version is 1000"),
        ("reward", "good", "reward: input should be a valid number"),
    ],
)
def test_a_line_of_a_buffer_with_a_number_that_is_none_of_a_row(
    tmp_path: Path, field: str, value: Any, reason: str
) -> None:
    file = tmp_path / "b.jsonl"
    file.write_text("".join(json.dumps(one) + "\n" for one in (GOOD, {**GOOD, field: value})))
    with pytest.raises(UserError) as error:
        OfflineBuffer.load(file)
    assert str(error.value).startswith(f"{file} line 2: {reason}")
    assert len(OfflineBuffer.load(file, BadRows("drop"))) == 1


@pytest.mark.parametrize(
    ("field", "kind", "value", "reason"),
    [
        ("completion_ids", pa.list_(pa.int64()), [2**40, 1], "row 2 of .*: completion_ids cannot be list<.*int32.*>: "),
        ("prompt_ids", pa.list_(pa.int32()), [5, None], "row 2 of .*: prompt_ids holds null, which is not a token id"),
        ("prompt_ids", pa.list_(pa.int32()), None, "row 2 of .*: prompt_ids is null: every row needs one"),
        ("temperature", pa.float64(), None, "row 2 of .*: temperature is null: every row needs one"),
        ("reward", pa.string(), "good", "row 2 of .*: reward cannot be double: "),
        ("reward", pa.list_(pa.float64()), [1.0], "b.parquet is not a saved buffer: its reward cannot be double: "),
        ("columns", pa.string(), "[1]", "row 2 of .*: columns is '\\[1\\]', which is not a JSON object"),
        ("columns", pa.string(), "{", "row 2 of .*: columns is '{', which is not a JSON object"),
        ("messages", None, [{"role": "user", "content": None}], "row 2 of .*: messages has a message without content"),
        ("messages", None, [{"content": "1"}], "row 2 of .*: messages has an entry without role"),
        (
            "completion_messages",
            None,
            [{"role": "tool", "content": "2", "extra": "[1]"}],
            "row 2 of .*: completion_messages has a message whose other keys are not a JSON object",
        ),
    ],
)
def test_a_table_with_a_value_that_is_none_of_a_row(
    tmp_path: Path, field: str, kind: Any, value: Any, reason: str
) -> None:
    row = unchecked_row(Trajectory(**GOOD))
    column = SCHEMA.arrow_schema.field(field).type if kind is None else kind
    first = None if field == "reward" else row[field]
    table = pa.Table.from_pylist([row, row], schema=SCHEMA.arrow_schema)
    table = table.set_column(list(SCHEMA).index(field), field, pa.array([first, value], column))
    pa.parquet.write_table(table, tmp_path / "b.parquet")
    with pytest.raises(UserError, match=reason):
        OfflineBuffer.load(tmp_path / "b.parquet")


@pytest.mark.slow
def test_a_buffer_that_lacks_a_column_is_none(tmp_path: Path) -> None:
    rows = OfflineBuffer.from_trajectories([Trajectory(**GOOD)]).rows
    for name in SCHEMA.keys() - ADDED:
        rows.remove_columns(name).save_to_disk(tmp_path / name)
        with pytest.raises(UserError, match=f"has no column '{name}', so it is not a saved buffer"):
            OfflineBuffer.load(tmp_path / name)


@pytest.mark.parametrize(("prompt", "completion", "part"), [([], [1], "prompt"), ([5], [], "completion")])
def test_a_row_without_tokens_is_nothing_to_train_on(
    short: Policy, prompt: list[int], completion: list[int], part: str
) -> None:
    ends = Trajectory("p", "", [5], [short.tokenizer.eos_token_id], "ends")  # has a token to learn from

    class Drawn:
        def draw(self) -> tuple[list[Trajectory], list[tuple[int, ...]]]:
            return rows, [(i,) for i in range(len(rows))]

    rows = [ends]
    (step,) = train(short, get_objective("sft"), Drawn(), Training(steps=1)).steps
    assert step["gradient_norm"] > 0
    rows.append(Trajectory("p", "c", prompt, completion, "none"))
    with pytest.raises(UserError, match=f"^a row of prompt 'none' has no tokens in its {part}: drop the row"):
        train(short, get_objective("sft"), Drawn(), Training(steps=1))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"train": [], "test": []}, r"from_trl takes the rows of one data set, and this is a dict \(train, test\)"),
        (5, "from_trl takes the rows of one data set, and this is an int"),
        (["1+1="], "row 1 is a str: every row must be an object of columns"),
        ([None], "row 1 is null: every row must be an object of columns"),
    ],
)
def test_what_is_no_list_of_rows_is_one_line(tokenizer: Any, rows: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        from_trl(rows, tokenizer)
    with pytest.raises(UserError, match="the name of the data is empty"):
        read_buffer("", tokenizer)
