"""What becomes of a run when Slurm takes its nodes away, its time ends, or its engine dies: no finished prompt is lost,
and nobody has to do anything. On a fake Slurm, or (LLMRUN_BENCH=real) on a real one."""

import json
import os
import re
import signal
import subprocess

import pytest
from conftest import REAL, SOME, wait_for

SLOT = "export SLURM_JOB_END_TIME=$(( $(date +%s) + 22 ))"  # a time limit in seconds; Slurm's own are whole minutes


def test_a_batch_of_three_time_slots_is_one_submit(site_on):
    site = site_on()
    site.slow(60)
    site.config(environment={"setup": [SLOT]}, slurm={"nodes": 2})
    site.llmrun("submit", "config.json")
    site.ended()
    assert len(site.lives()) >= 3 and all(name.split(".")[0] == site.lives()[0].split(".")[0] for name in site.lives())
    assert {end["next"] for end in site.ends()[:-1]} == {"requeued"}
    assert all(line["llmrun"]["ok"] for line in site.journal()) and len(site.journal()) == 60, "nothing asked twice"


@pytest.mark.parametrize("proctrack", ["cgroup", "linuxproc"])
def test_an_early_warning_lets_running_prompts_finish_and_the_job_goes_on(site_on, proctrack):
    site = site_on(proctrack=proctrack)
    site.slow(SOME)
    site.llmrun("submit", "config.json")
    site.answering()
    subprocess.run(["scancel", "-b", "-s", "USR1", str(site.status()["job"])], env=site.env, check=True)
    site.ended()
    assert [end["next"] for end in site.ends()] == ["requeued", ""]
    assert all(line["llmrun"]["ok"] for line in site.journal()) and len(site.journal()) == SOME, "nothing was cut off"


@pytest.mark.parametrize("words", ["PreemptMode=REQUEUE", "PreemptMode=REQUEUE GraceTime=20",
                                   "PreemptMode=CANCEL", "PreemptMode=CANCEL GraceTime=20"])
def test_a_preempted_run_comes_back_and_finishes(site_on, words):
    site = site_on(partitions={"low": words})
    site.slow(SOME)
    site.config(slurm={"nodes": 2, "partition": "low"})
    site.llmrun("submit", "config.json")
    site.answering(4)
    site.preempt()
    state = site.ended()
    before, after = site.ends()[0], site.ends()[-1]
    assert len(site.lives()) == 2 and before["code"] == 4 and after["code"] == 0
    if "GraceTime" in words:
        assert "preempted" in before["why"]
    assert before["next"] == "requeued"
    assert len(site.journal()) == state["total"], "every finished prompt was kept"


def test_a_suspended_run_goes_on_where_it_was(site_on):
    shared = " OverSubscribe=FORCE:1" * REAL  # which a real Slurm needs to suspend, and the gang scheduler
    site = site_on(partitions={"low": "PreemptMode=SUSPEND" + shared, "high": shared.strip()},
                   **({"PreemptMode": "SUSPEND,GANG"} if REAL else {}))
    site.slow(SOME)
    site.config(slurm={"partition": "low"})
    site.llmrun("submit", "config.json")
    site.answering()
    site.preempt(15 if REAL else 3)  # longer than a stalled agent may be silent, on the real one
    wait_for("the suspension", lambda: site.status()["state"] == "suspended")
    site.ended()
    assert len(site.lives()) == 1


def test_scancel_is_the_end(site_on):
    site = site_on()
    site.slow(SOME)
    site.llmrun("submit", "config.json")
    site.answering()
    subprocess.run(["scancel", str(site.status()["job"])], env=site.env, check=True)
    state = site.ended(code=4)
    assert "cancelled" in state["detail"] and site.ends()[0]["next"] == ""
    site.assert_nothing_left(8)


