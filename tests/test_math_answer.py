"""The mathematics reward: what counts as the final answer, which answers are equal, and what earns nothing."""

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlzoo.errors import UserError
from rlzoo.reward import get_reward

SHARED = Path(__file__).resolve().parents[2] / "shared"


def scores(spec: Any, completions: list[Any], **columns: Any) -> list[float | None]:
    return get_reward(spec)(["q"] * len(completions), completions, **columns)


def score(completion: str, gold: Any) -> float | None:
    return scores("math-answer", [completion], answer=[gold])[0]


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
        ("#### 3\n#### 4\nIs that right?", 4.0, 1),
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


def test_math_answer_may_demand_a_mark() -> None:
    completions = ["so 20 or so", "#### 20", r"\boxed{\frac{40}{2}}", "so 20", "#### 3"]
    golds = ["20", "20", "20", "", "#### 3"]
    demanding = get_reward({"name": "math-answer", "marked": True})
    assert demanding([""] * 5, completions, answer=golds) == [0.0, 1.0, 1.0, None, 1.0]
    assert get_reward("math-answer")([""] * 5, completions, answer=golds)[0] == 1.0


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


@pytest.mark.parametrize("file", ["data/gsm8k/train.jsonl", "data/gsm8k/test.jsonl"])
def test_math_answer_on_gsm8k(file: str) -> None:
    answers = [row["answer"] for row in rows(file)]
    finals = [answer.rpartition("####")[2].strip() for answer in answers]
    assert set(scores("math-answer", answers, answer=answers)) == {1.0}
    assert set(scores("math-answer", [rf"Thus \boxed{{{f}}}." for f in finals], answer=answers)) == {1.0}
    assert set(scores("math-answer", [f"#### {f}1" for f in finals], answer=answers)) == {0.0}


def test_math_answer_on_math500() -> None:
    problems = rows("data/math500/test.jsonl")
    answers = [p["answer"] for p in problems]
    right = scores("math-answer", [p["solution"] for p in problems], answer=answers)
    assert None not in right
    share = sum(value == 1 for value in right) / len(right)
    assert share >= 0.97, f"{share:.3f} of MATH-500's solutions agree with their answers"  # 1.000 as of math-verify 0.9
    swapped = scores("math-answer", [p["solution"] for p in problems[:100]], answer=answers[1:101])
    same = sum(value == 1 for value in swapped) / len(swapped)
    assert same <= 0.05, f"{same:.3f} of MATH-500's solutions agree with the next problem's answer"


def test_math_answer_on_aime24() -> None:
    answers = [row["answer"] for row in rows("data/aime24/test.jsonl")]
    assert set(scores("math-answer", [f"The answer is ${a}$." for a in answers], answer=answers)) == {1.0}
    assert set(scores("math-answer", ["#### 1000"] * len(answers), answer=answers)) == {0.0}


# Held against people's grades, and against math-verify


def plain_math_verify(completion: str, gold: Any) -> float:
    from math_verify import parse, verify

    return float(verify(parse(str(gold)), parse(completion)))


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
    ],
    ids=lambda answer: f"{answer[:20]}-{len(answer)}",
)
def test_no_answer_takes_long(answer: str) -> None:
    score(r"\boxed{x + 1}", "1 + x")  # imports sympy
    for completion in (rf"It is \boxed{{{answer}}}.", f"The answer is ${answer}$.", answer):
        started = time.perf_counter()
        assert score(completion, r"5 + \sqrt{2}") == 0
        assert time.perf_counter() - started < 4


def test_rows_without_a_gold_answer_are_counted() -> None:
    golds = ["4", None, float("nan"), " ", [], ["4", None]]
    with pytest.warns(
        UserWarning, match="5 of 6 rows have no gold answer in column 'answer'.* the first is row 1, None"
    ):
        values = scores("math-answer", ["#### 4"] * 6, answer=golds)
    assert values == [1.0, None, None, None, None, None]


# What is equal to what


