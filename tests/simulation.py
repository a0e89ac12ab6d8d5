"""Many drivers, one run, bad days: llmrun's own Claims, Journal, Marks and Run over a simulated cluster.

A seed decides everything: hosts that see each other's files late, disks that fail, processes that stand still, die, or
live on beside their successors. Time is virtual, so that minutes take milliseconds and a seed is the same every time.

    python tests/simulation.py --seeds 10000            on all cores: the counts, and every seed that breaks a rule
    python tests/simulation.py --first 17 --seeds 1     one of them
    python tests/simulation.py --set claim=0.1          with links that fail more often

It knows nothing of engines, Slurm or the files a user gets: a merge here is the lines that the product would write.
"""

import argparse
import asyncio
import collections
import contextlib
import errno
import gc
import heapq
import io
import itertools
import json
import multiprocessing
import os
import random
import sys
import time
import traceback
import types
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import llmrun

FOLDER = Path("/nowhere/run")
LONGEST_S, MOST_EVENTS, MOST_DRIVERS = 6 * 3600.0, 300000, 40


class Broken(AssertionError):
    """A rule that did not hold."""


class Killed(BaseException):
    """The end of a process in the middle of what it does: nothing in a program may catch it."""


def must(holds, what):
    if not holds:
        raise Broken(what)


class Faults(NamedTuple):
    """How bad a seed's days are: chances by operation, unless a unit says otherwise."""

    disk: float  # an append, a sync or a new file fails
    full: tuple  # (from_s, to_s): all of them fail
    beat: float  # a beat cannot be put
    stale: float  # a look at what another host wrote shows less than there is
    lag_s: float  # by then everybody sees all
    cached: float  # appended bytes stay on their host until the next sync
    again: float  # a link is asked for twice, so that the second answer says "taken"
    claim: float  # a link fails, made or not
    read: float  # a listing or a read fails
    holes: float  # what is lost leaves zeros with more behind them
    one_journal: bool = False  # every driver writes the same journal: what must never be

    @classmethod
    def of(cls, chance, **switches):
        full_at = chance.uniform(5, 150)
        full = (full_at, full_at + chance.uniform(1, 60)) if chance.random() < 0.15 else (0, 0)
        return cls(chance.choice([0, 0.01, 0.05]), full, chance.choice([0, 0.2]), chance.choice([0, 0.3, 0.8]),
                   chance.choice([0.5, 5, 60]), chance.choice([0, 0.5, 1]), chance.choice([0, 0.1]), chance.choice([0, 0.02]),
                   chance.choice([0, 0.001]), chance.choice([0, 0.5]))._replace(**switches)


class Fate(NamedTuple):
    """What happens to one life of a driver, in seconds after its start."""

    dies_s: float = 0.0
    dies_in: int = 0  # in the middle of this disk operation
    host_dies_s: float = 0.0
    drains_s: float = 0.0
    replaced_s: float = 0.0  # Slurm gives the job to other nodes, and this life does not know
    still: tuple = ()  # (from_s, time_s): it stands still, then goes on
    failed_again: bool = False  # it was told to ask failed prompts once more

    @classmethod
    def of(cls, chance):
        return cls.some(chance)._replace(failed_again=chance.random() < 0.1)

    @classmethod
    def some(cls, chance):
        kind, when_s = chance.random(), chance.expovariate(1 / 30)
        still = (chance.expovariate(1 / 30), chance.uniform(5, 300)) if chance.random() < 0.25 else ()
        if kind < 0.15:
            return cls(dies_s=when_s, still=still)
        if kind < 0.25:
            return cls(dies_in=chance.randint(1, 150), still=still)
        if kind < 0.35:
            return cls(host_dies_s=when_s, still=still)
        if kind < 0.45:
            return cls(drains_s=when_s, still=still)
        if kind < 0.6:
            return cls(replaced_s=when_s, still=(max(0.0, when_s - 5), chance.uniform(5, 300)))
        return cls(still=still)


# ── time and processes ─────────────────────────────────────────────────────────


class Timer:
    """Something to be called at a time."""

    __slots__ = ("when_s", "process", "call", "args", "context")

    def __init__(self, when_s, process, call, args, context):
        self.when_s, self.process, self.call, self.args, self.context = when_s, process, call, args, context

    def cancel(self):
        self.call = None

    def cancelled(self):
        return self.call is None


