"""Inputs of every shape, and what comes out of them."""

import csv
import io
import json
import os
import re

import llmrun
import pytest
from conftest import bytes_read


def config_for(tmp_path, user, **prompts):
    tables = {"prompts": {"user": str(tmp_path / user) if user != "-" else user, **prompts}, "run_dir": str(tmp_path / "runs"),
              "engine": {"name": "echo"}}
    config = llmrun.build_config(llmrun.Config, tables, "config.toml", None)
    return llmrun.dataclasses.replace(config, source=str(tmp_path / "config.toml"))


def frozen_input(tmp_path, config):
    run = llmrun.create_run(config, llmrun.freeze(config, "m"), lambda run: "")
    return run, llmrun.Input.load(run, config, "m")


def all_prompts(tmp_path, config):
    _, prompts = frozen_input(tmp_path, config)
    return [prompts.prompt(number) for number in range(len(prompts))]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def batch_row(name, body=None, url=llmrun.CHAT):
    return {"custom_id": name, "method": "POST", "url": url,
            "body": body or {"model": "gpt", "messages": [{"role": "user", "content": f"Hi {name}"}], "max_tokens": 5}}


def test_batch_requests_go_through_untouched(tmp_path):
    body = {"model": "gpt-x", "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x/é.png"}}]}],
            "tools": [{"type": "function", "function": {"name": "f"}}], "response_format": {"type": "json_object"}, "seed": 3,
            "logprobs": True, "max_completion_tokens": 7}
    rows = [batch_row("a", body), batch_row("b", {"model": "e", "input": "text"}, llmrun.EMBEDDINGS),
            batch_row("c", {"model": "m", "prompt": "p", "max_tokens": 1}, llmrun.COMPLETIONS)]
    write_jsonl(tmp_path / "in.jsonl", rows)
    prompts = all_prompts(tmp_path, config_for(tmp_path, "in.jsonl"))
    assert [json.loads(p.body) for p in prompts] == [row["body"] for row in rows]
    assert [(p.custom_id, p.url) for p in prompts] == [(row["custom_id"], row["url"]) for row in rows]


def test_a_body_that_stands_twice_in_a_row_is_read_as_json_reads_it(tmp_path):
    row = json.dumps(batch_row("a"))
    (tmp_path / "in.jsonl").write_text(row.replace('"body": ', '"body": {"messages": [1]}, "body": ') + "\n")
    prompts = all_prompts(tmp_path, config_for(tmp_path, "in.jsonl"))
    assert json.loads(prompts[0].body)["messages"][0]["content"] == "Hi a"


@pytest.mark.parametrize("layout", ["plain", "spaced", "other order", "a key more", "escaped name"])
def test_defaults_are_added_however_a_row_is_laid_out(tmp_path, layout):
    """Rows alike are cut, not read; the outcome must be the same as for any other layout."""
    rows = [batch_row(f"r{n}", {"messages": [{"role": "user", "content": "}{ \"body\": {}"}], "temperature": n}) for n in range(3)]
    if layout == "other order":
        rows = [dict(reversed(list(row.items()))) for row in rows]
    if layout == "a key more":
        rows = [{**row, "note": {"x": 1}} for row in rows]
    if layout == "escaped name":
        rows = [{**row, "custom_id": row["custom_id"] + '"\\'} for row in rows]
    separators = (" , ", " :  ") if layout == "spaced" else (", ", ": ")
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row, separators=separators) + "\n" for row in rows))
    prompts = all_prompts(tmp_path, config_for(tmp_path, "in.jsonl", params={"top_k": 4, "temperature": 9}))
    for row, prompt in zip(rows, prompts):
        assert prompt.custom_id == row["custom_id"]
        assert json.loads(prompt.body) == {"model": "m", "max_tokens": 1024, "top_k": 4, **row["body"]}


GOOD = '{"custom_id": "%s", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": [{"role": "user", "content": "hi"}]}}'
ALMOST = {  # rows that a pattern could take for the usual layout
    "a body after the body": GOOD[:-1] + ', "body": {"messages": [2], "seed": 5}}', "a body before the body": GOOD.replace('"body"', '"body": {"messages": [1]}, "body"'),
    "an object after the body": GOOD[:-1] + ', "x": {}}', "a url after the body": GOOD[:-1] + ', "url": "/v1/completions", "body": {"prompt": "p"}}',
    "a name after the body": GOOD[:-1] + ', "custom_id": "late", "note": {"body": {}}}', "a key of the body written otherwise": GOOD.replace('"messages"', '"mod\\u0065l": "own", "messages"'),
    "white space of another kind at its end": GOOD + " \f", "a key twice in the body": GOOD.replace('"messages"', '"seed": 1, "seed": 2, "messages"')}
NONE = {  # and that are no JSON
    "two rows in one line": GOOD + " " + GOOD, "a tab in the name": GOOD.replace("%s", "%s\t"), "a brace too many": GOOD + "}",
    "a brace too few": GOOD[:-1], "a comma at the end": GOOD[:-1] + ",}", "white space of another kind within": GOOD.replace('"body":', '"body":\f'),
    "a name that is not UTF-8": GOOD.replace("%s", "%s\udce9"), "a text that is not UTF-8": GOOD.replace("hi", "\udce9")}


@pytest.mark.parametrize("name", ALMOST)
def test_a_row_that_only_looks_like_the_usual_layout_is_read_as_json_reads_it(tmp_path, name):
    rows = [GOOD % "one", ALMOST[name] % "two", GOOD % "three"]
    (tmp_path / "in.jsonl").write_text("\n".join(rows))
    for prompt, record in zip(all_prompts(tmp_path, config_for(tmp_path, "in.jsonl", params={"top_k": 4})), map(json.loads, map(str.strip, rows))):
        assert (prompt.custom_id, prompt.url) == (record["custom_id"], record["url"])
        assert json.loads(prompt.body) == {"model": "m", "max_tokens": 1024, "top_k": 4, **record["body"]}


@pytest.mark.parametrize("name", NONE)
def test_a_row_that_looks_like_the_usual_layout_and_is_no_json_is_refused(tmp_path, name):
    (tmp_path / "in.jsonl").write_bytes("\n".join([GOOD % "one", NONE[name].replace("%s", "two"), GOOD % "three"]).encode(errors="surrogateescape"))
    with pytest.raises(llmrun.UserError, match="in.jsonl:2: not (JSON|UTF-8)"):
        llmrun.freeze(config_for(tmp_path, "in.jsonl"), "m")


def test_what_no_row_could_take_is_refused_with_the_first_row_that_would(tmp_path):
    """The first row has its own top_p; the others would be sent with one that is no number."""
    own = GOOD.replace('"messages"', '"top_p": 1, "messages"')
    (tmp_path / "in.jsonl").write_text("\n".join([own % "one", own % "two", GOOD % "three"]))
    config = config_for(tmp_path, "in.jsonl", params={"top_p": float("nan")})
    with pytest.raises(llmrun.UserError, match="in.jsonl:3: NaN and Infinity"):
        llmrun.freeze(config, "m")


def test_rows_with_a_template(tmp_path):
    write_jsonl(tmp_path / "in.jsonl", [{"word": "sea", "to": "de", "n": 3}, {"word": "{x}", "to": "fr", "n": [1]}])
    (tmp_path / "system.txt").write_text("You speak {to}.")
    prompts = all_prompts(tmp_path, config_for(tmp_path, "in.jsonl", template="{{say}} {word} {n}", id_column="word",
                                               system=str(tmp_path / "system.txt")))
    assert [p.custom_id for p in prompts] == ["sea", "{x}"]
    assert json.loads(prompts[0].body)["messages"] == [{"role": "system", "content": "You speak de."},
                                                       {"role": "user", "content": "{say} sea 3"}]
    assert json.loads(prompts[1].body)["messages"][1]["content"] == "{say} {x} [1]"


