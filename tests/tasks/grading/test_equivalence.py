"""Which mathematical answers are worth the same, with and without math-verify; and that no answer costs more than its own row."""

import math
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from d1jax.tasks.grading import equivalence
from d1jax.tasks.grading.equivalence import decide, equivalent, equivalent_many, normal_form
from d1jax.tasks.grading.pool import Pool
from d1jax.tasks.grading.powers import MAX_DIGITS, has_unwritable_power
from d1jax.tasks.task import DataError

ROOT = Path(__file__).resolve().parents[3]

EXACT = [  # decided without math-verify
    ("\\frac{1}{2}", "0.5"), ("\\dfrac12", "\\frac{1}{2}"), ("1,234", "1234"), ("10,\\!080", "10080"), ("11,\\! 111,\\! 100", "11111100"),
    ("\\$36", "36.00"), ("90^\\circ", "90"), ("10\\%", "10"), ("x=5", "5"), ("5", "x = 5."), ("\\text{(C)}", "C"), ("\\text{(C)}", "(C) 5"),
    ("\\text{east}", "East"), ("864 \\mbox{ inches}^2", "864"), ("5.4 \\text{ cents}", "5.4"), ("4210_{5}", "4210_5"), ("52_8", "52"),
    ("70 \\sqrt{2}", "70\\sqrt2\\text{ m}"), ("x \\in [-2,7]", "-2\\le x\\leq 7"), ("(2,\\infty)", "x>2"), ("(3,4]", "3<x\\le4"),
    ("[-2,7]", "7\\ge x\\ge-2"), ("2,3", "2 or 3"), ("\\left( 3, \\frac{\\pi}{2} \\right)", "(3,\\frac{\\pi}2)"), ("x^{2}", "x^2"),
    ("0.5", "50\\%"), ("50\\%", "0.5"), ("50 \\%", "\\frac12"), ("\\frac13", "33\\frac13\\%"), ("50\\%", "50"), ("5", "500%"),
    ("\\frac52", "2 1/2"), ("2\\frac12", "2\\ 1/2."), ("-2\\frac12", "-2\\,1/2"), ("1234567", "1 234 567"), ("\\log_2 3", "\\log_{2}3"),
    ("(-\\infty,2)\\cup(5,\\infty)", "x<2 \\text{ or } x>5"), ("x<2 \\text{ or } x>5", "(-∞,2)∪(5,∞)"),
    ("(-\\infty,2]\\cup[5,\\infty)", "x\\le2 \\lor x \\geq 5"), ("(-\\infty,-1)\\cup(0,1]", "x<-1, or 0 < x \\le 1."),
    ("\\begin{pmatrix}1\\\\2\\end{pmatrix}", "\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}"), ("(10,200)", "(10, 200)"), ("\\pi", "π"),
]  # fmt: skip
ASKED = [  # of math-verify
    ("x+y", "y+x"), ("3\\sqrt{2}", "\\sqrt{18}"), ("1,-2", "-2,1"), ("\\frac{2}{3}\\pi", "\\frac{2\\pi}{3}"), ("6r^2-4r", "2(3r^2-2r)"),
    ("(-\\infty,2)\\cup(5,\\infty)", "x>5 or x<2"),
    ("10080", "7!\\times2!"), ("\\begin{pmatrix} 1/5 \\\\ -3 \\end{pmatrix}", "\\begin{pmatrix} \\frac15 \\\\ -3 \\end{pmatrix}"),
]  # fmt: skip
WRONG = [
    ("2", "3"), ("5", "5,7"), ("(1,2)", "(2,1)"), ("\\text{east}", "seat"), ("\\text{(C)}", "(B)"), ("52_8", "42"), ("52_8", "52_9"),
    ("1/3", "0.333"), ("(1,2)", "x^2-3x+2<0"), ("(1,2)", "[1,2]"), ("x", "2x"), ("2", ""), ("", ""), ("2", "\\boxed{}"), ("2", "two"),
    ("0.5", "50"), ("50", "0.5"), ("50\\%", "5"), ("50\\%", "50000"), ("0.5\\%", "50\\%"), ("50\\%", "0.5\\%"), ("50", "0.5\\%"),
    ("\\frac{21}{2}", "2 1/2"), ("\\frac{21}{2}", "2\\,1/2"), ("1820", "18 20"), ("12", "1 2"), ("15", "3 5"), ("35", "3 5"),
    ("\\frac52", "2 \\text{ and } 1/2"), ("2,\\frac12", "2 1/2"), ("\\frac{15}{2}", "3 5/2"), ("\\frac{11}{2}", "3 5/2"),
    ("(2,5)", "x>2 and x<5 or x>7"), ("(-\\infty,2)\\cup(5,\\infty)", "x<2 and x>5"), ("(-\\infty,2)\\cup(5,\\infty)", "x<2, x>5"),
    ("(-\\infty,2]\\cup(5,\\infty)", "x<2 or x>5"), ("(-\\infty,2)\\cup(5,\\infty)", "x<2 or y>5"),
    ("(-\\infty,2)\\cup(5,\\infty)", "x<5 or x>2"), ("(-\\infty,2)\\cup(5,\\infty)", "x<2"), ("x<2 or x>5", "x<2 and x>5"),
    ("\\sqrt{2}", "1.41"), ("(1,\\infty)", "x\\ge1"), ("3", "3x"), ("\\text{even}", "odd"), ("10,200", "200,10"),
]  # fmt: skip
HOSTILE = [
    "9**9**9**9", "9^{9^{9^{9}}}", "{" * 290, "\\frac{" * 48, "\\sqrt{" * 48, "(" * 299, "\\ud800", "\ud800", "\x00", "1" * 299,
    "\\int_0^\\infty e^{-x^2} x^{100!} dx", "x" * 10_000_000, "\\text{" * 49, "import os", "__import__('os').system('true')",
]  # fmt: skip


