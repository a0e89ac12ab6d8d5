"""What somebody meets who uses it for a week: a second cancel, a deleted folder, a job that joins, a terminal left by Ctrl-C."""

import json
import re
import shutil
import signal
import subprocess
import time

import llmrun
from conftest import wait_for


def test_after_a_second_cancel_the_counts_are_those_of_the_journals(site):
    site.slow()
    site.llmrun("submit", "config.json")
    site.answering()
    site.llmrun("cancel")
    first = site.ended(4)
    assert (first["state"], first["detail"]) == ("stopped", "cancelled by you")
    site.llmrun("resume")
    site.answering(first["done"] + 3)
    site.llmrun("cancel")
    again = site.ended(4)
    assert again["done"] == len(site.journal()) > first["done"] and again["detail"] == "cancelled by you"
    said = site.llmrun("status", site.run.name)
    assert f"{again['done']}/40 prompts" in said and re.search(r"all jobs  \d+ \d+\n", said) and "(of" not in said


def test_to_ask_failed_prompts_again_is_waited_for(site):
    """The run was finished before, with a verdict of its own."""
    (site.folder / "prompts" / "part0" / "000.txt").write_text("much too long " * 300 + "\n")
    site.config(engine={"context": 256})
    site.llmrun("submit", "config.json", "--wait", code=1)
    said = site.llmrun("resume", "--failed", "--set", "engine.context=65536", "--wait")
    assert len(site.ends()) == 2 and "All 6 prompts are answered" in said and site.status()["failed"] == 0


def test_who_cancels_a_job_that_waits_is_told_so(site_on):
    site = site_on()
    site.config(slurm={"extra": {"begin": "now+600"}})
    site.llmrun("submit", "config.json")
    assert "no logs yet: pending" in site.llmrun("logs")
    site.llmrun("results")
    assert "no answers yet: pending" in site.output
    site.llmrun("cancel")
    state = wait_for("the end", lambda: site.status()["exit_code"] is not None and site.status())
    assert (state["state"], state["exit_code"], state["detail"]) == ("stopped", 4, "cancelled by you")


def test_a_job_whose_folder_was_deleted_ends(site_on):
    """Nothing can name it any more, and nobody wants its answers."""
    site = site_on()
    site.slow()
    site.amend("", "Orders.GONE_S = 1.0")
    site.llmrun("submit", "config.json")
    site.answering()
    looking = [site.start(*words) for words in (("status", "-f"), ("logs", "-f"))]
    site.wait_for_event("ready")
    wait_for("them to look", lambda: len(site.lives()) == 1 and all(one.poll() is None for one in looking))
    time.sleep(1)  # Python has started
    shutil.rmtree(site.run)
    for one in looking:
        output, _ = one.communicate(timeout=20)
        assert one.returncode == 3 and "the run's folder is gone" in output, output
    site.assert_nothing_left(20)


def test_cancel_means_the_newest_run_that_is_not_over(site):
    site.slow(400)
    site.llmrun("submit", "config.json")
    first = llmrun.Run(site.run)
    site.answering()
    time.sleep(1)  # names have seconds
    site.llmrun("submit", "config.json")
    site.llmrun("cancel", site.run.name)
    site.ended(4)
    assert f"job {first.submitted()[0]}: cancelled" in site.llmrun("cancel")
    wait_for("the end", lambda: llmrun.state_of(first, {})["detail"] == "cancelled by you", 30)


def test_the_rate_of_jobs_that_worked_side_by_side_is_that_of_all(tmp_path):
    def life(job, began, ended, tokens):
        events = [{"event": "start", "time": began - 5, "job": job, "submitted": job, "nodes": ["n1"], "pid": 1, "born": 1, "host": "elsewhere"},
                  {"event": "progress", "time": ended, "answers": 1, "tokens": tokens, "working_s": ended - began},
                  {"event": "end", "time": ended, "code": 0, "why": "", "next": ""}]
        return llmrun.LifeState(llmrun.Life(job, 0, 0), events, None)
    side_by_side = [life(1, 100.0, 110.0, 1000), life(2, 105.0, 115.0, 1000), life(3, 200.0, 205.0, 500)]
    assert llmrun.ended_facts(side_by_side)["tokens_per_s"] == 2500 / 20


def test_a_job_without_a_folder_can_be_cancelled(site_on):
    site = site_on()
    site.config(slurm={"extra": {"begin": "now+600"}})
    site.llmrun("submit", "config.json")
    other = subprocess.run(["sbatch", "--parsable", "--begin=now+600", "--wrap", "sleep 1"], env=site.env, cwd=site.folder,
                           stdout=subprocess.PIPE, text=True, check=True).stdout.strip()
    shutil.rmtree(site.run)
    assert "job 1: cancelled; the folder of its run is not here" in site.llmrun("cancel", "1")
    assert "job 1 has ended already" in site.llmrun("cancel", "1")
    site.llmrun("cancel", other, code=2)
    slurm = llmrun.Slurm(site.env)
    jobs = slurm.jobs([1, int(other)])
    assert jobs[int(other)].state == "PENDING", "another program's job is none of ours"
    slurm.cancel([int(other)])


