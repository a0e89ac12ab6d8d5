"""The one process of a fake cluster: slurmctld and every slurmd in one asyncio loop.

It schedules jobs, starts their processes, keeps their time and answers the clients. What a client
prints is made in commands.py, steps.py and show.py; who gets a signal is decided here."""

import asyncio
import os
import shutil
import signal
import time

from .arrays import last_one, running_tasks, split_off
from .conf import read_conf
from .dependencies import judge_dependency
from .environment import LOGIN_PATH, batch_variables
from .files import name_files
from .formats import fold
from .failures import look_at_nodes
from .model import Node, Step, Task
from .preemption import end_preempted, make_room, resume_those_who_made_way
from .processes import CLUSTER_MARK, Tracking, adopt_orphans, descendants, marks, send, spawn, start_time, with_marks
from .request import partition_reason, place
from .wire import SOCKET, Frames, pack, socket_address

REQUEUE_HEAD_START_S = 0.004    # who requeues itself hears of it 2-5 ms after scontrol said yes
STOP_AFTER_S = 2                # scontrol suspend: TSTP, then STOP
NOTICES = {"CANCELLED": "", "TIMEOUT": " DUE TO TIME LIMIT", "PREEMPTED": " DUE TO PREEMPTION",
           "REQUEUED": " DUE TO JOB REQUEUE", "NODE_FAIL": " DUE TO NODE FAILURE, SEE SLURMCTLD LOG FOR DETAILS"}


