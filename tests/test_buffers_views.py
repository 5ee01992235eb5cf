"""The laws of the four views over a buffer, against what each would be row by row."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import pytest
from buffer_rows import sample, samples
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rlzoo.buffers import OfflineBuffer
from rlzoo.errors import UserError
from rlzoo.objective import get_objective
from rlzoo.types import Selection, Trajectory

row_lists = st.lists(
    st.builds(
        sample,
        prompt=st.integers(0, 3),
        reward=st.sampled_from([None, 0.0, 0.4, 0.5, 1.0]),
        text=st.sampled_from("abc"),
        version=st.integers(0, 1),
        source=st.sampled_from(["policy", "preference", "demonstration"]),
        behaviour_logp=st.sampled_from([None, [-1.0]]),
    ),
    max_size=24,
)


def units(buffer: OfflineBuffer, selection: Selection, **options: object) -> list[tuple[int, ...]]:
    """The view's units; none where the view is refused for being empty."""
    try:
        return list(buffer.view(selection, **options).units)
    except UserError as error:
        assert "the buffer has no " in str(error)
        return []


@pytest.mark.slow
@given(row_lists)
def test_demonstrations_are_all_rows_of_that_source(rows: list[Trajectory]) -> None:
    expected = [(i,) for i, row in enumerate(rows) if row.source == "demonstration"]
    assert units(samples(*rows), Selection.DEMONSTRATIONS) == expected


@pytest.mark.slow
@given(row_lists, st.integers(1, 3), st.sampled_from([0.4, 0.5, 2.0]))
def test_correct_keeps_the_first_distinct_texts(rows: list[Trajectory], per_prompt: int, threshold: float) -> None:
    expected, seen, count = [], set(), Counter[str]()
    for i, row in enumerate(rows):
        usable = row.source != "demonstration" and row.reward is not None and row.reward >= threshold
        if usable and (row.prompt_id, row.completion) not in seen and count[row.prompt_id] < per_prompt:
            seen.add((row.prompt_id, row.completion))
            count[row.prompt_id] += 1
            expected.append((i,))
    assert units(samples(*rows), Selection.CORRECT, threshold=threshold, per_prompt=per_prompt) == expected


@pytest.mark.slow
@given(row_lists, st.integers(1, 3), st.sampled_from([0.4, 0.5, 2.0]))
def test_pairs_straddle_the_threshold_within_a_prompt(
    rows: list[Trajectory], per_prompt: int, threshold: float
) -> None:
    found = units(samples(*rows), Selection.PAIRS, threshold=threshold, per_prompt=per_prompt)
    used = [index for unit in found for index in unit]
    assert len(used) == len(set(used))
    better, worse, made = Counter[str](), Counter[str](), Counter[str]()
    for row in rows:
        if row.source != "demonstration" and row.reward is not None:
            (better if row.reward >= threshold else worse)[row.prompt_id] += 1
    for first, second in found:
        high, low = rows[first], rows[second]
        assert high.prompt_id == low.prompt_id
        assert high.reward is not None
        assert low.reward is not None
        assert low.reward < threshold <= high.reward
        assert "demonstration" not in (high.source, low.source)
        made[high.prompt_id] += 1
    for prompt in better.keys() | worse.keys():
        assert made[prompt] == min(better[prompt], worse[prompt], per_prompt)


@pytest.mark.slow
@given(row_lists, st.integers(1, 3))
@example([sample(0, 0.2), sample(0, 1.0), sample(0, 0.2), sample(0, 0.7)], 2)
def test_the_best_samples_are_paired_with_the_worst(rows: list[Trajectory], per_prompt: int) -> None:
    expected = []
    for prompt in dict.fromkeys(row.prompt_id for row in rows):
        usable = [i for i, r in enumerate(rows) if r.prompt_id == prompt and r.source != "demonstration"]
        known = {i: reward for i in usable if (reward := rows[i].reward) is not None}
        best, worst = sorted(known, key=lambda i: -known[i]), sorted(known, key=lambda i: known[i])
        both = list(zip(best, worst, strict=True))[:per_prompt]
        expected += [(good, bad) for good, bad in both if known[good] > known[bad]]
    found = units(samples(*rows), Selection.PAIRS, pairing="best_worst", per_prompt=per_prompt)
    assert sorted(found) == sorted(expected)
    used = [index for unit in found for index in unit]
    assert len(used) == len(set(used))


