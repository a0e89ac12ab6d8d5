"""What is wrong with the user's input is said in one line with its mend, before anything is made."""

import json
import os
import platform
import shutil
import struct
import subprocess
import sys

import pytest
from conftest import wait_for
from fakes.build import make_build


def python_of(version):
    """A real old Python of this machine, where there is one."""
    folder = os.path.expanduser("~/.pyenv/versions")
    found = [name for name in (os.listdir(folder) if os.path.isdir(folder) else []) if name.startswith(version + ".")]
    path = os.path.join(folder, found[0], "bin", "python") if found else shutil.which(f"python{version}")
    works = path and subprocess.call([path, "-c", ""], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) == 0
    return path if works else None


def all_refused(site, *args, code=2, command="submit", made=False):
    """The lines that a command ends with; nothing of a run may be left behind."""
    said = site.llmrun(command, *args, code=code)
    lines = [line for line in said.splitlines() if line.startswith("llmrun: ")]
    assert lines and said.splitlines()[-len(lines):] == lines, said
    assert made or not site.runs(), "no half-made run is left"
    assert all("; " in line for line in lines), f"no mend in: {lines}"
    return lines


def refused(site, *args, **how):
    """The one line that a command ends with."""
    lines = all_refused(site, *args, **how)
    assert len(lines) == 1, lines
    return lines[0]


WRONG_VALUES = [
    ("slurm.nodes", '"three"', "a whole number"), ("slurm.nodes", "0", "from 1"), ("slurm.time", '"5 hours"', '"05:00:00"'),
    ("slurm.time", "90.5", "quotes"), ("slurm.directives", '"x"', "a list"), ("slurm.extra", "3", "a table"),
    ("environment.modules", '"cuda"', "a list"), ("environment.vars", "[1]", "a table"), ("network.interface", "3", "quotes"),
    ("model.path", "7", "quotes"), ("model.vram_per_node", '"lots"', '"24GB"'), ("engine.slots", "true", "a whole number"),
    ("engine.name", '"llama"', "llama.cpp"), ("engine.load_timeout", '"soon"', '"10min"'),
    ("engine.request_timeout", '"soon"', '"10min"'),
    ("engine.llama.rpc_port", "99999", "65535"), ("engine.llama.user_settings", '"yes"', "true or false"),
    ("prompts.max_tokens", '"many"', "a whole number"), ("prompts.params", '"x"', "a table"), ("results.folder", "1", "quotes"),
    ("name", '"a/b"', "letters"), ("name", '"a b"', "letters"), ("name", '"a\\"b"', "letters"), ("name", '"a\\nb"', "letters"),
    ("name", '""', "letters"), ("slurm", "3", "below a line [slurm]")]


@pytest.mark.parametrize("key, value, words", WRONG_VALUES, ids=[f"{k}={v}" for k, v, _ in WRONG_VALUES])
def test_a_value_of_the_wrong_kind_names_its_key(site, key, value, words):
    table, _, name = key.rpartition(".")
    what, _, mend = refused(site, "config.json", "--set", f"{key}={value}").partition("; ")
    assert f"--set {key}={value}: {table and f'[{table}] '}{name} = {json.dumps(json.loads(value))}: not " in what
    assert words in mend, mend


@pytest.mark.parametrize("key, value, words", [
    ("results.columns", '["answer", "anser"]', '"anser" is not one of answer, reasoning, finish_reason, prompt_tokens, completion_tokens, '
     'error; did you mean "answer"?'), ("slurm.directives", '["--exclusive", 3]', "3 is not one line of text; put it in quotes"),
    ("slurm.nodes", "0", "not at least 1; write a number from 1 to"), ("network.ports", '"x"', "not a range of ports"),
    ("engine.port", "65536", "not at most 65535; write a number from 0 to 65535"), ("slurm.nodes", "1.5", 'not a whole number or "auto"')])