@pytest.mark.parametrize(("gold", "offer"), EXACT)
def test_layout_is_decided_without_math_verify(gold, offer):
    assert decide(gold, offer) is True


def test_the_rest_is_asked_of_math_verify_in_one_batch():
    assert all(decide(gold, offer) is None for gold, offer in ASKED)
    assert equivalent_many([*EXACT, *ASKED, *WRONG]) == [True] * (len(EXACT) + len(ASKED)) + [False] * len(WRONG)


@given(st.text(max_size=40), st.text(max_size=40))
def test_no_text_raises(gold, offer):
    assert normal_form(gold) == normal_form(gold)
    assert decide(gold, offer) in (True, False, None)
    assert decide(gold, gold) is (True if normal_form(gold) else False)


@given(st.fractions(min_value=-(10**6), max_value=10**6, max_denominator=999))
def test_a_fraction_in_any_documented_spelling_is_equal_and_another_is_not(value):
    top, bottom = value.numerator, value.denominator
    for offer in (
        f"\\frac{{{top}}}{{{bottom}}}",
        f"{top}/{bottom}",
        f"x=\\dfrac{{{2 * top}}}{{{2 * bottom}}}",
        f"${top}/{bottom}$ \\text{{ cm}}",
    ):
        assert decide(f"\\frac{{{top}}}{{{bottom}}}", offer) is True, offer
        assert decide(f"\\frac{{{top + 1}}}{{{bottom}}}", offer) is False, offer


@given(st.integers(1, 10**6), st.fractions(min_value=0, max_value=1, max_denominator=99).filter(lambda x: 0 < x < 1))
def test_a_mixed_number_is_a_sum_and_never_its_digits_side_by_side(whole, part):
    gold = whole + part
    top, bottom = part.numerator, part.denominator
    for offer in (f"{whole} {top}/{bottom}", f"{whole}\\ {top}/{bottom}", f"x = {whole}\\frac{{{top}}}{{{bottom}}}"):
        assert decide(f"\\frac{{{gold.numerator}}}{{{gold.denominator}}}", offer) is True, offer
        assert decide(f"\\frac{{{whole}{top}}}{{{bottom}}}", offer) is False, offer
    assert decide(f"{whole}{top}", f"{whole} {top}") is False


@given(st.fractions(max_denominator=1000).filter(bool))
def test_a_percentage_is_worth_its_number_and_the_share_that_it_means(value):
    for gold, offer in (
        (str(value), f"{value}\\%"),
        (str(value / 100), f"{value}\\%"),
        (f"{value} \\%", str(value / 100)),
    ):
        assert decide(gold, offer) is True, (gold, offer)
    for gold, offer in (
        (str(value), str(value / 100)),
        (str(value * 100), f"{value}\\%"),
        (f"{value}\\%", f"{value / 100}%"),
    ):
        assert decide(gold, offer) is False, (gold, offer)


def worker(tmp_path, body, seconds=0.5):
    """A pool whose program answers by `body`, which has `asked`."""
    program = tmp_path / "worker.py"
    loop = "for line in sys.stdin:\n    asked = json.loads(line)['offer']\n" + textwrap.indent(
        textwrap.dedent(body), "    "
    )
    program.write_text(
        f"import json, os, sys, time\nprint('true', flush=True)\n{loop}\n    print('true', flush=True)\n"
    )
    return Pool(workers=2, seconds=seconds, program=program)


def test_a_worker_that_hangs_or_dies_costs_its_row_only(tmp_path):
    pool = worker(
        tmp_path,
        """
        if asked == 'hang': time.sleep(60)
        if asked == 'die': os._exit(1)
        if asked == 'noise': print('no JSON', flush=True)
        """,
    )
    try:
        began = time.monotonic()
        asked = ["a", "hang", "b", "die", "c", "noise", "d", "e"]
        assert pool.ask([("", one) for one in asked]) == [True, None, True, None, True, None, True, True]
        assert time.monotonic() - began < 10 and pool.replaced == 3
        assert pool.ask([("", "again")]) == [True], "the pool goes on"
    finally:
        pool.close()


class Recorder:
    """A pool that keeps what it is asked and agrees."""

    def __init__(self):
        self.asked = []

    def ask(self, pairs):
        self.asked += [offer for _, offer in pairs]
        return [True] * len(pairs)


