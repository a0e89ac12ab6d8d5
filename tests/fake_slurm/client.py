"""The user's commands: each sends its command line to the controller and does what it is told.

Knows nothing of Slurm; what an option means is decided at the other end. It imports the C halves
of socket and signal, since a test calls squeue often and their Python halves double its time."""

import _signal
import _socket
import os
import select
import sys

from .wire import Frames, pack, socket_address, state_folder

FORWARDED = (_signal.SIGINT, _signal.SIGTERM, _signal.SIGHUP, _signal.SIGQUIT,
             _signal.SIGUSR1, _signal.SIGUSR2, _signal.SIGCONT, _signal.SIGALRM)


PIPE_PIECE = 4096           # so much a pipe takes without blocking once poll says it is writable
LARGEST_BACKLOG = 1 << 20


class Session:
    """One command's conversation with the controller.

    Output waits for its reader without stopping input: who writes to srun may not be reading yet."""

    def __init__(self, sock):
        self.sock = sock
        self.frames = Frames()
        self.poll = select.poll()
        self.poll.register(sock.fileno(), select.POLLIN)
        self.signals = None
        self.child = None
        self.unwritten = {}             # fd -> bytes
        self.code = None
        self.terminal = None

    def say(self, *message):
        try:
            self.sock.sendall(pack(message))
        except OSError:
            pass                        # the controller is gone; hear() will find that out

    def talk(self):
        while self.code is None or self.unwritten:
            for fd, _ in self.poll.poll():
                if fd == self.sock.fileno():
                    self.hear()
                elif fd == self.signals:
                    self.pass_signals()
                elif fd in self.unwritten:
                    self.write(fd)
                elif fd == 0:
                    self.pass_stdin()
        if self.terminal:
            import termios
            termios.tcsetattr(0, termios.TCSADRAIN, self.terminal)
        os._exit(self.code)

    def hear(self):
        try:
            data = self.sock.recv(1 << 18)
        except OSError:
            data = b""
        if not data:
            return self.on_exit(1)
        for verb, *values in self.frames.feed(data):
            getattr(self, "on_" + verb)(*values)

    def on_out(self, fd, data):
        self.unwritten.setdefault(fd, bytearray()).extend(data)
        self.poll.register(fd, select.POLLOUT)
        if len(self.unwritten[fd]) > LARGEST_BACKLOG and self.code is None:
            self.poll.modify(self.sock.fileno(), 0)

    def write(self, fd):
        waiting = self.unwritten[fd]
        try:
            del waiting[:os.write(fd, waiting[:PIPE_PIECE])]
        except OSError:
            waiting.clear()
        if not waiting:
            del self.unwritten[fd]
            self.poll.unregister(fd)
            if self.code is None:
                self.poll.modify(self.sock.fileno(), select.POLLIN)

    def on_read(self, path):
        """The controller wants a file as this process sees it: a pipe, /dev/fd/63, stdin."""
        try:
            with open(0 if path is None else path, "rb") as file:
                self.say("file", file.read())
        except OSError as error:
            self.say("file", error.errno)

    def on_stdin(self):
        self.poll.register(0, select.POLLIN)

    def on_signals(self):
        self.signals, write_end = os.pipe()
        os.set_blocking(write_end, False)
        _signal.set_wakeup_fd(write_end)
        for number in FORWARDED:
            _signal.signal(number, lambda *_: None)
        self.poll.register(self.signals, select.POLLIN)

    def on_raw(self):
        """srun --pty: keys go through as they are, the other side echoes."""
        import termios
        self.terminal = termios.tcgetattr(0)
        mode = termios.tcgetattr(0)
        mode[0] &= ~(termios.ICRNL | termios.IXON | termios.INLCR | termios.IGNCR)
        mode[1] &= ~termios.OPOST
        mode[3] &= ~(termios.ECHO | termios.ICANON | termios.ISIG | termios.IEXTEN)
        termios.tcsetattr(0, termios.TCSANOW, mode)

    def on_run(self, argv, environment):
        """salloc: the command runs here, on the login node."""
        _signal.signal(_signal.SIGCHLD, lambda *_: None)
        try:
            self.child = os.posix_spawnp(argv[0], argv, environment, setsigdef=FORWARDED)
        except OSError as error:
            self.on_out(2, os.fsencode("salloc: error: Unable to exec command %r: %s\n" % (argv[0], error.strerror)))
            self.say("ran", 1 << 8)

    def on_kill(self, number):
        if self.child:
            os.kill(self.child, number)

    def on_exit(self, code):
        self.code = code & 255
        self.poll.unregister(self.sock.fileno())

    def pass_signals(self):
        for number in os.read(self.signals, 512):
            if number == _signal.SIGCHLD:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid and pid == self.child:
                    self.child = None
                    self.say("ran", status)
            else:
                self.say("signal", number)

    def pass_stdin(self):
        try:
            data = os.read(0, 1 << 16)
        except OSError:
            data = b""
        if not data:
            self.poll.unregister(0)
        self.say("in", data)


def own_environment():
    """As this process was given it: Python itself adds LC_CTYPE to os.environ in the C locale."""
    with open("/proc/self/environ", "rb") as file:
        pairs = [os.fsdecode(item).partition("=") for item in file.read().split(b"\0") if b"=" in item]
    return {name: value for name, _, value in pairs}


def who():
    """As munge would vouch for him. Another user can be had without root: one who is only called so, and whose
    processes are the caller's."""
    called = os.environ.get("FAKE_SLURM_UID")
    return (int(called), int(called)) if called else (os.getuid(), os.getgid())


def connect(conf_path):
    folder = os.open(state_folder(conf_path), os.O_PATH)
    sock = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
    sock.connect(socket_address(folder))
    os.close(folder)
    return sock


def unreachable(tool, conf_path):
    """What each command prints when nobody answers."""
    if not conf_path or not os.path.exists(conf_path):
        return ("%s: error: resolve_ctls_from_dns_srv: res_nsearch error: Unknown host\n"
                "%s: fatal: Could not establish a configuration source\n" % (tool, tool))
    words = "Unable to contact slurm controller (connect failure)\n"
    prefix = {"squeue": "slurm_load_jobs error: ", "scontrol": "slurm_load_jobs error: ",
              "sinfo": "slurm_load_partitions: ", "sbatch": "sbatch: error: Batch job submission failed: ",
              "srun": "srun: error: Unable to allocate resources: ",
              "salloc": "salloc: error: Unable to allocate resources: "}
    return prefix.get(tool, tool + ": error: ") + words


def main(tool):
    conf_path = os.environ.get("SLURM_CONF")
    try:
        sock = connect(conf_path or "")
    except OSError:
        os.write(2, os.fsencode(unreachable(tool, conf_path)))
        os._exit(1)
    try:
        cwd = os.getcwd()
    except OSError:
        cwd = ""
    umask = os.umask(0)
    os.umask(umask)
    uid, gid = who()
    session = Session(sock)
    sock.sendall(pack({"tool": tool, "argv": sys.argv[1:], "environment": own_environment(), "cwd": cwd,
                       "umask": umask, "pid": os.getpid(), "uid": uid, "gid": gid, "tty": os.isatty(0)}))
    session.talk()
