"""A real Slurm cluster of four nodes on one machine, for a test or for a shell (Debian, as root):

    with RealCluster(tmp_path) as cluster:
        subprocess.run(["sbatch", "job.sh"], env=cluster.env)

    python tests/real/cluster.py install                  the Debian packages
    eval "$(python tests/real/cluster.py start FOLDER)"; sinfo; ... cluster.py stop FOLDER
    python tests/real/cluster.py run FOLDER -- COMMAND    up, COMMAND, down

Everything of a cluster lies in its folder: slurm.conf, logs/, state/. Several may run side by side.

A keeper process owns munged, slurmctld and the four slurmd. It is the subreaper of all that descends from
them, so no process of a job escapes it, and it ends them all when told to, or when its starter dies."""

import contextlib
import ctypes
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
import zlib
from pathlib import Path

HERE = Path(__file__).resolve().parent
if not __package__:                       # run as a script
    sys.path.insert(0, str(HERE.parent))

from real.network import Network  # noqa: E402

DAEMONS = ("munged", "slurmctld", "slurmd")
START_TIMEOUT_S = 60
STOP_TIMEOUT_S = 30
FIRST_PORT, PORT_BLOCKS, PORTS_A_BLOCK = 20000, 1000, 10       # below the range of outgoing connections
SOCKET_PATH_MAX = 107
JOBS_A_CLUSTER = 1000
CGROUPS = Path("/sys/fs/cgroup/freezer")
PR_SET_CHILD_SUBREAPER = 36

SLURM_CONF = """\
ClusterName=real
SlurmctldHost={host}({ctld_address})
SlurmctldPort={ctld_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# cred_expire: a requeued job may start after 6 s; with the default of 120 after 121 s (seen on 22.05.8)
AuthInfo=socket={short}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state/ctld
SlurmdSpoolDir={short}/%n
SlurmctldPidFile={folder}/state/slurmctld.pid
SlurmdPidFile={folder}/state/slurmd-%n.pid
SlurmctldLogFile={folder}/logs/slurmctld.log
SlurmdLogFile={folder}/logs/slurmd-%n.log
SlurmctldDebug=verbose
SlurmdDebug=verbose
MpiDefault=none
SwitchType=switch/none
TaskPlugin=task/none
ProctrackType=proctrack/{proctrack}
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=10000,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait={kill_wait}
FirstJobId={first_job}
MinJobAge=300
ReturnToService=2
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName=DEFAULT CPUs=4 RealMemory=4000 Gres=gpu:2 State=UNKNOWN
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=04:00:00 PriorityTier=5 PreemptMode=OFF
PartitionName=short Nodes=ALL MaxTime=00:05:00 MaxNodes=2 PriorityTier=5 PreemptMode=OFF
PartitionName=low Nodes=ALL MaxTime=04:00:00 PriorityTier=1 PreemptMode=REQUEUE
PartitionName=high Nodes=ALL MaxTime=04:00:00 PriorityTier=10 PreemptMode=OFF
"""

GRES_CONF = """\
AutoDetect=off
NodeName=node[1-4] Name=gpu File={folder}/state/fakegpu[0-1]
"""

CGROUP_CONF = """\
CgroupAutomount=no
ConstrainCores=no
ConstrainDevices=no
ConstrainRAMSpace=no
"""


