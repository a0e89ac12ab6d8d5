"""Engines that live and do not answer: the pump between scripted replicas, in a time of its own that costs none."""

import asyncio
import collections
import json

import llmrun
import pytest
import test_suspects

loop = test_suspects.loop
BROKEN = "CUDA error: unspecified launch failure"


def refuses(status, words=BROKEN):
    body = json.dumps({"error": {"message": words}}).encode()
    return llmrun.Message(llmrun.parse_head(b"HTTP/1.1 %d X\r\nContent-Length: 1" % status, True), body)


class Replica(test_suspects.Replica):
    """One whose engine may be restarted, which `starts` counts. In `play`, a delay of None is for ever; it asks for
    the hour by `replica.loop.time()`. `healthy` is what it says of itself, `figures` what moves while it works."""

    def __init__(self, number, play, in_flight=4, healthy=True, request_timeout=None, figures=lambda time_s: 1):
        super().__init__(number, play, in_flight)
        self.engine.request_timeout = request_timeout or llmrun.math.inf
        self.title, self.healthy, self.starts, self.figures = f"llama-server {number}", healthy, [], figures
        self.worked = []

    def ask(self, method, url, body, limit, then):
        replica, began = self, len(self.starts)

        def play(*asked):
            delay_s, outcome = replica.script(*asked)
            return (10**9 if delay_s is None else delay_s), outcome
        self.script, self.play = self.play, play
        super().ask(method, url, body, limit, then)
        self.play = self.script
        self.loop.call_at(limit, lambda: began == len(self.starts) and self.come(then, llmrun.WireError("no answer within the time allowed")))

    async def request(self, method, path, body, timeout_s):
        """A small question, which `play` answers as "?"."""
        delay_s, outcome = self.play(self, "?", 1)
        await asyncio.sleep(timeout_s if delay_s is None else min(delay_s, timeout_s))
        if delay_s is None or delay_s > timeout_s:
            raise llmrun.WireError("no answer within the time allowed")
        if isinstance(outcome, llmrun.WireError):
            raise outcome
        return test_suspects.says(outcome) if outcome == "ok" else outcome

    async def signs(self):
        return self.healthy, [f"steps {self.figures(self.loop.time())}"] if self.healthy else []

    def give_up(self, then):
        self.come(then, llmrun.WireError("no answer within the time allowed"))

    async def recover(self, error, restarts=3, worked=False):
        self.starts.append(self.loop.time())
        self.waiting = []
        self.worked.append(worked)
        if len(self.starts) > restarts:
            raise error
        await asyncio.sleep(self.restart_s)


class Pumped:
    """What came of so many prompts with these replicas: results by name, how they ended, how many were taken at all."""

    def __init__(self, loop, names, *make_replicas, limit_s=7200, taken_at=None):
        self.names, self.results, self.error, self.taken, self.taken_then = names, [], None, 0, None
        self.limit_s, self.taken_at = limit_s, taken_at
        asyncio.set_event_loop(loop)
        try:
            loop.run_until_complete(self.work(make_replicas))
        finally:
            asyncio.set_event_loop(None)
        self.took_s = loop.time()

    def next(self):
        if self.taken == len(self.names):
            return None
        self.taken += 1
        return self.taken - 1

    def read(self, number):
        return llmrun.Prompt((0, number, 0), self.names[number], llmrun.CHAT, json.dumps({"name": self.names[number]}).encode())

    async def look(self):
        await asyncio.sleep(self.taken_at)
        self.taken_then = self.taken

    async def work(self, make_replicas):
        self.replicas = [make() for make in make_replicas]
        pump = llmrun.Pump(self.next, self.read, self.results.extend, llmrun.math.inf)
        looking = asyncio.ensure_future(self.look() if self.taken_at else asyncio.sleep(0))
        pumping = asyncio.ensure_future(pump.run([(replica, asyncio.ensure_future(asyncio.sleep(0))) for replica in self.replicas]))
        await asyncio.wait([pumping], timeout=self.limit_s)
        ended = pumping.done()
        for task in (pumping, looking):
            task.cancel()
        self.error, _ = await asyncio.gather(pumping, looking, return_exceptions=True)
        assert ended, f"no end within {llmrun.show_duration(self.limit_s)}; by then {self.counted()} of {len(self.names)}"
        assert self.error is None or isinstance(self.error, llmrun.ClusterError), self.error

    def counted(self):
        """How many prompts came to which status or error."""
        assert len({result.prompt.custom_id for result in self.results}) == len(self.results)
        return dict(collections.Counter(result.status or result.error["code"] for result in self.results))


def names(count, of="q"):
    return [f"{of}{number}" for number in range(count)]


# ── errors ─────────────────────────────────────────────────────────────────────


def test_an_engine_that_refuses_all_is_not_fed_with_more_than_may_be_under_way_and_wait(loop):
    def play(replica, name, times):
        return (0.01, refuses(500)) if replica.loop.time() < 20 else (0.01, "ok")
    run = Pumped(loop, names(20000), lambda: Replica(0, play), taken_at=15)
    assert run.taken_then <= 2 * 4


