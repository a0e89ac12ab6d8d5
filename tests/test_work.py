"""The pump against servers that are slow, unfair, overrun or dying; the journal on a disk that fails."""

import asyncio
import errno
import json
import math
import os
import random
import resource
import types

import llmrun
import pytest


class Engine:
    """A server with some slots and a time for each answer; `faults(request number)` may give raw bytes instead."""

    def __init__(self, slots=2, answer_s=0.0, faults=lambda number: None):
        self.size, self.answer_s, self.faults = slots, answer_s, faults
        self.in_flight, self.request_timeout, self.asked, self.connections = slots + slots // 8 + 2, math.inf, [], set()
        self.under_way = self.most_under_way = 0

    async def start(self):
        self.slots = asyncio.Semaphore(self.size)
        self.server = await asyncio.start_server(self.talk, "127.0.0.1", 0)
        return llmrun.Client("127.0.0.1", self.server.sockets[0].getsockname()[1])

    async def talk(self, reader, writer):
        self.connections.add(writer)
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0])
                body = json.loads(await reader.readexactly(length))
                number = len(self.asked)
                self.asked.append(body["messages"][0]["content"])
                fault = self.faults(number)
                if fault is None:
                    self.under_way += 1
                    self.most_under_way = max(self.most_under_way, self.under_way)
                    async with self.slots:
                        await asyncio.sleep(self.answer_s)
                    self.under_way -= 1
                    fault = answer(f"re: {self.asked[number]}")
                writer.write(fault)
                if not fault:
                    return
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    def die(self):
        self.server.close()
        for writer in self.connections:
            writer.transport.abort()


def taken_from(numbers):
    numbers = iter(numbers)
    return lambda: next(numbers, None)


def answer(text, status=200, extra=""):
    body = json.dumps({"choices": [{"finish_reason": "stop", "message": {"content": text}}], "usage": {"completion_tokens": 1}}
                      if status == 200 else {"error": {"message": text}})
    return f"HTTP/1.1 {status} X\r\n{extra}Content-Length: {len(body)}\r\n\r\n{body}".encode()


class Group:
    """What the pump knows of a replica."""

    def __init__(self, number, engine, client):
        self.number, self.engine, self.client, self.failed = number, engine, client, asyncio.get_running_loop().create_future()

    async def unless_failed(self, work):
        work = asyncio.ensure_future(work)
        await asyncio.wait([work, self.failed], return_when=asyncio.FIRST_COMPLETED)
        if self.failed.done() and not work.done():
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)
            raise self.failed.result()
        return work.result()

    async def recover(self, error, worked=False):
        raise error

    def forgive(self):
        self.forgiven = True

    def fail(self):
        self.engine.die()
        self.client.close()
        self.failed.set_result(llmrun.ProgramFailed("", "died", ""))


def read(number):
    body = {"messages": [{"role": "user", "content": f"q{number}"}]}
    return llmrun.Prompt((0, number, 0), f"r{number}", llmrun.CHAT, json.dumps(body).encode())


def pumped(count, *engines, ends_in=None, meanwhile=None, starts=None, limit_s=20):
    """Run `count` prompts through these engines; the results and how long it took. Nothing may go wrong unseen."""
    troubles = []

    async def work():
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: troubles.append(context))
        groups = [Group(number, engine, await engine.start()) for number, engine in enumerate(engines)]
        results, began = [], llmrun.clock()
        pump = llmrun.Pump(taken_from(range(count)), read, results.extend, began + ends_in if ends_in else llmrun.math.inf)
        begun = [asyncio.ensure_future(asyncio.sleep(starts[n] if starts else 0)) for n in range(len(groups))]
        helper = asyncio.ensure_future(meanwhile(pump, groups, results)) if meanwhile else None
        try:
            await pump.run(list(zip(groups, begun)))
        finally:
            if helper:
                helper.cancel()
            for group in groups:
                group.client.close()
                group.engine.server.close()
        assert_own_answers(results)
        return results, llmrun.clock() - began
    pumped = asyncio.run(asyncio.wait_for(work(), limit_s))
    assert not troubles, troubles
    return pumped


def assert_own_answers(results):
    """Each answer is the one to its own question, in what is written and in what is counted."""
    for result in results:
        if result.ok:
            assert json.loads(result.body) == result.answer
            assert llmrun.answer_of(result.answer)["answer"] == f"re: q{result.prompt.key[1]}", result