class RealCluster:
    """The interface of the fake cluster. Further keys of slurm.conf may be given by name: MinJobAge=2.

    partitions: a partition's name to further words of its line, {"low": "GraceTime=20"}.
    hosts: every node is a host with its own address, ports, name and /etc/hosts (see network.py); with
    `shared`, a list of folders, they have nothing else of /tmp in common."""

    nodes = ["node1", "node2", "node3", "node4"]
    # What another user's command lines begin with; he may read what is in the tests' folders.
    stranger = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups",
                "--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]

    def __init__(self, folder, kill_wait=5, proctrack="linuxproc", partitions=None, hosts=False, shared=None,
                 **settings):
        self.folder = Path(os.path.realpath(folder))
        self.conf_path = self.folder / "slurm.conf"
        self.kill_wait, self.proctrack = kill_wait, proctrack.replace("proctrack/", "")
        self.partitions, self.settings = partitions or {}, settings
        self.hosts, self.shared = hosts, shared
        self.keeper, self.returned = None, []

    @property
    def env(self):
        """The caller's environment as on a login node: no variable of Slurm's but SLURM_CONF."""
        kept = {name: value for name, value in os.environ.items()
                if not name.startswith(("SLURM_", "SLURMD_", "SRUN_", "SBATCH_", "SALLOC_", "PMI"))}
        return {**kept, "SLURM_CONF": str(self.conf_path)}

    def start(self, watched=True):
        """Returns when all nodes are idle. watched: the cluster ends when the calling process does."""
        install()
        self.write_files()
        with open(self.folder / "logs" / "keeper.log", "ab") as log:
            self.keeper = subprocess.Popen(
                [sys.executable, "-u", str(HERE / "cluster.py"), "keep", str(self.folder)],
                stdin=subprocess.PIPE if watched else subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log,
                cwd="/", start_new_session=True, env={**self.env, "KEEPER_WATCHES_STDIN": str(int(watched))})
        if self.keeper.stdout.readline() != b"ready\n":
            self.keeper.wait()
            raise RuntimeError("Slurm does not start:\n" + self.log("keeper"))
        return self

    def stop(self):
        """Cancels all jobs, ends the daemons, kills what is left. Raises if something stays."""
        if not self.keeper:
            return
        if self.keeper.stdin:
            self.keeper.stdin.close()
        else:
            self.keeper.terminate()
        said = self.keeper.stdout.read().decode(errors="replace")
        keeper, self.keeper = self.keeper, None
        keeper.wait()
        for daemon in self.returned:
            kill_all([pid for pid, _ in descendants(daemon.pid)] + [daemon.pid])
            daemon.wait()
        if keeper.returncode:
            raise RuntimeError("Slurm did not stop cleanly:\n" + said + self.log("keeper"))

    def __enter__(self):
        return self.start()

    def __exit__(self, *_):
        self.stop()

    def processes(self):
        """(pid, node, argv) of every living process of this cluster's jobs, escaped ones too."""
        return [found for root in self.roots() for found in job_processes(root)]

    def roots(self):
        return [daemon.pid for daemon in [self.keeper, *self.returned] if daemon and daemon.poll() is None]

    def log(self, name="slurmctld"):
        """The text of logs/NAME.log: keeper, slurmctld, slurmd-node1, munged."""
        path = self.folder / "logs" / (name + ".log")
        return path.read_text(errors="replace") if path.exists() else ""

    def slurm(self, *argv, check=True):
        """The output of a Slurm command, for short tests: cluster.slurm("squeue", "-h")."""
        done = subprocess.run(argv, env=self.env, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        if check and done.returncode:
            raise RuntimeError("%s: exit code %d\n%s" % (" ".join(argv), done.returncode, done.stderr))
        return done.stdout

    def daemon(self, node):
        """The pid of a node's slurmd, for tests that take a node away."""
        return int((self.folder / "state" / ("slurmd-%s.pid" % node)).read_text())

    def lose_node(self, name, kill=True):
        """Its slurmd is gone; kill: with all that runs there, as when its power fails."""
        doomed = [pid for pid, node, _ in self.processes() if node == name] if kill else []
        stepds = [pid for root in self.roots() for pid, argv in descendants(root) if argv and "slurmstepd" in argv[0]
                  and {below for below, _ in descendants(pid)} & set(doomed)]
        kill_all([self.daemon(name), *stepds, *doomed])

    def return_node(self, name):
        self.returned.append(subprocess.Popen([program("slurmd"), "-D", "-N", name], env=self.env,
                                              stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL))

    def hang(self):
        """The controller answers nobody; what runs, runs on."""
        os.kill(self.controller(), signal.SIGSTOP)

    def go_on(self):
        os.kill(self.controller(), signal.SIGCONT)

    def controller(self):
        return int((self.folder / "state" / "slurmctld.pid").read_text())

    def address(self, node):
        """What others reach a node by."""
        network = Network.of(self.folder)
        return network.address[node] if network else "127.0.0.1"

    def cut(self, node):
        """Pull a node's network cable (hosts only)."""
        Network.of(self.folder).cut(node)

    def mend(self, node):
        Network.of(self.folder).mend(node)

    def firewall(self, closed, to):
        """A node drops all connections of another but those to Slurm's daemon (hosts only)."""
        line = next(line for line in self.conf_path.read_text().splitlines() if line.startswith("NodeName=%s " % closed))
        Network.of(self.folder).firewall(closed, to, int(line.rpartition("Port=")[2].split()[0]))

    # The files ---------------------------------------------------------------------------------------

    def write_files(self):
        state = self.folder / "state"
        if Network.of(self.folder):       # of a keeper that was killed
            Network.of(self.folder).down()
        shutil.rmtree(state, ignore_errors=True)
        for folder in (self.folder, state, state / "ctld", self.folder / "logs"):
            folder.mkdir(parents=True, exist_ok=True)
        for number in range(2):
            with contextlib.suppress(FileExistsError):     # Slurm takes device nodes only; nobody opens these
                os.mknod(state / ("fakegpu%d" % number), stat.S_IFCHR | 0o600, os.makedev(195, number))
        short = self.short_folder()
        (state / "short").write_text("%s\n" % short)
        network = Network.new(self.folder, self.nodes, self.shared) if self.hosts else None
        ports = free_ports(str(self.folder))
        nodes = "\n".join(
            "NodeName=%s NodeHostname=%s NodeAddr=%s Port=%d"
            % (node, node if network else host_name(), self.address(node), port)
            for node, port in zip(self.nodes, ports[1:]))
        text = SLURM_CONF.format(
            host=host_name(), ctld_address=network.login if network else "127.0.0.1", ctld_port=ports[0], nodes=nodes,
            folder=self.folder, short=short, kill_wait=self.kill_wait, proctrack=self.proctrack,
            first_job=self.first_job())
        self.conf_path.write_text(with_settings(text, self.partitions, self.settings))
        (self.folder / "gres.conf").write_text(GRES_CONF.format(folder=self.folder))
        (self.folder / "cgroup.conf").write_text(CGROUP_CONF)

    def first_job(self):
        """1, but cgroups are named by node and job alone: there two clusters at once must not share a number."""
        return 1 if self.proctrack != "cgroup" else 10000 + zlib.crc32(str(self.folder).encode()) % 5000 * JOBS_A_CLUSTER

    def short_folder(self):
        """Where the sockets lie: below the cluster's folder, or in /tmp if the kernel would find them too long."""
        inside = self.folder / "s"
        if len("%s/node1/node1_12345678.4294967294" % inside) > SOCKET_PATH_MAX:
            inside = Path("/tmp/llmrun-slurm-%08x" % zlib.crc32(str(self.folder).encode()))
        inside.mkdir(exist_ok=True)
        inside.chmod(0o755)
        return inside


def with_settings(text, partitions, settings):
    """slurm.conf with the given keys in place of its own, and the partitions' further words."""
    lines = []
    for line in text.splitlines():
        key = line.split("=", 1)[0]
        if key in settings:
            continue
        if key == "PartitionName":
            line = with_words(line, partitions.get(line.split()[0].split("=")[1], ""))
        lines.append(line)
    return "\n".join(["%s=%s" % item for item in settings.items()] + lines) + "\n"


def with_words(line, words):
    given = {word.split("=")[0] for word in words.split()}
    return " ".join([word for word in line.split() if word.split("=")[0] not in given] + words.split())


def host_name():
    return socket.gethostname().split(".")[0]


def free_ports(name):
    """Five ports that stay the same for a folder as long as nobody else has taken them."""
    first = zlib.crc32(name.encode())
    for step in range(PORT_BLOCKS):
        base = FIRST_PORT + (first + step) % PORT_BLOCKS * PORTS_A_BLOCK
        ports = list(range(base, base + 5))
        if all(is_free(port) for port in ports):
            return ports
    raise RuntimeError("no free ports for Slurm between %d and %d" % (FIRST_PORT, FIRST_PORT + 10000))


def is_free(port):
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
        return True


def install():
    """The Debian packages, if they are missing."""
    with contextlib.suppress(RuntimeError):
        if [program(name) for name in DAEMONS + ("sbatch",)]:
            return
    subprocess.run(["bash", str(HERE / "setup.sh")], check=True, stdout=sys.stderr)


# What runs ---------------------------------------------------------------------------------------

def descendants(root):
    """Every living process below root, from one reading of /proc: (pid, argv) in order of pids."""
    children = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError, ValueError, IndexError):
                stat = Path("/proc", name, "stat").read_text(errors="replace").rpartition(")")[2].split()
                if stat[0] not in "ZX":
                    children.setdefault(int(stat[1]), []).append(int(name))
    found, todo = [], [root]
    while todo:
        below = children.get(todo.pop(), [])
        found += below
        todo += below
    return [(pid, argv_of(pid)) for pid in sorted(found)]


