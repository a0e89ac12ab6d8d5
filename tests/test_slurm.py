"""Slurm's own formats, by our parsers; where the real one is at hand, held against it."""

import os
import shutil
import subprocess
import sys

import llmrun
import pytest

HOSTLISTS = """\
gorgona1                -> gorgona1
gorgona[1-4]            -> gorgona1 gorgona2 gorgona3 gorgona4
gorgona[1,3-4]          -> gorgona1 gorgona3 gorgona4
gorgona[01-04,07]       -> gorgona01 gorgona02 gorgona03 gorgona04 gorgona07
gorgona[8-11]           -> gorgona8 gorgona9 gorgona10 gorgona11
gorgona[098-101]        -> gorgona098 gorgona099 gorgona100 gorgona101
a[1-2],b3,c[5,7-8]      -> a1 a2 b3 c5 c7 c8
rack[1-2]node[1-3]      -> rack1node1 rack1node2 rack1node3 rack2node1 rack2node2 rack2node3
r[0-1]-n[08-10]         -> r0-n08 r0-n09 r0-n10 r1-n08 r1-n09 r1-n10
n[1-2]x[3-4]y[5-6]      -> n1x3y5 n1x3y6 n2x3y5 n2x3y6 n1x4y5 n1x4y6 n2x4y5 n2x4y6
n[5,1-2],a1             -> n5 n1 n2 a1
a1,a1,a2                -> a1 a1 a2
a[1-2,2-3]              -> a1 a2 a2 a3
n[9-010]                -> n9 n10
n[001-3]                -> n001 n002 n003
[1-3]                   -> 1 2 3
n[1-2] m3               -> n1 n2 m3
a,,b                    -> a b"""
VECTORS = [(line.split("->")[0].strip(), line.split("->")[1].split()) for line in HOSTLISTS.splitlines()]


@pytest.mark.parametrize("text, hosts", VECTORS, ids=[text for text, _ in VECTORS])
def test_host_lists(text, hosts):
    assert llmrun.expand_hostlist(text) == hosts


@pytest.mark.parametrize("text", ["a[3-1]", "a[]", "a[b-c]", "n[0-4:2]", "a[1-2"])
def test_what_is_no_host_list(text):
    with pytest.raises(ValueError):
        llmrun.expand_hostlist(text)


def test_host_lists_are_what_scontrol_shows(cluster):
    for text, hosts in VECTORS:
        shown = subprocess.run(["scontrol", "show", "hostnames", text], env=dict(os.environ, **cluster.env), text=True,
                               stdout=subprocess.PIPE)
        assert shown.stdout.split() == hosts


TIMES = "1=1 90=90 1:30=2 90:00=90 0:30=1 00:00:30=1 1:30:00=90 25:00:00=1500 1-0=1440 1-12=2160 1-12:30=2190 " \
        "1-12:30:15=2191 0-1=60 0-0:5=5 2-25:00=4380 1:90=3 100:100:100=6102"


@pytest.mark.parametrize("pair", TIMES.split())
def test_times(pair):
    text, minutes = pair.split("=")
    assert llmrun.slurm_minutes(text) == int(minutes)


@pytest.mark.parametrize("text", ["0", "00:00", "UNLIMITED", "infinite", "-1"])
def test_times_without_end(text):
    assert llmrun.slurm_minutes(text) == llmrun.UNLIMITED


@pytest.mark.parametrize("text", ["1.5", "1h", "30m", "5min", "1d", "", " 10", "+5", "1:", ":1", "1:2:3:4", "1-2-3", "1-0:0:0:0"])
def test_what_is_no_time(text):
    with pytest.raises(ValueError):
        llmrun.slurm_minutes(text)


def test_the_roles_of_a_process():
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1"}
    batch = dict(job, SLURMD_NODENAME="n1", SLURM_TASK_PID="40")
    assert llmrun.role_of({}, 40) == "login"
    assert llmrun.role_of(job, 40) == "allocation"
    assert llmrun.role_of(batch, 40) == "batch"
    assert llmrun.role_of(batch, 41) == "job"
    assert llmrun.role_of(dict(batch, SLURM_STEP_ID="0"), 40) == "task"
    assert llmrun.role_of(dict(batch, SLURM_STEP_ID="0", SLURM_PTY_PORT="1"), 40) == "shell"


