"""What every floor needs: words, files, waits."""

import asyncio
import errno
import subprocess

import llmrun
import pytest
from conftest import wait_for

# ── files ──────────────────────────────────────────────────────────────────────


def test_a_line_that_a_crash_tore_costs_no_other():
    assert llmrun.parse_lines([b'{"a": 1}', b'{"a"', b'{"a": 3}']) == [{"a": 1}, {"a": 3}]


@pytest.mark.parametrize("body", [b"{} {}", b"{}x", b"", b"{", b"[" * 100000])
def test_what_is_not_one_json_value_is_none(body):
    with pytest.raises(ValueError):
        llmrun.read_json(body)
    assert llmrun.read_json(b' {"a": [1]}\n') == {"a": [1]}


def full_until(tries, error=errno.ENOSPC):
    """Work on a disk that is full for so many tries."""
    left = [tries]

    def work():
        left[0] -= 1
        if left[0] >= 0:
            raise OSError(error, "as the disk says")
        return "done"
    return work


@pytest.fixture
def time_flies(monkeypatch):
    """The clock goes on by sleeps alone; a minute of them is too many."""
    now = [0.0]

    def sleep(time_s):
        now[0] += time_s
        assert now[0] < 60, "it tries for ever"
    monkeypatch.setattr(llmrun, "clock", lambda: now[0])
    monkeypatch.setattr(llmrun.time, "sleep", sleep)
    return now


def test_a_full_disk_is_waited_for_but_no_other_fault(time_flies):
    assert llmrun.patiently("cannot write", full_until(5)) == "done" and time_flies[0] == 5
    with pytest.raises(OSError):
        llmrun.patiently("cannot write", full_until(1, errno.EACCES))
    assert time_flies[0] == 5


def test_a_disk_that_stays_full_is_given_up(time_flies):
    with pytest.raises(OSError):
        llmrun.patiently("cannot write", full_until(1000), 20)
    assert 20 <= time_flies[0] < 25


# ── words ──────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("time_s, words", [
    (0, "0s"), (59.6, "1m00s"), (61, "1m01s"), (3599, "59m59s"), (3600, "1h00m"), (5442, "1h30m"), (90065, "1d01h01m")])
def test_durations_as_people_say_them(time_s, words):
    assert llmrun.show_duration(time_s) == words


def test_an_error_is_one_line_whatever_is_told_in_it():
    error = llmrun.UserError("a\nb", "c\r\nd", "e\n\n  f")
    assert str(error) == "a b: c d; e f"


def test_of_a_long_log_the_end_is_shown(tmp_path):
    (tmp_path / "log").write_text("".join(f"line {number}\n\n" for number in range(5000)))
    assert llmrun.log_tail(tmp_path / "log") == [f"line {number}" for number in range(5000 - llmrun.TAIL_LINES, 5000)]
    assert llmrun.log_tail(tmp_path / "none") == []


# ── processes and waits ────────────────────────────────────────────────────────


def test_a_process_that_ended_is_dead_though_nobody_waited_for_it():
    child = subprocess.Popen(["sleep", "100"])
    born = llmrun.process_birth(child.pid)
    child.kill()
    wait_for("its death", lambda: llmrun.process_birth(child.pid) == 0, 5)
    child.wait()
    assert born > 0


def soon(work):
    """What a piece of work comes to, within two seconds."""
    return asyncio.run(asyncio.wait_for(work, 2))


def test_a_wait_has_an_end_and_names_what_it_waited_for():
    with pytest.raises(llmrun.ClusterError, match="waited 0s for the engine; see its log"):
        soon(llmrun.wait_until("the engine", lambda: False, 0.05, "see its log", poll_s=0.01))


def test_what_takes_too_long_is_ended():
    async def work():
        working = asyncio.ensure_future(asyncio.sleep(60))
        with pytest.raises(asyncio.TimeoutError):
            await llmrun.within(0.01, working)
        await asyncio.sleep(0)
        return working.cancelled()
    assert soon(work())


def test_a_failure_ends_the_others_and_is_told_at_once():
    ended = []

    async def slow():
        try:
            await asyncio.sleep(60)
        finally:
            ended.append("slow")

    async def fail():
        raise llmrun.ClusterError("node1", "it broke")
    with pytest.raises(llmrun.ClusterError, match="it broke"):
        soon(llmrun.first_failure(slow(), fail()))
    assert ended == ["slow"]


def test_a_full_quota_shows_when_writing_is_tried_and_nothing_is_left_of_it(tmp_path, monkeypatch):
    llmrun.try_writing(tmp_path / "not" / "yet")
    with monkeypatch.context() as patched, pytest.raises(OSError):
        patched.setattr(llmrun.os, "fsync", lambda file: (_ for _ in ()).throw(OSError(llmrun.errno.EDQUOT, "Disk quota exceeded")))
        llmrun.try_writing(tmp_path / "not" / "yet")
    assert list(tmp_path.iterdir()) == []