def job_processes(keeper):
    """(pid, node, argv) of the descendants of a keeper that are neither Slurm's daemons nor its slurmstepd."""
    return [(pid, node_of(pid, keeper), argv) for pid, argv in descendants(keeper)
            if argv and not is_slurms_own(argv)]


def is_slurms_own(argv):
    name = os.path.basename(argv[0].split(" ")[0]).rstrip(":")
    return name in DAEMONS + ("slurmstepd", "slurmscriptd")


def argv_of(pid):
    return [os.fsdecode(word) for word in read_proc(pid, "cmdline").split(b"\0") if word]


def node_of(pid, keeper):
    """SLURMD_NODENAME of a process, else of the nearest process above it that has one."""
    while pid not in (0, 1, keeper):
        for item in read_proc(pid, "environ").split(b"\0"):
            if item.startswith(b"SLURMD_NODENAME="):
                return os.fsdecode(item.split(b"=", 1)[1])
        stat = read_proc(pid, "stat").decode(errors="replace").rpartition(")")[2].split()
        pid = int(stat[1]) if stat else 0
    return ""


def read_proc(pid, name):
    try:
        return Path("/proc", str(pid), name).read_bytes()
    except OSError:
        return b""


# The keeper --------------------------------------------------------------------------------------

def keep(folder):
    """Runs the cluster of a folder until its starter is gone or tells it to stop by SIGTERM."""
    folder = Path(folder)
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    stopped = {"now": False}
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopped.update(now=True))
    (folder / "state" / "keeper.pid").write_text("%d\n" % os.getpid())
    try:
        start_daemons(folder)
        print("ready", flush=True)
        wait_for_the_end(stopped, watches_stdin=os.environ.get("KEEPER_WATCHES_STDIN") == "1")
    finally:
        left = end_everything(folder)
    if left:
        print("still there: %s" % left, flush=True)
    sys.exit(1 if left else 0)


