"""The fake engines keep the habits of the real ones: flags, exit codes, HTTP answers, deaths.

Each program is started as its user would, on free ports of the loopback."""

import concurrent.futures
import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "fakes"))
import llama  # noqa: E402
from build import make_build, make_model  # noqa: E402


@pytest.fixture(scope="session")
def builds(tmp_path_factory):
    folder = tmp_path_factory.mktemp("builds")
    return {(age, rpc): make_build(str(folder / ("%s-%s" % (age, rpc))), age=age, rpc=rpc)
            for age in ("new", "old") for rpc in (True, False)}


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    return str(make_model(tmp_path_factory.mktemp("model") / "tiny.gguf"))


@pytest.fixture
def start(builds, model, tmp_path):
    """start(flags…, age=, env=…) → a running llama-server; all are killed at the end."""
    with contextlib.ExitStack() as stack:
        yield lambda *flags, **how: stack.enter_context(
            Program([os.path.join(builds[how.pop("age", "new"), True], "llama-server"),
                     *(("-m", model) if "-m" not in flags else ()), *flags], tmp_path, **how))


@pytest.fixture
def worker(builds, tmp_path):
    """worker(flags…, age=) → a running RPC worker that takes connections."""
    with contextlib.ExitStack() as stack:
        def begin(*flags, age="new", **env):
            name = "ggml-rpc-server" if age == "new" else "rpc-server"
            program = stack.enter_context(
                Program([os.path.join(builds[age, True], name), *flags], tmp_path, port_flag="-p", **env))
            until(program.listens, program)
            return program
        yield begin


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def until(condition, program=None, seconds=10):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end and (not program or program.process.poll() is None), (
            program and program.log())
        time.sleep(0.01)


class Program:
    """One process, its port, its log file."""

    def __init__(self, argv, folder, port_flag="--port", wait=True, **env):
        self.port = free_port()
        self.wait = wait and port_flag == "--port"
        self.logfile = str(folder / ("log-%d" % self.port))
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("LLAMA_", "FAKE_", "XDG_"))}
        clean.update(HOME=str(folder), **{key: str(value) for key, value in env.items()})
        with open(self.logfile, "wb") as log:
            self.process = subprocess.Popen([*argv, port_flag, str(self.port)], stdout=log,
                                            stderr=subprocess.STDOUT, env=clean, cwd=str(folder))

    def __enter__(self):
        if self.wait:
            until(self.ready, self)
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()

    def log(self):
        with open(self.logfile) as file:
            return file.read()

    def listens(self):
        with socket.socket() as sock:
            return not sock.connect_ex(("127.0.0.1", self.port))

    def ready(self):
        return self.listens() and self.get("/health")[0] == 200

    def connect(self):
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)

    def get(self, path, **headers):
        return exchange(self.connect(), "GET", path, None, headers)

    def chat(self, text="say something", **body):
        headers = body.pop("headers", {})
        body = dict({"messages": [{"role": "user", "content": text}], "max_tokens": 40}, **body)
        return exchange(self.connect(), "POST", "/v1/chat/completions", body, headers)

    def ends_with(self, code):
        assert self.process.wait(10) == code, self.log()
        return self.log()


def exchange(connection, method, path, body, headers):
    connection.request(method, path, body=json.dumps(body) if body is not None else None, headers=headers)
    answer = connection.getresponse()
    data = answer.read().decode()
    return answer.status, json.loads(data) if answer.headers["Content-Type"].startswith("application/json") else data


def run(build, program, *flags, **env):
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("LLAMA_", "FAKE_", "XDG_"))}
    done = subprocess.run([os.path.join(build, program), *flags], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          env=dict(clean, **env), timeout=10)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


# ── command lines ──────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("age, known, unknown", [
    ("new", ["--load-mode", "--fit", "--cache-ram", "--no-ui", "--no-webui", "--rpc"], ["--no-mmap", "--mlock"]),
    ("old", ["--no-mmap", "--mlock", "--kv-unified", "--rpc", "--no-webui"], ["--fit", "--no-ui", "--cache-ram"]),
])
def test_help_lists_exactly_the_flags_of_that_build(builds, age, known, unknown):
    code, out, _ = run(builds[age, True], "llama-server", "--help")
    words = [word for line in out.splitlines() if line[:1] == "-" for word in line.replace(",", " ").split()]
    assert code == 0 and all(flag in words for flag in known) and not any(flag in words for flag in unknown)
    code, _, err = run(builds[age, True], "llama-server", unknown[0])
    assert (code, err) == (1, "error: invalid argument: %s\n" % unknown[0])


