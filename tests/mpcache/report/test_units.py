"""Bytes, times and counts as people read them: one rule, in Python and in the audit's page."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence

import pytest

from mpcache.audit.page import page
from mpcache.report.units import BYTES, DURATIONS, Unit, duration, number, size, whole

NODE = shutil.which("node")
SHOWN = re.compile(r"(\d+(?:\.\d+)?) (\w+)")


def magnitudes() -> Iterator[float]:
    """Sixteen powers of ten, and around each what rounds up to it and what does not."""
    yield 0.0
    for power in range(-3, 19):
        for times in (1, 1.5, 5.994, 5.996, 9.9949, 9.995, 9.996, 9.99949, 9.9995, 9.9996, 9.99999):
            yield times * 10.0**power
    for minutes in (1, 9.99, 9.996, 10, 599.4, 599.6, 600, 601):  # where units do not go by thousands
        yield minutes * 60_000


@pytest.mark.parametrize(("show", "units"), [(size, BYTES), (duration, DURATIONS)])
def test_no_number_reaches_the_next_unit(show: Callable[[float], str], units: Sequence[Unit]) -> None:
    """Of a unit that has a larger one never 1000, and never as many as the larger one begins with."""
    most = {unit.name: unit.most for unit in units}
    for n in magnitudes():
        found = SHOWN.fullmatch(show(n))
        assert found is not None, (n, show(n))
        digits, name = found.groups()
        limit = most[name]
        assert limit is None or float(digits) < limit <= 1000, (n, show(n))
        assert limit is None or len(digits.lstrip("0.").replace(".", "")) <= 3, (n, show(n))


@pytest.mark.parametrize(("show", "units"), [(size, BYTES), (duration, DURATIONS)])
def test_what_is_shown_is_near_what_is(show: Callable[[float], str], units: Sequence[Unit]) -> None:
    worth, of = 1.0, {}
    for unit in units:
        of[unit.name] = worth
        worth *= unit.step
    for n in filter(lambda n: n >= 100, magnitudes()):
        digits, name = show(n).split(" ")
        assert float(digits) * of[name] == pytest.approx(n, rel=0.0051), (n, show(n))


def test_bytes() -> None:
    shown = {
        0: "0 B", 999: "999 B", 999.5: "1 kB", 999_499: "999 kB", 999_600: "1 MB", 1_234_567: "1.23 MB",
        99_960: "100 kB", 5e9: "5 GB", 3.22e12: "3.22 TB", 1e18: "1000 PB",
    }  # fmt: skip
    assert {n: size(n) for n in shown} == shown


def test_durations() -> None:
    shown = {
        0: "0 ms", 0.5: "0.5 ms", 4.314: "4.31 ms", 999.4: "999 ms", 999.6: "1 s", 5149.2: "5.15 s",
        148_000: "148 s", 599_600: "9.99 min", 599_700: "10 min", 5_450_000: "90.8 min",
        36_000_000: "10 h", 0.00002: "0.00002 ms",
    }  # fmt: skip
    assert {n: duration(n) for n in shown} == shown


def test_counts() -> None:
    assert [number(n) for n in (5, 5.25, 1234.0, 12_345.6)] == ["5", "5.2", "1,234", "12,345.6"]
    assert [type(whole(n)) for n in (5.0, 5.5, 5)] == [int, float, int]


@pytest.mark.skipif(NODE is None, reason="needs node")
def test_the_page_shows_the_same() -> None:
    """The page's own functions, run on the same numbers."""
    assert NODE is not None
    text = page({"shape": "demo", "rows": []}, None)
    found = re.search(r"const UNITS = .*?^const ms = [^\n]*\n", text, re.S | re.M)
    assert found is not None
    numbers = [n for n in magnitudes() if n == 0 or n >= 0.01]
    script = f"{found[0]}console.log(JSON.stringify({json.dumps(numbers)}.map(n => [bytes(n), ms(n)])))"
    done = subprocess.run([NODE, "-e", script], capture_output=True, text=True, timeout=60, check=True)
    for n, (in_bytes, in_ms) in zip(numbers, json.loads(done.stdout), strict=True):
        assert (in_bytes, in_ms) == (size(n), duration(n)), n
