"""The Wire against peers that behave and peers that do not."""

import asyncio
import contextlib

import llmrun
import pytest


def run(work):
    return asyncio.run(asyncio.wait_for(work, 20))


@contextlib.asynccontextmanager
async def server_saying(*replies, then="close"):
    """A raw server: to the n-th request it says the n-th of these bytes, then closes or stays silent."""
    replies = iter(replies)

    async def talk(reader, writer):
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                await reader.readuntil(b"\r\n\r\n")
                for piece in next(replies, b"").split(b"|"):
                    writer.write(piece)
                    await writer.drain()
                    await asyncio.sleep(0.01)
                if then == "close":
                    writer.close()
                    return
    server = await asyncio.start_server(talk, "127.0.0.1", 0)
    client = llmrun.Client("127.0.0.1", server.sockets[0].getsockname()[1])
    try:
        yield client
    finally:
        client.close()
        server.close()


async def ask(*replies, then="close", timeout_s=5.0):
    async with server_saying(*replies, then=then) as client:
        return await client.request("GET", "/", timeout_s=timeout_s)


OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi"


@pytest.mark.parametrize("reply", [
    OK, b"|".join(OK[i:i + 1] for i in range(len(OK))),
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nh\r\n1;x=y\r\ni\r\n0\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r|\n1|\r\nh\r|\n1\r\ni\r\n0\r\nTrailer: x\r\n\r\n",
    b"HTTP/1.0 200 OK\r\n\r\nhi", b"HTTP/1.1 100 Continue\r\n\r\n" + OK, b"HTTP/1.1 200 OK\r\ncontent-length:2\r\n\r\nhi"])
def test_a_whole_answer_is_read_however_it_comes(reply):
    message = run(ask(reply))
    assert message.status == 200 and message.body == b"hi"


