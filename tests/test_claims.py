"""Claims: who asks what when drivers share a run. First rule by rule; then every interleaving of two drivers."""

import asyncio
import contextlib
import itertools
import math
import types
from pathlib import Path
from typing import NamedTuple

import llmrun
import pytest
import test_suspects

FOLDER = Path("/nowhere/run")
loop = test_suspects.loop
BIRTH = 7


class Rows:
    """Prompts of one source."""

    def __init__(self, total):
        self.total = total

    def __len__(self):
        return self.total

    def number(self, key):
        return key[1]


def line_of(number, ok=True):
    prompt = llmrun.Prompt((0, number, 0), str(number), "", b"")
    return llmrun.journal_line(llmrun.Result(prompt, 200 if ok else 400, b"{}", {}, None, 0, 0, 1, 0))


class Shared:
    """Files in memory, as llmrun.Disk gives them; `lost` are names whose link is made and said to be taken."""

    def __init__(self):
        self.files, self.lost = {}, set()

    def names(self, folder):
        return [name for name in self.files if name.endswith(".jsonl") == (folder.name == "journal")]

    def read(self, path, at=0, most=-1):
        return self.files.get(path.name, b"")[at:]

    def put(self, path, data):
        self.files[path.name] = data

    def put_new(self, path, data):
        if path.name in self.files:
            return False
        self.files[path.name] = data
        return path.name not in self.lost


class Site:
    """Some drivers on a shared disk, each with the clock that the test sets."""

    def __init__(self, starts=(0, 2, 4)):
        self.disk, self.starts, self.now, self.host = Shared(), list(starts), 1000.0, "here"
        self.births = {}

    def driver(self, job, restart=0, number=0, host="here"):
        self.host = host
        life = llmrun.Life(job, restart, number)
        run = llmrun.Run(FOLDER, self.disk)
        return llmrun.Claims(run, life, llmrun.Marks(run, Rows(self.starts[-1])), self.starts, lambda: self.now)

    def answer(self, claims, *numbers, ok=True):
        """What a driver does with results, without the pump."""
        name = f"{claims.life}.0.jsonl"
        for number in numbers:
            self.disk.files[name] = self.disk.files.get(name, b"") + line_of(number, ok)
            claims.settle((0, number, 0), ok)

    def beat_of(self, claims, host):
        """A driver on another host shows that it lives."""
        ours, self.host = self.host, host
        claims.beat()
        self.host = ours

    def ask_all(self, claims):
        """The numbers that a driver gets until there are none just now, each answered at once."""
        asked = []
        while True:
            number = claims.next()
            if number is None or number == llmrun.LATER:
                return asked
            asked.append(number)
            self.answer(claims, number)


@pytest.fixture
def site(monkeypatch):
    site = Site()
    monkeypatch.setattr(llmrun, "socket", types.SimpleNamespace(gethostname=lambda: site.host))
    monkeypatch.setattr(llmrun, "process_birth", lambda pid: BIRTH if site.births.get(pid, True) else 0)
    return site


# ── the chunks ─────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("total, jobs", list(itertools.product(
    [0, 1, 2, 15, 16, 17, 60, 1000, 123457], [1, 2, 8, 9, 100])))