def test_cancel_drain_lets_running_prompts_finish(site_on):
    site = site_on()
    site.slow(SOME)
    site.llmrun("submit", "config.json")
    site.answering()
    assert "finishes what is under way" in site.llmrun("cancel", "--drain")
    state = site.ended(code=4)
    assert 2 <= state["done"] < SOME and all(line["llmrun"]["ok"] for line in site.journal())
    assert site.ends()[0]["next"] == "" and len(site.lives()) == 1
    site.llmrun("resume", "--wait")
    assert site.ended()["done"] == SOME


@pytest.mark.parametrize("victim", ["/llama-server ", "-H"])
def test_an_engine_that_died_is_started_again(site_on, victim):
    site = site_on()
    site.slow(SOME)
    site.config(slurm={"nodes": 2})
    site.llmrun("submit", "config.json")
    site.answering()
    os.kill(site.process(victim), signal.SIGKILL)
    site.ended()
    died, = [event["why"] for event in site.events() if event["event"] == "engine_died"]
    program = "llama-server" if "llama" in victim else "rpc"
    assert re.match(rf"{program} on .*: .*most likely for memory \(was killed by SIGKILL\)", died), died
    assert len(site.lives()) == 1 and len([e for e in site.events() if e["event"] == "ready"]) == 2
    assert len(site.journal()) == SOME, "no prompt was answered twice"


def test_a_run_with_a_replica_left_goes_on_without_a_lost_node(site_on):
    site = site_on()
    site.slow(SOME)
    site.config(slurm={"nodes": 2}, engine={"replicas": 2})
    site.llmrun("submit", "config.json")
    site.answering(4)
    nodes = site.status()["nodes"]
    os.kill(site.process(" agent " + nodes[1]), signal.SIGKILL)
    state = site.ended()
    assert len(site.lives()) == 1 and nodes[1] in state["lost"][0]


def test_without_a_replica_left_another_job_goes_on_elsewhere(site_on):
    site = site_on()
    site.slow(SOME)
    site.config(slurm={"nodes": 2})
    site.llmrun("submit", "config.json")
    site.answering()
    nodes = site.status()["nodes"]
    os.kill(site.process(" agent " + nodes[1]), signal.SIGKILL)
    state = site.ended()
    assert nodes[1] in state["lost"][0] and site.ends()[0]["next"] == "successor"
    starts = [event for event in site.events() if event["event"] == "start"]
    assert nodes[1] in starts[0]["nodes"] and nodes[1] not in starts[1]["nodes"]


def test_a_node_that_never_joins_is_named_and_not_asked_for_again(site_on):
    site = site_on()
    site.shim("srun", '[[ "$*" == *"-w node2 "* ]]', "exec sleep 60")
    site.config(slurm={"nodes": 2, "join_timeout": "2s"})
    site.llmrun("submit", "config.json")
    state = site.ended()
    starts = [event for event in site.events() if event["event"] == "start"]
    assert len(starts) == 2 and "node2" in starts[0]["nodes"] and "node2" not in starts[1]["nodes"]
    assert "node2" in state["lost"][0]


def test_replicas_go_on_without_a_node_that_never_joins(site_on):
    site = site_on()
    site.shim("srun", '[[ "$*" == *"-w node2 "* ]]', "exec sleep 60")
    site.config(slurm={"nodes": 3, "join_timeout": "2s"}, engine={"replicas": 3})
    site.llmrun("submit", "config.json")
    state = site.ended()
    assert len(site.lives()) == 1 and "node2" in state["lost"][0]

@pytest.mark.parametrize("may_submit", [True, False])
def test_where_requeue_is_refused_another_job_goes_on_or_the_user_is_told_how(site_on, may_submit):
    site = site_on()
    site.slow(SOME)
    site.shim("scontrol", '[ "$1" = requeue ]', "echo 'Requested operation is presently disabled for job' >&2", "exit 1")
    if not may_submit:
        site.shim("sbatch", '[ -n "$SLURMD_NODENAME" ]', "echo 'sbatch: error: not from compute nodes' >&2", "exit 1")
    site.llmrun("submit", "config.json")
    site.answering()
    subprocess.run(["scancel", "-b", "-s", "USR1", str(site.status()["job"])], env=site.env, check=True)
    if may_submit:
        site.ended()
        assert site.ends()[0]["next"] == "successor" and "presently disabled" in site.ends()[0]["why"]
    else:
        state = site.ended(code=4)
        assert f"python llmrun.py resume {site.run.name}" in state["detail"] and "compute nodes" in state["detail"]
        site.llmrun("resume", "--wait")
        site.ended()


