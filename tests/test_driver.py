"""The driver's parts by themselves: who follows it, what it beats and tells, what an end by Slurm means."""

import asyncio
import gc
import os
import signal
import subprocess
import sys
import time
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
    claims = types.SimpleNamespace(BEAT_S=0.05, finished=False, trouble="", STILL_S=60, left_to_others=lambda still_s: True, beat=lambda: beats.append(1), look=list, watch_beats=lambda: looks.append(1))
    prompts = llmrun.Prompts(None, None, claims, None, None)
    prompts.pump, prompts.TEND_S = types.SimpleNamespace(first_sent=1.0, trouble="", trays=[], wake_all=list), 0.01
    orders = types.SimpleNamespace(driver=types.SimpleNamespace(ends_at=llmrun.math.inf), mind_the_folder=list)

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
        orders.detail = lambda: asyncio.sleep(0, "JobId=7")
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
    running = here.start("run", "--here", "config.json")
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


# ── a Slurm that does not answer ───────────────────────────────────────────────


class Instead:
    """Stands for a module of Python's in the program, with some of its functions replaced."""

    def __init__(self, module, **functions):
        self.__dict__ = {**functions, "module": module}

    def __getattr__(self, name):
        return getattr(self.module, name)


class Controller:
    """Slurm's commands in a time of its own: those of `trouble` fail in their way until `until`, by that clock."""

    SAYS = {"away": "slurm_load_jobs error: Unable to contact slurm controller (connect failure)",
            "busy": "slurm_load_jobs error: Socket timed out on send/recv operation"}

    def __init__(self, monkeypatch, trouble, until=llmrun.math.inf):
        self.now, self.trouble, self.until, self.asked, self.detail = 1000.0, trouble, until, [], ""
        self.began = time.time()
        monkeypatch.setattr(llmrun, "clock", lambda: self.now)
        monkeypatch.setattr(llmrun, "subprocess", Instead(subprocess, run=self.run))
        monkeypatch.setattr(llmrun, "time", Instead(time, sleep=self.rest, time=lambda: self.date(self.now)))

    def rest(self, time_s):
        self.now += time_s
        assert self.now < 10**6, "it waits for ever"

    def run(self, argv, timeout=90, **_):
        self.asked.append((self.now, " ".join(argv)))
        self.rest(0.01)
        if self.now > self.until or argv[0] == "sbatch":
            said = {"scontrol show": self.detail, "sbatch --parsable": "18\n"}.get(" ".join(argv[:2]), "")
            return subprocess.CompletedProcess(argv, 0, said, "")
        if self.trouble == "silent":
            self.rest(timeout)
            raise subprocess.TimeoutExpired(argv, timeout)
        return subprocess.CompletedProcess(argv, 1, "", self.SAYS[self.trouble] + "\n")

    def date(self, by_our_clock):
        """A time of our clock as Slurm writes it."""
        return int(self.began + by_our_clock - 1000.0)


@pytest.fixture(params=["silent", "away", "busy"])
def troubled(monkeypatch, request):
    """A controller that is restarted, or overrun, for five minutes."""
    return Controller(monkeypatch, request.param, until=1300.0)


def test_what_slurm_gave_is_learned_though_it_does_not_answer_at_first(troubled):
    troubled.detail = f"JobId=7 Restarts=0 EndTime={troubled.date(8200.0)} Nodes=n1 CPU_IDs=0 Mem=0 GRES=gpu:2(IDX:0-1)"
    given = llmrun.find_allocation({"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1"}, 1)
    assert abs(given.ends_at - 8200.0) < 2 and given.gpus == {"n1": "2"}
    assert len(troubled.asked) <= 300 / 15 + 2, "sites ban who asks more often than every 15 s"


class Left(llmrun.Work):
    """Work of which something is left; it keeps what was done to it."""

    def __init__(self):
        self.saved, self.closed = [], 0

    def close(self, patience_s):
        self.closed += 1

    def save(self, ending):
        self.saved.append(ending)
        return True


