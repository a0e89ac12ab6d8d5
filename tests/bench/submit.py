"""What a submit does with its rows: reads and checks each, and keeps the input in a run.

    python tests/bench/submit.py [ROWS]

Batch rows, rows with a template and a table with a template, each beside a bare reading of the same file, all in
processes of their own: the ratio of their times, and the peak memory of the submit."""

import csv
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS.parent), str(TESTS / "bench")]

from figures import Figures  # noqa: E402

TEXT = "A question of some length, as people ask them? It has a second sentence, too. "
TEMPLATE = "Answer in one word, and give no reason for it: {q}"


def batch_row(number):
    body = {"model": "m", "messages": [{"role": "system", "content": "You are a helpful assistant."},
                                       {"role": "user", "content": TEXT + str(number)}], "max_tokens": 64}
    return json.dumps({"custom_id": f"request-{number}", "method": "POST", "url": "/v1/chat/completions", "body": body})


def plain_row(number):
    return json.dumps({"id": number, "topic": "questions", "q": TEXT * 2 + str(number)})


def table_row(number):
    return f'{number},questions,"{TEXT * 2}{number}"'


KINDS = {  # the file, its first line, a row, the settings, how often the time of a bare reading it may take
    "Batch rows": ("batch.jsonl", "", batch_row, {}, 4),
    "rows with a template": ("plain.jsonl", "", plain_row, {"template": TEMPLATE}, None),
    "a table with a template": ("table.csv", "id,topic,q\n", table_row, {"template": TEMPLATE, "id_column": "id"}, None)}


def read_bare(path):
    if path.suffix == ".csv":
        with open(path, newline="") as file:
            return sum(1 for _ in csv.reader(file)) - 1
    with open(path, "rb") as file:
        return sum(1 for line in file if json.loads(line))


def submit(path, settings):
    import llmrun
    config = llmrun.build_config(llmrun.Config, {
        "prompts": {"user": str(path), **settings}, "run_dir": str(path.parent / "runs"), "engine": {"name": "echo"}},
        "config.json", None)

    def work():
        prompts = llmrun.freeze(config, "m")
        llmrun.create_run(config, prompts, lambda run: "")
        return len(prompts)
    return work


def one_side(kind, side, folder, count):
    """Prints the seconds that one of the two took, and its peak memory."""
    name, _, _, settings, _ = KINDS[kind]
    path = Path(folder) / name
    work = submit(path, settings) if side == "submit" else lambda: read_bare(path)
    began = time.perf_counter()
    assert work() == int(count)
    took_s = time.perf_counter() - began
    with open("/proc/self/status") as file:  # not ru_maxrss, which knows of the process that started this one
        peak_kb = next(line for line in file if line.startswith("VmHWM")).split()[1]
    print(took_s, int(peak_kb) / 1024)


def measure(kind, folder, count):
    """(seconds, megabytes) of a bare reading and of a submit, the best of some rounds."""
    seen = {"bare": [], "submit": []}
    for _ in range(3 if count <= 10**6 else 1):
        for side, rounds in seen.items():
            argv = [sys.executable, __file__, "--side", kind, side, folder, str(count)]
            said = subprocess.run(argv, stdout=subprocess.PIPE, check=True, text=True).stdout
            rounds.append(tuple(map(float, said.split())))
    return [tuple(map(min, zip(*rounds))) for rounds in seen.values()]


def main(count):
    figures = Figures()
    for kind, (name, header, row, _, at_most) in KINDS.items():
        with tempfile.TemporaryDirectory() as folder:
            with open(Path(folder) / name, "w") as file:
                file.write(header)
                file.writelines(row(number) + "\n" for number in range(count))
            (bare_s, _), (submit_s, peak_mb) = measure(kind, folder, count)
        figures.show(f"{kind}: a submit, of a bare reading", submit_s / bare_s, "x", at_most=at_most,
                     more=f"{count} rows in {submit_s:.2f} s, {bare_s:.2f} s")
        figures.show(f"{kind}: peak memory", peak_mb, "MB", at_most=40 + 26e-6 * count)  # ten million within 300 MB
    figures.end()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--side"]:
        one_side(*sys.argv[2:])
    else:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 300000)
