"""An engine's command lines, and one replica's life, without any process."""

import asyncio
import types

import llmrun
import pytest


def config_of(**engine):
    tables = {"model": {"path": "/m/tiny.gguf"}, "slurm": {"nodes": 3}, "engine": {"path": "/x/llama-server", **engine}}
    return llmrun.build_config(llmrun.Config, tables, "config.toml", None)


def test_each_listens_on_one_address_and_the_server_is_told_its_workers():
    *workers, server = llmrun.preview(llmrun.LlamaCpp(config_of(slots=4, context=2048), llmrun.Run("RUN"), "LIFE", 3))
    assert [line.split(": ")[0] for line in (*workers, server)] == ["NODE2", "NODE3", "NODE1"], "the head starts last"
    assert [" -H ADDRESS2 -p PORT" in workers[0], " -H ADDRESS3 -p PORT" in workers[1]] == [True, True]
    for words in ("--host ADDRESS1 --port PORT", "-c 8192 -np 4", "--rpc ADDRESS2:PORT,ADDRESS3:PORT", "--alias tiny.gguf",
                  "--api-key-file RUN/key"):
        assert words in server, server


@pytest.mark.parametrize("engine, in_flight", [({"slots": 4}, 6), ({"slots": 16}, 20), ({"slots": 4, "concurrency": 3}, 3)])
def test_a_few_prompts_wait_at_the_engine_so_that_no_slot_is_empty(engine, in_flight):
    assert llmrun.LlamaCpp(config_of(**engine), llmrun.Run("RUN"), "LIFE", 1).in_flight == in_flight


@pytest.fixture
def replica(monkeypatch):
    """A replica whose clock stands where the test sets it; `starts` is what its next starts come to."""
    engine = llmrun.LlamaCpp(config_of(), llmrun.Run("RUN"), "LIFE", 3)

    async def start_once():
        replica.started += 1
        outcome = next(replica.starts, None)
        if outcome:
            raise outcome
    told = []
    replica = llmrun.Replica(0, engine, [None] * 3, lambda event, **facts: told.append(event))
    replica.start_once, replica.started, replica.starts, replica.told = start_once, 0, iter(()), told
    replica.now = 10000.0
    monkeypatch.setattr(llmrun, "clock", lambda: replica.now)
    rest = asyncio.sleep
    monkeypatch.setattr(llmrun.asyncio, "sleep", lambda time_s: rest(0))
    return replica


def failed(what="it crashed"):
    return llmrun.ProgramFailed("", f"llama-server on n1: {what}", "")


def test_an_engine_that_dies_again_and_again_is_given_up(replica):
    replica.starts = iter([failed(f"death {number}") for number in range(2, 100)])
    with pytest.raises(llmrun.ProgramFailed, match="death 4"):
        asyncio.run(replica.recover(failed("death 1")))
    assert replica.started == replica.RESTARTS == 3 and replica.told == ["engine_died"] * 4


def test_deaths_of_long_ago_are_forgotten(replica):
    replica.deaths = [replica.now - replica.WITHIN_S - 1] * 3
    asyncio.run(replica.recover(failed(), worked=True))
    assert replica.started == 1


def test_an_engine_that_answered_nothing_between_its_deaths_has_made_good_for_none(replica):
    """However long it took to load, or was waited for."""
    replica.deaths = [replica.now - replica.WITHIN_S - 1] * 3
    with pytest.raises(llmrun.ProgramFailed):
        asyncio.run(replica.recover(failed()))


def test_a_port_that_another_was_quicker_to_take_is_replaced(replica):
    replica.starts = iter([failed("its port is in use by another program")] * 2)
    asyncio.run(replica.start())
    assert replica.started == 3
    replica.starts = iter([failed("its port is in use by another program")] * 3)
    with pytest.raises(llmrun.ProgramFailed, match="port is in use"):
        asyncio.run(replica.start())
    replica.starts, replica.started = iter([failed()] * 2), 0
    with pytest.raises(llmrun.ProgramFailed, match="crashed"):
        asyncio.run(replica.start())
    assert replica.started == 1, "what would fail again is not tried again"


