"""Whether the engine's slots are full, against a real llama-server with 8 slots and a tiny model:

    python tests/bench/slots.py [ROUNDS]

Prompts of varied length go through `llmrun.py run`, then through the best hand-tuned load there is (every fixed
concurrency of a list, bare HTTP, the same bodies, a server started the same way). Prints the share of time that slots
were busy between the first and the last full moment, and the medians of the total times."""

import asyncio
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS), str(TESTS.parent), str(TESTS / "bench")]

from figures import Figures  # noqa: E402
from real.llama import llama_build  # noqa: E402
from real.tiny_model import write_tiny_model  # noqa: E402

import llmrun  # noqa: E402

SLOTS, PROMPTS, TRIED = 8, 120, (8, 11, 16)


class Sampler(threading.Thread):
    """Looks at /slots every 50 ms while an endpoint is up."""

    def __init__(self, folder):
        super().__init__(daemon=True)
        self.folder, self.seen, self.done = folder, [], False

    def run(self):
        while not self.done:
            found = list(self.folder.glob("runs/*/endpoint.json"))
            try:
                endpoint = json.loads(found[-1].read_text())
                key = Path(endpoint["key_file"]).read_text().strip()
                request = urllib.request.Request(endpoint["url"].replace("/v1", "/slots"), headers={"Authorization": f"Bearer {key}"})
                slots = json.load(urllib.request.urlopen(request, timeout=5))
                self.seen.append(sum(slot["is_processing"] for slot in slots))
            except (OSError, IndexError, ValueError):
                pass
            time.sleep(0.05)

    def busy_share(self):
        full = [number for number, busy in enumerate(self.seen) if busy == SLOTS]
        between = self.seen[full[0]:full[-1] + 1]
        return sum(between) / len(between) / SLOTS, len(between)


def write_folder(folder):
    chance = random.Random(5)
    write_tiny_model(folder / "tiny.gguf", layers=8, ends=False)
    with open(folder / "in.jsonl", "w") as file:
        for number in range(PROMPTS):
            body = {"messages": [{"role": "user", "content": "word " * chance.randint(5, 150)}], "model": "tiny.gguf",
                    "max_tokens": chance.randint(8, 64)}
            file.write(json.dumps({"custom_id": f"r{number}", "method": "POST", "url": llmrun.CHAT, "body": body}) + "\n")
    (folder / "config.json").write_text(json.dumps({
        "slurm": {"time": "01:00:00"}, "model": {"path": "tiny.gguf"}, "prompts": {"user": "in.jsonl"},
        "engine": {"path": str(llama_build()), "slots": SLOTS, "context": 1024}}))
    shutil.copy(llmrun.__file__, folder)


def ours(folder):
    """(seconds from the engine's first ready moment to the last answer, the engine's command line)."""
    subprocess.run([sys.executable, "llmrun.py", "run", "--here", "config.json"], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    run = sorted(folder.glob("runs/*"), key=lambda path: path.stat().st_mtime)[-1]
    events = [json.loads(line) for path in run.glob("events/*.jsonl") for line in path.read_text().splitlines()]
    at = {event["event"]: event for event in events}
    command = at["engine_started"]["command"]
    took = at["answered"]["time"] - at["ready"]["time"]
    shutil.rmtree(run)
    return took, command


def by_hand(folder, command, concurrency):
    """Seconds for the same bodies at a fixed concurrency, over bare asyncio streams."""
    with llmrun.listen_on(0) as free:
        port = free.getsockname()[1]
    argv = llmrun.shlex.split(command)
    argv[argv.index("--port") + 1] = str(port)
    at = argv.index("--api-key-file")
    del argv[at:at + 2]
    bodies = iter([json.dumps(json.loads(line)["body"]).encode() for line in open(folder / "in.jsonl")])
    server = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=dict(os.environ, XDG_CONFIG_HOME=str(folder)))

    async def work():
        client = llmrun.Client("127.0.0.1", port)

        async def ready():
            try:
                return (await client.request("GET", "/health")).status == 200
            except llmrun.WireError:
                return False
        await llmrun.wait_until("the server", ready, 60)

        async def worker():
            for body in bodies:
                assert (await client.request("POST", llmrun.CHAT, body)).status == 200
        began = time.monotonic()
        await asyncio.gather(*(worker() for _ in range(concurrency)))
        client.close()
        return time.monotonic() - began
    try:
        return asyncio.run(work())
    finally:
        server.terminate()
        server.wait()


def main(rounds):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_folder(folder)
        sampler = Sampler(folder)  # looking costs the server time, so the looked-at round is not one of the timed
        sampler.start()
        ours(folder)
        sampler.done = True
        sampler.join()
        share, samples = sampler.busy_share()
        mine, hand = [], {count: [] for count in TRIED}
        for _ in range(rounds):
            took, command = ours(folder)
            mine.append(took)
            for count in TRIED:
                hand[count].append(by_hand(folder, command, count))
    best, times = min(hand.items(), key=lambda item: statistics.median(item[1]))
    for what, seen in [("llmrun", mine)] + [(f"{count} at a time", seen) for count, seen in hand.items()]:
        print(f"{what:15} " + " ".join(f"{took:6.2f}" for took in seen) + f"  median {statistics.median(seen):.2f} s")
    figures = Figures()
    figures.show("slots busy between the first and last full moment", 100 * share, "%", at_least=97, more=f"{samples} samples")
    figures.show("llmrun's time of the best by hand", statistics.median(mine) / statistics.median(times), "x", at_most=1.05,
                 more=f"{statistics.median(mine):.2f} s; by hand, best of {TRIED}: {statistics.median(times):.2f} s at {best} at a time")
    figures.end()


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
