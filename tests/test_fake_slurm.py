"""What the fake Slurm must do, since other tests believe it: told in what a user of a cluster sees."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from fake_slurm import processes
from fake_slurm.cluster import FakeCluster
from fake_slurm.conf import read_conf

REAL = os.environ.get("LLMRUN_BENCH") == "real"
WAIT_S = 120 if REAL else 20

REPORTER = """
import os, signal, sys, time
name = sys.argv[1]
file = open("signals." + name, "a", 1)
for number in (signal.SIGTERM, signal.SIGCONT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT):
    signal.signal(number, lambda number, _: file.write(signal.Signals(number).name[3:] + "\\n"))
open("ready." + name, "w").close()
while not os.path.exists("enough"):
    time.sleep(0.01)
"""


class Desk:
    """A user's folder at a cluster, with the commands as functions."""

    def __init__(self, cluster, folder):
        self.cluster, self.folder, self.env = cluster, folder, cluster.env

    def run(self, *argv, env=None, **more):
        return subprocess.run([str(word) for word in argv], cwd=self.folder, env={**self.env, **(env or {})},
                              capture_output=True, text=True, timeout=WAIT_S, **more)

    def start(self, *argv, **more):
        return subprocess.Popen([str(word) for word in argv], cwd=self.folder, env=self.env, **more)

    def write(self, name, text):
        path = self.folder / name
        path.write_text(text)
        return path

    def script(self, body, name="job.sh", shebang="#!/bin/bash"):
        return self.write(name, shebang + "\n" + body)

    def submit(self, body, *options, **more):
        done = self.run("sbatch", "--parsable", *options, self.script(body), **more)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def read(self, name):
        path = self.folder / name
        return path.read_text() if path.exists() else ""

    def output(self, job):
        return self.read("slurm-%s.out" % job)

    def show(self, job, form="%T"):
        return self.run("squeue", "-h", "-t", "all", "-j", job, "-o", form).stdout.strip()

    def until(self, what, name):
        deadline = time.monotonic() + WAIT_S
        while True:
            value = what()
            if value:
                return value
            assert time.monotonic() < deadline, "waited in vain for " + name + "\n" + self.cluster.log()
            time.sleep(0.02)

    def until_state(self, job, *states):
        return self.until(lambda: self.show(job) in states and self.show(job), "job %s to be %s" % (job, states))

    def until_done(self, job):
        return self.until_state(job, "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")

    def variables(self, name):
        pairs = (line.partition("=") for line in self.read(name).splitlines())
        return {key: value for key, _, value in pairs}

    def reporters(self, *options):
        """A job whose script, a child of it and two tasks write down the signals they get."""
        self.write("reporter.py", REPORTER)
        python = sys.executable
        job = self.submit("%s reporter.py child & srun -N2 -n2 bash -c '%s reporter.py below$SLURM_PROCID & "
                          "exec %s reporter.py task$SLURM_PROCID' & exec %s reporter.py batch\n" % (python, python, python, python),
                          "-N2", *options)
        for name in ("batch", "child", "task0", "task1", "below0", "below1"):
            self.until(lambda: (self.folder / ("ready." + name)).exists(), name + " to be ready")
        return job

    def signals(self, name):
        return self.read("signals." + name).split()


@pytest.fixture
def desk_of(tmp_path):
    """desk_of(KillWait=1, ...) is a desk at a cluster with those settings."""
    clusters = []

    def make(**settings):
        cluster = FakeCluster(tmp_path / "cluster", **{"FakeTick": 0.2, "KillWait": 1, "FakeSignalGap": 0.05, **settings})
        clusters.append(cluster)
        (tmp_path / "home").mkdir()
        return Desk(cluster.start(), tmp_path / "home")

    yield make
    for cluster in clusters:
        cluster.stop()
        assert cluster.processes() == []
        assert "Traceback" not in cluster.log()


@pytest.fixture
def desk(desk_of):
    return desk_of()


# The roles and what they see ---------------------------------------------------------------------

def test_each_role_sees_its_own_variables(desk):
    job = desk.submit("env > batch.env\nsrun -l bash -c 'env > task$SLURM_PROCID.env'\n", "-N2", "--gres=gpu:2")
    assert desk.until_done(job) == "COMPLETED", desk.output(job)
    batch, task = desk.variables("batch.env"), desk.variables("task1.env")
    for name in ("SLURM_STEP_ID", "SLURM_NTASKS", "SLURM_GPUS_PER_NODE", "SLURM_CPUS_PER_TASK", "SLURM_JOB_END_TIME",
                 "SLURM_RESTART_COUNT", "SLURM_LAUNCH_NODE_IPADDR", "SLURM_SRUN_COMM_HOST"):
        assert name not in batch
    assert batch["SLURMD_NODENAME"] == "node1" and batch["ENVIRONMENT"] == "BATCH" and batch["SLURM_PROCID"] == "0"
    assert batch["SLURM_JOB_NODELIST"] == "node[1-2]" and batch["SLURM_TASKS_PER_NODE"] == "1(x2)"
    assert batch["CUDA_VISIBLE_DEVICES"] == "0,1" and batch["SLURM_GPUS_ON_NODE"] == "2"
    assert (task["SLURMD_NODENAME"], task["SLURM_NODEID"], task["SLURM_PROCID"]) == ("node2", "1", "1")
    assert (task["SLURM_STEP_ID"], task["SLURM_STEP_NODELIST"], task["SLURM_NTASKS"]) == ("0", "node[1-2]", "2")
    assert task["ENVIRONMENT"] == "BATCH" and task["SLURM_STEP_GPUS"] == "0,1"
    assert task["SLURM_JOB_NODELIST"] == "node[1-2]" and task["SLURM_LAUNCH_NODE_IPADDR"]


def test_a_step_on_one_node_keeps_the_jobs_nodes_in_its_variables(desk):
    job = desk.submit("srun -N1 -n1 -w node2 env\n", "-N2")
    desk.until_done(job)
    text = desk.output(job)
    for line in ("SLURM_JOB_NUM_NODES=2", "SLURM_NNODES=1", "SLURM_STEP_NODELIST=node2", "SLURM_JOB_NODELIST=node[1-2]"):
        assert line + "\n" in text


def test_a_step_from_a_cleared_environment_knows_less(desk):
    job = desk.submit('env -i PATH="$PATH" SLURM_CONF="$SLURM_CONF" SLURM_JOB_ID=$SLURM_JOB_ID srun -N1 -n1 -w node2 env\n', "-N2")
    desk.until_done(job)
    task = dict(line.split("=", 1) for line in desk.output(job).splitlines())
    assert (task["SLURM_JOB_NODELIST"], task["SLURM_NODELIST"], task["SLURM_JOB_NAME"]) == ("node2", "node[1-2]", "env")
    assert not {"SLURM_JOB_NUM_NODES", "SLURM_SUBMIT_DIR", "SLURM_CLUSTER_NAME", "SLURM_JOB_CPUS_PER_NODE", "LC_CTYPE"} & set(task)


def test_variables_appear_when_asked_for(desk):
    job = desk.submit("env\n", "-n2", "-c2", "--mem=1G", "--gpus-per-node=1")
    desk.until_done(job)
    for line in ("SLURM_NTASKS=2", "SLURM_CPUS_PER_TASK=2", "SLURM_MEM_PER_NODE=1024", "SLURM_GPUS_PER_NODE=1",
                 "SLURM_CPUS_ON_NODE=4", "SLURM_JOB_CPUS_PER_NODE=4"):
        assert line + "\n" in desk.output(job)


def test_newer_slurm_tells_the_end_time_and_makes_output_folders(desk_of):
    desk = desk_of(FakeVersion="23.02.1")
    job = desk.submit("echo $((SLURM_JOB_END_TIME - SLURM_JOB_START_TIME))\n", "-t", "7", "-o", "new/out")
    desk.until_done(job)
    assert desk.read("new/out") == "420\n"


def test_a_job_submitted_from_a_step_inherits_what_leaks(desk):
    desk.write("inner.sh", "#!/bin/sh\nenv > inner.env\n")
    job = desk.submit("export SLURM_ARRAY_TASK_ID=7\nsrun -N1 -n1 sbatch -N1 inner.sh\n", "-N2", "--ntasks-per-node=1")
    desk.until_done(job)
    desk.until_done(str(int(job) + 1))
    inner = desk.variables("inner.env")
    assert inner["SLURM_STEP_ID"] == "0" and inner["SLURM_ARRAY_TASK_ID"] == "7" and inner["SLURM_NTASKS_PER_NODE"] == "1"
    assert inner["SLURM_JOB_ID"] == str(int(job) + 1) and inner["SLURM_NNODES"] == "1"


def test_export_none_starves_the_steps_of_their_path(desk):
    job = desk.submit("srun bash -c 'echo one'; echo $?\nsrun --export=ALL bash -c 'echo two'\n", "--export=NONE")
    desk.until_done(job)
    assert "execve(): bash: No such file or directory" in desk.output(job)
    assert desk.output(job).endswith("2\ntwo\n")


def test_the_script_is_a_copy_in_the_spool_with_no_input(desk):
    job = desk.submit('echo "$0 $# $2"; readlink /proc/self/fd/0; pwd; echo $$ $SLURM_TASK_PID\n')
    desk.until_done(job)
    first, stdin, cwd, pids = desk.output(job).splitlines()
    assert re.search(r"/node1/job%05d/slurm_script 0 $" % int(job), first)
    assert stdin == "/dev/null" and cwd == str(desk.folder)
    assert len(set(pids.split())) == 1


def test_salloc_runs_its_command_on_the_login_node(desk):
    done = desk.run("salloc", "-N2", "bash", "-c", "echo $SLURM_JOB_NODELIST:$SLURMD_NODENAME; srun bash -c 'echo $SLURMD_NODENAME'; exit 3")
    assert done.returncode == 3
    assert sorted(done.stdout.split()) == ["node1", "node2", "node[1-2]:"]
    assert "salloc: Granted job allocation " in done.stderr


# Signals and endings -----------------------------------------------------------------------------

def test_a_cgroup_tells_only_its_direct_children(desk_of):
    desk = desk_of(ProctrackType="proctrack/cgroup")
    job = desk.reporters()
    desk.run("scancel", job)
    assert desk.until_done(job) == "CANCELLED"
    assert desk.signals("batch") == desk.signals("task0") == desk.signals("task1") == ["CONT", "TERM"]
    assert desk.signals("child") == desk.signals("below0") == []
    assert desk.cluster.processes() == []
    assert "slurmstepd-node1: error: *** JOB %s ON node1 CANCELLED AT 2" % job in desk.output(job)


def test_linuxproc_tells_all_descendants(desk_of):
    desk = desk_of(ProctrackType="proctrack/linuxproc")
    job = desk.reporters()
    desk.run("scancel", job)
    assert desk.until_done(job) == "CANCELLED"
    for name in ("batch", "child", "task0", "task1", "below0", "below1"):
        assert desk.signals(name) == ["CONT", "TERM"]


@pytest.mark.parametrize("options, batch, tasks, children", [
    (["-s", "USR1"], [], ["USR1"], []),
    (["-b", "-s", "USR1"], ["USR1"], [], []),
    (["-f", "-s", "USR2"], ["USR2"], ["USR2"], ["USR2"]),
])
def test_scancel_signals_whom_it_should(desk_of, options, batch, tasks, children):
    desk = desk_of(ProctrackType="proctrack/linuxproc")
    job = desk.reporters()
    assert desk.run("scancel", *options, job).returncode == 0
    wanted = {"batch": batch, "task0": tasks, "task1": tasks, "child": children}
    desk.until(lambda: {name: sorted(set(desk.signals(name))) for name in wanted} == wanted, "the signals")
    desk.write("enough", "")
    assert desk.until_done(job) == "COMPLETED"


