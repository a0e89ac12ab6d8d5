"""Runs in a storm: seeded schedules of kills, lost nodes, preemptions, requeues, time limits and full disks.

    python tests/chaos.py [--real] [--seeds N] [--first K]

After each: every prompt has exactly one result, no process is left, and the events tell what happened. A run may stop
with work left where nobody of it lives to go on (its batch process was killed on a site that then kills all the rest,
its disk was full): then the user's one command, `resume`, goes on, and how often that was needed is told."""

import argparse
import contextlib
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS), str(TESTS.parent)]

import conftest  # noqa: E402

PROMPTS = 24
SLOT = "export SLURM_JOB_END_TIME=$(( $(date +%s) + 24 ))"


def new_cluster(folder, chance, real):
    low = chance.choice(["PreemptMode=REQUEUE", "PreemptMode=CANCEL", "PreemptMode=REQUEUE GraceTime=20"])
    proctrack = chance.choice(["linuxproc", "cgroup"])
    if real:
        from real.cluster import RealCluster
        return RealCluster(folder, kill_wait=3, partitions={"low": low}, proctrack=proctrack, SlurmdTimeout=15)
    from fake_slurm.cluster import FakeCluster
    return FakeCluster(folder, kill_wait=2, partitions={"low": low}, proctrack=proctrack, SlurmdTimeout=3, FakeTick=0.5,
                       FakeRequeueDelay=0.5)


def new_engine(folder, real):
    folder.mkdir()
    if real:
        from real.llama import llama_build
        from real.tiny_model import write_tiny_model
        write_tiny_model(folder / conftest.TINY_MODEL, ends=False)
        return Path(llama_build()), folder / conftest.TINY_MODEL
    from fakes.build import make_build, make_model
    make_build(folder / "bin")
    make_model(folder / conftest.TINY_MODEL)
    return folder / "bin", folder / conftest.TINY_MODEL


class Storm:
    """What can befall a run."""

    def __init__(self, site, chance, real):
        self.site, self.chance, self.real, self.disk = site, chance, real, None

    def victims(self, *words):
        return [pid for pid, argv in self.site.processes() if all(word in " ".join(argv) for word in words)]

    def kill(self, *words):
        pids = self.victims(*words)
        if not pids:
            return False
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.chance.choice(pids), signal.SIGKILL)
        return True

    def a_driver_or_its_batch_process(self):
        return self.kill(" drive ")

    def an_agent(self):
        return self.kill("import llmrun", " agent ")

    def an_engine(self):
        return self.kill("/llama-server ")

    def an_rpc_worker(self):
        return self.kill("rpc-server")

    def an_srun(self):
        return self.kill("srun -N1")

    def slurm(self, *argv):
        done = subprocess.run(argv, env=self.site.env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        return done.returncode == 0, done.stdout

    def running_jobs(self):
        return self.slurm("squeue", "-h", "-r", "-t", "RUNNING", "-n", "test", "-o", "%A")[1].split()

    def a_requeue(self):
        jobs = self.running_jobs()
        return bool(jobs) and self.slurm("scontrol", "requeue", self.chance.choice(jobs))[0]

    def an_early_warning(self):
        jobs = self.running_jobs()
        return bool(jobs) and self.slurm("scancel", "-b", "-s", "USR1", self.chance.choice(jobs))[0]

    def a_preemption(self):
        self.site.preempt(self.chance.uniform(0.5, 3))
        return True

    def a_lost_node(self):
        """Its power fails; it is back some seconds later."""
        name = self.chance.choice(self.site.cluster.nodes)
        self.site.cluster.lose_node(name)
        time.sleep(self.chance.uniform(1, 20) if self.real else self.chance.uniform(0.5, 6))
        self.site.cluster.return_node(name)
        return True

    def a_full_disk(self):
        """The disk with the runs is full for some seconds."""
        if not self.disk:
            return False
        filler = os.open(self.disk / "filler", os.O_CREAT | os.O_WRONLY)
        for size in (2**16, 2**10, 1):
            with contextlib.suppress(OSError):
                while True:
                    os.write(filler, bytes(size))
        os.close(filler)
        time.sleep(self.chance.uniform(0.5, 4))
        (self.disk / "filler").unlink()
        return True


ACTIONS = ["a_driver_or_its_batch_process", "an_agent", "an_engine", "an_rpc_worker", "an_srun", "a_requeue",
           "an_early_warning", "a_preemption", "a_lost_node", "a_full_disk"]


@contextlib.contextmanager
def small_disk(folder):
    """A file system of its own that can be full; none where nobody may mount one."""
    mounted = os.geteuid() == 0 and subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(folder)],
                                                   stderr=subprocess.DEVNULL).returncode == 0
    try:
        yield folder if mounted else None
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], check=True)


