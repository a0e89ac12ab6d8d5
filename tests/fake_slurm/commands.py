"""The commands that change something: sbatch, srun, salloc, scancel. Each is one conversation with a client."""

import asyncio
import os
import pwd
import re
import signal
import time
import traceback

from . import failures, show
from .arrays import drop_waiting, make_array, named_jobs, parse_array
from .dependencies import parse_dependency
from .environment import allocation_variables, exported, login_variables
from .files import name_files
from .formats import fold, parse_signal
from .model import Job, Node
from .options import Refusal, overridden, read_command_line, read_directives, read_environment
from .request import failed, judge, place, read_request
from .steps import run_step, unable

LARGEST_SCRIPT = 4194304
LONGEST_NAME = 1024
TOO_LONG = "Pathname of a file, directory or other parameter too long"


async def answer(controller, client):
    message = await client.messages.get()
    if message[0] != "hello":
        return
    request = message[1]
    client.tool, client.environment, client.request = request["tool"], request["environment"], request
    try:
        if client.tool not in ("fake", "sbatch"):       # sbatch reads its script first
            await answered(controller, client)
        code = await TOOLS[client.tool](controller, client, list(request["argv"]))
    except Refusal as refusal:
        client.err(*refusal.lines)
        code = refusal.code
    except Exception:
        traceback.print_exc()
        client.err("%s: the fake Slurm broke, see %s/controller.log" % (client.tool, controller.state))
        code = 70
    client.say("exit", code)
    if not client.gone:
        await client.writer.drain()


SILENCE = "Socket timed out on send/recv operation"
SILENT_WORDS = {"sbatch": "sbatch: error: Batch job submission failed: ", "sinfo": "slurm_load_partitions: ",
                "squeue": "slurm_load_jobs error: ", "srun": "srun: error: Unable to allocate resources: ",
                "salloc": "salloc: error: Job submit/allocate failed: "}
LATE = ("sbatch", "scancel", "scontrol")        # whose wishes a controller that hung still fulfils


async def answered(controller, client):
    """Returns once the controller does not hang; the command has given up by then if that takes long."""
    argv, environment = client.request["argv"], client.environment
    if controller.answering.is_set() or argv[:2] == ["show", "hostnames"]:
        return
    twice = any(word.startswith(("-j", "--job")) for word in argv) if client.tool == "squeue" else argv[:2] == ["show", "job"]
    try:
        await asyncio.wait_for(controller.answering.wait(), controller.conf.number("MessageTimeout") * (1 + twice))
    except asyncio.TimeoutError:
        code, words = silent_words(client.tool, argv, environment.get("SLURM_JOB_ID"))
        client.err(*words)
        client.say("exit", code)
        await client.listening
        if client.tool not in LATE:
            raise Refusal(code) from None
        await controller.answering.wait()


def silent_words(tool, argv, job):
    """-> exit code, what each command says of a controller that does not answer"""
    if tool == "scancel":
        return 140, ["scancel: error: Kill job error on job id %s: %s" % (word, SILENCE) for word in read_scancel(argv)[1]]
    if tool == "scontrol" and argv[:1] != ["show"]:
        return 1, ["Unexpected message received for job %s" % argv[-1]]
    if tool == "srun" and job:
        return 1, ["srun: error: Unable to confirm allocation for job %s: %s" % (job, SILENCE),
                   "srun: Check SLURM_JOB_ID environment variable. Expired or invalid job %s" % job]
    return 1, [SILENT_WORDS.get(tool, "slurm_load_jobs error: " if "job" in argv else "slurm_load_ctl_conf error: ") + SILENCE]


def user_name(uid):
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def version(controller, client):
    client.out("slurm-wlm %s\n" % controller.conf.values["FakeVersion"])
    return 0


# sbatch ----------------------------------------------------------------------------------------