def start_daemons(folder):
    short = Path((folder / "state" / "short").read_text().strip())
    network = Network.of(folder)
    if network:
        network.up()
    start_munge(folder, short)
    start_daemon(folder, "slurmctld", [program("slurmctld"), "-D", "-c"])
    port = int(setting(folder, "SlurmctldPort"))
    wait_until("slurmctld listens; see logs/slurmctld.log", lambda: connects(network.login if network else "127.0.0.1", port), 0.02)
    for node in RealCluster.nodes:
        argv = [program("slurmd"), "-D", "-N", node]
        start_daemon(folder, "slurmd-" + node, network.inside(node, argv) if network else argv)
    wait_until("all nodes are idle; see logs/slurmd-*.log", lambda: states(folder) == {"idle"}, every_s=0.1)


def start_munge(folder, short):
    key = folder / "state" / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(os.urandom(128))
    sock = short / "munge.socket"
    start_daemon(folder, "munged", [
        program("munged"), "--foreground", "--force", "--num-threads=2", "--key-file=%s" % key, "--socket=%s" % sock,
        "--pid-file=%s" % (folder / "state" / "munged.pid"), "--seed-file=%s" % (folder / "state" / "munge.seed"),
        "--log-file=%s" % (folder / "logs" / "munged.log")])
    wait_until("munged listens; see logs/munged.log", sock.exists, every_s=0.01)


def start_daemon(folder, name, argv):
    """A child of the keeper that the kernel kills with it, should the keeper itself be killed."""
    with open(folder / "logs" / (name + ".out"), "ab") as log:
        subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "--", *argv], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            cwd="/", start_new_session=True, env=slurm_env(folder))


