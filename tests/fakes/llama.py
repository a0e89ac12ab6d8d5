"""Fakes of llama.cpp's `llama-server` and of its RPC worker, for tests.

They keep the command lines, exit codes, log lines and HTTP habits of the real programs, and
know nothing of models: an answer is a digest of all that was asked (`mark_of`) and an echo of the
prompt, so that a test can tell to which question it belongs; a token is four characters, and of a
GGUF file only the header is read. `build.py` makes executables of them.

Two ages: "new" is build 11434, "old" is the build that llama-cpp-python 0.3.16 carries. The
flags of each stand in flags-new.txt and flags-old.txt, one a line as in --help.

What a test may ask for, all by environment variables (unset: no wait, no fault):

  FAKE_LLAMA_LOAD_S=3          loading takes so long (503 "Loading model" meanwhile)
  FAKE_LLAMA_LOAD_FAIL=TEXT    loading ends with these lines on stderr and exit code 1
  FAKE_LLAMA_DIES=NAME         it fails with the words, at the moment and in the way of the real one:
                               a name of the table DEATHS, such as gpu-memory or library
  FAKE_LLAMA_HANG=load|start|answers
                               never ready | never opens its port | ready, but never answers
  FAKE_LLAMA_TOKENS_PER_S=50   speed of one slot (0 or unset: at once)
  FAKE_LLAMA_TTFT_S=0.2        time to the first token
  FAKE_LLAMA_ANSWER_TOKENS=40  every answer wants to be so long (unset: the echo's own length)
  FAKE_LLAMA_EOS=1             without a limit the answer still ends by itself (unset: as a
                               model without an end token, it runs until its context is full)
  FAKE_LLAMA_EMPTY=1           answers are empty; a fraction: that share of them
  FAKE_LLAMA_THINK=1           answers open with a reasoning_content of a few tokens
  FAKE_LLAMA_CRASH_AFTER=10    the process crashes on request number 11
  FAKE_LLAMA_POISON=WORD       the process crashes on a prompt that holds WORD
  FAKE_LLAMA_CRASH_SIGNAL=SEGV how it crashes (ABRT unless told)
  FAKE_LLAMA_ONCE=FILE         LOAD_FAIL, DIES, HANG, CRASH_AFTER and POISON befall only the process
                               that manages to create FILE; those after it are well
  FAKE_LLAMA_FAULT_RATE=0.1    that share of the requests fails …
  FAKE_LLAMA_FAULTS=500,cut,429,503
                               … in one of these ways, by turns of a dice …
  FAKE_LLAMA_FAULT_SEED=0      … with this seed
  FAKE_LLAMA_RETRY_AFTER=1     the Retry-After of 429 and 503
  FAKE_LLAMA_DISCONNECT_S=1    a client's leaving is noticed so late (streams: at once)
  FAKE_LLAMA_STREAMS_WAIT=1    SIGTERM does not cut streams but waits for their clients (the real one
                               does now this, now that)
  FAKE_LLAMA_JOURNAL=FILE      one JSON line per answered request is appended to FILE:
                               pid, time, path, status, prompt (its last message), written
                               before the answer goes out; status may be "cut" or "left"
  FAKE_LLAMA_GPUS=2            GPUs of this node, of FAKE_LLAMA_GPU_MIB (81559) each
  FAKE_LLAMA_MEM_MIB=16000     memory that an RPC worker without GPUs reports
  FAKE_RPC_DIE_AFTER_S=2       an RPC worker dies (SIGSEGV) so long after its start …
  FAKE_RPC_DIE_SIGNAL=KILL     … by this signal
  FAKE_RPC_PROTOCOL=6.0.0      an RPC worker speaks this version of the protocol
"""

import asyncio
import collections
import hashlib
import json
import os
import random
import re
import signal
import socket
import struct
import sys
import time

STARTED = time.time()
HERE = os.path.dirname(os.path.abspath(__file__))
BUILD = {"new": "b11434-0cc4c0e", "old": "b0-unknown"}
PROTOCOL = {"new": (7, 0, 0), "old": (2, 0, 0)}
KEEP_ALIVE_S, KEEP_ALIVE_REQUESTS = 5, 100  # what the real server's HTTP library does
TRUE = ("1", "on", "enabled", "true", "yes")


def compact(data):
    return json.dumps(data, ensure_ascii=False, separators=(",", ":"))


def wish(name, default=0.0):
    """The number in an environment variable of this fake."""
    return float(os.environ.get("FAKE_LLAMA_" + name) or default)


