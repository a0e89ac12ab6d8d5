"""Every failure of an engine or a node ends in one line that says what happened and what to change, in the output, in
`status` and in the exit code. The words are those of llama.cpp builds of August 2025 and October 2026."""

import asyncio
import contextlib
import http.server
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import threading
import types

import pytest
from conftest import Site, wait_for
from fakes.build import make_build

import llmrun

CUDA = "/build/ggml/src/ggml-cuda/ggml-cuda.cu"
RPC = "/build/ggml/src/ggml-rpc/ggml-rpc.cpp"
LOADED_NOT = ["srv    load_model: failed to load model, 'm.gguf'", "srv    operator(): operator(): cleaning up before exit...",
              "main: exiting due to model loading error"]
NEW_NOT = ["0.00.008.938 E llama_model_load: error loading model: {}",
           "0.00.008.991 E llama_model_load_from_file_impl: failed to load model",
           "0.00.009.033 E cmn  common_init_: failed to load model 'm.gguf'",
           "0.00.009.075 E srv    load_model: failed to load model, 'm.gguf'",
           "0.00.009.119 I srv    operator(): operator(): cleaning up before exit...",
           "0.00.009.774 E srv  llama_server: exiting due to model loading error"]
CUDA_ALLOC = "ggml_backend_cuda_buffer_type_alloc_buffer: allocating 39979.48 MiB on device 0: cudaMalloc failed: out of memory"
NO_CACHE = "llama_init_from_model: failed to initialize the context: failed to allocate buffer for kv cache"


def new(*errors):
    """The last lines of a new build that could not load its model."""
    return [f"0.00.008.306 E {line}" for line in errors[:-1]] + [line.format(errors[-1]) for line in NEW_NOT]


def gpu(message, where="ggml_backend_cuda_synchronize", call="cudaStreamSynchronize(cuda_ctx->stream())"):
    """The words of a build whose GPU fails; the last line is written past the log, and may come before the others."""
    return [f"4.20.760.357 E CUDA error: {message}", f"4.20.760.359 E   current device: 0, in function {where} at {CUDA}:3145",
            f"4.20.760.360 E   {call}", f"{CUDA}:104: CUDA error"]