def test_what_is_wrong_with_a_value_is_said_of_that_which_is_wrong(here, key, value, words):
    assert f"{key.partition('.')[2]} = {value}: {words}" in refused(here, "config.json", "--set", f"{key}={value}")


@pytest.mark.parametrize("text, words", [
    ("nodes = 3", "unknown key nodes; did you mean [slurm] nodes?"), ("[slurm]\nnode = 3", 'did you mean "nodes"'),
    ("[slrum]\nnodes = 3", 'config.toml:1: unknown key slrum; did you mean "slurm"'),
    ("name = ", "config.toml: not TOML: Invalid value"), ("[slurm\nnodes=3", "config.toml:1: not TOML"),
    ("[slurm]\ntime = 5 hours", "config.toml:2: not TOML"),
    ('[slurm]\n\ntime = "5 hours"', 'config.toml:3: [slurm] time = "5 hours": not a time Slurm takes; write "05:00:00"')])
def test_a_broken_toml_file_names_its_line(site, text, words):
    (site.folder / "config.toml").write_text(text)
    assert words in all_refused(site, "config.toml")[0]


@pytest.mark.parametrize("text, words", [("{", "config.json:1"), ('{"name": "x"\n y}', "config.json:2"), ("[1]", "not a table"),
                                         ("", "config.json:1"), ('{"nme": "x"}', 'did you mean "name"')])
def test_a_broken_json_file_names_its_line(site, text, words):
    (site.folder / "config.json").write_text(text)
    assert words in all_refused(site, "config.json")[0]


EIGHT = """\
name = "my run"
[slurm]
nodes = "three"
time = "5 hours"
partition = "mian"
mem = "1T"
[engine]
path = "nowhere"
slot = 4
[model]
path = "none.gguf"
[prompts]
user = "pormpts"
system = "none.txt"
"""


def test_all_that_is_wrong_is_said_at_once(site):
    (site.folder / "config.toml").write_text(EIGHT)
    for command, slurms in (("check", [5, 6]), ("submit", [])):
        lines = all_refused(site, "config.toml", command=command)
        found = sorted(int(line.split("config.toml:")[1].split(":")[0]) for line in lines if "config.toml:" in line)
        assert found == [1, 3, 4, *slurms, 8, 9, 11, 13] and len(lines) == len(found) + 1, lines
        assert any("none.txt: cannot read the system prompt" in line for line in lines)


@pytest.mark.parametrize("text, words", [
    ('[model]\npth = "x"\n[engine]\nname = "llama.cpp"', 'did you mean "path"'),
    ('[engine]\nname = "ehco"', 'did you mean "echo"'),
    ('[engine]\nname = "echo"\nreplicas = 2\n[slurm]\nnodes = "two"', "a whole number"),
    ('[engine]\nname = "echo"\n[prompts]\nusr = "pormpts"', 'did you mean "user"')])
def test_what_only_follows_from_another_error_is_not_said(site, text, words):
    (site.folder / "prompts" / "user").mkdir()
    (site.folder / "prompts" / "user" / "a.txt").write_text("Why?\n")
    (site.folder / "config.toml").write_text(text)
    assert words in refused(site, "config.toml", command="check")


def test_a_wrong_override_is_told_as_what_was_typed(site):
    assert "llmrun: --set slurm.time=5 hours: [slurm] time" in refused(site, "config.json", "--set", "slurm.time=5 hours")
    assert "llmrun: --set model.path=none: [model] path" in refused(site, "config.json", "--set", "model.path=none")
    words = '--set nodes=3: unknown key nodes; did you mean "slurm.nodes"?'
    assert words in refused(site, "config.json", "--set", "nodes=3")
    assert 'did you mean "slurm.nodes"?' in refused(site, "config.json", "--set", "node=3")
    lines = all_refused(site, "config.json", "--set", "path=x", "--set", "engine.slot=2")
    assert '"model.path" or "engine.path"' in lines[0] and '"engine.slots"' in lines[1], lines


