"""What others left in a user's runs: words that a terminal would obey, folders that are damaged or closed."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys

import llmrun
import pytest
from conftest import SCRIPT


def made_run(folder, name="test"):
    """A run of two prompts whose driver was killed, and the one answer that it has; the journal and events to go on with."""
    (folder / "in.jsonl").write_text('{"x": "one"}\n{"x": "two"}\n')
    config = llmrun.build_config(llmrun.Config, {
        "name": name, "engine": {"name": "echo"}, "run_dir": str(folder / "runs"),
        "prompts": {"user": str(folder / "in.jsonl"), "template": "{x}"}}, "config.toml", None)
    run = llmrun.create_run(config, llmrun.freeze(config, "m"), lambda run: "")
    life = run.new_life(0, 0)
    return run, life, llmrun.Events(run, life)


def started(**facts):
    return {"job": 0, "submitted": 0, "nodes": ["n1"], "pid": 1, "born": 1, "host": llmrun.socket.gethostname(), **facts}


def line_of(row, name, body=b"{}", error=None):
    prompt = llmrun.Prompt((0, row, 0), name, llmrun.CHAT, b"")
    return llmrun.journal_line(llmrun.Result(prompt, 0 if error else 200, body, {}, error, 0, 0, 1, 0))


def said_by(folder, *args, **streams):
    """A command of a user in that folder."""
    env = dict(os.environ, NO_COLOR="1", COLUMNS="200", PATH="/nowhere")
    return subprocess.Popen([sys.executable, str(SCRIPT), *args], cwd=folder, env=env, **streams)


# ── what others said ───────────────────────────────────────────────────────────

SPELLS = "\x1b]0;owned\x07 \x1b[2Jcleared \x9b31mred \x08\x7f \rover"  # they name the window, clear it, write over what stands there


@pytest.fixture
def spoken(tmp_path):
    """A run in which everybody said what a terminal would obey: a model, an engine, and who named the files."""
    run, life, told = made_run(tmp_path)
    told.append("start", **started(nodes=["n1" + SPELLS]))
    told.append("node_lost", node="n1", why=SPELLS)
    told.append("end", **llmrun.Ending(3, "the engine said " + SPELLS)._asdict())
    body = json.dumps({"choices": [{"message": {"content": SPELLS + "\nnext line\tand on"}}]}, ensure_ascii=False).encode()
    lines = [line_of(0, "r0" + SPELLS, body), line_of(1, "r1" + SPELLS, error={"code": "connection", "message": SPELLS})]
    (run.journal / f"{life}.0.jsonl").write_bytes(b"".join(lines))
    (run.logs_of(life) / f"n1-engine{SPELLS}.log").write_text(SPELLS + "\nnext line\tand on\n")
    return run


def shown_on_terminal(folder, *args):
    """What a command writes to a terminal."""
    ours, theirs = os.openpty()
    shown, running = b"", said_by(folder, *args, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    with contextlib.suppress(OSError):  # the end of a terminal
        while True:
            shown += os.read(ours, 65536)
    os.close(ours)
    running.wait(10)
    return shown.decode()


@pytest.mark.parametrize("words", [
    "results", "results --format text", "results --format csv", "results --format jsonl", "results --failed", "logs {run} engine", "logs",
    "status", "status {run}", "status no{spells}", "logs {run} no{spells}"])
def test_what_others_said_is_shown_on_a_terminal_and_not_obeyed(spoken, tmp_path, words):
    args = [arg.format(run=spoken.name, spells=SPELLS) for arg in words.split()]
    shown = shown_on_terminal(tmp_path, *args).replace("\r\n", "\n")
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", shown), repr(shown)
    assert "owned" in shown, "and can be read"
    if words in ("results --format text", "logs {run} engine"):
        assert re.search(r"\nnext line(\t| +)and on\n", shown), "its lines and tabs are no spells"


def test_in_a_pipe_others_words_are_what_they_are(spoken, tmp_path):
    for args in (["results", "--format", "text"], ["results", "--format", "csv"], ["logs", spoken.name, "engine"]):
        said, _ = said_by(tmp_path, *args, stdout=subprocess.PIPE).communicate(timeout=20)
        assert SPELLS.encode().replace(b"\r", b"\n") in said.replace(b"\r", b"\n"), args


# ── runs folders that others have been in ──────────────────────────────────────


def append(path, text):
    with open(path, "a") as file:
        file.write(text)


DAMAGES = {
    "its key is gone": lambda run: (run / "key").unlink(),
    "its config is half": lambda run: (run / "shapes" / "0" / "config.json").write_text('{"name": "te'),
    "its config is of another program": lambda run: (run / "shapes" / "0" / "config.json").write_text('{"source": "", "nme": 1}'),
    "its config is a list": lambda run: (run / "shapes" / "0" / "config.json").write_text("[]"),
    "its config is no text": lambda run: (run / "shapes" / "0" / "config.json").write_bytes(b"\xff\xfe"),
    "its input is gone": lambda run: shutil.rmtree(run / "input"),
    "its input is empty": lambda run: (run / "input" / "input.json").write_text(""),
    "its events are gone": lambda run: shutil.rmtree(run / "events"),
    "its submit is half": lambda run: (run / "events" / "7.submit.json").write_text('{"job":'),
    "its submit is nothing": lambda run: (run / "events" / "7.submit.json").write_text("{}"),
    "its events have no start": lambda run: (run / "events" / "0.0.0.jsonl").write_text('{"event": "ready", "time": 1}\n'),
    "its events are no events": lambda run: (run / "events" / "0.0.0.jsonl").write_text('3\n[]\n{"a": 1}\n'),
    "its end is half": lambda run: append(run / "events" / "0.0.0.jsonl", '{"event": "end", "time": 3}\n')}


@pytest.fixture
def two(tmp_path):
    """The names of an older run that is whole, and of a newer one."""
    runs = []
    for name in ("whole", "hurt"):
        run, life, told = made_run(tmp_path, name)
        told.append("start", **started())
        told.append("progress", answers=1, own_failed=0, tokens=1, working_s=1.0)
        (run.journal / f"{life}.0.jsonl").write_bytes(line_of(0, "in-1"))
        (run.logs_of(life) / "n1-engine.log").write_text("listening\n")
        runs.append(run)
    (run.folder / "events" / "7.submit.json").write_text('{"job": 7, "time": 1.0, "shape": 0}')
    return [run.name for run in runs]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_run_is_named_and_passed_over(tmp_path, two, damage, capsys, monkeypatch):
    whole, hurt = two
    monkeypatch.setenv("PATH", "/nowhere")
    DAMAGES[damage](tmp_path / "runs" / hurt)

    def said(*args, codes=(0,)):
        code = llmrun.main([*args, "--runs", str(tmp_path / "runs")])
        captured = capsys.readouterr()
        assert code in codes, captured
        return captured.out, captured.out + captured.err
    out, everything = said("status")
    assert [line for line in out.splitlines() if whole in line and "killed" in line], out
    assert hurt in everything, "it is named"
    for args in (["status", whole], ["results", whole], ["results", "whole", "--json"], ["logs", whole, "--json"], ["cancel", whole], ["results"]):
        assert said(*args)[0], args
    assert whole in [state["run"] for state in json.loads(said("status", "--json")[0])]
    assert hurt in said("status", hurt, codes=(0, 2, 3))[1], "asked for by its name it is told what is wrong with it"


def test_another_users_run_is_named_and_passed_over(tmp_path, two):
    """To root nothing is forbidden, so the commands then run as nobody."""
    whole, hurt = two
    runs = tmp_path / "runs"
    for folder in [runs / whole, *(path for path in (runs / whole).rglob("*") if path.is_dir()), tmp_path, *list(tmp_path.parents)[:4]]:
        if str(folder) != "/":
            folder.chmod(0o755)
    (runs / hurt).chmod(0)
    as_nobody = f"import locale, os, sys; sys.path.insert(0, {str(SCRIPT.parent)!r}); import llmrun; " \
                "os.getuid() or (os.setgid(65534), os.setuid(65534)); sys.exit(llmrun.main(sys.argv[1:]))"
    said = {}
    for words in ("status", "status WHOLE", "results WHOLE", "results whole", "logs WHOLE --json"):
        done = subprocess.run([sys.executable, "-c", as_nobody, *words.replace("WHOLE", whole).split()], cwd=tmp_path, text=True,
                              env=dict(os.environ, HOME="/", PATH="/nowhere"), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        assert done.returncode == 0 and "Traceback" not in done.stdout, done.stdout
        said[words] = done.stdout
    (runs / hurt).chmod(0o700)
    assert whole in said["status"] and hurt in said["status"] and "in-1" in said["results whole"] and "engine" in said["logs WHOLE --json"]