def test_a_job_that_joins_has_the_shape_of_its_own_config_or_the_first(site):
    site.slow(60)
    site.llmrun("submit", "config.json")
    site.answering()
    run = site.run
    other = dict(site.data, slurm={"nodes": 2, "time": "00:05:00"}, engine={**site.data["engine"], "slots": 3})
    (site.folder / "other.json").write_text(json.dumps(other))
    site.llmrun("submit", "--join", run, "other.json")
    site.llmrun("submit", "--join", run)
    submits = llmrun.Run(run).submits()
    shapes = {job: llmrun.Run(run).config(record["shape"]) for job, record in submits.items()}
    assert [(config.slurm.nodes, config.engine.slots) for config in shapes.values()] == [(1, 2), (2, 3), (1, 2)]
    asks_other = dict(other, prompts={**site.data["prompts"], "max_tokens": 3})
    (site.folder / "asks.json").write_text(json.dumps(asks_other))
    said = site.llmrun("submit", "--join", run, "asks.json", code=2)
    assert 'did you mean "slurm.nodes"?' in site.llmrun("submit", "--join", run, "--set", "nodes=3", code=2)
    assert "[prompts] differs" in said and "slurm, engine, environment, network, model" in said
    site.llmrun("cancel")
    site.ended(4)


def test_a_run_of_several_nodes_is_not_taken_for_one_of_this_machine(site):
    site.config(slurm={"nodes": 3})
    said = site.llmrun("run", "config.json", code=2)
    assert "would stand for all 3 nodes" in said and "--here" in said and "submit" in said and not site.runs()


def test_ctrl_c_ends_the_looking_and_says_how_to_look_again(site):
    site.slow()
    waiting = site.start("submit", "config.json", "--wait")
    site.answering()
    waiting.send_signal(signal.SIGINT)
    output, _ = waiting.communicate(timeout=20)
    name = site.run.name
    assert waiting.returncode == 130 and f"status -f {name}" in output and f"cancel {name}" in output
    looking = site.start("status", "-f")
    wait_for("the run to go on", lambda: site.status()["state"] == "answering")
    site.llmrun("cancel")
    output, _ = looking.communicate(timeout=30)
    assert looking.returncode == 4 and output.count("cancelled by you") == 1


def test_logs_show_how_far_it_is(site):
    site.slow()
    site.llmrun("submit", "config.json")
    following = site.start("logs", "-f")
    site.ended()
    output, _ = following.communicate(timeout=30)
    assert re.search(r"ready(.|\n)*\d\d:\d\d:\d\d answering, \d+/40 prompts(.|\n)* end ", output), output


def test_a_time_limit_is_shown_as_slurm_takes_it(site):
    site.config(slurm={"time": "00:10"})
    said = site.llmrun("check", "config.json")
    assert 'nodes     1 for up to 1 minute (time = "00:10")' in said


def test_the_end_of_the_jobs_time_is_told_beside_what_is_left():
    state = {"state": "answering", "done": 5, "total": 100, "failed": 0, "tokens_per_s": 3, "left_s": 900, "ends_in_s": 40, "detail": ""}
    assert llmrun.state_line(state).endswith("about 15m00s left, the job's time ends in 40s")
    assert "ends" not in llmrun.state_line({**state, "ends_in_s": 1000})


def test_results_are_as_new_as_the_last_lifes_end(site_on):
    site = site_on()
    site.slow(60)
    site.config(slurm={"time": "00:01:00", "grace": "5s"})
    site.llmrun("submit", "config.json")
    site.answering(4)
    subprocess.run(["scancel", "-b", "-s", "USR1", "1"], env=site.env, check=True)
    wait_for("a life to end", site.ends, 90)
    done = site.ends()[0]["done"]
    wait_for("its results", lambda: (site.run / "results" / "results.jsonl").exists(), 20)
    assert len((site.run / "results" / "results.jsonl").read_text().splitlines()) >= done
    site.llmrun("cancel")
    wait_for("the end", lambda: site.status()["exit_code"] is not None, 30)


def test_numbers_agree_with_their_nouns(here):
    here.write_prompts(1)
    said = here.llmrun("run", "--here", "config.json")
    assert re.search(r"The prompt is answered in \d+s", said) and "1 prompts" not in said