def test_an_engine_that_refuses_all_for_good_ends_with_its_words_and_every_prompt_open(loop):
    run = Pumped(loop, names(300), lambda: Replica(0, lambda *asked: (0.01, refuses(500))))
    assert run.results == [] and isinstance(run.error, llmrun.ProgramFailed) and BROKEN in str(run.error)
    starts = run.replicas[0].starts
    assert len(starts) == 4 and 60 <= starts[0] < 120, "it was started anew before it was given up"


@pytest.mark.parametrize("status", [500, 503, 0])
def test_an_engine_that_refuses_all_until_it_is_started_anew_costs_no_prompt(loop, status):
    def play(replica, name, times):
        return 0.01, "ok" if replica.starts else refuses(status) if status else llmrun.WireError("the connection broke")
    run = Pumped(loop, names(300), lambda: Replica(0, play))
    assert run.counted() == {200: 300} and len(run.replicas[0].starts) == 1


def test_half_a_minute_of_errors_costs_no_prompt_and_no_restart(loop):
    def play(replica, name, times):
        return 0.01, refuses(500) if replica.loop.time() < 30 else "ok"
    run = Pumped(loop, names(300), lambda: Replica(0, play))
    assert run.counted() == {200: 300} and not run.replicas[0].starts


def test_an_engine_that_refuses_all_takes_nothing_from_one_that_is_well(loop):
    def play(replica, name, times):
        return (1.0, "ok") if replica.number else (0.01, refuses(500))
    run = Pumped(loop, names(500), lambda: Replica(0, play), lambda: Replica(1, play))
    assert run.counted() == {200: 500} and run.took_s < 200 and not run.replicas[1].starts


def test_prompts_that_fail_while_others_succeed_fail_alone(loop):
    """However many they are, and though they are asked first."""
    def play(replica, name, times):
        return 0.5, refuses(500) if name[0] == "P" else "ok"
    run = Pumped(loop, names(40, "P") + names(1000), lambda: Replica(0, play, in_flight=50))
    assert run.counted() == {200: 1000, 500: 40} and not run.replicas[0].starts
    assert {result.attempts for result in run.results if not result.ok} == {llmrun.MAX_ATTEMPTS}


def test_refusals_of_the_prompts_themselves_are_no_sickness(loop):
    def play(replica, name, times):
        return None if name == "?" else 1.0, refuses(500 if name[0] == "P" else 400)
    run = Pumped(loop, names(10, "P") + names(300), lambda: Replica(0, play, in_flight=12))
    assert run.counted() == {400: 300, 500: 10} and not run.replicas[0].starts


# ── silence ────────────────────────────────────────────────────────────────────


def test_a_request_takes_no_longer_than_it_may(loop):
    """One prompt hangs, each time that it is asked; the others do not wait for it, nor the run for ever."""
    def play(replica, name, times):
        return None if name == "q3" else 1.0, "ok"
    run = Pumped(loop, names(200), lambda: Replica(0, play, request_timeout=20.0), limit_s=600)
    assert run.counted() == {200: 199, "connection": 1} and not run.replicas[0].starts


@pytest.mark.parametrize("first, healthy", [(0, False), (50, False), (50, True)])
def test_an_engine_that_falls_silent_is_started_anew_and_no_prompt_is_lost(loop, first, healthy):
    """After some answers, whatever it says of its health: it is known how long an answer takes."""
    def play(replica, name, times):
        return 1.0 if replica.starts or len(replica.times) <= first else None, "ok"
    run = Pumped(loop, names(100), lambda: Replica(0, play, healthy=healthy))
    assert run.counted() == {200: 100} and len(run.replicas[0].starts) == 1


def test_an_engine_that_stays_silent_is_given_up_with_every_prompt_open(loop):
    run = Pumped(loop, names(100), lambda: Replica(0, lambda *asked: (None, "ok"), healthy=False), limit_s=8 * 3600)
    assert run.results == [] and isinstance(run.error, llmrun.ProgramFailed)
    assert len(run.replicas[0].starts) == 4 and "answer" in str(run.error)


def test_an_engine_whose_first_answers_take_long_is_given_its_time(loop):
    """A long document on a small machine: it is healthy, and nobody knows yet what it can do."""
    run = Pumped(loop, names(8), lambda: Replica(0, lambda *asked: (2400.0, "ok")))
    assert run.counted() == {200: 8} and not run.replicas[0].starts


def test_an_engine_whose_figures_move_is_at_work(loop):
    """Its first answers take hours."""
    run = Pumped(loop, names(8), lambda: Replica(0, lambda *asked: (9000.0, "ok"), figures=int), limit_s=20000)
    assert run.counted() == {200: 8} and not run.replicas[0].starts


def test_an_engine_whose_figures_stand_still_for_an_hour_is_not(loop):
    run = Pumped(loop, names(8), lambda: Replica(0, lambda replica, *asked: (1.0 if replica.starts else None, "ok")))
    assert run.counted() == {200: 8} and 3600 < run.replicas[0].starts[0] < 4000


