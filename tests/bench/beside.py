"""The pump of another commit beside this one, alternating, each in a process of its own against a server that answers
at once:

    python tests/bench/beside.py COMMIT [PROMPTS] [ROUNDS]

Prints each round's rates and the ratio of their medians."""

import importlib.util
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "tests" / "bench"))


def one_round(script, port, count):
    """The rate of the llmrun.py that this names, and of its own processor time."""
    spec = importlib.util.spec_from_file_location("llmrun", script)
    sys.modules["llmrun"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["llmrun"])
    import pump
    import ready
    spent, work = [], ready.OneLife.work

    def timed(life, *args, **options):
        began = time.process_time()
        work(life, *args, **options)
        spent.append(time.process_time() - began)
    pump.OneLife.work = timed
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    print(count / pump.llmrun_pump(port, pump.Numbers(count=count)), count / spent[0])


def main(commit, count=40000, rounds=5):
    import pump
    from figures import Figures
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "old").mkdir()
        text = subprocess.run(["git", "show", f"{commit}:llmrun.py"], cwd=ROOT, stdout=subprocess.PIPE, check=True).stdout
        (folder / "old" / "llmrun.py").write_bytes(text)
        sides, server = {commit: folder / "old" / "llmrun.py", "here": ROOT / "llmrun.py"}, pump.Server(folder)
        seen = {side: [] for side in sides}
        try:
            for _ in range(rounds):
                for side, script in sides.items():
                    argv = [sys.executable, __file__, "--round", str(script), str(server.port), str(count)]
                    said = subprocess.run(argv, stdout=subprocess.PIPE, check=True, text=True).stdout.split()
                    seen[side].append(tuple(map(float, said)))
                    print(f"{side:12} {seen[side][-1][0]:8.0f}/s  {seen[side][-1][1]:8.0f} a second of its processor", flush=True)
        finally:
            server.stop()
    figures = Figures()
    for number, what in enumerate(("by the clock", "by the processor's time")):
        old, here = (statistics.median(rates[number] for rates in seen[side]) for side in sides)
        figures.show(f"this one's rate of {commit}'s, {what}", here / old, "x", at_least=0.97)
    figures.end()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--round"]:
        one_round(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
    else:
        main(sys.argv[1], *map(int, sys.argv[2:]))
