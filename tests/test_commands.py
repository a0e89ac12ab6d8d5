"""What users type, beyond a run that goes well."""

import csv
import json
import os
import signal
import subprocess
import sys
import time

import llmrun
import pytest
from conftest import wait_for
from test_others import shown_on_terminal


@pytest.fixture
def here(here):
    """A user without Slurm whose engine only repeats."""
    here.config(engine={"name": "echo"})
    return here


def test_a_dry_run_prints_the_script_and_makes_nothing(here):
    said = here.llmrun("submit", "config.json", "--dry-run")
    assert said.startswith("#!/bin/bash") and "#SBATCH --time=00:10:00" in said and not (here.folder / "runs").exists()


def test_init_overwrites_nothing(here):
    here.llmrun("init", "new")
    config = here.folder / "new" / "config.toml"
    config.write_text("mine")
    (here.folder / "new" / "prompts" / "system.txt").unlink()
    assert "config.toml: is already there" in here.llmrun("init", "new", code=2)
    assert config.read_text() == "mine" and not (here.folder / "new" / "prompts" / "system.txt").exists()


def test_nodes_that_cannot_be_split_among_the_replicas_are_refused(here):
    said = here.llmrun("run", "--here", "config.json", "--set", "slurm.nodes=3", "--set", "engine.replicas=2", code=2)
    assert "3 nodes cannot be split into 2 equal groups" in said and "a multiple of 2" in said and not here.runs()


def test_the_reader_of_a_command_may_leave(here):
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "llmrun.py", "help", "config"], cwd=here.folder, env=here.env, text=True, stdout=write,
                          stderr=subprocess.PIPE)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_newest_run_is_meant_and_its_counts_are_those_of_the_journal(here):
    here.llmrun("run", "--here", "config.json", "--set", "name=first")
    here.llmrun("run", "--here", "config.json", "--set", "name=second")
    assert here.llmrun("status").count("done") == 2
    assert json.loads(here.llmrun("results", "--json").splitlines()[0])["custom_id"] == "part0/000.txt"
    newest = max(here.runs(), key=lambda run: run.name.startswith("second"))
    for path in (*here.runs(), here.folder / "runs"):
        os.utime(path)  # a look into a folder does not make it newer
    assert newest.name in here.llmrun("logs", "--json") and "second" in here.llmrun("cancel")
    summary = json.loads((newest / "summary.json").read_text())
    lines = [json.loads(line) for path in newest.glob("journal/*.jsonl") for line in path.read_text().splitlines()]
    assert summary["answered"] == len(lines) == 6 and summary["failed"] == 0
    assert summary["completion_tokens"] == sum(line["response"]["body"]["usage"]["completion_tokens"] for line in lines)


def test_run_passes_on_that_it_was_told_to_end(here):
    here.config(engine={"args": ["5"]})
    running = here.start("run", "--here", "config.json")
    here.wait_for_event("ready")
    running.send_signal(signal.SIGTERM)
    running.communicate(timeout=10)
    assert running.returncode == 4
    here.assert_nothing_left(5)
    assert here.ends()[0]["code"] == 4


def test_a_run_whose_answers_are_all_empty_has_not_gone_well(here, engine):
    here.config(engine={"name": "llama.cpp"}, environment={"vars": {"FAKE_LLAMA_EMPTY": "1"}})
    said = here.llmrun("run", "--here", "config.json", code=1)
    wait_for("the summary", (here.run / "summary.json").exists)
    assert "answers are empty" in said + json.loads((here.run / "summary.json").read_text())["why"]


def test_failed_prompts_are_shown_alone_and_asked_again_alone(here):
    here.config(engine={"name": "llama.cpp"})
    asked = here.folder / "prompts" / "part0" / "000.txt"
    asked.write_text("word " * 5000)
    here.llmrun("run", "--here", "config.json", code=1)
    failed, = map(json.loads, here.llmrun("results", "--failed", "--json").splitlines())
    assert failed["custom_id"] == "part0/000.txt" and not failed["llmrun"]["ok"]
    assert len(here.llmrun("results", "--json").splitlines()) == 6
    here.llmrun("resume", "--failed", code=1)
    names = [line["custom_id"] for line in here.journal()]
    assert len(names) == 7 and names.count("part0/000.txt") == 2
    assert json.loads((here.run / "summary.json").read_text())["failed"] == 1