@pytest.mark.parametrize("tracking, survivors", [("cgroup", 0), ("linuxproc", 2)])
def test_left_over_children_live_on_only_under_linuxproc(desk_of, tracking, survivors):
    desk = desk_of(proctrack=tracking)
    job = desk.submit("setsid sleep 60 > /dev/null 2>&1 &\nsrun bash -c 'nohup sleep 60 > /dev/null 2>&1 & exit 0'\n")
    assert desk.until_done(job) == "COMPLETED"
    desk.until(lambda: len(desk.cluster.processes()) == survivors, "the orphans")


def test_an_orphan_that_holds_stdout_delays_the_end_of_the_step(desk_of):
    desk = desk_of(proctrack="linuxproc", EioTimeout=1)
    begin = time.monotonic()
    done = desk.run("srun", "bash", "-c", "sleep 60 & echo out")
    assert done.stdout == "out\n" and 1 <= time.monotonic() - begin < 5


def test_a_python_without_exec_is_killed_unwarned_under_cgroup(desk_of):
    desk = desk_of(KillWait=30)
    desk.write("reporter.py", REPORTER)
    job = desk.submit("%s reporter.py inner\n" % sys.executable)
    desk.until(lambda: (desk.folder / "ready.inner").exists(), "the inner program")
    desk.run("scancel", job)
    assert desk.until_done(job) == "CANCELLED"
    assert desk.signals("inner") == []


def test_a_time_limit_ends_the_job_and_tells_tasks_twice(desk_of):
    desk = desk_of()
    job = desk.reporters("-t", "1")
    end = desk.run("squeue", "-h", "-j", job, "-o", "%S %e", env={"SLURM_TIME_FORMAT": "%s"}).stdout.split()
    assert int(end[1]) - int(end[0]) == 60
    desk.run("scontrol", "update", "job", job, "FakeEnd=0")
    assert desk.until_done(job) == "TIMEOUT"
    assert desk.signals("batch") == ["CONT", "TERM"]
    assert desk.signals("task0") == desk.signals("task1") == ["TERM", "CONT", "TERM"]
    assert "DUE TO TIME LIMIT ***" in desk.output(job)


def test_the_warning_comes_before_the_end(desk_of):
    desk = desk_of()
    job = desk.reporters("--signal=B:USR1@30", "-t", "1")
    desk.run("scontrol", "update", "job", job, "FakeEnd=30")
    desk.until(lambda: desk.signals("batch") == ["CONT", "USR1"], "the warning")
    assert desk.show(job) == "RUNNING" and desk.signals("task0") == desk.signals("child") == []


def test_a_warning_without_b_goes_to_the_tasks(desk_of):
    desk = desk_of()
    job = desk.reporters("--signal=USR2@30", "-t", "1")
    desk.run("scontrol", "update", "job", job, "FakeEnd=30")
    desk.until(lambda: desk.signals("task0") == desk.signals("task1") == ["CONT", "USR2"], "the warning")
    assert desk.signals("batch") == []


def test_the_end_of_the_script_ends_the_steps(desk):
    desk.write("step.sh", "#!/bin/bash\ntrap 'echo told > told; exit' TERM\ntouch up\nwhile :; do sleep 0.05; done\n")
    holder = desk.start("salloc", "-Q", "bash", "-c", "echo $SLURM_JOB_ID > id; while [ ! -e up ]; do sleep 0.02; done; exit 5")
    desk.until(lambda: desk.read("id").strip(), "the allocation")
    job = desk.read("id").strip()
    step = desk.start("srun", "--jobid=" + job, "bash", "step.sh")
    assert holder.wait(WAIT_S) == 5
    step.wait(WAIT_S)
    assert desk.until_done(job) == "FAILED" and desk.read("told") == "told\n"


def test_a_job_that_exits_in_peace_after_scancel_is_cancelled_with_code_0(desk):
    job = desk.submit("trap 'exit 0' TERM\ntouch up\nwhile :; do sleep 0.02; done\n")
    desk.until(lambda: (desk.folder / "up").exists(), "the script")
    desk.run("scancel", job)
    assert desk.until_done(job) == "CANCELLED"
    assert " ExitCode=0:0" in desk.run("scontrol", "show", "job", job, "-o").stdout


def test_scancel_b_alone_kills_the_script_and_fails_the_job(desk):
    job = desk.submit("touch up; sleep 60\n")
    desk.until(lambda: (desk.folder / "up").exists(), "the script")
    desk.run("scancel", "-b", job)
    assert desk.until_done(job) == "FAILED" and desk.show(job, "%r") == "JobLaunchFailure"


def test_scancel_of_a_step_kills_only_that(desk):
    job = desk.submit("srun -N1 -n1 bash -c 'touch up; sleep 60'; echo rc $?; echo on\n")
    desk.until(lambda: (desk.folder / "up").exists(), "the step")
    assert desk.run("scancel", job + ".0").returncode == 0
    assert desk.until_done(job) == "COMPLETED" and "rc 137\non\n" in desk.output(job)


def test_scancel_of_what_is_gone_is_silent(desk):
    assert desk.run("scancel", "4711").returncode == 0
    refused = desk.run("scancel", "1.batch")
    assert refused.returncode == 1 and "Invalid job id" in refused.stderr


# srun ----------------------------------------------------------------------------------------------

@pytest.fixture
def held(desk):
    """A desk with two nodes allocated; desk.env names the job."""
    done = desk.run("salloc", "-N2", "--no-shell", "--gres=gpu:2", "-n2", "-c2")
    assert done.returncode == 0
    desk.env["SLURM_JOB_ID"] = re.search(r"Granted job allocation (\d+)\n", done.stderr).group(1)
    return desk


