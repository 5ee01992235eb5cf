"""Some cases of every kind of wrong input; docs/fuzzing.md counts many (see tests/fuzz.py)."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from fuzz import TARGETS, fuzz

REPORT = Path(__file__).parent.parent / "docs" / "fuzzing.md"


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_wrong_input_is_refused_in_one_line_or_read_rightly(name: str, tmp_path: Path) -> None:
    counts = fuzz(name, 60, tmp_path)
    assert sum(counts.values()) == 60


def test_the_committed_report_is_of_these_targets() -> None:
    rows = re.findall(r"^\| (.+) \| ([\d,]+) \| ([\d,]+) \| ([\d,]+) \|$", REPORT.read_text(), re.M)
    counted = {name: [int(number.replace(",", "")) for number in numbers] for name, *numbers in rows}
    assert list(counted) == list(TARGETS)
    assert all(cases == read + refused for cases, read, refused in counted.values())
    assert sum(cases for cases, _, _ in counted.values()) >= 10_000