def test_a_template_may_be_a_file(tmp_path):
    (tmp_path / "ask.txt").write_text("What is {word}?")
    write_jsonl(tmp_path / "in.jsonl", [{"word": "sea"}])
    prompts = all_prompts(tmp_path, config_for(tmp_path, "in.jsonl", template="ask.txt"))
    assert "What is sea?" in prompts[0].body.decode()


def test_csv_rows_with_quotes_and_line_ends_in_them(tmp_path):
    (tmp_path / "in.csv").write_bytes("\ufeffid,text\r\n1,\"a, b\"\r\n2,\"line one\nline \"\"two\"\"\"\r\n\r\n3,é\r\n".encode())
    prompts = all_prompts(tmp_path, config_for(tmp_path, "in.csv", template="Say {text}", id_column="id"))
    assert [p.custom_id for p in prompts] == ["1", "2", "3"]
    assert [json.loads(p.body)["messages"][0]["content"] for p in prompts] == ["Say a, b", 'Say line one\nline "two"', "Say é"]


def test_a_pattern_takes_many_files(tmp_path):
    for name in ("b", "a"):
        (tmp_path / f"{name}.csv").write_text(f"id,q\n{name}1,x\n{name}2,y\n")
    prompts = all_prompts(tmp_path, config_for(tmp_path, "*.csv", template="{q}", id_column="id"))
    assert [p.custom_id for p in prompts] == ["a1", "a2", "b1", "b2"]
    assert [p.key for p in prompts] == [(0, 0, 0), (0, 1, 0), (1, 0, 0), (1, 1, 0)]


def test_standard_input_is_kept_with_the_run(tmp_path, monkeypatch):
    class Stdin:
        buffer = io.BytesIO(json.dumps(batch_row("x")).encode() + b"\n")
    monkeypatch.setattr(llmrun.sys, "stdin", Stdin)
    assert [p.custom_id for p in all_prompts(tmp_path, config_for(tmp_path, "-"))] == ["x"]


def test_samples_have_their_own_key_and_seed(tmp_path):
    write_jsonl(tmp_path / "in.jsonl", [batch_row("a"), batch_row("b")])
    prompts = all_prompts(tmp_path, config_for(tmp_path, "in.jsonl", samples=3, params={"seed": 10}))
    assert [p.key for p in prompts][:4] == [(0, 0, 0), (0, 0, 1), (0, 0, 2), (0, 1, 0)]
    assert [json.loads(p.body)["seed"] for p in prompts][:3] == [10, 11, 12]
    assert [p.custom_id for p in prompts][:3] == ["a#1", "a#2", "a#3"]


BAD = [
    ('{"custom_id": "a"}\n', "in.jsonl:1", "template"), ("{}\n[1]\n", "in.jsonl:1", "template"), ("nonsense\n", "in.jsonl:1", "not JSON"),
    (json.dumps(batch_row("a")) + "\n\n" + '{"custom_id": "b", "body": {}}\n', "in.jsonl:3", "asks nothing"),
    (json.dumps(batch_row("a")) + "\n" + json.dumps(batch_row("a")) + "\n", "in.jsonl:2", "stands already in"),
    (json.dumps({**batch_row("a"), "url": "/v1/images"}) + "\n", "in.jsonl:1", "no Batch endpoint"),
    (json.dumps({**batch_row("a"), "custom_id": 5}) + "\n", "in.jsonl:1", "custom_id is no text"),
    ("[1]\n", "in.jsonl:1", "not a JSON object"), ("", "prompts", "no prompts")]


@pytest.mark.parametrize("text, where, what", BAD, ids=[what for _, _, what in BAD])
def test_a_bad_row_is_named_by_file_and_line(tmp_path, text, where, what):
    (tmp_path / "in.jsonl").write_text(text)
    with pytest.raises(llmrun.UserError) as caught:
        llmrun.freeze(config_for(tmp_path, "in.jsonl"), "m")
    assert where in str(caught.value) and what in str(caught.value) and caught.value.mend


@pytest.mark.parametrize("text, where, what", [
    ("a,b\n1,2,3\n", "in.csv:2", "3 fields where the header has 2"), ("a,b\n1,2\n", "in.csv:2", "no column c"),
    ("c\n\n\"\"\n", "in.csv:3", "empty prompt")])
def test_a_bad_csv_row_is_named_by_file_and_line(tmp_path, text, where, what):
    (tmp_path / "in.csv").write_text(text)
    with pytest.raises(llmrun.UserError) as caught:
        llmrun.freeze(config_for(tmp_path, "in.csv", template="{c}"), "m")
    assert where in str(caught.value) and what in str(caught.value)


@pytest.mark.parametrize("column, words", [("wrod", 'did you mean "word"?'), ("q", "there are id, word")])
def test_an_id_column_that_is_none_is_named_and_not_answered_with_braces(tmp_path, column, words):
    (tmp_path / "in.csv").write_text("id,word\n1,sea\n")
    with pytest.raises(llmrun.UserError) as caught:
        llmrun.freeze(config_for(tmp_path, "in.csv", template="{word}", id_column=column), "m")
    assert f"in.csv:2: there is no column {column}, which [prompts] id_column names; {words}" in str(caught.value)
    assert "{" not in str(caught.value)


def test_a_name_that_stands_twice_among_many_is_named_with_both_places(tmp_path):
    for file in "ab":
        write_jsonl(tmp_path / f"{file}.jsonl", [batch_row(f"{file}{number}") for number in range(2000)] + [batch_row("same")] * (file == "a"))
    with open(tmp_path / "b.jsonl", "a") as file:
        file.write("\n" + GOOD % "same" + "\n" + GOOD % "b7" + "\n")
    with pytest.raises(llmrun.UserError, match=r"b\.jsonl:2002: custom_id same stands already in .*a\.jsonl:2001") as caught:
        llmrun.freeze(config_for(tmp_path, "*.jsonl"), "m")
    assert "id_column" in caught.value.mend


def test_names_with_one_hash_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(llmrun, "hash", len, raising=False)
    write_jsonl(tmp_path / "in.jsonl", [batch_row(f"r{number}") for number in range(100)])
    assert len(llmrun.freeze(config_for(tmp_path, "in.jsonl"), "m")) == 100
    write_jsonl(tmp_path / "in.jsonl", [batch_row(f"r{number % 99}") for number in range(100)])
    with pytest.raises(llmrun.UserError, match="in.jsonl:100: custom_id r0 stands already in .*in.jsonl:1;"):
        llmrun.freeze(config_for(tmp_path, "in.jsonl"), "m")


def test_numbers_that_stand_twice_are_found_wherever_they_stand():
    least, most = -2**63, 2**63 - 1
    numbers = [0, 256, 512, -256, least, most, *range(1000, 3000), 5, -1, 512, least, 5, most, 5, 2999]
    assert llmrun.doubled_among(llmrun.array.array("q", numbers)) == {512, least, most, 5, 2999}
    assert llmrun.doubled_among(llmrun.array.array("q", range(-3000, 3000))) == set()


def test_a_long_input_is_told_of_and_put_away_as_it_is_read(tmp_path, monkeypatch):
    """However many lines a row has."""
    monkeypatch.setattr(llmrun, "STEP_BYTES", 100)
    texts = [f"{number}\n{'x' * (number % 7)}\n\n" for number in range(200)]
    (tmp_path / "in.csv").write_text("id,q\n" + "".join(f'r{number},"{text}"\n' for number, text in enumerate(texts)))
    write_jsonl(tmp_path / "in.jsonl", [batch_row(f"j{number}") for number in range(200)])
    config, told = config_for(tmp_path, "in.*", template="{q}", id_column="id"), []
    frozen = llmrun.freeze(config, "m", lambda done, total: told.append((done, total)))
    for name in ("in.csv", "in.jsonl"):
        size = (tmp_path / name).stat().st_size
        done = [done for done, total in told if total == size]
        assert done == sorted(done) and done[-1] == size and len(done) > size / 300
    run = llmrun.create_run(config, frozen, lambda run: "")
    prompts = llmrun.Input.load(run, config, "m")
    assert [prompts.prompt(number).custom_id for number in range(400)] == [f"{kind}{number}" for kind in "rj" for number in range(200)]
    assert [json.loads(prompts.prompt(number).body)["messages"][0]["content"] for number in range(200)] == texts


