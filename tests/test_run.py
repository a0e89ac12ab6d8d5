"""A run's folder: who may read it, what is written how; and where a run stands, by its events and Slurm's word."""

import errno
import json
import os
import re
import socket
import time

import llmrun
import pytest
from conftest import bytes_read

# ── the disk that drivers share ────────────────────────────────────────────────


def test_a_file_for_appending_was_nobodys_before(tmp_path):
    disk = llmrun.Disk()
    disk.close(disk.create(tmp_path / "segment"))
    with pytest.raises(FileExistsError):
        disk.create(tmp_path / "segment")


def test_what_the_disk_took_in_parts_is_whole(tmp_path, monkeypatch):
    write, disk = os.write, llmrun.Disk()
    file = disk.create(tmp_path / "segment")
    monkeypatch.setattr(os, "write", lambda file, data: write(file, data[:3]))
    disk.append(file, b"a whole line\n")
    monkeypatch.undo()
    disk.close(file)
    assert (tmp_path / "segment").read_bytes() == b"a whole line\n"


def test_only_one_gets_a_new_file_and_nothing_else_is_left(tmp_path):
    disk = llmrun.Disk()
    assert [disk.put_new(tmp_path / "0.0", life) for life in (b"1.0.0", b"2.0.0")] == [True, False]
    assert (tmp_path / "0.0").read_bytes() == b"1.0.0" and os.listdir(tmp_path) == ["0.0"]


@pytest.mark.parametrize("refusal", [errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS], ids=errno.errorcode.get)
def test_only_one_gets_a_new_file_on_a_file_system_that_knows_no_links(tmp_path, monkeypatch, refusal):
    def link(source, target):
        raise OSError(refusal, os.strerror(refusal))
    monkeypatch.setattr(os, "link", link)
    disk = llmrun.Disk()
    assert [disk.put_new(tmp_path / "0.0", life) for life in (b"1.0.0", b"2.0.0")] == [True, False]
    assert (tmp_path / "0.0").read_bytes() == b"1.0.0" and os.listdir(tmp_path) == ["0.0"]


# ── the folder ─────────────────────────────────────────────────────────────────


@pytest.fixture
def run(tmp_path):
    """A run of ten prompts."""
    (tmp_path / "in.jsonl").write_text("".join(f'{{"x": "{number}"}}\n' for number in range(10)))
    config = llmrun.build_config(llmrun.Config, {
        "engine": {"name": "echo"}, "run_dir": str(tmp_path / "runs"),
        "prompts": {"user": str(tmp_path / "in.jsonl"), "template": "{x}"}}, "config.toml", None)
    return llmrun.create_run(config, llmrun.freeze(config, "m"), lambda run: "")


def test_a_run_is_its_users_alone(run):
    assert run.folder.stat().st_mode & 0o777 == 0o700 and run.key_file.stat().st_mode & 0o777 == 0o600


def test_two_runs_of_one_moment_have_each_a_folder(tmp_path):
    folders = [llmrun.new_folder(tmp_path, "test-20261121-170509") for _ in range(3)]
    assert [folder.name[4:] for folder in folders] == ["-20261121-170509", "-20261121-170509-2", "-20261121-170509-3"]


def test_the_frozen_program_is_the_one_that_submitted(run, tmp_path, monkeypatch):
    (tmp_path / "llmrun.py").write_text("another")
    monkeypatch.chdir(tmp_path)
    again = llmrun.create_run(run.config(), llmrun.freeze(run.config(), "m"), lambda run: "")
    with open(llmrun.__file__, "rb") as file:
        assert again.script.read_bytes() == file.read()


def tell(run, life, *events):
    """Write what happened in a life."""
    with open(run.events_file(life), "a") as file:
        file.writelines(json.dumps(event) + "\n" for event in events)


def started(job=7, at=100.0, **facts):
    """The first event of a driver that lives, here, unless the facts say otherwise."""
    pid = os.getpid()
    return {"event": "start", "time": at, "job": job, "submitted": job, "nodes": ["n1"], "pid": pid,
            "born": llmrun.process_birth(pid), "host": socket.gethostname(), **facts}


