"""Checks in processes of their own: each is run, whatever has become of those before it."""

import time

import pytest

from inflora.isolated import Verdict, called, run_checks
from tests import planted

ENDS = {
    planted.breaks: (Verdict.FAILED, "RuntimeError: CUDA error: no kernel image is available"),
    planted.finds_something: (Verdict.FAILED, "the loss is nan"),
    planted.crashes: (Verdict.FAILED, "its process died of SIGSEGV"),
    planted.leaves: (Verdict.FAILED, "its process died of exit code 3"),
    planted.has_nothing_to_try: (Verdict.NOT_TRIED, "1 GPU"),
    planted.passes: (Verdict.PASSED, "all is well on cpu"),
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    checks = {check.__name__: check for check in ENDS}
    return list(run_checks(checks, "cpu", tmp_path_factory.mktemp("checks")))


def test_every_check_runs_in_turn_however_the_ones_before_it_ended(outcomes):
    assert [(each.name, each.verdict, each.detail) for each in outcomes] == [
        (check.__name__, verdict, detail) for check, (verdict, detail) in ENDS.items()
    ]


def test_what_a_failed_check_printed_is_kept_with_its_traceback(outcomes):
    printed = {each.name: each.printed for each in outcomes}
    assert printed["finds_something"].startswith("the loss is nan\nTraceback")
    assert "no kernel image" in printed["breaks"]
    assert "in crashes" in printed["crashes"], "also of a crash it is known where"
    assert printed["passes"] == ""


def test_nothing_of_it_is_printed_here(tmp_path, capfd):
    list(run_checks({"finds": planted.finds_something}, "cpu", tmp_path))
    assert capfd.readouterr() == ("", "")


def test_a_check_that_hangs_is_ended_and_the_next_one_runs(tmp_path):
    start = time.monotonic()
    (hung,) = run_checks({"hangs": planted.hangs}, "cpu", tmp_path / "hung", limit_s=1)
    assert (hung.verdict, hung.detail) == (Verdict.FAILED, "has not ended after 1 s")
    (after,) = run_checks({"passes": planted.passes}, "cpu", tmp_path / "after")
    assert after.verdict is Verdict.PASSED
    assert time.monotonic() - start < 60


def test_an_answer_comes_back_as_a_value(tmp_path):
    with called(divmod, 7, 2, output=tmp_path / "printed") as answer:
        assert answer(60) == (3, 1)
