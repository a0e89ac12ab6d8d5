"""How well jobs that share a run fill their engines, on the fake Slurm with fake engines of a fixed speed:

    python tests/bench/scaling.py [JOBS ...]

An array of 1, 8 and 32 jobs answers prompts of uneven cost: each has its own length, and the first third of the file is
three times as long. Efficiency is the time that slots were at work, of all the time that the jobs had them, from each
job's first prompt to the run's last answer. The tail is how long the first job without work waited for the last one."""

import json
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS), str(TESTS.parent)]

from answers import check_run, questions  # noqa: E402
from fake_slurm.cluster import FakeCluster  # noqa: E402
from fakes.build import make_build, make_model  # noqa: E402

SLOTS, PROMPTS_A_JOB, TOKENS_PER_S = 2, 40, 50
CONF = """\
ClusterName=fake
ProctrackType=proctrack/linuxproc
KillWait=2
NodeName=node[1-{nodes}] CPUs=1 RealMemory=4000
PartitionName=main Nodes=ALL Default=YES MaxTime=04:00:00
"""


def write_site(folder, jobs):
    make_build(folder / "bin")
    make_model(folder / "tiny.gguf")
    chance, count = random.Random(jobs), jobs * PROMPTS_A_JOB
    with open(folder / "in.jsonl", "w") as rows:
        for number in range(count):
            tokens = chance.randint(20, 80) * (3 if number < count // 3 else 1)  # the fake answers with the prompt
            rows.write(json.dumps({"text": f"{number} ".ljust(4 * tokens, "x")}) + "\n")
    (folder / "config.json").write_text(json.dumps({
        "name": "scaling", "slurm": {"jobs": jobs, "time": "00:30:00"}, "model": {"path": str(folder / "tiny.gguf")},
        "engine": {"path": str(folder / "bin"), "slots": SLOTS, "context": 1024},
        "prompts": {"user": "in.jsonl", "template": "{text}"},
        "environment": {"vars": {"FAKE_LLAMA_TOKENS_PER_S": str(TOKENS_PER_S),
                                 "FAKE_LLAMA_JOURNAL": str(folder / "asked.jsonl")}}}))


def measure(jobs):
    """(efficiency, tail in average prompts, seconds, jobs that worked)"""
    with tempfile.TemporaryDirectory() as name, FakeCluster(Path(name), CONF.format(nodes=jobs)) as cluster:
        folder = Path(name)
        write_site(folder, jobs)
        subprocess.run([sys.executable, str(TESTS.parent / "llmrun.py"), "submit", "config.json", "--wait"], cwd=folder,
                       env=cluster.env, check=True, stdout=subprocess.DEVNULL)
        config, run = json.loads((folder / "config.json").read_text()), next(folder.glob("runs/*"))
        check_run(run, folder, config, questions(folder, config))
        answers = {path.name: [json.loads(line) for line in path.read_text().splitlines()]
                   for path in folder.glob("runs/*/journal/*.jsonl")}
    answers = {name: lines for name, lines in answers.items() if lines}
    work = [len(line["response"]["body"]["choices"][0]["message"]["content"]) / 4 / TOKENS_PER_S
            for lines in answers.values() for line in lines]
    first = [min(line["llmrun"]["started"] for line in lines) for lines in answers.values()]
    last = [max(line["llmrun"]["started"] + line["llmrun"]["time_s"] for line in lines) for lines in answers.values()]
    capacity = sum(max(last) - begun for begun in first) * SLOTS
    return sum(work) / capacity, (max(last) - min(last)) / statistics.mean(work), max(last) - min(first), len(answers)


def main(counts):
    print(f"{'jobs':>5} {'worked':>7} {'seconds':>8} {'efficiency':>11} {'tail':>22}")
    for jobs in counts:
        efficiency, tail, seconds, worked = measure(jobs)
        print(f"{jobs:5} {worked:7} {seconds:8.1f} {efficiency:11.1%} {tail:6.2f} average prompts", flush=True)


if __name__ == "__main__":
    main([int(word) for word in sys.argv[1:]] or [1, 8, 32])
