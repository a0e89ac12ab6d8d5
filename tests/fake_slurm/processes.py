"""Real processes: starting them, finding them, signalling them as the two kinds of process tracking do.

A started process carries three marks in its environment, so that it is found wherever it hides."""

import ctypes
import errno
import fcntl
import os
import signal
import socket
import termios

CLUSTER_MARK, STEP_MARK, NODE_MARK = "FAKE_SLURM_CLUSTER", "FAKE_SLURM_STEP", "FAKE_SLURM_NODE"
PR_SET_CHILD_SUBREAPER = 36
CLONE_NEWUTS, CLONE_NEWUSER = 0x04000000, 0x10000000


def adopt_orphans():
    """Orphans come to the controller, which reaps them and finds them below itself at the end."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def marks(cluster, label, node):
    return {CLUSTER_MARK: cluster, STEP_MARK: label, NODE_MARK: node}


def find_program(name, environment, cwd):
    """As slurmstepd looks: along the task's own PATH, which may be empty. Raises OSError."""
    if "/" in name:
        return name
    for folder in environment.get("PATH", "").split(":"):
        path = os.path.join(cwd, folder, name)
        if folder and os.path.isfile(path) and os.access(path, os.X_OK):
            return path
    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)


def spawn(argv, environment, cwd, umask, files, terminal=False, host=""):
    """Start one task in a session of its own, -> its pid; raises OSError when it cannot be executed.
    Its argv[0] is the path that was found, as slurmstepd makes it. host: the name of the machine it believes to be on.

    A fork of our own and not subprocess: SLURM_TASK_PID must hold the number the process itself has."""
    program = find_program(argv[0], environment, cwd)
    heard, told = os.pipe()
    pid = os.fork()
    if not pid:
        become(program, argv, environment, cwd, umask, files, terminal, host, told)
    os.close(told)
    with os.fdopen(heard, "rb") as pipe:
        trouble = pipe.read()
    if trouble:
        os.waitpid(pid, 0)
        raise OSError(int(trouble), os.strerror(int(trouble)), program)
    return pid


def become(program, argv, environment, cwd, umask, files, terminal, host, told):
    """In the child: everything up to exec, which closes the pipe; a number in it is what went wrong."""
    try:
        os.setsid()
        if host:
            take_host_name(host)
        for target, descriptor in enumerate([os.dup(descriptor) for descriptor in files]):
            os.dup2(descriptor, target)
        if terminal:
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        for number in (signal.SIGPIPE, signal.SIGXFSZ):
            signal.signal(number, signal.SIG_DFL)
        os.chdir(cwd)
        os.umask(umask)
        os.execve(program, [program, *argv[1:]], {**environment, "SLURM_TASK_PID": str(os.getpid())})
    except OSError as error:
        os.write(told, b"%d" % error.errno)
    finally:
        os._exit(2)


# Host names ------------------------------------------------------------------------------------

def take_host_name(name):
    """For this process and all below it. Root can always; others where they may have a user namespace.

    The kernel's own way, so that every program is told it: hostname, Python's socket, uname."""
    libc = ctypes.CDLL(None, use_errno=True)
    uid, gid = os.getuid(), os.getgid()
    if libc.unshare(CLONE_NEWUTS):
        if libc.unshare(CLONE_NEWUSER | CLONE_NEWUTS):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        for file, text in (("setgroups", "deny"), ("uid_map", "%d %d 1" % (uid, uid)), ("gid_map", "%d %d 1" % (gid, gid))):
            with open("/proc/self/" + file, "w") as stream:
                stream.write(text)
    socket.sethostname(name)


def can_name_hosts():
    """Whether this kernel lets this user give processes a host name of their own."""
    pid = os.fork()
    if not pid:
        try:
            take_host_name("probe")
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitpid(pid, 0)[1] == 0


# Finding ---------------------------------------------------------------------------------------

def all_pids():
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def read_proc(pid, name):
    try:
        with open("/proc/%d/%s" % (pid, name), "rb") as file:
            return file.read()
    except OSError:
        return b""


def parent_and_state(pid):
    """The command name in between may hold blanks and brackets."""
    fields = read_proc(pid, "stat").rpartition(b")")[2].split()
    return (int(fields[1]), fields[0]) if len(fields) > 1 else (0, b"Z")


def descendants(roots):
    """Every process below these, not the roots themselves."""
    children = {}
    for pid in all_pids():
        children.setdefault(parent_and_state(pid)[0], []).append(pid)
    found, waiting = [], list(roots)
    while waiting:
        below = children.get(waiting.pop(), [])
        found += below
        waiting += below
    return found


def mark_values(pid):
    """{mark: value} of one process; empty for one without our marks."""
    text = read_proc(pid, "environ")
    if CLUSTER_MARK.encode() not in text:
        return {}
    pairs = (item.partition(b"=") for item in text.split(b"\0") if item.startswith(b"FAKE_SLURM_"))
    return {os.fsdecode(name): os.fsdecode(value) for name, _, value in pairs}


def with_marks(**wanted):
    """Living processes whose marks are these."""
    found = []
    for pid in all_pids():
        values = mark_values(pid)
        if values and all(values.get(name) == value for name, value in wanted.items()):
            if parent_and_state(pid)[1] != b"Z":
                found.append(pid)
    return found


def start_time(pid):
    """Tells a process from a later one with the same number."""
    fields = read_proc(pid, "stat").rpartition(b")")[2].split()
    return fields[19] if len(fields) > 19 and fields[0] != b"Z" else None


# Signalling ------------------------------------------------------------------------------------

def send(pids, number):
    for pid in pids:
        try:
            os.kill(pid, number)
        except (ProcessLookupError, PermissionError):
            pass


class Tracking:
    """proctrack: who belongs to a step, and whom a signal reaches."""

    def __init__(self, cluster, cgroup):
        self.cluster, self.cgroup = cluster, cgroup
        self.lost = set()                       # nodes that hear nothing

    def members(self, step, node=None):
        """All of a step as a cgroup holds them: found by mark, even after a double fork."""
        wanted = {CLUSTER_MARK: self.cluster, STEP_MARK: step.mark}
        if node:
            wanted[NODE_MARK] = node
        return [pid for pid in with_marks(**wanted) if mark_values(pid).get(NODE_MARK) not in self.lost]

    def signal(self, step, number, only=None):
        """A cgroup's direct children hear everything, the rest only KILL; linuxproc tells all descendants."""
        roots = [task.pid for task in step.tasks
                 if task.alive and task.node not in self.lost and (only is None or task in only)]
        if number == signal.SIGKILL and self.cgroup and only is None:
            send(set(roots + descendants(roots) + self.members(step)), number)
        elif number == signal.SIGKILL or not self.cgroup:
            send(roots + descendants(roots), number)
        else:
            send(roots, number)

    def clear(self, step, node):
        """A step has ended on a node: a cgroup takes everything left with it, linuxproc lets it live."""
        if self.cgroup:
            send(self.members(step, node), signal.SIGKILL)