async def sbatch(controller, client, argv):
    given, words = read_command_line("sbatch", argv)
    if "version" in given:
        return version(controller, client)
    script, default_name, command = await batch_script(client, given, words)
    check_script(script)
    await answered(controller, client)
    options = overridden(read_directives(script.decode("utf-8", "replace")), read_environment("sbatch", client.environment), given)
    job = make_job(controller, client, options, default_name)
    job.script, job.argv, job.command = script, tuple(words[1:]), command
    prepare_batch(controller, job, options)
    if "test-only" in options:
        return test_only(controller, client, job)
    admit(controller, "sbatch", job, options)
    if "parsable" in options:
        client.out("%d\n" % job.id)
    elif "quiet" not in options:
        client.out("Submitted batch job %d\n" % job.id)
    return await wait_for(controller, job) if "wait" in options else 0


async def batch_script(client, given, words):
    """-> (text, the job's name if none is given, what scontrol shows as Command)"""
    if "wrap" in given:
        if words:
            raise Refusal(1, "sbatch: error: Script arguments not permitted with --wrap option")
        text = "#!/bin/sh\n# This script was created by sbatch --wrap.\n\n%s\n" % given["wrap"]
        return os.fsencode(text), "wrap", "(null)"
    if not words:
        return await read_script(client, None), "sbatch", "(stdin)"
    path = words[0]
    command = " ".join([os.path.join(client.request["cwd"], path), *words[1:]])
    return await read_script(client, path), os.path.basename(path), command


async def read_script(client, path):
    try:
        return await client.read_file(path)
    except IsADirectoryError:
        raise Refusal(1, "sbatch: error: Batch script is empty!") from None
    except OSError:
        raise Refusal(1, "sbatch: error: Unable to open file %s" % path) from None


def check_script(script):
    first = script.split(b"\n", 1)[0]
    if not script.strip():
        raise Refusal(1, "sbatch: error: Batch script is empty!")
    if not first.startswith(b"#!"):
        raise Refusal(1, "sbatch: error: This does not look like a batch script.  The first",
                      "sbatch: error: line must start with #! followed by the path to an interpreter.",
                      "sbatch: error: For instance: #!/bin/sh")
    if b"\0" in script:
        raise Refusal(1, "sbatch: error: The Slurm controller does not allow scripts that",
                      "sbatch: error: contain the NULL character '\\0'.")
    if b"\r\n" in script:
        raise Refusal(1, "sbatch: error: Batch script contains DOS line breaks (\\r\\n)",
                      "sbatch: error: instead of expected UNIX line breaks (\\n).")
    if len(script) > LARGEST_SCRIPT:
        raise Refusal(1, failed("sbatch", TOO_LONG))


def make_job(controller, client, options, default_name):
    tool, now, request = client.tool, time.time(), client.request
    asked = read_request(tool, options, controller.conf, default_name, now)
    if len(asked.name) > LONGEST_NAME:
        raise Refusal(1, failed(tool, TOO_LONG))
    if "clusters" in options:
        raise Refusal(1, "%s: error: Problem talking to database" % tool)
    return Job(id=0, request=asked, environment=dict(client.environment), partition=",".join(asked.partitions),
               minute=controller.conf.number("FakeMinute"), uid=request["uid"], gid=request["gid"], user=user_name(request["uid"]), submitted=now,
               workdir=os.path.join(request["cwd"], options.get("chdir", "")).rstrip("/") or "/",
               umask=submitted_umask(client))


def submitted_umask(client):
    """A SLURM_UMASK that leaked from an outer step is taken for the user's wish."""
    text = client.environment.get("SLURM_UMASK", "")
    return int(text, 8) if re.fullmatch("[0-7]+", text) else client.request["umask"]


def prepare_batch(controller, job, options):
    """The environment as sbatch sends it, and where the output goes."""
    wish = options.get("export")
    environment = exported(job.environment, wish, login=True)
    if environment.get("SLURM_GET_USER_ENV") and not (wish or "ALL").startswith("ALL"):
        environment = {**login_variables(job.environment, controller.bin), **environment}
    environment.pop("SLURM_UMASK", None)
    environment["SLURM_SUBMIT_DIR"] = job.workdir if "chdir" not in options else job.environment.get("PWD", job.workdir)
    environment["SLURM_JOB_NAME"] = job.request.name
    job.environment = environment
    output = options.get("output", "slurm-%j.out" if "array" not in options else "slurm-%A_%a.out")
    job.patterns = {"output": output, "error": options.get("error", ""), "input": options.get("input", "/dev/null")}


