"""Problems from tables: what stands in a prompt, fields within columns, and values as the file says."""

from __future__ import annotations

import datetime
import decimal
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlzoo.buffers.bad_rows import BadRows
from rlzoo.buffers.problems import Problem, demonstrations, encode_problems, load_problems
from rlzoo.buffers.spooled import Spooled
from rlzoo.config import ProblemSource
from rlzoo.errors import UserError
from rlzoo.policy import load_policy
from rlzoo.reward import get_reward
from rlzoo.rollout import scorable

VERL: dict[str, Any] = {
    "prompt": [{"role": "user", "content": "1+1?"}],
    "reward_model": {"style": "rule", "ground_truth": "2"},
    "extra_info": {"answer": "So 2", "score": "0.5"},
    "a.b": "whole",
    "a": {"b": "within"},
    "choices": [{"text": "x"}, {"text": "y"}],
    "nan": float("nan"),
    "inf": float("inf"),
}


def written(folder: Path, *rows: dict[str, Any]) -> str:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def load(source: str, **settings: Any) -> Any:
    return load_problems(ProblemSource(source=source, **settings))


def test_fields_within_columns_have_dotted_names(tmp_path: Path) -> None:
    answers = {"answer": "reward_model.ground_truth", "texts": "choices.text"}
    settings = {"columns": answers, "solution": "extra_info.answer", "quality": "extra_info.score"}
    (problem,) = load(written(tmp_path, VERL), **settings)
    assert problem.prompt == VERL["prompt"]
    assert (problem.columns["answer"], problem.columns["texts"]) == ("2", ["x", "y"])
    assert (problem.solutions, problem.quality) == (("So 2",), 0.5)
    (problem,) = load(written(tmp_path, VERL), prompt="{a.b}, {choices[0].text} or {choices.1.text!r:>5}?")
    assert problem.prompt == "whole, x or   'y'?", "a column whose own name has a dot comes first"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"columns": {"answer": "reward_model.gold"}}, "'reward_model' has: style, ground_truth"),
        ({"columns": {"answer": "prompt.0.content.x"}}, "'prompt.0.content' is a str"),
        ({"columns": {"answer": "gold"}}, "no column 'gold'; it has: prompt, reward_model"),
        ({"prompt": "{choices}"}, "column 'choices' is a list, and the template needs text there"),
        ({"prompt": "{inf}"}, "column 'inf' is inf, and the template needs text there"),
        ({"prompt": "{a.b:d}"}, "column 'a.b' cannot be shown as {a.b:d}"),
        ({"prompt": "a"}, "column 'a' is a dict: give text or a list of messages"),
        ({"solution": "reward_model"}, "column 'reward_model' holds a dict: give text"),
        ({"solution": "nan"}, "column 'nan' holds NaN: give text"),
    ],
)
def test_a_wrong_name_or_value_names_the_row_and_what_there_is(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError) as error:
        load(written(tmp_path, VERL), **settings)
    assert str(error.value).startswith(f"{tmp_path}/rows.jsonl line 1: ")
    assert message in str(error.value)


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("prompt", ["question", "{question}"])
@pytest.mark.parametrize("value", [None, "", " \n", float("nan")])
def test_a_prompt_is_never_none_or_blank(tmp_path: Path, chat: bool, prompt: str, value: Any) -> None:
    source = written(tmp_path, {"question": "1+1?"}, {"question": value})
    with pytest.raises(UserError, match=r"rows\.jsonl line 2: .*question"):
        load(source, prompt=prompt, chat=chat)
    assert len(load(source, prompt=prompt, chat=chat, bad_rows="drop")) == 1


def test_a_template_names_its_columns(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"template 'Say \{\}' has \{\}: name a column in it"):
        load(written(tmp_path, {"q": "1"}), prompt="Say {}")


