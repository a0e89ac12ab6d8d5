"""Reads the subset of slurm.conf that describes a fake cluster."""

import re
from dataclasses import dataclass, field

from .formats import UNLIMITED, compare_version, expand, parse_time

# What a key means when the file does not name it. Fake* keys exist only here:
#   FakeVersion       the release to behave like
#   FakeTick          the controller's slow cycle (30 s in Slurm)
#   FakeMinute        seconds that a minute of a time limit lasts; the lead of --signal goes with it
#   FakeTaskProlog    a line that every task prints first, as a site's TaskProlog does
#   FakeRequeueDelay  seconds that a requeued job waits (in Slurm cred_expire of AuthInfo and one more)
#   FakeHosts         1: each node has a host name of its own, where the kernel lets us give it one
#   FakeSignalGap     seconds between CONT and TERM; where they are as few as Slurm's, a process on a busy machine
#                     finds both at once, and then in the order of their numbers
# Only here as well: `scontrol update job ID FakeEnd=SECONDS` moves a time limit, whose least is a minute in Slurm.
DEFAULTS = {
    "ClusterName": "fake", "KillWait": "30", "MinJobAge": "300", "EioTimeout": "60",
    "EnforcePartLimits": "NO", "ProctrackType": "proctrack/cgroup", "MaxArraySize": "1001",
    "SelectType": "select/cons_tres", "SelectTypeParameters": "CR_Core", "TaskPlugin": "task/none",
    "AccountingStorageType": "accounting_storage/none", "SchedulerType": "sched/backfill",
    "PreemptMode": "OFF", "PreemptType": "preempt/none", "JobRequeue": "1", "JobFileAppend": "0",
    "SlurmdTimeout": "300", "MessageTimeout": "10", "InactiveLimit": "0", "KillOnBadExit": "0", "WaitTime": "0",
    "MpiDefault": "none", "AuthInfo": "", "PreemptParameters": "", "SlurmctldParameters": "",
    "SrunPortRange": "", "LaunchParameters": "", "PrologSlurmctld": "",
    "FakeVersion": "22.05.8", "FakeTick": "30", "FakeMinute": "60", "FakeTaskProlog": "",
    "FakeRequeueDelay": "", "FakeSignalGap": "0.004", "FakeHosts": "",
}


@dataclass(frozen=True)
class NodeConf:
    name: str
    cpus: int = 1
    memory: int = 1
    gpus: int = 0
    gpu_type: str = ""
    features: str = ""

    @property
    def gres(self):
        if not self.gpus:
            return "(null)"
        return "gpu:%s%d" % (self.gpu_type + ":" if self.gpu_type else "", self.gpus)


@dataclass(frozen=True)
class PartitionConf:
    name: str
    nodes: tuple
    default: bool = False
    max_time: object = UNLIMITED          # minutes
    default_time: object = None           # minutes; None: the same as max_time
    max_nodes: object = UNLIMITED
    priority_tier: int = 1
    preempt_mode: str = "OFF"
    grace_time: int = 0
    state: str = "UP"


@dataclass(frozen=True)
class Conf:
    values: dict
    nodes: dict = field(default_factory=dict)
    partitions: dict = field(default_factory=dict)

    def number(self, key):
        return float(self.values[key])

    def is_set(self, key, *words):
        return self.values[key].upper() in words

    @property
    def cgroup(self):
        return self.values["ProctrackType"].endswith("cgroup")

    @property
    def memory_counts(self):
        return "MEMORY" in self.values["SelectTypeParameters"].upper()

    def host_of(self, node):
        """The host name that a node's processes are to have; "" leaves them the machine's."""
        return node if self.values["FakeHosts"] else ""

    @property
    def requeue_delay(self):
        """A requeued job waits until the credentials of its earlier run have expired."""
        expire = re.search(r"cred_expire=(\d+)", self.values["AuthInfo"])
        return float(self.values["FakeRequeueDelay"] or (int(expire.group(1)) if expire else 120) + 1)

    @property
    def preempts(self):
        return self.values["PreemptType"] == "preempt/partition_prio"

    def since(self, version):
        return compare_version(self.values["FakeVersion"]) >= compare_version(version)


def logical_lines(text):
    """Comments off, lines that end in a backslash joined."""
    for line in re.sub(r"\\\n", " ", text).splitlines():
        line = re.sub(r"(^|\s)#.*", "", line).strip()
        if line:
            yield line


def pairs(line):
    return dict(re.findall(r"(\w+)=(\"[^\"]*\"|\S*)", line))


def read_gres(text):
    """gpu:2, gpu:a100:2 -> (2, 'a100')"""
    match = re.search(r"gpu(?::([a-z]\w*))?(?::(\d+))?", text or "")
    return (int(match.group(2) or 1), match.group(1) or "") if match else (0, "")


def node_confs(line):
    value = pairs(line)
    gpus, gpu_type = read_gres(value.get("Gres"))
    for name in expand(value["NodeName"]):
        yield NodeConf(name, int(value.get("CPUs", 1)), int(value.get("RealMemory", 1)), gpus, gpu_type,
                       value.get("Feature", ""))


def limit(text):
    return UNLIMITED if text.upper() in (UNLIMITED, "INFINITE") else int(text)


def partition_conf(line, nodes, preempt_mode):
    value = pairs(line)
    names = tuple(nodes) if value.get("Nodes", "ALL") == "ALL" else tuple(expand(value["Nodes"]))
    return PartitionConf(
        value["PartitionName"], names, value.get("Default", "NO").upper() == "YES",
        parse_time(value.get("MaxTime", UNLIMITED)),
        parse_time(value["DefaultTime"]) if "DefaultTime" in value else None,
        limit(value.get("MaxNodes", UNLIMITED)), int(value.get("PriorityTier", 1)),
        value.get("PreemptMode", preempt_mode).upper(), int(value.get("GraceTime", 0)), value.get("State", "UP"))


def read_conf(text):
    values, nodes, partition_lines = dict(DEFAULTS), {}, []
    names = {name.lower(): name for name in DEFAULTS}
    for line in logical_lines(text):
        if line.startswith("NodeName="):
            nodes.update((node.name, node) for node in node_confs(line))
        elif line.startswith("PartitionName="):
            partition_lines.append(line)
        else:
            key, _, value = line.partition("=")
            values[names.get(key.strip().lower(), key.strip())] = value.strip().strip('"')
    preempt_mode = values["PreemptMode"].upper().replace(",GANG", "").replace("GANG,", "")
    partitions = [partition_conf(line, nodes, preempt_mode) for line in partition_lines]
    return Conf(values, nodes, {partition.name: partition for partition in partitions})
