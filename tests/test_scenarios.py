"""What users do with a run from its submit to its end, on a fake Slurm or (LLMRUN_BENCH=real) a real one."""

import contextlib
import csv
import json
import os
import shutil
import subprocess
import sys

from conftest import wait_for
from fakes.llama import mark_of

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def test_every_prompt_is_answered_over_three_nodes(site):
    site.write_prompts(24)
    site.config(slurm={"nodes": 3})
    site.llmrun("submit", "config.json", "--wait", "--set", "engine.slots=4")
    assert len(site.results()) == 24 and all(site.results().values())
    assert "part0/000.txt" in site.results()
    lines = site.journal()
    assert {line["custom_id"] for line in lines} == set(site.results())
    for line in lines:
        assert line["error"] is None and line["response"]["status_code"] == 200
        assert line["response"]["body"]["usage"]["completion_tokens"] <= 16
        assert line["llmrun"]["attempts"] == 1 and line["llmrun"]["time_s"] > 0
    command = site.wait_for_event("engine_started")["command"]
    assert command.count("127.0.0.1:") == 2, "both RPC workers are named to the server"
    assert site.status()["state"] == "done"
    site.assert_nothing_left()


def test_one_node_runs_without_rpc(site):
    site.llmrun("submit", "config.json", "--wait")
    assert len(site.results()) == 6
    assert "--rpc" not in site.wait_for_event("engine_started")["command"]


