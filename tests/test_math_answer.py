"""The mathematics reward: what counts as the final answer, which answers are equal, and what earns nothing."""

import contextlib
import io
import json
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from comparisons import inline_pool
from rich.console import Console

from rlzoo.cli import main
from rlzoo.comparison.runner import compare
from rlzoo.config import load_experiment
from rlzoo.errors import UserError
from rlzoo.reward import get_reward
from rlzoo.rewards import _symbols

SHARED = Path(__file__).resolve().parents[2] / "shared"


def scores(spec: Any, completions: list[Any], **columns: Any) -> list[float | None]:
    return get_reward(spec)(["q"] * len(completions), completions, **columns)


def score(completion: str, gold: Any) -> float | None:
    return scores("math-answer", [completion], answer=[gold])[0]


def table(file: str) -> list[tuple[str, str, float]]:
    """The rows of a file of `gold  ==  text` and `gold  !=  text`."""
    found = []
    for line in (Path(__file__).parent / file).read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("# "):
            gold, relation, text = re.split("  (==|!=)  ", line, maxsplit=1)
            found.append((gold, text.replace("⏎", "\n"), float(relation == "==")))
    return found


def said(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def rows(file: str) -> list[dict[str, Any]]:
    path = SHARED / file
    if not path.is_file():
        pytest.skip(f"no ../shared/{file}")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(
    ("completion", "gold", "value"),
    [
        (r"so \boxed{\frac{1}{2}}", r"\frac12", 1),
        (r"so \boxed{\frac{\sqrt{3}}{2}} it is", r"\frac{\sqrt{3}}{2}", 1),
        (r"\boxed{\left\{ 1, 2 \right\}}", r"\{2, 1\}", 1),
        (r"first \boxed{3}, no: \boxed{4}", "4", 1),
        (r"first \boxed{3}, no: \boxed{4}", "3", 0),
        (r"\boxed{4} and then \boxed{5", "4", 1),
        (r"#### 3 but really \boxed{4}", 4, 1),
        (r"\boxed{}", "4", 0),
        ("2 + 2 = 4\n#### 4", 4, 1),
        ("#### 4\nIs that right?", 4.0, 1),
        ("#### 4", "He adds 2 and 2.\n#### 4", 1),
        ("#### 1,234,567", 1234567, 1),
        ("#### $1,234.50.", "1234.5", 1),
        ("#### -7", "-7", 1),
        ("#### 7", "-7", 0),
        ("#### -$7", "-7", 1),
        ("#### 0.1", "1/10", 1),
        ("#### 18 dollars", "18", 1),
        (r"\boxed{18 \text{ dollars}}", "18", 1),
        (r"\boxed{10 cm}", r"10 \text{ cm}", 1),
        ("#### 50%", "50", 1),
        ("#### 50%", r"\frac{1}{2}", 1),
        ("#### 50%", "0.5", 1),
        ("#### 0.5", r"50\%", 1),
        ("#### 50%", "5000%", 0),
        ("The final answer is 18.", "18", 1),
        ("There were 3, now the answer is 4", "4", 1),
        (r"The answer is $\frac{3}{4}$.", "0.75", 1),
        (r"\boxed{\text{Evelyn}}", r"\text{Evelyn}", 1),
        (r"\boxed{\text{Carla}}", r"\text{Evelyn}", 0),
        (r"\boxed{x+1}", "1+x", 1),
        (r"\boxed{(3, \frac{\pi}{2})}", r"\left( 3, \frac{\pi}{2} \right)", 1),
        (r"\boxed{(\frac{\pi}{2}, 3)}", r"\left( 3, \frac{\pi}{2} \right)", 0),
        ("I cannot say", "4", 0),
        ("", "4", 0),
        ("#### 4", "", None),
        ("#### 4", None, None),
        ("#### 4", float("nan"), None),
        ("#### 4", "nobody knows it", 0),
        ("#### Nobody knows it.", "nobody knows it", 1),
    ],
)
def test_math_answer(completion: str, gold: Any, value: float | None) -> None:
    assert scores("math-answer", [completion], answer=[gold]) == [value]
    assert scores("math-answer", [said(completion)], answer=[gold]) == [value]


def test_math_answer_reads_the_column_it_is_told() -> None:
    assert scores({"name": "math-answer", "column": "solution"}, ["#### 4"], solution=["4"]) == [1.0]
    with pytest.raises(UserError, match="reward 'math-answer' needs the column 'answer'"):
        scores("math-answer", ["#### 4"], solution=["4"])


def test_math_answer_works_in_a_thread() -> None:
    found: list[float | None] = []
    thread = threading.Thread(
        target=lambda: found.extend(scores("math-answer", [r"\boxed{\frac12}"] * 2, answer=["0.5", r"\frac13"]))
    )
    thread.start()
    thread.join()
    assert found == [1.0, 0.0]


@pytest.mark.slow
@pytest.mark.parametrize("file", ["data/gsm8k/train.jsonl", "data/gsm8k/test.jsonl"])
def test_math_answer_on_gsm8k(file: str) -> None:
    answers = [row["answer"] for row in rows(file)]
    finals = [answer.rpartition("####")[2].strip() for answer in answers]
    assert set(scores("math-answer", answers, answer=answers)) == {1.0}
    assert set(scores("math-answer", [rf"Thus \boxed{{{f}}}." for f in finals], answer=answers)) == {1.0}
    assert set(scores("math-answer", [f"#### {f}1" for f in finals], answer=answers)) == {0.0}


def test_math_answer_on_aime24() -> None:
    answers = [row["answer"] for row in rows("data/aime24/test.jsonl")]
    assert set(scores("math-answer", [f"The answer is ${a}$." for a in answers], answer=answers)) == {1.0}
    assert set(scores("math-answer", ["#### 1000"] * len(answers), answer=answers)) == {0.0}


# Held against people's grades, and against math-verify


def plain_math_verify(completion: str, gold: Any) -> float:
    from math_verify import parse, verify

    return float(verify(parse(str(gold)), parse(completion)))


@pytest.mark.slow
def test_grades_that_people_found_wrong() -> None:
    triples = rows("cases/82-grading-triples/triples.jsonl")
    found = [score(triple["completion"], triple["answer"]) for triple in triples]
    wrong = [(t["answer"], t["completion"]) for t, value in zip(triples, found, strict=True) if value != t["expected"]]
    assert wrong == []


WRITTEN: dict[str, Callable[[str], str]] = {
    "boxed": lambda answer: rf"So it is \boxed{{{answer}}}.",
    "announced": lambda answer: f"The final answer is ${answer}$. I hope it is correct.",
    "at the end": lambda answer: f"We add them all.\nThus we find ${answer}$.",
    "tagged": lambda answer: f"<think>7 or 8?</think> <answer>{answer}</answer>",
    "hashes": lambda answer: f"#### {answer}",
}


@pytest.mark.slow
@pytest.mark.parametrize("written", list(WRITTEN))
def test_never_wrong_where_math_verify_is_right(written: str) -> None:
    """Right answers are those of the problem, wrong ones those of the next problem that has another."""
    answers = [row["answer"] for row in rows("data/math500/test.jsonl") + rows("data/aime24/test.jsonl")]
    for gold, other in zip(answers, answers[1:] + answers[:1], strict=True):
        right = WRITTEN[written](gold)
        value = score(right, gold)
        assert value == 1 or plain_math_verify(right, gold) == 0, (right, gold)
        wrong = WRITTEN[written](other)
        assert score(wrong, gold) == (gold == other) or plain_math_verify(wrong, gold) == 1, (wrong, gold)


def test_math500_solutions() -> None:
    problems = rows("data/math500/test.jsonl")
    answers, solutions = [p["answer"] for p in problems], [p["solution"] for p in problems]
    assert set(scores("math-answer", solutions, answer=answers)) == {1.0}
    swapped = scores("math-answer", solutions[1:], answer=answers[:-1])
    alike = [(a, b) for a, b, value in zip(answers, answers[1:], swapped, strict=False) if value == 1 and a != b]
    assert alike == [("5", "x=5")]


@pytest.mark.slow
def test_graded_solutions_of_gpt3() -> None:
    graded = [
        (row["ground_truth"], row[model]["solution"], row[model]["is_correct"])
        for row in rows("data/gsm8k-graded/solutions.jsonl")[::5]
        for model in ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")
    ]
    golds, completions, grades = (list(column) for column in zip(*graded, strict=True))
    assert scores("math-answer", completions, answer=golds) == [float(grade) for grade in grades]


# What takes too long, or cannot be read


@pytest.mark.parametrize(
    "answer",
    [
        "9^9^9^9",
        "10^{10^{10}}",
        "((9^{99})^{999})^{9999}",
        "(10^5)!",
        "99999!",
        "3!!!!",
        "9" * 5000,
        "1." + "3" * 5000,
        "1e999999999",
        "10^{-999999999}",
        r"\binom{1000000}{500000}",
        r"\frac{1}{" * 60 + "2" + "}" * 60,
        "{" * 3000 + "6" + "}" * 3000,
        "(" * 200 + "6" + ")" * 200,
        r"\boxed{" * 1000 + "6" + "}" * 1000,
        r"\boxed{" * 20_000,
        "<answer>" * 5000,
        "$" * 5000,
        "6" + " " * 100_000,
        "the answer is " * 5000,
        ", ".join(map(str, range(3000))),
        r"\prod_{k=1}^{5000} \sin(k)",
        "(x+1)^{10000}",
        "=6" * 2000,
        "2 " + "abcdefghij" * 6 + "!",
    ],
    ids=lambda answer: f"{answer[:20]}-{len(answer)}",
)
def test_no_answer_takes_long(answer: str) -> None:
    score(r"\boxed{x + 1}", "1 + x")  # imports sympy
    for completion in (rf"It is \boxed{{{answer}}}.", f"The answer is ${answer}$.", answer):
        started = time.process_time()
        assert score(completion, r"5 + \sqrt{2}") == 0
        assert time.process_time() - started < 20, "minutes, without bounds"


@pytest.mark.slow
def test_no_grade_depends_on_how_busy_the_machine_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """A comparison that waits ten times its limit, as beside other programs, and then computes for a moment."""
    read, limit = _symbols._parsed, 0.05

    def slow(text: str) -> Any:
        time.sleep(5 * limit)
        return read(text)

    score(r"\boxed{x + 1}", "1 + x")  # imports sympy
    read("a + 7 b"), read("7 b + a")
    monkeypatch.setattr(_symbols, "SECONDS", limit)
    monkeypatch.setattr(_symbols, "_parsed", slow)
    assert score(r"\boxed{7 b + a}", "a + 7 b") == 1


def test_a_comparison_without_end_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that catches what stops it, once."""

    def busy(text: str) -> None:
        with contextlib.suppress(BaseException):
            while True:
                pass
        while True:
            pass

    monkeypatch.setattr(_symbols, "SECONDS", 0.05)
    monkeypatch.setattr(_symbols, "_parsed", busy)
    assert score(r"\boxed{9 b + a}", "a + 9 b") == 0


@pytest.mark.parametrize("sign", ["\x00", "\ud800", "\udfff", "\u202e", "\u200b", "\ufeff", "\U0001f600", "\\"])
def test_no_sign_is_an_error(sign: str) -> None:
    for text in (sign, f"6{sign}", f"{sign}6", sign * 2000):
        for gold in ("5", f"5{sign}", r"\sqrt{2}", "Tom"):
            assert {name: score(write(text), gold) for name, write in WRITTEN.items()} == dict.fromkeys(WRITTEN, 0)


@pytest.mark.slow
def test_no_notation_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names, numbers and signs, on both sides of all that joins them."""
    monkeypatch.setattr(_symbols, "_equal", lambda *_: False)
    sides = ("P", "n", "5", "-1", r"\frac12", "{", "(5, 2)")
    joints = [r"\choose ", "_", "^", "/", ":", "=", "-", "C", "P_", ",", ".", "e", " of ", " to ", " and ", "_5^"]
    joints += [r"\times 10^", "年", "月", "万", r"\overline{3}", r"\approx ", r"\in ", "!", "(", "*", "°", "'"]
    texts = [rf"\boxed{{{one}{joint}{other}}}" for one in sides for joint in joints for other in sides]
    assert set(scores("math-answer", texts, answer=[r"\sqrt{777} + 1"] * len(texts))) == {0.0}


@pytest.mark.slow
@pytest.mark.usefixtures("sketched")
def test_commands_count_the_samples_without_a_reward(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlzoo.comparison.runner.pool", inline_pool)
    problems = tmp_path / "problems.jsonl"
    problems.write_text(
        '{"question": "What is 2+2?", "answer": "4"}\n{"question": "And 2+3?", "answer": null}\n', encoding="utf-8"
    )
    source = {"source": str(problems), "prompt": "question"}
    settings = {
        "name": "nulls",
        "model": "embedded",
        "reward": "math-answer",
        "train": {**source, "solution": "question"},
        "benchmarks": {"mine": source},
        "rollouts": {"samples": 2, "max_new_tokens": 2},
        "evaluation": {"samples": 3, "k": 1, "max_new_tokens": 2, "curve_points": 0},
        "training": {"steps": 1, "batch_size": 2},
        "seeds": [0],
        "algorithms": {"sft": {}, "dpo": {}},
    }
    file = tmp_path / "nulls.yaml"
    file.write_text(json.dumps(settings), encoding="utf-8")

    assert main(["rollout", str(file), "--out", str(tmp_path / "buffer")]) == 0
    missing = "the reward returned None, as it does for a missing gold answer); the first has the prompt 'And 2+3?'"
    assert f"2 of 4 samples have no reward ({missing}\n" in capsys.readouterr().out
    assert main(["evaluate", str(file)]) == 0
    assert f"mine: 4 of 8 samples have no reward ({missing}; they count as wrong\n" in capsys.readouterr().err
    lines = io.StringIO()
    compare(load_experiment(str(file)), tmp_path / "out", 1, console=Console(file=lines, width=500))
    assert f"shared buffer: 2 of 4 samples have no reward ({missing}" in lines.getvalue()
    assert f"evaluation: 8 of 16 samples have no reward ({missing}; they count as wrong" in lines.getvalue()


def test_rows_without_a_gold_answer_are_counted() -> None:
    golds = ["4", None, float("nan"), " ", [], ["4", None]]
    with pytest.warns(
        UserWarning, match="5 of 6 rows have no gold answer in column 'answer'.* the first is row 1, None"
    ):
        values = scores("math-answer", ["#### 4"] * 6, answer=golds)
    assert values == [1.0, None, None, None, None, None]


@pytest.mark.parametrize("gold", [{"ground_truth": "5", "style": "rule"}, ["5", {"ground_truth": "5"}], b"5"])
def test_a_gold_answer_that_is_no_text_is_refused(gold: Any) -> None:
    with pytest.raises(
        UserError, match=r"on row 1: TypeError: the gold answer is (dict|bytes), .*reward_model.ground_truth"
    ):
        scores("math-answer", ["#### 5"] * 2, answer=["5", gold])


# What is equal to what


def wrong_rows(file: str, written: str = "{}") -> list[str]:
    """The rows of a table that are not worth what they should be."""
    found = [(gold, text, value, score(written.format(text), gold)) for gold, text, value in table(file)]
    return [f"{gold}  {text!r}  {got} for {value}" for gold, text, value, got in found if got != value]


@pytest.mark.slow
def test_what_a_box_is_worth() -> None:
    assert len(table("math_boxes.txt")) > 700
    assert wrong_rows("math_boxes.txt", r"The answer is $\boxed{{{}}}$.") == []


@pytest.mark.parametrize(
    ("gold", "boxed", "value"),
    [
        (1000.0, "1000", 1),
        (1000.0, "1,000", 1),
        (1e21, "10^{21}", 1),
        (1e21, "10^{20}", 0),
        (0.1 + 0.2, "0.3", 1),
        (0.1 + 0.2, "0.31", 0),
        (1e-7, "10^{-7}", 1),
        (1e-7, "0", 0),
        (1e-7, "2e-7", 0),
        ("5", "", 0),
        ("5", " 5\n", 1),
    ],
)
def test_what_a_box_is_worth_for_numbers(gold: Any, boxed: str, value: float) -> None:
    assert score(rf"The answer is $\boxed{{{boxed}}}$.", gold) == value


# What is the final answer


@pytest.mark.slow
def test_where_the_final_answer_is() -> None:
    assert len(table("math_completions.txt")) > 100
    assert wrong_rows("math_completions.txt") == []


JOINS = (
    *(" or ", ", ", "; ", " and ", " / ", " | ", " & ", " to ", "–", "~", " of ", " vs ", "\n", "\n\n", "\n- "),
    *(" or maybe ", ", or ", ", maybe ", " or else ", ", then ", ", not sure, maybe ", ", but perhaps ", " otherwise "),
    *(". Or ", ". Maybe ", "? ", ". Alternatively, ", ". Another option: "),
    *(
        " und ",
        " oder ",
        " ou ",
        " o ",
        " y ",
        " или ",
        "或",
        "、",
        "或者",
        " または ",
        " 또는 ",
        " أو ",
        " lub ",
        " nebo ",
    ),
    *(" eller ", " ya da ", " hoặc ", " atau ", " หรือ ", " या "),
)
AROUND = (
    *(
        "{}",
        "The answer is {}.",
        "Answer: {}",
        r"\boxed{{{}}}",
        r"\boxed{{\text{{{}}}}}",
        "<answer>{}</answer>",
        "#### {}",
    ),
    *("The final answer is ${}$.", "答案是{}。", "La respuesta es {}.", "Die Antwort ist {}.", "La réponse est {}."),
)


@pytest.mark.parametrize("around", AROUND)
def test_listing_candidates_earns_nothing(around: str) -> None:
    for one, other in (("7", "8"), ("1/2", "1/3"), ("A", "C")):
        listed = [around.format(f"{one}{join}{other}") for join in JOINS]
        paid = [scores("math-answer", listed, answer=[gold] * len(listed)) for gold in (one, other)]
        assert [text for text, *values in zip(listed, *paid, strict=True) if any(values)] == []


def test_a_thread_without_time_limits_takes_no_longer() -> None:
    score(r"\boxed{x + 1}", "1 + x")  # imports sympy
    found: list[float | None] = []
    answers = [r"\prod_{k=1}^{900} \sin(k)", r"\int_0^1 e^{-x^2} \sin(x^3) dx", "(x+1)^{10000}", r"\frac{\sqrt{8}}{2}"]
    boxed = [rf"\boxed{{{answer}}}" for answer in answers]
    thread = threading.Thread(target=lambda: found.extend(scores("math-answer", boxed, answer=[r"\sqrt{2}"] * 4)))
    started = time.process_time()
    thread.start()
    thread.join()
    assert found == [0.0, 0.0, 0.0, 1.0]
    assert time.process_time() - started < 20, "minutes, without bounds"


@pytest.mark.parametrize(
    ("gold", "completion", "value"),
    [
        (["2"], r"\boxed{2}", 1),
        ([r"$\frac{1}{2}$"], r"\boxed{\frac12}", 1),
        (["3", "5"], r"\boxed{3, 5}", 1),
        (["3", "5"], r"$\boxed{5}$ and $\boxed{3}$", 1),
        (["3", "5"], r"\boxed{3}", 0),
        (["3", "5"], r"\boxed{3, 5, 7}", 0),
        (["$x=1$", "$x=2$"], "x=1", 0),
        (["$x=1$", "$x=2$"], r"\boxed{1, 2}", 1),
        (["(1,2)", "(3,4)"], r"\boxed{(3,4), (1,2)}", 1),
        (("3", 5), r"\boxed{3, 5}", 1),
        ({"3", "5"}, r"\boxed{3, 5}", 1),
        ({"3", "5"}, r"\boxed{3}", 0),
        (True, r"\boxed{True}", 1),
        (True, r"\boxed{False}", 0),
    ],
)
def test_lists_of_gold_answers_ask_for_all_of_them(gold: Any, completion: str, value: float) -> None:
    assert score(completion, gold) == value


def test_only_marks_count_where_they_are_demanded() -> None:
    marked = get_reward({"name": "math-answer", "marked": True})
    completions = [
        "The answer is 5",
        "5",
        "<answer>5</answer>",
        "<answer> $5$",
        "#### 5",
        r"\boxed{5}",
        "<answer>4</answer>",
    ]
    assert marked(["q"] * 7, completions, answer=["5"] * 7) == [0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 0.0]
