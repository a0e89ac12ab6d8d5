"""An agent by itself, spoken to over its pipes as the driver does."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
import types

import llmrun
import pytest
import test_suspects
from conftest import wait_for

BOOT = "import sys; sys.path.insert(0, sys.argv[1]); import llmrun; {settings}; llmrun.main(['agent', 'n1'])"


class Spoken:
    """An agent's process and what it said."""

    def __init__(self, folder, settings="pass"):
        self.folder, self.said = folder, []
        self.process = subprocess.Popen(
            [sys.executable, "-c", BOOT.format(settings=settings), os.path.dirname(llmrun.__file__)], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, text=True, bufsize=1)
        os.set_blocking(self.process.stdout.fileno(), False)
        self.rest = ""
        self.heard("hello")

    def listen(self):
        try:
            self.rest += os.read(self.process.stdout.fileno(), 65536).decode()
        except BlockingIOError:
            return
        *whole, self.rest = self.rest.split("\n")
        self.said += [json.loads(line) for line in whole]

    def heard(self, name, value=None):
        def found():
            self.listen()
            return next((m for m in self.said if name in m and value in (None, m[name])), None)
        return wait_for(f"{name} {value}", found, 15)

    def order(self, number, do, **details):
        self.process.stdin.write(json.dumps({"id": number, "do": do, **details}) + "\n")
        return self.heard("re", number)

    def start(self, number, *argv, **details):
        process = llmrun.Process("p", list(argv), str(self.folder / "p.log"), **details)
        return self.order(number, "start", process=llmrun.dataclasses.asdict(process))


@pytest.fixture
def agent(tmp_path):
    spoken = Spoken(tmp_path)
    yield spoken
    spoken.process.kill()
    spoken.process.wait()
    spoken.process.stdout.close()


