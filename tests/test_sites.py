"""Sites that differ from ours: a small run on each of them ends as it does here. On a fake Slurm, or (LLMRUN_BENCH=real)
on a real one with the same settings."""

import json
import os
import shutil
import signal
import subprocess

import pytest
from conftest import REAL, wait_for

FEW = 40 if REAL else 8         # prompts in whose midst something can be done
TIMES_OUT_SOON = {"MessageTimeout": 2 if REAL else 1}
LOST_SOON = {"SlurmdTimeout": 10 if REAL else 1}


def slurm(site, *words):
    return subprocess.run(words, env=site.env, text=True, check=True, stdout=subprocess.PIPE).stdout.strip()


def state_in_slurm(site):
    return slurm(site, "squeue", "-h", "-t", "all", "-j", str(site.status()["job"]), "-o", "%T")


def test_where_memory_counts_agents_and_engines_share_what_the_job_has(site_on):
    site = site_on(SelectTypeParameters="CR_Core_Memory")
    site.config(slurm={"nodes": 2, "mem": "1G"})
    site.llmrun("submit", "config.json", "--wait")
    assert site.ended()["done"] == 6 and len(site.lives()) == 1


def test_a_site_that_ends_steps_in_haste_costs_no_more_than_the_lost_agent(site_on):
    site = site_on(KillOnBadExit=1, WaitTime=1)
    site.slow(FEW)
    site.config(slurm={"nodes": 3}, engine={"replicas": 3})
    site.llmrun("submit", "config.json")
    site.answering(4)
    lost = site.status()["nodes"][1]
    os.kill(site.process(" agent " + lost), signal.SIGKILL)
    state = site.ended()
    assert len(site.lives()) == 1 and len(state["lost"]) == 1 and lost in state["lost"][0]
    assert len(site.journal()) == FEW


def test_what_slurm_has_forgotten_is_told_and_resumed_from_the_runs_own_files(site_on):
    site = site_on(MinJobAge=2 if REAL else 1)
    site.slow(FEW)
    site.llmrun("submit", "config.json")
    site.answering()
    site.kill_job()
    is_forgotten(site)
    assert site.status()["state"] == "killed"
    site.llmrun("resume", "--wait")
    is_forgotten(site)
    assert site.ended()["done"] == FEW
    assert json.loads(site.llmrun("status", str(site.status()["job"]), "--json"))["state"] == "done"


def is_forgotten(site):
    job = str(site.status()["job"])
    wait_for("Slurm to forget", lambda: subprocess.run(["squeue", "-h", "-t", "all", "-j", job], env=site.env,
                                                       stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL).returncode)


def test_where_jobs_are_not_requeued_by_default_ours_still_are(site_on):
    site = site_on(JobRequeue=0)
    site.slow(FEW)
    site.llmrun("submit", "config.json")
    site.answering()
    slurm(site, "scancel", "-b", "-s", "USR1", str(site.status()["job"]))
    site.ended()
    assert [end["next"] for end in site.ends()] == ["requeued", ""] and len(site.journal()) == FEW


def test_what_a_site_says_around_the_id_loses_no_job(site_on):
    site = site_on()
    sbatch = shutil.which("sbatch", path=site.env["PATH"])
    site.shim("sbatch", "true", "echo '-> Welcome to node 4711'", f"{sbatch} \"$@\" | sed -E 's/^([0-9]+)$/\\1;cluster/'",
              "code=${PIPESTATUS[0]}", "echo '-> 12 jobs of yours are waiting'", "exit $code")
    site.llmrun("submit", "config.json", "--wait")
    assert site.status()["job"] == 1 and len(site.results()) == 6


def test_the_controllers_own_warning_changes_nothing_for_who_knows_the_limit(site_on):
    site = site_on(**({} if REAL else {"FakeMinute": 18}))
    site.slow(240 if REAL else 16)
    site.config(slurm={"time": "1"})
    site.llmrun("submit", "config.json")
    state = site.ended(timeout_s=200)
    before = site.ends()[:-1]
    assert before or REAL, "a real engine may be through within the minute, of which the warning leaves half"
    assert all(end["next"] == "requeued" and end["why"] == "the time limit came" for end in before)
    assert all(line["llmrun"]["ok"] for line in site.journal()) and len(site.journal()) == state["total"], "nothing was cut off"


def test_a_controller_that_hangs_stops_no_answers(site_on):
    site = site_on(**TIMES_OUT_SOON)
    site.slow(FEW)
    site.config(slurm={"nodes": 2})
    site.llmrun("submit", "config.json")
    site.answering()
    site.cluster.hang()
    before = len(site.journal())
    assert "timed out" in site.llmrun("status", code=3)
    wait_for("answers while it hangs", lambda: len(site.journal()) > before + 2)
    site.cluster.go_on()
    site.ended()
    assert len(site.lives()) == 1 and len(site.journal()) == FEW


def test_a_submit_to_a_controller_that_hangs_says_so_in_a_line(site_on):
    site = site_on(**TIMES_OUT_SOON)
    site.cluster.hang()
    said = site.llmrun("submit", "config.json", code=3)
    assert "timed out" in said and len(said.splitlines()) <= 3, said
    site.cluster.go_on()


