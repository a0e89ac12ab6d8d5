"""What engines in trouble cost the pump:

    python tests/bench/trouble.py [PROMPTS]

Three replicas of which one is three times slower, and a fast one dies half-way: the time it takes, of the least that the
capacity there was allows. Then many prompts to one engine that cuts, garbles, delays or refuses one answer of a hundred:
every prompt has one result, and only those that were refused for good have failed."""

import collections
import random
import statistics
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS), str(TESTS.parent), str(TESTS / "bench")]

from figures import Figures  # noqa: E402
from test_work import Engine, answer, assert_each_once, one_slow_one_dying, pumped  # noqa: E402

import llmrun  # noqa: E402

ROUNDS, COUNT, SLOTS, ANSWER_S = 5, 3000, 4, 0.02
FAULTS = {"nothing": b"", "garbage": b"garbage\r\n\r\n", "cut short": b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\nshort",
          "500": answer("e", 500), "503": answer("e", 503), "429": answer("busy", 429, "Retry-After: 0\r\n"),
          "400": answer("bad", 400)}


def of_the_ideal():
    """How long three unequal replicas with a death half-way took, of what their capacity allows."""
    results, before, took = one_slow_one_dying(COUNT, SLOTS, ANSWER_S)
    assert_each_once(results, COUNT)
    fast = SLOTS / ANSWER_S
    return took / (len(before) / (7 / 3 * fast) + (COUNT - len(before)) / (4 / 3 * fast))


def through_faults(count):
    """How often each fault was met, and the results."""
    chance, met = random.Random(3), collections.Counter()

    def fault(number):
        if chance.random() >= 0.01:
            return None
        name = chance.choice(list(FAULTS))
        met[name] += 1
        return FAULTS[name]
    results, _ = pumped(count, Engine(64, 0, fault), limit_s=600)
    return met, results


if __name__ == "__main__":
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 100000
    llmrun.IDLE_TIMEOUT_S = 0.5  # an answer that was cut short is given up sooner
    ratios = [of_the_ideal() for _ in range(ROUNDS)]
    figures = Figures()
    figures.show("three replicas, one 3x slower, one dead half-way", statistics.median(ratios), "x", at_most=1.1,
                 more=f"of the ideal time ({min(ratios):.3f}-{max(ratios):.3f}), {COUNT} prompts, each once")
    met, results = through_faults(count)
    assert_each_once(results, count)
    failed = [result for result in results if not result.ok]
    assert len(failed) == met["400"] and all(result.status == 400 for result in failed)
    print(f"{count} prompts, {sum(met.values())} faults ({dict(met)}): one result each, "
          f"{len(failed)} failed, all of them refused with 400; {sum(result.attempts for result in results) - count} asked again")
    figures.end()
