"""The driver's parts by themselves: who follows it, what it beats and tells, what an end by Slurm means."""

import asyncio
import os
import signal
import subprocess
import sys
import types

import llmrun
import pytest
from conftest import wait_for

LIFE = """
import os, sys, time
sys.path.insert(0, sys.argv[1])
import llmrun
def live():
    with open(sys.argv[2], "a") as file:
        file.write(f"{os.getpid()}\\n")
    time.sleep(60)
sys.exit(llmrun.supervise(live))
"""


@pytest.fixture
def supervised(tmp_path):
    """A supervisor and the numbers of the drivers that it started."""
    process = subprocess.Popen([sys.executable, "-c", LIFE, os.path.dirname(llmrun.__file__), str(tmp_path / "lives")])

    def lives():
        path = tmp_path / "lives"
        return [int(line) for line in path.read_text().splitlines()] if path.exists() else []
    wait_for("a life", lives, 10)
    yield process, lives
    process.kill()
    process.wait()


def test_a_killed_driver_is_followed_by_one_that_hears_of_the_jobs_end(supervised):
    process, lives = supervised
    os.kill(lives()[0], signal.SIGKILL)
    wait_for("another life", lambda: len(lives()) == 2, 10)
    process.send_signal(signal.SIGUSR1)  # a warning is no end
    process.send_signal(signal.SIGTERM)
    assert process.wait(5) == llmrun.WORK_LEFT and len(lives()) == 2
    wait_for("the driver to be gone", lambda: not llmrun.process_birth(lives()[1]), 5)


def test_a_driver_that_was_told_to_end_is_followed_by_none(supervised):
    process, lives = supervised
    process.send_signal(signal.SIGTERM)
    assert process.wait(5) == llmrun.WORK_LEFT and len(lives()) == 1


FORKED = """
import os, signal, sys, time
sys.path.insert(0, sys.argv[1])
import llmrun
fork = os.fork
def fork_and_be_told():
    child = fork()
    if child:
        os.kill(os.getpid(), signal.SIGTERM)
    return child
os.fork = fork_and_be_told
sys.exit(llmrun.supervise(lambda: time.sleep(60)))
"""


def test_a_signal_that_comes_as_the_driver_is_made_reaches_it():
    done = subprocess.run([sys.executable, "-c", FORKED, os.path.dirname(llmrun.__file__)], timeout=20, stderr=subprocess.PIPE, text=True)
    assert done.returncode == llmrun.WORK_LEFT and "killed by SIGTERM" in done.stderr


def test_a_driver_that_works_shows_the_others_that_it_lives():
    beats, looks = [], []
    claims = types.SimpleNamespace(BEAT_S=0.05, finished=False, beat=lambda: beats.append(1), look=list, watch_beats=lambda: looks.append(1))
    prompts = llmrun.Prompts(None, None, claims, None, None)
    prompts.pump, prompts.TEND_S = types.SimpleNamespace(first_sent=1.0, wake_all=list), 0.01
    orders = types.SimpleNamespace(driver=types.SimpleNamespace(ends_at=llmrun.math.inf))

    async def work():
        async with llmrun.tending(prompts, orders):
            await asyncio.sleep(0.4)
    asyncio.run(work())
    assert 2 <= len(beats) == len(looks) <= 8


def test_what_is_told_as_done_is_written_before():
    order = []
    claims = types.SimpleNamespace(marks=types.SimpleNamespace(count=lambda state: 0, state=b""))
    journal = types.SimpleNamespace(write=lambda: order.append("written"))
    prompts = llmrun.Prompts(None, None, claims, journal, lambda event, **facts: order.append((event, facts["answers"])))
    prompts.pump = types.SimpleNamespace(first_sent=None)

    async def work():
        async with prompts.reporting():
            await asyncio.sleep(0.01)
            prompts.tally.answers = 3
    asyncio.run(work())
    assert order == ["written", ("progress", 0), "written", ("progress", 3)]


@pytest.mark.parametrize("detail, left_s, words, goes_on, requeued", [
    ("JobState=COMPLETING Restarts=1", 100, "cancelled", False, True),
    ("JobState=RUNNING Restarts=0 PreemptTime=1700000000", 100, "preempted", True, False),
    ("JobState=COMPLETING Restarts=0 PreemptTime=None", -5, "the time limit came", True, False),
    ("JobState=COMPLETING Restarts=0 PreemptTime=None", 100, "cancelled", False, False), ("", 100, "cancelled", False, False)])
