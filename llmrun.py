#!/usr/bin/env python3
"""llmrun: run a language model on a Slurm cluster, from this one file.

    python llmrun.py demo                   see it work right here, without Slurm or a model
    python llmrun.py init                   write config.toml and example prompts
    python llmrun.py submit config.toml     place the model, answer every prompt, tear it down

The same file is the command on the login node, the driver inside the job and the agent on every
node. It needs CPython 3.9 or newer and nothing else. It is a house of floors, bottom up; a room uses
only what stands above it in this list (but for Assets, which all may use):

     1 · Basics       errors with their mends, whole files, the one clock, the one wait
     2 · Config       every key: its kind, default and words
     3 · Old files    configs of older scripts, read as they are
     4 · Models       a model file's header: layers, memory, how many nodes
     5 · Slurm        host lists, times, sbatch and its kin
     6 · Run          the run directory: its files, lives and events
     7 · State        where a run stands
     8 · Environment  what a process is; the batch script
     9 · Wire         HTTP, client and server
    11 · Nodes        the agent on each node, and the driver's view of it
    12 · Programs     a program on several nodes as one thing: ports, start, watch, end
    13 · Engines      what each engine needs, and what its failures mean
    15 · Input        sources of prompts, frozen, read a row at a time
    16 · Journal      results on disk, and the files that users read
    17 · Claims       whose prompts are whose when jobs share a run
    18 · Pump         how prompts become results
    21 · Driver       the life of a job, start to teardown
    22 · Commands     the command line
    23 · Assets       help, example prompts, the demo
"""
# /// script
# requires-python = ">=3.9"
# dependencies = ["requests", "openai", "tomli; python_version < '3.11'"]
# ///
import sys


def run_with_newer_python():
    """Go on in the newest Python that really runs here, or say what was found.

    Many login nodes have 3.6, so this function, like the whole file, keeps to grammar that 3.6
    can read. Names on the PATH are tried, not believed: pyenv's shims stand there and fail."""
    import os
    import shutil
    import subprocess

    named = os.environ.get("LLMRUN_PYTHON")
    test = "import sys; sys.exit(sys.version_info < (3, 9))"
    for name in [named] if named else ["python3.%d" % minor for minor in range(14, 8, -1)]:
        path = shutil.which(name)
        if path and subprocess.call([path, "-c", test], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) == 0:
            os.execv(path, [path] + sys.argv)
    sys.stderr.write(
        "llmrun: this is Python %d.%d and llmrun needs 3.9 or newer; %s. Sites usually offer one by "
        "`module avail python` then `module load`, or by conda; or name one: LLMRUN_PYTHON=/path/to/python3\n"
        % (sys.version_info[0], sys.version_info[1],
           "LLMRUN_PYTHON=%s does not run or is too old" % named if named
           else "no python3.9 to python3.14 on the PATH runs"))
    sys.exit(2)


if sys.version_info < (3, 9):
    run_with_newer_python()

import argparse
import array
import asyncio
import bisect
import codecs
import collections
import contextlib
import csv
import ctypes
import dataclasses
import difflib
import errno
import fcntl
import functools
import gc
import glob
import hashlib
import io
import itertools
import json
import math
import mmap
import os
import random
import re
import secrets
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import tempfile
import textwrap
import time
import traceback
import zlib
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple

VERSION = "0.1"

# ═══════════════════════════════════════════════════════════════════════════════
# 1 · Basics
#
# Owns what every floor needs: errors that carry their mend, files that are whole or absent,
# sizes and durations in words, the one clock, the one wait, the log.
# Knows nothing of models, Slurm or prompts.
# ═══════════════════════════════════════════════════════════════════════════════

DONE, SOME_FAILED, BAD_INPUT, CLUSTER_FAILED, WORK_LEFT, INTERRUPTED = 0, 1, 2, 3, 4, 130


class UserError(Exception):
    """What is wrong, where, and what its reader can do about it; one line. `keys` are those of the config that it is
    about."""

    exit_code = BAD_INPUT

    def __init__(self, where, what, mend="", keys=()):
        super().__init__(where, what, mend, keys)
        self.where, self.what, self.mend, self.keys = one_line(where), one_line(what), one_line(mend), keys

    def __str__(self):
        text = f"{self.where}: {self.what}" if self.where else self.what
        return f"{text}; {self.mend}" if self.mend else text


class ClusterError(UserError):
    """The user's input was right, but the engine or the cluster did not do its part."""

    exit_code = CLUSTER_FAILED


class ManyErrors(UserError):
    """Several errors of one input, a line each."""

    def __init__(self, errors):
        super().__init__("", "")
        self.errors, self.exit_code = errors, errors[0].exit_code

    def __str__(self):
        return "\n".join(map(str, self.errors))


class Faults:
    """The errors of several looks at one input, raised together at the end of its `with`: its user hears of all of them
    at once, and of none that only follows from another."""

    def __init__(self):
        self.errors = []

    def about(self, *keys):
        """Whether one of these keys, or one of these tables, is wrong as far as is known."""
        return any(f"{wrong}.".startswith(f"{key}.") for error in self.errors for wrong in error.keys for key in keys)

    @contextlib.contextmanager
    def kept(self, *keys):
        """Keeps the errors of a look, which where they name no key are about these."""
        try:
            yield
        except UserError as found:
            for error in getattr(found, "errors", [found]):
                error.keys = error.keys or keys
                if not self.about(*error.keys):
                    self.errors.append(error)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if isinstance(error, UserError):
            with self.kept():
                raise error
        if self.errors and (error is None or isinstance(error, UserError)):
            raise self.errors[0] if len(self.errors) == 1 else ManyErrors(self.errors)


def one_line(text):
    return " ".join(str(text).split())


def visible(text):
    """A text as a terminal may have it: what would move, rename or clear it is shown, not obeyed."""
    return re.sub("[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda found: repr(found.group())[1:-1], text)


def os_reason(error):
    """An OSError in words, without Python's number and path around them."""
    text = error.strerror or str(error)
    return text[:1].lower() + text[1:]


@contextlib.contextmanager
def whole_file(path, mode=None):
    """A file to write to that in the end is either whole under its name or not there at all."""
    temporary = Path(path).with_name(f".llmrun-{secrets.token_hex(8)}")
    handle = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666 if mode is None else mode)
    try:
        with open(handle, "wb") as file:
            yield file
            if mode is not None:
                os.fchmod(file.fileno(), mode)  # whatever the umask says
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def write_file(path, text, mode=None):
    with whole_file(path, mode) as file:
        file.write(text if isinstance(text, bytes) else text.encode(errors="replace"))


PASSING_TROUBLE = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.EROFS, errno.ETIMEDOUT}


def patiently(what, work, patience_s=300.0):
    """Do some work on files, again and again while the disk has a trouble that can pass."""
    end = clock() + patience_s
    while True:
        try:
            return work()
        except OSError as error:
            if error.errno not in PASSING_TROUBLE or clock() > end:
                raise
            log(f"{what}: {os_reason(error)}; trying again")
            time.sleep(1)


def try_writing(folder):
    """An OSError where a folder, or the nearest above it that is there, takes no files. A full quota shows at the first
    bytes, and /proc only at a file's name; nothing is left behind."""
    folder = os.path.abspath(folder)
    while not os.path.lexists(folder):
        folder = os.path.dirname(folder)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".llmrun-") as made:
        with open(os.path.join(made, "try"), "wb") as file:
            file.write(bytes(4096))
            file.flush()
            os.fsync(file.fileno())


def parse_lines(lines):
    """The objects of JSONL; a line torn by a crash and written over is left out."""
    objects = []
    for line in lines:
        with contextlib.suppress(ValueError):
            objects.append(json.loads(line))
    return objects


def finite(text):
    """A number that JSON can hold; Python reads NaN, Infinity and 1e999, too."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError("no finite number")
    return value


scan_json = json.JSONDecoder().scan_once
scan_strict = json.JSONDecoder(parse_float=finite, parse_constant=finite).scan_once
encode_text = json.encoder.encode_basestring  # a text as JSON, in quotes


def json_bytes(value):
    """A value as JSON in UTF-8; in ASCII where a text holds half of a character, which has no UTF-8."""
    try:
        return json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return json.dumps(value).encode()


def read_json(data, scan=scan_json):
    """json.loads for the many small bodies of a run, where what stands around the parser costs as much as it."""
    text = data.decode().strip()
    try:
        value, end = scan(text, 0)
    except StopIteration as stop:
        raise json.JSONDecodeError("Expecting value", text, stop.value)
    except RecursionError:
        raise json.JSONDecodeError("nested too deeply", text, 0)
    if end != len(text):
        raise ValueError("more than one JSON value")
    return value


SIZE_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40, "KB": 10**3, "MB": 10**6, "GB": 10**9,
              "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
DURATION_UNITS = {"ms": 0.001, "": 1, "s": 1, "sec": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}


NUMBER_AND_UNIT = r"([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)"
MOST_DIGITS = 30


def number_text(value):
    """A number or text as its writer sees it; one longer than any that is meant is refused."""
    if isinstance(value, int) and abs(value) >= 10**MOST_DIGITS or len(str(value)) > MOST_DIGITS + 10:
        raise ValueError("write fewer digits")
    return str(value)


def parse_size(text):
    """Bytes of "20GB", "512 MiB" or a plain number; G alone is GiB, as Slurm reads it."""
    match = re.fullmatch(NUMBER_AND_UNIT, number_text(text).strip())
    if not match or match.group(2).upper() not in SIZE_UNITS:
        raise ValueError('write a number and a unit, as in "24GB"')
    return int(float(match.group(1)) * SIZE_UNITS[match.group(2).upper()])


def parse_duration(text):
    """Seconds of "90s", "2min", "1.5h" or a plain number."""
    match = re.fullmatch(NUMBER_AND_UNIT, number_text(text).strip())
    if not match or match.group(2) not in DURATION_UNITS:
        raise ValueError('write a number and a unit, as in "90s", "10min" or "2h"')
    return float(match.group(1)) * DURATION_UNITS[match.group(2)]


def show_size(size_bytes):
    for unit, size in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("KB", 10**3)):
        if size_bytes >= size:
            return f"{size_bytes / size:.1f} {unit}"
    return f"{size_bytes} B"


def show_duration(time_s):
    time_s = int(round(time_s))
    if time_s < 60:
        return f"{time_s}s"
    if time_s < 3600:
        return f"{time_s // 60}m{time_s % 60:02d}s"
    days, hours = divmod(time_s // 3600, 24)
    return (f"{days}d{hours:02d}h" if days else f"{hours}h") + f"{time_s // 60 % 60:02d}m"


def nearest(word, words):
    """", did you mean "…"?" for a word that nobody knows, or nothing."""
    found = difflib.get_close_matches(str(word), list(words), 1, 0.6)
    return f'did you mean "{found[0]}"?' if found else ""


clock = time.monotonic  # for waits and durations; the time of day is only ever written down
CLOCK_TO_DATE = time.time() - clock()


def log(text):
    """One line for whoever reads the job's output."""
    sys.stderr.write(f"{time.strftime('%H:%M:%S')} {visible(one_line(text))}\n")
    sys.stderr.flush()


def process_birth(pid):
    """A process's start time in clock ticks: with the pid it names one process for ever. 0 for one that is dead."""
    with contextlib.suppress(OSError, IndexError):
        stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return 0 if stat[0] in "ZX" else int(stat[19])
    return 0


TAIL_LINES = 30


def signal_name(number):
    """"SIGKILL" for 9. Slurm writes 53 for a job that could not start, which is no signal: it stays a number."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def log_tail(path, since=0):
    """The last lines of a log, of those behind a place in it."""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        file.seek(max(since, os.fstat(file.fileno()).st_size - 16384))
        return [line for line in file.read().decode("utf-8", "replace").splitlines() if line.strip()][-TAIL_LINES:]
    return []


async def wait_until(what, condition, timeout_s, mend="", poll_s=0.05):
    """The one wait that polls: our own ports and files, every 50 ms, until `condition()` holds.

    It names what it waits for, so that a hang explains itself."""
    end = clock() + timeout_s
    while True:
        value = condition()
        if asyncio.iscoroutine(value):
            value = await value
        if value:
            return value
        if clock() >= end:
            raise ClusterError("", f"waited {show_duration(timeout_s)} for {what}", mend)
        await asyncio.sleep(poll_s)


async def within(timeout_s, work):
    """The outcome of some work, or asyncio.TimeoutError once the time is over; the work is ended either way.

    Not asyncio.wait_for: before Python 3.12 it loses a cancellation that comes as the work ends."""
    work = asyncio.ensure_future(work)
    try:
        await asyncio.wait([work], timeout=timeout_s)
        if not work.done():
            raise asyncio.TimeoutError
        return work.result()
    finally:
        work.cancel()


async def first_failure(*tasks):
    """Run tasks together; when one fails, end the others and raise its error."""
    tasks = [asyncio.ensure_future(task) for task in tasks]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


# ═══════════════════════════════════════════════════════════════════════════════
# 2 · Config
#
# Owns the one schema: every key with its kind, default and words. Checking, --set, the example
# file and `help config` all come from it. Leaves to later floors what a value means: whether the
# model exists, or Slurm takes the time.
# ═══════════════════════════════════════════════════════════════════════════════


class Kind(NamedTuple):
    """What a value may be: in words for its writer, and as the function that checks and converts it.

    `convert(value, base)` raises ValueError with the mend. `base` is the folder that relative paths
    start from; it is None where a frozen config is read again and nothing may be expanded twice."""

    words: str
    convert: Callable

    def wrong(self, error):
        """What is wrong with a value of which that was said."""
        return error.what if isinstance(error, WrongPart) else f"not {self.words}"


class WrongPart(ValueError):
    """A value is of its kind, but for this; the text is the mend."""

    def __init__(self, what, mend):
        super().__init__(mend)
        self.what = what


def expand(value, base):
    if not isinstance(value, str):
        raise ValueError("put it in quotes")
    if "\0" in value:
        raise ValueError("take out the NUL character")
    if re.search("[\ud800-\udfff]", value):
        raise ValueError("it holds half of a character: write the whole one")
    if base is None:
        return value
    expanded = os.path.expandvars(os.path.expanduser(value))
    unknown = re.search(r"\$(\w+|\{\w+\})", expanded)
    if unknown:
        raise ValueError(f"{unknown.group()} is not set in the environment")
    return expanded


def one_line_text(value, base):
    value = expand(value, base)
    if "\n" in value or "\r" in value:
        raise ValueError("write it on one line")
    return value


def path_text(value, base):
    value = one_line_text(value, base)
    return os.path.normpath(os.path.join(base, value)) if value not in ("", "-") and base is not None else value


def node_text(value, base):
    """Text whose $VARS mean the node's and are expanded there."""
    return expand(value, None)


def run_name(value, base):
    if not isinstance(value, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", value):
        raise ValueError("use up to 64 letters, digits, dots, dashes and underscores, as in \"llama-70b\"")
    return value


def number_between(least, most):
    def convert(value, base):
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"write a whole number, as in {max(least, 1)}")
        if not least <= value <= most:
            bound = f"at least {least}" if value < least else f"at most {most}"
            raise WrongPart(f"not {bound}", f"write a number from {least} to {most}")
        return value
    return Kind("a whole number", convert)


def number_or(word, least, most):
    number = number_between(least, most)

    def convert(value, base):
        return value if value == word else number.convert(value, base)
    return Kind(f'a whole number or "{word}"', convert)


def from_words(words, parse):
    """A kind whose values are text or numbers that `parse` understands."""
    def convert(value, base):
        if isinstance(value, bool) or not isinstance(value, (str, int, float)):
            raise ValueError("put it in quotes")
        return parse(value)
    return Kind(words, convert)


def flag(value, base):
    if not isinstance(value, bool):
        raise ValueError("write true or false, without quotes")
    return value


def list_of(kind):
    def item_of(item, base):
        try:
            return kind.convert(item, base)
        except ValueError as error:
            raise WrongPart(f"{json.dumps(item, default=str)} is {kind.wrong(error)}", error)

    def convert(value, base):
        if not isinstance(value, list):
            raise ValueError("write a list, as in [\"a\", \"b\"]")
        return [item_of(item, base) for item in value]
    return Kind(f"a list, each {kind.words}", convert)


def texts_by_name(value, base):
    if not isinstance(value, dict) or not all(isinstance(v, (str, int, float)) for v in value.values()):
        raise ValueError("write a table of names and values")
    if any("\n" in str(v) for v in value.values()):
        raise ValueError("write each value on one line")
    return value


def variables_by_name(value, base):
    for name in texts_by_name(value, base):
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise ValueError(f"{name} is no name of an environment variable")
    return value


def port_range(value, base):
    value = one_line_text(value, base)
    if value and not re.fullmatch(r"\d{1,5}(-\d{1,5})?", value):
        raise ValueError('write the first and the last, as in "20000-20100"')
    return value


def any_table(value, base):
    if not isinstance(value, dict):
        raise ValueError("write a table of names and values")
    try:
        json.dumps(value)
    except TypeError:
        raise ValueError("put dates and times in quotes")
    return value


def choice(*words):
    def convert(value, base):
        if value not in words:
            raise ValueError(nearest(value, words) or "write one of " + ", ".join(words))
        return value
    return Kind("one of " + ", ".join(words), convert)


TEXT = Kind("one line of text", one_line_text)
PATH = Kind("a path", path_text)
NODE_TEXT = Kind("text", node_text)
NAME = Kind("a name for files and folders", run_name)
FLAG = Kind("true or false", flag)
TEXTS = Kind("a table of texts", texts_by_name)
TABLE = Kind("a table", any_table)
SIZE = from_words("a size", parse_size)
DURATION = from_words("a duration", parse_duration)
AMOUNT = from_words("a number or text", lambda value: one_line_text(str(value), None))
PORT = number_between(0, 65535)
PORTS = Kind("a range of ports", port_range)
NODE_TEXTS = Kind("a table of variables", variables_by_name)


ANSWER_COLUMNS = ("answer", "reasoning", "finish_reason", "prompt_tokens", "completion_tokens", "error")


def key(default, kind, doc, example=None):
    """A key of the config; one with an example stands uncommented in the example file, and in the one that `init`
    writes, too; with an empty one it stands there behind a #."""
    extra = {"kind": kind, "doc": doc, "example": example}
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=extra)
    return dataclasses.field(default=default, metadata=extra)


@dataclasses.dataclass(frozen=True)
class SlurmConfig:
    """What to ask Slurm for. What is left out, the site decides."""

    nodes: Any = key(1, number_or("auto", 1, 4096), "How many nodes; \"auto\" takes as many as the model needs "
                     "at model.vram_per_node.", example=1)
    time: str = key("01:00:00", TEXT, "The longest the job may take: hours:minutes:seconds, or days-hours.",
                    example="01:00:00")
    partition: str = key("", TEXT, "The partition (queue); `sinfo` lists them.", example="")
    account: str = key("", TEXT, "The account that is charged.")
    qos: str = key("", TEXT, "The quality of service.")
    gpus_per_node: str = key("", AMOUNT, "GPUs on each node, as in \"2\" or \"a100:2\".")
    cpus_per_node: int = key(0, number_between(0, 4096), "CPU cores on each node; 0 leaves it to the site.")
    mem: str = key("", AMOUNT, "Memory of each node, as in \"64G\"; \"0\" is all of it.")
    constraint: str = key("", TEXT, "Features the nodes must have.")
    nodelist: str = key("", TEXT, "Nodes to use, as in \"gpu[01-04]\".")
    exclude: str = key("", TEXT, "Nodes not to use.")
    reservation: str = key("", TEXT, "A reservation to use.")
    jobs: int = key(1, number_between(1, 1000), "Share the prompts among so many jobs (a Slurm array), each with "
                    "its own nodes and engine; whichever is faster does more.")
    max_running: int = key(0, number_between(0, 1000), "How many of them may run at the same time; 0 is all.")
    requeue: bool = key(True, FLAG, "Go on by itself when the time limit, a preemption or a lost node ends the job "
                        "with work left: the same job once more, or a new one.")
    grace: float = key(120.0, DURATION, "How long before the time limit Slurm warns the driver. Prompts that can "
                       "still end before the limit are asked.")
    join_timeout: float = key(120.0, DURATION, "How long a node may take to answer at the start of the job. Then "
                              "it goes on without it, where replicas allow that, or another job does.")
    output: str = key("", PATH, "The job's own output; by default slurm-JOB.out in the run's logs. "
                      "%j stands for the job id.")
    output_link: str = dataclasses.field(default="", metadata={"kind": PATH, "doc": ""})  # of an old config: a name
    # for the newest submit's output, which begins anew each time, as their scripts cleaned it
    directives: List[str] = key([], list_of(TEXT), "More #SBATCH options as they are, as in [\"--exclusive\"]; "
                                "the keys above win.")
    extra: Dict[str, Any] = key({}, TEXTS, "More options by name: licenses = \"x\" becomes --licenses=x.")


@dataclasses.dataclass(frozen=True)
class EnvironmentConfig:
    """What is prepared on the nodes, once, before anything starts."""

    python: str = key("", PATH, "The Python (3.9 or newer) that runs llmrun on the nodes; by default the one "
                      "that submits, or the newest found.")
    modules: List[str] = key([], list_of(TEXT), "Modules to load, as in [\"cuda/12.4\"].")
    conda: str = key("", NODE_TEXT, "A conda environment to activate, by name or folder.")
    venv: str = key("", PATH, "A Python virtual environment to activate; its Python also runs llmrun.")
    setup: List[str] = key([], list_of(NODE_TEXT), "Shell lines to run after that.")
    vars: Dict[str, Any] = key({}, NODE_TEXTS, "Environment variables to set; $NAMES in them mean the node's.")


@dataclasses.dataclass(frozen=True)
class NetworkConfig:
    """How the nodes talk to each other. Usually nothing needs to be said."""

    interface: str = key("", TEXT, "The network interface to use between nodes, as in \"ib0\".")
    ports: str = key("", PORTS, "The range that ports are taken from, as in \"20000-20100\"; by default any free one.")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The model."""

    path: str = key("", PATH, "The GGUF file; of a split model the first part.", example="~/models/model.gguf")
    name: str = key("", TEXT, "The name that prompts and results use; by default the file's name.")
    vram_per_node: int = key(0, SIZE, "GPU memory of one node, as in \"24GB\"; needed for nodes = \"auto\".")


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """llama.cpp's own settings."""

    gpu_layers: Any = key("auto", number_or("auto", 0, 100000), "Layers to put on GPUs; \"auto\" is as many as fit.")
    rpc_port: int = key(0, PORT, "The port of the RPC workers, where it is free; 0 takes any free one.")
    rpc_cache: str = key("", NODE_TEXT, "A node-local folder in which RPC workers keep their part of the model "
                         "for the next start, as in \"/scratch/$USER/rpc\".")
    user_settings: bool = key(False, FLAG, "Also obey LLAMA_ARG_* variables and ~/.config/llama.cpp/config.ini.")


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """The program that runs the model."""

    name: str = key("llama.cpp", choice("llama.cpp", "echo"), "Which engine: llama.cpp, or echo (no model: it "
                    "repeats the prompt, to try things out).", example="llama.cpp")
    path: str = key("", PATH, "llama-server, or the folder it lies in; by default it is looked for on the nodes' "
                    "PATH.", example="~/llama.cpp/build/bin")
    slots: int = key(4, number_between(1, 1024), "Prompts answered at the same time.", example=4)
    context: int = key(4096, number_between(256, 2**24), "Tokens of context for each of them: prompt and answer "
                       "together.", example=4096)
    replicas: int = key(1, number_between(1, 1024), "Run the model so often, each on an equal share of the nodes.")
    concurrency: int = key(0, number_between(0, 100000), "Prompts under way at each replica; 0 is a few more than its "
                           "slots.")
    port: int = key(0, PORT, "The engine's port; 0 takes a free one.")
    port_is_wish: bool = dataclasses.field(default=False, metadata={"kind": FLAG, "doc": ""})  # of an old config
    pooling: str = dataclasses.field(default="", metadata={"kind": TEXT, "doc": ""})  # where embeddings are asked for
    load_timeout: float = key(3600.0, DURATION, "How long the model may take to load.")
    request_timeout: float = key(0.0, DURATION, "How long an answer may take, from when it was asked for; 0 is as long "
                                 "as its max_tokens make likely at the pace of the others, and much more.")
    args: List[str] = key([], list_of(NODE_TEXT), "More arguments for the engine, as in [\"--flash-attn\", \"on\"].")
    llama: LlamaConfig = dataclasses.field(default_factory=LlamaConfig)


@dataclasses.dataclass(frozen=True)
class PromptsConfig:
    """What is asked."""

    system: str = key("", PATH, "A text file with the system prompt.", example="prompts/system.txt")
    user: str = key("prompts/user", PATH, "A folder of text files, one prompt each; sub-folders count, hidden files "
                    "and editors' copies (name~, name.bak) do not. Or a .jsonl of OpenAI Batch requests, or a .jsonl, "
                    ".csv or .tsv of rows (see template), or a pattern as in \"in/*.csv\". \"-\" reads JSONL rows from "
                    "standard input.", example="prompts/user")
    template: str = key("", NODE_TEXT, "How a row becomes a prompt, as in \"Translate: {text}\", or a file that says "
                        "it. The system prompt may hold {columns} too.")
    id_column: str = key("", TEXT, "The column that names each row in the results; by default its number.")
    samples: int = key(1, number_between(1, 100000), "How often each prompt is asked, each time with another seed; the "
                       "answers tell their sample, from 1, and their seed.")
    on_bad_row: str = key("fail", choice("fail", "skip"), "What to do with a row or a file that cannot be "
                          "asked, as one that is empty or no text: fail before anything starts, or skip it and say so.")
    max_tokens: int = key(1024, number_between(1, 2**24), "The longest answer, in tokens.", example=1024)
    params: Dict[str, Any] = key({}, TABLE, "More of each request, as in temperature = 0.2 or seed = 1.")


@dataclasses.dataclass(frozen=True)
class ResultsConfig:
    """Where the answers go."""

    folder: str = key("", PATH, "The folder of the answers; by default results/ in the run's folder.")
    file_name: str = key("{path}", TEXT, "The name of each answer's file: {path} is the prompt's path, {name} its "
                         "name without folder and ending.")
    columns: List[str] = key(["answer"], list_of(choice(*ANSWER_COLUMNS)), "What is added to each row of a table: "
                             + ", ".join(ANSWER_COLUMNS) + ". Where it has such a column, the new one is answer_2.")


@dataclasses.dataclass(frozen=True)
class Config:
    """One run."""

    name: str = key("llmrun", NAME, "The run's name; its folder and its Slurm job are called after it.",
                    example="my-run")
    run_dir: str = key("runs", PATH, "The folder that holds the runs; the compute nodes must see it too.")
    slurm: SlurmConfig = dataclasses.field(default_factory=SlurmConfig)
    environment: EnvironmentConfig = dataclasses.field(default_factory=EnvironmentConfig)
    network: NetworkConfig = dataclasses.field(default_factory=NetworkConfig)
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    engine: EngineConfig = dataclasses.field(default_factory=EngineConfig)
    prompts: PromptsConfig = dataclasses.field(default_factory=PromptsConfig)
    results: ResultsConfig = dataclasses.field(default_factory=ResultsConfig)
    source: str = dataclasses.field(default="", metadata={"kind": TEXT, "doc": ""})
    overrides: List[str] = dataclasses.field(default_factory=list, metadata={"kind": list_of(TEXT), "doc": ""})

    def value_of(self, dotted):
        return functools.reduce(getattr, dotted.split("."), self)

    def error(self, dotted, what, mend=""):
        """The error for a key whose value turned out wrong on a later floor."""
        return key_error(Written(self.source, self.overrides), dotted, self.value_of(dotted), what, mend)

    def note(self, dotted, what):
        """A word about a key that is not wrong."""
        return f"{Written(self.source, self.overrides).place(dotted)}: {show_key(dotted)} {what}"


class Written(NamedTuple):
    """Where the keys of a config were written: in a file, or as `--set KEY=VALUE` instead."""

    source: str
    overrides: List[str]

    def override(self, dotted):
        """The last --set of a key, of its table, or of one in that table, as it was typed; or ""."""
        found = [""]
        for text in self.overrides:
            one, other = sorted((f"{text.partition('=')[0].strip()}.", f"{dotted}."), key=len)
            found += [text] * other.startswith(one)
        return found[-1]

    def place(self, dotted):
        """"config.toml:12", the line on which a key stands, where that can be found out, or "--set KEY=VALUE"."""
        if self.override(dotted):
            return f"--set {shortened(self.override(dotted))}"
        table, _, name = dotted.rpartition(".")
        current = ""
        with contextlib.suppress(OSError, UnicodeDecodeError):
            lines = Path(self.source).read_text().splitlines() if self.source.endswith(".toml") else []
            for number, line in enumerate(lines, 1):
                header = re.match(r"\s*\[([^\[\]]+)\]", line)
                current = header.group(1).strip() if header else current
                if header and current == dotted or (
                        current == table and re.match(r"\s*[\"']?%s[\"']?\s*=" % re.escape(name), line)):
                    return f"{self.source}:{number}"
        return self.source


def key_error(written, dotted, value, what, mend):
    shown = shortened(json.dumps(value, default=str))
    return UserError(written.place(dotted), f"{show_key(dotted)} = {shown}: {what}", mend, (dotted,))


def shortened(text):
    return text if len(text) <= 120 else text[:117] + "..."


def show_key(dotted):
    table, _, name = dotted.rpartition(".")
    return f"[{table}] {name}" if table else name


def unknown_key(written, dotted):
    """The error for a key that nobody knows: one that is spelt like it, or stands in another table, may be meant."""
    table, _, name = dotted.rpartition(".")
    everywhere = list(known_keys(Config))
    own = [key for key in everywhere if key.rpartition(".")[0] == table]
    meant = (near_keys(name, everywhere, 1) or near_keys(name, own, 0.75) or near_keys(name, everywhere, 0.85)
             or near_keys(name, own, 0.6))
    mend = "known are " + ", ".join(key.rpartition(".")[2] for key in own)
    if meant:
        typed, here = written.override(dotted), len(table) + 1 if table else 0
        shown = [f'"{key}"' if typed else f'"{key[here:]}"' if key in own else show_key(key) for key in meant]
        mend = f"did you mean {' or '.join(shown)}?"
    return UserError(written.place(dotted), f"unknown key {show_key(dotted)}", mend, tuple(meant))


def near_keys(name, keys, likeness):
    """Those of the keys, in whatever tables, whose name is most like this one."""
    found = difflib.get_close_matches(name, [key.rpartition(".")[2] for key in keys], 1, likeness)
    return [key for key in keys if key.rpartition(".")[2] in found]


def known_keys(schema, table=""):
    """All keys that a user may write, with their tables."""
    for field in dataclasses.fields(schema):
        dotted = f"{table}.{field.name}" if table else field.name
        if dataclasses.is_dataclass(field.type):
            yield dotted
            yield from known_keys(field.type, dotted)
        elif field.metadata["doc"]:
            yield dotted


def build_config(schema, data, source, base):
    """A config from plain data, every key checked."""
    with Faults() as faults:
        return build_table(schema, data, Written(source, data.get("overrides", [])), base, faults)


def build_table(schema, data, written, base, faults, table=""):
    """A config, or one table of it; a key that is wrong is among the faults, and here has its default."""
    if not isinstance(data, dict):
        faults.errors.append(key_error(written, table, data, "not a table", f"write its keys below a line [{table}]"))
        data = {}
    fields = {field.name: field for field in dataclasses.fields(schema)}
    faults.errors += [unknown_key(written, f"{table}.{name}" if table else name) for name in data if name not in fields]
    values = {}
    for name, field in fields.items():
        dotted = f"{table}.{name}" if table else name
        if dataclasses.is_dataclass(field.type):
            values[name] = build_table(field.type, data.get(name, {}), written, base, faults, dotted)
            continue
        values[name] = given = data[name] if name in data else default_of(field)
        kind = field.metadata["kind"]
        try:
            values[name] = kind.convert(given, base)
        except ValueError as error:
            faults.errors.append(key_error(written, dotted, given, kind.wrong(error), error))
            values[name] = kind.convert(default_of(field), base)
    return schema(**values)


def default_of(field):
    return field.default_factory() if field.default is dataclasses.MISSING else field.default


def toml_reader():
    """The `loads` of whichever TOML reader this Python has."""
    for module in ("tomllib", "tomli", "pip._vendor.tomli"):
        with contextlib.suppress(ImportError):
            return __import__(module, fromlist=["loads"]).loads
    return None


def parse_config_text(text, source):
    if source.endswith(".json") or text.lstrip().startswith("{"):
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{source}:{getattr(error, 'lineno', 1)}", f"not JSON: {getattr(error, 'msg', error)}",
                            "mend that line; the error may start on the line before")
    loads = toml_reader()
    if not loads:
        raise UserError(source, "this Python cannot read TOML",
                        "`python -m pip install --user tomli`, use Python 3.11 or newer, or write the config as JSON")
    try:
        return loads(text)
    except (ValueError, RecursionError) as error:
        line = re.search(r"at line (\d+)", str(error))
        raise UserError(f"{source}:{line.group(1)}" if line else source, f"not TOML: {error}",
                        "texts need quotes, tables stand in [brackets]")


MAX_CONFIG_BYTES = 2**20


class NotText(UserError):
    """A file that the user names holds something other than UTF-8 text."""

    def __init__(self, path, line, what):
        super().__init__(f"{path}:{line}", f"the {what} is not UTF-8 text",
                         "save it as UTF-8, or convert it with iconv")
        self.line = line


def read_user_file(path, what):
    """The text of a file that the user names; whatever is wrong with it is said in one line."""
    try:
        with open(path, "rb") as file:
            data = file.read()
    except OSError as error:
        if error.errno in PASSING_TROUBLE:
            raise
        mend = {errno.ENOENT: "check the path", errno.EISDIR: "name a file in it", errno.ELOOP: "name the real file",
                errno.EACCES: "make it readable: chmod u+r"}.get(error.errno, "check the path")
        raise UserError(path, f"cannot read the {what}: {os_reason(error)}", mend)
    try:
        return data.decode().lstrip("\ufeff")  # editors on Windows begin a file so
    except UnicodeDecodeError as error:
        raise NotText(path, data.count(b"\n", 0, error.start) + 1, what)


def apply_override(data, override):
    """Put `--set table.key=value` into the data of a config."""
    dotted, equals, text = override.partition("=")
    if not equals or not re.fullmatch(r"\w[\w-]*(\.\w[\w-]*)*", dotted.strip()):
        raise UserError(f"--set {override}", "not of the form table.key=value", "as in --set slurm.nodes=3",
                        (dotted.strip(),))
    *tables, name = dotted.strip().split(".")
    for table in tables:
        data = data.setdefault(table, {})
        if not isinstance(data, dict):
            raise UserError(f"--set {override}", f"{table} is no table", "`help config` lists the tables",
                            (dotted.strip(),))
    data[name] = parse_value(text.strip())


def parse_value(text):
    """A value as TOML or JSON would read it; anything else is text that needs no quotes here."""
    loads = toml_reader()
    with contextlib.suppress(ValueError, RecursionError):
        value = loads(f"value = {text}")["value"] if loads else json.loads(text)
        return value if isinstance(value, (str, int, float, list, dict)) else text  # 05:00:00 is a time in TOML
    return text


def toml_value(value):
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name} = {toml_value(item)}" for name, item in value.items()) + "}"
    if isinstance(value, float) and value == int(value):
        return f'"{show_duration(value)}"' if value < 60 else f'"{int(value) // 60}min"'
    return json.dumps(value)


def example_toml(everything=True):
    """config.example.toml, or (not everything) the short config that `init` writes."""
    lines = ["# A run of llmrun. `python llmrun.py submit THIS-FILE` starts it.",
             "# Paths are relative to this file; ~ and $VARIABLES may be used.", ""]
    if everything:
        lines[2:] = ["# Keys that stand behind a # show their default.", ""]

    def add_table(schema, table):
        keys = [field for field in dataclasses.fields(schema) if field.metadata.get("doc")]
        shown = [field for field in keys if everything or field.metadata["example"] is not None]
        if table and shown:
            lines.extend([f"# {schema.__doc__.strip()}"] * everything + [f"[{table}]"])
        for field in shown:
            example = field.metadata["example"]
            lines.extend(textwrap.wrap(field.metadata["doc"], 98, initial_indent="# ", subsequent_indent="# "))
            value = toml_value(example or default_of(field))
            lines.append(f"{'' if example else '# '}{field.name} = {value}")
        lines.extend([""] if shown else [])
        for field in dataclasses.fields(schema):
            if dataclasses.is_dataclass(field.type):
                add_table(field.type, f"{table}.{field.name}" if table else field.name)

    add_table(Config, "")
    return "\n".join(lines)


# ═══════════════════════════════════════════════════════════════════════════════
# 3 · Old files
#
# Owns the reading of a config file, since it may be one that was written for other scripts: the lab's
# flat config.json is turned into ours. Leaves what the keys mean to Config.
# ═══════════════════════════════════════════════════════════════════════════════

FLAT_KEYS = {"job_name": "name", "output_log": "slurm.output_link", "dir_llama_script": "engine.path",
             "model": "model.path", "port_rpc": "engine.llama.rpc_port", "port_server": "engine.port",
             "venv_dir": "environment.venv", "prompt_server": "prompts.system", "prompts_user_dir": "prompts.user",
             "nodes": "slurm.nodes", "time": "slurm.time"}
FLAT_CONTEXT = 8192  # what the scripts around these files always passed as -c


def from_flat_config(flat, source, faults):
    """The config that a lab's flat config.json means, and what its user should know of it."""
    known = list(FLAT_KEYS) + ["result_dir", "ntasks", "sbatch_script"]
    faults.errors += [UserError(source, f"unknown key {name}", nearest(name, known) or "known are " + ", ".join(known))
                      for name in flat if name not in known]
    data, notes = {}, []
    for name, dotted in FLAT_KEYS.items():
        value = flat.get(name, "")
        if value not in ("", None):
            numeric = name in ("nodes", "port_rpc", "port_server") and str(value).isdecimal()
            apply_override(data, f"{dotted}={json.dumps(int(value) if numeric else value)}")
    nodes, tasks = str(flat.get("nodes", 1)), str(flat.get("ntasks", flat.get("nodes", 1)))
    if nodes != tasks:
        raise UserError(source, f"ntasks = {tasks} but nodes = {nodes}",
                        "one task runs on each node: make the two equal, or leave ntasks out")
    data.setdefault("engine", {}).update(context=FLAT_CONTEXT, port_is_wish=True)
    if flat.get("result_dir"):
        stamp = time.strftime("result_%d-%m-%Y_%H-%M-%S")
        data["results"] = {"folder": os.path.join(str(flat["result_dir"]), stamp), "file_name": "result_{name}.txt"}
    if flat.get("sbatch_script"):
        script = os.path.expanduser(os.path.expandvars(str(flat["sbatch_script"])))
        script = os.path.join(os.path.dirname(source), script)
        data.setdefault("slurm", {})["directives"] = sbatch_options(read_user_file(script, "sbatch script"))
        notes.append(f"{flat['sbatch_script']}: its #SBATCH lines are kept; its commands are not run, "
                     "since llmrun starts the servers itself")
    return data, notes


def sbatch_options(script):
    """The options of a script's #SBATCH lines, by Slurm's own rule: they end at the first command."""
    options = []
    for line in script.splitlines():
        if line.startswith("#SBATCH"):
            options.append(line[len("#SBATCH"):].strip())
        elif line.strip() and not line.startswith("#"):
            break
    return [option for option in options if option]


def read_config(path, overrides=()):
    """The config of a file as the user means it, and what to tell about how it was read."""
    with Faults() as faults:
        return read_with_faults(path, overrides, faults)


def read_with_faults(path, overrides, faults):
    """The same for who looks on; a key that is wrong is among the faults, and has its default."""
    path = os.path.abspath(path)
    if os.path.isfile(path) and os.path.getsize(path) > MAX_CONFIG_BYTES:
        raise UserError(path, f"a config of {show_size(os.path.getsize(path))}",
                        "that is no llmrun config; `init` writes one to start from")
    data = parse_config_text(read_user_file(path, "config"), path)
    base = os.path.dirname(path)
    notes = []
    if isinstance(data, dict) and "dir_llama_script" in data:
        data, notes = from_flat_config(data, path, faults)
    if not isinstance(data, dict):
        raise UserError(path, "not a table of keys", "`init` writes a config to start from")
    for override in overrides:
        with faults.kept():
            apply_override(data, override)
    for ours in ("source", "overrides"):
        data.pop(ours, None)
    config = build_table(Config, data, Written(path, overrides), base, faults)
    return dataclasses.replace(config, source=path, overrides=list(overrides)), notes


# ═══════════════════════════════════════════════════════════════════════════════
# 4 · Models
#
# Owns what a model file tells before it is loaded: a GGUF header becomes layers, heads and bytes,
# and those become memory and a number of nodes. Never reads the weights themselves.
# ═══════════════════════════════════════════════════════════════════════════════


class Model(NamedTuple):
    """What a GGUF file says of itself."""

    name: str
    architecture: str
    layers: int
    heads: int
    kv_heads: Tuple[int, ...]  # of each layer
    key_length: int
    value_length: int
    context: int
    size_bytes: int
    files: Tuple[str, ...]
    pools: bool = False  # it says itself how the vectors of its tokens become one


GGUF_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
GGUF_STRING, GGUF_ARRAY = 8, 9
GGUF_BLOCKS = {  # tensor type: elements in a block, bytes of a block
    0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34), 9: (32, 36),
    10: (256, 84), 11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210), 15: (256, 292), 16: (256, 66),
    17: (256, 74), 18: (256, 98), 19: (256, 50), 20: (32, 18), 21: (256, 110), 22: (256, 82), 23: (256, 136),
    24: (1, 1), 25: (1, 2), 26: (1, 4), 27: (1, 8), 28: (1, 8), 29: (256, 56), 30: (1, 2), 34: (256, 54),
    35: (256, 66), 39: (32, 17)}
SPLIT_NAME = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")


class GgufHeader:
    """Reads a GGUF header off a memory map, front to back; a map costs only the pages it touches."""

    def __init__(self, data):
        self.data, self.at, self.keys = data, 0, {}
        magic, self.version, self.tensors, key_count = self.take("4sIQQ")
        if magic != b"GGUF":
            raise ValueError
        for _ in range(key_count):
            name = self.string().decode("utf-8", "replace")
            self.keys[name] = self.value(*self.take("I"))

    def take(self, form):
        values = struct.unpack_from("<" + form, self.data, self.at)
        self.at += struct.calcsize("<" + form)
        return values

    def string(self):
        length, = self.take("Q")
        start, self.at = self.at, self.at + length
        return self.data[start:self.at]

    def value(self, kind):
        if kind == GGUF_STRING:
            return self.string().decode("utf-8", "replace")
        if kind != GGUF_ARRAY:
            return self.take(GGUF_NUMBERS[kind])[0]
        item_kind, count = self.take("IQ")
        if item_kind in GGUF_NUMBERS:
            form = f"{count}{GGUF_NUMBERS[item_kind]}"
            if count <= 4096:
                return self.take(form)
            self.at += struct.calcsize("<" + form)
            return None
        for _ in range(count):  # a tokenizer's words: passed over, not kept
            self.value(item_kind)
        return None

    def end_of_weights(self):
        """Where the last tensor ends: a file that is shorter was cut."""
        end = 0 if self.tensors else self.at
        for _ in range(self.tensors):
            self.string()
            dimensions, = self.take("I")
            elements = math.prod(self.take(f"{dimensions}Q"))
            kind, offset = self.take("IQ")
            block, size = GGUF_BLOCKS.get(kind, (1, 0))
            end = max(end, offset + elements // block * size)
        alignment = self.keys.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise KeyError("general.alignment")
        return -(-self.at // alignment) * alignment + end if self.tensors else end


def read_gguf(path):
    """The keys of a GGUF file that is all there; ValueError says what is wrong with it."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if file.read(4) != b"GGUF":
            raise ValueError("not a GGUF file")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                header = GgufHeader(data)
                end = header.end_of_weights()
            except (struct.error, LookupError, OverflowError, MemoryError, RecursionError, TypeError):
                raise ValueError("its header is cut short or damaged")
    if size < end:
        raise ValueError(f"cut short: {show_size(size)} of {show_size(end)} are there")
    return header.keys, size


def read_model(config):
    """The model a config names, or the error for its user."""
    def wrong(what, mend):
        return config.error("model.path", what, mend)

    path = config.model.path
    if not path:
        raise wrong("no model", "name a GGUF file")
    if os.path.isdir(path):
        raise wrong("a folder", "name the .gguf file in it; of a split model the first part")
    paths, split = [path], SPLIT_NAME.fullmatch(os.path.basename(path))
    if split:
        stem, number, count = os.path.join(os.path.dirname(path), split.group(1)), int(split.group(2)), split.group(3)
        paths = [f"{stem}-{part:05d}-of-{count}.gguf" for part in range(1, int(count) + 1)]
        if number != 1:
            raise wrong(f"part {number} of a split model", f"name the first part, {os.path.basename(paths[0])}")
    size_bytes, keys = 0, {}
    for part in paths:
        name = os.path.basename(part)
        try:
            part_keys, part_size = read_gguf(part)
        except OSError as error:
            missing = f"its part {name} is missing" if split and error.errno == errno.ENOENT else os_reason(error)
            raise wrong(missing, "check the path" if not split else "all parts must lie in one folder")
        except ValueError as error:
            raise wrong(f"{name}: {error}", "copy or download it again"
                        if str(error) != "not a GGUF file" else "llama.cpp loads .gguf files only")
        keys, size_bytes = keys or part_keys, size_bytes + part_size
    try:
        return model_from_keys(keys, size_bytes, tuple(paths))
    except (LookupError, TypeError, ValueError):
        raise wrong("its header does not describe a language model",
                    "name the model itself, not an adapter or projector")


def model_from_keys(keys, size_bytes, files):
    architecture = keys["general.architecture"]

    def of(name, default=None):
        value = keys.get(f"{architecture}.{name}", default)
        if value is None:
            raise KeyError(name)
        return value

    def count(name, default=None, most=2**40):
        return whole(of(name, default), most)

    layers, heads = count("block_count", most=2**16), of("attention.head_count")
    head_count = max(whole(number) for number in heads) if isinstance(heads, tuple) else whole(heads)
    kv_heads = of("attention.head_count_kv", heads)
    kv_heads = kv_heads if isinstance(kv_heads, tuple) else (kv_heads,) * layers
    length = count("embedding_length") // head_count if head_count else 0  # without attention nothing is kept of it
    return Model(
        name=keys.get("general.name") or Path(files[0]).stem, architecture=architecture, layers=layers,
        heads=head_count, kv_heads=tuple(map(whole, kv_heads)), key_length=count("attention.key_length", length),
        value_length=count("attention.value_length", length), context=count("context_length"), size_bytes=size_bytes,
        files=files, pools=bool(count("pooling_type", 0)))


def whole(value, most=2**40):
    """A count of a header, which anybody may have written."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= most:
        raise ValueError("no count")
    return value


KV_BYTES = 2  # f16, llama.cpp's default for both halves of the cache
NODE_OVERHEAD_BYTES = 2**30  # what llama.cpp itself keeps free of each device (its fit margin)


def kv_cache_bytes(model, context, slots):
    """Bytes of the KV cache: every slot has its own cells, in steps of 256."""
    cells = -(-min(context, model.context) // 256) * 256 * slots
    return sum(model.kv_heads) * (model.key_length + model.value_length) * KV_BYTES * cells


class Plan(NamedTuple):
    """How a run is laid out, and the figures that led to it."""

    nodes: int
    model: Optional[Model]
    kv_bytes: int


def plan_nodes(config, sized):
    """How many nodes the engine takes, by the header of its model where it is `sized` by that."""
    if not sized:
        if config.slurm.nodes == "auto":
            raise config.error("slurm.nodes", "this engine has no model to size", "write a number")
        return Plan(config.slurm.nodes, None, 0)
    model = read_model(config)
    kv_bytes = kv_cache_bytes(model, config.engine.context, config.engine.slots)
    if config.slurm.nodes != "auto":
        return Plan(config.slurm.nodes, model, kv_bytes)
    if not config.model.vram_per_node:
        raise config.error("slurm.nodes", "the GPU memory of a node is not known",
                           'write [model] vram_per_node = "24GB", or a number of nodes')
    nodes = nodes_for(model.size_bytes + kv_bytes, config.model.vram_per_node)
    if not nodes:
        raise config.error("model.vram_per_node", "less than the engine itself needs",
                           "write the memory of a whole node")
    return Plan(nodes * config.engine.replicas, model, kv_bytes)


def nodes_for(size_bytes, node_bytes):
    """How many nodes with so much GPU memory hold so much; 0 if no number does."""
    room = node_bytes - NODE_OVERHEAD_BYTES
    return -(-size_bytes // room) if room > 0 else 0


def what_would_fit(config, nodes, node_bytes):
    """The mend for a model that did not fit into so many nodes."""
    model = read_model(config)
    size_bytes = model.size_bytes + kv_cache_bytes(model, config.engine.context, config.engine.slots)
    wanted = max(nodes_for(size_bytes, node_bytes), nodes + 1) * config.engine.replicas
    room = f", a node has {show_size(node_bytes)}: set [slurm] nodes = {wanted}" if node_bytes else ": add nodes"
    return f"weights and context take {show_size(size_bytes)}{room}, or lower [engine] slots or context"


# ═══════════════════════════════════════════════════════════════════════════════
# 5 · Slurm
#
# Owns everything that is Slurm's own: host lists, times, which role this process has, and
# sbatch, squeue, scontrol and scancel behind one small class. Never parses JSON or fixed widths:
# both change between versions. Leaves to others what runs inside a job.
# ═══════════════════════════════════════════════════════════════════════════════


def expand_hostlist(text):
    """The nodes of "a[1-3,7],b01" in Slurm's own order; ValueError where Slurm sees none."""
    hosts = []
    for item in re.findall(r"(?:[^\[\],\s]|\[[^\]]*\])+|[\[\]]", text or ""):
        parts = re.split(r"\[([^\]]*)\]", item)
        if "[" in parts[0] or "]" in "".join(parts[::2]):
            raise ValueError(f"not a host list: {text}")
        numbers = [expand_numbers(inside) for inside in parts[1::2]]
        if not numbers:
            hosts.append(item)
            continue
        # Slurm runs through the last bracket first, then the first, the second and so on (seen on 22.05).
        for outer in itertools.product(*reversed(numbers[:-1])):
            for last in numbers[-1]:
                inner = list(reversed(outer)) + [last]
                hosts.append("".join(itertools.chain(*zip(parts[::2], inner))) + parts[-1])
    return hosts


def expand_numbers(text):
    """["08", "09", "12"] of "08-09,12"; the first number's width is everyone's."""
    numbers = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if not match:
            raise ValueError(f"not a range: {text}")
        first, last = match.group(1), match.group(2) or match.group(1)
        if not 0 <= int(last) - int(first) < 65536:
            raise ValueError(f"not a range: {text}")
        numbers.extend(str(number).zfill(len(first)) for number in range(int(first), int(last) + 1))
    return numbers


UNLIMITED = math.inf


def slurm_minutes(text):
    """Minutes of a Slurm time (any of its forms, rounded up as it does); 0 and UNLIMITED are endless."""
    text = number_text(text)
    if text.upper() in ("UNLIMITED", "INFINITE", "-1"):
        return UNLIMITED
    match = re.fullmatch(r"(\d+)-(\d*)(?::(\d+))?(?::(\d+))?|(\d+)(?::(\d+))?(?::(\d+))?", text)
    if not match:
        raise ValueError("not a time Slurm takes")
    days, hours, minutes, seconds, one, two, three = (int(part or 0) for part in match.groups())
    if match.group(5) is not None:
        has_hours = match.group(7) is not None
        hours, minutes, seconds = (one, two, three) if has_hours else (0, one, two)
    return math.ceil((days * 86400 + hours * 3600 + minutes * 60 + seconds) / 60) or UNLIMITED


def time_limit_minutes(config):
    """The job's time limit, or the error that shows how it is written."""
    try:
        return slurm_minutes(config.slurm.time)
    except ValueError as error:
        guess = re.match(r"\s*(\d{1,9})\s*([dhm])", config.slurm.time.lower())
        number = int(guess.group(1)) if guess else 1
        minutes = number * {"d": 1440, "h": 60, "m": 1}[guess.group(2)] if guess else 60
        raise config.error("slurm.time", error, f'write "{minutes // 60:02d}:{minutes % 60:02d}:00"')


def show_slurm_time(minutes):
    return "no limit" if minutes == UNLIMITED else f"{minutes // 60:02d}:{minutes % 60:02d}:00"


def show_minutes(minutes):
    """So many minutes, as people say it."""
    parts = zip((minutes // 1440, minutes // 60 % 24, minutes % 60), ("day", "hour", "minute"))
    return " ".join(f"{count} {unit}{'s' * (count > 1)}" for count, unit in parts if count)


def role_of(environ, pid):
    """Where this process stands: "login", "allocation" (salloc), "batch", "task", "shell" or "job".

    No single variable is safe: sbatch inside a job leaks its parent's. SLURM_TASK_PID is set anew at
    each level, so it tells whether slurmstepd itself started this process; "job" is deeper inside."""
    if "SLURM_JOB_ID" not in environ:
        return "login"
    if "SLURM_PTY_PORT" in environ:
        return "shell"
    if "SLURMD_NODENAME" not in environ:
        return "allocation"
    if environ.get("SLURM_TASK_PID") != str(pid):
        return "job"
    return "task" if "SLURM_STEP_ID" in environ else "batch"


SLURM_VARIABLES = ("SLURM_", "SRUN_", "SBATCH_", "PMI")


def without_slurm(environ, keep=("SLURM_CONF",)):
    """An environment without what Slurm put there for the process that runs now."""
    return {name: value for name, value in environ.items()
            if name in keep or not name.startswith(SLURM_VARIABLES)}


def submit_environment(environ):
    """What sbatch may see: inside a job nothing of that job leaks; on a login node SBATCH_* is the user's wish."""
    return without_slurm(environ) if "SLURM_JOB_ID" in environ else dict(environ)


class Job(NamedTuple):
    """What squeue says of a job."""

    job: str
    state: str
    reason: str
    start: str
    end: str
    left: str
    nodes: str
    ahead: int = 0  # waiting jobs that come before it
    killed_by: str = ""  # the signal that its batch process died of


UNKNOWN = "UNKNOWN"


def unknown_job(job):
    """A job of which Slurm has said nothing."""
    return Job(str(job), UNKNOWN, "", "", "", "", "")


def has_nodes(job):
    """Whether a job may have a process on its nodes, as far as Slurm has said."""
    return job is not None and job.state not in ENDED_STATES and job.state not in WAITING_STATES


class Partition(NamedTuple):
    name: str
    is_default: bool
    state: str
    max_minutes: float
    max_nodes: float
    nodes: int


PENDING_WORDS = {
    "None": "just submitted", "Priority": "waiting its turn", "Resources": "waiting for free nodes",
    "BeginTime": "waiting for its start time (after a requeue Slurm waits about two minutes)",
    "Dependency": "waiting for another job",
    "DependencyNeverSatisfied": "waits for a job that failed: it can never start",
    "JobHeldUser": "held: `scontrol release` lets it go", "JobHeldAdmin": "held by an administrator",
    "job requeued in held state": "requeued and held: `scontrol release` lets it go",
    "PartitionTimeLimit": "asks for more time than its partition allows: it can never start",
    "PartitionNodeLimit": "asks for more nodes than its partition has: it can never start",
    "PartitionConfig": "asks for what its partition does not allow: it can never start",
    "BadConstraints": "asks for what no node has: it can never start",
    "ReqNodeNotAvail": "waiting for nodes that are down or reserved",
    "PartitionDown": "its partition is closed for now",
    "QOSMaxJobsPerUserLimit": "waiting until fewer of your jobs run",
    "AssocGrpGRES": "the account's GPUs are all in use",
    "QOSMaxGRESPerUser": "waiting until your jobs use fewer GPUs", "Reservation": "waiting for its reservation"}
# All states that squeue shows (of 22.05 to 26.05) but for those of a job that runs or is ending; a flag hides its base.
WAITING_STATES = {"PENDING": "", "REQUEUED": "", "REQUEUE_FED": "", "REQUEUE_HOLD": "JobHeldUser",
                  "SPECIAL_EXIT": "JobHeldUser", "RESV_DEL_HOLD": "JobHeldAdmin"}  # and the reason that they imply
ENDED_STATES = ("COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "BOOT_FAIL", "DEADLINE",
                "OUT_OF_MEMORY", "REVOKED")
STANDING_STATES = ("SUSPENDED", "STOPPED")

ENDINGS = {"TIMEOUT": "the time limit came", "OUT_OF_MEMORY": "the node ran out of memory: raise [slurm] mem",
           "NODE_FAIL": "a node failed", "CANCELLED": "cancelled", "PREEMPTED": "preempted",
           "BOOT_FAIL": "a node failed", "DEADLINE": "its deadline passed"}

REFUSALS = (  # what sbatch prints, the key it is about (of several those that the config sets), what to do
    (r"invalid partition|Invalid partition", "slurm.partition", "`sinfo -s` lists the partitions"),
    (r"[Ii]nvalid account", "slurm.account", "`sacctmgr show assoc user=$USER format=account,partition` lists yours"),
    (r"Invalid qos", "slurm.qos", "`sacctmgr show assoc user=$USER format=qos` lists yours"),
    (r"generic resource|gres", "slurm.gpus_per_node", "`sinfo -o '%P %G'` lists the GPUs of each partition"),
    (r"Memory specification", "slurm.mem", "`sinfo -o '%P %m'` lists the memory of each partition's nodes, in MB"),
    (r"--mem spec", "slurm.mem", 'write it as in "64G"'),
    (r"[Ii]nvalid feature", "slurm.constraint", "`sinfo -o '%P %f'` lists the features"),
    (r"[Ii]nvalid node name", "slurm.nodelist", "`sinfo -N` lists the nodes"),
    (r"[Rr]eservation", "slurm.reservation", "`scontrol show reservation` lists them"),
    (r"[Tt]ime limit", "slurm.time", "ask for less time"),
    (r"[Nn]ode count", "slurm.nodes", "ask for fewer nodes"),
    (r"More processors", "slurm.cpus_per_node", "`sinfo -o '%P %c'` lists the cores of each partition's nodes"),
    (r"node configuration is not available",
     "slurm.gpus_per_node slurm.mem slurm.cpus_per_node slurm.constraint slurm.nodelist",
     "no node has all that is asked for: `sinfo -o '%P %c %m %G'` lists cores, memory and GPUs"))


class SlurmSilent(ClusterError):
    """Slurm gave no answer: what it was asked for may be done all the same, or later."""


NO_ANSWER = (r"contact slurm controller|[Tt]imed out|[Cc]onnection refused|Zero Bytes were transmitted|"
             r"Unexpected message received")  # the last is what `scontrol requeue` says of a time-out (seen on 22.05)


class Slurm:
    """Slurm's commands. Answers are plain data, refusals are errors that name the key to change."""

    def __init__(self, environ, timeout_s=90.0):
        self.environ = dict(environ, LC_ALL="C", SLURM_TIME_FORMAT="%s", SLURM_BITSTR_LEN="0")
        self.timeout_s = timeout_s
        self.deaths = {}  # job → the signal that its batch process died of, which is asked once

    def call(self, *argv, environ=None):
        mend = "try again when Slurm answers: `sinfo` tells"
        try:
            answer = subprocess.run(argv, env=environ or self.environ, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                    stderr=subprocess.PIPE, universal_newlines=True, errors="replace",
                                    timeout=self.timeout_s)
        except OSError as error:
            raise ClusterError(argv[0], f"cannot be started on this machine: {os_reason(error)}",
                               "go to a login node of the cluster, or use `run`, which needs no Slurm")
        except subprocess.TimeoutExpired:
            raise SlurmSilent(argv[0], f"Slurm did not answer within {show_duration(self.timeout_s)}", mend)
        if answer.returncode and re.search(NO_ANSWER, answer.stderr):
            raise SlurmSilent(argv[0], answer.stderr, mend)
        return answer

    def submit(self, config, script, *options):
        """Hand a script to sbatch; its id, or what sbatch says to --test-only."""
        answer = self.call("sbatch", *options, str(script), environ=submit_environment(os.environ))
        if answer.returncode:
            raise refusal(config, answer.stderr, self.partitions)
        return answer.stdout.strip() or answer.stderr.strip()

    def jobs(self, ids, with_places=True):
        """What Slurm still knows of these jobs, by id; it forgets a job minutes after its end. Their places in the
        queue cost a look at all that waits on the cluster: not for who asks again and again."""
        if not ids:
            return {}
        answer = self.call("squeue", "-h", "-t", "all", "-j", ",".join(map(str, ids)), "-o", "%A|%T|%r|%S|%e|%L|%N")
        if answer.returncode and "Invalid job id" not in answer.stderr:
            raise ClusterError("squeue", answer.stderr or f"exit code {answer.returncode}", "is Slurm up? try `sinfo`")
        rows = [Job(*line.split("|")) for line in answer.stdout.splitlines() if line.count("|") == 6]
        if with_places and any(row.state in WAITING_STATES for row in rows):
            ahead = self.waiting_before()
            rows = [row._replace(ahead=ahead.get(int(row.job), 0)) for row in rows]
        rows = [row._replace(killed_by=self.death_of(row.job)) if row.state == "FAILED" else row for row in rows]
        return {int(row.job): row for row in rows}

    def death_of(self, job):
        """The signal that a job's batch process died of, by its name, or ""."""
        if job not in self.deaths:
            ended = re.search(r"\bExitCode=\d+:(\d+)", self.detail(job))
            number = int(ended.group(1)) if ended else 0
            self.deaths[job] = signal_name(number) if number else ""
        return self.deaths[job]

    def waiting_before(self):
        """{job: how many waiting jobs of its partition have a higher priority}."""
        answer = self.call("squeue", "-h", "-t", "PENDING", "-o", "%P|%Q|%A")
        lines = [line.split("|") for line in answer.stdout.splitlines() if re.fullmatch(r"[^|]+\|\d+\|\d+", line)]
        before, place = {}, collections.Counter()
        for partition, _, job in sorted((partition, -int(rank), int(job)) for partition, rank, job in lines):
            before.setdefault(job, place[partition])
            place[partition] += 1
        return before

    def detail(self, job):
        """`scontrol show job` as one line, or nothing where Slurm has forgotten the job."""
        answer = self.call("scontrol", "show", "job", "-d", "-o", str(job))
        return re.sub(r"JobName=.*? UserId=", "UserId=", answer.stdout, count=1)

    def partitions(self):
        answer = self.call("scontrol", "show", "partition", "-o")
        return [parse_partition(line) for line in answer.stdout.splitlines() if line.startswith("PartitionName=")]

    def cancel(self, jobs, *options):
        answer = self.call("scancel", *options, *map(str, jobs))
        if answer.returncode:
            raise ClusterError("scancel", answer.stderr or "refused", f"is job {' '.join(map(str, jobs))} yours?")

    def requeue(self, job):
        """Put a job back into the queue under the same id; "" or why Slurm would not.

        Only for a job that has not ended: a finished one would run once more."""
        answer = self.call("scontrol", "requeue", str(job))
        return one_line(answer.stderr) or "refused" if answer.returncode else ""


def job_id_in(said):
    """The id in what `sbatch --parsable` says: "194" or "194;cluster", maybe below a site's own words."""
    ids = re.findall(r"^(\d+)(?:;\S+)?$", said, re.MULTILINE)
    if not ids:
        raise ClusterError("sbatch", f"accepted the job but did not tell its id: {said}", "`squeue --me` shows it")
    return int(ids[-1])


def refusal(config, message, partitions=list):
    """The error for what sbatch would not take, at the key that it is about. `partitions()` tells those there are."""
    reasons = [re.sub(r"^(sbatch|srun|salloc): (error: |fatal: )?", "", line) for line in message.splitlines()]
    reason = "; ".join(dict.fromkeys(line.replace("Batch job submission failed: ", "") for line in reasons if line
                                     and not line.startswith("Try ")))
    for pattern, keys, mend in REFUSALS:
        if re.search(pattern, reason):
            known = [partition.name for partition in partitions()] if keys == "slurm.partition" else []
            if known:
                mend = nearest(config.slurm.partition, known) or "this cluster has " + ", ".join(known)
            asked = [key for key in keys.split() if " " not in keys or config.value_of(key)]
            if len(asked) == 1:
                return config.error(asked[0], f"Slurm refuses: {reason}", mend)
            whole = " and ".join(map(show_key, asked)) or "the job"
            return UserError(config.source, f"Slurm refuses {whole}: {reason}", mend, tuple(asked))
    return UserError(config.source, f"Slurm refuses the job: {reason or 'no reason given'}",
                     "see [slurm] and [slurm.extra] in the config")


def parse_partition(line):
    value = dict(pair.split("=", 1) for pair in line.split() if "=" in pair)

    def limit(name, parse):
        text = value.get(name, "UNLIMITED")
        return UNLIMITED if text in ("UNLIMITED", "NONE", "N/A") else parse(text)
    return Partition(value["PartitionName"], value.get("Default") == "YES", value.get("State", "UP"),
                     limit("MaxTime", slurm_minutes), limit("MaxNodes", int), int(value.get("TotalNodes", 0) or 0))


def check_partition(config, partitions, nodes):
    """Refuse what the partition can never start: many sites let Slurm accept it and wait for ever."""
    minutes = time_limit_minutes(config)
    wanted = config.slurm.partition
    chosen = [p for p in partitions if (p.name in wanted.split(",") if wanted else p.is_default)]
    otherwise = "SBATCH_PARTITION" in os.environ or "partition" in config.slurm.extra or any(
        re.match(r"(-p|--partition)", option) for option in config.slurm.directives)
    if otherwise or len(chosen) < len(wanted.split(",")):  # chosen elsewhere, or hidden: Slurm's to judge
        return
    if all(p.state != "UP" for p in chosen):
        raise config.error("slurm.partition", f"partition {chosen[0].name} is {chosen[0].state.lower()}",
                           "choose another: " + ", ".join(p.name for p in partitions if p.state == "UP"))
    longest, most = max(p.max_minutes for p in chosen), max(min(p.max_nodes, p.nodes) for p in chosen)
    if minutes > longest:
        raise config.error("slurm.time", f"more than partition {chosen[0].name} allows",
                           f'write at most "{show_slurm_time(longest)}"')
    if nodes > most:
        raise config.error("slurm.nodes", f"{nodes} nodes are more than partition {chosen[0].name} gives a job",
                           f"at most {most}; see `sinfo -s` for other partitions")


# ═══════════════════════════════════════════════════════════════════════════════
# 6 · Run
#
# Owns the run directory: all state of a run is files in it, and this is the only place that knows
# their paths. A start of a driver is a life; each life writes its own events, logs and journal, so
# no file ever has two writers. Leaves what is in the files to the floors that write them.
# ═══════════════════════════════════════════════════════════════════════════════


class Life(NamedTuple):
    """One start of a driver: the raw job id (0 outside Slurm), Slurm's restart count, and a number."""

    job: int
    restart: int
    number: int

    def __str__(self):
        return f"{self.job}.{self.restart}.{self.number}"

    @classmethod
    def of_file(cls, path):
        """The life that wrote a file, or None for a file of another kind."""
        parts = path.name.split(".")[:3]
        return cls(*map(int, parts)) if len(parts) == 3 and all(part.isdigit() for part in parts) else None


class Segment(NamedTuple):
    """One file of a journal. Their order decides between two results for one prompt."""

    life: Life
    number: int
    path: Path


NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}


class Disk:
    """All that drivers do to the files they share; the proof of it puts another in this place.

    Shared file systems keep few promises. This asks for those that all of them keep: whole appends of one writer, a
    link that only one of many gets, a rename. It never asks for a file's size or time."""

    def names(self, folder):
        return os.listdir(folder)

    def read(self, path, at=0, most=-1):
        """Some bytes of a file from a place in it; none where there is no such file yet."""
        try:
            with open(path, "rb") as file:
                file.seek(at)
                return file.read(most)
        except FileNotFoundError:
            return b""

    def create(self, path):
        """A file for appending that nobody had before."""
        return os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_APPEND, 0o644)

    def append(self, file, data):
        while data:
            data = data[os.write(file, data):]

    def is_empty(self, file):
        """Whether nothing came of any append to a file of our own."""
        return not os.fstat(file).st_size

    def sync(self, file):
        os.fsync(file)

    def close(self, file):
        os.close(file)

    def put(self, path, data):
        write_file(path, data)

    def put_new(self, path, data):
        """Put a whole file under a name that is free; False if it was taken."""
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        write_file(temporary, data)
        try:
            os.link(temporary, path)
            return True
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise
            return self.put_first(path, data)
        finally:
            os.unlink(temporary)

    def put_first(self, path, data):
        """The same where files cannot be linked; for a moment the file is there and empty."""
        with contextlib.suppress(FileExistsError):
            file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
            try:
                self.append(file, data)
            finally:
                os.close(file)
            return True
        return False


class Run:
    """One run's folder."""

    ENDED_BEAT = b"ended"  # instead of a beat: this life takes no more, and what it claimed is anybody's

    def __init__(self, folder, disk=None):
        self.folder, self.disk = Path(folder), disk or Disk()
        self.claims = self.folder / "claims"
        self.heard = {}  # life → (up to where its events were read, what is kept of them)
        self.stop_file = self.folder / "stop"
        self.script = self.folder / "llmrun.py"
        self.key_file = self.folder / "key"
        self.endpoint = self.folder / "endpoint.json"
        self.results = self.folder / "results"
        self.summary = self.folder / "summary.json"
        self.logs = self.folder / "logs"
        self.journal = self.folder / "journal"

    @property
    def name(self):
        return self.folder.name

    def config_file(self, shape=0):
        return self.folder / "shapes" / str(shape) / "config.json"

    def job_script(self, shape=0):
        return self.folder / "shapes" / str(shape) / "job.sh"

    def config(self, shape=0):
        """The frozen config; its paths are absolute and nothing is expanded again."""
        data = json.loads(read_user_file(self.config_file(shape), "frozen config"))
        return build_config(Config, data, data["source"], None)

    def made_at(self):
        """When it was made, of a run whose frozen files can be read; 0 for what is no run."""
        if not self.config_file().exists():
            return 0
        self.config(), self.submits(), json.loads(self.input_file("input.json").read_text())["rows"]
        return self.key_file.stat().st_mtime_ns

    def input_file(self, name):
        return self.folder / "input" / name

    def logs_of(self, life):
        return self.logs / str(life)

    def job_output(self, job):
        """The job's own output, where the config did not choose another place."""
        return self.config().slurm.output.replace("%j", str(job)) or str(self.logs / f"slurm-{job}.out")

    def record_submit(self, job, **facts):
        """`shape` among the facts says that the job runs our job.sh, `after` which job it goes on for."""
        record = {"job": job, "time": time.time(), **facts}
        write_file(self.folder / "events" / f"{job}.submit.json", json.dumps(record))

    def submits(self):
        """{job: what was recorded} of the jobs that sbatch was given, oldest first."""
        records = [json.loads(path.read_text()) for path in (self.folder / "events").glob("*.submit.json")]
        return {record["job"]: record for record in sorted(records, key=lambda record: record["time"])}

    def submitted(self):
        return list(self.submits())

    def shapes(self):
        """The numbers of the shapes so far: 0 at submit, one more for each join with other settings."""
        return sorted(int(path.name) for path in (self.folder / "shapes").iterdir() if path.name.isdigit())

    def lives(self):
        """All lives so far, in the order in which they began to write."""
        found = [Life.of_file(path) for path in (self.folder / "events").glob("*.jsonl")]
        events = {life: self.events(life) for life in found if life}
        return sorted((life for life in events if events[life]), key=lambda life: (events[life][0]["time"], life))

    def events(self, life):
        """What happened in a life; of its progress, which a long life tells by the thousand, the last word."""
        at, events = self.heard.get(life, (0, []))
        if events and events[-1]["event"] == "end":
            return events
        data = self.disk.read(self.events_file(life), at)
        lines = data[:data.rfind(b"\n") + 1].splitlines()
        told = [line for line in lines if b'"event": "progress"' in line]
        new = parse_lines(line for line in lines if b'"event": "progress"' not in line or line is told[-1])
        if told:
            events = [event for event in events if event["event"] != "progress"]
        self.heard[life] = at + data.rfind(b"\n") + 1, events + new
        return events + new

    def progress(self, life):
        """A life's last word on its counts."""
        told = [event for event in self.events(life) if event["event"] == "progress"]
        return told[-1] if told else {}

    def bore_fruit(self, life):
        """Whether a life did some of what it was for: it answered or, where its work is no prompts, was ready to."""
        events = self.events(life)
        if events[0].get("work", "prompts") == "prompts":
            return bool(self.progress(life).get("answers"))
        return any(event["event"] == "ready" for event in events)

    def events_file(self, life):
        return self.folder / "events" / f"{life}.jsonl"

    def segments(self):
        """The journals of all lives, in the order that decides between two results for one prompt."""
        names = [re.fullmatch(r"(\d+)\.(\d+)\.(\d+)\.(\d+)\.jsonl", name) for name in self.disk.names(self.journal)]
        found = [(*map(int, match.groups()), match.group()) for match in names if match]
        return [Segment(Life(*life), number, self.journal / name) for *life, number, name in sorted(found)]

    def claim_file(self, chunk, generation):
        return self.claims / f"{chunk}.{generation}"

    def generations(self):
        """{chunk: how often it was claimed}, less 1."""
        latest = {}
        for name in self.disk.names(self.claims):
            match = re.fullmatch(r"(\d+)\.(\d+)", name)
            if match:
                chunk, generation = map(int, match.groups())
                latest[chunk] = max(generation, latest.get(chunk, 0))
        return latest

    def beat_file(self, life):
        return self.claims / f"beat.{life}"

    def again_file(self, job):
        return self.claims / f"again.{job}"

    def asked_again(self):
        """{journal's file: up to where its failures are open again}, by all that `resume --failed` was told."""
        places = collections.Counter()
        for name in self.disk.names(self.claims):
            if name.startswith("again."):
                places |= collections.Counter(json.loads(self.disk.read(self.claims / name)))
        return places

    def new_life(self, job, restart):
        """The next life of this job: the first number that nobody else was given."""
        for number in itertools.count():
            life = Life(job, restart, number)
            with contextlib.suppress(FileExistsError):
                os.close(os.open(self.events_file(life), os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
                self.logs_of(life).mkdir()
                return life
        return None


def create_run(config, prompts, make_script):
    """A run's folder with everything frozen in it, or nothing at all.

    `prompts.keep(run)` keeps the input there; `make_script(run)` gives the text of its job.sh."""
    folder = None
    try:
        parent = Path(config.run_dir)
        parent.mkdir(parents=True, exist_ok=True)
        folder = new_folder(parent, f"{config.name}-{time.strftime('%Y%m%d-%H%M%S')}")
        run = Run(folder)
        for sub in ("shapes/0", "input", "events", "logs", "journal", "claims"):
            (folder / sub).mkdir(parents=True)
        write_file(run.script, Path(__file__).read_bytes())
        write_file(run.key_file, secrets.token_urlsafe(32) + "\n", 0o600)
        prompts.keep(run)
        freeze_shape(run, 0, config, make_script(run))  # the last: it makes it a run
    except BaseException as error:
        if folder:
            shutil.rmtree(folder, ignore_errors=True)
        if not isinstance(error, OSError):
            raise
        mend = {errno.ENOSPC: "free some space", errno.EDQUOT: "your quota is full: free some space"}
        raise config.error("run_dir", f"cannot make the run's folder: {os_reason(error)}",
                           mend.get(error.errno, "name a folder that you may write to and the nodes can see"))
    return run


def freeze_shape(run, shape, config, script):
    """Keep what a submit or a join asked for: its job.sh, and its config, whose presence says that both are whole."""
    run.job_script(shape).parent.mkdir(exist_ok=True)
    write_file(run.job_script(shape), script, 0o755)
    write_file(run.config_file(shape), json.dumps(dataclasses.asdict(config), indent=1))


def new_folder(parent, name):
    """A new folder of that name; a second one in the same second gets a number."""
    for number in itertools.count(1):
        folder = parent / (name if number == 1 else f"{name}-{number}")
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)
            return folder
    return None


DAMAGED = (UserError, OSError, ValueError, TypeError, LookupError, AttributeError)  # what reading such files raises


def readable(run, look):
    """What a look at a run's files gives; None, and a word about it, where they are damaged or another user's."""
    try:
        return look(run)
    except DAMAGED as error:
        why = getattr(error, "what", "") or (os_reason(error) if isinstance(error, OSError) else repr(error))
        log(f"{run.folder} is passed over, since it cannot be read: {why}")
        return None


def all_runs(folder):
    """The runs below a folder that can be read, oldest first."""
    found = [(readable(run, Run.made_at), run) for run in map(Run, sorted(Path(folder).glob("*")))]
    return [run for _, run in sorted((one for one in found if one[0]), key=lambda one: one[0])]


CANCELLED = "cancelled by you"  # by the command, which leaves word of it in the run's folder
NOBODY, REQUEUED, SUCCESSOR, OTHERS = "", "requeued", "successor", "others"


class Ending(NamedTuple):
    """How a life ended, and who goes on after it. The driver tells it as the life's last event, State reads it back."""

    code: int
    why: str = ""
    next: str = NOBODY  # or the same job once more, another job, or other jobs that are at it already
    job: int = 0  # the successor's

    @classmethod
    def told_by(cls, event):
        return cls(event["code"], event["why"], event["next"], event.get("job", 0))


class Events:
    """Writes what happened in one life, one line a change."""

    def __init__(self, run, life):
        self.file, self.torn = os.open(run.events_file(life), os.O_WRONLY | os.O_APPEND), False

    def write(self, event, **facts):
        with contextlib.suppress(OSError):  # a full disk must not end a run that still has results to save
            self.append(event, **facts)

    def append(self, event, **facts):
        line = json_bytes({"time": round(time.time(), 3), "event": event, **facts}) + b"\n"
        whole, self.torn = b"\n" * self.torn + line, True
        if os.write(self.file, whole) < len(whole):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.torn = False


# ═══════════════════════════════════════════════════════════════════════════════
# 7 · State
#
# Owns where a run stands: in one dictionary, from the events of its lives and from what Slurm says of
# its jobs. Leaves its words and columns to Commands.
# ═══════════════════════════════════════════════════════════════════════════════

PHASES = {"start": "starting", "agents_up": "starting the engine", "engine_started": "loading the model",
          "ready": "answering", "answered": "tearing down", "stopping": "stopping", "draining": "finishing",
          "engine_died": "starting the engine again"}
VERDICTS = {DONE: "done", SOME_FAILED: "done", BAD_INPUT: "failed", CLUSTER_FAILED: "failed", WORK_LEFT: "stopped",
            INTERRUPTED: "interrupted"}


class LifeState:
    """What the events of one life tell, and Slurm where they tell nothing more. One that another life of its job has
    followed is over, whatever Slurm says of the job."""

    def __init__(self, life, events, job, followed=False):
        self.life, self.events, self.job, self.followed = life, events, job, followed
        self.phase, self.detail, self.lost, self.progress, self.until = "starting", "", [], {}, None
        for event in events:
            self.hear(event["event"], event)
        self.last_word = events[-1] if events[-1]["event"] == "end" else {}
        self.alive = not (self.last_word or followed) and is_alive(events[0], job)
        self.ending = Ending.told_by(self.last_word) if self.last_word else None if self.alive else self.death()
        self.counts = counts = {**self.progress, **self.last_word}
        self.own_failed = counts.get("own_failed", 0)
        self.answered = counts.get("answered", counts.get("answers", 0) - self.own_failed)

    def hear(self, name, event):
        self.until = event.get("until", self.until)
        if name in PHASES:
            self.phase, self.detail = PHASES[name], event.get("why", "")
        elif name == "progress":
            self.progress = event
            if self.phase == "starting" and event["answers"]:  # a long run: its "ready" is out of sight
                self.phase = "answering"
        elif name == "engine_says" and self.phase == "loading the model":
            self.detail = event["line"]
        elif name == "journal_trouble":
            self.detail = f"results cannot be written ({event['why']}): paused, {event['held']} held in memory"
        elif name in ("trouble", "trouble_over", "journal_well"):
            self.detail = event.get("why", "")
        elif name == "node_lost":
            self.lost.append(f"{event['node']}: {event['why']}")

    def death(self):
        """How a driver ended that says nothing of it: it was killed. None while Slurm has yet to see that."""
        if has_nodes(self.job) and not self.followed:
            return None
        job, goes_on = self.job, self.followed or self.job and self.job.state in WAITING_STATES
        by = job and not goes_on and (ENDINGS.get(job.state) or job.killed_by and f"by {job.killed_by}")
        return Ending(CLUSTER_FAILED, f"the driver was killed{f' ({by})' if by else ''}; finished prompts are kept",
                      REQUEUED if goes_on else NOBODY)

    @property
    def word(self):
        """What it is at, as long as it has not ended."""
        if not self.alive:
            return "stopping"
        return "suspended" if self.job and self.job.state in STANDING_STATES else self.phase

    @property
    def began(self):
        return self.events[0]["time"]

    @property
    def ended(self):
        return self.events[-1]["time"]

    @property
    def complete(self):
        """Whether there was nothing left to do when it ended."""
        return self.ending is not None and self.ending.code in (DONE, SOME_FAILED)

    def per_second(self, count):
        return self.progress[count] / self.progress["working_s"] if self.progress.get("working_s") else 0.0

    def shown(self):
        """An ended life as the state of its run."""
        word = VERDICTS[self.ending.code] if self.last_word else "killed"
        if self.ending.code == SOME_FAILED and not self.counts.get("done"):
            word = "failed"
        return {"state": word, "exit_code": self.ending.code, "detail": self.ending.why or self.detail}


def state_of(run, jobs):
    """Where a run stands, as one dictionary: from its own files, and from what Slurm says of its jobs."""
    submits, total = run.submits(), shape_of(run.folder)
    began = run.lives()
    last = {life.job: life for life in began}
    lives = [LifeState(life, run.events(life), jobs.get(life.job), followed=life.job and life != last[life.job])
             for life in began]
    job = next(reversed([*submits] or [life.life.job for life in lives] or [0]))
    all_jobs = dict.fromkeys([*submits, *(life.life.job for life in lives if life.life.job)])
    state = {"run": run.name, "folder": str(run.folder), "job": job, "all_jobs": list(all_jobs), "state": "new",
             "detail": "", **counts_of(lives, total), "total": total, "tokens_per_s": 0.0, "left_s": None,
             "ends_in_s": None, "took_s": None, "exit_code": None, "nodes": [],
             "lost": [lost for life in lives for lost in life.lost], "jobs": 0}
    if not lives:
        return {**state, **if_cancelled(run, {"exit_code": None, **state_before_start(run, job, jobs.get(job))})}
    complete = next((life for life in reversed(lives) if life.complete), None)
    if complete:  # but then failed prompts were to be asked again, and that waits to begin, or was not finished
        later = {job: record for job, record in submits.items() if record["time"] > complete.ended}
        if is_fresh(later, lives, jobs) or any(
                life.last_word and not life.complete and life.began >= complete.ended for life in lives):
            complete = None
    going = [life for life in lives if life.ending is None]
    if going and not (complete and all(life.began <= complete.ended for life in going)):
        return {**state, **state_of_going(going, state)}
    found = complete.shown() if complete else {"exit_code": None, **state_of_stopped(lives, submits, jobs)}
    if found["state"] not in ("done", "failed"):
        found = if_cancelled(run, found)
    return {**state, **(ended_facts(lives) if found["exit_code"] is not None else {}), **found}


def if_cancelled(run, found):
    """The state of a run with work left; where its user cancelled it, that is why, whatever Slurm tells."""
    if found["exit_code"] is None or not run.stop_file.exists():
        return found
    return {"state": "stopped", "detail": CANCELLED, "exit_code": WORK_LEFT}


def ended_facts(lives):
    """What a run took, over all of its lives."""
    tokens, working_s, until = sum(life.progress.get("tokens", 0) for life in lives), 0.0, 0.0
    told = [life.progress for life in lives if life.progress]
    for begin, end in sorted((event["time"] - event["working_s"], event["time"]) for event in told):
        working_s, until = working_s + max(0.0, end - max(begin, until)), max(until, end)  # jobs work side by side
    return {"took_s": round(max(life.ended for life in lives) - min(life.began for life in lives)),
            "tokens_per_s": round(tokens / working_s, 1) if working_s else 0.0,
            "nodes": list(dict.fromkeys(node for life in lives for node in life.events[0]["nodes"]))}


def counts_of(lives, total):
    """How many prompts are answered, and have failed: as the last life counted them in the journals when it ended; as
    long as none has, or others go on, by what each tells of its own."""
    last = max(lives, key=lambda life: life.ended).last_word if lives else {}
    if "done" in last:
        return {"done": last["done"], "failed": last["failed"]}
    done = max([sum(life.answered for life in lives), *(life.counts.get("done", 0) for life in lives)])
    return {"done": min(total, done), "failed": sum(life.own_failed for life in lives)}


def state_of_going(going, state):
    """The lives that run, as one: the first of them that has got farthest, and the sums."""
    shown = next((life for life in going if life.phase == "answering"), going[0])
    rate = sum(life.per_second("answers") for life in going)
    left = state["total"] - state["done"] - state["failed"]
    ends = [life.until for life in going if life.until]
    return {"state": shown.word, "detail": shown.detail, "jobs": len(going),
            "ends_in_s": max(0, round(min(ends) - time.time())) if ends else None,
            "nodes": [node for life in going for node in life.events[0]["nodes"]],
            "tokens_per_s": round(sum(life.per_second("tokens") for life in going), 1),
            "left_s": round(left / rate) if rate else None}


def state_of_stopped(lives, submits, jobs):
    """A run with work left and no life: a job of it waits, or soon will; else the last word of those that ended."""
    latest = {life.life.job: life for life in lives}
    waiting = [job for number, job in jobs.items() if job.state in WAITING_STATES
               and (latest[number].ending.next if number in latest else number in submits)]
    if waiting:
        return {"state": "pending", "detail": pending_words(waiting[0])}
    if is_fresh(submits, lives, jobs):
        return {"state": "pending", "detail": "just submitted"}
    requeued = [life for life in latest.values() if life.ending.next == REQUEUED and not job_ended(life)]
    if requeued:
        return {"state": "pending", "detail": f"{requeued[0].ending.why}; it was put back into the queue"}
    newest = max(life.began for life in lives)  # what ended before that began is history
    last = [life for life in latest.values() if life.ending.next == NOBODY and life.ended >= newest] or lives[-1:]
    return max(last, key=lambda life: (life.ending.code, life.ended)).shown()


def is_fresh(submits, lives, jobs):
    """Whether a job was submitted that has not begun yet; of one that Slurm has not been asked about, for a minute."""
    begun = {life.events[0]["submitted"] for life in lives}
    return any(jobs[job].state not in ENDED_STATES if job in jobs else time.time() - record["time"] < 60
               for job, record in submits.items() if job not in begun)


def job_ended(life):
    """Whether a job that should go on has ended after all: cancelled in the queue, say."""
    return life.job.state in ENDED_STATES if life.job else time.time() - life.ended > 60


@functools.lru_cache(maxsize=None)
def shape_of(folder):
    """How many prompts a run has: frozen, so read once."""
    run = Run(folder)
    return json.loads(run.input_file("input.json").read_text())["rows"] * run.config().prompts.samples


def state_before_start(run, job_id, job):
    if not job_id:
        return {"state": "starting"}
    if job is None or job.state in ENDED_STATES:
        said = log_tail(run.job_output(job_id))
        why = said[-1] if said else ENDINGS.get(job.state if job else "", "the job ended before it started anything")
        return {"state": "failed", "detail": why, "exit_code": CLUSTER_FAILED}
    if job.state == UNKNOWN:
        return {"state": "pending", "detail": "Slurm has not yet said how it stands"}
    if job.state in WAITING_STATES:
        return {"state": "pending", "detail": pending_words(job)}
    making_ready = ": the nodes are being made ready" if job.state == "CONFIGURING" else ""
    return {"state": "starting", "detail": job.nodes + making_ready}


def pending_words(job):
    expected = time.strftime("%a %H:%M", time.localtime(int(job.start))) if job.start.isdigit() else ""
    reason = WAITING_STATES[job.state] or job.reason
    return (PENDING_WORDS.get(reason, reason)
            + (f"; {job.ahead} waiting jobs come before it" if job.ahead else "")
            + (f"; expected to start {expected}" if expected else ""))


def is_alive(start, job):
    """Whether the driver of a life still runs: seen from its own host, or by Slurm from any other."""
    if start["host"] == socket.gethostname():
        return start["born"] == process_birth(start["pid"])
    return has_nodes(job)


def state_watch(run, slurm):
    """A function that gives the run's state: its own files each time, Slurm's word at most every 15 s."""
    jobs, asked, doubted = None, -math.inf, set()

    def ask():
        nonlocal jobs, asked
        asked = clock()
        over = {number: job for number, job in (jobs or {}).items() if job.state in ENDED_STATES}
        try:
            jobs = {**over, **slurm.jobs([job for job in run.submitted() if job not in over], with_places=False)}
        except ClusterError:  # Slurm may be away for a while, which does not say that a job is gone
            jobs = jobs or {job: unknown_job(job) for job in run.submitted()}

    def look():
        if not run.config_file(0).exists():
            raise ClusterError(str(run.folder), "the run's folder is gone", "its jobs end by themselves in a minute")
        if slurm and clock() - asked >= 15:
            ask()
        state = state_of(run, jobs or {})
        if slurm and state["state"] in ("killed", "stopping") and state["job"] not in doubted:
            doubted.add(state["job"])  # Slurm's word is from before that, so ask once out of turn
            ask()
            state = state_of(run, jobs)
        return state
    return look


# ═══════════════════════════════════════════════════════════════════════════════
# 8 · Environment
#
# Owns what a process is, as data, and the one shell script there is: a config becomes the
# four-section job.sh, a pure function of it. Every value in it is quoted by `quote`.
# Leaves starting processes to Nodes, submitting the script to Slurm.
# ═══════════════════════════════════════════════════════════════════════════════

quote = shlex.quote

# How a frozen llmrun.py is started: imported from its folder rather than run as a script, so that Python keeps
# the compiled program beside it. Compiling it anew costs each of a node's agents about 0.1 s.
START = "import sys; sys.path.insert(0, sys.argv.pop(1)); import llmrun; sys.exit(llmrun.main())"


@dataclasses.dataclass(frozen=True)
class Process:
    """A program to run on a node."""

    name: str  # before Programs has given it one that no other of the life has, and a log: as users call it
    argv: List[str]
    log: str = ""
    env: Dict[str, str] = dataclasses.field(default_factory=dict)
    node_env: Dict[str, str] = dataclasses.field(default_factory=dict)  # $VARS in it mean the node's
    without: Tuple[str, ...] = ()  # prefixes of variables it must not see
    grace_s: float = 2.0  # between the first TERM and KILL
    progress: str = ""  # a pattern: log lines worth telling while it starts


JOB_SCRIPT = """\
#!/bin/bash
# The batch script of the llmrun job {name}, in four sections.
# ── 1 · resources ──────────────────────────────────────────────────────────────
{resources}
# ── 2 · environment and modules ────────────────────────────────────────────────
trap '' USR1  # Slurm's early warning stays ignored, through exec, until the driver listens for it
ulimit -n "$(ulimit -Hn)" 2>/dev/null
fail() {{ echo "llmrun: $1" >&2; exit 3; }}
# Python is found before any module can put another one, or its settings, in the way.
for candidate in {pythons}; do
    python=$(command -v "$candidate") &&
        "$python" -c 'import sys; sys.exit(sys.version_info < (3, 9))' 2>/dev/null && break
    python=
done
[ -n "$python" ] || fail {no_python}
{environment}
# ── 3 · container ──────────────────────────────────────────────────────────────
# none: the engine runs as it is installed on the nodes
# ── 4 · run ────────────────────────────────────────────────────────────────────
exec "$python" -I {command}
"""


def frozen_command(run_folder, *words):
    """What a Python runs to do a command with the llmrun.py of a run's folder."""
    return ["-c", START, str(run_folder), *map(str, words)]


def job_script(config, nodes, output, command, python=""):
    """The text of job.sh. `command` is what Python runs, `python` the one that submits."""
    only = config.environment.python or (os.path.join(config.environment.venv, "bin", "python")
                                         if config.environment.venv else "")
    newest = [f"python3.{minor}" for minor in range(14, 8, -1)] + ["python3"]
    candidates = [quote(only)] if only else [quote(python)] * bool(python) + ['"$LLMRUN_PYTHON"'] + newest
    what = f"{only} does not run as Python 3.9 or newer on" if only else "no Python 3.9 or newer found on"
    return JOB_SCRIPT.format(
        name=config.name, resources="\n".join(sbatch_lines(config, nodes, output)), pythons=" ".join(candidates),
        no_python=quote(what) + '" $(hostname); set [environment] python in the config"',
        environment="\n".join(environment_lines(config.environment)) or "# nothing more to load",
        command=" ".join(quote(str(word)) for word in command))


def sbatch_lines(config, nodes, output):
    """#SBATCH lines: the user's own first, since of two equal options Slurm takes the last."""
    slurm = config.slurm
    warn_s = int(max(1, min(slurm.grace, time_limit_minutes(config) * 30)))  # at most half of the job's time
    options = [
        ("job-name", config.name), ("nodes", nodes), ("ntasks-per-node", 1), ("time", slurm.time),
        ("partition", slurm.partition), ("account", slurm.account), ("qos", slurm.qos),
        ("gpus-per-node", slurm.gpus_per_node), ("cpus-per-task", slurm.cpus_per_node or ""), ("mem", slurm.mem),
        ("constraint", slurm.constraint), ("nodelist", slurm.nodelist), ("exclude", slurm.exclude),
        ("reservation", slurm.reservation), ("array", array_range(slurm)),
        ("output", output), ("open-mode", "append"), ("signal", f"B:USR1@{warn_s}"), ("propagate", "NONE")]
    given = [f"#SBATCH {line}" for line in slurm.directives]
    given += [f"#SBATCH --{name}" + ("" if value is True else f"={quote(str(value))}")
              for name, value in slurm.extra.items() if value is not False]
    return given + [f"#SBATCH --{name}={quote(str(value))}" for name, value in options if value != ""] + [
        "#SBATCH --no-kill", "#SBATCH --requeue" if slurm.requeue else "#SBATCH --no-requeue"]


def array_range(slurm):
    """The tasks of an array and how many may run at once, as in "0-3%2"."""
    if slurm.jobs == 1:
        return ""
    return f"0-{slurm.jobs - 1}" + (f"%{slurm.max_running}" if slurm.max_running else "")


def environment_lines(environment):
    """Shell lines that load what the user named; each that fails says so and ends the job."""
    lines = []
    if environment.modules:
        lines.append("type module >/dev/null 2>&1 || . /etc/profile")
    for module in environment.modules:
        lines.append(f"module load {quote(module)} || fail {quote(f'module load {module} failed; see `module avail`')}")
    if environment.conda:
        lines.append('eval "$(conda shell.bash hook)" || fail "conda is not on the PATH of the node"')
        lines.append(f"conda activate {quote(environment.conda)} || "
                     f"fail {quote(f'conda activate {environment.conda} failed; see `conda env list`')}")
    if environment.venv:
        activate = os.path.join(environment.venv, "bin", "activate")
        lines.append(f". {quote(activate)} || fail {quote(f'{environment.venv} is no virtual environment')}")
    lines.extend(environment.setup)
    for name, value in environment.vars.items():
        lines.append(f"export {name}={quote_with_variables(str(value))}")
    return lines


def quote_with_variables(text):
    """Quoted for the shell, but with its $VARIABLES live: they mean the node's."""
    return '"' + re.sub(r'(["\\`]|\$(?![A-Za-z_{]))', r"\\\1", text) + '"' if "$" in text else quote(text)


# ═══════════════════════════════════════════════════════════════════════════════
# 9 · Wire
#
# Owns HTTP/1.1 over plain TCP: the one reader of messages, a client that keeps connections alive,
# and a small server. Malformed or silent peers become a WireError, never a hang or an endless buffer.
# Knows nothing of prompts, engines or retries; TLS belongs to the openai package.
# ═══════════════════════════════════════════════════════════════════════════════


class WireError(Exception):
    """The peer cannot be reached, fell silent, broke off, or does not speak HTTP."""


class Unreachable(WireError):
    """There is no connection: nothing was asked."""


MAX_HEAD_BYTES = 2**16
MAX_BODY_BYTES = 2**28


class Head(NamedTuple):
    """The head of a message, and what it says of the body and of the connection."""

    start: str
    headers: Dict[str, str]
    status: int  # 0 in a request
    chunked: bool
    length: Optional[int]  # None: up to the end of the connection
    closes: bool
    streams: bool  # the body is a stream of events


class Message(NamedTuple):
    """A whole HTTP request or response."""

    head: Head
    body: bytes

    @property
    def status(self):
        return self.head.status

    @property
    def headers(self):
        return self.head.headers

    @property
    def path(self):
        return self.head.start.split(" ")[1]

    def json(self):
        return json.loads(self.body)


NO_HEAD = Head("", {}, 0, False, 0, True, False)


@functools.lru_cache(maxsize=1024)
def parse_head(data, response):
    """Servers send the same few heads over and over: reading one is most of the work of reading a short answer."""
    start, *lines = data.decode("latin-1").split("\r\n")
    headers = {}
    for line in lines:
        name, colon, value = line.partition(":")
        if not colon or not name or name != name.strip():
            raise WireError(f"not a header: {line[:80]!r}")
        headers[name.lower()] = value.strip()
    if response and not (start.startswith("HTTP/1.") and start[9:12].isdigit()):
        raise WireError(f"not HTTP: {start[:80]!r}")
    text = headers.get("content-length")
    if text is not None and (not (text.isascii() and text.isdigit()) or int(text) > MAX_BODY_BYTES):
        raise WireError(f"content-length {text[:20]!r}")
    status = int(start[9:12]) if response else 0
    length = int(text) if text is not None else None if response and status not in (204, 304) else 0
    return Head(start, headers, status, headers.get("transfer-encoding", "").lower() == "chunked", length,
                headers.get("connection", "").lower() == "close",
                headers.get("content-type", "").startswith("text/event-stream"))


class MessageReader:
    """Takes bytes as they come; gives the message when it is whole. What comes after it stays in `rest`."""

    def __init__(self, response):
        self.response = response
        self.rest, self.head, self.body = b"", None, bytearray()

    def feed(self, data):
        while self.head is None:
            data = self.rest + data if self.rest else data
            self.rest = b""
            end = data.find(b"\r\n\r\n")
            if end > MAX_HEAD_BYTES or end < 0 and len(data) > MAX_HEAD_BYTES:
                raise WireError("the head of the message has no end")
            if end < 0:
                self.rest = data
                return None
            head, data = parse_head(data[:end], self.response), data[end + 4:]
            if head.length == len(data) and not head.chunked and head.status >= 200:  # as most answers come
                return Message(head, data)
            if head.status // 100 != 1:  # 100 Continue and its like stand before the real answer
                self.head = head
        if self.head.chunked:
            return self.feed_chunks(data)
        length = self.head.length
        if self.body or length is None or len(data) < length:
            self.body += data
            if len(self.body) > MAX_BODY_BYTES:
                raise WireError("the body is endless")
            if length is None or len(self.body) < length:
                return None
            data = bytes(self.body)
        return self.whole(data[:length], data[length:])

    def feed_chunks(self, data):
        self.rest += data
        while True:
            end = self.rest.find(b"\r\n")
            if end < 0:
                if len(self.rest) > 1024:
                    raise WireError("a chunk's size has no end")
                return None
            size_text = self.rest[:end].split(b";")[0].strip()
            if not re.fullmatch(rb"[0-9a-fA-F]{1,8}", size_text):
                raise WireError(f"not a chunk's size: {size_text[:20]!r}")
            size = int(size_text, 16)
            if len(self.body) + size > MAX_BODY_BYTES:
                raise WireError("the body is endless")
            if size == 0:
                return self.end_chunks(end)
            if len(self.rest) < end + 2 + size + 2:
                return None
            if self.rest[end + 2 + size:end + 4 + size] != b"\r\n":
                raise WireError("a chunk is longer than it says")
            self.body += self.rest[end + 2:end + 2 + size]
            self.rest = self.rest[end + 4 + size:]

    def end_chunks(self, end):
        trailer = self.rest.find(b"\r\n\r\n", end)
        if trailer >= 0:
            return self.whole(bytes(self.body), self.rest[trailer + 4:])
        if len(self.rest) > MAX_HEAD_BYTES:
            raise WireError("the trailer has no end")
        return None

    def ended(self):
        """The message that the end of the connection makes whole, if it does."""
        if self.head and self.head.length is None and not self.head.chunked:
            return self.whole(bytes(self.body), b"")
        return None

    def whole(self, body, rest):
        message = Message(self.head, body)
        self.head, self.rest = None, rest
        if self.body:
            self.body = bytearray()
        return message


class Connection(asyncio.Protocol):
    """One connection of a client; it carries one request at a time."""

    def __init__(self, client):
        self.client, self.reader = client, MessageReader(response=True)
        self.transport = self.request = self.then = None
        self.reused = self.heard = False
        self.deadline = self.limit = math.inf  # of the silence just now; of the whole request

    def connection_made(self, transport):
        self.transport = transport
        self.client.all.add(self)

    def expect(self, request, limit, then):
        self.request, self.then, self.heard, self.deadline, self.limit = request, then, False, limit, limit

    def data_received(self, data):
        self.heard = True
        if self.then is None:  # nobody asked
            self.transport.abort()
            return
        try:
            message = self.reader.feed(data)
        except WireError as error:
            self.fail(error)
            return
        if message:
            self.finish(message)
        else:
            self.deadline = min(self.limit, clock() + IDLE_TIMEOUT_S)

    def finish(self, message):
        then, self.then, self.deadline = self.then, None, math.inf
        if self.reader.rest or message.head.closes:
            self.transport.abort()
        else:
            self.reused = True
            self.client.idle.append(self)
        then(message)

    def fail(self, error):
        """End; the request goes to another connection where the server closed one that rested, and to nobody else."""
        then, self.then = self.then, None
        self.transport.abort()
        if then and self.reused and not self.heard and not self.client.closed and clock() < self.limit:
            self.client.send(self.request, self.limit, functools.partial(after_sent, then))
        elif then:
            then(error)

    def eof_received(self):
        message = self.reader.ended() if self.then else None
        if message:
            self.finish(message)

    def connection_lost(self, error):
        self.client.all.discard(self)
        if self in self.client.idle:
            self.client.idle.remove(self)
        self.fail(WireError(f"the connection broke: {error or 'closed by the server'}"))


def after_sent(then, outcome):
    """A request that a server may have read already, and have ended of: no connection now says nothing of that."""
    then(WireError(str(outcome)) if isinstance(outcome, Unreachable) else outcome)


CONNECT_TIMEOUT_S = 10.0
IDLE_TIMEOUT_S = 300.0  # in the middle of an answer; its first byte may take as long as the request may


class Client:
    """Talks to one server and keeps its connections for the next request."""

    def __init__(self, host, port, key=""):
        self.host, self.port = host, port
        self.idle, self.all, self.openings = [], set(), set()
        self.outbox = []  # connections with a request to send at the end of this turn of the loop
        self.closed = False
        authority = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        self.common = f" HTTP/1.1\r\nHost: {authority}\r\n" + (f"Authorization: Bearer {key}\r\n" if key else "")
        self.heads = {}  # (method, path) → the beginning of such a request
        self.sweeping = None

    async def request(self, method, path, body=b"", timeout_s=60.0):
        """The answer to one request; WireError when there is none within the time."""
        answer = asyncio.get_running_loop().create_future()
        self.ask(method, path, body, clock() + timeout_s, lambda outcome: answer.done() or answer.set_result(outcome))
        outcome = await answer
        if isinstance(outcome, WireError):
            raise outcome
        return outcome

    def ask(self, method, path, body, limit, then):
        """Send a request that may take until `limit`; `then` is called once, with its Message or a WireError."""
        head = self.heads.get((method, path))
        if head is None:
            head = f"{method} {path}{self.common}Content-Type: application/json\r\nContent-Length: ".encode()
            self.heads[method, path] = head
        self.send(b"%b%d\r\n\r\n%b" % (head, len(body), body), limit, then)

    def send(self, request, limit, then):
        """To a connection that rests, or over a new one."""
        while self.idle:
            connection = self.idle.pop()
            if not connection.transport.is_closing():
                self.post(connection, request, limit, then)
                return
        opening = asyncio.ensure_future(self.open(request, limit, then))
        self.openings.add(opening)
        opening.add_done_callback(self.openings.discard)

    def post(self, connection, request, limit, then):
        """Requests leave together at the end of the loop's turn: sent one by one, each would have to wake a
        server that had just gone to sleep (15 % slower, measured against nginx on another core)."""
        connection.expect(request, limit, then)
        if not self.outbox:
            asyncio.get_running_loop().call_soon(self.flush)
        self.outbox.append(connection)

    def flush(self):
        outbox, self.outbox = self.outbox, []
        for connection in outbox:
            connection.transport.write(connection.request)

    async def open(self, request, limit, then):
        """Send it over a new connection."""
        loop = asyncio.get_running_loop()
        opening = loop.create_connection(lambda: Connection(self), self.host, self.port)
        try:
            _, connection = await within(CONNECT_TIMEOUT_S, opening)
        except (OSError, ValueError, OverflowError, asyncio.TimeoutError) as error:
            return then(Unreachable(f"cannot connect to {self.host} port {self.port}: {error or 'no answer'}"))
        if self.closed:
            connection.transport.abort()
        if connection.transport.is_closing():  # no end of it will be told any more
            return then(WireError("the connection broke: closed as soon as it was open"))
        if self.sweeping is None:
            self.sweeping = loop.call_later(1.0, self.sweep)
        self.post(connection, request, limit, then)

    def give_up(self, then):
        """The time of the request with this `then` is over."""
        for connection in self.all:
            if connection.then is then:
                connection.deadline = connection.limit = -math.inf

    def sweep(self):
        """One timer for all connections: a timer for each request would cost more than the request."""
        now = clock()
        for connection in list(self.all):
            if connection.deadline < now:
                connection.fail(WireError("no answer within the time allowed"))
        self.sweeping = asyncio.get_running_loop().call_later(1.0, self.sweep) if self.all else None

    def close(self):
        """Close every connection at once; requests under way end with a WireError."""
        self.closed = True
        for connection in self.all:
            connection.transport.abort()
        self.idle = []
        if self.sweeping:
            self.sweeping.cancel()
            self.sweeping = None


class ServerConnection(asyncio.Protocol):
    """One connection of a server: its requests are answered in turn."""

    def __init__(self, answer):
        self.answer, self.reader = answer, MessageReader(response=False)
        self.requests, self.task, self.transport = collections.deque(), None, None

    def connection_made(self, transport):
        self.transport = transport

    def data_received(self, data):
        try:
            message = self.reader.feed(data)
            while message:
                self.requests.append(message)
                message = self.reader.feed(b"")
        except WireError as error:
            self.transport.write(http_response(400, {"error": {"message": str(error), "code": 400}}))
            self.transport.close()
            return
        if self.requests and not self.task:
            self.task = asyncio.ensure_future(self.work())

    async def work(self):
        while self.requests:
            request = self.requests.popleft()
            try:
                response = await self.answer(request)
            except Exception as error:  # one bad request must not end the connection's answers
                response = http_response(500, {"error": {"message": f"{type(error).__name__}: {error}", "code": 500}})
            self.transport.write(response)
        self.task = None

    def connection_lost(self, error):
        if self.task:
            self.task.cancel()


HTTP_WORDS = {200: "OK", 400: "Bad Request", 401: "Unauthorized", 404: "Not Found", 503: "Service Unavailable"}


def http_response(status, value):
    body = json.dumps(value).encode()
    return (f"HTTP/1.1 {status} {HTTP_WORDS.get(status, 'Status')}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n").encode() + body


async def serve_http(host, port, answer):
    """A server on that address; `answer(request)` is a coroutine that gives the response's bytes."""
    return await asyncio.get_running_loop().create_server(lambda: ServerConnection(answer), host, port)


# ═══════════════════════════════════════════════════════════════════════════════
# 11 · Nodes
#
# Owns the agent, one on every node, and the driver's view of it: starting, watching and stopping
# processes, ports and the addresses by which nodes reach each other. They talk in JSON lines over
# the agent's stdin and stdout, which Slurm already connects. Knows nothing of engines or prompts.
# ═══════════════════════════════════════════════════════════════════════════════

BEAT_S = 2.0  # each side tells the other that it lives
SILENT_NODE_S = 30.0  # one stall of a shared file system must not end a long load
LOST_DRIVER_S = 180.0  # an agent that hears nothing so long, not even an end, stops everything
STILL_DRIVER_S = 30.0  # three times as long as a driver's beat in the claims may take
STALL_S = 10.0  # a sleep that took so much longer says that we stood still ourselves: suspended, or a stalled disk
KILLED_S = 10.0  # what has not ended so long after KILL may never do
TERM_WAIT_S = 3.0  # an agent told to end by Slurm waits so long for the driver's order
LINE_LIMIT = 2**20
PR_SET_PDEATHSIG = 1
SIOCGIFADDR = 0x8915


def die_with_parent():
    """Runs in a new process: the kernel kills it when its agent dies, whatever Slurm does."""
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


LIBC = ctypes.CDLL(None)


def node_addresses(interface):
    """This host's IPv4 addresses that others may reach, the named interface's alone if one is named."""
    request = {}
    for _, name in socket.if_nameindex():
        with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            packed = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            request[name] = socket.inet_ntoa(packed[20:24])
    if interface:
        return [request[interface]] if interface in request else []
    return [address for address in request.values() if not address.startswith("127.")]


def machine_identity():
    """Equal on two agents that share one network stack, as nodes simulated on one machine do."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/net")
    return socket.gethostname()


def free_port(ports):
    """A listening socket on a port of the range "20000-20100", or on any free one."""
    first, _, last = ports.partition("-")
    wanted = range(int(first), int(last or first) + 1) if ports else [0]
    for port in random.sample(wanted, len(wanted)):  # two runs on one node should not always try the same
        with contextlib.suppress(OSError):
            return listen_on(port)
    raise OSError(errno.EADDRINUSE, f"no free port in {ports}" if len(wanted) > 1 else f"port {ports} is in use")


def listen_on(port):
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("", port))
        listener.listen(16)
    except OSError:
        listener.close()
        raise
    return listener


class Listener(NamedTuple):
    """A socket that listens, as /proc/net tells it."""

    uid: int
    inode: str


def listeners_on(address, port):
    """The sockets that a connection to this IPv4 address and port can reach: bound to it, or else to any address."""
    packed = socket.inet_aton(address)
    own = {f"{int.from_bytes(packed, sys.byteorder):08X}",  # the kernel writes whole words in the machine's order
           f"0000000000000000{int.from_bytes(bytes((0, 0, 255, 255)), sys.byteorder):08X}"
           f"{int.from_bytes(packed, sys.byteorder):08X}"}
    found = {True: [], False: []}
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(OSError):
            for line in Path(table).read_text().splitlines()[1:]:
                fields = line.split()
                host, _, number = fields[1].partition(":")
                if fields[3] == "0A" and int(number, 16) == port and (host in own or not host.strip("0")):
                    found[host in own].append(Listener(int(fields[7]), fields[9]))
    return found[True] or found[False]


def sockets_of(leader):
    """The inodes of all sockets of a process that leads a session, and of its session and descendants; None where
    /proc does not show them."""
    parents, members = {}, {leader}
    for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
        with contextlib.suppress(OSError, IndexError):
            _, parent, _, session = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:4]
            parents[pid] = int(parent)
            members.update({pid} if int(session) == leader else ())
    while True:
        more = {pid for pid, parent in parents.items() if parent in members} - members
        if not more:
            break
        members |= more
    try:
        links = [os.readlink(f"/proc/{pid}/fd/{fd}") for pid in members for fd in open_files(pid)]
    except PermissionError:
        return None
    return {link[len("socket:["):-1] for link in links if link.startswith("socket:[")}


def open_files(pid):
    try:
        return os.listdir(f"/proc/{pid}/fd")
    except FileNotFoundError:  # it has just ended
        return []


async def first_reachable(addresses, port, nonce, timeout_s):
    """The first of these addresses behind which the nonce's owner answers, or "" when none does."""
    async def attempt(number, address):
        await asyncio.sleep(number * 0.05)  # an earlier address is the better one: it gets a head start
        reader, writer = await asyncio.open_connection(address, port)
        try:
            if await reader.readexactly(len(nonce)) != nonce.encode():
                raise OSError("somebody else answers there")
            return address
        finally:
            writer.close()

    attempts = [asyncio.ensure_future(attempt(*item)) for item in enumerate(addresses)]
    try:
        for done in asyncio.as_completed(attempts, timeout=timeout_s):
            with contextlib.suppress(OSError, EOFError, asyncio.TimeoutError):
                return await done
        return ""
    finally:
        for attempt_task in attempts:
            attempt_task.cancel()
        await asyncio.gather(*attempts, return_exceptions=True)


class Agent:
    """One node's end: does what the driver says, and leaves nothing running behind it."""

    def __init__(self, name):
        self.name = name
        self.processes = {}  # name → its Popen, a future of its return code, the Process, and where its log began
        self.exits = {}  # pid → a future of its return code
        self.probes = {}  # nonce → a listening server
        self.last_heard = clock()
        self.ending = asyncio.get_running_loop().create_future()
        self.term_end = None
        self.orphaned = False

    async def serve(self):
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGCHLD, self.reap)
        loop.add_signal_handler(signal.SIGTERM, self.on_term)
        for ignored in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(ignored, signal.SIG_IGN)
        lines = asyncio.StreamReader(limit=LINE_LIMIT)
        await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
        self.send(hello=self.facts())
        tasks = [asyncio.ensure_future(work) for work in (self.listen(lines), self.beat())]
        await self.ending
        for task in tasks:
            task.cancel()
        self.kill_all()
        if self.orphaned and await self.driver_is_gone(os.environ.get("LLMRUN_REQUEUE", "")):
            # The driver's node is gone, and Slurm may take many minutes to see that. The first agent to ask is heard.
            Slurm(os.environ).requeue(os.environ["SLURM_JOB_ID"])

    async def driver_is_gone(self, beat_file):
        """Whether the driver's own life is over, though nobody ended the run: its beat, a file in the run's claims that
        is named where the run may be requeued, is there and stands still."""
        if not beat_file:
            return False
        run, beat_file = Run(Path(beat_file).parent.parent), Path(beat_file)
        try:
            beat = beat_file.read_bytes()
            if beat == Run.ENDED_BEAT or run.stop_file.exists():
                return False
            await asyncio.sleep(STILL_DRIVER_S)
            return beat_file.read_bytes() == beat and not run.stop_file.exists()
        except OSError:  # who cannot see the run's folder cannot know
            return False

    def facts(self):
        cpus = len(os.sched_getaffinity(0))
        granted = os.environ.get("SLURM_CPUS_ON_NODE", "")
        return {"node": self.name, "pid": os.getpid(), "machine": machine_identity(), "host": socket.gethostname(),
                "cpus": min(cpus, int(granted)) if granted.isdigit() else cpus, "python": sys.version.split()[0]}

    def end(self):
        if not self.ending.done():
            self.ending.set_result(None)

    def send(self, **message):
        try:
            os.write(1, json.dumps(message).encode() + b"\n")
        except OSError:
            self.end()  # nobody listens any more

    async def listen(self, lines):
        while True:
            line = await lines.readline()
            if not line:
                return self.end()
            self.last_heard = clock()
            order = json.loads(line)
            if order["do"] != "beat":
                asyncio.ensure_future(self.obey(order))

    async def beat(self):
        while clock() - self.last_heard < LOST_DRIVER_S:
            self.send(beat=1)
            if await stalled(BEAT_S):
                self.last_heard = clock()
        self.orphaned = True
        self.end()

    async def obey(self, order):
        """Do one order and send its answer; what goes wrong is the answer too."""
        number, method = order.pop("id"), order.pop("do")
        try:
            answer = await getattr(self, f"order_{method}")(**order)
            self.send(re=number, ok=answer)
        except OSError as error:
            self.send(re=number, errno=error.errno or 0, error=os_reason(error))
        except Exception as error:  # a fault of ours must reach the driver, not vanish in a task
            self.send(re=number, errno=0, error=f"{type(error).__name__}: {error}")

    def on_term(self):
        """Slurm wants this node: the driver decides, or the clock does."""
        self.send(term=1)
        if self.term_end is None:
            self.term_end = asyncio.get_running_loop().call_later(TERM_WAIT_S, self.end)

    def reap(self):
        for pid, done in list(self.exits.items()):
            with contextlib.suppress(ChildProcessError):
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    del self.exits[pid]
                    done.set_result(-os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status))

    def launch(self, argv, env, output):
        """Start a program in its own process group; a future of its return code comes with it."""
        process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=env,
                                   start_new_session=True, preexec_fn=die_with_parent)
        self.exits[process.pid] = done = asyncio.get_running_loop().create_future()
        return process, done

    async def order_find(self, names):
        """The first of these that is a program here, by its path or on the PATH; "" if none is."""
        paths = [name if os.path.isabs(name) else shutil.which(name) for name in names]
        return next((path for path in paths if path and os.path.isfile(path)), "")

    async def order_run(self, argv, timeout_s, without=()):
        """Run a short command to its end: its code and what it printed."""
        env = {name: value for name, value in os.environ.items() if not name.startswith(tuple(without))}
        with tempfile.TemporaryFile() as output:
            process, done = self.launch(argv, env, output)
            try:
                code = await within(timeout_s, asyncio.shield(done))
            except asyncio.TimeoutError:
                kill_group(process.pid, signal.SIGKILL)
                code = await killed(argv[0], process.pid, done)
            output.seek(0)
            return {"code": code, "out": output.read(LINE_LIMIT // 4).decode("utf-8", "replace")}

    async def order_start(self, process):
        """Start a process of the run; its end is reported whenever it comes."""
        process = Process(**process)
        env = {name: value for name, value in os.environ.items() if not name.startswith(tuple(process.without))}
        env.update(process.env)
        for name, value in process.node_env.items():
            env[name] = os.path.expandvars(value)
            if "$" in env[name]:
                raise OSError(errno.ENOENT, f"{value} is not set on this node")
        with open(process.log, "ab") as output:
            since = output.tell()  # an earlier start's words are not this one's
            started, done = self.launch(process.argv, env, output)
        self.processes[process.name] = (started, done, process, since)
        asyncio.ensure_future(self.watch(started, done, process, since))
        return {"pid": started.pid}

    async def watch(self, started, done, process, since):
        """Tell the lines that matter while it runs, and how it ended."""
        pattern, at = process.progress and re.compile(process.progress), since
        with contextlib.suppress(OSError), open(process.log, "rb") as lines:  # a log that cannot be read hides no end
            while pattern and not done.done():
                await asyncio.wait([done], timeout=0.3)
                lines.seek(at)
                new = lines.read(65536)
                whole = new[:new.rfind(b"\n") + 1]
                at += len(whole)
                for line in whole.decode("utf-8", "replace").splitlines():
                    if pattern.search(line):
                        self.send(line=line.strip()[:400], name=process.name)
        code = await done
        kill_group(started.pid, signal.SIGKILL)  # what it left behind
        self.processes.pop(process.name, None)
        self.send(exit=process.name, code=code, tail=log_tail(process.log, since))

    async def order_stop(self, name):
        """TERM, once more for those that wait for their clients, then KILL."""
        if name not in self.processes:
            return None
        started, done, process, _ = self.processes[name]
        for sent in (signal.SIGTERM, signal.SIGTERM, signal.SIGKILL):
            kill_group(started.pid, sent)
            with contextlib.suppress(asyncio.TimeoutError):
                return await within(process.grace_s / 2, asyncio.shield(done))
        return await killed(process.name, started.pid, done)

    async def order_probe(self, ports, nonce, interface):
        """Hold a port and answer on it with the nonce, until it is released for its process."""
        listener = free_port(ports)

        async def answer(reader, writer):
            writer.write(nonce.encode())
            await reader.read()  # the other side closes first, so that no port is left in TIME_WAIT here
            writer.close()
        self.probes[nonce] = await asyncio.start_server(answer, sock=listener)
        return {"port": listener.getsockname()[1], "addresses": node_addresses(interface)}

    async def order_release(self, nonce):
        self.probes.pop(nonce).close()

    async def order_reach(self, addresses, port, nonce, timeout_s):
        return await first_reachable(addresses, port, nonce, timeout_s)

    async def order_said(self, name, pattern):
        """Whether a process has written a line with this pattern to its log since it was started."""
        if name not in self.processes:
            return False
        _, _, process, since = self.processes[name]
        with open(process.log, "rb") as lines:
            lines.seek(since)
            return bool(re.search(pattern, lines.read(2**22).decode("utf-8", "replace"), re.MULTILINE))

    async def order_connect(self, host, port):
        """Whether something listens there."""
        try:
            _, writer = await asyncio.open_connection(host, port)
        except OSError:
            return False
        writer.close()
        return True

    async def order_owns(self, name, address, port):
        """Whether all that listens there is of a process of ours: on a shared node another user's may be quicker."""
        listeners = listeners_on(address, port)
        if name not in self.processes or not listeners:
            return False
        ours = sockets_of(self.processes[name][0].pid)
        if ours is None:
            return all(listener.uid == os.getuid() for listener in listeners)
        return all(listener.inode in ours for listener in listeners)

    async def order_gpus(self):
        """Free MiB of each GPU this job may use; nothing where nvidia-smi is not at hand."""
        tool = shutil.which("nvidia-smi")
        if not tool:
            return []
        answer = await self.order_run([tool, "--query-gpu=memory.free", "--format=csv,noheader,nounits"], 20)
        return [int(line) for line in answer["out"].split() if line.isdigit()]

    async def order_hold(self, seconds):
        """The driver needs longer than the agent would wait after TERM."""
        if self.term_end:
            self.term_end.cancel()
            self.term_end = asyncio.get_running_loop().call_later(seconds, self.end)

    async def order_end(self):
        asyncio.get_running_loop().call_soon(self.end)  # after the answer

    def kill_all(self):
        for started, *_ in self.processes.values():
            kill_group(started.pid, signal.SIGKILL)


async def killed(name, pid, done):
    """The return code of a process that was sent KILL; an error where it hangs in a driver or a file system."""
    try:
        return await within(KILLED_S, asyncio.shield(done))
    except asyncio.TimeoutError:
        raise OSError(errno.EBUSY, f"{name} (process {pid}) survives KILL: it hangs in a GPU's driver or a file system")


def kill_group(pid, signal_number):
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal_number)


async def stalled(time_s):
    """Sleep, and say whether it took so long that nobody's silence in that time means anything."""
    began = clock()
    await asyncio.sleep(time_s)
    return clock() - began > time_s + STALL_S


class Exit(NamedTuple):
    """How a process ended; `code` is None when its node was lost."""

    process: str
    node: str
    code: Optional[int]
    tail: List[str]

    def __str__(self):
        return f"{self.process} on {self.node} {self.how}"

    @property
    def how(self):
        if self.code is None:
            return "was lost with its node"
        return f"was killed by {signal_name(-self.code)}" if self.code < 0 else f"ended with code {self.code}"


class NodeLost(ClusterError):
    """A node no longer answers."""


class NodeRefusal(ClusterError):
    """A node could not do what was asked; `errno` says why."""

    def __init__(self, where, what, number):
        super().__init__(where, what)
        self.errno = number


class Node:
    """The driver's view of one node: asks its agent, and hears from it."""

    def __init__(self, name, command, env, log_path, tell, join_timeout_s):
        self.name, self.command, self.env, self.log_path, self.tell = name, command, env, log_path, tell
        self.join_timeout_s = join_timeout_s
        loop = asyncio.get_running_loop()
        self.facts, self.lost = loop.create_future(), loop.create_future()
        self.asked, self.exits, self.numbers = {}, {}, itertools.count(1)
        self.last_heard = clock()
        self.channel = self.tasks = None
        self.closing = False

    async def open(self):
        with open(self.log_path, "ab") as output:
            self.channel = await asyncio.create_subprocess_exec(
                *self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=output, env=self.env,
                limit=LINE_LIMIT, start_new_session=True)
        self.tasks = [asyncio.ensure_future(self.listen()), asyncio.ensure_future(self.beat())]

    async def listen(self):
        while True:
            line = await self.channel.stdout.readline()
            if not line:
                break
            self.last_heard = clock()
            try:
                self.take(json.loads(line))
            except (ValueError, TypeError, KeyError):  # a site's TaskProlog speaks, say
                log(f"{self.name}: {line.decode('utf-8', 'replace').strip()}")
        self.lose("its agent ended")

    def take(self, message):
        if "re" in message:
            answer = self.asked.pop(message["re"], None)
            if answer and not answer.done():
                if "error" in message:
                    answer.set_exception(NodeRefusal(self.name, message["error"], message["errno"]))
                else:
                    answer.set_result(message["ok"])
        elif "exit" in message:
            ended = self.exits[message["exit"]]
            if not ended.done():
                ended.set_result(Exit(message["exit"], self.name, message["code"], message["tail"]))
        elif "hello" in message and not self.facts.done():
            self.facts.set_result(message["hello"])
        elif "term" in message:
            self.tell("term", node=self.name)
        elif "line" in message:
            self.tell("engine_says", node=self.name, process=message["name"], line=message["line"])

    async def beat(self):
        while clock() - self.last_heard < self.patience_s:
            self.write({"do": "beat"})
            if await stalled(BEAT_S):
                self.last_heard = clock()
        self.lose(f"silent for {show_duration(self.patience_s)}")

    @property
    def patience_s(self):
        return SILENT_NODE_S if self.facts.done() else self.join_timeout_s

    def write(self, message):
        with contextlib.suppress(ConnectionError, RuntimeError):
            self.channel.stdin.write(json.dumps(message).encode() + b"\n")

    def lose(self, why):
        """The node is gone, and with it all that ran there."""
        if self.lost.done():
            return
        self.lost.set_result(why)
        self.dismiss()
        if not self.closing:
            said = log_tail(self.log_path)
            self.tell("node_lost", node=self.name, why=why, **({"said": said[-1]} if said else {}))
        error = NodeLost(self.name, f"the node was lost: {why}", f"see {self.log_path}")
        for answer in [self.facts] + list(self.asked.values()):
            if not answer.done():
                answer.set_exception(error)
                answer.exception()  # nobody may be waiting for this one
        for name, ended in self.exits.items():
            if not ended.done():
                ended.set_result(Exit(name, self.name, None, []))

    def dismiss(self):
        """Tell the agent to end, by an order and by the end of its pipe, whenever it hears of it: one that joins too
        late, or comes back, must not wait for a driver that has given it up."""
        if self.channel:
            self.write({"id": next(self.numbers), "do": "end"})
            self.channel.stdin.close()

    async def ask(self, order, **details):
        """Give an order and wait for its answer."""
        if self.lost.done():
            raise NodeLost(self.name, f"the node was lost: {self.lost.result()}", f"see {self.log_path}")
        number = next(self.numbers)
        self.asked[number] = answer = asyncio.get_running_loop().create_future()
        self.write({"id": number, "do": order, **details})
        return await answer

    def hold(self, seconds):
        """An agent that Slurm told to end: give the driver so long."""
        self.write({"id": next(self.numbers), "do": "hold", "seconds": seconds})

    async def start(self, process):
        """Start a process; a future of its Exit."""
        self.exits[process.name] = ended = asyncio.get_running_loop().create_future()
        await self.ask("start", process=dataclasses.asdict(process))
        return ended

    async def close(self):
        """Let the agent end, and go on without it if it does not."""
        self.closing = True
        self.dismiss()
        try:
            await within(0 if self.lost.done() else 5, self.channel.wait())
        except asyncio.TimeoutError:
            self.channel.kill()
            await self.channel.wait()
        for task in self.tasks:
            task.cancel()
        self.lose("stopped")


@contextlib.asynccontextmanager
async def agents(names, command, env, log_of, tell, join_timeout_s=120.0, enough=None):
    """An agent on each node, as `Node`s; on the way out they end, and all that they started.

    `command(name)` is the argv that starts one. At least `enough` of them must come up, else all: a node that does
    not join is named, and left out where the others can do without it."""
    nodes = [Node(name, command(name), env, log_of(name), tell, join_timeout_s) for name in names]
    opened = []
    try:
        for node in nodes:
            await node.open()
            opened.append(node)
        await asyncio.wait([node.facts for node in nodes])
        joined = [node for node in nodes if not node.facts.exception()]
        if len(joined) < (len(names) if enough is None else enough):
            missing = [node for node in nodes if node not in joined]
            said = log_tail(missing[0].log_path)
            raise NodeLost(", ".join(node.name for node in missing),
                           f"no agent came up: {said[-1] if said else 'nothing was said'}",
                           f"see {missing[0].log_path}; can the nodes see this folder and its Python?")
        yield joined
    finally:
        await asyncio.gather(*(node.close() for node in opened))


@contextlib.asynccontextmanager
async def open_way(target, probers, ports, interface, what):
    """A port on `target` that all `probers` reach: its host address and the port. It is held, so that nothing else is
    given it, and free in the end for what starts there.

    Nodes that share one network stack meet on loopback, where nobody else comes by."""
    nonce = secrets.token_hex(8)
    probe = await target.ask("probe", ports=ports, nonce=nonce, interface=interface)
    try:
        addresses, port = probe["addresses"], probe["port"]
        machine = target.facts.result()["machine"]
        if all(prober.facts.result()["machine"] == machine for prober in probers) and not interface:
            addresses = ["127.0.0.1"]
        yield await common_address(target, probers, addresses, port, nonce, what), port
    finally:
        await target.ask("release", nonce=nonce)


async def common_address(target, probers, addresses, port, nonce, what):
    """That by which all of them reach a node: what each finds first or, where they differ, one of these."""
    async def reach(some):
        return await first_failure(*[prober.ask("reach", addresses=some, port=port, nonce=nonce, timeout_s=5)
                                     for prober in probers])
    found = await reach(addresses) if probers else addresses[:1]
    for address in filter(None, dict.fromkeys(found)):
        if len(set(found)) == 1 or all(await reach([address])):
            return address
    cut_off = [prober for prober, address in zip(probers, found) if not address] or probers or [target]
    raise ClusterError("", f"{cut_off[0].name} cannot reach {what} on {target.name}, port {port} "
                       f"({', '.join(addresses) or 'it has no address on the interface'})",
                       "is a firewall between the nodes? Set [network] ports to a range that is open, "
                       "or [network] interface")


def agent_command(python, run_folder, node, slurm_job="", gpus="", overlap=False):
    """The argv that starts the agent of a node: through srun, or right here."""
    agent = [python, "-S", "-I", *frozen_command(run_folder, "agent", node)]
    if not slurm_job:
        return agent
    step = ["srun", "-N1", "-n1", "-w", node, "--ntasks-per-node=1", "--mem=0", "--kill-on-bad-exit=0", "--wait=0",
            "--no-kill", "--export=ALL", "--mpi=none", "-J", "agent"]
    return step + [f"--gres=gpu:{gpus}"] * bool(gpus) + ["--overlap"] * overlap + agent


# ═══════════════════════════════════════════════════════════════════════════════
# 12 · Programs
#
# Owns a program on a group of nodes as one thing, be it an engine or a service: the ways to its ports, the order of
# its start, when it is ready, its watch, its recovery and its end. Knows no program by name, nor what it is for.
# ═══════════════════════════════════════════════════════════════════════════════

DRIVER, HEAD, GROUP = "driver", "head", "group"  # of its group: who must reach a port


class Port(NamedTuple):
    """A port that a program opens on a node."""

    reached_by: str
    what: str  # that listens there, in words
    wanted: str = ""  # a number or a range; "" is any
    wish: bool = False  # another one will do: nobody outside needs to know it


class Way(NamedTuple):
    """Where a port is reached by those who must reach it."""

    address: str
    port: int

    def __str__(self):
        return f"[{self.address}]:{self.port}" if ":" in self.address else f"{self.address}:{self.port}"


class Placed(NamedTuple):
    """A node of a group, with what was found there and the ways to the program's ports on it."""

    rank: int  # 0 is the head
    node: Node
    facts: Dict[str, Any]  # what the program's probe found
    ways: Dict[str, Way]
    devices: Tuple[int, ...]  # free MiB of each GPU, where the program asked for it


class Part(NamedTuple):
    """One process of a program. When it is ready, what stands in the next step may start: when it takes connections on
    all ports that it opens, which are then proven to be its own, and `ready` says so."""

    placed: Placed
    process: Process
    opens: Tuple[str, ...] = ()  # names of ports
    ready: Optional[Callable] = None  # one of those below, or an async function of (group, part)
    patience_s: float = 60.0
    mend: str = ""  # where that was too short


class Answers(NamedTuple):
    """Ready when it answers the driver, who does not know yet who it is and so gives no key."""

    port: str
    path: str = "/health"
    status: int = 200

    async def __call__(self, group, part):
        return (await look(group.stranger(part.placed.ways[self.port]), self.path)).status == self.status


class Says(NamedTuple):
    """Ready when its log has a line with this pattern."""

    pattern: str

    async def __call__(self, group, part):
        return await part.placed.node.ask("said", name=part.process.name, pattern=self.pattern)


async def look(client, path, timeout_s=30.0):
    """What a server answers; nothing, with status 0, if it does not."""
    try:
        return await client.request("GET", path, timeout_s=timeout_s)
    except WireError:
        return Message(NO_HEAD, b"")


class ProgramFailed(ClusterError):
    """A program did not start, or ended while it was needed."""

    killed = False  # by somebody else: that may not come again

    @property
    def port_taken(self):
        """Whether another program has its port: another port is free, maybe."""
        return "by another program" in self.what


class Program:
    """What all programs have in common: what they need on the nodes of a group, and what they do there."""

    name = ""
    kind = "program"  # as events call it
    failures = ()  # its own, as in COMMON_FAILURES, and before them
    named_by = ""  # the key of the config that names its binary
    free_ports = "choose other ports"  # how the user comes by some

    def __init__(self, config, run, life, group_size):
        self.config, self.run, self.life, self.group_size = config, run, life, group_size

    @classmethod
    def check(cls, config):
        """Raise UserError where the config cannot work, as far as the login node knows."""

    def foreseen(self):
        """What `probe` will most likely find, for a look at the command lines before there are nodes."""
        return {}

    def ports(self, rank):
        """{name: Port} of what it opens on a node."""
        return {}

    async def probe(self, node, rank):
        """What is installed on a node; raises ProgramFailed where something is missing."""
        return {}

    def wants_devices(self, head_facts):
        """Whether it must know the free memory of the GPUs."""
        return False

    def steps(self, group):
        """Its parts on these Placed nodes, as a list of steps: what stands in one step starts together."""
        raise NotImplementedError

    async def better(self, error, node):
        """An error of it on a node, with a better mend where one is known."""
        return error


class Running(NamedTuple):
    """A process that was started."""

    what: str  # it is to the user, on whatever node
    node: Node
    process: Process
    ended: Any  # a future of its Exit

    @property
    def title(self):
        return f"{self.what} on {self.node.name}"


class Group:
    """A program on its nodes: its start, its watch, its end. It starts, fails and is restarted as one."""

    STARTS = 3  # a port that was free may be taken before the program has it
    RESTARTS, WITHIN_S = 3, 600.0  # a program that dies more often has a reason that stays

    def __init__(self, number, program, nodes, tell):
        self.number, self.program, self.nodes, self.tell = number, program, nodes, tell
        self.placed, self.running = [], []  # the second in the order of their start
        self.names = {}  # address:port → the node behind it
        self.strangers = {}  # way → a client without a key
        self.deaths = []  # when it died, of late

    async def start(self):
        """Bring it up to its first ready moment."""
        for attempt in range(self.STARTS):
            try:
                await self.start_once()
                break
            except ProgramFailed as error:
                if not error.port_taken or self.has_fixed_port or attempt == self.STARTS - 1:
                    raise
                self.tell("port_replaced", why=str(error))
                await self.stop()

    @property
    def has_fixed_port(self):
        ports = [port for rank in range(len(self.nodes)) for port in self.program.ports(rank).values()]
        return any(port.wanted.isdigit() and not port.wish for port in ports)

    async def start_once(self):
        self.placed = await self.place()
        self.names = {str(way): placed.node.name for placed in self.placed for way in placed.ways.values()}
        for step in self.program.steps(self.placed):
            await first_failure(*map(self.start_part, step))
        self.forget_strangers()

    async def recover(self, error, restarts=RESTARTS, worked=False):
        """Start it again after it died, or raise the error if it dies again and again. One that was of no use since
        its last death has not made good for it, however long it took to start or was waited for."""
        if worked:
            self.deaths = [death for death in self.deaths if clock() - death < self.WITHIN_S]
        while True:
            self.deaths.append(clock())
            self.tell(f"{self.program.kind}_died", replica=self.number, why=str(error), times=len(self.deaths))
            if len(self.deaths) > restarts:
                raise error
            await self.stop()
            await asyncio.sleep(4 ** (len(self.deaths) - 1) - 1)
            try:
                return await self.start()
            except ProgramFailed as failed:
                error = failed

    def forgive(self):
        """Its last deaths were not its own doing, and will not come again."""
        self.deaths.clear()

    async def place(self):
        """Ask the nodes what is installed, and find the ways by which its ports are reached, all of them held until
        the last is found."""
        program, count = self.program, len(self.nodes)
        wanted = [(rank, name, port) for rank in range(count) for name, port in program.ports(rank).items()]
        async with contextlib.AsyncExitStack() as held:
            answers = await first_failure(*[program.probe(node, rank) for rank, node in enumerate(self.nodes)],
                                          *[self.find_way(held, rank, port) for rank, _, port in wanted])
        facts, devices, ways = answers[:count], [()] * count, [{} for _ in self.nodes]
        for (rank, name, _), way in zip(wanted, answers[count:]):
            ways[rank][name] = way
        if program.wants_devices(facts[0]):
            devices = await first_failure(*[node.ask("gpus") for node in self.nodes])
        return [Placed(rank, self.nodes[rank], facts[rank], ways[rank], tuple(devices[rank])) for rank in range(count)]

    async def find_way(self, held, rank, port):
        """The way to a port; where the wanted one is taken and but a wish, to another."""
        node, network = self.nodes[rank], self.program.config.network
        probers = {DRIVER: [Here()], HEAD: self.nodes[:1], GROUP: self.nodes}[port.reached_by]

        async def find(ports):
            others = [prober for prober in probers if prober is not node]
            return Way(*await held.enter_async_context(open_way(node, others, ports, network.interface, port.what)))
        try:
            try:
                return await find(port.wanted or network.ports)
            except NodeRefusal as refused:
                if not port.wish:
                    raise
                self.tell("port_replaced", node=node.name, port=port.wanted,
                          why=f"{refused.what}: another one is taken")
                return await find(network.ports)
        except NodeRefusal as refused:
            raise ProgramFailed(node.name, refused.what, self.program.free_ports + ", or widen [network] ports")

    async def start_part(self, part):
        """Start a process, wait until it is ready, and go on only if what answers on its ports is this process."""
        node, what = part.placed.node, part.process.name
        part = part._replace(process=self.named(part))
        try:
            one = Running(what, node, part.process, await node.start(part.process))
        except NodeRefusal as refused:
            raise ProgramFailed(node.name, f"{part.process.argv[0]} cannot be started: {refused.what}",
                                exec_mend(self.program, refused.errno))
        self.running.append(one)
        self.on_start(one, part)
        ways = [part.placed.ways[name] for name in part.opens]
        await self.unless_failed(wait_until(f"{one.title} to be ready", lambda: self.is_ready(part, ways),
                                            part.patience_s, f"{part.mend}see {part.process.log}"))
        for way in ways:
            if not await node.ask("owns", name=part.process.name, address=way.address, port=way.port):
                raise ProgramFailed(node.name, f"port {way.port} was taken by another program before {what} had it",
                                    self.program.free_ports)

    async def is_ready(self, part, ways):
        if part.ready and not await part.ready(self, part):
            return False
        connect = functools.partial(part.placed.node.ask, "connect")
        return all(await asyncio.gather(*[connect(host=way.address, port=way.port) for way in ways]))

    def named(self, part):
        """The process under a name that no other of this life has, with the log of that name."""
        name, node, rank = part.process.name, part.placed.node.name, part.placed.rank
        name = f"{name}-{self.number}.{rank}" if rank or self.number else name
        log = self.program.run.logs_of(self.program.life) / f"{node}-{name}.log"
        return dataclasses.replace(part.process, name=name, log=str(log))

    def on_start(self, one, part):
        """A process of it runs."""

    def stranger(self, way):
        if way not in self.strangers:
            self.strangers[way] = Client(way.address, way.port)
        return self.strangers[way]

    def forget_strangers(self):
        while self.strangers:
            self.strangers.popitem()[1].close()

    async def failure(self):
        """Waits for the end of any of its processes, and says what it means."""
        running = list(self.running)
        ends = [one.ended for one in running]
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        await asyncio.wait(ends, timeout=0.3)  # a server may be told of before the worker of whose death it died
        # Those that started first come first: the others end because of them; but what is cut off by another's death
        # is no cause.
        over = [(one, one.ended.result()) for one in running if one.ended.done()]
        one, ended = min(over, key=lambda pair: pair[1].code == -signal.SIGPIPE)
        if ended.code is None:
            return NodeLost(ended.node, f"the node was lost, and {one.what} with it",
                            "it failed, or was taken away")
        tail = [self.with_names(line) for line in ended.tail]
        error = await self.program.better(explain_failure(one.title, tail, ended.how, self.program), one.node)
        error.killed = ended.code == -signal.SIGKILL
        return error

    def with_names(self, line):
        """A line of a log with the nodes' names before their addresses."""
        for address, name in self.names.items():
            line = re.sub(re.escape(address) + r"\b", f"{name} {address}", line)
        return line

    async def unless_failed(self, work):
        """The outcome of some work, or the error of a process that ended meanwhile."""
        work, failure = asyncio.ensure_future(work), asyncio.ensure_future(self.failure())
        try:
            await asyncio.wait([work, failure], return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                raise failure.result()
            return work.result()
        finally:
            work.cancel()
            failure.cancel()
            await asyncio.gather(work, failure, return_exceptions=True)

    async def stop(self):
        """Stop its processes, the last started first: clients leave before their server is told to."""
        self.forget_strangers()
        while self.running:
            one = self.running.pop()
            if not one.ended.done():
                await self.stop_process(one)

    async def stop_process(self, one):
        """Stop it; a node on which that cannot be done is lost to us."""
        try:
            await within(one.process.grace_s + 2 * KILLED_S, one.node.ask("stop", name=one.process.name))
            await one.ended
        except NodeRefusal as refused:
            one.node.lose(refused.what)
        except asyncio.TimeoutError:
            one.node.lose(f"{one.process.name} was told to stop, and nothing came of it")
        except ClusterError:  # it is lost already
            pass


class Here:
    """The driver itself, where it must reach a node: it answers as a Node would."""

    name = "the driver"

    def __init__(self):
        self.facts = asyncio.get_running_loop().create_future()
        self.facts.set_result({"machine": machine_identity()})

    async def ask(self, order, addresses, port, nonce, timeout_s):
        return await first_reachable(addresses, port, nonce, timeout_s)


COMMON_FAILURES = (  # in one of a log's last lines or in how the process ended; what it means; what to do
    (r"[Aa]ddress already in use", "its port is in use by another program", "{program.free_ports}"),
    (r"bad_alloc|[Cc]annot allocate memory", "the node ran out of memory", "raise [slurm] mem"),
    (r"error while loading shared libraries: (\S+)|symbol lookup error|version `\S+' not found",
     "a shared library is missing on the node, or too old", "load the module that brings it: [environment] modules"),
    (r"[Ee]xec format error", "it was built for another CPU", "{program.named_by} must name a build for these nodes"),
    (r"killed by SIGILL", "it uses instructions that the node's CPU does not have",
     "use a build for these nodes, or choose nodes by [slurm] constraint"),
    (r"killed by SIGKILL", "the kernel killed it, most likely for memory", "raise [slurm] mem"),
    (r"killed by SIGBUS", "a file that it reads was cut short, or its disk failed", "copy its files again"),
    (r"killed by SIGSEGV", "it crashed", "`logs` shows its last words"))


def explain_failure(who, tail, how, program):
    """The error for a program that ended: what its last lines or its end mean, and the most telling of them."""
    for pattern, what, mend in (*program.failures, *COMMON_FAILURES):
        line = next((line for line in [*tail, how] if re.search(pattern, line)), None)
        if line is not None:
            line = re.sub(r"^[\d.]+ [A-Z] ", "", line)  # the time and the level that new builds write
            return ProgramFailed("", f"{who}: {what} ({one_line(line)[:200]})", mend.format(program=program))
    telling = [line for line in tail if re.search(r"error|fail|fatal|abort|exception", line, re.I)] or tail[-1:]
    return ProgramFailed("", f"{who} ({how}): {one_line(telling[0])[:300] if telling else 'it said nothing'}",
                         "`logs` shows the rest")


def exec_mend(program, number):
    """What helps where a program's binary cannot be started."""
    return {errno.ENOEXEC: f"it was built for another CPU: {program.named_by} must name a build for these nodes",
            errno.EACCES: "make it executable: chmod +x"}.get(number, f"check {program.named_by}")


class ForeseenNode(NamedTuple):
    """Stands for a node that is not there yet."""

    name: str

    @property
    def facts(self):
        return self

    def result(self):
        return {"cpus": "CPUS"}


def preview(program):
    """A program's command lines as they will be, with words for what only the nodes know."""
    group = [Placed(rank, ForeseenNode(f"NODE{rank + 1}"), program.foreseen(),
                    {name: Way(f"ADDRESS{rank + 1}", "PORT") for name in program.ports(rank)}, ())
             for rank in range(program.group_size)]
    return [f"{part.placed.node.name}: {' '.join(map(quote, part.process.argv))}"
            for step in program.steps(group) for part in step]


# ═══════════════════════════════════════════════════════════════════════════════
# 13 · Engines
#
# Owns what each engine needs: what to start where, when it is ready, what its failures mean. What
# differs between engines stands side by side in small classes. Knows nothing of Slurm, containers or prompts.
# ═══════════════════════════════════════════════════════════════════════════════


class EngineSick(ProgramFailed):
    """An engine lives and answers nothing: no prompt is to blame."""


def model_name(config):
    return config.model.name or Path(config.model.path).name or config.engine.name


class Engine(Program):
    """What all engines have in common: they answer prompts at an endpoint of their head."""

    kind = "engine"
    named_by = "[engine] path"
    endpoint = "http"  # the name of that port
    health = "/health"  # a path that says there that it is well
    figures = ""  # how the lines of /metrics begin that move only while it works
    sized = False  # it runs model.path, whose header tells how many nodes it takes

    def __init__(self, config, run, life, group_size):
        super().__init__(config, run, life, group_size)
        self.slots = config.engine.slots
        # A few prompts wait at the engine, so that no slot is ever empty.
        self.in_flight = config.engine.concurrency or self.slots + self.slots // 8 + 2
        self.request_timeout = config.engine.request_timeout or math.inf

    def endpoint_port(self):
        fixed = self.config.engine.port
        return Port(DRIVER, "the engine", str(fixed or ""), self.config.engine.port_is_wish)

    def serving(self, head, process):
        """The part that answers prompts."""
        return Part(head, process, (self.endpoint,), Answers(self.endpoint, self.health),
                    self.config.engine.load_timeout, "raise [engine] load_timeout, or ")


class Echo(Engine):
    """No model: repeats the prompt. For trying things out, and for the demo."""

    name = "echo"

    def ports(self, rank):
        return {} if rank else {"http": self.endpoint_port()}

    def steps(self, group):
        head = group[0]
        argv = [sys.executable, "-S", "-I", *frozen_command(self.run.folder, "echo", *head.ways["http"],
                                                            self.run.key_file)] + self.config.engine.args
        return [[self.serving(head, Process("engine", argv))]]


async def echo_server(host, port, key_file, delay_s=0.0):
    """The echo engine's server: an OpenAI-compatible endpoint that says what it was told."""
    key = f"Bearer {Path(key_file).read_text().strip()}"

    async def answer(request):
        if request.path == "/health":
            return http_response(200, {"status": "ok"})
        if request.headers.get("authorization") != key:
            return http_response(401, {"error": {"message": "wrong key", "code": 401}})
        if request.path != "/v1/chat/completions":
            return http_response(404, {"error": {"message": f"no {request.path} here", "code": 404}})
        await asyncio.sleep(delay_s)
        body = request.json()
        said = str(body["messages"][-1].get("content", ""))
        tokens = {"prompt_tokens": len(said.split()), "completion_tokens": len(said.split())}
        return http_response(200, {
            "id": "echo", "object": "chat.completion", "created": int(time.time()), "model": body.get("model", ""),
            "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": said}}],
            "usage": dict(tokens, total_tokens=sum(tokens.values()))})

    server = await serve_http(host, port, answer)
    await server.serve_forever()


OWN_POOLING, MEAN_POOLING = "model", "mean"  # a model for chat names none, and then llama-server makes no embeddings


class LlamaCpp(Engine):
    """llama-server on the first node of the group; an RPC worker on each of the others."""

    name = "llama.cpp"
    figures = "llamacpp:"
    sized = True
    free_ports = "set [engine] port and [engine.llama] rpc_port to 0 to take free ones"
    worker_names = ("ggml-rpc-server", "rpc-server")  # renamed in June 2026
    own_settings = ("LLAMA_ARG_", "LLAMA_API_KEY", "AIP_")
    progress = r"load_tensors|n_ctx_slot|KV buffer|using device|RPC|listening|[Ee]rror|failed|warming up"

    @property
    def failures(self):
        return LLAMA_FAILURES

    def __init__(self, config, run, life, group_size):
        super().__init__(config, run, life, group_size)
        self.llama = config.engine.llama
        self.without = () if self.llama.user_settings else self.own_settings

    @staticmethod
    def named(config):
        """The llama-server that the config names, itself or by its folder; "" for that of the PATH."""
        path = config.engine.path
        return os.path.join(path, "llama-server") if os.path.isdir(path) else path

    @classmethod
    def check(cls, config):
        server = cls.named(config)
        if server and not os.path.exists(server):
            raise config.error("engine.path", "no llama-server there", "name the binary, or the folder it lies in")
        if server and not os.access(server, os.X_OK):
            raise config.error("engine.path", f"{server} is not executable", "chmod +x it")

    def foreseen(self):
        return {"server": self.named(self.config) or "llama-server",
                "worker": self.worker_names[0], "flags": ["--fit", "--alias", "--embeddings", "--pooling"]}

    def ports(self, rank):
        rpc_port = self.llama.rpc_port
        if rank:
            return {"rpc": Port(HEAD, "the RPC worker", str(rpc_port or ""), wish=bool(rpc_port))}
        return {self.endpoint: self.endpoint_port()}

    async def probe(self, node, rank):
        folder = self.config.engine.path
        candidates = [folder, os.path.join(folder, "llama-server")] if folder else ["llama-server"]
        server = await node.ask("find", names=candidates)
        if not server:
            raise ProgramFailed(node.name, f"llama-server not found {f'in {folder}' if folder else 'on the PATH'}",
                               "set [engine] path to it, or load its module in [environment] modules")
        if rank:
            beside = os.path.dirname(os.path.realpath(server))
            worker = await node.ask("find", names=[os.path.join(beside, name) for name in self.worker_names])
            if not worker:
                raise ProgramFailed(node.name, f"no RPC worker (ggml-rpc-server or rpc-server) in {beside}",
                                   "build llama.cpp with -DGGML_RPC=ON, or use one node")
            return {"worker": worker}
        return {"server": server, "flags": await self.flags(node, server)}

    async def flags(self, node, server):
        """The flags this build knows: they come and go between builds, so it is asked."""
        try:
            answer = await node.ask("run", argv=[server, "--help"], timeout_s=60, without=self.without)
        except NodeRefusal as refused:
            raise ProgramFailed(node.name, f"{server} cannot be started: {refused.what}",
                               exec_mend(self, refused.errno))
        heads = [line.strip() for line in answer["out"].splitlines() if line.lstrip().startswith("-")]
        flags = {word for head in heads for word in re.findall(r"(?:^|,\s*)(--?[a-zA-Z][\w-]*)", head)}
        if answer["code"] != 0 or "--port" not in flags:
            ended = Exit(server, node.name, answer["code"], answer["out"].splitlines())
            raise explain_failure(f"{server} on {node.name}", ended.tail, ended.how, self)
        if "--rpc" not in flags and self.group_size > 1:
            raise ProgramFailed(node.name, f"{server} lacks RPC, which several nodes need", BUILD_WITH_RPC)
        return sorted(flags)

    def wants_devices(self, head_facts):
        return "--fit" not in head_facts["flags"] and self.group_size > 1

    async def better(self, error, node):
        """The engine is gone, and what is free on the node now is what a node has."""
        with contextlib.suppress(UserError, OSError):
            if error.mend == MORE_ROOM:
                node_bytes = self.config.model.vram_per_node or sum(await node.ask("gpus")) * 2**20
                return ProgramFailed("", error.what, what_would_fit(self.config, self.group_size, node_bytes))
        return error

    def steps(self, group):
        head, others = group[0], group[1:]
        return [[Part(placed, self.worker(placed), ("rpc",)) for placed in others],
                [self.serving(head, self.server(head, others))]]

    def worker(self, placed):
        address, port = placed.ways["rpc"]
        argv = [placed.facts["worker"], "-H", address, "-p", str(port)]
        node_env = {"LLAMA_CACHE": self.llama.rpc_cache} if self.llama.rpc_cache else {}
        return Process("rpc", argv + ["-c"] * bool(node_env), node_env=node_env, env={"GGML_NO_BACKTRACE": "1"},
                       without=self.without)

    def server(self, head, workers):
        engine, flags, (address, port) = self.config.engine, head.facts["flags"], head.ways["http"]
        argv = [head.facts["server"], "-m", self.config.model.path, "--host", address, "--port", str(port),
                "-c", str(engine.context * engine.slots), "-np", str(engine.slots),
                "-t", str(head.node.facts.result()["cpus"]), "--api-key-file", str(self.run.key_file), "--metrics"]
        if self.llama.gpu_layers != "auto":
            argv += ["-ngl", str(self.llama.gpu_layers)]
        elif "--fit" not in flags:
            argv += ["-ngl", "999"]  # builds without fit leave all on the CPU unless told
        if workers:
            argv += ["--rpc", ",".join(str(placed.ways["rpc"]) for placed in workers)]
        shares = self.tensor_split(head, workers)
        argv += ["-ts", ",".join(map(str, shares))] if shares else []
        argv += ["--alias", model_name(self.config)] if "--alias" in flags else []
        argv += ["--no-webui"] if "--no-webui" in flags else []
        # Old builds hold a thread for each open connection, and answer no more of them than they have threads.
        argv += ["--threads-http", str(self.in_flight + 8)] if "--threads-http" in flags else []
        argv += self.for_embeddings(flags)
        env = {"GGML_NO_BACKTRACE": "1"}
        if not self.llama.user_settings:
            env["XDG_CONFIG_HOME"] = str(self.run.folder / "shapes")  # new builds read llama.cpp/config.ini there
        return Process("llama-server", argv + engine.args, env=env, without=self.without, progress=self.progress)

    def for_embeddings(self, flags):
        """What makes one vector of each text. It is read at one go, so the physical batch must hold all of it: of more
        than the usual 512 tokens no vector is made otherwise (seen on b11434)."""
        pooling, size = self.config.engine.pooling, str(self.config.engine.context)
        if not pooling or "--embeddings" not in flags:
            return []
        named = [] if pooling == OWN_POOLING or "--pooling" not in flags else ["--pooling", pooling]
        return ["--embeddings", *named, "-b", size, "-ub", size]

    @staticmethod
    def tensor_split(head, workers):
        """Each device's share on builds that cannot fit by themselves: RPC workers first, one device each."""
        shares = [placed.devices[:1] for placed in workers] + [head.devices]
        return [share for devices in shares for share in devices] if all(shares) else []


BUILD_WITH_RPC = "build llama.cpp with -DGGML_RPC=ON, or set [slurm] nodes = 1"
SAME_BUILD = "all nodes need the same build of llama.cpp: see [engine] path"
MORE_ROOM = "ask for more nodes or larger GPUs, or lower [engine] slots or context"
LLAMA_FAILURES = (
    (r"[Aa]ddress already in use|couldn't bind|Failed to create server socket",
     "its port is in use by another program", LlamaCpp.free_ports),
    (r"RPC not supported|invalid argument: --rpc", "it lacks RPC, which several nodes need", BUILD_WITH_RPC),
    (r"invalid argument: (\S+)", "this build does not know an argument", "see [engine] args"),
    (r'argument "--api-key-file"', "its key file cannot be read on the node",
     "keep the run in a folder that all nodes see: --runs FOLDER"),
    (r"error while handling argument", "it does not take an argument's value", "see [engine] args"),
    (r"RPC server version mismatch|RPC handshake failed|HELLO request size mismatch|Expected HELLO",
     "the RPC worker is of another build", SAME_BUILD),
    (r"Failed to connect to \S+", "it cannot reach its RPC worker",
     "is a firewall between the nodes? Set [network] ports to a range that is open, or [network] interface"),
    (r"Remote RPC server crashed", "its RPC worker was lost, or is of another build",
     "see the worker's log with `logs`; " + SAME_BUILD),
    (r"(CUDA|ROCm|MUSA) error: out of memory", "it ran out of memory on a GPU while it worked",
     "lower [engine] slots or context, or ask for more nodes"),
    (r"cudaMalloc failed|ErrorOutOfDeviceMemory|out of memory|allocate (CUDA|ROCm|MUSA|Vulkan|SYCL)\d+ buffer",
     "the model does not fit: it ran out of memory on a GPU", MORE_ROOM),
    (r"allocate RPC.* buffer", "the model does not fit: its RPC worker ran out of memory", MORE_ROOM),
    (r"insufficient memory|bad_alloc|[Cc]annot allocate memory|allocate CPU\S* buffer",
     "the node ran out of memory", "raise [slurm] mem, or lower [engine] slots or context"),
    (r"unable to allocate .* buffer|failed to allocate .*(buffer|kv cache)",
     "the model does not fit: it ran out of memory", MORE_ROOM),
    (r"no kernel image is available|driver version is insufficient|unsupported display driver|unsupported toolchain",
     "it was built for other GPUs or a newer driver than the node has",
     "build or fetch llama.cpp for these GPUs: [engine] path, or [environment] modules"),
    (r"(CUDA|ROCm|MUSA) error: \S+", "a GPU failed it",
     "if it comes again, leave the node out with [slurm] exclude, or use a newer llama.cpp"),
    (r"unknown (model architecture|pre-tokenizer type)|missing tensor '|wrong number of tensors|invalid ggml type",
     "this build does not know the model's architecture", "use a newer llama.cpp: [engine] path"),
    (r"failed to (open|load) GGUF|invalid magic|within the file bounds|failed to read (magic|header|key|tensor)",
     "the node cannot read the whole model", "put [model] path where all nodes see it; copy it again if it is damaged"),
    (r"n_seq_max must be <=", "this build has fewer slots", "lower [engine] slots"),
    (r"killed by SIGILL", "it uses instructions that the node's CPU does not have",
     "build llama.cpp with -DGGML_NATIVE=OFF or on such a node, or choose nodes by [slurm] constraint"),
    (r"killed by SIGKILL", "the kernel killed it, most likely for memory",
     "raise [slurm] mem, or lower [engine] slots or context"),
    (r"killed by SIGBUS", "a file that it reads was cut short, or its disk failed",
     "copy the model again: [model] path"),
    (r"killed by SIGSEGV", "it crashed", "use a newer llama.cpp: [engine] path; `logs` shows its last words"))


ENGINES = {engine.name: engine for engine in (LlamaCpp, Echo)}


class Replica(Group):
    """One group of nodes that runs the model once, and the way to its endpoint."""

    client = None
    title = "the engine"
    began = 0.0

    @property
    def engine(self):
        return self.program

    def on_start(self, one, part):
        if self.engine.endpoint in part.opens:
            self.title, self.began = one.title, clock()
            self.tell("engine_started", replica=self.number, nodes=[node.name for node in self.nodes],
                      command=" ".join(map(quote, part.process.argv)))

    async def start_once(self):
        await super().start_once()
        host, port = self.placed[0].ways[self.engine.endpoint]
        self.client = Client(host, port, self.engine.run.key_file.read_text().strip())
        self.tell("ready", replica=self.number, load_s=round(clock() - self.began, 2), host=host, port=port)

    async def signs(self):
        """Whether the engine says that it is well; and its figures, which move while it works, if it has any."""
        well, told = await asyncio.gather(look(self.client, self.engine.health), look(self.client, "/metrics"))
        figures = [line for line in told.body.decode("utf-8", "replace").splitlines()
                   if self.engine.figures and line.startswith(self.engine.figures)]
        return well.status == 200, figures

    async def stop(self):
        if self.client:
            self.client.close()
        await super().stop()


@contextlib.asynccontextmanager
async def replicas(engine, groups, tell):
    """A replica on each group of nodes, all starting; on the way out they are stopped.

    Gives (replica, task of its start) pairs: work begins with the first that is ready."""
    made = [Replica(number, engine, nodes, tell) for number, nodes in enumerate(groups)]
    starts = [asyncio.ensure_future(replica.start()) for replica in made]
    try:
        yield list(zip(made, starts))
    finally:
        for start in starts:
            start.cancel()
        await asyncio.gather(*starts, return_exceptions=True)
        await asyncio.gather(*(replica.stop() for replica in made))


# ═══════════════════════════════════════════════════════════════════════════════
# 15 · Input
#
# Owns what is asked: sources of prompts, read once and frozen at submit, then a row at a time. Nothing
# here holds all prompts: a row is a number and an offset into its file. Knows nothing of HTTP, nor of
# results but for the names of their files.
# ═══════════════════════════════════════════════════════════════════════════════

CHAT, COMPLETIONS, EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
LENGTH_KEYS = {"max_tokens", "max_completion_tokens", "n_predict"}
PARAMETERS = LENGTH_KEYS.union(re.findall(r"\w+", """
    temperature top_p top_k min_p typical_p top_n_sigma n best_of stop seed stream stream_options user metadata echo
    suffix response_format json_schema grammar tools tool_choice parallel_tool_calls logprobs top_logprobs n_probs
    logit_bias frequency_penalty presence_penalty repetition_penalty repeat_penalty repeat_last_n ignore_eos min_tokens
    reasoning_effort reasoning_format chat_template_kwargs cache_prompt id_slot mirostat mirostat_tau mirostat_eta
    samplers dynatemp_range dynatemp_exponent dry_multiplier dry_base dry_allowed_length dry_penalty_last_n
    xtc_probability xtc_threshold dimensions encoding_format model"""))  # what is none, engines drop without a word
TEXT_FILE, BATCH_REQUEST, FROM_TEMPLATE = "a text file", "a Batch request", "made by the template"
Key = Tuple[int, int, int]  # source, row, sample


class Prompt(NamedTuple):
    """One question: where it stands in the input, and the request that asks it."""

    key: Key
    custom_id: str
    url: str
    body: bytes
    seed: Optional[int] = None  # of one of several samples


class Source(NamedTuple):
    """One file of rows. A folder of texts becomes one too: the list of its files, kept in the run."""

    kind: str  # "folder", "jsonl" or "csv"
    path: str  # as the user knows it
    row_file: str
    rows: int
    size: int
    mtime_ns: int
    digest: str
    columns: List[str]
    splice: str  # what goes before each row's own body, where all rows are alike enough for that; else ""
    separator: str = ","  # of a CSV

    def looks_like(self, found):
        """By the size and time of a file it can be told quickly that it is the same."""
        return (found.st_size, found.st_mtime_ns) == (self.size, self.mtime_ns)

    def row_name(self, row):
        """What a row is called that has no name of its own."""
        return f"{os.path.basename(self.path).rpartition('.')[0] or 'row'}-{row + 1}"  # standard input has no ending


CHANGED = "the {} was changed after the run was submitted"
PUT_BACK = "put it back and `resume --failed`, or submit the new prompts as a new run"


class BadRow(Exception):
    """A row that cannot be asked, and what to do about it."""


# The usual layout of a Batch request, as OpenAI's documentation writes it. All that stands around the body is JSON by
# itself, so where the body is one value, the row is one, too, and has these four keys and no others.
BATCH_ROW = (rb'\s*\{\s*"custom_id":\s*"([^"\\\x00-\x1f]+)",\s*"method":\s*"POST",\s*"url":\s*"(/v1/[a-z/]+)",'
             rb'\s*"body":\s*(\{.*\})\s*\}\s*')
BATCH_ROW = re.compile(BATCH_ROW.replace(rb"\s", rb"[ \t\r\n]"), re.DOTALL)  # the white space of JSON


class Asking:
    """Turns a record of the input into the request that asks it."""

    def __init__(self, config, model, system, template):
        self.config, self.system, self.template = config.prompts, system, template
        self.defaults = {"model": model, **config.prompts.params}
        self.known, self.splices = frozenset(self.defaults) | LENGTH_KEYS, {}
        self.met, self.urls, self.lengths = set(), set(), Lengths(config)  # what the prompts so far were, and how long

    def of_record(self, source, record, number):
        """(custom_id, url, body without the defaults) of a row; BadRow says what it lacks."""
        if source.kind == "folder":
            text = self.file_text(source, record)
            if not text.strip():
                raise BadRow("the prompt is empty; write a question in it, or remove the file")
            self.met.add(TEXT_FILE)
            return record["path"], CHAT, self.chat(self.system, text)
        if self.is_batch(record):
            self.met.add(BATCH_REQUEST)
            return self.of_batch(record)
        self.met.add(FROM_TEMPLATE)
        if not self.template:
            raise BadRow("neither a Batch request nor is there a template; "
                         "set [prompts] template to a text with {columns}")
        column = self.config.id_column
        named = ", which [prompts] id_column names"
        custom_id = column_of(record, column, named) if column else source.row_name(number)
        text = fill(self.template, record)
        if not custom_id.strip():
            raise BadRow(f"its {self.config.id_column} is empty; give each row a name of its own")
        if not text.strip():
            raise BadRow("the row gives an empty prompt; fill its columns or remove it")
        return custom_id, CHAT, self.chat(fill(self.system, record), text)

    def is_batch(self, record):
        return "body" in record and "custom_id" in record and (isinstance(record["body"], dict) or not self.template)

    def of_batch(self, record):
        custom_id, url, body = record["custom_id"], record.get("url", CHAT), record["body"]
        if not isinstance(custom_id, str) or not custom_id:
            raise BadRow("custom_id is no text; give each request its own name in quotes")
        if url not in (CHAT, COMPLETIONS, EMBEDDINGS) or record.get("method", "POST") != "POST":
            raise BadRow(f"{record.get('method', 'POST')} {url} is no Batch endpoint; use POST {CHAT}")
        if not isinstance(body, dict) or not body.get("input" if url == EMBEDDINGS else
                                                      "prompt" if url == COMPLETIONS else "messages"):
            raise BadRow("the body asks nothing; give it messages (or prompt, or input)")
        return custom_id, url, body

    @staticmethod
    def chat(system, text):
        messages = [{"role": "system", "content": system}] * bool(system) + [{"role": "user", "content": text}]
        return {"messages": messages}

    def with_defaults(self, body, url):
        """A row's own keys win; a limit on the answer is always there, or an engine fills its whole context."""
        if url == EMBEDDINGS:
            return {"model": self.defaults["model"], **body}
        limited = LENGTH_KEYS & (set(body) | set(self.defaults))
        return {**({} if limited else {"max_tokens": self.config.max_tokens}), **self.defaults, **body}

    def splice(self, url, body):
        """What goes before a body, less its brace, and makes it the request: the defaults that it lacks.

        Cutting a Batch row's body out and sending it costs a quarter of reading it and writing it again."""
        alike = url == EMBEDDINGS, self.known.intersection(body)  # all that decides which it lacks
        if alike not in self.splices:
            added = {name: value for name, value in self.with_defaults(body, url).items() if name not in body}
            check_encodes("", added)
            self.splices[alike] = json.dumps(added)[:-1] + ", " if added else "{"
        return self.splices[alike]

    def splice_now(self, splice):
        """A frozen beginning with the model's name as it is now: a job that joins may have another."""
        added = json.loads(splice.rstrip(", ") + "}") if splice else {}
        if "model" not in added:
            return splice
        return json.dumps({**added, "model": self.defaults["model"]})[:-1] + ", "

    @staticmethod
    def file_text(source, record):
        path = os.path.join(source.path, record["path"])
        try:
            text = read_user_file(path, "prompt")
        except NotText as error:
            raise BadRow(f"not UTF-8 text in line {error.line}; every file in the folder is a prompt: move this one "
                         "elsewhere, or save it as UTF-8")
        if text_digest(text) != record["digest"]:
            raise UserError(path, CHANGED.format("prompt"), PUT_BACK)
        return text


def as_text(value):
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def question_of(body):
    """What a request asks: its last message, its prompt or its input."""
    messages = body.get("messages")
    asked = messages[-1] if isinstance(messages, list) else body.get("prompt", body.get("input"))
    return as_text(asked.get("content") if isinstance(asked, dict) else asked)


def column_of(row, name, which="", mend=""):
    """The text in a column of a row."""
    if name not in row:
        raise BadRow(f"there is no column {name}{which}; {nearest(name, row) or 'there are ' + ', '.join(row)}{mend}")
    return as_text(row[name])


class Lengths:
    """How many of the prompts seem too long for the context of a slot, or want answers that are. Their bytes tell it
    only about; one that no tokens could make short enough is refused."""

    TOKEN_BYTES, LONGEST_TOKEN_BYTES = 4, 256  # of usual text; those of usual vocabularies have 128 at most

    def __init__(self, config):
        self.config, self.context = config, config.engine.context
        self.bounded = ENGINES[config.engine.name].sized  # by the memory that a slot has
        self.limit = self.limit_of({"max_tokens": config.prompts.max_tokens, **config.prompts.params})
        self.prompts = self.too_long = self.longest = self.too_much = self.most = 0

    @staticmethod
    def limit_of(body):
        """The most tokens that an answer may have, by the key that wins at the engine."""
        for name in ("n_predict", "max_completion_tokens", "max_tokens"):
            if name in body:
                return body[name] if isinstance(body[name], int) else 0
        return 0

    def add(self, url, body, most_bytes=math.inf):
        """One more prompt, of so many bytes at most."""
        if not self.bounded:
            return
        if most_bytes > self.context * self.TOKEN_BYTES:
            self.measure(url, body)
        self.prompts += 1
        limit = self.limit if LENGTH_KEYS.isdisjoint(body) else self.limit_of(body)
        if limit > self.context and url != EMBEDDINGS:
            self.too_much, self.most = self.too_much + 1, max(self.most, limit)

    def measure(self, url, body):
        text = body.get("input" if url == EMBEDDINGS else "prompt" if url == COMPLETIONS else "messages")
        several = url != CHAT and isinstance(text, list)
        size = max(map(text_bytes, text), default=0) if several else text_bytes(text)
        if size > self.context * self.LONGEST_TOKEN_BYTES:
            raise BadRow(f"its {size} bytes are more than {self.context} tokens can hold; "
                         "shorten it, or raise [engine] context")
        if size > self.context * self.TOKEN_BYTES:
            self.too_long, self.longest = self.too_long + 1, max(self.longest, size // self.TOKEN_BYTES)

    def notes(self):
        found = []
        if self.too_long:
            found.append(f"= {self.context}: too little for {self.too_long} of {self.prompts} prompts, as far as bytes "
                         f"tell; the longest has about {self.longest} tokens, and the engine refuses such a prompt")
        if self.too_much:
            found.append(f"= {self.context}: less than the max_tokens of {self.too_much} of {self.prompts} prompts, "
                         f"up to {self.most}; their answers end where the context does")
        return [self.config.note("engine.context", what) for what in found]


def text_bytes(value):
    """How many bytes of text there are in a message, or in several."""
    if isinstance(value, str):
        return len(value) if value.isascii() else len(value.encode(errors="replace"))
    if isinstance(value, dict):
        return text_bytes(value.get("content") or value.get("text"))
    return sum(map(text_bytes, value)) if isinstance(value, list) else 0


def fill(template, row):
    """A template with the row's columns in its {places}; {{ and }} are braces."""
    def value(match):
        name = match.group(1)
        if name is None:
            return match.group()[0]
        return column_of(row, name, mend="; braces that are text are written {{ and }}")
    return re.sub(r"\{\{|\}\}|\{([^{}]+)\}", value, template)


def text_digest(text):
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def cut_record(data):
    """The record of a Batch row in the usual layout, of which only the body is read; None for any other row."""
    match = BATCH_ROW.fullmatch(data)
    try:
        return match and {"custom_id": match.group(1).decode(), "method": "POST", "url": match.group(2).decode(),
                          "body": read_json(match.group(3), scan_strict)}
    except ValueError:  # what seemed the body is more than that, or no JSON
        return None


def read_record(source, data, fields=None):
    """The record in a row's bytes; `fields` are a table's where they were read already."""
    if source.kind == "csv":
        fields, columns = fields or table_fields(data.decode(), source.separator), source.columns
        if len(fields) != len(columns):
            name = SEPARATORS[source.separator]
            raise BadRow(f"{len(fields)} fields where the header has {len(columns)}; quote fields that hold {name}")
        return dict(zip(columns, fields))
    try:
        record = read_json(data)
    except UnicodeDecodeError:
        raise BadRow("not UTF-8 text; save the file as UTF-8")
    except ValueError as error:
        raise BadRow(f"not JSON: {getattr(error, 'msg', error)}; a row is one line with one JSON object")
    if not isinstance(record, dict):
        raise BadRow("not a JSON object; a row is one line in {braces}")
    return record


SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs"}


def table_fields(text, separator):
    return next(csv.reader(io.StringIO(text, newline=""), delimiter=separator), [])


def separator_of(source):
    """What stands between a table's columns: what its header has most of outside quotes. Where a comma is the decimal
    point, spreadsheets write semicolons."""
    if source.path.lower().endswith(".tsv"):
        return "\t"
    with open(source.row_file, "rb") as file:
        header = next(filter(bytes.strip, file), b"").decode(errors="replace")
    return max(SEPARATORS, key=re.sub('"[^"]*"', "", header).count)


class RowScanner:
    """Runs once through a row file: (line number, offset, bytes, fields of a table) of each row, and on the way its
    digest."""

    def __init__(self, file, source):
        self.file, self.source = file, source
        self.hash, self.at, self.line = hashlib.sha256(), 0, 0

    def __iter__(self):
        if self.source.kind == "csv":
            yield from self.csv_rows()
            return
        for data in self.lines():
            offset = self.at - len(data)
            if not offset and data.startswith(codecs.BOM_UTF8):  # editors on Windows begin a file so
                offset, data = len(codecs.BOM_UTF8), data[len(codecs.BOM_UTF8):]
            if data.strip():
                yield self.line, offset, data, None

    def lines(self):
        for some in iter(lambda: self.file.readlines(2**16), []):
            self.hash.update(b"".join(some))  # many at once: each call costs as much as a line
            for data in some:
                self.at += len(data)
                self.line += 1
                yield data

    def csv_rows(self):
        """A quoted field may hold line ends: the csv module takes as many lines as a row has."""
        taken = []

        def texts():
            for data in self.lines():
                taken.append(data)
                yield data.decode()
        try:
            for fields in csv.reader(texts(), strict=True, delimiter=self.source.separator):
                data = b"".join(taken)
                first, taken[:] = self.line - len(taken) + 1, []
                if fields:
                    yield first, self.at - len(data), data, fields
        except csv.Error:
            self.line -= max(0, len(taken) - 1)  # where the row begins whose quotes have no end
            raise


class Rows:
    """The rows of one source, each as its bytes; a UserError for one that was changed since it was frozen, and for
    those after it. Neighbours are read together: they are asked together."""

    AHEAD_BYTES, LENGTH = 2**16, 2**32 - 1

    def __init__(self, source, index_file):
        self.source, self.index_file = source, index_file
        self.start, self.data, self.doubtful = 0, b"", False
        self.lost = math.inf  # the first row that is not what it was

    @functools.cached_property
    def file(self):
        return open(self.source.row_file, "rb")

    @functools.cached_property
    def index(self):
        """Of each row its offset, and its length with its checksum above it, one row's after another's."""
        with open(self.index_file, "rb") as file:
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)).cast("Q")

    def __getitem__(self, row):
        offset, length = self.index[2 * row], self.index[2 * row + 1] & self.LENGTH
        begin = offset - self.start
        if begin < 0 or begin + length > len(self.data):
            self.read(offset, max(length, self.AHEAD_BYTES))
            begin = 0
        data = self.data[begin:begin + length]
        if self.doubtful and (row >= self.lost or zlib.crc32(data) != self.index[2 * row + 1] >> 32):
            self.lost = min(self.lost, row)
            raise UserError(self.source.path, CHANGED.format("file"), PUT_BACK)
        return data

    def read(self, offset, length):
        try:
            data, found = os.pread(self.file.fileno(), length, offset), os.fstat(self.file.fileno())
        except OSError:
            self.__dict__.pop("file", None)  # a handle that a file server has forgotten stays so
            raise
        self.start, self.data, self.doubtful = offset, data, not self.source.looks_like(found)

    def line(self, row):
        """The line on which a row stands; reads all before it."""
        self.file.seek(0)
        return self.file.read(self.index[2 * row]).count(b"\n") + 1


class LostPrompt(Exception):
    """It is not there any more as it was when it was frozen. `prompt` has its key and, as far as is known, its name."""

    def __init__(self, prompt, error):
        super().__init__(str(error))
        self.prompt = prompt


class Input:
    """All that is asked, as it was frozen: prompts are numbered 0, 1, 2 … over all sources, rows and samples."""

    def __init__(self, sources, folder, asking, samples):
        self.sources, self.asking, self.samples = sources, asking, samples
        self.starts = list(itertools.accumulate([0] + [source.rows * samples for source in sources]))
        self.rows = [Rows(source, os.path.join(folder, f"{number}.index"))
                     for number, source in enumerate(sources)]
        # what goes before each row's own body, where that alone makes its request
        self.splices = [asking.splice_now(source.splice).encode() if samples == 1 else b"" for source in sources]

    def __len__(self):
        return self.starts[-1]

    def key(self, number):
        source = bisect.bisect_right(self.starts, number) - 1
        return (source, *divmod(number - self.starts[source], self.samples))

    def number(self, key):
        return self.starts[key[0]] + key[1] * self.samples + key[2]

    def record(self, key):
        source = self.sources[key[0]]
        return read_record(source, self.rows[key[0]][key[1]])

    def text_names(self, source):
        """The files of a folder that are asked, by their rows."""
        return [self.record((source, row, 0))["path"] for row in range(self.sources[source].rows)]

    def prompt(self, number):
        """What is asked; LostPrompt where that is not there any more, an OSError where it cannot be read just now."""
        key = self.key(number)
        try:
            data = self.rows[key[0]][key[1]]
            splice = self.splices[key[0]]
            match = BATCH_ROW.fullmatch(data) if splice else None
            if match:
                custom_id, url, body = match.groups()
                return Prompt(key, custom_id.decode(), url.decode(), splice + body[1:])
            custom_id, url, body = self.request(key, data)
        except (UserError, BadRow) as error:
            raise LostPrompt(Prompt(key, self.name(key), CHAT, b""), error)
        except OSError as error:
            if error.errno in PASSING_TROUBLE:
                raise
            raise LostPrompt(Prompt(key, self.name(key), CHAT, b""), f"{error.filename}: {os_reason(error)}")
        if self.samples > 1:
            body = {**body, "seed": int(body.get("seed") or 0) + key[2]}
            custom_id = f"{custom_id}#{key[2] + 1}"
        seed = body["seed"] if self.samples > 1 else None
        return Prompt(key, custom_id, url, json.dumps(body, ensure_ascii=False).encode(), seed)

    def asked(self, key):
        """(its row's own columns, what it asks) of a prompt; nothing where that is not there any more as it was."""
        source = self.sources[key[0]]
        try:
            record = read_record(source, self.rows[key[0]][key[1]])
            _, _, body = self.asking.of_record(source, record, key[1])
        except (UserError, BadRow, OSError):
            return {}, ""
        return {} if source.kind == "folder" or self.asking.is_batch(record) else record, question_of(body)

    def own_columns(self):
        """Those of all sources' rows; a JSONL has those of its first row."""
        found = {}
        for number, source in enumerate(self.sources):
            rows_own = source.columns or source.rows and self.asked((number, 0, 0))[0]
            found.update(dict.fromkeys(rows_own or ()))
        return list(found)

    def request(self, key, data):
        """(custom_id, url, body) of a row."""
        source = self.sources[key[0]]
        record = read_record(source, data)
        custom_id, url, body = self.asking.of_record(source, record, key[1])
        return custom_id, url, self.asking.with_defaults(body, url)

    def name(self, key):
        """What a prompt is called whose row cannot be read."""
        source, row, sample = key
        name = self.record(key)["path"] if self.sources[source].kind == "folder" else self.sources[source].row_name(row)
        return name if self.samples == 1 else f"{name}#{sample + 1}"

    @classmethod
    def load(cls, run, config, model):
        """What `freeze` kept."""
        frozen = json.loads(run.input_file("input.json").read_text())
        sources = [Source(*source) for source in frozen["sources"]]
        asking = Asking(config, model, frozen["system"], frozen["template"])
        return cls(sources, run.input_file(""), asking, config.prompts.samples)


def check_unchanged(source):
    """The digest of a file decides when it is not seen at once that it is the same."""
    with open(source.row_file, "rb") as file:
        found = os.fstat(file.fileno())
        if source.looks_like(found):
            return
        digest = hashlib.sha256()
        while True:
            data = file.read(2**20)
            if not data:
                break
            digest.update(data)
    if digest.hexdigest() != source.digest:
        raise UserError(source.path, CHANGED.format("file"), PUT_BACK)


class Frozen(NamedTuple):
    """An input that was read and checked, ready to be kept in a run."""

    sources: List[Source]
    spool: Any  # a temporary folder with the row files that llmrun itself makes, and the index of each source
    system: str
    template: str
    skipped: List[str]
    notes: List[str]  # what the user should know of how it was taken
    urls: frozenset  # the endpoints that are asked

    def __len__(self):
        return sum(source.rows for source in self.sources)

    def keep(self, run):
        """Write it into the run's folder."""
        sources = []
        for number, source in enumerate(self.sources):
            if source.row_file != source.path:
                kept = run.input_file(f"{number}.rows")
                shutil.move(source.row_file, kept)
                source = source._replace(row_file=str(kept))
            shutil.move(os.path.join(self.spool.name, f"{number}.index"), run.input_file(f"{number}.index"))
            sources.append(source)
        write_file(run.input_file("input.json"), json.dumps(
            {"sources": sources, "rows": len(self), "system": self.system, "template": self.template,
             "skipped": self.skipped}))


csv.field_size_limit(2**31 - 1)  # a cell may hold a whole document


def freeze(config, model, tell=lambda done, total: None):
    """Read all of the input once, as it will be asked: what is wrong with a row is known before anything starts."""
    with Faults() as faults:
        with faults.kept("prompts.system"):
            system = read_user_file(config.prompts.system, "system prompt") if config.prompts.system else ""
        with faults.kept("prompts.template"):
            template = read_template(config)
        with faults.kept("prompts.user"):
            found = find_sources(config)
        if not isinstance(config.prompts.params.get("seed") or 0, int):
            raise config.error("prompts.params", "its seed is no whole number", "write a number")
    asking = Asking(config, model, system, template)
    spool = tempfile.TemporaryDirectory()
    sources, skipped, hashes = [], [], array.array("q")
    for number, (kind, path) in enumerate(found):
        row_file, index_file = (os.path.join(spool.name, f"{number}.{ending}") for ending in ("rows", "index"))
        source = Source(kind, path, make_row_file(kind, path, row_file, skipped), 0, 0, 0, "", [], "")
        sources.append(scan_source(source, index_file, asking, skipped, hashes, tell))
    if not any(source.rows for source in sources):
        if skipped:
            raise config.error("prompts.user", f"no row of it can be asked; the first: {skipped[0]}", "mend the rows")
        raise config.error("prompts.user", "no prompts in it", "put text files in the folder, or rows in the file")
    prompts = Input(sources, spool.name, asking, 1)
    check_unique(prompts, hashes)
    check_result_names(config, prompts)
    notes = notes_on_columns(config, sources) + odd_keys(config, sources, asking.met) + asking.lengths.notes()
    if EMBEDDINGS in asking.urls and len(asking.urls) > 1:
        notes.append(config.note("prompts.user", "asks for embeddings and for other answers: a llama-server that makes "
                                 "embeddings is slow at others, and many builds refuse them; put them into two runs"))
    return Frozen(sources, spool, system, asking.template, skipped, notes, frozenset(asking.urls))


def odd_keys(config, sources, met):
    """What the config says to no effect with such prompts, and what of it may be misspelt, in words."""
    every, kinds = " or ".join(sorted(met)), {source.kind for source in sources}
    notes = [config.note(dotted, f"has no effect: {why}") for dotted, effect, why in (
        ("prompts.template", FROM_TEMPLATE in met, f"each prompt is {every} as it stands"),
        ("prompts.id_column", FROM_TEMPLATE in met, f"each prompt is {every}, which has its own name"),
        ("prompts.system", met != {BATCH_REQUEST}, "each prompt is a Batch request, which brings its own"),
        ("results.columns", "csv" in kinds, "no prompt comes from a CSV"),
        ("results.file_name", "folder" in kinds, "no prompt is a text file"),
        ("slurm.max_running", config.slurm.jobs > 1, "there is one job; see [slurm] jobs"),
    ) if not effect and config.value_of(dotted) != Config().value_of(dotted)]
    for name in set(config.prompts.params) - PARAMETERS:
        notes += [config.note(f"prompts.params.{name}", f'is sent as it is; did you mean "{meant}"?')
                  for meant in difflib.get_close_matches(name, PARAMETERS, 1, 0.8)]
    return notes


def read_template(config):
    """The template itself, or the text of the file that it names."""
    value = config.prompts.template
    if not value or "{" in value:
        return value
    return read_user_file(os.path.join(os.path.dirname(config.source), os.path.expanduser(value)), "template")


def find_sources(config):
    """(kind, path) of everything that prompts.user names: a folder, a file of rows, or a pattern of them."""
    wanted = config.prompts.user
    if wanted == "-":
        return [("jsonl", "-")]
    paths = [wanted] if os.path.exists(wanted) else sorted(glob.glob(wanted, recursive=True))
    if not paths:
        raise config.error("prompts.user", "no such folder or file", "name a folder of text files, a .jsonl or a .csv")
    # A pattern such as in/** names a folder, and again what is in it.
    parents = {str(parent) for path in paths for parent in Path(path).parents}
    paths = [path for path in paths if os.path.normpath(path) not in parents]
    kinds = {".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".tsv": "csv"}
    found = [("folder" if os.path.isdir(path) else kinds.get(Path(path).suffix.lower()), path) for path in paths]
    for kind, path in found:
        if not kind or kind != "folder" and not os.path.isfile(path):
            what = f"{os.path.basename(path)} is neither a folder nor a .jsonl, .csv or .tsv file"
            raise config.error("prompts.user", what, "name the folder that the text files lie in")
    return found


EDITORS_COPY = re.compile(r".*~|#.*#|.*\.(sw[op]|bak|orig)", re.IGNORECASE | re.DOTALL)


def make_row_file(kind, path, made, skipped):
    """The file with a source's rows: of a folder, a list of its files and what each holds now."""
    if kind == "jsonl" and path == "-":
        with open(made, "wb") as rows:
            shutil.copyfileobj(sys.stdin.buffer, rows)
    elif kind == "folder":
        with open(made, "w") as rows:
            for name in prompt_files(path):
                file = os.path.join(path, name)
                if EDITORS_COPY.fullmatch(os.path.basename(name)):
                    skipped.append(f"{file}: an editor's copy of a file, no prompt")
                    continue
                if os.path.exists(file) and not os.path.isfile(file):
                    raise UserError(file, "neither a file nor a folder", "remove it")
                digest = ""
                with contextlib.suppress(NotText):  # which is said when it is to be asked
                    digest = text_digest(read_user_file(file, "prompt"))
                rows.write(json.dumps({"path": name, "digest": digest}) + "\n")
    else:
        return path
    return made


def prompt_files(folder):
    """The paths of all files below a folder, in a fixed order; hidden ones are not prompts."""
    def refuse(error):
        raise UserError(error.filename, f"cannot read the prompts: {os_reason(error)}", "make it readable: chmod u+rx")

    found, seen = [], set()
    for top, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        seen.add(os.path.realpath(top))
        folders[:] = [name for name in folders if not name.startswith(".")
                      and os.path.realpath(os.path.join(top, name)) not in seen]
        found.extend(os.path.relpath(os.path.join(top, name), folder) for name in names if not name.startswith("."))
    return sorted(found)


STEP_BYTES = 2**22  # of the input: after so many it is told how far we are, and the index goes to its file


def scan_source(source, index_file, asking, skipped, hashes, tell):
    """The source with its counts; where each of its good rows lies stands then in the index file."""
    index, splices, count, told = array.array("Q"), set(), 0, 0
    try:
        with open(source.row_file, "rb") as file:
            if source.kind == "csv":
                source = source._replace(separator=separator_of(source))
            found, scanner = os.fstat(file.fileno()), RowScanner(file, source)
            rows = iter(scanner)
            if source.kind == "csv":
                header = next(rows, (1, 0, b"", []))[2].decode().lstrip("\ufeff")
                source = source._replace(columns=table_fields(header, source.separator))
                if len(set(source.columns)) < len(source.columns):
                    raise UserError(f"{source.path}:1", "two columns have the same name", "give each its own")
            for line, offset, data, fields in rows:
                try:
                    custom_id, splice = check_row(source, asking, count, data, fields)
                except BadRow as bad:
                    skip_or_fail(asking, place_of_row(source, line, data), str(bad), skipped)
                except RecursionError:
                    bad = "nested too deeply; make it flatter"
                    skip_or_fail(asking, place_of_row(source, line, data), bad, skipped)
                else:
                    index.extend((offset, zlib.crc32(data) << 32 | len(data)))
                    hashes.append(hash(custom_id))
                    splices.add(splice)
                    count += 1
                if scanner.at - told > STEP_BYTES:
                    told = scanner.at
                    spill(index, index_file)
                    tell(told, found.st_size)
            spill(index, index_file)
            tell(found.st_size, found.st_size)
    except OSError as error:
        raise UserError(source.path, f"cannot read the prompts: {os_reason(error)}", "make it readable: chmod u+r")
    except UnicodeDecodeError:
        raise UserError(f"{source.path}:{scanner.line}", "not UTF-8 text", "save the file as UTF-8")
    except csv.Error as error:
        raise UserError(f"{source.path}:{scanner.line}", f"not CSV: {error}", "mend the quotes of that row")
    splice = splices.pop() if len(splices) == 1 else ""
    return source._replace(rows=count, splice=splice, size=found.st_size, mtime_ns=found.st_mtime_ns,
                           digest=scanner.hash.hexdigest())


def spill(index, index_file):
    """Move to the file what there is of an index: that of ten million rows takes 160 megabytes."""
    try:
        with open(index_file, "ab") as file:
            index.tofile(file)
    except OSError as error:
        raise UserError(os.path.dirname(index_file), f"cannot write there: {os_reason(error)}",
                        "free some space, or set TMPDIR to another folder")
    del index[:]


HALF_CHARACTER = re.compile(rb"\\u[dD][89a-fA-F]")  # or a whole one of two halves


def check_row(source, asking, number, data, fields):
    """(custom_id, splice, or "" where it cannot be cut) of a row that can be asked; BadRow says what it lacks."""
    cut = None if fields else cut_record(data)
    record = cut or read_record(source, data, fields)
    custom_id, url, body = asking.of_record(source, record, number)
    if not isinstance(body.get("seed") or 0, int):
        raise BadRow("its seed is no whole number; write a number")
    own = not cut and body is record.get("body")  # of a cut one the numbers are known, and a template makes none
    if not number or own or HALF_CHARACTER.search(data):
        check_encodes(custom_id, body)
    splice = asking.splice(url, body)
    asking.lengths.add(url, body, len(data) if cut or own else math.inf)  # a row holds all of its own body
    asking.urls.add(url)
    return custom_id, splice if cut else ""


def check_encodes(custom_id, body):
    """Refuse what could not be sent, or kept, when its turn comes."""
    try:
        custom_id.encode()
        json.dumps(body, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError:
        raise BadRow("it holds half of a character (a lone surrogate); write the whole character")
    except ValueError:
        raise BadRow("NaN and Infinity are no JSON; write a number or null")


def place_of_row(source, line, data):
    """Where the user finds a row: a text is a file of its own."""
    if source.kind == "folder":
        return os.path.join(source.path, json.loads(data)["path"])
    return f"{'standard input' if source.path == '-' else source.path}:{line}"


def skip_or_fail(asking, where, bad, skipped):
    what, _, mend = bad.partition("; ")
    if asking.config.on_bad_row == "fail":
        raise UserError(where, what, f'{mend}, or set [prompts] on_bad_row = "skip"')
    skipped.append(f"{where}: {what}")


def check_unique(prompts, hashes):
    """Two rows of one custom_id could not be told apart in the results. Only equal hashes are looked at again:
    a set of a million names would take a hundred megabytes."""
    doubled, seen = doubled_among(hashes), {}
    if not doubled:
        return
    for number in (number for number, found in enumerate(hashes) if found in doubled):
        source, row, _ = key = prompts.key(number)
        custom_id = prompts.asking.of_record(prompts.sources[source], prompts.record(key), row)[0]
        if custom_id in seen:
            where = [place_of_row(prompts.sources[s], prompts.rows[s].line(r), prompts.rows[s][r])
                     for s, r in (seen[custom_id], (source, row))]
            raise UserError(where[1], f"custom_id {custom_id} stands already in {where[0]}",
                            "give each row its own, or set [prompts] id_column to a column that differs")
        seen[custom_id] = (source, row)


def doubled_among(hashes):
    """Those that stand there more than once. Equal ones are in the same part, and only one part at a time is made a
    set: as one, ten million numbers would take most of a gigabyte."""
    parts, doubled = [array.array("q") for _ in range(256)], set()
    for one in hashes:
        parts[one & 255].append(one)
    for part in parts:
        if len(set(part)) < len(part):
            doubled.update(one for one, times in collections.Counter(part).items() if times > 1)
    return doubled


def result_names(config, names):
    """Where each text prompt's answer goes below the results folder; the {name}s of two never meet."""
    stems = [os.path.splitext(os.path.basename(name))[0] for name in names]
    if len(set(stems)) < len(stems):
        stems = [name.replace(os.sep, "_") for name in names]
    template = config.results.file_name
    return [template.replace("{path}", path).replace("{name}", stem) for path, stem in zip(names, stems)]


def sample_names(name, samples):
    """The files of a text's answers: its own name, or one for each sample."""
    stem, ending = os.path.splitext(name)
    return [name] if samples == 1 else [f"{stem}.{sample + 1}{ending}" for sample in range(samples)]


def table_name(sources, source):
    """The file of a CSV's answers: its own name, or where several have it one that tells their folders."""
    same = [other.path for other in sources if other.kind == "csv"
            and os.path.basename(other.path) == os.path.basename(source.path)]
    if len(same) == 1:
        return os.path.basename(source.path)
    return os.path.relpath(source.path, os.path.commonpath(same)).replace(os.sep, "_")


def sample_columns(prompts):
    """By what several answers to one row are told apart. `prompts` is the input, or the config's table of it."""
    return ["sample", "seed"] if prompts.samples > 1 else []


def added_columns(config):
    """What the rows of a table get."""
    return sample_columns(config.prompts) + config.results.columns


def free_names(taken, names):
    """The names of more columns in a table: answer, or answer_2 where it has an answer of its own."""
    found = list(taken)
    for name in names:
        others = (f"{name}_{number}" for number in itertools.count(2))
        found.append(next(free for free in itertools.chain([name], others) if free not in found))
    return found[len(taken):]


def notes_on_columns(config, sources):
    return [f"{source.path} has a column {name} of its own: the new one is called {free}"
            for source in sources if source.kind == "csv"
            for name, free in zip(added_columns(config), free_names(source.columns, added_columns(config)))
            if name != free]


def check_result_names(config, prompts):
    """No answer may land on another, outside the results, or on a prompt."""
    folder = config.results.folder
    written, inputs = ["results.jsonl", "errors.jsonl"], set()
    for number, source in enumerate(prompts.sources):
        if source.kind == "folder":
            names = prompts.text_names(number)
            for name in result_names(config, names):
                written += sample_names(name, config.prompts.samples)
            inputs.update(os.path.realpath(os.path.join(source.path, name)) for name in names)
        elif source.kind == "csv":
            written.append(table_name(prompts.sources, source))
        inputs.add(os.path.realpath(source.path))
    taken = set(written)
    if len(taken) < len(written):
        twice = next(name for name in written if written.count(name) > 1)
        raise config.error("results.file_name", f"two answers would land in one file, {twice}",
                           'use "{path}" or "{name}" in it, or rename a prompt')
    for name in written:
        if not os.path.basename(name) or any(str(parent) in taken for parent in Path(name).parents):
            raise config.error("results.file_name", f'"{name}" cannot be a file beside the others', 'use "{name}.txt"')
        if os.path.isabs(name) or os.path.normpath(name).startswith(".."):
            raise config.error("results.file_name", f"{name} is outside the results folder", 'take out "/" and ".."')
        if folder and os.path.realpath(os.path.join(folder, name)) in inputs:
            raise config.error("results.folder", "the answers would overwrite the prompts", "name another folder")
    if folder:
        try:
            try_writing(folder)
        except OSError as error:
            raise config.error("results.folder", f"cannot be written to: {os_reason(error)}",
                               "name a folder that you may write to")



# ═══════════════════════════════════════════════════════════════════════════════
# 16 · Journal
#
# Owns what came back, on disk: the journal of results, what it holds after a restart, the files that
# users read. Nothing here holds all results: one is a byte of state and a place in a file. Knows
# nothing of HTTP.
# ═══════════════════════════════════════════════════════════════════════════════


class Result(NamedTuple):
    """What came of a prompt: a status and the body of the answer, or an error where there was no answer."""

    prompt: Prompt
    status: int
    body: bytes  # one line of JSON
    answer: Dict[str, Any]  # the same, read
    error: Optional[Dict[str, str]]
    started: float
    time_s: float
    attempts: int
    replica: int

    @property
    def ok(self):
        return self.status == 200


def journal_line(result):
    """A line in OpenAI's Batch output format. Its id holds the key and its end the verdict, so that a resume
    reads bytes and parses nothing."""
    (key, custom_id, _, _, seed), status, body, _, error, started, time_s, attempts, replica = result
    source, row, sample = key  # users count from 1
    name, seed = f"{source}_{row}_{sample}", "" if seed is None else f'"seed": {seed}, '
    if status:
        before, after = f'{{"status_code": {status}, "request_id": "req_{name}", "body": ', '}, "error": null'
    else:
        before, body, after = "null", b"", f', "error": {json.dumps(error)}'
    return b"".join((
        f'{{"id": "batch_req_{name}", "custom_id": {encode_text(custom_id)}, "response": {before}'.encode(), body,
        f'{after}, "llmrun": {{"row": {row + 1}, "sample": {sample + 1}, {seed}"started": {started:.3f}, '
        f'"time_s": {time_s:.4f}, "attempts": {attempts}, "replica": {replica}, '
        f'"ok": {"true" if status == 200 else "false"}}}}}\n'.encode()))


def key_in(record):
    """The key of a line's prompt."""
    return tuple(map(int, record["id"].split("_")[2:]))


LINE_BEGIN = b'{"id": "batch_req_'
KEY_IN_LINE = re.compile(rb'\{"id": "batch_req_(\d+)_(\d+)_(\d+)"')
LINE_END, OK_END = b"}}", b'"ok": true}}'


class Journal:
    """Appends results, in whole lines, to this life's own segments; a line is on disk before it counts.

    Lines are written soon, and the disk is asked to keep them at least every second, off the loop. After a
    write or sync that failed nobody knows what the disk kept: a new segment then takes all lines since the
    last good sync once more, and the merge sees each only once."""

    WRITE_AFTER_S, SYNC_AFTER_S, AGAIN_AFTER_S = 0.05, 1.0, 1.0

    def __init__(self, run, life, tell=lambda event, **facts: None):
        self.run, self.life, self.tell, self.disk = run, life, tell, run.disk
        self.segment, self.file = -1, -1
        self.lines, self.unsynced = [], []  # not written yet; written, but maybe not on the disk
        self.timer = self.syncing = self.lost = None
        self.trouble = ""  # why nothing can be written just now
        self.open_segment()

    def open_segment(self):
        if self.file >= 0:
            if self.disk.is_empty(self.file):
                return  # a full disk would be filled with empty files
            with contextlib.suppress(OSError):  # an old fault may be told once more; its lines are in the new segment
                self.disk.close(self.file)
            self.file = -1
        self.segment += 1
        self.file = self.disk.create(self.run.journal / f"{self.life}.{self.segment}.jsonl")

    def add(self, *results):
        self.lines += map(journal_line, results)
        if self.timer is None:
            self.timer = asyncio.get_running_loop().call_later(self.WRITE_AFTER_S, self.write)

    def write(self):
        if self.trouble:
            return
        if self.timer:
            self.timer.cancel()
            self.timer = None
        try:
            self.write_lines()
        except OSError as error:
            self.fail(error)
        if self.syncing is None and self.unsynced and not self.trouble:
            self.syncing = asyncio.ensure_future(self.sync())

    def write_lines(self):
        data = b"".join(self.lines)
        self.unsynced += [data] if data else []
        self.lines = []
        self.disk.append(self.file, data)

    async def sync(self):
        await asyncio.sleep(self.SYNC_AFTER_S)
        segment, synced = self.segment, len(self.unsynced)
        try:
            await asyncio.get_running_loop().run_in_executor(None, self.sync_file, self.file)
            if segment == self.segment and not self.trouble:
                del self.unsynced[:synced]
        except OSError as error:
            if segment == self.segment and not self.trouble:  # else it is known already
                self.fail(error)
        self.syncing = None

    def sync_file(self, file):
        """A failure is told once only, and may come when nobody waits for it any more."""
        try:
            self.disk.sync(file)
        except OSError:
            self.lost = file
            raise

    def hold(self, trouble):
        """Keep everything since the last good sync for a new segment, and say so."""
        self.lines, self.unsynced = self.unsynced + self.lines, []
        if not self.trouble:
            self.tell("journal_trouble", why=trouble, held=len(self.lines))
        self.trouble = trouble

    def fail(self, error):
        self.hold(os_reason(error))
        if self.timer:
            self.timer.cancel()
        self.timer = asyncio.get_running_loop().call_later(self.AGAIN_AFTER_S, self.try_again)

    def try_again(self):
        self.timer = None
        try:
            self.open_segment()
            self.write_lines()
            self.disk.sync(self.file)
        except OSError as error:
            self.fail(error)
            return
        self.well()

    def well(self):
        self.unsynced, self.trouble = [], ""
        self.tell("journal_well")

    async def written(self, until):
        """Wait while the disk has trouble, at most until then."""
        self.write()
        while self.trouble and clock() < until:
            await asyncio.sleep(0.1)

    def close(self):
        """Everything is on disk when this returns; after an OSError it may be tried again."""
        for waiting in (self.timer, self.syncing):
            if waiting:
                waiting.cancel()
        if self.lost == self.file and not self.trouble:
            self.hold("not synced")
        try:
            if self.trouble:
                self.open_segment()
            self.write_lines()
            self.disk.sync(self.file)
        except OSError as error:
            self.hold(os_reason(error))
            raise
        if self.trouble:
            self.well()
        self.disk.close(self.file)


class Marks:
    """What the journals hold: of each prompt its state, and the place of the line that counts.

    A success comes before an error, then the first by life and place, so that whoever merges gets the same."""

    OPEN, FAILED, DONE = 0, 1, 2
    NOWHERE = 2**64 - 1
    READ_BYTES = 2**22
    OPEN_FILES = 12

    def __init__(self, run, prompts, again=None):
        self.run, self.prompts, self.again = run, prompts, again or {}  # whose failures are taken as not asked yet
        self.segments, self.read_to = [], []
        self.state = bytearray(len(prompts))
        self.place = array.array("Q", b"\xff" * 8 * len(prompts))  # NOWHERE
        self.refresh()

    def refresh(self, but=None):
        """Read what the journals have gained since the last time, all or those of other lives than one; whether that
        was anything."""
        known, before = set(self.segments), sum(self.read_to)
        new = [segment for segment in self.run.segments() if segment not in known]
        self.segments += new
        self.read_to += [0] * len(new)
        for index, segment in enumerate(self.segments):
            if segment.life != but:
                self.read(index)
        return sum(self.read_to) > before

    def read(self, index):
        """The whole lines that one journal has gained; one without an end was torn by a crash, or is still to come."""
        most = self.READ_BYTES
        while True:
            data = self.run.disk.read(self.segments[index].path, self.read_to[index], most)
            end = data.rfind(b"\n") + 1
            if not end:
                if len(data) < most:
                    return
                most *= 2  # a line longer than that
            for line in data[:end].split(b"\n")[:-1]:
                match = KEY_IN_LINE.match(line)
                # Else it was torn, or a crash left a hole in it: then another segment has it, or it is asked again.
                if match and line.endswith(LINE_END) and not line.rfind(LINE_BEGIN) and b"\0" not in line:
                    self.mark(tuple(map(int, match.groups())), line.endswith(OK_END), index << 44 | self.read_to[index])
                self.read_to[index] += len(line) + 1

    def places(self):
        """{journal's file: up to where it was read}."""
        return {segment.path.name: end for segment, end in zip(self.segments, self.read_to)}

    def mark(self, key, ok, place):
        if not ok and self.again and place & (2**44 - 1) < self.again.get(self.segments[place >> 44].path.name, 0):
            return
        number, state = self.prompts.number(key), self.DONE if ok else self.FAILED
        if number < len(self.state) and (state > self.state[number] or state == self.state[number]
                                         and self.order(place) < self.order(self.place[number])):
            self.state[number], self.place[number] = state, place

    def order(self, place):
        return (1,) if place == self.NOWHERE else (0, self.segments[place >> 44], place & (2**44 - 1))

    def settle(self, number, ok):
        """Count a result of our own at once; `refresh` finds its place when it is written."""
        state = self.DONE if ok else self.FAILED
        if state > self.state[number]:
            self.state[number], self.place[number] = state, self.NOWHERE

    def count(self, state):
        return self.state.count(state)

    def lines(self, states):
        """(number, line) of each prompt in one of these states, in input order. A few files are open at a time: a run
        of many lives has more than a process may open."""
        files = {}  # segment's index → its file, the last used last
        try:
            for number, state in enumerate(self.state):
                if state in states:
                    index = self.place[number] >> 44
                    file = files[index] = files.pop(index, None) or open(self.segments[index].path, "rb")
                    if len(files) > self.OPEN_FILES:
                        files.pop(next(iter(files))).close()
                    file.seek(self.place[number] & (2**44 - 1))
                    yield number, file.readline()
        finally:
            for file in files.values():
                file.close()


MISSHAPEN = (ValueError, TypeError, AttributeError, LookupError)  # what reading a strange answer raises


def answer_of(body):
    """What an answer says, whichever engine and endpoint gave it: its text, its reasoning, why it ended. One that has
    the shape of none says nothing."""
    try:
        choice = (body.get("choices") or [{}])[0]
        message = choice.get("message") or {}
        text = message.get("content") or choice.get("text") or message.get("refusal") or ""
        if not text and message.get("tool_calls"):
            text = message["tool_calls"]
        if not text and body.get("data"):
            text = body["data"][0].get("embedding")
        usage = body.get("usage") or {}
        return {"answer": as_text(text),
                "reasoning": message.get("reasoning_content") or message.get("reasoning") or "",
                "finish_reason": choice.get("finish_reason") or "", "prompt_tokens": usage.get("prompt_tokens") or 0,
                "completion_tokens": int(usage.get("completion_tokens") or 0)}
    except MISSHAPEN:
        return answer_of({})


def columns_of(record):
    """The columns of a journal line: what `answer_of` finds, or the error, and which prompt's it is."""
    body, found = (record["response"] or {}).get("body") or {}, {"seed": "", **record["llmrun"]}
    took_s = engine_time(body, found["time_s"])
    which = {"custom_id": record["custom_id"], "sample": found["sample"], "seed": found["seed"],
             "time_s": round(took_s, 3), "waited_s": round(found["time_s"] - took_s, 3)}
    if found["ok"]:
        return {**which, **answer_of(body), "error": ""}
    return {**which, **answer_of({}), "error": error_text(record["error"] or body)}


def engine_time(body, most_s):
    """How long the engine worked at an answer, as far as it says so: some prompts wait there for a slot."""
    try:
        return min(most_s, (body["timings"]["prompt_ms"] + body["timings"]["predicted_ms"]) / 1000)
    except MISSHAPEN:
        return most_s


def error_text(body):
    """The words of an error, in any of the shapes that engines give it."""
    error = body.get("error", body) if isinstance(body, dict) else body
    return str(error.get("message", error)) if isinstance(error, dict) else str(error)


def write_results(run, config, marks):
    """Write the results, and again what the journals gained meanwhile: whoever else wrote a newer set of them just then
    must not find an older one over it. Of a run that goes on that may be so each time."""
    for tries in itertools.count(1):
        folder = write_all_results(run, config, marks)
        if not marks.refresh() or tries > 2 and marks.count(Marks.OPEN):
            return folder
    return None


def write_all_results(run, config, marks):
    """Write what the user asked for from the journals: results.jsonl in input order, errors.jsonl, and the shape
    that each source came in: a text file for each text file, a CSV with answer columns for a CSV."""
    folder = Path(config.results.folder) if config.results.folder else run.results
    folder.mkdir(parents=True, exist_ok=True)
    prompts = marks.prompts
    for name, states in (("results.jsonl", (Marks.DONE,)), ("errors.jsonl", (Marks.FAILED,))):
        if name == "results.jsonl" or marks.count(Marks.FAILED):
            with whole_file(folder / name) as file:
                file.writelines(line for _, line in marks.lines(states))
        else:
            with contextlib.suppress(FileNotFoundError):
                (folder / name).unlink()
    kinds = [source.kind for source in prompts.sources]
    if "folder" in kinds:
        write_texts(folder, config, prompts, marks)
    if "csv" in kinds:
        write_tables(folder, config, prompts, marks)
    return folder


def write_tables(folder, config, prompts, marks):
    """The CSVs, each with its answers, in one pass over them all."""
    lines = marks.lines((Marks.DONE, Marks.FAILED))
    for number, own in itertools.groupby(lines, lambda one: prompts.key(one[0])[0]):
        source = prompts.sources[number]
        if source.kind == "csv":
            try:
                check_unchanged(source)
            except (UserError, FileNotFoundError):
                log(f"{source.path} is not what was submitted: its answers are in results.jsonl alone")
            else:
                write_csv(folder, config, prompts, own, source)


def write_texts(folder, config, prompts, marks):
    names = {}
    for number, line in marks.lines((Marks.DONE,)):
        source, row, sample = prompts.key(number)
        if prompts.sources[source].kind == "folder":
            if source not in names:
                names[source] = result_names(config, prompts.text_names(source))
            path = folder / sample_names(names[source][row], prompts.samples)[sample]
            path.parent.mkdir(parents=True, exist_ok=True)
            answer = answer_of(json.loads(line)["response"]["body"])["answer"].encode(errors="replace")
            with contextlib.suppress(OSError):
                if path.read_bytes() == answer:
                    continue
            write_file(path, answer)


def write_csv(folder, config, prompts, lines, source):
    """The rows of a CSV source as they were, each with the columns of its answer."""
    columns, separator = added_columns(config), source.separator
    with whole_file(folder / table_name(prompts.sources, source)) as file:
        file.write(csv_row(source.columns + free_names(source.columns, columns), separator))
        for number, line in lines:
            answer, record = columns_of(json.loads(line)), prompts.record(prompts.key(number))
            file.write(csv_row(list(record.values()) + [answer[name] for name in columns], separator))


def csv_row(cells, separator=","):
    """A line of a table. The csv module quotes only those ends of lines that it writes itself."""
    buffer = io.StringIO()
    csv.writer(buffer, delimiter=separator, lineterminator="\r\n").writerow(cells)
    return buffer.getvalue()[:-2].encode(errors="replace") + b"\n"


class Tally:
    """Counts of the answers of a life, and whether they look like answers at all."""

    def __init__(self):
        self.answers = self.failed = self.tokens = self.empty = self.cut = 0
        self.first, self.all_same = None, True

    def add(self, result):
        if not result.ok:
            self.failed += 1
            return
        found = answer_of(result.answer)
        self.tokens += found["completion_tokens"]
        self.answers += 1
        self.empty += not found["answer"].strip()
        self.cut += found["finish_reason"] == "length"
        if self.all_same:
            text = hash(found["answer"])
            self.first = text if self.first is None else self.first
            self.all_same = text == self.first

    def doubt(self):
        """What is suspicious about the answers as a whole, in words for the user."""
        if self.answers and self.empty == self.answers:
            return (f"all {self.answers} answers are empty: is the chat template right, or max_tokens too small "
                    "to end thinking?")
        if self.answers >= 10 and self.all_same:
            return f"all {self.answers} answers are the same: do the prompts reach the model?"
        if self.answers >= 2 and self.cut * 2 > self.answers:
            return (f"{self.cut} of {self.answers} answers of this job were cut off by their length: raise max_tokens "
                    "in [prompts], or in the rows that say their own")
        return ""


# ═══════════════════════════════════════════════════════════════════════════════
# 17 · Claims
#
# Owns which prompts are whose when drivers share a run: by links and beats in a folder that all of them
# see. Leaves what is finished to the journals, which are the truth.
# ═══════════════════════════════════════════════════════════════════════════════

LATER = -1  # no prompt to ask just now, but there may be one later


def chunk_starts(total, jobs):
    """Where each chunk of the prompts begins, and the end: large ones first, single prompts last, so that all
    drivers end together. A run of one job is cut as for eight: others may join it."""
    starts, parts = [0], 2 * max(jobs, 8)
    while starts[-1] < total:
        starts.append(starts[-1] + max(1, (total - starts[-1]) // parts))
    return starts


class Claims:
    """Which prompts are this driver's to ask, among all drivers that share a run.

    The journals are the truth; claims only keep drivers apart, and a claim too many costs some prompts asked twice.
    CHUNK.GENERATION is a file that one driver gets by a link and nobody deletes. When no chunk is unclaimed, one with
    prompts left is taken over, as its next generation, from an owner that is gone: it said so, it was an earlier life
    of this job, its process is not there, or its beat has stood still for a minute of our own clock."""

    BEAT_S, LOOK_S, STILL_S, BEATS_A_TURN = 10.0, 2.0, 60.0, 10

    def __init__(self, run, life, marks, starts, clock=clock):
        self.run, self.life, self.marks, self.starts, self.clock = run, life, marks, starts, clock
        self.mine = iter(())  # the prompts of the claimed chunk that are not given out yet
        self.chunk = 0  # all before it are claimed by somebody
        self.owners = {}  # (chunk, generation) → the life that has it
        self.beats = {}  # a life's name → its beat, and since when it stands there
        self.held = set()  # (chunk, generation) of our own claims
        self.under_way = set()  # the prompts that were given out and have no result yet
        self.count = 0
        self.looked, self.read_beats = -math.inf, {}  # when, and each life's beat as it was then
        self.claimed = []  # chunks to look at for what their owners left, the last first
        self.trouble = ""  # why none can be claimed just now
        self.beat()
        self.generations = run.generations()

    @property
    def finished(self):
        """Whether every prompt has a result, whoever got it."""
        return self.marks.state.find(Marks.OPEN) < 0

    def next(self):
        """The number of the next prompt to ask; LATER when all are claimed, None when all have results."""
        while True:
            for number in self.mine:
                if not self.marks.state[number] and number not in self.under_way:
                    self.under_way.add(number)
                    return number
            try:
                claimed = self.claim_next() or not self.finished and self.take_over()
                self.trouble = ""
            except OSError as error:
                if error.errno not in PASSING_TROUBLE:
                    raise
                self.trouble = os_reason(error)
                return LATER
            if not claimed:
                return None if self.finished else LATER

    def claim_next(self):
        """Claim the first chunk that nobody has."""
        while self.chunk < len(self.starts) - 1:
            if self.chunk not in self.generations and self.open(self.chunk) and self.claim(self.chunk, 0):
                return True
            self.chunk += 1
        return False

    def open(self, chunk):
        return self.marks.state.find(Marks.OPEN, self.starts[chunk], self.starts[chunk + 1]) >= 0

    def claim(self, chunk, generation):
        """Whether we got it; a link that a file server did twice says "taken" for our own."""
        new = self.run.disk.put_new(self.run.claim_file(chunk, generation), str(self.life).encode())
        self.generations[chunk] = generation
        if not new and self.owner(chunk, generation) != self.life:
            self.generations.update(self.run.generations())
            return False
        return self.hold(chunk, generation)

    def hold(self, chunk, generation):
        """Take up a claim of ours, and what was answered until then by whoever had it before."""
        self.owners[chunk, generation] = self.life
        if generation:
            self.marks.refresh(but=self.life)
        self.held.add((chunk, generation))
        self.mine = iter(range(self.starts[chunk], self.starts[chunk + 1]))
        return True

    def settle(self, key, ok):
        """A result of our own."""
        number = self.marks.prompts.number(key)
        self.under_way.discard(number)
        self.marks.settle(number, ok)

    @property
    def rest_s(self):
        """Between two looks of who has nothing to do: the more there are to look at, the longer."""
        return max(self.LOOK_S, len(set(self.owners.values())) / self.BEATS_A_TURN)

    def take_over(self):
        """Claim a chunk that its owner left with prompts to ask: the next of those that were claimed at the last look,
        and if that is long enough ago, at a new one."""
        if not self.claimed and self.clock() - self.looked >= self.rest_s:
            self.look()
            self.claimed = sorted(self.generations, reverse=True)
        while self.claimed:
            chunk = self.claimed.pop()
            if self.open(chunk):
                generation = self.generations[chunk]
                owner = self.owner(chunk, generation)
                if owner == self.life and (chunk, generation) not in self.held:
                    return self.hold(chunk, generation)  # a link that was made, though we were told of a failure
                if owner != self.life and self.is_gone(owner, chunk) and self.claim(chunk, generation + 1):
                    return True
        return False

    def look(self):
        self.looked, self.read_beats = self.clock(), {}
        self.marks.refresh(but=self.life)  # our own results are counted as they come
        self.generations.update(self.run.generations())

    def owner(self, chunk, generation):
        """The life that has a claim, or None while its file cannot be seen here yet."""
        if (chunk, generation) not in self.owners:
            said = self.run.disk.read(self.run.claim_file(chunk, generation)).decode()
            if not said:
                return None
            self.owners[chunk, generation] = Life(*map(int, said.split(".")))
        return self.owners[chunk, generation]

    def is_gone(self, owner, chunk=None, still_s=STILL_S):
        """Whether the owner of a chunk will do no more of it; None is one whose claim cannot be seen here yet."""
        if owner is None:
            return self.stood_still_s(f"the owner of {chunk}", b"") > still_s
        if owner.job and owner.job == self.life.job and owner.restart < self.life.restart:
            return True
        if owner not in self.read_beats:
            self.read_beats[owner] = self.run.disk.read(self.run.beat_file(owner))
        beat = self.read_beats[owner]
        if beat == Run.ENDED_BEAT:
            return True
        process = re.fullmatch(rb"\d+ (\S+) (\d+) (\d+)", beat)
        if process and process.group(1).decode() == socket.gethostname() and process_birth(
                int(process.group(2))) != int(process.group(3)):
            return True
        return self.stood_still_s(str(owner), beat) > still_s

    def stood_still_s(self, life, beat):
        """For how long, by our own clock, a life's beat has been this one."""
        if self.beats.get(life, (None, 0))[0] != beat:
            self.beats[life] = beat, self.clock()
        return self.clock() - self.beats[life][1]

    def watch_beats(self):
        """Look at some of the others each time: who stands still is known by when we have nothing left to do."""
        others = [name for name in self.run.disk.names(self.run.claims) if name.startswith("beat.")]
        for turn in range(min(self.BEATS_A_TURN, len(others))):
            name = others[(self.count * self.BEATS_A_TURN + turn) % len(others)]
            self.stood_still_s(name[5:], self.run.disk.read(self.run.claims / name))

    def beat(self):
        """Show the others that we live."""
        self.count += 1
        pid = os.getpid()
        with contextlib.suppress(OSError):  # a full disk costs a takeover at most
            self.run.disk.put(self.run.beat_file(self.life),
                              f"{self.count} {socket.gethostname()} {pid} {process_birth(pid)}".encode())

    def end(self):
        """What is left of our chunks is anybody's from now on."""
        with contextlib.suppress(OSError):
            self.run.disk.put(self.run.beat_file(self.life), Run.ENDED_BEAT)

    def all_with_others(self):
        """Whether all that has no result is claimed by drivers that live: nothing is left for this job."""
        self.look()
        return self.left_to_others(self.STILL_S)

    def left_to_others(self, still_s):
        """The same, as far as was seen at the last look, of those whose beat stands still no longer than that."""
        for chunk in filter(self.open, range(len(self.starts) - 1)):
            owner = self.owner(chunk, self.generations[chunk]) if chunk in self.generations else self.life
            if owner == self.life or self.is_gone(owner, chunk, still_s):
                return False
        return True


# ═══════════════════════════════════════════════════════════════════════════════
# 18 · Pump
#
# Owns how prompts become results: who asks what when, retries, deadlines and the balance between
# replicas. The pump knows nothing of files (prompts come from a function, results go to one) and nothing
# of engines beyond a client, a number of prompts at a time, and a promise to say when they fail.
# ═══════════════════════════════════════════════════════════════════════════════

RETRY_STATUS = {408, 409, 425, 429}  # and all of 5xx: what can pass by itself
MAX_ATTEMPTS = 6
LAST_MOMENTS_S = 15.0  # before the job's end: for the last results and the teardown
FOR_EVER_S = 30 * 86400.0


class InHand:
    """A prompt from the moment it is taken from the input until it has a result. Where it stands is its tray, and
    nothing else: `put` is the one change of state, and how many there are of a kind is how many lie in its tray."""

    __slots__ = ("prompt", "tray", "timer", "attempts", "began", "failed", "then", "deaths")

    def __init__(self, prompt):
        self.prompt, self.tray, self.timer = prompt, None, None
        self.attempts = 0  # how often it was asked and not answered for good
        self.began = self.failed = 0.0  # when it was asked last, and when it came to nothing last
        self.deaths = 0  # how many engines died while it was under way

    def put(self, tray):
        """Into another tray; None is for one that has a result, or is left to another life."""
        if self.tray is not None:
            del self.tray[self.prompt.key]
        if self.timer:
            self.timer.cancel()
            self.timer = None
        self.tray = tray
        if tray is not None:
            tray[self.prompt.key] = self


class Desk:
    """What one replica is asked just now, and what came back since the pump looked."""

    def __init__(self, replica, pump):
        self.replica = replica
        self.under_way = {}  # trays, key → InHand: what it is asked,
        self.alone = {}  # one that it is asked alone, and that is judged here if the engine dies,
        self.refused = {}  # and what it could not be asked, which keeps its slot for a moment
        self.came = []  # (prompt in hand, Message or WireError)
        self.broken = {}  # prompt in hand → when its answer broke off, unless it was answered since
        self.accused = []  # what may have killed the engine
        self.turn, self.alarm = asyncio.Event(), None
        self.pulse = Pulse(self, pump)

    @property
    def trays(self):
        return [self.under_way, self.alone, self.refused]

    @property
    def room(self):
        """How many more it may be asked; none beside a prompt that is asked alone."""
        free = self.replica.engine.in_flight - len(self.under_way) - len(self.refused)
        return 0 if self.alone or self.pulse.in_doubt else max(0, free)

    def ask(self, hand, tray, now, limit):
        hand.began, hand.then = now, functools.partial(self.answered, hand)  # the second is what its client calls
        hand.put(tray)
        prompt = hand.prompt
        self.replica.client.ask("POST", prompt.url, prompt.body, limit, hand.then)

    def answered(self, hand, outcome):
        hand.then = None  # it holds the prompt in hand, which would live until Python looks for such rings
        self.came.append((hand, outcome))
        self.turn.set()

    def note_broken(self, hand, since):
        """Its answer broke off just now; what broke before `since` was not its engine's end."""
        self.broken.pop(hand, None)  # those that broke last stand last
        self.broken[hand] = clock()
        while next(iter(self.broken.values())) <= since:
            del self.broken[next(iter(self.broken))]

    def look_again(self, delay_s):
        """Wake the pump after a while, once."""
        def ring():
            self.alarm = None
            self.turn.set()
        self.alarm = self.alarm or asyncio.get_running_loop().call_later(delay_s, ring)

    def take(self):
        came, self.came = self.came, []
        self.turn.clear()
        return came


class Pulse:
    """Whether the engine at a desk answers: that it lives does not say so.

    Where requests come to nothing, it is asked a small question of ours. If it answers that, they fail for reasons of
    their own; if not, then after some failures it is asked nothing else, and after a while it is sick. Where nothing
    comes at all, its health and its figures tell a long answer from none."""

    LOOK_S = 2.0
    SICK_S, SICK_FAILURES = 60.0, 20  # no answer for so long, and so many 5xx, timeouts and broken connections
    SIGNS_S = 30.0  # between two looks for signs of life in one that says nothing
    UNWELL_S = 300.0  # without a word that it is well
    STILL_S, FIRST_S = 900.0, 3600.0  # without a move, at the least; the second before anything was ever answered
    MUCH_MORE = 4  # than its max_tokens make likely, an answer may take

    def __init__(self, desk, pump):
        self.desk, self.replica, self.pump = desk, desk.replica, pump
        self.answered = 0.0  # when, last; to refuse a question for what is wrong with it is an answer
        self.failures, self.failing = 0, 0.0  # how many came to nothing since then, and since when
        self.failed, self.words = None, ""  # the last of them, and why
        self.since = self.looked = self.well = self.moved = clock()
        self.figures = []

    @property
    def in_doubt(self):
        return self.failures >= self.SICK_FAILURES

    @property
    def asked(self):
        """What it is asked just now, the oldest first."""
        return [*self.desk.under_way.values(), *self.desk.alone.values()]

    def note_failure(self, prompt, words):
        if not self.failures:
            self.failing = clock()
        self.failures, self.failed, self.words = self.failures + 1, prompt, words

    async def watch(self):
        """Ends only when the engine is sick, with that error."""
        while True:
            if await stalled(self.LOOK_S):  # nobody could answer
                self.since = clock()
            if self.failures:
                await self.ask_small_question()
            failing_s = clock() - max(self.since, self.failing)
            if self.in_doubt and failing_s > self.SICK_S and not self.asked:
                raise self.sick(failing_s, f"{self.failures} requests failed, the last with: {self.words}")
            if self.quiet_s(self.looked) > self.SIGNS_S:
                await self.look_for_signs()
            self.give_up_late()

    async def ask_small_question(self):
        url = self.failed.url
        body = {"model": json.loads(self.failed.body).get("model", ""), **SMALL_QUESTIONS[url]}
        try:
            outcome = await self.replica.client.request("POST", url, json_bytes(body), min(
                self.UNWELL_S, self.replica.engine.request_timeout))
        except WireError as error:
            outcome = error
        status, _, answer, error, _ = reply_of(outcome)
        if 0 < status < 500:
            self.answered, self.failures = clock(), 0
            self.desk.turn.set()
        else:
            self.note_failure(self.failed, error_text(error or answer))

    def quiet_s(self, *signs):
        """For how long what it was asked first waits, without an answer or one of these signs of life."""
        began = [hand.began for hand in self.asked[:1]]
        return clock() - max(began[0], self.since, self.answered, *signs) if began else 0.0

    async def look_for_signs(self):
        self.looked = clock()
        well, figures = await self.replica.signs()
        if well:
            self.well = clock()
        if figures and figures != self.figures:
            self.moved, self.figures = clock(), figures
        if self.quiet_s(self.well) > self.UNWELL_S:
            raise self.sick(self.quiet_s(self.well), "it does not even say that it is well")
        patience_s = max([self.patience_s(hand.prompt) for hand in self.asked], default=math.inf)
        if self.quiet_s(self.moved) > patience_s:
            raise self.sick(self.quiet_s(self.moved), "it says that it is well, and nothing comes")

    def give_up_late(self):
        """What is not answered, though others are: it is asked again."""
        for hand in self.asked:
            waited_s = clock() - max(hand.began, self.since)
            if self.pump.last_answer and waited_s > self.STILL_S and waited_s > self.patience_s(hand.prompt):
                self.replica.client.give_up(hand.then)

    def patience_s(self, prompt):
        """How long it may take: as the user says, else by its max_tokens at the pace of the last answer."""
        if self.replica.engine.request_timeout < math.inf:
            return self.replica.engine.request_timeout + self.LOOK_S
        if not self.pump.last_answer:
            return self.FIRST_S if self.figures else math.inf
        answer, took_s = self.pump.last_answer
        body, tokens = json.loads(prompt.body), answer_of(answer)["completion_tokens"]
        allowed = max([int(body[name]) for name in LENGTH_KEYS & set(body)], default=0)
        return max(self.STILL_S, self.MUCH_MORE * took_s * max(1.0, allowed / max(1, tokens)))

    def sick(self, time_s, why):
        return EngineSick("", f"{self.replica.title} lives, but answered nothing for {show_duration(time_s)}: {why}",
                          "`logs` shows what it said")


SMALL_QUESTIONS = {CHAT: {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1},
                   COMPLETIONS: {"prompt": "Hi", "max_tokens": 1}, EMBEDDINGS: {"input": "Hi"}}


class Pump:
    """Asks every prompt once, of whichever replica is free, until none is left or it is told to stop.

    A replica takes its next prompt when it has room, so a faster one takes more; no other balance is needed.
    All that came back in one turn of the loop is settled together, step by step, and all that there is room for is
    asked together: a task or a future for each prompt would cost as much as the rest of its way.
    `next_number()` gives a prompt's number, LATER, or None for ever; `finish(results)` takes what came of some."""

    REST_S = 0.05  # where nothing can be asked just now
    READ_AGAIN_S = 1.0  # what could not be read
    DEATH_NOTICE_S = 3.0  # a broken connection is known so much sooner than its engine's death
    DEATH_PAUSE_S = 2.0  # an engine that ended because its job does is no crash: that is known by then

    def __init__(self, next_number, read, finish, ends_at, held=lambda: ""):
        self.next_number, self.read, self.finish = next_number, read, finish
        self.ends_at, self.held = ends_at, held
        self.waiting = {}  # trays, key → InHand: to be asked once more as soon as there is room,
        self.resting = {}  # when its time has come,
        self.suspects = {}  # or alone: two engines died with it under way
        self.desks = {}  # replica → its desk, with trays of its own
        self.most_again = 0
        self.unread, self.read_at = None, 0.0  # the number of a prompt that could not be read, and when it is next
        self.trouble = ""  # why it could not
        self.exhausted = self.draining = False
        self.over = asyncio.Event()  # nothing is left to ask or to wait for, not even for an engine that starts
        self.first_sent = None
        self.usual_s = 0.0  # how long a prompt takes: a moving average of the answered ones
        self.last_answer = None  # and how long that took

    async def run(self, pairs):
        """Work with each replica from the moment it is ready; fails when the last one has."""
        over = asyncio.ensure_future(self.over.wait())
        tasks = [asyncio.ensure_future(self.work_with(*pair)) for pair in pairs]
        try:
            left, error = {over, *tasks}, None
            while len(left) > 1:
                done, left = await asyncio.wait(left, return_when=asyncio.FIRST_COMPLETED)
                if over in done:
                    return
                for task in done:
                    error = task.exception()
                    if not isinstance(error, ClusterError):
                        return task.result()
            raise error
        finally:
            for task in [over, *tasks]:
                task.cancel()
            await asyncio.gather(over, *tasks, return_exceptions=True)

    @property
    def trays(self):
        return [self.waiting, self.resting, self.suspects, *(
            tray for desk in self.desks.values() for tray in desk.trays)]

    @property
    def finished(self):
        return (self.exhausted or self.draining) and not any(self.trays)

    async def work_with(self, replica, start):
        """Ask one replica until all is done, and again after each time that it dies and comes back."""
        try:
            await asyncio.shield(start)
        except ProgramFailed as error:
            if not error.killed:
                raise
            await replica.recover(error, restarts=1)
        try:
            while True:
                desk = self.desks[replica.number] = Desk(replica, self)
                self.most_again = sum(desk.replica.engine.in_flight for desk in self.desks.values())
                try:
                    return await replica.unless_failed(self.serve(desk))
                except ProgramFailed as error:
                    await asyncio.sleep(self.DEATH_PAUSE_S)
                    if isinstance(error, EngineSick):
                        self.take_from_alone(desk)
                    else:
                        self.blame(desk)
                    if self.finished:
                        return None
                    await replica.recover(error, worked=desk.pulse.answered > 0)
        except ClusterError:  # it dies again and again, or its node was lost: the others ask what it was asked alone
            self.take_from_alone(desk)
            raise

    def take_from_alone(self, desk):
        for hand in list(desk.alone.values()):
            self.put_back(hand)

    def time_left(self):
        """How long a prompt that is asked now may take."""
        return min(self.ends_at - LAST_MOMENTS_S - clock(), FOR_EVER_S)

    async def serve(self, desk):
        watching = asyncio.ensure_future(desk.pulse.watch())
        watching.add_done_callback(lambda _: desk.turn.set())
        try:
            self.fill(desk)
            while not self.finished:
                await desk.turn.wait()
                self.settle_all(desk)
                if watching.done():
                    watching.result()
                self.fill(desk)
        finally:
            self.leave(desk)
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)

    def fill(self, desk):
        """Ask as many prompts as there is room for; none whose result could not be written."""
        if self.usual_s > self.time_left() and not self.draining:
            self.drain()
        if self.held():
            return desk.look_again(self.REST_S)
        alone = self.suspects and not any(desk.trays) and desk.room
        taken = [next(iter(self.suspects.values()))] if alone else self.take(desk)
        now = clock()
        limit = now + min(self.time_left(), desk.replica.engine.request_timeout)
        if taken and not self.first_sent:
            self.first_sent = now
        for hand in taken:
            desk.ask(hand, desk.alone if alone else desk.under_way, now, limit)

    def take(self, desk):
        """As many prompts as there is room for, those first that are to be asked once more; new ones only while no
        more than may be under way wait for that."""
        again = list(itertools.islice(self.waiting.values(), desk.room))
        enough = len(self.waiting) - len(again) + len(self.resting) >= self.most_again
        if enough or len(again) == desk.room or self.exhausted or self.draining:
            return again
        return again + self.take_new(desk, desk.room - len(again))

    def take_new(self, desk, room):
        """Up to so many from the input. What cannot be read just now is read later; what is not there any more as it
        was has failed."""
        hands, lost = [], []
        if clock() < self.read_at:
            desk.look_again(self.READ_AGAIN_S)
            return hands
        while len(hands) + len(lost) < room:
            number = self.next_number() if self.unread is None else self.unread
            if number is None or number == LATER:
                self.exhausted = number is None
                break
            try:
                hands.append(InHand(self.read(number)))
            except LostPrompt as error:
                lost.append(self.lose(desk, error))
            except OSError as error:
                self.unread, self.read_at, self.trouble = number, clock() + self.READ_AGAIN_S, os_reason(error)
                desk.look_again(self.READ_AGAIN_S)
                break
            if self.unread is not None:
                self.unread, self.trouble = None, ""
        if lost:
            self.finish(lost)
            desk.turn.set()
        return hands

    def lose(self, desk, lost):
        """The result of a prompt that was never asked."""
        hand = InHand(lost.prompt)
        hand.began = clock()
        return self.conclude(desk, hand, no_reply("lost", str(lost)))

    def settle_all(self, desk):
        results = []
        for hand, outcome, reply in [(hand, outcome, reply_of(outcome)) for hand, outcome in desk.take()]:
            if isinstance(outcome, Unreachable):  # the engine may be about to end, or overrun: its slot rests a moment
                desk.pulse.note_failure(hand.prompt, str(outcome))
                hand.put(desk.refused)
                self.after(self.REST_S, hand, self.put_back)
                continue
            broken = not reply[0]
            if broken:
                desk.note_broken(hand, clock() - self.DEATH_NOTICE_S)
            elif desk.broken:
                desk.broken.pop(hand, None)
            if broken and hand.tray is desk.alone:  # did the engine die of it? It is alone until that is known
                self.after(self.DEATH_NOTICE_S, hand, lambda hand, reply=reply: self.settle(desk, hand, reply))
            else:
                results.append(self.settle(desk, hand, reply))
        results = list(filter(None, results))
        if results:
            self.finish(results)

    def after(self, delay_s, hand, step):
        """Take a step with a prompt when it has lain in its tray for so long."""
        def now():
            result = step(hand)
            if result:
                self.finish([result])
            self.wake_all()
        hand.timer = asyncio.get_running_loop().call_later(delay_s, now)

    def leave(self, desk):
        """What is under way goes back: its replica failed, or the run is stopping, and it was not answered. What was
        asked alone stays, no longer to be settled by its timer but by `blame`."""
        self.settle_all(desk)
        since = clock() - self.DEATH_NOTICE_S
        broken = [hand for hand, broke in desk.broken.items() if broke > since]
        desk.accused = list(dict.fromkeys([*desk.under_way.values(), *broken]))
        for hand in [*desk.under_way.values(), *desk.refused.values()]:
            self.put_back(hand)
        for hand in list(desk.alone.values()):
            hand.put(desk.alone)
        self.wake_all()

    def wake_all(self):
        for desk in self.desks.values():
            desk.turn.set()
        if self.finished:
            self.over.set()

    def put_back(self, hand):
        """To be asked again by whoever has room, or by another life."""
        hand.put(None if self.draining else self.waiting)
        self.wake_all()

    def settle(self, desk, hand, reply):
        """The result that a reply makes, or none: it is asked once more where that may help."""
        status, now, pulse = reply[0], clock(), desk.pulse
        hand.attempts += 1
        if 0 < status < 500:
            pulse.answered, pulse.failures = now, 0
        if status == 200:
            took = now - hand.began
            self.usual_s = took if not self.usual_s else 0.95 * self.usual_s + 0.05 * took
            self.last_answer = reply[2], took
        elif self.can_come(pulse, hand, reply):
            delay = max(reply[4], min(30.0, 0.25 * 2 ** hand.attempts)) * (0.75 + secrets.randbelow(500) / 1000)
            self.rest(hand, delay)
            return None
        return self.conclude(desk, hand, reply)

    def can_come(self, pulse, hand, reply):
        """Whether an answer may come another time. It has failed for good only where since its last failure the engine
        has answered something else."""
        status, _, answer, error, _ = reply
        before, hand.failed = hand.failed, clock()
        if not 0 < status < 500:
            pulse.note_failure(hand.prompt, error_text(error or answer))
        enough = hand.attempts >= MAX_ATTEMPTS and pulse.answered >= before
        return can_pass(status) and (self.draining or not enough)

    def conclude(self, desk, hand, reply):
        status, body, answer, error, _ = reply
        hand.put(None)
        return Result(hand.prompt, status, body, answer, error, hand.began + CLOCK_TO_DATE, clock() - hand.began,
                      hand.attempts, desk.replica.number)

    def rest(self, hand, delay_s):
        """Ask once more after a while; the slot is free meanwhile."""
        if self.draining:
            return self.put_back(hand)
        hand.put(self.resting)
        return self.after(delay_s, hand, self.put_back)

    def drain(self):
        """Let the prompts under way finish; take no new ones, and none once more."""
        self.draining = True
        for tray in (self.waiting, self.resting, self.suspects):
            for hand in list(tray.values()):
                hand.put(None)
        self.wake_all()

    def blame(self, desk):
        """An engine died. What was under way in two such deaths is asked alone, which tells the one from the others."""
        for hand in list(desk.alone.values()):
            hand.attempts += 1
            desk.replica.forgive()
            self.finish([self.conclude(desk, hand, no_reply(
                "engine_died", "in flight when the engine died, also when it was asked alone"))])
        for hand in desk.accused:
            hand.deaths += 1
            if hand.deaths >= 2 and (hand.tray is self.waiting or hand.tray is self.resting):
                hand.put(self.suspects)


def can_pass(status):
    """Whether the same question may be answered another time.

    llama.cpp's "Context size has been exceeded" is a 500 that depends on what else runs, so it may, too; 501 is what it
    was not started for."""
    return not status or status in RETRY_STATUS or status >= 500 and status != 501


def reply_of(outcome):
    """(status, body, answer, error, wait_s) of a Message or a WireError: the body as one line of JSON, and read;
    an error where there is no answer; how long the engine wants to be left alone."""
    if isinstance(outcome, WireError):
        return no_reply("connection", str(outcome))
    head, body = outcome
    status, wait_s = head.status, retry_after(head.headers)
    if head.streams:
        try:
            answer = assemble_stream(body)
        except MISSHAPEN as broken:
            return no_reply("stream", str(broken))
        return status, json_bytes(answer), answer, None, wait_s
    try:
        answer = read_json(body)
        if not isinstance(answer, dict):
            raise ValueError
    except ValueError:
        text = body[:500].decode("utf-8", "replace")
        if status == 200:
            return no_reply("not_json", f"the engine's answer is not JSON: {text}")
        answer = {"error": {"message": text}}
        return status, json.dumps(answer).encode(), answer, None, wait_s
    if status == 200 and not is_answer(answer):
        if answer.get("error") or answer.get("object") == "error":  # its head had left before it failed
            return no_reply("engine", error_text(answer))
        return no_reply("shape", f"an answer of no known shape: {body[:500].decode('utf-8', 'replace')}")
    if b"\n" in body:
        body = json_bytes(answer)
    return status, body, answer, None, wait_s


def is_answer(answer):
    """Whether it has the shape of a chat's, a completion's or an embedding's answer, though it may say nothing."""
    if answer.get("error"):
        return False
    try:
        if "choices" in answer:
            choice = answer["choices"][0]
            return "text" in choice or isinstance(choice["message"], dict)
        return "embedding" in answer["data"][0]
    except MISSHAPEN:
        return False


def no_reply(code, message):
    return 0, b"", {}, {"code": code, "message": message}, 0.0


def assemble_stream(data):
    """The whole answer that an event stream gave in pieces; ValueError if it has no end or tells of an error."""
    whole, ended = {"choices": []}, False
    for line in data.split(b"\n"):
        if not line.startswith(b"data:"):
            continue  # a comment (engines ping so), or an event's name
        piece = line[5:].strip()
        if piece == b"[DONE]":
            ended = True
            continue
        event = json.loads(piece.decode("utf-8", "replace"))
        if "error" in event:
            raise ValueError(f"the stream broke off: {json.dumps(event['error'])[:300]}")
        for choice in event.get("choices") or []:
            choice.setdefault("index", 0)
            if "delta" in choice:
                choice["message"] = choice.pop("delta")
        grow(whole, event)
    if not ended:
        raise ValueError("the stream has no end")
    whole["object"] = str(whole.get("object", "")).replace(".chunk", "")
    return whole


GROWING = {"content", "text", "refusal", "reasoning", "reasoning_content", "arguments"}  # other texts come whole


def grow(whole, piece):
    """Add a piece of a streamed answer: texts go on, parts with an index are found by it, other lists go on, too."""
    for name, value in piece.items():
        if name in GROWING and isinstance(value, str):
            whole[name] = (whole.get(name) or "") + value
        elif isinstance(value, dict):
            grow(whole.setdefault(name, {}), value)
        elif isinstance(value, list):
            have = whole.setdefault(name, [])
            for part in value:
                if not isinstance(part, dict):
                    have.append(part)
                    continue
                known = next((one for one in have if "index" in part and one.get("index") == part["index"]), None)
                if known is None:
                    known = {}
                    have.append(known)
                grow(known, part)
        elif value is not None:
            whole[name] = value


def retry_after(headers):
    text = headers.get("retry-after")
    return min(float(text), 120.0) if text and re.fullmatch(r"\d+(\.\d+)?", text) else 0.0


# ═══════════════════════════════════════════════════════════════════════════════
# 21 · Driver
#
# Owns the life of a job, start to teardown: straight-line code whose `async with`s unwind in the
# reverse order, whatever happens, and the signals that Slurm and users send. Leaves every part of
# the story to the section that owns it.
# ═══════════════════════════════════════════════════════════════════════════════


class Allocation(NamedTuple):
    """The nodes this driver may use, from Slurm or, without it, on this machine."""

    job: int
    restart: int
    nodes: List[str]
    gpus: Dict[str, str]  # what to ask srun for on each node
    ends_at: float  # by the clock; math.inf without a limit
    in_step: bool  # inside a step already, so that agents must overlap it
    submitted: int  # the id that sbatch gave: of an array its own, which is not its tasks'


def find_allocation(environ, nodes_wanted):
    """What Slurm gave this job; without Slurm, agents on this machine stand for the nodes."""
    if "SLURM_JOB_ID" not in environ:
        names = [socket.gethostname()] if nodes_wanted == 1 else [f"local{n + 1}" for n in range(nodes_wanted)]
        return Allocation(0, 0, names, {}, math.inf, False, 0)
    if "SLURM_HET_SIZE" in environ:
        raise UserError("this job", "is a heterogeneous job", "submit a plain one: llmrun places its parts by itself")
    detail = insist(lambda slurm: slurm.detail(environ["SLURM_JOB_ID"]), 3600.0)  # no step could be started, either
    nodes = expand_hostlist(environ.get("SLURM_JOB_NODELIST", ""))
    if len(nodes) < nodes_wanted:
        raise UserError("this job", f"has {len(nodes)} nodes and the config wants {nodes_wanted}",
                        "ask for more nodes, or --set slurm.nodes")
    return Allocation(
        job=int(environ["SLURM_JOB_ID"]), restart=int(environ.get("SLURM_RESTART_COUNT", 0)),
        nodes=nodes[:nodes_wanted], gpus=gpus_of_nodes(detail), ends_at=end_of_job(environ, detail),
        in_step="SLURM_STEP_ID" in environ, submitted=int(environ.get("SLURM_ARRAY_JOB_ID", environ["SLURM_JOB_ID"])))


def insist(ask, patience_s):
    """What Slurm answers, asked again for so long while it is silent; `ask` gets one that waits no longer than that."""
    end = clock() + patience_s
    while True:
        try:
            return ask(Slurm(os.environ, max(1.0, min(90.0, end - clock()))))
        except SlurmSilent as silent:
            if clock() + 1 > end:
                raise
            log(f"{silent}; asking again")
            time.sleep(min(15.0, patience_s / 10, end - clock()))


def gpus_of_nodes(detail):
    """GPUs of each node in `scontrol show job -d`: a step must ask for them, or may see too few."""
    gpus = {}
    for hosts, gres in re.findall(r" Nodes=(\S+) CPU_IDs=\S* Mem=\S* GRES=(\S*)", detail):
        count = re.search(r"gpu(?::[^:,(]+)?:(\d+)", gres)
        if count:
            gpus.update(dict.fromkeys(expand_hostlist(hosts), count.group(1)))
    return gpus


def end_of_job(environ, detail):
    """When the time limit comes, by our clock."""
    shown = re.search(r"\bEndTime=(\d+)", detail)
    end = environ.get("SLURM_JOB_END_TIME") or (shown.group(1) if shown else "")
    return clock() + int(end) - time.time() if end else math.inf


PREEMPTED = "preempted: a job of higher priority gets the nodes"


class Stop(NamedTuple):
    """Why a life's work stopped, and what that means for the work that is left."""

    code: int
    why: str = ""
    go_on: bool = False  # by another life of this job, or another job
    without: Tuple[str, ...] = ()  # nodes that it should not be given again

    def leads_to(self, next=NOBODY, job=0, more=""):
        """The ending with that, and more words for the user; where somebody goes on, nothing has failed."""
        return Ending(self.code if next == NOBODY else WORK_LEFT, "; ".join(filter(None, [self.why, more])), next, job)


class Orders:
    """What Slurm and users tell a life to do, by signals to it or to its agents."""

    GONE_S = 30.0  # a folder that was not there for so long was deleted
    EARLY_S = 90.0  # Slurm's warning comes up to half a minute sooner than asked for
    ASK_AGAIN_S = 15.0

    def __init__(self, driver, work):
        self.driver, self.work, self.tell = driver, work, driver.tell
        self.task, self.loop = asyncio.current_task(), asyncio.get_running_loop()
        self.nodes, self.stopped, self.asking, self.looking = [], None, None, None
        self.drained = Stop(WORK_LEFT, "the time limit came", go_on=True)  # what an end with work left means
        self.agent_termed = asyncio.Event()
        self.loading_since, self.folder_seen = None, clock()
        stopping = [(signal.SIGTERM, WORK_LEFT, "told to end (SIGTERM)"), (signal.SIGINT, INTERRUPTED, "interrupted"),
                    (signal.SIGHUP, WORK_LEFT, "the terminal was closed")]
        self.loop.add_signal_handler(signal.SIGUSR2, self.stop, Stop(WORK_LEFT, "its batch process was killed", True))
        for number, code, why in stopping:
            self.hear(number, self.stop, Stop(code, why))
        self.hear(signal.SIGUSR1, self.on_warning)

    def hear(self, number, do, *args):
        """In the loop, which is woken by its own handler above, but not by it: as it ends it gives what it
        handles back to the system, and until we said that we do not care each of these signals would kill."""
        signal.signal(number, lambda *_: self.loop.call_soon_threadsafe(do, *args))

    def stop(self, stop):
        """End now: unwind everything. Both TERM and INT may come twice; the first one counts."""
        if self.stopped is None:
            if self.driver.run.stop_file.exists():
                stop = Stop(WORK_LEFT, CANCELLED)
            self.stopped = stop
            self.tell("stopping", why=stop.why)
            self.task.cancel()

    def on_warning(self):
        """USR1: Slurm's word that time is short, which we know already, or a user's that running prompts may finish."""
        told_to_stop = self.driver.run.stop_file.exists()
        if told_to_stop or not self.driver.ends_at - clock() < self.driver.config.slurm.grace + self.EARLY_S:
            self.tell("draining")
            self.drain(Stop(WORK_LEFT, "told to finish what is under way (SIGUSR1)", not told_to_stop))
        self.doubt_the_end()  # whose limit was lowered, Slurm warns sooner

    def time_is_up(self):
        """What is left of the job's time is for the teardown. Prompts that would not end before it were not asked."""
        loaded = f", after {show_duration(clock() - self.loading_since)} of loading" if self.loading_since else ""
        self.drain(self.drained if self.work.started else Stop(
            WORK_LEFT, f"the time limit came before the engine was ready{loaded}: raise [slurm] time", go_on=True))

    def drain(self, stop):
        """Let what is under way finish; where nothing is, end now."""
        if self.work.started:
            self.drained = stop
            self.work.drain()
        else:
            self.stop(stop)

    def mind_the_folder(self):
        """Who deletes a run's folder wants nothing of it any more, and nobody could find its job."""
        if self.driver.run.config_file(0).exists():
            self.folder_seen = clock()
        elif clock() - self.folder_seen > self.GONE_S:
            self.stop(Stop(CLUSTER_FAILED, f"the run's folder is gone: {self.driver.run.folder}"))

    def on_agent_term(self):
        """Slurm ends our steps. Preempting with grace, it tells the agents first and this driver nothing."""
        self.agent_termed.set()
        if self.asking is None and self.driver.allocation.job:
            self.asking = asyncio.ensure_future(self.ask_why())

    async def ask_why(self):
        for node in self.nodes:
            node.hold(30)
        detail = await self.detail()
        if re.search(r"\bPreemptTime=\d", detail) and "JobState=RUNNING" in detail:
            self.driver.ends_at = end_of_job({}, detail)  # of its grace
            self.stop(Stop(WORK_LEFT, PREEMPTED, go_on=True))

    def doubt_the_end(self):
        """A job that was suspended ends so much later; one whose limit was changed, too, or sooner."""
        if self.driver.allocation.job and (not self.looking or self.looking.done()):
            self.looking = asyncio.ensure_future(self.look_at_the_end())

    async def look_at_the_end(self):
        detail = await self.detail()
        if detail:
            self.driver.ends_at = end_of_job({}, detail)
            self.tell("time_limit", **told_end(self.driver.ends_at))
            self.work.until(self.driver.ends_at)

    async def detail(self):
        """What Slurm says of the job, as soon as it says anything."""
        while True:
            try:
                return await self.loop.run_in_executor(None, Slurm(os.environ).detail, self.driver.allocation.job)
            except SlurmSilent:
                await asyncio.sleep(self.ASK_AGAIN_S)

    async def meant_to_end(self):
        """Whether Slurm is ending the job: its TERM may reach an engine a moment before it reaches us."""
        with contextlib.suppress(asyncio.TimeoutError, asyncio.CancelledError):
            await within(0.5, self.agent_termed.wait())
        return self.agent_termed.is_set() or self.stopped is not None


@contextlib.asynccontextmanager
async def tending(work, orders):
    """While the work goes on: all that it wants to be done now and then, and an eye on the time."""
    async def tend():
        while True:
            if await stalled(work.TEND_S):  # suspended, maybe
                orders.doubt_the_end()
            work.tend()
            orders.mind_the_folder()
            if clock() > orders.driver.ends_at - LAST_MOMENTS_S:
                orders.time_is_up()
            elif not work.started and work.finished:
                orders.stop(Stop(DONE, "the other jobs have answered all"))
            elif work.idle:
                orders.drain(Stop(WORK_LEFT, go_on=True))
    task = asyncio.ensure_future(tend())
    try:
        yield
    finally:
        task.cancel()


def supervise(live_once):
    """Do a life in a process of its own, and another one should it be killed: by the kernel for its memory, say.

    Signals are passed on. Should this process be killed, the other hears SIGUSR2."""
    told, child = [], 0

    def pass_on(number, frame):
        told.append(number)
        if child:
            os.kill(child, number)
    passed_on = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGUSR1)
    for number in passed_on:
        signal.signal(number, pass_on)
    while True:
        signal.pthread_sigmask(signal.SIG_BLOCK, passed_on)  # none comes while it is open whom it is passed on to
        if set(told) - {signal.SIGUSR1}:
            return WORK_LEFT
        child = os.fork()
        if not child:
            for number in passed_on:
                signal.signal(number, signal.SIG_IGN if number == signal.SIGUSR1 else signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, passed_on)
        if not child:
            LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGUSR2)
            return live_once()
        (_, status), child = os.waitpid(child, 0), 0
        if not os.WIFSIGNALED(status):
            return os.WEXITSTATUS(status)
        log(f"the driver was killed by {signal_name(os.WTERMSIG(status))}")


class Work:
    """What a life is for, as its driver knows it. Prompts are one kind; to serve until it is stopped is another."""

    name = ""  # as the life's first event tells it
    TEND_S = 2.0
    finished = False  # nothing is left to do, for this life or any other
    started = False  # something is under way that `drain` can let finish
    idle = False  # for long, nothing was left but what other lives are doing

    @classmethod
    def begin(cls, driver):
        """The work of a life that begins; an error where it cannot be done."""
        return cls()

    async def do(self, pairs, ends_at):
        """Do it with these (replica, task of its start) pairs until it is finished or drained."""
        raise NotImplementedError

    def drain(self):
        """Let what is under way finish, and begin nothing new."""

    def tend(self):
        """What is to be done every TEND_S seconds."""

    def until(self, ends_at):
        """The job's end has moved."""

    def close(self, patience_s):
        """Make whole what is on disk; an OSError where that cannot be, even patiently."""

    def with_others(self):
        """Whether all that is left is being done by other lives."""
        return False

    def verdict(self):
        """The ending of a life when it is finished."""
        return Ending(DONE)

    def save(self, ending):
        """Write what users read, when nobody goes on; False if another life has done so."""
        return True

    def show(self):
        """Write what users read so far, when others go on, if that is quick."""

    def counts(self):
        """What the life's last event tells beside its ending."""
        return {}


class Prompts(Work):
    """The work of a run that has prompts: from the input through claims and pump into the journal, and the results."""

    name = "prompts"
    TEND_S = Claims.LOOK_S
    QUICK = 300_000  # prompts, whose results are written in some seconds: Slurm leaves half a minute after a requeue

    def __init__(self, run, config, claims, journal, tell):
        self.run, self.config, self.claims, self.journal, self.tell = run, config, claims, journal, tell
        self.tally, self.pump, self.told_trouble = Tally(), None, ""
        self.beaten = self.busy = clock()

    @classmethod
    def begin(cls, driver, failed_again=False):
        run, life = driver.run, driver.life
        journal = patiently("cannot begin", lambda: Journal(run, life, driver.tell))
        prompts = patiently("cannot begin", lambda: Input.load(run, driver.config, model_name(driver.config)))
        if failed_again:  # said once for the job, whatever its lives
            job = driver.allocation.submitted or life
            run.disk.put_new(run.again_file(job), json.dumps(Marks(run, prompts).places()).encode())
        marks = Marks(run, prompts, run.asked_again())
        claims = Claims(run, life, marks, chunk_starts(len(prompts), run.config().slurm.jobs))
        return cls(run, driver.config, claims, journal, driver.tell)

    @property
    def finished(self):
        return self.claims.finished

    @property
    def started(self):
        return bool(self.pump and self.pump.first_sent)

    @property
    def idle(self):
        return clock() - self.busy > self.claims.STILL_S

    async def do(self, pairs, ends_at):
        """Every prompt, asked of these replicas."""
        marks = self.claims.marks
        self.pump = Pump(self.claims.next, marks.prompts.prompt, self.keep, ends_at, lambda: self.journal.trouble)
        async with self.reporting():
            await self.pump.run(pairs)
            await self.journal.written(self.pump.ends_at - LAST_MOMENTS_S)
            self.tell("answered", done=marks.count(Marks.DONE), failed=marks.count(Marks.FAILED))

    def keep(self, results):
        self.journal.add(*results)
        for result in results:
            self.tally.add(result)
        for result in results:
            self.claims.settle(result.prompt.key, result.ok)

    def until(self, ends_at):
        if self.pump:
            self.pump.ends_at = ends_at

    def drain(self):
        self.pump.drain()

    def tend(self):
        """Show the others that we live, see who of them does, and look for work that they left."""
        if clock() - self.beaten > self.claims.BEAT_S:
            self.beaten = clock()
            self.claims.beat()
            with contextlib.suppress(OSError):
                self.claims.watch_beats()
                if not self.started:
                    self.claims.look()
        self.tell_trouble()
        if self.pump:
            self.pump.wake_all()
        others_do = self.started and not any(self.pump.trays) and self.claims.left_to_others(self.claims.STILL_S / 2)
        if self.finished or not others_do:  # one whose beat is that old may be dead, and its prompts ours soon
            self.busy = clock()

    def tell_trouble(self):
        """What keeps all from going on, when it changes."""
        trouble = (f"prompts cannot be claimed ({self.claims.trouble}): waiting" if self.claims.trouble else
                   f"prompts cannot be read ({self.pump.trouble}): waiting" if self.pump and self.pump.trouble else "")
        if trouble != self.told_trouble:
            self.told_trouble = trouble
            self.tell("trouble" if trouble else "trouble_over", why=trouble)

    @contextlib.asynccontextmanager
    async def reporting(self):
        """A progress event whenever the counts changed: often at first, at most every 10 s later."""
        began, told = clock(), -1

        async def keep_reporting():
            nonlocal told
            while True:
                if self.tally.answers + self.tally.failed != told:
                    told = self.tally.answers + self.tally.failed
                    self.report()
                await asyncio.sleep(min(10.0, max(0.2, (clock() - began) / 100)))
        reporting = asyncio.ensure_future(keep_reporting())
        try:
            yield
        finally:
            reporting.cancel()
            self.report()

    def report(self):
        self.journal.write()  # what is counted is on disk
        tally, marks = self.tally, self.claims.marks
        self.tell("progress", done=marks.count(Marks.DONE), failed=marks.count(Marks.FAILED), total=len(marks.state),
                  tokens=tally.tokens, answers=tally.answers + tally.failed, own_failed=tally.failed,
                  working_s=round(clock() - (self.pump.first_sent or clock()), 2))

    def close(self, patience_s):
        """All results are on disk, and what is left of our chunks is anybody's. Then the journals are read anew:
        a disk in trouble may have lost what was read before."""
        patiently("cannot write the results", self.journal.close, patience_s)
        self.claims.end()
        prompts, again, self.claims.marks = self.claims.marks.prompts, self.claims.marks.again, None  # they take room
        self.claims.marks = patiently("cannot read the journals", lambda: Marks(self.run, prompts, again), patience_s)

    def with_others(self):
        return self.claims.all_with_others()

    def verdict(self):
        nothing_said = self.tally.answers and self.tally.empty == self.tally.answers
        failed = nothing_said or self.claims.marks.count(Marks.FAILED)
        return Ending(SOME_FAILED if failed else DONE, self.tally.doubt())

    def save(self, ending):
        """Write the results and the counts; False if another driver has just done so."""
        found = {"exit_code": ending.code, "why": ending.why, "answered": self.claims.marks.count(Marks.DONE),
                 "failed": self.claims.marks.count(Marks.FAILED)}
        with contextlib.suppress(OSError, ValueError):
            if self.finished and json.loads(self.run.summary.read_text()).items() >= found.items():
                return False
        marks = self.claims.marks  # to users, what is to be asked again has failed until it is
        folder = write_results(self.run, self.config, Marks(self.run, marks.prompts) if marks.again else marks)
        tokens = sum(self.run.progress(life).get("tokens", 0) for life in self.run.lives())
        summary = {**found, "completion_tokens": tokens, "results": str(folder)}
        write_file(self.run.summary, json.dumps(summary, indent=1) + "\n")
        return True

    def show(self):
        if len(self.claims.marks.state) <= self.QUICK:
            write_results(self.run, self.config, self.claims.marks)

    def counts(self):
        marks, tally = self.claims.marks, self.tally
        return {"answered": tally.answers, "own_failed": tally.failed,
                "done": marks.count(Marks.DONE) if marks else tally.answers,
                "failed": marks.count(Marks.FAILED) if marks else tally.failed}


MAX_FRUITLESS = 3  # lives in a row that answered nothing: the next would not, either


def drive(run, allocation, shape=0, work=Prompts, **wishes):
    """One life of a driver, from its first event to its last; its exit code."""
    life = patiently("cannot begin", lambda: run.new_life(allocation.job, allocation.restart))
    events = Events(run, life)

    def tell(event, **facts):
        events.write(event, **facts)
        if event != "progress":
            log(" ".join([event.replace("_", " ")] + [f"{name}={value}" for name, value in facts.items()]))
    sys.setrecursionlimit(10000)  # a deep row that was read at submit must not fail by where it is read now
    gc.freeze()  # the program itself is no garbage: look only at what comes, and not after every 700 objects
    gc.set_threshold(20000, 20, 100)
    patiently("cannot begin", lambda: events.append(
        "start", job=allocation.job, submitted=allocation.submitted, nodes=allocation.nodes, work=work.name,
        pid=os.getpid(), born=process_birth(os.getpid()), host=socket.gethostname(), python=sys.version.split()[0],
        **told_end(allocation.ends_at)))
    log(f"start {life} on {' '.join(allocation.nodes)}")
    driver, begun, stop = Driver(run, run.config(shape), shape, life, allocation, tell), None, Stop(DONE)
    try:
        begun = work.begin(driver, **wishes)
        if run.stop_file.exists():  # a job that started after all
            stop = Stop(WORK_LEFT, CANCELLED)
        elif driver.fruitless() > MAX_FRUITLESS:  # whoever started us again and again
            stop = Stop(CLUSTER_FAILED, f"{MAX_FRUITLESS} starts in a row answered nothing; `logs` shows them")
        elif not begun.finished:
            stop = asyncio.run(driver.live(begun))
    except Exception as error:
        stop = stop_of(error, run)
    ignore_signals()
    ending = driver.finish(begun, stop) if begun else stop.leads_to()
    tell("end", **ending._asdict(), **(begun.counts() if begun else {}))
    return ending.code


def told_end(ends_at):
    """When the job's time ends, for its events, if it ends at all."""
    return {"until": round(ends_at + CLOCK_TO_DATE)} if ends_at < math.inf else {}


def ignore_signals():
    """They come twice, and what is left is quick and must be whole."""
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def stop_of(error, run):
    """An error that ended the work, in words for the user."""
    if isinstance(error, UserError):
        return Stop(error.exit_code, str(error))
    if isinstance(error, OSError):
        return Stop(CLUSTER_FAILED, f"{error.filename or run.folder}: {os_reason(error)}")
    traceback.print_exception(type(error), error, error.__traceback__)  # a fault of ours: the job's output has the rest
    return Stop(CLUSTER_FAILED, f"a fault in llmrun: {type(error).__name__}: {error}; please report it")


ENGINE_LINES = 200  # of an engine's log are told in the events of a life


class Driver:
    """One life: has its work done on the nodes that it has, and sees that what is left of it goes on."""

    LEAST_PATIENCE_S = 20.0  # with a Slurm that is silent at the end; KillWait is 30 s where nobody changed it

    def __init__(self, run, config, shape, life, allocation, tell):
        self.run, self.config, self.shape, self.life = run, config, shape, life
        self.allocation, self.tell, self.ends_at = allocation, tell, allocation.ends_at
        self.asked_to_requeue = False

    async def live(self, work):
        """The story of a job: agents, engine, the work, and back. Why it stopped, where the work is not finished."""
        def told(event, **facts):
            if event == "engine_says" and next(engine_lines) >= ENGINE_LINES:
                return  # the engine's start is worth telling; later its log speaks of every prompt
            self.tell(event, **facts)
            if event == "term":
                orders.on_agent_term()
            elif event == "node_lost":
                lost.append(facts["node"])
            elif event == "engine_started":
                orders.loading_since = orders.loading_since or clock()
            elif event == "ready":
                publish_endpoint(self.run, self.config, facts)

        orders, lost, engine_lines = Orders(self, work), [], itertools.count()
        run, config, names = self.run, self.config, self.allocation.nodes
        size = len(names) // config.engine.replicas
        try:
            async with agents(names, self.agent_command, self.agent_environment(),
                              lambda name: run.logs_of(self.life) / f"{name}-agent.log", told,
                              config.slurm.join_timeout, size if config.engine.replicas > 1 else None) as nodes:
                self.tell("agents_up", nodes=len(nodes))
                orders.nodes = nodes
                engine = ENGINES[config.engine.name](config, run, self.life, size)
                groups = split_groups(nodes, size)
                async with replicas(engine, groups, told) as pairs, endpoint(run), tending(work, orders):
                    await work.do(pairs, self.ends_at)
        except asyncio.CancelledError:
            return orders.stopped
        except ClusterError as error:
            if await orders.meant_to_end():
                return orders.stopped or Stop(WORK_LEFT, "told to end (SIGTERM)")
            if not isinstance(error, NodeLost):
                raise
            return Stop(CLUSTER_FAILED, str(error), go_on=True, without=tuple(lost))
        finally:
            ignore_signals()  # before the loop is over, which they would wake
        return Stop(DONE) if work.finished else orders.drained

    def agent_command(self, name):
        allocation = self.allocation
        return agent_command(sys.executable, self.run.folder, name, str(allocation.job or ""),
                             allocation.gpus.get(name, ""), allocation.in_step)

    def agent_environment(self):
        environment = without_slurm(os.environ, keep=("SLURM_CONF", "SLURM_JOB_ID"))
        if self.config.slurm.requeue and self.submit_runs_job_sh:
            environment["LLMRUN_REQUEUE"] = str(self.run.beat_file(self.life))
        return environment

    @property
    def submit(self):
        """What was recorded of the sbatch that this job came from; nothing where it is a shell's own, or no job."""
        return self.run.submits().get(self.allocation.submitted, {})

    @property
    def submit_runs_job_sh(self):
        return "shape" in self.submit

    def finish(self, work, stop):
        """Make whole what is on disk, see that somebody goes on with what is left, else write what users read."""
        told = stop.code not in (DONE, CLUSTER_FAILED)
        patience_s = 0.0 if told else min(300.0, self.ends_at - clock() - LAST_MOMENTS_S)
        try:
            work.close(patience_s)
            ending = work.verdict() if work.finished else self.going_on(work, stop)
            if ending.next == NOBODY:
                return self.saved(work, ending, patience_s)
            with contextlib.suppress(OSError):
                work.show()
            return ending
        except OSError as error:
            return Ending(CLUSTER_FAILED, f"results could not be written: {os_reason(error)}; "
                          f"mend that, then `llmrun.py resume {self.run.name}`")

    def saved(self, work, ending, patience_s):
        """The ending, once what users read is written; all of it stands in the journals, if that cannot be."""
        try:
            first = patiently("cannot write the results", lambda: work.save(ending), patience_s)
        except OSError as error:
            folder, before = self.config.results.folder or self.run.results, f"{ending.why}; " if ending.why else ""
            return Ending(CLUSTER_FAILED, f"{before}all answers are kept, but their files cannot be written to "
                          f"{folder} ({os_reason(error)}): `python llmrun.py results {self.run.name} --to FOLDER` "
                          "writes them elsewhere")
        if first and work.finished:
            self.cancel_waiting()
        return ending

    def cancel_waiting(self):
        """Jobs of the run that have not begun need not."""
        if self.run.submitted():
            with contextlib.suppress(ClusterError):
                Slurm(os.environ).cancel(self.run.submitted(), "--state=PENDING")

    def going_on(self, work, stop):
        """What `hand_over` says, or that Slurm said nothing."""
        resume = f"`python llmrun.py resume {self.run.name}` goes on"
        try:
            return self.hand_over(work, stop, resume)
        except SlurmSilent as silent:
            return stop.leads_to(more=f"{silent.what}: if `squeue --me` shows no job of it, {resume}")

    def insist(self, stop, ask):
        """What Slurm answers within the time that this process has: TERM leaves it half a minute before KILL."""
        left_s = self.ends_at - clock() - 5 if stop.go_on else 0.0
        return insist(ask, max(self.LEAST_PATIENCE_S, min(600.0, left_s)))

    def hand_over(self, work, stop, resume):
        """See that somebody does what is left, where that is wanted and can be had; the ending with that."""
        if self.run.stop_file.exists():
            return (stop if stop.code == CLUSTER_FAILED else Stop(WORK_LEFT, CANCELLED)).leads_to()
        if not self.submit_runs_job_sh:
            return stop.leads_to(more=resume if stop.go_on else "")
        if stop.code == WORK_LEFT and not stop.go_on:  # by TERM, which does not say why
            detail = self.insist(stop, lambda slurm: slurm.detail(self.allocation.job))
            if was_requeued(detail, self.allocation.restart):
                return Ending(WORK_LEFT, "Slurm took its nodes for another job", REQUEUED)
            stop = what_term_meant(detail, self.ends_at)
        if not stop.go_on:
            return stop.leads_to()
        if work.with_others():
            return stop.leads_to(OTHERS, more="the other jobs do the rest")
        if not self.config.slurm.requeue:
            return stop.leads_to(more=f"[slurm] requeue is off: {resume}")
        if self.fruitless() >= MAX_FRUITLESS:
            return stop.leads_to(more=f"{MAX_FRUITLESS} starts in a row answered nothing, so this was the last")
        refused = "" if stop.without else self.insist(stop, self.requeue)
        if not (stop.without or refused):  # a requeue cannot leave nodes out
            return stop.leads_to(REQUEUED)
        return self.submit_successor(stop, refused, resume)

    def requeue(self, slurm):
        """Put the job back; "" or why Slurm would not. An earlier order that it did not answer it may have heard."""
        asked, self.asked_to_requeue = self.asked_to_requeue, True
        if asked and was_requeued(slurm.detail(self.allocation.job), self.allocation.restart):
            return ""
        return slurm.requeue(self.allocation.job)

    def submit_successor(self, stop, refused, resume):
        """The ending with another job submitted, or with the reason why that could not be, either."""
        slurm = self.config.slurm
        without = sorted({*self.submit.get("without", ()), *stop.without, *expand_hostlist(slurm.exclude)})
        for excluded in [without, []] if stop.without else [without]:  # there may be no nodes but those lost before
            options = [f"--exclude={','.join(excluded)}"] * bool(excluded) + ["--array=0"] * (slurm.jobs > 1)
            try:
                said = Slurm(os.environ).submit(self.config, self.run.job_script(self.shape), "--parsable", *options)
                job = job_id_in(said)
            except SlurmSilent:  # which may have taken it
                raise
            except UserError as error:
                failed = f"{refused or 'a new job was refused'} ({error.what})"
                continue
            self.run.record_submit(job, shape=self.shape, after=self.life, without=excluded)
            if self.run.stop_file.exists():  # whoever cancelled the run meanwhile did not know of it
                with contextlib.suppress(ClusterError):
                    Slurm(os.environ).cancel([job])
                return Stop(WORK_LEFT, CANCELLED).leads_to()
            return stop.leads_to(SUCCESSOR, job, f"Slurm would not requeue it ({refused})" if refused else "")
        return stop.leads_to(more=f"{failed}: {resume}")

    def fruitless(self):
        """How many lives in a row bore no fruit, up to this one, of this job and of those that it goes on for."""
        lives, count, life = self.run.lives(), 0, self.life
        while True:
            for other in sorted((other for other in lives if other.job == life.job and other <= life), reverse=True):
                if self.run.bore_fruit(other):
                    return count
                count += 1
            after = self.run.submits().get(life.job, {}).get("after")
            if not after:
                return count
            life = Life(*after)


def was_requeued(detail, restart):
    """Whether Slurm itself put the job back, as it does with one that it preempts."""
    restarts = re.search(r"\bRestarts=(\d+)", detail)
    return bool(restarts) and int(restarts.group(1)) > restart


def what_term_meant(detail, ends_at):
    """Why Slurm ended a job by TERM. Meanwhile its state is only COMPLETING; who ended it shows in its preemption and
    its time (seen on 22.05)."""
    if re.search(r"\bPreemptTime=\d", detail):
        return Stop(WORK_LEFT, PREEMPTED, go_on=True)
    if clock() > ends_at:
        return Stop(WORK_LEFT, "the time limit came", go_on=True)
    return Stop(WORK_LEFT, "cancelled by scancel")


def split_groups(nodes, size):
    """Equal groups of neighbours, one for each replica; nodes that are too few for one more rest."""
    return [nodes[first:first + size] for first in range(0, len(nodes) - size + 1, size)]


def publish_endpoint(run, config, ready):
    """endpoint.json tells other programs where the model answers."""
    with contextlib.suppress(OSError):
        write_file(run.endpoint, json.dumps({
            "url": f"http://{ready['host']}:{ready['port']}/v1", "model": model_name(config),
            "key_file": str(run.key_file)}) + "\n", 0o600)


@contextlib.asynccontextmanager
async def endpoint(run):
    """No endpoint.json outlives its engine."""
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            run.endpoint.unlink()


# ═══════════════════════════════════════════════════════════════════════════════
# 22 · Commands
#
# Owns the command line: what users type, what they read, and exit codes. The only place that
# prints. Leaves every decision to the sections below it.
# ═══════════════════════════════════════════════════════════════════════════════


def say(text="", style=""):
    if on_terminal():
        text = visible(text)
        text = f"\033[{style}m{text}\033[0m" if style and not os.environ.get("NO_COLOR") else text
    print(text, flush=True)


def complain(text):
    sys.stderr.write(f"llmrun: {visible(text) if sys.stderr.isatty() else text}\n")


def on_terminal():
    return sys.stdout.isatty()


class Table:
    """Rows that come a few at a time: on a terminal aligned, below one header; in a pipe with tabs between the fields,
    and with a header only where it is asked for."""

    def __init__(self, header, in_pipes_too=False):
        self.header, self.widths = [header] * (in_pipes_too or on_terminal()), [0] * len(header)

    def say(self, rows):
        lines = self.header + [[one_line(cell) for cell in row] for row in rows]
        for row in lines:
            self.widths = list(map(max, self.widths, map(len, row)))
        for number, row in enumerate(lines):
            if on_terminal():
                line = "  ".join(cell.ljust(width) for cell, width in zip(row, self.widths)).rstrip()
                say(line, "1" * (number < len(self.header)))
            else:
                say("\t".join(row))
        self.header = []


def say_table(header, rows):
    Table(header).say(rows)


def say_json(value):
    say(json.dumps(value, indent=1, default=str))


class Prepared(NamedTuple):
    """A config that was read, checked and planned, with the prompts as they stand now."""

    config: Config
    notes: List[str]
    plan: Plan
    prompts: Frozen


def prepare(config_path, overrides):
    """Everything that can be known to be wrong before anything is made."""
    with Faults() as faults:
        return look_over(config_path, overrides, faults)


def look_over(config_path, overrides, faults):
    """What a config means; nothing may be made of it if there are faults."""
    config, notes = read_with_faults(config_path or "config.toml", overrides, faults)
    config, plan = check_shape(config, faults)
    prompts = None
    with faults.kept("prompts"):
        prompts = freeze(config, model_name(config), scan_progress)
    if prompts and EMBEDDINGS in prompts.urls:
        pooling = OWN_POOLING if plan.model and plan.model.pools else MEAN_POOLING
        config = dataclasses.replace(config, engine=dataclasses.replace(config.engine, pooling=pooling))
    return Prepared(config, notes + (prompts.notes if prompts else []), plan, prompts)


def check_shape(config, faults):
    """The config with its nodes planned, and the plan; among the faults is why its jobs could not run."""
    engine, plan = ENGINES[config.engine.name], None
    with faults.kept():
        time_limit_minutes(config)
    if config.model.path or not faults.about("engine.name"):
        with faults.kept():
            plan = plan_nodes(config, engine.sized)
    with faults.kept():
        engine.check(config)
    with faults.kept():
        check_output(config)
    if plan and not faults.about("slurm.nodes"):
        with faults.kept():
            check_replicas(config, plan.nodes)
    plan = plan or Plan(1 if config.slurm.nodes == "auto" else config.slurm.nodes, None, 0)
    return dataclasses.replace(config, slurm=dataclasses.replace(config.slurm, nodes=plan.nodes)), plan


def scan_progress(done, total):
    """A bar while a large input is read, on a terminal only."""
    if on_terminal() and total:
        sys.stderr.write(f"\rreading the prompts: {100 * done // total}%" if done < total else "\r\033[K")


def check_replicas(config, nodes):
    if nodes % config.engine.replicas:
        raise config.error("engine.replicas",
                           f"{nodes} nodes cannot be split into {config.engine.replicas} equal groups",
                           f"set [slurm] nodes to a multiple of {config.engine.replicas}")


def check_output(config):
    """Slurm before 23.02 lets a job fail unseen when the folder of its output is not there."""
    for name in ("output", "output_link"):
        path = getattr(config.slurm, name)
        folder = os.path.dirname(path)
        try:
            if path:
                os.makedirs(folder, exist_ok=True)
                try_writing(folder)
        except OSError as error:
            raise config.error(f"slurm.{name}", f"{folder}: {os_reason(error)}", "name a folder that you may write to")


def script_for(config, run, shape=0, failed_again=False):
    """The job.sh of a run's shape."""
    output = config.slurm.output or str(run.logs / "slurm-%j.out").replace("%", "%%").replace("%%j", "%j")
    words = ["drive", run.folder] + ["--shape", shape] * bool(shape) + ["--failed"] * failed_again
    return job_script(config, config.slurm.nodes, output, frozen_command(run.folder, *words), sys.executable)


def make_run(prepared):
    return create_run(prepared.config, prepared.prompts, lambda run: script_for(prepared.config, run))


def describe(prepared):
    """The plan in a few lines: what will run where, and how much memory it takes."""
    config, plan = prepared.config, prepared.plan
    lines = [f"note      {note}" for note in prepared.notes]
    if plan.model:
        lines.append(f"model     {plan.model.name}: {plan.model.architecture}, {plan.model.layers} layers, "
                     f"{show_size(plan.model.size_bytes)}; {show_size(plan.kv_bytes)} more for "
                     f"{config.engine.slots} prompts at a time with {config.engine.context} tokens each")
        if config.engine.context > plan.model.context:
            lines.append(f"note      the model was trained with {plan.model.context} tokens of context; "
                         "more is not used")
    minutes = time_limit_minutes(config)
    limit = "no limit of time" if minutes == UNLIMITED else f"up to {show_minutes(minutes)}"
    lines.append(f"nodes     {plan.nodes} for {limit} (time = \"{config.slurm.time}\")"
                 + (f" in partition {config.slurm.partition}" if config.slurm.partition else "")
                 + (f", {config.slurm.jobs} jobs" if config.slurm.jobs > 1 else ""))
    lines.append(f"prompts   {len(prepared.prompts)} in {config.prompts.user}"
                 + (f", each asked {config.prompts.samples} times" if config.prompts.samples > 1 else ""))
    skipped = prepared.prompts.skipped
    if skipped:
        lines.append(f"skipped   {len(skipped)}; the first: {skipped[0]}")
    return lines


def command_init(args):
    folder = Path(args.folder)
    files = {"config.toml": example_toml(everything=False), "prompts/system.txt": EXAMPLE_SYSTEM, **{
        f"prompts/user/{name}": text for name, text in EXAMPLE_PROMPTS.items()}}
    taken = [name for name in files if (folder / name).exists()]
    if taken:
        raise UserError(str(folder / taken[0]), "is already there", "choose another folder: init FOLDER")
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, text)
    written = [str(folder / name) for name in files]
    if args.json:
        say_json({"written": written})
        return DONE
    for path in written:
        say(f"wrote {path}")
    say("Next: name your model and llama-server in config.toml, then `python llmrun.py check`.")
    return DONE


def command_check(args):
    slurm, answers = Slurm(os.environ) if shutil.which("sbatch") else None, {}
    with Faults() as faults:
        prepared = look_over(args.config, args.set, faults)
        config = prepared.config
        if slurm:
            answers["slurm"] = ask_slurm(slurm, config, faults)
    answers["script"] = script_for(config, Run("RUN"))
    answers["engine"] = preview(ENGINES[config.engine.name](config, Run("RUN"), "LIFE", config.slurm.nodes))
    if args.json:
        say_json({"plan": dataclasses.asdict(config), "notes": prepared.notes, **answers})
        return DONE
    for line in describe(prepared):
        say(line)
    for line in answers["engine"]:
        say(f"starts    {line}")
    say(f"slurm     {answers.get('slurm', 'sbatch is not on this machine; `run` works without it')}")
    say()
    say(textwrap.indent(answers["script"], "    "))
    return DONE


def ask_slurm(slurm, config, faults):
    """What Slurm says to such a job. It refuses one thing at a time, so it is asked again without what is known to be
    wrong, for as long as it finds more."""
    while True:
        known = len(faults.errors)
        config = dataclasses.replace(config, slurm=dataclasses.replace(config.slurm, **{
            field.name: default_of(field) for field in dataclasses.fields(SlurmConfig)
            if faults.about(f"slurm.{field.name}")}))
        with faults.kept(), tempfile.NamedTemporaryFile("w", suffix=".sh") as script:
            check_partition(config, slurm.partitions(), config.slurm.nodes)
            script.write(script_for(config, Run("RUN")).replace("RUN/logs/slurm-%j.out", "/dev/null"))
            script.flush()
            return re.sub(r"^sbatch: ", "", slurm.submit(config, script.name, "--test-only"))
        if len(faults.errors) == known or not faults.errors[-1].keys:
            return ""


def command_submit(args):
    if args.join:
        run, slurm = find_run(argparse.Namespace(run=args.join, runs=args.runs)), query_slurm()
        code = done_already(run, state_of(run, slurm.jobs(run.submitted()) if slurm else {}))
        return join(args, run) if code is None else code
    prepared = prepare(args.config, args.set)
    config = prepared.config
    if args.dry_run:
        say(script_for(config, Run("RUN")))
        return DONE
    slurm = Slurm(os.environ)
    check_partition(config, slurm.partitions(), config.slurm.nodes)
    run = make_run(prepared)
    try:
        said = slurm.submit(config, run.job_script(), "--parsable")
    except UserError:
        shutil.rmtree(run.folder, ignore_errors=True)
        raise
    job = job_id_in(said)
    run.record_submit(job, shape=0)
    link_output(config, run, job)
    if args.json:
        say_json({"job": job, "run": str(run.folder)})
    else:
        for line in describe(prepared):
            say(line)
        say(f"submitted job {job}: {run.folder}")
    if args.wait:
        return follow(run, slurm, quiet=args.json)
    if not args.json:
        say("Next: `python llmrun.py status` shows how it goes, `results` the answers.")
    return DONE


def link_output(config, run, job):
    """Where an old config wants the job's output, that of the newest submit is found; each run keeps its own."""
    if config.slurm.output_link:
        link = Path(config.slurm.output_link.replace("%j", str(job)))
        with contextlib.suppress(FileNotFoundError):
            link.unlink()
        link.symlink_to(run.job_output(job))


SHAPE_TABLES = ("slurm", "engine", "environment", "network", "model")  # of a config: in these, a run's jobs may differ


def join(args, run, failed_again=False, alone=True):
    """One more submit for a run: in its first shape, or in a new one with other settings. `alone` is a single job."""
    shape, named = 0, getattr(args, "join", "") and args.config
    config = run.config(shape)
    options = ["--array=0"] * (alone and config.slurm.jobs > 1)
    if args.set or failed_again or named:
        data = joining_config(run, named) if named else json.loads(run.config_file(shape).read_text())
        with Faults() as faults:
            config, _ = check_shape(other_shape(data, args.set, failed_again, not named), faults)
        shape, options = run.shapes()[-1] + 1, []
        freeze_shape(run, shape, config, script_for(config, run, shape, failed_again))
    with contextlib.suppress(FileNotFoundError):
        run.stop_file.unlink()
    if not shutil.which("sbatch") or not run.submitted():
        return run_here(run, shape, args.json)
    slurm = Slurm(os.environ)
    check_partition(config, slurm.partitions(), config.slurm.nodes)
    job = job_id_in(slurm.submit(config, run.job_script(shape), "--parsable", *options))
    run.record_submit(job, shape=shape)
    if args.json:
        say_json({"job": job, "run": str(run.folder)})
    else:
        say(f"submitted job {job} for {run.folder}")
    return follow(run, slurm, quiet=args.json) if args.wait else DONE


def joining_config(run, path):
    """The config of a job that joins, from a file of its own. What is asked, and where answers go, is the run's; a file
    that says it otherwise was written for another run."""
    mine = dataclasses.asdict(run.config())
    theirs = dataclasses.asdict(read_config(path, [])[0])
    default = dataclasses.asdict(build_config(Config, {}, path, os.path.dirname(os.path.abspath(path))))
    for name in [name for name in theirs if name not in (*SHAPE_TABLES, "source", "name", "run_dir")]:
        if theirs[name] not in (mine[name], default[name]):
            raise UserError(path, f"[{name}] differs from that of {run.name}, whose prompts and results are fixed",
                            f"a job that joins may differ in {', '.join(SHAPE_TABLES)}; leave the others out")
    theirs["engine"]["pooling"] = mine["engine"]["pooling"]  # as the prompts ask for it
    return {**mine, **{name: theirs[name] for name in SHAPE_TABLES}, "source": theirs["source"]}


def other_shape(data, overrides, failed_again, one_job):
    """The config of a run with other settings for its jobs; what is asked, and where answers go, is frozen."""
    if failed_again or one_job and not any(override.startswith("slurm.jobs") for override in overrides):
        data["slurm"]["jobs"] = 1  # two that ask failed prompts again would each wait for what the other holds
    tables = tuple(f"{table}." for table in SHAPE_TABLES)
    for override in overrides:
        dotted = override.partition("=")[0].strip()
        if not dotted.startswith(tables):
            meant = near_keys(dotted, [key for key in known_keys(Config) if key.startswith(tables)], 1)
            raise UserError(f"--set {override}", "cannot be changed for a run that was submitted",
                            f'did you mean "{meant[0]}"?' if meant and "." not in dotted else
                            f"submit a new run, or set keys of {', '.join(SHAPE_TABLES)}")
        apply_override(data, override)
    data["overrides"] = [*data.get("overrides", []), *overrides]
    source = data.pop("source")
    return dataclasses.replace(build_config(Config, data, source, os.getcwd()), source=source)


def command_resume(args):
    """Go on with a run whose jobs are gone."""
    run, slurm = find_run(args), query_slurm()
    state = state_of(run, slurm.jobs(run.submitted()) if slurm else {})
    if state["exit_code"] is None:
        raise UserError(run.name, f"is {state['state']}: there is nothing to resume",
                        "`submit --join` adds jobs to it, `cancel` ends it")
    if not (args.failed and state["failed"]) and done_already(run, state) is not None:
        return state["exit_code"]
    return join(args, run, args.failed, alone=False)


def done_already(run, state):
    """The exit code of a run that has nothing left to do, which is said; None for any other."""
    if state["exit_code"] not in (DONE, SOME_FAILED):
        return None
    say(f"{run.name} is finished" + (f"; `resume --failed` asks the {state['failed']} failed prompts again"
                                     if state["failed"] else ""))
    return state["exit_code"]


def command_run(args):
    """`bash job.sh` without sbatch: here, or in the allocation that this shell is in."""
    prepared = prepare(args.config, args.set)
    nodes = prepared.config.slurm.nodes
    if nodes > 1 and not args.here and shutil.which("sbatch") and role_of(os.environ, os.getpid()) == "login":
        raise UserError("run", f"this machine alone would stand for all {nodes} nodes",
                        "`submit` asks Slurm for them; `run --here` does it here all the same")
    run = make_run(prepared)
    if not args.json:
        for line in describe(prepared):
            say(line)
        say(f"run       {run.folder}")
    return run_here(run, 0, args.json)


def run_here(run, shape, quiet):
    with open(run.logs / "slurm-0.out", "ab") as output:
        child = subprocess.Popen(["bash", str(run.job_script(shape))], stdin=subprocess.DEVNULL, stdout=output,
                                 stderr=subprocess.STDOUT)
    for passed_on in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(passed_on, lambda number, frame: child.send_signal(number))
    signal.signal(signal.SIGINT, lambda number, frame: None)  # the terminal sends it to the driver itself
    return follow(run, None, child, quiet)


def command_drive(args):
    """What job.sh runs: the driver of a run, or (by hand) of a config that has no run yet."""
    if args.config:
        run = make_run(prepare(args.config, args.set))
        log(f"run {run.folder}")
        job = os.environ.get("SLURM_JOB_ID")
        if job:
            run.record_submit(int(job))
    else:
        run = Run(args.run)
    nodes = run.config(args.shape).slurm.nodes
    return supervise(lambda: drive(run, find_allocation(os.environ, nodes), args.shape, failed_again=args.failed))


def serve_agent(name):
    async def serve():
        await Agent(os.environ.get("SLURMD_NODENAME") or name).serve()
    asyncio.run(serve())
    return DONE


def serve_echo(host, port, key_file, delay="0"):
    signal.signal(signal.SIGTERM, lambda number, frame: os._exit(0))
    asyncio.run(echo_server(host, int(port), key_file, float(delay)))
    return DONE


def follow(run, slurm, child=None, quiet=False):
    """Wait for a run's end, telling what changes; its exit code. Ctrl-C ends the looking, not the run."""
    try:
        return follow_to_the_end(run, slurm, child, quiet)
    except KeyboardInterrupt:
        complain(f"{run.name} goes on: `status -f {run.name}` looks again, `cancel {run.name}` ends it")
        return INTERRUPTED


def follow_to_the_end(run, slurm, child, quiet):
    look, told, seen = state_watch(run, slurm), "", None
    while True:
        ended = child is not None and child.poll() is not None
        state = look()
        if ended and state["exit_code"] is None:
            said = log_tail(run.logs / "slurm-0.out")
            state.update(state="failed", exit_code=child.returncode if child.returncode > 0 else CLUSTER_FAILED,
                         detail=said[-1] if said else "it ended without a word")
        line, over = state_line(state), state["exit_code"] is not None and (child is None or ended)
        if not quiet and line != told and not over:
            told = line
            if on_terminal():
                sys.stdout.write("\r\033[K" + visible(line)[:shutil.get_terminal_size().columns - 1])
                sys.stdout.flush()
            why = state["detail"] if state["state"] == "pending" else ""
            step = state["state"], why, state["done"] * 10 // max(1, state["total"])
            if step != seen and not on_terminal():
                say(line)
            seen = step
        if over:
            if not quiet:
                say("\r\033[K" * on_terminal() + verdict(run, state))
            return state["exit_code"]
        pause(child, 0.1 if state["state"] in ("starting", "starting the engine") else 0.5)


def pause(child, time_s):
    """Rest, but not beyond the end of a child. Looking often would take the engine's own cores from it."""
    if not child:
        time.sleep(time_s)
        return
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(time_s)


def state_line(state):
    parts = [state["state"], *([progress_line(state)] if state["done"] or state["failed"] else [])]
    return ", ".join(parts) + (f": {state['detail']}" if state["detail"] else "")


def progress_line(state):
    parts = [f"{state['done']}/{state['total']} prompts"]
    if state["failed"]:
        parts.append(f"{state['failed']} failed")
    if state["tokens_per_s"]:
        parts.append(f"{state['tokens_per_s']:.0f} tokens/s")
    if state["left_s"]:
        parts.append(f"about {show_duration(state['left_s'])} left")
        if state["ends_in_s"] is not None and state["ends_in_s"] < state["left_s"]:
            parts.append(f"the job's time ends in {show_duration(state['ends_in_s'])}")
    return ", ".join(parts)


def verdict(run, state):
    """How a run ended, and where its answers are."""
    folder, done, failed = run.config().results.folder or run.results, state["done"], state["failed"]
    doubt = f"\n{state['detail']}" if state["detail"] else ""
    took = f" in {show_duration(state['took_s'])}" if state["took_s"] is not None else ""
    rate = f", {state['tokens_per_s']:.0f} tokens/s" if state["tokens_per_s"] else ""
    if state["exit_code"] == DONE:
        return f"{all_of(done)} answered{took}{rate}: {folder}{doubt}"
    if state["exit_code"] == SOME_FAILED and failed:
        what = f"{are(done)} answered, {failed} failed" if done else f"No prompt is answered, all {failed} failed"
        return f"{what}{took}{rate}: {folder}/errors.jsonl says why{doubt}"
    if state["exit_code"] == SOME_FAILED:
        return f"{all_of(done)} answered{took}{rate}, but see for yourself: {folder}{doubt}"
    return f"{state['state']}: {state['detail'] or 'work is left'} ({done} of {state['total']} answered; " \
           f"`python llmrun.py logs {run.name}` shows more)"


def are(count):
    return "1 prompt is" if count == 1 else f"{count} prompts are"


def all_of(count):
    return "The prompt is" if count == 1 else f"All {count} prompts are"


def runs_folder(args):
    """Where the runs lie: --runs, else the run_dir of the config.toml here, else runs/."""
    if args.runs:
        return args.runs
    if os.path.isfile("config.toml"):
        with contextlib.suppress(UserError):
            return read_config("config.toml")[0].run_dir
    return "runs"


def find_run(args, going=None):
    """The run that is meant: by folder, name, job id, or the newest; of those, with a Slurm to ask who is `going`, the
    newest that is not over."""
    wanted = args.run
    if wanted and os.path.isfile(os.path.join(wanted, "shapes", "0", "config.json")):
        return Run(os.path.abspath(wanted))
    runs = all_runs(runs_folder(args))
    if not runs:
        raise UserError(runs_folder(args), "there are no runs here",
                        "start one with `submit`, or name the folder: --runs")
    fitting = [run for run in runs if not wanted or wanted in (readable(run, names_of) or ())]
    if not fitting:
        raise UserError(wanted, "no run of that name or job id", nearest(wanted, [run.name for run in runs])
                        or "`status` lists the runs")
    if going and len(fitting) > 1:
        jobs = going.jobs([job for run in fitting for job in run.submitted()])
        fitting = [run for run in fitting if state_of(run, jobs)["exit_code"] is None] or fitting
    return fitting[-1]


def names_of(run):
    """All by which a run may be meant: its folder's name, its own, its jobs' ids."""
    return [run.name, run.config().name, *map(str, run.submitted()), *(str(life.job) for life in run.lives())]


def query_slurm():
    return Slurm(os.environ) if shutil.which("squeue") else None


def command_status(args):
    slurm = query_slurm()
    runs = [find_run(args)] if args.run else all_runs(runs_folder(args))
    jobs = slurm.jobs([job for run in runs for job in run.submitted()]) if slurm else {}
    states = list(filter(None, (readable(run, lambda run: state_of(run, jobs)) for run in runs)))
    if args.run and not states:
        raise UserError(str(runs[0].folder), "cannot be read", "the line above says why")
    if args.json:
        say_json(states[0] if args.run else states)
    elif args.follow and states:
        run = next(run for run in reversed(runs) if run.name == states[-1]["run"])
        return follow(run, slurm)
    elif args.run:
        for name in ("run", "folder", "job", "state", "detail"):
            say(f"{name:9} {states[0][name] or '-'}")
        if len(states[0]["all_jobs"]) > 1:
            say(f"{'all jobs':9} {' '.join(map(str, states[0]['all_jobs']))}")
        say(f"{'nodes':9} {' '.join(states[0]['nodes']) or '-'}")
        for lost in states[0]["lost"]:
            say(f"{'lost':9} {lost}")
        say(f"{'prompts':9} {progress_line(states[0])}")
        if states[0]["took_s"] is not None:
            say(f"{'took':9} {show_duration(states[0]['took_s'])}")
    elif not states:
        say(f"No runs in {runs_folder(args)}; `submit` starts one.")
    else:
        say_table(["RUN", "JOB", "STATE", "DONE", "FAILED", "TOK/S", "LEFT", ""], [
            [s["run"], str(s["job"] or "-"), s["state"], f"{s['done']}/{s['total']}", str(s["failed"]),
             f"{s['tokens_per_s']:.0f}", show_duration(s["left_s"]) if s["left_s"] else "-", s["detail"]]
            for s in states])
    return DONE


def command_logs(args):
    run = find_run(args)
    look = state_watch(run, query_slurm())
    files = log_files(run)
    chosen = chosen_logs(files, args.process)
    if args.process and not chosen:
        names = sorted({path.stem for path in files})
        raise UserError(run.name, f"no log of {args.process}",
                        "there are " + ", ".join(names) if names else "it has none yet")
    if args.json:
        say_json([str(path) for path in (chosen if args.process else files)])
        return DONE
    if not chosen and not args.follow:
        say(f"no logs yet: {state_line(look())}")
    chosen = chosen or args.follow and first_log(run, lambda: chosen_logs(log_files(run), ""), look) or []
    if not args.process:
        for path in files:
            say(str(path), "2")
    for path in chosen:
        if len(chosen) > 1:
            say(f"── {path}", "1")
        show_log(path, look if args.follow and path is chosen[-1] else None)
    return DONE


def log_files(run):
    files = sorted(run.logs.glob("*/*.log")) + sorted(run.logs.glob("slurm-*.out"))
    return [*files, *(Path(run.job_output(job)) for job in run.submitted() if run.config().slurm.output)]


def chosen_logs(files, process):
    """Those of a process; without one, the newest of a driver, or else of any."""
    found = [path for path in files if path.is_file() and (process or "slurm-") in path.name]
    return found if process else found[-1:] or [path for path in files if path.is_file()][-1:]


def show_log(path, look):
    """What stands in a log and, with a `look` at the run's state, what comes to it until the run ends; between the
    driver's own lines, how far it is."""
    told = None
    with open(path, errors="replace") as lines:
        while True:
            state = look and look()
            text = lines.read()
            sys.stdout.write(visible(text) if on_terminal() else text)
            sys.stdout.flush()
            if not look or state["exit_code"] is not None:
                return
            step = state["done"] * 10 // max(1, state["total"])
            if step != told and state["state"] == "answering":
                say(f"{time.strftime('%H:%M:%S')} {state_line(state)}")
            told = step
            time.sleep(0.3)


def first_log(run, find, look):
    """The files that `find()` gives: of a run that waits, as soon as there are some."""
    told = ""
    while True:
        state, files = look(), find()
        if files or state["exit_code"] is not None:
            return files
        if state_line(state) != told:
            told = state_line(state)
            say(told)
        time.sleep(0.5)


def cancel_lost_job(job, slurm):
    """End a job of llmrun's whose run is not found: its folder was deleted, or lies elsewhere."""
    detail = slurm.detail(job)
    state = re.search(r"\bJobState=(\w+)", detail)
    if not re.search(r"\bCommand=\S*/shapes/\d+/job\.sh\b", detail):
        return False
    if state and state.group(1) in ENDED_STATES:
        say(f"job {job} has ended already; the folder of its run is not here")
        return True
    slurm.cancel([int(job)])
    say(f"job {job}: cancelled; the folder of its run is not here")
    return True


def command_cancel(args):
    slurm = query_slurm()
    try:
        run = find_run(args, slurm)
    except UserError:
        if slurm and args.run.isdigit() and cancel_lost_job(args.run, slurm):
            return DONE
        raise
    jobs = slurm.jobs(run.submitted()) if slurm else {}
    going = {job: row.state for job, row in jobs.items() if row.state not in ENDED_STATES}
    starts = [run.events(life)[0] for life in run.lives()]
    stopped = [start["pid"] for start in starts if not start["job"] and is_alive(start, None)]
    if going or stopped:
        write_file(run.stop_file, "")  # before any signal: what ends now is not to go on by itself
    for pid in stopped:
        os.kill(pid, signal.SIGUSR1 if args.drain else signal.SIGTERM)
    refused = {}
    for job, state in going.items():
        try:
            slurm.cancel([job], *["--batch", "--signal=USR1"] * (args.drain and state == "RUNNING"))
        except ClusterError as error:  # the others are to end all the same
            refused[job] = error
    going = {job: state for job, state in going.items() if job not in refused}
    if args.json:
        say_json({"run": run.name, "cancelled": list(going), "stopped": stopped, "refused": list(refused)})
    else:
        what = "finishes what is under way" if args.drain else "cancelled"
        said = [f"job {job}: {what if state == 'RUNNING' else 'cancelled'}" for job, state in going.items()]
        said += [f"the driver of {run.name}: {what if args.drain else 'stopped'}"] * bool(stopped)
        if said or not refused:
            say("\n".join(said) or f"{run.name} is not running")
    for error in refused.values():
        complain(str(error))
    return CLUSTER_FAILED if refused else DONE


def command_results(args):
    form = "jsonl" if args.json else args.format
    if args.columns and form not in ("csv", "table"):
        raise UserError(f"--columns {args.columns}", f"{form} has no columns", "add --format csv, or --format table")
    run = find_run(args)
    config = run.config()
    prompts = Input.load(run, config, model_name(config))
    marks = Marks(run, prompts)
    if args.to:
        config = results_elsewhere(config, prompts, args.to)
    try:
        written = f"the files are in {write_results(run, config, marks)}"
    except OSError as error:  # the answers are in the journals, whatever the disk says
        written = f"the files could not be written: {os_reason(error)}; `results --to FOLDER` writes them elsewhere"
        log(written)
    states = (Marks.FAILED,) if args.failed else (Marks.DONE, Marks.FAILED)
    if not args.follow and not marks.count(Marks.DONE) + marks.count(Marks.FAILED):
        complain(f"no answers yet: {state_line(state_watch(run, query_slurm())())}")
    show = RESULT_FORMATS[form](prompts, args)
    places = {segment.path: end for segment, end in zip(marks.segments, marks.read_to)}
    show(line for _, line in marks.lines(states))
    if args.follow:
        follow_results(run, show, args.failed, places)
    elif on_terminal():
        say(f"{marks.count(Marks.DONE)} answers, {marks.count(Marks.FAILED)} failed; {written}")
    return DONE


def results_elsewhere(config, prompts, folder):
    """A run's config with another folder for its answers, which may be none that this would spoil."""
    results = dataclasses.replace(config.results, folder=os.path.abspath(os.path.expanduser(folder)))
    config = dataclasses.replace(config, results=results, source=f"--to {folder}", overrides=[])
    check_result_names(config, prompts)
    return config


def follow_results(run, show, failed, places):
    """Show what the journals gain beyond these places until the run ends."""
    look = state_watch(run, query_slurm())
    while True:
        ended = look()["exit_code"] is not None
        for _, _, path in run.segments():
            with open(path, "rb") as file:
                file.seek(places.get(path, 0))
                lines = [line for line in file if line.endswith(LINE_END + b"\n")]
            places[path] = places.get(path, 0) + sum(map(len, lines))
            lines = [line for line in lines if not (failed and line.endswith(OK_END + b"\n"))]
            show(iter(lines))
        if ended:
            return
        time.sleep(0.3)


class Columns:
    """What is shown of each answer, by names: columns of its own, and those of the row that asked it. Of a name that
    both have, the answer's is another, as answer_2."""

    def __init__(self, prompts, wanted):
        ours = ["custom_id", *sample_columns(prompts), "prompt", *ANSWER_COLUMNS, "time_s", "waited_s"]
        rows = prompts.own_columns()
        first, *others = free_names(rows, ours)
        self.prompts, self.own, known = prompts, dict(zip([first, *others], ours)), [first, *rows, *others]
        self.names = [name.strip() for name in wanted.split(",")] if wanted else known
        unknown = next((name for name in self.names if name not in known), None)
        if unknown is not None:
            raise UserError(f"--columns {unknown}", "no such column",
                            nearest(unknown, known) or "there are " + ", ".join(known))

    def cells(self, record):
        row, asked = self.prompts.asked(key_in(record))
        found = {**columns_of(record), "prompt": asked}
        return [str(found[self.own[name]]) if name in self.own else as_text(row.get(name, "")) for name in self.names]


def show_jsonl(prompts, args):
    def show(lines):
        for line in lines:
            say(line.decode().rstrip("\n"))
    return show


def show_texts(prompts, args):
    def show(lines):
        for record in map(json.loads, lines):
            found = columns_of(record)
            say(f"── {found['custom_id']}", "1")
            say(found["answer"] or f"({found['error']})")
    return show


def show_csv(prompts, args):
    columns = Columns(prompts, args.columns)
    say(csv_row(columns.names).decode()[:-1])

    def show(lines):
        for record in map(json.loads, lines):
            say(csv_row(columns.cells(record)).decode()[:-1])
    return show


def show_table(prompts, args):
    most, samples = 70 if on_terminal() else 200, sample_columns(prompts)
    columns = Columns(prompts, args.columns) if args.columns else None
    header = columns.names if columns else ["PROMPT", *map(str.upper, samples), "TOKENS", "TIME", "WAITED", "ANSWER"]
    table = Table(header, args.header)
    if not on_terminal():
        table.say([])  # the header; on a terminal it is as wide as the first rows

    def cells(record):
        if columns:
            return [cell[:most] for cell in columns.cells(record)]
        found = columns_of(record)
        text = found["answer"] if record["llmrun"]["ok"] else f"({found['error']})"
        return [found["custom_id"], *(found[name] for name in samples), found["completion_tokens"],
                f"{found['time_s']:.1f}s", f"{found['waited_s']:.1f}s", text[:most]]

    def show(lines):
        for some in iter(lambda: [cells(json.loads(line)) for line in itertools.islice(lines, 500)], []):
            table.say(some)
    return show


# a form → the function that shows lines of a journal in it, some at a time
RESULT_FORMATS = {"table": show_table, "text": show_texts, "jsonl": show_jsonl, "csv": show_csv}


def command_demo(args):
    """The whole path with the built-in echo engine, from this file alone."""
    folder = Path("llmrun-demo")
    (folder / "prompts").mkdir(parents=True, exist_ok=True)
    for number, text in enumerate(DEMO_PROMPTS, 1):
        write_file(folder / "prompts" / f"{number:02d}.txt", text + "\n")
    write_file(folder / "config.json", json.dumps(DEMO_CONFIG, indent=1))
    say("Three nodes, the echo engine (it only repeats), and a few prompts:")
    say()
    prepared = prepare(folder / "config.json", [])
    if args.submit:
        code = command_submit(argparse.Namespace(config=folder / "config.json", set=[], dry_run=False, json=False,
                                                 wait=True, join=""))
    else:
        code = run_here(make_run(prepared), 0, quiet=False)
    if code == DONE:
        say()
        command_results(argparse.Namespace(run="", runs=str(folder / "runs"), failed=False, format="table", json=False,
                                           columns="", header=False, follow=False, to=""))
        say()
        say("Next: `python llmrun.py init` writes a config for a real model.")
    return code


def command_help(args):
    topic = args.topic or "start"
    if topic == "config":
        say(example_toml())
    elif topic in HELP:
        say(HELP[topic])
    else:
        known = ["config"] + sorted(HELP)
        raise UserError(f"help {topic}", "no such topic", nearest(topic, known) or "there are " + ", ".join(known))
    return DONE


def command_help_table():
    """(name, function, one line of help, arguments) of every command, in the order users meet them."""
    run = [("run", {"nargs": "?", "default": "", "help": "its folder, name or job id; the newest if left out"}),
           ("--runs", {"default": "", "metavar": "FOLDER",
                       "help": "where the runs lie (default: run_dir of ./config.toml)"})]
    config = [("config", {"nargs": "?", "default": "", "help": "the config file (default: config.toml)"}),
              ("--set", {"action": "append", "default": [], "metavar": "KEY=VALUE",
                         "help": "override a key: slurm.nodes=3"})]
    wait = [("--wait", {"action": "store_true", "help": "follow the run; exit with its code"})]
    as_json = [("--json", {"action": "store_true", "help": "print JSON, for programs"})]
    return [
        ("demo", command_demo, "see it work here, without Slurm or a model",
         [("--submit", {"action": "store_true", "help": "through sbatch instead of here"})]),
        ("init", command_init, "write config.toml and example prompts",
         [("folder", {"nargs": "?", "default": ".", "help": "where (default: here)"})] + as_json),
        ("check", command_check, "validate and plan; show what would run; change nothing", config + as_json),
        ("submit", command_submit, "submit a run to Slurm", config + as_json + wait + [
            ("--dry-run", {"action": "store_true", "help": "print the batch script and stop"}),
            ("--join", {"default": "", "metavar": "RUN",
                        "help": "add a job to this run: like its first, or as the config or --set say"}), run[1]]),
        ("run", command_run, "run here: this machine, or the allocation this shell is in", config + as_json + [
            ("--here", {"action": "store_true", "help": "even where this machine has to stand for several nodes"})]),
        ("resume", command_resume, "go on with a run that stopped with work left", run + config[1:] + as_json + wait + [
            ("--failed", {"action": "store_true", "help": "ask failed prompts again, too"})]),
        ("status", command_status, "how runs stand: all, or one", run + as_json + [
            ("-f", {"flags": ["--follow"], "action": "store_true", "help": "until it ends; exit with its code"})]),
        ("logs", command_logs, "a run's logs", run + as_json + [
            ("process", {"nargs": "?", "default": "", "help": "part of a log's name, as in llama-server"}),
            ("-f", {"flags": ["--follow"], "action": "store_true", "help": "keep showing what is added"})]),
        ("cancel", command_cancel, "stop a run for good; finished prompts are kept", run + as_json + [
            ("--drain", {"action": "store_true", "help": "let the prompts that are under way finish first"})]),
        ("results", command_results, "the answers so far", run + as_json + [
            ("--format", {"choices": list(RESULT_FORMATS), "default": "table", "help": ", ".join(RESULT_FORMATS)}),
            ("--columns", {"default": "", "metavar": "NAMES", "help": "what a csv or a table shows, as in "
                           "prompt,answer; a csv shows all there are, the columns of your own rows too"}),
            ("--header", {"action": "store_true", "help": "a table has its header in a pipe, too"}),
            ("-f", {"flags": ["--follow"], "action": "store_true", "help": "keep showing what is added"}),
            ("--failed", {"action": "store_true", "help": "only prompts that failed"}),
            ("--to", {"default": "", "metavar": "FOLDER", "help": "write the files there instead"})]),
        ("help", command_help, "more on a topic: config, results, files, codes, engines, lives",
         [("topic", {"nargs": "?", "default": "", "help": "the topic"})]),
        ("drive", command_drive, "", [("run", {"nargs": "?", "default": ""}), ("--config", {"default": ""}),
                                      ("--shape", {"type": int, "default": 0}), ("--failed", {"action": "store_true"}),
                                      config[1]])]


class Parser(argparse.ArgumentParser):
    """Says what is wrong with a command line in one line, as every other error."""

    def error(self, message):
        match = re.search(r"invalid choice: '([^']*)'", message)
        names = [row[0] for row in command_help_table() if row[2]]
        if match and "COMMAND" in message:
            raise UserError(f"llmrun.py {match.group(1)}", "no such command",
                            nearest(match.group(1), names) or "there are " + ", ".join(names))
        raise UserError(self.prog, message, f"`{self.prog} --help` shows what it takes")


def make_parser(wanted):
    """The parser of one command, or of all where it is not clear which is meant: each costs a few milliseconds."""
    parser = Parser(prog="llmrun.py", description="Run a language model on a Slurm cluster, from one file.",
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", action="version", version=f"llmrun {VERSION}, Python {sys.version.split()[0]}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
    table = command_help_table()
    for name, function, summary, arguments in [row for row in table if row[0] == wanted] or table:
        sub = commands.add_parser(name, **({"help": summary, "description": summary} if summary else {}))
        sub.set_defaults(function=function)
        for argument, options in arguments:
            longer = options.get("flags", [])
            sub.add_argument(argument, *longer, **{name: value for name, value in options.items() if name != "flags"})
    return parser


def interrupted_once(number, frame):
    """What SIGINT does to a command: another one would tear a traceback out of what the first has begun to end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise KeyboardInterrupt


def main(argv=None):
    """Run one command; errors become one line, and the exit code says of which kind they are."""
    words = sys.argv[1:] if argv is None else argv
    try:
        sys.stdin, sys.stdout, sys.stderr = (stream or open(os.devnull, mode) for stream, mode in (
            (sys.stdin, "r"), (sys.stdout, "w"), (sys.stderr, "w")))
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(errors="replace", **({} if stream.isatty() else {"encoding": "utf-8"}))
        if words[:1] == ["agent"] and len(words) == 2:  # a run starts many of these two, and waits for them
            return serve_agent(words[1])
        if words[:1] == ["echo"] and len(words) in (4, 5):
            return serve_echo(*words[1:])
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, interrupted_once)
        args = make_parser(words[0] if words else "").parse_args(words)
        if not args.command:
            say(where_am_i())
            say(HELP["start"])
            return DONE
        return args.function(args)
    except UserError as error:
        for one in getattr(error, "errors", [error]):
            complain(str(one))
        return error.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the reader left, as `head` does
        return DONE
    except OSError as error:
        complain(f"{error.filename or 'this machine'}: {os_reason(error)}")
        return CLUSTER_FAILED


def where_am_i():
    """One line on where this was started, for who is not sure."""
    return {"login": "This runs a language model on a Slurm cluster, from this one file.",
            "allocation": "This shell holds a Slurm allocation; `run` uses its nodes.",
            "shell": "This is an interactive step of a Slurm job; `run` uses its nodes.",
            "batch": "This is the batch script of a Slurm job; `run` uses its nodes.",
            "task": "This is a task of a Slurm job; start llmrun once, in the batch script.",
            "job": "This runs inside a Slurm job; `run` uses its nodes."}[role_of(os.environ, os.getpid())]


# ═══════════════════════════════════════════════════════════════════════════════
# 23 · Assets
#
# Owns the constant texts: help topics, example prompts, the demo. Uses nothing.
# ═══════════════════════════════════════════════════════════════════════════════

EXAMPLE_SYSTEM = "You are a careful assistant. Answer in a few sentences.\n"
EXAMPLE_PROMPTS = {"tides.txt": "Why are there two high tides a day?\n",
                   "bread.txt": "What does the salt in bread dough do?\n"}
DEMO_PROMPTS = [
    "Why is the sky blue?", "What does the salt in bread dough do?", "Why are there two high tides a day?",
    "How does a compass know north?", "Why do leaves turn red?", "What makes a violin sound warm?",
    "How do bees find their way home?", "Why does ice float?", "What is a prime number good for?",
    "How old is the light of the stars?", "Why do cats purr?", "How does a seed know which way is up?"]
DEMO_CONFIG = {"name": "demo", "slurm": {"nodes": 3, "time": "00:05:00"},
               "engine": {"name": "echo", "slots": 2, "args": ["0.4"]}, "prompts": {"user": "prompts"}}

HELP = {
    "start": """\
From a model file to answers, on the login node of a Slurm cluster:

  python llmrun.py init                 writes config.toml and example prompts
  (edit three lines of config.toml: the model, llama-server, the partition)
  python llmrun.py check                validates, plans, shows what would run
  python llmrun.py submit config.toml   starts it
  python llmrun.py status               how it goes
  python llmrun.py results              the answers

`python llmrun.py demo` shows all of it on this machine, without Slurm or a model.
More: `help config`, `help results`, `help files`, `help codes`, `help engines`, `help lives`; `COMMAND --help`.""",
    "results": """\
`results` writes the answers so far as files, and shows them. While a run goes on, too, as often as you like.

  results                    a table of the newest run; `results RUN` of another
  results --failed           only the prompts that failed, and why
  results --format text      the answers in full; `csv` and `jsonl` are for a spreadsheet or a program
  results -f                 and those to come, until the run ends
  results --to FOLDER        writes the files there instead, as where their own folder cannot be written

The files lie in results/ in the run's folder, or in the folder that [results] folder names:

  results.jsonl              every answer in the order of the prompts, in OpenAI's Batch format
  errors.jsonl               the prompts that failed; not there if none did
  part/name.txt              the answer to the text file part/name.txt: [results] file_name changes its name
  name.csv                   your CSV with the columns of the answers added: [results] columns says which
""",
    "files": """\
A run is a folder, runs/NAME-DATE-TIME, and all that is known about it is in there:

  results/           the answers: results.jsonl in input order, errors.jsonl for the prompts that failed;
                     a text file for each text file, a CSV with answer columns for a CSV; of several samples the
                     text files are a.1.txt, a.2.txt … and the tables have the columns sample and seed
  summary.json       the counts
  logs/              slurm-JOB.out: the driver; JOB.LIFE/NODE-PROCESS.log: everything else
  journal/           every finished prompt, as it came (OpenAI Batch format); `results` reads it
  events/            what happened, one line a change; `status` reads them
  claims/            which prompts which job has taken on, and a beat of each job that lives
  key                the secret that the engine asks for; only you can read it
  endpoint.json      where the model answers, while it does
  input/             where each prompt stands in your files; they must stay as they are until the end
  shapes/0/          the config as it was understood, and the batch script; one more for each other shape that joined
  llmrun.py          the program as it was when you submitted

Delete the folder and nothing of the run is left.""",
    "lives": """\
A run may need more than one job, and goes on by itself when Slurm takes one away:

  the time limit     no prompt is asked that would not end before it; then the same job waits in the queue
                     again (`scontrol requeue`; Slurm lets it start two minutes later at the earliest).
                     A batch of 40 hours in a partition of 4 hours is one `submit`.
  a preemption       the same; with grace or without.
  a lost node        named in `status`. With replicas left the job goes on; else another job does, on other nodes.
  an engine's death  it is started again, up to 3 times in 10 minutes. A prompt that was there each time is asked
                     alone once; if the engine dies of it, that prompt has failed, and the rest go on.
  a sick engine      one that lives but answers nothing for a minute, not even a small question of llmrun's own, is
                     started again, too. If that does not help, the run ends with the engine's words, and all that
                     it did not answer stays open for `resume`. An engine that says nothing at all is given longer.
  a full disk        nothing more is asked until the answers can be written.
  a changed prompt   fails alone: of a table, the rows from the first that is not what it was when you submitted.
                     What cannot be read for a while is read later.

Three starts in a row that answer nothing are the last. `cancel` ends a run for good, `cancel --drain` when the
prompts under way are answered; [slurm] requeue = false lets no job come back. `resume` goes on with a run that
stopped, `resume --failed` asks failed prompts again.

With [slurm] jobs = 8 eight jobs share the prompts, each on its own nodes; a faster one does more, and what a dead
one had taken on goes to the others. `submit --join RUN` adds a job to a run, like its first; with --set, or with a
config file of its own, it has another shape: `submit --join RUN --set slurm.partition=small --set slurm.nodes=2`.""",
    "codes": """\
Exit codes, of every command and of the Slurm job:

  0    all done
  1    finished, but some prompts failed (results/errors.jsonl says why)
  2    something in the input is wrong: the message says what and where
  3    the engine or the cluster failed
  4    stopped with work left; what is finished is kept, and `resume` goes on
  130  interrupted""",
    "engines": """\
[engine] name = "llama.cpp"
  llama-server on the first node. With more nodes, an RPC worker (ggml-rpc-server or rpc-server,
  beside llama-server) runs on each of the others and lends its GPU to the first: this is how a model
  that is too large for one GPU runs on several small ones. The build needs -DGGML_RPC=ON.
  The RPC workers of llama.cpp know no password: they listen on one address of their node, and
  everybody who can reach that address could use them while the job runs.
  Prompts that ask for embeddings (a Batch file with url /v1/embeddings) start llama-server for them: --embeddings,
  --pooling mean where the model names none (set your own by args = ["--pooling", "last"] under [engine]), and
  batches that hold a whole text. Put embeddings and chat into two runs.

[engine] name = "echo"
  No model: it repeats the prompt. To try out a config, or llmrun itself."""}


if __name__ == "__main__":
    sys.exit(main())