def test_a_solution_may_be_a_template(tmp_path: Path) -> None:
    rows = {"q": "1+1", "why": ["so", "thus"], "answer": 2}, {"q": "2+2", "why": "so", "answer": None}
    first, second = load(written(tmp_path, *rows), prompt="q", solution="<think>{why}</think>{answer}")
    assert first.solutions == ("<think>so</think>2", "<think>thus</think>2"), "one per element of a list"
    assert second.solutions == (), "as for a null"
    (built_in,) = load("world:arithmetic/train", limit=1, solution=": {solution}\n{prompt}")
    (plain,) = load("world:arithmetic/train", limit=1)
    assert built_in.solutions == tuple(f": {one}\n{plain.prompt}" for one in plain.solutions)
    assert built_in.columns == plain.columns, "rewards get the same columns"
    with pytest.raises(UserError, match=r"template '\{why': expected"):
        load(written(tmp_path, rows[0]), prompt="q", solution="{why")


def test_demonstrations_are_rows_of_their_problems(tokenizer: Any) -> None:
    """One that is cut has the text of the tokens that are left."""
    problem = Problem("a", "1+1=", {"answer": "2"}, solutions=("3-1=2", "2"), quality=0.5)
    one, other = demonstrations(tokenizer, [problem])
    assert (one.completion, other.completion) == ("3-1=2", "2") and not one.truncated
    assert one.completion_ids == [*tokenizer.encode("3-1=2"), tokenizer.eos_token_id]
    assert (one.prompt, one.prompt_id, one.reward, one.columns) == ("1+1=", "a", 0.5, {"answer": "2"})
    cut, whole = demonstrations(tokenizer, [problem], max_tokens=2)
    assert cut.truncated and cut.completion_ids == one.completion_ids[:2]
    assert cut.completion == tokenizer.decode(cut.completion_ids) != "3-1=2"
    assert not whole.truncated and whole.completion_ids == other.completion_ids


def test_problems_that_are_all_dropped_are_an_error(tokenizer: Any) -> None:
    with pytest.raises(UserError, match="problem 'a'"):
        encode_problems(tokenizer, [Problem("a", [{"role": "user", "content": "1+1"}], {})], BadRows("drop"))


def test_an_empty_text_in_a_template_is_nothing(tmp_path: Path) -> None:
    (problem,) = load(written(tmp_path, {"instruction": "Add.", "input": ""}), prompt="{instruction}{input}")
    assert problem.prompt == "Add."


def test_ids_are_a_tables_own_and_no_two_are_the_same(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"id": 7, "q": "1"}, {"id": "b", "q": "2"}, {"id": None, "q": "3"}]
    assert [problem.id for problem in load(written(tmp_path, *rows), prompt="q")] == ["7", "b", "train-2"]
    source = written(tmp_path, *rows, {"id": "b", "q": "4"})
    with pytest.raises(UserError, match=r"line 4: the id 'b' is that of .*line 2: give each its own"):
        load(source, prompt="q")
    assert [problem.prompt for problem in load(source, prompt="q", bad_rows="drop")] == ["1", "2", "3"]


def test_a_column_may_take_the_name_of_another(tmp_path: Path) -> None:
    (problem,) = load(
        written(tmp_path, {"q": "1+1", "answer": "so", "gold": "2"}), prompt="q", columns={"answer": "gold"}
    )
    assert problem.columns["answer"] == "2"
    (built_in,) = load("world:facts/train", limit=1, columns={"answer": "prompt"})
    assert built_in.columns["answer"] == built_in.prompt and not {"id", "prompt"} & set(built_in.columns)
    assert built_in.solutions, "those of the task"


def test_numbers_of_any_size_and_columns_of_several_types_are_read_exactly(tmp_path: Path) -> None:
    values: list[Any] = [2**100, 7, 7.0, "x", True, [1], -(10**30)]
    problems = load(written(tmp_path, *({"q": str(i), "answer": v} for i, v in enumerate(values))), prompt="q")
    found = [problem.columns["answer"] for problem in problems]
    assert found == values and list(map(type, found)) == list(map(type, values))
    source = written(tmp_path, {"q": "1", "answer": 2**100})
    assert load(source, prompt="{q}", solution="answer")[0].solutions == ("1267650600228229401496703205376",)


