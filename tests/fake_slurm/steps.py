"""srun: a step of an allocation, its tasks, and the streams between them and the command.

The tasks are the controller's own children; srun only holds the line, and its death ends them."""

import asyncio
import errno
import os
import re
import signal
import time

from .environment import exported, task_variables
from .files import expand_pattern
from .formats import expand, parse_megabytes
from .model import Share, Step, Task
from .options import Refusal
from .processes import marks, spawn
from .request import gpu_count, gres_gpus, node_range

DEATHS = {1: "Hangup", 2: "Interrupt", 3: "Quit", 4: "Illegal instruction", 6: "Aborted", 7: "Bus error",
          8: "Floating point exception", 9: "Killed", 10: "User defined signal 1", 11: "Segmentation fault",
          12: "User defined signal 2", 13: "Broken pipe", 14: "Alarm clock", 15: "Terminated"}
KILLS_AT_ONCE = (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
LARGEST_LINE = 1 << 16
NO_ANSWER, LAUNCH_FAILED = "Communication connection failure", 233


def unable(job, words):
    return Refusal(1, "srun: error: Unable to create step for job %d: %s" % (job.id, words))


# What a step gets ------------------------------------------------------------------------------

def step_nodes(client, job, options, given):
    """The step's nodes and its number of tasks. given: what stood on the command line, not in variables."""
    nodes = [name for name in job.nodes if name not in expand(options.get("exclude", ""))]
    wanted = expand(options["nodelist"]) if "nodelist" in options else []
    if not set(wanted) <= set(nodes):
        raise unable(job, "Requested node configuration is not available")
    count = node_count(client, job, options, given, len(nodes), len(set(wanted)))
    if "relative" in options:
        nodes = nodes[int(options["relative"]):]
    order = sorted(nodes, key=lambda name: name not in wanted)
    chosen = [name for name in nodes if name in order[:count]]
    ntasks = int(options["ntasks"]) if "ntasks" in options else count * int(options.get("ntasks-per-node", 1))
    if ntasks < len(chosen):
        if "nodes" in given:
            client.err("srun: warning: can't run %d processes on %d nodes, setting nnodes to %d"
                       % (ntasks, len(chosen), ntasks))
        chosen = [name for name in nodes if name in order[:ntasks]]
    return chosen, ntasks


def node_count(client, job, options, given, available, wanted):
    if "nodes" not in given:
        said = options.get("nodes")
        if said and int(said) != len(job.nodes):
            client.err("srun: error: SLURM_JOB_NUM_NODES environment variable conflicts with allocated node count "
                       "(%s != %d)." % (said, len(job.nodes)))
        return wanted or available
    low, high = node_range(options["nodes"])
    if low > len(job.nodes):
        client.err("srun: warning: can't honor --nodes=%d, the job has %d" % (low, len(job.nodes)))
    return min(max(high if high < available else available, low), available) if high != low else min(low, available)


def spread(nodes, ntasks, job, options):
    """Tasks on each node: one each, then the rest as CPUs allow."""
    per_node = int(options.get("ntasks-per-node", 0))
    cpus_each = int(options.get("cpus-per-task", 1))
    room = {name: job.shares[name].cpus // cpus_each for name in nodes}
    if "overcommit" in options:
        room = dict.fromkeys(nodes, ntasks)
    if per_node and ntasks <= per_node * len(nodes):
        room = {name: min(count, per_node) for name, count in room.items()}
    dealt = dict.fromkeys(nodes, 0)
    for _ in range(ntasks):
        open_nodes = [name for name in nodes if dealt[name] < room[name]]
        if not open_nodes:
            raise unable(job, "More processors requested than permitted")
        dealt[min(open_nodes, key=lambda name: dealt[name])] += 1
    return dealt


def step_gpus(job, options, node, ntasks_here):
    """How many GPUs of the job's on this node; None: all of them."""
    if "gres" in options:
        return gres_gpus("srun", options["gres"])
    if "gpus-per-node" in options:
        return gpu_count(options["gpus-per-node"])
    if "gpus-per-task" in options:
        return gpu_count(options["gpus-per-task"]) * ntasks_here
    return None


def step_shares(controller, job, dealt, options):
    """{node: Share} if there is room now, {} if not; raises if there never is."""
    exact = "exact" in options or "cpus-per-task" in options
    shares = {}
    for node, tasks in dealt.items():
        whole = job.shares[node]
        wanted = step_gpus(job, options, node, tasks)
        if wanted and wanted > len(whole.gpus):
            raise Refusal(1, *(() if whole.gpus else ("srun: error: Step requested GRES but job doesn't have GRES",)),
                          *unable(job, "Invalid generic resource (gres) specification").lines)
        memory = step_memory(controller, job, whole, options)
        busy = [] if "overlap" in options else [
            step.shares[node] for step in job.steps.values() if node in step.shares and not step.overlap]
        cpus = tasks * int(options.get("cpus-per-task", 1)) if exact else whole.cpus
        free_gpus = [gpu for gpu in whole.gpus if all(gpu not in share.gpus for share in busy)]
        wanted = len(whole.gpus) if wanted is None else wanted
        if (cpus + sum(share.cpus for share in busy) > whole.cpus or wanted > len(free_gpus)
                or memory + sum(share.memory for share in busy) > max(whole.memory, memory if not busy else 0)):
            return {}
        shares[node] = Share(cpus, memory, tuple(free_gpus[:wanted]), tasks)
    return shares


def step_memory(controller, job, whole, options):
    if not controller.conf.memory_counts:
        return 0
    memory = parse_megabytes(options["mem"]) if "mem" in options else whole.memory
    if memory > whole.memory:
        raise unable(job, "Memory required by task is not available")
    return memory


async def create_step(controller, client, job, options, given, name):
    """Waits for the job's other steps as srun does, saying so once."""
    nodes, ntasks = step_nodes(client, job, options, given)
    dealt = spread(nodes, ntasks, job, options)
    patience = options.get("immediate")
    deadline = None if patience is None else time.monotonic() + int(patience or 1)
    told = False
    while True:
        if job.shown_state == "CONFIGURING" and not client.gone:
            told = True
            await asyncio.sleep(0.05)
            continue
        if job.shown_state not in ("RUNNING", "STOPPED"):
            raise unable(job, "Job/step already completing or completed")
        shares = step_shares(controller, job, dealt, options)
        if shares:
            break
        if client.gone or (deadline and time.monotonic() > deadline):
            raise unable(job, "Requested nodes are busy")
        if not told:
            client.err("srun: Job %d step creation temporarily disabled, retrying (Requested nodes are busy)" % job.id)
            told = True
        await asyncio.sleep(0.05)
    step = Step(job, job.next_step, name, shares, overlap="overlap" in options, started=time.time(), run=job.restarts)
    job.next_step += 1
    job.steps[step.id] = step
    if told:
        client.err("srun: Step created for StepId=%s" % step.label)
    return step


# Running it ------------------------------------------------------------------------------------

class Running:
    """A step at work: its tasks' streams, srun's signals, the words srun prints."""

    def __init__(self, controller, client, step, options, cwd):
        self.controller, self.client, self.step, self.options, self.cwd = controller, client, step, options, cwd
        self.changed = asyncio.Event()
        self.interrupted = 0.0
        self.first_exit = None
        self.said_abort = self.said_cancelled = False
        self.files = {}
        step.announce, step.say_cancelled, step.node_failed = self.announce, self.say_cancelled, self.node_failed

    def announce(self, notice):
        """*** STEP ... CANCELLED ***, from each of its nodes."""
        self.say_abort()
        self.say_cancelled(notice)

    def say_cancelled(self, notice):
        """Once: who was told of a preemption's grace is not told again at its end."""
        if self.said_cancelled:
            return
        self.said_cancelled = True
        moment = time.strftime("%Y-%m-%dT%H:%M:%S")
        for node in self.step.nodes:
            if any(task.alive for task in self.step.tasks if task.node == node):
                self.client.err("slurmstepd-%s: error: *** STEP %s ON %s CANCELLED AT %s%s ***"
                                % (node, self.step.label, node, moment, notice))
                break

    def node_failed(self, node, survives):
        """Where the job lives on, the step does so only with --no-kill of its own."""
        self.client.err("srun: error: Node failure on %s" % node)
        if survives and "no-kill" not in self.options:
            self.step.cancelled = True
            self.kill()
        self.changed.set()

    def say_abort(self):
        if not self.said_abort:
            self.said_abort = True
            wait = int(self.controller.conf.number("KillWait")) + 2
            self.client.err("srun: Job step aborted: Waiting up to %d seconds for job step to finish." % wait)

    # Launch

    def launch(self, command, environment, umask):
        step, procid = self.step, 0
        for nodeid, (node, share) in enumerate(step.shares.items()):
            for localid in range(share.tasks):
                step.tasks.append(Task(procid, localid, node, nodeid, step=step))
                procid += 1
        for task in step.tasks:
            self.launch_task(task, command, environment, umask)

    def launch_task(self, task, command, environment, umask):
        values = task_variables(self.step, task, environment, self.controller.conf, self.controller.conf_path)
        values["SLURM_UMASK"] = "%04o" % umask
        values["SRUN_DEBUG"] = "2" if "quiet" in self.options else "3"
        values.update(self.terminal_variables(), **marks(self.controller.folder, self.step.mark, task.node))
        if "gpus-per-task" in self.options and "SLURM_GPUS_PER_NODE" not in environment:
            self.narrow_gpus(task, values)
        if task.node in self.controller.tracking.lost:
            self.controller.loop.call_later(self.controller.conf.number("MessageTimeout"), self.launch_failed, task)
            return
        ours, theirs = self.pipes(task)
        prolog = self.controller.conf.values["FakeTaskProlog"]
        if prolog:
            self.emit(task, 1, os.fsencode(prolog) + b"\n")
        try:
            task.pid = spawn(command, values, self.cwd if os.path.isdir(self.cwd) else "/tmp", umask, theirs,
                             terminal="pty" in self.options and task.procid == 0, host=self.controller.conf.host_of(task.node))
            self.controller.watch(task, self.task_ended)
        except OSError as error:
            self.client.err("slurmstepd-%s: error: execve(): %s: %s" % (task.node, command[0], error.strerror))
            self.task_ended(task, {errno.ENOENT: 2, errno.EACCES: 13}.get(error.errno, error.errno) << 8)
        for descriptor in set(theirs):
            os.close(descriptor)
        self.connect(task, *ours)

    def launch_failed(self, task):
        """Its node does not answer; what runs on the others is ended."""
        if task.status is not None:
            return
        self.client.err("srun: error: Task launch for StepId=%s failed on node %s: %s" % (self.step.label, task.node, NO_ANSWER),
                        "srun: error: Application launch failed: " + NO_ANSWER, "srun: Job step aborted")
        self.said_abort = True
        task.status = LAUNCH_FAILED << 8
        self.kill()
        self.changed.set()

    def terminal_variables(self):
        return {"SLURM_PTY_PORT": "40002"} if "pty" in self.options else {}

    def narrow_gpus(self, task, values):
        each = gpu_count(self.options["gpus-per-task"])
        mine = self.step.shares[task.node].gpus[task.localid * each:(task.localid + 1) * each]
        values["CUDA_VISIBLE_DEVICES"] = ",".join(str(gpu) for gpu in mine)

    def pipes(self, task):
        """((write stdin, read stdout, read stderr), (the task's own three))"""
        if "pty" in self.options and task.procid == 0:
            ours, theirs = os.openpty()
            return (os.dup(ours), ours, None), (theirs, theirs, theirs)
        if "pty" in self.options:           # the other tasks see nothing of the terminal
            null = os.open("/dev/null", os.O_RDWR)
            return (None, None, None), (null, null, null)
        stdin_read, stdin_write = self.stdin_of(task)
        stdout_read, stdout_write = os.pipe()
        stderr_read, stderr_write = os.pipe()
        return (stdin_write, stdout_read, stderr_read), (stdin_read, stdout_write, stderr_write)

    def stdin_of(self, task):
        wish = self.options.get("input", "all")
        if wish == "none" or (wish.isdigit() and int(wish) != task.procid):
            return os.open("/dev/null", os.O_RDONLY), None
        if wish != "all" and not wish.isdigit():
            return os.open(wish, os.O_RDONLY), None
        return os.pipe()

    def connect(self, task, stdin, stdout, stderr):
        for fd, descriptor in ((1, stdout), (2, stderr)):
            if descriptor is not None:
                task.open_streams += 1
                self.controller.soon(self.read_stream(task, fd, descriptor))
        if stdin is not None:
            self.controller.soon(self.open_stdin(task, stdin))

    async def open_stdin(self, task, descriptor):
        transport, _ = await self.controller.loop.connect_write_pipe(asyncio.Protocol, os.fdopen(descriptor, "wb", 0))
        task.stdin = transport
        for data in task.early_input:
            self.feed(task, data)
        task.early_input.clear()

    # Streams

    async def read_stream(self, task, fd, descriptor):
        """Whole lines, unless --unbuffered; srun that does not read makes the task wait."""
        reader = asyncio.StreamReader(limit=LARGEST_LINE)
        transport, _ = await self.controller.loop.connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(descriptor, "rb", 0))
        kept = b""
        whole_lines = not ("unbuffered" in self.options or "pty" in self.options) or "label" in self.options
        while True:
            try:
                data = await reader.read(LARGEST_LINE)
            except OSError:                     # a pty's other side has closed
                data = b""
            if not data:
                break
            kept += data
            end = kept.rfind(b"\n") + 1 if whole_lines and len(kept) < LARGEST_LINE else len(kept)
            self.emit(task, fd, kept[:end])
            kept = kept[end:]
            if not self.client.gone:
                await self.drain()
        self.emit(task, fd, kept)
        transport.close()
        task.open_streams -= 1
        self.changed.set()

    async def drain(self):
        try:
            await self.client.writer.drain()
        except ConnectionError:
            pass

    def emit(self, task, fd, data):
        if not data:
            return
        if "label" in self.options:
            label = b"%*d: " % (len(str(len(self.step.tasks) - 1)), task.procid)
            data = b"".join(label + line for line in data.splitlines(True))
        path = self.options.get("error" if fd == 2 and "error" in self.options else "output")
        if not path or path == "all":
            self.client.out(data, fd)
        elif path != "none" and (not path.isdigit() or int(path) == task.procid):
            self.file_for(path, task).write(data)

    def file_for(self, path, task):
        path = self.named(path, task)
        if path not in self.files:
            self.files[path] = open(path, "ab" if self.options.get("open-mode", "t")[0] == "a" else "wb", 0)
        return self.files[path]

    def named(self, path, task):
        return os.path.join(self.cwd, expand_pattern(path, self.step.job, self.step, task))

    def output_opens(self):
        """-o into a folder that is not there: srun itself fails, but where each task has a file of its own
        nothing runs and srun says 0. -> the code to end with, or None."""
        for name in ("output", "error"):
            path = self.options.get(name, "all")
            if path in ("all", "none") or path.isdigit():
                continue
            count = sum(share.tasks for share in self.step.shares.values())
            if os.path.isdir(os.path.dirname(self.named(path, Task(0, 0, self.step.nodes[0], 0)))):
                continue
            if not re.search(r"%\d*[tnN]", path):
                self.client.err("srun: error: Could not open std%s file: No such file or directory"
                                % ("out" if name == "output" else "err"))
                return 1
            for procid in range(count):
                self.client.err("srun: error: task %d launch failed: Slurmd could not connect IO" % procid)
            return 0
        return None

    def feed(self, task, data):
        """b'' is the end of the input."""
        if not task.stdin:
            task.early_input.append(data)
        elif task.stdin.is_closing():
            return
        elif data:
            task.stdin.write(data)
        else:
            task.stdin.write_eof()

    # What srun hears

    def hear(self, message):
        verb, *values = message
        if verb == "in":
            for task in self.step.tasks:
                self.feed(task, values[0])
        elif verb == "signal":
            self.hear_signal(values[0])
        elif verb == "gone":
            self.kill()
            for task in self.step.tasks:
                self.feed(task, b"")

    def kill(self):
        self.step.killed = True
        self.controller.tracking.signal(self.step, signal.SIGKILL)

    def hear_signal(self, number):
        if number in KILLS_AT_ONCE:
            self.client.err("srun: forcing job termination")
            self.say_abort()
            self.kill()
        elif number == signal.SIGINT:
            self.hear_interrupt()
        elif number == signal.SIGCONT:
            self.client.err("srun: got SIGCONT")
        elif number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM):
            self.controller.soon(self.controller.signal_steps([self.step], number))

    def hear_interrupt(self):
        now = time.monotonic()
        if now - self.interrupted > 1:
            self.interrupted = now
            self.client.err("srun: interrupt (one more within 1 sec to abort)", "srun: StepId=%s %s"
                            % (self.step.label, self.status_line()))
            return
        self.client.err("srun: sending Ctrl-C to StepId=%s" % self.step.label)
        self.say_abort()
        self.controller.soon(self.interrupt_then_kill())

    async def interrupt_then_kill(self):
        await self.controller.signal_steps([self.step], signal.SIGINT)
        await asyncio.sleep(0.01)
        self.kill()

    def status_line(self):
        running = ",".join(str(task.procid) for task in self.step.tasks if task.alive)
        return "task%s %s: running" % ("s" if "," in running else "", running)

    # Ends

    def task_ended(self, task, status):
        task.status = status
        self.changed.set()
        step = self.step
        if not any(other.alive for other in step.tasks if other.node == task.node):
            self.controller.tracking.clear(step, task.node)
        if status:
            end = DEATHS.get(status & 127, "Killed") if status & 127 else "Exited with exit code %d" % (status >> 8)
            core = " (core dumped)" if status & 128 else ""
            self.client.err("srun: error: %s: task %d: %s%s" % (task.node, task.procid, end, core))
        if self.first_exit is None:
            self.first_exit = time.monotonic()
            self.end_others(status)
        self.controller.settle(step.job)

    def end_others(self, status):
        """--kill-on-bad-exit: TERM to the rest; --wait=N: KILL to the rest after N seconds."""
        if status and self.options.get("kill-on-bad-exit", "0") != "0":
            self.client.err("srun: launch/slurm: _step_signal: Terminating StepId=%s" % self.step.label)
            self.step.cancelled = self.said_abort = True
            self.announce("")
            self.controller.soon(self.controller.signal_steps([self.step], signal.SIGCONT, signal.SIGTERM))
        wait = int(self.options.get("wait") or 0)
        if wait and any(task.alive for task in self.step.tasks):
            self.controller.loop.call_later(wait, self.give_up_waiting, wait)

    def give_up_waiting(self, wait):
        if self.step.alive:
            self.client.err("srun: First task exited %ds ago" % wait, "srun: StepId=%s %s"
                            % (self.step.label, self.status_line()),
                            "srun: launch/slurm: _step_signal: Terminating StepId=%s" % self.step.label)
            self.kill()

    async def finish(self):
        """All tasks ended and their streams read out; an orphan may hold those open for EioTimeout."""
        while self.step.alive or any(task.status is None for task in self.step.tasks):
            self.changed.clear()
            await self.changed.wait()
        deadline = time.monotonic() + self.controller.conf.number("EioTimeout")
        while any(task.open_streams for task in self.step.tasks if not task.given_up):
            self.changed.clear()
            try:
                await asyncio.wait_for(self.changed.wait(), max(0, deadline - time.monotonic()))
            except asyncio.TimeoutError:
                break
        for task in self.step.tasks:
            if task.stdin and not task.stdin.is_closing():
                task.stdin.abort()
        for file in self.files.values():
            file.close()
        if self.step.cancelled or self.step.job.completing and self.said_abort:
            self.client.err("srun: Force Terminated StepId=%s" % self.step.label)
        return max(128 + (task.status & 127) if task.status & 127 else task.status >> 8 for task in self.step.tasks)