def test_a_config_that_is_no_config(site):
    folder = site.folder
    assert "no such file" in refused(site, "nowhere.toml")
    assert "is a directory" in refused(site, ".")
    (folder / "a.toml").symlink_to("b.toml")
    (folder / "b.toml").symlink_to("a.toml")
    assert "symbolic links" in refused(site, "a.toml")
    (folder / "big.toml").write_bytes(b"# \n" * 3_500_000)
    assert "10.5 MB" in refused(site, "big.toml")
    (folder / "latin.toml").write_bytes(b'name = "caf\xe9"')
    assert "not UTF-8" in refused(site, "latin.toml")
    assert "not of the form" in refused(site, "config.json", "--set", "nodes")
    assert "no such command" in refused(site, command="sumbit")


def test_prompts_that_cannot_be_asked(site):
    prompts = site.folder / "prompts"
    (prompts / "part0" / "000.txt").write_bytes(b"caf\xe9\n")
    assert "not UTF-8" in refused(site, "config.json")
    (prompts / "part0" / "000.txt").write_text(" \n")
    assert "prompt is empty" in refused(site, "config.json")
    (prompts / "part0" / "000.txt").unlink()
    (prompts / "part0" / "gone.txt").symlink_to("/nowhere/at/all")
    assert "no such file" in refused(site, "config.json")
    shutil.rmtree(prompts)
    assert "no such folder" in refused(site, "config.json")
    prompts.mkdir()
    assert "no prompts" in refused(site, "config.json")
    assert "is a directory" in refused(site, "config.json", "--set", "prompts.system=prompts")
    assert "no such file" in refused(site, "config.json", "--set", "prompts.system=none.txt")