def test_math_verify_is_not_asked_for_a_power_that_nobody_can_write():
    large = [
        "9^{9^{9^9}}",
        "9^{9^{9}}+1",
        "x^{9^{9^9}}",
        "\\frac{1}{10^{10^{10}}}",
        "9^(9^9)",
        "9^{999999999}",
        "9^{-9^9}",
        "(9^9)^{9^9}",
    ]
    small = ["2^{10}+x", "x^{9^9}", "2^{2^{25}}", "1^{9^{9^9}}", "9^{0^{9^{9^9}}}", "9^{9}x", "x^{999}"]
    pool = Recorder()
    told = equivalent_many([("x", offer) for offer in [*large, *small]], pool)
    assert told == [None] * len(large) + [True] * len(small)
    assert pool.asked == [normal_form(offer) for offer in small]
    assert equivalent_many([(large[0], "x"), (large[0], large[0])], Recorder()) == [None, True], (
        "a reference may be one, too"
    )


@given(st.lists(st.integers(0, 40), min_size=2, max_size=3))
def test_the_digits_of_a_power_are_those_of_its_value(numbers):
    exponent = numbers[2] if len(numbers) == 3 else 1
    assume(numbers[1] ** exponent < 10**9)
    digits = math.log10(max(numbers[0], 1)) * numbers[1] ** exponent
    form = f"{numbers[0]}^{{{numbers[1]}^{exponent}}}" if len(numbers) == 3 else f"{numbers[0]}^{{{numbers[1]}}}"
    assert has_unwritable_power(form) == (digits > MAX_DIGITS)


@given(st.text(alphabet="0129^{}()-x", max_size=60))
def test_no_power_raises(form):
    assert has_unwritable_power(form) in (True, False)


def test_processes_that_do_not_start_are_told(tmp_path):
    program = tmp_path / "broken.py"
    program.write_text("raise SystemExit(1)")
    with pytest.raises(DataError, match="ended before they were ready; see why with: .*broken.py"):
        Pool(workers=1, program=program).ask([("1", "2")])


def test_no_process_is_left_where_asking_is_interrupted(tmp_path):
    pool = worker(tmp_path, "time.sleep(60)", seconds=30)
    started = []
    pool._start, start = lambda: started.append(start()) or started[-1], pool._start

    def interrupted():
        raise KeyboardInterrupt

    pool._reports = interrupted
    with pytest.raises(KeyboardInterrupt):
        pool.ask([("", "x")])
    assert started and all(one.process.poll() is not None for one in started)


def test_hostile_answers_end_and_leave_no_process():
    pool = Pool(workers=2, seconds=1.0)
    try:
        told = equivalent_many([("x+1", text) for text in HOSTILE], pool)
        assert True not in told
        pids = [one.process.pid for one in pool._workers]
    finally:
        pool.close()
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_workers_have_no_jax_and_end_with_their_parent():
    code = """
        import os, sys
        from d1jax.tasks.grading.equivalence import equivalent
        from d1jax.tasks.grading.pool import shared_pool
        assert equivalent("x+y", "y+x")
        pids = [one.process.pid for one in shared_pool()._workers]
        assert not any("jax" in open(f"/proc/{pid}/maps").read() for pid in pids)
        assert "jax" not in sys.modules
        print(*pids)
    """
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    told = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, env=env, check=True
    )
    assert told.stdout.split() and not any(Path(f"/proc/{pid}").exists() for pid in told.stdout.split())


def test_a_missing_library_is_told_with_its_cure(monkeypatch):
    monkeypatch.setattr(equivalence.importlib.util, "find_spec", lambda name: None)
    assert equivalent("1", "1.0") is True, "not needed for this"
    with pytest.raises(DataError, match=r"pip install 'd1jax\[maths\]'"):
        equivalent("x+y", "y+x")


@pytest.mark.parametrize(
    ("gold", "offered"),
    [("\\text{(C)}", "C or D"), ("\\text{(C)}", "C, D"), ("\\text{C}", "C and D"), ("6", "6 \\text{ million}"), ("6", "6 million"),
     ("6", "6\\text{ but also 7}"), ("6", "6_7"), ("3", "x = 3 or x = 5"), ("1,2", "x = 1, y = 2"),
     ("3", "x+y=3"), ("x+y=3", "3"), ("(1,2)", "\\{1,2\\}")],
)  # fmt: skip
def test_a_hedge_is_no_answer(gold, offered):
    assert equivalent(gold, offered) is False


@pytest.mark.parametrize(
    ("gold", "offered"),
    [
        ("31", "8 + 8 + 15 = 31 units"),
        ("5", "x=5"),
        ("1,2", "x = 1 or x = 2"),
        ("-\\frac{1}{2}, 3", "x=3,x=-\\frac12"),
        ("x=1,x=2", "2, 1"),
        ("(0,1]", "0 < x \\leqslant 1"),
    ],
)
def test_what_is_worked_out_or_named_is_one(gold, offered):
    assert equivalent(gold, offered) is True
