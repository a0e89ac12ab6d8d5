"""Whether each answer of a run is the answer to its own question.

What a prompt asks is found here from the user's own files and config, with nothing of llmrun, and held against what
the engine says it was asked: the fake llama-server begins each answer with a digest of the whole request, the echo
repeats the question, and a real llama.cpp with the tiny model, whose tokens are bytes, counts the prompt's tokens."""

import csv
import json
import os
import re
from pathlib import Path
from typing import NamedTuple

from fakes.llama import mark_of

LIMITS = {"max_tokens", "max_completion_tokens", "n_predict"}


class Question(NamedTuple):
    """One request that is to be sent."""

    custom_id: str
    source: Path  # the file or folder that it stands in
    place: str  # SOURCE_ROW_SAMPLE
    body: dict
    row: dict  # of a table; else None


def text_of(folder, value):
    """A text that stands in the config, or in the file that it names."""
    path = folder / value
    return path.read_text() if value and "{" not in value and path.is_file() else value


def filled(template, row):
    for name, value in row.items():
        template = template.replace("{%s}" % name, value if isinstance(value, str) else json.dumps(value))
    return template


def rows_of(path):
    with open(path, newline="", encoding="utf-8-sig") as file:
        return list(csv.DictReader(file)) if path.suffix == ".csv" else [json.loads(line) for line in file if line.strip()]


def questions(folder, config):
    """{custom_id: Question} of all that this config in this folder asks."""
    prompts, asked = config["prompts"], {}
    engine = config.get("engine", {}).get("name", "llama.cpp")
    model = config.get("model", {})
    model = model.get("name") or os.path.basename(model.get("path", "")) or engine
    base = {"model": model, **prompts.get("params", {})}
    system = text_of(folder, prompts.get("system", ""))
    template = text_of(folder, prompts.get("template", ""))

    def add(custom_id, source, number, body, row=None):
        if not LIMITS & ({*base, *body}):
            body = {"max_tokens": prompts.get("max_tokens", 1024), **body}
        body, samples = {**base, **body}, prompts.get("samples", 1)
        for sample in range(samples):
            one, name = body, custom_id
            if samples > 1:
                one, name = {**body, "seed": body.get("seed", 0) + sample}, f"{custom_id}#{sample + 1}"
            asked[name] = Question(name, sources[source], f"{source}_{number}_{sample}", one, row)

    def chat(words, text):
        return {"messages": [{"role": "system", "content": words}] * bool(words) + [{"role": "user", "content": text}]}

    user = prompts.get("user", "prompts/user")
    sources = sorted(folder.glob(user)) if "*" in user else [folder / user]
    for source, path in enumerate(sources):
        if path.is_dir():
            names = sorted(str(file.relative_to(path)) for file in path.rglob("*") if file.is_file())
            for number, name in enumerate(names):
                add(name, source, number, chat(system, (path / name).read_bytes().decode()))
            continue
        for number, row in enumerate(rows_of(path)):
            if isinstance(row.get("body"), dict):
                add(row["custom_id"], source, number, row["body"])
                continue
            column = prompts.get("id_column")
            name = row[column] if column else f"{path.stem}-{number + 1}"
            add(name, source, number, chat(filled(system, row), filled(template, row)), row)
    return asked


def said_by(body):
    if "data" in body:
        return json.dumps([vector["embedding"] for vector in body["data"]])
    return body["choices"][0]["message"]["content"] or ""


def check_answer(question, body, engine, may_be_empty=False):
    """The body of an answer is one to this question: to its messages and to each of its parameters."""
    about = f"{question.custom_id} was answered"
    if "input" in question.body:
        inputs = question.body["input"]
        assert len(body["data"]) == (len(inputs) if isinstance(inputs, list) else 1), f"{about} with {len(body['data'])} vectors"
        return
    if engine == "real":
        counted = body["usage"]["prompt_tokens"]
        assert counted == tiny_tokens(question.body["messages"]), f"{about} as a prompt of {counted} tokens: {question.body}"
        assert body["usage"]["completion_tokens"] <= min(question.body.get(name, 10**9) for name in LIMITS), body
        return
    said = said_by(body)
    if engine == "echo":
        assert said == question.body["messages"][-1]["content"], f"{about} with {said!r}: {question.body}"
    elif said or not may_be_empty:
        mark = mark_of(question.body)
        assert len(said) >= 4 and said[:8] == mark[:len(said)], f"{about} with {said!r}, not {mark}…: {question.body}"


def tiny_tokens(messages):
    """How many tokens the tiny model's chat template makes of them: each byte is one, but "th" and the two marks."""
    def cost(text):
        return len(text.encode()) - len(re.findall("th", text))
    return sum(4 + cost(message["role"]) + cost(message["content"]) for message in messages) + 2 + cost("assistant")


def check_run(run, folder, config, asked, real=False):
    """Every answer of a run, wherever it is kept, is the answer to its own question."""
    engine = config.get("engine", {}).get("name", "llama.cpp")
    if real and engine == "llama.cpp":
        engine = "real"
    may_be_empty = "FAKE_LLAMA_EMPTY" in config.get("environment", {}).get("vars", {})
    wanted = config.get("results", {})
    results = next(folder.glob(wanted["folder"]), run / "none") if wanted.get("folder") else run / "results"
    merged, texts = results / "results.jsonl", {}
    for path in [*run.glob("journal/*.jsonl"), *([merged] if merged.exists() else [])]:
        for line in path.read_text().split("\n")[:-1]:
            record = json.loads(line)
            question = asked[record["custom_id"]]
            own, response = record["llmrun"], record["response"]
            assert record["id"] == "batch_req_" + question.place and question.place.endswith(f"_{own['row'] - 1}_{own['sample'] - 1}"), record
            assert response is None or response["request_id"] == "req_" + question.place, record
            if own["ok"]:
                check_answer(question, response["body"], engine, may_be_empty)
                if path == merged:
                    texts[question.custom_id] = said_by(response["body"])
    if merged.exists():
        assert list(texts) == [name for name in asked if name in texts], "results.jsonl is in the order of the input"
        failed = results / "errors.jsonl"
        settled = {*texts, *(record["custom_id"] for record in (rows_of(failed) if failed.exists() else []))}
        check_texts(results, wanted.get("file_name", "{path}"), asked, texts)
        check_tables(results, [question for name, question in asked.items() if name in settled], texts, wanted.get("columns", ["answer"]))


def check_texts(results, file_name, asked, texts):
    """A text file holds the answer to the prompt that it is named for, and only answered prompts have one."""
    expected = {}
    for name, text in texts.items():
        if asked[name].source.is_dir():
            path, _, sample = name.partition("#")
            stem, ending = os.path.splitext(file_name.replace("{path}", path).replace(
                "{name}", os.path.splitext(os.path.basename(path))[0]))
            expected[stem + (f".{sample}" if sample else "") + ending] = text
    found = {str(path.relative_to(results)): path.read_bytes().decode() for path in results.rglob("*.txt")}
    assert found == expected, "the text files are the answers to the prompts of their names"


def check_tables(results, settled, texts, columns):
    """A row of a CSV is one of the input's, in its order, beside the answer to it."""
    for path in results.glob("*.csv"):
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file))
        own = [question for question in settled if question.source.name == path.name]
        assert [{name: row[name] for name in question.row} for row, question in zip(rows, own)] == [
            question.row for question in own] and len(rows) == len(own), f"{path.name}: {rows}"
        for row, question in zip(rows, own) if "answer" in columns else ():
            assert row["answer"] == texts.get(question.custom_id, ""), f"{path.name}: {row}"
