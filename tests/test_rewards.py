"""The rewards: what each is worth on answers written by hand, how they are found, and how they fail."""

import asyncio
import functools
import inspect
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlzoo.errors import UserError
from rlzoo.registry import Registry
from rlzoo.reward import Reward, Score, get_reward, list_rewards, register_reward
from rlzoo.testing import check_reward


def scores(spec: Any, completions: list[Any], **columns: Any) -> list[float | None]:
    return get_reward(spec)(["q"] * len(completions), completions, **columns)


def said(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


# Finding a reward


def test_list_rewards() -> None:
    built_in = {
        "exact-match",
        "format",
        "inspect-task",
        "length",
        "math-answer",
        "overlong",
        "reasoning-gym",
        "weighted",
    }
    assert built_in <= set(list_rewards())


def test_importing_the_rewards_imports_nothing_heavy() -> None:
    code = (
        "import sys; from rlzoo.reward import list_rewards; list_rewards();"
        "print(*{'torch', 'sympy', 'math_verify', 'reasoning_gym', 'inspect_ai', 'trl'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


TEN_LINES = '''
import re

def shout(completions, least=2, **columns):
    """1 for a completion with enough exclamation marks."""
    return [float(c.count("!") >= least) for c in completions]

def alone(completions):
    return [len(c) for c in completions]

from rlzoo.reward import get_reward
both = get_reward([shout, alone])

class Scale:
    def __init__(self, by: float = 1.0):
        self.by = by
    def __call__(self, completions, **columns):
        return [self.by] * len(completions)
'''


@pytest.fixture
def plugin(tmp_path: Path) -> str:
    path = tmp_path / "mine.py"
    path.write_text(TEN_LINES)
    return str(path)


def test_reward_from_a_file(plugin: str) -> None:
    assert scores(f"{plugin}:shout", ["a", "b!!"], answer=["1", "2"]) == [0.0, 1.0]
    assert scores({"name": f"{plugin}:shout", "least": 3}, ["a", "b!!"]) == [0.0, 0.0]
    assert scores(f"{plugin}:alone", ["a", "b!!"], answer=["1", "2"]) == [1.0, 3.0]
    assert scores({"name": f"{plugin}:Scale", "by": "2.5"}, ["a"]) == [2.5]
    assert get_reward(f"{plugin}:shout").name == "shout"
    assert scores(f"{plugin}:both", ["b!!"]) == [4.0] and get_reward(f"{plugin}:both").components == ("shout", "alone")


def test_a_spec_is_read_and_left_as_it_is(plugin: str) -> None:
    spec = {"name": f"{plugin}:shout", "least": 1}
    both = ({**spec, "weight": 2.0}, spec)
    kept = repr((spec, both))
    for _ in range(2):
        assert scores(spec, ["a!"]) == [1.0] and scores(both, ["a!"]) == [3.0]
    assert repr((spec, both)) == kept


def test_options_of_every_kind_of_reward(plugin: str) -> None:
    def build(by: float, **given: Any) -> Any:
        return lambda completions: [by * given["of"]] * len(completions)

    class Odd:
        """What no validator knows."""

    def odd(completions: list[str], by: Odd | None = None) -> list[float]:
        return [float(isinstance(by, Odd))] * len(completions)

    def checked_only(completions: list[str], by: "Nowhere" = 1.0) -> list[float]:  # type: ignore[name-defined] # noqa: F821
        return [by] * len(completions)

    bound = functools.partial(checked_only)
    assert scores({"name": build, "by": "2", "of": 3}, ["a"]) == [6.0]
    assert scores({"name": odd, "by": Odd()}, ["a"]) == [1.0]
    assert scores({"name": checked_only, "by": 2.0}, ["a"]) == scores({"name": bound, "by": 2.0}, ["a"]) == [2.0]
    for spec in (f"{plugin}:shout", get_reward(f"{plugin}:shout")):
        with pytest.raises(UserError, match="unknown option of reward 'shout' 'laest'"):  # though it takes any column
            get_reward({"name": spec, "laest": 3})
    with pytest.raises(UserError, match="unknown option of reward 'shout' 'completions'"):
        get_reward({"name": f"{plugin}:shout", "completions": ["a"]})


def test_an_option_wins_over_a_column_of_its_name(plugin: str) -> None:
    assert scores({"name": f"{plugin}:shout", "least": 1}, ["a!", "b!"], least=[5, 5]) == [1.0, 1.0]


def test_reward_from_a_callable_and_from_a_reward() -> None:
    reward = get_reward(lambda completions, **columns: [len(c) for c in completions])
    assert reward.score(["q"], ["abc"], {})[0].value == 3.0
    assert get_reward(reward) is reward
    assert scores(lambda *args, **columns: columns["answer"], ["a", "b"], answer=np.array([1, 2])) == [1.0, 2.0]


def test_register_reward_uses_dashes(monkeypatch: pytest.MonkeyPatch) -> None:
    empty: Registry[Any] = Registry("reward", "rlzoo.rewards", "rlzoo.rewards")
    monkeypatch.setattr("rlzoo.reward.finding._rewards", empty)

    @register_reward
    def a_test_reward(completions: list[str]) -> list[float]:
        return [1.0] * len(completions)

    assert scores("a-test-reward", ["x"]) == scores("a_test_reward", ["x"]) == [1.0]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("math-anwser", r"unknown reward 'math-anwser': did you mean 'math-answer'\?"),
        ({"name": "length", "targt": 3}, r"unknown option of reward 'length' 'targt': did you mean 'target'\?"),
        ({"name": "length", "target": "many"}, r"reward 'length': option 'target' = 'many': .*integer"),
        ({"name": "length", "target": 9, "limit": 9}, r"target 9, limit 9: must be 0 <= target < limit"),
        ({"name": "format", "pattern": "(a"}, r"pattern '\(a' is not a regular expression"),
        ({"target": 3}, r"has no name"),
        ({"name": "weighted", "of": []}, r"at least one reward in 'of'"),
        ("weighted", r"needs the option 'of'"),
        ([{"name": "length", "weight": "heavy"}], r"the weight of 'length' is 'heavy', not a number"),
        ([{"name": "length"}, "nothing-here"], r"unknown reward 'nothing-here'"),
        (3, r"reward 3 is int: give a name, a function or a class"),
        (max, r"reward 'max' cannot be built: TypeError"),
        (
            lambda: 3,
            r"takes \(\) rather than completions; a reward has TRL's signature, .* must return a callable, not int",
        ),
        ("trl.rewards:get_soft_overlong_punishment", r"needs the option 'max_completion_len'"),
        ({"name": "trl.rewards:get_repetition_penalty_reward", "max_penalty": 1.0}, r"cannot be built: ValueError"),
    ],
)
def test_a_wrong_spec_is_told_in_one_line(spec: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        get_reward(spec)
    assert "\n" not in str(error.value)


# The contract

PLUGINS = Path(__file__).parent / "plugins"
TASKS = Path(__file__).parent / "tasks"
NEEDS = {"inspect-task": "inspect_ai", "reasoning-gym": "reasoning_gym"}
"""The optional packages of rewards."""
GOLD = {"answer": ["4", "5", None, "x+1"]}
CHECKED: dict[str, tuple[Any, dict[str, list[Any]]]] = {
    "exact-match": ("exact-match", GOLD),
    "format": ("format", {}),
    "inspect-task": ("inspect-task", {"task": [f"{TASKS / 'inspect_sums.py'}@plain"] * 4, "sample": ["1", "b"] * 2}),
    "length": ({"name": "length", "target": 1, "limit": 4}, {}),
    "math-answer": ("math-answer", GOLD),
    "overlong": ({"name": "overlong", "target": 1, "limit": 4}, {}),
    "reasoning-gym": (
        "reasoning-gym",
        {"metadata": [{"source_dataset": "chain_sum"}] * 4, "answer": ["4", "5", "6", "7"], "question": ["q"] * 4},
    ),
    "weighted": ([{"name": "math-answer", "weight": 2}, "format"], GOLD),
}


@pytest.mark.parametrize("name", list_rewards())
@pytest.mark.parametrize("conversational", [False, True], ids=["texts", "conversations"])
@pytest.mark.filterwarnings("ignore:.*no gold answer")
def test_the_contract(name: str, conversational: bool) -> None:
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    spec, columns = CHECKED[name]
    texts = ["It is 4.\n#### 4", r"so \boxed{4}, not 5", "I cannot say", r"\boxed{1+x}"]
    check_reward(spec, ["What is 2+2?"] * 4, [said(text) for text in texts] if conversational else texts, **columns)


# Calling a reward


def test_completion_ids_reach_a_reward_however_it_is_called() -> None:
    length = {"name": "length", "target": 1, "limit": 4}
    for reward in (get_reward(length), get_reward([length]), get_reward([length]).function):
        assert reward(["q"], ["one two three four"], [[7]]) == [1.0]


def test_the_score_of_a_plain_reward_names_it() -> None:
    reward = get_reward("exact-match")
    assert reward.components == ("exact-match",)
    assert reward.score(["q"], ["4"], {"answer": ["4"]}) == [Score(1.0, {"exact-match": 1.0})]
    assert reward.score([], [], {"answer": []}) == []


async def asynchronous(completions: list[str], answer: list[str], **columns: Any) -> list[float]:
    await asyncio.sleep(0)
    return [float(c == a) for c, a in zip(completions, answer, strict=True)]


def test_async_reward() -> None:
    assert scores(asynchronous, ["1", "2"], answer=["1", "1"]) == [1.0, 0.0]


def test_async_reward_within_a_running_loop() -> None:
    async def main() -> list[float | None]:
        return scores(asynchronous, ["1", "2"], answer=["1", "1"])

    assert asyncio.run(main()) == [1.0, 0.0]


@pytest.mark.parametrize(
    "result", [[True, None], (1, None), [np.float32(1), None], [torch.tensor(1.0), None], [np.bool_(True), None]]
)
def test_results_that_are_numbers(result: Any) -> None:
    assert scores(lambda completions: result, ["a", "b"]) == [1.0, None]


@pytest.mark.parametrize("result", [np.array([1.0, 0.5]), torch.tensor([1.0, 0.5])])
def test_results_that_are_arrays(result: Any) -> None:
    assert scores(lambda completions: result, ["a", "b"]) == [1.0, 0.5]


def named(result: Any) -> Any:
    def x(completions: list[str]) -> Any:
        return result

    return x


@pytest.mark.parametrize(
    ("result", "message", "nulled"),
    [
        (
            [1, 2, 3],
            "reward 'x' returned 3 values for 4 completions: return one number or None per completion",
            [None] * 4,
        ),
        (1.0, "reward 'x' returned float for 4 completions: return one number or None per completion", [None] * 4),
        ("1234", "reward 'x' returned str for 4 completions", [None] * 4),
        (None, "reward 'x' returned NoneType for 4 completions", [None] * 4),
        ([1, 1, float("nan"), 1], "reward 'x' returned nan on row 2: return a finite number", [1, 1, None, 1]),
        ([1, float("inf"), 1, 1], "reward 'x' returned inf on row 1", [1, None, 1, 1]),
        ([1, 1, 1, "1"], "reward 'x' returned '1' on row 3", [1, 1, 1, None]),
    ],
)
def test_a_wrong_result(result: Any, message: str, nulled: list[float | None]) -> None:
    completions = list("abcd")
    with pytest.raises(UserError, match=message):
        get_reward(named(result)).score(completions, completions, {})
    with pytest.warns(RuntimeWarning, match=message):
        assert get_reward(named(result), on_error="null")(completions, completions) == nulled


def stumbles(completions: list[str], answer: list[int]) -> list[float]:
    return [1 / a for a in answer]


def test_a_reward_that_raises_is_told_with_its_row() -> None:
    with pytest.raises(UserError, match="reward 'stumbles' raised on row 2: ZeroDivisionError: division by zero"):
        scores(stumbles, list("abcd"), answer=[1, 2, 0, 0])
    with pytest.warns(RuntimeWarning, match="on row 2: .*; scored as null"):
        reward = get_reward(stumbles, on_error="null")
        assert reward(list("abcd"), list("abcd"), answer=[1, 2, 0, 4]) == [1.0, 0.5, None, 0.25]


def test_a_reward_that_raises_on_all_rows_together_only() -> None:
    def narrow(completions: list[str]) -> list[float]:
        (_,) = completions
        return [1.0]

    with pytest.raises(UserError, match="on 2 rows together, but on none of them alone"):
        scores(narrow, ["a", "b"])
    assert get_reward(narrow, on_error="null")(["q", "q"], ["a", "b"]) == [1.0, 1.0]


def test_a_reward_that_raises_is_told_with_its_line_and_what_it_got(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def mean(completions):\n    return [1 / len(text) for text in completions]\n")
    mean = get_reward(f"{tmp_path / 'mine.py'}:mean")
    told = r"raised on row 1, an empty completion: ZeroDivisionError: division by zero \(mine\.py line 2\)$"
    with pytest.raises(UserError, match=told):
        mean(["q", "q"], ["a", ""])


def test_a_missing_column_is_an_error_whatever_the_setting() -> None:
    for reward in (get_reward("exact-match", on_error="null"), get_reward(stumbles, on_error="null")):
        with pytest.raises(UserError, match="'answer'; the data's columns: solution; rename one with --column answer="):
            reward(["q"], ["a"], solution=["a"])
    with pytest.raises(UserError, match="'answer' has 2 values for 1 completions"):
        scores("exact-match", ["a"], answer=["a", "b"])


# The other rewards


@pytest.mark.parametrize(
    ("options", "completion", "gold", "value"),
    [
        ({}, "a red house\n#### red", "red", 1),
        ({}, "#### blue #### red ", "red", 1),
        ({}, "#### Red", "red", 0),
        ({"ignore_case": True}, "#### Red", "red", 1),
        ({}, " 42\n", 42, 1),
        ({}, "the answer is 42", "42", 0),
        ({}, "#### 42", "6 * 7\n#### 42", 1),
        ({"marker": "Answer:"}, "Answer: 42", "42", 1),
        ({"marker": ""}, "#### 42", "42", 0),
        ({}, "#### 42", None, None),
        ({}, "#### 42", float("nan"), None),
        ({}, "#### Ünï ♥", "Ünï ♥", 1),
        ({}, "####\u00a042\u3000", "42", 1),
    ],
)
def test_exact_match(options: dict[str, Any], completion: str, gold: Any, value: float | None) -> None:
    assert scores({"name": "exact-match", **options}, [completion], answer=[gold]) == [value]


def test_exact_match_with_one_of_several_answers() -> None:
    asked = {"name": "exact-match", "any_of": True, "ignore_case": True}
    golds = [["14 December 1972", "December 1972"], ["1973", None], "1972", [], [None]]
    assert scores(asked, ["december 1972"] * 5, answer=golds) == [1.0, 0.0, 0.0, None, None]


@pytest.mark.parametrize("gold", [["42"], {"answer": "42"}, b"42"])
def test_exact_match_refuses_a_gold_answer_that_is_no_text(gold: Any) -> None:
    with pytest.raises(UserError, match=rf"raised on row 0: TypeError: the gold answer is {type(gold).__name__}"):
        scores("exact-match", ["#### 42"], answer=[gold])


@pytest.mark.parametrize(
    ("options", "completion", "value"),
    [
        ({}, "2 + 2\n#### 4", 1),
        ({}, "2 + 2\n#### 4\n\n", 1),
        ({}, "#### 4\nor so", 0),
        ({}, "2 + 2 #### 4", 0),
        ({}, "2 + 2\n####", 0),
        ({}, r"so \boxed{4} it is", 1),
        ({}, r"so \boxed{} it is", 0),
        ({}, "4", 0),
        ({"pattern": "(?is)<answer>.*</answer>"}, "<ANSWER>\n4</ANSWER> ok", 1),
        ({"pattern": r"\A\d+\Z"}, "4", 1),
        ({"pattern": r"\A\d+\Z"}, "4 ok", 0),
    ],
)
def test_format(options: dict[str, Any], completion: str, value: float) -> None:
    assert scores({"name": "format", **options}, [completion]) == [value]


def test_length_counts_tokens_and_else_words() -> None:
    reward = get_reward({"name": "length", "target": 2, "limit": 6})
    texts = ["a", "a b", "a b c", "a b c d e", "a b c d e f", "a b c d e f g"]
    falling = [1.0, 1.0, 0.75, 0.25, 0.0, 0.0]  # (6 - n) / 4 between 2 and 6
    assert reward(texts, texts) == falling
    assert reward(texts, [said(t) for t in texts]) == falling
    assert reward(["q"] * 2, ["one word more", "a"], completion_ids=[[7], [7] * 4]) == [1.0, 0.5]


def test_overlong_is_the_soft_punishment_of_dapo() -> None:
    """Eq. 13 with L_max = 10 and L_cache = 4: 0 up to 6 tokens, (6 - n) / 4 up to 10, -1 beyond."""
    lengths = [0, 1, 6, 7, 8, 10, 11, 99]
    expected = [0.0, 0.0, 0.0, -0.25, -0.5, -1.0, -1.0, -1.0]
    reward = get_reward({"name": "overlong", "target": 6, "limit": 10})
    ids = [[7] * n for n in lengths]
    assert reward(["q"] * 8, ["a word"] * 8, completion_ids=ids) == expected
    assert reward(["q"] * 8, ["word " * n for n in lengths]) == expected
    punish = pytest.importorskip("trl.rewards").get_soft_overlong_punishment(10, 4)
    assert punish(completion_ids=ids) == expected
    with pytest.raises(UserError, match="reward 'overlong': target 9, limit 9: must be 0 <= target < limit"):
        get_reward({"name": "overlong", "target": 9, "limit": 9})


def test_a_weighted_sum_reports_its_components() -> None:
    spec = [{"name": "math-answer", "weight": 2}, {"name": "format", "pattern": "!", "weight": -0.5}, "format"]
    reward = get_reward(spec)
    assert reward.name == "weighted"
    assert reward.components == ("math-answer", "format", "format-2")
    first, second = reward.score(["q"] * 2, ["Yes!\n#### 4", "#### 4"], {"answer": ["4", None]})
    assert first == Score(2 - 0.5 + 1, {"math-answer": 1.0, "format": 1.0, "format-2": 1.0})
    assert second == Score(None, {"math-answer": None, "format": 0.0, "format-2": 1.0})
    same = get_reward({"name": "weighted", "of": spec})
    assert same.score(["q"] * 2, ["Yes!\n#### 4", "#### 4"], {"answer": ["4", None]}) == [first, second]


def test_the_terms_of_a_weighted_sum_keep_names_of_their_own() -> None:
    def term(name: str) -> Reward:
        return Reward(name, lambda completions, **_: [float(len(name))] * len(completions))

    given = ["a", "a-2", "a", "a-2", "a", "a"]
    reward = get_reward([term(name) for name in given])
    assert reward.components == ("a", "a-2", "a-3", "a-2-2", "a-4", "a-5")
    assert list(reward.score(["q"], ["x"], {})[0].components.values()) == [float(len(name)) for name in given]
    assert get_reward([term("a"), term("a"), term("a-2")]).components == ("a", "a-3", "a-2")


def test_a_weighted_sum_passes_the_setting_on_to_its_components() -> None:
    spec = [stumbles, "exact-match"]
    with pytest.raises(UserError, match="reward 'stumbles' raised on row 0: ZeroDivisionError"):
        scores(spec, ["0", "1"], answer=[0, 1])
    with pytest.warns(RuntimeWarning, match="reward 'stumbles' raised"):
        found = replace(get_reward(spec), on_error="null").score(["q"] * 2, ["0", "1"], {"answer": [0, 1]})
    assert found == [
        Score(None, {"stumbles": None, "exact-match": 1.0}),
        Score(2.0, {"stumbles": 1.0, "exact-match": 1.0}),
    ]


def test_reasoning_gym_scores_its_own_answers() -> None:
    reasoning_gym = pytest.importorskip("reasoning_gym")
    for name in ("chain_sum", "countdown", "spiral_matrix", "simple_equations", "word_sorting"):
        entry = reasoning_gym.create_dataset(name, size=1, seed=1)[0]
        columns = {
            "metadata": [entry["metadata"], json.dumps(entry["metadata"])],
            "answer": [entry["answer"]] * 2,
            "question": [entry["question"]] * 2,
        }
        for written in ("{}", "I say <answer> {} </answer> so", r"\boxed{{{}}}", "So:\n#### {}"):
            right = written.format(entry["answer"])
            assert scores("reasoning-gym", [right, said(right)], **columns) == [1.0, 1.0], (name, written)
        wrong = scores("reasoning-gym", ["<answer>none</answer>", ""], **columns)
        assert all(value is not None and value < 0.1 for value in wrong), name


def test_reasoning_gym_takes_an_unreadable_answer_for_a_wrong_one() -> None:
    pytest.importorskip("reasoning_gym")
    metadata = [{"source_dataset": "prime_factorization"}]
    assert scores("reasoning-gym", ["2 times 3"], metadata=metadata, answer=["2 × 3"]) == [0.0]
    with pytest.raises(UserError, match="raised on row 0: AttributeError"):  # not the answer's fault
        scores("reasoning-gym", ["1 2"], metadata=[{"source_dataset": "spiral_matrix"}], answer=[None])


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"source_dataset": "no_such"}, "reasoning_gym has no data set 'no_such'"),
        ({}, "metadata of row 0 has no 'source_dataset'"),
        ("{", "metadata of row 0 is not JSON"),
    ],
)
def test_reasoning_gym_tells_wrong_metadata(metadata: Any, message: str) -> None:
    pytest.importorskip("reasoning_gym")
    with pytest.raises(UserError, match=message):
        scores("reasoning-gym", ["1"], metadata=[metadata], answer=["1"])