def test_what_an_end_by_term_means_is_read_from_slurms_word(detail, left_s, words, goes_on, requeued):
    stop = llmrun.what_term_meant(detail, llmrun.clock() + left_s)
    assert words in stop.why and stop.go_on == goes_on and llmrun.was_requeued(detail, 0) == requeued


def test_the_end_that_term_is_measured_by_moves_with_a_suspension(monkeypatch):
    """A job that was suspended for an hour, and is cancelled after the end that it had at its start, was cancelled."""
    monkeypatch.setattr(llmrun, "end_of_job", lambda environ, detail: llmrun.clock() + 3600)
    allocation = llmrun.Allocation(7, 0, ["n1"], {}, llmrun.clock() + 0.2, False, 7)
    driver = llmrun.Driver(None, None, 0, llmrun.Life(7, 0, 0), allocation, lambda *told, **facts: None)

    async def work():
        orders = llmrun.Orders(driver, llmrun.Work())
        orders.detail = lambda: asyncio.sleep(0, "")
        await orders.look_at_the_end()
    asyncio.run(work())
    assert not llmrun.what_term_meant("Restarts=0", driver.ends_at).go_on and driver.ends_at > allocation.ends_at + 3000


def test_a_run_that_may_not_be_requeued_says_how_to_go_on(site_on):
    site = site_on()
    site.write_prompts(14)
    site.config(engine={"name": "echo", "args": ["0.3"]}, slurm={"requeue": False})
    site.llmrun("submit", "config.json")
    site.answering()
    subprocess.run(["scancel", "-b", "-s", "USR1", str(site.status()["job"])], env=site.env, check=True)
    state = site.ended(code=4)
    assert "requeue is off" in state["detail"] and f"resume {site.run.name}" in state["detail"] and len(site.lives()) == 1
    assert 2 <= state["done"] == len(site.journal()) < 14


def test_an_engine_that_ends_because_its_job_does_is_no_failure(here):
    """Slurm's TERM may reach an engine and its agent before it reaches the driver."""
    here.config(environment={"vars": {"FAKE_LLAMA_LOAD_S": "20"}})
    running = here.start("run", "config.json")
    here.wait_for_event("engine_started")
    for words in (" agent ", "llama-server -m"):
        os.kill(here.process(words), signal.SIGTERM)
    output, _ = running.communicate(timeout=20)
    assert running.returncode == 4 and "told to end" in output, output


def test_a_run_that_is_done_is_not_run_once_more(site):
    site.config(engine={"name": "echo"})
    site.llmrun("submit", "config.json", "--wait")
    slurm, job = llmrun.Slurm(site.env), site.status()["job"]
    wait_for("the job's end", lambda: slurm.jobs([job])[job].state == "COMPLETED")
    assert "Restarts=0" in slurm.detail(job) and len(site.lives()) == 1


def test_a_run_that_was_cancelled_does_not_come_back_however_its_job_ends(site_on):
    site = site_on()
    site.write_prompts(14)
    site.config(engine={"name": "echo", "args": ["0.3"]})
    site.llmrun("submit", "config.json")
    site.answering()
    (site.run / "stop").touch()  # what `cancel` leaves, and then Slurm is quicker
    os.kill(min(pid for pid, argv in site.processes() if "drive" in argv), signal.SIGKILL)
    site.ended(code=4)
    assert [end["next"] for end in site.ends()] == [""] and len(site.lives()) == 1


def test_a_job_whose_rest_the_others_do_is_not_queued_again(site_on):
    site = site_on()
    site.write_prompts(2)
    site.config(engine={"name": "echo", "args": ["1"], "concurrency": 1}, slurm={"jobs": 2})
    site.llmrun("submit", "config.json")
    wait_for("a claim of each job", lambda: site.runs() and len({path.read_text() for path in site.run.glob("claims/?.0")}) == 2)
    run = llmrun.Run(site.run)
    one, other = run.lives()
    port = next(event["port"] for event in run.events(other) if event["event"] == "ready")
    engine = site.process(" echo ", f" {port} ")
    os.kill(engine, signal.SIGSTOP)  # the other has much to do yet
    subprocess.run(["scancel", "-b", "-s", "USR1", str(one.job)], env=site.env, check=True)
    assert site.wait_for_event("end")["next"] == "others"
    os.kill(engine, signal.SIGCONT)
    site.ended()
    wait_for("both ends", lambda: len(site.ends()) == 2)
    assert len(site.lives()) == len(site.journal()) == 2