def test_the_version_is_told_on_stderr_in_the_shape_of_its_age(builds):
    assert run(builds["new", True], "llama-server", "--version")[2].startswith("version: 0.6.0-dev (build 11434")
    assert run(builds["old", True], "llama-server", "--version")[2].startswith("version: 6096 (4227c9b)")


def test_a_value_is_never_joined_to_its_flag(builds):
    code, _, err = run(builds["new", True], "llama-server", "--port=8080")
    assert (code, err) == (1, "error: invalid argument: --port=8080\n")
    assert run(builds["new", True], "llama-server", "--port", "many")[0] == 1
    assert run(builds["new", True], "llama-server", "--port")[0] == 1
    assert "removed" in run(builds["new", True], "llama-server", "--draft", "4")[2]


def test_a_build_without_rpc_says_so(builds):
    assert "RPC not supported in this build" in run(builds["new", False], "llama-server", "--rpc", "h:1")[2]
    assert run(builds["old", False], "llama-server", "--rpc", "h:1")[2] == "error: invalid argument: --rpc\n"
    assert not os.path.exists(os.path.join(builds["new", False], "ggml-rpc-server"))


def test_environment_and_config_file_speak_but_the_command_line_wins(start, tmp_path):
    config = tmp_path / "config" / "llama.cpp"
    config.mkdir(parents=True)
    (config / "config.ini").write_text("[*]\nctx-size = 2048\nparallel = 3\nalias = from-file\n")
    server = start("-np", "2", XDG_CONFIG_HOME=tmp_path / "config", LLAMA_ARG_ALIAS="from-env",
                   LLAMA_ARG_N_PARALLEL=8)
    props = server.get("/props")[1]
    assert (props["total_slots"], props["default_generation_settings"]["n_ctx"]) == (2, 1024)
    assert server.get("/v1/models")[1]["data"][0]["id"] == "from-env"
    assert "LLAMA_ARG_N_PARALLEL environment variable is set, but will be overwritten" in server.log()


@pytest.mark.parametrize("age, flags, slots, ctx", [
    ("new", [], 4, 4096), ("new", ["-np", "2"], 2, 4096), ("new", ["-np", "4", "-c", "512"], 4, 256),
    ("new", ["-np", "2", "-c", "1000", "-kvu"], 2, 1024), ("new", ["-np", "1", "-c", "8192"], 1, 4096),
    ("old", [], 1, 4096), ("old", ["-np", "4", "-c", "1000"], 4, 250)])
def test_the_context_of_a_slot(start, age, flags, slots, ctx):
    props = start(*flags, age=age).get("/props")[1]
    assert (props["total_slots"], props["default_generation_settings"]["n_ctx"]) == (slots, ctx)


def test_without_a_model_the_new_one_is_a_router_and_the_old_one_fails(builds, start):
    server = start("-m", "", wait=False)
    until(server.ready, server)
    assert server.get("/v1/models")[1]["data"] == []
    assert run(builds["old", True], "llama-server", "--port", str(free_port()))[0] == 1


# ── start and end ──────────────────────────────────────────────────────────────────────────

def test_while_loading_every_endpoint_answers_503(start):
    server = start(FAKE_LLAMA_LOAD_S=0.5, wait=False)
    until(server.listens, server)
    for path in ("/health", "/v1/models", "/nowhere"):
        assert server.get(path) == (503, {"error": {"code": 503, "message": "Loading model",
                                                    "type": "unavailable_error"}})
    until(server.ready, server)
    assert "n_slots = 4, n_ctx_slot = 4096, kv_unified = 'true'" in server.log()
    assert "listening on http://127.0.0.1:%d" % server.port in server.log()


@pytest.mark.parametrize("name, content, message", [
    ("absent.gguf", None, "No such file or directory"),
    ("text.gguf", b"hello, world", "invalid magic characters: 'hell', expected 'GGUF'"),
    ("short.gguf", b"GGUF\x03\0\0\0\0\0\0\0", "failed to read header"),
])
def test_a_model_that_cannot_be_read_ends_the_server(start, tmp_path, name, content, message):
    if content:
        (tmp_path / name).write_bytes(content)
    log = start("-m", str(tmp_path / name), wait=False).ends_with(1)
    assert message in log and "failed to load model, '%s'" % (tmp_path / name) in log


