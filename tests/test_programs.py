"""Programs that are not llama.cpp, on agents of their own: what a program of any shape says of itself is all that it needs.

Two of them are thrown away here: one that spans nodes, of whose ranks but the first none has a port or a health, and one
with two ports and a process beside it."""

import asyncio
import contextlib
import os
import random
import shutil
import signal
import socket
import sys

import llmrun
import pytest
from conftest import wait_for

LIFE = llmrun.Life(0, 0, 0)

HEAD = """\
import http.server, socketserver, sys, threading
host, port, meet_host, meet_port, others = sys.argv[1:]
joined = []

class Meet(socketserver.BaseRequestHandler):
    def handle(self):
        joined.append(1)
        self.request.recv(1)

class Ping(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        assert "Authorization" not in self.headers
        self.send_response(204 if self.path == "/ping" and len(joined) == int(others) else 503)
        self.end_headers()

meeting = socketserver.ThreadingTCPServer((meet_host, int(meet_port)), Meet)
threading.Thread(target=meeting.serve_forever, daemon=True).start()
http.server.ThreadingHTTPServer((host, int(port)), Ping).serve_forever()
"""

JOIN = """\
import socket, sys, time
while True:
    try:
        socket.create_connection((sys.argv[1], int(sys.argv[2]))).recv(1)
        sys.exit("the head is gone")
    except ConnectionRefusedError:
        time.sleep(0.02)
"""


class Ranked(llmrun.Program):
    """One program over all nodes: the head serves once all others have joined it."""

    kind = "ranked"

    def ports(self, rank):
        return {} if rank else {"http": llmrun.Port(llmrun.DRIVER, "the server"), "meet": llmrun.Port(llmrun.GROUP, "the meeting")}

    def steps(self, group):
        head, *others = group
        meet = [str(part) for part in head.ways["meet"]]
        serve = llmrun.Process("serve", [sys.executable, "-c", HEAD, *map(str, head.ways["http"]), *meet, str(len(others))])
        return [[llmrun.Part(head, serve, ("http", "meet"), llmrun.Answers("http", "/ping", 204), 10.0),
                 *(llmrun.Part(placed, llmrun.Process("rank", [sys.executable, "-c", JOIN, *meet])) for placed in others)]]


LISTEN = """\
import socket, sys
opened = [socket.create_server((sys.argv[at], int(sys.argv[at + 1]))) for at in range(1, len(sys.argv), 2)]
print("open for", "all", flush=True)
while True:
    opened[0].accept()
"""


class Beside(llmrun.Program):
    """A server with two ports, and a process beside it that looks at it and is ready when it has said so."""

    kind = "beside"
    failures = ((r"the glass is (\w+)", "it broke", "use another glass"),)
    look = "import time; print('I see it', flush=True); time.sleep(1000)"

    def ports(self, rank):
        return {"data": llmrun.Port(llmrun.DRIVER, "the data"), "admin": llmrun.Port(llmrun.HEAD, "the admin's port")}

    def steps(self, group):
        placed, = group
        argv = [sys.executable, "-c", LISTEN, *map(str, [*placed.ways["data"], *placed.ways["admin"]])]
        return [[llmrun.Part(placed, llmrun.Process("server", argv), ("data", "admin"))],
                [llmrun.Part(placed, llmrun.Process("look", [sys.executable, "-c", self.look]), (), llmrun.Says("^I see"), 5.0)]]


