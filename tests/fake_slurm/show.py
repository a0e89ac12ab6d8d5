"""The commands that only tell: squeue, scontrol, sinfo."""

import grp
import os
import pwd
import re
import time

from .arrays import id_text, named_jobs, one_line_each, read_name, single_jobs, some_of, task_text, together
from .dependencies import parse_dependency, show_dependency
from .failures import take_down
from .files import name_files
from .formats import (UNLIMITED, BadHostlist, clock, expand, fold, fold_numbers, minutes_as_seconds, parse_time,
                      print_long_time, print_megabytes, print_time)
from .model import CODES, LIVE
from .options import Refusal


def code_of(job):
    return CODES[job.shown_state]


def elapsed(job, now):
    if not job.started:
        return 0
    until = job.suspended_at or (now if job.live and not job.completing else job.ended or now)
    return max(0, int(until - job.started - job.paused))


def time_left(job, now):
    if job.time_limit == UNLIMITED:
        return UNLIMITED
    return print_time(job.limit_s if not job.started else max(0, job.limit_s - elapsed(job, now)))


def group_name(gid):
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)


def known_user(name):
    try:
        return name.isdigit() or pwd.getpwnam(name)
    except KeyError:
        return False


def gres_text(job):
    if job.request.gres:
        return ",".join("gres:" + part for part in job.request.gres.split(","))
    return "gres:gpu:%d" % job.request.gpus_per_node if job.request.gpus_per_node else "N/A"


def memory_text(job):
    return print_megabytes(job.request.memory_per_cpu if job.request.memory_per_cpu else job.request.memory or 0)


def cpu_count(job):
    shares = job.shares.values()
    return sum(share.cpus for share in shares) or job.request.tasks * job.request.cpus_per_task


def start_of(job):
    if job.started:
        return job.started
    return job.begin if job.begin and job.begin > time.time() else job.planned


def end_of(job):
    if job.ended:
        return job.ended
    start = None if job.started or job.time_limit == UNLIMITED else start_of(job)
    return start + job.limit_s if start else job.end_at


# squeue ----------------------------------------------------------------------------------------

COLUMNS = {
    "i": ("JOBID", lambda job, see: id_text(job, see.environment)), "A": ("JOBID", lambda job, see: job.id),
    "F": ("ARRAY_JOB_ID", lambda job, see: job.array.id if job.array else job.id),
    "K": ("ARRAY_TASK_ID", lambda job, see: task_text(job, see.environment)),
    "j": ("NAME", lambda job, see: job.request.name), "T": ("STATE", lambda job, see: job.shown_state),
    "t": ("ST", lambda job, see: code_of(job)), "r": ("REASON", lambda job, see: job.reason),
    "R": ("NODELIST(REASON)", lambda job, see: fold(job.nodes) if job.shares else "(%s)" % job.reason),
    "S": ("START_TIME", lambda job, see: clock(start_of(job), see.environment)),
    "e": ("END_TIME", lambda job, see: clock(end_of(job), see.environment)),
    "V": ("SUBMIT_TIME", lambda job, see: clock(job.submitted, see.environment)),
    "L": ("TIME_LEFT", lambda job, see: time_left(job, see.now)),
    "l": ("TIME_LIMIT", lambda job, see: print_time(minutes_as_seconds(job.time_limit))),
    "M": ("TIME", lambda job, see: print_time(elapsed(job, see.now))),
    "N": ("NODELIST", lambda job, see: fold(job.nodes)), "B": ("EXEC_HOST", lambda job, see: (job.nodes or ["n/a"])[0]),
    "D": ("NODES", lambda job, see: len(job.shares) or job.request.min_nodes),
    "P": ("PARTITION", lambda job, see: job.partition), "u": ("USER", lambda job, see: job.user),
    "U": ("UID", lambda job, see: job.uid), "g": ("GROUP", lambda job, see: group_name(job.gid)), "G": ("GID", lambda job, see: job.gid),
    "k": ("COMMENT", lambda job, see: job.comment or "(null)"),
    "b": ("TRES_PER_NODE", lambda job, see: gres_text(job)), "C": ("CPUS", lambda job, see: cpu_count(job)),
    "c": ("MIN_CPUS", lambda job, see: job.request.cpus_per_task), "m": ("MIN_MEMORY", lambda job, see: memory_text(job)),
    "E": ("DEPENDENCY", lambda job, see: show_dependency(job, see.jobs)),
    "a": ("ACCOUNT", lambda job, see: "(null)"), "q": ("QOS", lambda job, see: "normal"),
    "Q": ("PRIORITY", lambda job, see: job.priority), "p": ("PRIORITY", lambda job, see: "%.14f" % (job.priority / 2 ** 32)),
    "f": ("FEATURES", lambda job, see: job.request.features or "(null)"), "d": ("MIN_TMP_DISK", lambda job, see: 0),
    "o": ("COMMAND", lambda job, see: job.command), "Z": ("WORK_DIR", lambda job, see: job.workdir),
    "h": ("OVER_SUBSCRIBE", lambda job, see: "NO" if job.request.exclusive else "OK"), "v": ("RESERVATION", lambda job, see: "(null)"),
    "n": ("REQ_NODES", lambda job, see: fold(list(job.request.nodelist))),
    "x": ("EXC_NODES", lambda job, see: fold(list(job.request.exclude))), "y": ("NICE", lambda job, see: 0),
    "Y": ("SCHEDNODES", lambda job, see: "(null)"), "W": ("LICENSES", lambda job, see: "(null)"),
    "w": ("WCKEY", lambda job, see: "(null)"), "X": ("CORE_SPEC", lambda job, see: "N/A"),
}
LONG_COLUMNS = {"jobid": "A", "jobarrayid": "i", "arrayjobid": "F", "arraytaskid": "K", "name": "j", "state": "T",
                "statecompact": "t", "reason": "r", "reasonlist": "R", "starttime": "S", "endtime": "e", "submittime": "V",
                "timeleft": "L", "timelimit": "l", "timeused": "M", "nodelist": "N", "numnodes": "D", "numcpus": "C",
                "partition": "P", "username": "u", "userid": "U", "comment": "k", "batchhost": "B", "dependency": "E",
                "tres-per-node": "b", "minmemory": "m", "workdir": "Z", "command": "o", "priority": "p",
                "prioritylong": "Q"}
