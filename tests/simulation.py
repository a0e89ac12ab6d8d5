"""Many drivers, one run, bad days: llmrun's own Claims, Journal, Marks and Run over a simulated cluster.

A seed decides everything: hosts that see each other's files late, disks that fail, processes that stand still, die
or live on beside their successors. Time is virtual, so a run of minutes takes milliseconds and a seed is the same
every time. What must hold is checked at each driver's end and at the end of all:

    python tests/simulation.py --seeds 10000        # on all cores; prints the counts and every seed that breaks a rule
    python tests/simulation.py --first 17 --seeds 1
"""

import argparse
import asyncio
import collections
import contextlib
import errno
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

FOLDER = Path("/run")
LONGEST_S, MOST_EVENTS = 6 * 3600.0, 400000
CRASH_FREE = "steady"


class Broken(AssertionError):
    """A rule that did not hold."""


class Killed(BaseException):
    """A process's end in the middle of what it does; nothing in the program may catch it."""


def must(holds, what):
    if not holds:
        raise Broken(what)


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

    def when(self):
        return self.when_s


class World:
    """The one order of all that happens, the file server, and what was promised to whom."""

    def __init__(self, seed, **switches):
        self.chance, self.now, self.agenda, self.turn = random.Random(seed), 0.0, [], itertools.count()
        self.faults = Faults.of(self.chance, switches)
        self.here = None  # the process that runs just now
        self.folders = {FOLDER / "journal": {}, FOLDER / "claims": {}}
        self.counts, self.trace, self.pids = collections.Counter(), [], itertools.count(100)
        self.processes = {}  # pid → process
        self.broken = None

    def at(self, when_s, process, call, args=(), context=None):
        timer = Timer(when_s, process, call, args, context)
        heapq.heappush(self.agenda, (when_s, next(self.turn), timer))
        return timer

    def run(self):
        """Let all happen that is to happen."""
        for events in itertools.count():
            if not self.agenda:
                return events
            when_s, _, timer = heapq.heappop(self.agenda)
            self.now = max(self.now, when_s)
            process = timer.process
            if timer.call is None or process and process.dead:
                continue
            must(self.now < LONGEST_S and events < MOST_EVENTS, "no end comes")
            if process and process.still_until > self.now:
                self.at(process.still_until, process, timer.call, timer.args, timer.context)
                timer.call = None if process.cancels(timer) else timer.call
                continue
            self.call(timer)
            if self.broken:
                raise self.broken
        return 0

    def call(self, timer):
        self.here = timer.process
        asyncio.events._set_running_loop(timer.process)
        try:
            if timer.context is None:
                timer.call(*timer.args)
            else:
                timer.context.run(timer.call, *timer.args)
        except Killed:
            pass
        finally:
            asyncio.events._set_running_loop(None)
            self.here = None

    def happens(self, likely):
        return likely > 0 and self.chance.random() < likely

    def note(self, *what):
        self.trace.append((round(self.now, 6), self.here.name if self.here else "", *what))
