"""llama.cpp builds of every age, and the ways they fail, with fakes that keep the real ones' habits."""

import json
import os
import urllib.error
import urllib.request

import llmrun
import pytest
from conftest import wait_for
from fakes.build import make_build, make_model


@pytest.fixture
def old_build(site):
    build = make_build(site.folder / "old-build", age="old")
    site.config(engine={"path": str(build)})
    return build


def command(site):
    return site.wait_for_event("engine_started")["command"]


def test_an_old_build_answers_over_three_nodes(site, old_build):
    site.config(slurm={"nodes": 3})
    site.llmrun("submit", "config.json", "--wait")
    assert len(site.results()) == 6
    assert "-ngl 999" in command(site), "builds without fit keep the model on the CPU unless told"
    assert "--threads-http" in command(site), "an old build answers no more connections than it has threads"


def test_old_builds_are_told_each_devices_share(site, old_build):
    tools = site.folder / "tools"
    tools.mkdir()
    (tools / "nvidia-smi").write_text("#!/bin/sh\nprintf '8000\\n16000\\n'\n")
    (tools / "nvidia-smi").chmod(0o755)
    site.config(slurm={"nodes": 2}, environment={"vars": {"PATH": f"{tools}:$PATH"}})
    site.llmrun("submit", "config.json", "--wait")
    assert "-ts 8000,8000,16000" in command(site), "the worker's one device first, then the head's two"


def test_a_new_build_fits_by_itself(site):
    site.config(slurm={"nodes": 2})
    site.llmrun("submit", "config.json", "--wait")
    assert "-ngl" not in command(site) and "-ts" not in command(site)


def test_layers_and_arguments_of_the_user_are_passed_on(site):
    site.config(engine={"args": ["--seed", "7"], "llama": {"gpu_layers": 12}})
    site.llmrun("submit", "config.json", "--wait")
    assert "-ngl 12" in command(site) and command(site).endswith("--seed 7")


def test_the_users_own_llama_settings_are_kept_out_unless_asked_for(site):
    home = site.folder / "home"
    (home / ".config" / "llama.cpp").mkdir(parents=True)
    (home / ".config" / "llama.cpp" / "config.ini").write_text("[*]\nctx-size = 256\n")
    site.env.update(HOME=str(home), LLAMA_ARG_CTX_SIZE="512", LLAMA_API_KEY="other")
    site.llmrun("submit", "config.json", "--wait")
    log = (site.run / "logs").glob("*/*llama-server.log")
    assert "n_ctx_slot = 1024" in next(log).read_text()


def test_the_engine_asks_for_the_runs_key(site):
    site.config(environment={"vars": {"FAKE_LLAMA_JOURNAL": str(site.folder / "asked.jsonl")}})
    site.llmrun("submit", "config.json", "--wait")
    assert "--api-key-file" in command(site)
    key = (site.run / "key").read_text().strip()
    assert len(key) > 20 and (site.run / "key").stat().st_mode & 0o777 == 0o600
    everything = [path for path in site.run.rglob("*") if path.is_file() and path.name != "key"]
    assert not [path for path in everything if key in path.read_text(errors="replace")], "the key stands in its file only"


def test_nobody_gets_in_without_the_key_of_this_very_run(site):
    """An engine whose key file is empty asks for none at all; one key for all runs would be everybody's."""
    site.llmrun("submit", "config.json", "--wait")
    earlier = (site.run / "key").read_text().strip()
    site.slow()
    site.llmrun("submit", "config.json")
    endpoint = json.loads(wait_for("the endpoint", lambda: (site.run / "endpoint.json").exists()
                                   and (site.run / "endpoint.json").read_text()))

    def asked(key):
        request = urllib.request.Request(endpoint["url"] + "/models", headers={"Authorization": f"Bearer {key}"} if key else {})
        try:
            return urllib.request.urlopen(request, timeout=10).status
        except urllib.error.HTTPError as error:
            return error.code
    key = open(endpoint["key_file"]).read().strip()
    assert [asked(one) for one in (None, "", "none", earlier, key)] == [401, 401, 401, 401, 200]
    site.llmrun("cancel")