def progressed(answers, failed=0, tokens=0, working_s=2.0, at=110.0):
    return {"event": "progress", "time": at, "answers": answers, "own_failed": failed, "tokens": tokens, "working_s": working_s}


def ended(code=0, at=120.0, done=10, answered=10):
    return {"event": "end", "time": at, "code": code, "why": "", "next": "", "answered": answered, "own_failed": 0, "done": done,
            "failed": 0}


LIFE = llmrun.Life(7, 0, 0)


def test_what_a_life_tells_later_is_seen_later(run):
    tell(run, LIFE, started())
    assert len(run.events(LIFE)) == 1
    tell(run, LIFE, progressed(3))
    assert run.progress(LIFE)["answers"] == 3


def test_a_torn_word_on_progress_does_not_hide_the_one_before(run):
    tell(run, LIFE, started(), progressed(3))
    with open(run.events_file(LIFE), "a") as file:
        file.write('{"event": "progress", "answers": 4')
    assert run.progress(LIFE)["answers"] == 3


def test_a_torn_last_event_is_there_when_it_is_whole(run):
    tell(run, LIFE, started())
    with open(run.events_file(LIFE), "a") as file:
        file.write('{"event": "ready", "time": 3}')
    assert len(run.events(LIFE)) == 1
    with open(run.events_file(LIFE), "a") as file:
        file.write("\n")
    assert [event["event"] for event in run.events(LIFE)] == ["start", "ready"]


def test_an_event_behind_a_torn_one_is_whole(run, monkeypatch):
    life, write = run.new_life(7, 0), os.write
    events = llmrun.Events(run, life)
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda file, data: write(file, data[:10]))  # the disk is full
        events.write("start")
    events.write("end")
    assert [event["event"] for event in run.events(life)] == ["end"]


# ── where it stands ────────────────────────────────────────────────────────────


def slurm_says(state, job=7, reason="None"):
    return {job: llmrun.Job(str(job), state, reason, "N/A", "N/A", "5:00", "n1")}


def stands(run, jobs=None):
    return llmrun.state_of(run, jobs or {})


def test_a_process_that_got_a_dead_drivers_number_is_not_the_driver(run):
    tell(run, LIFE, started(born=1))
    assert stands(run)["state"] == "killed" and stands(run)["exit_code"] == 3


@pytest.mark.parametrize("state, words", [
    ("TIMEOUT", "the time limit came"), ("NODE_FAIL", "a node failed"), ("OUT_OF_MEMORY", "out of memory"), ("PREEMPTED", "preempted")])
def test_a_driver_elsewhere_whose_job_has_ended_was_killed_and_by_what(run, state, words):
    tell(run, LIFE, started(host="elsewhere"))
    assert stands(run, slurm_says("RUNNING"))["exit_code"] is None
    found = stands(run, slurm_says(state))
    assert found["state"] == "killed" and words in found["detail"]


def test_speed_and_the_time_that_is_left_are_of_all_lives(run):
    for job in (7, 8):
        tell(run, llmrun.Life(job, 0, 0), started(job), progressed(3, failed=1, tokens=8))
    found = stands(run)
    assert (found["done"], found["failed"], found["tokens_per_s"], found["left_s"]) == (4, 2, 8.0, 1)
    assert found["jobs"] == 2 and found["nodes"] == ["n1", "n1"]


def test_what_two_lives_answered_counts_once_at_most(run):
    for job in (7, 8):
        tell(run, llmrun.Life(job, 0, 0), started(job), progressed(8))
    assert stands(run)["done"] == 10


def test_a_jobs_latest_life_has_the_last_word(run):
    tell(run, llmrun.Life(7, 1, 0), started(at=300.0), dict(ended(3, at=310.0, done=4, answered=1), why="the engine broke"))
    tell(run, llmrun.Life(7, 0, 0), started(at=100.0), dict(ended(4, done=3, answered=3), next="requeued"))
    found = stands(run)
    assert (found["exit_code"], found["detail"], found["done"]) == (3, "the engine broke", 4)