def test_an_engine_that_gives_nothing_is_told_apart_from_one_that_gave(loop):
    def play(replica, name, times):
        return 0.01, "ok" if name in ("q0", "q1") else refuses(500)
    assert Pumped(loop, names(50), lambda: Replica(0, play)).replicas[0].worked == [True, False, False, False]


def test_what_a_sick_engine_had_is_not_suspected(loop):
    """It would be asked alone, one after the other, and each be judged by the next sickness."""
    def play(replica, name, times):
        return 20.0 if len(replica.starts) >= 3 else None, "ok"
    run = Pumped(loop, names(40), lambda: Replica(0, play, in_flight=20, healthy=False))
    assert run.counted() == {200: 40} and run.took_s < 3 * 400 + 3 * 20


# ── whose fault it is ──────────────────────────────────────────────────────────


@pytest.mark.parametrize("count", [1, 3, 40])
def test_where_only_failing_prompts_are_left_they_fail_alone(loop, count):
    """Nothing else is asked any more that could succeed, but a small question of ours."""
    run = Pumped(loop, names(100) + names(count, "P"), lambda: Replica(0, lambda replica, name, times: (
        0.01, refuses(500) if name[0] == "P" else "ok")))
    assert run.counted() == {200: 100, 500: count} and not run.replicas[0].starts


@pytest.mark.parametrize("count", [1, 3, 40])
def test_however_few_are_asked_of_an_engine_that_answers_nothing_they_stay_open(loop, count):
    run = Pumped(loop, names(count), lambda: Replica(0, lambda *asked: (0.01, refuses(500))))
    assert run.results == [] and isinstance(run.error, llmrun.EngineSick) and run.took_s < 600


def test_what_is_asked_for_long_is_not_taken_from_an_engine_at_which_others_fail(loop):
    """A small question has to wait for a slot as well."""
    def play(replica, name, times):
        if name[0] == "P" and len([one for one in replica.times if one[0] == "L"]) == 4:
            return 0.01, refuses(500)
        return 1500.0 if name[0] == "L" else max(0.01, 1500 - replica.loop.time()) if name == "?" else 0.01, "ok"
    run = Pumped(loop, names(4, "L") + names(30, "P"), lambda: Replica(0, play, in_flight=34))
    assert not run.replicas[0].starts and run.counted() == {200: 4, 500: 30}


@pytest.mark.parametrize("lost", ["Unreachable", "WireError"])
def test_an_engine_that_lives_and_takes_no_connection_is_sick(loop, lost):
    run = Pumped(loop, names(10), lambda: Replica(0, lambda replica, name, times: (
        0.0, "ok" if replica.starts else getattr(llmrun, lost)("connection refused"))))
    assert run.counted() == {200: 10} and len(run.replicas[0].starts) == 1


def test_a_shape_that_is_no_answer_is_told_as_the_engines_fault(loop):
    answer = llmrun.Message(test_suspects.ANSWER, b'{"response": "Hi"}')
    run = Pumped(loop, names(100), lambda: Replica(0, lambda *asked: (0.01, answer)))
    assert run.results == [] and "an answer of no known shape" in str(run.error)


# ── how long an answer may take ────────────────────────────────────────────────


def long_one(loop, allowed, takes_s):
    """A hundred prompts that take ten seconds and make a hundred tokens, beside one that takes long."""
    def play(replica, name, times):
        answer = json.dumps({"choices": [{"message": {"content": "ok"}}], "usage": {"completion_tokens": 100}}).encode()
        return takes_s if name == "long" else 10.0, llmrun.Message(test_suspects.ANSWER, answer)

    class Asked(Pumped):
        def read(self, number):
            prompt = super().read(number)
            return prompt._replace(body=json.dumps({**json.loads(prompt.body), "max_tokens": allowed}).encode())
    return Asked(loop, ["long"] + names(400), lambda: Replica(0, play), limit_s=40000)


def test_what_hangs_while_others_are_answered_is_asked_again_in_the_end(loop):
    run = long_one(loop, 200, None)
    assert run.counted() == {200: 400, "connection": 1} and not run.replicas[0].starts
    assert run.took_s > llmrun.MAX_ATTEMPTS * llmrun.Pulse.STILL_S


def test_what_may_be_long_may_take_long(loop):
    """Its max_tokens allow a thousand times as much, and so an hour is none too many."""
    run = long_one(loop, 100_000, 3600.0)
    assert run.counted() == {200: 401} and not run.replicas[0].starts


def test_the_time_that_we_were_suspended_is_no_silence(loop):
    """The clock went on for a day, for whoever was asked too."""
    async def nap():
        await asyncio.sleep(30)
        for handle in [*loop._scheduled]:
            handle._when += 86400
        loop.jumping.now += 86400

    class Napping(Pumped):
        async def look(self):
            await nap()
    run = Napping(loop, names(20), lambda: Replica(0, lambda *asked: (20.0, "ok"), healthy=False), limit_s=10**6, taken_at=1)
    assert run.counted() == {200: 20} and not run.replicas[0].starts
