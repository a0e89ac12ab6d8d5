"""A fake Slurm cluster for a test, or for a shell:

    with FakeCluster(tmp_path) as cluster:
        subprocess.run(["sbatch", "job.sh"], env=cluster.env)

    eval "$(python tests/fake_slurm/cluster.py start FOLDER)"; sinfo; ... cluster.py stop FOLDER

Everything of a cluster lies in its folder: slurm.conf, bin/ with the commands, state/ of the controller."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

if not __package__:                       # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fake_slurm import processes  # noqa: E402
from fake_slurm.client import connect  # noqa: E402
from fake_slurm.conf import read_conf  # noqa: E402
from fake_slurm.wire import SOCKET, Frames, pack  # noqa: E402

PACKAGE = Path(__file__).resolve().parent
COMMANDS = ("sbatch", "srun", "salloc", "scancel", "squeue", "scontrol", "sinfo", "sacct", "sacctmgr")
START_TIMEOUT_S = 20

DEFAULT_CONF = """\
ClusterName=fake
ProctrackType=proctrack/cgroup
KillWait=2
NodeName=node[1-4] CPUs=4 RealMemory=4000 Gres=gpu:2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=main Nodes=ALL Default=YES MaxTime=04:00:00 PriorityTier=5 PreemptMode=OFF
PartitionName=short Nodes=ALL MaxTime=00:05:00 MaxNodes=2 PriorityTier=5 PreemptMode=OFF
PartitionName=low Nodes=ALL MaxTime=04:00:00 PriorityTier=1 PreemptMode=REQUEUE
PartitionName=high Nodes=ALL MaxTime=04:00:00 PriorityTier=10 PreemptMode=OFF
"""

CLIENT = """\
#!{python} -SE
import sys
sys.path.insert(0, {tests!r})
from fake_slurm.client import main
main({name!r})
"""


class FakeCluster:
    """One controller and its folder. Further keys of slurm.conf may be given by name: FakeTick=1.

    partitions: a partition's name to further words of its line, {"low": "GraceTime=20"}.
    hosts: each node has a host name of its own (but no address), where the kernel lets this user give it one: root can
    always, others where user namespaces are on. Elsewhere all nodes have the machine's, as without it."""

    def __init__(self, folder, conf_text=DEFAULT_CONF, kill_wait=None, proctrack=None, partitions=None, hosts=False, **settings):
        self.folder = Path(os.path.realpath(folder))
        if hosts and processes.can_name_hosts():
            settings["FakeHosts"] = 1
        if kill_wait is not None:
            settings["KillWait"] = kill_wait
        if proctrack is not None:
            settings["ProctrackType"] = proctrack if "/" in proctrack else "proctrack/" + proctrack
        for name, words in (partitions or {}).items():
            conf_text = re.sub(r"(?m)^(PartitionName=%s\b.*)$" % name, r"\1 " + words, conf_text)
        self.conf_text = conf_text + "".join("%s=%s\n" % item for item in settings.items())
        self.nodes = list(read_conf(self.conf_text).nodes)
        self.conf_path = self.folder / "slurm.conf"
        self.controller = None

    @property
    def env(self):
        """The caller's environment as on a login node: no variable of Slurm's but SLURM_CONF."""
        kept = {name: value for name, value in os.environ.items()
                if not name.startswith(("SLURM_", "SRUN_", "SBATCH_", "SALLOC_", "FAKE_SLURM_", "PMI"))}
        return {**kept, "SLURM_CONF": str(self.conf_path), "PATH": "%s:%s" % (self.folder / "bin", kept.get("PATH", ""))}

    # What another user's command lines begin with.
    stranger = ["env", "FAKE_SLURM_UID=65533"]

    def start(self, watched_pid=None):
        """watched_pid: the cluster ends when this process does; by default the caller, 0 for nobody."""
        self.write_files()
        log = open(self.folder / "state" / "controller.log", "wb")
        with log:
            self.controller = subprocess.Popen(
                [sys.executable, "-SE", str(PACKAGE), str(self.folder), str(self.conf_path),
                 str(os.getpid() if watched_pid is None else watched_pid)],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self.folder, start_new_session=True, env=self.env)
        (self.folder / "state" / "controller.pid").write_text("%d\n" % self.controller.pid)
        deadline = time.monotonic() + START_TIMEOUT_S
        while not (self.folder / "state" / SOCKET).exists():
            if self.controller.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("the fake Slurm does not start:\n" + self.log())
            time.sleep(0.005)
        return self

    def write_files(self):
        (self.folder / "bin").mkdir(parents=True, exist_ok=True)
        shutil.rmtree(self.folder / "state", ignore_errors=True)
        (self.folder / "state").mkdir()
        self.conf_path.write_text(self.conf_text)
        for name in COMMANDS:
            path = self.folder / "bin" / name
            path.write_text(CLIENT.format(python=sys.executable, tests=str(PACKAGE.parent), name=name))
            path.chmod(0o755)

    def log(self):
        return (self.folder / "state" / "controller.log").read_text(errors="replace")

    def stop(self):
        """Ends the controller and every process of its jobs, escaped ones too."""
        if self.controller:
            self.controller.terminate()
            try:
                self.controller.wait(10)
            except subprocess.TimeoutExpired:
                self.controller.kill()
                self.controller.wait()
        self.kill_strays()

    def kill_strays(self):
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline:
            left = processes.with_marks(**{processes.CLUSTER_MARK: str(self.folder)})
            if not left:
                return
            processes.send(left, signal.SIGKILL)
            time.sleep(0.01)

    def __enter__(self):
        return self.start()

    def __exit__(self, *_):
        self.stop()

    # Nodes that fail

    def lose_node(self, name, kill=True):
        """A node falls silent. kill: with all its processes, as when its power fails; else only its slurmd is gone,
        and what runs there lives on beyond the reach of signals. Slurm notices after SlurmdTimeout."""
        self.ask("kill" if kill else "lose", name)

    def return_node(self, name):
        self.ask("return", name)

    def ask(self, *argv):
        """One of commands.py's `fake` actions; returns when it is done."""
        sock = connect(str(self.conf_path))
        frames, code = Frames(), None
        with contextlib.closing(sock):
            sock.sendall(pack({"tool": "fake", "argv": list(argv), "environment": {}}))
            while code is None:
                data = sock.recv(1 << 16)
                messages = frames.feed(data) if data else [("exit", 1)]
                code = next((message[1] for message in messages if message[0] == "exit"), None)
        if code:
            raise RuntimeError("the fake Slurm refuses %s:\n%s" % (" ".join(argv), self.log()))

    # A controller that hangs

    def hang(self):
        """Commands wait in vain and give up after MessageTimeout; nothing is scheduled; what runs, runs on. What
        sbatch, scancel and scontrol asked for meanwhile is done all the same when the controller goes on."""
        self.ask("hang")

    def go_on(self):
        self.ask("go on")

    def processes(self):
        """(pid, node, argv) of every living process of this cluster's jobs, escaped ones too."""
        found = set(processes.with_marks(**{processes.CLUSTER_MARK: str(self.folder)}))
        if self.controller:
            found |= set(processes.descendants([self.controller.pid]))
        rows = []
        for pid in sorted(found):
            argv = [os.fsdecode(word) for word in processes.read_proc(pid, "cmdline").split(b"\0")[:-1]]
            if argv:
                rows.append((pid, processes.mark_values(pid).get(processes.NODE_MARK, ""), argv))
        return rows