def test_an_array_shares_the_prompts_and_ends_together(site_on):
    site = site_on()
    site.slow(24)
    site.config(slurm={"jobs": 4}, engine={"slots": 1})  # so slow that a job which starts late still finds work
    site.llmrun("submit", "config.json", "--wait")
    state = site.ended()
    assert state["done"] == 24 and len(site.journal()) == 24, "each prompt was asked once"
    by_life = [len(path.read_text().splitlines()) for path in site.run.glob("journal/*.jsonl")]
    assert len(by_life) == 4 and min(by_life) >= 2, by_life
    wait_for("all lives to end", lambda: len(site.ends()) == 4)


def test_waiting_tasks_are_cancelled_when_the_work_is_done(site_on):
    site = site_on()
    site.config(slurm={"jobs": 6, "max_running": 1})
    site.llmrun("submit", "config.json", "--wait")
    site.ended()

    def queue(*options):
        return subprocess.run(["squeue", "-h", "-r", "-o", "%T", *options], env=site.env, stdout=subprocess.PIPE, text=True).stdout
    wait_for("the queue to be empty", lambda: not queue())
    assert len(site.lives()) == 1, "none of the others began"
    others = 1 if REAL else 5  # a real Slurm keeps those of an array that never began as one
    assert sorted(queue("-t", "all").split()) == ["CANCELLED"] * others + ["COMPLETED"]


def test_another_job_of_another_shape_joins(site_on):
    site = site_on()
    site.slow(SOME)
    site.llmrun("submit", "config.json")
    site.answering()
    run = site.run
    assert "cannot be changed" in site.llmrun("submit", "--join", run, "--set", "prompts.max_tokens=3", code=2)
    assert "submitted job" in site.llmrun("submit", "--join", run, "--set", "slurm.nodes=2", "--set", "engine.slots=4")
    site.ended()
    assert len(site.journal()) == SOME and len(list(run.glob("journal/*.jsonl"))) == 2
    assert json.loads((run / "shapes" / "1" / "config.json").read_text())["slurm"]["nodes"] == 2
    assert "is finished" in site.llmrun("submit", "--join", run, "--set", "slurm.nodes=1")
    assert len(list(run.glob("shapes/*"))) == 2, "nothing more was submitted"


def test_resume_goes_on_with_a_run_whose_driver_was_killed(site_on):
    site = site_on()
    site.slow(SOME)
    site.llmrun("submit", "config.json")
    site.answering()
    said = site.llmrun("resume", code=2)
    assert "there is nothing to resume" in said
    site.kill_job()
    wait_for("the verdict", lambda: site.status()["state"] == "killed")
    site.llmrun("resume", "--wait")
    site.ended()
    assert "is finished" in site.llmrun("resume")


def test_a_killed_driver_is_followed_by_another_at_once(site_on):
    site = site_on()
    site.slow(SOME)
    site.llmrun("submit", "config.json")
    site.answering()
    site.kill_driver()
    site.ended()
    assert [name.split(".")[1:] for name in site.lives()] == [["0", "0"], ["0", "1"]], "the same job, and no requeue"


def test_a_batch_process_that_was_killed_alone_comes_back(site_on):
    site = site_on()
    site.slow(SOME)
    site.llmrun("submit", "config.json")
    site.answering()
    os.kill(min(pid for pid, argv in site.processes() if "drive" in argv), signal.SIGKILL)
    site.ended()
    assert site.ends()[0]["next"] == "requeued" and "batch process" in site.ends()[0]["why"]