OTHER_LONG_COLUMNS = {"exit_code": lambda job: job.exit_code << 8 | job.exit_signal, "stdout": lambda job: job.patterns["output"],
                      "restartcnt": lambda job: job.restarts, "restarts": lambda job: job.restarts}
DEFAULT_FORMAT = "%.18i %.9P %.8j %.8u %.2t %.10M %.6D %R"
START_FORMAT = "%.18i %.9P %.8j %.8u %.2t %.19S %.6D %20Y %R"
SQUEUE_VALUES = {"-j": "jobs", "-t": "states", "-o": "format", "-u": "user", "-n": "name", "-p": "partition",
                 "-O": "Format", "-w": "nodelist", "-S": "sort", "-A": "account", "-q": "qos", "-s": "steps", "-i": "iterate",
                 "-M": "clusters"}
SQUEUE_FLAGS = {"-h": "noheader", "-r": "array", "-l": "long", "-a": "all", "-v": "verbose", "-V": "version"}
SQUEUE_LONG = {"--job": "jobs", "--jobs": "jobs", "--state": "states", "--states": "states", "--format": "format",
               "--user": "user", "--users": "user", "--name": "name", "--names": "name", "--partition": "partition",
               "--Format": "Format", "--nodelist": "nodelist", "--sort": "sort", "--account": "account", "--qos": "qos",
               "--steps": "steps", "--noheader": "noheader", "--array": "array", "--long": "long", "--all": "all",
               "--me": "me", "--start": "start", "--iterate": "iterate", "--array-unique": "array", "--local": "all",
               "--federation": "all", "--verbose": "verbose", "--sibling": "all"}
BARE = {"noheader", "array", "long", "all", "me", "start", "verbose", "version"}


def read_options(tool, argv, values, flags, long_names, bare, optional=()):
    """-> {option: text} for the telling commands, whose options are few."""
    wishes, rest = {}, list(argv)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        if word.startswith("--"):
            matches = sorted({long_names[full] for full in long_names if full.startswith(name)}) if name not in long_names \
                else [long_names[name]]
            if len(matches) != 1:
                raise Refusal(1, "%s: unrecognized option '%s'" % (tool, word), 'Try "%s --help" for more information' % tool)
            if matches[0] in bare:
                wishes[matches[0]] = ""
            elif equals or matches[0] in optional:
                wishes[matches[0]] = value
            elif rest:
                wishes[matches[0]] = rest.pop(0)
            else:
                raise Refusal(1, "%s: option '%s' requires an argument" % (tool, word))
        elif word[:2] in optional and (len(word) > 2 or not rest or rest[0].startswith("-")):
            wishes[values[word[:2]]] = word[2:]
        elif word[:2] in values:
            if len(word) == 2 and not rest:
                raise Refusal(1, "%s: option requires an argument -- '%s'" % (tool, word[1]))
            wishes[values[word[:2]]] = word[2:] if len(word) > 2 else rest.pop(0)
        elif word[:2] in flags:
            wishes[flags[word[:2]]] = ""
            rest[:0] = ["-" + word[2:]] if len(word) > 2 else []
        elif word.startswith("-"):
            raise Refusal(1, "%s: invalid option -- '%s'" % (tool, word[1:2]), 'Try "%s --help" for more information' % tool)
        else:
            raise Refusal(1, "%s: error: Unrecognized option: %s" % (tool, word))
    return wishes


class Look:
    """One glance of one asker: the moment, and how he wants times written."""

    def __init__(self, controller, client):
        self.jobs, self.environment, self.now = controller.jobs, client.environment, time.time()
        self.controller = controller


def squeue(controller, client, argv):
    wishes = read_options("squeue", argv, SQUEUE_VALUES, SQUEUE_FLAGS, SQUEUE_LONG, BARE, ("-s", "steps"))
    if "steps" in wishes:
        return squeue_steps(controller, client, wishes)
    see = Look(controller, client)
    for user in wishes.get("user", "").split(","):
        if user and not known_user(user):
            client.err("squeue: error: Invalid user: %s" % user)
    jobs = squeue_jobs(see, client, wishes)
    if "Format" in wishes:
        client.out(long_table(jobs, wishes["Format"], "noheader" in wishes, see))
        return 0
    pattern = wishes.get("format") or client.environment.get("SQUEUE_FORMAT") or (
        START_FORMAT if "start" in wishes else DEFAULT_FORMAT)
    lines = [] if "noheader" in wishes else [fill(pattern, lambda letter: COLUMNS[letter][0] if letter in COLUMNS else None)]
    for job in jobs:
        lines.append(fill(pattern, lambda letter: COLUMNS[letter][1](job, see) if letter in COLUMNS else None))
    client.out("".join(line + "\n" for line in lines))
    return 0


def fill(pattern, value):
    """%i, %.18i (right), %20Y (left, cut): letters that nobody knows stay."""
    def replace(match):
        right, width, letter = match.groups()
        text = value(letter)
        if text is None:
            return match.group(0)
        text = str(text)
        if not width:
            return text
        return (text.rjust if right else text.ljust)(int(width))[:int(width)]
    return re.sub(r"%(\.?)(\d*)([A-Za-z])", replace, pattern)