@pytest.mark.parametrize("words", ["logs -f", "results -f"])
def test_whoever_interrupts_twice_reads_no_more_than_who_does_once(here, words):
    here.config(engine={"args": ["3"]})
    running = here.start("run", "config.json")
    here.wait_for_event("ready")
    for pause_s in (0, 0.001, 0.003, 0.01, 0.02):
        following = here.start(*words.split())
        assert following.stdout.readline(), "it shows what there is"
        for _ in range(2):
            following.send_signal(signal.SIGINT)
            time.sleep(pause_s)
        said, _ = following.communicate(timeout=10)
        assert "Traceback" not in said and following.returncode == 130, said
    running.send_signal(signal.SIGTERM)
    running.communicate(timeout=10)


# ── results ────────────────────────────────────────────────────────────────────


@pytest.fixture
def sampled(here):
    """A user without Slurm whose rows were each asked twice, and answered."""
    (here.folder / "in.csv").write_text('id,word,answer\n1,sea,Meer\n2,"sky, blue",Himmel\n')
    here.config(prompts={"user": "in.csv", "template": "Say {word}", "samples": 2}, results={"columns": ["error"]})
    here.llmrun("run", "config.json")
    return here


def test_results_that_are_followed_on_a_terminal_have_one_header(here):
    here.config(engine={"args": ["0.8"]})
    running = here.start("run", "config.json")
    here.wait_for_event("ready")
    lines = shown_on_terminal(here.folder, "results", "-f").splitlines()
    running.communicate(timeout=20)
    assert [line.split()[0] for line in lines if line.startswith("P")] == ["PROMPT"] and "PROMPT" in lines[0]
    assert sorted(line.split()[0] for line in lines[1:]) == sorted(here.results()), lines
    assert len({line.index("Question") for line in lines[1:]}) == 1, "the columns of all batches are one below the other"


def test_each_form_of_results_tells_the_samples_apart(sampled):
    def shown(*words):
        return sampled.llmrun("results", *words).splitlines()
    names, numbers = ["in-1#1", "in-1#2", "in-2#1", "in-2#2"], [("1", "0"), ("2", "1")] * 2
    assert [tuple(line.split("\t")[:3]) for line in shown()] == [(name, *number) for name, number in zip(names, numbers)]
    rows = list(csv.DictReader(shown("--format", "csv")))
    assert [(row["custom_id"], (row["sample"], row["seed"])) for row in rows] == list(zip(names, numbers))
    records = [json.loads(line) for line in shown("--json")]
    assert [(r["custom_id"], (str(r["llmrun"]["sample"]), str(r["llmrun"]["seed"]))) for r in records] == list(zip(names, numbers))
    assert [line for line in shown("--format", "text") if line.startswith("──")] == [f"── {name}" for name in names]


def test_results_can_show_what_was_asked_and_the_rows_own_columns(sampled):
    row = list(csv.DictReader(sampled.llmrun("results", "--format", "csv").splitlines()))[1]
    assert float(row.pop("time_s")) >= 0 <= float(row.pop("waited_s")) and row == {"custom_id": "in-1#2", "sample": "2", "seed": "1", "id": "1", "word": "sea", "answer": "Meer", "prompt": "Say sea",
                   "answer_2": "Say sea", "reasoning": "", "finish_reason": "stop", "prompt_tokens": "2", "completion_tokens": "2", "error": ""}
    wanted = ["results", "--columns", "word, sample,prompt,answer,answer_2", "--format"]
    said = [["word", "sample", "prompt", "answer", "answer_2"], ["sea", "1", "Say sea", "Meer", "Say sea"], ["sea", "2", "Say sea", "Meer", "Say sea"]]
    assert list(csv.reader(sampled.llmrun(*wanted, "csv").splitlines()))[:3] == said
    assert [line.split("\t") for line in sampled.llmrun(*wanted, "table", "--header").splitlines()][:3] == said
    assert sampled.llmrun("results", "--header").splitlines()[0].split("\t") == ["PROMPT", "SAMPLE", "SEED", "TOKENS", "TIME", "WAITED", "ANSWER"]
    said = sampled.llmrun("results", "--columns", "wrod", code=2)
    assert '--columns wrod: no such column; did you mean "word"?' in said
    assert "--columns word: jsonl has no columns; add --format csv" in sampled.llmrun("results", "--columns", "word", "--json", code=2)
    (sampled.folder / "in.csv").write_text("id,word,answer\n1,other,x\n")
    rows = list(csv.DictReader(sampled.llmrun("results", "--format", "csv").splitlines()))
    assert [(row["word"], row["prompt"], row["answer_2"]) for row in rows[:2]] == [("", "", "Say sea")] * 2, "what was asked is not there any more"


