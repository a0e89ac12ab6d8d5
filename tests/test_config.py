"""The config: one schema, from which everything about it comes."""

import json
import subprocess
import sys

import examples
import llmrun
import pytest


def read(tmp_path, text, *overrides, name="config.toml"):
    (tmp_path / name).write_text(text)
    return llmrun.read_config(tmp_path / name, overrides)[0]


def test_the_written_files_are_what_the_program_would_write_now():
    for path, text in examples.rendered().items():
        assert path.read_text() == text, f"{path.name} differs: run `make sbatch`"


def test_the_example_config_is_a_config_and_shows_every_key(tmp_path):
    text = llmrun.example_toml()
    assert read(tmp_path, text).name == "my-run"
    uncommented = "\n".join(line[2:] if line.startswith("# ") and " = " in line else line for line in text.splitlines()
                            if not line.startswith("# ") or " = " in line and line[2:].split(" = ")[0].isidentifier())
    config = read(tmp_path, uncommented)
    assert config.slurm.nodes == 1 and config.engine.load_timeout == 3600


def test_the_short_config_that_init_writes_is_a_config(tmp_path):
    assert read(tmp_path, llmrun.example_toml(everything=False)).engine.slots == 4


def test_the_readme_shows_the_config_that_init_writes_and_names_lines_that_it_has():
    readme = (examples.ROOT / "README.md").read_text()
    written = [line for line in llmrun.example_toml(everything=False).splitlines() if not line.startswith("# ") or " = " in line[:15]]
    shown = readme.split("```toml\n")[1].split("```")[0].splitlines()
    assert list(filter(None, shown)) == list(filter(None, written)) and '# partition = ""' in shown
    step = readme.split("Edit three lines")[1].split("3. ")[0]
    for name in ("path", "partition"):
        assert f"`{name}`" in step and any(f"{name} = " in line for line in written)