@pytest.mark.parametrize(
    ("gold", "boxed", "value"),
    [
        ("1010_2", "1010", 1),
        ("1010_2", "1010_3", 0),
        ("1010_2", "10", 0),
        ("52_8", "52_{8}", 1),
        ("52_8", "52_7", 0),
        ("A", "A. 5", 1),
        ("A", "(A) 5", 1),
        ("A", "A) 5", 1),
        ("A", r"\textbf{(A)}\ 5", 1),
        ("A", "A or B", 0),
        ("A", "A, B", 0),
        ("A", "A. 5 or B. 6", 0),
        ("A", "(A) or (B)", 0),
        ("(A)", "A", 1),
        (r"\textbf{(A) } 5", "A", 1),
        (r"\textbf{(A) } 5", "5", 1),
        (r"\textbf{(A) } 5", "B", 0),
        ("A", "Option A", 1),
        ("C", "B", 0),
        ("D", "d", 0),
        ("9 (apples)", "9", 1),
        ("9 (apples)", "9 apples", 1),
        ("9 (apples)", "9 apple", 1),
        ("9 (apples)", "9 oranges", 0),
        ("9 (apples)", "10 apples", 0),
        ("10 (miles/hour)", "10 mph", 1),
        ("10 (miles/hour)", r"10 \text{ miles per hour}", 1),
        ("10 (miles/hour)", "10 km/h", 0),
        ("5:30 (PM)", "5:30", 1),
        ("5:30 (PM)", "5:30 PM", 1),
        ("5:30 (PM)", "5:30 p.m.", 1),
        ("5:30 (PM)", "5:30 AM", 0),
        ("5:30 (PM)", "5:31", 0),
        (r"5 \text{ cm}", "5 m", 0),
        (r"5 \text{ cm}", "5 centimeters", 1),
        ("5 cm", "5", 1),
        (r"5 \text{ cm}^2", r"5 \text{ cm}^3", 0),
        (r"5 \text{ cm}^2", "5 square centimeters", 1),
        ("$5", "5 cents", 0),
        ("$5", "5 dollars", 1),
        ("5", r"\$5.00", 1),
        ("5", "€5", 1),
        ("0.5", "50 cents", 0),
        ("1000.0", "1000", 1),
        (1000.0, "1000", 1),
        (1000.0, "1,000", 1),
        (1e21, "10^{21}", 1),
        (1e21, "10^{20}", 0),
        (0.30000000000000004, "0.3", 1),
        (0.30000000000000004, "0.31", 0),
        (1e-07, "10^{-7}", 1),
        (1e-07, "0", 0),
        (1e-07, "2e-7", 0),
        ("1000.99", "1000,99", 1),
        ("1.5", "1,5", 1),
        ("3,5", "3.5", 0),
        ("1.234", "1,234", 0),
        ("1234", "1.234", 0),
        ("1234.56", "1.234,56", 1),
        ("1000,99", "1000.99", 0),
        ("1234", "1 234", 1),
        ("1234567", "1 234 567", 1),
        ("1234", "1{,}234", 1),
        ("1234", "1'234", 1),
        ("3,5,7", "357", 0),
        ("357", "3,5,7", 0),
        ("12", "1 2", 0),
        ("7", "3 4", 0),
        ("12", "3 4", 0),
        ("1/2", "0.5", 1),
        ("1/3", "0.333333", 1),
        ("1/3", "0.3333", 0),
        ("1/3", "0.33", 0),
        ("2/3", "0.667", 0),
        ("0.333", "1/3", 0),
        ("5.5", r"5\frac{1}{2}", 1),
        ("5.5", "5 1/2", 1),
        ("5.5", "5½", 1),
        ("-5.5", r"-5\frac12", 1),
        (r"50\%", "0.5", 1),
        (r"50\%", "50", 1),
        ("50", r"50\%", 1),
        ("50", r"0.5\%", 0),
        ("0.5", r"0.5\%", 0),
        ("0.1", "10 percent", 1),
        (r"10\%", "0.1", 1),
        ("0.005", r"0.5\%", 1),
        ("3:4", "3/4", 1),
        ("3:4", "6:8", 1),
        ("3:4", "4:3", 0),
        ("3:4", "3:5", 0),
        ("3:45", "3:46", 0),
        ("1:2:3", "2:4:6", 1),
        ("1:2:3", "1:2:4", 0),
        (r"30^\circ", "30", 1),
        ("30", "30°", 1),
        ("30", "30 degrees", 1),
        (r"30^\circ", r"31^\circ", 0),
        ("14", "14th", 1),
        ("2", "2nd", 1),
        ("2", r"2^{\text{nd}}", 1),
        ("4", "4 = 4", 1),
        ("4", "3 = 4", 0),
        ("8", "5+3=8", 1),
        ("9", "5+3=8", 0),
        ("6", "3x+2y=6", 0),
        ("10", "2x=10", 0),
        ("5", "a+b=5", 1),
        ("4", "x^2=4", 0),
        ("5", "|AB| = 5", 1),
        ("0", "x-y+3=0", 0),
        ("5", r"x \in \mathbb{R}", 0),
        ("5", r"x \in \{4,5\}", 0),
        ("5", "[1,10]", 0),
        ("5", "(0,10)", 0),
        ("5", "1-10", 0),
        ("10", "1-10", 0),
        ("10", "1 to 10", 0),
        ("5", r"x \ge 5", 0),
        ("5", r"\le 5", 0),
        ("5", r"\ge 5", 0),
        ("5", "> 4", 0),
        ("5", r"\pm 5", 0),
        ("5", r"5 \pm 1", 0),
        ("3", r"2 \pm 1", 0),
        ("1,3", r"2 \pm 1", 1),
        ("5", "5 or more", 0),
        ("5", "at least 5", 0),
        ("5", "more than 5", 0),
        ("5", "not 5", 0),
        ("5", r"\neq 5", 0),
        ("5", r"\text{not } 5", 0),
        ("5", r"x \ne 5", 0),
        ("5", r"5 \text{ or } 6", 0),
        ("5", "5; 6", 0),
        ("5", "5 and 6", 0),
        ("5", "5/6", 0),
        ("5", r"5 \quad 6", 0),
        ("5", "5, 5", 1),
        ("5", r"\{5\}", 1),
        ("5", "(5)", 1),
        ("5", "5!", 0),
        ("5", "5?", 1),
        ("5", "5...", 0),
        ("5", r"5, \ldots", 0),
        ("5", "x", 0),
        ("5", "", 0),
        ("5", "?", 0),
        ("5", r"\text{any number}", 0),
        ("5", "What is 2+3?", 0),
        ("5", "2+3", 1),
        ("5", "n", 0),
        ("5", "five", 0),
        ("5", r"\infty", 0),
        ("5", r"5\ \text{or}\ 6", 0),
        ("5", r"5 \lor 6", 0),
        ("5", r"\max(5,6)", 0),
        ("5", r"\frac{5}{1}", 1),
        ("5", "5.0", 1),
        ("5", "05", 1),
        ("5", "+5", 1),
        ("-5", "5", 0),
        ("5", r"\boxed{5}", 1),
        ("5", r"\text{5}", 1),
        ("5", r"5 \text{ units}", 1),
        ("5", "5 units", 1),
        ("5", "5x", 0),
        ("5", "5 xy", 0),
        ("5", "5 abc", 0),
        ("5", "5n", 0),
        ("5x", "5", 0),
        ("5 ab", "5", 0),
        ("(1,2)", "1,2", 1),
        ("(1,2)", "(2,1)", 0),
        ("(1,2)", "2,1", 0),
        (r"\{1,2\}", r"\{2,1\}", 1),
        (r"\{1,2\}", "(1,2)", 0),
        ("(1,2)", r"\{1,2\}", 0),
        ("[1,2]", "(1,2)", 0),
        ("(1,2]", "[1,2)", 0),
        ("(0,1)", "(0,1.5)", 0),
        ("D=(0,1)", "(0,1)", 1),
        ("(0,1)", "0<x<1", 1),
        (r"(-\infty,2)", "x<2", 1),
        ("x<2", r"(-\infty,2)", 1),
        ("x<2", r"x \le 2", 0),
        ("x<2", "x>2", 0),
        ("(2,3)", "(2,3),(4,5)", 0),
        ("(1,2),(3,4)", "(3,4),(1,2)", 1),
        ("(1,2),(3,4)", "(1,2)", 0),
        ("(1,2),(3,4)", "(2,1),(3,4)", 0),
        ("1", "1,2", 0),
        ("x=1,y=2", "(1,2)", 1),
        ("x=1,y=2", "y=2,x=1", 1),
        ("x=1,y=2", "x=2,y=1", 0),
        ("x=1,y=2", "2,1", 0),
        ("x=1,y=2", "1,2", 1),
        ("n=2,3,4", "n=1,2,3", 0),
        ("n=2,3,4", "2,3,4", 1),
        ("n=2,3,4", r"n \in \{2,3,4\}", 1),
        ("x=1 or x=2", "1,2", 1),
        (r"a=1 \text{ or } a=-2", "a=-2, a=1", 1),
        ("x=5", "y=5", 0),
        ("x=5", "5", 1),
        ("y=2x+3", "2x+3", 1),
        ("y=2x+3", "y=2x+4", 0),
        ("y=2x+3", "2x-y=-3", 1),
        ("y = 2x+3", "3+2x=y", 1),
        (r"\sqrt{2}", "1.41421356", 1),
        (r"\sqrt{2}", "1.414", 0),
        (r"\sqrt{2}", r"\sqrt{2} \approx 1.41", 1),
        ("3", r"3 \approx 4", 1),
        ("4", r"3 \approx 4", 0),
        ("3.14", r"x \approx 3.14", 1),
        (r"\frac{1}{2004!}", r"\frac{1}{2006!}", 0),
        ("10^{-20}", "10^{-21}", 0),
        ("2^{99}", "2^{98}", 0),
        ("2^{2005}+1", "2^{2005}", 0),
        ("1/3", "1/3+10^{-20}", 0),
        ("no solution", "No solutions", 0),
        ("No solution", r"\text{no solution}", 1),
        ("No solution", "There is no solution", 0),
        ("Quadrant I", "Quadrant II", 0),
        ("Brand B", "Brand A", 0),
        ("Brand B", "brand b", 1),
        ("Mrs. Hill", "Mrs Hill", 1),
        ("the red one", "red one", 1),
        ("on", "no", 0),
        ("east", "seat", 0),
        ("True", "true", 1),
        ("Tuesday", "Thursday", 0),
        ("even", "odd", 0),
        ("yes", "no", 0),
        ("yes", "Yes.", 1),
        ("Tom and Jerry", "Tom", 0),
        ("Tom and Jerry", "Jerry and Tom", 1),
        ("3x^2+2x", "2x+3x^2", 1),
        ("x^2", "x^3", 0),
        (r"\frac{x+1}{x}", r"1+\frac{1}{x}", 1),
        ("e^{2x}", "e^{x}", 0),
        (r"\ln 2", r"\log 2", 0),
        ("x+C", "x", 0),
        (r"2\sqrt3", "2√3", 1),
        (r"2\pi", "2*pi", 1),
        (r"2\pi", "6.28", 0),
        ("x**2", "x^2", 1),
        ("sqrt(2)", r"\sqrt{2}", 1),
        (r"25\pi \text{ cm}^2", r"25\pi", 1),
        (r"25\pi", r"25\pi cm^2", 1),
        (r"3\sqrt2", r"3\sqrt2 \text{ meters}", 1),
        (r"3\sqrt2 \text{ cm}", r"3\sqrt2 \text{ m}", 0),
        (r"\frac{3}{4}", r"\frac{6}{8}", 1),
        (r"\frac{3}{4}", "3/4", 1),
        (r"-\frac{3}{4}", r"\frac{-3}{4}", 1),
        (r"-\frac{3}{4}", "-3/4", 1),
        (r"-\frac34", r"\frac{3}{-4}", 1),
        (r"5 \text{ N}", "5", 1),
        ("5", r"5 \text{ N}", 1),
        ("5", r"5\mathrm{ m/s}", 1),
        ("5", r"5\,\mathrm{m/s}^2", 1),
        ("90", "90 minutes", 1),
        ("1.5 hours", "90 minutes", 0),
        ("20", r"\text{20 students}", 1),
        ("(2,3)", "x=2, y=3", 1),
        ("(2,3)", "(x,y)=(2,3)", 1),
        ("2,3", r"\text{2 and 3}", 1),
        (r"\mathbb{R}", r"(-\infty,\infty)", 1),
        (r"\emptyset", r"\varnothing", 1),
        ("0", r"\emptyset", 0),
        (r"2 \pmod 5", "2", 0),
        ("12", "12个", 1),
        ("12", "12个苹果", 1),
        ("12 个", "12", 1),
        ("三角形", "三角形。", 1),
        ("3/8", r"\dfrac{3}{8}", 1),
        (r"0.\overline{3}", "0.3", 0),
        ("100", "1e2", 1),
        ("100", r"1.0 \times 10^2", 1),
        ("100", "10^2", 1),
        ("6.02e23", r"6.02 \times 10^{23}", 1),
        ("0.000001", "1e-6", 1),
        ("12,15,18", "12, 15, 18", 1),
        ("1,000", "1000", 1),
        ("1,000,000", "1 million", 0),
        ("2", "2.0000001", 1),
        ("2", "2.00001", 0),
        ("2", "1.99", 0),
        ("x", "y", 0),
        ("10", "1010", 0),
        ("7", "7 o'clock", 1),
    ],
)
def test_what_a_box_is_worth(gold: Any, boxed: str, value: float) -> None:
    assert score(rf"The answer is $\boxed{{{boxed}}}$.", gold) == value


