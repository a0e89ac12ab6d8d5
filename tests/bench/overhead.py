"""Time around the engine, on the real four-node Slurm with the real llama.cpp (root on Debian):

    python tests/bench/overhead.py [ROUNDS]

Medians of ROUNDS (10) runs, each beside its limit; then the medians of half as many runs of 24 short prompts over
3 nodes, by llmrun and by a hand-written job script, which has fixed sleeps and asks one prompt at a time."""

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
sys.path[:0] = [str(TESTS), str(TESTS / "bench")]

from figures import Figures  # noqa: E402
from real.cluster import RealCluster  # noqa: E402
from real.llama import llama_build  # noqa: E402
from real.tiny_model import write_tiny_model  # noqa: E402


class Bench:
    """A user's folder on the cluster with 24 short prompts."""

    def __init__(self, folder, cluster):
        self.folder, self.env = folder, dict(os.environ, **cluster.env)
        shutil.copy(TESTS.parent / "llmrun.py", folder)
        write_tiny_model(folder / "tiny.gguf")
        for number in range(24):
            path = folder / "prompts" / f"{number:02d}.txt"
            path.parent.mkdir(exist_ok=True)
            path.write_text(f"What comes after {number}?\n")
        (folder / "config.json").write_text(json.dumps({
            "slurm": {"time": "00:10:00"}, "model": {"path": "tiny.gguf"},
            "engine": {"path": str(llama_build()), "slots": 4, "context": 1024},
            "prompts": {"user": "prompts", "max_tokens": 32}}))

    def shell(self, *argv, **env):
        return subprocess.run(argv, cwd=self.folder, env=dict(self.env, **env), check=True, text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT).stdout

    def llmrun(self, *args):
        return self.shell(sys.executable, "llmrun.py", *args)

    def state(self, job):
        return self.shell("squeue", "-h", "-t", "all", "-o", "%T", "-j", f"{job},{job}").strip()

    def job_over(self, job):
        while self.state(job) in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING"):
            time.sleep(0.01)
        return time.time()

    def phases(self, nodes):
        """Seconds of each phase of one run."""
        said = json.loads(self.llmrun("submit", "config.json", "--json", "--set", f"slurm.nodes={nodes}"))
        over, run = self.job_over(said["job"]), Path(said["run"])
        lines = [json.loads(line) for path in run.glob("events/*.jsonl") for line in path.read_text().splitlines()]
        at = {event["event"]: event["time"] for event in lines if event["event"] != "progress"}
        answers = [json.loads(line)["llmrun"] for path in run.glob("journal/*") for line in path.read_text().splitlines()]
        assert len(answers) == 24, f"{len(answers)} answers in {run}"
        return {"driver start to all agents up": at["agents_up"] - at["start"],
                "agents up to engine processes started": at["engine_started"] - at["agents_up"],
                "engine ready to first prompt sent": min(a["started"] for a in answers) - at["ready"],
                "last answer to job over": over - max(a["started"] + a["time_s"] for a in answers)}

    def submit_cost(self):
        """Seconds that `submit` takes beyond a bare sbatch of the same script."""
        began = time.perf_counter()
        said = json.loads(self.llmrun("submit", "config.json", "--json"))
        mine = time.perf_counter() - began
        self.shell("scancel", str(said["job"]))
        began = time.perf_counter()
        job = self.shell("sbatch", "--parsable", str(Path(said["run"]) / "shapes" / "0" / "job.sh")).strip()
        bare = time.perf_counter() - began
        self.shell("scancel", job)
        for number in (said["job"], job):
            self.job_over(number)
        return mine - bare

    def ours(self):
        """Seconds from the submit of 24 prompts over 3 nodes to the end of the job."""
        began = time.time()
        return self.job_over(json.loads(self.llmrun("submit", "config.json", "--json", "--set", "slurm.nodes=3"))["job"]) - began

    def handwritten(self):
        """The same by the hand-written script; not by `sbatch --wait`, whose own polling would add half a minute."""
        began = time.time()
        job = self.shell("sbatch", "--parsable", "-N3", "-o", str(self.folder / "hand.out"),
                         str(TESTS / "real" / "overhead_handwritten.sh"), LLAMA=str(llama_build()), MODEL="tiny.gguf",
                         PROMPTS="prompts", RESULTS=str(self.folder / "handwritten"), PYTHON=sys.executable,
                         CLIENT=str(TESTS / "real" / "overhead_handwritten.py"), PORT_RPC="31000", PORT_SERVER="31100")
        over = self.job_over(job.strip())
        assert "COMPLETED" in self.state(job.strip()), (self.folder / "hand.out").read_text()
        return over - began


LIMITS = {"driver start to all agents up": 0.5, "agents up to engine processes started": 0.2,
          "engine ready to first prompt sent": 0.1, "last answer to job over": 1.0, "submit beyond a bare sbatch": 0.3}


def main(rounds):
    with tempfile.TemporaryDirectory(dir="/tmp") as folder, RealCluster(Path(folder) / "cluster") as cluster:
        bench = Bench(Path(folder), cluster)
        bench.phases(4)  # warms the caches of the disk
        seen = [bench.phases(4) for _ in range(rounds)]
        medians = {name: statistics.median(phases[name] for phases in seen) for name in seen[0]}
        medians["submit beyond a bare sbatch"] = statistics.median(bench.submit_cost() for _ in range(rounds))
        figures = Figures()
        for name, value in medians.items():
            figures.show(name, value, "s", at_most=LIMITS[name])
        pairs = [(bench.ours(), bench.handwritten()) for _ in range(max(3, rounds // 2))]
        ours, theirs = (statistics.median(side) for side in zip(*pairs))
        figures.show("24 prompts over 3 nodes, llmrun", ours, "s")
        figures.show("24 prompts over 3 nodes, hand-written", theirs, "s")
        figures.show("hand-written takes as long as llmrun", theirs / ours, "x", at_least=3)
        figures.end()


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 10)