def test_only_the_first_part_of_a_split_model_loads(start, tmp_path):
    first, second = tmp_path / "m-00001-of-00002.gguf", tmp_path / "m-00002-of-00002.gguf"
    make_model(first, split__no=0, split__count=2)
    assert "failed to load GGUF split" in start("-m", str(first), wait=False).ends_with(1)
    make_model(second, split__no=1, split__count=2)
    log = start("-m", str(second), wait=False).ends_with(1)
    assert "illegal split file idx: 1" in log and "must be loaded with the first split" in log
    start("-m", str(first))


def test_a_port_in_use_ends_the_new_server_but_old_ones_share_it(builds, model, start):
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        for age in ("new", "old"):
            code, _, err = run(builds[age, True], "llama-server", "-m", model, "--port",
                               str(holder.getsockname()[1]))
            assert code == 1 and "couldn't bind HTTP server socket" in err
    old = start(age="old")
    other = start(age="old", wait=False)
    until(lambda: "server is listening" in other.log(), other)
    twin = start("--port", str(old.port), age="old", wait=False)
    assert twin.process.poll() is None


def test_a_server_that_fails_or_hangs_while_loading(start):
    log = start(wait=False, FAKE_LLAMA_LOAD_FAIL="ggml_cuda: out of memory\nsecond line").ends_with(1)
    assert "out of memory" in log and "second line" in log
    server = start(wait=False, FAKE_LLAMA_HANG="load")
    until(server.listens, server)
    time.sleep(0.2)
    assert server.get("/health")[0] == 503
    server.process.terminate()
    server.ends_with(-signal.SIGTERM)


def test_term_ends_an_idle_server_at_once(start):
    server = start()
    idle = server.connect()
    assert exchange(idle, "GET", "/health", None, {})[0] == 200
    server.process.terminate()
    server.ends_with(0)


def test_term_cuts_streams_but_waits_for_the_clients_of_plain_requests(start):
    server = start(FAKE_LLAMA_TOKENS_PER_S=5, FAKE_LLAMA_ANSWER_TOKENS=100)
    stream, plain = post(server, stream=True, max_tokens=100), post(server, max_tokens=100)
    stream.getresponse().readline()
    until(lambda: sum(slot["is_processing"] for slot in server.get("/slots")[1]) == 2, server)
    server.process.terminate()
    time.sleep(0.3)
    assert server.process.poll() is None
    plain.sock.close()
    server.ends_with(0)


def test_a_second_term_ends_it_with_1(start):
    server = start(FAKE_LLAMA_TOKENS_PER_S=1)
    waiting = post(server)
    until(lambda: any(slot["is_processing"] for slot in server.get("/slots")[1]), server)
    server.process.terminate()
    until(lambda: "cleaning up" in server.log(), server)
    server.process.terminate()
    assert "second interrupt" in server.ends_with(1)
    waiting.close()


def post(server, **body):
    connection = server.connect()
    body = dict({"messages": [{"role": "user", "content": "go on"}], "max_tokens": 40}, **body)
    connection.request("POST", "/v1/chat/completions", body=json.dumps(body))
    return connection


# ── answers ────────────────────────────────────────────────────────────────────────────────

def test_the_same_prompt_gets_the_same_answer_and_another_seed_another(start):
    server = start()
    first, again, other = (server.chat("tell me of Łódź", seed=seed)[1] for seed in (1, 1, 2))
    text = first["choices"][0]["message"]["content"]
    assert text == again["choices"][0]["message"]["content"] != other["choices"][0]["message"]["content"]
    assert text.endswith("tell me of Łódź") and first["choices"][0]["finish_reason"] == "stop"
    used, times = first["usage"], first["timings"]
    assert used["total_tokens"] == used["prompt_tokens"] + used["completion_tokens"]
    assert times["predicted_n"] == used["completion_tokens"] and times["prompt_n"] == used["prompt_tokens"]