def test_inside_a_job_nothing_of_it_reaches_sbatch_and_outside_the_users_wishes_do():
    wishes = {"SBATCH_PARTITION": "gpu", "PATH": "/bin", "SLURM_CONF": "/etc/slurm.conf"}
    assert llmrun.submit_environment(wishes) == wishes
    inside = dict(wishes, SLURM_JOB_ID="1", SLURM_STEP_ID="0", SRUN_DEBUG="3", PMIX_RANK="0", SLURM_MEM_PER_NODE="1")
    assert llmrun.submit_environment(inside) == {"PATH": "/bin", "SLURM_CONF": "/etc/slurm.conf"}


@pytest.mark.parametrize("gres, gpus", [("gpu:2(IDX:0-1)", "2"), ("gpu:a100:4(IDX:0-3)", "4"), ("", None), ("gpu(S:0):8", None)])
def test_the_gpus_of_each_node(gres, gpus):
    detail = f"JobId=7 TRES=x Nodes=n[1-2] CPU_IDs=0-3 Mem=0 GRES={gres} MinCPUsNode=1"
    assert llmrun.gpus_of_nodes(detail).get("n2") == gpus


def test_partitions_as_scontrol_shows_them(cluster, monkeypatch):
    for name, value in cluster.env.items():
        monkeypatch.setenv(name, value)
    partitions = {p.name: p for p in llmrun.Slurm(os.environ).partitions()}
    assert partitions["main"].is_default and partitions["main"].max_minutes == 240 and partitions["main"].nodes == 4
    assert partitions["short"].max_nodes == 2 and partitions["short"].max_minutes == 5


@pytest.mark.parametrize("message, key", [
    ("sbatch: error: invalid partition specified: nope\nsbatch: error: Batch job submission failed: Invalid partition name specified",
     "partition"),
    ("sbatch: error: Batch job submission failed: Invalid account or account/partition combination specified", "account"),
    ("sbatch: error: Batch job submission failed: Invalid qos specification", "qos"),
    ("sbatch: error: Invalid generic resource (gres) specification", "gpus_per_node"),
    ("sbatch: error: Memory specification can not be satisfied\nsbatch: error: Batch job submission failed: "
     "Requested node configuration is not available", "mem"),
    ("sbatch: error: Batch job submission failed: Requested time limit is invalid (missing or exceeds some limit)", "time"),
    ("sbatch: error: Batch job submission failed: Node count specification invalid", "nodes"),
    ("sbatch: error: Batch job submission failed: Invalid feature specification", "constraint"),
    ("sbatch: error: Batch job submission failed: Requested reservation is invalid", "reservation")])
def test_a_refusal_is_told_at_its_key(message, key):
    error = llmrun.refusal(llmrun.Config(source="config.toml"), message)
    assert f"[slurm] {key} = " in str(error) and error.mend and "sbatch" not in str(error)


@pytest.mark.parametrize("asked, said", [
    ({"mem": "900G"}, '[slurm] mem = "900G": Slurm refuses: Requested'),
    ({"mem": "900G", "gpus_per_node": "8"}, "Slurm refuses [slurm] gpus_per_node and [slurm] mem: Requested"), ({}, "Slurm refuses the job")])
def test_a_refusal_that_names_no_key_is_told_at_those_that_are_set(asked, said):
    config = llmrun.Config(source="config.toml", slurm=llmrun.SlurmConfig(**asked))
    error = llmrun.refusal(config, "sbatch: error: Batch job submission failed: Requested node configuration is not available")
    assert said in str(error) and error.mend and "= \"\"" not in str(error)


def test_no_slurm_here_is_one_line():
    with pytest.raises(llmrun.ClusterError, match="login node"):
        llmrun.Slurm({"PATH": "/nowhere"}).call("squeue-is-not-here")
    assert shutil.which("squeue-is-not-here") is None


def test_job_scripts_are_shell_whatever_stands_in_the_config(tmp_path):
    nasty = "a'b\"c $HOME `id` \\ ;#"
    config = llmrun.build_config(llmrun.Config, {"environment": {
        "modules": [nasty], "conda": nasty, "vars": {"A": nasty, "B": "it's `id` \\ plain"}},
        "slurm": {"extra": {"comment": "x y"}}}, "c", None)
    text = llmrun.job_script(config, 1, "/x y/o", ["/r/llmrun.py", "drive", "/r x"], "/usr/bin/python3")
    script = tmp_path / "job.sh"
    script.write_text(text)
    subprocess.run(["bash", "-n", str(script)], check=True)
    body = text[text.index("# ── 2"):].replace('exec "$python" -I', "printf '%s\\n' \"$A\" \"$B\" --")
    body = "module() { printf 'module %s\\n' \"$*\"; }; conda() { [ \"$1\" = activate ] && printf '%s\\n' \"$2\"; }\n" + body
    done = subprocess.run(["bash", "-c", body], stdout=subprocess.PIPE, text=True, env={"HOME": "/h", "PATH": os.environ["PATH"]})
    assert done.stdout.splitlines() == [f"module load {nasty}", nasty, nasty.replace("$HOME", "/h"), "it's `id` \\ plain",
                                        "--", "/r/llmrun.py", "drive", "/r x"]


