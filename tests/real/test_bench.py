"""The real bench itself: Slurm comes up, behaves as the scenarios count on, and leaves nothing; the model speaks."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import pytest
from conftest import wait_for
from real.cluster import CGROUPS, RealCluster, argv_of, descendants, free_ports
from real.tiny_model import split_model, write_tiny_model

HERE = Path(__file__).resolve().parent


def submit(cluster, *options, script, folder):
    path = folder / "job.sh"
    path.write_text("#!/bin/bash\n" + script)
    return cluster.slurm("sbatch", "--parsable", "--open-mode=append", "-o", str(folder / "job.out"), *options,
                         str(path)).strip()


def state(cluster, job):
    return cluster.slurm("squeue", "-h", "-t", "all", "-j", job, "-o", "%T %r").strip()


def seconds_until(what, condition, timeout_s=30):
    start = time.monotonic()
    wait_for(what, condition, timeout_s)
    return time.monotonic() - start


# Slurm -------------------------------------------------------------------------------------------

def test_four_nodes_run_a_step(cluster):
    said = cluster.slurm("srun", "-N4", "bash", "-c", "echo $SLURMD_NODENAME").split()
    assert sorted(said) == cluster.nodes == ["node1", "node2", "node3", "node4"]


def test_the_partitions_are_there(cluster):
    said = cluster.slurm("sinfo", "-h", "-o", "%P %l %s").splitlines()
    assert sorted(line.split()[0] for line in said) == ["high", "low", "main*", "short"]
    assert "MaxNodes=2" in cluster.slurm("scontrol", "show", "partition", "short", "-o")


def test_gpus_are_given_out(cluster):
    said = cluster.slurm("srun", "-N2", "--gres=gpu:2", "bash", "-c", "echo $CUDA_VISIBLE_DEVICES/$SLURM_GPUS_ON_NODE")
    assert said.split() == ["0,1/2", "0,1/2"]


def test_a_preempted_job_is_requeued_within_seconds(cluster, tmp_path):
    low = submit(cluster, "-p", "low", "-N4", "--exclusive", script="echo start $SLURM_RESTART_COUNT; sleep 100",
                 folder=tmp_path)
    wait_for("the low job to run", lambda: "RUNNING" in state(cluster, low))
    submit(cluster, "-p", "high", "-N1", "--exclusive", "--job-name=high", script="sleep 0.2", folder=tmp_path)
    wait_for("its preemption", lambda: state(cluster, low) == "PENDING BeginTime")
    assert 3 < seconds_until("its restart", lambda: "RUNNING" in state(cluster, low)) < 12
    wait_for("its second start", lambda: "start 1" in (tmp_path / "job.out").read_text())
    cluster.slurm("scancel", low)
    wait_for("no process to be left", lambda: not cluster.processes())


def test_processes_are_listed_by_node(cluster, tmp_path):
    job = submit(cluster, "-N2", script="srun -N2 sleep 97", folder=tmp_path)
    wait_for("two tasks", lambda: len([row for row in cluster.processes() if row[2][1:] == ["97"]]) == 2)
    assert {node for _, node, argv in cluster.processes() if argv[1:] == ["97"]} == {"node1", "node2"}
    cluster.slurm("scancel", job)
    wait_for("no process to be left", lambda: not cluster.processes())


# What a cluster leaves ---------------------------------------------------------------------------

def test_nothing_is_left_after_stop(tmp_path):
    with RealCluster(tmp_path) as cluster:
        keeper = cluster.keeper.pid
        submit(cluster, "-N2", script="setsid -f sleep 98 >/dev/null 2>&1; srun -N2 sleep 98", folder=tmp_path)
        wait_for("escaped process and tasks", lambda: len(cluster.processes()) >= 5)
        below = [pid for pid, _ in descendants(keeper)]
    assert len(below) > 10
    assert not [argv_of(pid) for pid in [keeper, *below] if argv_of(pid)]


def test_a_cluster_ends_with_the_process_that_started_it(tmp_path):
    code = "import sys, time; from real.cluster import RealCluster; RealCluster(sys.argv[1]).start(); time.sleep(100)"
    starter = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=HERE.parent)
    pid_file = tmp_path / "state" / "keeper.pid"
    wait_for("the cluster", lambda: pid_file.exists() and "sinfo" and len(descendants(int(pid_file.read_text()))) >= 6)
    keeper = int(pid_file.read_text())
    starter.kill()
    starter.wait()
    wait_for("the keeper's end", lambda: not argv_of(keeper), timeout_s=10)
    assert free_ports(str(tmp_path)), "its ports are free again"


def test_the_command_line_starts_and_stops_a_cluster(tmp_path):
    def cluster(*words):
        return subprocess.run([sys.executable, str(HERE / "cluster.py"), *words], check=True, capture_output=True,
                              text=True).stdout
    said = cluster("start", str(tmp_path))
    assert said == 'export SLURM_CONF="%s"\n' % (tmp_path / "slurm.conf")
    keeper = int((tmp_path / "state" / "keeper.pid").read_text())
    cluster("stop", str(tmp_path))
    assert not argv_of(keeper)
    assert "node3" in cluster("run", str(tmp_path), "--", "sinfo", "-N")


# Variants ----------------------------------------------------------------------------------------

@pytest.mark.skipif(not CGROUPS.is_dir(), reason="no freezer cgroup (v1) here")
def test_with_cgroups_nothing_outlives_its_job(tmp_path):
    with RealCluster(tmp_path, proctrack="cgroup", kill_wait=2) as cluster:
        submit(cluster, "-N1", script="setsid -f sleep 96 >/dev/null 2>&1; sleep 0.5; touch %s" % (tmp_path / "end"),
               folder=tmp_path)
        wait_for("the escaped process", lambda: any("96" in argv for _, _, argv in cluster.processes()))
        wait_for("the job's end", (tmp_path / "end").exists)
        wait_for("no process to be left", lambda: not cluster.processes())


def test_nodes_can_be_hosts_of_their_own(tmp_path):
    with RealCluster(tmp_path, hosts=True, shared=[tmp_path]) as cluster:
        said = cluster.slurm("srun", "-N2", "bash", "-c", "echo $(hostname) $(hostname -I); touch /tmp/mine.$(hostname)")
        assert sorted(said.splitlines()) == ["%s %s" % (node, cluster.address(node)) for node in ("node1", "node2")]
        said = cluster.slurm("srun", "-N2", "bash", "-c", "cd /tmp; echo mine.*")
        assert sorted(said.split()) == ["mine.node1", "mine.node2"], "each has its own /tmp"
        said = cluster.slurm("srun", "-w", "node1", "-N1", "getent", "hosts", "node4")
        assert said.split() == [cluster.address("node4"), "node4"]


def test_an_ordinary_user_may_run_jobs():
    with tempfile.TemporaryDirectory(dir="/tmp") as folder, RealCluster(folder) as cluster:
        os.chmod(folder, 0o755)           # pytest's own folders are closed to others
        done = subprocess.run(["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "srun", "-N2", "id", "-u"],
                              env=cluster.env, cwd="/", capture_output=True, text=True)
        assert done.stdout.split() == ["65534", "65534"], done.stderr


def test_settings_and_partitions_may_be_changed(tmp_path):
    with RealCluster(tmp_path, KillWait=7, EnforcePartLimits="ALL", partitions={"low": "GraceTime=20 MaxNodes=1"}) as it:
        assert "KillWait                = 7 sec" in it.slurm("scontrol", "show", "config")
        low = it.slurm("scontrol", "show", "partition", "low", "-o")
        assert "GraceTime=20" in low and "MaxNodes=1" in low
        with pytest.raises(RuntimeError, match="Requested time limit is invalid"):
            it.slurm("sbatch", "-p", "short", "-t", "01:00:00", "--wrap", "true")


# The engine --------------------------------------------------------------------------------------

@contextlib.contextmanager
def running(argv, port, ready):
    process = subprocess.Popen([str(word) for word in argv], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for("%s on port %d" % (argv[0], port), lambda: process.poll() is None and ready(port))
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(10)


def healthy(port):
    with contextlib.suppress(OSError):
        return urllib.request.urlopen("http://127.0.0.1:%d/health" % port).status == 200


def connects(port):
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True


def ask(port, **body):
    body = {"messages": [{"role": "user", "content": "Hello, wörld"}], "max_tokens": 40, "temperature": 0, **body}
    request = urllib.request.Request("http://127.0.0.1:%d/v1/chat/completions" % port, json.dumps(body).encode(),
                                     {"Content-Type": "application/json"})
    answer = json.load(urllib.request.urlopen(request))
    return answer["choices"][0]["message"]["content"], answer["usage"]


def server(folder, model, port, *options):
    return [folder / "llama-server", "-m", model, "--host", "127.0.0.1", "--port", port, "-c", 2048, "-np", 2, *options]


def test_the_tiny_model_speaks_ascii_and_the_same_each_time(engine, tmp_path):
    folder, model = engine
    assert model.stat().st_size < 2e6
    assert write_tiny_model(tmp_path / "again.gguf").read_bytes() == model.read_bytes()
    port = free_ports("alone")[0]
    with running(server(folder, model, port), port, healthy):
        text, usage = ask(port)
        assert text.isascii() and text.isprintable() and len(text) > 20
        assert usage["completion_tokens"] == 40
        assert ask(port)[0] == text
        assert ask(port, temperature=1, seed=3)[0] != text


def test_the_model_in_parts_says_the_same_as_the_whole(engine, tmp_path):
    folder, model = engine
    parts = split_model(write_tiny_model(tmp_path / "parts.gguf"), 3)
    assert [path.name for path in parts] == ["parts-0000%d-of-00003.gguf" % number for number in (1, 2, 3)]
    port = free_ports("parts")[0]
    said = []
    for path in (model, parts[0]):
        with running(server(folder, path, port), port, healthy):
            said.append(ask(port)[0])
    assert said[0] == said[1]


def test_the_model_speaks_over_two_rpc_workers(engine):
    folder, model = engine
    first, second, port = free_ports("rpc")[:3]
    worker = folder / "ggml-rpc-server"
    with running([worker, "-H", "127.0.0.1", "-p", first], first, connects), \
            running([worker, "-H", "127.0.0.1", "-p", second], second, connects), \
            running(server(folder, model, port, "--rpc", "127.0.0.1:%d,127.0.0.1:%d" % (first, second), "-ngl", 99),
                    port, healthy):
        assert len(ask(port)[0]) > 20


def test_the_handwritten_script_answers_every_prompt(cluster, engine, tmp_path):
    prompts = tmp_path / "prompts"
    prompts.mkdir()
    for number in range(24):
        (prompts / ("%02d.txt" % number)).write_text("Write a line about %d." % number)
    env = dict(cluster.env, LLAMA=str(engine[0]), MODEL=str(engine[1]), PROMPTS=str(prompts), PYTHON=sys.executable,
               RESULTS=str(tmp_path / "results"), CLIENT=str(HERE / "overhead_handwritten.py"))
    start = time.monotonic()
    job = subprocess.run(["sbatch", "--parsable", "-N3", "-o", str(tmp_path / "job.out"),
                          str(HERE / "overhead_handwritten.sh")], env=env, check=True, stdout=subprocess.PIPE,
                         text=True).stdout.strip()
    wait_for("the job's end", lambda: state(cluster, job).split()[0] not in ("PENDING", "RUNNING", "COMPLETING"), 60)
    print("24 prompts over 3 nodes, handwritten: %.1f s" % (time.monotonic() - start))
    assert state(cluster, job).startswith("COMPLETED"), (tmp_path / "job.out").read_text()
    assert len(list((tmp_path / "results").glob("result_*.txt"))) == 24
    wait_for("no process to be left", lambda: not cluster.processes())


if __name__ == "__main__":
    os.chdir(HERE.parent)
    sys.exit(pytest.main(["-q", "-s", str(HERE)]))