def test_what_was_asked_is_shown_of_texts_and_of_requests(here):
    body = {"messages": [{"role": "system", "content": "x"}, {"role": "user", "content": "hi"}]}
    (here.folder / "prompts" / "in.jsonl").write_text(json.dumps({"custom_id": "a", "body": body}) + "\n")
    (here.folder / "prompts" / "more.jsonl").write_text('{"word": "sea", "n": [1, null]}\n')
    here.config(prompts={"user": "prompts/*", "template": "{word}?"})
    here.llmrun("run", "config.json")
    rows = {row["custom_id"]: row for row in csv.DictReader(here.llmrun("results", "--format", "csv").splitlines())}
    assert rows["a"]["prompt"] == "hi" and rows["a"]["word"] == ""
    assert (rows["more-1"]["prompt"], rows["more-1"]["n"]) == ("sea?", "[1, null]")
    assert [row["n"] for name, row in rows.items() if name != "more-1"] == [""] * (len(rows) - 1) and len(rows) == 8
    here.config(prompts={"user": "prompts/part0", "template": ""})
    here.llmrun("run", "config.json")
    assert "000.txt\tQuestion 0: what comes after 0?" in here.llmrun("results", "--columns", "custom_id,prompt")


# ── cancel ─────────────────────────────────────────────────────────────────────


def made_run(here):
    """A run whose jobs nobody starts."""
    return llmrun.make_run(llmrun.prepare(here.config(engine={"name": "echo"}), []))


def command_of_slurm(here, name, *lines):
    """One of Slurm's commands, as a shell script."""
    folder = here.folder / "slurm"
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("\n".join(["#!/bin/sh", *lines, ""]))
    (folder / name).chmod(0o755)
    here.env["PATH"] = f"{folder}:{os.environ['PATH']}"


def test_cancel_stops_all_that_it_may_though_one_job_is_refused(here):
    run, driver = made_run(here), subprocess.Popen(["sleep", "60"])
    for job in (7, 8, 9):
        run.record_submit(job, shape=0)
    life = run.new_life(0, 0)
    llmrun.Events(run, life).append("start", job=0, submitted=0, nodes=["n"], pid=driver.pid, born=llmrun.process_birth(driver.pid),
                                    host=llmrun.socket.gethostname())
    command_of_slurm(here, "squeue", "for job in 7 8 9; do echo \"$job|RUNNING|None|N/A|N/A|5:00|n1\"; done")
    command_of_slurm(here, "scancel", f"echo \"$@\" >> {here.folder}/cancelled",
                     "case \"$*\" in *8*) echo 'scancel: error: Kill job error on job id 8: Access/permission denied' >&2; exit 1;; esac")
    said = here.llmrun("cancel", run.name, code=3)
    driver.wait(5)
    assert {"7", "9"} <= set((here.folder / "cancelled").read_text().split()) and run.stop_file.exists()
    assert "permission denied" in said and "job 7: cancelled" in said and "job 9: cancelled" in said and "job 8: cancelled" not in said


def test_a_job_of_a_cancelled_run_that_starts_after_all_ends_at_once(here):
    run = made_run(here)
    run.stop_file.touch()
    here.llmrun("drive", run.folder, code=4)
    assert not {"agents_up", "engine_started"} & {event["event"] for event in here.events()}, "nothing was started"
    assert "cancel" in here.ends()[0]["why"] and not here.journal()


def test_every_topic_of_help_is_named_where_help_begins(here):
    said = here.llmrun("help")
    for topic in ["config", *llmrun.HELP]:
        assert topic == "start" or f"`help {topic}`" in said
        assert len(here.llmrun("help", topic).splitlines()) > 5
    assert "results.jsonl" in here.llmrun("help", "results")


def test_answers_whose_folder_cannot_be_written_are_kept_and_written_elsewhere(here):
    here.config(results={"folder": "out"}, engine={"args": ["0.3"]})
    running = here.start("run", "config.json")
    wait_for("an answer", lambda: here.runs() and list(here.run.glob("journal/*")))
    (here.folder / "out").write_text("in the way")
    output, _ = running.communicate(timeout=60)
    assert running.returncode == 3 and "all answers are kept, but their files cannot be written to" in output, output
    mend = f"`python llmrun.py results {here.run.name} --to FOLDER`"
    assert mend in output and mend in here.llmrun("status", here.run.name)
    here.llmrun("results", here.run.name, "--to", "elsewhere")
    assert len(list((here.folder / "elsewhere").rglob("*.txt"))) == 6
    assert "would overwrite the prompts" in here.llmrun("results", here.run.name, "--to", "prompts", code=2)
