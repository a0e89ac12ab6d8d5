"""Which prompt is it that kills engines? The pump between scripted replicas, in a time of its own that costs none."""

import asyncio
import json
import random
import selectors

import llmrun
import pytest

ANSWER = llmrun.parse_head(b"HTTP/1.1 200 OK\r\nContent-Length: 1", True)
STREAM = llmrun.parse_head(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close", True)


class Jumping(selectors.DefaultSelector):
    """Nobody writes to us, so instead of waiting the time is later."""

    now = 0.0

    def select(self, timeout=None):
        self.now += timeout or 0
        return super().select(0)


class Loop(asyncio.SelectorEventLoop):
    def __init__(self):
        self.jumping = Jumping()
        super().__init__(self.jumping)

    def time(self):
        return self.jumping.now


@pytest.fixture
def loop(monkeypatch):
    loop = Loop()
    monkeypatch.setattr(llmrun, "clock", loop.time)
    monkeypatch.setattr(llmrun, "CLOCK_TO_DATE", 0.0)
    yield loop
    loop.close()


def says(text):
    body = json.dumps({"choices": [{"finish_reason": "stop", "message": {"content": text}}], "usage": {}}).encode()
    return llmrun.Message(ANSWER, body)


class Replica:
    """`play(replica, prompt's name, how often it was asked here)` gives (seconds, what then): an answer's text, a
    Message, or None where the engine dies of it. Its end is known `notice_s` after its connections broke."""

    def __init__(self, number, play, in_flight=1, notice_s=0.0, restart_s=0.05, restarts=3):
        self.number, self.play, self.notice_s, self.restart_s, self.restarts = number, play, notice_s, restart_s, restarts
        self.engine, self.client = type("Engine", (), {"in_flight": in_flight, "request_timeout": llmrun.math.inf}), self
        self.loop, self.failed, self.down = asyncio.get_event_loop(), None, False
        self.waiting, self.times, self.deaths, self.forgiven = [], {}, 0, 0

    def ask(self, method, url, body, limit, then):
        if self.down:
            self.loop.call_soon(then, llmrun.Unreachable("refused"))
            return
        name = json.loads(body)["name"]
        self.times[name] = self.times.get(name, 0) + 1
        delay_s, outcome = self.play(self, name, self.times[name])
        self.waiting.append(then)
        self.loop.call_later(delay_s, self.come, then, says(outcome) if isinstance(outcome, str) else outcome)

    def come(self, then, outcome):
        if then in self.waiting and outcome is None:
            self.die()
        elif then in self.waiting:
            self.waiting.remove(then)
            then(outcome)

    def die(self):
        waiting, self.waiting, self.down, self.deaths = self.waiting, [], True, self.deaths + 1
        for then in waiting:
            self.loop.call_soon(then, llmrun.WireError("broke"))
        self.loop.call_later(self.notice_s, self.failed.set_result, llmrun.ProgramFailed("", "died", ""))

    async def unless_failed(self, work):
        self.failed, work = self.loop.create_future(), asyncio.ensure_future(work)
        try:
            await asyncio.wait([work, self.failed], return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                raise self.failed.result()
            return work.result()
        finally:
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)

    async def request(self, method, path, body, timeout_s):
        """A small question, which does not kill."""
        if self.down:
            raise llmrun.Unreachable("refused")
        return says("Hi")

    async def recover(self, error, restarts=3, worked=False):
        if self.deaths - self.forgiven > self.restarts:
            raise error
        await asyncio.sleep(self.restart_s)
        self.down = False

    def forgive(self):
        self.forgiven = self.deaths


def pumped(loop, make_replicas, names, meanwhile=None, limit_s=2000):
    """What came of prompts with these names, as (name, status or error's code, replica); and the replicas."""
    async def work():
        replicas, numbers, results = make_replicas(), iter(range(len(names))), []
        pump = llmrun.Pump(lambda: next(numbers, None), lambda n: llmrun.Prompt((0, n, 0), names[n], llmrun.CHAT, json.dumps({"name": names[n]}).encode()),
                           results.extend, llmrun.math.inf)
        helper = asyncio.ensure_future(meanwhile(pump) if meanwhile else asyncio.sleep(0))
        starts = [(replica, asyncio.ensure_future(asyncio.sleep(0))) for replica in replicas]
        await llmrun.within(limit_s, pump.run(starts))
        await helper
        assert not any(pump.trays) or pump.draining
        return [(result.prompt.custom_id, result.status or result.error["code"], result.replica) for result in results], replicas
    asyncio.set_event_loop(loop)
    try:
        return loop.run_until_complete(work())
    finally:
        asyncio.set_event_loop(None)


def poisonous(name="P", after_s=0.05):
    return lambda replica, asked, times: (after_s, None) if asked == name else (0.02, f"re: {asked}")


def test_a_prompt_that_kills_alone_is_judged_where_it_was_asked(loop):
    """Its node's fault, maybe; meanwhile nobody else asks it, and it has one result."""
    def bad_node(replica, name, times):
        return (0.3, None) if name == "P" else (0.02, "ok")

    def good_node(replica, name, times):
        return {"P": 3.0, "busy": 6.0}.get(name, 0.02), "ok"
    results, replicas = pumped(loop, lambda: [Replica(0, bad_node), Replica(1, good_node), Replica(2, lambda *asked: (12.0, "ok"))],
                               ["P", "busy", "slow"])
    assert sorted(results) == [("P", "engine_died", 0), ("busy", 200, 1), ("slow", 200, 2)]
    assert [replica.deaths for replica in replicas] == [3, 0, 0]


def test_an_innocent_prompt_that_met_three_deaths_has_its_answer(loop):
    """It is being asked alone, of an engine that came back, when the last of the deaths is judged."""
    def dies_at(at_s):
        return lambda replica, name, times: (at_s, None) if name == "P" and times == 1 else (2.0, "ok") if name == "P" else (20.0, "ok")
    results, _ = pumped(loop, lambda: [Replica(0, dies_at(0.2)), Replica(1, dies_at(0.2)), Replica(2, dies_at(0.2)),
                                       Replica(3, dies_at(0))], ["P", "s"])
    assert [result for result in results if result[0] == "P"] == [("P", 200, results[0][2])]


@pytest.mark.parametrize("notice_s", [0.0, 0.5, 1.0, 2.5])
def test_a_poisonous_prompt_is_found_however_late_its_engines_end_is_known(loop, notice_s):
    results, (replica,) = pumped(loop, lambda: [Replica(0, poisonous(), in_flight=2, notice_s=notice_s)], ["P", "a", "b"])
    assert sorted(name for name, status, _ in results if status == 200) == ["a", "b"]
    assert [result for result in results if result[0] == "P"] == [("P", "engine_died", 0)] and replica.deaths == 3


def test_a_prompt_that_killed_alone_has_its_result_though_the_run_is_drained(loop):
    async def drain(pump):
        while not any(desk.alone for desk in pump.desks.values()):
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.5)  # its engine is dead, and not judged yet
        pump.drain()
    results, _ = pumped(loop, lambda: [Replica(0, poisonous(), restart_s=0.5)], ["P", "a"], drain)
    assert ("P", "engine_died", 0) in results