ABORTED = "was killed by SIGABRT"
FAILED = "ended with code 1"
ROOM = r"\[slurm\] nodes|more nodes"
TAILS = [  # what failed, its last lines, how it ended; what must be said, and the mend
    ("weights on a GPU, old", [
        CUDA_ALLOC, "alloc_tensor_range: failed to allocate CUDA0 buffer of size 41921519616",
        "llama_model_load: error loading model: unable to allocate CUDA0 buffer",
        "llama_model_load_from_file_impl: failed to load model", *LOADED_NOT], FAILED,
        "does not fit.*out of memory on a GPU.*39979.48 MiB", "nodes"),
    ("weights on a GPU, new", new(
        CUDA_ALLOC, "alloc_tensor_range: failed to allocate CUDA0 buffer of size 41921519616",
        "unable to allocate CUDA0 buffer"), FAILED, "does not fit.*out of memory on a GPU", "nodes"),
    ("weights on an AMD GPU", new("alloc_tensor_range: failed to allocate ROCm0 buffer of size 5368709120",
                                  "unable to allocate ROCm0 buffer"), FAILED, "out of memory on a GPU", "nodes"),
    ("weights on a GPU by Vulkan", new("ggml_vulkan: Device memory allocation of size 1632174080 failed.",
                                       "ggml_vulkan: vk::Device::allocateMemory: ErrorOutOfDeviceMemory",
                                       "unable to allocate Vulkan0 buffer"), FAILED, "out of memory on a GPU", "nodes"),
    ("context on a GPU", [
        CUDA_ALLOC, "alloc_tensor_range: failed to allocate CUDA0 buffer of size 41921519616", NO_CACHE,
        "common_init_from_params: failed to create context with model 'm.gguf'", *LOADED_NOT], FAILED,
        "does not fit.*out of memory on a GPU", r"\[engine\] slots or context"),
    ("compute buffers", [
        "ggml_gallocr_reserve_n: failed to allocate CUDA4 buffer of size 150995968",
        "llama_init_from_model: failed to initialize the context: failed to allocate compute pp buffers", *LOADED_NOT], FAILED,
        "does not fit", r"\[engine\] slots or context"),
    ("context at an RPC worker", [
        "alloc_tensor_range: failed to allocate RPC[node2 10.0.0.2:50052] buffer of size 204800000000", NO_CACHE, *LOADED_NOT],
        FAILED, "does not fit.*RPC worker ran out of memory.*node2", "nodes"),
    ("context in a node's memory", [
        "ggml_aligned_malloc: insufficient memory (attempted to allocate 195312.50 MB)",
        "ggml_backend_cpu_buffer_type_alloc_buffer: failed to allocate buffer of size 204800000000",
        "alloc_tensor_range: failed to allocate CPU buffer of size 204800000000", NO_CACHE, *LOADED_NOT], FAILED,
        "the node ran out of memory", r"\[slurm\] mem"),
    ("a node's memory, in C++", ["terminate called after throwing an instance of 'std::bad_alloc'",
                                 "  what():  std::bad_alloc"], ABORTED, "the node ran out of memory", r"\[slurm\] mem"),
    ("a GPU's memory during the work", gpu("out of memory", "alloc", "cuMemCreate(&handle, reserve_size, &prop, 0)"), ABORTED,
     "out of memory on a GPU while it worked", r"\[engine\] slots or context"),
    ("a GPU's memory during the work, the end first",
     [f"{CUDA}:88: CUDA error", "CUDA error: out of memory", "  current device: 0, in function alloc at x.cu:1"], ABORTED,
     "out of memory on a GPU while it worked", r"\[engine\] slots or context"),
    ("a GPU", gpu("an illegal memory access was encountered"), ABORTED, "a GPU failed.*illegal memory access",
     r"\[slurm\] exclude"),
    ("an AMD GPU", [line.replace("CUDA", "ROCm") for line in gpu("unspecified launch failure")], ABORTED,
     "a GPU failed.*unspecified launch failure", r"\[slurm\] exclude"),
    ("another kind of GPU", [
        "ggml_cuda_compute_forward: RMS_NORM failed",
        *gpu("no kernel image is available for execution on the device", "ggml_cuda_compute_forward", "err")], ABORTED,
        "built for other GPUs", r"\[engine\] path"),
    ("an old driver", gpu("CUDA driver version is insufficient for CUDA runtime version", "ggml_cuda_init", "x"), ABORTED,
     "newer driver", r"\[engine\] path"),
    ("model's architecture, new", new("unknown model architecture: 'next9'"), FAILED,
     "does not know the model's architecture.*next9", "newer llama.cpp"),
    ("model's architecture, old", [
        "llama_model_load: error loading model: error loading model architecture: unknown model architecture: 'next9'",
        "llama_model_load_from_file_impl: failed to load model", *LOADED_NOT], FAILED,
        "does not know the model's architecture.*next9", "newer llama.cpp"),
    ("model's words", new("error loading model vocabulary: unknown pre-tokenizer type: 'next9'"), FAILED,
     "does not know the model", "newer llama.cpp"),
    ("no model file", new("gguf_init_from_file: failed to open GGUF file 'm.gguf' (No such file or directory)",
                          "llama_model_loader: failed to load model from m.gguf"), FAILED, "cannot read", r"\[model\] path"),
    ("half a model file", new("tensor 'blk.2.ffn_down.weight' data is not within the file bounds, model is corrupted or "
                              "incomplete"), FAILED, "cannot read the whole model", r"\[model\] path"),
    ("another file", ["gguf_init_from_file_impl: invalid magic characters: 'HELL', expected 'GGUF'",
                      "llama_model_load: error loading model: llama_model_loader: failed to load model from m.gguf", *LOADED_NOT],
     FAILED, "cannot read", r"\[model\] path"),
    ("too many slots", ["llama_init_from_model: failed to initialize the context: n_seq_max must be <= 64", *LOADED_NOT],
     FAILED, "fewer slots", r"\[engine\] slots"),
    ("port, new", [
        "0.00.007.934 E srv         start: couldn't bind HTTP server socket, hostname: 127.0.0.1, port: 18081",
        "0.00.007.934 I srv    operator(): operator(): cleaning up before exit...",
        "0.00.008.097 E srv  llama_server: exiting due to HTTP server error"], FAILED, "port is in use.*18081",
        r"\[engine\] port"),
    ("port, old", ["main: couldn't bind HTTP server socket, hostname: 127.0.0.1, port: 18081"], FAILED, "port is in use.*18081",
     r"\[engine\] port"),
    ("a worker's port", ["Failed to create server socket", "Starting RPC server v7.0.0", "  endpoint       : 127.0.0.1:18081"],
     "ended with code 0", "port is in use", "rpc_port"),
    ("key file", [
        'error while handling argument "--api-key-file": error: failed to open file \'/nope\'', "usage:",
        "--api-key-file FNAME                    path to file containing API keys (default: none)",
        "to show complete usage, run with -h"], FAILED, "key file cannot be read.*/nope", "folder that all nodes see"),
    ("an argument", ["error: invalid argument: --no-mmap"], FAILED, "does not know an argument.*--no-mmap", r"\[engine\] args"),
    ("an argument's value", ['error while handling argument "-ngl": stoi', "usage:", "-ngl,  --gpu-layers N   x"], FAILED,
     'does not take.*"-ngl"', r"\[engine\] args"),
    ("no RPC, new", ['error while handling argument "--rpc": RPC not supported in this build'], FAILED, "lacks RPC", "GGML_RPC"),
    ("no RPC, old", ["error: invalid argument: --rpc"], FAILED, "lacks RPC", r"\[slurm\] nodes = 1"),
    ("worker of another version", ["RPC server version mismatch: 6.0.0", f"{RPC}:550: RPC handshake failed for 10.0.0.2:50052"],
     ABORTED, "another build", "same build.*" + re.escape("[engine] path")),
    ("worker far older, or lost", [f"{RPC}:354: Remote RPC server crashed or returned malformed response"], ABORTED,
     "worker was lost, or is of another build", "worker's log.*same build"),
    ("client too old, at the worker", [
        "Accepted client connection", "HELLO request size mismatch (0 vs 24) — client needs upgrade to protocol v7.x"],
        "was killed by SIGTERM", "another build", "same build"),
    ("worker lost during the work", [
        "0.02.999.721 E send failed (bytes_sent=0, size_to_send=8)",
        f"{RPC}:569: Remote RPC server crashed or returned malformed response"], ABORTED, "worker was lost", "worker's log"),
    ("worker not reached, new", [f"{RPC}:547: Failed to connect to node2 10.0.0.2:50052"], ABORTED,
     "cannot reach its RPC worker.*node2 10.0.0.2:50052", r"firewall.*\[network\] ports"),
    ("worker not reached, old", [
        "load_tensors: loading model tensors, this can take a while... (mmap = true)", "Failed to connect to 127.0.0.1:18099",
        "llama_model_load: error loading model: vector::_M_range_check: __n (which is 1) >= this->size() (which is 1)",
        *LOADED_NOT], FAILED, "cannot reach its RPC worker.*127.0.0.1:18099", r"firewall.*\[network\] ports"),
    ("a library", ["/opt/llama-server: error while loading shared libraries: libcudart.so.12: cannot open shared object file: No "
                   "such file or directory"], "ended with code 127", "shared library.*libcudart.so.12",
     r"\[environment\] modules"),
    ("an old C library", ["/opt/llama-server: /lib/x86_64-linux-gnu/libc.so.6: version `GLIBC_2.38' not found (required by "
                          "/opt/llama-server)"], FAILED, "shared library.*GLIBC_2.38", r"\[environment\] modules"),
    ("another symbol", ["/opt/llama-server: symbol lookup error: /opt/libggml.so: undefined symbol: ggml_x"],
     "ended with code 127", "shared library.*ggml_x", r"\[environment\] modules"),
    ("another CPU, by a shell", ["/opt/llama-server: cannot execute binary file: Exec format error"], "ended with code 126",
     "another CPU", r"\[engine\] path"),
    ("a lesser CPU", [], "was killed by SIGILL", "instructions.*CPU", "GGML_NATIVE=OFF"),
    ("killed for memory", ["srv    load_model: loading model 'm.gguf'"], "was killed by SIGKILL", "killed.*memory",
     r"\[slurm\] mem"),
    ("a disk", ["srv    load_model: loading model 'm.gguf'"], "was killed by SIGBUS", "cut short|disk", r"\[model\] path"),
    ("a fault of its own", ["slot launch_slot_: id 3 | task 0 | processing task"], "was killed by SIGSEGV", "crashed",
     r"\[engine\] path"),
    ("something nobody has seen", ["a", "0.1 E error: it is raining", "b"], FAILED, "ended with code 1.*it is raining", "logs"),
    ("an assertion", ["/build/ggml/src/ggml.c:4021: GGML_ASSERT(ne > 0) failed"], ABORTED, "SIGABRT.*GGML_ASSERT", "logs"),
    ("a silent end", [], "ended with code 0", "ended with code 0.*said nothing", "logs"),
]


