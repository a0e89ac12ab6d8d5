"""Many bad days of many drivers, and that the simulation would see it if something were wrong."""

import asyncio
import errno
import os
import re
import subprocess
import sys
import threading
import types
from pathlib import Path

import llmrun
import pytest
import simulation

SCRIPT = Path(simulation.__file__)
MUST_OCCUR = [
    "answers of two lives", "bytes lost", "drains", "drivers ended by the disk", "errors beaten by a success", "failed appends",
    "failed beats", "failed claims", "failed closes", "failed creates", "failed reads", "failed syncs", "holes", "host crashes",
    "journal_trouble", "journal_well", "kills", "kills in an operation", "links asked for twice", "lives beside an earlier one",
    "lives that ask failed prompts again", "merges", "pauses", "resumes", "results of a part", "stale looks", "takeovers",
    "torn writes"]


def test_every_result_stands_once_in_every_merge_whatever_happens():
    counts, broken = simulation.simulate_some(range(500))
    assert not broken, "\n".join(broken.values())
    assert counts["seeds"] == 500 and counts["lives"] > 1500 and counts["prompts"] > 10000
    assert not [name for name in MUST_OCCUR if not counts[name]], counts


def test_a_seed_is_the_same_every_time():
    for seed in (3, 77):
        one, other = [], []
        assert simulation.simulate(seed, one) == simulation.simulate(seed, other)
        assert one == other and len(one) > 90


def test_a_seed_is_the_same_in_every_process():
    code = "import simulation, zlib; t = []; simulation.simulate(3, t); " \
           "print(len(t), zlib.crc32(repr(t).encode()))"
    told = {subprocess.check_output([sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}, cwd=SCRIPT.parent)
            for seed in ("1", "2")}
    assert len(told) == 1


def test_the_command_says_what_it_saw():
    words = [sys.executable, SCRIPT, "--seeds", "20", "--set", "claim=0.05"]
    told = subprocess.run(words, text=True, stdout=subprocess.PIPE, check=True).stdout
    assert "20  seeds" in told and "0 of 20 seeds broke a rule" in told


# ── the simulation sees what is wrong ──────────────────────────────────────────


def first_seen(monkeypatch, change):
    """What breaks first by a change that is wrong, in a seed that is well without it."""
    for seed in range(120):
        with monkeypatch.context() as patch:
            change(patch)
            _, broken = simulation.simulate_some([seed])
        if broken and not simulation.simulate_some([seed])[1]:
            return broken[seed]
    return "nothing"


def last_line_wins(monkeypatch):
    def mark(self, key, ok, place):
        number = self.prompts.number(key)
        self.state[number], self.place[number] = self.DONE if ok else self.FAILED, place
    monkeypatch.setattr(llmrun.Marks, "mark", mark)


def errors_win(monkeypatch):
    mark = llmrun.Marks.mark

    def wrong(self, key, ok, place):
        if self.state[self.prompts.number(key)] != self.FAILED:
            mark(self, key, ok, place)
            if not ok:
                self.state[self.prompts.number(key)], self.place[self.prompts.number(key)] = self.FAILED, place
    monkeypatch.setattr(llmrun.Marks, "mark", wrong)


def unsynced_lines_are_forgotten(monkeypatch):
    fail = llmrun.Journal.fail

    def wrong(self, error):
        self.unsynced = []
        fail(self, error)
    monkeypatch.setattr(llmrun.Journal, "fail", wrong)


def synced_is_what_is_written(monkeypatch):
    write_lines = llmrun.Journal.write_lines

    def wrong(self):
        write_lines(self)
        self.unsynced = []
    monkeypatch.setattr(llmrun.Journal, "write_lines", wrong)


def torn_lines_count(monkeypatch):
    def read(self, index):
        data = self.run.disk.read(self.segments[index].path, self.read_to[index])
        for line in data.split(b"\n"):
            match = llmrun.KEY_IN_LINE.match(line)
            if match:
                self.mark(tuple(map(int, match.groups())), line.endswith(llmrun.OK_END), index << 44 | self.read_to[index])
            self.read_to[index] += len(line) + 1
    monkeypatch.setattr(llmrun.Marks, "read", read)


def nothing_is_taken_over(monkeypatch):
    monkeypatch.setattr(simulation, "LONGEST_S", 3600)
    monkeypatch.setattr(llmrun.Claims, "is_gone", lambda *about: False)


@pytest.mark.parametrize("change", [last_line_wins, errors_win, unsynced_lines_are_forgotten, synced_is_what_is_written,
                                    torn_lines_count, nothing_is_taken_over], ids=lambda change: change.__name__)
