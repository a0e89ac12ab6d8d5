"""The life of a driver whose work is no prompts: as a server's will be, that answers until it is stopped."""

import json
import subprocess
import sys

import llmrun
from conftest import wait_for

SERVER = """\
import asyncio, os, sys
sys.path.insert(0, sys.argv[1])
import llmrun

llmrun.LAST_MOMENTS_S = 1.0


class UntilStopped(llmrun.Work):
    name, drained = "until stopped", None

    async def do(self, pairs, ends_at):
        self.drained = asyncio.Event()
        await asyncio.gather(*(start for _, start in pairs))
        self.started = True
        await self.drained.wait()

    def drain(self):
        self.drained.set()


run = llmrun.Run(sys.argv[1])
sys.exit(llmrun.supervise(lambda: llmrun.drive(run, llmrun.find_allocation(os.environ, 1), 0, UntilStopped)))
"""
JOB = """\
#!/bin/bash
#SBATCH --nodes=1 --requeue --open-mode=append --output={run}/logs/slurm-%j.out
export SLURM_JOB_END_TIME=$(( $(date +%s) + 3 ))
exec {python} {folder}/server.py {run}
"""


def start_server(site):
    """The run, which one job serves in time slots of two to three seconds."""
    config = site.config(engine={"name": "echo"})
    prepared = llmrun.prepare(config, [])
    run = llmrun.make_run(prepared)
    (site.folder / "server.py").write_text(SERVER)
    run.job_script().write_text(JOB.format(run=run.folder, python=sys.executable, folder=site.folder))
    said = subprocess.run(["sbatch", "--parsable", str(run.job_script())], env=site.env, stdout=subprocess.PIPE, text=True, check=True)
    run.record_submit(int(said.stdout), shape=0)
    return run


def test_a_server_goes_on_through_more_time_slots_than_may_be_fruitless(site_on):
    site = site_on()
    run = start_server(site)
    wait_for("five lives", lambda: len(run.lives()) > llmrun.MAX_FRUITLESS + 1, 60)
    assert {(end["code"], end["next"]) for end in site.ends()} == {(4, "requeued")}
    assert site.status()["state"] in ("pending", "starting", "starting the engine", "loading the model", "answering", "finishing",
                                      "tearing down")
    site.llmrun("cancel")  # while it serves, or waits in the queue for its next life
    wait_for("the end", lambda: site.status()["exit_code"] == 4)
    site.assert_nothing_left(10)


LATE = """\
import asyncio, os, signal, sys, threading
sys.path.insert(0, sys.argv[1])
import llmrun

run_loop = asyncio.run


def run_and_be_told_to_end(work):
    try:
        return run_loop(work)
    finally:
        os.kill(os.getpid(), signal.SIGTERM)


class Short(llmrun.Work):
    async def do(self, pairs, ends_at):
        self.finished = True


asyncio.run = run_and_be_told_to_end
threading.Thread(target=threading.Event().wait, daemon=True).start()  # like those that wait for a child's end: any may be told
sys.exit(llmrun.drive(llmrun.Run(sys.argv[1]), llmrun.find_allocation({}, 1), 0, Short))
"""


def test_a_signal_between_the_work_and_its_last_word_changes_nothing(here):
    """The loop gives the signals back to the system as it ends, and there each of them would kill."""
    run = llmrun.make_run(llmrun.prepare(here.config(engine={"name": "echo"}), []))
    done = subprocess.run([sys.executable, "-c", LATE, str(run.folder)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0 and "Traceback" not in done.stdout, done.stdout
    assert [(end["code"], end["why"]) for end in here.ends()] == [(0, "")]


def life_with(run, restart, *events):
    """A life that is over, with these events after its start."""
    life = run.new_life(7, restart)
    told = llmrun.Events(run, life)
    told.append("start", job=7, submitted=7, nodes=["n"], work="until stopped", pid=1, born=1, host="elsewhere")
    for event in events:
        told.append(event)
    return life


def test_a_server_that_never_was_ready_ends_after_three_lives(site):
    config = site.config(engine={"name": "echo"})
    run = llmrun.make_run(llmrun.prepare(config, []))
    run.record_submit(7, shape=0)
    lives = [life_with(run, 0, "ready")] + [life_with(run, restart, "agents_up") for restart in (1, 2, 3)]
    allocation = llmrun.Allocation(7, 0, ["n"], {}, llmrun.math.inf, False, 7)
    counts = [llmrun.Driver(run, None, 0, life, allocation, None).fruitless() for life in lives]
    assert counts == [0, 1, 2, 3]


def test_an_ending_is_read_back_as_it_was_told(site):
    run = llmrun.make_run(llmrun.prepare(site.config(engine={"name": "echo"}), []))
    life = life_with(run, 0)
    ending = llmrun.Stop(llmrun.CLUSTER_FAILED, "the node was lost", True).leads_to(llmrun.SUCCESSOR, 12, "Slurm would not")
    assert ending == llmrun.Ending(llmrun.WORK_LEFT, "the node was lost; Slurm would not", "successor", 12)
    llmrun.Events(run, life).append("end", **ending._asdict())
    assert llmrun.LifeState(life, run.events(life), None).ending == ending
    assert json.loads(run.events_file(life).read_text().splitlines()[-1])["job"] == 12