def test_the_warning_comes_with_time_to_spare_but_not_before_half_the_job():
    def warned(time, grace):
        config = llmrun.build_config(llmrun.Config, {"slurm": {"time": time, "grace": grace}}, "c", None)
        return [line for line in llmrun.sbatch_lines(config, 1, "o") if "--signal" in line][0].partition("USR1@")[2]
    assert warned("04:00:00", 120) == "120" and warned("2", "5min") == "60" and warned("UNLIMITED", 120) == "120"


@pytest.mark.parametrize("said, silent", [
    ("sbatch: error: Batch job submission failed: Unable to contact slurm controller (connect failure)", True),
    ("sbatch: error: Batch job submission failed: Socket timed out on send/recv operation", True),
    ("sbatch: error: Batch job submission failed: Some new reason", False)])
def test_a_slurm_that_does_not_answer_is_not_the_users_fault(tmp_path, monkeypatch, said, silent):
    slurm = slurm_whose(tmp_path, "sbatch", f"echo '{said}' >&2", "exit 1")
    monkeypatch.setenv("PATH", slurm.environ["PATH"])
    with pytest.raises(llmrun.UserError) as error:
        slurm.submit(llmrun.Config(source="config.toml"), "job.sh")
    assert isinstance(error.value, llmrun.SlurmSilent) == silent and error.value.exit_code == (3 if silent else 2)


def test_a_slurm_that_is_silent_is_asked_again_while_there_is_time(monkeypatch):
    now, asked = [0.0], []
    monkeypatch.setattr(llmrun, "clock", lambda: now[0])
    monkeypatch.setattr(llmrun.time, "sleep", lambda time_s: now.__setitem__(0, now[0] + time_s))

    def ask(slurm):
        asked.append(now[0])
        now[0] += min(10, slurm.timeout_s)
        if len(asked) < 3:
            raise llmrun.SlurmSilent("scontrol", "did not answer", "")
        return "an answer"
    assert llmrun.insist(ask, 100) == "an answer" and len(asked) == 3
    asked.clear()
    with pytest.raises(llmrun.SlurmSilent):
        llmrun.insist(ask, 12)
    assert len(asked) < 3


# ── Slurm's commands, as sites have them ───────────────────────────────────────


def slurm_whose(tmp_path, command, *script):
    """A Slurm one of whose commands is this shell script."""
    (tmp_path / command).write_text("\n".join(["#!/bin/sh", *script, ""]))
    (tmp_path / command).chmod(0o755)
    return llmrun.Slurm({"PATH": f"{tmp_path}:{os.environ['PATH']}"})


def test_a_slurm_that_is_away_is_an_error_and_not_a_cluster_without_jobs(tmp_path):
    slurm = slurm_whose(tmp_path, "squeue", "echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2", "exit 1")
    with pytest.raises(llmrun.ClusterError, match="Unable to contact slurm controller"):
        slurm.jobs([7])
    assert slurm.jobs([]) == {}


def test_a_job_that_ended_is_still_told_and_its_times_are_seconds(cluster):
    environ = dict(os.environ, **cluster.env)
    done = subprocess.run(["sbatch", "--parsable", "--wait", "-o", "/dev/null", "-t", "5", "--wrap", "true"], env=environ, text=True,
                          stdout=subprocess.PIPE, check=True)
    job = llmrun.job_id_in(done.stdout)
    slurm = llmrun.Slurm(dict(environ, SLURM_TIME_FORMAT="relative"))
    found = slurm.jobs([job])[job]
    assert found.state == "COMPLETED" and found.start.isdigit()
    assert llmrun.end_of_job({}, slurm.detail(job)) < llmrun.clock() + 400


def test_the_jobs_id_stands_below_a_sites_own_words():
    assert llmrun.job_id_in("2026\nWelcome to cluster 9\n194;main\n") == 194
    with pytest.raises(llmrun.ClusterError, match="did not tell its id"):
        llmrun.job_id_in("Welcome\n")


