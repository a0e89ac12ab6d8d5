"""A million prompts through the pump, killed ten times on the first half of the way and resumed:

    python tests/bench/million.py [PROMPTS]

Prints the peak memory of each life, the rate at the start and at the end of an undisturbed stretch, how long a resume
takes when all is done, and whether there is exactly one result for each prompt."""

import json
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from figures import Figures  # noqa: E402
from pump import Server  # noqa: E402
from ready import OneLife, config_of, llmrun, make_run  # noqa: E402

KILLS, CONNECTIONS = 10, 64


def write_input(path, count):
    with open(path, "w") as file:
        for number in range(count):
            file.write(json.dumps({"custom_id": f"request-{number}", "method": "POST", "url": "/v1/chat/completions",
                                   "body": body_of(number)}) + "\n")


def body_of(number):
    text = "A question of some length, as people ask them? " * 5 + "?" * (number % 50)
    return {"model": "m", "messages": [{"role": "user", "content": f"{number} {text}"}], "max_tokens": 64}


def life(folder, port):
    """One life, in a process of its own."""
    began = time.monotonic()
    one = OneLife(folder, CONNECTIONS)
    resumed_s = time.monotonic() - began
    last, rates = (time.monotonic(), 0), []

    def keep(results):
        nonlocal last
        one.keep(results)
        if one.tally.answers - last[1] >= 20000:
            now = time.monotonic()
            rates.append(20000 / (now - last[0]))
            last = (now, one.tally.answers)
    one.work(port, keep=keep)
    print(json.dumps({"rates": rates, "resumed_s": resumed_s, "asked": one.tally.answers,
                      "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}))


def start(folder, server):
    return subprocess.Popen([sys.executable, __file__, "life", str(folder), str(server.port)], stdout=subprocess.PIPE, text=True)


def answered(folder):
    """About how many prompts have a line in the journals: all lines are of one length, but for their numbers."""
    journals = list(folder.glob("runs/*/journal/*.jsonl"))
    lines = (open(path, "rb").readline() for path in journals)
    length = max((len(line) for line in lines), default=0)
    return sum(path.stat().st_size for path in journals) / length if length else 0


def peak_mb(pid):
    with open(f"/proc/{pid}/status") as file:
        return int(next(line for line in file if line.startswith("VmHWM")).split()[1]) / 1024


def main(count):
    with tempfile.TemporaryDirectory() as name:
        folder, server = Path(name), Server(Path(name))
        try:
            write_input(folder / "in.jsonl", count)
            began = time.monotonic()
            make_run(folder, CONNECTIONS)
            print(f"submit: {count} rows read and checked in {time.monotonic() - began:.1f} s, peak "
                  f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MB", flush=True)
            peaks, chance = [], random.Random(7)
            for _ in range(KILLS):
                process, enough = start(folder, server), answered(folder) + chance.uniform(0, 0.1) * count
                while answered(folder) < enough:
                    time.sleep(0.02)
                peaks.append(peak_mb(process.pid))
                process.send_signal(signal.SIGKILL)
                process.wait()
            told = json.loads(start(folder, server).communicate()[0])
            done = json.loads(start(folder, server).communicate()[0])
        finally:
            server.stop()
        run, config = llmrun.all_runs(folder / "runs")[-1], config_of(folder, CONNECTIONS)
        began = time.monotonic()
        results = llmrun.write_results(run, config, llmrun.Marks(run, llmrun.Input.load(run, config, "m")))
        merged_s = time.monotonic() - began
        names = []
        for number, line in enumerate(open(results / "results.jsonl")):
            record = json.loads(line)
            names.append(record["custom_id"])
            length = record["response"]["body"]["usage"]["prompt_tokens"]  # the server says how long a request it got
            assert length == len(json.dumps(body_of(number))), f"{names[-1]} has the answer to another prompt"
        assert names == [f"request-{number}" for number in range(count)], "one result each, in input order"
        edge = max(1, len(told["rates"]) // 5)
        first, last = (sum(part) / edge for part in (told["rates"][:edge], told["rates"][-edge:]))
        figures = Figures()
        figures.show("rate at the end, of that at the start", last / first, "x", at_least=0.8,
                     more=f"killed {len(peaks)} times; then {told['asked']} asked at {first:.0f}/s at first")
        figures.show("peak memory in any life", max(peaks + [told["peak_mb"]]), "MB", at_most=200)
        print(f"a resume with all done: {done['resumed_s']:.1f} s, {done['asked']} asked; results written in {merged_s:.1f} s")
        print(f"exactly one result for each of {len(names)} prompts; journal lines: "
              f"{sum(1 for segment in run.segments() for line in open(segment.path, 'rb'))}")
        figures.end()


if __name__ == "__main__":
    if sys.argv[1:2] == ["life"]:
        life(Path(sys.argv[2]), int(sys.argv[3]))
    else:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 1000000)
