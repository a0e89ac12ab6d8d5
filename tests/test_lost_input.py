"""Prompts that cannot be read for a while, or are not what they were any more, when their turn comes."""

import asyncio
import errno
import json
import math
import os
import time
import types

import llmrun
import pytest
import test_suspects

loop = test_suspects.loop


class Module:
    """Stands for a module of Python's in the program, with some of its functions replaced."""

    def __init__(self, module, **functions):
        self.__dict__ = {**functions, "module": module}

    def __getattr__(self, name):
        return getattr(self.module, name)


class Asked:
    """A run whose prompts are asked of an engine that answers at once; in a time that costs none, also where a driver
    that begins sleeps in it. `failing(path)` says whether a read of the input fails at this moment."""

    def __init__(self, tmp_path, loop, monkeypatch, user, change=lambda: None, failing=lambda path, now: None):
        self.asking, self.told = False, []

        def rest(time_s):
            assert not self.asking, "a driver that stands still is taken for dead"
            loop.jumping.now += time_s

        def check(path):
            number = failing(str(path), loop.time())
            if number:
                raise OSError(number, os.strerror(number), str(path))

        def opened(path, *mode, **how):
            check(path)
            return open(path, *mode, **how)

        def pread(file, length, offset):
            check(os.readlink(f"/proc/self/fd/{file}"))
            return os.pread(file, length, offset)
        config = llmrun.build_config(llmrun.Config, {"engine": {"name": "echo"}, "run_dir": str(tmp_path / "runs"), "prompts": {
            "user": str(tmp_path / user), "template": "" if user == "texts" else "{x}"}}, "config.toml", None)
        self.run = llmrun.create_run(config, llmrun.freeze(config, "m"), lambda run: "")
        change()
        monkeypatch.setattr(llmrun, "time", Module(time, sleep=rest))
        monkeypatch.setattr(llmrun, "os", Module(os, pread=pread))
        monkeypatch.setattr(llmrun, "open", opened, raising=False)
        allocation = llmrun.Allocation(0, 0, ["n1"], {}, math.inf, False, 0)
        driver = llmrun.Driver(self.run, config, 0, self.run.new_life(0, 0), allocation, lambda event, **facts: self.told.append(
            (event, facts.get("why"))))
        asyncio.set_event_loop(loop)
        try:
            loop.run_until_complete(self.live(driver))
        finally:
            asyncio.set_event_loop(None)
            monkeypatch.undo()
        self.failed = {json.loads(line)["custom_id"]: json.loads(line) for line in self.lines("errors.jsonl")}
        self.answered = [json.loads(line)["custom_id"] for line in self.lines("results.jsonl")]

    async def tend(self, work):
        while True:
            await asyncio.sleep(work.TEND_S)
            work.tend()

    def lines(self, name):
        path = self.run.results / name
        return path.read_text().splitlines() if path.exists() else []

    async def live(self, driver):
        loop = asyncio.get_running_loop()
        work = llmrun.Prompts.begin(driver)
        replica = types.SimpleNamespace(number=0, engine=types.SimpleNamespace(in_flight=4, request_timeout=math.inf), unless_failed=lambda serving: serving)
        replica.client = types.SimpleNamespace(
            ask=lambda method, url, body, limit, then: loop.call_later(0.1, then, test_suspects.says("an answer")))
        living = asyncio.ensure_future(work.do([(replica, asyncio.ensure_future(asyncio.sleep(0)))], math.inf))
        tending = asyncio.ensure_future(self.tend(work))
        self.asking = True
        await asyncio.wait([living], timeout=3600)
        ended, self.asking = living.done(), False
        living.cancel()
        tending.cancel()
        await asyncio.gather(living, tending, return_exceptions=True)
        assert ended, "it waits for ever"
        living.result()
        work.close(0.0)
        self.ending = work.verdict()
        work.save(self.ending)


def texts(tmp_path, count=8):
    (tmp_path / "texts").mkdir()
    for number in range(count):
        (tmp_path / "texts" / f"{number}.txt").write_text(f"Question {number}")