def test_nodes_that_must_be_made_ready_first_are_waited_for(site_on, tmp_path):
    prolog = tmp_path / "prolog"
    prolog.write_text(f"#!/bin/sh\nwhile [ ! -e {tmp_path}/ready ]; do sleep 0.05; done\n")
    prolog.chmod(0o755)
    site = site_on(PrologSlurmctld=prolog)
    site.config(slurm={"nodes": 2})
    site.llmrun("submit", "config.json")
    wait_for("the state", lambda: state_in_slurm(site) == "CONFIGURING")
    state = site.status()
    assert (state["state"], state["exit_code"]) == ("starting", None)
    (tmp_path / "ready").touch()
    assert site.ended()["done"] == 6 and len(site.lives()) == 1


def test_a_slurmd_that_dies_costs_its_node_and_no_prompt(site_on):
    site = site_on(**LOST_SOON)
    site.slow(FEW)
    site.config(slurm={"nodes": 3, "nodelist": "node[1-3]"}, engine={"replicas": 3})
    site.llmrun("submit", "config.json")
    site.answering(4)
    site.cluster.lose_node("node2")
    state = site.ended(timeout_s=120)
    assert len(site.lives()) == 1 and "node2" in state["lost"][0] and len(site.journal()) == FEW


def test_the_drivers_own_node_lost_starts_the_job_elsewhere(site_on):
    site = site_on(**LOST_SOON)
    site.slow(FEW)
    site.llmrun("submit", "config.json")
    site.answering()
    job, node = site.status()["job"], site.status()["nodes"][0]
    site.cluster.lose_node(node)
    state = site.ended(timeout_s=120)
    starts = [event for event in site.events() if event["event"] == "start"]
    assert [name.split(".")[:2] for name in site.lives()] == [[str(job), "0"], [str(job), "1"]]
    assert node not in starts[-1]["nodes"] and state["done"] == FEW and len(site.journal()) == FEW


def test_on_nodes_with_names_of_their_own_slurm_tells_who_lives(site_on):
    site = site_on(hosts=True)
    site.slow(FEW)
    site.config(slurm={"nodes": 2})
    site.llmrun("submit", "config.json")
    site.answering()
    assert site.status()["state"] == "answering" and site.status()["exit_code"] is None
    site.kill_job()
    wait_for("the verdict", lambda: site.status()["state"] == "killed")


def test_an_order_that_slurm_did_not_answer_is_not_given_twice(site_on):
    """It hears it all the same, later: neither a second job nor a resume by hand is called for."""
    site = site_on(kill_wait=20, **TIMES_OUT_SOON)
    site.slow(FEW)
    site.llmrun("submit", "config.json")
    site.answering()
    site.cluster.hang()
    start, = [event for event in site.events() if event["event"] == "start"]
    os.kill(start["pid"], signal.SIGUSR1)
    wait_for("a try", lambda: "asking again" in site.job_output(), 40)
    site.cluster.go_on()
    assert site.ended()["done"] == FEW
    assert [end["next"] for end in site.ends()] == ["requeued", ""] and len(site.journal()) == FEW
    assert len(slurm(site, "squeue", "-h", "-t", "all", "-o", "%A").split()) == 1


def test_a_limit_that_is_lowered_while_the_job_runs_is_heard_of(site_on):
    site = site_on(**({} if REAL else {"FakeMinute": 12}))
    site.slow(240 if REAL else 60)
    site.config(slurm={"time": "6"})
    site.llmrun("submit", "config.json")
    site.answering()
    slurm(site, "scontrol", "update", f"JobId={site.status()['job']}", "TimeLimit=1")
    site.wait_for_event("end", 150)
    # The warning is Slurm's first word of it, and looks like a user's: a real one's comes before its answer is read.
    assert site.ends()[0]["next"] == "requeued"
    assert site.ends()[0]["why"] in ("the time limit came", "told to finish what is under way (SIGUSR1)")
    site.llmrun("cancel")


def shows_partitions(site, words):
    """A site whose `scontrol show partition` goes through this filter."""
    real = shutil.which("scontrol", path=site.cluster.env.get("PATH", os.environ["PATH"]))
    site.shim("scontrol", '[[ "$1 $2" = "show partition" ]]', f"{real} \"$@\" | {words}", "exit")


def test_a_partition_that_is_hidden_is_slurms_to_judge(site):
    """AllowGroups and Hidden=YES keep it out of what users are shown, not from what they may ask for."""
    shows_partitions(site, "grep -v PartitionName=short")
    site.llmrun("check", "config.json", "--set", "slurm.partition=short", "--set", "slurm.time=00:02:00")
    said = site.llmrun("check", "config.json", "--set", "slurm.partition=mian", code=2)
    assert '[slurm] partition = "mian"' in said and "invalid partition" in said


@pytest.mark.parametrize("by", ["SBATCH_PARTITION", "slurm.extra.partition", "slurm.directives"])
def test_limits_of_the_default_partition_are_not_those_of_the_one_that_is_asked_for_otherwise(site, by):
    shows_partitions(site, "sed '/PartitionName=main/s/MaxTime=[0-9:]*/MaxTime=00:01:00/'")
    assert "[slurm] time" in site.llmrun("check", "config.json", code=2), "of the default one it is"
    value = '["--partition=low"]' if "directives" in by else "low"
    if by == "SBATCH_PARTITION":
        site.env[by] = value
        site.llmrun("check", "config.json")
    else:
        site.llmrun("check", "config.json", "--set", f"{by}={value}")


def test_what_sbatch_is_told_by_the_environment_wins_over_the_config_and_is_not_judged_by_it(site):
    """Slurm takes SBATCH_PARTITION before a script's own lines."""
    site.env["SBATCH_PARTITION"] = "low"
    said = site.llmrun("check", "config.json", "--set", "slurm.partition=short", "--set", "slurm.nodes=3")
    assert "in partition low" in said