@pytest.fixture
def driver(tmp_path):
    """The driver of a job that sbatch gave the id 7, and that ends in ten minutes."""
    (tmp_path / "in.jsonl").write_text('{"x": "1"}\n')
    config = llmrun.build_config(llmrun.Config, {"engine": {"name": "echo"}, "run_dir": str(tmp_path / "runs"), "prompts": {
        "user": str(tmp_path / "in.jsonl"), "template": "{x}"}}, "config.toml", None)
    run = llmrun.create_run(config, llmrun.freeze(config, "m"), lambda run: "")
    run.record_submit(7, shape=0)
    life = run.new_life(7, 0)
    llmrun.Events(run, life).append("start", work="")
    allocation = llmrun.Allocation(7, 0, ["n1"], {}, 1600.0, False, 7)
    return llmrun.Driver(run, config, 0, life, allocation, lambda *told, **facts: None)


WARNED = llmrun.Stop(llmrun.WORK_LEFT, "the time limit came", go_on=True)
TERMED = llmrun.Stop(llmrun.WORK_LEFT, "told to end (SIGTERM)")


def test_a_job_goes_on_though_slurm_does_not_answer_at_first(troubled, driver):
    ending = driver.finish(Left(), WARNED)
    assert ending.next == llmrun.REQUEUED and troubled.now < 1600.0
    assert len(troubled.asked) <= 300 / 15 + 2, "sites ban who asks more often than every 15 s"


@pytest.mark.parametrize("trouble", ["silent", "away", "busy"])
@pytest.mark.parametrize("stop", [WARNED, TERMED], ids=["warned", "told to end"])
def test_a_life_whose_slurm_never_answers_writes_its_results_and_says_how_to_go_on(monkeypatch, driver, trouble, stop):
    controller, work = Controller(monkeypatch, trouble), Left()
    monkeypatch.setattr(llmrun.Slurm, "submit", lambda *about: controller.run(["sbatch-is-silent-too"]) and "")
    ending = driver.finish(work, stop)
    assert ending.code == llmrun.WORK_LEFT and ending.next == llmrun.NOBODY and work.saved == [ending]
    assert f"resume {driver.run.name}" in ending.why, "nobody knows whether it was cancelled"
    assert controller.now < (1600.0 if stop.go_on else 1030.0), "Slurm kills 30 s after its TERM"


def test_a_preempted_job_goes_on_though_slurm_does_not_answer_at_first(monkeypatch, driver):
    """Told to end, it asks why, and has some seconds."""
    controller = Controller(monkeypatch, "away", until=1000.015)  # the first question alone is in vain
    controller.detail = "JobState=RUNNING Restarts=0 PreemptTime=1700000000"
    assert driver.finish(Left(), TERMED).next == llmrun.REQUEUED and controller.now < 1030.0


@pytest.fixture
def orders(monkeypatch, driver):
    """Orders of a driver whose work goes on; `orders(meanwhile)` does something while they are obeyed. Nothing takes time."""
    rest = asyncio.sleep
    monkeypatch.setattr(llmrun.asyncio, "sleep", lambda time_s, *value: rest(0.001, *value))

    def obeyed(meanwhile, work):
        troubles = []

        async def work_on():
            asyncio.get_running_loop().set_exception_handler(lambda loop, context: troubles.append(context))
            orders = llmrun.Orders(driver, work)
            try:
                await meanwhile(orders)
            except asyncio.CancelledError:
                assert orders.stopped
            return orders
        obeyed = asyncio.run(asyncio.wait_for(work_on(), 10))
        gc.collect()
        assert not troubles, "a task died of it"
        return obeyed
    return obeyed