def test_a_port_that_the_user_chose_is_not_tried_again(replica):
    replica.program = llmrun.LlamaCpp(config_of(port=8080), llmrun.Run("RUN"), "LIFE", 3)
    replica.starts = iter([failed("its port is in use by another program")] * 2)
    with pytest.raises(llmrun.ProgramFailed, match="port is in use"):
        asyncio.run(replica.start())
    assert replica.started == 1


@pytest.mark.parametrize("status, ready", [(200, True), (503, False), (404, False), (None, False)])
def test_only_an_engine_that_says_so_is_ready(replica, status, ready):
    class Client:
        async def request(self, method, path, timeout_s):
            assert path == "/health"
            if not status:
                raise llmrun.WireError("the connection broke")
            return types.SimpleNamespace(status=status)
    way = llmrun.Way("127.0.0.1", 1)
    replica.strangers[way] = Client()
    (part,), = llmrun.Echo(config_of(), llmrun.Run("RUN"), "LIFE", 1).steps([llmrun.Placed(0, None, {}, {"http": way}, ())])
    assert asyncio.run(part.ready(replica, part)) is ready


def test_the_server_is_stopped_before_its_workers(replica):
    async def work():
        stopped = []

        class Node:
            async def ask(self, order, name):
                stopped.append(name)
                next(one.ended for one in running if one.process.name == name).set_result(None)
        running = [llmrun.Running(name, Node(), types.SimpleNamespace(name=name, grace_s=2.0), asyncio.get_running_loop().create_future())
                   for name in ("rpc2", "rpc3", "server")]
        replica.running = list(running)
        await asyncio.wait_for(replica.stop(), 2)
        return stopped
    assert asyncio.run(work()) == ["server", "rpc3", "rpc2"]


def test_the_echo_engine_answers_only_who_has_the_key(tmp_path):
    (tmp_path / "key").write_text("secret\n")

    async def work():
        with llmrun.free_port("") as probe:
            port = probe.getsockname()[1]
        server = asyncio.ensure_future(llmrun.echo_server("127.0.0.1", port, tmp_path / "key"))
        statuses = []
        for key in ("secret", "other", ""):
            client = llmrun.Client("127.0.0.1", port, key)

            async def healthy(client=client):
                try:
                    return (await client.request("GET", "/health")).status == 200
                except llmrun.Unreachable:
                    return False
            await llmrun.wait_until("the echo engine", healthy, 5)
            body = b'{"messages": [{"role": "user", "content": "hi there"}]}'
            answer = await client.request("POST", llmrun.CHAT, body)
            statuses.append((answer.status, b"hi there" in answer.body))
            client.close()
        server.cancel()
        return statuses
    assert asyncio.run(asyncio.wait_for(work(), 20)) == [(200, True), (401, False), (401, False)]


@pytest.mark.parametrize("obeyed", [False, True])
def test_the_users_own_llama_settings_reach_no_process_unasked(obeyed):
    config = config_of(llama={"user_settings": obeyed})
    engine = llmrun.LlamaCpp(config, llmrun.Run("RUN"), "LIFE", 3)
    group = [llmrun.Placed(rank, llmrun.ForeseenNode(f"n{rank}"), engine.foreseen(), dict.fromkeys(engine.ports(rank), llmrun.Way("a", 1)), ())
             for rank in range(3)]
    for process in [part.process for step in engine.steps(group) for part in step]:
        seen = [name for name in ("LLAMA_ARG_CTX_SIZE", "LLAMA_API_KEY", "HOME") if not name.startswith(tuple(process.without))]
        assert seen == (["LLAMA_ARG_CTX_SIZE", "LLAMA_API_KEY", "HOME"] if obeyed else ["HOME"])
        assert ("XDG_CONFIG_HOME" in process.env) == (process.name == "llama-server" and not obeyed)


def test_an_engine_that_ends_while_it_loads_ends_the_wait(replica):
    async def work():
        ended = asyncio.get_running_loop().create_future()
        replica.running = [llmrun.Running("llama-server", types.SimpleNamespace(name="n1"), None, ended)]
        waiting = asyncio.ensure_future(replica.unless_failed(asyncio.get_running_loop().create_future()))
        await asyncio.wait([waiting], timeout=0.05)
        ended.set_result(llmrun.Exit("llama-server", "n1", -11, []))
        await asyncio.wait_for(waiting, 2)
    with pytest.raises(llmrun.ProgramFailed, match="llama-server on n1: it crashed .*SIGSEGV"):
        asyncio.run(work())