def test_before_a_job_wait_those_of_its_partition_with_a_higher_priority(tmp_path):
    slurm = slurm_whose(tmp_path, "squeue", "printf 'main|5|7\\nmain|9|8\\nlow|1|3\\nmain|9|6\\nmain|10|9\\n'")
    assert slurm.waiting_before() == {9: 0, 6: 1, 8: 2, 7: 3, 3: 0}


def test_the_end_of_a_job_is_told_by_its_environment_or_by_slurm():
    end = int(llmrun.time.time()) + 100
    for found in (llmrun.end_of_job({"SLURM_JOB_END_TIME": str(end)}, "EndTime=1"), llmrun.end_of_job({}, f"x EndTime={end} y")):
        assert 95 < found - llmrun.clock() < 105
    assert llmrun.end_of_job({}, "EndTime=Unknown") == llmrun.math.inf


# ── what stands in job.sh ──────────────────────────────────────────────────────


def script_of(tmp_path, *words, **tables):
    """A job.sh whose driver is this command."""
    config = llmrun.build_config(llmrun.Config, tables, "c", None)
    script = tmp_path / "job.sh"
    script.write_text(llmrun.job_script(config, 1, "/x/o", words, sys.executable))
    return script


def test_what_a_run_cannot_do_without_wins_over_the_users_own_options(tmp_path):
    theirs = ["--open-mode=truncate", "--propagate=ALL", "--signal=B:TERM@9", "--job-name=x", "--nodes=9", "--requeue"]
    script = script_of(tmp_path, slurm={"directives": theirs, "requeue": False, "extra": {"output": "elsewhere", "comment": "x"}})
    options = llmrun.sbatch_options(script.read_text())
    last = dict(option[2:].partition("=")[::2] for option in options)
    assert (last["open-mode"], last["propagate"], last["signal"]) == ("append", "NONE", "B:USR1@120")
    assert (last["job-name"], last["nodes"], last["output"], last["comment"]) == ("llmrun", "1", "/x/o", "x")
    assert "--no-kill" in options and options[-1] == "--no-requeue"


def test_an_array_has_a_task_for_each_job_and_no_more_at_once_than_wanted(tmp_path):
    def array(**slurm):
        return [option for option in llmrun.sbatch_options(script_of(tmp_path, slurm=slurm).read_text()) if "array" in option]
    assert array(jobs=4) == ["--array=0-3"] and array(jobs=4, max_running=2) == ["--array=0-3%2"] and array(max_running=2) == []


def test_a_warning_that_comes_before_the_driver_listens_does_no_harm(tmp_path):
    asks = "import signal; print(signal.getsignal(signal.SIGUSR1) == signal.SIG_IGN)"
    script = script_of(tmp_path, "-c", asks, environment={"setup": ["kill -USR1 $$", "kill -USR1 $$"]})
    done = subprocess.run(["bash", script], stdout=subprocess.PIPE, text=True)
    assert (done.returncode, done.stdout) == (0, "True\n"), "ignored through exec, until the driver listens"


def test_the_driver_takes_the_place_of_the_script(tmp_path):
    """A site that tracks processes by cgroups sends its signals to the script's own process alone."""
    script = script_of(tmp_path, "-c", "import os; print(os.getpid())")
    started = subprocess.Popen(["bash", script], stdout=subprocess.PIPE, text=True)
    assert int(started.communicate()[0]) == started.pid


def test_a_module_that_is_missing_ends_the_job_and_is_named(tmp_path):
    script = script_of(tmp_path, "-c", "print('went on')", environment={"modules": ["nosuch/1.0"], "setup": ["echo went on"]})
    text = script.read_text().replace("trap '' USR1", "module() { return 1; }\ntrap '' USR1")
    done = subprocess.run(["bash", "-c", text], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 3 and "module load nosuch/1.0 failed" in done.stdout and "went on" not in done.stdout


def test_a_users_files_and_settings_do_not_reach_the_drivers_python(tmp_path):
    for folder in (tmp_path, tmp_path / "more"):
        folder.mkdir(exist_ok=True)
        (folder / "secrets.py").write_text("raise SystemExit('not this one')\n")
    script = script_of(tmp_path, "-c", "import secrets; print('went on')")
    done = subprocess.run(["bash", script], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                          env={**os.environ, "PYTHONPATH": str(tmp_path / "more")})
    assert done.stdout == "went on\n"