def test_half_a_character_is_an_error_where_it_is_used(tmp_path: Path) -> None:
    source = written(tmp_path, {"q": "1", "other": "\ud83d"}, {"q": "\ud83d", "other": ""})
    assert len(load(source, prompt="q", limit=1)) == 1
    with pytest.raises(UserError, match=r"line 2: column 'q' holds a lone surrogate \(\\ud83d\)"):
        load(source, prompt="q")


def test_csv_is_text_as_it_stands(tmp_path: Path) -> None:
    said = ["007", "1e5", "1.50", "true", "NA", "null", "12:30", "2024-03-04", "123456789012345678901", "", "1,5"]
    rows = "".join(f'"{i}+1","{answer}"\n' for i, answer in enumerate(said))
    for name, content in (("a.csv", rows), ("b.tsv", rows.replace('","', '"\t"'))):
        (tmp_path / name).write_text(("q\tanswer\n" if name == "b.tsv" else "q,answer\n") + content)
        assert [p.columns["answer"] for p in load(str(tmp_path / name), prompt="{q}=")] == said
    (tmp_path / "c.csv").write_text("q,score\n1+1,2.5\n1+2,high\n")
    with pytest.raises(UserError, match=r"c\.csv row 2: quality column 'score' is 'high': give a finite number"):
        load(str(tmp_path / "c.csv"), prompt="q", quality="score")


def test_columns_that_json_cannot_hold_are_text_or_left_out(tmp_path: Path) -> None:
    columns = {
        "q": ["1+1"],
        "date": [datetime.date(2024, 3, 4)],
        "time": [datetime.time(12, 30)],
        "stamp": pa.array([1], pa.timestamp("ns")),
        "price": [decimal.Decimal("1.50")],
        "utf8": [b"text"],
        "image": [{"bytes": b"\x89PNG", "path": "a.png"}],
    }
    path = str(tmp_path / "rows.parquet")
    pq.write_table(pa.table(columns), path)
    (problem,) = load(path, prompt="{q} at {time} for {price}", columns={"answer": "utf8"})
    assert problem.prompt == "1+1 at 12:30:00 for 1.50"
    assert problem.columns["answer"] == "text"
    assert problem.columns["date"] == "2024-03-04" and "image" not in problem.columns
    json.dumps(problem.columns)
    for settings in ({"prompt": "image"}, {"prompt": "q", "columns": {"answer": "image"}}, {"prompt": "{q}{image}"}):
        with pytest.raises(UserError, match=r"rows\.parquet row 1: column 'image' holds bytes that are not UTF-8 text"):
            load(path, **settings)


def test_a_name_leads_into_json_text(tmp_path: Path) -> None:
    """As in SYNTHETIC-1's ``verification_info``."""
    row = {"prompt": "1+1=", "info": json.dumps({"gold": {"value": ["2"]}}), "note": "{no JSON"}
    file = tmp_path / "p.jsonl"
    file.write_text(json.dumps(row))
    (problem,) = load_problems(ProblemSource(source=str(file), columns={"answer": "info.gold.value.0"}))
    assert problem.columns["answer"] == "2" and problem.columns["info"] == row["info"]
    with pytest.raises(UserError, match=r"no column 'note\.x': 'note' is a str"):
        load_problems(ProblemSource(source=str(file), columns={"answer": "note.x"}))


def test_braces_that_are_no_column_are_told_how_to_be_text(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"q": "1+1="}')
    with pytest.raises(
        UserError, match=r"no column '2'; it has: q: name a column in \{2\}, or write \{\{2\}\} for text"
    ):
        load_problems(ProblemSource(source=str(tmp_path / "p.jsonl"), prompt="{q} as in \\frac{2}"))