def admit(controller, tool, job, options):
    """Last checks, then a number and a place in the queue."""
    largest = int(controller.conf.values["MaxArraySize"])
    if "array" in options and not parse_array(options["array"], largest):
        raise Refusal(1, failed(tool, "Invalid job array specification"))
    if parse_dependency(job.request.dependency) is None:
        raise Refusal(1, failed(tool, "Job dependency problem"))
    try:
        judge(tool, job.request, controller.conf)
    except Refusal as refusal:
        if "Requested node configuration" in refusal.lines[-1]:
            leave_failed(controller, job)
        raise
    job.id = controller.new_id()
    if "array" in options:
        make_array(job, options["array"], largest)
    if job.script is not None:
        name_files(job)
    controller.add(job)


def leave_failed(controller, job):
    job.id = controller.new_id()
    job.state, job.reason, job.started = "FAILED", "BadConstraints", job.submitted
    job.exit_code = 1
    controller.jobs[job.id] = job
    controller.finish(job)


def test_only(controller, client, job):
    """Uses up a job id, runs nothing."""
    try:
        judge("sbatch", job.request, controller.conf)
    except Refusal as refusal:
        words = refusal.lines[-1].rpartition(": ")[2]
        client.err(*refusal.lines[:-1], "allocation failure: " + words)
        return 1
    job.id = controller.new_id()
    partition = controller.conf.partitions[job.request.partitions[0]]
    nodes = [controller.nodes[name] for name in partition.nodes]
    moment, shares = time.time(), place(job.request, controller.conf, nodes, partition.max_nodes)
    if not shares:
        moment = controller.estimate(job, partition) or moment
        shares = place(job.request, controller.conf, [Node(node.conf) for node in nodes], partition.max_nodes)
    if not shares:
        client.err("allocation failure: Requested node configuration is not available")
        return 1
    client.err("sbatch: Job %d to start at %s using %d processors on nodes %s in partition %s" % (
        job.id, time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(moment)),
        sum(share.cpus for share in shares.values()), fold(list(shares)), partition.name))
    return 0


async def wait_for(controller, job):
    """The highest code of an array's tasks."""
    codes = {}
    while True:
        tasks = named_jobs(controller.jobs, str(job.id)) or [job]
        codes.update((each.id, 1 if each.exit_signal else each.exit_code) for each in tasks if not each.live)
        waiting = next((each for each in tasks if each.live), None)
        if not waiting:
            return max(codes.values())
        await waiting.finished.wait()


# srun ------------------------------------------------------------------------------------------

async def srun(controller, client, argv):
    given, command = read_command_line("srun", argv)
    if "version" in given:
        return version(controller, client)
    if not command:
        raise Refusal(1, "srun: fatal: No command given to execute.")
    check_memory_variables(client)
    client.say("signals")
    options = {**read_environment("srun", client.environment), **given}
    if reads_cpus_per_task(controller, client, options):
        options["cpus-per-task"] = client.environment["SLURM_CPUS_PER_TASK"]
    cwd, umask = client.request["cwd"], client.request["umask"]
    if "jobid" in options:
        job = find_running(controller, client, options["jobid"])
        return await run_step(controller, client, job, options, given, command, cwd, umask)
    job = await allocate(controller, client, options, os.path.basename(command[0]))
    await configured(controller, client, job)
    try:
        code = await run_step(controller, client, job, {**options, **inherited(job, options)}, given, command, cwd, umask)
    except Refusal:
        close_allocation(controller, job, 1 << 8)
        raise
    close_allocation(controller, job, code << 8)
    return code


def inherited(job, options):
    """An srun that made its own job asks its step for just what it asked the job for."""
    asked = {} if "ntasks" in options or not job.request.ntasks_per_node else {"ntasks": str(job.request.tasks)}
    return {**asked, "nodes": str(len(job.nodes)), "ntasks": str(max(job.request.tasks, len(job.nodes)))}


def reads_cpus_per_task(controller, client, options):
    """21.08 and 23.11+ do, the ones in between do not."""
    conf = controller.conf
    reads = not conf.since("22.05") or conf.since("23.11")
    return reads and "SLURM_CPUS_PER_TASK" in client.environment and "cpus-per-task" not in options