def one(seed, real):
    """One run in one storm; what happened, in words."""
    chance = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(os.path.realpath(name))
        for sub in ("cluster", "home", "disk"):
            (folder / sub).mkdir()
        with small_disk(folder / "disk") as disk, new_cluster(folder / "cluster", chance, real) as cluster:
            site = conftest.Site(folder / "home", cluster, new_engine(folder / "engine", real))
            storm = Storm(site, chance, real)
            storm.disk = disk
            try:
                return weather(site, storm, chance)
            except AssertionError:
                if os.environ.get("CHAOS_KEEP"):
                    subprocess.run(["cp", "-rL", str(folder), os.environ["CHAOS_KEEP"]])
                raise


def weather(site, storm, chance):
    os.symlink(storm.disk or site.folder.parent / "disk", site.folder / "runs")
    site.slow(PROMPTS)
    site.config(slurm={"nodes": chance.choice([1, 2]), "jobs": chance.choice([1, 1, 2, 3]), "partition": "low"},
                environment={"setup": [SLOT] if chance.random() < 0.3 else []})
    if site.data["slurm"]["nodes"] == 2 and chance.random() < 0.5:
        site.config(engine={"replicas": 2})
    site.llmrun("submit", "config.json")
    told = []
    for _ in range(chance.randint(2, 5)):
        time.sleep(chance.uniform(0.3, 3))
        action = chance.choice(ACTIONS)
        if getattr(storm, action)():
            told.append(action.replace("_", " "))
    by_hand = until_done(site)
    check(site)
    return f"{', '.join(told) or 'nothing'}; {len(site.lives())} lives, {len(site.journal()) - PROMPTS} answered twice" \
        + (f", resumed {by_hand} times by hand" if by_hand else "")


def until_done(site):
    """Wait for the end, and do what a user does where the run says that it stopped."""
    for by_hand in range(6):
        conftest.wait_for("the end", lambda: site.status()["exit_code"] is not None, 150)
        state = site.status()
        if state["exit_code"] == 0:
            return by_hand
        assert state["exit_code"] in (3, 4), state
        print(f"      {state['state']}: {state['detail']}", flush=True)
        site.llmrun("resume")
    raise AssertionError(f"six resumes were not enough: {state}")


def check(site):
    site.ended()
    site.assert_nothing_left(20)
    lines = site.journal()
    answered = {line["custom_id"] for line in lines}
    assert len(answered) == PROMPTS and all(line["llmrun"]["ok"] for line in lines), "every answer is a good one"
    for path in site.run.glob("events/*.jsonl"):
        names = re.findall(r'"event": "(\w+)"', path.read_text())
        assert not names or names[0] == "start" and "end" not in names[:-1], (path.name, names)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--real", action="store_true")
    parser.add_argument("--seeds", type=int, default=0)
    parser.add_argument("--first", type=int, default=0)
    given = parser.parse_args()
    failed = []
    for seed in range(given.first, given.first + (given.seeds or (10 if given.real else 40))):
        try:
            print(f"{seed:4}: {one(seed, given.real)}", flush=True)
        except (AssertionError, subprocess.SubprocessError, OSError) as error:
            failed.append(seed)
            print(f"{seed:4}: FAILED: {error}", flush=True)
    print(f"failed: {failed}" if failed else "all have exactly one result for each prompt")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