# What is the final answer


@pytest.mark.parametrize(
    ("gold", "completion", "value"),
    [
        ("9", "最终答案是9。", 1),
        ("9", "答案:9", 1),
        ("9", "答案：９", 1),
        ("9", "所以答案是 9 个。", 1),
        ("9", "La respuesta es 9", 1),
        ("9", "La respuesta final es 9 manzanas.", 1),
        ("9", "Die Antwort ist 9", 1),
        ("9", "Die Antwort lautet 9.", 1),
        ("9", "Das Ergebnis ist 9.", 1),
        ("9", "La réponse est 9", 1),
        ("9", "La réponse finale est : 9.", 1),
        ("9", "Ответ: 9", 1),
        ("9", "Ответ — 9.", 1),
        ("9", "Ответ равен 9", 1),
        ("9", "Правильный ответ: 9.", 1),
        ("9", "Resposta: 9", 1),
        ("9", "A resposta é 9.", 1),
        ("9", "答えは9です", 1),
        ("9", "答えは9です。", 1),
        ("9", "答え：９", 1),
        ("9", "정답은 9", 1),
        ("9", "정답은 9입니다.", 1),
        ("9", "답: 9개", 1),
        ("9", "La risposta è 9.", 1),
        ("9", "Het antwoord is 9.", 1),
        ("9", "Odpowiedź: 9", 1),
        ("9", "Odpowiedź to 9.", 1),
        ("9", "Odpověď je 9.", 1),
        ("9", "Svaret är 9.", 1),
        ("9", "Svaret er 9.", 1),
        ("9", "Cevap: 9", 1),
        ("9", "Cevap 9'dur.", 1),
        ("9", "Jawabannya adalah 9.", 1),
        ("9", "Đáp án là 9.", 1),
        ("9", "คำตอบคือ 9", 1),
        ("9", "उत्तर 9 है", 1),
        ("9", "उत्तर: ९", 1),
        ("9", "উত্তর হল ৯।", 1),
        ("9", "الإجابة هي 9", 1),
        ("9", "الجواب: ٩", 1),
        ("9", "Jibu ni 9.", 1),
        ("9", "సమాధానం 9.", 1),
        ("9", "Răspunsul este 9.", 1),
        ("9", "Η απάντηση είναι 9.", 1),
        ("9", "Відповідь: 9", 1),
        ("9", "A válasz 9.", 1),
        ("9", "Vastaus on 9.", 1),
        ("9", "התשובה היא 9", 1),
        ("8", "最终答案是9。", 0),
        ("8", "La respuesta es 9", 0),
        ("8", "答えは9です", 0),
        ("9", "La respuesta es 8 o 9", 0),
        ("9", "答案是8或9", 0),
        ("9", "Die Antwort ist 8 oder 9", 0),
        ("9", "答案是8和9", 0),
        ("9", "La réponse est 8 ou 9", 0),
        ("A", "The answer is A.", 1),
        ("A", "The answer is (A).", 1),
        ("A", "The correct answer is A.", 1),
        ("A", "The answer is B.", 0),
        ("A", "The answer is A or B.", 0),
        ("A", "Answer: A", 1),
        ("A", "答案选A", 1),
        ("A", "故选：A．", 1),
        ("A", "答案：B", 0),
        ("A", "The answer is **A**.", 1),
        ("A", "The answer is A. Because B is wrong.", 1),
        ("A", "The answer is option A.", 1),
        ("No solution", "The answer is No solution.", 1),
        ("Mrs. Hill", "The answer is Mrs. Hill.", 1),
        ("Brand B", "The answer is Brand A.", 0),
        ("They are equal", "The answer is: They are equal.", 1),
        ("Brand B", "Let us see.\n\nBrand B", 1),
        ("yes", "Answer: Yes.", 1),
        ("Tom", "So the answer is: Tom", 1),
        ("5", "The answer is therefore 5", 1),
        ("5", "The answer is: **5**", 1),
        ("5", "The answer is **5**.", 1),
        ("5", "The answer is $5$ because $3+2=5$.", 1),
        ("5", "The answer is 5 because 3+2=5.", 1),
        ("5", "The answer is 5 apples.", 1),
        ("5", "The answer is 8 - 3 = 5.", 1),
        ("5", "The answer is 8 - 3 = 5 apples.", 1),
        ("5", "The answer is 5, since 3 + 2 = 5.", 1),
        ("5", "The answer to question 3 is 5.", 1),
        ("5", "The answer would be 5.", 1),
        ("5", "The answer comes out to $5.", 1),
        ("5", r"The final answer is $\boxed{5}$.", 1),
        ("5", "Answer:\n5", 1),
        ("5", "Answer: \n\n$$5$$", 1),
        ("5", "**Final Answer**\n\n5", 1),
        ("5", "## Answer\n\n5", 1),
        ("5", "#### Final Answer\n\nThe answer is 5.", 1),
        ("5", "#### Step 3: add 4\nThe answer is 5", 1),
        ("5", "Final answer: x = 5", 1),
        ("5", "Answer = 5", 1),
        ("5", "Ans: 5", 1),
        ("5", "A: 5", 1),
        ("5", "The answer is 5 or 6.", 0),
        ("6", "The answer is 5 or 6.", 0),
        ("5", "The answer is either 5 or 6.", 0),
        ("5", "The answer is between 4 and 5.", 0),
        ("5", "The answer is less than 5.", 0),
        ("5", "The answer is at least 5.", 0),
        ("5", "The answer is not 5.", 0),
        ("5", "The answer could be 1, 2, 3, 4 or 5.", 0),
        ("5", "It is 1 or 2 or 3 or 4 or 5", 0),
        ("5", "1, 2, 3, 4, 5", 0),
        ("5", "The answer is 1 2 3 4 5", 0),
        ("5", "4 and 5", 0),
        ("12", "The answer is 12 apples in 3 baskets.", 1),
        ("5", "The answer is 5. I am sure the answer is correct.", 1),
        ("5", "So he has 5 apples.", 1),
        ("5", "So he has 5 apples left", 1),
        ("5", "x = 5", 1),
        ("5", "Therefore, $x = 5$.", 1),
        ("5", "Thus x=5 or x=6.", 0),
        ("5", "5", 1),
        ("5", "5.", 1),
        ("5", "five", 0),
        ("70000", "He made $200,000 - $130,000 = $70,000.", 1),
        ("18", "She makes 9 * 2 = $<<9*2=18>>18 every day", 1),
        ("0.75", r"The answer is $\frac{3}{4}$.", 1),
        ("3/4", r"So we get \frac{3}{4}", 1),
        ("5", "<answer>4</answer><answer>5</answer>", 0),
        ("5", r"\boxed{4} or \boxed{5}", 0),
        ("4", r"\boxed{4} or \boxed{5}", 0),
        ("5", r"\boxed{4}\boxed{5}", 0),
        ("5", "$\\boxed{4}$\n\n$\\boxed{5}$", 0),
        ("5", r"<think>\boxed{4}</think><answer>5</answer>", 1),
        ("4", r"<think>\boxed{4}</think><answer>5</answer>", 0),
        ("5", r"<answer>5</answer> \boxed{6}", 0),
        ("6", r"<answer>5</answer> \boxed{6}", 0),
        ("5", r"<answer>5</answer> so finally we have \boxed{6}", 0),
        ("5", r"<think>hm \boxed{5}</think>", 1),
        ("5", "<think>so 5</think> The answer is 6", 0),
        ("5", "<think>so 6</think> The answer is 5", 1),
        ("5", "<answer>5", 1),
        ("5", "<answer>#### 5</answer>", 1),
        ("5", "<Answer>5</Answer>", 1),
        ("5", "I put it in <answer> tags: <answer>5</answer>", 1),
        ("5", r"<answer>\boxed{4} \boxed{5}</answer>", 0),
        ("5", r"#### \boxed{5}", 1),
        ("5", "\\boxed{5}\n#### 5", 1),
        ("5", r"\boxed{\boxed{5}}", 1),
        ("5", r"\fbox{5}", 1),
        ("5", r"\boxed{x = \boxed{5}}", 1),
        ("5", r"\boxed{5", 1),
        ("5", r"first \boxed{3}, no: \boxed{5}", 1),
        ("3", r"first \boxed{3}, no: \boxed{5}", 0),
        ("3,5", r"One root is \boxed{3} and the other root is \boxed{5}.", 1),
        ("5", r"One root is \boxed{3} and the other root is \boxed{5}.", 0),
        ("(3,5)", r"x = \boxed{3}, y = \boxed{5}", 1),
        ("5", r"$x$ = \boxed{3}, $y$ = \boxed{5}", 0),
        ("0.5", r"\boxed{\frac12} = \boxed{0.5}", 1),
        ("0.5", r"\boxed{\frac12} or \boxed{0.5}", 1),
    ],
)
def test_where_the_final_answer_is(gold: Any, completion: str, value: float) -> None:
    assert score(completion, gold) == value