def lives(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def family(agent):
    """The pids of a process that ignores TERM, of its child and of that one's child."""
    path = agent.folder / "pids"
    path.touch()
    agent.start(1, "sh", "-c", f"trap '' TERM; echo $$ >> {path}; sh -c 'echo $$ >> {path}; sleep 100 & "
                f"echo $! >> {path}; wait; sleep 100' & wait; sleep 100")
    wait_for("three generations", lambda: path.read_text().count("\n") == 3)
    return [int(pid) for pid in path.read_text().split()]


def test_an_end_is_reported_with_code_and_last_lines(agent):
    agent.start(1, "sh", "-c", "echo one; echo two >&2; exit 5")
    ended = agent.heard("exit", "p")
    assert ended["code"] == 5 and ended["tail"] == ["one", "two"]


def test_a_death_by_signal_is_told_as_one(agent):
    agent.start(1, "sh", "-c", "kill -SEGV $$")
    assert agent.heard("exit", "p")["code"] == -signal.SIGSEGV


def test_a_program_that_cannot_start_is_an_answer(agent):
    assert agent.start(1, "/nowhere/program")["errno"] == 2
    assert agent.start(2, str(agent.folder))["errno"] == 13
    assert "error" in agent.order(3, "no_such_order")


def test_the_end_of_the_driver_ends_everything_even_what_ignores_term(agent):
    started = family(agent)
    agent.process.stdin.close()
    agent.process.wait(5)
    wait_for("all three generations to be gone", lambda: not any(map(lives, started)), 5)


def test_a_killed_agent_takes_its_process_along(agent):
    pid = agent.start(1, "sleep", "100")["ok"]["pid"]
    agent.process.kill()
    wait_for("the process to be gone", lambda: not lives(pid), 5)


def test_stop_is_term_and_then_kill(agent):
    agent.start(1, "sh", "-c", "trap 'echo told to end' TERM; echo up; while :; do sleep 0.05; done", grace_s=0.4, progress="up")
    agent.heard("line", "up")
    agent.order(2, "stop", name="p")
    ended = agent.heard("exit", "p")
    assert ended["code"] == -signal.SIGKILL and ended["tail"].count("told to end") == 2, ended
    assert agent.order(3, "stop", name="p")["ok"] is None, "stopping what has ended is no error"


def test_what_a_process_leaves_behind_is_killed(agent):
    pid_file = agent.folder / "pid"
    agent.start(1, "sh", "-c", f"sleep 100 & echo $! > {pid_file}")
    agent.heard("exit", "p")
    pid = int(pid_file.read_text())
    wait_for("the left process to be gone", lambda: not lives(pid), 5)


def test_term_is_told_and_waits_for_the_driver_only_so_long(agent):
    pid = agent.start(1, "sleep", "100")["ok"]["pid"]
    began = time.monotonic()
    agent.process.terminate()
    agent.heard("term")
    assert lives(pid), "the driver decides first"
    agent.process.wait(10)
    assert 2 < time.monotonic() - began < 6
    wait_for("the process to be gone", lambda: not lives(pid), 5)


def test_a_driver_that_needs_longer_after_term_gets_it(agent):
    agent.start(1, "sleep", "100")
    agent.process.terminate()
    agent.heard("term")
    agent.order(2, "hold", seconds=30)
    time.sleep(llmrun.TERM_WAIT_S + 1)  # longer than it would have waited
    assert agent.process.poll() is None
    agent.order(3, "end")
    agent.process.wait(5)


def test_an_agent_that_hears_nothing_ends(tmp_path):
    spoken = Spoken(tmp_path, "llmrun.LOST_DRIVER_S = 1; llmrun.BEAT_S = 0.2")
    pid = spoken.start(1, "sleep", "100")["ok"]["pid"]
    spoken.process.wait(10)
    wait_for("the process to be gone", lambda: not lives(pid), 5)
    spoken.process.communicate()


def test_an_agent_whose_driver_fell_silent_asks_for_a_requeue_but_not_one_whose_driver_ended(tmp_path, monkeypatch):
    """A node that was switched off sends no end of its pipe, and Slurm may take minutes to see that it is gone."""
    (tmp_path / "scontrol").write_text(f"#!/bin/sh\necho \"$@\" >> {tmp_path}/asked\n")
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    beat = tmp_path / "claims" / "beat.17.0.0"
    beat.parent.mkdir()
    beat.write_text("3 host 1 1")
    monkeypatch.setenv("LLMRUN_REQUEUE", str(beat))
    ended = Spoken(tmp_path)
    ended.process.communicate(timeout=10)  # the end of its pipe
    assert not (tmp_path / "asked").exists()
    silent = Spoken(tmp_path, "llmrun.LOST_DRIVER_S = 0.5; llmrun.BEAT_S = 0.1; llmrun.STILL_DRIVER_S = 0.2")
    silent.process.wait(10)
    assert (tmp_path / "asked").read_text() == "requeue 17\n"
    silent.process.communicate()


@pytest.mark.parametrize("stalled", [True, False])
def test_a_silence_means_nothing_while_we_stood_still_ourselves(monkeypatch, stalled, tmp_path):
    """A job that was suspended, or whose disk hung for a minute, finds all its nodes silent for so long."""
    monkeypatch.setattr(llmrun, "BEAT_S", 0.05)
    monkeypatch.setattr(llmrun, "SILENT_NODE_S", 0.3)
    monkeypatch.setattr(llmrun, "STALL_S", 0.2)

    async def work():
        told = []
        node = llmrun.Node("n1", [], {}, tmp_path / "log", lambda event, **facts: told.append(event), 0.3)
        node.facts.set_result({})
        node.write = lambda message: None
        beating = asyncio.ensure_future(node.beat())
        await asyncio.sleep(0)
        if stalled:
            time.sleep(0.5)
            await asyncio.sleep(0.1)
        else:
            await asyncio.sleep(0.6)
        beating.cancel()
        return told
    assert asyncio.run(work()) == ([] if stalled else ["node_lost"])


def test_an_address_is_proved_by_the_nonce_behind_it(agent):
    probe = agent.order(1, "probe", ports="", nonce="abc", interface="")["ok"]
    right = dict(addresses=["127.0.0.2", "127.0.0.1"], port=probe["port"], timeout_s=3)
    assert agent.order(2, "reach", nonce="abc", **right)["ok"] in right["addresses"]
    assert agent.order(3, "reach", nonce="xyz", **right)["ok"] == "", "somebody else may answer on that port"
    agent.order(4, "release", nonce="abc")
    assert agent.order(5, "reach", nonce="abc", **right)["ok"] == ""
    again = agent.order(6, "probe", ports=str(probe["port"]), nonce="d", interface="")
    assert again["ok"]["port"] == probe["port"], "the port is free for what starts there"
    taken = agent.order(7, "probe", ports=str(probe["port"]), nonce="e", interface="")
    assert f"port {probe['port']} is in use" in taken["error"]


def test_ports_come_from_the_range_that_is_given(agent):
    first = agent.order(1, "probe", ports="31000-31020", nonce="a", interface="")["ok"]["port"]
    second = agent.order(2, "probe", ports="31000-31020", nonce="b", interface="")["ok"]["port"]
    assert 31000 <= min(first, second) < max(first, second) <= 31020


def test_lines_that_matter_are_told_as_they_come(agent):
    agent.start(1, "sh", "-c", "echo nothing; echo loading 10%; sleep 0.3; echo loading 90%; sleep 100", progress="loading")
    assert agent.heard("line", "loading 10%") and agent.heard("line", "loading 90%")
    assert not [m for m in agent.said if m.get("line") == "nothing"]


def test_what_is_stopped_may_end_by_itself(agent):
    agent.start(1, "sh", "-c", "trap 'echo ended well; exit 7' TERM; echo up; while :; do sleep 0.02; done", progress="up", grace_s=5)
    agent.heard("line", "up")
    agent.order(2, "stop", name="p")
    ended = agent.heard("exit", "p")
    assert ended["code"] == 7 and ended["tail"][-1] == "ended well"


def test_a_lost_node_leaves_nobody_waiting(tmp_path):
    async def work():
        told = []
        node = llmrun.Node("n1", [], {}, tmp_path / "log", lambda event, **facts: told.append((event, facts["node"])), 5)
        node.facts.set_result({})
        node.write = lambda message: None
        asked = asyncio.ensure_future(node.ask("find", names=["x"]))
        node.exits["server"] = ended = asyncio.get_running_loop().create_future()
        await asyncio.sleep(0)
        node.lose("its agent ended")
        node.lose("and once more")
        with pytest.raises(llmrun.NodeLost, match="its agent ended"):
            await asyncio.wait_for(asked, 1)
        assert (await asyncio.wait_for(ended, 1)).how == "was lost with its node"
        with pytest.raises(llmrun.NodeLost):
            await node.ask("find", names=["y"])
        return told
    assert asyncio.run(work()) == [("node_lost", "n1")]


def test_a_step_asks_for_the_gpus_of_its_node_and_takes_the_jobs_variables_along():
    command = llmrun.agent_command("/usr/bin/python3", "/r", "n1", "7", gpus="2")
    assert command[0] == "srun" and "--gres=gpu:2" in command and "--export=ALL" in command and "--overlap" not in command
    assert not [word for word in llmrun.agent_command("/usr/bin/python3", "/r", "n1", "7") if "gres" in word]
    assert "--overlap" in llmrun.agent_command("/usr/bin/python3", "/r", "n1", "7", overlap=True)
    assert llmrun.agent_command("/usr/bin/python3", "/r", "n1")[0] == "/usr/bin/python3"


def test_a_process_sees_what_it_is_given_and_the_nodes_words_but_not_what_it_must_not(tmp_path, monkeypatch):
    for name, value in (("LLAMA_ARG_CTX_SIZE", "1"), ("LLAMA_API_KEY", "2"), ("SCRATCH_HERE", "/scratch")):
        monkeypatch.setenv(name, value)
    spoken = Spoken(tmp_path)
    spoken.start(1, "sh", "-c", "env | grep -E '^(LLAMA|CACHE|PLAIN)'", without=["LLAMA_ARG_", "LLAMA_API_KEY"],
                 env={"PLAIN": "$SCRATCH_HERE"}, node_env={"CACHE": "$SCRATCH_HERE/rpc"})
    assert sorted(spoken.heard("exit", "p")["tail"]) == ["CACHE=/scratch/rpc", "PLAIN=$SCRATCH_HERE"]
    spoken.process.communicate()


def test_what_a_site_says_among_an_agents_words_is_logged_and_ends_no_hearing(tmp_path, capfd):
    async def work():
        node = llmrun.Node("n1", [], {}, tmp_path / "log", lambda event, **facts: None, 5)
        lines = asyncio.StreamReader()
        node.channel = types.SimpleNamespace(stdout=lines, stdin=types.SimpleNamespace(write=len, close=list))
        lines.feed_data(b'Welcome!\n[1]\n3\n\xff\n{"exit": "nobody"}\n{"hello": {"node": "n1"}}\n')
        hearing = asyncio.ensure_future(node.listen())
        facts = await asyncio.wait_for(asyncio.shield(node.facts), 2)
        assert not hearing.done() and not node.lost.done()
        lines.feed_eof()
        await asyncio.wait_for(hearing, 2)
        return facts, node.lost.result()
    assert asyncio.run(work()) == ({"node": "n1"}, "its agent ended")
    assert "n1: Welcome!" in capfd.readouterr().err


@pytest.mark.parametrize("life", ["beats on", "has ended", "was told to stop", "cannot be seen", "may not come back"])
def test_an_agent_of_a_healthy_job_asks_for_no_requeue(tmp_path, monkeypatch, life):
    """The driver gave this node up, or the network did; the other nodes are at work."""
    (tmp_path / "scontrol").write_text(f"#!/bin/sh\necho \"$@\" >> {tmp_path}/asked\n")
    (tmp_path / "scontrol").chmod(0o755)
    (tmp_path / "claims").mkdir()
    beat = tmp_path / "claims" / "beat.17.0.0"
    if life != "cannot be seen":
        beat.write_text("ended" if life == "has ended" else "3 host 1 1")
    (tmp_path / "stop").touch() if life == "was told to stop" else None
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    if life != "may not come back":
        monkeypatch.setenv("LLMRUN_REQUEUE", str(beat))
    agent = Spoken(tmp_path, "llmrun.LOST_DRIVER_S = 0.3; llmrun.BEAT_S = 0.1; llmrun.STILL_DRIVER_S = 1.5")
    if life == "beats on":
        for count in range(4, 30):
            time.sleep(0.1)
            beat.write_text(f"{count} host 1 1")
    agent.process.wait(10)
    assert not (tmp_path / "asked").exists()
    agent.process.communicate()


def test_a_node_that_is_given_up_is_told_to_end(tmp_path):
    """It may join after its time, or have been cut off for a while; nothing of it must be left running."""
    async def work():
        told = []
        command = ["sh", "-c", "sleep 0.6; cat > %s/heard" % tmp_path]
        node = llmrun.Node("n1", command, dict(os.environ), tmp_path / "log", lambda event, **facts: told.append(event), 0.2)
        await node.open()
        await asyncio.wait([node.facts], timeout=5)
        assert told == ["node_lost"]
        await asyncio.wait_for(node.channel.wait(), 5)  # the end of its pipe has reached it, too
        return node
    monkey = pytest.MonkeyPatch()
    monkey.setattr(llmrun, "BEAT_S", 0.05)
    try:
        asyncio.run(work())
    finally:
        monkey.undo()
    orders = [json.loads(line)["do"] for line in (tmp_path / "heard").read_text().splitlines()]
    assert orders[-1] == "end"


def test_an_orphaned_agent_of_a_cancelled_run_asks_for_no_requeue(here, monkeypatch):
    """Started as the driver starts it; its driver falls silent after the user's `cancel`."""
    run = llmrun.make_run(llmrun.prepare(here.config(engine={"name": "echo"}), []))
    run.record_submit(17, shape=0)
    run.stop_file.touch()
    text = run.script.read_text()
    for name, value in (("LOST_DRIVER_S", "0.5"), ("BEAT_S", "0.1")):
        text, found = re.subn(rf"(?m)^{name} = [0-9.]+", f"{name} = {value}", text)
        assert found == 1
    run.script.write_text(text)
    (here.folder / "scontrol").write_text(f"#!/bin/sh\necho \"$@\" >> {here.folder}/asked\n")
    (here.folder / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{here.folder}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    allocation = llmrun.Allocation(17, 0, ["n1"], {}, llmrun.math.inf, False, 17)
    driver = llmrun.Driver(run, run.config(), 0, run.new_life(17, 0), allocation, None)
    command = driver.agent_command("n1")
    agent = subprocess.Popen(command[command.index(sys.executable):], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
                             env=driver.agent_environment())
    agent.wait(10)
    agent.stdin.close()
    assert not (here.folder / "asked").exists()


def test_what_an_earlier_start_left_in_a_log_is_not_told_of_a_later_one(agent):
    """An engine that is started again writes on in the log of the one that died."""
    agent.start(1, "sh", "-c", "echo cudaMalloc failed: out of memory; sleep 0.1; exit 1", progress="memory|KV")
    assert agent.heard("exit", "p")["tail"] == ["cudaMalloc failed: out of memory"] and agent.heard("line")
    agent.said.clear()
    agent.start(2, "sh", "-c", "echo KV buffer; sleep 0.4; kill -SEGV $$", progress="memory|KV")
    ended = agent.heard("exit", "p")
    assert ended["code"] == -signal.SIGSEGV and ended["tail"] == ["KV buffer"], "the cause is this start's own"
    assert [m["line"] for m in agent.said if "line" in m] == ["KV buffer"]
    agent.said.clear()
    agent.start(3, "sh", "-c", "exit 1")
    assert agent.heard("exit", "p")["tail"] == [], "who says nothing is not given another's words"
    assert len((agent.folder / "p.log").read_text().splitlines()) == 2, "the log itself keeps all"


# ── processes that survive KILL ────────────────────────────────────────────────


async def ends_within(time_s, work):
    """The outcome of some work, which ends in that time."""
    work = asyncio.ensure_future(work)
    await asyncio.wait([work], timeout=time_s)
    ended = work.done()
    work.cancel()
    await asyncio.gather(work, return_exceptions=True)
    assert ended, f"no end within {time_s} s"
    return work.result()


@pytest.fixture
def undying(monkeypatch):
    """undying(work) does some work in a time that costs none, on a machine where no process ends: each hangs in a
    driver of its GPU. Gives what came of it."""
    loop = test_suspects.Loop()
    monkeypatch.setattr(llmrun, "clock", loop.time)
    sent = []
    monkeypatch.setattr(llmrun, "kill_group", lambda pid, number: sent.append(number))

    def run(work):
        asyncio.set_event_loop(loop)
        try:
            return loop.run_until_complete(work())
        finally:
            asyncio.set_event_loop(None)
    run.sent = sent
    yield run
    loop.close()


@pytest.mark.parametrize("order", ["stop", "run"])
def test_an_agent_does_not_wait_for_ever_for_a_process_that_survives_kill(undying, order):
    told = []

    async def work():
        agent = llmrun.Agent("n1")
        agent.send = lambda **message: told.append(message)
        started, done = types.SimpleNamespace(pid=4711), asyncio.get_running_loop().create_future()
        agent.launch = lambda argv, env, output: (started, done)
        agent.processes["llama-server"] = (started, done, llmrun.Process("llama-server", ["llama-server"], "log", grace_s=2.0), 0)
        details = {"stop": {"name": "llama-server"}, "run": {"argv": ["llama-server", "--version"], "timeout_s": 20}}[order]
        await ends_within(300, agent.obey({"id": 1, "do": order, **details}))
    undying(work)
    answer, = [message for message in told if message.get("re") == 1]
    assert signal.SIGKILL in undying.sent and "llama-server" in answer["error"] and "KILL" in answer["error"]


@pytest.mark.parametrize("answers", [True, False], ids=["its agent says so", "its agent hangs, too"])
def test_a_node_on_which_a_process_survives_kill_counts_as_lost(undying, tmp_path, answers):
    told = []

    async def work():
        node = llmrun.Node("n1", [], {}, tmp_path / "log", lambda event, **facts: told.append((event, facts)), 5)
        node.facts.set_result({})
        why = "llama-server (process 4711) survives KILL"
        node.write = lambda order: answers and order["do"] == "stop" and asyncio.get_running_loop().call_later(
            30, node.take, {"re": order["id"], "errno": 0, "error": why})
        replica = llmrun.Replica(0, types.SimpleNamespace(), [node], lambda event, **facts: told.append((event, facts)))
        ended = node.exits["llama-server"] = asyncio.get_running_loop().create_future()
        replica.running = [llmrun.Running("llama-server", node, types.SimpleNamespace(name="llama-server", grace_s=2.0), ended)]
        assert await ends_within(300, replica.stop()) is None
        with pytest.raises(llmrun.NodeLost, match="llama-server"):
            await ends_within(10, node.ask("find", names=["sh"]))
    undying(work)
    (event, facts), = told
    assert event == "node_lost" and facts["node"] == "n1" and "llama-server" in facts["why"]