def test_what_an_ordinary_user_may_not_touch(site):
    """To root nothing is forbidden, so the command then runs as nobody."""
    site.config(engine={"name": "echo"})
    secret = site.folder / "prompts" / "part0" / "000.txt"
    secret.chmod(0)
    for folder in [site.folder] + list(site.folder.parents)[:4]:
        if str(folder) != "/":
            folder.chmod(0o755)

    def as_nobody(*args):
        done = subprocess.run([sys.executable, "-c", "import locale, os, sys; sys.path.insert(0, '.'); import llmrun; "
                               "os.getuid() or (os.setgid(65534), os.setuid(65534)); sys.exit(llmrun.main(sys.argv[1:]))", *args], cwd=site.folder, env=dict(site.env, HOME="/"), text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        assert done.returncode == 2 and "Traceback" not in done.stdout, done.stdout
        return done.stdout.splitlines()[-1]
    assert "permission denied" in as_nobody("submit", "config.json")
    secret.chmod(0o644)
    site.folder.chmod(0o555)
    assert "run's folder" in as_nobody("run", "--here", "config.json")
    assert "permission denied" in as_nobody("submit", "config.json", "--set", "slurm.output=logs/out.txt")
    assert "cannot be written" in as_nobody("submit", "config.json", "--set", f"results.folder={site.folder}/answers")
    site.folder.chmod(0o755)


def test_a_model_that_is_none(site):
    folder = site.folder

    def said(path):
        return refused(site, "config.json", "--set", f"model.path={path}")
    assert "no such file" in said("none.gguf")
    assert "a folder" in said(".")
    (folder / "text.gguf").write_text("hello, this is not a model")
    assert "not a GGUF file" in said("text.gguf")
    (folder / "empty.gguf").write_text("")
    assert "not a GGUF file" in said("empty.gguf")
    whole = site.model.read_bytes()
    for cut in (5, 40, len(whole) - 20):
        (folder / "cut.gguf").write_bytes(whole[:cut])
        assert "cut short" in said("cut.gguf")
    for part in (1, 2):
        shutil.copy(site.model, folder / f"big-{part:05d}-of-00003.gguf")
    assert "part 2 of a split model" in said("big-00002-of-00003.gguf") and "big-00001" in site.output
    assert "part big-00003-of-00003.gguf is missing" in said("big-00001-of-00003.gguf")
    (folder / "lies.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 2**60, 2**60))
    assert "cut short or damaged" in said("lies.gguf")
    assert "name a GGUF file" in said('""')


def test_an_engine_that_cannot_run(site):
    empty = site.folder / "empty"
    empty.mkdir()
    assert "no llama-server there" in refused(site, "config.json", "--set", "engine.path=empty")
    assert "no llama-server there" in refused(site, "config.json", "--set", "engine.path=nowhere")
    (empty / "llama-server").write_text("#!/bin/sh\n")
    assert "not executable" in refused(site, "config.json", "--set", "engine.path=empty")


@pytest.mark.parametrize("age", ["new", "old"])
def test_a_build_without_rpc_is_named_on_several_nodes(site, age):
    build = make_build(site.folder / "build", age=age, rpc=False)
    site.config(engine={"path": str(build)}, slurm={"nodes": 2})
    said = site.llmrun("submit", "config.json", "--wait", code=3)
    assert "RPC" in said and "GGML_RPC" in said
    assert "RPC" in site.status()["detail"] and "RPC" in site.job_output()


@pytest.mark.parametrize("key, value, named, words", [
    ("slurm.partition", "mian", '[slurm] partition = "mian": ', 'did you mean "main"'),
    ("slurm.partition", "nowhere", '[slurm] partition = "nowhere": ', "this cluster has main"),
    ("slurm.nodes", "9", "[slurm] nodes = 9: ", "at most 4"), ("slurm.time", "05:00:00", '[slurm] time = "05:00:00": ', 'at most "04:00:00"'),
    ("slurm.gpus_per_node", "9", '[slurm] gpus_per_node = "9": Slurm refuses', "`sinfo -o '%P %c %m %G'`"),
    ("slurm.nodelist", "node9", '[slurm] nodelist = "node9": Slurm refuses', "`sinfo -N` lists the nodes"),
    ("slurm.mem", "lots", '[slurm] mem = "lots": Slurm refuses', 'write it as in "64G"'),
    ("slurm.extra.frob", "1", "Slurm refuses the job: unrecognized option '--frob'", "see [slurm] and [slurm.extra]")])
def test_what_the_cluster_cannot_give(site, key, value, named, words):
    """Its line names the key with its value, and then the mend."""
    what, _, mend = refused(site, "config.json", "--set", f"{key}={value}").partition("; ")
    assert (f"--set {key}={value}: {named}" if f"[{key.split('.')[0]}]" in named else f"config.json: {named}") in what, site.output
    assert words in mend


def test_folders_that_cannot_be_written(site):
    (site.folder / "file").write_text("")
    path = site.folder / "file"
    for key, value, what, mend in [
            ("run_dir", "file", f'run_dir = "{path}": cannot make the run\'s folder: file exists', "name a folder that you may write to"),
            ("results.folder", "file", f'[results] folder = "{path}": cannot be written to: not a dir', "name a folder"),
            ("results.folder", "file/deeper", f'[results] folder = "{path}/deeper": cannot be written to: not a dir', "name a folder"),
                ("results.folder", "/proc/answers", '[results] folder = "/proc/answers": cannot be written to', "name a folder"),
            ("slurm.output", "file/out.txt", f'[slurm] output = "{path}/out.txt": {path}: file exists', "name a folder"),
            ("results.file_name", "../{path}", '[results] file_name = "../{path}": ../part0/000.txt is outside', 'take out "/" and ".."'),
            ("results.file_name", "all.txt", '[results] file_name = "all.txt": two answers would land in one file', '"{path}" or "{name}"')]:
        line = refused(site, "config.json", "--set", f"{key}={value}")
        assert f"--set {key}={value}: {what}" in line and mend in line.partition("; ")[2], line


def test_a_full_disk_leaves_no_half_made_run(site):
    """The size limit of files stands for a full disk: the first write beyond it fails with an error, too."""
    limited = "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); " \
              "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)); sys.path.insert(0, '.'); " \
              "sys.argv = ['llmrun.py', 'submit', 'config.json']; import llmrun; sys.exit(llmrun.main())"
    subprocess.run(["sinfo"], env=site.env, stdout=subprocess.DEVNULL)  # Slurm's commands are compiled: below the limit half of them would be kept
    done = subprocess.run([sys.executable, "-c", limited], cwd=site.folder, env=site.env, text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT)
    assert done.returncode == 2, done.stdout
    assert "cannot make the run's folder" in done.stdout and "Traceback" not in done.stdout
    assert not site.runs()


def test_old_flat_configs_with_mistakes(site):
    flat = {"dir_llama_script": str(site.bin), "model": str(site.model), "prompts_user_dir": "prompts", "nodes": 3, "ntasks": 2}
    (site.folder / "config.json").write_text(json.dumps(flat))
    assert "ntasks = 2 but nodes = 3" in refused(site, "config.json")
    (site.folder / "config.json").write_text(json.dumps(dict(flat, ntasks=3, prt_rpc=1)))
    assert 'did you mean "port_rpc"' in refused(site, "config.json")
    (site.folder / "config.json").write_text(json.dumps(dict(flat, ntasks=3, sbatch_script="none.sh")))
    assert "none.sh" in refused(site, "config.json")


def test_a_venv_without_python_is_named_by_the_job(site):
    site.config(environment={"venv": str(site.folder / "novenv")})
    said = site.llmrun("submit", "config.json", "--wait", code=3)
    assert "novenv/bin/python does not run as Python 3.9 or newer" in said


def test_a_prompt_that_was_changed_before_its_turn_fails_alone(site):
    site.config(slurm={"extra": {"begin": "now+2"}})
    waiting = site.start("submit", "config.json", "--wait")
    wait_for("the run", site.runs)
    (site.folder / "prompts" / "part0" / "000.txt").write_text("Something else\n")
    output, _ = waiting.communicate(timeout=60)
    assert waiting.returncode == 1 and "5 prompts are answered, 1 failed" in output, output
    failed = json.loads((site.run / "results" / "errors.jsonl").read_text())
    assert "the prompt was changed" in failed["error"]["message"] and failed["custom_id"].endswith("000.txt")


@pytest.mark.parametrize("version", [v for v in ("3.6", "3.7", "3.8") if python_of(v)])
def test_an_old_python_goes_on_in_a_newer_one_or_says_what_to_do(site, version):
    def started(*args, **env):
        return subprocess.run([python_of(version), "llmrun.py", *args], cwd=site.folder, env=dict(site.env, **env),
                              universal_newlines=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    for named in ("/nowhere/python", python_of(version)):
        done = started("status", PATH="/nowhere", LLMRUN_PYTHON=named)
        assert done.returncode == 2 and len(done.stdout.splitlines()) == 1, done.stdout
        assert f"Python {version}" in done.stdout and named in done.stdout
    done = started("status", PATH="/nowhere")
    assert done.returncode == 2 and "no python3.9 to python3.14 on the PATH runs" in done.stdout
    assert f"Python {platform.python_version()}" in started("--version", LLMRUN_PYTHON=sys.executable).stdout
    shims = site.folder / "shims"
    shims.mkdir()
    (shims / "python3.14").write_text("#!/bin/sh\nexit 127\n")
    (shims / "python3.14").chmod(0o755)
    (shims / "python3.9").symlink_to(sys.executable)
    assert "llmrun" in started("--version", PATH=str(shims)).stdout


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-"])
def test_a_closed_stream_costs_no_command(site, closed):
    done = subprocess.run(["bash", "-c", f"{sys.executable} llmrun.py status {closed}"], cwd=site.folder, env=site.env,
                          capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
