"""How runs end when somebody else ends them: Slurm, the user, the kernel. On a cluster of each kind."""

import errno
import json
import os
import re
import signal
import socket
import subprocess
import sys

import llmrun
import pytest
from answers import check_run, questions
from conftest import Site, wait_for
from fake_slurm.cluster import FakeCluster


@pytest.fixture(params=["cgroup", "linuxproc"])
def tracked(request, tmp_path, engine):
    """A user on a cluster that ends processes as this kind of site does."""
    (tmp_path / "cluster").mkdir()
    (tmp_path / "home").mkdir()
    with FakeCluster(tmp_path / "cluster", proctrack=request.param, kill_wait=3, FakeTick="0.2") as cluster:
        site = Site(tmp_path / "home", cluster, engine)
        site.config()
        yield site
        site.assert_answers()


def test_scancel_leaves_nothing_on_either_kind_of_site(tracked):
    tracked.slow()
    tracked.config(slurm={"nodes": 3})
    tracked.llmrun("submit", "config.json")
    wait_for("an answer", lambda: tracked.runs() and tracked.journal())
    subprocess.run(["scancel", str(tracked.status()["job"])], env=tracked.env, check=True)
    tracked.assert_nothing_left(5)
    assert [(end["code"], end["why"], end["next"]) for end in tracked.ends()] == [(4, "cancelled by scancel", "")]
    assert tracked.status()["exit_code"] == 4
    tracked.llmrun("results")
    assert len(tracked.results()) == len(tracked.journal()) > 0


def test_a_killed_driver_leaves_nothing_on_either_kind_of_site(tracked):
    tracked.slow()
    tracked.config(slurm={"nodes": 3})
    tracked.llmrun("submit", "config.json")
    wait_for("an answer", lambda: tracked.runs() and tracked.journal())
    tracked.kill_job()
    tracked.assert_nothing_left(8)
    wait_for("the verdict", lambda: tracked.status()["state"] == "killed")


def test_signals_that_follow_the_first_change_nothing(site):
    """Slurm's TERM may come twice, and others with it: in the middle of the teardown, and while results are written."""
    engine, told, late, writing = (site.folder / name for name in ("engine/llama-server", "told", "late", "writing"))
    engine.parent.mkdir()
    engine.write_text(f"#!/bin/bash\ntrap 'echo told >> {told}; sleep 0.5; echo ended >> {told}; exit' TERM\n"
                      f"{site.bin}/llama-server \"$@\" & wait $!; exit $?\n")
    engine.chmod(0o755)
    site.shim("scontrol", f"[ -e {late} ]", f"touch {writing}", f"while [ -e {late} ]; do sleep 0.02; done")
    site.slow()
    site.config(engine={"path": str(engine)})
    site.llmrun("submit", "config.json")
    site.answering()
    driver = next(event["pid"] for event in site.events() if event["event"] == "start")
    late.touch()
    os.kill(driver, signal.SIGTERM)
    wait_for("the teardown", lambda: told.exists())
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(driver, number)
    wait_for("what follows it", lambda: writing.exists())
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGUSR1):
        os.kill(driver, number)
    late.unlink()
    state = site.ended(code=4)
    assert [end["why"] for end in site.ends()] == ["cancelled by scancel"]
    assert [event["why"] for event in site.events() if event["event"] == "stopping"] == ["told to end (SIGTERM)"]
    assert "ended" in told.read_text().split(), "the engine was given its time"
    assert len(site.results()) == state["done"] == len(site.journal()) >= 2, "and the results were written"


def test_a_warning_that_leaves_time_for_more_prompts_ends_nothing(site):
    """Slurm's word that the time limit comes is half a minute early; what can finish until then is still asked."""
    site.slow(10)
    site.config(environment={"setup": ["export SLURM_JOB_END_TIME=$(( $(date +%s) + 60 ))"]})
    site.llmrun("submit", "config.json")
    site.answering()
    subprocess.run(["scancel", "-b", "-s", "USR1", str(site.status()["job"])], env=site.env, check=True)
    end = site.wait_for_event("end")
    assert (end["done"], end["code"], end["next"]) == (10, 0, "")
    assert "draining" not in [event["event"] for event in site.events()]
    site.ended()


def test_noise_on_a_tasks_output_is_logged_and_does_no_harm(tmp_path, engine):
    (tmp_path / "cluster").mkdir()
    (tmp_path / "home").mkdir()
    with FakeCluster(tmp_path / "cluster", FakeTaskProlog="Welcome to the cluster!") as cluster:
        site = Site(tmp_path / "home", cluster, engine)
        site.config(slurm={"nodes": 2})
        site.llmrun("submit", "config.json", "--wait")
        assert len(site.results()) == 6
        assert "Welcome to the cluster!" in site.job_output()


def test_limits_that_slurm_refuses_itself_are_told_the_same_way(tmp_path, engine):
    (tmp_path / "cluster").mkdir()
    (tmp_path / "home").mkdir()
    with FakeCluster(tmp_path / "cluster", EnforcePartLimits="ALL") as cluster:
        site = Site(tmp_path / "home", cluster, engine)
        site.config(slurm={"partition": "short", "time": "10"})
        assert 'write at most "00:05:00"' in site.llmrun("submit", "config.json", code=2)
        assert not site.runs()


# ── here, without Slurm ────────────────────────────────────────────────────────