def test_reasoning_gym_tells_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from rlzoo.rewards import reasoning_gym

    reasoning_gym._scorer.cache_clear()
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(UserError, match=r"pip install rlzoo\[reasoning-gym\]"):
        scores("reasoning-gym", ["1"], metadata=[{"source_dataset": "chain_sum"}], answer=["1"])


def test_the_scorers_that_evaluate_answers_are_known() -> None:
    """A new version of reasoning-gym may bring a scorer that evaluates what the model answered."""
    pytest.importorskip("reasoning_gym")
    from reasoning_gym.factory import DATASETS

    from rlzoo.rewards.reasoning_gym import PYTHON_SCORERS, SYMPY_SCORERS

    bodies = {name: inspect.getsource(data_set.score_answer) for name, (data_set, _) in DATASETS.items()}
    evaluating = {name for name, body in bodies.items() if "eval(" in body or "parse_expr(" in body}
    assert evaluating - {"number_sorting"} == PYTHON_SCORERS | SYMPY_SCORERS  # that one evaluates the gold answer


@pytest.mark.parametrize("source", ["n_queens", "spiral_matrix", "countdown", "polynomial_multiplication"])
@pytest.mark.parametrize(
    "attack",
    [
        "open({!r}, 'w').close()",
        "__import__('pathlib').Path({!r}).touch()",
        "[open({!r}, 'w')][0]",
        "sqrt(\"open({!r}, 'w')\")",
        "open({!r}, 'w') + 3!",
        "(lambda: open({!r}, 'w'))()",
    ],
)
def test_model_output_is_never_run(source: str, attack: str, tmp_path: Path) -> None:
    reasoning_gym = pytest.importorskip("reasoning_gym")
    trace = tmp_path / "trace"
    entry = reasoning_gym.create_dataset(source, size=1, seed=1)[0]
    columns = {name: [entry[name]] for name in ("question", "answer", "metadata")}
    (value,) = scores("reasoning-gym", [attack.format(str(trace))], **columns)
    assert value is not None and value < 0.1
    assert not trace.exists()


