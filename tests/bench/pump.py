"""How fast one core pushes prompts, in one run on one pinned core, against a server that answers at once:

    python tests/bench/pump.py [REQUESTS]

The server is nginx with a fixed completion, pinned to another core. Side by side: llmrun's pump with durable results;
bare asyncio streams that do nothing with the answer (the ceiling for Python); aiohttp bare; the OpenAI SDK, plain and
over aiohttp; `requests` in threads. Rounds alternate, so that a noisy neighbour meets them all."""

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
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(TESTS.parent))

import llmrun  # noqa: E402

CONNECTIONS, ROUNDS = 64, 3
COMPLETION = json.dumps({
    "id": "chatcmpl-1", "object": "chat.completion", "created": 1700000000, "model": "m",
    "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "An answer of some words. " * 8}}],
    "usage": {"prompt_tokens": 60, "completion_tokens": 40, "total_tokens": 100}})
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
        folder = Path(name)
        with open(folder / "in.jsonl", "w") as file:
            for number in range(count):
                file.write(f'{{"custom_id": "r{number}", "method": "POST", "url": "/v1/chat/completions", "body": {BODY}}}\n')
        config = llmrun.build_config(llmrun.Config, {"prompts": {"user": str(folder / "in.jsonl")}, "run_dir": str(folder / "runs"),
                                                     "engine": {"name": "echo", "concurrency": CONNECTIONS}}, "c", None)
        run = llmrun.create_run(config, llmrun.freeze(config, "m"), lambda run: "")
        prompts = llmrun.Input.load(run, config, "m")
        journal, tally = llmrun.Journal(run, run.new_life(0, 0)), llmrun.Tally()

        class Ready(llmrun.Replica):
            async def failure(self):
                await asyncio.Event().wait()

        async def work():
            replica = Ready(0, llmrun.Echo(config, run, "0.0.0", 1), [], print)
            replica.client = llmrun.Client("127.0.0.1", port, "key")

            def finish(result):
                journal.add(result)
                tally.add(result)
            pump = llmrun.Pump(range(len(prompts)), prompts.prompt, finish, llmrun.math.inf)
            await pump.run([(replica, asyncio.ensure_future(asyncio.sleep(0)))])
            replica.client.close()
        llmrun.gc.freeze()
        llmrun.gc.set_threshold(20000, 20, 100)
        began = time.perf_counter()
        asyncio.run(work())
        journal.close()
        took = time.perf_counter() - began
        assert tally.done == count, tally.done
        return took


SIDES = {"bare asyncio streams": bare_streams, "llmrun's pump, durable": llmrun_pump, "aiohttp, bare": bare_aiohttp,
         "OpenAI SDK": openai_sdk, "OpenAI SDK over aiohttp": lambda port, count: openai_sdk(port, count, True),
         "requests in threads": requests_threads}
SLOW = ("OpenAI SDK", "OpenAI SDK over aiohttp", "requests in threads")


def main(count):
    with tempfile.TemporaryDirectory() as folder:
        server = Server(Path(folder))
        try:
            os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
            rates = {name: [] for name in SIDES}
            for _ in range(ROUNDS):
                for name, side in SIDES.items():
                    asked = count // 10 if name in SLOW else count
                    began = time.perf_counter()
                    took = side(server.port, asked) or time.perf_counter() - began
                    rates[name].append(asked / took)
        finally:
            server.stop()
    ours = statistics.median(rates["llmrun's pump, durable"])
    print(f"{'':26} {'requests/s':>10} {'llmrun is':>10}")
    for name, seen in rates.items():
        rate = statistics.median(seen)
        print(f"{name:26} {rate:10.0f} {ours / rate:9.2f}x")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20000)