def test_run_answers_here_over_agents_that_stand_for_nodes(here):
    here.config(slurm={"nodes": 3})
    here.llmrun("run", "--here", "config.json")
    assert len(here.results()) == 6
    assert here.events()[0]["nodes"] == ["local1", "local2", "local3"]
    assert "done" in here.llmrun("status")


def test_an_interrupted_run_ends_with_130_and_keeps_what_is_finished(here):
    here.slow()
    running = here.start("run", "--here", "config.json")
    wait_for("an answer", lambda: here.runs() and here.journal())
    for pid in [running.pid] + [pid for pid, argv in here.processes() if "drive" in argv]:  # a terminal interrupts all
        os.kill(pid, signal.SIGINT)
    output, _ = running.communicate(timeout=20)
    assert running.returncode == 130, output
    here.llmrun("results")
    assert len(here.results()) == len(here.journal()) > 0


def test_cancel_stops_a_run_that_is_here(here, monkeypatch):
    here.slow()
    running = here.start("run", "--here", "config.json")
    wait_for("an answer", lambda: here.runs() and here.journal())
    assert "stopped" in here.llmrun("cancel")
    running.communicate(timeout=20)
    assert running.returncode == 4
    left = {f"part{number % 3}/{number:03d}.txt" for number in range(40)} - {line["custom_id"] for line in here.journal()}
    assert left and set(asked_elsewhere(here.run, monkeypatch)) == left, "and who goes on waits for nothing"


def asked_elsewhere(folder, monkeypatch):
    """The prompts that a driver on another machine gets at once, while those under way there have no answers yet."""
    monkeypatch.setattr(socket, "gethostname", lambda: "elsewhere")
    run = llmrun.Run(folder)
    prompts = llmrun.Input.load(run, run.config(), "m")
    claims = llmrun.Claims(run, llmrun.Life(99, 0, 0), llmrun.Marks(run, prompts),
                           llmrun.chunk_starts(len(prompts), run.config().slurm.jobs))
    return [prompts.prompt(number).custom_id for number in iter(claims.next, llmrun.LATER)]


@pytest.mark.parametrize("victim", ["drive", "agent"])
def test_a_kill_here_leaves_nothing_and_is_told(here, victim):
    here.slow()
    running = here.start("run", "--here", "config.json")
    wait_for("an answer", lambda: here.runs() and here.journal())
    if victim == "drive":
        here.kill_job()
    else:
        os.kill(here.process(" agent "), signal.SIGKILL)
    output, _ = running.communicate(timeout=20)
    assert running.returncode == 3, output
    here.assert_nothing_left(5)
    assert ("the driver was killed" if victim == "drive" else "the node was lost") in output


def test_the_demo_needs_nothing_but_the_file(tmp_path):
    script = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "llmrun.py")
    with open(script) as file:
        (tmp_path / "llmrun.py").write_text(file.read())
    done = subprocess.run([sys.executable, "llmrun.py", "demo"], cwd=tmp_path, text=True, stdout=subprocess.PIPE, timeout=30,
                          stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout
    assert "All 12 prompts are answered" in done.stdout
    folder = tmp_path / "llmrun-demo"
    config, run = json.loads((folder / "config.json").read_text()), next(folder.glob("runs/*"))
    check_run(run, folder, config, questions(folder, config))
    for path in folder.glob("prompts/*"):
        assert re.search(rf"(?m)^{path.name}\t.*\t{re.escape(path.read_text())}", done.stdout), "each answer stands beside its name"
    record = subprocess.run([sys.executable, "llmrun.py", "status", "--runs", "llmrun-demo/runs", "--json"], cwd=tmp_path,
                            text=True, stdout=subprocess.PIPE)
    assert json.loads(record.stdout)[0]["done"] == 12


def refuse_claims(here, number):
    """A disk that takes no new claim, for this reason, as long as the file `refused` is there."""
    (here.folder / "refused").touch()
    here.amend("", "def put_new(disk, path, data, put_new=Disk.put_new):",
               f"    if path.parent.name == 'claims' and os.path.exists({str(here.folder / 'refused')!r}):",
               f"        raise OSError({number}, os.strerror({number}))", "    return put_new(disk, path, data)", "", "",
               "Disk.put_new = put_new", "Claims.LOOK_S = Prompts.TEND_S = 0.2")


def test_a_run_that_may_make_no_claims_says_so_and_goes_on_when_it_may(here):
    """The quota of files is used up, though there is room for their bytes."""
    here.config(engine={"name": "echo"})
    refuse_claims(here, errno.EDQUOT)
    running = here.start("run", "--here", "config.json")
    try:
        wait_for("the word", lambda: here.runs() and "quota" in here.job_output().lower(), 10)
        assert "quota" in here.llmrun("status", here.run.name).lower() and running.poll() is None
    finally:
        (here.folder / "refused").unlink()
        output, _ = running.communicate(timeout=20)
    assert running.returncode == 0, output
    assert "quota" not in here.status()["detail"].lower() and here.status()["done"] == 6


def test_a_run_that_may_never_make_claims_ends_with_the_reason(here):
    here.config(engine={"name": "echo"})
    refuse_claims(here, errno.EACCES)
    running = here.start("run", "--here", "config.json")
    try:
        running.wait(10)
    except subprocess.TimeoutExpired:
        running.terminate()
    output, _ = running.communicate(timeout=20)
    assert running.returncode == 3 and "permission denied" in here.status()["detail"].lower(), output