def test_many_problems_are_in_a_file(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """And are those of a list, whole, one by one and in parts."""
    rows = [{"q": f"{i}+{i}=?", "a": [f"{2 * i}", "#"], "deep": {"x": [i, None, 0.5]}} for i in range(9)]
    rows[4]["q"] = ""
    (tmp_path / "many.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = ProblemSource(
        source=str(tmp_path / "many.jsonl"), prompt="q", solution="a", bad_rows="drop", limit=7, chat=True
    )

    def read() -> tuple[Any, Any, BadRows]:
        bad = BadRows("drop")
        problems = load_problems(source, bad)
        return problems, encode_problems(tokenizer, problems, bad), bad

    monkeypatch.setattr(tokenizer, "chat_template", "{% for m in messages %}{{ m.content }}{% endfor %}")
    problems, encoded, counted = read()
    assert isinstance(problems, list) and len(problems) == 7
    monkeypatch.setattr("rlzoo.buffers.spooled.CHUNK", 3)
    many, more, bad = read()
    assert isinstance(many, Spooled) and isinstance(more, Spooled)
    assert list(many) == problems and [one.place for one in many] == [one.place for one in problems]
    assert list(more) == encoded and bad.to_json() == counted.to_json()
    assert many[-1] == problems[-1] and list(many[2:6][1:]) == problems[3:6] and len(many[5:99]) == 2
    with pytest.raises(IndexError):
        many[7]
    made, expected = (demonstrations(tokenizer, some, 4, bad) for some in (many[1:], problems[1:]))
    assert made == expected and len(made) == 12


def test_a_subset_is_drawn_by_its_seed_from_the_whole_table(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"prompt": f"{i}?"} for i in range(40)]
    path = written(tmp_path, *rows)

    def drawn(**settings: Any) -> list[int]:
        found = load(path, **settings)
        assert [problem.place for problem in found] == [f"{path} line {int(p.prompt[:-1]) + 1}" for p in found]
        assert [problem.id for problem in found] == [f"train-{p.prompt[:-1]}" for p in found], (
            "ids are those of all rows"
        )
        return [int(problem.prompt[:-1]) for problem in found]

    first = drawn(limit=9, subset_seed=0)
    assert first == drawn(limit=9, subset_seed=0) == sorted(first) and len(first) == 9
    assert first != drawn(limit=9, subset_seed=1) and max(first) > 20, "not the first rows"
    assert drawn(limit=9) == list(range(9)) and drawn(limit=40, subset_seed=0) == drawn(subset_seed=3) == list(
        range(40)
    )
    rows[first[3]]["prompt"] = None  # which rows are drawn does not depend on it
    written(tmp_path, *rows)
    bad = BadRows("drop")
    kept = load_problems(ProblemSource(source=path, limit=9, subset_seed=0, bad_rows="drop"), bad)
    assert [int(str(problem.prompt)[:-1]) for problem in kept] == [n for n in first if n != first[3]]
    assert bad.summary() is not None and (bad.dropped, bad.rows) == (1, 9)


def test_problems_without_a_readable_gold_answer_are_not_sampled(tmp_path: Path) -> None:
    answers = ["2", None, "see the figure, and prove it", "4"]
    path = written(tmp_path, *({"prompt": f"{n}?", "answer": answer} for n, answer in enumerate(answers)))
    policy = load_policy("embedded")
    encoded = encode_problems(policy.tokenizer, load(path))
    bad = BadRows("drop")
    kept = scorable(get_reward("math-answer"), encoded, bad)
    assert [one.problem.prompt for one in kept] == ["0?", "2?", "3?"]
    assert bad.events() == [
        "problems not sampled, because their reward is None, as for an unreadable gold answer: 1 in all "
        f"(problem 'train-1' ({path} line 2): its reward is None)"
    ]
    assert scorable(get_reward("math-answer"), encoded, BadRows()) == encoded, "an error later, or counted"
    with pytest.raises(UserError, match="the reward is None for every problem"):
        scorable(get_reward("math-answer"), encoded[1:2], BadRows("drop"))