class Site:
    """Some nodes, which are agents on this machine, and what was told of them."""

    def __init__(self, tmp_path):
        self.run, self.told = llmrun.Run(tmp_path / "run"), []
        self.run.logs_of(LIFE).mkdir(parents=True)
        shutil.copy(llmrun.__file__, self.run.script)

    def tell(self, event, **facts):
        self.told.append((event, facts))

    def doing(self, story, program, count=1, **network):
        """Let `story(group)` happen to a group of so many nodes, and stop it; nothing of it may be left."""
        config = llmrun.build_config(llmrun.Config, {"network": network}, "config.toml", None)

        async def live():
            names = [f"n{number + 1}" for number in range(count)]
            async with llmrun.agents(names, lambda name: llmrun.agent_command(sys.executable, self.run.folder, name), os.environ,
                                     lambda name: self.run.logs_of(LIFE) / f"{name}-agent.log", self.tell) as nodes:
                group = llmrun.Group(0, program(config, self.run, LIFE, count), nodes, self.tell)
                try:
                    await llmrun.within(40, story(group))
                finally:
                    pids = self.pids(group)
                    await group.stop()
                    wait_for("all of it to be gone", lambda: not any(map(llmrun.process_birth, pids)))
        asyncio.run(live())

    @staticmethod
    def pids(group):
        """Of the processes that run now, by the log that each has open."""
        logs = {os.path.realpath(one.process.log) for one in group.running}
        found = []
        for pid in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError):
                if os.path.realpath(f"/proc/{pid}/fd/1") in logs:
                    found.append(int(pid))
        return found


@pytest.fixture
def nodes(tmp_path):
    return Site(tmp_path)


def test_a_program_whose_other_ranks_have_no_port_and_no_health(nodes):
    async def story(group):
        await group.start()
        assert sorted(one.title for one in group.running) == ["rank on n2", "rank on n3", "serve on n1"]
        names = {one.process.name for one in group.running}
        assert len(names) == 3 and "serve" in names, "in events and logs each has a name of its own"
        assert len(Site.pids(group)) == 3
    nodes.doing(story, Ranked, 3)


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_whichever_rank_ends_all_of_it_is_restarted_as_one(nodes, rank):
    async def story(group):
        await group.start()
        titles, pids = {one.title for one in group.running}, Site.pids(group)
        victim, = (one for one in group.running if one.node is group.nodes[rank])
        with pytest.raises(llmrun.ProgramFailed) as caught:
            own, = (pid for pid in pids if os.path.realpath(f"/proc/{pid}/fd/1") == os.path.realpath(victim.process.log))
            os.kill(own, signal.SIGKILL)
            await group.unless_failed(asyncio.sleep(30))
        await group.recover(caught.value, worked=True)
        assert {one.title for one in group.running} == titles
        assert len(Site.pids(group)) == 3 and not set(pids) & set(Site.pids(group))
    nodes.doing(story, Ranked, 3)
    assert [event for event, _ in nodes.told] == ["ranked_died"]


def test_a_program_with_two_ports_and_a_process_beside_it(nodes):
    async def story(group):
        await group.start()
        assert [one.title for one in group.running] == ["server on n1", "look on n1"]
        ways = group.placed[0].ways
        assert ways["data"].port != ways["admin"].port
        for way in ways.values():
            _, writer = await asyncio.open_connection(*way)
            writer.close()
    nodes.doing(story, Beside)


def test_ports_of_one_node_are_held_until_all_are_found(nodes):
    """Of a range of two, each gets one, and not twice the first."""
    free = [port for port in random.sample(range(12000, 19000), 50) if is_free(port) and is_free(port + 1)]  # whom no connection is given
    first, second = free[0], free[0] + 1

    async def story(group):
        await group.start()
        assert {way.port for way in group.placed[0].ways.values()} <= set(range(first, second + 1))
    nodes.doing(story, Beside, ports=f"{first}-{second}")


