"""What the controller knows: nodes, jobs, steps, tasks. Data and small questions about it."""

import asyncio
from dataclasses import dataclass, field
from typing import Optional

from .conf import NodeConf
from .formats import UNLIMITED

CODES = {"PENDING": "PD", "RUNNING": "R", "SUSPENDED": "S", "COMPLETED": "CD", "CANCELLED": "CA", "FAILED": "F", "TIMEOUT": "TO", "NODE_FAIL": "NF",
         "PREEMPTED": "PR", "BOOT_FAIL": "BF", "DEADLINE": "DL", "OUT_OF_MEMORY": "OOM",
         "COMPLETING": "CG", "CONFIGURING": "CF", "RESIZING": "RS", "RESV_DEL_HOLD": "RD", "REQUEUED": "RQ",
         "REQUEUE_FED": "RF", "REQUEUE_HOLD": "RH", "REVOKED": "RV", "SIGNALING": "SI", "SPECIAL_EXIT": "SE",
         "STAGE_OUT": "SO", "STOPPED": "ST"}
LIVE = ("PENDING", "RUNNING", "SUSPENDED", "COMPLETING", "CONFIGURING", "SPECIAL_EXIT", "STOPPED")


@dataclass(frozen=True)
class Share:
    """What a job or a step holds on one node."""
    cpus: int
    memory: int
    gpus: tuple = ()
    tasks: int = 1


@dataclass
class Node:
    conf: NodeConf
    holders: dict = field(default_factory=dict)     # job id -> Share
    drained: bool = False
    down: bool = False
    lost_at: Optional[float] = None                 # its slurmd is silent since then
    killed: bool = False                            # with all its processes
    silent: bool = False                            # which the controller has noticed by now
    unheard: list = field(default_factory=list)     # ends of tasks that it could not report
    reason: str = ""

    @property
    def usable(self):
        return not self.drained and not self.down and self.lost_at is None

    @property
    def name(self):
        return self.conf.name

    @property
    def free_cpus(self):
        return self.conf.cpus - sum(share.cpus for share in self.holders.values())

    @property
    def free_memory(self):
        return self.conf.memory - sum(share.memory for share in self.holders.values())

    @property
    def free_gpus(self):
        held = {gpu for share in self.holders.values() for gpu in share.gpus}
        return tuple(gpu for gpu in range(self.conf.gpus) if gpu not in held)


@dataclass(frozen=True)
class Request:
    """What a job asks of the cluster, read from its options."""
    name: str
    partitions: tuple
    min_nodes: int = 1
    max_nodes: int = 1
    nodes_given: bool = False
    ntasks: int = 0                       # 0: not asked, one a node
    ntasks_per_node: int = 0
    cpus_per_task: int = 1
    cpus_given: bool = False
    memory: Optional[int] = None          # MB a node; 0: the whole node
    memory_per_cpu: Optional[int] = None
    gpus_per_node: int = 0
    gpus: int = 0
    gpus_per_task: int = 0
    gres: str = ""
    nodelist: tuple = ()
    exclude: tuple = ()
    features: str = ""
    reservation: str = ""
    exclusive: bool = False
    time_limit: object = None             # minutes, UNLIMITED or None: the partition's
    dependency: str = ""
    begin: Optional[float] = None
    hold: bool = False
    comment: str = ""
    signal: int = 0
    signal_batch: bool = False
    signal_lead: int = 60
    no_kill: bool = False                 # a lost node does not end the job
    requeue: bool = True
    append: bool = False
    kill_on_invalid_dep: bool = False

    @property
    def tasks(self):
        return self.ntasks or self.ntasks_per_node * self.min_nodes or self.min_nodes


@dataclass
class Task:
    """One process that a node's slurmstepd would have started."""
    procid: int
    localid: int
    node: str
    nodeid: int
    pid: int = 0
    status: Optional[int] = None          # as waitpid gives it
    step: object = None
    stdin: object = None                  # a write transport
    early_input: list = field(default_factory=list)     # what came before stdin was open
    open_streams: int = 0
    given_up: bool = False                # its node was lost; it may live on

    @property
    def alive(self):
        return self.pid != 0 and self.status is None