def test_chunks_cover_all_prompts_and_end_in_single_ones(total, jobs):
    starts = llmrun.chunk_starts(total, jobs)
    sizes = [after - before for before, after in zip(starts, starts[1:])]
    assert starts[0] == 0 and starts[-1] == total
    assert all(size >= 1 for size in sizes) and sizes == sorted(sizes, reverse=True)
    singles = min(total, 3 * jobs)
    assert sizes[len(sizes) - singles:] == [1] * singles, "the last prompts of all drivers end together"
    assert all(size <= max(1, (total - before) // (2 * jobs)) for before, size in zip(starts, sizes)), \
        "no driver gets more than half its share of what is left"
    assert len(sizes) <= 2 * max(jobs, 8) * (2 + math.log(max(1, total / max(jobs, 8)))), "few files"


# ── claims ─────────────────────────────────────────────────────────────────────


def test_one_driver_gets_every_prompt_once_and_then_none(site):
    claims = site.driver(1)
    assert site.ask_all(claims) == [0, 1, 2, 3]
    assert claims.finished and claims.next() is None


def test_two_drivers_share_the_chunks(site):
    one, other = site.driver(1), site.driver(2)
    assert [one.next(), other.next(), one.next(), other.next()] == [0, 2, 1, 3]
    assert one.next() == other.next() == llmrun.LATER
    assert {name: data for name, data in site.disk.files.items() if "beat" not in name} == {"0.0": b"1.0.0", "1.0": b"2.0.0"}


def test_answered_prompts_are_not_claimed(site):
    site.answer(site.driver(1), 0, 1, 2)
    assert site.driver(2).next() == 3
    assert "0.0" not in site.disk.files and site.disk.files["1.0"] == b"2.0.0"


def test_a_claim_lost_to_another_is_the_others(site):
    one = site.driver(1)
    site.disk.files["0.0"] = b"2.0.0"  # a moment after it looked
    assert one.next() == 2
    assert one.owner(0, 0) == llmrun.Life(2, 0, 0)


def test_a_link_that_was_made_and_said_to_be_taken_is_ours(site):
    site.disk.lost.add("0.0")
    assert site.driver(1).next() == 0


def test_nothing_is_taken_from_a_driver_that_lives(site):
    one, claims = left_by(site), site.driver(2)
    for _ in range(100):
        site.now += 10
        site.beat_of(one, "there")
        assert claims.next() == llmrun.LATER
    assert not {"0.1", "1.1"} & set(site.disk.files)


def left_by(site, **where):
    """A driver that claimed all and answered nothing; its prompts are open."""
    gone = site.driver(1, host="there", **where)
    for _ in site.starts:
        gone.next(), gone.claim_next()
    site.host = "here"
    return gone


def test_a_takeover_needs_a_minute_of_ones_own_clock_without_a_beat(site):
    left_by(site)
    site.now += 10000
    claims = site.driver(2)
    assert claims.next() == llmrun.LATER, "it has only begun to look"
    site.now += claims.STILL_S
    assert claims.next() == llmrun.LATER
    site.now += claims.LOOK_S
    assert site.ask_all(claims)[0] == 0
    assert site.disk.files["0.1"] == b"2.0.0"


def test_a_beat_begins_the_minute_anew(site):
    gone = left_by(site)
    claims = site.driver(2)
    claims.next()
    for _ in range(5):
        site.now += claims.STILL_S
        site.beat_of(gone, "there")
        assert claims.next() == llmrun.LATER
    site.now += claims.STILL_S + 1
    assert claims.next() == 0


def test_between_two_looks_nothing_is_read(site):
    left_by(site)
    claims = site.driver(2)
    claims.next()
    site.disk.files["beat.1.0.0"] = llmrun.Run.ENDED_BEAT
    site.now += claims.LOOK_S / 2
    assert claims.next() == llmrun.LATER
    site.now += claims.LOOK_S
    assert claims.next() == 0


def test_of_an_earlier_life_of_the_same_job_all_is_taken_over_at_once(site):
    left_by(site)
    assert site.driver(1, restart=1).next() == 0


def test_of_another_life_of_the_same_start_nothing_is_taken_over_at_once(site):
    left_by(site)
    assert site.driver(1, number=1).next() == llmrun.LATER


def test_an_earlier_life_takes_nothing_from_a_later_one(site):
    left_by(site, restart=1)
    assert site.driver(1).next() == llmrun.LATER


def test_outside_slurm_a_restart_says_nothing(site):
    gone = left_by(site)
    assert not gone.is_gone(llmrun.Life(0, 0, 0), 0)
    claims = site.driver(0, restart=1)
    assert not claims.is_gone(llmrun.Life(0, 0, 0), 0)


def test_of_a_driver_that_ended_all_is_taken_over_at_once(site):
    left_by(site).end()
    assert site.driver(2).next() == 0


def test_of_a_process_that_is_not_on_this_host_any_more_all_is_taken_over_at_once(site):
    site.host = "here"
    gone = site.driver(1)
    while gone.claim_next():
        pass
    claims = site.driver(2)
    assert claims.next() == llmrun.LATER, "it lives"
    site.births[llmrun.os.getpid()] = False
    site.now += claims.LOOK_S
    assert claims.next() == 0


def test_a_process_of_that_number_on_another_host_says_nothing(site):
    left_by(site)
    site.births[llmrun.os.getpid()] = False  # here nobody has that number
    claims = site.driver(2)
    assert claims.next() == llmrun.LATER
    site.now += claims.STILL_S + 1
    assert claims.next() == 0


def test_a_driver_without_a_beat_is_waited_for_like_any_other(site):
    left_by(site)
    del site.disk.files["beat.1.0.0"]
    claims = site.driver(2)
    assert claims.next() == llmrun.LATER
    site.now += claims.STILL_S + 1
    assert claims.next() == 0


def test_a_claim_whose_file_cannot_be_seen_yet_is_taken_over_late(site):
    site.disk.names = lambda folder: ["0.0", "1.0"] if folder.name == "claims" else []
    claims = site.driver(2)
    assert claims.next() == llmrun.LATER
    site.now += claims.STILL_S + 1
    assert claims.next() == 0


def test_each_claim_whose_file_cannot_be_seen_yet_has_its_own_minute(site):
    listed = ["0.0"]
    site.disk.names = lambda folder: listed if folder.name == "claims" else []
    claims = site.driver(2)
    site.disk.files["1.0"] = b"2.0.0"
    assert claims.next() == 2, "a link that was made twice"
    assert claims.next() == 3 and claims.next() == llmrun.LATER
    site.now += claims.STILL_S + 1
    assert [claims.next(), claims.next()] == [0, 1]
    site.answer(claims, 3)
    listed += ["0.2"]
    site.now += claims.LOOK_S
    assert claims.next() == llmrun.LATER, "that claim was made a moment ago"


def test_only_one_gets_what_is_taken_over(site):
    left_by(site).end()
    one, other = site.driver(2), site.driver(3)
    assert (one.next(), other.next()) == (0, 2)
    assert site.disk.files["0.1"] == b"2.0.0" and site.disk.files["1.1"] == b"3.0.0"


def test_what_was_answered_meanwhile_is_not_asked_again(site):
    gone = left_by(site)
    site.answer(gone, 0, 2)
    gone.end()
    claims = site.driver(2)
    assert site.ask_all(claims) == [1, 3], "and nothing waits between two chunks that were left"


def test_a_driver_that_was_thought_gone_finishes_what_it_has(site):
    """It stood still for a minute, and another asks the rest of its chunk too: the merge sees one result for each."""
    one = site.driver(1, host="there")
    assert one.next() == 0
    site.host = "here"
    other = site.driver(2)
    assert [other.next(), other.next(), other.next()] == [2, 3, llmrun.LATER]
    site.answer(other, 2, 3)
    site.now += other.STILL_S + 1
    assert site.ask_all(other) == [0, 1] and site.disk.files["0.1"] == b"2.0.0"
    site.host = "there"
    assert one.next() == 1, "it knows nothing of that"
    site.answer(one, 0, 1)
    assert site.ask_all(one) == [] and one.next() is None
    lines = [line for name, data in site.disk.files.items() if name.endswith(".jsonl") for line in data.splitlines()]
    assert len(lines) == 6 and llmrun.Marks(one.run, Rows(4)).count(llmrun.Marks.DONE) == 4


def many_at_work(site, jobs, chunks=3):
    """An idle driver beside so many that live elsewhere, each with prompts under way in some chunks; the files that it reads; how
    the others show that they live; and one of them."""
    site.starts = list(range(jobs * chunks + 1))
    others = [site.driver(job, host=f"host{job}") for job in range(1, jobs + 1)]
    for _ in range(chunks):
        for other in others:
            assert other.next() >= 0
    for other in others:
        site.disk.files[f"{other.life}.0.jsonl"] = b""
    read, files = [], site.disk.read
    site.disk.read = lambda path, *place: read.append(path.name) or files(path, *place)
    site.host = "here"
    idle = site.driver(jobs + 1)

    def beat():
        for other in others:
            site.beat_of(other, f"host{other.life.job}")
    return idle, read, beat, others[-1]


def read_in_a_minute(site, idle, read, beat):
    """How many files an idle driver reads in a minute, once it has looked at all of them."""
    assert idle.next() == llmrun.LATER
    del read[:]
    for second in range(120):
        if second % 10 == 0:
            beat()
        site.now += 0.5
        assert idle.next() == llmrun.LATER
    return len(read)


def test_a_look_reads_each_beat_once(site):
    idle, read, _, _ = many_at_work(site, 20)
    assert idle.next() == llmrun.LATER
    beats = [name for name in read if name.startswith("beat.")]
    assert sorted(beats) == sorted(f"beat.{job}.0.0" for job in range(1, 21))


def test_what_idle_drivers_read_does_not_grow_with_the_square_of_the_jobs(site):
    """Each of 200 reads no more in a minute than a few times what each of 20 does; what one leaves is soon seen all the same."""
    few = read_in_a_minute(site, *many_at_work(site, 20)[:3])
    site.disk.__init__()
    idle, read, beat, other = many_at_work(site, 200)
    many = read_in_a_minute(site, idle, read, beat)
    assert few > 0 and many < 3 * few, (few, many)
    other.end()
    for _ in range(60):
        site.now += 1
        if idle.next() != llmrun.LATER:
            break
    assert idle.held, "it took over what was left, within a minute"


def test_nothing_is_left_when_all_is_claimed_by_drivers_that_live(site):
    one, other = site.driver(1), site.driver(2, host="there")
    other.next(), one.next()
    site.host = "here"
    assert not one.all_with_others(), "it has prompts of its own"
    site.answer(one, 2, 3)
    assert one.all_with_others()
    other.end()
    assert not one.all_with_others(), "the other has left some"


def test_something_is_left_when_a_chunk_is_nobodys(site):
    one, other = site.driver(1), site.driver(2, host="there")
    other.next()
    site.host = "here"
    assert not one.all_with_others()


@pytest.mark.parametrize("beat", [b"3", b"3 there", b"\0\0\0\0", b"3 here x y"])
def test_a_beat_that_cannot_be_read_is_waited_for_like_any_other(site, beat):
    left_by(site)
    site.disk.files["beat.1.0.0"] = beat
    claims = site.driver(2)
    assert claims.next() == llmrun.LATER
    site.now += claims.STILL_S + 1
    assert claims.next() == 0


def test_a_driver_does_not_ask_twice_what_it_has_under_way(site):
    one = site.driver(1)
    assert one.next() == 0
    for name in ("0.1", "1.0"):  # another took the one over and claimed the other, and left both
        site.disk.files[name] = b"2.0.0"
    site.disk.files["beat.2.0.0"] = llmrun.Run.ENDED_BEAT
    assert [one.next(), one.next(), one.next()] == [1, 2, 3]
    assert one.next() == llmrun.LATER


@pytest.mark.parametrize("chunk", ["0.0", "1.1"])
def test_a_link_that_failed_and_was_made_is_ours(site, chunk):
    if chunk == "1.1":
        left_by(site).end()
    put_new, claims = site.disk.put_new, site.driver(2)

    def failing(path, data):
        put_new(path, data)
        if path.name == chunk and chunk not in failed:
            failed.append(chunk)
            raise OSError(5, "Input/output error")
        return site.disk.files[path.name] == data
    failed, asked = [], []
    site.disk.put_new = failing
    for _ in range(5):
        with contextlib.suppress(OSError):
            asked += site.ask_all(claims)
        claims.look()
        site.now += claims.LOOK_S
    assert sorted(asked) == [0, 1, 2, 3]


# ── every interleaving of two drivers ──────────────────────────────────────────
#
# A driver is a function from what its operations gave it so far to its next operation: its code is run from the start
# over a disk that answers from that record and stops it where the record ends. So a state of the model is the files
# and two records, and equal states are looked at once.


class Next(BaseException):
    """A driver's next operation, where its record ends."""


class Replay:
    """A disk that gives what was given before."""

    def __init__(self, record):
        self.record, self.clock = iter(record), 0.0

    def do(self, *operation):
        for given in self.record:
            return given
        raise Next(*operation)

    def names(self, folder):
        return self.do("names", folder.name)

    def read(self, path, at=0, most=-1):
        return self.do("read", path.name)[at:]

    def put(self, path, data):
        return self.do("put", path.name, data)

    def put_new(self, path, data):
        return self.do("put_new", path.name, data)


LIVES = llmrun.Life(1, 0, 0), llmrun.Life(2, 0, 0)


def drive(disk, life, starts):
    """What a driver does with claims, one prompt at a time."""
    run = llmrun.Run(FOLDER, disk)
    claims = llmrun.Claims(run, life, llmrun.Marks(run, Rows(starts[-1])), starts, lambda: disk.clock)
    while True:
        number = claims.next()
        if number is None:
            return claims.end()
        if number == llmrun.LATER:
            disk.clock += disk.do("wait")
        else:
            disk.do("work", number)
            claims.settle((0, number, 0), True)


class State(NamedTuple):
    """The number of what files there are, those of the drivers' records, and what else is over or to come."""

    files: int
    records: tuple
    over: tuple  # "", "ended" or "crashed"
    news: tuple  # whether the other has changed a file since one waited last
    crashes: int  # how many there may be yet, like those that follow
    stalls: int
    retries: int


class Model:
    """All that two drivers can do, with so many crashes, stalls and links that are asked for twice in all."""

    MOST_WAITS = 40

    def __init__(self, monkeypatch, starts, crashes=0, stalls=0, retries=0):
        self.stalls, self.starts, self.next_of, self.paths = stalls, starts, {}, {}
        self.records = [()]  # by number
        self.numbers = {}  # (number of a record, what was given next) → number of the longer record
        self.contents, self.content_numbers = [{}], {frozenset(): 0}  # what files there are, by number
        self.host = None
        self.ends = 0
        monkeypatch.setattr(llmrun, "socket", types.SimpleNamespace(gethostname=lambda: self.host))
        monkeypatch.setattr(llmrun, "process_birth", lambda pid: BIRTH)
        first = State(0, (0, 0), ("", ""), (True, True), crashes, stalls, retries)
        self.interleavings = self.explore(first)

    def next(self, who, number):
        """The next operation of a driver, None at its end."""
        if (who, number) not in self.next_of:
            self.host = f"n{who}"
            try:
                drive(Replay(self.records[number]), LIVES[who], self.starts)
                operation = None
            except Next as stopped:
                operation = stopped.args
            self.next_of[who, number] = operation
        return self.next_of[who, number]

    def longer(self, number, given):
        key = number, given
        if key not in self.numbers:
            self.numbers[key] = len(self.records)
            self.records.append((*self.records[number], given))
        return self.numbers[key]

    def explore(self, first):
        """The number of ways from a state to an end; each state is looked at once."""
        stack = [(first, None)]
        while stack:
            state, after = stack.pop()
            if after is not None:
                self.paths[state] = sum(self.paths[other] for other in after)
            elif state not in self.paths:
                after = list(self.after(state))
                if after:
                    self.paths[state] = 0
                    stack.append((state, after))
                    stack += [(other, None) for other in after]
                else:
                    self.check(state)
                    self.ends += 1
                    self.paths[state] = 1
        return self.paths[first]

    def after(self, state):
        """Every state that may come next."""
        for who in (0, 1):
            if state.over[who]:
                continue
            operation = self.next(who, state.records[who])
            if operation is None:
                yield state._replace(over=swap(state.over, who, "ended"))
                continue
            if state.crashes:
                crashed = state._replace(over=swap(state.over, who, "crashed"), crashes=state.crashes - 1)
                yield crashed
                if operation[0] == "work":
                    yield crashed._replace(files=self.appended(state.files, who, line_of(operation[1])[:-9]))
            for given, changes in self.outcomes(state, who, operation):
                number = self.longer(state.records[who], given)
                if "files" in changes:  # something that the other has not seen
                    changes["news"] = swap(changes.get("news", state.news), 1 - who, True)
                yield state._replace(records=swap(state.records, who, number), **changes)

    def outcomes(self, state, who, operation):
        """(what a driver gets, what changes) for each way in which its operation can go."""
        files, kind, name = self.contents[state.files], operation[0], operation[1] if operation[1:] else ""
        if kind == "wait":
            yield from self.waits_of(state, who)
        elif kind == "names":
            yield tuple(sorted(other for other in files if other.endswith(".jsonl") == (name == "journal"))), {}
        elif kind == "read":
            yield files.get(name, b""), {}
        elif kind == "work":
            yield None, {"files": self.appended(state.files, who, line_of(name))}
        elif kind == "put":
            yield None, {"files": self.with_file(files, name, operation[2])}
        elif name in files:
            yield False, {}
        else:
            assert (name.endswith(".0") or state.over[1 - who] == "crashed" or state.stalls < self.stalls
                    or files[f"beat.{LIVES[1 - who]}"] == llmrun.Run.ENDED_BEAT), "a chunk was taken from a driver that lives"
            made = {"files": self.with_file(files, name, operation[2])}
            yield True, made
            if state.retries:
                yield False, {**made, "retries": state.retries - 1}

    def waits_of(self, state, who):
        """It waits until there is news; for more than a minute when the other is no more, or stands still."""
        waited = sum(isinstance(given, float) for given in self.records[state.records[who]])
        assert waited < self.MOST_WAITS, f"{LIVES[who]} waits for ever"
        if state.over[1 - who]:
            yield llmrun.Claims.STILL_S + 1, {}
            return
        if state.news[who]:
            yield llmrun.Claims.LOOK_S, {"news": swap(state.news, who, False)}
        if state.stalls:
            yield llmrun.Claims.STILL_S + 1, {"stalls": state.stalls - 1}

    def appended(self, files, who, line):
        files, name = self.contents[files], f"{LIVES[who]}.0.jsonl"
        return self.with_file(files, name, files.get(name, b"") + line)

    def with_file(self, files, name, data):
        """The number of these files with one more, or another content."""
        files = {**files, name: data}
        number = self.content_numbers.setdefault(frozenset(files.items()), len(self.contents))
        if number == len(self.contents):
            self.contents.append(files)
        return number

    def operations(self, state, who):
        """What a driver did, with what came of it."""
        number = 0
        for given in self.records[state.records[who]]:
            yield self.next(who, number), given
            number = self.longer(number, given)

    def check(self, state):
        assert all(state.over), "both drivers wait for each other"
        files = self.contents[state.files]
        lines = [line for name, data in files.items() if name.endswith(".jsonl") for line in data.split(b"\n")[:-1]]
        answered = [int(llmrun.KEY_IN_LINE.match(line).group(2)) for line in lines]
        done = [operation for who in (0, 1) for operation, _ in self.operations(state, who)]
        asked = sorted(operation[1] for operation in done if operation[0] == "work")
        owners = [name for who in (0, 1) for (kind, name, *_), given in
                  ((operation + ("",), given) for operation, given in self.operations(state, who)) if kind == "put_new" and given]
        taken_over = any(name[0] in "012" and not name.endswith(".0") for name in files if not name.endswith(".jsonl"))
        if "ended" in state.over:
            assert sorted(set(answered)) == list(range(self.starts[-1])), "a prompt has no result"
        assert len(owners) == len(set(owners)), "a claim has two owners"
        if not taken_over:
            assert asked == sorted(set(asked)), "a prompt was asked twice"
        if "crashed" not in state.over and state.stalls == self.stalls:
            assert asked == list(range(self.starts[-1])), "a prompt was asked twice and nobody had died"


def swap(pair, who, value):
    return (value, pair[1]) if who == 0 else (pair[0], value)


@pytest.mark.parametrize("starts, faults", [
    ((0, 2, 3, 4), {}), ((0, 1, 2, 3), {"crashes": 1}), ((0, 1, 2), {"stalls": 1}), ((0, 1, 2), {"retries": 1})], ids=str)
def test_two_drivers_in_every_interleaving(monkeypatch, starts, faults):
    model = Model(monkeypatch, list(starts), **faults)
    print(f"\n{model.interleavings:,} interleavings in {len(model.paths):,} states with {model.ends:,} ends")
    assert model.interleavings > 10**6 and model.ends > 100


@pytest.mark.parametrize("fault, words", [
    ("a link that both get", "two owners|that lives"), ("own claims are not known", "no result|for ever|twice"),
    ("nobody is ever gone", "for ever"), ("everybody is gone", "that lives")])
def test_the_model_sees_what_is_wrong(monkeypatch, fault, words):
    if fault == "a link that both get":
        monkeypatch.setattr(Model, "outcomes", both_get(Model.outcomes))
    elif fault == "own claims are not known":
        monkeypatch.setattr(llmrun.Claims, "open", lambda self, chunk: chunk != 1)
    else:
        monkeypatch.setattr(llmrun.Claims, "is_gone", lambda *about: fault == "everybody is gone")
    with pytest.raises(AssertionError, match=words):
        Model(monkeypatch, [0, 1, 2], crashes=1)


def both_get(outcomes):
    def wrong(self, state, who, operation):
        for given, changes in outcomes(self, state, who, operation):
            yield (True if operation[0] == "put_new" else given), changes
    return wrong


def test_what_was_taken_over_from_a_second_driver_too_is_asked_by_a_third(site):
    left_by(site).end()
    second = site.driver(2)
    assert second.next() == 0
    second.end()
    assert site.driver(3).next() == 0 and site.disk.files["0.2"] == b"3.0.0"


def test_what_a_slow_driver_answered_since_the_last_look_is_not_asked_again(site):
    slow = left_by(site)
    slow.end()
    claims = site.driver(2)
    for number in (0, 1):
        assert claims.next() == number
        site.answer(claims, number)
    site.answer(slow, 2)  # it was thought gone
    assert claims.next() == 3


# ── a job that has nothing to do but to wait for the others ────────────────────


class Idle:
    """A driver whose prompts are answered at once, beside another life that has claimed some and answers none of
    them; all in a time that costs none. `beats_until` is when the other dies."""

    def __init__(self, tmp_path, loop, beats_until=math.inf):
        (tmp_path / "in.jsonl").write_text("".join(f'{{"x": "{number}"}}\n' for number in range(20)))
        config = llmrun.build_config(llmrun.Config, {"engine": {"name": "echo"}, "run_dir": str(tmp_path / "runs"), "prompts": {
            "user": str(tmp_path / "in.jsonl"), "template": "{x}"}}, "config.toml", None)
        self.run = llmrun.create_run(config, llmrun.freeze(config, "m"), lambda run: "")
        self.run.record_submit(1, shape=0)
        self.prompts, self.loop, self.beats_until = llmrun.Input.load(self.run, config, "m"), loop, beats_until
        self.starts, self.config = llmrun.chunk_starts(len(self.prompts), 2), config
        other = self.claims(2)
        for _ in range(3):
            other.claim_next()
        asyncio.set_event_loop(loop)
        try:
            loop.run_until_complete(self.live())
        finally:
            asyncio.set_event_loop(None)

    def claims(self, job):
        life = self.run.new_life(job, 0)
        llmrun.Events(self.run, life).append("start", work="prompts")
        return llmrun.Claims(self.run, life, llmrun.Marks(self.run, self.prompts), self.starts, self.loop.time)

    async def other_beats(self):
        for count in itertools.count():
            self.run.disk.put(self.run.beat_file(llmrun.Life(2, 0, 0)), b"%d elsewhere 1 1" % count)
            await asyncio.sleep(10 if self.loop.time() < self.beats_until else 10**9)

    async def live(self):
        async def written(until):
            pass
        journal = types.SimpleNamespace(add=lambda *results: None, write=lambda: None, close=lambda: None, written=written, trouble="")
        work = llmrun.Prompts(self.run, self.config, self.claims(1), journal, lambda event, **facts: None)
        allocation = llmrun.Allocation(1, 0, ["n1"], {}, math.inf, False, 1)
        driver = llmrun.Driver(self.run, self.config, 0, llmrun.Life(1, 0, 0), allocation, lambda event, **facts: None)
        living = asyncio.ensure_future(self.story(driver, work))
        beating = asyncio.ensure_future(self.other_beats())
        await asyncio.wait([living], timeout=3600)
        ended = living.done()
        for task in (living, beating):
            task.cancel()
        await asyncio.gather(living, beating, return_exceptions=True)
        assert ended, "it waits for the others for ever"
        self.took_s, self.done = self.loop.time(), work.claims.marks.count(llmrun.Marks.DONE)
        self.ending = None if work.finished else driver.hand_over(work, living.result(), "resume")

    async def story(self, driver, work):
        replica = test_suspects.Replica(0, lambda replica, name, times: (0.1, "ok"))
        replica.ask = lambda method, url, body, limit, then: self.loop.call_later(0.1, then, test_suspects.says("ok"))
        orders = llmrun.Orders(driver, work)
        try:
            async with llmrun.tending(work, orders):
                await work.do([(replica, asyncio.ensure_future(asyncio.sleep(0)))], math.inf)
        except asyncio.CancelledError:
            if not orders.stopped:
                raise
        return orders.stopped or orders.drained


def test_a_job_ends_when_all_that_is_left_is_with_others_that_live(tmp_path, loop):
    """However long they take for it: they may hang, and these nodes are somebody else's until then."""
    idle = Idle(tmp_path, loop)
    assert idle.done == 20 - 3 and idle.ending.next == llmrun.OTHERS and "the other jobs" in idle.ending.why
    assert "time limit" not in idle.ending.why


def test_a_job_does_not_leave_what_a_dead_one_had(tmp_path, loop):
    """It died as this one came to its end, when nobody could know yet."""
    idle = Idle(tmp_path, loop, beats_until=1)
    assert idle.done == 20 and idle.ending is None and idle.took_s < 200