def test_no_room_to_put_away_where_rows_stand_is_not_blamed_on_the_prompts(tmp_path, monkeypatch):
    class Full(llmrun.array.array):
        def tofile(self, file):
            raise OSError(28, "No space left on device")
    write_jsonl(tmp_path / "in.jsonl", [batch_row("a")])
    monkeypatch.setattr(llmrun.array, "array", Full)
    with pytest.raises(llmrun.UserError, match="no space left on device; .*TMPDIR") as caught:
        llmrun.freeze(config_for(tmp_path, "in.jsonl"), "m")
    assert "in.jsonl" not in str(caught.value)


def test_rows_that_are_not_utf8_are_named(tmp_path):
    (tmp_path / "in.jsonl").write_bytes(json.dumps(batch_row("a")).encode() + b'\n{"x": "caf\xe9"}\n')
    with pytest.raises(llmrun.UserError, match="in.jsonl:2: not UTF-8"):
        llmrun.freeze(config_for(tmp_path, "in.jsonl"), "m")


def test_bad_rows_can_be_skipped_and_are_told(tmp_path):
    (tmp_path / "in.jsonl").write_text(json.dumps(batch_row("a")) + "\noops\n" + json.dumps(batch_row("b")) + "\n")
    config = config_for(tmp_path, "in.jsonl", on_bad_row="skip")
    frozen = llmrun.freeze(config, "m")
    assert len(frozen.skipped) == 1 and "in.jsonl:2: not JSON" in frozen.skipped[0]
    assert [p.custom_id for p in all_prompts(tmp_path, config)] == ["a", "b"]


def test_a_changed_input_is_refused_and_a_touched_one_is_not(tmp_path):
    path = tmp_path / "in.jsonl"
    write_jsonl(path, [batch_row("a")])
    config = config_for(tmp_path, "in.jsonl")
    run, _ = frozen_input(tmp_path, config)
    path.touch()
    assert llmrun.Input.load(run, config, "m").prompt(0).custom_id == "a"
    path.write_text(path.read_text().replace("Hi", "Ho"))
    with pytest.raises(llmrun.LostPrompt, match="changed after the run was submitted"):
        llmrun.Input.load(run, config, "m").prompt(0)


def result(prompts, number, status=200, text="an answer", **more):
    answer = {"choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}],
              "usage": {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5}, **more}
    error = None if status else {"code": "connection", "message": "it broke"}
    return llmrun.Result(prompts.prompt(number), status, json.dumps(answer).encode(), answer, error, 1.5, 0.25, 1, 0)


def journal_of(run, life, *lines):
    path = run.journal / f"{life}.0.jsonl"
    with open(path, "ab") as file:
        file.writelines(lines)


@pytest.fixture
def three(tmp_path):
    write_jsonl(tmp_path / "in.jsonl", [batch_row(name) for name in "abc"])
    config = config_for(tmp_path, "in.jsonl")
    return (config, *frozen_input(tmp_path, config))


def test_a_journal_line_is_openais_batch_output(three):
    from openai.types.chat import ChatCompletion
    config, run, prompts = three
    done = result(prompts, 1, id="x", object="chat.completion", created=1, model="m")
    record = json.loads(llmrun.journal_line(done))
    assert set(record) == {"id", "custom_id", "response", "error", "llmrun"}
    assert set(record["response"]) == {"status_code", "request_id", "body"} and record["error"] is None
    assert ChatCompletion.model_validate(record["response"]["body"]).choices[0].message.content == "an answer"
    lost = json.loads(llmrun.journal_line(result(prompts, 1, status=0)))
    assert lost["response"] is None and lost["error"] == {"code": "connection", "message": "it broke"}