def test_a_worker_cache_is_used_only_where_the_user_named_a_folder(site):
    site.config(slurm={"nodes": 2}, engine={"llama": {"rpc_cache": "$SCRATCH_OF_NODE/rpc"}},
                environment={"vars": {"SCRATCH_OF_NODE": str(site.folder / "scratch")}})
    site.slow()
    site.llmrun("submit", "config.json")
    worker = site.process("rpc-server")
    with open(f"/proc/{worker}/environ") as file:
        assert f"LLAMA_CACHE={site.folder}/scratch/rpc" in file.read().split("\0")
    site.llmrun("cancel")


def test_the_startup_of_the_engine_is_told(site):
    site.config(environment={"vars": {"FAKE_LLAMA_LOAD_S": "1"}})
    site.llmrun("submit", "config.json", "--wait")
    said = [event["line"] for event in site.events() if event["event"] == "engine_says"]
    assert any("n_ctx_slot" in line for line in said) and any("listening" in line for line in said)


@pytest.mark.parametrize("variables, words", [
    ({"FAKE_LLAMA_LOAD_FAIL": "llama_model_load: error loading model: unknown model architecture: 'next9'"}, "newer llama.cpp"),
    ({"FAKE_LLAMA_LOAD_FAIL": "ggml_cuda: cudaMalloc failed: out of memory"}, "ran out of memory"),
    ({"FAKE_LLAMA_LOAD_FAIL": "error: something nobody has seen"}, "something nobody has seen"),
    ({"FAKE_LLAMA_HANG": "load"}, "waited 2s for llama-server on node1 to be ready"),
])
def test_an_engine_that_does_not_start_is_explained(site, variables, words):
    site.config(environment={"vars": variables}, engine={"load_timeout": 2 if "HANG" in str(variables) else 60})
    said = site.llmrun("submit", "config.json", "--wait", code=3)
    assert words in said and words in site.status()["detail"]
    site.assert_nothing_left()


def test_a_worker_that_ends_while_the_model_loads_is_named(site):
    site.config(slurm={"nodes": 2}, environment={"vars": {"FAKE_LLAMA_LOAD_S": "3", "FAKE_RPC_DIE_AFTER_S": "1"}})
    said = site.llmrun("submit", "config.json", "--wait", code=3)
    for words in (said, site.status()["detail"]):
        assert "rpc on node2: it crashed (was killed by SIGSEGV)" in words


def test_a_full_context_is_a_failed_prompt_and_the_run_goes_on(site):
    (site.folder / "prompts" / "part0" / "000.txt").write_text("word " * 5000)
    site.llmrun("submit", "config.json", "--wait", code=1)
    assert len(site.results()) == 5
    errors = [json.loads(line) for line in (site.run / "results" / "errors.jsonl").read_text().splitlines()]
    assert [error["custom_id"] for error in errors] == ["part0/000.txt"]
    assert errors[0]["response"]["status_code"] == 400 and errors[0]["llmrun"]["attempts"] == 1
    assert "exceeds the available context size" in site.llmrun("results", "--failed")


def test_faults_that_pass_are_asked_again(site):
    site.write_prompts(40)
    asked = site.folder / "asked.jsonl"
    site.config(environment={"vars": {"FAKE_LLAMA_FAULT_RATE": "0.2", "FAKE_LLAMA_FAULTS": "500,cut,503", "FAKE_LLAMA_FAULT_SEED": "1",
                                      "FAKE_LLAMA_RETRY_AFTER": "0", "FAKE_LLAMA_JOURNAL": str(asked)}})
    site.llmrun("submit", "config.json", "--wait")
    assert len(site.results()) == 40
    assert len(asked.read_text().splitlines()) > 40, "some prompts were asked more than once"