# From a shell ------------------------------------------------------------------------------------

def start_from_shell(folder):
    os.makedirs(folder, exist_ok=True)
    if running_pid(Path(folder)):
        sys.exit("%s: a fake Slurm runs there already" % folder)
    own = Path(folder) / "slurm.conf"
    cluster = FakeCluster(folder, own.read_text() if own.exists() else DEFAULT_CONF)
    cluster.start(watched_pid=0)
    print('export PATH="%s:$PATH"' % (cluster.folder / "bin"))
    print('export SLURM_CONF="%s"' % cluster.conf_path)


def running_pid(folder):
    """The controller of this folder, if it lives."""
    try:
        pid = int((folder / "state" / "controller.pid").read_text())
    except (OSError, ValueError):
        return None
    return pid if str(PACKAGE).encode() in processes.read_proc(pid, "cmdline") else None


def stop_from_shell(folder):
    pid = running_pid(Path(folder))
    if not pid:
        sys.exit("%s: no fake Slurm runs there" % folder)
    os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + 10
    while processes.start_time(pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    FakeCluster(folder).kill_strays()


def main(argv):
    actions = {"start": start_from_shell, "stop": stop_from_shell}
    if len(argv) != 2 or argv[0] not in actions:
        sys.exit("use: cluster.py start FOLDER | stop FOLDER")
    actions[argv[0]](argv[1])


if __name__ == "__main__":
    main(sys.argv[1:])