LLAMA = llmrun.LlamaCpp(llmrun.Config(), None, None, 1)


@pytest.mark.parametrize("tail, how, words, mend", [case[1:] for case in TAILS], ids=[case[0] for case in TAILS])
def test_last_words_are_understood(tail, how, words, mend):
    error = llmrun.explain_failure("llama-server on node1", tail, how, LLAMA)
    assert str(error).startswith("llama-server on node1") and "\n" not in str(error) and len(str(error)) < 500
    assert re.search(words, error.what), error
    assert re.search(mend, error.mend), error


def test_chatter_before_the_end_is_no_cause():
    chatter = ["slot launch_slot_: id  3 | task 0 | processing task", "srv  log_server_r: done request: POST /v1 200",
               "load_tensors: CUDA0 model buffer size = 39979.48 MiB", "warning: munmap failed: Invalid argument"]
    error = llmrun.explain_failure("llama-server on node1", chatter, "was killed by SIGKILL", LLAMA)
    assert "killed" in error.what and "[slurm] mem" in error.mend


# ── how many nodes a model takes ───────────────────────────────────────────────


def sized(**model):
    """A config whose model has 40 GB of weights, and the model."""
    config = types.SimpleNamespace(engine=types.SimpleNamespace(name="llama.cpp", context=4096, slots=4, replicas=1),
                                   model=types.SimpleNamespace(**{"vram_per_node": 0, "path": "m.gguf", **model}))
    return config, llmrun.Model("m", "llama", 80, 64, (8,) * 80, 128, 128, 8192, 40 * 10**9, ("m.gguf",))


