"""The runner of mutants tells a fault that is seen from one that is not."""

import os

import mutants
import pytest
from conftest import wait_for
from mutants_list import fault

PROGRAM = "def double(number):\n    return 2 * number\n\n\ndef half(number):\n    return number / 2\n"
TESTS = """
import llmrun, subprocess, time

def test_double():
    subprocess.Popen(["sleep", "987.6"], start_new_session=True)
    assert llmrun.double(3) == 6

def test_half():
    assert llmrun.half(0) == 0

def test_slow():
    while llmrun.half(2) != 1:
        time.sleep(0.1)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A project with one program and three tests, of which one sees little."""
    monkeypatch.setattr(mutants, "ROOT", tmp_path)
    (tmp_path / "llmrun.py").write_text(PROGRAM)
    folder = tmp_path / "copy"
    (folder / "tests").mkdir(parents=True)
    (folder / "tests" / "conftest.py").write_text("import sys\nsys.path.insert(0, '.')\n")
    (folder / "tests" / "test_it.py").write_text(TESTS)
    return folder


def sleepers():
    def argv(pid):
        with open(f"/proc/{pid}/cmdline") as file:
            return file.read().split("\0")
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            found += [pid] if argv(pid)[:2] == ["sleep", "987.6"] else []
        except OSError:
            continue
    return found


def test_a_fault_is_seen_or_not_and_nothing_of_it_is_left(folder):
    before = sleepers()
    doubled = fault("doubles thrice", "2 * number", "3 * number", "test_it.py::test_double")
    halved = fault("halves thrice", "number / 2", "number / 3", "test_it.py::test_half")
    assert mutants.try_out(doubled, folder)[0] == "test_it.py::test_double"
    assert mutants.try_out(halved, folder)[0] == ""
    assert mutants.try_out(halved._replace(tests=()), folder)[0] == ""
    assert "double" in (folder / "llmrun.py").read_text() and "3 * number" not in (folder / "llmrun.py").read_text()
    wait_for("the test's own process to be gone", lambda: sleepers() == before, 5)


def test_a_fault_that_makes_the_tests_hang_is_seen(folder):
    (folder / "llmrun.py").write_text(PROGRAM.replace("number / 2", "number / 3"))
    code, said = mutants.run_tests(folder, ["test_it.py::test_slow"], limit_s=1)
    assert code and "took longer than 1 s" in said


def test_a_mutant_whose_text_is_gone_or_that_is_no_program_is_named():
    two = fault("two places", "number", "x"), fault("gone", "triple", "x")
    broken = fault("no program", "return 2 *", "return 2 * *")
    said = list(mutants.stale([*two, broken], PROGRAM, {broken}))
    assert "stands 4 times" in said[0] and "gone: its text stands 0 times" in said[1] and "no program" in said[2] and len(said) == 3


def test_a_tenth_is_the_same_for_a_commit_and_another_for_the_next():
    def tenth(seed):
        return {mutant.name for mutant in mutants.chosen(mutants.argparse.Namespace(tenth=seed, only=[]))}
    assert tenth("abc") == tenth("abc") != tenth("abd") and len(tenth("abc")) == len(mutants.MUTANTS) // 10
    assert len({mutant.name for mutant in mutants.MUTANTS}) == len(mutants.MUTANTS), "a name says which fault it is"