def test_a_torn_last_line_is_done_again(three):
    _, run, prompts = three
    whole = llmrun.journal_line(result(prompts, 0))
    for cut in (1, 20, len(whole) // 2, len(whole) - 1):
        journal_of(run, f"{cut}.0.0", whole, llmrun.journal_line(result(prompts, 1))[:cut])
    marks = llmrun.Marks(run, prompts)
    assert list(marks.state) == [llmrun.Marks.DONE, llmrun.Marks.OPEN, llmrun.Marks.OPEN]


def test_a_success_counts_before_an_error_and_the_first_life_before_others(three):
    config, run, prompts = three
    journal_of(run, "10.0.0", llmrun.journal_line(result(prompts, 0, text="ten")))
    journal_of(run, "9.1.0", llmrun.journal_line(result(prompts, 0, text="nine again")), llmrun.journal_line(result(prompts, 1, 400)))
    journal_of(run, "9.0.1", llmrun.journal_line(result(prompts, 0, status=500)), llmrun.journal_line(result(prompts, 1, 400)))
    journal_of(run, "11.0.0", llmrun.journal_line(result(prompts, 1, text="late success")))
    marks = llmrun.Marks(run, prompts)
    folder = llmrun.write_results(run, config, marks)
    records = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    texts = {r["custom_id"]: r["response"]["body"]["choices"][0]["message"]["content"] for r in records}
    assert texts == {"a": "nine again", "b": "late success"}
    assert list(marks.state) == [2, 2, 0] and not (folder / "errors.jsonl").exists()


def test_results_stand_in_input_order_and_errors_apart(three):
    config, run, prompts = three
    journal_of(run, "1.0.0", *(llmrun.journal_line(result(prompts, n, 400 if n == 1 else 200)) for n in (2, 1, 0)))
    folder = llmrun.write_results(run, config, llmrun.Marks(run, prompts))
    assert [json.loads(line)["custom_id"] for line in (folder / "results.jsonl").read_text().splitlines()] == ["a", "c"]
    assert [json.loads(line)["custom_id"] for line in (folder / "errors.jsonl").read_text().splitlines()] == ["b"]


def test_whoever_reads_results_while_they_are_written_anew_sees_all_of_the_old_ones(tmp_path):
    (tmp_path / "in.csv").write_text("id,q\n1,a\n2,b\n")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("hi")
    for user in ("in.csv", "texts"):
        config = config_for(tmp_path, user, template="{q}")
        run, prompts = frozen_input(tmp_path, config)
        journal_of(run, "1.0.0", *(llmrun.journal_line(result(prompts, number, text="old")) for number in range(len(prompts))))
        folder = llmrun.write_results(run, config, llmrun.Marks(run, prompts))
        opened = {path.name: path.open() for path in folder.iterdir()}
        journal_of(run, "0.0.0", llmrun.journal_line(result(prompts, 0, text="new")))  # an earlier life's, which comes first
        llmrun.write_results(run, config, llmrun.Marks(run, prompts))
        for name, file in opened.items():
            with file:
                assert "old" in file.read() and "new" in (folder / name).read_text(), name
        assert len(opened) == len(list(folder.iterdir())) == 2


def test_a_file_that_could_not_be_written_is_what_it_was(tmp_path):
    path = tmp_path / "summary.json"
    llmrun.write_file(path, "old")
    with pytest.raises(OSError), llmrun.whole_file(path) as file:
        file.write(b"half of the n")
        file.flush()
        assert path.read_text() == "old"
        raise OSError(28, "No space left on device")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with llmrun.whole_file(tmp_path / "new.json") as file:
        file.write(b"{}")
        assert not (tmp_path / "new.json").exists(), "there is no half of a file"
    assert (tmp_path / "new.json").read_text() == "{}"


def test_a_csv_comes_back_with_its_answers(tmp_path):
    (tmp_path / "in.csv").write_text('id,q\n1,"a, b"\n2,c\n')
    config = config_for(tmp_path, "in.csv", template="{q}")
    config = llmrun.dataclasses.replace(config, results=llmrun.ResultsConfig(columns=["answer", "completion_tokens", "error"]))
    run, prompts = frozen_input(tmp_path, config)
    journal_of(run, "1.0.0", llmrun.journal_line(result(prompts, 1, status=0)), llmrun.journal_line(result(prompts, 0, text='say "x"\n')))
    folder = llmrun.write_results(run, config, llmrun.Marks(run, prompts))
    with open(folder / "in.csv", newline="") as file:
        assert list(csv.reader(file)) == [["id", "q", "answer", "completion_tokens", "error"], ["1", "a, b", 'say "x"\n', "3", ""],
                                          ["2", "c", "", "0", "it broke"]]


@pytest.mark.parametrize("body, text", [
    ({"choices": [{"message": {"content": "x"}}]}, "x"), ({"choices": [{"text": "y"}]}, "y"), ({}, ""),
    ({"choices": [{"message": {"content": None, "refusal": "no"}}]}, "no"), ({"data": [{"embedding": [1, 2]}]}, "[1, 2]"),
    ({"choices": [{"message": {"tool_calls": [{"id": 1}]}}]}, '[{"id": 1}]')])
def test_the_text_of_any_kind_of_answer(body, text):
    assert llmrun.answer_of(body)["answer"] == text


@pytest.mark.parametrize("body", [
    {"choices": None}, {"choices": [None]}, {"choices": "x"}, {"choices": {"0": 1}}, {"choices": [{"message": "x"}]}, {"data": 5},
    {"data": [5]}, {"usage": "much"}, {"choices": [{}], "usage": {"completion_tokens": "many"}}, {"usage": {"completion_tokens": [1]}}])
def test_an_answer_of_a_strange_shape_says_nothing_and_counts_as_empty(three, body):
    tally = llmrun.Tally()
    tally.add(result(three[2], 0)._replace(answer=body))
    assert llmrun.answer_of(body)["answer"] == "" and (tally.answers, tally.empty) == (1, 1)


def test_content_in_parts_is_kept_as_json():
    parts = [{"type": "text", "text": "x"}]
    assert json.loads(llmrun.answer_of({"choices": [{"message": {"content": parts}}]})["answer"]) == parts


def test_an_answer_with_half_of_a_character_is_written_like_any_other(tmp_path):
    (tmp_path / "in.csv").write_text("id,q\n1,a\n")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("hi")
    for user, written in (("in.csv", "in.csv"), ("texts", "a.txt")):
        config = config_for(tmp_path, user, template="{q}")
        run, prompts = frozen_input(tmp_path, config)
        body = json.dumps({"choices": [{"message": {"content": "half \ud83d"}}]}).encode()
        journal_of(run, "1.0.0", llmrun.journal_line(result(prompts, 0)._replace(body=body)))
        folder = llmrun.write_results(run, config, llmrun.Marks(run, prompts))
        assert "half ?" in (folder / written).read_text()


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content"])
def test_reasoning_is_kept_under_either_name(name):
    assert llmrun.answer_of({"choices": [{"message": {"content": "x", name: "since"}}]})["reasoning"] == "since"


@pytest.mark.parametrize("body", [{"error": {"message": "why"}}, {"error": "why"}, {"object": "error", "message": "why"}])
def test_the_words_of_an_error_in_every_engines_shape(body):
    assert llmrun.error_text(body) == "why"


@pytest.mark.parametrize("texts, finish, words", [
    (["", " "], "stop", "all 2 answers are empty"), (["same"] * 10, "stop", "are the same"),
    (["a", "b", "c"], "length", "3 of 3 answers of this job were cut off"), (["a", "b"], "stop", ""), (["same"] * 3, "stop", "")])
def test_answers_that_hardly_are_some_raise_a_doubt(three, texts, finish, words):
    _, _, prompts = three
    tally = llmrun.Tally()
    for text in texts:
        one = result(prompts, 0, text=text)
        one.answer["choices"][0]["finish_reason"] = finish
        tally.add(one)
    assert words in tally.doubt() and bool(words) == bool(tally.doubt())


def test_results_never_land_on_the_prompts(tmp_path):
    (tmp_path / "in.csv").write_text("q\nx\n")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("hi")
    for user, folder in (("in.csv", tmp_path), ("texts", tmp_path / "texts")):
        config = config_for(tmp_path, user, template="{q}")
        config = llmrun.dataclasses.replace(config, results=llmrun.ResultsConfig(folder=str(folder)))
        with pytest.raises(llmrun.UserError, match="overwrite the prompts"):
            llmrun.freeze(config, "m")


def test_a_skipped_text_moves_no_answer_to_another_name(tmp_path):
    (tmp_path / "texts").mkdir()
    for name in ("a\udcff.txt", "b.txt", "c.txt"):
        (tmp_path / "texts" / name).write_text(name[0])
    config = config_for(tmp_path, "texts", on_bad_row="skip")
    run, prompts = frozen_input(tmp_path, config)
    assert len(prompts) == 2
    journal_of(run, "1.0.0", *(llmrun.journal_line(result(prompts, number, text="BC"[number])) for number in range(2)))
    folder = llmrun.write_results(run, config, llmrun.Marks(run, prompts))
    assert {path.name: path.read_text() for path in folder.glob("*.txt")} == {"b.txt": "B", "c.txt": "C"}


@pytest.mark.parametrize("change", [lambda path: path.write_text("id,q\n2,b\n1,a\n"), lambda path: path.unlink()])
def test_a_table_that_was_changed_since_is_not_given_others_answers(tmp_path, change):
    (tmp_path / "in.csv").write_text("id,q\n1,a\n2,b\n")
    config = config_for(tmp_path, "in.csv", template="{q}", id_column="id")
    run, prompts = frozen_input(tmp_path, config)
    journal_of(run, "1.0.0", *(llmrun.journal_line(result(prompts, number, text="AB"[number])) for number in range(2)))
    folder = llmrun.write_results(run, config, llmrun.Marks(run, prompts))
    table = (folder / "in.csv").read_text()
    change(tmp_path / "in.csv")
    again = llmrun.Input.load(run, config, "m")
    llmrun.write_results(run, config, llmrun.Marks(run, again))
    assert (folder / "in.csv").read_text() == table and len((folder / "results.jsonl").read_text().splitlines()) == 2


def test_a_quote_without_an_end_is_named_where_it_begins(tmp_path):
    (tmp_path / "in.csv").write_text('id,text\n1,hello\n2,"unclosed\n3,good\n4,good\n')
    with pytest.raises(llmrun.UserError, match=r"in.csv:3: not CSV"):
        llmrun.freeze(config_for(tmp_path, "in.csv", template="{text}"), "m")


def test_results_that_could_not_be_written_leave_nothing_behind(three, monkeypatch):
    """A driver tries again each second while the disk is full: what each try leaves would fill it."""
    config, run, prompts = three

    def full(marks, states):
        yield 0, b"a line"
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(llmrun.Marks, "lines", full)
    with pytest.raises(OSError):
        llmrun.write_results(run, config, llmrun.Marks(run, prompts))
    assert list(run.results.iterdir()) == []


def test_a_lone_carriage_return_stays_in_its_cell():
    assert llmrun.csv_row(["1", "a\rb", "c\nd", "e"]) == b'1,"a\rb","c\nd",e\n'


def test_a_mark_at_the_beginning_of_a_file_is_no_text(tmp_path):
    row = json.dumps(batch_row("a")) + "\n"
    (tmp_path / "in.jsonl").write_text("\ufeff" + row + row.replace('"a"', '"b"'))
    _, prompts = frozen_input(tmp_path, config_for(tmp_path, "in.jsonl"))
    assert [prompts.prompt(number).custom_id for number in range(2)] == ["a", "b"] and prompts.splices[0]


@pytest.mark.parametrize("row, words", [
    ('{"id": "x\\ud800", "q": "hi"}', "half of a character"), ('{"id": "x", "q": "hi \\ud800"}', "half of a character"),
    ('{"id": "x", "q": "hi", "n": %s}' % ("[" * 100000 + "]" * 100000), "nested too deeply"),
    ('{"id": " ", "q": "hi"}', "its id is empty"), ('{"id": "x", "q": " "}', "empty prompt"), ('{"id": "x"}', "no column q")])
def test_a_row_that_cannot_be_asked_is_named_or_skipped(tmp_path, row, words):
    (tmp_path / "in.jsonl").write_text('{"id": "a", "q": "b"}\n' + row + "\n")
    with pytest.raises(llmrun.UserError, match=f"in.jsonl:2: .*{words}"):
        llmrun.freeze(config_for(tmp_path, "in.jsonl", template="{q}", id_column="id"), "m")
    frozen = llmrun.freeze(config_for(tmp_path, "in.jsonl", template="{q}", id_column="id", on_bad_row="skip"), "m")
    assert len(frozen) == 1 and "in.jsonl:2: " in frozen.skipped[0]


@pytest.mark.parametrize("layout", [(", ", ": "), (" , ", " : ")], ids=["cut", "read"])
@pytest.mark.parametrize("number", ["NaN", "-Infinity", "1e999", "-1E+0400", "9" * 400 + ".0"], ids=lambda number: number[:8])
def test_a_batch_row_with_a_number_that_is_none_is_refused(tmp_path, number, layout):
    rows = [json.dumps(batch_row(name), separators=layout) for name in "ab"]
    (tmp_path / "in.jsonl").write_text(rows[0] + "\n" + rows[1].replace('"messages"', f'"top_p": {number}, "messages"') + "\n")
    with pytest.raises(llmrun.UserError, match="in.jsonl:2: NaN"):
        llmrun.freeze(config_for(tmp_path, "in.jsonl"), "m")


def test_when_every_row_is_skipped_the_first_reason_is_told(tmp_path):
    (tmp_path / "in.jsonl").write_text("nonsense\nmore\n")
    with pytest.raises(llmrun.UserError, match="no row of it can be asked; the first: .*in.jsonl:1: not JSON"):
        llmrun.freeze(config_for(tmp_path, "in.jsonl", on_bad_row="skip"), "m")


def test_a_deep_row_can_be_asked_wherever_it_is_read(tmp_path):
    """Submit and driver stand at different depths of their own."""
    (tmp_path / "in.jsonl").write_text('{"id": "a", "q": %s}\n' % ("[" * 400 + "]" * 400))
    _, prompts = frozen_input(tmp_path, config_for(tmp_path, "in.jsonl", template="{q}", id_column="id"))
    assert "[[[[" in prompts.prompt(0).body.decode()


def test_a_skipped_empty_text_is_named_by_its_file(tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text(" \n")
    (tmp_path / "texts" / "b.txt").write_text("hi")
    frozen = llmrun.freeze(config_for(tmp_path, "texts", on_bad_row="skip"), "m")
    assert len(frozen) == 1 and "a.txt: the prompt is empty" in frozen.skipped[0]


@pytest.mark.parametrize("data, line", [(b"\x89PNG\r\n\x1a\n\0\1", 1), ("ok\nCaf\xe9\n".encode("latin-1"), 2)], ids=["image", "latin-1"])
def test_a_file_that_is_no_text_is_skipped_as_an_empty_one_is(tmp_path, data, line):
    """Else it is named, with the rule by which it is a prompt."""
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.png").write_bytes(data)
    (tmp_path / "texts" / "b.txt").write_text("hi")
    frozen = llmrun.freeze(config_for(tmp_path, "texts", on_bad_row="skip"), "m")
    assert len(frozen) == 1 and f"a.png: not UTF-8 text in line {line}" in frozen.skipped[0]
    with pytest.raises(llmrun.UserError, match=rf"a.png: not UTF-8 text in line {line}; every file in the folder is a prompt.*on_bad_row"):
        llmrun.freeze(config_for(tmp_path, "texts"), "m")


def test_what_editors_leave_behind_is_no_prompt_and_is_told(tmp_path):
    left = ["b.txt~", "#b.txt#", "a/c.txt.swp", "c.BAK", "d.txt.orig"]
    frozen = llmrun.freeze(texts(tmp_path, "b.txt", "a/c#1.txt", "#2.txt", ".#b.txt", "swp", *left), "m")
    assert len(frozen) == 4 and [line.partition(": ")[0] for line in frozen.skipped] == [
        str(tmp_path / "texts" / name) for name in sorted(left)]


def test_a_pipe_among_the_prompts_is_refused(tmp_path):
    (tmp_path / "texts").mkdir()
    os.mkfifo(tmp_path / "texts" / "pipe.txt")
    os.mkfifo(tmp_path / "in.jsonl")
    for user in ("texts", "in.jsonl"):
        with pytest.raises(llmrun.UserError, match="neither a f"):
            llmrun.freeze(config_for(tmp_path, user), "m")


def test_a_pattern_that_names_a_folder_and_what_is_in_it_asks_each_once(tmp_path):
    (tmp_path / "in" / "sub").mkdir(parents=True)
    write_jsonl(tmp_path / "in" / "one.jsonl", [batch_row("a")])
    write_jsonl(tmp_path / "in" / "sub" / "two.jsonl", [batch_row("b")])
    assert len(llmrun.freeze(config_for(tmp_path, "in/**"), "m")) == 2


def test_columns_named_like_a_batch_requests_are_columns(tmp_path):
    (tmp_path / "in.csv").write_text("custom_id,body\nx,hello\n")
    _, prompts = frozen_input(tmp_path, config_for(tmp_path, "in.csv", template="{body}", id_column="custom_id"))
    assert prompts.prompt(0).custom_id == "x" and b"hello" in prompts.prompt(0).body


@pytest.mark.parametrize("name", ["", "results.jsonl/{path}"])
def test_a_name_for_answers_that_is_no_file_name_is_refused(tmp_path, name):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("hi")
    config = config_for(tmp_path, "texts")
    config = llmrun.dataclasses.replace(config, results=llmrun.ResultsConfig(file_name=name))
    with pytest.raises(llmrun.UserError, match="cannot be a file"):
        llmrun.freeze(config, "m")


def test_a_long_name_gets_its_answer_too(tmp_path):
    (tmp_path / "texts").mkdir()
    name = "\N{ROLLING ON THE FLOOR LAUGHING}" * 61 + ".txt"
    (tmp_path / "texts" / name).write_text("hi")
    (tmp_path / ("t" * 246 + ".csv")).write_text("q\nhi\n")
    for user, kind in (("texts", name), ("t" * 246 + ".csv", "t" * 246 + ".csv")):
        config = config_for(tmp_path, user, template="{q}")
        run, prompts = frozen_input(tmp_path, config)
        journal_of(run, "1.0.0", llmrun.journal_line(result(prompts, 0)))
        assert (llmrun.write_results(run, config, llmrun.Marks(run, prompts)) / kind).exists()


def test_linked_folders_are_read_and_loops_of_them_end(tmp_path):
    for folder in ("texts", "more"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / f"{folder}.txt").write_text("hi")
    (tmp_path / "texts" / "linked").symlink_to(tmp_path / "more")
    (tmp_path / "more" / "back").symlink_to(tmp_path / "texts")
    assert llmrun.prompt_files(str(tmp_path / "texts")) == ["linked/more.txt", "texts.txt"]


def test_a_folder_that_cannot_be_read_is_not_passed_over(tmp_path, monkeypatch):
    def scandir(path, real=os.scandir):
        if os.path.basename(path) == "closed":
            raise PermissionError(13, "Permission denied", path)
        return real(path)
    (tmp_path / "texts" / "closed").mkdir(parents=True)
    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(llmrun.UserError, match="closed: cannot read the prompts"):
        llmrun.prompt_files(str(tmp_path / "texts"))


def test_two_tables_of_one_name_are_kept_apart(tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "in.csv").write_text(f"id,q\n{folder},x\n")
    config = config_for(tmp_path, "*/in.csv", template="{q}", id_column="id")
    run, prompts = frozen_input(tmp_path, config)
    journal_of(run, "1.0.0", *(llmrun.journal_line(result(prompts, number, text=f"re {number}")) for number in range(2)))
    folder = llmrun.write_results(run, config, llmrun.Marks(run, prompts))
    found = {path: path.read_text() for path in folder.rglob("*.csv")}
    assert sorted(found.values()) == ["id,q,answer\none,x,re 0\n", "id,q,answer\ntwo,x,re 1\n"]
    assert all(("one" in path.name) == ("one" in text) for path, text in found.items()), "and are told apart by where they come from"


def test_a_pattern_needs_no_id_column(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.csv").write_text("q\nx\ny\n")
    names = [p.custom_id for p in all_prompts(tmp_path, config_for(tmp_path, "*.csv", template="{q}"))]
    assert names == ["a-1", "a-2", "b-1", "b-2"]


def test_a_table_with_a_header_alone_does_no_harm(tmp_path):
    (tmp_path / "a.csv").write_text("q\n")
    (tmp_path / "b.csv").write_text("q\nx\n")
    assert len(all_prompts(tmp_path, config_for(tmp_path, "*.csv", template="{q}"))) == 1


@pytest.mark.parametrize("row, words", [('{"x": "bad \\ud83d"}', "lone surrogate"), ('{"x": "ok"}', "seed is no whole number")])
def test_what_could_not_be_sent_is_refused_before_anything_starts(tmp_path, row, words):
    (tmp_path / "in.jsonl").write_text(row + "\n")
    with pytest.raises(llmrun.UserError, match=words):
        llmrun.freeze(config_for(tmp_path, "in.jsonl", template="{x}", samples=2, params={"seed": "abc"} if "ok" in row else {}), "m")


def test_columns_of_one_name_are_refused_and_long_cells_are_not(tmp_path):
    (tmp_path / "in.csv").write_text("t,t\n1,2\n")
    with pytest.raises(llmrun.UserError, match="same name"):
        llmrun.freeze(config_for(tmp_path, "in.csv", template="{t}"), "m")
    (tmp_path / "in.csv").write_text("t\n" + "x" * 200000 + "\n")
    assert len(all_prompts(tmp_path, config_for(tmp_path, "in.csv", template="{t}"))) == 1


def test_rows_that_are_read_together_are_each_whole(tmp_path):
    """Neighbours are read in pieces of 64 KiB: some row crosses every edge, and one is longer than a piece."""
    rows = [{"id": str(number), "q": f"<{number}>" + "x" * (number * 37 % 3000) + f"</{number}>"} for number in range(300)]
    rows[150]["q"] = "<150>" + "y" * 200000 + "</150>"
    write_jsonl(tmp_path / "in.jsonl", rows)
    _, prompts = frozen_input(tmp_path, config_for(tmp_path, "in.jsonl", template="{q}", id_column="id"))
    for number in [*range(300), 299, 0, 151, 150, 7]:
        prompt = prompts.prompt(number)
        assert (prompt.custom_id, json.loads(prompt.body)["messages"][0]["content"]) == (str(number), rows[number]["q"])


def texts(tmp_path, *names):
    """A folder of prompts whose text is their name."""
    for name in names:
        (tmp_path / "texts" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "texts" / name).write_text(name)
    return config_for(tmp_path, "texts")


def test_hidden_files_are_no_prompts(tmp_path):
    config = texts(tmp_path, "b.txt", "a/c.txt", ".b.txt.swp", ".git/config", "a/.DS_Store")
    assert [prompt.custom_id for prompt in all_prompts(tmp_path, config)] == ["a/c.txt", "b.txt"]


def answered(run, config, prompts, *lines):
    """The texts among the results once these lines stand in the journal."""
    journal_of(run, "1.0.0", *lines)
    folder = llmrun.write_results(run, config, llmrun.Marks(run, prompts))
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*.txt")}


def test_texts_of_one_name_in_two_folders_get_two_answers(tmp_path):
    config = texts(tmp_path, "a/x.txt", "b/x.txt")
    config = llmrun.dataclasses.replace(config, results=llmrun.ResultsConfig(file_name="answer_{name}.txt"))
    run, prompts = frozen_input(tmp_path, config)
    found = answered(run, config, prompts, *(llmrun.journal_line(result(prompts, number, text="AB"[number])) for number in range(2)))
    assert found == {"answer_a_x.txt.txt": "A", "answer_b_x.txt.txt": "B"}


def test_each_sample_of_a_text_has_a_file_of_its_own(tmp_path):
    texts(tmp_path, "a.txt", "b.txt")
    config = config_for(tmp_path, "texts", samples=2)
    run, prompts = frozen_input(tmp_path, config)
    found = answered(run, config, prompts, *(llmrun.journal_line(result(prompts, number, text=str(number))) for number in range(4)))
    assert found == {"a.1.txt": "0", "a.2.txt": "1", "b.1.txt": "2", "b.2.txt": "3"}


def test_errors_that_were_mended_do_not_stay_beside_the_results(three):
    config, run, prompts = three
    journal_of(run, "1.0.0", llmrun.journal_line(result(prompts, 0, 500)))
    assert (llmrun.write_results(run, config, llmrun.Marks(run, prompts)) / "errors.jsonl").exists()
    journal_of(run, "2.0.0", llmrun.journal_line(result(prompts, 0)))
    assert not (llmrun.write_results(run, config, llmrun.Marks(run, prompts)) / "errors.jsonl").exists()


def test_failures_that_are_forgotten_are_asked_again_and_nothing_else(three):
    _, run, prompts = three
    journal_of(run, "1.0.0", llmrun.journal_line(result(prompts, 0)), llmrun.journal_line(result(prompts, 1, 400)))
    places = llmrun.Marks(run, prompts).places()
    journal_of(run, "2.0.0", llmrun.journal_line(result(prompts, 2, 400)))
    marks = llmrun.Marks(run, prompts, places)
    assert list(marks.state) == [marks.DONE, marks.OPEN, marks.FAILED]


# ── results that two write at once ─────────────────────────────────────────────


@pytest.mark.parametrize("moment", ["after", "in the middle"])
def test_an_older_set_of_results_never_replaces_a_newer_one(tmp_path, moment):
    """`results` read the journals, and then a driver that had the rest wrote them all: in whatever files."""
    (tmp_path / "in.csv").write_text("id,q\n1,a\n2,b\n3,c\n")
    (tmp_path / "texts").mkdir()
    for name in "abc":
        (tmp_path / "texts" / f"{name}.txt").write_text(f"Hi {name}")
    for user in ("in.csv", "texts"):
        config = config_for(tmp_path, user, template="{q}")
        run, prompts = frozen_input(tmp_path, config)
        journal_of(run, "1.0.0", llmrun.journal_line(result(prompts, 0, text="old")), llmrun.journal_line(result(prompts, 1, 500)))
        written = []

        class Slow(llmrun.Marks):
            def lines(self, states):
                yield from super().lines(states)
                if moment == "in the middle" and not written:
                    newer()

        def newer():
            written.append(llmrun.write_results(run, config, llmrun.Marks(run, prompts)))
        older = Slow(run, prompts)
        journal_of(run, "2.0.0", *(llmrun.journal_line(result(prompts, number, text="new")) for number in (1, 2)))
        if moment == "after":
            newer()
        folder = llmrun.write_results(run, config, older)
        found = {path.name: path.read_text() for path in folder.iterdir()}
        assert written and len(found["results.jsonl"].splitlines()) == 3
        newer()
        assert found == {path.name: path.read_text() for path in folder.iterdir()}


def test_results_after_failures_were_asked_again_are_newer_though_fewer_failed(three):
    """What makes a set the newer one is what it knows of the journals, and no count of files or lines."""
    config, run, prompts = three
    journal_of(run, "1.0.0", *(llmrun.journal_line(result(prompts, number, 500)) for number in range(3)))
    llmrun.write_results(run, config, llmrun.Marks(run, prompts))
    older = llmrun.Marks(run, prompts)
    journal_of(run, "2.0.0", llmrun.journal_line(result(prompts, 1)))
    folder = llmrun.write_results(run, config, llmrun.Marks(run, prompts))
    for _ in range(2):
        llmrun.write_results(run, config, older)
        assert [len((folder / name).read_text().splitlines()) for name in ("results.jsonl", "errors.jsonl")] == [1, 2]


@pytest.mark.parametrize("umask", [0o000, 0o007, 0o022, 0o077])
def test_answers_are_the_users_to_share_and_what_is_ours_stays_closed(tmp_path, umask):
    (tmp_path / "in.csv").write_text("q\nx\ny\n")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("hi")
    before = os.umask(umask)
    try:
        config = config_for(tmp_path, "[it][ne]*[sv]", template="{q}")
        config = llmrun.dataclasses.replace(config, results=llmrun.ResultsConfig(folder=str(tmp_path / "answers")))
        run, prompts = frozen_input(tmp_path, config)
        journal_of(run, "1.0.0", *(llmrun.journal_line(result(prompts, number, 400 if number == 1 else 200)) for number in range(len(prompts))))
        folder = llmrun.write_results(run, config, llmrun.Marks(run, prompts))
        assert llmrun.main(["init", str(tmp_path / "new")]) == 0
    finally:
        os.umask(before)
    written = [*folder.iterdir(), tmp_path / "new" / "config.toml", *(tmp_path / "new" / "prompts").glob("**/*.txt")]
    assert {path.name for path in folder.iterdir()} == {"results.jsonl", "errors.jsonl", "in.csv", "a.txt"} and len(written) == 8
    assert {path.name: oct(path.stat().st_mode & 0o777) for path in written} == {path.name: oct(0o666 & ~umask) for path in written}
    assert run.folder.stat().st_mode & 0o777 == 0o700 and run.key_file.stat().st_mode & 0o777 == 0o600


def test_many_tables_are_merged_in_one_reading_of_the_journals(tmp_path):
    (tmp_path / "in").mkdir()
    for number in range(50):
        (tmp_path / "in" / f"{number:02d}.csv").write_text("q\n" + "".join(f"{number}-{row}\n" for row in range(20)))
    config = config_for(tmp_path, "in/*.csv", template="{q}")
    run, prompts = frozen_input(tmp_path, config)
    journal_of(run, "1.0.0", *(llmrun.journal_line(result(prompts, number, text=f"answer {number}")) for number in range(1000)))
    marks = llmrun.Marks(run, prompts)
    size = (run.journal / "1.0.0.0.jsonl").stat().st_size
    assert bytes_read(lambda: llmrun.write_results(run, config, marks)) < 8 * size
    with open(run.results / "49.csv", newline="") as file:
        assert list(csv.reader(file))[1:] == [[f"49-{row}", f"answer {980 + row}"] for row in range(20)]


def test_an_answers_file_that_is_right_is_left_alone(tmp_path):
    (tmp_path / "texts").mkdir()
    for name in "abcd":
        (tmp_path / "texts" / f"{name}.txt").write_text(f"Say {name}.")
    config = config_for(tmp_path, "texts")
    run, prompts = frozen_input(tmp_path, config)
    journal_of(run, "2.0.0", *(llmrun.journal_line(result(prompts, number, text=f"old {number}")) for number in range(4)))
    folder = llmrun.write_results(run, config, llmrun.Marks(run, prompts))
    before = {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.glob("*.txt")}
    journal_of(run, "1.0.0", llmrun.journal_line(result(prompts, 1, text="new 1")))  # an earlier life's, which comes first
    (folder / "c.txt").unlink()
    (folder / "d.txt").write_text("odd 3")
    llmrun.write_results(run, config, llmrun.Marks(run, prompts))
    after = {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.glob("*.txt")}
    assert [(folder / f"{name}.txt").read_text() for name in "abcd"] == ["old 0", "new 1", "old 2", "old 3"]
    assert after["a.txt"] == before["a.txt"]


def test_names_that_look_like_samples_are_told_apart_from_them(tmp_path):
    write_jsonl(tmp_path / "in.jsonl", [batch_row(name) for name in ("a", "a#1", "a#2", "a#1#1")])
    names = [prompt.custom_id for prompt in all_prompts(tmp_path, config_for(tmp_path, "in.jsonl", samples=2))]
    assert len(set(names)) == len(names) == 8


@pytest.mark.parametrize("names", [["texts/a", "texts/a.1/b"], ["texts/t.csv", "t.1.csv"]], ids=str)
def test_answers_that_meet_only_as_samples_are_refused_at_submit(tmp_path, names):
    """The first sample's answer to a goes to a.1, and to t.csv to t.1.csv."""
    for name in names:
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_text("q\nhi\n")
    llmrun.freeze(config_for(tmp_path, "in/*", template="{q}"), "m")
    with pytest.raises(llmrun.UserError) as caught:
        llmrun.freeze(config_for(tmp_path, "in/*", template="{q}", samples=2), "m")
    assert "results" in str(caught.value) and re.search(r"a\.1|t\.1\.csv|samples", str(caught.value)) and caught.value.mend


def table_of(run, config, prompts, separator=","):
    """The rows of a run's only table, all its prompts answered."""
    journal_of(run, "1.0.0", *(llmrun.journal_line(result(prompts, number, text=f"A{number}")) for number in range(len(prompts))))
    folder = llmrun.write_results(run, config, llmrun.Marks(run, prompts))
    with open(folder / os.path.basename(config.prompts.user), newline="") as file:
        return list(csv.reader(file, delimiter=separator, strict=True))


def test_a_column_of_the_input_that_is_named_like_one_of_the_answers_is_kept_apart_and_told(tmp_path):
    """Whoever reads the table by its names would find only one of the two."""
    (tmp_path / "in.csv").write_text("id,q,answer,error,answer_2\n1,x,the right one,none,another\n")
    config = config_for(tmp_path, "in.csv", template="{q}")
    told, = llmrun.freeze(config, "m").notes
    assert told == f"{tmp_path}/in.csv has a column answer of its own: the new one is called answer_3"
    rows = table_of(*frozen_input(tmp_path, config)[:1], config, frozen_input(tmp_path, config)[1])
    assert rows == [["id", "q", "answer", "error", "answer_2", "answer_3"], ["1", "x", "the right one", "none", "another", "A0"]]
    config = llmrun.dataclasses.replace(config, results=llmrun.ResultsConfig(columns=["reasoning"]))
    assert not llmrun.freeze(config, "m").notes


def test_samples_are_told_apart_by_the_same_numbers_in_every_file(tmp_path):
    (tmp_path / "in.csv").write_text("q,sample\nx,s1\ny,s2\n")
    config = config_for(tmp_path, "in.csv", template="{q}", samples=2, params={"seed": 10})
    run, prompts = frozen_input(tmp_path, config)
    assert table_of(run, config, prompts) == [
        ["q", "sample", "sample_2", "seed", "answer"], ["x", "s1", "1", "10", "A0"], ["x", "s1", "2", "11", "A1"],
        ["y", "s2", "1", "10", "A2"], ["y", "s2", "2", "11", "A3"]]
    records = [json.loads(line) for line in (run.results / "results.jsonl").read_text().splitlines()]
    assert [(record["custom_id"], record["llmrun"]["row"], record["llmrun"]["sample"], record["llmrun"]["seed"]) for record in records] == [
        ("in-1#1", 1, 1, 10), ("in-1#2", 1, 2, 11), ("in-2#1", 2, 1, 10), ("in-2#2", 2, 2, 11)]


@pytest.mark.parametrize("name, separator", [("in.csv", ";"), ("in.csv", "\t"), ("in.tsv", "\t"), ("in.TSV", "\t")])
def test_a_table_may_be_separated_otherwise_and_comes_back_so(tmp_path, name, separator):
    rows = [["id", "of", "text, or more"], ["1", "x", "sea, deep"], ["2", "y", f"a{separator}b"], ["3", "z", "line one\nline two"]]
    with open(tmp_path / name, "w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file, delimiter=separator).writerows(rows)
    config = config_for(tmp_path, name, template="{text, or more}", id_column="id")
    run, prompts = frozen_input(tmp_path, config)
    assert [prompts.prompt(number).custom_id for number in range(3)] == ["1", "2", "3"]
    assert [json.loads(prompts.prompt(number).body)["messages"][0]["content"] for number in range(3)] == [row[2] for row in rows[1:]]
    assert table_of(run, config, prompts, separator) == [row + ["answer" if not n else f"A{n - 1}"] for n, row in enumerate(rows)]


def test_a_comma_separates_where_nothing_else_does_so_more(tmp_path):
    (tmp_path / "in.csv").write_text('id,"a; b; c",q;r\n1,x,y\n')
    _, prompts = frozen_input(tmp_path, config_for(tmp_path, "in.csv", template="{a; b; c}"))
    assert b'"x"' in prompts.prompt(0).body


@pytest.mark.parametrize("seed", ["x", 1.5, [1]])
def test_a_seed_for_all_that_is_no_whole_number_is_not_blamed_on_a_row(tmp_path, seed):
    write_jsonl(tmp_path / "in.jsonl", [batch_row("a")])
    with pytest.raises(llmrun.UserError, match=r"\[prompts\] params = .*seed") as caught:
        llmrun.freeze(config_for(tmp_path, "in.jsonl", params={"seed": seed}, on_bad_row="skip"), "m")
    assert "in.jsonl:1" not in str(caught.value) and caught.value.mend
    write_jsonl(tmp_path / "in.jsonl", [batch_row("a", {"messages": [{"role": "user", "content": "x"}], "seed": seed})])
    with pytest.raises(llmrun.UserError, match="in.jsonl:1: its seed"):
        llmrun.freeze(config_for(tmp_path, "in.jsonl", params={"seed": 1}), "m")


@pytest.mark.parametrize("layout", [(", ", ": "), (" , ", " :  ")], ids=["cut", "read"])
def test_a_job_that_joins_with_another_model_names_that_one(tmp_path, layout):
    """However the rows are laid out: those alike are cut, not read."""
    rows = [batch_row(f"r{number}", {"messages": [{"role": "user", "content": "hi"}]}) for number in range(2)]
    rows += [batch_row("own", {"messages": [{"role": "user", "content": "hi"}], "model": "its own"})] * (layout[0] != ", ")
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row, separators=layout) + "\n" for row in rows))
    config = config_for(tmp_path, "in.jsonl", params={"top_k": 4})
    run, first = frozen_input(tmp_path, config)
    joined = llmrun.Input.load(run, config, "another")
    assert [json.loads(first.prompt(number).body)["model"] for number in range(2)] == ["m", "m"]
    assert [json.loads(joined.prompt(number).body) for number in range(2)] == [
        {"model": "another", "max_tokens": 1024, "top_k": 4, **row["body"]} for row in rows[:2]]
    assert layout[0] == ", " or json.loads(joined.prompt(2).body)["model"] == "its own"


@pytest.mark.parametrize("timings, time_s, waited_s", [
    ({"prompt_ms": 500.0, "predicted_ms": 1000.0}, 1.5, 0.5), ({"prompt_ms": 9000.0, "predicted_ms": 1.0}, 2.0, 0.0), (None, 2.0, 0.0),
    ({"prompt_ms": None}, 2.0, 0.0)])
def test_the_time_of_an_answer_is_its_engines_and_what_it_waited_stands_apart(timings, time_s, waited_s):
    body = {"choices": [{"message": {"content": "x"}}], **({"timings": timings} if timings else {})}
    found = llmrun.columns_of({"custom_id": "a", "response": {"body": body}, "llmrun": {"ok": True, "sample": 1, "time_s": 2.0}})
    assert (found["time_s"], found["waited_s"]) == (time_s, waited_s)


@pytest.mark.parametrize("user, keys, words", [
    ("texts", {"template": "Say {x}"}, "[prompts] template has no effect: each prompt is a text file"),
    ("in.jsonl", {"template": "Say {x}", "id_column": "x"}, "[prompts] template has no effect: each prompt is a Batch request"),
    ("in.jsonl", {"system": "system.txt"}, "[prompts] system has no effect: each prompt is a Batch request"),
    ("rows.csv", {"template": "Say {x}", "params": {"temprature": 0.2}}, '[prompts.params] temprature is sent as it is; did you mean "temperature"?')])
def test_a_key_to_no_effect_and_a_misspelt_parameter_are_noted(tmp_path, user, keys, words):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("Why?")
    (tmp_path / "system.txt").write_text("Be short.")
    (tmp_path / "rows.csv").write_text("x\n1\n")
    (tmp_path / "in.jsonl").write_text(json.dumps({"custom_id": "a", "body": {"messages": [{"role": "user", "content": "Why?"}]}}))
    keys = {**keys, "system": str(tmp_path / "system.txt")} if "system" in keys else keys
    notes = llmrun.freeze(config_for(tmp_path, user, **keys), "m").notes
    assert words in notes[0] and len(notes) == len(keys) - ("params" in keys), notes


def test_what_has_an_effect_is_not_noted(tmp_path):
    (tmp_path / "rows.csv").write_text("x,y\n1,2\n")
    (tmp_path / "system.txt").write_text("Be short.")
    keys = {"template": "Say {x}", "id_column": "y", "system": str(tmp_path / "system.txt"), "params": {"temperature": 0.2, "top_k": 3, "my_own": 1}}
    assert llmrun.freeze(config_for(tmp_path, "rows.csv", **keys), "m").notes == []


def with_context(tmp_path, context, rows, **prompts):
    """The config of a Batch file for llama.cpp, with so many tokens of context."""
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"custom_id": str(number), "body": {
        "messages": [{"role": "user", "content": text}], **keys}}) + "\n" for number, (text, keys) in enumerate(rows)))
    config = config_for(tmp_path, "in.jsonl", **prompts)
    return llmrun.dataclasses.replace(config, engine=llmrun.EngineConfig(context=context))


