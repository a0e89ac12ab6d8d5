"""The check of the answers sees each way in which one can stand beside another's question."""

import csv
import json

import pytest
from answers import check_run, questions, tiny_tokens
from fakes.llama import mark_of

TEXTS = {"model": {"path": "m.gguf"}, "prompts": {"user": "texts", "system": "system.txt", "samples": 2, "params": {"seed": 5}}}
TABLE = {"model": {"path": "m.gguf"}, "prompts": {"user": "in.csv", "template": "Say {word}.", "id_column": "word"}}


class Kept:
    """A run's files, made by hand from its questions."""

    def __init__(self, folder, config, tokens=None):
        (folder / "texts" / "sub").mkdir(parents=True)
        for name in ("a.txt", "sub/b.txt"):
            (folder / "texts" / name).write_text(f"What is {name}?")
        (folder / "system.txt").write_text("Be brief.")
        (folder / "in.csv").write_text("word,n\nsea,1\nsky,2\n")
        self.folder, self.config, self.run = folder, config, folder / "run"
        self.asked, self.results = questions(folder, config), self.run / "results"
        for path in (self.run / "journal", self.results / "sub"):
            path.mkdir(parents=True)
        lines = [self.line(question, tokens) for question in self.asked.values()]
        self.journal, self.merged = self.run / "journal" / "1.0.0.0.jsonl", self.results / "results.jsonl"
        for path in (self.journal, self.merged):
            path.write_text("".join(lines))
        if config is TEXTS:
            for name, question in self.asked.items():
                path, _, sample = name.partition(".txt#")
                (self.results / f"{path}.{sample}.txt").write_text(self.said(question))
        else:
            with open(self.results / "in.csv", "w") as file:
                rows = csv.writer(file)
                rows.writerow(["word", "n", "answer"])
                rows.writerows([*question.row.values(), self.said(question)] for question in self.asked.values())

    def said(self, question):
        return f"{mark_of(question.body)} and more"

    def line(self, question, tokens):
        row, sample = map(int, question.place.split("_")[1:])
        body = {"choices": [{"message": {"content": self.said(question)}}],
                "usage": {"completion_tokens": 3, "prompt_tokens": tokens and tokens(question.body["messages"])}}
        return json.dumps({"id": f"batch_req_{question.place}", "custom_id": question.custom_id, "response": {
            "status_code": 200, "request_id": f"req_{question.place}", "body": body}, "error": None,
            "llmrun": {"row": row + 1, "sample": sample + 1, "ok": True}}) + "\n"

    def check(self, real=False):
        check_run(self.run, self.folder, self.config, self.asked, real)


def swap(path, *words):
    """Exchange two words everywhere in a file."""
    text = path.read_text().replace(words[0], "\0").replace(words[1], words[0]).replace("\0", words[1])
    path.write_text(text)


def marks(kept):
    return [mark_of(question.body) for question in kept.asked.values()]


def test_what_is_as_it_should_be_is_well(tmp_path):
    for name, config in (("texts", TEXTS), ("table", TABLE)):
        (tmp_path / name).mkdir()
        kept = Kept(tmp_path / name, config)
        kept.check()
        assert len(set(marks(kept))) == len(kept.asked) == len(kept.merged.read_text().splitlines()) == (4 if config is TEXTS else 2)


@pytest.mark.parametrize("tamper", [
    lambda kept: swap(kept.journal, *marks(kept)[:2]), lambda kept: swap(kept.merged, *marks(kept)[:2]),
    lambda kept: swap(kept.journal, "a.txt#1", "a.txt#2"), lambda kept: swap(kept.merged, "0_1_0", "0_1_1"),
    lambda kept: swap(kept.merged, '"row": 1', '"row": 2'),
    lambda kept: kept.merged.write_text("".join(kept.merged.read_text().splitlines(True)[::-1])),
    lambda kept: swap(kept.results / "a.1.txt", *marks(kept)[:2]), lambda kept: (kept.results / "a.1.txt").unlink(),
    lambda kept: (kept.results / "c.txt").write_text("whose?"), lambda kept: kept.merged.write_text(""),
    lambda kept: kept.journal.write_text(kept.journal.read_text().replace(f"{marks(kept)[0]} and more", ""))],
    ids="journal merged names places rows order text missing strange nothing empty".split())
def test_another_answer_beside_a_text_is_seen(tmp_path, tamper):
    kept = Kept(tmp_path, TEXTS)
    tamper(kept)
    with pytest.raises(AssertionError):
        kept.check()


@pytest.mark.parametrize("change", [
    {"system": ""}, {"samples": 1}, {"params": {}}, {"params": {"seed": 6}}, {"max_tokens": 3}, {"model": "other"}], ids=str)
def test_a_part_of_the_question_that_was_lost_is_seen(tmp_path, change):
    """The run was asked without something, or with something else, and all else is as it should be."""
    config = {"model": {"path": change.get("model", "m.gguf")}, "prompts": {**TEXTS["prompts"], **change}}
    kept = Kept(tmp_path, TEXTS)
    kept.asked = questions(tmp_path, config)
    with pytest.raises((AssertionError, KeyError)):
        kept.check()


@pytest.mark.parametrize("tamper", [
    lambda kept: swap(kept.results / "in.csv", *marks(kept)), lambda kept: swap(kept.results / "in.csv", "sea", "sky"),
    lambda kept: (kept.results / "in.csv").write_text((kept.results / "in.csv").read_text().partition("sky")[0])],
    ids="answers rows short".split())
def test_another_answer_beside_a_row_is_seen(tmp_path, tamper):
    kept = Kept(tmp_path, TABLE)
    tamper(kept)
    with pytest.raises(AssertionError):
        kept.check()


def test_of_a_real_engine_the_count_of_tokens_is_compared(tmp_path):
    kept = Kept(tmp_path, TABLE, tiny_tokens)
    kept.check(real=True)
    (tmp_path / "other").mkdir()
    with pytest.raises(AssertionError, match="as a prompt of"):
        Kept(tmp_path / "other", TABLE, lambda messages: tiny_tokens(messages) + 1).check(real=True)