def rows(tmp_path, name, count=8):
    (tmp_path / name).write_text("".join(json.dumps({"x": f"Question {number}"}) + "\n" for number in range(count)))


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO, errno.ETIMEDOUT], ids=errno.errorcode.get)
@pytest.mark.parametrize("user, before", [("texts", 1), ("a.jsonl", 1), ("a.jsonl", 0)])
def test_prompts_that_cannot_be_read_for_a_minute_are_asked_then(tmp_path, loop, monkeypatch, user, before, number):
    """A file server was started anew; so many reads come before that."""
    texts(tmp_path)
    rows(tmp_path, "a.jsonl")
    times = []

    def failing(path, now):
        if user in path and "runs" not in path:
            times.append(now)
            return number if len(times) > before and now < times[0] + 60 else None
        return None
    asked = Asked(tmp_path, loop, monkeypatch, user, failing=failing)
    assert len(asked.answered) == 8 and not asked.failed and asked.ending.code == llmrun.DONE
    assert len(times) < 1000, "and the file server is not asked without a rest"


def test_a_text_that_was_changed_fails_alone(tmp_path, loop, monkeypatch):
    texts(tmp_path)

    def change():
        (tmp_path / "texts" / "3.txt").write_text("Another question")
        (tmp_path / "texts" / "5.txt").unlink()
    asked = Asked(tmp_path, loop, monkeypatch, "texts", change)
    assert asked.ending.code == llmrun.SOME_FAILED and sorted(asked.failed) == ["3.txt", "5.txt"] and len(asked.answered) == 6
    assert "changed after the run was submitted" in asked.failed["3.txt"]["error"]["message"]


@pytest.mark.parametrize("change", ["another row", "a longer row", "no row", "cut short"])
def test_of_a_table_that_was_changed_the_rows_from_there_on_fail_and_other_files_go_on(tmp_path, loop, monkeypatch, change):
    rows(tmp_path, "a.jsonl")
    rows(tmp_path, "b.jsonl")

    def change_it():
        path = tmp_path / "a.jsonl"
        lines = path.read_text().splitlines(keepends=True)
        lines[4:] = {"another row": [lines[4].replace("Question", "Response"), *lines[5:]],
                     "a longer row": [lines[4].replace("Question", "Quite another question"), *lines[5:]],
                     "no row": ["x" * (len(lines[4]) - 1) + "\n", *lines[5:]], "cut short": []}[change]
        path.write_text("".join(lines))
    asked = Asked(tmp_path, loop, monkeypatch, "?.jsonl", change_it)
    assert asked.ending.code == llmrun.SOME_FAILED
    assert asked.answered == [f"a-{row}" for row in (1, 2, 3, 4)] + [f"b-{row}" for row in range(1, 9)]
    assert sorted(asked.failed) == [f"a-{row}" for row in (5, 6, 7, 8)]
    assert all("changed after the run was submitted" in record["error"]["message"] for record in asked.failed.values())


def test_what_cannot_be_read_is_told_and_again_when_it_can(tmp_path, loop, monkeypatch):
    """Among the prompts: some are under way or rest when it begins."""
    texts(tmp_path, 200)
    asked = Asked(tmp_path, loop, monkeypatch, "texts", failing=lambda path, now: (
        errno.ESTALE if "texts" in path and 0.2 < now < 30 else None))
    said = [facts for facts in asked.told if facts[0].startswith("trouble")]
    assert said == [("trouble", f"prompts cannot be read ({os.strerror(errno.ESTALE).lower()}): waiting"), ("trouble_over", "")]
    assert len(asked.answered) == 200 and not asked.failed


@pytest.mark.parametrize("user", ["a.jsonl", "?.jsonl"])
def test_a_file_that_is_gone_fails_its_rows_and_no_others(tmp_path, loop, monkeypatch, user):
    rows(tmp_path, "a.jsonl", 30)
    rows(tmp_path, "b.jsonl", 3 if "?" in user else 0)
    asked = Asked(tmp_path, loop, monkeypatch, user, (tmp_path / "a.jsonl").unlink)
    assert len(asked.failed) == 30 and asked.failed["a-30"]["error"]["message"] == f"{tmp_path / 'a.jsonl'}: no such file or directory"
    assert asked.answered == [f"b-{row}" for row in (1, 2, 3)][:3 if "?" in user else 0]


def test_a_handle_that_a_file_server_has_forgotten_is_opened_anew(tmp_path):
    rows(tmp_path, "a.jsonl")
    config = llmrun.build_config(llmrun.Config, {"prompts": {"user": str(tmp_path / "a.jsonl"), "template": "{x}"}}, "config.toml", None)
    frozen = llmrun.freeze(config, "m")
    held = llmrun.Rows(frozen.sources[0], f"{frozen.spool.name}/0.index")
    assert b"Question 0" in held[0]
    held.data = b""
    os.close(held.file.fileno())
    with pytest.raises(OSError):
        held[1]
    assert b"Question 1" in held[1]
