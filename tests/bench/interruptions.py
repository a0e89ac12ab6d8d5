"""What an interruption costs on a real Slurm (root, on Debian), beyond the model's load and Slurm's own requeue delay:

    python tests/bench/interruptions.py

A batch of three time slots of a minute each, then a run that a job of higher priority preempts, without grace and with
it. For each life but the last: from its last answer to its end, and from its successor's start to the first prompt."""

import json
import os
import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS), str(TESTS.parent), str(TESTS / "bench")]
os.environ["LLMRUN_BENCH"] = "real"

from conftest import TINY_MODEL, Site  # noqa: E402
from figures import Figures  # noqa: E402
from real.cluster import RealCluster  # noqa: E402
from real.llama import llama_build  # noqa: E402
from real.tiny_model import write_tiny_model  # noqa: E402


def lost_times(site):
    """(seconds lost, seconds that the job waited in the queue) for each interruption."""
    lives, found = [], []
    for path in site.run.glob("events/*.jsonl"):
        events = [json.loads(line) for line in path.read_text().splitlines()]
        lines = [json.loads(line) for part in site.run.glob(f"journal/{path.name[:-6]}.*.jsonl")
                 for line in part.read_text().splitlines()]
        lives.append((events, [line["llmrun"] for line in lines]))
    lives.sort(key=lambda life: life[0][0]["time"])
    for (events, answers), (later, first) in zip(lives, lives[1:]):
        load_s = next(event["load_s"] for event in later if event["event"] == "ready")
        start, end = later[0]["time"], events[-1]["time"]
        last = max(answer["started"] + answer["time_s"] for answer in answers)
        found.append((end - last + min(answer["started"] for answer in first) - start - load_s, start - end))
    return found


def interrupted(figures, name, count, config, partitions=None, disturb=lambda site: None):
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for sub in ("cluster", "home"):
            (folder / sub).mkdir()
        write_tiny_model(folder / TINY_MODEL, ends=False)
        with RealCluster(folder / "cluster", kill_wait=5, partitions=partitions) as cluster:
            site = Site(folder / "home", cluster, (Path(llama_build()), folder / TINY_MODEL))
            site.slow(count)
            site.config(**config)
            site.llmrun("submit", "config.json")
            site.answering(4)
            disturb(site)
            site.ended(timeout_s=600)
            for lost_s, waited_s in lost_times(site):
                figures.show(f"lost by {name}", lost_s, "s", at_most=2, more=f"in the queue {waited_s:.1f} s")
            assert len(site.journal()) == count, "no prompt was answered twice"


def main():
    slots = {"slurm": {"time": "00:01:00"}, "prompts": {"max_tokens": 400}}
    figures = Figures()
    interrupted(figures, "a time limit of a minute", int(sys.argv[1]) if len(sys.argv) > 1 else 300, slots)
    for words in ("PreemptMode=REQUEUE", "PreemptMode=REQUEUE GraceTime=20"):
        interrupted(figures, f"preempted, {words.replace('PreemptMode=', '').lower()}", 40, {"slurm": {"partition": "low"}},
                    {"low": words}, lambda site: site.preempt())
    figures.end()


if __name__ == "__main__":
    main()