def squeue_jobs(see, client, wishes):
    jobs = sorted(see.jobs.values(), key=lambda job: (job.shown_state != "PENDING", -job.priority if job.state == "PENDING" else 0, job.id))
    if wishes.get("jobs"):
        jobs = asked_jobs(see, wishes["jobs"])
    states = wanted_states(wishes)
    jobs = one_line_each(jobs) if "array" in wishes else together(jobs)
    names, partitions = wishes.get("name"), wishes.get("partition")
    users = wishes["user"].split(",") if "user" in wishes else None
    return [job for job in jobs
            if job.shown_state in states
            and (users is None or job.user in users or str(job.uid) in users)
            and ("me" not in wishes or job.uid == client.request["uid"])
            and (not names or job.request.name in names.split(","))
            and (not partitions or set(job.partition.split(",")) & set(partitions.split(",")))
            and ("nodelist" not in wishes or set(job.nodes) & set(expand(wishes["nodelist"])))]


def asked_jobs(see, text):
    """One unknown id alone is an error; among several, unknown ones are passed over."""
    words = [word for word in text.split(",") if word]
    found = []
    for word in words:
        name = read_name(word)
        if not name:
            raise Refusal(1, "squeue: error: Invalid job id: %s" % word)
        jobs = named_jobs(see.jobs, word) if name[1] is None else named_tasks(see, word)
        found += [job for job in jobs if job not in found]
        if len(words) == 1 and not named_jobs(see.jobs, str(name[0])):
            raise Refusal(1, "slurm_load_jobs error: Invalid job id specified")
    return found


def named_tasks(see, word):
    """`3_1`; squeue takes 3_[1-2] for 3_0."""
    number, indices = read_name(word.partition("[")[0] + "0" if "[" in word else word)
    jobs = named_jobs(see.jobs, "%d_%d" % (number, indices[0]))
    return [some_of(job, indices) if job.array_waiting else job for job in jobs]


def wanted_states(wishes):
    if "states" not in wishes:
        return ("PENDING",) if "start" in wishes else LIVE
    if wishes["states"].lower() == "all":
        return tuple(CODES)
    codes = {code: name for name, code in CODES.items()}
    states = []
    for word in wishes["states"].split(","):
        name = codes.get(word.upper(), word.upper())
        if name not in CODES:
            raise Refusal(1, "squeue: error: Invalid job state specified: %s" % word,
                          "squeue: error: Valid job states include: " + ",".join(CODES), "")
        states.append(name)
    return states


def long_table(jobs, pattern, bare, see):
    """-O name[:[.]width[separator]]: twenty characters a column unless told otherwise."""
    fields = []
    for part in pattern.split(","):
        name, _, shape = part.partition(":")
        fields.append((name, int(re.sub(r"\D", "", shape) or 20)))
    rows = [] if bare else [[name.upper() for name, _ in fields]]
    for job in jobs:
        rows.append([long_value(job, name, see) for name, _ in fields])
    return "".join("".join(str(cell).ljust(width)[:width] for cell, (_, width) in zip(row, fields)) + "\n" for row in rows)


def long_value(job, name, see):
    key = name.lower()
    if key in OTHER_LONG_COLUMNS:
        return OTHER_LONG_COLUMNS[key](job)
    if key not in LONG_COLUMNS:
        raise Refusal(1, "squeue: error: Invalid job format specification: %s" % name)
    return COLUMNS[LONG_COLUMNS[key]][1](job, see)


def squeue_steps(controller, client, wishes):
    pattern = wishes.get("format", "%.15i %.8j %.9P %.8u %.9M %N")
    now = time.time()
    headers = {"i": "STEPID", "j": "NAME", "P": "PARTITION", "u": "USER", "M": "TIME", "N": "NODELIST", "A": "CPUS"}
    lines = [] if "noheader" in wishes else [fill(pattern, headers.get)]
    ids = {int(word) for word in re.findall(r"\d+", wishes.get("jobs", "") or wishes["steps"].split(".")[0])}
    for job in controller.jobs.values():
        for step in job.all_steps():
            if step.alive and (not ids or job.id in ids):
                values = {"i": step.label, "j": step.name, "P": job.partition, "u": job.user, "N": fold(step.nodes),
                          "M": print_time(now - step.started), "A": sum(share.cpus for share in step.shares.values())}
                lines.append(fill(pattern, values.get))
    client.out("".join(line + "\n" for line in lines))
    return 0


# scontrol --------------------------------------------------------------------------------------

def scontrol(controller, client, argv):
    flags = {word for word in argv if word in ("-o", "--oneliner", "-d", "--details", "-a", "--all", "-dd", "-Q", "--quiet")}
    words = [word for word in argv if word not in flags]
    see = Look(controller, client)
    see.one_line = bool(flags & {"-o", "--oneliner"})
    see.details = bool(flags & {"-d", "--details", "-dd"})
    verb = see.verb = words[0].lower() if words else ""
    actions = {"show": scontrol_show, "update": scontrol_update, "hold": scontrol_hold, "uhold": scontrol_hold,
               "release": scontrol_release, "requeue": scontrol_requeue, "requeuehold": scontrol_requeuehold, "suspend": scontrol_suspend, "resume": scontrol_resume,
               "ping": scontrol_ping, "listpids": scontrol_listpids}
    if verb not in actions:
        raise Refusal(1, "invalid keyword: %s" % (words[0] if words else ""))
    return actions[verb](controller, client, words[1:], see) or 0