@pytest.mark.parametrize("trouble", ["silent", "away", "busy"])
def test_a_job_that_was_suspended_keeps_its_end_while_slurm_does_not_answer(monkeypatch, driver, orders, trouble):
    controller = Controller(monkeypatch, trouble)
    monkeypatch.setattr(llmrun, "stalled", lambda time_s: asyncio.sleep(0, True))  # each look finds that it stood still
    looks = []

    class Going(llmrun.Work):
        started, TEND_S = True, 2.0

        def tend(self):
            looks.append(controller.now)
            controller.rest(2.0)

        def drain(self):
            self.drained = controller.now
    work = Going()

    async def meanwhile(orders):
        async with llmrun.tending(work, orders):
            for _ in range(3000):
                if hasattr(work, "drained"):
                    break
                await asyncio.sleep(0)
    orders(meanwhile, work)
    assert len(looks) >= 3, "others must see that it lives"
    assert driver.ends_at == 1600.0, "nobody said that it has another end"
    assert 1600.0 - llmrun.LAST_MOMENTS_S <= work.drained < 1700.0


@pytest.mark.parametrize("trouble", ["silent", "away", "busy"])
def test_a_preemption_that_slurm_explains_late_is_obeyed(monkeypatch, driver, orders, trouble):
    """With grace only the agents are told to end; a job that merely leaves in its grace is not put back."""
    controller = Controller(monkeypatch, trouble, until=1000.015)
    controller.detail = "JobState=RUNNING Restarts=0 PreemptTime=1700000000"

    async def meanwhile(orders):
        orders.on_agent_term()
        for _ in range(1000):
            await asyncio.sleep(0)
    stopped = orders(meanwhile, llmrun.Work()).stopped
    assert stopped and stopped.go_on and "preempted" in stopped.why


def test_a_job_that_is_submitted_while_the_run_is_cancelled_is_cancelled_too(here, monkeypatch):
    """sbatch may take long, and who cancels meanwhile knows nothing of the job that it makes."""
    run = llmrun.make_run(llmrun.prepare(here.config(engine={"name": "echo"}), []))
    run.record_submit(7, shape=0)
    life = run.new_life(7, 0)
    events = llmrun.Events(run, life)
    events.append("start", job=7, submitted=7, nodes=["n1"], pid=1, born=1, host="elsewhere")
    for name, line in (("sbatch", f"touch {run.stop_file}; echo 8"), ("scancel", f"echo \"$@\" >> {here.folder}/cancelled")):
        (here.folder / name).write_text(f"#!/bin/sh\n{line}\n")
        (here.folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{here.folder}:{os.environ['PATH']}")
    allocation = llmrun.Allocation(7, 0, ["n1"], {}, llmrun.math.inf, False, 7)
    driver = llmrun.Driver(run, run.config(), 0, life, allocation, lambda *told, **facts: None)
    ending = driver.finish(llmrun.Work(), llmrun.Stop(3, "the node was lost", go_on=True, without=("n1",)))
    assert (here.folder / "cancelled").exists() and (here.folder / "cancelled").read_text().split()[-1] == "8"
    assert ending.next == llmrun.NOBODY


def test_at_a_runs_end_each_of_its_submits_is_cancelled_by_its_own_word(driver, monkeypatch):
    """`scancel "7 9"` is refused, and what waits would start for nothing."""
    folder = driver.run.folder
    (folder / "scancel").write_text(f"#!/bin/sh\nprintf '%s\\n' \"$@\" > {folder}/asked\n")
    (folder / "scancel").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    driver.run.record_submit(9, shape=0)
    work = Left()
    work.finished = True
    driver.finish(work, llmrun.Stop(llmrun.DONE))
    assert sorted((folder / "asked").read_text().split("\n")) == ["", "--state=PENDING", "7", "9"]


def test_a_requeue_that_slurm_heard_though_it_did_not_answer_is_asked_for_once(driver):
    """The second order would be refused, since the job waits already, and another job submitted beside it."""
    asked = []

    class Late:
        def requeue(self, job):
            asked.append(job)
            raise llmrun.SlurmSilent("scontrol", "Unexpected message received", "")

        def detail(self, job):
            return "JobId=7 JobState=PENDING Restarts=1"
    with pytest.raises(llmrun.SlurmSilent):
        driver.requeue(Late())
    assert driver.requeue(Late()) == "" and asked == [7]