def test_an_answer_tells_to_which_question_it_belongs(start):
    """Whoever swaps two answers, or loses a part of a question, is seen by the first word, even of one token."""
    server = start("-np", "2", "-c", "1024")
    questions = [{}, {"seed": 1}, {"seed": 2}, {"temperature": 0}, {"model": "m"}, {"max_tokens": 1}, {"max_tokens": 2},
                 {"messages": [{"role": "system", "content": "hello"}]},
                 {"messages": [{"role": "system", "content": "be"}, {"role": "user", "content": "hello"}]},
                 {"messages": [{"role": "user", "content": "be"}, {"role": "user", "content": "hello"}]}]
    answers = []
    for question in questions:
        body = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 9, **question}
        choice = exchange(server.connect(), "POST", "/v1/chat/completions", body, {})[1]["choices"][0]
        answers.append(choice["message"]["content"])
        assert answers[-1][:8] == llama.mark_of(body)[:len(answers[-1])] and len(answers[-1]) >= 4
    assert len({answer[:4] for answer in answers}) == len(questions)


def test_limits_end_an_answer_and_without_one_it_fills_the_context(start):
    server = start("-np", "1", "-c", "256")
    short = server.chat("one two three four", max_tokens=3)[1]
    assert short["choices"][0]["finish_reason"] == "length" and short["usage"]["completion_tokens"] == 3
    nearest = server.chat("one two three four", n_predict=2, max_completion_tokens=4, max_tokens=9)[1]
    assert nearest["usage"]["completion_tokens"] == 2
    endless = server.chat("one two three four", max_tokens=None)[1]
    assert endless["choices"][0]["finish_reason"] == "length" and endless["usage"]["total_tokens"] == 256


def test_a_prompt_longer_than_its_slot(start):
    long = "word " * 400
    new = start("-np", "1", "-c", "256")
    for stream in (False, True):
        assert new.chat(long, stream=stream) == (400, {"error": {
            "code": 400, "message": "request (500 tokens) exceeds the available context size (256 tokens), "
            "try increasing it", "type": "exceed_context_size_error", "n_prompt_tokens": 500, "n_ctx": 256}})
    status, body = start("-c", "256", "--no-context-shift", age="old").chat(long)
    assert status == 400 and body["error"]["type"] == "invalid_request_error" and "n_ctx" not in body["error"]
    assert start("-c", "256", age="old").chat(long)[0] == 200