def test_prompts_and_answers_too_long_for_the_context_are_counted_and_the_longest_told(tmp_path):
    config = with_context(tmp_path, 1024, [("short", {}), ("word " * 16016, {"max_tokens": 4096}), ("word " * 1000, {})])
    notes = llmrun.freeze(config, "m").notes
    assert len(notes) == 2 and all("[engine] context = 1024" in note for note in notes)
    assert "2 of 3 prompts" in notes[0] and "about 20020 tokens" in notes[0]
    assert "1 of 3 prompts" in notes[1] and "4096" in notes[1]
    assert llmrun.freeze(with_context(tmp_path, 1024, [("a" * 4096, {})]), "m").notes == []
    assert "1 of 1" in llmrun.freeze(with_context(tmp_path, 1024, [("a", {})], max_tokens=2000), "m").notes[0]


def test_a_prompt_that_cannot_fit_is_a_bad_row(tmp_path):
    rows = [("fits", {}), ("a" * (256 * 256 + 1), {})]
    with pytest.raises(llmrun.UserError, match="in.jsonl:2: its 65537 bytes are more than 256 tokens can hold"):
        llmrun.freeze(with_context(tmp_path, 256, rows, max_tokens=9), "m")
    frozen = llmrun.freeze(with_context(tmp_path, 256, rows, max_tokens=9, on_bad_row="skip"), "m")
    assert len(frozen) == 1 and len(frozen.skipped) == 1


def test_the_texts_of_a_prompt_are_measured_in_whatever_shape_they_come(tmp_path):
    parts = [{"type": "text", "text": "ab"}, {"type": "image_url", "image_url": {"url": "data:" + "A" * 9000}}]
    assert llmrun.text_bytes([{"role": "user", "content": parts}, {"role": "user", "content": "\u00e9"}, 7, None]) == 4
    lengths = llmrun.Lengths(llmrun.Config(engine=llmrun.EngineConfig(context=256)))
    lengths.add(llmrun.EMBEDDINGS, {"input": ["a" * 1000] * 9 + ["b" * 1028]})
    lengths.add(llmrun.COMPLETIONS, {"prompt": "a" * 1024})
    assert (lengths.prompts, lengths.too_long, lengths.longest) == (2, 1, 257)