def check_memory_variables(client):
    names = ("SLURM_MEM_PER_CPU", "SLURM_MEM_PER_GPU", "SLURM_MEM_PER_NODE")
    if sum(name in client.environment for name in names) > 1:
        raise Refusal(1, "srun: fatal: SLURM_MEM_PER_CPU, SLURM_MEM_PER_GPU, and SLURM_MEM_PER_NODE are mutually exclusive.")


def find_running(controller, client, text):
    job = controller.jobs.get(int(text.split("_")[0]))
    if not job or not job.live:
        raise Refusal(1, "srun: error: Unable to confirm allocation for job %s: Invalid job id specified" % text,
                      "srun: Check SLURM_JOB_ID environment variable. Expired or invalid job %s" % text)
    if job.state == "PENDING":
        raise Refusal(1, "srun: error: Unable to confirm allocation for job %s: Job is pending execution" % text)
    if client.request["uid"] not in (0, job.uid):
        raise unable(job, "Access/permission denied")
    return job


# Allocations held by a command -----------------------------------------------------------------

async def allocate(controller, client, options, default_name):
    """A job without a script, held by the client that asked for it."""
    tool = client.tool
    job = make_job(controller, client, options, default_name)
    job.environment["SLURM_SUBMIT_DIR"] = client.request["cwd"]
    job.client = client
    admit(controller, tool, job, options)
    controller.schedule_now()
    if not job.shares:
        if tool == "salloc":
            client.err("salloc: Pending job allocation %d" % job.id)
        client.err("%s: job %d queued and waiting for resources" % (tool, job.id))
        client.hear = watch_departure(controller, client, job)
        await job.allocated.wait()
        client.hear = client.messages.put_nowait
        if not job.shares:
            raise Refusal(1, "%s: error: Unable to allocate resources: Job/step already completing or completed" % tool)
        client.err("%s: job %d has been allocated resources" % (tool, job.id))
    return job


async def configured(controller, client, job):
    """Until PrologSlurmctld has made the nodes ready."""
    if job.configuring:
        client.hear = watch_departure(controller, client, job)
        await job.allocated.wait()
        client.hear = client.messages.put_nowait
    if job.state != "RUNNING":
        raise Refusal(1, "%s: error: Unable to allocate resources: Job/step already completing or completed" % client.tool)


def watch_departure(controller, client, job):
    def hear(message):
        interrupted = message[0] == "signal" and message[1] != signal.SIGCONT
        if message[0] == "gone" or interrupted:
            controller.end(job, "CANCELLED")
        elif message[0] != "signal":
            client.messages.put_nowait(message)
    return hear


def close_allocation(controller, job, status):
    job.exit_code, job.exit_signal = status >> 8, status & 127
    job.client = None
    if job.state == "RUNNING":
        job.state = "COMPLETED" if status == 0 else "FAILED"
        job.reason = "None" if status == 0 else "NonZeroExitCode"
        controller.close(job)
    controller.settle(job)


async def salloc(controller, client, argv):
    given, command = read_command_line("salloc", argv)
    if "version" in given:
        return version(controller, client)
    options = {**read_environment("salloc", client.environment), **given}
    job = await allocate(controller, client, options, "interactive")
    if "quiet" not in options:
        client.err("salloc: Granted job allocation %d" % job.id)
    if job.configuring:
        client.err("salloc: Waiting for resource configuration")
        await configured(controller, client, job)
        client.err("salloc: Nodes %s are ready for job" % fold(job.nodes))
    if "no-shell" in options:
        job.client = None
        return 0
    environment = {**client.environment, **allocation_variables(job, controller.conf, controller.conf_path)}
    client.say("signals")
    client.say("run", command or [client.environment.get("SHELL", "/bin/sh")], environment)
    status = await command_ended(client)
    if "quiet" not in options and job.state == "RUNNING":
        client.err("salloc: Relinquishing job allocation %d" % job.id)
    close_allocation(controller, job, status)
    return 128 + (status & 127) if status & 127 else status >> 8


