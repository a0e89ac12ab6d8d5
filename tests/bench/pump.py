"""How fast one core pushes prompts, in one run on one pinned core, against a server that answers at once:

    python tests/bench/pump.py [REQUESTS]

The server is nginx with a completion that tells no more of its request than its length, pinned to another core. Side by side: llmrun's pump with durable results;
bare asyncio streams that do nothing with the answer (the ceiling for Python); aiohttp bare; the OpenAI SDK, plain and
over aiohttp; `requests` in threads. Rounds alternate, so that a noisy neighbour meets them all.

Then the same sides against the fake llama-server, whose 64 slots give tokens at a set rate: how much of what the engine
can do each of them gets."""

import asyncio
import concurrent.futures
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS), str(TESTS.parent), str(TESTS / "bench")]

from fakes.build import make_build, make_model  # noqa: E402
from ready import OneLife, make_run  # noqa: E402

import llmrun  # noqa: E402

CONNECTIONS, ROUNDS = 64, 5
COMPLETION = json.dumps({
    "id": "chatcmpl-1", "object": "chat.completion", "created": 1700000000, "model": "m",
    "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "An answer of some words. " * 8}}],
    "usage": {"prompt_tokens": 0, "completion_tokens": 40}}).replace('"prompt_tokens": 0', '"prompt_tokens": $content_length')
NGINX = """\
daemon off; worker_processes 1; pid {folder}/pid; error_log {folder}/error.log; worker_rlimit_nofile 4096;
events {{ worker_connections 2048; }}
http {{
    access_log off; keepalive_requests 100000000; client_body_temp_path {folder}; proxy_temp_path {folder};
    fastcgi_temp_path {folder}; uwsgi_temp_path {folder}; scgi_temp_path {folder}; client_body_buffer_size 64k;
    server {{ listen 127.0.0.1:{port}; default_type application/json; location / {{ return 200 '{body}'; }} }}
}}
"""
BODY = json.dumps({"model": "m", "max_tokens": 64, "messages": [{"role": "user", "content": "A question of some length? " * 12}]})
BODIES = [BODY.replace("? ", "?" * (1 + number % 7) + " ", 1) for number in range(7)]  # of lengths of their own


class Server:
    """nginx on a core of its own."""

    def __init__(self, folder):
        with llmrun.listen_on(0) as free:
            self.port = free.getsockname()[1]
        (folder / "nginx.conf").write_text(NGINX.format(folder=folder, port=self.port, body=COMPLETION))
        nginx = shutil.which("nginx", path=os.environ["PATH"] + ":/usr/sbin")
        self.process = subprocess.Popen([nginx, "-p", str(folder), "-c", str(folder / "nginx.conf")], stderr=subprocess.DEVNULL,
                                        preexec_fn=lambda: os.sched_setaffinity(0, {max(os.sched_getaffinity(0))}))
        while True:
            try:
                return llmrun.socket.create_connection(("127.0.0.1", self.port)).close()
            except OSError:
                time.sleep(0.01)

    def stop(self):
        self.process.terminate()
        self.process.wait()


async def together(ask, count):
    """Each of CONNECTIONS workers asks until `count` are asked."""
    numbers = iter(range(count))

    async def worker():
        for _ in numbers:
            await ask()
    await asyncio.gather(*(worker() for _ in range(CONNECTIONS)))


def bare_streams(port, count):
    request = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(BODY)}\r\n\r\n{BODY}".encode()

    async def work():
        numbers = iter(range(count))

        async def worker():
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            for _ in numbers:
                writer.write(request)
                head = await reader.readuntil(b"\r\n\r\n")
                at = head.index(b"Content-Length: ") + 16
                await reader.readexactly(int(head[at:head.index(b"\r", at)]))
            writer.close()
        await asyncio.gather(*(worker() for _ in range(CONNECTIONS)))
    asyncio.run(work())


def bare_aiohttp(port, count):
    import aiohttp

    async def work():
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=CONNECTIONS)) as session:
            async def ask():
                async with session.post(f"http://127.0.0.1:{port}/v1/chat/completions", data=BODY) as answer:
                    await answer.read()
            await together(ask, count)
    asyncio.run(work())