def test_a_run_is_done_though_an_old_driver_hangs(run):
    tell(run, llmrun.Life(7, 0, 0), started(7), progressed(2))
    tell(run, llmrun.Life(8, 0, 0), started(8, at=105.0), ended())
    assert stands(run)["state"] == "done" and stands(run)["exit_code"] == 0
    tell(run, llmrun.Life(9, 0, 0), started(9, at=130.0))
    assert stands(run)["exit_code"] is None, "a driver that began after that end"


def test_slurm_is_not_asked_at_every_look(run, monkeypatch):
    asked, now = [], [1000.0]

    class Slurm:
        def jobs(self, ids, *how, **wishes):
            asked.append(ids)
            return slurm_says("RUNNING")
    monkeypatch.setattr(llmrun, "clock", lambda: now[0])
    tell(run, LIFE, started())
    look = llmrun.state_watch(run, Slurm())
    for _ in range(100):
        look()
        now[0] += 0.3
    assert len(asked) == 2, "sites ban who asks more often than every 15 s"


def test_a_life_that_another_has_followed_is_over_whatever_slurm_says_of_their_job(run):
    """A lost node's driver says nothing of its end, and the job runs again, under the same id and elsewhere."""
    tell(run, llmrun.Life(7, 0, 0), started(host="there", nodes=["n1"]), progressed(3))
    waits = stands(run, slurm_says("PENDING", reason="BeginTime"))
    assert waits["state"] == "pending" and waits["nodes"] == [] and waits["exit_code"] is None
    tell(run, llmrun.Life(7, 1, 0), started(at=200.0, host="elsewhere", nodes=["n2"]))
    runs = stands(run, slurm_says("RUNNING"))
    assert (runs["nodes"], runs["jobs"], runs["state"], runs["done"]) == (["n2"], 1, "starting", 3)
    assert stands(run, slurm_says("COMPLETING"))["state"] == "starting"


@pytest.mark.parametrize("in_slurm, before, after", [
    *((state, "pending", "pending") for state in ("PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT", "RESV_DEL_HOLD")),
    ("CONFIGURING", "starting", "answering"), *((state, "starting", "answering") for state in ("RUNNING", "RESIZING", "SIGNALING")),
    *((state, "starting", "suspended") for state in ("SUSPENDED", "STOPPED")),
    *((state, "starting", "answering") for state in ("COMPLETING", "STAGE_OUT")),
    *((state, "failed", "killed") for state in llmrun.ENDED_STATES)])
def test_each_state_that_slurm_shows_has_its_word(run, in_slurm, before, after):
    """Of a job that has not begun, and of one whose driver said last that it answers."""
    run.record_submit(7, shape=0)
    jobs = slurm_says(in_slurm, reason="None")
    assert stands(run, jobs)["state"] == before and (stands(run, jobs)["exit_code"] is None) == (before != "failed")
    tell(run, LIFE, started(host="elsewhere"), {"event": "ready", "time": 101.0})
    assert stands(run, jobs)["state"] == after and (stands(run, jobs)["exit_code"] is None) == (after != "killed")


@pytest.mark.parametrize("state, words", [("CONFIGURING", "being made ready"), ("REQUEUE_HOLD", "`scontrol release` lets it go"),
                                          ("RESV_DEL_HOLD", "administrator")])
def test_what_keeps_a_job_is_said(run, state, words):
    run.record_submit(7, shape=0)
    assert words in stands(run, slurm_says(state, reason="None"))["detail"]


@pytest.mark.parametrize("reason, words", [("BeginTime", "about two minutes"), ("PartitionTimeLimit", "never start"), ("NewOne", "NewOne")])
def test_why_a_job_waits_is_said_in_words(run, reason, words):
    run.record_submit(7, shape=0)
    found = stands(run, slurm_says("PENDING", reason=reason))
    assert found["state"] == "pending" and words in found["detail"] and found["exit_code"] is None
    job = slurm_says("PENDING")[7]._replace(start=str(int(time.time())), ahead=3)
    assert "3 waiting jobs" in llmrun.pending_words(job) and "expected to start" in llmrun.pending_words(job)


# ── the watch over a run ───────────────────────────────────────────────────────