def test_a_wrong_rule_is_seen(monkeypatch, change):
    broken = first_seen(monkeypatch, change)
    assert re.search("the rule says|a result without a line|was told|no end comes|ends with work left", broken), broken


def test_two_writers_of_one_journal_are_seen(monkeypatch):
    monkeypatch.setattr(simulation, "LONGEST_S", 3600)
    _, broken = simulation.simulate_some(range(10), one_journal=True)
    assert len(broken) > 3


# ── what it has found ──────────────────────────────────────────────────────────


class Rows:
    """One prompt."""

    def __len__(self):
        return 1

    def number(self, key):
        return 0


def result(status):
    return llmrun.Result(llmrun.Prompt((0, 0, 0), "p", "", b""), status, b"{}", {}, None, 0, 0, 1, 0)


@pytest.fixture
def run(tmp_path):
    (tmp_path / "journal").mkdir()
    return llmrun.Run(tmp_path)


def write(run, life, status):
    async def work():
        journal.add(result(status))
    journal = llmrun.Journal(run, life)
    asyncio.run(work())
    journal.close()


@pytest.mark.parametrize("again", [True, False], ids=["asked again", "another's error"])
def test_a_success_takes_the_place_of_an_error_that_was_read_before(run, again):
    write(run, llmrun.Life(1, 0, 0), 400)
    marks = llmrun.Marks(run, Rows(), llmrun.Marks(run, Rows()).places() if again else None)
    write(run, llmrun.Life(2, 0, 0), 200)
    marks.settle(0, True)
    marks.refresh()
    line, = [line for _, line in marks.lines((llmrun.Marks.DONE,))]
    assert line.endswith(llmrun.OK_END + b"\n")


@pytest.mark.parametrize("hole", [b"", b"\0" * 50], ids=["glued", "zeros"])
def test_two_pieces_of_lines_are_no_line(run, hole):
    whole = llmrun.journal_line(result(200))
    for name, data in (("1.0.0.0", whole[:60] + hole + whole[(20 if hole else 0):]), ("1.0.0.1", whole)):
        (run.journal / f"{name}.jsonl").write_bytes(data)
    assert [line for _, line in llmrun.Marks(run, Rows()).lines((llmrun.Marks.DONE,))] == [whole]


class LosesOnce(llmrun.Disk):
    """A disk whose first sync takes until the loop has ended, fails and loses all; failures are told once."""

    def __init__(self):
        self.asked, self.over = threading.Event(), threading.Event()

    def sync(self, file):
        if self.asked.is_set():
            return
        self.asked.set()
        self.over.wait(5)
        os.ftruncate(file, 0)
        raise OSError(errno.EIO, "Input/output error")


def test_a_sync_that_fails_while_the_loop_ends_costs_no_result(run, monkeypatch):
    monkeypatch.setattr(llmrun.Journal, "SYNC_AFTER_S", 0.0)
    run.disk = LosesOnce()
    journal = llmrun.Journal(run, llmrun.Life(1, 0, 0))

    async def work():
        journal.add(result(200))
        while not run.disk.asked.is_set():
            await asyncio.sleep(0.01)
        asyncio.get_running_loop().call_soon(threading.Timer(0.1, run.disk.over.set).start)
    asyncio.run(work())
    journal.close()
    assert llmrun.Marks(run, Rows()).count(llmrun.Marks.DONE) == 1


def test_a_line_that_was_lost_after_it_was_read_is_taken_from_the_new_segment(run, monkeypatch):
    """A sync that fails on a full quota drops what the file system had taken; the journal writes it once more."""
    run.claims.mkdir()
    life, told = llmrun.Life(1, 0, 0), []
    whole = llmrun.journal_line(result(200))
    (run.journal / f"{life}.0.jsonl").write_bytes(whole)
    claims = llmrun.Claims(run, life, llmrun.Marks(run, Rows()), [0, 1])
    (run.journal / f"{life}.0.jsonl").write_bytes(b"")
    (run.journal / f"{life}.1.jsonl").write_bytes(whole)
    monkeypatch.setattr(llmrun, "write_results", lambda run, config, marks: told.extend(marks.lines((llmrun.Marks.DONE,))))
    work = llmrun.Prompts(run, None, claims, types.SimpleNamespace(close=lambda: None), None)
    allocation = types.SimpleNamespace(job=1, ends_at=llmrun.math.inf)
    llmrun.Driver(run, None, 0, life, allocation, None).finish(work, llmrun.Stop(llmrun.DONE))
    assert told == [(0, whole)]
