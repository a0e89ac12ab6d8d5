"""An array of four jobs on four hosts of their own (a real Slurm in network namespaces; root, on Debian): half-way one
node's cable is pulled and another's power fails. Engines are fakes of a fixed speed.

    python tests/bench/lost_nodes.py [PROMPTS]

Prints the time that the run took against the time that the capacity there was would have needed: four nodes until then,
and after it those whose drivers lived."""

import contextlib
import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS), str(TESTS.parent), str(TESTS / "bench")]
os.environ["LLMRUN_BENCH"] = "real"

from conftest import TINY_MODEL, Site, wait_for  # noqa: E402
from fakes.build import make_build, make_model  # noqa: E402
from figures import Figures  # noqa: E402
from real.cluster import RealCluster  # noqa: E402

SLOTS, TOKENS_PER_S = 2, 20


def main(count):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for sub in ("cluster", "home", "engine"):
            (folder / sub).mkdir()
        make_build(folder / "engine" / "bin")
        make_model(folder / "engine" / TINY_MODEL)
        with RealCluster(folder / "cluster", kill_wait=3, hosts=True, shared=[folder, TESTS], SlurmdTimeout=15) as cluster:
            site = Site(folder / "home", cluster, (folder / "engine" / "bin", folder / "engine" / TINY_MODEL))
            site.write_prompts(count)
            site.config(slurm={"jobs": 4, "cpus_per_node": 4, "time": "00:30:00"}, engine={"slots": SLOTS},
                        prompts={"max_tokens": 400}, environment={"vars": {"FAKE_LLAMA_TOKENS_PER_S": str(TOKENS_PER_S)}})
            site.llmrun("submit", "config.json")
            wait_for("half of the answers", lambda: len(site.journal()) >= count // 2, 600)
            where = [event["nodes"][0] for event in site.events() if event["event"] == "start"]
            cluster.cut(where[1])
            cluster.lose_node(where[2])
            lost_at, before = time.time(), len(site.journal())
            wait_for("the end", lambda: (site.run / "results" / "results.jsonl").exists(), 900)
            site.ended()
            figures = report(site, count, lost_at, before)
            for pid, _ in site.processes():  # a driver on a node that nobody reaches hears no scancel
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
    figures.end()


def report(site, count, lost_at, before):
    lives = [[json.loads(line)["llmrun"] for line in path.read_text().splitlines()]
             for path in site.run.glob("journal/*.jsonl")]
    spans = [(min(a["started"] for a in life), max(a["started"] + a["time_s"] for a in life)) for life in lives if life]
    begun, end = min(first for first, _ in spans), max(last for _, last in spans)
    alive = sum(last > lost_at + 5 for _, last in spans)
    rate = before / sum(lost_at - first for first, _ in spans if first < lost_at)  # of one node
    ideal = lost_at - begun + (count - before) / (rate * alive)
    answered = sum(map(len, lives))
    print(f"{count} prompts, {answered - count} answered twice; {alive} of 4 drivers lived on")
    figures = Figures()
    figures.show("time of what the capacity there was would need", (end - begun) / ideal, "x", at_most=1.2,
                 more=f"{end - begun:.1f} s of {ideal:.1f} s")
    return figures


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1200)