@pytest.mark.slow
@given(row_lists)
@example([sample(0, 1.0, version=0), sample(0, 0.0, version=1), sample(0, 0.5, version=0)])
@example([sample(0, 1.0), sample(1, 0.0), sample(0, None), sample(0, 0.0, behaviour_logp=None), sample(1, 1.0)])
@example([sample(0, 1.0, source="preference"), sample(0, 1.0, source="demonstration"), sample(0, 0.0)])
def test_groups_are_whole(rows: list[Trajectory]) -> None:
    expected: dict[tuple[str, int], list[int]] = {}
    for i, row in enumerate(rows):
        if row.source == "policy" and row.reward is not None and row.behaviour_logp is not None:
            expected.setdefault((row.prompt_id, row.policy_version), []).append(i)
    assert sorted(units(samples(*rows), Selection.GROUPS)) == sorted(map(tuple, expected.values()))


@pytest.mark.slow
@given(row_lists, st.integers(1, 3))
def test_groups_of_a_size_are_the_beginnings_of_those_large_enough(rows: list[Trajectory], size: int) -> None:
    buffer = samples(*rows)
    whole = units(buffer, Selection.GROUPS)
    assert units(buffer, Selection.GROUPS, size=size) == [unit[:size] for unit in whole if len(unit) >= size]


def test_views_do_not_depend_on_how_rows_are_chunked() -> None:
    rows = [sample(i % 7, float(i % 3 == 0), text=str(i % 5), version=i % 2) for i in range(60)]
    whole = samples(*rows)
    parts = samples(*rows[:1])
    for start in range(1, 60, 9):
        parts = parts.concatenate(samples(*rows[start : start + 9]))
    for selection in (Selection.CORRECT, Selection.PAIRS, Selection.GROUPS):
        assert parts.view(selection) == whole.view(selection)
        assert len(whole.view(selection)) == len(whole.view(selection).units) > 0


def test_pairs_of_imported_preferences_stay_pairs() -> None:
    rows = [sample(0, float(i % 2 == 0), text=str(i), source="preference") for i in range(6)]
    for pairing in ("threshold", "best_worst"):
        assert samples(*rows).view(Selection.PAIRS, pairing=pairing).units == ((0, 1), (2, 3), (4, 5))


def test_a_way_of_pairing_is_known_and_finds_rewards_that_differ() -> None:
    graded = samples(sample(0, 0.7), sample(0, 0.9), sample(1, 0.1), sample(1, 0.1))
    assert graded.view(Selection.PAIRS, pairing="best_worst").units == ((1, 0),)
    with pytest.raises(UserError, match=r"option pairing 'best': did you mean 'best_worst'\? known"):
        graded.view(Selection.PAIRS, pairing="best")
    with pytest.raises(UserError, match=r"no pairs \(in all its 1 sampled prompts, completions have equal"):
        samples(sample(0, 0.7), sample(0, 0.7)).view(Selection.PAIRS, pairing="best_worst")


def test_samples_may_be_told_apart_by_their_equations() -> None:
    texts = [
        "Half of 48 is <<48/2=24>>24. #### 24",
        "In May she sold 48 / 2 = <<48 / 2 = 24>>24 clips. #### 24",  # the same equation in other words
        "<<48/2=24>>24, and <<24+0=24>>24. #### 24",
        "48/2=24;24+0=24\n#### 24",  # without marks: the same two equations
        "24",
        "The answer is 24.",  # neither has an equation: their texts differ
    ]
    buffer = samples(*(sample(0, 1.0, text=text) for text in texts), sample(1, 1.0, text=texts[1]))
    assert units(buffer, Selection.CORRECT, per_prompt=9) == [(i,) for i in range(7)]
    by_equations = units(buffer, Selection.CORRECT, per_prompt=9, distinct="equations")
    assert by_equations == [(0,), (2,), (4,), (5,), (6,)]
    assert units(buffer, Selection.CORRECT, per_prompt=2, distinct="equations") == [(0,), (2,), (6,)]
    options = get_objective("rft", distinct="equations", samples_per_prompt=2).view_options
    assert units(buffer, Selection.CORRECT, **options) == [(0,), (2,), (6,)]
    with pytest.raises(UserError, match="option distinct 'equation': did you mean 'equations'"):
        buffer.view(Selection.CORRECT, distinct="equation")


def test_a_reward_that_is_not_a_number_is_none() -> None:
    buffer = samples(sample(0, None), sample(0, 1.0)).with_rewards([math.nan, 1.0])
    assert units(buffer, Selection.GROUPS) == [(1,)]
    assert units(buffer, Selection.PAIRS) == []