async def command_ended(client):
    while True:
        verb, *values = await client.messages.get()
        if verb == "ran":
            return values[0]
        if verb == "gone":
            return int(signal.SIGKILL)
        if verb == "signal" and values[0] in (signal.SIGTERM, signal.SIGHUP):
            client.say("kill", int(signal.SIGHUP))


# scancel ---------------------------------------------------------------------------------------

SCANCEL = {"-s": "signal", "-u": "user", "-n": "name", "-p": "partition", "-t": "state", "-w": "nodelist",
           "-A": "account", "-q": "qos", "--signal": "signal", "--user": "user", "--name": "name",
           "--jobname": "name", "--partition": "partition", "--state": "state", "--nodelist": "nodelist"}
SCANCEL_FLAGS = {"-b": "batch", "--batch": "batch", "-f": "full", "--full": "full", "--me": "me", "-Q": "quiet",
                 "--quiet": "quiet", "-v": "verbose", "--verbose": "verbose", "-H": "hurry", "--hurry": "hurry",
                 "-V": "version", "--version": "version"}


def read_scancel(argv):
    wishes, ids, rest = {}, [], list(argv)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        if word in SCANCEL_FLAGS:
            wishes[SCANCEL_FLAGS[word]] = ""
        elif name in SCANCEL and (equals or rest):
            wishes[SCANCEL[name]] = value if equals else rest.pop(0)
        elif word[:2] in SCANCEL and not word.startswith("--") and len(word) > 2:
            wishes[SCANCEL[word[:2]]] = word[2:]
        elif re.fullmatch(r"-[bfQvH]{2,}", word):
            wishes.update((SCANCEL_FLAGS["-" + letter], "") for letter in word[1:])
        elif word.startswith("-"):
            trouble = "unrecognized option '%s'" % word if word.startswith("--") else "invalid option -- '%s'" % word[1]
            raise Refusal(1, "scancel: " + trouble, 'Try "scancel --help" for more information')
        else:
            ids += ids_in(word)
    return wishes, ids


JOB_OR_STEP = r"\s*([1-9]\d*(?:\+\d+|_(?:\d+|\[[^\[\]]*\]|\*))?(?:\.\d+)?)_?(,|$)"


def ids_in(text):
    """The ids of one argument, apart by commas. A blank may stand before one, but is no comma."""
    ids, rest, comma = [], text, True
    while comma:
        match = re.match(JOB_OR_STEP, rest)
        if not match:
            raise Refusal(1, "scancel: error: Invalid job id %s" % rest)
        rest, comma = rest[match.end():], match.group(2)
        ids.append(match.group(1))
    return ids


async def scancel(controller, client, argv):
    wishes, ids = read_scancel(argv)
    if "version" in wishes:
        return version(controller, client)
    number = None
    if "signal" in wishes:
        number = parse_signal(wishes["signal"])
        if number is None:
            raise Refusal(1, "Unknown job signal: %s" % wishes["signal"])
    if not ids and not set(wishes) & {"user", "me", "name", "partition", "state", "nodelist"}:
        raise Refusal(1, "scancel: error: No job identification provided")
    code = ended_ids(controller, client, ids, quiet="quiet" in wishes) if number is not None or "batch" in wishes else 0
    for name, job, step in scancel_targets(controller, client, wishes, ids):
        code = cancel_one(controller, client, name, job, step, wishes, number) or code
    return code


def cancel_one(controller, client, name, job, step, wishes, number):
    """-> the exit code, which is the number of Slurm's error cut to a byte."""
    if client.request["uid"] not in (0, job.uid):
        client.err("scancel: error: Kill job error on job %s" % (
            "id %s: Access/permission denied" % name if step is None else "step id %d: Invalid user id" % job.id))
        return 210 if step is None else 218
    if step is not None:
        return cancel_step(controller, client, job, step, number)
    if job.state == "PENDING" and number not in (None, signal.SIGKILL):
        client.err("scancel: error: Kill job error on job id %s: Job can not be altered now, try again later" % name)
        return 228
    if not (job.state == "PENDING" and drop_waiting(job, name)):
        cancel_job(controller, job, wishes, number)
    return 0