def scontrol_show(controller, client, words, see):
    kinds = {"job": show_job, "jobs": show_job, "hostnames": show_hostnames, "hostname": show_hostnames,
             "hostlist": show_hostlist, "hostlistsorted": show_hostlist, "partition": show_partition,
             "partitions": show_partition, "node": show_node, "nodes": show_node, "config": show_config,
             "step": show_steps, "steps": show_steps}
    if not words:
        raise Refusal(1, "too few arguments for keyword:show")
    kind, _, inline = words[0].partition("=")
    if kind.lower() not in kinds:
        raise Refusal(1, "invalid entity:%s for keyword:show" % words[0])
    see.kind = kind.lower()
    return kinds[see.kind](controller, client, ([inline] if inline else []) + words[1:], see)


def record(fields, see):
    """Fields in lines of groups; -o puts them all on one."""
    if see.one_line:
        return " ".join(group for group in fields) + "\n"
    return "\n   ".join(fields) + "\n\n"


def show_job(controller, client, words, see):
    jobs = list(controller.jobs.values())
    if words:
        jobs = jobs_to_show(controller, client, words[0])
        if not jobs:
            return 1
    if not jobs:
        client.out("No jobs in the system\n")
    client.out("".join(record(job_fields(controller, job, see), see) for job in jobs))


def jobs_to_show(controller, client, word):
    name = read_name(word)
    if not name:
        raise Refusal(1, "scontrol_print_job error: Invalid job id specified")
    if not named_jobs(controller.jobs, str(name[0])):
        raise Refusal(1, "slurm_load_jobs error: Invalid job id specified")
    jobs = [some_of(job, name[1]) if job.array_waiting and name[1] else job for job in named_jobs(controller.jobs, word)]
    if not jobs:
        client.out("Job %s not found\n" % word)
    for job in jobs:
        if job.script is not None and job.array:
            name_files(job)
    return jobs


def dependency_text(controller, job):
    return show_dependency(job, controller.jobs)


def when(see, moment, missing="Unknown"):
    return clock(moment, see.environment, missing)


def job_fields(controller, job, see):
    request, share = job.request, next(iter(job.shares.values()), None)
    end = end_of(job)
    fields = [
        "JobId=%d %sJobName=%s" % (job.id, array_fields(job, see), request.name),
        "UserId=%s(%d) GroupId=%s(%d) MCS_label=N/A" % (job.user, job.uid, group_name(job.gid), job.gid),
        "Priority=%d Nice=0 Account=(null) QOS=(null)" % job.priority,
        "JobState=%s Reason=%s Dependency=%s" % (job.shown_state, job.reason.replace(" ", "_"), dependency_text(controller, job)),
        "Requeue=%d Restarts=%d BatchFlag=%d Reboot=0 ExitCode=%d:%d" % (
            request.requeue, job.restarts, job.script is not None, job.exit_code, job.exit_signal)]
    if see.details:
        fields.append("DerivedExitCode=0:0")
    fields += [
        "RunTime=%s TimeLimit=%s TimeMin=N/A" % (print_long_time(elapsed(job, see.now)),
                                                 print_long_time(minutes_as_seconds(job.time_limit))),
        "SubmitTime=%s EligibleTime=%s" % (when(see, job.submitted), when(see, job.eligible)),
        "AccrueTime=%s" % when(see, job.eligible),
        "StartTime=%s EndTime=%s Deadline=N/A" % (when(see, start_of(job)), when(see, end)),
        "PreemptEligibleTime=%s PreemptTime=%s" % (when(see, job.started), when(see, job.preempted_at, "None"))
        * preemptible(controller, job),
        "SuspendTime=%s SecsPreSuspend=%d LastSchedEval=%s Scheduler=Main" % (
            when(see, job.suspended_at, "None"), elapsed(job, see.now) * bool(job.suspended_at),
            when(see, job.started or job.submitted)),
        "Partition=%s AllocNode:Sid=%s:%d" % (job.partition, os.uname().nodename, 1),
        "ReqNodeList=%s ExcNodeList=%s" % (fold(list(request.nodelist)) or "(null)", fold(list(request.exclude)) or "(null)"),
        "NodeList=%s" % (fold(job.nodes) or ("(null)" if not job.started else ""))]
    if job.batch:
        fields.append("BatchHost=%s" % job.batch_host)
    fields += size_fields(job, share)
    if see.details and job.live:
        fields += detail_fields(job)
    return [field for field in fields + file_fields(job) if field]


def preemptible(controller, job):
    if not job.started or job.again or not controller.conf.preempts:
        return False
    return controller.conf.partitions[job.partition].preempt_mode != "OFF"


def array_fields(job, see):
    if not job.array:
        return ""
    limit = "ArrayTaskThrottle=%d " % job.array.limit if job.array.limit else ""
    return "ArrayJobId=%d ArrayTaskId=%s %s" % (job.array.id, task_text(job, see.environment), limit)


def size_fields(job, share):
    request = job.request
    cpus, nodes = cpu_count(job), len(job.shares) or request.min_nodes
    memory = sum(share.memory for share in job.shares.values())
    tres = "cpu=%d,%snode=%d,billing=%d" % (cpus, "mem=%s," % print_megabytes(memory) if memory else "", nodes, cpus)
    return ["NumNodes=%d NumCPUs=%d NumTasks=%d CPUs/Task=%d ReqB:S:C:T=0:0:*:*"
            % (nodes, cpus, request.tasks, request.cpus_per_task),
            "TRES=" + tres, "Socks/Node=* NtasksPerN:B:S:C=%d:0:*:* CoreSpec=*" % request.ntasks_per_node]