@pytest.mark.parametrize(
    ("selection", "options", "message"),
    [
        (
            Selection.DEMONSTRATIONS,
            {},
            "no demonstrations (0 of 1,200 rows have the source 'demonstration'): say",
        ),
        (
            Selection.CORRECT,
            {},
            "the buffer has no correct samples (0 of 1,200 rows reach reward 0.5): "
            "sample more per prompt (rollouts.samples), warm the base up first (warm_up), or lower",
        ),
        (
            Selection.PAIRS,
            {"threshold": -1},
            "no pairs (0 of 600 sampled prompts have both a completion that reaches",
        ),
        (Selection.GROUPS, {"size": 4}, "no groups of 4 samples (the largest of its 600 has 2): sample more"),
    ],
)
def test_an_empty_view_names_the_selection_and_the_mend(
    selection: Selection, options: dict[str, float], message: str
) -> None:
    buffer = samples(*(sample(i % 600, 0.0) for i in range(1200)))
    with pytest.raises(UserError) as error:
        buffer.view(selection, **options)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_groups_may_be_followed_by_demonstrations_of_their_prompt() -> None:
    def expert(prompt: int, text: str, truncated: bool = False) -> Trajectory:
        return sample(prompt, None, text=text, source="demonstration", behaviour_logp=None, truncated=truncated)

    buffer = samples(
        expert(0, "a"),
        sample(0, 1.0),
        sample(1, 0.0),
        sample(0, 0.0),
        expert(0, "b", truncated=True),
        expert(2, "c"),
    )
    assert buffer.view(Selection.GROUPS).units == ((1, 3), (2,))
    assert buffer.view(Selection.GROUPS, demonstrations=1).units == ((1, 3, 0), (2,))
    assert buffer.view(Selection.GROUPS, demonstrations=2).units == ((1, 3, 0, 4), (2,))
    assert buffer.view(Selection.GROUPS, demonstrations=2, truncated="drop").units == ((1, 3, 0), (2,))
    assert buffer.view(Selection.GROUPS, demonstrations=1, size=2, varied=True).units == ((1, 3, 0),)
    for rows in ([sample(0, 1.0)], [sample(0, 1.0), expert(1, "x")]):
        with pytest.raises(UserError, match="no demonstrations of the prompts of its 1 groups"):
            samples(*rows).view(Selection.GROUPS, demonstrations=1)


def test_groups_without_behaviour_log_probs_say_so() -> None:
    with pytest.raises(UserError, match=r"1 samples have a reward but no behaviour log-probs.*behaviour: current"):
        samples(sample(0, 1.0, behaviour_logp=None)).view(Selection.GROUPS)


@pytest.mark.parametrize("selection", Selection)
def test_an_empty_buffer_has_no_views(selection: Selection) -> None:
    with pytest.raises(UserError, match="the buffer has no "):
        samples().view(selection)


@pytest.mark.slow
@pytest.mark.parametrize("selection", Selection)
@settings(max_examples=30)  # of each view
@given(row_lists, st.lists(st.booleans(), min_size=24, max_size=24))
def test_a_view_without_truncated_rows_is_that_of_the_others(
    selection: Selection, rows: list[Trajectory], cut: list[bool]
) -> None:
    rows = [replace(row, truncated=flag) for row, flag in zip(rows, cut, strict=False)]
    whole = [i for i, row in enumerate(rows) if not row.truncated]
    expected = units(samples(*(rows[i] for i in whole)), selection)
    found = units(samples(*rows), selection, truncated="drop")
    assert sorted(found) == sorted(tuple(whole[place] for place in unit) for unit in expected)


def test_a_view_says_how_much_it_left_out() -> None:
    rows = [sample(i // 2, float(i % 4 == 0), text=str(i), truncated=i in (0, 3)) for i in range(8)]
    buffer = samples(*rows)  # rewards 1 0, 0 0, 1 0, 0 0
    assert buffer.view(Selection.UNPAIRED, truncated="drop").left_out == {"truncated completions": 2}
    assert buffer.view(Selection.CORRECT, truncated="drop").left_out == {"truncated completions": 1}
    assert buffer.view(Selection.GROUPS, varied=True).left_out == {"groups of equal rewards": 2}
    for options in ({}, {"truncated": "keep"}, {"varied": False}):
        assert buffer.view(Selection.GROUPS, **options).left_out == {}


def test_wrong_options_of_a_view_are_refused() -> None:
    with pytest.raises(UserError, match="unknown value of the view's option truncated 'dorp': did you mean 'drop'"):
        samples(sample(0, 1.0)).view(Selection.GROUPS, truncated="dorp")
    with pytest.raises(UserError, match="unknown option of the view 'groups' 'sise': did you mean 'size'"):
        samples(sample(0, 1.0)).view(Selection.GROUPS, sise=4)
    with pytest.raises(UserError, match="the view 'correct' needs per_prompt of at least 1, got 0"):
        samples(sample(0, 1.0)).view(Selection.CORRECT, per_prompt=0)