@pytest.mark.parametrize("nodes, node_bytes, replicas, words", [
    (1, 24 * 10**9, 1, "nodes = 2"), (1, 16 * 10**9, 1, "nodes = 4"), (1, 16 * 10**9, 2, "nodes = 8"),
    (3, 24 * 10**9, 1, "nodes = 4"),  # the estimate was too low: one more
    (2, 0, 1, "nodes"),
])
def test_the_nodes_that_a_model_takes_are_counted(monkeypatch, nodes, node_bytes, replicas, words):
    config, model = sized()
    config.engine.replicas = replicas
    monkeypatch.setattr(llmrun, "read_model", lambda config: model)
    said = llmrun.what_would_fit(config, nodes, node_bytes)
    assert "take 45.4 GB" in said and words in said and "[engine] slots or context" in said


# ── made to happen ─────────────────────────────────────────────────────────────


@pytest.fixture
def here(here):
    here.write_prompts(1)
    return here


def told(here, *words, env=None, **tables):
    """Run it to its failure: the words stand in the output and in `status`, each time in one line."""
    here.config(environment={"vars": env or {}}, **tables)
    output = here.llmrun("run", "--here", "config.json", code=3)
    state = here.status()
    assert state["exit_code"] == 3 and state["state"] == "failed"
    for word in words:
        assert re.search(word, state["detail"]), state["detail"]
        assert re.search(word, output), output
    assert "\n" not in state["detail"]
    return state["detail"]


