"""Faults put into llmrun.py one at a time, each with the tests that must notice it: tests/mutants_list.py names them.

    python tests/mutants.py                       all of them (`make mutants`)
    python tests/mutants.py --tenth $(git rev-parse HEAD)   a tenth, another for each commit (CI)
    python tests/mutants.py --only requeue key    those whose room or name has one of these words

First the tests run on a clean copy of the tree, where all must pass; then, in copies side by side, on each mutant.
One that all its tests pass has survived: a fault that a user would meet and no test sees."""

import argparse
import ast
import collections
import concurrent.futures
import contextlib
import hashlib
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from mutants_list import MUTANTS

ROOT = Path(__file__).resolve().parent.parent
PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-rfE", "--timeout", "60"]
LEAST, MOST_EXPLAINED = 95, 5  # per cent of the mutants
MARK = "LLMRUN_MUTANT"  # in the environment of all that a run of tests starts, by which its left-overs are found


def stale(mutants, source, chosen):
    """Why some mutants cannot be put into the program any more, a line each."""
    for mutant in mutants:
        count = source.count(mutant.old)
        if count != 1:
            yield f"stale: {mutant.room}: {mutant.name}: its text stands {count} times in llmrun.py"
        elif mutant in chosen:
            try:
                ast.parse(source.replace(mutant.old, mutant.new))
            except SyntaxError as error:
                yield f"{mutant.room}: {mutant.name}: it makes no program: {error}"


def copy_tree(folder):
    """The tracked files as they are now."""
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, stdout=subprocess.PIPE, check=True, text=True).stdout
    for name in filter(os.path.isfile, (str(ROOT / name) for name in names.split("\0") if name)):
        target = folder / os.path.relpath(name, ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(name, target)
    return folder


def run_tests(folder, tests, *options, limit_s=900):
    """(exit code, what pytest said) of some tests in a copy; whatever they started is gone afterwards."""
    mark, argv = secrets.token_hex(8), [*PYTEST, *options, "--basetemp", folder / "t", *(f"tests/{test}" for test in tests)]
    with open(folder / "said", "w+") as said:
        process = subprocess.Popen(argv, cwd=folder, env=dict(os.environ, PYTHONDONTWRITEBYTECODE="1", **{MARK: mark}),
                                   stdin=subprocess.DEVNULL, stdout=said, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            code = 124
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            end_marked(mark)
            process.wait()
        said.seek(0)
        return code, said.read() if code != 124 else f"the tests took longer than {limit_s} s"


def end_marked(mark):
    """End what a mutant left running outside of its group; only what we started has the mark."""
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            if f"{MARK}={mark}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                os.kill(int(pid), signal.SIGKILL)


def try_out(mutant, folder):
    """(what noticed the mutant, "" for nothing; the seconds that took)."""
    began, source = time.monotonic(), (ROOT / "llmrun.py").read_text()
    (folder / "llmrun.py").write_text(source.replace(mutant.old, mutant.new))
    code, said = run_tests(folder, mutant.tests, "-x", limit_s=180) if mutant.tests else (0, "")
    noticed = re.search(r"^(?:FAILED|ERROR) tests/(.+?)(?: - |$)", said, re.MULTILINE)
    return (noticed.group(1) if noticed else said.strip()[-100:] or "?") if code else "", time.monotonic() - began


def chosen(args):
    """The mutants that the command line asks for."""
    if args.tenth:
        ranked = sorted(MUTANTS, key=lambda mutant: hashlib.sha256(f"{args.tenth} {mutant.name}".encode()).digest())
        return [mutant for mutant in MUTANTS if mutant in ranked[:len(MUTANTS) // 10]]
    words = [word.lower() for word in args.only]
    return [mutant for mutant in MUTANTS if not words
            or any(word in f"{mutant.room} {mutant.name}".lower() for word in words)]


def show_totals(outcomes):
    """A line for each room, and how many per cent of the unexplained were caught."""
    caught, all_of = collections.Counter(), collections.Counter(mutant.room for mutant in outcomes)
    caught.update(mutant.room for mutant, noticed in outcomes.items() if noticed)
    explained = sum(bool(mutant.survives) for mutant, noticed in outcomes.items() if not noticed)
    for room, count in all_of.items():
        print(f"{room:12} {caught[room]:3} of {count}")
    per_cent = 100 * sum(caught.values()) / max(1, len(outcomes) - explained)
    print(f"{'all':12} {sum(caught.values()):3} of {len(outcomes)}, {explained} explained: {per_cent:.1f} %")
    return per_cent


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tenth", default="", metavar="SEED", help="a random tenth, the same for the same seed")
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="those whose room or name has such a word")
    parser.add_argument("--list", action="store_true", help="name them and stop")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="mutants tried side by side")
    args = parser.parse_args()
    mutants, source = chosen(args), (ROOT / "llmrun.py").read_text()
    if args.list:
        print("\n".join(f"{mutant.room:12} {mutant.name}" for mutant in mutants))
        return 0
    faults = list(stale(MUTANTS, source, set(mutants)))
    if faults:
        sys.exit("\n".join(faults))
    if sum(bool(mutant.survives) for mutant in MUTANTS) * 100 > MOST_EXPLAINED * len(MUTANTS):
        sys.exit(f"more than {MOST_EXPLAINED} % of the mutants are explained survivors")
    with tempfile.TemporaryDirectory(prefix="mutants-") as parent:
        union = sorted({test for mutant in mutants for test in mutant.tests})
        clean = copy_tree(Path(parent, "clean"))
        code, said = run_tests(clean, union, "--collect-only")  # side by side, pytest hides which test is not there
        if not code:
            code, said = run_tests(clean, union, "-n", str(args.jobs), "--dist", "worksteal", limit_s=3600)
        if code:
            sys.exit(f"{said}\nthe tests must pass before a fault is put in: else a caught one means nothing")
        print(f"{len(union)} tests pass on the clean tree; {len(mutants)} mutants:", flush=True)
        folders, outcomes = [copy_tree(Path(parent, str(number))) for number in range(args.jobs)], {}

        def work(mutant):
            folder = folders.pop()
            try:
                return mutant, *try_out(mutant, folder)
            finally:
                folders.append(folder)
        with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
            for mutant, noticed, took_s in pool.map(work, mutants):
                outcomes[mutant] = noticed
                why = f"survived, explained: {mutant.survives}" if mutant.survives else "SURVIVED"
                print(f"{mutant.room:12} {took_s:5.1f} s  {mutant.name}: {noticed or why}", flush=True)
    return int(show_totals(outcomes) < LEAST)


if __name__ == "__main__":
    sys.exit(main())