def test_lines_go_both_ways_at_once(held):
    step = held.start("srun", "-N1", "-n1", "-w", "node2", "--ntasks-per-node=1", "--mem=0", "--kill-on-bad-exit=0", "--wait=0",
                      "--no-kill", "--export=ALL", "--mpi=none", "-J", "agents", "cat",
                      stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    def ask():
        begin = time.perf_counter()
        step.stdin.write(b'{"n": 1}\n')
        step.stdin.flush()
        assert step.stdout.readline() == b'{"n": 1}\n'
        return time.perf_counter() - begin
    ask()
    assert sorted(ask() for _ in range(101))[50] < 0.005
    step.stdin.write(b"x" * 1000000 + b"\n")
    step.stdin.close()
    assert step.stdout.read() == b"x" * 1000000 + b"\n"
    assert step.wait(WAIT_S) == 0


def test_the_death_of_srun_ends_its_task_only(held):
    steps = [held.start("srun", "-N1", "-n1", "-w", node, "bash", "-c", "touch %s; exec cat" % node, stdin=subprocess.PIPE)
             for node in ("node1", "node2")]
    for node in ("node1", "node2"):
        held.until(lambda: (held.folder / node).exists(), node)
    steps[0].kill()
    held.until(lambda: [node for _, node, _ in held.cluster.processes()] == ["node2"], "one task left")
    steps[0].stdin.close()
    steps[1].stdin.close()
    assert steps[1].wait(WAIT_S) == 0
    steps[0].wait()


def test_srun_says_who_failed_and_returns_the_highest_code(held):
    done = held.run("srun", "-n2", "bash", "-c", "exit $((SLURM_PROCID * 3))")
    assert done.returncode == 3 and "srun: error: node2: task 1: Exited with exit code 3\n" in done.stderr
    done = held.run("srun", "-n1", "-N1", "bash", "-c", "kill -9 $$")
    assert done.returncode == 137 and "srun: error: node1: task 0: Killed\n" in done.stderr
    assert held.run("srun", "-n1", "-N1", "nothing-like-that").returncode == 2
    held.write("plain", "text")
    assert held.run("srun", "-n1", "-N1", "./plain").returncode == 13


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_terminated_srun_kills_its_tasks_at_once(held, number):
    held.write("reporter.py", REPORTER)
    step = held.start("srun", "-N1", "-n1", sys.executable, "reporter.py", "task", stderr=subprocess.DEVNULL)
    held.until(lambda: (held.folder / "ready.task").exists(), "the task")
    step.send_signal(number)
    assert step.wait(WAIT_S) == 137 and held.signals("task") == []


def test_srun_passes_usr1_on_and_takes_two_interrupts(held):
    held.write("reporter.py", REPORTER)
    step = held.start("srun", "-N1", "-n1", sys.executable, "reporter.py", "task", stderr=subprocess.PIPE)
    held.until(lambda: (held.folder / "ready.task").exists(), "the task")
    step.send_signal(signal.SIGUSR1)
    held.until(lambda: held.signals("task") == ["USR1"], "USR1")
    step.send_signal(signal.SIGINT)
    assert b"one more within 1 sec to abort" in step.stderr.readline()
    step.send_signal(signal.SIGINT)
    assert step.wait(WAIT_S) == 137 and held.signals("task") == ["USR1", "INT"]


def test_steps_wait_for_each_other_unless_they_overlap(held):
    first = held.start("srun", "-N1", "-n1", "-w", "node1", "bash", "-c", "touch up; while [ ! -e enough ]; do sleep 0.02; done")
    held.until(lambda: (held.folder / "up").exists(), "the first step")
    other_node = held.run("srun", "-N1", "-n1", "-w", "node2", "bash", "-c", "echo $SLURMD_NODENAME $CUDA_VISIBLE_DEVICES")
    assert other_node.stdout == "node2 0,1\n" and other_node.stderr == ""
    assert held.run("srun", "-N1", "-n1", "-w", "node1", "--overlap", "echo", "beside").stdout == "beside\n"
    refused = held.run("srun", "-N1", "-n1", "-w", "node1", "--immediate=1", "true")
    assert refused.returncode == 1 and "Requested nodes are busy" in refused.stderr
    waiting = held.start("srun", "-N1", "-n1", "-w", "node1", "echo", "after", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert waiting.stderr.readline() == ("srun: Job %s step creation temporarily disabled, retrying "
                                         "(Requested nodes are busy)\n" % held.env["SLURM_JOB_ID"]).encode()
    held.write("enough", "")
    assert waiting.communicate(timeout=WAIT_S)[0] == b"after\n" and first.wait(WAIT_S) == 0


def test_srun_refuses_what_the_job_does_not_have(held):
    for options, words in ((["-N1", "-n1", "-w", "node3"], "Requested node configuration is not available"),
                           (["-N1", "-n1", "-c9"], "More processors requested than permitted"),
                           (["-N1", "-n1", "--gres=gpu:3"], "Invalid generic resource (gres) specification")):
        done = held.run("srun", *options, "true")
        assert done.returncode == 1 and words in done.stderr
    done = held.run("srun", "true", env={"SLURM_MEM_PER_NODE": "1", "SLURM_MEM_PER_CPU": "1"})
    assert "are mutually exclusive." in done.stderr


def test_a_step_takes_the_gpus_it_asks_for(held):
    show = ["bash", "-c", "echo $SLURM_PROCID:$CUDA_VISIBLE_DEVICES:$SLURM_CPUS_ON_NODE"]
    assert held.run("srun", "-N1", "-n1", "--gres=gpu:1", *show).stdout == "0:0:2\n"
    assert held.run("srun", "-N1", "-n1", "--gres=none", *show).stdout == "0::2\n"
    assert held.run("srun", "-N1", "-n1", "--exact", *show).stdout == "0:0,1:1\n"


def test_labels_files_input_and_kill_on_bad_exit(held):
    done = held.run("srun", "-n2", "-l", "bash", "-c", "cat; echo $SLURM_PROCID", input="in\n")
    assert sorted(done.stdout.splitlines()) == ["0: 0", "0: in", "1: 1", "1: in"]
    assert held.run("srun", "-n2", "--input=none", "cat", input="in\n").stdout == ""
    held.run("srun", "-n2", "-o", "out.%t.%s", "bash", "-c", "echo $SLURM_PROCID")
    assert [path.name for path in sorted(held.folder.glob("out.*"))][0].startswith("out.0.")
    assert held.run("srun", "-n1", "-o", "no/where", "true").returncode == 1
    nothing_ran = held.run("srun", "-n1", "-o", "no/%t", "touch", "ran")
    assert nothing_ran.returncode == 0 and "task 0 launch failed: Slurmd could not connect IO" in nothing_ran.stderr
    assert not (held.folder / "ran").exists()
    begin = time.monotonic()
    done = held.run("srun", "-n2", "-K", "bash", "-c",
                    "[ $SLURM_PROCID = 0 ] && touch up && exec sleep 60; while [ ! -e up ]; do sleep 0.02; done; exit 4")
    assert done.returncode == 143 and time.monotonic() - begin < 10
    done = held.run("srun", "-n2", "--wait=1", "bash", "-c", "[ $SLURM_PROCID = 1 ] && exit 0; exec sleep 60")
    assert done.returncode == 137


def test_srun_outside_a_job_makes_one(desk):
    done = desk.run("srun", "-N2", "bash", "-c", "echo $SLURM_JOB_ID $SLURMD_NODENAME; exit 6")
    (job, one), (_, two) = sorted(line.split() for line in done.stdout.splitlines())
    assert (done.returncode, one, two) == (6, "node1", "node2")
    desk.until_state(job, "FAILED")


def test_a_task_prolog_speaks_first(desk_of):
    desk = desk_of(FakeTaskProlog="welcome to the site")
    assert desk.run("srun", "echo", "hello").stdout == "welcome to the site\nhello\n"


def test_a_pty_looks_like_an_agent(desk):
    ours, theirs = os.openpty()
    shell = desk.start("srun", "--pty", "sh", stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    os.write(ours, b"echo step:$SLURM_STEP_ID:$SLURM_PTY_PORT; tty; exit 9\n")
    heard = b""
    while not re.search(rb"step:0:\d+\r\n/dev/pts/\d+\r\n", heard):
        heard += os.read(ours, 1000)
    assert shell.wait(WAIT_S) == 9
    os.close(ours)
    piped = desk.run("srun", "--pty", "sh", "-c", "echo $SLURM_STEP_ID:$SLURM_PTY_PORT", input="")
    assert piped.stdout == "0:\n" and "Not using a pseudo-terminal, disregarding --pty option" in piped.stderr


# sbatch --------------------------------------------------------------------------------------------

FAILED_TO_SUBMIT = "sbatch: error: Batch job submission failed: "


@pytest.mark.parametrize("options, code, words", [
    (["-p", "nope"], 1, "sbatch: error: invalid partition specified: nope\n" + FAILED_TO_SUBMIT + "Invalid partition name specified"),
    (["--gres=gpu:9"], 1, FAILED_TO_SUBMIT + "Requested node configuration is not available"),
    (["--gres=foo:1"], 1, "sbatch: error: Invalid generic resource (gres) specification"),
    (["--mem=1T"], 1, "sbatch: error: Memory specification can not be satisfied\n" + FAILED_TO_SUBMIT),
    (["-C", "nope"], 1, FAILED_TO_SUBMIT + "Invalid feature specification"),
    (["-w", "nope"], 1, FAILED_TO_SUBMIT + "Invalid node name specified"),
    (["-d", "bogus:1"], 1, FAILED_TO_SUBMIT + "Job dependency problem"),
    (["--array=5-1"], 1, FAILED_TO_SUBMIT + "Invalid job array specification"),
    (["-t", "abc"], 255, "sbatch: error: Invalid --time specification"),
    (["--mem=abc"], 255, "sbatch: error: Invalid --mem specification"),
    (["-N", "abc"], 255, 'sbatch: error: "abc" is not a valid node count'),
    (["--frob"], 255, "sbatch: unrecognized option '--frob'\nTry \"sbatch --help\" for more information"),
    (["--signal=B:R:USR1"], 255, "sbatch: error: Invalid --signal specification"),
    (["--signal=USR1@65536"], 255, "sbatch: error: Invalid --signal specification"),
])
def test_a_bad_request_is_refused_in_slurms_words(shared, options, code, words):
    done = shared.run("sbatch", *options, shared.script("true\n"))
    assert done.returncode == code and done.stderr.startswith(words) and done.stdout == ""


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """One cluster for tests that leave nothing running in it."""
    folder = tmp_path_factory.mktemp("shared")
    (folder / "home").mkdir()
    with FakeCluster(folder / "cluster", FakeTick=0.2) as cluster:
        yield Desk(cluster, folder / "home")
        assert "Traceback" not in cluster.log()


@pytest.mark.parametrize("name, text, words", [
    ("a", "echo\n", "This does not look like a batch script."), ("b", "\n#!/bin/sh\n", "This does not look like a batch script."),
    ("c", "#!/bin/sh\r\ntrue\r\n", "DOS line breaks"), ("d", "", "Batch script is empty!"),
    ("missing", None, "Unable to open file"),
])
def test_a_bad_script_is_refused(shared, name, text, words):
    if text is not None:
        (shared.folder / name).write_bytes(text.encode())
    done = shared.run("sbatch", name)
    assert done.returncode == 1 and words in done.stderr


def test_limits_are_met_late_or_at_once(desk_of, shared):
    for options, reason in ((["-t", "5:00:00"], "PartitionTimeLimit"), (["-N3", "-p", "short"], "PartitionNodeLimit"),
                            (["-N9"], "PartitionConfig")):
        job = shared.submit("true\n", *options)
        shared.until(lambda: shared.show(job, "%T %r") == "PENDING " + reason, reason)
        shared.run("scancel", job)
    strict = desk_of(EnforcePartLimits="ALL")
    for options, words in ((["-t", "5:00:00"], "Requested time limit is invalid (missing or exceeds some limit)"),
                           (["-N9"], "Node count specification invalid"),
                           (["-c64"], "More processors requested than permitted")):
        done = strict.run("sbatch", *options, strict.script("true\n"))
        assert (done.returncode, done.stderr) == (1, FAILED_TO_SUBMIT + words + "\n")


@pytest.mark.parametrize("text, shown", [
    ("1", "1:00"), ("90", "1:30:00"), ("1:30", "2:00"), ("0:30", "1:00"), ("00:00:30", "1:00"), ("1-0", "1-00:00:00"),
    ("1-12:30:15", "1-12:31:00"), ("0-0:5", "5:00"), ("1-", "1-00:00:00"), ("0", "UNLIMITED"), ("-1", "UNLIMITED"),
    ("infinite", "UNLIMITED"), ("100:100:100", "4-05:42:00"), ("1.5", None), ("1h", None), ("", None), (" 10", None),
    ("+5", None), ("1:", None), (":1", None), ("1:2:3:4", None), ("1-2-3", None)])
def test_times_are_read_as_slurm_reads_them(shared, text, shown):
    done = shared.run("sbatch", "-H", "--parsable", "--time=" + text, shared.script("true\n"))
    if shown is None:
        assert done.returncode == 255 and "Invalid --time specification" in done.stderr
    else:
        assert shared.show(done.stdout.strip(), "%l") == shown
        shared.run("scancel", done.stdout.strip())


def test_directives_end_at_the_first_other_line(shared):
    body = ("#SBATCH -J 'first name' --comment=a#b\n\n# a comment\n##SBATCH -J no\n #SBATCH -J no\n#SBATCH\t-t 7\n"
            "#SBATCH-N 2\ntrue\n#SBATCH -J late\n")
    job = shared.submit(body, "-H")
    assert shared.show(job, "%j|%k|%l|%D") == "first name|a|7:00|2"
    shared.run("scancel", job)
    job = shared.submit(body, "-H", "-N1", env={"SBATCH_TIMELIMIT": "8", "SBATCH_JOB_NAME": "env"})
    assert shared.show(job, "%j|%l|%D") == "env|8:00|1"
    shared.run("scancel", job)
    done = shared.run("sbatch", shared.script("#SBATCH -N1 a\\ b\n"))
    assert (done.returncode, done.stderr) == (255, "sbatch: error: Invalid directive found in batch script: a\n")


def test_a_script_comes_from_stdin_or_the_command_line(desk):
    done = desk.run("sbatch", input="#!/bin/sh\necho from stdin ${SLURM_JOB_NAME-unset}\n")
    job = re.fullmatch(r"Submitted batch job (\d+)\n", done.stdout).group(1)
    wrapped = desk.run("sbatch", "--parsable", "--wrap", "echo wrapped $SLURM_JOB_NAME", "-o", "%x-%9j%%.txt").stdout.strip()
    assert desk.until_done(job) == desk.until_done(wrapped) == "COMPLETED"
    assert desk.output(job) == "from stdin unset\n" and desk.read("wrap-%09d%%.txt" % int(wrapped)) == "wrapped wrap\n"


def test_a_python_file_is_a_batch_script(desk):
    desk.write("job.py", "#!%s\n#SBATCH -J py\nimport sys\nprint(sys.argv[1:])\n" % sys.executable)
    job = desk.run("sbatch", "--parsable", "job.py", "-N9", "a b").stdout.strip()
    desk.until_done(job)
    assert desk.output(job) == "['-N9', 'a b']\n" and desk.show(job, "%j") == "py"


def test_a_missing_output_folder_fails_the_job_unseen(desk):
    job = desk.submit("touch ran\n", "-o", "missing/out")
    assert desk.until_done(job) == "FAILED"
    assert desk.show(job, "%r") == "JobLaunchFailure" and not (desk.folder / "ran").exists()
    assert " ExitCode=0:53" in desk.run("scontrol", "show", "job", job, "-o").stdout


def test_wait_returns_the_jobs_code(desk):
    assert desk.run("sbatch", "--wait", desk.script("exit 7\n")).returncode == 7
    assert desk.run("sbatch", "--wait", desk.script("kill -9 $$\n")).returncode == 1
    bad = desk.run("sbatch", "--wait", "--parsable", desk.script("", shebang="#!/no/such/thing"))
    assert bad.returncode == 2 and "bad interpreter" in desk.output(bad.stdout.strip())


def test_dependencies_and_holds_are_kept(desk):
    first = desk.submit("while [ ! -e go ]; do sleep 0.02; done; exit 1\n")
    after = desk.submit("echo after\n", "-d", "afterany:" + first)
    never = desk.submit("echo never\n", "-d", "afterok:" + first)
    held = desk.submit("echo held\n", "-H")
    later = desk.submit("echo later\n", "--begin=now+1hour")
    unknown = desk.submit("echo unknown\n", "-d", "afterok:99999")
    desk.until(lambda: desk.show(never, "%T|%r|%E") == "PENDING|Dependency|afterok:%s(unfulfilled)" % first, "the dependency")
    assert desk.show(held, "%r") == "JobHeldUser" and desk.show(later, "%r") == "BeginTime"
    assert desk.until_done(unknown) == "COMPLETED"
    desk.write("go", "")
    assert desk.until_done(after) == "COMPLETED"
    desk.until(lambda: desk.show(never, "%r") == "DependencyNeverSatisfied", "the verdict")
    desk.run("scontrol", "release", held)
    assert desk.until_done(held) == "COMPLETED"


def test_test_only_tells_where_and_runs_nothing(desk):
    done = desk.run("sbatch", "--test-only", "-N2", desk.script("touch ran\n"))
    assert done.returncode == 0 and done.stdout == ""
    assert re.fullmatch(r"sbatch: Job \d+ to start at \d{4}-\d\d-\d\dT[\d:]{8} using 2 processors on nodes node\[1-2\] in partition main\n",
                        done.stderr)
    refused = desk.run("sbatch", "--test-only", "-p", "nope", desk.script("true\n"))
    assert refused.returncode == 1 and "allocation failure: Invalid partition name specified" in refused.stderr


def test_jobs_wait_for_nodes_and_a_higher_tier_goes_first(desk):
    first = desk.submit("while [ ! -e go ]; do sleep 0.02; done\n", "-N4", "--exclusive")
    low = desk.submit("echo low >> order\n", "-N4", "-p", "low", "--exclusive")
    high = desk.submit("echo high >> order\n", "-N4", "-p", "high", "--exclusive")
    desk.until(lambda: desk.show(low, "%T %r") == "PENDING Resources", "the wait")
    desk.write("go", "")
    assert desk.until_done(low) == desk.until_done(high) == desk.until_done(first) == "COMPLETED"
    assert desk.read("order") == "high\nlow\n"


# Reading the state ---------------------------------------------------------------------------------

def test_squeue_tells_a_running_job(desk):
    job = desk.submit("sleep 60\n", "-N2", "-t", "10", "--comment", "some words", "--gres=gpu:1", "-J", "a|b=c")
    desk.until_state(job, "RUNNING")
    assert desk.show(job, "%i|%A|%F|%K|%T|%t|%r|%R|%l|%N|%D|%P|%u|%k|%b|%C|%E|%j").split("|", 17) == [
        job, job, job, "N/A", "RUNNING", "R", "None", "node[1-2]", "10:00", "node[1-2]", "2", "main",
        desk.run("id", "-un").stdout.strip(), "some words", "gres:gpu:1", "2", "(null)", "a|b=c"]
    assert re.fullmatch(r"0:\d\d (9:\d\d|10:00)", desk.show(job, "%M %L"))
    started = int(desk.run("squeue", "-h", "-j", job, "-o", "%S", env={"SLURM_TIME_FORMAT": "%s"}).stdout)
    assert abs(started - time.time()) < 60
    assert desk.run("scontrol", "update", "job", job, "comment=half way", "TimeLimit=5").returncode == 0
    assert desk.show(job, "%k %l") == "half way 5:00"
    assert desk.run("squeue", "-h", "--me", "-t", "PD").stdout == ""
    assert "GRES=gpu:1(IDX:0)" in desk.run("scontrol", "show", "job", "-d", job).stdout
    assert desk.run("sinfo", "-h", "-p", "main", "-o", "%T %D").stdout == "mixed 2\nidle 2\n"


def test_unknown_jobs_are_an_error_only_alone(desk):
    job = desk.submit("true\n")
    desk.until_done(job)
    alone = desk.run("squeue", "-h", "-j", "4711")
    assert (alone.returncode, alone.stderr) == (1, "slurm_load_jobs error: Invalid job id specified\n")
    assert desk.run("scontrol", "show", "job", "4711").stderr == alone.stderr
    assert desk.run("squeue", "-h", "-t", "all", "-j", "4711," + job, "-o", "%i").stdout == job + "\n"
    assert desk.run("squeue", "-h", "-j", job).stdout == ""


def test_old_jobs_are_forgotten(desk_of):
    desk = desk_of(MinJobAge=2)
    job = desk.submit("true\n")
    desk.until(lambda: desk.run("squeue", "-t", "all", "-j", job).returncode == 1, "the job to be forgotten")


def test_nodes_and_partitions_are_told(shared):
    lines = shared.run("sinfo", "-h", "-N", "-o", "%N|%P|%T|%C|%m|%e|%G|%O|%l|%D|%c").stdout.splitlines()
    assert len(lines) == 16 and re.fullmatch(r"node1\|main\*\|idle\|0/4/0/4\|4000\|\d+\|gpu:2\|[\d.]+\|4:00:00\|1\|4", lines[0])
    text = shared.run("scontrol", "show", "partition", "short", "-o").stdout
    for words in ("MaxTime=00:05:00", "DefaultTime=NONE", "MaxNodes=2", "State=UP", "Default=NO", "TotalNodes=4", "GraceTime=0"):
        assert " " + words + " " in text
    assert "AccountingStorageType   = accounting_storage/none\n" in shared.run("scontrol", "show", "config").stdout
    sacct = shared.run("sacct")
    assert (sacct.returncode, sacct.stderr) == (1, "Slurm accounting storage is disabled\n")


@pytest.mark.parametrize("text, hosts", [
    ("gorgona[01-04,07]", "gorgona01 gorgona02 gorgona03 gorgona04 gorgona07"),
    ("gorgona[098-101]", "gorgona098 gorgona099 gorgona100 gorgona101"), ("a[1-2],b3,c[5,7-8]", "a1 a2 b3 c5 c7 c8"),
    ("rack[1-2]node[1-3]", "rack1node1 rack1node2 rack1node3 rack2node1 rack2node2 rack2node3"),
    ("r[0-1]-n[08-10]", "r0-n08 r0-n09 r0-n10 r1-n08 r1-n09 r1-n10"),
    ("n[1-2]x[3-4]y[5-6]", "n1x3y5 n1x3y6 n2x3y5 n2x3y6 n1x4y5 n1x4y6 n2x4y5 n2x4y6"),
    ("n[5,1-2],a1", "n5 n1 n2 a1"), ("a1,a1,a2", "a1 a1 a2"), ("a[1-2,2-3]", "a1 a2 a2 a3"), ("n[9-010]", "n9 n10"),
    ("n[001-3]", "n001 n002 n003"), ("[1-3]", "1 2 3"), ("n[1-2] m3", "n1 n2 m3"), ("a,,b", "a b"), ("(null)", "(null)")])
def test_hostlists_expand(shared, text, hosts):
    assert shared.run("scontrol", "show", "hostnames", text).stdout.split() == hosts.split()


def test_bad_hostlists_are_said_so_with_code_0(shared):
    for text in ("a[3-1]", "a[]", "a[b-c]", "n[0-4:2]", "a[1-3]b"):
        done = shared.run("scontrol", "show", "hostnames", text)
        assert (done.returncode, done.stdout) == (0, "") and done.stderr.endswith("Invalid hostlist: %s\n" % text)
    assert shared.run("scontrol", "show", "hostnames").stderr == "scontrol: error: host list is empty\n"
    assert shared.run("scontrol", "show", "hostlist", "n1,n2,n3,n5,m01,m02").stdout == "n[1-3,5],m[01-02]\n"


# On either cluster -------------------------------------------------------------------
# These hold on a real Slurm too: LLMRUN_BENCH=real pytest tests/test_fake_slurm.py -k both

class BothDesk(Desk):
    """What is the same to do at either cluster."""

    def exists(self, name):
        return self.until(lambda: (self.folder / name).exists(), name)

    def nodes(self):
        """{state: nodes}"""
        return dict(line.split() for line in self.run("sinfo", "-h", "-p", "main", "-o", "%T %N").stdout.splitlines())

    def field(self, job, name):
        found = re.search(r"\b%s=(\S*)" % name, self.run("scontrol", "show", "job", "-o", job).stdout)
        return found and found.group(1)

    def living(self, program, *words):
        """The nodes of a program's processes."""
        return sorted(node for _, node, argv in self.cluster.processes()
                      if os.path.basename(argv[0]) == program and set(words) <= set(argv))

    def again(self):
        """Away with the marks of a first run."""
        for path in [*self.folder.glob("ready.*"), *self.folder.glob("up*")]:
            path.unlink()


@pytest.fixture
def both(tmp_path):
    """both(KillWait=1, ...) is a desk at a fake cluster, or at a real one with the settings in `real` besides."""
    desks = []

    def make(real=(), fake=(), partitions=None, kill_wait=1, **settings):
        (tmp_path / "home").mkdir()
        if REAL:
            from real.cluster import RealCluster
            cluster = RealCluster(tmp_path / "cluster", kill_wait=kill_wait, partitions=partitions, **{**settings, **dict(real)})
        else:
            cluster = FakeCluster(tmp_path / "cluster", kill_wait=kill_wait, partitions=partitions, **{
                "FakeTick": 0.2, "FakeRequeueDelay": 0.5, "FakeSignalGap": 0.05, "proctrack": "linuxproc", **settings, **dict(fake)})
        desk = BothDesk(cluster, tmp_path / "home")
        desks.append(desk)
        cluster.start()
        return desk

    yield make
    for desk in desks:
        desk.cluster.stop()
        assert desk.cluster.processes() == []
        assert REAL or "Traceback" not in desk.cluster.log()


WAITS = "touch up.$SLURM_ARRAY_TASK_ID; while [ ! -e go ]; do sleep 0.02; done\n"


# What is refused, who may do what

def test_both_a_reservation_that_nobody_made_is_refused(both):
    desk = both()
    for words, answer in ((["sbatch", "--wrap", "true"], FAILED_TO_SUBMIT), (["sbatch", "-H", "--wrap", "true"], FAILED_TO_SUBMIT),
                          (["sbatch", "--test-only", "--wrap", "true"], "allocation failure: "),
                          (["srun", "true"], "srun: error: Unable to allocate resources: "),
                          (["salloc", "true"], "salloc: error: Job submit/allocate failed: ")):
        done = desk.run(words[0], "--reservation=none", *words[1:])
        assert (done.returncode, done.stderr) == (1, answer + "Requested reservation is invalid\n")


@pytest.mark.parametrize("site, default", [("1", "1"), ("0", "0")])
def test_both_the_last_word_on_requeue_counts(both, site, default):
    desk = both(JobRequeue=site)
    no, yes = (desk.write(name, "#!/bin/sh\n#SBATCH --%s\n" % name) for name in ("no-requeue", "requeue"))
    plain, twice = desk.script(""), desk.write("twice", "#!/bin/sh\n#SBATCH --requeue\n#SBATCH --no-requeue\n")
    for requeue, variables, *words in (
            (default, {}, plain), ("1", {}, "--no-requeue", "--requeue", plain), ("0", {}, "--requeue", "--no-requeue", plain),
            ("0", {}, no), ("1", {}, yes), ("0", {}, twice), ("1", {}, "--requeue", no), ("0", {}, "--no-requeue", yes),
            ("1", {"SBATCH_REQUEUE": "1"}, no), ("0", {"SBATCH_NO_REQUEUE": "1"}, yes), ("1", {"SBATCH_NO_REQUEUE": "1"}, "--requeue", no),
            ("1", {"SBATCH_NO_REQUEUE": "1", "SBATCH_REQUEUE": "1"}, plain)):
        job = desk.run("sbatch", "--parsable", "-H", *words, env=variables).stdout.strip()
        assert desk.field(job, "Requeue") == requeue, (words, variables)


def test_both_scancel_takes_ids_apart_at_commas_and_not_at_blanks(both):
    desk = both()
    first, second, third = (desk.submit("true\n", "-H") for _ in range(3))
    for text, shown in ((first + " " + second, None), (first + " " + second + ",3", None), ("3," + first + " " + second, first + " " + second),
                        (first + " ", None), (first + "\t", None), ("", None), (first + ",", ""), ("," + first, None), ("0", None), ("abc", None),
                        (first + "-3", None), (first + ".x", None), (first + ".batch", None), (first + ".0 1", None)):
        refused = desk.run("scancel", text)
        assert (refused.returncode, refused.stderr) == (1, "scancel: error: Invalid job id %s\n" % (text if shown is None else shown))
    assert desk.run("scancel", first, "abc").returncode == 1
    assert desk.show(first + "," + second) == "PENDING\nPENDING", "nobody is cancelled where one name is wrong"
    done = desk.run("scancel", " %s, 4711" % first, second, "4712")
    assert (done.returncode, done.stderr) == (0, ""), "unknown ones are passed over"
    assert desk.show("%s,%s,%s" % (first, second, third)).split() == ["CANCELLED", "CANCELLED", "PENDING"]
    said = desk.run("scancel", "-s", "USR1", first)
    assert (said.returncode, said.stderr) == (1, "scancel: error: Kill job error on job id %s: Invalid job id specified\n" % first)
    if not REAL:                        # where it is tried for 90 s
        said = desk.run("scancel", "-s", "USR1", third)
        assert (said.returncode, said.stderr) == (
            228, "scancel: error: Kill job error on job id %s: Job can not be altered now, try again later\n" % third)
    assert desk.show(third) == "PENDING"
    quiet = desk.run("scancel", "-Q", "-s", "USR1", first)
    assert (quiet.returncode, quiet.stderr) == (1, "")
    assert desk.run("scancel", "-b", first).returncode == 1
    assert desk.run("scancel", "-s", "KILL", third).returncode == 0 and desk.show(third) == "CANCELLED"


def test_both_another_users_jobs_are_seen_and_not_touched(both):
    desk = both()
    job, waiting = desk.submit(WAITS), desk.submit("true\n", "-H")
    array = desk.submit("true\n", "-H", "-a", "1-3")
    desk.exists("up.")
    stranger = desk.cluster.stranger
    assert desk.run(*stranger, "squeue", "-h", "-j", job, "-o", "%T").stdout == "RUNNING\n"
    for words in ([], ["-s", "USR1"], ["-b", "-s", "USR1"], ["-Q"]):
        for name in (job, waiting, *(() if words else (array, array + "_1", array + "_[1-2]"))):
            refused = desk.run(*stranger, "scancel", *words, name)
            assert (refused.returncode, refused.stderr) == (
                210, "scancel: error: Kill job error on job id %s: Access/permission denied\n" % name)
    assert desk.run(*stranger, "scancel", "-u", "root").returncode == (210 if os.getuid() == 0 else 0)
    for words, answer in ((["requeue", job], "Access/permission denied for job %s\n" % job),
                          (["requeue", waiting], "Access/permission denied for job %s\n" % waiting),
                          (["suspend", job], "Access/permission denied for job %s\n" % job),
                          (["update", "JobId=" + job, "comment=x"], "Invalid user id for job %s\n" % job),
                          (["hold", waiting], "Invalid user id for job %s\nslurm_suspend error: Invalid user id\n" % waiting),
                          (["release", waiting], "Invalid user id for job %s\nslurm_suspend error: Invalid user id\n" % waiting)):
        refused = desk.run(*stranger, "scontrol", *words)
        assert (refused.returncode, refused.stderr) == (1, answer)
    step = desk.run(*stranger, "srun", "--jobid=" + job, "true")
    assert (step.returncode, step.stderr) == (1, "srun: error: Unable to create step for job %s: Access/permission denied\n" % job)
    assert desk.run(*stranger, "scancel", "--me").returncode == 0
    own = desk.run(*stranger, "sbatch", "--parsable", "-H", "-D", "/tmp", "-o", "/dev/null", "--wrap", "true").stdout.strip()
    assert int(desk.show(own, "%U")) not in (0, os.getuid()) and desk.run(*stranger, "scancel", own).returncode == 0 and desk.show(own) == "CANCELLED"
    assert (desk.show(job), desk.show(waiting)) == ("RUNNING", "PENDING")


# Starting and ending

def test_both_before_the_first_cycle_a_reason_is_a_guess(both):
    desk = both(fake={"FakeTick": 1.5})
    said = desk.submit("true\n", "-N3", "-p", "short"), "PartitionNodeLimit"
    assert desk.show(said[0], "%r") == "PartitionConfig"
    holder = desk.submit(WAITS, "-N4", "--exclusive")
    desk.exists("up.")
    waiting = [said]
    for options, first, later in ((["--begin=now+60"], "Resources", "BeginTime"), (["-d", "afterany:" + holder], "Resources", "Dependency"),
                                  (["-t", "10", "-p", "short"], "PartitionConfig", "PartitionTimeLimit")):
        job = desk.submit("true\n", *options)
        said = desk.show(job, "%r")
        assert said in (first, "Priority", later), "before or, on a quick cluster, after the first cycle"
        assert REAL or said != later
        waiting.append((job, later))
    for job, later in waiting:
        desk.until(lambda: desk.show(job, "%r") == later, later)
    held = desk.submit("true\n", "-H")
    assert desk.show(held, "%r") == "JobHeldUser", "which is known at once"


def test_both_after_its_time_limit_a_job_has_the_exit_code_of_its_script(both):
    desk = both()
    ends = {}
    for name, body, code in (("deaf", "exec sleep 1000\n", "0:15"), ("polite", "trap 'exit 0' TERM\n", "0:0"), ("own", "trap 'exit 7' TERM\n", "7:0")):
        job = desk.submit(body + "touch up.%s; while :; do sleep 0.02; done\n" % name, "-t", "1")
        ends[job] = code
    desk.until(lambda: all(desk.show(job) == "RUNNING" for job in ends) and len(list(desk.folder.glob("up.*"))) == 2, "the start")
    for job in [] if REAL else ends:
        desk.run("scontrol", "update", "job", job, "FakeEnd=0")
    for job, code in ends.items():
        assert desk.until_done(job) == "TIMEOUT"
        assert (desk.field(job, "ExitCode"), desk.field(job, "Reason")) == (code, "TimeLimit")


def test_both_a_job_is_configuring_while_its_nodes_are_made_ready(both, tmp_path):
    prolog = tmp_path / "prolog"
    prolog.write_text("#!/bin/sh\necho $SLURM_JOB_ID $SLURM_JOB_NODELIST $SLURM_SCRIPT_CONTEXT >> %s/readied\n"
                      "while [ ! -e %s/ready ]; do sleep 0.02; done\n" % (tmp_path, tmp_path))
    prolog.chmod(0o755)
    desk = both(PrologSlurmctld=prolog)
    job = desk.submit("touch up\n", "-N2", "-t", "5")
    desk.until(lambda: desk.show(job, "%T %t %r %N") == "CONFIGURING CF None node[1-2]", "the state")
    assert desk.nodes() == {"mixed": "node[1-2]", "idle": "node[3-4]"}
    assert desk.run("squeue", "-h", "-t", "CF", "-o", "%A").stdout.strip() == job
    other = desk.submit("true\n")
    desk.until_state(other, "CONFIGURING")
    desk.run("scancel", other)
    desk.until_state(other, "CANCELLED")
    step = desk.start("srun", "--jobid=" + job, "-N1", "-n1", "touch", "stepped", stderr=subprocess.DEVNULL)
    time.sleep(0.3)
    assert not (desk.folder / "up").exists() and not (desk.folder / "stepped").exists()
    (tmp_path / "ready").touch()
    assert desk.until_done(job) == "COMPLETED" and step.wait(WAIT_S) in (0, 1), "it ran, or came too late for so short a job"
    assert (tmp_path / "readied").read_text().splitlines()[0] == "%s node[1-2] prolog_slurmctld" % job
    done = desk.run("salloc", "-N1", "true")
    assert [line.partition("node")[0] for line in done.stderr.splitlines()][1:3] == ["salloc: Waiting for resource configuration", "salloc: Nodes "]


def test_both_a_job_requeued_to_be_held_waits_for_its_release(both):
    desk = both()
    for words, state in (([], "PENDING"), (["State=SpecialExit"], "SPECIAL_EXIT")):
        job = desk.submit(WAITS)
        desk.exists("up.")
        assert desk.run("scontrol", "requeuehold", *words, job).returncode == 0
        desk.until(lambda: desk.show(job, "%T|%r") == state + "|job requeued in held state", "the hold")
        assert desk.field(job, "Reason") == "job_requeued_in_held_state" and desk.field(job, "Restarts") == "1"
        desk.again()
        assert desk.run("scontrol", "release", job).returncode == 0
        desk.exists("up.")
        assert desk.until_state(job, "RUNNING")
        desk.run("scancel", job)
        desk.until_done(job)
        desk.again()


def test_both_a_job_that_its_user_stops_says_so_till_it_goes_on(both):
    desk = both()
    job = desk.submit(WAITS)
    desk.exists("up.")
    desk.run("scancel", "-f", "-s", "STOP", job)
    desk.until(lambda: desk.show(job, "%T %t") == "STOPPED ST", "the state")
    desk.run("scancel", "-f", "-s", "CONT", job)
    desk.until_state(job, "RUNNING")
    unknown = desk.run("squeue", "-t", "nope")
    assert unknown.returncode == 1 and unknown.stderr == (
        "squeue: error: Invalid job state specified: nope\nsqueue: error: Valid job states include: PENDING,RUNNING,SUSPENDED,COMPLETED,"
        "CANCELLED,FAILED,TIMEOUT,NODE_FAIL,PREEMPTED,BOOT_FAIL,DEADLINE,OUT_OF_MEMORY,COMPLETING,CONFIGURING,RESIZING,RESV_DEL_HOLD,"
        "REQUEUED,REQUEUE_FED,REQUEUE_HOLD,REVOKED,SIGNALING,SPECIAL_EXIT,STAGE_OUT,STOPPED\n\n")
    desk.write("go", "")
    assert desk.until_done(job) == "COMPLETED"


# Sites

def test_both_where_memory_counts_a_step_takes_all_of_the_jobs(both):
    desk = both(SelectTypeParameters="CR_Core_Memory")
    second = "srun -N1 -n1 -w node1 -c1 %s bash -c 'touch %s' & "
    job = desk.submit("srun -N1 -n1 -w node1 -c1 bash -c 'touch one; while [ ! -e go ]; do sleep 0.02; done' &\nwhile [ ! -e one ]; do sleep 0.02; done\n"
                      + second % ("", "all") + second % ("--mem=0", "none") + second % ("--overlap", "over")
                      + "wait; srun -N1 -n1 -c1 --mem=2000 true; echo $?\n", "-c2", "--mem=1000", "-w", "node1")
    desk.exists("none"), desk.exists("over")
    desk.until(lambda: "retrying (Requested nodes are busy)" in desk.output(job), "the third step to be told to wait")
    assert not (desk.folder / "all").exists()
    whole = desk.submit("true\n", "-w", "node2")
    desk.until_done(whole)
    assert "mem=4000M" in desk.field(whole, "TRES"), "who asks for no memory gets all of a node"
    desk.write("go", "")
    assert desk.until_done(job) == "FAILED" or desk.show(job) == "COMPLETED"
    assert (desk.folder / "all").exists() and "Memory required by task is not available" in desk.output(job)


def test_both_only_the_first_task_has_the_terminal(both):
    desk = both()
    ours, theirs = os.openpty()
    shell = desk.start("srun", "-N2", "--pty", "bash", "-c", "readlink /proc/self/fd/0 > input.$SLURM_PROCID; echo task $SLURM_PROCID\n"
                       "[ $SLURM_PROCID = 0 ] && read word && echo said $word; exit $((SLURM_PROCID + 4))", stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    os.write(ours, b"hello\n")
    heard = b""
    with contextlib.suppress(OSError):              # the end of a terminal
        while True:
            heard += os.read(ours, 1000)
    os.close(ours)
    assert shell.wait(WAIT_S) == 5 and b"task 0\r\n" in heard and b"said hello\r\n" in heard and b"task 1\r\n" not in heard
    assert desk.read("input.0").startswith("/dev/pts/") and desk.read("input.1") == "/dev/null\n"


def test_both_a_hasty_site_ends_steps_of_which_one_task_ended(both):
    desk = both(KillOnBadExit=1, WaitTime=1)
    one = "bash -c '[ $SLURM_PROCID = 0 ] && exit %d; trap \"touch told.%s; exit 5\" TERM; sleep 2 & wait; touch on.%s'; echo %s $?) &\n"
    job = desk.submit("".join("(srun --overlap -N2 -n2 %s " % words + one % (code, name, name, name) for words, code, name in (
        ("", 3, "bad"), ("", 0, "good"), ("-K0 --wait=0", 3, "own"))) + "wait\n", "-N2")
    assert desk.until_done(job) == "COMPLETED"
    text = desk.output(job)
    assert "bad 5\n" in text and (desk.folder / "told.bad").exists(), "TERM where it ended badly"
    assert "good 137\n" in text and "srun: First task exited 1s ago\n" in text and not (desk.folder / "told.good").exists(), "KILL after WaitTime"
    assert "own 3\n" in text and (desk.folder / "on.own").exists(), "unless the step says otherwise"


def test_both_a_job_is_forgotten_soon_where_the_site_says_so(both):
    desk = both(real={"MinJobAge": 2}, fake={"MinJobAge": 1})
    job = desk.submit("true\n")
    desk.until(lambda: desk.run("squeue", "-h", "-t", "all", "-j", job).stderr == "slurm_load_jobs error: Invalid job id specified\n", "it")
    assert desk.run("scontrol", "show", "job", job).returncode == 1 and desk.run("scancel", job).returncode == 0
    assert desk.run("scontrol", "requeue", job).stderr == "Invalid job id specified for job %s\n" % job


def test_both_a_controller_that_hangs_is_waited_for_and_does_late_what_was_asked(both):
    desk = both(MessageTimeout=2)
    desk.env["SBATCH_TIMELIMIT"] = "5"
    job = desk.submit("srun --overlap bash -c 'touch up; while [ ! -e go ]; do date +%s%N > now; sleep 0.1; done' & "
                      "while [ ! -e hung ]; do sleep 0.02; done; srun --overlap true; echo srun $?; wait\n")
    gone = desk.submit(WAITS)
    desk.exists("up"), desk.exists("up.")
    desk.cluster.hang()
    desk.write("hung", "")
    silence = "Socket timed out on send/recv operation\n"
    begun = time.monotonic()
    asked = [desk.start(*words, stderr=subprocess.PIPE, text=True) for words in (
        ["squeue", "-h"], ["sinfo", "-h"], ["scancel", gone], ["sbatch", "-o", "late", "--wrap", "true"], ["scontrol", "show", "hostnames", "a[1-2]"])]
    answers = [(each.communicate(timeout=WAIT_S)[1], each.returncode) for each in asked]
    assert 2 <= time.monotonic() - begun < 9
    assert answers == [("slurm_load_jobs error: " + silence, 1), ("slurm_load_partitions: " + silence, 1),
                       ("scancel: error: Kill job error on job id %s: %s" % (gone, silence), 140), (FAILED_TO_SUBMIT + silence, 1), ("", 0)]
    text = desk.until(lambda: "srun 1\n" in desk.output(job) and desk.output(job), "a step to give up")
    assert "srun: error: Unable to confirm allocation for job %s: %s" % (job, silence) in text
    then = desk.read("now")
    desk.until(lambda: desk.read("now") not in ("", then), "what runs to run on")
    assert not (desk.folder / "late").exists()
    desk.cluster.go_on()
    desk.until(lambda: (desk.folder / "late").exists(), "the job that sbatch said had failed")
    assert desk.until_state(gone, "CANCELLED") and desk.show(job) == "RUNNING"
    desk.write("go", "")
    assert desk.until_done(job) == "COMPLETED"


def test_both_nodes_can_have_host_names_of_their_own(both):
    desk = both(hosts=True)
    here = os.uname().nodename
    names = ["node1", "node2"] if REAL or processes.can_name_hosts() else [here, here]
    job = desk.submit("hostname; srun -N2 -n2 %s -c 'import socket; print(\"task\", socket.gethostname())' | sort\n" % sys.executable, "-N2")
    assert desk.until_done(job) == "COMPLETED"
    assert desk.output(job).split() == [names[0], "task", names[0], "task", names[1]]
    assert "NodeHostName=%s " % names[0] in desk.run("scontrol", "show", "node", "node1").stdout
    assert os.uname().nodename == here


# Arrays

def test_both_array_tasks_know_their_array_and_the_last_one_takes_its_number(both):
    desk = both()
    array = desk.submit("env > env.$SLURM_ARRAY_TASK_ID\n" + WAITS, "-a", "1,3,5-9:2", "-o", "%A-%a-%j-%x-%3a.out", "-J", "name")
    for index in (1, 3, 5, 7, 9):
        desk.exists("up.%d" % index)
    raw = {}
    for index in (1, 3, 5, 7, 9):
        task = desk.variables("env.%d" % index)
        assert (task["SLURM_ARRAY_JOB_ID"], task["SLURM_ARRAY_TASK_ID"], task["SLURM_ARRAY_TASK_COUNT"]) == (array, str(index), "5")
        assert (task["SLURM_ARRAY_TASK_MIN"], task["SLURM_ARRAY_TASK_MAX"], task["SLURM_ARRAY_TASK_STEP"]) == ("1", "9", "2")
        raw[index] = task["SLURM_JOB_ID"]
        assert (desk.folder / ("%s-%d-%s-name-%03d.out" % (array, index, raw[index], index))).exists()
    assert raw == {1: str(int(array) + 1), 3: str(int(array) + 2), 5: str(int(array) + 3), 7: str(int(array) + 4), 9: array}
    lines = desk.show(array, "%i|%A|%F|%K|%T").splitlines()
    assert sorted(lines) == ["%s_%d|%s|%s|%d|RUNNING" % (array, index, raw[index], array, index) for index in (1, 3, 5, 7, 9)]
    assert desk.show(raw[3], "%i") == array + "_3"
    desk.write("go", "")
    desk.until(lambda: set(desk.show(array).split()) == {"COMPLETED"}, "the end")


def test_both_an_array_keeps_its_limit(both):
    desk = both()
    array = desk.submit(WAITS, "-a", "0-4%2")
    desk.until(lambda: desk.show(array, "%i|%T|%r").count("RUNNING") == 2, "two tasks")
    desk.until(lambda: "%s_[2-4%%2]|2-4%%2|PENDING|JobArrayTaskLimit" % array in desk.show(array, "%i|%K|%T|%r").splitlines(), "the rest")
    rows = desk.run("squeue", "-h", "-r", "-o", "%i %A %T").stdout.splitlines()
    assert {"%s_%d %s PENDING" % (array, index, array) for index in (2, 3, 4)} < set(rows) and len(rows) == 5
    assert desk.show(array + "_3", "%i %K %T") == array + "_3 3 PENDING"
    assert desk.show("%s_3,%s_4" % (array, array), "%i") in (array + "_[3-4]", array + "_3\n" + array + "_4")
    shown = desk.run("scontrol", "show", "job", array).stdout
    assert "JobId=%s ArrayJobId=%s ArrayTaskId=2-4%%2 ArrayTaskThrottle=2 JobName=job.sh" % (array, array) in shown
    assert shown.count("JobId=") - shown.count("ArrayJobId=") == 3
    assert desk.run("scontrol", "update", "JobId=" + array, "ArrayTaskThrottle=3").returncode == 0
    desk.exists("up.2")
    assert not (desk.folder / "up.3").exists()
    desk.write("go", "")
    desk.until(lambda: desk.show(array).split() == ["COMPLETED"] * 5, "the end")


def test_both_scancel_takes_a_task_some_or_all(both):
    desk = both()
    array = desk.submit(WAITS, "-a", "0-7%2")
    desk.exists("up.0"), desk.exists("up.1")
    desk.until(lambda: "JobArrayTaskLimit" in desk.show(array, "%r"), "the limit")
    assert desk.run("scancel", array + "_3").returncode == 0
    assert "%s_[2,4-7%%2]" % array in desk.show(array, "%i").split() and desk.show(array + "_3") == ""
    assert desk.run("scancel", array + "_[4-6]").returncode == 0
    assert "%s_[2,7%%2]" % array in desk.show(array, "%i").split()
    desk.run("scancel", array + "_0")
    desk.until(lambda: "RUNNING" == desk.show(array + "_2"), "the next task")
    assert desk.until(lambda: desk.show(array + "_0", "%i %T") == array + "_0 CANCELLED", "its end")
    assert desk.show(array + "_1") == "RUNNING"
    desk.run("scancel", array)
    desk.until(lambda: set(desk.show(array).split()) == {"CANCELLED"}, "the end")


def test_both_unknown_tasks_are_silent_in_squeue_and_errors_elsewhere(both):
    desk = both()
    array = desk.submit("true\n", "-H", "-a", "1-2")
    assert desk.show(array, "%i|%r") == array + "_[1-2]|JobHeldUser"
    unknown = desk.run("squeue", "-h", "-j", array + "_9")
    assert (unknown.returncode, unknown.stdout) == (0, "")
    assert desk.run("squeue", "-h", "-j", "4711_1").stderr == "slurm_load_jobs error: Invalid job id specified\n"
    shown = desk.run("scontrol", "show", "job", array + "_9")
    assert (shown.returncode, shown.stdout) == (1, "Job %s_9 not found\n" % array)
    changed = desk.run("scontrol", "update", "JobId=%s_9" % array, "comment=x")
    assert (changed.returncode, changed.stderr) == (1, "%s_9: Invalid job id specified\n" % array)
    assert desk.run("scancel", array + "_9").returncode == 0
    assert desk.run("scancel", "-s", "USR1", array + "_9").returncode == 1
    for text in ("5-1", "a", "1001"):
        done = desk.run("sbatch", "-a", text, desk.script("true\n"))
        assert (done.returncode, done.stderr) == (1, FAILED_TO_SUBMIT + "Invalid job array specification\n")
    desk.run("scancel", array)
    assert desk.show(array, "%i|%T") == array + "_[1-2]|CANCELLED"


def test_both_long_lists_of_tasks_are_cut(both):
    desk = both()
    indices = "1-2,5,9,14,20,27,35,44,54,65,77,90,104,119,135,152,170,189,209"
    array = desk.submit("true\n", "-H", "-a", indices)
    assert desk.show(array, "%i") == (array + "_[" + indices)[:31]
    assert desk.show(array, "%K") == indices[:60] + "..."
    whole = desk.run("squeue", "-h", "-j", array, "-o", "%i %K", env={"SLURM_BITSTR_LEN": "0"}).stdout
    assert whole == "%s_[%s] %s\n" % (array, indices, indices)
    even = desk.submit("true\n", "-H", "-a", "1-43:2")
    assert desk.show(even, "%i") == even + "_[1-43:2]"
    even = desk.submit("true\n", "-H", "-a", "1-9:2")
    assert desk.show(even, "%i") == even + "_[1,3,5,7,9]"


def test_both_one_waiting_task_can_be_changed_alone(both):
    desk = both()
    array = desk.submit(WAITS, "-H", "-a", "1-3")
    assert desk.run("scontrol", "update", "JobId=%s_2" % array, "comment=two").returncode == 0
    assert desk.show(array, "%i %A") == "%s_[1-3] %s" % (array, array), "squeue puts together what waits"
    assert desk.run("squeue", "-h", "-r", "-j", array + "_2", "-o", "%A %k").stdout == "%d two\n" % (int(array) + 1)
    desk.run("scontrol", "release", array + "_3")
    desk.exists("up.3")
    assert desk.show(array + "_3", "%A %T") == "%d RUNNING" % (int(array) + 2)
    assert desk.show(array + "_1", "%A %T %r") == array + " PENDING JobHeldUser"


def test_both_jobs_wait_for_a_whole_array_or_for_one_task(both):
    desk = both()
    array = desk.submit("[ $SLURM_ARRAY_TASK_ID = 1 ] || while [ ! -e go ]; do sleep 0.02; done\n", "-a", "1-2")
    one = desk.submit("true\n", "-d", "afterok:%s_1" % array)
    whole = desk.submit("true\n", "-d", "afterok:" + array)
    each = desk.submit("true\n", "-a", "1-2", "-d", "aftercorr:" + array)
    assert desk.until_done(one) == "COMPLETED"
    assert desk.until_done(each + "_1") == "COMPLETED"
    assert desk.show(whole) == desk.show(each + "_2") == "PENDING"
    desk.write("go", "")
    assert desk.until_done(whole) == desk.until_done(each + "_2") == "COMPLETED"
    assert desk.run("sbatch", "--wait", "-a", "0-2", desk.script("exit $SLURM_ARRAY_TASK_ID\n")).returncode == 2


RESTARTED = 'echo "run ${SLURM_RESTART_COUNT-first}"; srun -N1 -n1 bash -c \'echo step $SLURM_STEP_ID\'\n'


def test_both_a_requeued_job_runs_its_stored_script_again(both):
    desk = both()
    job = desk.submit(RESTARTED + "touch up; while [ ! -e go ]; do sleep 0.02; done\n")
    desk.exists("up")
    assert desk.output(job) == "run first\nstep 0\n"
    desk.script("echo edited\n")
    before = desk.show(job, "%V")
    assert desk.run("scontrol", "requeue", job).returncode == 0
    desk.again()
    desk.until(lambda: desk.show(job, "%T %r") == "PENDING BeginTime", "the wait")
    assert desk.show(job, "%S") != "N/A" and desk.show(job, "%N") == "" and desk.show(job, "%V") >= before
    desk.exists("up")
    assert desk.output(job) == "run 1\nstep 0\n", "the file begins anew"
    assert desk.field(job, "Restarts") == "1"
    refused = desk.run("scontrol", "requeue", "4711")
    assert (refused.returncode, refused.stderr) == (1, "Invalid job id specified for job 4711\n")
    desk.write("go", "")
    assert desk.until_done(job) == "COMPLETED"


def test_both_a_job_that_requeues_itself_hears_yes_and_then_term(both):
    desk = both(proctrack="cgroup")
    desk.write("self.py", "import os, signal, subprocess, sys, time\n"
               "signal.signal(signal.SIGTERM, lambda *_: (open('told', 'a').write('TERM after %s\\n' % said), sys.exit(0)))\n"
               "said = None\n"
               "if 'SLURM_RESTART_COUNT' not in os.environ:\n"
               "    said = subprocess.call(['scontrol', 'requeue', os.environ['SLURM_JOB_ID']])\n"
               "    time.sleep(20)\n"
               "print('restarted', flush=True)\n")
    job = desk.submit("echo one; exec %s self.py\n" % sys.executable, "--open-mode=append")
    assert desk.until_done(job) == "COMPLETED"
    assert desk.read("told") == "TERM after 0\n"
    assert re.fullmatch(r"one\nslurmstepd-node1: error: \*\*\* JOB %s ON node1 CANCELLED AT \S+ DUE TO JOB REQUEUE \*\*\*\none\nrestarted\n" % job,
                        desk.output(job))


def test_both_requeue_tells_the_whole_job_and_waits_for_it(both):
    desk = both(kill_wait=2)
    job = desk.reporters("--open-mode=append")
    desk.run("scontrol", "requeue", job)
    assert desk.until_state(job, "COMPLETING") == "COMPLETING"
    for name in ("batch", "child", "task0", "task1"):
        desk.until(lambda: sorted(desk.signals(name)) == ["CONT", "TERM"], name)
    desk.until_state(job, "PENDING")
    assert not desk.living(os.path.basename(sys.executable), "reporter.py"), "after KillWait they were killed"
    assert "STEP %s.0 ON node1 CANCELLED AT" % job in desk.output(job) and "DUE TO JOB REQUEUE ***" in desk.output(job)


def test_both_requeue_is_refused_where_the_job_or_its_state_forbids(both):
    desk = both()
    job = desk.submit(WAITS, "--no-requeue")
    desk.exists("up.")
    refused = desk.run("scontrol", "requeue", job)
    assert (refused.returncode, refused.stderr) == (1, "Requested operation is presently disabled for job %s\n" % job)
    assert desk.show(job) == "RUNNING"
    held = desk.submit(WAITS, "-H")
    refused = desk.run("scontrol", "requeue", held)
    assert (refused.returncode, refused.stderr) == (1, "Job is pending execution for job %s\n" % held)


def test_both_a_finished_job_can_be_run_again(both):
    desk = both()
    job = desk.submit("echo run ${SLURM_RESTART_COUNT-first} >> runs\n")
    assert desk.until_done(job) == "COMPLETED"
    assert desk.run("scontrol", "requeue", job).returncode == 0
    assert desk.show(job) == "PENDING"
    desk.until(lambda: desk.read("runs") == "run first\nrun 1\n", "the second run")
    assert desk.until_done(job) == "COMPLETED"


def test_both_a_requeued_array_task_keeps_its_numbers(both):
    desk = both()
    array = desk.submit("echo run ${SLURM_RESTART_COUNT-first} $SLURM_JOB_ID\n" + WAITS, "-a", "1-6%2")
    desk.exists("up.1"), desk.exists("up.2")
    raw = desk.show(array + "_1", "%A")
    assert desk.run("scontrol", "requeue", array + "_1").returncode == 0
    desk.until(lambda: "%s_[1,4-6] %s" % (array, array) in desk.show(array, "%i %A"), "the task to wait among the others")
    assert desk.run("squeue", "-h", "-r", "-j", array + "_1", "-o", "%i %A %T").stdout == "%s_1 %s PENDING\n" % (array, raw)
    everything = desk.run("scontrol", "requeue", array)
    assert everything.returncode == 1
    assert sorted(everything.stderr.splitlines()) == ["%s_1,4-6: Job is pending execution" % array, "%s_2-3: No error" % array]
    desk.write("go", "")
    desk.until(lambda: desk.show(array).split() == ["COMPLETED"] * 6, "the end")
    assert desk.read("slurm-%s_1.out" % array) == "run 1 %s\n" % raw


def test_the_wait_after_a_requeue_follows_the_credentials():
    assert read_conf("").requeue_delay == 121
    assert read_conf("AuthInfo=socket=/run/munge,cred_expire=5\n").requeue_delay == 6
    assert read_conf("AuthInfo=cred_expire=5\nFakeRequeueDelay=0.5\n").requeue_delay == 0.5


# Preemption

def test_both_without_grace_a_lower_job_is_told_at_once_and_waited_for(both):
    desk = both(kill_wait=2)
    low = desk.reporters("-p", "low", "--exclusive")
    high = desk.submit("echo > up.high; while [ ! -e go ]; do sleep 0.02; done\n", "-p", "high", "-N4", "--exclusive")
    desk.until_state(low, "COMPLETING")
    assert desk.show(high) == "PENDING"
    for name in ("batch", "child"):
        desk.until(lambda: sorted(desk.signals(name)) == ["CONT", "TERM"], name)
    for name in ("task0", "task1"):
        desk.until(lambda: desk.signals(name) == ["TERM", "CONT", "TERM"], name)
    assert "DUE TO PREEMPTION ***" in desk.output(low)
    desk.until_state(high, "RUNNING")
    assert desk.show(low, "%T") == "PENDING" and desk.field(low, "Restarts") == "1"
    desk.again()
    desk.write("go", "")
    assert desk.until_done(high) == "COMPLETED"
    desk.until_state(low, "RUNNING")


def test_both_with_grace_tasks_hear_first_and_the_script_at_the_next_cycle(both):
    desk = both(kill_wait=2, partitions={"low": "GraceTime=1"}, fake={"FakeTick": 1})
    low = desk.reporters("-p", "low", "--exclusive", "--open-mode=append")
    before = desk.field(low, "EndTime")
    assert desk.field(low, "PreemptTime") == "None"
    high = desk.submit("true\n", "-p", "high", "-N4", "--exclusive")
    for name in ("task0", "task1"):
        desk.until(lambda: sorted(desk.signals(name)[:2]) == ["CONT", "TERM"], name)
    desk.until_state(low, "RUNNING")
    assert desk.signals("batch") == desk.signals("child") == []
    assert re.search(r"STEP %s.0 ON node\d CANCELLED AT \S+ \*\*\*" % low, desk.output(low)), "it does not say why"
    assert desk.field(low, "EndTime") < before
    assert desk.field(low, "PreemptTime") not in ("None", None)
    for name in ("batch", "child"):
        desk.until(lambda: sorted(desk.signals(name)) == ["CONT", "TERM"], name)
    for name in ("task0", "task1"):
        desk.until(lambda: desk.signals(name)[2:] == ["TERM", "CONT", "TERM"], name)
    assert "JOB %s ON node1 CANCELLED AT" % low in desk.output(low) and "DUE TO PREEMPTION ***" in desk.output(low)
    assert desk.until_done(high) == "COMPLETED"
    assert desk.field(low, "Restarts") == "1"


ASKS = "srun -N1 -n1 bash -c 'trap \"touch told; exit\" TERM; touch up; while :; do sleep 0.02; done'\n"


def test_both_who_leaves_in_his_grace_is_not_requeued(both):
    desk = both(partitions={"low": "GraceTime=60"})
    low = desk.submit(ASKS + "exit 0\n", "-p", "low", "--exclusive", "-N4")
    desk.exists("up")
    high = desk.submit("true\n", "-p", "high", "-N4", "--exclusive")
    assert desk.until_done(high) == "COMPLETED"
    assert desk.show(low) == "COMPLETED" and desk.field(low, "Restarts") == "0"


def test_both_a_job_may_requeue_itself_in_its_grace(both):
    desk = both(partitions={"low": "GraceTime=60"})
    low = desk.submit("[ $SLURM_RESTART_COUNT ] && exit 0\n" + ASKS + "scontrol requeue $SLURM_JOB_ID; sleep 30\n",
                      "-p", "low", "--exclusive", "-N4")
    desk.exists("up")
    high = desk.submit("true\n", "-p", "high", "-N4", "--exclusive")
    assert desk.until_done(high) == "COMPLETED"
    assert desk.until_done(low) == "COMPLETED" and desk.field(low, "Restarts") == "1"


@pytest.mark.parametrize("words, options", [("PreemptMode=CANCEL", []), ("PreemptMode=REQUEUE", ["--no-requeue"])])
def test_both_who_may_not_come_again_is_preempted_for_good(both, words, options):
    desk = both(partitions={"low": words})
    low = desk.submit(WAITS, "-p", "low", "--exclusive", *options)
    desk.exists("up.")
    high = desk.submit("true\n", "-p", "high", "-N4", "--exclusive")
    assert desk.until_done(high) == "COMPLETED"
    assert desk.show(low, "%T %r") == "PREEMPTED None" and desk.field(low, "Restarts") == "0"
    assert desk.field(low, "PreemptTime") not in ("None", None)


def test_both_partitions_without_preemption_and_equals_are_waited_for(both):
    desk = both()
    main = desk.submit(WAITS, "-N4", "--exclusive")
    desk.exists("up.")
    high = desk.submit("true\n", "-p", "high", "-N4", "--exclusive")
    desk.until(lambda: desk.show(high, "%T %r") == "PENDING Resources", "the wait")
    assert desk.show(main) == "RUNNING"
    desk.write("go", "")
    assert desk.until_done(high) == "COMPLETED"


def test_only_as_many_are_preempted_as_must_go(desk_of):
    desk = desk_of()
    jobs = [desk.submit(WAITS, "-p", "low", "--exclusive") for _ in range(4)]
    for job in jobs:
        desk.until_state(job, "RUNNING")
    high = desk.submit(WAITS, "-p", "high", "-N2", "--exclusive")
    desk.until_state(high, "RUNNING")
    assert [desk.show(job) for job in jobs] == ["RUNNING", "RUNNING", "PENDING", "PENDING"], "the youngest leave"


def test_a_site_may_send_the_users_signal_at_preemption(desk_of):
    desk = desk_of(partitions={"low": "GraceTime=60"}, PreemptParameters="send_user_signal")
    desk.reporters("-p", "low", "--exclusive", "--signal=B:USR1@10")
    desk.submit("true\n", "-p", "high", "-N4", "--exclusive")
    desk.until(lambda: desk.signals("batch") == ["CONT", "USR1"], "the signal")
    assert desk.signals("task0") == desk.signals("task1") == []


def test_preemption_by_suspending_lets_both_use_the_nodes_in_turn(desk_of):
    desk = desk_of(partitions={"low": "PreemptMode=SUSPEND"})
    low = desk.submit(WAITS, "-p", "low", "--exclusive")
    desk.until_state(low, "RUNNING")
    high = desk.submit("while [ ! -e high ]; do sleep 0.02; done\n", "-p", "high", "-N4", "--exclusive")
    desk.until_state(high, "RUNNING")
    assert desk.show(low) == "SUSPENDED"
    desk.write("high", "")
    desk.until_state(low, "RUNNING")
    desk.write("go", "")
    assert desk.until_done(low) == "COMPLETED"


def test_both_a_suspended_job_is_stopped_and_frees_its_processors(both):
    desk = both()
    job = desk.reporters("--exclusive")
    assert desk.run("scontrol", "suspend", job).returncode == 0
    assert desk.show(job) == "SUSPENDED" and desk.nodes() == {"idle": "node[1-4]"}
    states = lambda: {processes.parent_and_state(pid)[1] for pid, _, argv in desk.cluster.processes() if "reporter.py" in argv}
    desk.until(lambda: states() == {b"T"}, "all to stand still")
    assert desk.run("scontrol", "resume", job).returncode == 0
    desk.until(lambda: desk.signals("batch") == desk.signals("task0") == desk.signals("child") == ["CONT"], "them to go on")
    assert desk.show(job) == "RUNNING" and b"T" not in states()
    again = desk.run("scontrol", "resume", job)
    assert (again.returncode, again.stderr) == (1, "Job is not suspended for job %s\n" % job)
    desk.run("scontrol", "suspend", job)
    desk.until(lambda: states() == {b"T"}, "all to stand still again")
    desk.run("scancel", job)
    desk.until_done(job)
    assert "TERM" not in desk.signals("batch") + desk.signals("task0"), "they were killed where they stood"


# Lost nodes

LOSSES = {"real": {"SlurmdTimeout": 10}, "fake": {"SlurmdTimeout": 1}}
AGENT = "srun %s bash -c 'touch up$SLURM_PROCID; exec sleep 1000'"


def test_both_a_lost_node_is_noticed_late_and_the_job_starts_on_others(both):
    desk = both(**LOSSES)
    job = desk.reporters("--open-mode=append")
    desk.cluster.lose_node("node2")
    desk.again()
    assert desk.show(job) == "RUNNING" and "error" not in desk.output(job)
    desk.until(lambda: desk.nodes().get("mixed*") == "node2", "sinfo to doubt")
    assert desk.show(job) == "RUNNING" and desk.signals("task0") == []
    desk.until(lambda: desk.nodes().get("down*") == "node2", "sinfo to know")
    text = desk.until(lambda: "DUE TO NODE FAILURE, SEE SLURMCTLD LOG FOR DETAILS ***" in desk.output(job) and desk.output(job), "the words")
    assert "srun: error: Node failure on node2\n" in text
    for name in ("batch", "child", "task0"):
        desk.until(lambda: sorted(desk.signals(name)) == ["CONT", "TERM"], name)
    desk.until_state(job, "RUNNING")
    assert "node2" not in (desk.show(job, "%B"), desk.show(job, "%N")) and desk.field(job, "Restarts") == "1"
    desk.cluster.return_node("node2")
    desk.until(lambda: not {"down*", "idle*", "down"} & set(desk.nodes()), "the node to be back")


def test_both_a_job_not_to_be_requeued_fails_with_its_node(both):
    desk = both(**LOSSES)
    job = desk.submit(AGENT % "-N2 -n2", "-N2", "--no-requeue")
    desk.exists("up0"), desk.exists("up1")
    desk.cluster.lose_node("node2")
    assert desk.until_state(job, "NODE_FAIL") and desk.show(job, "%r %N") == "NodeDown node[1-2]"
    alone = desk.submit("touch up.alone; sleep 1000", "-w", "node1", "--no-requeue")
    desk.exists("up.alone")
    desk.cluster.lose_node("node1")
    assert desk.until_state(alone, "NODE_FAIL")


def test_both_no_kill_shrinks_the_job_and_kills_the_step(both):
    desk = both(**LOSSES)
    after = ("echo srun $?; srun true; echo plain $?; srun -N1 -n1 true; echo one $?; srun -N1 -n1 -w node2 true; echo gone $?\n"
             "echo $SLURM_JOB_NUM_NODES $SLURM_JOB_NODELIST; while [ ! -e go ]; do sleep 0.02; done\n")
    job = desk.submit(AGENT % "-N3 -n3" + "\n" + after, "-N3", "--no-kill")
    for number in range(3):
        desk.exists("up%d" % number)
    desk.cluster.lose_node("node2")
    desk.until(lambda: "3 node[1-3]\n" in desk.output(job), "the script to go on")
    assert desk.show(job, "%T %N %D") == "RUNNING node[1,3] 2"
    text = desk.output(job)
    assert "srun: error: Node failure on node2\n" in text and "srun 137\n" in text
    assert "srun: error: node3: task 2: Killed\n" in text and "srun: error: node1: task 0: Killed\n" in text
    assert "srun: error: SLURM_JOB_NUM_NODES environment variable conflicts with allocated node count (3 != 2)." in text
    assert "plain 0\n" in text and "one 0\n" in text and "gone 1\n" in text
    desk.write("go", "")
    assert desk.until_done(job) == "COMPLETED"


def test_both_a_step_on_a_node_that_does_not_answer_fails_slowly(both):
    desk = both(real={"SlurmdTimeout": 300}, fake={"MessageTimeout": 1})
    job = desk.submit(WAITS + "srun -N3 -n3 bash -c 'echo on $SLURMD_NODENAME'; echo srun $?\n", "-N3")
    desk.exists("up.")
    desk.cluster.lose_node("node2")
    desk.write("go", "")
    text = desk.until(lambda: "srun 233\n" in desk.output(job) and desk.output(job), "srun to give up")
    assert "on node1\n" in text and "on node3\n" in text
    assert ("srun: error: Task launch for StepId=%s.0 failed on node node2: Communication connection failure\n"
            "srun: error: Application launch failed: Communication connection failure\nsrun: Job step aborted\n" % job) in text
    if not REAL:
        desk.cluster.return_node("node2")


def test_both_steps_of_their_own_outlive_another_node(both):
    desk = both(**LOSSES)
    steps = "".join("srun -N1 -n1 -w node%d bash -c 'touch up%d; exec sleep 1000' &\n" % (number, number) for number in (1, 2, 3))
    job = desk.submit(steps + "srun --overlap --no-kill -N3 -n3 bash -c 'touch up.all$SLURM_PROCID; exec sleep 1000'; echo all $?\n"
                      "while [ ! -e go ]; do sleep 0.02; done\n", "-N3", "--no-kill")
    for name in ("up1", "up2", "up3", "up.all0", "up.all1", "up.all2"):
        desk.exists(name)
    desk.cluster.lose_node("node2")
    desk.until(lambda: desk.show(job, "%N") == "node[1,3]", "the job to shrink")
    desk.until(lambda: desk.output(job).count("srun: error: Node failure on node2\n") == 2, "both sruns to say so")
    assert desk.living("sleep", "1000") == ["node1", "node1", "node3", "node3"]
    assert desk.show(job) == "RUNNING" and "all" not in desk.output(job)
    desk.run("scancel", job)


def test_both_a_driver_that_is_cut_off_lives_on_beside_its_successor(both):
    desk = both(**LOSSES)
    job = desk.submit("srun -N2 -n2 sleep 1000\necho srun $? >> ends.${SLURM_RESTART_COUNT-0}\n"
                      "touch up.${SLURM_RESTART_COUNT-0}; exec sleep 999\n", "-N2", "--open-mode=append")
    desk.until(lambda: desk.living("sleep", "1000") == ["node1", "node2"], "the step")
    desk.cluster.lose_node("node1", kill=False)
    desk.until(lambda: "Node failure on node1" in desk.output(job), "its srun to say so")
    desk.exists("up.0")
    assert desk.read("ends.0") == "srun 143\n", "its task on node2 was told to go"
    desk.until(lambda: desk.show(job, "%T %B") in ("RUNNING node2", "RUNNING node3"), "the successor")
    desk.until(lambda: len(desk.living("sleep", "1000")) >= 2, "its step")
    assert desk.living("sleep", "999") == ["node1"], "the old driver has heard nothing"
    desk.cluster.return_node("node1")
    desk.until(lambda: desk.living("sleep", "999") == [], "the old driver to be swept away")
    desk.run("scancel", job)


def test_both_a_node_that_returns_in_time_was_never_away(both):
    desk = both(real={"SlurmdTimeout": 60}, fake={"SlurmdTimeout": 600})
    job = desk.submit(AGENT % "-N2 -n2", "-N2")
    desk.exists("up0"), desk.exists("up1")
    desk.cluster.lose_node("node2", kill=False)
    desk.cluster.return_node("node2")
    assert desk.show(job) == "RUNNING" and len(desk.living("sleep", "1000")) == 2
    desk.run("scancel", job)
    assert desk.until_done(job) == "CANCELLED"


def test_both_nodes_can_be_drained_and_set_down_by_hand(both):
    desk = both()
    assert desk.run("scontrol", "update", "NodeName=node3", "State=DRAIN").returncode == 1
    desk.run("scontrol", "update", "NodeName=node3", "State=DRAIN", "Reason=mending it")
    assert desk.nodes() == {"drained": "node3", "idle": "node[1-2,4]"}
    assert desk.run("sinfo", "-h", "-p", "main", "-t", "drain", "-o", "%E").stdout == "mending it\n"
    job = desk.submit(WAITS, "-N3")
    desk.exists("up.")
    assert desk.show(job, "%N") == "node[1-2,4]"
    desk.run("scontrol", "update", "NodeName=node4", "State=DRAIN", "Reason=x")
    assert desk.nodes()["draining"] == "node4" and desk.show(job) == "RUNNING"
    desk.run("scontrol", "update", "NodeName=node[3-4]", "State=RESUME")
    desk.until(lambda: desk.nodes() == {"mixed": "node[1-2,4]", "idle": "node3"}, "both to be used again")
    desk.run("scontrol", "update", "NodeName=node2", "State=DOWN", "Reason=gone")
    desk.until(lambda: desk.field(job, "Restarts") == "1", "the job to be requeued")
    if not REAL:                        # where ReturnToService=2 brings it back at once
        assert desk.nodes()["down"] == "node2"
        desk.run("scontrol", "update", "NodeName=node2", "State=RESUME")
    desk.until(lambda: "down" not in desk.nodes(), "the node to be back")


def test_what_has_ended_of_an_array_is_forgotten_by_itself(desk_of):
    desk = desk_of(MinJobAge=1, FakeRequeueDelay=0.2)
    array = desk.submit("[ $SLURM_ARRAY_TASK_ID = 1 ] && exit\n" + WAITS, "-a", "1-3%2")
    desk.until(lambda: desk.show(array + "_1") == "", "the first task to be forgotten")
    assert sorted(desk.show(array, "%i %T").splitlines()) == [array + "_2 RUNNING", array + "_3 RUNNING"]
    unknown = desk.run("squeue", "-h", "-j", array + "_1")
    assert (unknown.returncode, unknown.stdout) == (0, "")
    desk.run("scontrol", "requeue", array + "_2")
    desk.until(lambda: desk.show(array + "_2") == "RUNNING", "its second run, which nobody forgot")
    desk.write("go", "")
    desk.until(lambda: desk.run("squeue", "-h", "-t", "all", "-j", array).returncode == 1, "the array to be forgotten")
    assert desk.run("squeue", "-h", "-j", array + "_2").stderr == "slurm_load_jobs error: Invalid job id specified\n"


# The bench itself ----------------------------------------------------------------------------------

def test_nothing_is_left_when_a_cluster_stops(tmp_path):
    with FakeCluster(tmp_path, proctrack="linuxproc") as cluster:
        script = "setsid nohup sleep 61 & env -i setsid sleep 62 & srun -N2 -n2 sleep 63"
        subprocess.run(["sbatch", "-N2", "-o", "/dev/null", "--wrap", script], env=cluster.env, check=True, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + WAIT_S
        while len([argv for _, _, argv in cluster.processes() if argv[0].endswith("sleep")]) < 4:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        pids = [pid for pid, _, _ in cluster.processes()]
    assert not [pid for pid in pids if lives(pid)]


def lives(pid):
    """Whether a process runs: one that was killed stays in /proc until its parent, on a busy machine, has seen it."""
    try:
        with open("/proc/%d/stat" % pid) as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_a_cluster_ends_with_the_process_that_wanted_it(tmp_path):
    owner = subprocess.Popen(["sleep", "60"])
    cluster = FakeCluster(tmp_path).start(watched_pid=owner.pid)
    subprocess.run(["sbatch", "-o", "/dev/null", "--wrap", "sleep 60"], env=cluster.env, check=True, stdout=subprocess.DEVNULL)
    owner.kill()
    owner.wait()
    assert cluster.controller.wait(WAIT_S) == 0
    assert cluster.processes() == []


def test_without_a_controller_the_commands_say_so(tmp_path):
    cluster = FakeCluster(tmp_path).start()
    cluster.stop()
    done = subprocess.run(["squeue"], env=cluster.env, capture_output=True, text=True)
    assert done.returncode == 1 and "Unable to contact slurm controller (connect failure)" in done.stderr