@pytest.mark.parametrize("death, words", [
    ("host-memory", ["node ran out of memory", r"\[slurm\] mem"]),
    ("other-gpu", ["built for other GPUs", r"\[engine\] path"]),
    ("library", ["shared library.*libcudart.so.12", r"\[environment\] modules"]),
    ("illegal-start", ["instructions.*CPU does not have", "GGML_NATIVE=OFF"]),
    ("killed", ["killed it, most likely for memory", r"\[slurm\] mem"]),
    ("segv", ["crashed", r"\[engine\] path"]),
    ("bus", ["cut short", r"\[model\] path"]),
    ("glibc", ["shared library is missing on the node, or too old", r"\[environment\] modules"]),
])
def test_an_engine_that_dies_at_its_start(here, death, words):
    told(here, *words, env={"FAKE_LLAMA_DIES": death})


@pytest.mark.parametrize("line, words", [
    ("ggml_cuda_init: failed to initialize CUDA: CUDA driver version is insufficient for CUDA runtime version",
     ["newer driver than the node has", r"\[environment\] modules"]),
    ("llama_init_from_model: failed to initialize the context: n_seq_max must be <= 64", ["fewer slots", r"\[engine\] slots"]),
    ("gguf_init_from_file: failed to open GGUF file '/models/m.gguf'", ["cannot read the whole model", r"\[model\] path"]),
    ('error while handling argument "--threads": stoi', ["does not take an argument's value", r"\[engine\] args"]),
    ("error: invalid argument: --rpc", ["lacks RPC", "-DGGML_RPC=ON"]),
    ("ROCm error: out of memory", ["out of memory on a GPU while it worked", r"\[engine\] slots"]),
    ("ggml_vulkan: Device memory allocation of size 41921519616 failed. vk::Device::allocateMemory: ErrorOutOfDeviceMemory",
     ["does not fit", r"\[engine\] slots"]),
    ("llama_kv_cache: failed to allocate buffer for kv cache", ["does not fit", r"\[engine\] slots"])])
def test_an_engine_that_ends_with_such_words(here, line, words):
    told(here, *words, env={"FAKE_LLAMA_LOAD_FAIL": line})


def test_a_model_that_does_not_fit_names_the_number_of_nodes_it_takes(here):
    told(here, r"llama-server on .*does not fit.*out of memory on a GPU", r"weights and context take .*[KM]B, a node has 2.0 GB",
         r"set \[slurm\] nodes = 2", env={"FAKE_LLAMA_DIES": "gpu-memory"}, model={"vram_per_node": "2GB"})


def test_an_architecture_that_an_old_build_does_not_know(here):
    told(here, "does not know the model's architecture.*next9", "newer llama.cpp", env={"FAKE_LLAMA_DIES": "architecture"},
         engine={"path": str(make_build(here.folder / "old", age="old"))})


def test_a_build_for_another_cpu(here):
    program = here.folder / "bin" / "llama-server"
    program.parent.mkdir()
    header = bytearray(open(os.path.realpath(shutil.which("env")), "rb").read(4096))
    header[18:20] = b"\x16\x00" if header[5] == 1 else b"\x00\x16"  # e_machine: S390
    program.write_bytes(header)
    program.chmod(0o755)
    told(here, "[Ee]xec format error", r"another CPU.*\[engine\] path", engine={"path": str(program.parent)})


def test_a_port_that_another_program_has(here):
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        told(here, f"port {other.getsockname()[1]} is in use", r"\[engine\] port", engine={"port": other.getsockname()[1]})


@pytest.fixture
def taken():
    """A port that another program has."""
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        yield other.getsockname()[1]