def test_paths_start_from_the_config_file_and_expand(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    monkeypatch.setenv("WORK", "/work")
    config = read(tmp_path, '[model]\npath = "~/m.gguf"\n[prompts]\nuser = "../p"\n[results]\nfolder = "$WORK/out"')
    assert config.model.path == "/home/ada/m.gguf" and config.results.folder == "/work/out"
    assert config.prompts.user == str(tmp_path.parent / "p")


@pytest.mark.parametrize("text, words", [
    ('{"prompts": {"template": "x\\ud800"}}', "half of a character"), ('{"prompts": {"params": %s}}' % ("[" * 50000), "not JSON"),
    ('{"results": {"folder": "\\udfff"}}', "half of a character")])
def test_odd_text_in_a_config_is_an_error_of_one_line(tmp_path, text, words):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(llmrun.UserError, match=words):
        llmrun.read_config(tmp_path / "config.json")


def test_set_takes_options_of_sbatch_with_their_hyphens(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    config, _ = llmrun.read_config(tmp_path / "config.json", ["slurm.extra.mail-type=END"])
    assert config.slurm.extra == {"mail-type": "END"}


def test_variables_that_mean_the_nodes_are_left_alone(tmp_path):
    config = read(tmp_path, '[engine.llama]\nrpc_cache = "$SCRATCH/rpc"\n[environment]\nvars = {A = "$TMPDIR"}')
    assert config.engine.llama.rpc_cache == "$SCRATCH/rpc" and config.environment.vars == {"A": "$TMPDIR"}


def test_json_and_toml_mean_the_same(tmp_path):
    toml = read(tmp_path, '[slurm]\nnodes = 2\nextra = {licenses = "x"}')
    from_json = read(tmp_path, json.dumps({"slurm": {"nodes": 2, "extra": {"licenses": "x"}}}), name="c.json")
    assert toml.slurm == from_json.slurm


def test_overrides_win_and_need_no_quotes(tmp_path):
    config = read(tmp_path, "[slurm]\nnodes = 2", "slurm.nodes=3", "slurm.partition=gpu", "prompts.params.seed=1",
                  "slurm.time=00:30:00", 'environment.modules=["a", "b"]', "engine.llama.user_settings=true")
    assert config.slurm.nodes == 3 and config.slurm.partition == "gpu" and config.slurm.time == "00:30:00"
    assert config.prompts.params == {"seed": 1} and config.environment.modules == ["a", "b"]
    assert config.engine.llama.user_settings is True


def test_a_frozen_config_reads_back_the_same(tmp_path):
    config = read(tmp_path, 'name = "x"\n[environment]\nvars = {A = "$B"}\n[prompts]\nparams = {stop = ["$C"]}')
    data = json.loads(json.dumps(llmrun.dataclasses.asdict(config)))
    assert llmrun.build_config(llmrun.Config, data, data["source"], None) == config


@pytest.mark.parametrize("text, size", [("24GB", 24 * 10**9), ("24G", 24 * 2**30), ("512 MiB", 2**29), ("1.5GB", 1500000000),
                                        (7, 7)])
def test_sizes(text, size):
    assert llmrun.parse_size(text) == size


@pytest.mark.parametrize("text, seconds", [("90s", 90), ("2min", 120), ("1.5h", 5400), (30, 30), ("1d", 86400)])
def test_durations(text, seconds):
    assert llmrun.parse_duration(text) == seconds


def test_a_requests_time_is_a_duration_and_need_not_be_given(tmp_path):
    assert read(tmp_path, '[engine]\nrequest_timeout = "90s"').engine.request_timeout == 90
    assert not read(tmp_path, "").engine.request_timeout


def test_help_config_is_the_example_file():
    done = subprocess.run([sys.executable, llmrun.__file__, "help", "config"], stdout=subprocess.PIPE, text=True)
    assert done.stdout.strip() == llmrun.example_toml().strip()


@pytest.mark.parametrize("tables, words", [
    ({"model": {"path": "$NOWHERE_AT_ALL/m.gguf"}}, "NOWHERE_AT_ALL is not set"),
    ({"environment": {"vars": {"A; rm x": "1"}}}, "no name of an environment variable"),
    ({"slurm": {"extra": {"comment": "a\n#SBATCH --nodes=9"}}}, "on one line"),
    ({"slurm": {"partition": "gpu\nrm x"}}, "on one line")])
def test_what_would_become_something_else_in_a_script_is_refused(tmp_path, tables, words):
    with pytest.raises(llmrun.UserError, match=words):
        read(tmp_path, json.dumps(tables), name="config.json")


def test_an_error_names_the_line_in_its_own_table(tmp_path):
    with pytest.raises(llmrun.UserError, match=r"config.toml:5: \[engine\] name"):
        read(tmp_path, '[model]\nname = "m"\n\n[engine]\nname = "nope"\n')


def test_a_mark_at_the_beginning_of_a_file_is_no_text_of_it(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffHello".encode())
    assert llmrun.read_user_file(tmp_path / "a.txt", "prompt") == "Hello"


def test_sbatch_options_end_at_the_first_command(tmp_path):
    script = "#!/bin/bash\n#SBATCH --comment=kept\n# a word\n\n#SBATCH -p gpu\ncd /x\n#SBATCH --nodes=9\n"
    assert llmrun.sbatch_options(script) == ["--comment=kept", "-p gpu"]


def test_an_old_config_dates_its_results_as_its_scripts_did(tmp_path, monkeypatch):
    strftime, then = llmrun.time.strftime, llmrun.time.struct_time((2026, 11, 21, 17, 5, 9, 5, 325, 0))
    monkeypatch.setattr(llmrun.time, "strftime", lambda form: strftime(form, then))
    flat = {"dir_llama_script": "bin", "model": "m.gguf", "prompts_user_dir": "p", "result_dir": "answers", "nodes": "2", "ntasks": 2}
    config = read(tmp_path, json.dumps(flat), name="config.json")
    assert config.results.folder == str(tmp_path / "answers" / "result_21-11-2026_17-05-09") and config.slurm.nodes == 2
    assert config.results.file_name == "result_{name}.txt" and config.engine.context == 8192


@pytest.mark.parametrize("digits", [200, 400, 5000])
@pytest.mark.parametrize("key", ["model.vram_per_node", "engine.load_timeout", "slurm.grace", "slurm.join_timeout", "slurm.time"])
@pytest.mark.parametrize("unit", ["", "GB", "h"])
def test_a_number_of_hundreds_of_digits_is_taken_or_refused_in_one_line(tmp_path, digits, key, unit):
    (tmp_path / "config.json").write_text(json.dumps({"engine": {"name": "echo"}, "slurm": {"time": "UNLIMITED"}}))
    try:
        config, _ = llmrun.read_config(tmp_path / "config.json", [f"{key}={'9' * digits}{unit}"])
        with llmrun.Faults() as faults:
            llmrun.check_shape(config, faults)
        llmrun.job_script(config, 1, "/x", ["drive"])
    except llmrun.UserError as error:
        assert key.split(".")[1] in str(error) and error.mend and len(str(error)) < 600 + len(str(tmp_path))