async def run_step(controller, client, job, options, given, command, cwd, umask):
    """One srun from its step's creation to its exit code."""
    name = given.get("job-name", os.path.basename(command[0]))
    for option, default in (("kill-on-bad-exit", "KillOnBadExit"), ("wait", "WaitTime")):
        options.setdefault(option, controller.conf.values[default])
    options["kill-on-bad-exit"] = options["kill-on-bad-exit"] or "1"
    environment = exported(client.environment, options.get("export"), login=False)
    if "pty" in options and not client.request["tty"]:
        client.err("srun: error: Not using a pseudo-terminal, disregarding --pty option")
        del options["pty"]
    step = await create_step(controller, client, job, options, given, name)
    running = Running(controller, client, step, options, os.path.join(cwd, options.get("chdir", "")))
    step.client = client
    try:
        code = running.output_opens()
        if code is not None:
            return code
        running.launch(command, environment, umask)
        while not client.messages.empty():
            running.hear(client.messages.get_nowait())
        client.hear = running.hear
        if "pty" in options:
            client.say("raw")
        if options.get("input", "all") == "all" or options["input"].isdigit():
            client.say("stdin")
        if "cpu-bind" in given and controller.conf.values["TaskPlugin"] == "task/none":
            client.err("srun: cluster configuration lacks support for cpu binding")
        return await running.finish()
    finally:
        del job.steps[step.id]
        controller.settle(job)