def is_free(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def test_a_program_is_ready_when_its_own_function_says_so(nodes):
    async def has_log(group, part):
        with open(part.process.log) as log:
            return "open for all" in log.read()

    class Own(Beside):
        def steps(self, group):
            (server,), _ = super().steps(group)
            return [[server._replace(ready=has_log)]]

    async def story(group):
        await group.start()
        assert "open for all" in open(group.running[0].process.log).read()
    nodes.doing(story, Own)


def test_its_own_words_are_understood_before_those_that_all_have(nodes):
    class Breaks(Beside):
        look = "import sys; print('Address already in use', flush=True); sys.exit('the glass is empty')"

    async def story(group):
        with pytest.raises(llmrun.ProgramFailed, match=r"look on n1: it broke \(the glass is empty\); use another glass"):
            await group.start()
    nodes.doing(story, Breaks)


def test_what_is_never_ready_is_named_with_its_log(nodes):
    class Silent(Beside):
        look = "import time; time.sleep(1000)"

        def steps(self, group):
            server, (look,) = super().steps(group)
            return [server, [look._replace(patience_s=0.3)]]

    async def story(group):
        with pytest.raises(llmrun.ClusterError, match=r"waited 0s for look on n1 to be ready; see .*/n1-look\.log"):
            await group.start()
    nodes.doing(story, Silent)


@pytest.mark.parametrize("stolen", ["data", "admin"])
def test_each_of_its_ports_is_proven_to_be_its_own(nodes, stolen):
    """Somebody else has bound it, and answers there."""
    class Lazy(Beside):
        def steps(self, group):
            placed, = group
            with contextlib.suppress(OSError):  # somebody else's connection has that port already, and so it is no less taken
                thieves.append(socket.create_server(tuple(placed.ways[stolen])))
            tries.append(group)
            (server,), look = super().steps(group)
            others = [str(part) for name, one in placed.ways.items() if name != stolen for part in one]
            argv = [*server.process.argv[:3], *others]
            return [[server._replace(process=llmrun.dataclasses.replace(server.process, argv=argv))], look]
    thieves, tries = [], []

    async def story(group):
        with pytest.raises(llmrun.ProgramFailed, match="taken by another program before server had it"):
            await group.start()
        assert len(tries) == group.STARTS and thieves
    try:
        nodes.doing(story, Lazy)
    finally:
        for thief in thieves:
            thief.close()


def test_two_groups_on_one_node_have_names_of_their_own(nodes):
    async def story(group):
        other = llmrun.Group(1, group.program, group.nodes, nodes.tell)
        await llmrun.first_failure(group.start(), other.start())
        try:
            names = [one.process.name for one in group.running + other.running]
            assert names == ["server", "look", "server-1.0", "look-1.0"]
        finally:
            await other.stop()
        assert not any(one.ended.done() for one in group.running), "the one ends without the other"
    nodes.doing(story, Beside)


# ── the way to a port that several must reach ──────────────────────────────────


class Prober:
    """A node on a machine of its own that reaches some addresses of another, the first of its own order first."""

    def __init__(self, name, reaches=(), addresses=()):
        self.name, self.reaches, self.addresses, self.released = name, reaches, addresses, False
        self.facts = asyncio.get_running_loop().create_future()
        self.facts.set_result({"machine": name})

    async def ask(self, order, addresses=(), **details):
        if order == "probe":
            return {"addresses": list(self.addresses), "port": 20001}
        if order == "release":
            self.released = True
            return None
        return next((address for address in self.reaches if address in addresses), "")


@pytest.mark.parametrize("reaches, found", [
    ((["a"], ["a", "b"]), "a"), ((["a", "b"], ["b", "a"]), "a"), ((["b", "a"], ["b"]), "b"), ((["a"], ["b"]), None), ((["a"], []), None)])
def test_all_who_must_reach_a_port_reach_it_by_one_address(reaches, found):
    async def way():
        target = Prober("n1", addresses=["a", "b"])
        probers = [Prober(f"n{number + 2}", some) for number, some in enumerate(reaches)]
        try:
            async with llmrun.open_way(target, probers, "", "", "the meeting") as (address, port):
                assert not target.released
                return address
        finally:
            assert target.released
    if found:
        assert asyncio.run(way()) == found
    else:
        with pytest.raises(llmrun.ClusterError, match=r"n3 cannot reach the meeting on n1, port 20001|n2 cannot reach"):
            asyncio.run(way())


def test_a_line_of_an_earlier_start_makes_nothing_ready(nodes):
    """Its log goes on where that of the start before ended."""
    class Once(Beside):
        look = "import os, time; os.path.exists('said') or print('I see it', flush=True); open('said', 'w'); time.sleep(1000)"

        def steps(self, group):
            server, (look,) = super().steps(group)
            argv = [*look.process.argv[:2], look.process.argv[2].replace("'said'", repr(str(self.run.folder / "said")))]
            return [server, [look._replace(patience_s=2.0, process=llmrun.dataclasses.replace(look.process, argv=argv))]]

    async def story(group):
        await group.start()
        await group.stop()
        with pytest.raises(llmrun.ClusterError, match="waited 2s for look on n1"):
            await group.start()
    nodes.doing(story, Once)
