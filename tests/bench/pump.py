"""How fast one core pushes prompts, in one run on one pinned core, against a server that answers at once:

    python tests/bench/pump.py [SECONDS]

The server is nginx, pinned to another core, with a completion that tells no more of its request than its length. Side
by side: llmrun's pump with durable results; bare asyncio streams that do nothing with the answer (the ceiling for
Python); aiohttp bare; the OpenAI SDK, plain and over aiohttp; `requests` in threads. Each asks for the same seconds,
after a first round that is not timed and pays for its imports; rounds alternate, so that a noisy neighbour meets them all.

Then the same sides against the fake llama-server, whose 64 slots give tokens at a set rate, the same number of requests
each: how much of what the engine can do each of them gets."""

import asyncio
import itertools
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
from figures import Figures  # noqa: E402
from ready import OneLife, make_run  # noqa: E402

import llmrun  # noqa: E402

CONNECTIONS, ROUNDS = 64, 5
FASTEST = 60000  # requests a second that no side reaches: llmrun's input must not end before its time
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


class Numbers:
    """Numbers to take, by any thread, for so many seconds from the first on, or so many of them."""

    def __init__(self, seconds=float("inf"), count=float("inf")):
        self.seconds, self.count, self.numbers, self.taken, self.began = seconds, count, itertools.count(), 0, None

    def __iter__(self):
        return self

    def __next__(self):
        now = time.perf_counter()
        self.began = self.began or now
        if now - self.began > self.seconds:
            raise StopIteration
        number = next(self.numbers)
        if number >= self.count:
            raise StopIteration
        self.taken = number + 1
        return number


async def together(ask, numbers):
    """CONNECTIONS workers that ask until the numbers end."""
    async def worker():
        for _ in numbers:
            await ask()
    await asyncio.gather(*(worker() for _ in range(CONNECTIONS)))


def bare_streams(port, numbers):
    request = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(BODY)}\r\n\r\n{BODY}".encode()

    async def work():
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


def bare_aiohttp(port, numbers):
    import aiohttp

    async def work():
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=CONNECTIONS)) as session:
            async def ask():
                async with session.post(f"http://127.0.0.1:{port}/v1/chat/completions", data=BODY) as answer:
                    await answer.read()
            await together(ask, numbers)
    asyncio.run(work())


def openai_sdk(port, numbers, over_aiohttp=False):
    import openai
    options = {"http_client": openai.DefaultAioHttpClient()} if over_aiohttp else {}
    body = json.loads(BODY)

    async def work():
        async with openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="x", **options) as client:
            await together(lambda: client.chat.completions.create(**body), numbers)
    asyncio.run(work())


def requests_threads(port, numbers):
    import threading

    import requests

    def work():
        session = requests.Session()
        for _ in numbers:
            session.post(f"http://127.0.0.1:{port}/v1/chat/completions", data=BODY).json()
    threads = [threading.Thread(target=work) for _ in range(CONNECTIONS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def llmrun_pump(port, numbers):
    """The driver's own path from a JSONL input to a durable journal, with one replica that is always ready."""
    with tempfile.TemporaryDirectory() as name:
        with open(Path(name) / "in.jsonl", "w") as file:
            for number in range(int(min(numbers.count, numbers.seconds * FASTEST))):
                file.write(f'{{"custom_id": "r{number}", "method": "POST", "url": "/v1/chat/completions", "body": {BODIES[number % 7]}}}\n')
        make_run(Path(name), CONNECTIONS)
        life = OneLife(Path(name), CONNECTIONS)
        began = time.perf_counter()
        life.work(port, only=numbers)
        took = time.perf_counter() - began
        assert life.tally.answers == numbers.taken < len(life.prompts) or numbers.taken == numbers.count, numbers.taken
        life.check_answers(lambda number: BODIES[number % 7])
        return took


OURS, BARE = "llmrun's pump, durable", "bare asyncio streams"
SIDES = {BARE: bare_streams, OURS: llmrun_pump, "aiohttp, bare": bare_aiohttp, "OpenAI SDK": openai_sdk,
         "OpenAI SDK over aiohttp": lambda port, numbers: openai_sdk(port, numbers, True), "requests in threads": requests_threads}
AT_LEAST = {BARE: 0.5, "aiohttp, bare": 2, "OpenAI SDK": 20, "OpenAI SDK over aiohttp": 12, "requests in threads": 6}


def alternate(port, rounds=ROUNDS, **numbers):
    """{side: requests a second in each of the alternating rounds}."""
    for side in SIDES.values():
        side(port, Numbers(count=CONNECTIONS))
    rates = {name: [] for name in SIDES}
    for _ in range(rounds):
        for name, side in SIDES.items():
            asked, began = Numbers(**numbers), time.perf_counter()
            took = side(port, asked) or time.perf_counter() - began
            rates[name].append(asked.taken / took)
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


def main(seconds):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        server, engine, figures = Server(folder), PacedEngine(folder), Figures()
        try:
            os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
            rates = alternate(server.port, seconds=seconds)
            print("requests a second, of a server that answers at once")
            for side, seen in rates.items():
                figures.show(side, statistics.median(seen), "/s", more=f"best {max(seen):.0f}")
            for side, least in AT_LEAST.items():
                figures.show(f"llmrun's rate of {side}", statistics.median(rates[OURS]) / statistics.median(rates[side]), "x",
                             at_least=least, more=f"best of best {max(rates[OURS]) / max(rates[side]):.2f}")
            print("requests a second, of an engine with a set rate")
            paced = {side: statistics.median(seen) for side, seen in alternate(engine.port, rounds=3, count=8 * CONNECTIONS).items()}
            for side, rate in paced.items():
                figures.show(side, rate, "/s", more=f"{rate / paced[BARE]:.0%} of a bare client")
            figures.show("llmrun's rate of a bare client", paced[OURS] / paced[BARE], "x", at_least=0.95)
        finally:
            server.stop()
            engine.stop()
    figures.end()


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 2.0)