def afflicted(name):
    """The text of a fault's variable, if this process is the one to suffer it."""
    value, once = os.environ.get("FAKE_LLAMA_" + name), os.environ.get("FAKE_LLAMA_ONCE")
    if value and once and not afflicted.chosen:
        try:
            os.close(os.open(once, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
            afflicted.chosen.append(True)
        except FileExistsError:
            afflicted.chosen.append(False)
    return value if value and (not once or afflicted.chosen[0]) else None


afflicted.chosen = []


# ── ways to die ────────────────────────────────────────────────────────────────────────────
# name → the moment, the lines, the end: a signal, an exit code, or None for that of a failed load. Lines were taken from runs of
# both builds; those of GPUs (ggml-cuda.cu) and of the linker from their sources and from issues that show them.

CUDA = "/build/ggml/src/ggml-cuda/ggml-cuda.cu"
CUDA_ALLOC = "ggml_backend_cuda_buffer_type_alloc_buffer: allocating 39979.48 MiB on device 0: cudaMalloc failed: out of memory"
NO_CACHE = "llama_init_from_model: failed to initialize the context: failed to allocate buffer for kv cache"
DEATHS = {
    "library": ("start", ["{program}: error while loading shared libraries: libcudart.so.12: cannot open shared object "
                          "file: No such file or directory"], 127),
    "glibc": ("start", ["{program}: /lib/x86_64-linux-gnu/libc.so.6: version `GLIBC_2.38' not found (required by "
                        "{program})"], 1),
    "illegal-start": ("start", [], "ILL"),
    "gpu-memory": ("load", [CUDA_ALLOC, "alloc_tensor_range: failed to allocate CUDA0 buffer of size 41921519616",
                            "error loading model: unable to allocate CUDA0 buffer"], None),
    "gpu-cache": ("load", [CUDA_ALLOC, "alloc_tensor_range: failed to allocate CUDA0 buffer of size 41921519616",
                           NO_CACHE], None),
    "worker-memory": ("load", ["alloc_tensor_range: failed to allocate {worker} buffer of size 204800000000", NO_CACHE],
                      None),
    "host-memory": ("load", ["ggml_aligned_malloc: insufficient memory (attempted to allocate 195312.50 MB)",
                             "ggml_backend_cpu_buffer_type_alloc_buffer: failed to allocate buffer of size 204800000000",
                             "alloc_tensor_range: failed to allocate CPU buffer of size 204800000000", NO_CACHE], None),
    "architecture": ("load", ["error loading model: unknown model architecture: 'next9'"], None),
    "other-gpu": ("load", ["ggml_cuda_compute_forward: RMS_NORM failed",
                           "CUDA error: no kernel image is available for execution on the device",
                           "  current device: 0, in function ggml_cuda_compute_forward at " + CUDA + ":2761", "  err",
                           CUDA + ":97: CUDA error"], "ABRT"),
    "killed": ("load", [], "KILL"),
    "illegal": ("load", [], "ILL"),
    "segv": ("load", [], "SEGV"),
    "bus": ("load", [], "BUS"),
    "gpu-memory-late": ("answer", ["CUDA error: out of memory", "  current device: 0, in function alloc at " + CUDA + ":528",
                                   "  cuMemCreate(&handle, reserve_size, &prop, 0)", CUDA + ":104: CUDA error"], "ABRT"),
    "gpu-access": ("answer", [CUDA + ":104: CUDA error", "CUDA error: an illegal memory access was encountered",
                              "  current device: 0, in function ggml_backend_cuda_synchronize at " + CUDA + ":3145",
                              "  cudaStreamSynchronize(cuda_ctx->stream())"], "ABRT"),
    "killed-late": ("answer", [], "KILL"),
}


def die_at(moment, say=lambda line: stderr(line + "\n"), give_up=None, worker=""):
    """Ends the process if this is the moment that FAKE_LLAMA_DIES means for it."""
    name = os.environ.get("FAKE_LLAMA_DIES")
    if not name or DEATHS[name][0] != moment or not afflicted("DIES"):
        return
    _, lines, end = DEATHS[name]
    lines = [line.format(program=sys.argv[0], worker=worker) for line in lines]
    if end is None:
        give_up(lines)
    for line in lines:
        say(line)
    if isinstance(end, str):
        crash("", end)
    os._exit(end)


def stderr(text):
    """Whole lines in one write, as they reach a log file."""
    data = text.encode()
    while data:
        data = data[os.write(2, data):]


def crash(message, how=None):
    if message:
        stderr(message + "\n")
    sys.stdout.flush()
    number = getattr(signal, "SIG" + (how or os.environ.get("FAKE_LLAMA_CRASH_SIGNAL") or "ABRT"))
    if number != signal.SIGKILL:
        signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    time.sleep(60)


def no_core_files():
    import resource
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


# ── the command line ───────────────────────────────────────────────────────────────────────

class Refused(Exception):
    """An argument that the program does not take."""


class Flag:
    def __init__(self, line, age):
        self.given_up = GIVEN_UP.get(line.split(",")[0]) if age == "new" else None
        line, _, self.env = line.partition("  env=")
        names = re.findall(r"(?:^|, )(--?[A-Za-z][\w.-]*)", line)
        shown = line if len(names) == 1 else (names[0] + ", ").ljust(7) + line[len(names[0]) + 2:]
        self.help = (shown.ljust(40) if len(shown) <= 37 else shown + "\n" + " " * 40) + self.explain(names)
        last = line.index(names[-1], len(", ".join(names[:-1]))) + len(names[-1])
        self.hint = line[last:].strip()
        self.takes = 2 if self.hint in ("START END", "FNAME SCALE") else 1 if self.hint else 0
        longs = [name for name in names if name.startswith("--")]
        positive = [name for name in longs if not name.startswith("--no-")]
        self.denials = [n for n in names if re.match(r"--?no|-nkvo$|-nr$", n)] if positive else []
        self.names = names
        self.key = (positive or longs)[0].lstrip("-")


    def explain(self, names):
        """Words that, as the real ones do, name other flags too."""
        text = "what %s is for" % names[-1]
        if self.given_up:
            text = "the argument has been removed. " + self.given_up
        elif not self.env:
            text += " (default: same as --threads)"
        return text + ("\n" + " " * 40 + "(env: %s)" % self.env if self.env else "") + "\n"


# Still parsed and listed by the new build, only to be refused with a word of advice.
GIVEN_UP = {"--draft": "use --spec-draft-n-max or --spec-ngram-mod-n-max",
            "--draft-min": "use --spec-draft-n-min or --spec-ngram-mod-n-min",
            "--spec-ngram-size-n": "use the respective --spec-ngram-*-size-n",
            "--spec-ngram-size-m": "use the respective --spec-ngram-*-size-m",
            "--spec-ngram-min-hits": "use the respective --spec-ngram-*-min-hits"}


class Build:
    """One build's flags, and what it makes of a command line and an environment."""

    NUMBERS = {"ctx-size", "parallel", "port", "batch-size", "ubatch-size", "timeout", "threads",
               "threads-http", "predict", "sse-ping-interval", "cache-ram", "cache-reuse",
               "kv-unified-per-slot", "main-gpu", "verbosity", "sleep-idle-seconds"}

    def __init__(self, age, rpc):
        self.age, self.rpc = age, rpc
        with open(os.path.join(HERE, "flags-%s.txt" % age)) as file:
            self.flags = [Flag(line.rstrip("\n"), age) for line in file]
        if age == "old" and not rpc:
            self.flags = [flag for flag in self.flags if flag.key != "rpc"]
        self.by_name = {name: flag for flag in self.flags for name in flag.names}

    def parse(self, argv):
        values = {"api-keys": [], "rpc-devices": []}
        if self.age == "new":
            self.read_config(values)
        for flag in self.flags:
            self.read_environment(flag, values)
        seen, rest = set(), iter(argv)
        for name in rest:
            if name.startswith("--"):
                name = name.replace("_", "-")
            flag = self.by_name.get(name)
            if not flag:
                raise Refused("error: invalid argument: " + name)
            if name in seen:
                stderr("%sDEPRECATED: argument '%s' specified multiple times, use comma-separated values instead "
                       "(only last value will be used)\n" % ("0.00.001.672 W " if self.age == "new" else "", name))
            seen.add(name)
            if flag.env and flag.env in os.environ:
                stderr("warn: %s environment variable is set, but will be overwritten by command "
                       "line argument %s\n" % (flag.env, name))
            given = []
            for _ in range(flag.takes):
                given.append(next(rest, None))
                if given[-1] is None:
                    raise Refused(self.wrong(name, flag, "expected value for argument"))
            try:
                self.apply(flag, given[0] if given else name not in flag.denials, values)
            except ValueError as error:
                raise Refused(self.wrong(name, flag, error))
        return values

    @staticmethod
    def wrong(name, flag, error):
        return ('error while handling argument "%s": %s\n\nusage:\n%s\n\nto show complete usage, '
                "run with -h" % (name, error, flag.help))

    def read_environment(self, flag, values):
        if not flag.env:
            return
        denial = flag.env.replace("LLAMA_ARG_", "LLAMA_ARG_NO_")
        value = os.environ.get(flag.env)
        if flag.denials and denial in os.environ:
            value = "0"
        if value is None:
            return
        try:
            if flag.takes:
                self.apply(flag, value, values)
            elif flag.denials:
                self.apply(flag, self.truth(value), values)
            elif value in TRUE:
                self.apply(flag, True, values)
        except ValueError as error:
            raise Refused('error while handling environment variable "%s": %s\n\n' % (flag.env, error))

    def read_config(self, values):
        home = os.environ.get("XDG_CONFIG_HOME") or os.path.join(os.path.expanduser("~"), ".config")
        for path in ("/etc/llama.cpp/config.ini", os.path.join(home, "llama.cpp", "config.ini")):
            if not os.path.exists(path):
                continue
            stderr("0.00.001.001 I using config file: %s\n" % path)
            section = "default"
            with open(path) as file:
                for line in map(str.strip, file):
                    if line.startswith("["):
                        section = line.strip("[]")
                    elif "=" in line and line[0] not in "#;" and section in ("default", "*"):
                        key, value = (part.strip() for part in line.split("=", 1))
                        self.apply_setting(path, key, value, values)

    def apply_setting(self, path, key, value, values):
        flag = next((f for f in self.flags if key == f.env or key in [n.lstrip("-") for n in f.names]), None)
        if key == "version":
            return
        if not flag:
            stderr("0.00.001.002 W ignoring option '%s' from %s: not supported by this program\n" % (key, path))
        elif flag.takes:
            self.apply(flag, value, values)
        else:
            denied = "-" + key in flag.denials or "--" + key in flag.denials
            self.apply(flag, (value in TRUE) != denied, values)

    @staticmethod
    def truth(value):
        if value in TRUE[:4]:
            return True
        if value in ("0", "off", "disabled", "false"):
            return False
        raise ValueError("invalid boolean value")

    def apply(self, flag, value, values):
        key = flag.key
        if flag.given_up:
            raise ValueError("the argument has been removed. " + flag.given_up)
        if key in self.NUMBERS:
            match = re.match(r"\s*[+-]?\d+", value)
            if not match:
                raise ValueError("stoi")
            value = int(match.group())
        if key == "flash-attn" and self.age == "new" and value not in (
                "on", "off", "auto", "1", "0", "enabled", "disabled", "true", "false", "-1"):
            raise ValueError("error: unknown value for --flash-attn: '%s'\n" % value)
        if key == "gpu-layers" and not re.match(r"-?\d", value) and not (
                self.age == "new" and value in ("auto", "all")):
            raise ValueError("stoi")
        if key in ("cache-type-k", "cache-type-v") and value not in (
                "f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "iq4_nl", "q5_0", "q5_1"):
            raise ValueError("Unsupported cache type: " + value)
        if key == "help":
            self.print_help()
        elif key == "version":
            self.print_version()
        elif key == "list-devices":
            self.print_devices(values)
        elif key == "api-key":
            values["api-keys"] += [k for k in (value.split(",") if self.age == "new" else [value]) if k]
        elif key == "api-key-file":
            values["api-keys"] += read_keys(value, self.age)
        elif key == "rpc":
            if not self.rpc:
                raise ValueError("RPC not supported in this build")
            values["rpc-devices"] += rpc_devices(value, self.age)
        values[key] = value

    def print_help(self):
        leave_with("----- common params -----\n\n" + "".join(flag.help for flag in self.flags))

    def print_version(self):
        if self.age == "new":
            stderr("version: 0.6.0-dev (build 11434, commit 0cc4c0e)\n")
        else:
            stderr("version: 6096 (4227c9b)\n")
        stderr("built with cc (Debian 12.2.0-14) 12.2.0 for x86_64-linux-gnu\n")
        os._exit(0)

    def print_devices(self, values):
        devices = ["  %s: %s (%d MiB, %d MiB free)" % device for device in values["rpc-devices"] + gpus()]
        leave_with("\n".join(["Available devices:"] + (devices or ["  (none)"] * (self.age == "new"))))


def leave_with(text):
    try:
        print(text, flush=True)
    except BrokenPipeError:
        pass
    os._exit(0)


def read_keys(path, age):
    try:
        with open(path) as file:
            lines = file.read().split("\n")
    except OSError:
        raise ValueError("error: failed to open file '%s'\n" % path)
    return [line for line in lines if line and not (age == "new" and line[0] == "#")]


def gpus():
    mib = int(wish("GPU_MIB", 81559))
    return [("CUDA%d" % i, "NVIDIA Fake", mib, mib - 500) for i in range(int(wish("GPUS")))]


# ── the RPC worker and its client ──────────────────────────────────────────────────────────
# A message is a command byte, a length and so many bytes; an answer is a length and bytes.

HELLO, DEVICE_COUNT, DEVICE_MEMORY = 14, 15, 11
HELLO_REQUEST = {"new": bytes(24), "old": b""}


def receive(sock, count):
    data = b""
    while len(data) < count:
        piece = sock.recv(count - len(data))
        if not piece:
            return None
        data += piece
    return data


class Worker:
    """A client's view of one RPC worker. Blocks for ever where the real one does."""

    def __init__(self, endpoint):
        self.endpoint = endpoint
        host, _, port = endpoint.rpartition(":")
        try:
            self.sock = socket.create_connection((host, int(port)))
        except (OSError, ValueError):
            self.sock = None

    def ask(self, command, request=b""):
        try:
            self.sock.sendall(struct.pack("<BQ", command, len(request)) + request)
            size = receive(self.sock, 8)
            return receive(self.sock, struct.unpack("<Q", size)[0]) if size else None
        except OSError:
            return None

    def dead(self):
        try:
            return self.sock.recv(1, socket.MSG_DONTWAIT | socket.MSG_PEEK) == b""
        except BlockingIOError:
            return False
        except OSError:
            return True


def rpc_memory(endpoint, age):
    """The worker's (total, free) MiB for each of its devices, over a connection of its own."""
    worker = Worker(endpoint)
    if not worker.sock:
        if age == "old":
            return [(0, 0)]
        crash("/build/ggml/src/ggml-rpc/ggml-rpc.cpp:547: Failed to connect to %s\n" % endpoint, "ABRT")
    hello = worker.ask(HELLO, HELLO_REQUEST[age])
    if not hello:  # too far apart to understand each other's greeting
        crash("/build/ggml/src/ggml-rpc/ggml-rpc.cpp:%d: Remote RPC server crashed or returned malformed response\n"
              % (354 if age == "new" else 444), "ABRT")
    if hello[0] != PROTOCOL[age][0]:
        stderr("RPC server version mismatch: %d.%d.%d\n" % tuple(hello))
        if age == "new":
            crash("/build/ggml/src/ggml-rpc/ggml-rpc.cpp:550: RPC handshake failed for %s\n" % endpoint, "ABRT")
        return [(0, 0)]
    memory = worker.ask(DEVICE_MEMORY)
    if memory is None:
        crash("/build/ggml/src/ggml-rpc/ggml-rpc.cpp:569: Remote RPC server crashed or returned malformed response\n",
              "ABRT")
    worker.sock.close()
    return list(struct.iter_unpack("<QQ", memory))


def rpc_devices(servers, age):
    devices = []
    for endpoint in servers.split(","):
        for index, (total, free) in enumerate(rpc_memory(endpoint, age)):
            devices.append(("RPC%d" % len(devices), endpoint, total, free))
    return devices


def rpc_worker(age, argv):
    """The RPC worker's main: its exit codes lie as the real ones do."""
    no_core_files()
    name = sys.argv[0]
    host, port, devices, mem, cache = "127.0.0.1", 50052, None, None, False
    rest = iter(argv)
    for flag in rest:
        value = ""
        if flag in ("-H", "--host", "-t", "--threads", "-d", "--device", "-p", "--port") or (
                age == "old" and flag in ("-m", "--mem")):
            value = next(rest, None)
            if value is None:
                return worker_refuses()
        if flag in ("-H", "--host"):
            host = value
        elif flag in ("-t", "--threads"):
            if not value.isdigit() or value == "0":
                stderr("error: invalid number of threads: %s\n" % value)
                return worker_refuses()
        elif flag in ("-d", "--device"):
            devices = value.split(",") if age == "new" else [value]
            if age == "old" and value not in known_devices():
                unknown_device(value)
                return worker_refuses()
        elif flag in ("-p", "--port"):
            if not value.isdigit() or not 0 < int(value) < 65536:
                return worker_refuses()
            port = int(value)
        elif flag in ("-m", "--mem") and age == "old":
            mem = int(value)
        elif flag in ("-c", "--cache"):
            cache = True
        elif flag in ("-h", "--help"):
            worker_usage(name, age)
            return 0
        else:
            stderr("error: unknown argument: %s\n" % flag)
            worker_usage(name, age)
            return 0
    return serve_rpc(age, host, port, devices, mem, cache)


def worker_refuses():
    stderr("Invalid parameters\n")
    return 1


def worker_usage(name, age):
    lines = ["-h, --help   show this help message and exit", "-t, --threads N   number of threads",
             "-d, --device DEV   device to use", "-H, --host HOST   host to bind to (default: 127.0.0.1)",
             "-p, --port PORT   port to bind to (default: 50052)", "-c, --cache   enable local file cache"]
    if age == "old":
        lines.insert(5, "-m, --mem MEM   backend memory size (in MB)")
    stderr("Usage: %s [options]\n\noptions:\n%s\n\n" % (name, "\n".join("  " + line for line in lines)))


def known_devices():
    """name → (text, total, free), GPUs first; the CPU serves only where there is no GPU."""
    mem = int(wish("MEM_MIB", 16000))
    found = {name: (text, total, free) for name, text, total, free in gpus()}
    found["CPU"] = ("Fake CPU", mem, mem - 1000)
    return found


def unknown_device(name):
    stderr("error: unknown device: %s\navailable devices:\n" % name)
    for known, (text, total, free) in known_devices().items():
        print("  %s: %s (%d MiB, %d MiB free)" % (known, text, total, free))


def serve_rpc(age, host, port, devices, mem, cache):
    if host != "127.0.0.1":
        bar = "!" * 59
        stderr("\n%s\nWARNING: Host ('%s') is != '127.0.0.1'\n         Never expose the RPC server to an open "
               "network!\n         This is an experimental feature and is not secure!\n%s\n\n" % (bar, host, bar))
    known = known_devices()
    chosen = devices or [n for n in known if n != "CPU"] or ["CPU"]
    for name in chosen:
        if name not in known:
            unknown_device(name)
            stderr("No devices found\n")
            return 1
    if age == "old":
        chosen = chosen[:1]
        stderr("create_backend: using %s backend\n" % chosen[0])
    memory = [(mem, mem) if mem else known[name][1:] for name in chosen]
    # Not flushed: in a log file the banner shows only when the first client comes.
    sys.stdout = os.fdopen(os.dup(1), "w", buffering=65536)
    print("Starting RPC server v%d.%d.%d" % spoken(age))
    print("  endpoint       : %s:%d" % (host, port))
    print("  local cache    : %s" % (rpc_cache_folder() if cache else "n/a"))
    if age == "new":
        print("Devices:")
        for name, (total, free) in zip(chosen, memory):
            print("  %s: %s (%d MiB, %d MiB free)" % (name, known[name][0], total, free))
        print("  transport      : TCP")
    else:
        print("  backend memory : %d MB" % memory[0][1])
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        socket.inet_aton(host)
        if host.count(".") != 3:
            raise OSError
    except OSError:
        stderr("Invalid host address: %s\n" % host if age == "new" else "Failed to create server socket\n")
        stderr("Failed to create server socket\n" if age == "new" else "")
        sys.stdout.flush()
        return 0
    try:
        listener.bind((host, port))
        listener.listen(1)
    except OSError:
        stderr("Failed to create server socket\n")
        sys.stdout.flush()
        return 0
    die_after_s = float(os.environ.get("FAKE_RPC_DIE_AFTER_S") or 0)
    if die_after_s:
        signal.signal(signal.SIGALRM, lambda *_: crash("", os.environ.get("FAKE_RPC_DIE_SIGNAL") or "SEGV"))
        signal.setitimer(signal.ITIMER_REAL, die_after_s)
    while True:
        client, _ = listener.accept()
        print("Accepted client connection" if age == "new" else
              "Accepted client connection, free_mem=%d, total_mem=%d" % (memory[0][1] << 20, memory[0][0] << 20))
        sys.stdout.flush()
        serve_rpc_client(client, age, memory)
        client.close()
        print("Client connection closed")
        sys.stdout.flush()


def rpc_cache_folder():
    folder = os.environ.get("LLAMA_CACHE") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "llama.cpp")
    folder = os.path.join(folder, "rpc")
    os.makedirs(folder, exist_ok=True)
    return folder


def spoken(age):
    """The version of the protocol that a worker speaks."""
    told = os.environ.get("FAKE_RPC_PROTOCOL")
    return tuple(map(int, told.split("."))) if told else PROTOCOL[age]


def serve_rpc_client(client, age, memory):
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    answers = {HELLO: bytes(spoken(age)), DEVICE_COUNT: struct.pack("<I", len(memory)),
               DEVICE_MEMORY: b"".join(struct.pack("<QQ", *pair) for pair in memory)}
    try:
        while True:
            head = receive(client, 9)
            if not head or head[0] not in answers:
                return
            size, = struct.unpack("<Q", head[1:])
            receive(client, size)
            if head[0] == HELLO and size != len(HELLO_REQUEST[age]):
                if age == "new":
                    stderr("HELLO request size mismatch (%d vs 24) — client needs upgrade to protocol v7.x\n" % size)
                return
            client.sendall(struct.pack("<Q", len(answers[head[0]])) + answers[head[0]])
    except OSError:
        return


# ── the model file ─────────────────────────────────────────────────────────────────────────

class BadModel(Exception):
    """Lines that the real one prints about a model it cannot load."""


SIZES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


def read_model(path):
    """The header's keys and what /v1/models tells of the file, or BadModel."""
    unloadable = "error loading model: llama_model_loader: failed to load model from %s" % path
    try:
        with open(path, "rb") as file:
            meta, tensors = read_gguf(file)
    except OSError as error:
        raise BadModel("gguf_init_from_file: failed to open GGUF file '%s' (%s)" % (path, error.strerror), unloadable)
    except BadModel as error:
        raise BadModel(error.args[0], unloadable)
    except (struct.error, KeyError, MemoryError, OverflowError):
        raise BadModel("gguf_init_from_reader: failed to read key-value pairs", unloadable)
    arch = meta.get("general.architecture", "llama")
    if meta.get("split.no", 0):
        raise BadModel("error loading model: illegal split file idx: %d (file: %s), model must be loaded "
                       "with the first split" % (meta["split.no"], path))
    size = os.path.getsize(path)
    for number in range(2, meta.get("split.count", 1) + 1):
        part = re.sub(r"-00001-of-", "-%05d-of-" % number, path)
        if not os.path.exists(part):
            raise BadModel("gguf_init_from_file: failed to open GGUF file '%s' (No such file or directory)" % part,
                           "error loading model: llama_model_loader: failed to load GGUF split from %s" % part)
        size += os.path.getsize(part)
    return {"arch": arch, "train": int(meta.get(arch + ".context_length", 4096)), "size": size, "tensors": tensors,
            "layers": int(meta.get(arch + ".block_count", 1)), "embd": int(meta.get(arch + ".embedding_length", 64)),
            "vocab": meta.get("tokenizer.ggml.tokens", 0) or 256, "keys": len(meta),
            "template": meta.get("tokenizer.chat_template", "")}


def read_gguf(file):
    magic = file.read(4)
    if len(magic) < 4:
        raise BadModel("gguf_init_from_reader: failed to read magic")
    if magic != b"GGUF":
        raise BadModel("gguf_init_from_reader: invalid magic characters: '%s', expected 'GGUF'"
                       % magic.decode("latin-1"))

    def number(code):
        size = struct.calcsize("<" + code)
        return struct.unpack("<" + code, file.read(size))[0]

    def text():
        length = number("Q")
        data = file.read(length) if length < 1 << 30 else b""
        if len(data) != length:
            raise struct.error
        return data.decode("utf-8", "replace")

    def value(kind):
        if kind == 8:
            return text()
        if kind != 9:
            return number(SIZES[kind])
        inner, count = number("i"), number("Q")
        if inner in SIZES:
            file.seek(struct.calcsize("<" + SIZES[inner]) * count, 1)
        else:
            for _ in range(count):
                value(inner)
        return count

    try:
        version, tensors, keys = number("I"), number("q"), number("q")
    except struct.error:
        raise BadModel("gguf_init_from_reader: failed to read header")
    if version not in (2, 3):
        raise BadModel("gguf_init_from_reader: this GGUF file is version %d but this software only "
                       "supports up to version 3" % version)
    return {key: value(kind) for key, kind in ((text(), number("i")) for _ in range(keys))}, tensors


# ── slots and answers ──────────────────────────────────────────────────────────────────────

class Failure(Exception):
    """An error answer: status, type, message and what else its body holds."""

    headers = ""

    def __init__(self, status, kind, message, **more):
        super().__init__(message)
        self.status = status
        self.body = {"error": dict({"code": status, "message": message, "type": kind}, **more)}


class Cut(Exception):
    """The connection is to be dropped without a word."""


class Slot:
    def __init__(self, number):
        self.number, self.job, self.task = number, None, -1


class Job:
    """One request that occupies a slot."""

    def __init__(self, prompt, limit, body, chat):
        self.prompt, self.limit, self.body, self.chat = prompt, limit, body, chat
        self.prompt_tokens = tokens(prompt)
        self.began = self.task = self.failure = None
        self.wanted, self.text, self.finish, self.thought, self.truncated = 0, "", "stop", "", False


def tokens(text):
    return max(1, -(-len(text) // 4))


def last_words(prompt, count=24):
    return " ".join(prompt.rsplit(None, count)[-count:])


class Slots:
    """N slots and the queue before them: unbounded, first come first served."""

    def __init__(self, server):
        self.server = server
        self.all = [Slot(number) for number in range(server.n_slots)]
        self.free = collections.deque(self.all)
        self.waiting = collections.deque()
        self.task = -1
        self.counts = collections.Counter()
        self.largest = 0
        self.pool = server.n_ctx if server.unified else 0

    @property
    def busy(self):
        return [slot for slot in self.all if slot.job]

    async def take(self, count=1):
        if self.waiting or len(self.free) < count:
            turn = asyncio.get_running_loop().create_future()
            entry = (count, turn)
            self.waiting.append(entry)
            try:
                return await turn
            except asyncio.CancelledError:
                if entry in self.waiting:
                    self.waiting.remove(entry)
                if turn.done() and not turn.cancelled():
                    self.give(turn.result())
                self.serve_waiting()
                raise
        return [self.free.popleft() for _ in range(count)]

    def give(self, slots):
        for slot in slots:
            slot.job = None
            self.free.append(slot)
        self.serve_waiting()

    def serve_waiting(self):
        while self.waiting and self.waiting[0][0] <= len(self.free):
            count, turn = self.waiting.popleft()
            if not turn.done():
                turn.set_result([self.free.popleft() for _ in range(count)])

    def begin(self, slot, job):
        self.task += 1
        slot.job, slot.task = job, self.task
        job.began, job.task = time.monotonic(), asyncio.current_task()
        if self.server.chatty:
            self.server.log("I", "slot launch_slot_: id %2d | task %d | processing task, is_child = 0"
                            % (slot.number, slot.task))

    def end(self, slot, job):
        spent = time.monotonic() - job.began
        first = min(spent, self.server.ttft_s)
        self.counts.update(prompt=job.prompt_tokens, predicted=job.wanted, decodes=job.wanted or 1,
                           prompt_s=first, predicted_s=spent - first, busy=(job.wanted or 1) * len(self.busy))
        self.largest = max(self.largest, job.prompt_tokens + job.wanted)
        if self.server.chatty:
            self.server.log("I", "slot      release: id %2d | task %d | stop processing: n_tokens = %d, truncated = %d"
                            % (slot.number, slot.task, job.prompt_tokens + job.wanted, job.truncated))
        return first * 1000, (spent - first) * 1000

    def overfull(self):
        """A unified pool that cannot hold what is under way fails everybody in it."""
        if not self.pool or sum(s.job.prompt_tokens + s.job.wanted for s in self.busy) <= self.pool:
            return False
        for slot in self.busy:
            slot.job.failure = Failure(500, "server_error", "Context size has been exceeded.")
            if slot.job.task is not asyncio.current_task():
                slot.job.task.cancel()
        return True


def mark_of(body, number=0):
    """The first word of an answer: it depends on every message, its role and each parameter, and of several
    choices on which it is. Four characters of it fit into an answer of one token."""
    asked = {name: value for name, value in body.items() if name not in ("stream", "stream_options")}
    return hashlib.sha256(json.dumps([asked, number], sort_keys=True).encode()).hexdigest()[:8]


def plan(job, server, number):
    """Decides the answer before it is spoken: text, length and how it ends."""
    room = server.slot_ctx - job.prompt_tokens
    if server.age == "old" and not server.flags.get("no-context-shift"):
        room = max(server.train - job.prompt_tokens, 1)
    mark = mark_of(job.body, number)
    echo = "%s %s" % (mark, last_words(job.prompt)) if job.prompt else mark
    wanted = int(wish("ANSWER_TOKENS")) or tokens(echo)
    share = wish("EMPTY")
    if share and server.dice.random() < share:
        job.wanted, job.text, job.finish = 1, "", "stop"
        return
    endless = job.body.get("ignore_eos") or (job.limit is None and not wish("EOS"))
    limit = room if job.limit is None else min(job.limit, room)
    job.wanted = max(0, limit if endless else min(wanted, limit))
    job.finish = "length" if endless or wanted > limit else "stop"
    text = (echo + " ") * (job.wanted * 4 // (len(echo) + 1) + 1) if job.wanted > tokens(echo) else echo
    job.text = text[:job.wanted * 4].ljust(job.wanted * 4 - 3, ".") if job.wanted else ""
    for stop in job.body.get("stop") or []:
        if stop and stop in job.text:
            job.text = job.text[:job.text.index(stop)]
            job.wanted, job.finish = tokens(job.text), "stop"
    if wish("THINK") and job.chat:
        job.thought = "thinking about it"


# ── the HTTP server ────────────────────────────────────────────────────────────────────────

REASONS = {200: "OK", 400: "Bad Request", 401: "Unauthorized", 403: "Forbidden", 404: "Not Found",
           429: "Too Many Requests", 500: "Internal Server Error", 501: "Not Implemented",
           503: "Service Unavailable"}
JSON = "application/json; charset=utf-8"


class Connection(asyncio.Protocol):
    """HTTP/1.1 on one connection: requests one after the other, as the real library takes them."""

    def __init__(self, server):
        self.server, self.data, self.count = server, b"", 0
        self.task = self.transport = None
        self.streaming = self.parked = self.close = self.frozen = False
        self.idle_since = time.monotonic()

    def connection_made(self, transport):
        self.transport = transport
        self.server.connections.add(self)
        if self.server.threads and self.server.held >= self.server.threads:
            self.parked = True
            self.server.parked.append(self)
        else:
            self.server.held += 1

    def connection_lost(self, error):
        server = self.server
        server.connections.discard(self)
        if self.parked:
            server.parked.remove(self)
        else:
            server.held -= 1
            if server.parked:
                other = server.parked.popleft()
                other.parked, other.idle_since = False, time.monotonic()
                server.held += 1
                other.next_request()
        if self.task:
            if self.streaming:
                self.task.cancel()
            else:
                asyncio.get_running_loop().call_later(server.disconnect_s, self.task.cancel)
        server.leave_if_done()

    def data_received(self, data):
        self.data += data
        if not (self.task or self.frozen or self.parked):
            self.next_request()

    def next_request(self):
        end = self.data.find(b"\r\n\r\n")
        if end < 0:
            return
        lines = self.data[:end].decode("latin-1").split("\r\n")
        headers = {}
        for line in lines[1:]:
            name, _, value = line.partition(":")
            headers[name.lower()] = value.strip()
        start = end + 4
        try:
            method, target, version = lines[0].split(" ")
            if "chunked" in headers.get("transfer-encoding", ""):
                body, stop = self.chunked(start)
            else:
                stop = start + int(headers.get("content-length", 0))
                body = self.data[start:stop]
        except ValueError:
            self.close = True
            self.answer(400, b"", "text/plain")
            return
        if stop is None or len(self.data) < stop:
            if headers.get("expect", "").lower() == "100-continue" and len(self.data) == start:
                self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            return
        self.data = self.data[stop:]
        self.count += 1
        asked = headers.get("connection", "").lower()
        self.close = asked == "close" or self.count >= KEEP_ALIVE_REQUESTS or (
            version == "HTTP/1.0" and asked != "keep-alive")
        self.task = asyncio.get_running_loop().create_task(self.serve(method, target, headers, body))

    def chunked(self, at):
        body = b""
        while True:
            line = self.data.find(b"\r\n", at)
            if line < 0:
                return body, None
            size = int(self.data[at:line].split(b";")[0], 16)
            at = line + 2 + size + 2
            if len(self.data) < at:
                return body, None
            if not size:
                return body, at
            body += self.data[line + 2:at - 2]

    async def serve(self, method, target, headers, body):
        try:
            await self.server.respond(self, method, target, headers, body)
        except Failure as error:
            self.fail(error)
        except Cut:
            self.transport.abort()
        except asyncio.CancelledError:
            if not self.frozen:
                self.transport.abort()
        except Exception as error:
            self.fail(Failure(500, "server_error", "%s: %s" % (type(error).__name__, error)))
        finally:
            self.task = None
            self.streaming = False
            self.idle_since = time.monotonic()
        if self.close and not self.frozen:
            self.transport.close()
        elif self.data and not self.frozen:
            self.next_request()

    def fail(self, error):
        if self.streaming:
            self.chunk("data: %s\n\n" % compact(error.body))
            self.transport.write(b"0\r\n\r\n")
        else:
            self.answer(error.status, compact(error.body).encode(), JSON, error.headers)

    def head(self, status, kind, more):
        keep = "Connection: close\r\n" if self.close else "Keep-Alive: timeout=%d, max=%d\r\n" % (
            KEEP_ALIVE_S, KEEP_ALIVE_REQUESTS)
        return "HTTP/1.1 %d %s\r\nServer: llama.cpp\r\nAccess-Control-Allow-Origin: \r\n%sContent-Type: %s\r\n%s" % (
            status, REASONS.get(status, ""), keep, kind, more)

    def answer(self, status, body, kind=JSON, more=""):
        head = self.head(status, kind, "%sContent-Length: %d\r\n\r\n" % (more, len(body)))
        self.transport.write(head.encode("latin-1") + body)

    def open_stream(self):
        self.streaming = True
        self.transport.write(self.head(200, "text/event-stream", "Transfer-Encoding: chunked\r\n\r\n").encode())

    def chunk(self, text):
        data = text.encode()
        self.transport.write(b"%x\r\n%s\r\n" % (len(data), data))


class Server:
    """llama-server, from its arguments to its exit code."""

    def __init__(self, build, flags):
        self.build, self.flags, self.age = build, flags, build.age
        self.ready = self.stopping = False
        self.connections, self.parked, self.held = set(), collections.deque(), 0
        self.workers, self.addresses, self.sockets = [], [], []
        self.ttft_s, self.rate = wish("TTFT_S"), wish("TOKENS_PER_S")
        self.disconnect_s = wish("DISCONNECT_S", 1)
        self.dice = random.Random(int(wish("FAULT_SEED")))
        self.fault_rate = wish("FAULT_RATE")
        self.faults = (os.environ.get("FAKE_LLAMA_FAULTS") or "500,cut,429,503").split(",")
        self.served = 0
        self.verbosity = flags.get("verbosity", 3 if self.age == "new" else 0)
        self.chatty = not flags.get("log-disable")
        self.metrics_window = collections.Counter()
        self.router = self.age == "new" and not any(
            flags.get(key) for key in ("model", "hf-repo", "model-url", "docker-repo"))
        self.path = flags.get("model") or ("models/7B/ggml-model-f16.gguf" if self.age == "old" else "")
        slots = flags.get("parallel", -1 if self.age == "new" else 1)
        self.unified = bool(flags.get("kv-unified")) or slots < 0
        self.n_slots = slots if slots > 0 else 4 if self.age == "new" else 1
        self.threads = 0
        if self.age == "old":  # a fixed pool: each open connection holds one of its threads
            self.threads = flags.get("threads-http", 0)
            if self.threads < 1:
                self.threads = max(self.n_slots + 2, (os.cpu_count() or 1) - 1)

    # its log

    def log(self, level, text):
        if self.age == "new":
            if {"E": 1, "W": 2, "I": 3, "T": 4, "D": 5}[level] > self.verbosity:
                return
            spent = time.time() - STARTED
            stamp = "%d.%02d.%03d.%03d" % (spent // 60, spent % 60, spent * 1e3 % 1e3, spent * 1e6 % 1e3)
            text = "%s %s %s" % (stamp, "I" if level == "T" else level, text)
        if self.chatty:
            stderr(text + "\n")

    # its start

    async def run(self):
        no_core_files()
        if afflicted("HANG") == "start":
            await asyncio.sleep(1e9)
        if self.age == "new":
            self.log("I", "srv  llama_server: initializing ...")
            self.log("I", "cmn  common_param: common_params_print_info: verbosity = %d (adjust with the `-lv N` "
                          "CLI arg)" % self.verbosity)
        else:
            self.log("I", "build: 6096 (4227c9b) with cc (Debian 12.2.0-14) 12.2.0 for x86_64-linux-gnu")
            self.log("I", "system info: n_threads = %s, n_threads_batch = %s, total_threads = %s\n"
                     % (self.flags.get("threads", os.cpu_count()), os.cpu_count(), os.cpu_count()))
        if self.age == "new" and not self.flags["api-keys"]:
            self.log("W", "srv  llama_server: security: no API key is set and CORS allows all origins (see "
                          "https://github.com/ggml-org/llama.cpp/pull/25655)")
        if not await self.listen():
            return 1
        if self.router:
            self.train = self.slot_ctx = self.n_ctx = 0
            self.log("I", "srv  llama_server: starting server in router mode. models will be automatically "
                          "loaded on-demand")
        else:
            await self.load()
        self.slots = Slots(self)
        self.done = asyncio.get_running_loop().create_future()
        self.ready = True
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.terminate)
        if not self.router:
            self.log("I", "srv  llama_server: model loaded" if self.age == "new" else "main: model loaded")
        for address in self.addresses:
            self.log("I", ("srv  llama_server: listening on http://%s" if self.age == "new" else
                           "main: server is listening on http://%s - starting the main loop") % address)
        if self.age == "new" and any(address.endswith(":8080") for address in self.addresses):
            self.log("W", "srv  llama_server: notice: server default port will be changed to :9931 in a "
                          "future release (ref: https://github.com/ggml-org/llama.cpp/pull/26508)")
        if self.age == "old":
            self.log("I", "srv  update_slots: all slots are idle")
        return await self.done

    async def listen(self):
        port = self.flags.get("port", 8080)
        if self.age == "new" and os.environ.get("AIP_MODE") == "PREDICTION":
            port = int(os.environ.get("AIP_HTTP_PORT") or 8080)
        loop = asyncio.get_running_loop()
        host = self.flags.get("host", "127.0.0.1")
        for name in host.split(",") if self.age == "new" else [host]:
            try:
                sock = self.bind(name, port)
            except (OSError, OverflowError):
                if self.age == "new":
                    self.log("E", "srv         start: couldn't bind HTTP server socket, hostname: %s, port: %d"
                             % (name, port))
                    self.log("I", "srv    operator(): operator(): cleaning up before exit...")
                    self.log("E", "srv  llama_server: exiting due to HTTP server error")
                else:
                    self.log("E", "main: couldn't bind HTTP server socket, hostname: %s, port: %d" % (name, port))
                return False
            self.sockets.append(await loop.create_server(lambda: Connection(self), sock=sock, backlog=128))
            self.addresses.append(name if name.endswith(".sock") else "%s:%d" % (name, sock.getsockname()[1]))
        if self.age == "old":
            self.log("I", "main: binding port with default address family")
            self.log("I", "main: HTTP server is listening, hostname: %s, port: %d, http threads: %d"
                     % (host, port, self.threads))
        self.sweeper = loop.create_task(self.sweep())
        return True

    def bind(self, name, port):
        if name.endswith(".sock"):
            sock = socket.socket(socket.AF_UNIX)
            sock.bind(name)
            return sock
        family, kind, protocol, _, address = socket.getaddrinfo(
            name, port, 0, socket.SOCK_STREAM, 0, socket.AI_PASSIVE)[0]
        sock = socket.socket(family, kind, protocol)
        # The old library asks for SO_REUSEPORT: two old servers can share a port unawares.
        shared = self.age == "old" or self.flags.get("reuse-port")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT if shared else socket.SO_REUSEADDR, 1)
        try:
            sock.bind(address)
            sock.listen(128)
        except OSError:
            sock.close()
            raise
        return sock

    async def sweep(self):
        """Closes connections that have been idle for as long as the real library waits."""
        while True:
            await asyncio.sleep(0.5)
            late = time.monotonic() - KEEP_ALIVE_S
            for connection in list(self.connections):
                if not connection.task and not connection.parked and connection.idle_since < late \
                        and not connection.frozen:
                    connection.transport.close()

    # loading

    async def load(self):
        self.log("I", "srv    load_model: loading model '%s'" % self.path)
        seconds, hang = wish("LOAD_S"), afflicted("HANG") == "load" or afflicted("HANG") == "1"
        try:
            model = read_model(self.path)
        except BadModel as error:
            self.unloadable(error.args)
        self.model, self.train = model, model["train"]
        loud = "I" if self.age == "old" else "T"
        self.log(loud, "llama_model_loader: loaded meta data with %d key-value pairs and %d tensors from %s "
                       "(version GGUF V3 (latest))" % (model["keys"], model["tensors"], self.path))
        self.log(loud, "load_tensors: loading model tensors, this can take a while... (mmap = true)")
        for name, endpoint, _, _ in self.flags["rpc-devices"]:
            await asyncio.get_running_loop().run_in_executor(None, rpc_memory, endpoint, self.age)
            self.log(loud, "load_tensors: %s[%s] model buffer size = %8.2f MiB" % (
                name, endpoint, model["size"] / 1048576 / (len(self.flags["rpc-devices"]) + 1)))
        self.log(loud, "load_tensors:   CPU_Mapped model buffer size = %8.2f MiB" % (model["size"] / 1048576))
        await self.hold_workers()
        for _ in range(20):
            if loud == "I" or self.verbosity >= 4:
                stderr(".")
            await asyncio.sleep(seconds / 20)
        if loud == "I" or self.verbosity >= 4:
            stderr("\n")
        while hang:
            await asyncio.sleep(3600)
        worker = "".join("%s[%s]" % device[:2] for device in self.flags["rpc-devices"][:1])
        die_at("load", lambda line: self.log("E", line), self.unloadable, worker)
        failure = afflicted("LOAD_FAIL")
        if failure:
            self.unloadable(failure.split("\n"))
        self.size_context(loud)

    async def hold_workers(self):
        """One connection stays open to each worker, as long as the server lives."""
        for endpoint in dict.fromkeys(device[1] for device in self.flags["rpc-devices"]):
            worker = await asyncio.get_running_loop().run_in_executor(None, Worker, endpoint)
            if worker.sock and await asyncio.get_running_loop().run_in_executor(
                    None, worker.ask, HELLO, HELLO_REQUEST[self.age]):
                self.workers.append(worker)
            elif self.age == "new":
                crash("/build/ggml/src/ggml-rpc/ggml-rpc.cpp:547: Failed to connect to %s\n" % endpoint, "ABRT")
            else:
                self.log("E", "Failed to connect to %s" % endpoint)
                if self.flags.get("gpu-layers", "0") != "0":
                    self.unloadable(["error loading model: vector::_M_range_check: __n (which is 1) >= this->size() "
                                     "(which is 1)"])
                crash("/build/ggml/src/ggml-backend.cpp:1486: GGML_ASSERT(ggml_backend_supports_buft(backends[b], "
                      "sched->bufts[b])) failed", "ABRT")

    def unloadable(self, lines):
        new = self.age == "new"
        for line in lines:
            self.log("E", "llama_model_load: %s" % line if line.startswith("error loading") else line)
        if not line.startswith("llama_init_from_model"):
            self.log("E", "llama_model_load_from_file_impl: failed to load model")
            if new:
                self.log("E", "common_fit_params: encountered an error while trying to fit params to free device "
                              "memory: failed to load model")
            self.log("E", "%s: failed to load model '%s'" % (
                "cmn  common_init_" if new else "common_init_from_params", self.path))
            self.log("E", "srv    load_model: failed to load model, '%s'" % self.path)
        elif new:
            self.log("E", "srv    load_model: failed to create_context with model '%s'" % self.path)
        else:
            self.log("E", "common_init_from_params: failed to create context with model '%s'" % self.path)
            self.log("E", "srv    load_model: failed to load model, '%s'" % self.path)
        self.log("I", "srv    operator(): operator(): cleaning up before exit...")
        self.log("E", "srv  llama_server: exiting due to model loading error" if new else
                 "main: exiting due to model loading error")
        os._exit(1)

    def size_context(self, loud):
        asked = self.flags.get("ctx-size", 0 if self.age == "new" else 4096)
        per_slot = self.flags.get("kv-unified-per-slot", 0)
        if per_slot and not asked:
            asked = self.n_slots * per_slot
        asked = asked or self.train * (1 if self.unified or self.age == "old" else self.n_slots)

        def pad(cells):
            return -(-cells // 256) * 256
        if self.age == "old":
            self.n_ctx, self.slot_ctx = asked, asked // self.n_slots
        elif self.unified:
            self.n_ctx = self.slot_ctx = pad(asked)
        else:
            self.slot_ctx = pad(pad(asked) // self.n_slots)
            self.n_ctx = self.slot_ctx * self.n_slots
        if self.age == "new":
            self.slot_ctx = min(self.slot_ctx, self.train, per_slot or self.train)
        self.log(loud, "llama_context: n_ctx         = %d" % self.n_ctx)
        self.log(loud, "llama_kv_cache: size = %8.2f MiB (%6d cells, %3d layers, %2d/%d seqs)" % (
            self.n_ctx * 512 / 1048576, self.slot_ctx, self.model["layers"], self.n_slots, self.n_slots))
        if self.age == "new":
            self.log("I", "srv    load_model: initializing, n_slots = %d, n_ctx_slot = %d, kv_unified = '%s'"
                     % (self.n_slots, self.slot_ctx, str(self.unified).lower()))
        else:
            self.log("I", "srv          init: initializing slots, n_slots = %d" % self.n_slots)
            for number in range(self.n_slots):
                self.log("I", "slot         init: id %2d | task -1 | new slot n_ctx_slot = %d"
                         % (number, self.slot_ctx))

    # its end

    def terminate(self):
        if self.stopping:
            stderr("Received second interrupt, terminating immediately.\n")
            os._exit(1)
        self.stopping = True
        self.log("I", "srv    operator(): operator(): cleaning up before exit...")
        for listener in self.sockets:
            listener.close()
        for connection in list(self.connections):
            # Streams are cut; a plain request is never answered, and the exit waits for its client. So it
            # is with a stream that has not yet begun.
            waits = not connection.streaming or wish("STREAMS_WAIT")
            if connection.task and waits and not self.router:
                connection.frozen = True
                connection.task.cancel()
            else:
                connection.transport.abort()
        self.leave_if_done()

    def leave_if_done(self):
        if self.stopping and not any(c.frozen for c in self.connections) and not self.done.done():
            self.done.set_result(0)

    # what it answers

    async def respond(self, connection, method, target, headers, body):
        path, _, query = target.partition("?")
        prefix = self.flags.get("api-prefix", "")
        if prefix and path.startswith(prefix):
            path = path[len(prefix):]
        elif prefix:
            raise Failure(404, "not_found_error", "File Not Found")
        self.admit(path, headers)
        if method == "OPTIONS":
            return connection.answer(200, b"", "text/html")
        route = self.ROUTES.get((method, path))
        if not route:
            raise Failure(404, "not_found_error", "File Not Found")
        return await route(self, connection, path, query, body)

    def admit(self, path, headers):
        open_paths = {"/health", "/v1/health", "/"} if self.age == "new" else {
            "/health", "/models", "/v1/models", "/api/tags", "/"}
        unready = not self.ready and not (self.age == "old" and path in ("/models", "/v1/models"))
        if unready and self.age == "new":
            raise Failure(503, "unavailable_error", "Loading model")
        keys = self.flags["api-keys"]
        if keys and path not in open_paths:
            given = headers.get("authorization", "")
            if self.age == "new":
                given = given or headers.get("x-api-key", "")
                given = given[7:] if given.startswith("Bearer ") else given
            else:
                given = given[7:] if given.startswith("Bearer ") else None
            if given not in keys:
                self.log("W", "srv    operator(): unauthorized: Invalid API Key")
                raise Failure(401, "authentication_error", "Invalid API Key")
        if unready:
            raise Failure(503, "unavailable_error", "Loading model")

    @property
    def alias(self):
        alias = self.flags.get("alias")
        return alias.split(",")[0] if alias else self.path

    def send(self, connection, data, status=200):
        connection.answer(status, compact(data).encode())

    async def health(self, connection, path, query, body):
        self.send(connection, {"status": "ok"})

    async def index(self, connection, path, query, body):
        connection.answer(200, b"<!doctype html>", "text/html; charset=utf-8")

    async def models(self, connection, path, query, body):
        if self.router:
            return self.send(connection, {"object": "list", "data": []})
        meta = None
        if self.ready:
            meta = {"vocab_type": 2, "n_vocab": self.model["vocab"], "n_ctx_train": self.train,
                    "n_embd": self.model["embd"], "n_params": self.model["size"] // 2, "size": self.model["size"]}
            if self.age == "new":
                meta.update(n_ctx=self.slot_ctx, ftype="all F32")
        name = self.alias
        entry = {"id": name, "object": "model", "created": int(time.time()), "owned_by": "llamacpp", "meta": meta}
        if self.age == "new":
            entry.update(aliases=[name], tags=[])
        listed = {"name": name, "model": name, "modified_at": "", "size": "", "digest": "", "type": "model",
                  "description": "", "tags": [""], "capabilities": ["completion"], "parameters": "",
                  "details": {"parent_model": "", "format": "gguf", "family": "", "families": [""],
                              "parameter_size": "", "quantization_level": ""}}
        self.send(connection, {"models": [listed], "object": "list", "data": [entry]})

    async def props(self, connection, path, query, body):
        if self.router:
            return self.send(connection, {"role": "router", "max_instances": 4, "models_autoload": True})
        settings = {"n_ctx": self.slot_ctx, "params": {"n_predict": self.flags.get("predict", -1)}}
        if self.age == "old":
            settings.update(id=0, id_task=-1, is_processing=False)
        answer = {"default_generation_settings": settings, "total_slots": self.n_slots, "model_path": self.path,
                  "modalities": {"vision": False, "audio": False}, "chat_template": self.model["template"],
                  "bos_token": "<s>", "eos_token": "</s>", "build_info": BUILD[self.age]}
        if self.age == "new":
            answer.update(model_alias=self.alias, model_ftype="all F32", is_sleeping=False, endpoint_slots=True,
                          endpoint_props=bool(self.flags.get("props")), ui=self.flags.get("ui", True),
                          endpoint_metrics=bool(self.flags.get("metrics")))
        self.send(connection, answer)

    async def list_slots(self, connection, path, query, body):
        on = self.flags.get("slots", self.age == "new") and not self.flags.get("no-slots")
        if not on:
            raise Failure(501, "not_supported_error",
                          "This server does not support slots endpoint. Start it with `--slots`")
        if "fail_on_no_slot" in query and not self.slots.free:
            raise Failure(503, "unavailable_error", "no slot available")
        found = []
        for slot in self.slots.all:
            entry = {"id": slot.number, "n_ctx": self.slot_ctx, "speculative": False, "is_processing": bool(slot.job)}
            if slot.job:
                entry.update(id_task=slot.task, params={"n_predict": slot.job.limit or -1},
                             next_token=[{"has_next_token": True, "n_decoded": self.spoken(slot.job)}])
            found.append(entry)
        self.send(connection, found)

    def spoken(self, job):
        spent = time.monotonic() - job.began - self.ttft_s
        return max(0, min(job.wanted, int(spent * self.rate)))

    async def metrics(self, connection, path, query, body):
        if not self.flags.get("metrics"):
            raise Failure(501, "not_supported_error",
                          "This server does not support metrics endpoint. Start it with `--metrics`")
        counts, window = self.slots.counts, self.metrics_window
        lines = []

        def line(kind, name, text, value):
            lines.append("# HELP llamacpp:%s %s\n# TYPE llamacpp:%s %s\nllamacpp:%s %.6g\n" % (
                name, text, name, kind, name, value))

        def rate(tokens_key, seconds_key):
            seconds = counts[seconds_key] - window[seconds_key]
            return (counts[tokens_key] - window[tokens_key]) / seconds if seconds > 0 else 0
        line("counter", "prompt_tokens_total", "Number of prompt tokens processed.", counts["prompt"])
        if self.age == "new":
            line("counter", "prompt_tokens_cached_total", "Number of prompt tokens reused from the cache", 0)
        line("counter", "prompt_seconds_total", "Prompt process time", counts["prompt_s"])
        line("counter", "tokens_predicted_total", "Number of generation tokens processed.", counts["predicted"])
        line("counter", "tokens_predicted_seconds_total", "Predict process time", counts["predicted_s"])
        line("counter", "n_decode_total", "Total number of llama_decode() calls", counts["decodes"])
        if self.age == "new":
            line("counter", "n_tokens_max", "Largest observed n_tokens.", self.slots.largest)
            for name in ("draft_tokens", "accepted_tokens", "drafts"):
                line("counter", "spec_decode_num_%s_total" % name, "Speculative decoding", 0)
        line("gauge" if self.age == "new" else "counter", "n_busy_slots_per_decode", "Average number of busy slots "
             "per llama_decode() call", counts["busy"] / max(counts["decodes"], 1))
        line("gauge", "prompt_tokens_seconds", "Average prompt throughput in tokens/s.", rate("prompt", "prompt_s"))
        line("gauge", "predicted_tokens_seconds", "Average generation throughput in tokens/s.",
             rate("predicted", "predicted_s"))
        line("gauge", "requests_processing", "Number of requests processing.", len(self.slots.busy))
        line("gauge", "requests_deferred", "Number of requests deferred.", len(self.slots.waiting))
        self.metrics_window = collections.Counter(counts)
        connection.answer(200, "".join(lines).encode(), "text/plain; version=0.0.4",
                          "Process-Start-Time-Unix: %d\r\n" % STARTED)

    async def tokenize(self, connection, path, query, body):
        text = parse_body(body).get("content", "")
        self.send(connection, {"tokens": list(range(tokens(text) if text else 0))})

    async def embeddings(self, connection, path, query, body):
        if not self.flags.get("embedding"):
            raise Failure(501, "not_supported_error",
                          "This server does not support embeddings. Start it with `--embeddings`")
        asked = parse_body(body)
        inputs = asked.get("input", asked.get("content"))
        if inputs is None:
            raise Failure(400, "invalid_request_error", '"input" or "content" must be provided')
        inputs = inputs if isinstance(inputs, list) else [inputs]
        if path == "/v1/embeddings" and self.flags.get("pooling", "none") == "none":
            raise Failure(400, "invalid_request_error",
                          "Pooling type 'none' is not OAI compatible. Please use a different pooling type")
        data, batch = [], self.flags.get("ubatch-size", 512)
        for number, text in enumerate(inputs):
            if tokens(str(text)) > batch:
                raise Failure(500, "server_error", "input (%d tokens) is too large to process. increase the physical "
                              "batch size (current batch size: %d)" % (tokens(str(text)), batch))
            digest = hashlib.sha256(str(text).encode()).digest()
            vector = [digest[i % 32] / 255 for i in range(self.model["embd"])]
            data.append({"embedding": vector, "index": number, "object": "embedding"})
        used = sum(tokens(str(text)) for text in inputs)
        self.send(connection, {"model": asked.get("model", self.alias), "object": "list", "data": data,
                               "usage": {"prompt_tokens": used, "total_tokens": used}})

    # completions

    async def complete(self, connection, path, query, raw):
        chat, plain = path.endswith("chat/completions"), path in ("/completion", "/completions")
        try:
            body = parse_body(raw)
            prompt, shown = ("", "") if self.router else read_prompt(body, chat)
        except Failure as error:
            if self.age == "old":  # which takes any bad request for its own failure
                raise Failure(500, "server_error", str(error))
            raise
        if self.router:
            raise Failure(400, "invalid_request_error", "model '%s' not found" % body.get("model", ""))
        self.served += 1
        try:
            fault = self.accident(prompt)
            finish = await self.complete_in_slots(connection, body, prompt, chat, plain, fault)
        except Failure as error:
            self.journal(path, error.status, shown)
            raise
        except Cut:
            self.journal(path, "cut", shown)
            raise
        except asyncio.CancelledError:
            self.journal(path, "left", shown)
            raise
        self.journal(path, 200, shown)
        finish()

    def accident(self, prompt):
        """The fault that befalls this request: crashes happen here, "cut" is left to the caller."""
        die_at("answer", lambda line: self.log("E", line))
        if afflicted("CRASH_AFTER") and self.served > wish("CRASH_AFTER"):
            crash("/build/ggml/src/ggml.c:4021: GGML_ASSERT(fake) failed")
        if os.environ.get("FAKE_LLAMA_POISON", "\0") in prompt and afflicted("POISON"):
            crash("/build/ggml/src/ggml.c:4022: GGML_ASSERT(poison) failed")
        if not self.fault_rate or self.dice.random() >= self.fault_rate:
            return None
        fault = self.dice.choice(self.faults)
        if fault in ("429", "503"):
            failure = Failure(int(fault), "unavailable_error", "come back later")
            failure.headers = "Retry-After: %g\r\n" % wish("RETRY_AFTER", 1)
            raise failure
        if fault == "500":
            raise Failure(500, "server_error", "a fault was asked for")
        return fault

    async def complete_in_slots(self, connection, body, prompt, chat, plain, fault):
        limit = read_limit(body, self.flags.get("predict", -1), self.age)
        count = body.get("n") or body.get("n_cmpl") or 1
        if not isinstance(count, int) or not 1 <= count <= self.n_slots:
            if self.age == "new":
                raise Failure(400, "invalid_request_error", "Field 'n': Value must be between 1 <= value <= %d, "
                              "but got %s" % (self.n_slots, count))
            if count != 1:
                raise Failure(500, "server_error", "Only one completion choice is allowed")
        elif self.age == "old" and count > 1:
            raise Failure(500, "server_error", "Only one completion choice is allowed")
        slots = await self.slots.take(count)
        jobs = [Job(prompt, limit, body, chat) for _ in slots]
        try:
            return await self.generate(connection, slots, jobs, fault, plain)
        except asyncio.CancelledError:
            failed = next((job.failure for job in jobs if job.failure), None)
            if failed:
                raise failed
            raise
        finally:
            self.slots.give(slots)

    def check_context(self, job):
        if job.prompt_tokens < self.slot_ctx:
            return
        if self.age == "new":
            raise Failure(400, "exceed_context_size_error", "request (%d tokens) exceeds the available context size "
                          "(%d tokens), try increasing it" % (job.prompt_tokens, self.slot_ctx),
                          n_prompt_tokens=job.prompt_tokens, n_ctx=self.slot_ctx)
        if self.flags.get("no-context-shift"):
            raise Failure(400, "invalid_request_error", "the request exceeds the available context size. try "
                          "increasing the context size or enable context shift")
        job.truncated, job.prompt_tokens = True, self.slot_ctx // 2

    async def generate(self, connection, slots, jobs, fault, plain):
        """Speaks, and returns what is left to do: to send the answer, or the end of it."""
        for number, (slot, job) in enumerate(zip(slots, jobs)):
            self.check_context(job)
            plan(job, self, number)
            self.slots.begin(slot, job)
        if self.slots.overfull():
            raise jobs[0].failure
        self.check_workers()
        if afflicted("HANG") == "answers":
            await self.wait(1e9)
        stream = Stream(self, connection, jobs[0], plain) if jobs[0].body.get("stream") else None
        if stream:
            await stream.run(fault)
        else:
            longest = max(job.wanted for job in jobs)
            await self.wait(self.ttft_s + (longest / self.rate if self.rate else 0))
        self.check_workers()
        times = [self.slots.end(slot, job) for slot, job in zip(slots, jobs)]
        if fault == "cut":
            raise Cut
        if stream:
            return lambda: stream.finish(timings(jobs[0], times[0], self.age))
        return lambda: self.send(connection, self.completion(slots, jobs, times, plain))

    async def wait(self, seconds):
        """Sleeps, but sees a worker die meanwhile, as the real one does while it computes."""
        until = time.monotonic() + seconds
        while self.workers and time.monotonic() + 0.05 < until:
            await asyncio.sleep(0.05)
            self.check_workers()
        if until > time.monotonic():
            await asyncio.sleep(until - time.monotonic())

    def check_workers(self):
        for worker in self.workers:
            if worker.dead():
                self.log("E", "recv failed (bytes_recv=0, size_to_recv=8)")
                crash("/build/ggml/src/ggml-rpc/ggml-rpc.cpp:566: Remote RPC server crashed or returned "
                      "malformed response", "ABRT")

    def completion(self, slots, jobs, times, plain):
        job, body = jobs[0], jobs[0].body
        if plain:
            return {"index": 0, "content": job.text, "tokens": [], "id_slot": slots[0].number, "stop": True,
                    "model": body.get("model", self.alias), "tokens_predicted": job.wanted,
                    "tokens_evaluated": job.prompt_tokens, "generation_settings": {}, "prompt": job.prompt,
                    "has_new_line": "\n" in job.text, "truncated": job.truncated, "stopping_word": "",
                    "stop_type": "eos" if job.finish == "stop" else "limit",
                    "tokens_cached": job.prompt_tokens + job.wanted - 1, "timings": timings(job, times[0], self.age)}
        choices = []
        for number, one in enumerate(jobs):
            choice = {"finish_reason": one.finish, "index": number}
            if one.chat:
                choice["message"] = {"role": "assistant", "content": one.text}
                if one.thought:
                    choice["message"]["reasoning_content"] = one.thought
            else:
                choice.update(text=one.text, logprobs=None)
            choices.append(choice)
        answer = self.envelope(body, job.chat, "chat.completion" if job.chat else "text_completion")
        spoken = sum(one.wanted for one in jobs)
        answer.update(choices=choices, usage=usage(job, spoken, self.age), timings=timings(job, times[0], self.age))
        return answer

    def envelope(self, body, chat, kind):
        return {"choices": [], "created": int(time.time()), "model": body.get("model", self.alias),
                "system_fingerprint": BUILD[self.age], "object": kind,
                "id": "chatcmpl-%032x" % random.getrandbits(128)}

    def journal(self, path, status, shown):
        file = os.environ.get("FAKE_LLAMA_JOURNAL")
        if file:
            line = json.dumps({"pid": os.getpid(), "time": time.time(), "path": path, "status": status,
                               "prompt": shown})
            handle = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            os.write(handle, line.encode() + b"\n")
            os.close(handle)


def timings(job, times, age):
    prompt_ms, predicted_ms = times
    prompt_ms, predicted_ms = max(prompt_ms, 0.001), max(predicted_ms, 0.001)
    return {**({"cache_n": 0} if age == "new" else {}), "prompt_n": job.prompt_tokens, "prompt_ms": prompt_ms,
            "prompt_per_token_ms": prompt_ms / job.prompt_tokens,
            "prompt_per_second": job.prompt_tokens / prompt_ms * 1e3, "predicted_n": job.wanted,
            "predicted_ms": predicted_ms, "predicted_per_token_ms": predicted_ms / max(job.wanted, 1),
            "predicted_per_second": job.wanted / predicted_ms * 1e3}


def usage(job, spoken, age):
    return {"completion_tokens": spoken, "prompt_tokens": job.prompt_tokens,
            "total_tokens": spoken + job.prompt_tokens,
            **({"prompt_tokens_details": {"cached_tokens": 0}} if age == "new" else {})}


class Stream:
    """One answer as server-sent events: role, content, finish, usage, [DONE]."""

    def __init__(self, server, connection, job, plain):
        self.server, self.connection, self.job, self.plain = server, connection, job, plain
        self.frame = server.envelope(job.body, job.chat, "chat.completion.chunk" if job.chat else "text_completion")
        self.ping_s = server.flags.get("sse-ping-interval", 30) if server.age == "new" else 0

    def event(self, data):
        self.connection.chunk("data: %s\n\n" % compact(data))

    def part(self, text=None, finish=None, role=False, thought=None):
        if self.plain:
            return {"index": 0, "content": text or "", "tokens": [], "stop": finish is not None,
                    "id_slot": 0, "tokens_predicted": self.job.wanted, "tokens_evaluated": self.job.prompt_tokens}
        choice = {"finish_reason": finish, "index": 0}
        if not self.job.chat:
            choice.update(text=text or "", logprobs=None)
        elif role:
            choice["delta"] = {"role": "assistant", "content": None}
        elif thought:
            choice["delta"] = {"reasoning_content": thought}
        else:
            choice["delta"] = {"content": text} if text is not None else {}
        return dict(self.frame, choices=[choice])

    async def run(self, fault):
        """Nothing goes out before the first token; an error until then is a plain answer."""
        job, rate = self.job, self.server.rate
        await self.server.wait(self.server.ttft_s)
        self.connection.open_stream()
        if job.chat and not self.plain:
            self.event(self.part(role=True))
        if job.thought:
            self.event(self.part(thought=job.thought))
        began = time.monotonic()
        for at in range(0, len(job.text), 4):
            if fault == "cut" and at > len(job.text) // 2:
                raise Cut
            pause = began + at / 4 / rate - time.monotonic() if rate else 0
            while pause > self.ping_s > 0:
                await self.server.wait(self.ping_s)
                self.connection.chunk(":\n\n")
                pause -= self.ping_s
            if pause > 0:
                await self.server.wait(pause)
            self.event(self.part(job.text[at:at + 4]))

    def finish(self, times):
        job = self.job
        last = self.part(finish=job.finish)
        if self.plain:
            last.update(stop=True, timings=times, truncated=job.truncated, stopping_word="", prompt=job.prompt,
                        stop_type="eos" if job.finish == "stop" else "limit", model=self.server.alias)
            self.event(last)
        elif self.server.age == "old" or not job.chat:
            self.event(dict(last, usage=usage(job, job.wanted, self.server.age), timings=times))
        elif (job.body.get("stream_options") or {}).get("include_usage"):
            self.event(last)
            self.event(dict(self.frame, choices=[], usage=usage(job, job.wanted, "new"), timings=times))
        else:
            self.event(dict(last, timings=times))
        if not self.plain:
            self.connection.chunk("data: [DONE]\n\n")
        self.connection.transport.write(b"0\r\n\r\n")


def parse_body(raw):
    try:
        body = json.loads(raw)
    except ValueError as error:
        raise Failure(400, "invalid_request_error", "[json.exception.parse_error.101] parse error: %s" % error)
    return body if isinstance(body, dict) else {}


def read_prompt(body, chat):
    """(all that the model reads, what a person asked last)"""
    if not chat:
        prompt = body.get("prompt")
        if prompt is None:
            raise Failure(400, "invalid_request_error", "[json.exception.out_of_range.403] key 'prompt' not found")
        prompt = prompt[0] if isinstance(prompt, list) and prompt and isinstance(prompt[0], str) else prompt
        return (prompt, prompt) if isinstance(prompt, str) else (str(prompt), str(prompt))
    messages = body.get("messages")
    if messages is None:
        raise Failure(400, "invalid_request_error", "'messages' is required")
    if not isinstance(messages, list):
        raise Failure(400, "invalid_request_error", "Expected 'messages' to be an array")
    texts = []
    for message in messages:
        if not isinstance(message, dict) or "role" not in message:
            raise Failure(500, "server_error",
                          "Failed to parse messages: Missing 'role' in message: " + compact(message))
        if "content" not in message and message["role"] != "assistant":
            raise Failure(400, "invalid_request_error", "All non-assistant messages must contain 'content'")
        content = message.get("content") or ""
        if isinstance(content, list):
            content = " ".join(part.get("text", "") for part in content if isinstance(part, dict))
        texts.append(content)
    return "\n".join(texts), texts[-1] if texts else ""


def read_limit(body, default, age):
    """The most tokens to speak, None for no limit."""
    names = ("n_predict", "max_completion_tokens", "max_tokens") if age == "new" else ("n_predict", "max_tokens")
    for name in names:
        if body.get(name) is not None:
            value = body[name]
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                kind = {str: "string", bool: "boolean", list: "array", dict: "object"}.get(type(value), "null")
                raise Failure(400, "invalid_request_error", "Field '%s': [json.exception.type_error.302] type must "
                              "be number, but is %s" % (name, kind))
            if value < -1 and age == "new":
                raise Failure(400, "invalid_request_error", "Field '%s': Value must be between -1 <= value "
                              "<= 2147483647, but got %d" % (name, value))
            return max(1, int(value)) if value >= 0 else None  # 0 speaks one token all the same
    return default if default >= 0 else None


Server.ROUTES = {("GET", "/"): Server.index, ("GET", "/metrics"): Server.metrics, ("GET", "/props"): Server.props,
                 ("GET", "/slots"): Server.list_slots, ("POST", "/tokenize"): Server.tokenize}
for health in ("/health", "/v1/health"):
    Server.ROUTES["GET", health] = Server.health
for models in ("/models", "/v1/models"):
    Server.ROUTES["GET", models] = Server.models
for path in ("/completion", "/completions", "/v1/completions", "/chat/completions", "/v1/chat/completions"):
    Server.ROUTES["POST", path] = Server.complete
for path in ("/embedding", "/embeddings", "/v1/embeddings"):
    Server.ROUTES["POST", path] = Server.embeddings


def llama_server(age, rpc, argv):
    build = Build(age, rpc)
    try:
        flags = build.parse(argv)
    except Refused as error:
        stderr("%s\n" % error)
        return 1
    return asyncio.run(Server(build, flags).run())


def main(program, age="new", rpc=True):
    no_core_files()
    if program == "llama-server":
        die_at("start")
    code = rpc_worker(age, sys.argv[1:]) if program != "llama-server" else llama_server(age, rpc, sys.argv[1:])
    sys.stdout.flush()
    os._exit(code)