def detail_fields(job):
    gpus = sum(len(share.gpus) for share in job.shares.values())
    lines = ["JOB_GRES=%s" % ("gpu:%d" % gpus if gpus else "(null)")]
    alike = {}
    for node, share in job.shares.items():
        alike.setdefault(share, []).append(node)
    for share, nodes in alike.items():
        gres = "gpu:%d(IDX:%s)" % (len(share.gpus), index_text(share.gpus)) if share.gpus else ""
        lines.append("  Nodes=%s CPU_IDs=%s Mem=%d GRES=%s" % (
            fold(nodes), "0" if share.cpus == 1 else "0-%d" % (share.cpus - 1), share.memory, gres))
    return lines


def index_text(gpus):
    """0-1 where they follow each other, as in fold()."""
    text = fold(["g%d" % gpu for gpu in gpus])
    return re.sub(r"^g\[?|\]$", "", text)


def file_fields(job):
    request = job.request
    per_cpu = request.memory_per_cpu is not None
    fields = ["MinCPUsNode=%d %s=%s MinTmpDiskNode=0" % (
                  request.cpus_per_task * max(1, request.ntasks_per_node), "MinMemoryCPU" if per_cpu else "MinMemoryNode",
                  memory_text(job)),
              "Features=%s DelayBoot=00:00:00" % (request.features or "(null)"),
              "OverSubscribe=%s Contiguous=0 Licenses=(null) Network=(null)" % ("NO" if request.exclusive else "OK"),
              "Command=%s" % job.command.replace("(stdin)", "(null)"), "WorkDir=%s" % job.workdir]
    if job.comment:
        fields.append("Comment=%s " % job.comment)
    if job.script is not None:
        fields += ["StdErr=%s" % (job.error or job.output), "StdIn=%s" % job.input, "StdOut=%s" % job.output]
    fields.append("Power=")
    if gres_text(job) != "N/A":
        fields.append("TresPerNode=%s" % gres_text(job))
    return fields


def show_steps(controller, client, words, see):
    for job in controller.jobs.values():
        for step in job.all_steps():
            if step.alive and (not words or words[0] in (str(job.id), step.label)):
                client.out(record(["StepId=%s UserId=%d StartTime=%s TimeLimit=%s" % (
                    step.label, job.uid, when(see, step.started), print_time(minutes_as_seconds(job.time_limit))),
                    "State=RUNNING Partition=%s NodeList=%s" % (job.partition, fold(step.nodes)),
                    "Nodes=%d CPUs=%d Tasks=%d Name=%s" % (len(step.nodes), sum(share.cpus for share in step.shares.values()),
                                                           len(step.tasks), step.name)], see))


def show_hostnames(controller, client, words, see):
    text = ",".join(words) or client.environment.get("SLURM_JOB_NODELIST", "")
    if not text:
        client.err("scontrol: error: host list is empty")
        return
    try:
        client.out("".join(host + "\n" for host in expand(text, controller.conf.since("23.11"))))
    except BadHostlist:
        client.err("Invalid hostlist: %s" % text)


def show_hostlist(controller, client, words, see):
    hosts = expand(",".join(words), True)
    client.out(fold(sorted(hosts, key=natural) if see.kind == "hostlistsorted" else hosts) + "\n")


def natural(host):
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", host)]


def number_or_unlimited(value):
    return value if value == UNLIMITED else "%d" % value


def show_partition(controller, client, words, see):
    partitions = [partition for partition in controller.conf.partitions.values() if not words or partition.name == words[0]]
    if not partitions:
        client.out("Partition %s not found\n" % words[0])
        return 1
    for partition in partitions:
        cpus = sum(controller.conf.nodes[name].cpus for name in partition.nodes)
        default = "NONE" if partition.default_time is None else print_long_time(minutes_as_seconds(partition.default_time))
        client.out(record([
            "PartitionName=%s" % partition.name, "AllowGroups=ALL AllowAccounts=ALL AllowQos=ALL",
            "AllocNodes=ALL Default=%s QoS=N/A" % ("YES" if partition.default else "NO"),
            "DefaultTime=%s DisableRootJobs=NO ExclusiveUser=NO GraceTime=%d Hidden=NO" % (default, partition.grace_time),
            "MaxNodes=%s MaxTime=%s MinNodes=0 LLN=NO MaxCPUsPerNode=UNLIMITED" % (
                number_or_unlimited(partition.max_nodes), print_long_time(minutes_as_seconds(partition.max_time))),
            "Nodes=%s" % fold(list(partition.nodes)),
            "PriorityJobFactor=1 PriorityTier=%d RootOnly=NO ReqResv=NO OverSubscribe=NO" % partition.priority_tier,
            "OverTimeLimit=NONE PreemptMode=%s" % partition.preempt_mode,
            "State=%s TotalCPUs=%d TotalNodes=%d SelectTypeParameters=NONE" % (partition.state, cpus, len(partition.nodes)),
            "JobDefaults=(null)", "DefMemPerNode=UNLIMITED MaxMemPerNode=UNLIMITED"], see))


def node_state(node, jobs):
    """With * when it does not answer and the controller knows."""
    return state_word(node, jobs) + "*" * node.silent


def state_word(node, jobs):
    if node.down:
        return "DOWN"
    if node.drained:
        return "DRAINING" if node.holders else "DRAINED"
    if not node.holders:
        return "IDLE"
    if all(jobs[number].completing for number in node.holders if number in jobs):
        return "COMPLETING"
    return "ALLOCATED" if node.free_cpus <= 0 else "MIXED"