def test_the_system_prompt_and_params_reach_the_engine_with_each_samples_own_seed(site):
    """The fake engine's answers say with what they were asked; of the real one the count of tokens tells."""
    (site.folder / "system.txt").write_text("Be brief.")
    site.config(prompts={"system": "system.txt", "samples": 2, "params": {"seed": 7, "max_tokens": 3, "temperature": 0}})
    site.llmrun("submit", "config.json", "--wait")
    assert all(line["response"]["body"]["usage"]["completion_tokens"] <= 3 for line in site.journal())
    results = site.results()
    assert len(results) == 12 and "part0/000.1.txt" in results and "part0/000.2.txt" in results
    if not site.real:
        question = {"model": site.model.name, "max_tokens": 3, "temperature": 0, "messages": [
            {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Question 1: what comes after 1?\n"}]}
        for sample, seed in (("1", 7), ("2", 8)):
            assert results[f"part1/001.{sample}.txt"].startswith(mark_of({**question, "seed": seed}))


def test_cancel_in_the_middle_leaves_the_finished_prompts_and_no_process(site):
    site.slow()
    site.config(slurm={"nodes": 3})
    site.llmrun("submit", "config.json")
    wait_for("a few answers", lambda: len(site.journal()) >= 3)
    job = site.status()["job"]
    subprocess.run(["scancel", str(job)], env=site.env, check=True)
    site.assert_nothing_left(5)
    finished = len(site.journal())
    assert 3 <= finished < 40
    state = site.status()
    assert (state["state"], state["exit_code"], state["detail"]) == ("stopped", 4, "cancelled by scancel"), state
    site.llmrun("results")
    assert len(site.results()) == finished


def test_a_killed_driver_is_noticed_and_named(site):
    site.slow()
    site.config(slurm={"nodes": 2})
    waiting = site.start("submit", "config.json", "--wait")
    wait_for("a few answers", lambda: site.runs() and len(site.journal()) >= 2)
    site.kill_job()
    site.assert_nothing_left(10)
    output, _ = waiting.communicate(timeout=40)
    assert waiting.returncode == 3, output
    assert "killed" in output
    state = site.status()
    assert state["state"] == "killed" and "driver was killed" in state["detail"]


def test_a_new_user_gets_from_the_one_file_to_answers(site):
    for path in list(site.folder.iterdir()):
        if path.name != "llmrun.py":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    site.llmrun("init")
    text = (site.folder / "config.toml").read_text()
    text = text.replace("~/models/model.gguf", str(site.model)).replace("~/llama.cpp/build/bin", str(site.bin))
    (site.folder / "config.toml").write_text(text.replace("my-run", "first"))
    site.means(prompts={"user": "prompts/user", "system": "prompts/system.txt", "max_tokens": 1024})
    assert "nodes     1" in site.llmrun("check")
    site.llmrun("submit", "config.toml", "--wait")
    assert "done" in site.llmrun("status")
    shown = site.llmrun("results")
    assert "bread.txt" in shown and "tides.txt" in shown


def test_salloc_and_run_use_the_allocation(site):
    site.config(slurm={"nodes": 2})
    done = subprocess.run(["salloc", "-N2", "--time=5", sys.executable, "llmrun.py", "run", "--here", "config.json"], cwd=site.folder,
                          env=site.env, text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, timeout=60)
    assert done.returncode == 0, done.stdout + site.job_output()
    assert len(site.results()) == 6
    assert site.events()[0]["nodes"] == ["node1", "node2"]


def test_run_inside_an_interactive_step_uses_the_allocation(site):
    site.config(slurm={"nodes": 2})
    done = subprocess.run(["salloc", "-N2", "--time=5", "srun", "-N1", "-n1", sys.executable, "llmrun.py", "run", "--here", "config.json"],
                          cwd=site.folder, env=site.env, text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, timeout=60)
    assert done.returncode == 0, done.stdout + site.job_output()
    assert len(site.results()) == 6


def test_run_typed_into_a_shell_of_srun_pty_uses_its_allocation(site):
    site.config(slurm={"nodes": 2})
    ours, theirs = os.openpty()
    shell = subprocess.Popen(["srun", "-N2", "--time=5", "--pty", "bash", "--norc"], cwd=site.folder, env=site.env, stdin=theirs,
                             stdout=theirs, stderr=theirs)
    os.close(theirs)
    os.write(ours, f"{sys.executable} llmrun.py run config.json; exit $((40 + $?))\n".encode())
    heard = b""
    with contextlib.suppress(OSError):  # the end of a terminal
        while True:
            heard += os.read(ours, 1000)
    os.close(ours)
    assert shell.wait(60) == 40, heard.decode() + site.job_output()
    assert len(site.results()) == 6 and site.status()["state"] == "done"
    assert site.events()[0]["nodes"] == ["node1", "node2"]


def test_a_submit_from_inside_a_job_is_a_job_of_its_own(site):
    site.config(slurm={"nodes": 2})
    script = site.folder / "outer.sh"
    script.write_text(f"#!/bin/bash\ncd {site.folder}\nsrun -n1 {sys.executable} llmrun.py submit config.json --wait\n")
    subprocess.run(["sbatch", "--wait", "-N1", "--mem=100", "-o", str(site.folder / "outer.out"), str(script)],
                   env=site.env, check=True, timeout=90)
    assert len(site.results()) == 6, (site.folder / "outer.out").read_text()
    assert site.status()["state"] == "done"


def test_a_rendered_script_can_be_submitted_by_hand(site):
    site.config(slurm={"nodes": 3})
    shutil.copy(os.path.join(ROOT, "sbatch", "rpc-three-nodes.sh"), site.folder / "job.sh")
    text = (site.folder / "job.sh").read_text().replace("config.toml", "config.json").replace("--gpus-per-node=1", "--comment=x")
    (site.folder / "job.sh").write_text(text.replace("--cpus-per-task=8", "--cpus-per-task=1"))
    env = dict(site.env, LLMRUN_PYTHON=sys.executable)
    done = subprocess.run(["sbatch", "--parsable", "--wait", "job.sh"], cwd=site.folder, env=env, text=True,
                          stdout=subprocess.PIPE, timeout=90)
    output = (site.folder / f"slurm-{done.stdout.strip()}.out").read_text()
    assert done.returncode == 0, output
    assert len(site.results()) == 6
    assert site.status()["job"] == int(done.stdout)


def test_an_array_shares_the_prompts(site):
    site.write_prompts(10)
    site.config(slurm={"jobs": 3})
    site.llmrun("submit", "config.json", "--wait")
    assert site.status()["done"] == 10
    assert all(end["code"] == 0 for end in site.ends()), "who finds all done ends well, too"
    site.llmrun("results")
    assert len(site.results()) == 10
    assert len(site.journal()) == 10, "no prompt was asked by two tasks"


def test_replicas_share_the_prompts_over_their_groups_of_nodes(site):
    site.slow()
    site.config(slurm={"nodes": 4}, engine={"replicas": 2})
    site.llmrun("submit", "config.json", "--wait")
    assert len(site.results()) == 40
    starts = [event for event in site.events() if event["event"] == "engine_started"]
    assert sorted(event["nodes"] for event in starts) == [["node1", "node2"], ["node3", "node4"]]
    assert {line["llmrun"]["replica"] for line in site.journal()} == {0, 1}
    assert len(site.journal()) == 40, "no prompt was answered twice"


def test_a_batch_file_goes_in_and_comes_out_in_that_format(site):
    from openai.types.chat import ChatCompletion
    rows = [{"custom_id": f"request-{n}", "method": "POST", "url": "/v1/chat/completions", "body": {
        "model": "gpt-4o-mini", "messages": [{"role": "system", "content": "You are a helpful assistant."},
                                             {"role": "user", "content": f"Hello world {n}!"}], "max_tokens": 10}}
            for n in range(12)]
    for row in rows[::3]:
        row["body"].update(stream=True, stream_options={"include_usage": True})
    (site.folder / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    site.config(prompts={"user": "in.jsonl"})
    site.llmrun("submit", "config.json", "--wait")
    lines = [json.loads(line) for line in (site.run / "results" / "results.jsonl").read_text().splitlines()]
    assert [line["custom_id"] for line in lines] == [f"request-{n}" for n in range(12)]
    for line in lines:
        answer = ChatCompletion.model_validate(line["response"]["body"])
        assert answer.choices[0].message.content and answer.usage.completion_tokens <= 10


def test_a_csv_comes_back_with_its_answers(site):
    (site.folder / "in.csv").write_text("word,language\nsea,German\n\"a, b\",French\n")
    (site.folder / "system.txt").write_text("You speak {language}.")
    site.config(prompts={"user": "in.csv", "template": "Say {word} in {language}.", "id_column": "word", "system": "system.txt"},
                results={"columns": ["answer", "completion_tokens"]})
    site.llmrun("submit", "config.json", "--wait")
    text = (site.run / "results" / "in.csv").read_text()
    assert text.startswith("word,language,answer,completion_tokens\nsea,German,")
    assert "sea" in site.llmrun("results", "--format", "csv")
    shown = list(csv.DictReader(site.llmrun("results", "--format", "csv").splitlines()))
    assert {row["custom_id"]: row["answer"] for row in shown} == {row["word"]: row["answer"] for row in csv.DictReader(text.splitlines())}


def test_a_killed_life_is_resumed_and_nothing_is_asked_twice(site):
    site.slow()
    waiting = site.start("submit", "config.json", "--wait")
    wait_for("a few answers", lambda: site.runs() and len(site.journal()) >= 3)
    site.kill_job()
    waiting.communicate(timeout=40)
    site.assert_nothing_left(10)
    before = {line["custom_id"] for line in site.journal()}
    subprocess.run(["sbatch", "--wait", str(site.run / "shapes" / "0" / "job.sh")], env=site.env, timeout=120, check=True,
                   stdout=subprocess.PIPE)
    names = [line["custom_id"] for line in site.journal()]
    assert len(names) == len(set(names)) == 40 and before < set(names)
    assert len(site.results()) == 40


def test_a_users_files_cannot_stand_in_for_pythons_own(site):
    for name in ("secrets", "csv", "queue", "random"):
        (site.folder / f"{name}.py").write_text("raise SystemExit('not this one')\n")
    env = dict(site.env, PYTHONSAFEPATH="1")
    done = subprocess.run([sys.executable, "-I", "-c", "import sys, runpy; sys.argv = sys.argv[1:]; "
                           "runpy.run_path('llmrun.py', run_name='__main__')", "llmrun.py", "submit", "config.json", "--wait"],
                          cwd=site.folder, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=60)
    assert done.returncode == 0, done.stdout + site.job_output()
    assert len(site.results()) == 6


def test_a_site_that_greets_on_sbatchs_output_loses_no_job(site):
    folder = site.folder / "bin"
    folder.mkdir()
    real = shutil.which("sbatch", path=site.env["PATH"])
    (folder / "sbatch").write_text(f"#!/bin/sh\necho '-> Welcome to the cluster'\nexec {real} \"$@\"\n")
    (folder / "sbatch").chmod(0o755)
    site.env["PATH"] = f"{folder}:{site.env['PATH']}"
    site.llmrun("submit", "config.json", "--wait")
    assert len(site.results()) == 6


def test_logs_and_results_can_be_followed(site):
    site.slow()
    site.llmrun("submit", "config.json")
    site.wait_for_event("ready")
    followers = [site.start("results", "-f", "--format", "csv"), site.start("logs", "-f")]
    outputs = [follower.communicate(timeout=90)[0] for follower in followers]
    rows = list(csv.DictReader(outputs[0].splitlines()))
    assert len(rows) == 40 and {row["custom_id"]: row["answer"] for row in rows} == site.results()
    assert "end code=0" in outputs[1]


def test_two_submits_in_the_same_second_both_succeed(site):
    both = [site.start("submit", "config.json", "--wait") for _ in range(2)]
    for one in both:
        output, _ = one.communicate(timeout=60)
        assert one.returncode == 0, output
    assert len(site.runs()) == 2
    assert all(len(list(run.glob("results/*/*.txt"))) == 6 for run in site.runs())


def test_the_old_flat_config_runs_unchanged(site):
    (site.folder / "server.txt").write_text("You are terse.")
    script = site.folder / "old.sbatch"
    script.write_text("#!/bin/bash\n#SBATCH --comment=kept\n#SBATCH --job-name=overridden\nsleep 5\nllama-server\n")
    ports = [free_port() for _ in range(2)]
    flat = {"job_name": "old", "output_log": "out/log_%j.txt", "result_dir": "answers", "dir_llama_script": str(site.bin),
            "model": str(site.model), "port_rpc": ports[0], "port_server": str(ports[1]), "prompt_server": "server.txt",
            "prompts_user_dir": "prompts", "nodes": 2, "ntasks": 2, "time": "00:05:00", "sbatch_script": "old.sbatch",
            "venv_dir": os.path.dirname(os.path.dirname(sys.executable))}
    (site.folder / "config.json").write_text(json.dumps(flat))
    site.means(prompts={"user": "prompts", "system": "server.txt"}, results={"folder": "answers/*", "file_name": "result_{name}.txt"})
    said = site.llmrun("submit", "config.json", "--wait")
    assert "#SBATCH lines are kept" in said
    answers = list((site.folder / "answers").glob("result_??-??-????_??-??-??/result_*.txt"))
    assert sorted(path.name for path in answers) == [f"result_{n:03d}.txt" for n in range(6)]
    command = site.wait_for_event("engine_started")["command"]
    assert f"--port {ports[1]}" in command and f":{ports[0]}" in command
    assert "-c 32768 -np 4" in command, "8,192 tokens for each slot"
    job = site.status()["job"]
    assert (site.folder / "out" / f"log_{job}.txt").exists()
    assert "#SBATCH --comment=kept" in (site.run / "shapes" / "0" / "job.sh").read_text()


def test_an_old_configs_log_begins_anew_at_each_submit_and_each_run_keeps_its_own(site):
    """As their script did, which removed the log first; a job that comes back writes on in it."""
    log = site.folder / "job.log"
    log.write_text("of a submit long ago\n")
    flat = {"output_log": "job.log", "dir_llama_script": str(site.bin), "model": str(site.model), "prompts_user_dir": "prompts",
            "nodes": 1, "time": "00:05:00"}
    (site.folder / "config.json").write_text(json.dumps(flat))
    site.means(prompts={"user": "prompts"})
    jobs = []
    for _ in range(2):
        site.llmrun("submit", "config.json", "--wait")
        jobs.append(site.status()["job"])
        said = log.read_text()
        assert "long ago" not in said and [job for job in jobs if f" start {job}.0.0 " in said] == jobs[-1:]
    assert all(f" start {job}.0.0 " in site.llmrun("logs", job) for job in jobs), "the first one's, too"
    assert jobs[0] != jobs[1] and "#SBATCH --open-mode=append" in (site.run / "shapes" / "0" / "job.sh").read_text()


def free_port():
    import socket
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def test_a_taken_port_is_named_in_status_and_log(site):
    import socket
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen(1)
        port = taken.getsockname()[1]
        site.config(engine={"port": port})
        said = site.llmrun("submit", "config.json", "--wait", code=3)
    assert f"port {port} is in use" in said
    assert f"port {port} is in use" in site.status()["detail"]


def test_a_binary_for_another_cpu_is_named(site):
    folder = site.folder / "wrong"
    folder.mkdir()
    (folder / "llama-server").write_bytes(b"\x7fELF\x02\x01\x01" + b"\0" * 9 + b"\x02\0\xf3\0" + b"\0" * 200)
    (folder / "llama-server").chmod(0o755)
    site.config(engine={"path": str(folder)})
    said = site.llmrun("submit", "config.json", "--wait", code=3)
    assert "built for another CPU" in said and "built for another CPU" in site.status()["detail"]


def test_logs_and_results_show_a_run_by_name_job_or_folder(site):
    site.llmrun("submit", "config.json", "--wait")
    job = str(site.status()["job"])
    for name in (job, site.run.name, str(site.run), "test"):
        assert "listening on http" in site.llmrun("logs", name, "llama-server")
        assert "001.txt" in site.llmrun("results", name)
    assert json.loads(site.llmrun("status", job, "--json"))["done"] == 6
    record = json.loads(site.llmrun("results", job, "--format", "jsonl").splitlines()[0])
    assert record["custom_id"] == "part0/000.txt"
    for line in site.llmrun("results", job, "--format", "jsonl").splitlines():
        record = json.loads(line)
        assert record["response"]["body"]["choices"][0]["message"]["content"] == site.results()[record["custom_id"]]


def test_run_in_too_small_an_allocation_says_so(site):
    site.config(slurm={"nodes": 3})
    done = subprocess.run(["salloc", "-N2", "--time=5", sys.executable, "llmrun.py", "run", "--here", "config.json"], cwd=site.folder,
                          env=site.env, text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, timeout=60)
    assert done.returncode == 2, done.stdout
    assert "has 2 nodes and the config wants 3" in done.stdout


def test_a_run_whose_job_slurm_has_forgotten_is_known_by_its_own_files(site):
    """Minutes after a job's end squeue knows no such job, and says so as an error."""
    site.llmrun("submit", "config.json", "--wait")
    site.shim("squeue", '[[ "$*" == *-j* ]]', "echo 'slurm_load_jobs error: Invalid job id specified' >&2", "exit 1")
    assert "done" in site.llmrun("status") and "is finished" in site.llmrun("resume")
    site.shim("squeue", '[[ "$*" == *-j* ]]', "echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2", "exit 1")
    assert "squeue" in site.llmrun("status", code=3) and "sinfo" in site.output


def test_agents_are_steps_of_their_own_whatever_the_site_and_the_job_have_set(site):
    """Variables of the job's would change what srun does, and so would a site's defaults for steps."""
    site.shim("srun", f"env >> {site.folder}/environment; echo $* >> {site.folder}/words", ":")
    leaks = ("SLURM_MEM_PER_CPU=1", "SLURM_NTASKS=7", "SLURM_STEP_TASKS_PER_NODE=3", "SRUN_DEBUG=3", "SBATCH_X=1", "PMI_RANK=1", "PMIX_RANK=0")
    site.config(slurm={"nodes": 2}, engine={"name": "echo"}, environment={"setup": ["export " + " ".join(leaks)]})
    site.llmrun("submit", "config.json", "--wait")
    names = {line.partition("=")[0] for line in (site.folder / "environment").read_text().splitlines()}
    assert {name for name in names if name.startswith(("SLURM_", "SRUN_", "SBATCH_", "PMI"))} == {"SLURM_CONF", "SLURM_JOB_ID"}
    steps = (site.folder / "words").read_text().splitlines()
    assert len(steps) == 2
    for step in steps:
        words = step.split()
        assert {"-N1", "-n1", "-w", "--mem=0",  # else a step takes all memory for itself, or waits for it
                "--kill-on-bad-exit=0", "--wait=0", "--no-kill",  # else another task's end is this one's
                "--export=ALL", "--mpi=none"} <= set(words[:words.index("agent")]), step


def test_cancel_stops_a_run(site):
    site.slow()
    site.llmrun("submit", "config.json")
    wait_for("an answer", lambda: site.journal())
    assert "cancelled" in site.llmrun("cancel")
    site.assert_nothing_left(8)
    state = site.status()
    assert (state["state"], state["exit_code"]) == ("stopped", 4) and 0 < state["done"] < 40


def test_a_pending_job_says_why_it_waits(site):
    site.config(slurm={"extra": {"begin": "now+1hour"}})
    site.llmrun("submit", "config.json")
    state = site.status()
    assert state["state"] == "pending" and state["detail"], state
    later = json.loads(site.llmrun("submit", "config.json", "--json"))
    assert "1 waiting jobs come before it" in json.loads(site.llmrun("status", later["job"], "--json"))["detail"]
    site.llmrun("cancel", later["job"])
    site.llmrun("cancel", state["job"])
    wait_for("the job to be gone", lambda: site.status()["exit_code"] is not None)


def test_waiting_for_a_run_costs_no_time(site):
    """`--wait` follows the run's own files: the end is told when it is there, not at the next poll of Slurm."""
    asked = site.folder / "asked"
    site.shim("squeue", f"date +%s.%N >> {asked}", ":")
    site.llmrun("submit", "config.json", "--wait")
    times = [float(line) for line in asked.read_text().split()]
    assert times and max(times) < site.wait_for_event("end")["time"], "Slurm was asked, and not for the end"