class Controller:
    def __init__(self, folder, conf_path):
        self.folder, self.conf_path = folder, conf_path
        self.state = os.path.join(folder, "state")
        self.bin = os.path.join(folder, "bin")
        with open(conf_path) as file:
            self.conf = read_conf(file.read())
        self.nodes = {name: Node(conf) for name, conf in self.conf.nodes.items()}
        self.tracking = Tracking(folder, self.conf.cgroup)
        self.jobs = {}
        self.last_id = 0
        self.children = {}                  # pid -> what to call with its status
        self.loop = asyncio.get_running_loop()
        self.stopping = asyncio.Event()
        self.scheduled = False
        self.answering = asyncio.Event()    # cleared while it hangs
        self.answering.set()
        self.background = set()

    # Time and errands ------------------------------------------------------------------------

    def soon(self, coroutine):
        task = self.loop.create_task(coroutine)
        self.background.add(task)
        task.add_done_callback(self.forget_errand)

    def forget_errand(self, task):
        self.background.discard(task)
        if not task.cancelled() and task.exception():
            self.loop.call_exception_handler({"message": "errand failed", "exception": task.exception()})

    async def tick(self):
        """The slow cycle: time limits, warnings and estimates are looked at only here."""
        while True:
            await asyncio.sleep(self.conf.number("FakeTick"))
            await self.answering.wait()
            now = time.time()
            for job in list(self.jobs.values()):
                if job.shown_state in ("RUNNING", "STOPPED") and job.end_at:
                    self.watch_time(job, now)
                elif not job.live and now - job.ended > self.conf.number("MinJobAge"):
                    self.forget(job)
            look_at_nodes(self, now)
            self.schedule_now(backfill=True)

    def watch_time(self, job, now):
        request = job.request
        warn = request.signal and request.signal_lead and not job.warned
        if now >= job.end_at and job.preempted_at:
            end_preempted(self, job)
        elif now >= job.end_at:
            self.end(job, "TIMEOUT", "TimeLimit")
        elif warn and now + self.conf.number("FakeTick") + request.signal_lead * job.minute / 60 >= job.end_at:
            job.warned = True
            if request.signal_batch:
                steps = [job.batch] if job.batch else []
                self.soon(self.signal_steps(steps, signal.SIGCONT, request.signal, direct=True))
            else:
                self.soon(self.signal_steps(job.steps.values(), signal.SIGCONT, request.signal))

    def forget(self, job):
        del self.jobs[job.id]

    # Jobs --------------------------------------------------------------------------------------

    def new_id(self):
        self.last_id += 1
        return self.last_id

    def add(self, job):
        self.jobs[job.id] = job
        job.held = "JobHeldUser" if job.request.hold else ""
        job.comment = job.request.comment
        job.begin = job.request.begin
        job.eligible = None if job.held else max(job.submitted, job.begin or 0)
        job.priority = 0 if job.held else 4294901760 - job.id
        job.time_limit = self.time_limit(job.request)
        self.wait_for_begin(job)

    def wait_for_begin(self, job):
        if job.begin:
            self.loop.call_later(max(0, job.begin - time.time()) + 0.01, self.schedule)
        self.schedule()

    def time_limit(self, request):
        if request.time_limit is not None:
            return request.time_limit
        partition = self.conf.partitions[request.partitions[0]]
        return partition.default_time or partition.max_time

    def schedule(self):
        """Many events, one pass."""
        if not self.scheduled:
            self.scheduled = True
            self.loop.call_soon(self.schedule_now)

    def schedule_now(self, backfill=False):
        self.scheduled = False
        if not self.answering.is_set():
            return
        resume_those_who_made_way(self)
        waiting = [job for job in self.jobs.values() if job.state == "PENDING"]
        waiting.sort(key=lambda job: (-max(self.conf.partitions[name].priority_tier for name in job.request.partitions),
                                      -job.priority))
        blocked = {}                        # partition -> when its first waiting job may start
        for job in waiting:
            while self.try_start(job, blocked, backfill) and job.state == "PENDING":
                pass                        # the next task of an array

    def try_start(self, job, blocked, backfill):
        if not job.held:
            last_one(job)
        job.looked_at = job.looked_at or backfill
        job.reason = self.obstacle(job)
        if job.reason != "None":
            job.reason = job.reason if job.looked_at or not job.live else self.first_reason(job, blocked)
            return False
        return self.try_partitions(job, blocked, backfill)

    def first_reason(self, job, blocked):
        """What is said before the first cycle: were there room, what keeps it; else what the lack of room alone would."""
        name = job.request.partitions[0]
        partition = self.conf.partitions[name]
        if job.held or not all(partition_reason(job.request, self.conf, each) == "" for each in job.request.partitions):
            return job.reason if job.held else "PartitionConfig"
        if name in blocked:
            return "Priority"
        if not place(job.request, self.conf, [self.nodes[node] for node in partition.nodes], partition.max_nodes):
            return "Resources"
        return "None" if job.array else job.reason

    def obstacle(self, job):
        """Why a job is not even looked at, or None."""
        now = time.time()
        if job.held:
            return job.held
        verdict = judge_dependency(job, self.jobs)
        if verdict != "met":
            return self.unmet(job, verdict)
        if job.eligible is None or job.eligible > now:
            return "BeginTime"
        if job.array and job.array.limit and running_tasks(self, job) >= job.array.limit:
            return "JobArrayTaskLimit"
        reasons = [partition_reason(job.request, self.conf, name) for name in job.request.partitions]
        return reasons[0] if all(reasons) else "None"

    def unmet(self, job, verdict):
        job.failed_dependency = verdict == "never"
        if verdict == "never" and job.request.kill_on_invalid_dep:
            self.end(job, "CANCELLED", "DependencyNeverSatisfied")
        return "DependencyNeverSatisfied" if verdict == "never" else "Dependency"

    def try_partitions(self, job, blocked, backfill):
        for name in job.request.partitions:
            partition = self.conf.partitions[name]
            if partition_reason(job.request, self.conf, name):
                continue
            limit = job.limit_s or 0
            behind = name in blocked and not (backfill and limit and time.time() + limit <= (blocked[name] or 0))
            shares = {} if behind else place(job.request, self.conf, [self.nodes[node] for node in partition.nodes],
                                             partition.max_nodes)
            if shares:
                self.start(split_off(self, job, job.array_waiting[0]) if job.array_waiting else job, name, shares)
                return True
            job.reason = "Priority" if name in blocked else self.wait_reason(job, partition)
            if job.reason == "Resources" and make_room(self, job, partition):
                return self.try_partitions(job, blocked, backfill)
            if job.reason != "BadConstraints" and name not in blocked:
                blocked[name] = self.estimate(job, partition)
                job.planned = blocked[name] if backfill else job.planned
        return False

    def wait_reason(self, job, partition):
        empty = [Node(self.conf.nodes[name]) for name in partition.nodes]
        return "Resources" if place(job.request, self.conf, empty, partition.max_nodes) else "BadConstraints"

    def estimate(self, job, partition):
        """When the jobs that run now would have made room, were each to use all its time."""
        running = sorted((other for other in self.jobs.values() if other.shares and other.end_at),
                         key=lambda other: other.end_at)
        nodes = {name: Node(self.conf.nodes[name], dict(self.nodes[name].holders)) for name in partition.nodes}
        for other in running:
            for node in nodes.values():
                node.holders.pop(other.id, None)
            if place(job.request, self.conf, list(nodes.values()), partition.max_nodes):
                return other.end_at
        return None

    def start(self, job, partition, shares):
        now = time.time()
        job.partition, job.shares, job.first_shares, job.started = partition, shares, shares, now
        job.state, job.reason, job.planned = "RUNNING", "None", None
        job.end_at = job.limit_s and now + job.limit_s
        self.hold_nodes(job)
        job.batch_host, job.paused = job.nodes[0], 0
        if self.conf.values["PrologSlurmctld"]:
            self.configure(job)
        else:
            self.launch(job)

    def launch(self, job):
        job.allocated.set()
        if job.script is not None:
            name_files(job)
            self.start_batch(job)

    def configure(self, job):
        """The site's own program makes the nodes ready (boots them, perhaps); the job's time begins after it."""
        job.configuring, started = True, job.started
        variables = {"SLURM_JOB_ID": str(job.id), "SLURM_JOB_NODELIST": fold(job.nodes), "SLURM_SCRIPT_CONTEXT": "prolog_slurmctld"}
        null, task = os.open("/dev/null", os.O_RDWR), Task(0, 0, "", 0)
        task.pid = spawn([self.conf.values["PrologSlurmctld"]], {"PATH": LOGIN_PATH, **variables}, "/", 0o022, [null] * 3)
        os.close(null)

        def configured(task, status):
            if job.configuring and job.started == started:
                job.configuring = False
                job.end_at = job.end_at and job.end_at + time.time() - started
                self.launch(job)
        self.watch(task, configured)

    def end(self, job, state, reason="None"):
        """A job is taken away: cancelled, out of time, to be requeued. Its processes have KillWait to leave."""
        if not job.live or job.completing:
            return
        before = job.state
        job.state, job.reason, job.ended, job.configuring = state, reason, time.time(), False
        if before == "PENDING":
            self.finish(job)
            return
        job.completing = True
        if before != "SUSPENDED":           # who stands still hears nothing until he is killed
            self.announce(job, NOTICES[state])
            self.soon(self.ask_to_leave(job, twice=state in ("TIMEOUT", "PREEMPTED")))
        self.kill_later(job)
        self.settle(job)

    def end_and_requeue(self, job, state):
        job.again = True
        job.restarts += 1
        self.end(job, state)

    def requeue(self, job):
        """scontrol requeue: a job that has ended but is still known runs again, too."""
        if job.live and not job.completing:
            self.end_and_requeue(job, "REQUEUED")
            return
        job.restarts += 1
        job.again = True
        if not job.completing:
            self.start_over(job)

    def start_over(self, job):
        """In the queue again, after the time that Slurm waits for its credentials to expire."""
        now = time.time()
        job.again, job.state, job.reason = False, "PENDING", "None"
        job.submitted, job.begin = now, now + self.conf.requeue_delay
        job.eligible = job.begin
        job.shares, job.batch, job.next_step, job.partition = {}, None, 0, ",".join(job.request.partitions)
        job.started = job.ended = job.end_at = job.preempted_at = job.suspended_at = None
        job.exit_code = job.exit_signal = 0
        job.warned = job.launch_failure = job.made_way = False
        job.looked_at, job.stopped = True, False
        if job.hold_again:
            job.held, job.priority = "job requeued in held state", 0
        job.finished.clear()
        job.allocated.clear()
        self.wait_for_begin(job)

    async def ask_to_leave(self, job, twice):
        """The steps first: under linuxproc the TERM that follows reaches the sruns of the script too,
        and an srun that gets it kills its tasks at once."""
        steps, batch = list(job.steps.values()), [job.batch] if job.batch else []
        if job.again:
            await asyncio.sleep(REQUEUE_HEAD_START_S)
        early = [signal.SIGTERM] if twice else []
        await self.signal_steps(steps, *early, signal.SIGCONT, signal.SIGTERM)
        await asyncio.sleep(self.conf.number("FakeSignalGap"))
        await self.signal_steps(batch, signal.SIGCONT, signal.SIGTERM)

    def announce(self, job, notice):
        moment = time.strftime("%Y-%m-%dT%H:%M:%S")
        if job.batch and job.batch.alive:
            self.write_output(job, "slurmstepd-%s: error: *** JOB %d ON %s CANCELLED AT %s%s ***\n"
                              % (job.batch_host, job.id, job.batch_host, moment, notice))
        for step in job.steps.values():
            step.announce(notice)
        if job.client:
            job.client.revoked(job)

    def write_output(self, job, text):
        try:
            with open(job.error or job.output, "a") as file:
                file.write(text)
        except OSError:
            pass

    def kill_later(self, job):
        self.loop.call_later(self.conf.number("KillWait"), self.kill_all, job, job.started)

    def kill_all(self, job, started):
        """Not the next run of the same job."""
        if job.completing and job.started == started:
            for step in job.all_steps():
                self.tracking.signal(step, signal.SIGKILL)

    async def signal_steps(self, steps, *numbers, direct=False):
        """direct: only the processes themselves, as the B: of --signal and scancel -b do."""
        steps = list(steps)
        for position, number in enumerate(numbers):
            if position:
                await asyncio.sleep(self.conf.number("FakeSignalGap"))
            for step in steps:
                if direct:
                    send([task.pid for task in step.tasks if task.alive], number)
                else:
                    self.tracking.signal(step, number)

    def settle(self, job):
        """A job that is ending is over when none of its tasks lives and nobody holds it."""
        if job.completing and not any(step.alive for step in job.all_steps()) and not job.steps:
            self.finish(job)

    def finish(self, job):
        job.completing = False
        job.ended = time.time()
        self.release(job)
        if job.batch:
            shutil.rmtree(self.spool(job), ignore_errors=True)
        if job.again:
            self.start_over(job)
            return
        if job.state == "NODE_FAIL":
            job.shares = job.first_shares
        job.finished.set()
        job.allocated.set()
        self.schedule()

    def hold_nodes(self, job):
        for name, share in job.shares.items():
            self.nodes[name].holders[job.id] = share

    def release(self, job):
        for node in self.nodes.values():
            node.holders.pop(job.id, None)

    # Suspending ----------------------------------------------------------------------------------

    def suspend(self, job):
        """Its processors are free for others meanwhile."""
        job.state, job.suspended_at = "SUSPENDED", time.time()
        self.release(job)
        for step in job.all_steps():
            self.tracking.signal(step, signal.SIGTSTP)
        self.loop.call_later(STOP_AFTER_S, self.stop_suspended, job, job.suspended_at)
        self.schedule()

    def stop_suspended(self, job, since):
        if job.state == "SUSPENDED" and job.suspended_at == since:
            for step in job.all_steps():
                self.tracking.signal(step, signal.SIGSTOP)

    def resume(self, job):
        pause = time.time() - job.suspended_at
        job.state, job.suspended_at, job.made_way = "RUNNING", None, False
        job.end_at = job.end_at and job.end_at + pause
        job.paused += pause
        self.hold_nodes(job)
        for step in job.all_steps():
            self.tracking.signal(step, signal.SIGCONT)

    # The batch script ------------------------------------------------------------------------------

    def spool(self, job):
        return os.path.join(self.state, "spool", job.batch_host, "job%05d" % job.id)

    def start_batch(self, job):
        node = job.nodes[0]
        task = Task(0, 0, node, 0)
        job.batch = task.step = Step(job, "batch", "batch", {node: job.shares[node]}, tasks=[task], started=time.time(), run=job.restarts)
        folder = self.spool(job)
        os.makedirs(folder, 0o750, exist_ok=True)
        script = os.path.join(folder, "slurm_script")
        with open(os.open(script, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o700), "wb") as file:
            file.write(job.script)
        try:
            files = self.open_files(job)
        except OSError:
            return self.launch_failed(job)
        environment = {**batch_variables(job, self.conf, self.conf_path), **marks(self.folder, job.batch.mark, node)}
        cwd = job.workdir if os.path.isdir(job.workdir) else "/tmp"
        try:
            task.pid = spawn([script, *job.argv], environment, cwd, job.umask, files, host=self.conf.host_of(node))
            self.watch(task, self.batch_ended)
        except OSError as error:
            os.write(files[2], b"slurmstepd: error: execve(): bad interpreter(%s): No such file or directory\n"
                     % job.script.split(b"\n")[0][2:].strip() if error.errno == 2 else
                     os.fsencode("slurmstepd: error: execve(): %s: %s\n" % (script, error.strerror)))
            self.batch_ended(task, 2 << 8)
        finally:
            for descriptor in files:
                os.close(descriptor)

    def open_files(self, job):
        """stdin, stdout, stderr; the output is emptied at each start unless --open-mode=append."""
        if self.conf.since("23.02"):
            os.makedirs(os.path.dirname(job.output), exist_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | (0 if job.request.append else os.O_TRUNC)
        files = []
        try:
            files.append(os.open(job.input, os.O_RDONLY))
            files.append(os.open(job.output, flags, 0o666 & ~job.umask))
            files.append(os.open(job.error, flags, 0o666 & ~job.umask) if job.error else os.dup(files[1]))
        except OSError:
            for descriptor in files:
                os.close(descriptor)
            raise
        return files

    def launch_failed(self, job):
        """Nobody is told: there is no file to tell it in."""
        job.state, job.reason, job.exit_code, job.exit_signal = "FAILED", "JobLaunchFailure", 0, 53
        self.finish(job)

    def batch_ended(self, task, status):
        job = task.step.job
        task.status = status
        if task.step is not job.batch:
            return
        job.exit_code, job.exit_signal = status >> 8, status & 127
        self.tracking.clear(task.step, task.node)
        if not job.completing:
            job.state = "COMPLETED" if status == 0 else "FAILED"
            job.reason = "None" if status == 0 else "JobLaunchFailure" if job.launch_failure else "NonZeroExitCode"
            self.close(job)
        self.settle(job)

    def close(self, job):
        """A job ends by itself; what is left of its steps is told so."""
        job.completing, job.ended = True, time.time()
        if any(step.alive for step in job.steps.values()):
            for step in job.steps.values():
                step.announce("")
            self.soon(self.signal_steps(job.steps.values(), signal.SIGCONT, signal.SIGTERM))
            self.kill_later(job)

    # Children --------------------------------------------------------------------------------------

    def watch(self, task, ended):
        self.children[task.pid] = (task, ended)

    def reap(self):
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if not pid:
                return
            task, ended = self.children.pop(pid, (None, None))
            if task and task.node in self.tracking.lost:
                self.nodes[task.node].unheard.append((task, ended, status))
            elif task and not task.given_up:
                ended(task, status)

    def kill_everything(self):
        """Until nothing is left: what is killed may just have forked."""
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline:
            self.reap()
            left = descendants([os.getpid()]) + with_marks(**{CLUSTER_MARK: self.folder})
            left = [pid for pid in left if start_time(pid)]
            if not left:
                return
            send(left, signal.SIGKILL)
            time.sleep(0.01)

    # The door --------------------------------------------------------------------------------------

    async def serve(self):
        folder = os.open(self.state, os.O_PATH)
        address = socket_address(folder)
        if os.path.exists(os.path.join(self.state, SOCKET)):
            os.unlink(os.path.join(self.state, SOCKET))
        server = await asyncio.start_unix_server(self.greet, address + ".new", limit=1 << 22)
        os.rename(os.path.join(self.state, SOCKET + ".new"), os.path.join(self.state, SOCKET))
        return server

    async def greet(self, reader, writer):
        from .commands import answer
        client = Client(reader, writer, self)
        try:
            await answer(self, client)
            await client.listening      # what it still says must not meet a closed door
        except (ConnectionError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    async def guard(self, watched_pid):
        """No orphans: ends with the folder, or with the process that wanted this cluster."""
        born, place_born = start_time(watched_pid), inode(self.state)
        while inode(self.state) == place_born and (not watched_pid or start_time(watched_pid) == born is not None):
            await asyncio.sleep(0.5)
        self.stopping.set()


def inode(path):
    try:
        return os.stat(path).st_ino
    except OSError:
        return None


class Client:
    """A command that waits for its answer."""

    def __init__(self, reader, writer, controller):
        self.reader, self.writer, self.controller = reader, writer, controller
        self.messages = asyncio.Queue()
        self.hear = self.messages.put_nowait      # or what a step puts in its place
        self.gone = False
        self.tool, self.environment = "", {}
        self.listening = controller.loop.create_task(self.listen())

    async def listen(self):
        frames = Frames()
        while True:
            try:
                data = await self.reader.read(1 << 18)
            except ConnectionError:
                data = b""
            if not data:
                self.gone = True
                self.hear(("gone",))
                return
            for message in frames.feed(data):
                self.hear(message if isinstance(message, tuple) else ("hello", message))

    def say(self, *message):
        if not self.gone:
            self.writer.write(pack(message))

    def out(self, text, fd=1):
        if text:
            self.say("out", fd, text if isinstance(text, bytes) else os.fsencode(text))

    def err(self, *lines):
        for line in lines:
            self.out(line + "\n", 2)

    async def read_file(self, path):
        """Its bytes, or raises OSError; None is the client's stdin."""
        self.say("read", path)
        verb, value = await self.messages.get() if not self.gone else ("gone", 5)
        if isinstance(value, int):
            raise OSError(value, os.strerror(value))
        return value

    def revoked(self, job):
        """salloc and srun are told when their allocation goes."""
        if self.tool == "salloc":
            self.err("salloc: Job allocation %d has been revoked." % job.id)
            self.say("kill", int(signal.SIGHUP))


async def run(folder, conf_path, watched_pid):
    controller = Controller(folder, conf_path)
    adopt_orphans()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGCHLD, controller.reap)
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, controller.stopping.set)
    server = await controller.serve()
    controller.soon(controller.tick())
    controller.soon(controller.guard(watched_pid))
    await controller.stopping.wait()
    server.close()
    loop.remove_signal_handler(signal.SIGCHLD)
    controller.kill_everything()
    os._exit(0)


def main(argv):
    folder, conf_path, watched_pid = argv
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    asyncio.run(run(folder, conf_path, int(watched_pid)))