class Squeue:
    """A Slurm whose squeue shows these rows, or fails; `asked` are the words of each call of one of its commands."""

    def __init__(self, folder, monkeypatch):
        self.folder, self.now = folder / "slurm", 1000.0
        self.folder.mkdir()
        for name, lines in (("squeue", ["case \"$*\" in *PENDING*) echo 'main|1|99'; exit;; esac", "[ -e refused ] && exit 1", "cat rows"]),
                            ("scontrol", ["echo 'JobId=7 ExitCode=0:9'"])):
            text = "\n".join(["#!/bin/sh", f"cd {self.folder}", f"echo {name} \"$@\" >> asked", *lines, ""])
            (self.folder / name).write_text(text)
            (self.folder / name).chmod(0o755)
        self.slurm = llmrun.Slurm({"PATH": f"{self.folder}:{os.environ['PATH']}"})
        monkeypatch.setattr(llmrun, "clock", lambda: self.now)
        self.shows()

    def shows(self, *rows):
        """Rows are (job, state, reason)."""
        (self.folder / "refused").unlink(missing_ok=True)
        (self.folder / "rows").write_text("".join(f"{job}|{state}|{reason}|N/A|N/A|5:00|n1\n" for job, state, reason in rows))

    def fails(self):
        (self.folder / "refused").touch()

    def asked(self, *words):
        lines = (self.folder / "asked").read_text().splitlines() if (self.folder / "asked").exists() else []
        return [line for line in lines if all(word in line for word in words)]


@pytest.fixture
def squeue(tmp_path, monkeypatch):
    return Squeue(tmp_path, monkeypatch)


@pytest.mark.parametrize("begun", [False, True])
def test_a_slurm_that_did_not_answer_has_not_said_that_a_job_is_gone(run, squeue, begun):
    """Of a job that has not begun, and of one whose driver is on another node."""
    run.record_submit(7, shape=0)
    if begun:
        tell(run, LIFE, started(host="elsewhere"))
    squeue.fails()
    look = llmrun.state_watch(run, squeue.slurm)
    for _ in range(5):
        assert look()["exit_code"] is None and look()["state"] not in ("killed", "failed")
        squeue.now += 20
    squeue.shows((7, "RUNNING", "None"))
    assert look()["exit_code"] is None
    squeue.fails()
    squeue.now += 20
    assert look()["exit_code"] is None
    squeue.shows()
    squeue.now += 20
    assert look()["exit_code"] == 3, "it answers, and knows of no such job"


def test_who_waits_in_a_pipe_reads_each_new_reason_why(run, squeue, monkeypatch, capsys):
    run.record_submit(7, shape=0)
    told = iter([("PENDING", "Priority"), ("PENDING", "Priority"), ("PENDING", "ReqNodeNotAvail"), ("PENDING", "JobHeldAdmin")])

    def pause(child, time_s):
        squeue.now += 20
        state = next(told, None)
        if state:
            squeue.shows((7, *state))
        else:
            tell(run, LIFE, started(), ended())
    pause(None, 0)
    monkeypatch.setattr(llmrun, "pause", pause)
    assert llmrun.follow(run, squeue.slurm) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("pending")]
    assert [bool(re.search(words, line)) for words, line in zip(("waiting its turn", "nodes that are down", "administrator"), said)] == [True] * 3
    assert len(said) == 3, "and no line comes twice"


def test_a_watch_asks_slurm_for_what_may_change_and_for_no_more(run, squeue):
    """Thousands may watch: what is over is asked once, and nobody's queue but on an explicit `status`."""
    for job, state in ((6, "FAILED"), (7, "COMPLETED"), (8, "RUNNING"), (9, "PENDING")):
        run.record_submit(job, shape=0)
        if state != "PENDING":
            tell(run, llmrun.Life(job, 0, 0), started(job, host="elsewhere"))
    squeue.shows((6, "FAILED", "NonZeroExitCode"), (7, "COMPLETED", "None"), (8, "RUNNING", "None"), (9, "PENDING", "Priority"))
    look = llmrun.state_watch(run, squeue.slurm)
    for _ in range(10):
        assert look()["state"] == "starting"
        squeue.now += 20
    assert len(squeue.asked("scontrol", "6")) <= 1, "how a killed life died"
    assert not squeue.asked("squeue", "PENDING") and not squeue.asked("squeue", "PD"), "the whole cluster's queue"
    asked = squeue.asked("squeue", "-j")
    assert 2 <= len(asked) <= 10 and "8" in asked[-1] and "9" in asked[-1]
    assert all(not re.search(r"-j \S*\b[67]\b", line) for line in asked[1:]), asked