def test_a_stream_that_ends_with_its_engine_is_taken_for_a_death(loop):
    """The connection's end looks like the stream's, and the engine's end is known a moment later."""
    def play(replica, name, times):
        if name != "P":
            return 0.02, "ok"
        replica.loop.call_later(0.06, replica.die)
        return 0.05, llmrun.Message(STREAM, b"data: {}\n\n")
    results, (replica,) = pumped(loop, lambda: [Replica(0, play, notice_s=0.3)], ["P", "a"])
    assert sorted(results)[0] == ("P", "engine_died", 0) and replica.deaths == 3


def test_a_suspect_that_was_answered_is_no_suspect_any_more(loop):
    """Asked alone it is refused for the moment; it need not wait until an engine has nothing else to do."""
    busy = llmrun.Message(llmrun.parse_head(b"HTTP/1.1 503 X\r\nContent-Length: 2", True), b"{}")

    def play(replica, name, times):
        return (0.05, [None, None, busy, "ok"][min(times, 4) - 1]) if name == "P" else (0.1, "ok")
    results, _ = pumped(loop, lambda: [Replica(0, play)], ["P"] + [f"a{n}" for n in range(100)])
    assert [name for name, _, _ in results].index("P") < 30


def test_prompts_that_reach_nobody_keep_their_slots_for_a_moment(loop):
    """An engine that refuses connections for a second is asked twenty times a second a slot, and none is suspected."""
    def play(replica, name, times):
        if name == "first":
            replica.down = True
            replica.loop.call_later(1.0, setattr, replica, "down", False)
        return 0.02, "ok"
    refused, deaths = [], []

    class Busy(Replica):
        def ask(self, method, url, body, limit, then):
            refused.extend([body] if self.down else [])
            super().ask(method, url, body, limit, then)

    async def look(pump):
        await asyncio.sleep(0.9)
        deaths.extend(pump.desks[0].broken)
    results, _ = pumped(loop, lambda: [Busy(0, play, in_flight=3)], ["first"] + [f"q{number}" for number in range(30)], look)
    assert len(results) == 31 and all(status == 200 for _, status, _ in results)
    assert 20 <= len(refused) <= 70 and len(set(refused)) <= 6 and not deaths


@pytest.mark.parametrize("first", range(0, 60, 20))
def test_every_prompt_has_one_result_and_none_but_the_poisonous_died_alone(loop, monkeypatch, first):
    for seed in range(first, first + 20):
        chance = random.Random(seed)
        monkeypatch.setattr(llmrun.secrets, "randbelow", chance.randrange)
        names = [f"{'P' if chance.random() < 0.04 else 'q'}{number}" for number in range(60)]

        def play(replica, name, times, chance=chance):
            if name[0] == "P":
                return chance.uniform(0, 0.3), None
            return chance.expovariate(5), f"re: {name}"
        results, _ = pumped(loop, lambda: [Replica(number, play, chance.randint(1, 4), chance.choice([0, 0.1, 1]), chance.uniform(0, 5), 99)
                                           for number in range(chance.randint(1, 3))], names, limit_s=100000)
        assert sorted(name for name, _, _ in results) == sorted(names), seed
        by_status = {name: status for name, status, _ in results}
        assert {by_status[name] for name in names if name[0] == "P"} <= {"engine_died", "connection"}, seed
        assert {by_status[name] for name in names if name[0] == "q"} <= {200, "connection"}, seed
