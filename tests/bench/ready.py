"""What the pump's benches share: a run made of a JSONL file, and one life of it with an engine that is always ready."""

import asyncio
import functools
import json
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS), str(TESTS.parent)]

from fakes.llama import mark_of  # noqa: E402

import llmrun  # noqa: E402


class Ready(llmrun.Replica):
    """An engine that somebody else has started."""

    async def failure(self):
        await asyncio.Event().wait()


def config_of(folder, connections):
    return llmrun.build_config(llmrun.Config, {
        "prompts": {"user": str(folder / "in.jsonl")}, "run_dir": str(folder / "runs"),
        "engine": {"name": "echo", "concurrency": connections}}, "config.json", None)


def make_run(folder, connections):
    config = config_of(folder, connections)
    return llmrun.create_run(config, llmrun.freeze(config, "m"), lambda run: "")


class OneLife:
    """What `drive` does between the agents' start and their end: claims, pump, journal."""

    def __init__(self, folder, connections):
        llmrun.gc.freeze()
        llmrun.gc.set_threshold(20000, 20, 100)
        self.config, self.run = config_of(folder, connections), llmrun.all_runs(folder / "runs")[-1]
        self.prompts = llmrun.Input.load(self.run, self.config, "m")
        self.life, self.tally = self.run.new_life(0, 0), llmrun.Tally()
        starts = llmrun.chunk_starts(len(self.prompts), 1)
        self.claims = llmrun.Claims(self.run, self.life, llmrun.Marks(self.run, self.prompts), starts)
        self.journal = llmrun.Journal(self.run, self.life)

    def keep(self, results):
        self.journal.add(*results)
        for result in results:
            self.tally.add(result)
        for result in results:
            self.claims.settle(result.prompt.key, result.ok)

    def next(self, only):
        """The next prompt, for as long as there are numbers in `only`."""
        return None if next(only, None) is None else self.claims.next()

    def work(self, port, key="key", keep=None, only=None):
        async def pump_all():
            replica = Ready(0, llmrun.Echo(self.config, self.run, self.life, 1), [], print)
            replica.client = llmrun.Client("127.0.0.1", port, key)
            next_number = functools.partial(self.next, only) if only else self.claims.next
            pump = llmrun.Pump(next_number, self.prompts.prompt, keep or self.keep, llmrun.math.inf)
            await pump.run([(replica, asyncio.ensure_future(asyncio.sleep(0)))])
            replica.client.close()
        if not self.claims.finished:
            asyncio.run(pump_all())
        self.journal.close()
        self.claims.end()

    def check_answers(self, body_of):
        """Each row has the answer to its own request: of its length (nginx), or with its mark (the fake llama-server)."""
        for segment in self.run.segments():
            for line in open(segment.path):
                record = json.loads(line)
                asked, answer = body_of(int(record["id"].split("_")[-2])), record["response"]["body"]
                mark = mark_of(json.loads(asked)) if "system_fingerprint" in answer else ""
                assert answer["usage"]["prompt_tokens"] == len(asked) or mark and answer["choices"][0]["message"]["content"].startswith(
                    mark), record