def test_a_look_reads_on_from_where_the_last_one_ended(run):
    """Lives that were killed have no last word, and one that answers for days tells of its progress by the thousand."""
    lives = [llmrun.Life(7, restart, 0) for restart in range(10)]
    for life in lives:
        tell(run, life, started(at=100.0 + life.restart), *(progressed(n, at=110.0 + life.restart) for n in range(500)))
    size = sum(run.events_file(life).stat().st_size for life in lives)
    look = llmrun.state_watch(run, None)
    assert look()["done"] == 10 and size > 500_000
    assert bytes_read(look) < size / 10
    tell(run, lives[-1], progressed(3, at=200.0))
    with open(run.events_file(lives[-1]), "a") as file:
        file.write('{"event": "progress", "time": 201.0, "answers": 9, "own_failed": 4, ')
    assert bytes_read(look) < size / 10
    assert look()["failed"] == 0
    with open(run.events_file(lives[-1]), "a") as file:
        file.write('"tokens": 1, "working_s": 1.0}\n')
    assert look()["failed"] == 4, "a line that was torn then is whole now"
    with open(run.events_file(lives[-1]), "a") as file:
        file.write(json.dumps(ended(3)) + "\n")
    assert look()["exit_code"] == 3


# ── several lives ──────────────────────────────────────────────────────────────


def left(at, done, why="told to end (SIGTERM)", code=4, **facts):
    return {**ended(code, at, done, **facts), "why": why}


def test_the_counts_of_a_run_are_those_of_its_last_life(run):
    """It was cancelled, resumed and cancelled again."""
    again = llmrun.Life(8, 0, 0)
    run.new_life(8, 0)
    tell(run, LIFE, started(host="elsewhere"), left(120.0, 2))
    tell(run, again, started(8, 130.0, host="elsewhere"), left(140.0, 7, "cancelled by you"))
    state = llmrun.state_of(run, {})
    assert (state["done"], state["state"], state["detail"]) == (7, "stopped", "cancelled by you")


def test_why_a_run_ended_is_not_what_ended_its_life_before(run):
    again = llmrun.Life(8, 0, 0)
    run.new_life(8, 0)
    tell(run, LIFE, started(host="elsewhere"), left(120.0, 2))
    tell(run, again, started(8, 130.0, host="elsewhere"), left(140.0, 7, "the model does not fit", 3))
    state = llmrun.state_of(run, {})
    assert (state["exit_code"], state["detail"]) == (3, "the model does not fit")


def test_a_run_that_is_done_and_asks_its_failed_prompts_again_is_not_done(run):
    tell(run, LIFE, started(host="elsewhere"), {**ended(1, time.time() - 5, 8), "failed": 2})
    assert llmrun.state_of(run, {})["state"] == "done"
    run.record_submit(9, shape=0)
    state = llmrun.state_of(run, {})
    assert (state["state"], state["exit_code"], state["failed"]) == ("pending", None, 2)


def test_a_job_that_was_submitted_before_all_was_done_makes_nothing_undone(run):
    run.record_submit(9, shape=0)
    tell(run, LIFE, started(host="elsewhere"), ended(0, time.time() + 5))
    assert llmrun.state_of(run, {})["state"] == "done"


def test_a_run_of_which_every_prompt_failed_is_not_called_done(run):
    tell(run, LIFE, started(host="elsewhere"), {**ended(1, 120.0, 0, answered=0), "failed": 10})
    state = llmrun.state_of(run, {})
    assert (state["state"], state["exit_code"]) == ("failed", 1)
    assert llmrun.verdict(run, state).startswith("No prompt is answered, all 10 failed in 20s: ")