class World:
    """The one order of all that happens, the file server, and the jobs."""

    def __init__(self, seed, **switches):
        self.chance, self.now, self.agenda, self.turn = random.Random(seed), 0.0, [], itertools.count()
        self.faults = Faults.of(self.chance, **switches)
        self.here = self.error = None  # the process that runs just now; what broke in one
        self.files, self.folders = {}, {"journal": [], "claims": []}
        self.counts, self.trace, self.drivers, self.processes = collections.Counter(), [], [], {}
        self.to_come = 0  # drivers that will start
        self.hosts = [Host(f"n{number}") for number in range(self.chance.randint(1, 5))]
        samples = self.chance.choice([1, 1, 2])
        self.rows = Rows(self.chance.randint(5, 60) // samples, samples)
        total, jobs = len(self.rows), self.chance.randint(1, 5)
        self.starts = llmrun.chunk_starts(total, jobs)
        if self.chance.random() < 0.3:  # larger chunks
            self.starts = list(range(0, total, self.chance.randint(3, 12))) + [total]
        self.hard = [self.chance.choice([0, 0, 0, 0, 0.5, 1]) for _ in range(total)]  # how likely it is to fail
        slurm = self.chance.random() < 0.8
        ids = self.chance.sample(range(1, 100), jobs) if slurm else [0] * jobs
        for job in ids:
            self.start(job, 0, self.chance.choice([0, 0, self.chance.uniform(0, 100)]), Fate.of(self.chance))
        self.keeper = itertools.count(self.chance.choice([100, 1000])) if slurm else itertools.repeat(0)

    def at(self, when_s, process, call, args=(), context=None):
        timer = Timer(when_s, process, call, args, context)
        heapq.heappush(self.agenda, (when_s, next(self.turn), timer))
        return timer

    def after(self, delay_s, call, *args):
        return self.at(self.now + delay_s, None, call, args)

    def run(self):
        """Let happen all that is to happen."""
        for events in itertools.count():
            if not self.agenda:
                return
            when_s, _, timer = heapq.heappop(self.agenda)
            self.now = max(self.now, when_s)
            process = timer.process
            if timer.call is None or process and process.dead:
                continue
            must(self.now < LONGEST_S and events < MOST_EVENTS, "no end comes")
            if process and process.still_until > self.now:
                heapq.heappush(self.agenda, (process.still_until, next(self.turn), timer))
                continue
            self.call(timer)
            if self.error:
                raise self.error

    def call(self, timer):
        self.here = timer.process
        if timer.process:
            asyncio._set_running_loop(timer.process)
        try:
            if timer.context is None:
                timer.call(*timer.args)
            else:
                timer.context.run(timer.call, *timer.args)
        except Killed:
            pass
        finally:
            asyncio._set_running_loop(None)
            self.here = None

    def happens(self, likely):
        return likely > 0 and self.chance.random() < likely

    def note(self, what, *about):
        self.trace.append((self.now, self.here.name if self.here else "", what, *about))

    # ── jobs ──

    def start(self, job, restart, delay_s, fate):
        self.to_come += 1
        self.after(delay_s, self.begin, job, restart, fate)

    def begin(self, job, restart, fate):
        self.to_come -= 1
        must(len(self.drivers) < MOST_DRIVERS, "one driver after the other ends with work left")
        taken = {driver.life for driver in self.drivers}
        life = next(life for life in (llmrun.Life(job, restart, number) for number in itertools.count()) if life not in taken)
        if any(driver.fate.failed_again and not driver.process.dead for driver in self.drivers):
            fate = fate._replace(failed_again=False)  # two such may wait for each other
        driver = Driver(self, life, self.chance.choice(self.hosts), fate)
        self.counts["lives"] += 1
        self.counts["lives beside an earlier one"] += any(
            other.life.job == job and not other.process.dead for other in self.drivers if job)
        self.drivers.append(driver)
        process = driver.process
        process.create_task(driver.guarded(driver.main))
        for delay_s, event in ((fate.dies_s, self.kill), (fate.host_dies_s, self.crash), (fate.replaced_s, self.requeue)):
            if delay_s:
                self.after(delay_s, event, process)
        if fate.drains_s:
            self.at(self.now + fate.drains_s, process, driver.drain)
        if fate.still:
            self.after(fate.still[0], self.stand_still, process, fate.still[1])

    def stand(self, time_s):
        """A process waits and holds up all others: what they have to do comes late."""
        self.now += time_s

    def stand_still(self, process, time_s):
        if not process.dead:
            self.counts["pauses"] += 1
            process.still_until = self.now + time_s

    def kill(self, process):
        if not process.dead:
            self.note("kill", process.name)
            self.counts["kills"] += 1
            self.over(process)
            if self.happens(0.7):
                self.requeue(process)

    def crash(self, process):
        """The host of a process dies: what was not on the server by then may be lost."""
        if process.dead:
            return
        host = process.host
        self.counts["host crashes"] += 1
        for other in [other for other in self.processes.values() if other.host is host and not other.dead]:
            self.kill(other)
        for name in self.folders["journal"]:
            file = self.files[name]
            if file.host is host:
                self.lose(file)
        host.boot()

    def lose(self, file):
        """Of what only its host has, some is lost: all from a place on, or a piece, which then reads as zeros."""
        first = self.chance.randint(file.sent, len(file.data))
        if self.happens(self.faults.holes):
            last = self.chance.randint(first, len(file.data))
            file.data[first:last] = bytes(last - first)
            self.counts["holes"] += last > first
        else:
            last = len(file.data)
            del file.data[first:]
        self.counts["bytes lost"] += last - first
        file.send(self.now)

    def requeue(self, process):
        restart = process.driver.life.restart
        if restart < 3:
            self.start(process.driver.life.job, restart + 1, self.chance.uniform(1, 60), Fate.of(self.chance))

    def over(self, process):
        """A process is no more. With nobody left and none to come, somebody resumes the run."""
        process.dead = True
        self.after(5, self.resume)

    def resume(self):
        if not self.to_come and all(process.dead for process in self.processes.values()) and not self.marks().finished:
            self.counts["resumes"] += 1
            self.start(next(self.keeper), 0, 0, Fate())

    def marks(self, host=None):
        """What is there to be read, by somebody new who sees all of it, or by a host."""
        marks = llmrun.Marks(llmrun.Run(FOLDER, Disk(self, host or Host("", knows_all=True), None)), self.rows)
        marks.finished = marks.state.find(llmrun.Marks.OPEN) < 0
        return marks


class Process(asyncio.AbstractEventLoop):
    """A process and its event loop, with a clock of its own. Dead, it does nothing more; standing still, nothing yet."""

    def __init__(self, world, host, driver):
        self.world, self.host, self.driver, self.name = world, host, driver, str(driver.life)
        self.dead, self.still_until, self.operations, self.threads = False, 0.0, 0, 0
        self.offset, self.rate = world.chance.uniform(0, 1e5), world.chance.uniform(0.98, 1.02)
        self.pid = len(world.processes) + 2
        self.tasks = []
        world.processes[self.pid] = self

    def time(self):
        return self.offset + self.world.now * self.rate

    def call_soon(self, callback, *args, context=None):
        return self.world.at(self.world.now, self, callback, args, context)

    def call_later(self, delay, callback, *args, context=None):
        return self.world.at(self.world.now + max(0, delay) / self.rate, self, callback, args, context)

    def create_future(self):
        return asyncio.Future(loop=self)

    def create_task(self, coro, **kwargs):
        task = asyncio.Task(coro, loop=self)
        self.tasks.append(task)
        return task

    def get_debug(self):
        return False

    def call_exception_handler(self, context):
        if context.get("exception") and not self.dead:
            self.world.error = context["exception"]

    def run_in_executor(self, executor, func, *args):
        """Done a moment from now, sometimes much later; heard of later still."""
        future = self.create_future()
        slow = 30 if self.world.happens(0.1) else 0.2
        self.threads += 1

        def work():
            self.threads -= 1
            try:
                func(*args)
                outcome = None
            except OSError as error:
                outcome = error
            self.call_later(self.world.chance.uniform(0, 0.1), hear, outcome)

        def hear(outcome):
            if not future.done():
                future.set_exception(outcome) if outcome else future.set_result(None)
        self.call_later(self.world.chance.uniform(0, slow), work)
        return future

    async def leave(self):
        """What the end of asyncio.run does: cancel all tasks, wait for the threads."""
        others = [task for task in self.tasks if task is not asyncio.current_task() and not task.done()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        for task in self.tasks:
            if task.done() and not task.cancelled() and task.exception() and not isinstance(task.exception(), OSError):
                raise task.exception()
        while self.threads:
            await asyncio.sleep(0.5)


# ── files ──────────────────────────────────────────────────────────────────────


class Host:
    """A machine, and what it has seen so far of the others' files; what it has seen it does not unsee."""

    def __init__(self, name, knows_all=False):
        self.name, self.knows_all = name, knows_all
        self.boot()

    def boot(self):
        self.booted = object()
        self.known = {}  # file → length or version
        self.found = set()  # names that a look-up gets
        self.listed, self.hidden, self.asked = {}, {}, {}  # by folder: names listed; not yet listed; how many were asked for


class File:
    """A file on the server. A journal grows, first on its host; other files come and are replaced as a whole."""

    def __init__(self, name, host, now):
        self.name, self.host, self.made_at = name, host, now
        self.lost = False  # its host may have read what is not there any more
        self.data, self.sent = bytearray(), 0  # of a journal: as its host sees it; how much of it the server has
        self.log = []  # (when, length on the server, or whole content)

    def send(self, now):
        self.sent = len(self.data)
        self.log.append((now, self.sent))

    def write_back(self, world, booted):
        """Its host sends it by itself after a while, if it has not been started anew."""
        if self.host.booted is booted and self.sent < len(self.data):
            self.send(world.now)


class Opened:
    """An open journal, and where its next append goes: a second writer's idea of the end is not the first's."""

    def __init__(self, file):
        self.file, self.end = file, len(file.data)


class Disk:
    """What one host makes of the shared file system, in the shape of llmrun.Disk."""

    WRITE_BACK_S = 30.0

    def __init__(self, world, host, process):
        self.world, self.host, self.process = world, host, process
        self.opened = {}  # by number; None once it is closed

    def begin(self, operation, name, data=b""):
        """One operation begins. True if it is this process's last, in the middle of which it dies."""
        process = self.process
        if process is None:
            return False
        self.world.note(operation, name, len(data))
        process.operations += 1
        return process.operations == process.driver.fate.dies_in

    def die(self):
        self.world.counts["kills in an operation"] += 1
        self.world.kill(self.process)
        raise Killed

    def fail(self, likely, what):
        if self.world.happens(likely):
            self.world.counts[what] += 1
            raise OSError(self.world.chance.choice([errno.ENOSPC, errno.EIO, errno.EDQUOT]), what)

    def fail_to_keep(self, what):
        full_from, full_to = self.world.faults.full
        self.fail(1 if full_from < self.world.now < full_to else self.world.faults.disk, what)

    def is_shown(self, file, since):
        world = self.world
        return (self.host.knows_all or file.host is self.host or since + world.faults.lag_s <= world.now
                or not world.happens(world.faults.stale))

    def names(self, folder):
        folder, host = folder.name, self.host
        self.begin("names", folder)
        if self.process:
            self.fail(self.world.faults.read, "failed reads")
        there, listed = self.world.folders[folder], host.listed.setdefault(folder, [])
        waiting = host.hidden.get(folder, []) + there[host.asked.get(folder, 0):]
        host.asked[folder], host.hidden[folder] = len(there), []
        for name in waiting:
            file = self.world.files[name]
            (listed if self.is_shown(file, file.made_at) else host.hidden[folder]).append(name)
        return list(listed)

    def look_up(self, name):
        file = self.world.files.get(name)
        if file is None or name in self.host.found:
            return file
        if not self.is_shown(file, file.made_at):
            return None
        self.host.found.add(name)
        return file

    def read(self, path, at=0, most=-1):
        self.begin("read", path.name)
        if self.process:
            self.fail(self.world.faults.read, "failed reads")
        file = self.look_up(path.name)
        if file is None:
            return b""
        data = self.seen(file)
        return bytes(data[at:] if most < 0 else data[at:at + most])

    def seen(self, file, news=True):
        """The content as this host has it; with `news`, maybe newer than at its last look."""
        host, world, grows = self.host, self.world, file.name.endswith(".jsonl")
        if host is file.host:
            return file.data if grows else file.log[-1][1]
        known, latest = host.known.get(file.name, 0), file.sent if grows else len(file.log) - 1
        if news and known < latest:
            if host.knows_all or not world.happens(world.faults.stale):
                known = latest
            else:
                world.counts["stale looks"] += 1
                old = [(number, entry[1]) for number, entry in enumerate(file.log) if entry[0] + world.faults.lag_s <= world.now]
                sure = (old[-1][1] if grows else old[-1][0]) if old else 0
                known = world.chance.randint(max(known, min(sure, latest)), latest)
            host.known[file.name] = known
        return file.data[:known] if grows else file.log[known][1]

    def open(self, path):
        """For a merge: what this host has seen of a file already."""
        return io.BytesIO(bytes(self.seen(self.world.files[path.name], news=False)))

    def create(self, path):
        if self.begin("create", path.name):
            self.die()
        self.fail_to_keep("failed creates")
        file = self.world.files.get(path.name)
        if file and not self.world.faults.one_journal:
            raise FileExistsError(errno.EEXIST, path.name)
        self.opened[len(self.opened)] = Opened(file or self.put_name("journal", path.name))
        return len(self.opened) - 1

    def put_name(self, folder, name):
        file = self.world.files[name] = File(name, self.host, self.world.now)
        self.world.folders[folder].append(name)
        return file

    def append(self, number, data):
        opened = self.opened_as(number)
        if self.begin("append", opened.file.name, data):
            self.write(opened, data[:self.world.chance.randint(0, len(data))])
            self.die()
        try:
            self.fail_to_keep("failed appends")
        except OSError:
            some = data[:self.world.chance.randint(0, len(data))]
            self.world.counts["torn writes"] += 0 < len(some) < len(data)
            self.write(opened, some)
            raise
        self.write(opened, data)

    def write(self, opened, data):
        opened.file.data[opened.end:opened.end + len(data)] = data
        opened.end += len(data)
        if not self.world.happens(self.world.faults.cached):
            opened.file.send(self.world.now)
        else:
            self.world.after(self.WRITE_BACK_S, opened.file.write_back, self.world, self.host.booted)

    def is_empty(self, number):
        return not self.opened_as(number).end

    def opened_as(self, number):
        opened = self.opened.get(number)
        if opened is None:
            raise OSError(errno.EBADF, "closed")
        return opened

    def sync(self, number):
        file = self.opened_as(number).file
        if self.begin("sync", file.name):
            self.die()
        self.keep(file, "failed syncs")

    def keep(self, file, what):
        """The server gets all. A failure is told once; what only this host has may then be lost."""
        try:
            self.fail_to_keep(what)
        except OSError:
            file.lost = True
            self.world.lose(file)
            raise
        file.send(self.world.now)

    def close(self, number):
        file = self.opened_as(number).file
        self.begin("close", file.name)
        self.opened[number] = None
        if file.sent < len(file.data):
            self.keep(file, "failed closes")

    def put(self, path, data):
        last = self.begin("put", path.name, data)
        self.fail(self.world.faults.beat, "failed beats")
        file = self.world.files.get(path.name) or self.put_name("claims", path.name)
        file.log.append((self.world.now, data))
        if last:
            self.die()

    def put_new(self, path, data):
        last = self.begin("put_new", path.name, data)
        world, claimed = self.world, False
        if world.happens(world.faults.claim / 2):
            world.counts["failed claims"] += 1
            raise OSError(errno.ENOSPC, path.name)
        if path.name not in world.files:
            self.put_name("claims", path.name).log.append((world.now, data))
            claimed = True
        else:
            self.host.found.add(path.name)
        if last:
            self.die()
        if world.happens(world.faults.claim / 2):
            world.counts["failed claims"] += 1
            raise OSError(errno.EIO, path.name)
        if claimed and world.happens(world.faults.again):
            world.counts["links asked for twice"] += 1
            return False
        return claimed


# ── drivers ────────────────────────────────────────────────────────────────────


class Rows:
    """Prompts by number and key."""

    def __init__(self, rows, samples):
        self.rows, self.samples = rows, samples

    def __len__(self):
        return self.rows * self.samples

    def key(self, number):
        return (0, *divmod(number, self.samples))

    def number(self, key):
        return key[1] * self.samples + key[2]


class Driver:
    """One life of a driver: its story as `drive` and `live` tell it, the product's own work on prompts, `tending` and
    `finish`, and the pump's way of asking; engines are a random time."""

    def __init__(self, world, life, host, fate):
        self.world, self.life, self.host, self.fate = world, life, host, fate
        self.process = Process(world, host, self)
        self.disk = Disk(world, host, self.process)
        self.run = llmrun.Run(FOLDER, self.disk)
        self.journal = self.claims = self.work = self.merged = None
        self.added, self.under_way, self.waiting = [], set(), []
        self.exhausted = self.draining = self.closed = False
        self.first_sent, self.trouble = None, ""
        self.hurry, self.slots = world.chance.uniform(1, 4), world.chance.randint(2, 4)
        self.answer_s = world.chance.choice([0.3, 3, 10])

    async def guarded(self, work):
        try:
            await work()
        except Exception as error:
            self.world.error = error

    def tell(self, event, **facts):
        self.world.counts[event] += 1

    async def main(self):
        try:
            life = llmrun.Life(0, 0, 0) if self.world.faults.one_journal else self.life
            self.journal = llmrun.Journal(self.run, life, self.tell)
            again = llmrun.Marks(self.run, self.world.rows).places() if self.fate.failed_again else None
            self.claims = llmrun.Claims(self.run, self.life, llmrun.Marks(self.run, self.world.rows, again), self.world.starts,
                                        self.process.time)
            self.work = llmrun.Prompts(self.run, None, self.claims, self.journal, self.tell)
            self.work.pump = self
            if self.fate.failed_again:
                self.world.counts["lives that ask failed prompts again"] += 1
            if not self.claims.finished:
                await self.live()
        except OSError:
            self.world.counts["drivers ended by the disk"] += 1
        await self.process.leave()
        if self.work:
            self.finish()
        self.world.over(self.process)

    async def live(self):
        driver = types.SimpleNamespace(ends_at=float("inf"))
        orders = types.SimpleNamespace(driver=driver, doubt_the_end=list, mind_the_folder=list, stop=lambda stop: self.drain(),
                                       drain=lambda stop: self.leave_it_to_others())
        self.claims.LOOK_S *= self.hurry
        self.work.TEND_S = self.claims.LOOK_S
        async with llmrun.tending(self.work, orders):
            ready = self.process.time() + self.world.chance.choice([0, 0, 5, 60])
            while self.process.time() < ready and not self.draining:
                await asyncio.sleep(min(2, ready - self.process.time()))
            self.first_sent = None if self.draining else self.process.time()
            await asyncio.gather(*(self.worker(self.world.chance) for _ in range(self.slots)))

    def wake_all(self):
        waiting, self.waiting = self.waiting, []
        for turn in waiting:
            if not turn.done():
                turn.set_result(None)

    @property
    def trays(self):
        return [self.under_way]

    def leave_it_to_others(self):
        self.world.counts["left to others"] += not self.draining
        self.drain()

    def drain(self):
        self.world.counts["drains"] += not self.draining
        self.draining = True
        self.wake_all()

    async def worker(self, chance):
        while True:
            while self.journal.trouble:
                await asyncio.sleep(0.5)
            number = None if self.exhausted or self.draining else self.claims.next()
            if number is None:
                self.exhausted = True
                return self.wake_all()
            if number == llmrun.LATER:
                turn = self.process.create_future()
                self.waiting.append(turn)
                await turn
                continue
            must(number not in self.under_way, f"{self.life} asks {number} twice at once")
            self.under_way.add(number)
            await asyncio.sleep(chance.expovariate(1 / self.answer_s))
            self.under_way.remove(number)
            self.keep(number, chance.random() >= self.world.hard[number])

    def keep(self, number, ok):
        """As the driver does with a result."""
        key = self.world.rows.key(number)
        body = b'{"by": "%s", "to": %d}' % (str(self.life).encode(), number)
        status, error = 200 if ok else self.world.chance.choice([0, 400]), {"code": "died", "message": f"by {self.life}"}
        result = llmrun.Result(llmrun.Prompt(key, str(number), "", b""), status, body, {}, error, self.world.now, 1.0, 1, 0)
        self.added.append(llmrun.journal_line(result))
        self.journal.add(result)
        self.claims.settle(key, ok)

    def finish(self):
        allocation = types.SimpleNamespace(job=self.life.job, submitted=0, ends_at=float("inf"))
        driver = llmrun.Driver(self.run, None, 0, self.life, allocation, self.tell)
        ending = driver.finish(self.work, llmrun.Stop(llmrun.WORK_LEFT))
        self.closed = ending.code != llmrun.CLUSTER_FAILED
        self.world.counts["ends with a failing disk"] += not self.closed

    def merge(self, marks):
        """What this driver would write now is what the rule says of all that it has read."""
        whole = marks.state.find(llmrun.Marks.OPEN) < 0
        self.world.counts["merges" if whole else "results of a part"] += 1
        self.merged = whole and self.host.booted
        read = {segment.path.name: bytes(self.disk.seen(self.world.files[segment.path.name], news=False)[:to])
                for segment, to in zip(marks.segments, marks.read_to)}
        lines, expected = merged(marks), by_the_rule(read)
        if self.fate.failed_again and not whole:  # an error that it forgot to ask once more, and did not, may be missing
            expected = {number: line for number, line in expected.items() if number in lines or line.endswith(b'"ok": true}}\n')}
        compare(lines, expected, len(self.world.rows) if whole else 0, f"the merge of {self.life}")

    def promised(self):
        """The lines that the journal holds no more, so that they must be on the disk."""
        if not self.journal or self.closed:
            return self.added
        held = set(b"".join(self.journal.unsynced + self.journal.lines).splitlines(keepends=True))
        return [line for line in self.added if line not in held]


# ── what must hold ─────────────────────────────────────────────────────────────


def merged(marks):
    try:
        return dict(marks.lines((llmrun.Marks.FAILED, llmrun.Marks.DONE)))
    except IndexError:
        raise Broken("a merge counts a result without a line")


def by_the_rule(journals):
    """{number: line} of {journal's name: bytes}, with no code of the product: a success before an error, then the
    first by job, restart, number, segment and place."""
    best = {}
    for name in sorted(journals, key=lambda name: [int(part) for part in name.split(".")[:4]]):
        for line in journals[name].split(b"\n")[:-1]:
            with contextlib.suppress(ValueError):
                record = json.loads(line)
                number, ok, answer = int(record["custom_id"]), record["llmrun"]["ok"], record["response"]
                must(not answer or answer["body"]["to"] == number, f"the answer to another prompt stands beside {number}: {line!r}")
                if number not in best or ok > best[number][0]:
                    best[number] = ok, line + b"\n"
    return {number: line for number, (ok, line) in best.items()}


def compare(lines, expected, total, whose):
    """A merge is what the rule says, and has at least so many results."""
    for number in sorted(set(lines) | set(expected)) if lines != expected else ():
        must(lines.get(number) == expected.get(number),
             f"{whose} has for prompt {number} {lines.get(number)!r} and the rule says {expected.get(number)!r}")
    must(len(lines) >= total, f"{whose} has {len(lines)} results for {total} prompts")


def check_the_end(world):
    """When all is over and everybody sees everything."""
    journals = [world.files[name] for name in world.folders["journal"]]
    for file in journals:
        file.send(world.now)
    whole = {file.name: bytes(file.data) for file in journals}
    expected, total = by_the_rule(whole), len(world.rows)
    compare(merged(world.marks()), expected, total, "the last merge")
    slow = Host("late")  # finds one journal after the other, each in pieces
    world.faults = world.faults._replace(stale=0.9, lag_s=50)
    for file in journals:
        file.made_at, file.log = world.now, [(world.now, file.sent)]
    late = world.marks(slow)
    for _ in range(5):
        world.now += 9
        late.refresh()
    world.now += 1000
    readers = [(late, "a slow reader's merge")]
    for driver in world.drivers:  # those that merged go on with what they know already
        if driver.merged is driver.host.booted and not any(file.lost and file.host is driver.host for file in journals):
            driver.disk.process = None
            if not driver.claims.marks.again:  # who asks failed prompts again does not know of their errors
                readers.append((driver.claims.marks, f"the merge of {driver.life}, later,"))
    for marks, whose in readers:
        marks.refresh()
        compare(merged(marks), expected, total, whose)
    lines = {line for data in whole.values() for line in data.splitlines(keepends=True)}
    for driver in world.drivers:
        lost = [line for line in driver.promised() if line not in lines]
        must(not lost, f"{driver.life} was told that {len(lost)} lines are on disk which are not, as {lost[:1]}")
    return whole


def count_all(world, whole):
    counts = world.counts
    counts["seeds"], counts["prompts"], counts["virtual s"] = 1, len(world.rows), int(world.now)
    counts["takeovers"] = sum(not name.startswith("beat.") and not name.endswith(".0") for name in world.folders["claims"])
    by = collections.defaultdict(set)
    for name, data in whole.items():
        for line in data.split(b"\n")[:-1]:
            match = llmrun.KEY_IN_LINE.match(line)
            if match:
                by[match.groups()].add((name.rpartition(".")[0].rpartition(".")[0], line.endswith(llmrun.OK_END)))
    counts["answers of two lives"] = sum(len({life for life, _ in found}) > 1 for found in by.values())
    counts["errors beaten by a success"] = sum(len({ok for _, ok in found}) > 1 for found in by.values())
    return counts


class Here:
    """Stands for os in the program, whose processes are the world's."""

    def __init__(self, world):
        self.getpid = lambda: world.here.pid

    def __getattr__(self, name):
        return getattr(os, name)


@contextlib.contextmanager
def standing_in(world):
    """The program's view of the machine is the simulated process that runs just now."""
    def birth(pid):
        process = world.processes.get(pid)
        return pid * 1000 if process and not process.dead and process.host is world.here.host else 0

    def open_seen(path, mode):
        return opened[0].open(path)

    def lines(marks, states):
        opened.insert(0, marks.run.disk)
        try:
            yield from own_lines(marks, states)
        finally:
            opened.pop(0)
    opened, own_lines = [], llmrun.Marks.lines
    put = {"os": Here(world), "socket": types.SimpleNamespace(gethostname=lambda: world.here.host.name),
           "process_birth": birth, "log": lambda text: None, "clock": lambda: world.here.time(),
           "time": types.SimpleNamespace(**{**vars(time), "sleep": world.stand}), "open": open_seen,
           "write_file": lambda path, text: None,
           "write_results": lambda run, config, marks: world.here.driver.merge(marks)}
    kept = {name: vars(llmrun)[name] for name in put if name in vars(llmrun)}
    vars(llmrun).update(put)
    llmrun.Marks.lines = lines
    try:
        yield
    finally:
        llmrun.Marks.lines = own_lines
        del llmrun.open
        vars(llmrun).update(kept)


def simulate(seed, trace=None, **switches):
    """Run one seed to its end; its counts. Broken names the seed and what did not hold."""
    world = World(seed, **switches)
    with standing_in(world):
        try:
            world.run()
            return count_all(world, check_the_end(world))
        except Exception as error:
            what = str(error) if isinstance(error, Broken) else traceback.format_exc()
            raise Broken(f"seed {seed}: {what}")
        finally:
            for task in [task for process in world.processes.values() for task in process.tasks]:
                task.get_coro().close()  # of processes that are no more
            if trace is not None:
                trace.extend(world.trace)


# ── many seeds ─────────────────────────────────────────────────────────────────


def simulate_some(seeds, **switches):
    """The counts of some seeds together, and what broke, by seed."""
    counts, broken, often = collections.Counter(), {}, gc.get_threshold()
    gc.set_threshold(50000)
    for seed in seeds:
        try:
            counts.update(simulate(seed, **switches))
        except Broken as error:
            broken[seed] = str(error)
    gc.set_threshold(*often)
    return counts, broken


def simulate_piece(piece):
    seeds, switches = piece
    return simulate_some(seeds, **switches)


def main():
    parser = argparse.ArgumentParser(description="Many drivers, one run, bad days: every seed is another.")
    parser.add_argument("--seeds", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE",
                        help=f"a switch: one of {', '.join(Faults._fields)}")
    options = parser.parse_args()
    switches = {name: float(value) for name, _, value in (text.partition("=") for text in options.set)}
    began, last = time.monotonic(), options.first + options.seeds
    pieces = [(range(first, min(first + 50, last)), switches) for first in range(options.first, last, 50)]
    counts, broken = collections.Counter(), {}
    with multiprocessing.Pool() as pool:
        for some, bad in pool.imap_unordered(simulate_piece, pieces):
            counts.update(some)
            broken.update(bad)
    for name, count in sorted(counts.items()):
        print(f"{count:12,}  {name}")
    print(f"{1000 * (time.monotonic() - began) * os.cpu_count() / options.seeds:12.1f}  ms of a core for a seed")
    for _, what in sorted(broken.items()):
        print(what)
    print(f"{len(broken)} of {options.seeds} seeds broke a rule")
    return bool(broken)


if __name__ == "__main__":
    sys.exit(main())