def test_the_endpoint_is_told_while_the_model_answers(site):
    site.slow()
    site.llmrun("submit", "config.json")
    site.wait_for_event("ready")
    wait_for("endpoint.json", lambda: (site.run / "endpoint.json").exists())
    endpoint = json.loads((site.run / "endpoint.json").read_text())
    assert endpoint["url"].startswith("http://127.0.0.1:") and os.path.exists(endpoint["key_file"])
    assert (site.run / "endpoint.json").stat().st_mode & 0o777 == 0o600
    site.llmrun("cancel")
    wait_for("the end of the endpoint", lambda: not (site.run / "endpoint.json").exists())


def test_a_variable_that_the_node_does_not_have_is_named(site):
    site.config(slurm={"nodes": 2}, engine={"llama": {"rpc_cache": "$NOWHERE/rpc"}})
    assert "$NOWHERE/rpc is not set on this node" in site.llmrun("submit", "config.json", "--wait", code=3)


def test_a_split_model_is_loaded_by_its_first_part(site):
    parts = [site.folder / f"m-{number:05d}-of-00002.gguf" for number in (1, 2)]
    for part in parts:
        make_model(part)
    site.config(model={"path": str(parts[0])})
    site.llmrun("submit", "config.json", "--wait")
    assert str(parts[0]) in command(site)


def write_rows(site, *rows):
    (site.folder / "in.jsonl").write_text("".join(json.dumps({"custom_id": f"row-{number}", "method": "POST", "url": url, "body": body}) + "\n"
                                                  for number, (url, body) in enumerate(rows)))
    site.config(prompts={"user": "in.jsonl"}, engine={"context": 2048})


EMBED, CHAT = "/v1/embeddings", "/v1/chat/completions"


def test_an_input_that_asks_for_embeddings_gets_an_engine_that_makes_them(site):
    write_rows(site, (EMBED, {"input": "Why?"}), (EMBED, {"input": ["One", "Two"]}), (EMBED, {"input": "word " * 900}))
    assert "--embeddings --pooling mean -b 2048 -ub 2048" in site.llmrun("check", "config.json")
    site.llmrun("submit", "config.json", "--wait")
    lines = [json.loads(line) for line in (site.run / "results" / "results.jsonl").read_text().splitlines()]
    assert [len(line["response"]["body"]["data"]) for line in lines] == [1, 2, 1]
    assert all(vector["embedding"] for line in lines for vector in line["response"]["body"]["data"])


def test_a_model_that_names_its_pooling_keeps_it(site):
    keys = {"general.architecture": "bert", "bert.block_count": 2, "bert.embedding_length": 64, "bert.context_length": 512,
            "bert.attention.head_count": 4}
    assert llmrun.model_from_keys({**keys, "bert.pooling_type": 2}, 1, ("m",)).pools
    assert not llmrun.model_from_keys({**keys, "bert.pooling_type": 0}, 1, ("m",)).pools
    engine = llmrun.EngineConfig(pooling=llmrun.OWN_POOLING, context=512)
    made = llmrun.LlamaCpp(llmrun.Config(engine=engine), llmrun.Run(site.folder), "0.0.0", 1)
    assert made.for_embeddings(["--embeddings", "--pooling"]) == ["--embeddings", "-b", "512", "-ub", "512"]
    assert made.for_embeddings(["--metrics"]) == [], "a build without them is not told of them"


def test_chat_and_embeddings_in_one_input_are_told_at_check(site):
    message = {"messages": [{"role": "user", "content": "Why?"}]}
    write_rows(site, (EMBED, {"input": "Why?"}), (CHAT, message))
    assert "asks for embeddings and for other answers" in site.llmrun("check", "config.json")
    write_rows(site, (CHAT, message))
    said = site.llmrun("check", "config.json")
    assert "--embeddings" not in said and "asks for embeddings" not in said