def openai_sdk(port, count, over_aiohttp=False):
    import openai
    options = {"http_client": openai.DefaultAioHttpClient()} if over_aiohttp else {}
    body = json.loads(BODY)

    async def work():
        async with openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="x", **options) as client:
            await together(lambda: client.chat.completions.create(**body), count)
    asyncio.run(work())


def requests_threads(port, count):
    import threading

    import requests
    local = threading.local()

    def ask(_):
        if not hasattr(local, "session"):
            local.session = requests.Session()
        return local.session.post(f"http://127.0.0.1:{port}/v1/chat/completions", data=BODY).json()
    with concurrent.futures.ThreadPoolExecutor(CONNECTIONS) as pool:
        for _ in pool.map(ask, range(count)):
            pass


def llmrun_pump(port, count):
    """The driver's own path from a JSONL input to a durable journal, with one replica that is always ready."""
    with tempfile.TemporaryDirectory() as name:
        with open(Path(name) / "in.jsonl", "w") as file:
            for number in range(count):
                file.write(f'{{"custom_id": "r{number}", "method": "POST", "url": "/v1/chat/completions", "body": {BODIES[number % 7]}}}\n')
        make_run(Path(name), CONNECTIONS)
        life = OneLife(Path(name), CONNECTIONS)
        began = time.perf_counter()
        life.work(port)
        took = time.perf_counter() - began
        assert life.tally.answers == count, life.tally.answers
        life.check_answers(lambda number: BODIES[number % 7])
        return took


OURS = "llmrun's pump, durable"
SIDES = {"bare asyncio streams": bare_streams, OURS: llmrun_pump, "aiohttp, bare": bare_aiohttp,
         "OpenAI SDK": openai_sdk, "OpenAI SDK over aiohttp": lambda port, count: openai_sdk(port, count, True),
         "requests in threads": requests_threads}
SLOW = ("OpenAI SDK", "OpenAI SDK over aiohttp", "requests in threads")


def alternate(port, asked):
    """Requests a second of each side, in alternating rounds of `asked(name)` each."""
    rates = {name: [] for name in SIDES}
    for _ in range(ROUNDS):
        for name, side in SIDES.items():
            began = time.perf_counter()
            took = side(port, asked(name)) or time.perf_counter() - began
            rates[name].append(asked(name) / took)
    return rates


class PacedEngine:
    """The fake llama-server with a slot for each connection; an answer takes ANSWER_S."""

    ANSWER_S, TOKENS = 0.8, 64

    def __init__(self, folder):
        make_build(folder / "bin")
        make_model(folder / "m.gguf")
        with llmrun.listen_on(0) as free:
            self.port = free.getsockname()[1]
        env = dict(os.environ, FAKE_LLAMA_TOKENS_PER_S=str(self.TOKENS / self.ANSWER_S))
        self.process = subprocess.Popen(
            [str(folder / "bin" / "llama-server"), "-m", str(folder / "m.gguf"), "--host", "127.0.0.1", "--port", str(self.port),
             "-np", str(CONNECTIONS), "-c", str(CONNECTIONS * 512)], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            preexec_fn=lambda: os.sched_setaffinity(0, {max(os.sched_getaffinity(0))}))
        while True:
            with llmrun.contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health") as health:
                if health.status == 200:
                    return
            time.sleep(0.02)

    def stop(self):
        self.process.kill()
        self.process.wait()


def main(count):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        server, engine = Server(folder), PacedEngine(folder)
        try:
            os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
            rates = alternate(server.port, lambda side: count // 40 if side in SLOW else count)
            print(f"{'requests/s: a server at once':30} {'median':>8} {'llmrun is':>10} {'best':>8} {'llmrun is':>10}")
            for side, seen in rates.items():
                print(f"{side:30}" + "".join(f" {of(seen):8.0f} {of(rates[OURS]) / of(seen):9.2f}x"
                                             for of in (statistics.median, max)))
            paced = {side: statistics.median(seen)
                     for side, seen in alternate(engine.port, lambda side: 8 * CONNECTIONS).items()}
            print(f"\n{'requests/s: a set rate':30} {'median':>8} {'of a bare client':>19}")
            for side, rate in paced.items():
                print(f"{side:30} {rate:8.1f} {rate / paced['bare asyncio streams']:18.0%}")
        finally:
            server.stop()
            engine.stop()


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 40000)