def test_two_workers_of_one_machine_may_be_wished_the_same_port(here):
    """Nodes simulated on one host, or two students on one node: nobody outside needs to know a worker's port."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        wished = probe.getsockname()[1]
    here.config(slurm={"nodes": 3}, engine={"llama": {"rpc_port": wished}})
    said = here.llmrun("run", "--here", "config.json") + here.job_output()
    one, other = re.search(r"--rpc \S+:(\d+),\S+:(\d+)", here.wait_for_event("engine_started")["command"]).groups()
    assert one != other
    assert re.search(rf"\b{wished}\b.*(taken|in use)", said), said


def test_ports_of_a_flat_config_that_others_have_are_replaced_and_named(here, taken):
    with socket.socket() as second:
        second.bind(("", 0))
        second.listen()
        ports = {"port_rpc": taken, "port_server": second.getsockname()[1]}
        flat = {"dir_llama_script": str(here.bin), "model": str(here.model), "prompts_user_dir": "prompts", "nodes": 2, **ports}
        (here.folder / "config.json").write_text(json.dumps(flat))
        here.means(prompts={"user": "prompts"})
        said = here.llmrun("run", "--here", "config.json") + here.job_output()
    for port in ports.values():
        assert re.search(rf"\b{port}\b.*(taken|in use)", said), said
        assert not re.search(rf"\b{port}\b", here.wait_for_event("engine_started")["command"])


class Thief(http.server.BaseHTTPRequestHandler):
    """Another user's process on the port that an engine was to have: it says that it is well, and answers all."""

    def do_GET(self):
        self.server.seen.append((self.command, self.path, self.headers.get("Authorization")))
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = json.dumps({"status": "ok", "choices": [{"finish_reason": "stop", "message": {"content": "a false answer"}}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET

    def log_message(self, *words):
        pass


def test_a_process_that_took_the_engines_port_is_given_no_key_and_no_prompt(here):
    """It was quicker than our engine, which comes to listen late; the next start is on another port."""
    here.write_prompts(6)
    slow = here.folder / "slow"
    here.config(environment={"vars": {"FAKE_LLAMA_HANG": "start", "FAKE_LLAMA_ONCE": str(slow)}}, engine={"load_timeout": 5})
    running = here.start("run", "--here", "config.json")
    command = here.wait_for_event("engine_started")["command"]
    port = int(re.search(r"--port (\d+)", command).group(1))
    wait_for("our engine, which is slow", slow.exists)
    thief = http.server.ThreadingHTTPServer(("127.0.0.1", port), Thief)
    thief.seen = []
    threading.Thread(target=thief.serve_forever, daemon=True).start()
    output, _ = running.communicate(timeout=30)
    thief.shutdown()
    thief.server_close()
    assert not [seen for seen in thief.seen if seen[0] == "POST"], "prompts"
    assert not [seen for seen in thief.seen if seen[2]], "the key"
    assert not [line for line in here.journal() if "false answer" in json.dumps(line)]
    said = [line for line in (output + here.job_output()).splitlines() if re.search("another (program|process|user)", line)]
    assert said and re.search(rf"\b{port}\b", said[0]), output
    assert running.returncode in (0, 3), output
    here.assert_answers()


def test_a_process_that_took_a_workers_port_is_told_nothing_of_the_model(here):
    build, slow, heard = make_build(here.folder / "bin"), here.folder / "slow", []
    os.rename(build / "ggml-rpc-server", build / "real")
    (build / "ggml-rpc-server").write_text(f"#!/bin/bash\n[ -e {slow} ] || {{ touch {slow}; sleep 5; exit 1; }}\nexec {build}/real \"$@\"\n")
    (build / "ggml-rpc-server").chmod(0o755)
    here.config(slurm={"nodes": 2}, engine={"path": str(build)})
    running = here.start("run", "--here", "config.json")
    wait_for("our worker, which is slow", slow.exists)
    pid = here.process("ggml-rpc-server", "-H")
    with open(f"/proc/{pid}/cmdline") as file:
        port = int(re.search(r"-p\0(\d+)", file.read()).group(1))
    thief = socket.create_server(("127.0.0.1", port))

    def listen():
        with contextlib.suppress(OSError):
            while True:
                connection, _ = thief.accept()
                heard.append(connection.recv(100))
                connection.close()
    threading.Thread(target=listen, daemon=True).start()
    output, _ = running.communicate(timeout=30)
    thief.close()
    assert not any(heard), heard
    assert running.returncode in (0, 3), output


def test_a_key_file_that_cannot_be_read(here):
    told(here, "key file cannot be read.*/nowhere/key", "folder that all nodes see",
         engine={"args": ["--api-key-file", "/nowhere/key"]})


def test_a_worker_of_another_version(here):
    told(here, r"llama-server on local1: the RPC worker is of another build.*6\.0\.0", "same build", slurm={"nodes": 2},
         env={"FAKE_RPC_PROTOCOL": "6.0.0"})


def test_a_worker_so_old_that_it_does_not_understand_the_greeting(here):
    build, old = make_build(here.folder / "mixed"), make_build(here.folder / "old", age="old")
    os.replace(old / "rpc-server", build / "ggml-rpc-server")
    told(here, "another build", "same build", slurm={"nodes": 2}, engine={"path": str(build)})


def test_a_worker_that_runs_out_of_memory_is_named(here):
    told(here, r"RPC worker ran out of memory.*RPC0\[local2 127\.0\.0\.1:\d+\]", "nodes", slurm={"nodes": 2},
         env={"FAKE_LLAMA_DIES": "worker-memory"})


def test_a_worker_that_is_killed_while_the_model_loads_is_named(here):
    told(here, "rpc on local2: .*killed it, most likely for memory", r"\[slurm\] mem", slurm={"nodes": 2},
         env={"FAKE_LLAMA_LOAD_S": "20", "FAKE_RPC_DIE_AFTER_S": "1", "FAKE_RPC_DIE_SIGNAL": "KILL"})


def test_a_worker_that_cannot_be_reached(here):
    told(here, r"llama-server on .*cannot reach its RPC worker.*127\.0\.0\.1:1\b", r"firewall.*\[network\] ports",
         engine={"args": ["--rpc", "127.0.0.1:1"]})


def test_a_network_that_the_nodes_do_not_share(here):
    told(here, "(the driver|local1) cannot reach the (engine on local1|RPC worker on local2)", r"firewall.*\[network\]",
         slurm={"nodes": 2}, network={"interface": "nosuch0"})


def test_a_firewall_between_two_nodes_names_both():
    class Fake:
        def __init__(self, name):
            self.name, self.facts = name, asyncio.get_running_loop().create_future()
            self.facts.set_result({"machine": name})

        async def ask(self, order, **details):
            return {"probe": {"addresses": ["10.0.0.2"], "port": 20001}, "reach": None, "release": None}[order]

    async def way():
        async with llmrun.open_way(Fake("node2"), [Fake("node1")], "", "", "the RPC worker"):
            pass
    with pytest.raises(llmrun.ClusterError) as caught:
        asyncio.run(way())
    said = str(caught.value)
    assert "node1 cannot reach the RPC worker on node2, port 20001 (10.0.0.2)" in said
    assert "firewall" in said and "[network] ports" in said


def test_a_load_that_takes_longer_than_it_may(here):
    told(here, "waited 1s for llama-server", r"\[engine\] load_timeout", env={"FAKE_LLAMA_HANG": "load"},
         engine={"load_timeout": 1})


def test_a_node_that_is_lost_while_the_model_loads(here):
    here.config(slurm={"nodes": 2}, environment={"vars": {"FAKE_LLAMA_LOAD_S": "20"}})
    running = here.start("run", "--here", "config.json")
    here.wait_for_event("engine_started")
    os.kill(here.process(" agent local2"), signal.SIGKILL)
    output, _ = running.communicate(timeout=20)
    assert running.returncode == 3, output
    for said in (output, here.status()["detail"]):
        assert "local2: the node was lost" in said


def test_a_time_limit_that_is_too_short_to_load_says_how_long_it_loaded(tmp_path, engine):
    from fake_slurm.cluster import FakeCluster
    (tmp_path / "cluster").mkdir()
    (tmp_path / "home").mkdir()
    with FakeCluster(tmp_path / "cluster", FakeTick="0.2") as cluster:
        site = Site(tmp_path / "home", cluster, engine)
        end = "export SLURM_JOB_END_TIME=$(( $(date +%s) + 20 ))"  # Slurm's own limits are whole minutes
        site.config(slurm={"requeue": False}, environment={"setup": [end], "vars": {"FAKE_LLAMA_LOAD_S": "60"}})
        output = site.llmrun("submit", "config.json", "--wait", code=4)
        for said in (output, site.status()["detail"]):
            assert re.search(r"time limit came before the engine was ready, after \ds of loading.*\[slurm\] time", said), said
        site.assert_nothing_left()


# ── in the middle of the work ──────────────────────────────────────────────────


def test_an_engine_that_dies_at_its_work_is_explained_and_started_again(here):
    here.config(environment={"vars": {"FAKE_LLAMA_DIES": "gpu-access", "FAKE_LLAMA_ONCE": str(here.folder / "once")}})
    here.llmrun("run", "--here", "config.json")
    died = [event["why"] for event in here.events() if event["event"] == "engine_died"]
    assert len(died) == 1 and re.search(r"a GPU failed.*illegal memory access.*\[slurm\] exclude", died[0]), died
    assert len(here.results()) == 1


def test_a_worker_that_dies_at_the_work_is_the_cause_not_the_server_that_follows_it():
    async def first_words():
        loop = asyncio.get_running_loop()
        replica = llmrun.Replica(0, LLAMA, [], lambda *told, **facts: None)
        for name, code, tail in (("rpc", -9, ["Accepted client connection"]),
                                 ("llama-server", -6, [f"{RPC}:569: Remote RPC server crashed or returned malformed response"])):
            ended = loop.create_future()
            ended.set_result(llmrun.Exit(name, f"node-of-{name}", code, tail))
            replica.running.append(llmrun.Running(name, types.SimpleNamespace(name=f"node-of-{name}"), None, ended))
        return await replica.failure()
    said = [str(asyncio.run(first_words())) for _ in range(5)]
    assert all("rpc on node-of-rpc" in line and "[slurm] mem" in line for line in said), said


def test_a_worker_that_dies_of_its_servers_death_is_not_the_cause():
    """A real worker whose server is killed writes to a closed connection."""
    async def first_words():
        loop = asyncio.get_running_loop()
        replica = llmrun.Replica(0, LLAMA, [], lambda *told, **facts: None)
        for name, code, tail in (("rpc", -13, ["Accepted client connection"]), ("llama-server", -9, ["loading"])):
            ended = loop.create_future()
            ended.set_result(llmrun.Exit(name, f"node-of-{name}", code, tail))
            replica.running.append(llmrun.Running(name, types.SimpleNamespace(name=f"node-of-{name}"), None, ended))
        return await replica.failure()
    error = asyncio.run(first_words())
    assert str(error).startswith("llama-server on node-of-llama-server") and error.killed, error


@pytest.mark.parametrize("env, keys, words", [
    ({"FAKE_LLAMA_FAULT_RATE": "1", "FAKE_LLAMA_FAULTS": "500"}, {}, "llama-server.*a fault was asked for"),
    ({"FAKE_LLAMA_HANG": "answers"}, {"request_timeout": "500ms"}, "llama-server.*answer")], ids=["refuses all", "never answers"])
def test_an_engine_that_lives_and_answers_nothing_is_named_and_its_prompts_are_open(here, env, keys, words):
    """It is sick sooner here, and given up at its first death."""
    here.write_prompts(30)
    here.amend("", "Pulse.LOOK_S, Pulse.SICK_S, Pump.DEATH_PAUSE_S = 0.1, 1.5, 0.1", "Replica.recover.__defaults__ = (0, False)")
    here.config(environment={"vars": env}, engine={"slots": 16, **keys})
    running = here.start("run", "--here", "config.json")
    try:
        running.wait(25)
    except subprocess.TimeoutExpired:
        running.terminate()
    output, _ = running.communicate(timeout=20)
    assert here.runs(), output
    state = here.status()
    assert (running.returncode, state["state"], state["done"], state["failed"]) == (3, "failed", 0, 0), output
    assert re.search(words, state["detail"]) and state["detail"] in output
    here.llmrun("resume", "--set", f"environment.vars.{next(iter(env))}=", "--set", "environment.vars.FAKE_LLAMA_FAULTS=503")
    assert len(here.results()) == 30 == here.status()["done"]


def test_an_engine_that_stands_still_is_started_anew_and_costs_no_prompt(here):
    """Its process is there, as one that waits for a GPU or a disk for ever: no answer, and no word of its health."""
    here.slow(12)
    here.amend("", "Pulse.LOOK_S, Pulse.SIGNS_S, Pulse.UNWELL_S, Pump.DEATH_PAUSE_S = 0.2, 0.5, 2.0, 0.1", "look.__defaults__ = (1.0,)")
    running = here.start("run", "--here", "config.json")
    here.answering()
    os.kill(here.process("llama-server", "--port"), signal.SIGSTOP)
    output, _ = running.communicate(timeout=90)
    assert running.returncode == 0 and "does not even say that it is well" in here.job_output(), output
    assert len(here.results()) == 12 and [event["event"] for event in here.events()].count("ready") == 2