def assert_each_once(results, count):
    assert sorted(result.prompt.key[1] for result in results) == list(range(count))
    assert_own_answers(results)


def test_a_few_prompts_more_than_slots_are_under_way_and_none_is_asked_twice():
    engine = Engine(slots=16, answer_s=0.01)
    results, _ = pumped(300, engine)
    assert_each_once(results, 300)
    assert len(engine.asked) == 300 and all(result.ok and result.attempts == 1 for result in results)
    assert engine.most_under_way == 16 + 16 // 8 + 2


@pytest.mark.parametrize("status, extra", [(429, "Retry-After: 0\r\n"), (503, ""), (500, ""), (408, ""), (409, ""), (0, "")])
def test_what_can_pass_is_asked_again(status, extra):
    def first_two(number):
        return (answer("busy", status, extra) if status else b"") if number < 2 else None
    results, _ = pumped(6, Engine(faults=first_two))
    assert_each_once(results, 6)
    assert all(result.ok for result in results) and sum(result.attempts for result in results) == 8


@pytest.mark.parametrize("status", [400, 401, 403, 404, 413, 422, 501])
def test_what_cannot_pass_is_a_result_with_its_error_and_the_run_goes_on(status):
    engine = Engine(faults=lambda number: answer("no", status) if number == 1 else None)
    results, _ = pumped(5, engine)
    assert_each_once(results, 5)
    failed, = [result for result in results if not result.ok]
    assert failed.status == status and failed.attempts == 1 and b"no" in failed.body and len(engine.asked) == 5


