"""The bench of the scenarios: a cluster, an engine and a model, fake or (LLMRUN_BENCH=real) real, and a user
who works there with nothing but llmrun.py in a folder."""

import contextlib
import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
SCRIPT = TESTS.parent / "llmrun.py"
REAL = os.environ.get("LLMRUN_BENCH") == "real"
sys.path[:0] = [str(TESTS), str(TESTS.parent)]

import llmrun  # noqa: E402
from answers import check_run, questions  # noqa: E402

TINY_MODEL = "tiny.gguf"
SOME = 40 if REAL else 14  # prompts that take a few seconds


def wait_for(what, condition, timeout_s=30, poll_s=0.02):
    """The value of a condition once it holds."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        value = condition()
        if value:
            return value
        time.sleep(poll_s)
    raise AssertionError(f"waited {timeout_s} s for {what}")


def bytes_read(work):
    """How much a piece of work reads from files."""
    def read():
        with open("/proc/self/io") as file:
            return int(file.readline().split()[1])
    before = read()
    work()
    return read() - before


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cluster")
    if REAL:
        from real.cluster import RealCluster as Cluster
    else:
        from fake_slurm.cluster import FakeCluster as Cluster
    with Cluster(folder) as running:
        yield running


@pytest.fixture(scope="session")
def engine(tmp_path_factory):
    """A folder with llama-server and its RPC worker, and a model beside them."""
    folder = tmp_path_factory.mktemp("engine")
    if REAL:
        from real.llama import llama_build
        from real.tiny_model import write_tiny_model
        write_tiny_model(folder / TINY_MODEL)
        return Path(llama_build()), folder / TINY_MODEL
    from fakes.build import make_build, make_model
    make_build(folder / "bin")
    make_model(folder / TINY_MODEL)
    return folder / "bin", folder / TINY_MODEL


def was_closed(events):
    """Whether a life came to its own end and told of no trouble with its disk."""
    return '"event": "end"' in events and '"event": "journal_trouble"' not in events


class Site:
    """A user's folder on a cluster: llmrun.py, a config, prompts."""

    def __init__(self, folder, cluster, engine):
        self.folder, self.cluster = folder, cluster
        self.bin, self.model = engine
        self.real = (self.bin / "llama-server").read_bytes().startswith(b"\x7fELF")
        self.env = dict(os.environ, **cluster.env)
        shutil.copy(SCRIPT, folder)
        self.data = {
            "name": "test", "slurm": {"nodes": 1, "time": "00:10:00"}, "model": {"path": str(self.model)},
            "engine": {"path": str(self.bin), "slots": 2, "context": 1024},
            "prompts": {"user": "prompts", "max_tokens": 16}, "environment": {"vars": {}}}
        self.asked = {}  # a run → its config and its questions, as they were when it was looked at first
        self.write_prompts(6)

    def write_prompts(self, count):
        folder = self.folder / "prompts"
        shutil.rmtree(folder, ignore_errors=True)
        for number in range(count):
            path = folder / f"part{number % 3}" / f"{number:03d}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            marks = "?" * (1 + number % 40 if self.real else 1)  # a real engine only tells how long a prompt was
            path.write_text(f"Question {number}: what comes after {number}{marks}\n")

    def config(self, **tables):
        """Write config.json: the basic one with these tables' keys put in."""
        for table, keys in tables.items():
            if isinstance(keys, dict):
                self.data.setdefault(table, {}).update(keys)
            else:
                self.data[table] = keys
        path = self.folder / "config.json"
        path.write_text(json.dumps(self.data))
        return path

    def means(self, **tables):
        """What a config that the test wrote itself says, where answers are held against their questions."""
        self.data.update(tables)

    def slow(self, prompts=40):
        """Make all answers take a few seconds, so that there is a middle to do something in."""
        self.write_prompts(prompts)
        variables = dict(self.data["environment"]["vars"], FAKE_LLAMA_TOKENS_PER_S="20")
        self.config(prompts={"max_tokens": 400}, environment={"vars": variables})

    def llmrun(self, *args, code=0, python=sys.executable, env=None, timeout=120):
        """Run a command as the user does; its output."""
        done = subprocess.run([python, "llmrun.py", *map(str, args)], cwd=self.folder, env=env or self.env, text=True,
                              stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=timeout)
        self.output = done.stdout + done.stderr
        assert "Traceback" not in self.output, self.output
        assert done.returncode == code, f"{args}: exit code {done.returncode}\n{self.output}\n{self.job_output()}"
        if code in (0, 1) and ("--wait" in args or args[0] == "run"):
            self.assert_answers()
        return done.stdout if code == 0 else self.output

    def start(self, *args):
        return subprocess.Popen([sys.executable, "llmrun.py", *args], cwd=self.folder, env=self.env, text=True,
                                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    def job_output(self):
        runs = self.runs()
        return "\n".join(path.read_text() for path in runs[-1].glob("logs/slurm-*")) if runs else ""

    def runs(self):
        return sorted(self.folder.glob("runs/*"), key=lambda path: path.stat().st_mtime)

    @property
    def run(self):
        return self.runs()[-1]

    def status(self):
        """What `status --json` says, without a process for each look."""
        run, slurm = llmrun.Run(self.run), llmrun.Slurm(self.env)
        return llmrun.state_of(run, slurm.jobs(run.submitted()))

    def results(self):
        """{prompt's path: answer's text} as it stands in the results folder."""
        folder = self.run / "results"
        return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*.txt")}

    def journal(self):
        """The results so far. Only a life that lives, was killed or had trouble with its disk may leave a line
        without its end, and only as the last of a segment."""
        lines, closed = [], {path.name[:-6] for path in self.run.glob("events/*.jsonl") if was_closed(path.read_text())}
        for path in self.run.glob("journal/*.jsonl"):
            *whole, torn = path.read_text().split("\n")
            lines += map(json.loads, whole)
            assert not torn or path.name.rsplit(".", 2)[0] not in closed, f"{path} ends in a torn line: {torn}"
        return lines

    def assert_answers(self):
        """Each answer that a run has kept, in whatever file, is the one to its own question."""
        for run in self.runs():
            if run not in self.asked:
                self.asked[run] = copy.deepcopy(self.data), questions(self.folder, self.data)
            check_run(run, self.folder, *self.asked[run], self.real)

    def events(self):
        paths = sorted(self.run.glob("events/*.jsonl"))
        return [json.loads(line) for path in paths for line in path.read_text().splitlines()]

    def wait_for_event(self, name, timeout_s=30):
        def seen():
            return next((e for e in (self.events() if self.runs() else []) if e["event"] == name), None)
        return wait_for(f"the event {name}", seen, timeout_s)

    def processes(self):
        """(pid, argv) of everything of this user's jobs that lives on any node."""
        return [(pid, argv) for pid, _, argv in self.cluster.processes()]

    def process(self, *words):
        """The pid of the one process whose command line has these words."""
        def found():
            return [pid for pid, argv in self.processes() if all(word in " ".join(argv) for word in words)
                    and "srun" not in argv[0]]
        return wait_for(f"a process with {words}", found)[0]

    def kill_driver(self):
        """As the kernel does when memory is short."""
        starts = [event for event in self.events() if event["event"] == "start"]
        os.kill(max(starts, key=lambda start: start["time"])["pid"], signal.SIGKILL)

    def kill_job(self):
        """The process that Slurm started, and with it the driver below it."""
        parent, child = sorted(pid for pid, argv in self.processes() if "drive" in argv)
        for pid in (parent, child):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def shim(self, name, condition, *lines):
        """A site on which one of Slurm's commands behaves otherwise where the condition on its words "$*" holds."""
        shim, real = self.folder / "shim" / name, shutil.which(name, path=self.env["PATH"])
        shim.parent.mkdir(exist_ok=True)
        shim.write_text("\n".join(["#!/bin/bash", f"if {condition}; then", *lines, "fi", f'exec {real} "$@"', ""]))
        shim.chmod(0o755)
        if str(shim.parent) not in self.env["PATH"]:
            self.env["PATH"] = f"{shim.parent}:{self.env['PATH']}"

    def amend(self, *lines):
        """Lines that stand at the end of this user's llmrun.py: a disk, a clock or a bound that is another here."""
        path, main = self.folder / "llmrun.py", '\n\nif __name__ == "__main__":\n'
        before, main, after = path.read_text().rpartition(main)
        path.write_text("\n".join([before, *lines]) + main + after)

    def answering(self, count=2, timeout_s=60):
        wait_for("a few answers", lambda: self.runs() and len(self.journal()) >= count, timeout_s)

    def ended(self, code=0, timeout_s=90):
        """The state once the run has ended; when all is done there is one result for every prompt."""
        try:
            wait_for("the end", lambda: self.status()["exit_code"] is not None, timeout_s, 0.3)
        except AssertionError:
            raise AssertionError(f"{self.status()}\n{self.job_output()}")
        state = self.status()
        assert state["exit_code"] == code, (state, self.job_output())
        if code == 0:
            lines = (self.run / "results" / "results.jsonl").read_text().splitlines()
            names = [json.loads(line)["custom_id"] for line in lines]
            assert len(names) == len(set(names)) == len(self.results()) == state["total"] == state["done"]
        self.journal()
        self.assert_answers()
        return state

    def ends(self):
        return [event for event in self.events() if event["event"] == "end"]

    def lives(self):
        return sorted(path.name[:-6] for path in self.run.glob("events/*.jsonl"))

    def preempt(self, seconds=2):
        """A job of the high partition that takes all nodes for a while."""
        (self.folder / "high.sh").write_text(f"#!/bin/bash\nsleep {seconds}\n")
        subprocess.run(["sbatch", "-p", "high", "-N4", "-c", "4", "-o", "/dev/null", "-t", "5", "high.sh"],
                       cwd=self.folder, env=self.env, check=True, stdout=subprocess.PIPE)

    def assert_nothing_left(self, timeout_s=5):
        wait_for(f"no process to be left, of {self.processes()}", lambda: not self.processes(), timeout_s)


@pytest.fixture
def site(tmp_path, cluster, engine):
    site = Site(tmp_path, cluster, engine)
    site.config()
    yield site
    for run in site.runs():
        for submitted in run.glob("events/*.submit.json"):
            subprocess.run(["scancel", submitted.name.split(".")[0]], env=site.env)
    site.assert_nothing_left(20)
    site.assert_answers()


@pytest.fixture
def site_on(tmp_path, engine):
    """site_on(partitions={"low": "GraceTime=5"}) is a user's folder on a cluster of its own."""
    sites = []

    def make(partitions=None, kill_wait=3, **settings):
        (tmp_path / "cluster").mkdir()
        (tmp_path / "home").mkdir()
        if REAL:
            from real.cluster import RealCluster
            cluster = RealCluster(tmp_path / "cluster", kill_wait=kill_wait, partitions=partitions, **settings)
        else:
            from fake_slurm.cluster import FakeCluster
            settings = {"FakeTick": 0.5, "FakeRequeueDelay": 0.5, "proctrack": "linuxproc", **settings}
            cluster = FakeCluster(tmp_path / "cluster", kill_wait=kill_wait, partitions=partitions, **settings)
        cluster.start()
        site = Site(tmp_path / "home", cluster, engine)
        site.config()
        sites.append(site)
        return site

    yield make
    for site in sites:
        for run in site.runs():
            (run / "stop").touch()
        try:
            subprocess.run(["scancel", "-u", "root"], env=site.env)
            site.assert_nothing_left(20)
            site.assert_answers()
        finally:
            site.cluster.stop()


class NoSlurm:
    """This machine alone."""

    nodes = []

    def __init__(self, folder):
        self.folder, self.env = str(folder), {"PATH": os.environ["PATH"]}

    def processes(self):
        found = []
        for pid in filter(str.isdigit, os.listdir("/proc")):
            try:
                with open(f"/proc/{pid}/cmdline") as file:
                    argv = file.read().split("\0")
            except OSError:
                continue
            if self.folder in " ".join(argv) and int(pid) != os.getpid():
                found.append((int(pid), "", argv))
        return found


@pytest.fixture
def here(tmp_path, engine):
    """A user on a machine that has no Slurm."""
    site = Site(tmp_path, NoSlurm(tmp_path), engine)
    site.config()
    yield site
    site.assert_nothing_left(10)
    site.assert_answers()