@dataclass
class Step:
    """A batch script or what one srun runs."""
    job: object
    id: object                            # "batch" or a number
    name: str
    shares: dict = field(default_factory=dict)      # node -> Share
    overlap: bool = False
    tasks: list = field(default_factory=list)
    client: object = None
    started: float = 0
    run: int = 0                                    # of the job, which may be requeued
    cancelled: bool = False
    killed: bool = False
    announce: object = lambda notice: None          # tells its srun that it is being ended
    say_cancelled: object = lambda notice: None     # ... that it has been signalled so
    node_failed: object = lambda node, survives: None       # ... that a node of it is lost

    @property
    def nodes(self):
        return list(self.shares)

    @property
    def alive(self):
        return any(task.alive for task in self.tasks)

    @property
    def label(self):
        return "%s.%s" % (self.job.id, self.id)

    @property
    def mark(self):
        """Its processes are known by this; those of an earlier run may live on."""
        return "%s.%d" % (self.label, self.run)


@dataclass
class Job:
    id: int
    request: Request
    environment: dict
    partition: str
    uid: int
    gid: int
    user: str
    submitted: float
    script: Optional[bytes] = None        # None: an allocation by salloc or srun
    argv: tuple = ()
    command: str = "(null)"
    workdir: str = "/"
    umask: int = 0o022
    output: str = ""
    error: str = ""
    input: str = "/dev/null"
    patterns: dict = field(default_factory=dict)    # these three as given, with %j and the like
    state: str = "PENDING"
    completing: bool = False
    configuring: bool = False             # its nodes are being made ready: PrologSlurmctld runs
    reason: str = "None"
    looked_at: bool = False               # by a scheduling cycle, which finds the true reason
    time_limit: object = UNLIMITED        # minutes
    minute: float = 60                    # seconds that one lasts
    begin: Optional[float] = None         # not before; --begin, or the wait after a requeue
    eligible: Optional[float] = None
    started: Optional[float] = None
    ended: Optional[float] = None
    end_at: Optional[float] = None        # when the time limit ends it
    planned: Optional[float] = None
    exit_code: int = 0
    exit_signal: int = 0
    shares: dict = field(default_factory=dict)      # node -> Share
    batch: Optional[Step] = None
    steps: dict = field(default_factory=dict)
    next_step: int = 0
    client: object = None                 # the salloc or srun that holds it
    comment: str = ""
    held: str = ""                        # by whom, as its reason says
    hold_again: str = ""                  # requeued so as to be held, in this state
    stopped: bool = False                 # by SIGSTOP of its user's
    warned: bool = False
    priority: int = 0
    failed_dependency: bool = False
    restarts: int = 0
    again: bool = False                   # it will wait anew once its processes are gone
    batch_host: str = ""
    suspended_at: Optional[float] = None
    paused: float = 0                     # seconds that it has been suspended
    made_way: bool = False                # suspended by preemption
    array: object = None                  # what it shares with the other tasks of its array
    array_task: Optional[int] = None      # None: no task, or not yet one
    array_waiting: tuple = ()             # the indices of the tasks that have not started
    merged: bool = False                  # squeue's look at the waiting tasks of an array
    preempted_at: Optional[float] = None
    launch_failure: bool = False
    first_shares: dict = field(default_factory=dict)    # before a node was lost
    finished: asyncio.Event = field(default_factory=asyncio.Event)
    allocated: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def nodes(self):
        return list(self.shares)

    @property
    def shown_state(self):
        if self.configuring and self.state == "RUNNING":
            return "CONFIGURING"
        if self.completing:
            return "COMPLETING"
        if self.stopped and self.state == "RUNNING":
            return "STOPPED"
        return self.hold_again if self.held and self.hold_again and self.state == "PENDING" else self.state

    @property
    def limit_s(self):
        return None if self.time_limit == UNLIMITED else self.time_limit * self.minute

    @property
    def live(self):
        return self.shown_state in LIVE

    @property
    def tasks_per_node(self):
        return [share.tasks for share in self.shares.values()]

    def all_steps(self):
        return ([self.batch] if self.batch else []) + list(self.steps.values())