@pytest.mark.parametrize("reply, words", [
    (b"", "broke"), (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhi", "broke"), (b"HTTP/1.1 200 OK\r\nConte", "broke"),
    (b"SSH-2.0-OpenSSH\r\n\r\n", "not HTTP"), (b"HTTP/1.1 OK\r\n\r\n", "not HTTP"), (b"\x00\xff" * 40000, "no end"),
    (b"HTTP/1.1 200 OK\r\nX: " + b"y" * 70000, "no end"), (b"HTTP/1.1 200 OK\r\nno colon\r\n\r\n", "not a header"),
    (b"HTTP/1.1 200 OK\r\n folded: x\r\n\r\n", "not a header"), (b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n", "content-length"),
    (b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n", "content-length"),
    (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n", "chunk"),
    (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nFFFFFFFF\r\n", "endless"),
    (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhello", "longer"),
    (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n", "broke")])
def test_a_malformed_answer_is_an_error_at_once(reply, words):
    with pytest.raises(llmrun.WireError, match=words):
        run(ask(reply))


def test_a_silent_server_costs_no_more_than_the_time_allowed():
    began = llmrun.clock()
    with pytest.raises(llmrun.WireError, match="time allowed"):
        run(ask(b"", then="silence", timeout_s=0.5))
    assert llmrun.clock() - began < 4


def test_an_answer_that_stops_in_its_middle_is_given_up(monkeypatch):
    monkeypatch.setattr(llmrun, "IDLE_TIMEOUT_S", 0.3)
    with pytest.raises(llmrun.WireError, match="time allowed"):
        run(ask(OK[:-1], then="silence", timeout_s=60))


def test_a_server_may_have_an_ipv6_address():
    async def work():
        heads = []

        async def answer(request):
            heads.append(request.headers["host"])
            return llmrun.http_response(200, {})
        server = await llmrun.serve_http("::1", 0, answer)
        port = server.sockets[0].getsockname()[1]
        client = llmrun.Client("::1", port)
        assert (await client.request("GET", "/")).status == 200 and heads == [f"[::1]:{port}"]
        client.close()
        server.close()
    run(work())


def test_a_connection_that_ends_as_it_begins_is_an_error_at_once(monkeypatch):
    """Its end may be told before anybody waits for an answer over it."""
    opened = llmrun.within

    async def opened_and_ended(time_s, opening):
        transport, connection = await opened(time_s, opening)
        transport.abort()
        while connection in connection.client.all:
            await asyncio.sleep(0.001)
        return transport, connection
    monkeypatch.setattr(llmrun, "within", opened_and_ended)
    with pytest.raises(llmrun.WireError, match="as soon as it was open"):
        run(ask(OK))


@pytest.mark.parametrize("host, port", [("a..b", 80), ("127.0.0.1", 70000)])
def test_an_address_that_is_none_is_unreachable(host, port):
    async def work():
        await llmrun.Client(host, port).request("GET", "/")
    with pytest.raises(llmrun.Unreachable, match="cannot connect"):
        run(work())


def test_nobody_there_is_told_apart_from_a_broken_answer():
    async def work():
        await llmrun.Client("127.0.0.1", 1).request("GET", "/")
    with pytest.raises(llmrun.Unreachable, match="cannot connect"):
        run(work())


def test_connections_are_kept_and_a_closed_one_is_replaced_unseen():
    async def work():
        async with server_saying(OK, b"", OK, then="silence") as client:
            first = await client.request("GET", "/")
            assert len(client.idle) == 1
            client.idle[0].transport.close()  # the server's end of a rest
            return first, await client.request("GET", "/", timeout_s=0.5)
    with pytest.raises(llmrun.WireError, match="time allowed"):
        run(work())  # the second request went out on a new connection, and met the silence meant for it


def test_a_connection_that_the_server_closed_while_it_rested_is_asked_again():
    async def work():
        async with server_saying(OK, OK, then="close") as client:
            answers = [(await client.request("GET", "/")).status]
            client.idle.extend(client.all)  # as if the close had not been seen yet
            answers.append((await client.request("GET", "/")).status)
            return answers
    assert run(work()) == [200, 200]


def test_a_connection_that_the_server_closed_while_it_rested_is_forgotten():
    async def work():
        async with server_saying(OK, then="close") as client:
            await client.request("GET", "/")
            while client.all:
                await asyncio.sleep(0.005)
            return client.idle
    assert run(work()) == []


def test_a_request_of_which_the_server_died_is_not_told_as_one_that_was_never_asked():
    """It went over a kept connection, and once more; that there is no server now does not make it innocent."""
    async def work():
        async def talk(reader, writer):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
            await reader.readuntil(b"\r\n\r\n")
            server.close()
            writer.transport.abort()
        server = await asyncio.start_server(talk, "127.0.0.1", 0)
        client = llmrun.Client("127.0.0.1", server.sockets[0].getsockname()[1])
        await client.request("GET", "/health")
        with pytest.raises(llmrun.WireError) as told:
            await client.request("POST", "/poison")
        assert type(told.value) is llmrun.WireError and "cannot connect" in str(told.value)
        with pytest.raises(llmrun.Unreachable):
            await client.request("POST", "/another")
        client.close()
    run(work())


def test_what_is_under_way_when_the_client_closes_ends_and_is_not_sent_anew():
    async def work():
        async with server_saying(OK, b"", OK, then="silence") as client:
            await client.request("GET", "/")  # the connection is kept, and used by the next
            asking = asyncio.ensure_future(client.request("GET", "/"))
            opening = asyncio.ensure_future(client.request("GET", "/"))
            await asyncio.sleep(0)
            client.close()
            outcomes = await asyncio.gather(asking, opening, return_exceptions=True)
            assert [type(outcome) for outcome in outcomes] == [llmrun.WireError] * 2
            while client.all:
                await asyncio.sleep(0.005)
    run(work())


def test_two_answers_to_one_request_end_the_connection():
    async def work():
        async with server_saying(OK + OK, OK, then="silence") as client:
            first = await client.request("GET", "/")
            assert first.body == b"hi" and not client.idle, "a connection that says too much is not used again"
            return await client.request("GET", "/")
    assert run(work()).body == b"hi"


def test_the_server_answers_pipelined_requests_in_turn_and_refuses_garbage():
    async def work():
        async def answer(request):
            await asyncio.sleep(0.05 if "slow" in request.path else 0)
            return llmrun.http_response(200, f"at {request.path}")
        server = await llmrun.serve_http("127.0.0.1", 0, answer)
        port = server.sockets[0].getsockname()[1]
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /slow HTTP/1.1\r\n\r\nPOST /quick HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc")
        await reader.readuntil(b'"at /slow"')
        await reader.readuntil(b'"at /quick"')
        writer.write(b"no\r\nheader\r\n\r\n")
        assert b"400" in await reader.readuntil(b"\r\n")
        server.close()
    run(work())


def test_an_end_of_waiting_is_not_lost_when_the_work_ends_with_it():
    """A cancellation that comes in the same moment as the work's end must arrive."""
    async def work():
        ended = asyncio.get_running_loop().create_future()
        waiting = asyncio.ensure_future(llmrun.within(5, ended))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        ended.set_result(1)
        waiting.cancel()
        await asyncio.wait([waiting])
        assert waiting.cancelled()
    run(work())


def test_a_connection_that_the_server_means_to_close_is_not_used_again():
    async def work():
        async with server_saying(OK.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"), OK, then="silence") as client:
            first = await client.request("GET", "/")
            assert first.body == b"hi" and client.idle == []
            return await client.request("GET", "/", timeout_s=2)
    assert run(work()).body == b"hi"


def test_a_request_whose_answer_had_begun_is_not_sent_once_more():
    """The engine has worked on it: whether to ask again is the pump's to say."""
    asked = []

    async def talk(reader, writer):
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                asked.append(await reader.readuntil(b"\r\n\r\n"))
                writer.write(OK if len(asked) == 1 else OK[:-1])
                if len(asked) > 1:
                    writer.close()
                    return

    async def work():
        server = await asyncio.start_server(talk, "127.0.0.1", 0)
        client = llmrun.Client("127.0.0.1", server.sockets[0].getsockname()[1])
        await client.request("GET", "/")
        with pytest.raises(llmrun.WireError, match="broke"):
            await client.request("GET", "/", timeout_s=2)
        client.close()
        server.close()
    run(work())
    assert len(asked) == 2


def test_requests_of_one_moment_get_each_their_own_answer():
    async def work():
        async def answer(request):
            await asyncio.sleep(0.01)
            return llmrun.http_response(200, request.path)
        server = await llmrun.serve_http("127.0.0.1", 0, answer)
        client = llmrun.Client("127.0.0.1", server.sockets[0].getsockname()[1])
        await client.request("GET", "/first")  # its connection rests
        paths = [f"/{number}" for number in range(20)]
        answers = await asyncio.wait_for(asyncio.gather(*(client.request("GET", path) for path in paths)), 3)
        client.close()
        server.close()
        return paths, [message.json() for message in answers]
    paths, answers = run(work())
    assert answers == paths