def program(name):
    """A user's PATH may lack the sbin folders."""
    found = shutil.which(name, path=os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin")
    if not found:
        raise RuntimeError("%s is not installed; run tests/real/setup.sh as root" % name)
    return found


def slurm_env(folder):
    return {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}


def setting(folder, key):
    for line in (folder / "slurm.conf").read_text().splitlines():
        if line.startswith(key + "="):
            return line.split("=", 1)[1]
    raise KeyError(key)


def connects(address, port):
    with contextlib.suppress(OSError), socket.create_connection((address, port), 1):
        return True
    return False


def states(folder):
    done = ask(folder, "sinfo", "-h", "-N", "-p", "main", "-o", "%T")
    return set(done.stdout.split())


def ask(folder, *argv):
    return subprocess.run(argv, capture_output=True, text=True, timeout=20, env=slurm_env(folder))


def wait_for_the_end(stopped, watches_stdin):
    """Until SIGTERM, or until the starter's end of our stdin closes. Reaps what the jobs leave."""
    if watches_stdin:
        os.set_blocking(0, False)
    while not stopped["now"]:
        reap()
        if watches_stdin:
            with contextlib.suppress(BlockingIOError):
                if os.read(0, 100) == b"":
                    return
        time.sleep(0.05)


def reap():
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def end_everything(folder):
    """Ends the jobs, then the daemons, then whatever else is below the keeper. Returns what would not go."""
    me, deadline = os.getpid(), time.monotonic() + STOP_TIMEOUT_S
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        end_jobs(folder)
    while descendants(me) and time.monotonic() < deadline:
        kill_all(pid for pid, _ in descendants(me))
        time.sleep(0.02)
        reap()
    remove_cgroups(int(setting(folder, "FirstJobId")))
    network = Network.of(folder)
    if network:
        network.down()
    shutil.rmtree((folder / "state" / "short").read_text().strip(), ignore_errors=True)
    return descendants(me)


def end_jobs(folder):
    """By Slurm itself, as it takes its cgroups along; escaped processes are left to the caller."""
    jobs = ask(folder, "squeue", "-h", "-o", "%A").stdout.split()
    if not jobs:
        return
    ask(folder, "scancel", *jobs)
    ask(folder, "scancel", "--signal=KILL", "--full", *jobs)
    deadline = time.monotonic() + 2
    while any("slurmstepd" in argv[0] for _, argv in descendants(os.getpid()) if argv) and time.monotonic() < deadline:
        time.sleep(0.02)
        reap()


def kill_all(pids):
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def remove_cgroups(first_job):
    """What a slurmstepd that was killed leaves behind. The kernel refuses those that are still in use."""
    for job in CGROUPS.glob("slurm_node[1-4]/uid_*/job_*"):
        if first_job <= int(job.name[4:]) < first_job + JOBS_A_CLUSTER:
            for folder, _, _ in os.walk(job, topdown=False):
                with contextlib.suppress(OSError):
                    os.rmdir(folder)


def wait_until(what, condition, every_s, timeout_s=START_TIMEOUT_S):
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise RuntimeError("waited %d s until %s" % (timeout_s, what))
        reap()
        time.sleep(every_s)


# From a shell ------------------------------------------------------------------------------------

def start_from_shell(folder):
    cluster = RealCluster(folder)
    cluster.start(watched=False)
    print('export SLURM_CONF="%s"' % cluster.conf_path)


def stop_from_shell(folder):
    try:
        pid = int((Path(folder) / "state" / "keeper.pid").read_text())
    except (OSError, ValueError):
        sys.exit("%s: no cluster was started there" % folder)
    if "keep" not in argv_of(pid):
        return
    os.kill(pid, signal.SIGTERM)
    wait_until("the cluster's keeper (process %d) has ended" % pid, lambda: not argv_of(pid), 0.05, STOP_TIMEOUT_S + 5)


def run_from_shell(folder, command):
    with RealCluster(folder) as cluster:
        return subprocess.run(command, env=cluster.env).returncode


def main(argv):
    if argv[:1] == ["install"] and len(argv) == 1:
        install()
    elif argv[:1] == ["run"] and len(argv) > 3 and argv[2] == "--":
        sys.exit(run_from_shell(argv[1], argv[3:]))
    elif argv[:1] in (["start"], ["stop"], ["keep"]) and len(argv) == 2:
        {"start": start_from_shell, "stop": stop_from_shell, "keep": keep}[argv[0]](argv[1])
    else:
        sys.exit("use: cluster.py install | start FOLDER | stop FOLDER | run FOLDER -- COMMAND")


if __name__ == "__main__":
    main(sys.argv[1:])