def test_a_stream_has_role_content_finish_usage_and_done(start):
    server = start()
    text = server.chat("stream this", stream=True, stream_options={"include_usage": True})[1]
    lines = [line[6:] for line in text.split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    role, *content, finish, usage = map(json.loads, lines)
    assert role["choices"][0]["delta"]["role"] == "assistant"
    spoken = "".join(chunk["choices"][0]["delta"]["content"] for chunk in content)
    assert spoken == server.chat("stream this")[1]["choices"][0]["message"]["content"]
    assert (finish["choices"][0]["finish_reason"], finish["choices"][0]["delta"]) == ("stop", {})
    assert usage["choices"] == [] and usage["usage"]["completion_tokens"] == len(content) and usage["timings"]
    assert '"timings"' in server.chat("stream this", stream=True)[1].split("\n\n")[-3]


def test_the_old_one_knows_fewer_words(start):
    server = start("-c", "256", age="old", FAKE_LLAMA_EOS=1)
    text = server.chat("stream this", stream=True, stream_options={"include_usage": True})[1]
    finish = json.loads(text.split("\n\n")[-3][6:])
    assert finish["choices"][0]["finish_reason"] == "stop" and finish["usage"] and "cache_n" not in finish["timings"]
    ignored = server.chat("one two three", max_tokens=None, max_completion_tokens=2)[1]
    assert ignored["usage"]["completion_tokens"] > 2 and "prompt_tokens_details" not in ignored["usage"]
    assert server.chat(messages=None)[0] == server.chat(n=2)[0] == 500


def test_pings_fill_the_silence_between_two_tokens(start):
    server = start("--sse-ping-interval", "1", FAKE_LLAMA_TOKENS_PER_S=0.8)
    assert "}\n\n:\n\ndata: {" in server.chat(stream=True, max_tokens=2)[1]


def test_slots_are_few_and_the_queue_has_no_end(start):
    server = start("-np", "2", "-c", "1024", "--metrics", FAKE_LLAMA_TTFT_S=0.3)
    began = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        answers = [pool.submit(server.chat) for _ in range(6)]
        until(lambda: "llamacpp:requests_deferred 4" in server.get("/metrics")[1])
        assert "llamacpp:requests_processing 2" in server.get("/metrics")[1]
        assert server.get("/slots?fail_on_no_slot=1")[0] == 503
        assert [answer.result()[0] for answer in answers] == [200] * 6
    assert 0.9 <= time.monotonic() - began < 2


def test_a_client_that_leaves_frees_its_slot(start):
    server = start("-np", "1", "-c", "512", FAKE_LLAMA_TOKENS_PER_S=1, FAKE_LLAMA_DISCONNECT_S=0.2)
    for stream in (False, True):
        connection = post(server, stream=stream)
        until(lambda: server.get("/slots")[1][0]["is_processing"])
        connection.sock.shutdown(socket.SHUT_RDWR)
        connection.close()
        until(lambda: not server.get("/slots")[1][0]["is_processing"], seconds=2)


def test_a_unified_pool_that_overflows_fails_everybody_in_it(start):
    server = start("-np", "2", "-c", "256", "-kvu", FAKE_LLAMA_TTFT_S=0.3)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        answers = [pool.submit(server.chat, max_tokens=200, ignore_eos=True).result for _ in range(2)]
        for status, body in [answer() for answer in answers]:
            assert status == 500 and body["error"]["message"] == "Context size has been exceeded."


def test_more_choices_than_slots_are_refused(start):
    server = start("-np", "2", "-c", "1024")
    texts = {choice["message"]["content"] for choice in server.chat(n=2)[1]["choices"]}
    assert len(texts) == 2 and server.chat(n=3)[0] == 400


def test_keys_guard_all_but_health(start, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("# who may\nsecret\n\nother\n")
    server = start("--api-key-file", str(keys), LLAMA_API_KEY="third")
    assert server.chat() == (401, {"error": {"code": 401, "message": "Invalid API Key",
                                             "type": "authentication_error"}})
    assert server.get("/v1/models")[0] == 401 and server.get("/health")[0] == 200
    for key in ("secret", "other", "third"):
        assert server.chat(headers={"Authorization": "Bearer " + key})[0] == 200
    assert server.get("/props", **{"X-Api-Key": "secret"})[0] == 200
    keys.write_text("")
    assert start("--api-key-file", str(keys)).chat()[0] == 200
    assert "failed to open file" in start("--api-key-file", "/none", wait=False).ends_with(1)


def test_other_endpoints(start):
    server = start("-np", "1")
    assert server.get("/metrics")[0] == 501 and server.get("/none")[1]["error"]["message"] == "File Not Found"
    ask = server.connect()
    status, body = exchange(ask, "POST", "/v1/completions", {"prompt": "once upon", "max_tokens": 9}, {})
    assert status == 200 and body["choices"][0]["text"].endswith("once upon")
    body = exchange(ask, "POST", "/completion", {"prompt": "once upon", "n_predict": 9}, {})[1]
    assert body["content"].endswith("once upon") and body["stop_type"] == "eos"
    assert exchange(ask, "POST", "/v1/embeddings", {"input": "a"}, {})[0] == 501
    assert exchange(ask, "POST", "/v1/chat/completions", {"max_tokens": 1}, {})[0] == 400
    assert exchange(start("--embeddings").connect(), "POST", "/v1/embeddings", {"input": "a"}, {})[0] == 400
    pooled = start("--embeddings", "--pooling", "mean")
    assert exchange(pooled.connect(), "POST", "/v1/embeddings", {"input": "word " * 3000}, {})[0] == 500
    vectors = exchange(pooled.connect(), "POST", "/v1/embeddings", {"input": ["a", "b"]}, {})[1]
    assert [len(entry["embedding"]) for entry in vectors["data"]] == [64, 64]


def test_hundreds_of_connections_are_kept_alive_for_a_hundred_requests(start):
    server = start("-np", "8")
    connections = [server.connect() for _ in range(200)]
    for connection in connections * 2:
        assert exchange(connection, "GET", "/health", None, {})[0] == 200
    one = server.connect()
    for count in range(1, 101):
        one.request("GET", "/health")
        answer = one.getresponse()
        answer.read()
        assert (answer.headers["Connection"] == "close") == (count == 100)


def test_the_old_server_serves_no_more_connections_than_it_has_threads(start):
    server = start("--threads-http", "2", age="old")
    held = [server.connect() for _ in range(3)]
    for connection in held:
        connection.request("GET", "/health")
    assert [held[i].getresponse().read() for i in (0, 1)] == [b'{"status":"ok"}'] * 2
    held[2].sock.settimeout(0.3)
    with pytest.raises(socket.timeout):
        held[2].sock.recv(1)
    held[0].close()
    held[2].sock.settimeout(5)
    assert held[2].sock.recv(12) == b"HTTP/1.1 200"


# ── faults ─────────────────────────────────────────────────────────────────────────────────

def test_it_crashes_when_asked_to_and_only_once_if_told(start, tmp_path):
    once = tmp_path / "once"
    server = start(FAKE_LLAMA_CRASH_AFTER=2, FAKE_LLAMA_CRASH_SIGNAL="SEGV", FAKE_LLAMA_ONCE=once)
    assert [server.chat()[0], server.chat()[0]] == [200, 200]
    with pytest.raises((http.client.HTTPException, OSError)):
        server.chat()
    server.ends_with(-signal.SIGSEGV)
    well = start(FAKE_LLAMA_CRASH_AFTER=2, FAKE_LLAMA_ONCE=once)
    assert [well.chat()[0] for _ in range(4)] == [200] * 4


def test_a_poisoned_prompt_kills_it(start):
    server = start(FAKE_LLAMA_POISON="arsenic")
    assert server.chat("plain water")[0] == 200
    with pytest.raises((http.client.HTTPException, OSError)):
        server.chat("some arsenic please")
    server.ends_with(-signal.SIGABRT)


def test_faults_come_at_their_rate_and_are_journalled(start, tmp_path):
    journal = tmp_path / "journal"
    server = start(FAKE_LLAMA_FAULT_RATE=0.5, FAKE_LLAMA_FAULT_SEED=7, FAKE_LLAMA_JOURNAL=journal)
    seen = []
    for number in range(40):
        try:
            seen.append(server.chat("prompt %d" % number)[0])
        except (http.client.HTTPException, OSError):
            seen.append("cut")
    assert set(seen) == {200, 429, 500, 503, "cut"} and 10 < seen.count(200) < 30
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    assert [line["status"] for line in lines] == seen and lines[3]["prompt"] == "prompt 3"
    server = start(FAKE_LLAMA_EMPTY=1)
    assert server.chat()[1]["choices"][0]["message"]["content"] == ""


# ── RPC workers ────────────────────────────────────────────────────────────────────────────

def test_the_exit_codes_of_a_worker_lie(builds):
    new, old = builds["new", True], builds["old", True]
    assert run(new, "ggml-rpc-server", "--mem", "5")[0] == 0
    assert "Usage:" in run(new, "ggml-rpc-server", "--mem", "5")[2]
    code, _, err = run(new, "ggml-rpc-server", "-H", "localhost", "-p", str(free_port()))
    assert code == 0 and "Invalid host address" in err
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        code, _, err = run(new, "ggml-rpc-server", "-p", str(holder.getsockname()[1]))
        assert code == 0 and err == "Failed to create server socket\n"
    assert run(new, "ggml-rpc-server", "-d", "CUDA7")[0] == 1
    assert run(old, "rpc-server", "-p", "0")[0] == 1


def test_a_worker_is_silent_until_its_first_client(builds, tmp_path):
    with Program([os.path.join(builds["new", True], "ggml-rpc-server")], tmp_path, port_flag="-p") as one:
        time.sleep(0.3)
        assert one.process.poll() is None and one.log() == ""
        until(one.listens, one)
        until(lambda: "Client connection closed" in one.log(), one)
        assert one.log().startswith("Starting RPC server v7.0.0\n  endpoint       : 127.0.0.1:%d\n" % one.port)


def test_a_server_names_its_workers_devices_in_their_order(worker, builds):
    workers = [worker(FAKE_LLAMA_GPUS=2, FAKE_LLAMA_GPU_MIB=9000), worker()]
    servers = ",".join("127.0.0.1:%d" % one.port for one in workers)
    out = run(builds["new", True], "llama-server", "--rpc", servers, "--list-devices")[1]
    assert ["RPC0:", "RPC1:", "RPC2:"] == [line.split()[0] for line in out.splitlines()[1:]]
    assert "127.0.0.1:%d (9000 MiB, 8500 MiB free)" % workers[0].port in out


def test_a_second_server_hangs_before_its_port_opens(worker, start):
    one = worker()
    first = start("--rpc", "127.0.0.1:%d" % one.port)
    second = start("--rpc", "127.0.0.1:%d" % one.port, wait=False)
    time.sleep(0.4)
    assert not second.listens() and second.process.poll() is None and second.log() == ""
    first.process.terminate()
    first.ends_with(0)
    until(second.ready, second)
    assert one.process.poll() is None and one.log().count("Accepted client connection") > 4


def test_a_missing_worker_ends_the_server_the_old_one_while_it_loads(start):
    endpoint = "127.0.0.1:%d" % free_port()
    assert "Failed to connect to " + endpoint in start("--rpc", endpoint, wait=False).ends_with(-signal.SIGABRT)
    old = start("--rpc", endpoint, age="old", wait=False).ends_with(-signal.SIGABRT)
    assert "Failed to connect to " + endpoint in old and "GGML_ASSERT" in old
    old = start("--rpc", endpoint, "-ngl", "999", age="old", wait=False).ends_with(1)
    assert "Failed to connect to " + endpoint in old and "exiting due to model loading error" in old


def test_workers_of_another_build_end_the_server(worker, start):
    lost = "Remote RPC server crashed or returned malformed response"
    new, old = worker(), worker(age="old")
    assert lost in start("--rpc", "127.0.0.1:%d" % old.port, wait=False).ends_with(-signal.SIGABRT)
    assert lost in start("--rpc", "127.0.0.1:%d" % new.port, age="old", wait=False).ends_with(-signal.SIGABRT)
    assert "HELLO request size mismatch (0 vs 24)" in new.log()
    other = worker(FAKE_RPC_PROTOCOL="6.0.0")
    log = start("--rpc", "127.0.0.1:%d" % other.port, wait=False).ends_with(-signal.SIGABRT)
    assert "RPC server version mismatch: 6.0.0\n" in log and "RPC handshake failed for 127.0.0.1:%d" % other.port in log
    assert other.process.poll() is None


@pytest.mark.parametrize("name, code, words", [
    ("library", 127, "llama-server: error while loading shared libraries: libcudart.so.12"),
    ("illegal-start", -signal.SIGILL, ""), ("killed", -signal.SIGKILL, "loading model"),
    ("gpu-memory", 1, "llama_model_load: error loading model: unable to allocate CUDA0 buffer"),
    ("gpu-cache", 1, "failed to create_context with model"), ("other-gpu", -signal.SIGABRT, ": CUDA error"),
])
def test_a_server_dies_as_it_is_told_to(start, name, code, words):
    assert words in start(wait=False, FAKE_LLAMA_DIES=name).ends_with(code)


def test_a_server_dies_at_its_first_answer(start):
    server = start(FAKE_LLAMA_DIES="gpu-access")
    with pytest.raises((http.client.HTTPException, OSError)):
        server.chat()
    assert "E CUDA error: an illegal memory access was encountered" in server.ends_with(-signal.SIGABRT)


def test_a_worker_that_dies_takes_the_server_with_it_at_the_next_request(worker, start):
    one = worker()
    server = start("--rpc", "127.0.0.1:%d" % one.port)
    one.process.kill()
    one.process.wait()
    time.sleep(0.1)
    assert server.get("/health")[0] == 200
    with pytest.raises((http.client.HTTPException, OSError)):
        server.chat()
    assert "Remote RPC server crashed or returned malformed response" in server.ends_with(-signal.SIGABRT)


def test_a_worker_that_dies_during_a_request_takes_the_server_at_once(worker, start):
    one = worker(FAKE_RPC_DIE_AFTER_S=1)
    server = start("--rpc", "127.0.0.1:%d" % one.port, FAKE_LLAMA_TTFT_S=30)
    with pytest.raises((http.client.HTTPException, OSError)):
        server.chat()
    server.ends_with(-signal.SIGABRT)
    assert one.process.wait(5) == -signal.SIGSEGV


def test_a_worker_survives_its_server(worker, start):
    one = worker(age="old")
    for _ in range(2):
        server = start("--rpc", "127.0.0.1:%d" % one.port, age="old")
        assert server.chat()[0] == 200
        server.process.terminate()
        server.ends_with(0)
    one.process.terminate()
    one.ends_with(-signal.SIGTERM)