def show_node(controller, client, words, see):
    try:
        wanted = expand(words[0]) if words else list(controller.nodes)
    except BadHostlist:
        wanted = []
    for name in wanted:
        node = controller.nodes.get(name)
        if not node:
            client.out("Node %s not found\n" % name)
            return 1
        partitions = [partition.name for partition in controller.conf.partitions.values() if name in partition.nodes]
        client.out(record([
            "NodeName=%s Arch=x86_64 CoresPerSocket=1 " % name,
            "CPUAlloc=%d CPUEfctv=%d CPUTot=%d CPULoad=0.10" % (
                node.conf.cpus - node.free_cpus, node.conf.cpus, node.conf.cpus),
            "AvailableFeatures=%s" % (node.conf.features or "(null)"), "ActiveFeatures=%s" % (node.conf.features or "(null)"),
            "Gres=%s" % node.conf.gres,
            "NodeAddr=127.0.0.1 NodeHostName=%s Version=%s" % (
                controller.conf.host_of(name) or os.uname().nodename, controller.conf.values["FakeVersion"]),
            "RealMemory=%d AllocMem=%d FreeMem=%d Sockets=%d Boards=1" % (
                node.conf.memory, node.conf.memory - node.free_memory, node.conf.memory // 2, node.conf.cpus),
            "State=%s ThreadsPerCore=1 TmpDisk=0 Weight=1 Owner=N/A MCS_label=N/A" % (
                state_word(node, controller.jobs).replace("DRAINED", "IDLE+DRAIN").replace("DRAINING", "MIXED+DRAIN")
                + "+NOT_RESPONDING" * node.silent),
            "Partitions=%s " % ",".join(partitions),
            "CfgTRES=cpu=%d,mem=%s,billing=%d" % (node.conf.cpus, print_megabytes(node.conf.memory), node.conf.cpus),
            "AllocTRES=%s" % ("cpu=%d" % (node.conf.cpus - node.free_cpus) if node.holders else ""),
            *(["Reason=%s" % node.reason] if node.reason else [])], see))


def show_config(controller, client, words, see):
    values = {name: value or "(null)" for name, value in controller.conf.values.items() if not name.startswith("Fake")}
    values.update(SLURM_VERSION=controller.conf.values["FakeVersion"], SLURM_CONF=controller.conf_path,
                  KillWait=values["KillWait"] + " sec", MinJobAge=values["MinJobAge"] + " sec",
                  SlurmdTimeout=values["SlurmdTimeout"] + " sec", WaitTime=values["WaitTime"] + " sec")
    client.out("Configuration data as of %s\n" % when(see, see.now)
               + "".join("%-23s = %s\n" % item for item in sorted(values.items(), key=lambda item: item[0].lower()))
               + "\nSlurmctld(primary) at %s is UP\n" % os.uname().nodename)


def own_jobs(controller, client, word, denial="Access/permission denied"):
    """The jobs a name stands for; a task named alone leaves the waiting rest of its array."""
    jobs = single_jobs(controller, word) if read_name(word) else []
    if not jobs:
        raise Refusal(1, "%s: Invalid job id specified" % word if "_" in word else
                      "Invalid job id specified for job %s" % word)
    if any(client.request["uid"] not in (0, job.uid) for job in jobs):
        raise Refusal(1, "%s for job %s" % (denial, word))
    return jobs


NOT_YOURS = "Invalid user id"


def jobs_to_hold(controller, client, words):
    for word in words:
        try:
            yield from own_jobs(controller, client, word, NOT_YOURS)
        except Refusal as refusal:
            raise Refusal(1, *refusal.lines, *["slurm_suspend error: " + NOT_YOURS] * refusal.lines[0].startswith(NOT_YOURS)) from None


def settings(words):
    """`job 5 comment=a TimeLimit=10` and `JobId=5 ...` -> (entity, name, {key: value})"""
    pairs = [word.partition("=") for word in words]
    if pairs and not pairs[0][1] and len(words) > 1:
        return words[0].lower(), words[1], {key.lower(): value for key, _, value in pairs[2:]}
    kind = pairs[0][0].lower() if pairs else ""
    return kind.replace("jobid", "job").replace("nodename", "node"), pairs[0][2] if pairs else "", {
        key.lower(): value for key, _, value in pairs[1:]}


def scontrol_update(controller, client, words, see):
    kind, name, wishes = settings(words)
    if kind == "node":
        return update_node(controller, name, wishes)
    if kind != "job":
        raise Refusal(1, "No valid entity in update command",
                      "Input line must include \"NodeName\", \"PartitionName\", \"JobId\", ...")
    jobs = own_jobs(controller, client, name, NOT_YOURS)
    for key, value in wishes.items():
        if key not in UPDATES:
            raise Refusal(1, "Update of this parameter is not supported: %s" % key, "Request aborted")
        for job in jobs:
            UPDATES[key](controller, client, job, value)
    controller.schedule()


def update_time_limit(controller, client, job, value):
    minutes = parse_time(value.lstrip("+-")) if value[:1] in "+-" and value != "-1" else parse_time(value)
    if minutes is None:
        raise Refusal(1, "Invalid TimeLimit value")
    if value[:1] in "+-" and value != "-1":
        minutes = job.time_limit + minutes * (1 if value[0] == "+" else -1)
    raises = minutes == UNLIMITED or (job.time_limit != UNLIMITED and minutes > job.time_limit)
    if raises and client.request["uid"]:
        raise Refusal(1, "Access/permission denied for job %d" % job.id)
    job.time_limit = minutes
    if job.started:
        job.end_at = job.limit_s and job.started + job.limit_s


def update_end(controller, client, job, value):
    """Only here: the time limit comes in so many seconds, since Slurm's shortest is a minute."""
    job.end_at = time.time() + float(value)


def update_comment(controller, client, job, value):
    job.comment = value


def update_dependency(controller, client, job, value):
    if parse_dependency(value) is None:
        raise Refusal(1, "Job dependency problem for job %d" % job.id)
    replace_request(job, dependency=value)


def update_throttle(controller, client, job, value):
    if not job.array:
        raise Refusal(1, "Invalid array task throttle for job %d" % job.id)
    job.array.limit = int(value)


def update_name(controller, client, job, value):
    replace_request(job, name=value)


def replace_request(job, **changes):
    from dataclasses import replace
    job.request = replace(job.request, **changes)


UPDATES = {"comment": update_comment, "fakeend": update_end, "timelimit": update_time_limit, "dependency": update_dependency,
           "arraytaskthrottle": update_throttle, "name": update_name, "jobname": update_name}


def update_node(controller, name, wishes):
    for host in expand(name):
        node = controller.nodes.get(host)
        state = wishes.get("state", "").upper()
        if not node:
            raise Refusal(1, "slurm_update error: Invalid node name specified")
        if state not in ("DRAIN", "DOWN", "RESUME", "IDLE", "UNDRAIN"):
            raise Refusal(1, "Invalid input: State=%s" % state, "Request aborted",
                          "Valid states are: NoResp DRAIN FAIL FUTURE RESUME POWER_DOWN POWER_UP UNDRAIN",
                          "Not all states are valid given a node's prior state")
        if state in ("DRAIN", "DOWN") and "reason" not in wishes:
            raise Refusal(1, "You must specify a reason when DOWNING or DRAINING a node. Request denied")
        if state == "DOWN":
            take_down(controller, node, wishes["reason"])
            continue
        node.drained, node.reason = state == "DRAIN", wishes.get("reason", "").strip('"')
        node.down = node.down and node.lost_at is not None
    controller.schedule()


def scontrol_hold(controller, client, words, see):
    for job in list(jobs_to_hold(controller, client, words)):
        if job.state == "PENDING":
            job.held = "JobHeldUser" if client.request["uid"] or see.verb == "uhold" else "JobHeldAdmin"
            job.priority, job.reason = 0, job.held


def scontrol_release(controller, client, words, see):
    for job in list(jobs_to_hold(controller, client, words)):
        job.held, job.hold_again, job.priority, job.reason = "", "", 4294901760 - job.id, "None"
        job.eligible = max(time.time(), job.begin or 0)
        controller.schedule()


def scontrol_requeue(controller, client, words, see):
    code = 0
    for word in words:
        code |= change_each(controller, client, word, requeue_one)
    return code


def scontrol_requeuehold(controller, client, words, see):
    """State=SpecialExit marks those whose end was odd; none of them starts before it is released."""
    special = words[0].lower() == "state=specialexit"
    code = 0
    for word in words[special:]:
        for job in own_jobs(controller, client, word):
            job.hold_again = "SPECIAL_EXIT" if special else "PENDING"
        code |= change_each(controller, client, word, requeue_one)
    return code


def change_each(controller, client, word, change):
    """Each job of a name by itself; where one of an array refuses, all are told in groups: `3_1,4: ...`."""
    verdicts = {}
    for job in own_jobs(controller, client, word):
        verdicts.setdefault(change(controller, job) or "No error", []).append(job)
    if set(verdicts) == {"No error"}:
        return 0
    for verdict, jobs in verdicts.items():
        indices = [index for job in jobs for index in (job.array_waiting or (job.array_task,))]
        client.err("%d_%s: %s" % (jobs[0].array.id, fold_numbers(sorted(indices)), verdict) if jobs[0].array and "_" not in word
                   else "%s: %s" % (word, verdict) if jobs[0].array else "%s for job %s" % (verdict, word))
    return 1


def requeue_one(controller, job):
    if job.state == "PENDING":
        return "Job is pending execution"
    if not job.request.requeue or job.script is None:
        return "Requested operation is presently disabled"
    controller.requeue(job)
    return ""


def scontrol_suspend(controller, client, words, see):
    return suspend_or_resume(controller, client, words, suspend_one)


def scontrol_resume(controller, client, words, see):
    return suspend_or_resume(controller, client, words, resume_one)


def suspend_or_resume(controller, client, words, change):
    code = 0
    for word in words:
        if not read_name(word) or not named_jobs(controller.jobs, word):
            raise Refusal(1, "Unexpected message received for job %s" % word)
        if client.request["uid"]:
            raise Refusal(1, "Access/permission denied for job %s" % word)
        code |= change_each(controller, client, word, change)
    return code


def suspend_one(controller, job):
    if job.shown_state == "RUNNING":
        controller.suspend(job)
    return refused_by_state(job)


def resume_one(controller, job):
    if job.shown_state == "RUNNING":
        return "Job is not suspended"
    if job.shown_state == "SUSPENDED":
        controller.resume(job)
    return refused_by_state(job)


def refused_by_state(job):
    if job.state == "PENDING":
        return "Job is pending execution"
    return "" if job.shown_state in ("RUNNING", "SUSPENDED") else "Job/step already completing or completed"


def scontrol_ping(controller, client, words, see):
    client.out("Slurmctld(primary) at %s is UP\n" % os.uname().nodename)


def scontrol_listpids(controller, client, words, see):
    client.out("%-8s %-8s %-6s %-7s %s\n" % ("PID", "JOBID", "STEPID", "LOCALID", "GLOBALID"))
    for job in controller.jobs.values():
        for step in job.all_steps():
            for task in step.tasks:
                if task.alive and (not words or words[0] in (str(job.id), step.label)):
                    client.out("%-8d %-8d %-6s %-7d %d\n" % (task.pid, job.id, step.id, task.localid, task.procid))


# sinfo -----------------------------------------------------------------------------------------

SINFO_VALUES = {"-o": "format", "-p": "partition", "-n": "nodes", "-t": "states", "-O": "Format", "-S": "sort", "-M": "clusters",
                "-i": "iterate"}
SINFO_FLAGS = {"-h": "noheader", "-N": "node", "-a": "all", "-l": "long", "-e": "exact", "-s": "summarize", "-r": "responding",
               "-v": "verbose", "-V": "version", "-R": "reasons", "-d": "dead"}
SINFO_LONG = {"--format": "format", "--partition": "partition", "--nodes": "nodes", "--states": "states", "--noheader": "noheader",
              "--Node": "node", "--all": "all", "--long": "long", "--exact": "exact", "--summarize": "summarize",
              "--Format": "Format", "--sort": "sort"}
SINFO_BARE = {"noheader", "node", "all", "long", "exact", "summarize", "responding", "verbose", "version", "reasons", "dead"}
SINFO_HEADERS = {"N": "NODELIST", "P": "PARTITION", "R": "PARTITION", "T": "STATE", "t": "STATE", "C": "CPUS(A/I/O/T)", "m": "MEMORY",
                 "e": "FREE_MEM", "G": "GRES", "O": "CPU_LOAD", "l": "TIMELIMIT", "L": "DEFAULTTIME", "D": "NODES", "c": "CPUS",
                 "a": "AVAIL", "f": "AVAIL_FEATURES", "n": "HOSTNAMES", "F": "NODES(A/I/O/T)", "z": "S:C:T", "d": "TMP_DISK", "w": "WEIGHT",
                 "E": "REASON", "s": "JOB_SIZE", "g": "GROUPS", "h": "OVERSUBSCRIBE", "B": "MAX_CPUS_PER_NODE"}
SHORT_STATES = {"ALLOCATED": "alloc", "MIXED": "mix", "IDLE": "idle", "DRAINED": "drain", "DRAINING": "drng", "COMPLETING": "comp", "DOWN": "down"}


def sinfo(controller, client, argv):
    wishes = read_options("sinfo", argv, SINFO_VALUES, SINFO_FLAGS, SINFO_LONG, SINFO_BARE)
    pattern = wishes.get("format") or ("%N %.6D %.9P %.11T %.4c" if "node" in wishes else "%9P %.5a %.10l %.6D %.6t %N")
    lines = [] if "noheader" in wishes else [fill(pattern, SINFO_HEADERS.get)]
    wanted = wishes["partition"].split(",") if "partition" in wishes else list(controller.conf.partitions)
    by_node = "node" in wishes or re.search(r"%[.\d]*[Oen]", pattern)
    for partition in controller.conf.partitions.values():
        if partition.name not in wanted:
            continue
        nodes = [controller.nodes[name] for name in partition.nodes
                 if ("nodes" not in wishes or name in expand(wishes["nodes"]))
                 and ("states" not in wishes or is_in_state(controller.nodes[name], controller.jobs, wishes["states"]))]
        for group in sinfo_groups(controller, nodes, by_node, pattern):
            values = sinfo_values(controller, partition, group)
            lines.append((group[0].name if by_node else "", fill(pattern, values.get)))
    header = [line for line in lines if isinstance(line, str)]
    rows = [line for line in lines if not isinstance(line, str)]
    if "node" in wishes:
        rows.sort(key=lambda row: natural(row[0]))
    client.out("".join(line + "\n" for line in header + [row[1] for row in rows]))
    return 0


def is_in_state(node, jobs, wanted):
    """-t drain: drained and draining alike; a short or a whole word."""
    state = state_word(node, jobs)
    words = {state.lower(), SHORT_STATES[state], "drain" if node.drained else ""}
    return bool(words & set(wanted.lower().split(",")))


def sinfo_groups(controller, nodes, by_node, pattern):
    """One line a node, or one for all nodes that look alike in what was asked."""
    if by_node:
        return [[node] for node in nodes]
    groups = {}
    for node in nodes:
        state = node_state(node, controller.jobs) if re.search(r"%[.\d]*[tT]", pattern) else ""
        groups.setdefault((state, node.conf.gres, node.conf.cpus, node.conf.memory), []).append(node)
    return list(groups.values())


def sinfo_values(controller, partition, group):
    node = group[0]
    state = node_state(node, controller.jobs)
    total = sum(each.conf.cpus for each in group)
    free = sum(each.free_cpus for each in group)
    default = partition.max_time if partition.default_time is None else partition.default_time
    busy = sum(bool(each.holders) for each in group)
    idle_cpus = 0 if node.drained or node.down else free
    return {"N": fold([each.name for each in group]), "P": partition.name + "*" * partition.default, "R": partition.name,
            "T": state.lower(), "t": SHORT_STATES[state.rstrip("*")] + "*" * node.silent, "C": "%d/%d/%d/%d" % (total - free, idle_cpus, free - idle_cpus, total),
            "m": node.conf.memory, "e": node.conf.memory // 2, "G": node.conf.gres, "O": "0.10",
            "l": print_time(minutes_as_seconds(partition.max_time)),
            "L": "n/a" if partition.default_time is None else print_time(minutes_as_seconds(default)),
            "D": len(group), "c": node.conf.cpus, "a": partition.state.lower(), "f": node.conf.features or "(null)",
            "n": node.name, "F": "%d/%d/0/%d" % (busy, len(group) - busy, len(group)), "z": "%d:1:1" % node.conf.cpus,
            "d": 0, "w": 1, "E": node.reason or "none", "s": "1-infinite", "g": "all", "h": "NO", "B": UNLIMITED}