@pytest.mark.parametrize("power", ["9**9**9**9", "(9**99)**99", "9**(99*99*99*99*99)", "9**999999999"])
def test_a_power_too_great_is_not_computed(power: str) -> None:
    pytest.importorskip("reasoning_gym")
    metadata = {"source_dataset": "countdown", "numbers": [9, 9], "target": 5}
    assert scores("reasoning-gym", [power], metadata=[metadata], answer=["9 - 9"]) == [0.01]


# TRL's rewards here, and ours in TRL


def test_every_reward_of_trl() -> None:
    rewards = pytest.importorskip("trl.rewards")
    half, third = said(r"<think>so</think>\boxed{\frac{1}{2}}"), said(r"\boxed{\frac{1}{3}}")
    columns = {"solution": [r"\frac{1}{2}"] * 2, "other": [1, 2]}
    ids = [[1] * 5, [5, 6, 7, 8, 9, 5, 6, 7, 8, 9]]
    expected: dict[str, tuple[dict[str, Any], list[float]]] = {
        "accuracy_reward": ({}, [1.0, 0.0]),
        "reasoning_accuracy_reward": ({}, [1.0, 0.0]),
        "think_format_reward": ({}, [1.0, 0.0]),
        # halfway along the cosine between 1 and 0.5; and at the end of the one from -1 to -0.5
        "get_cosine_scaled_reward": ({"max_len": 10}, [0.75, -0.5]),
        # 1 distinct of 4 pairs; 5 distinct of 9
        "get_repetition_penalty_reward": ({"ngram_size": 2}, [-0.75, -(1 - 5 / 9)]),
        # 5 tokens are few enough; 10 are 3 more than 7, of 4
        "get_soft_overlong_punishment": ({"max_completion_len": 11, "soft_punish_cache": 4}, [0.0, -0.75]),
    }
    assert set(expected) == {name for name in dir(rewards) if name.endswith(("_reward", "_punishment"))}
    for name, (options, values) in expected.items():
        reward = get_reward({"name": f"trl.rewards:{name}", **options})
        found = reward.score([said("q")] * 2, [half, third], columns, completion_ids=ids)
        assert [score.value for score in found] == pytest.approx(values), name
    with pytest.raises(UserError, match="needs the column 'solution'"):
        scores("trl.rewards:accuracy_reward", [half], answer=["1"])
    with pytest.raises(UserError, match="'completion_ids'"):
        scores(
            {"name": "trl.rewards:get_soft_overlong_punishment", **expected["get_soft_overlong_punishment"][0]}, ["a"]
        )


@pytest.mark.parametrize(
    "spec",
    ["math-answer", "exact-match", "format", "length", ["math-answer", {"name": "format", "weight": 0.1}]],
)
def test_ours_take_what_trl_passes(spec: Any) -> None:
    reward = get_reward(spec)
    for ours in (reward, reward.function):  # the wrapper, and the callable within
        values = ours(
            prompts=[said("2 + 2?")] * 2,
            completions=[said("#### 4"), said("five")],
            completion_ids=[[1, 2], [3] * 600],
            answer=["4", "4"],
            trainer_state=object(),
            log_extra=lambda column, values: None,
            log_metric=lambda name, value: None,
            environments=None,
        )
        assert values == pytest.approx([1.1 if isinstance(spec, list) else 1.0, 0.0])