def test_an_answer_that_never_comes_right_fails_in_the_end(monkeypatch):
    monkeypatch.setattr(llmrun, "MAX_ATTEMPTS", 3)
    engine = Engine(faults=lambda number: None if engine.asked[number] == "Hi" else b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nno!")
    results, _ = pumped(2, engine)
    assert_each_once(results, 2)
    assert {result.error["code"] for result in results} == {"not_json"} and all(3 <= result.attempts <= 4 for result in results)


def said_200(body):
    body = json.dumps(body)
    return f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()


ERRORS = [{"error": {"message": "the slot is gone", "code": 500}}, {"error": "the slot is gone"},
          {"object": "error", "message": "the slot is gone", "code": 500}, {"error": {"message": "the slot is gone"}, "choices": []},
          {"error": {"message": "the slot is gone"}, "choices": [{"message": {"content": "half of an"}}]}]


@pytest.mark.parametrize("body", ERRORS, ids=str)
def test_a_200_that_tells_of_an_error_is_no_answer(body, monkeypatch):
    """Some engines and proxies have sent their head before they fail."""
    results, _ = pumped(4, Engine(faults=lambda number: said_200(body) if number == 0 else None))
    assert_each_once(results, 4)
    assert all(result.ok for result in results) and sum(result.attempts for result in results) == 5, "it was asked again"
    monkeypatch.setattr(llmrun, "MAX_ATTEMPTS", 1)
    results, _ = pumped(2, Engine(faults=lambda number: said_200(body)))
    assert_each_once(results, 2)
    for result in results:
        line = json.loads(llmrun.journal_line(result))
        assert not result.ok and not line["llmrun"]["ok"] and "the slot is gone" in llmrun.columns_of(line)["error"]


SHAPELESS = [{"hello": "world"}, {}, {"choices": "x"}, {"choices": [5]}, {"choices": [{"message": "x"}]}, {"data": [5]}, {"choices": None}]


@pytest.mark.parametrize("body", SHAPELESS, ids=str)
def test_an_answer_of_no_known_shape_is_told_as_such(body, monkeypatch):
    monkeypatch.setattr(llmrun, "MAX_ATTEMPTS", 1)
    results, _ = pumped(2, Engine(faults=lambda number: said_200(body)))
    assert_each_once(results, 2)
    for result in results:
        said = llmrun.columns_of(json.loads(llmrun.journal_line(result)))["error"]
        assert not result.ok and "shape" in said and json.dumps(body)[:20] in said, said


KNOWN = [{"choices": [{"message": {"content": ""}}]}, {"choices": [{"message": {"content": None, "tool_calls": [{"id": "1"}]}}]},
         {"choices": [{"text": "x"}]}, {"data": [{"embedding": [0.1]}]}, {"choices": [{"message": {"content": None, "refusal": "no"}}]},
         {"choices": [{"message": {"content": None, "reasoning_content": "hm"}}]}, {"choices": [{"message": {"content": "x"}}], "error": None}]


@pytest.mark.parametrize("body", KNOWN, ids=str)
def test_an_answer_of_any_known_shape_is_one_though_it_may_say_nothing(body, monkeypatch):
    monkeypatch.setattr("test_work.assert_own_answers", lambda results: None)
    results, _ = pumped(2, Engine(faults=lambda number: said_200(body)))
    assert_each_once(results, 2)
    assert all(result.ok and result.answer == body for result in results)


def test_retry_after_is_waited_for_outside_the_slot():
    engine = Engine(slots=1, answer_s=0.01, faults=lambda number: answer("later", 429, "Retry-After: 1\r\n") if number == 0 else None)
    results, took = pumped(20, engine)
    assert_each_once(results, 20)
    assert results[-1].attempts == 2 and took > 0.7, "the refused one came last, the others went on meanwhile"


def one_slow_one_dying(count, slots, answer_s):
    """Three replicas, one 3 times slower; a fast one dies half-way: the results, those of before, the seconds."""
    before = []

    async def kill_one(pump, groups, results):
        while len(results) < count / 2:
            await asyncio.sleep(0.001)
        before.extend(results)
        groups[1].fail()
    results, took = pumped(count, Engine(slots, answer_s), Engine(slots, answer_s), Engine(slots, 3 * answer_s),
                           meanwhile=kill_one)
    return results, before, took


def test_replicas_share_by_their_speed_and_a_lost_one_costs_only_its_share():
    """The others take over what the dead one had, each by its speed."""
    results, before, _ = one_slow_one_dying(600, 4, 0.02)
    assert_each_once(results, 600)
    shares = [sum(result.replica == number for result in results[len(before):]) for number in range(3)]
    assert shares[1] == 0 and 2 < shares[0] / shares[2] < 4.5, shares


def test_the_first_ready_replica_starts_and_a_late_one_joins():
    engines = [Engine(2, 0.01), Engine(2, 0.01)]
    results, _ = pumped(200, *engines, starts=[0.4, 0])
    assert_each_once(results, 200)
    assert {result.replica for result in results[:20]} == {1} and {result.replica for result in results} == {0, 1}


def test_when_the_last_replica_is_lost_the_run_ends_with_its_error():
    async def kill(pump, groups, results):
        while len(results) < 5:
            await asyncio.sleep(0.005)
        groups[0].fail()
    with pytest.raises(llmrun.ProgramFailed, match="died"):
        pumped(1000, Engine(2, 0.01), meanwhile=kill)


def test_nothing_is_sent_that_cannot_finish_before_the_end(monkeypatch):
    monkeypatch.setattr(llmrun, "LAST_MOMENTS_S", 0.2)
    engine = Engine(2, 0.3)
    results, took = pumped(100, engine, ends_in=2.0)
    assert took < 2.0 and 0 < len(results) < 100
    assert len(engine.asked) - len(results) <= engine.in_flight, "only what was under way when time ran out is open"


def test_draining_finishes_what_is_under_way():
    engine = Engine(2, 0.1)

    async def drain(pump, groups, results):
        while len(results) < 4:
            await asyncio.sleep(0.005)
        pump.drain()
    results, _ = pumped(1000, engine, meanwhile=drain)
    assert 4 <= len(results) == len(engine.asked) < 20


def test_many_prompts_with_random_faults_are_all_accounted_for(monkeypatch):
    monkeypatch.setattr(llmrun, "IDLE_TIMEOUT_S", 0.5)
    chance = random.Random(3)
    kinds = [b"", answer("e", 500), answer("e", 503), answer("busy", 429, "Retry-After: 0\r\n"), b"garbage\r\n\r\n",
             b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\nshort", answer("bad", 400)]
    engine = Engine(32, 0, lambda number: chance.choice(kinds) if chance.random() < 0.01 else None)
    results, _ = pumped(3000, engine)
    assert_each_once(results, 3000)
    assert all(result.ok or result.status == 400 for result in results)


def test_a_replica_lost_while_results_cannot_be_written_loses_no_prompt():
    engines, held = [Engine(2), Engine(2)], [False]

    async def work():
        groups = [Group(number, engine, await engine.start()) for number, engine in enumerate(engines)]
        results = []
        pump = llmrun.Pump(taken_from(range(40)), read, results.extend, llmrun.math.inf, lambda: held[0])
        held[0] = True
        running = asyncio.ensure_future(pump.run([(group, asyncio.ensure_future(asyncio.sleep(0))) for group in groups]))
        await asyncio.sleep(0.2)
        groups[0].fail()
        await asyncio.sleep(0.1)
        held[0] = False
        await running
        assert_each_once(results, 40)
        for group in groups:
            group.client.close()
            group.engine.server.close()
    asyncio.run(asyncio.wait_for(work(), 20))


def test_draining_does_not_wait_for_an_engine_that_starts_again(monkeypatch):
    monkeypatch.setattr(llmrun.Pump, "DEATH_PAUSE_S", 0.01)
    monkeypatch.setattr(Group, "recover", lambda group, error, worked: asyncio.sleep(1000))

    async def die_and_drain(pump, groups, results):
        while len(results) < 4:
            await asyncio.sleep(0.005)
        groups[0].fail()
        await asyncio.sleep(0.1)
        pump.drain()
    results, took = pumped(1000, Engine(2, 0.02), meanwhile=die_and_drain)
    assert took < 5 and len(results) >= 4


def test_a_suspect_whose_node_is_lost_is_asked_by_another(monkeypatch):
    """Two engines died with the same prompts under way, so these are asked alone; then that replica is gone for good,
    and neither the one that it was asked just then nor the others are lost."""
    monkeypatch.setattr(llmrun.Pump, "DEATH_PAUSE_S", 0.01)
    engines, lost = [Engine(2, 1000), Engine(2)], []

    async def recover(group, error, worked):
        group.failed, group.client = asyncio.get_running_loop().create_future(), await group.engine.start()
    monkeypatch.setattr(Group, "recover", recover)

    async def asked(count):
        while len(engines[0].asked) < count:
            await asyncio.sleep(0.005)

    async def die_twice_and_be_lost(group):
        for count in (4, 8):
            await asked(count)
            group.fail()
        await asked(9)
        await asyncio.sleep(0.6)  # any other would have its turn by then
        lost.append(len(engines[0].asked))
        group.failed.set_result(llmrun.NodeLost("node1", "the node was lost", ""))

    async def work():
        groups = [Group(number, engine, await engine.start()) for number, engine in enumerate(engines)]
        results = []
        pump = llmrun.Pump(taken_from(range(5)), read, results.extend, llmrun.math.inf)
        late = asyncio.ensure_future(die_twice_and_be_lost(groups[0]))
        await pump.run([(groups[0], asyncio.ensure_future(asyncio.sleep(0))), (groups[1], late)])
        for group in groups:
            group.client.close()
            group.engine.server.close()
        assert lost == [9], "only one was asked by then"
        assert_each_once(results, 5)
    asyncio.run(asyncio.wait_for(work(), 20))


def test_waiting_for_the_disk_does_not_grow_busier(monkeypatch):
    """However often the pump is woken meanwhile, it looks twenty times a second."""
    looked, engine = [], Engine(2)

    async def work():
        group = Group(0, engine, await engine.start())
        pump = llmrun.Pump(taken_from(range(1)), read, lambda results: None, llmrun.math.inf, lambda: looked.append(1) or "full")
        running = asyncio.ensure_future(pump.run([(group, asyncio.ensure_future(asyncio.sleep(0)))]))
        for _ in range(50):
            await asyncio.sleep(0.001)
            pump.wake_all()
        looked.clear()
        await asyncio.sleep(0.5)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        group.client.close()
        engine.server.close()
    asyncio.run(asyncio.wait_for(work(), 20))
    assert 0 < len(looked) <= 15


def test_draining_does_not_wait_for_those_to_be_asked_again():
    engine = Engine(2, 0.02, faults=lambda number: answer("later", 429, "Retry-After: 60\r\n") if number == 0 else None)

    async def drain(pump, groups, results):
        while len(results) < 4:
            await asyncio.sleep(0.005)
        pump.drain()
    results, took = pumped(1000, engine, meanwhile=drain)
    assert took < 5 and all(result.ok for result in results)


def test_what_was_to_be_asked_again_is_not_once_it_drains():
    """Its time comes while others are still under way."""
    engine = Engine(3, 0.5, faults=lambda number: answer("busy", 503) if number == 0 else None)

    async def drain(pump, groups, results):
        while len(engine.asked) < 5:
            await asyncio.sleep(0.005)
        await asyncio.sleep(0.1)
        pump.drain()
    results, took = pumped(1000, engine, meanwhile=drain)
    assert len(engine.asked) == 6 and sorted(result.prompt.key[1] for result in results) == [1, 2, 3, 4, 5]
    assert took < 3


SSE = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"
STREAM_HEAD = llmrun.parse_head(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream", True)
PIECES = b'data: {"id":"x","object":"chat.completion.chunk","choices":[{"index":0,"delta":{"role":"assistant","content":""}}]}\n\n' \
         b': ping\n\ndata: {"choices":[{"index":0,"delta":{"content":"Hel"}}]}\n\ndata: {"choices":[{"index":0,"delta":{"content":"lo"}}]}\n\n' \
         b'data: {"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\ndata: {"choices":[],"usage":{"completion_tokens":2}}\n\n'


def test_a_stream_is_put_together_like_an_answer_that_came_whole():
    status, body, read_body, error, _ = llmrun.reply_of(llmrun.Message(STREAM_HEAD, PIECES + b"data: [DONE]\n\n"))
    assert status == 200 and error is None and json.loads(body) == read_body
    assert llmrun.answer_of(read_body) == {"answer": "Hello", "reasoning": "", "finish_reason": "stop", "prompt_tokens": 0,
                                           "completion_tokens": 2}
    assert read_body["object"] == "chat.completion"


def streamed(*events):
    return llmrun.reply_of(llmrun.Message(STREAM_HEAD, b"".join(
        b"data: " + json.dumps(event, ensure_ascii=False).encode() + b"\n\n" for event in events) + b"data: [DONE]\n\n"))[2]


def test_several_streamed_choices_stay_apart():
    answer = streamed(*({"choices": [{"index": n % 2, "delta": {"content": f"{'AB'[n % 2]}{n // 2}"}}]} for n in range(4)))
    assert [choice["message"]["content"] for choice in answer["choices"]] == ["A0A1", "B0B1"]


def test_streamed_choices_without_an_index_or_a_message_are_one_choice():
    answer = streamed({"choices": [{"delta": None}]}, {"choices": [{"delta": {"role": "assistant", "content": None}}]},
                      {"choices": [{"delta": {"content": "Hel"}}]}, {"choices": [{"delta": {"content": "lo"}, "finish_reason": "stop"}]})
    assert answer["choices"] == [{"index": 0, "message": {"role": "assistant", "content": "Hello"}, "finish_reason": "stop"}]


def test_a_streamed_tool_call_is_whole():
    def call(**piece):
        return {"choices": [{"index": 0, "delta": {"tool_calls": [{"index": 0, **piece}]}}]}
    answer = streamed(call(id="c1", type="function", function={"name": "add", "arguments": ""}),
                      call(function={"arguments": '{"a": 1, '}), call(function={"arguments": '"b": 2}'}),
                      {"choices": [{"index": 0, "delta": {}, "finish_reason": "tool_calls"}]})
    assert answer["choices"][0] == {"index": 0, "finish_reason": "tool_calls", "message": {"tool_calls": [{
        "index": 0, "id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": 2}'}}]}}


def test_odd_ends_of_lines_in_a_stream_are_text():
    answer = streamed({"choices": [{"index": 0, "delta": {"content": "a\u2028b\x85c"}}]})
    assert answer["choices"][0]["message"]["content"] == "a\u2028b\x85c"


def test_streamed_logprobs_are_all_there():
    answer = streamed(*({"choices": [{"index": 0, "delta": {"content": t}, "logprobs": {"content": [{"token": t, "bytes": [1]}]}}]}
                        for t in "ab"))
    assert [one["token"] for one in answer["choices"][0]["logprobs"]["content"]] == ["a", "b"]


def test_a_stream_with_half_of_a_character_is_kept():
    half = b'data: {"choices":[{"index":0,"delta":{"content":"\\ud83d"}}]}\n\ndata: [DONE]\n\n'
    status, body, answer, _, _ = llmrun.reply_of(llmrun.Message(STREAM_HEAD, half))
    assert status == 200 and json.loads(body) == answer and answer["choices"][0]["message"]["content"] == "\ud83d"


@pytest.mark.parametrize("piece", [b"null", b"5", b'{"choices":[null]}', b'{"choices":5}', b'"x"'])
def test_a_stream_of_a_strange_shape_is_no_answer(piece):
    status, _, _, error, _ = llmrun.reply_of(llmrun.Message(STREAM_HEAD, b"data: " + piece + b"\n\ndata: [DONE]\n\n"))
    assert status == 0 and error["code"] == "stream"


@pytest.mark.parametrize("end, words", [(b"", "no end"), (b'data: {"error":{"message":"full"}}\n\n', "full")])
def test_a_stream_without_its_end_is_no_answer(end, words):
    status, _, _, error, _ = llmrun.reply_of(llmrun.Message(STREAM_HEAD, PIECES + end))
    assert status == 0 and words in error["message"]


# ── the journal on a disk that fails ───────────────────────────────────────────


class Disk:
    """Stands for os in the program: its writes and syncs fail while `broken` says so."""

    def __init__(self, broken):
        self.broken, self.calls = broken, {"write": 0, "fsync": 0}

    def __getattr__(self, name):
        return getattr(os, name)

    def write(self, file, data):
        self.calls["write"] += 1
        if self.broken(self.calls["write"], "write"):
            os.write(file, data[:len(data) // 2])  # half of it gets there
            raise OSError(errno.ENOSPC, "No space left on device")
        return os.write(file, data)

    def fsync(self, file):
        self.calls["fsync"] += 1
        if self.broken(self.calls["fsync"], "fsync"):
            raise OSError(errno.EIO, "Input/output error")
        return os.fsync(file)


def sixty(tmp_path):
    """A run of sixty prompts, and they."""
    config = llmrun.build_config(llmrun.Config, {"engine": {"name": "echo"}, "run_dir": str(tmp_path / "runs"), "prompts": {
        "user": str(tmp_path / "in.jsonl"), "template": "{x}"}}, "c", None)
    (tmp_path / "in.jsonl").write_text("".join(f'{{"x": "{n}"}}\n' for n in range(60)))
    run = llmrun.create_run(config, llmrun.freeze(config, "m"), lambda run: "")
    return run, llmrun.Input.load(run, config, "m")


def result_of(prompts, number):
    return llmrun.Result(prompts.prompt(number), 200, b"{}", {}, None, 0, 0, 1, 0)


@pytest.mark.parametrize("what, failing", [("write", range(2, 4)), ("fsync", range(2, 5)), ("write", range(1, 8))])
def test_a_disk_that_fails_for_a_while_costs_no_result(tmp_path, monkeypatch, what, failing):
    run, prompts = sixty(tmp_path)
    monkeypatch.setattr(llmrun.Journal, "SYNC_AFTER_S", 0.05)
    monkeypatch.setattr(llmrun.Journal, "AGAIN_AFTER_S", 0.05)
    monkeypatch.setattr(llmrun.Journal, "WRITE_AFTER_S", 0.01)
    told = []
    journal = llmrun.Journal(run, run.new_life(0, 0), lambda event, **facts: told.append(event))

    async def work():
        for number in range(60):
            journal.add(result_of(prompts, number))
            await asyncio.sleep(0.01)
        while journal.trouble:
            await asyncio.sleep(0.01)
    disk = Disk(lambda calls, name: name == what and calls in failing)
    with monkeypatch.context() as patch:
        patch.setattr(llmrun, "os", disk)
        asyncio.run(work())
        journal.close()
    assert told.count("journal_trouble") >= 1 and told.count("journal_trouble") == told.count("journal_well"), told
    marks = llmrun.Marks(run, prompts)
    assert marks.count(llmrun.Marks.DONE) == 60
    assert len(list(marks.lines((llmrun.Marks.DONE,)))) == 60


@pytest.mark.parametrize("what", ["write", "fsync"])
def test_a_journal_that_could_not_be_closed_is_closed_later(tmp_path, monkeypatch, what):
    """As when a node is lost while the disk is full: the driver waits for room, and then another life goes on."""
    run, prompts = sixty(tmp_path)
    journal = llmrun.Journal(run, run.new_life(0, 0))

    async def work():
        journal.add(*(result_of(prompts, number) for number in range(60)))
    asyncio.run(work())
    with monkeypatch.context() as patch:
        patch.setattr(llmrun, "os", Disk(lambda calls, name: name == what and calls <= 2))
        for _ in range(2):
            with pytest.raises(OSError):
                journal.close()
        journal.close()
    assert llmrun.Marks(run, prompts).count(llmrun.Marks.DONE) == 60


def test_no_prompt_is_sent_while_results_cannot_be_written():
    engine, held = Engine(2), [True]

    async def work():
        group = Group(0, engine, await engine.start())
        results = []
        pump = llmrun.Pump(taken_from(range(10)), read, results.extend, llmrun.math.inf, lambda: held[0])
        running = asyncio.ensure_future(pump.run([(group, asyncio.ensure_future(asyncio.sleep(0)))]))
        await asyncio.sleep(0.3)
        assert not engine.asked
        held[0] = False
        await running
        assert_each_once(results, 10)
        group.client.close()
        engine.server.close()
    asyncio.run(asyncio.wait_for(work(), 20))


def test_an_answer_of_several_lines_is_one_line_of_the_journal():
    body = b'{\n  "choices": [{"message": {"content": "a\\nb"}}]\n}\n'
    status, line, answer, error, _ = llmrun.reply_of(llmrun.Message(llmrun.parse_head(b"HTTP/1.1 200 OK", True), body))
    assert status == 200 and error is None and b"\n" not in line
    assert llmrun.answer_of(json.loads(line))["answer"] == llmrun.answer_of(answer)["answer"] == "a\nb"


def test_a_prompt_that_reached_nobody_has_used_no_attempt(monkeypatch):
    """An engine that starts again, or has no room for a connection, costs no prompt its tries."""
    monkeypatch.setattr(llmrun, "MAX_ATTEMPTS", 2)
    engine = Engine(2)

    async def work():
        client = await engine.start()
        engine.server.close()
        await engine.server.wait_closed()
        group, results = Group(0, engine, client), []
        pump = llmrun.Pump(taken_from(range(5)), read, results.extend, llmrun.math.inf)
        running = asyncio.ensure_future(pump.run([(group, asyncio.ensure_future(asyncio.sleep(0)))]))
        await asyncio.sleep(0.5)
        assert not results
        engine.server = await asyncio.start_server(engine.talk, "127.0.0.1", client.port)
        await running
        client.close()
        engine.server.close()
        return results
    results = asyncio.run(asyncio.wait_for(work(), 20))
    assert_each_once(results, 5)
    assert all(result.ok and result.attempts == 1 for result in results)


def test_a_line_that_a_full_disk_tore_is_written_again_elsewhere(tmp_path, monkeypatch):
    """What follows in the same file would be one line with the torn one."""
    run, prompts = sixty(tmp_path)
    for name in ("SYNC_AFTER_S", "AGAIN_AFTER_S", "WRITE_AFTER_S"):
        monkeypatch.setattr(llmrun.Journal, name, 0.01)
    journal = llmrun.Journal(run, run.new_life(0, 0))

    async def work():
        for number in range(3):
            journal.add(result_of(prompts, number))
            await asyncio.sleep(0.15)  # it is written and synced, or fails and is written again
    with monkeypatch.context() as patch:
        patch.setattr(llmrun, "os", Disk(lambda calls, name: name == "write" and calls == 2))
        asyncio.run(work())
        journal.close()
    assert llmrun.Marks(run, prompts).count(llmrun.Marks.DONE) == 3


def test_a_disk_that_is_full_for_long_is_not_filled_with_empty_segments(tmp_path, monkeypatch):
    """Each of them would be a file of the quota, and one more to open for whoever reads the results."""
    run, prompts = sixty(tmp_path)
    for name in ("SYNC_AFTER_S", "AGAIN_AFTER_S", "WRITE_AFTER_S"):
        monkeypatch.setattr(llmrun.Journal, name, 0.001)
    journal = llmrun.Journal(run, run.new_life(0, 0))

    class Full(Disk):
        def write(self, file, data):
            if self.broken(self.calls, "write"):
                self.calls["write"] += 1
                raise OSError(errno.ENOSPC, "No space left on device")
            return os.write(file, data)
    disk = Full(lambda calls, name: True)

    async def work():
        for number in range(60):
            journal.add(result_of(prompts, number))
        while disk.calls["write"] < 50:
            await asyncio.sleep(0.001)
        disk.broken = lambda calls, name: False
        while journal.trouble:
            await asyncio.sleep(0.001)
    with monkeypatch.context() as patch:
        patch.setattr(llmrun, "os", disk)
        asyncio.run(asyncio.wait_for(work(), 10))
        journal.close()
    assert llmrun.Marks(run, prompts).count(llmrun.Marks.DONE) == 60
    assert len(run.segments()) <= 2


def test_results_of_more_lives_than_files_may_be_open_are_written(tmp_path):
    """A run of months has a segment for each of its lives."""
    run, prompts = sixty(tmp_path)
    for number in range(60):
        journal = run.journal / f"{number + 1}.0.0.0.jsonl"
        journal.write_bytes(llmrun.journal_line(result_of(prompts, number)))
    marks, limits = llmrun.Marks(run, prompts), resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(map(int, os.listdir("/proc/self/fd")))
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 20, limits[1]))
    try:
        folder = llmrun.write_results(run, run.config(), marks)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    rows = [json.loads(line)["llmrun"]["row"] for line in (folder / "results.jsonl").read_text().splitlines()]
    assert rows == list(range(1, 61))


# ── failed prompts that are asked again ────────────────────────────────────────


def life_of(run, job, restart=0):
    """The driver of a life that has begun."""
    life = run.new_life(job, restart)
    tell = llmrun.Events(run, life).append
    tell("start", job=job, submitted=job, nodes=["n1"], pid=1, born=1, host="elsewhere")
    allocation = llmrun.Allocation(job, restart, ["n1"], {}, llmrun.clock() + 60, False, job)
    return llmrun.Driver(run, run.config(), 0, life, allocation, tell)


def lived(driver, failed_again, stop, outcomes):
    """A life that asks as many prompts as there are outcomes, which are ok or not: the numbers asked, and its ending."""
    asked = []

    async def work():
        work = llmrun.Prompts.begin(driver, failed_again=failed_again)
        work.pump = types.SimpleNamespace(first_sent=llmrun.clock())
        for ok in outcomes:
            asked.append(work.claims.next())
            result = result_of(work.claims.marks.prompts, asked[-1])
            work.keep([result if ok else result._replace(status=500)])
        work.report()
        return work
    begun = asyncio.run(work())
    ending = driver.finish(begun, stop)
    driver.tell("end", **ending._asdict(), **begun.counts())
    return asked, ending


CUT = llmrun.Stop(llmrun.WORK_LEFT, "the time limit came", go_on=True)


@pytest.fixture
def failed(tmp_path, monkeypatch):
    """A run of sixty prompts that all failed but one."""
    monkeypatch.setattr(llmrun.Slurm, "requeue", lambda slurm, job: "")
    run, _ = sixty(tmp_path)
    run.record_submit(7, shape=0)
    _, ending = lived(life_of(run, 7), False, llmrun.Stop(llmrun.DONE), [True] + [False] * 59)
    assert ending.code == llmrun.SOME_FAILED
    run.record_submit(8, shape=0)  # resume --failed
    return run


def test_failed_prompts_that_were_to_be_asked_again_are_left_when_the_time_ends_first(failed):
    asked, ending = lived(life_of(failed, 8), True, CUT, [True, True, False])
    assert asked == [1, 2, 3] and (ending.code, ending.next) == (llmrun.WORK_LEFT, llmrun.REQUEUED)
    state = llmrun.state_of(failed, {8: llmrun.Job("8", "PENDING", "BeginTime", "N/A", "N/A", "5:00", "")})
    assert state["exit_code"] is None and state["state"] == "pending"
    asked, ending = lived(life_of(failed, 8, restart=1), True, llmrun.Stop(llmrun.DONE), [True] * 56)
    assert asked == list(range(4, 60)), "and what was asked again is not asked a third time"
    assert ending.code == llmrun.SOME_FAILED
    assert len((failed.results / "results.jsonl").read_text().splitlines()) == 59
    assert llmrun.state_of(failed, {})["exit_code"] == llmrun.SOME_FAILED


def test_failed_prompts_that_were_to_be_asked_again_are_asked_by_whoever_goes_on(failed):
    """Its user stops it, and goes on later by a plain `resume`."""
    failed.stop_file.touch()
    _, ending = lived(life_of(failed, 8), True, CUT, [True, False])
    state = llmrun.state_of(failed, {})
    assert (ending.code, ending.next) == (llmrun.WORK_LEFT, llmrun.NOBODY) and state["exit_code"] == llmrun.WORK_LEFT
    failed.stop_file.unlink()
    failed.record_submit(9, shape=0)
    asked, ending = lived(life_of(failed, 9), False, llmrun.Stop(llmrun.DONE), [True] * 57)
    assert asked == list(range(3, 60)) and ending.code == llmrun.SOME_FAILED