def ended_ids(controller, client, ids, quiet):
    """Those that are not, or no more: silent for a mere scancel, an error for a signal."""
    ended = [word for word in ids if not any(is_on(job) for job in named_jobs(controller.jobs, word.partition(".")[0]))]
    for word in [] if quiet else ended:
        client.err("scancel: error: Kill job error on job %sid %s: Invalid job id specified" % ("step " * ("." in word), word))
    return 1 if ended else 0


def is_on(job):
    return job.live and not job.completing


def scancel_targets(controller, client, wishes, ids):
    """(as it was named, job, number of a step or None)"""
    for word in ids:
        name, _, step = word.partition(".")
        for job in named_jobs(controller.jobs, name):
            if is_on(job) and selected(job, client, wishes):
                yield name, job, int(step) if step else None
    for job in [] if ids else list(controller.jobs.values()):
        if is_on(job) and selected(job, client, wishes):
            yield str(job.id), job, None


def selected(job, client, wishes):
    wanted_user = client.request["uid"] if "me" in wishes else None
    return ((wanted_user is None or job.uid == wanted_user)
            and wishes.get("user", job.user) in (job.user, str(job.uid))
            and wishes.get("name", job.request.name) == job.request.name
            and wishes.get("partition", job.partition) == job.partition
            and wishes.get("state", job.shown_state).upper() in (job.shown_state, show.code_of(job)))


def cancel_job(controller, job, wishes, number):
    if "batch" in wishes and job.batch:
        signal_batch(job, number)
        return
    if number in (None, signal.SIGKILL):
        controller.end(job, "CANCELLED")
        return
    job.stopped = number == signal.SIGSTOP or (job.stopped and number != signal.SIGCONT)
    steps = list(job.steps.values()) + ([job.batch] if "full" in wishes and job.batch else [])
    for step in steps:
        if number == signal.SIGTERM:
            step.announce("")
        controller.tracking.signal(step, number)


def signal_batch(job, number):
    """scancel -b: only the script; without a signal it is killed and the job has failed."""
    if number in (None, signal.SIGKILL):
        job.launch_failure = True
        os.kill(job.batch.tasks[0].pid, signal.SIGKILL)
    elif job.batch.alive:
        os.kill(job.batch.tasks[0].pid, number)


def cancel_step(controller, client, job, number_of_step, number):
    step = job.steps.get(number_of_step)
    if not step:
        client.err("scancel: error: Kill job error on job step id %d: Invalid job id specified" % job.id)
        return 225
    if number in (None, signal.SIGKILL):
        step.cancelled = True
        step.announce("")
        controller.tracking.signal(step, signal.SIGKILL)
    else:
        if number == signal.SIGTERM:
            step.announce("")
        controller.tracking.signal(step, number)
    return 0


# For tests --------------------------------------------------------------------------------------

async def fake(controller, client, argv):
    """What a test does to a cluster: lose NODE | kill NODE | return NODE | hang | go on."""
    if argv in (["hang"], ["go on"]):
        change = controller.answering.clear if argv == ["hang"] else controller.answering.set
        change()
        controller.schedule()
        return 0
    action, node = argv
    if node not in controller.nodes:
        raise Refusal(1, "no such node: " + node)
    if action == "return":
        failures.give_back(controller, node)
    else:
        failures.lose(controller, node, kill=action == "kill")
    return 0


# Commands that only tell ------------------------------------------------------------------------

def teller(function):
    async def command(controller, client, argv):
        if argv[:1] in (["--version"], ["-V"]):
            return version(controller, client)
        return function(controller, client, argv)
    return command


def no_accounting(controller, client, argv):
    words = {"sacct": "Slurm accounting storage is disabled",
             "sacctmgr": "You are not running a supported accounting_storage plugin\n"
                         "Only 'accounting_storage/slurmdbd' is supported."}
    client.err(words[client.tool])
    return 1


TOOLS = {"fake": fake, "sbatch": sbatch, "srun": srun, "salloc": salloc, "scancel": scancel, "squeue": teller(show.squeue),
         "scontrol": teller(show.scontrol), "sinfo": teller(show.sinfo), "sacct": teller(no_accounting),
         "sacctmgr": teller(no_accounting)}
