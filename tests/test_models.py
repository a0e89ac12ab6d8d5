"""What a GGUF header tells before anything is submitted."""

import math
import struct

import llmrun
import pytest
from fakes.build import make_model


def config_for(path, **tables):
    data = {"model": {"path": str(path)}, "engine": {"path": "/x"}}
    for table, keys in tables.items():
        data.setdefault(table, {}).update(keys)
    return llmrun.build_config(llmrun.Config, data, "config.toml", None)


def big_model(size_bytes, layers=80, kv_heads=8, key_length=128):
    return llmrun.Model("big", "llama", layers, 64, (kv_heads,) * layers, key_length, key_length, 8192, size_bytes, ("x",))


def test_the_header_gives_layers_heads_and_context(tmp_path):
    make_model(tmp_path / "m.gguf")
    model = llmrun.read_model(config_for(tmp_path / "m.gguf"))
    assert (model.architecture, model.layers, model.heads, model.kv_heads) == ("llama", 4, 4, (2, 2, 2, 2))
    assert model.key_length == model.value_length == 16 and model.context == 4096


def test_the_kv_cache_of_a_known_model():
    """4 layers, 2 KV heads of 16, 4096 cells at f16 are exactly 2 MiB in llama.cpp's own log."""
    model = llmrun.Model("t", "llama", 4, 4, (2,) * 4, 16, 16, 4096, 0, ())
    assert llmrun.kv_cache_bytes(model, 4096, 1) == 2 * 2**20
    assert llmrun.kv_cache_bytes(model, 1000, 4) == 4 * llmrun.kv_cache_bytes(model, 1024, 1), "cells come in 256s"
    assert llmrun.kv_cache_bytes(model, 99999, 1) == llmrun.kv_cache_bytes(model, 4096, 1), "no more than it was trained with"


@pytest.mark.parametrize("size_gb, vram, nodes", [(50, "20GB", 3), (18, "24GB", 1), (40, "80GB", 1), (140, "48GB", 4)])
def test_nodes_by_the_rule_users_know(tmp_path, monkeypatch, size_gb, vram, nodes):
    monkeypatch.setattr(llmrun, "read_model", lambda config: big_model(size_gb * 10**9))
    config = config_for("x", slurm={"nodes": "auto"}, engine={"slots": 1, "context": 4096}, model={"vram_per_node": vram})
    assert llmrun.plan_nodes(config, True).nodes == nodes


def test_auto_without_the_memory_of_a_node_says_what_to_write(tmp_path):
    make_model(tmp_path / "m.gguf")
    with pytest.raises(llmrun.UserError, match="vram_per_node"):
        llmrun.plan_nodes(config_for(tmp_path / "m.gguf", slurm={"nodes": "auto"}), True)


def test_kv_heads_of_each_layer_may_differ(tmp_path):
    keys = {"general.architecture": "a", "a.block_count": 2, "a.embedding_length": 64, "a.context_length": 512,
            "a.attention.head_count": (4, 4), "a.attention.head_count_kv": (1, 0)}
    model = llmrun.model_from_keys(keys, 0, ("f.gguf",))
    assert model.kv_heads == (1, 0) and llmrun.kv_cache_bytes(model, 256, 1) == 256 * 32 * 2


def test_a_split_model_weighs_what_all_its_parts_do(tmp_path):
    for number in (1, 2, 3):
        make_model(tmp_path / f"m-{number:05d}-of-00003.gguf")
    model = llmrun.read_model(config_for(tmp_path / "m-00001-of-00003.gguf"))
    assert len(model.files) == 3 and model.size_bytes == 3 * (tmp_path / "m-00001-of-00003.gguf").stat().st_size


def gguf(kind, elements, size_bytes):
    """A model of one tensor, with so many bytes for it."""
    def text(words):
        return struct.pack("<Q", len(words)) + words
    head = b"GGUF" + struct.pack("<IQQ", 3, 1, 1) + text(b"general.architecture") + struct.pack("<I", 8) + text(b"llama")
    head += text(b"token_embd.weight") + struct.pack("<IQIQ", 1, elements, kind, 0)
    return head + b"\0" * (-len(head) % 32) + b"\1" * size_bytes


@pytest.mark.parametrize("kind, elements, size_bytes", [(0, 64, 256), (2, 4096, 2304), (12, 512, 288)])
def test_a_model_is_whole_when_its_last_weight_is_there(tmp_path, kind, elements, size_bytes):
    (tmp_path / "m.gguf").write_bytes(gguf(kind, elements, size_bytes))
    assert llmrun.read_gguf(tmp_path / "m.gguf")[0] == {"general.architecture": "llama"}
    (tmp_path / "m.gguf").write_bytes(gguf(kind, elements, size_bytes - 1))
    with pytest.raises(ValueError, match="cut short: .* are there"):
        llmrun.read_gguf(tmp_path / "m.gguf")


def test_each_replica_gets_the_nodes_that_the_model_takes(monkeypatch):
    monkeypatch.setattr(llmrun, "read_model", lambda config: big_model(40 * 10**9))
    config = config_for("x", slurm={"nodes": "auto"}, model={"vram_per_node": "24GB"},
                        engine={"slots": 1, "context": 4096, "replicas": 2})
    assert llmrun.plan_nodes(config, True).nodes == 4


# ── headers of every kind ──────────────────────────────────────────────────────

TYPES = {bool: 7, int: 10, float: 12, str: 8}


def packed(value):
    """A value of a header with its type before it; a list is an array of its first one's type, or of whole numbers."""
    if isinstance(value, list):
        kind = TYPES[type(value[0])] if value else 10
        return struct.pack("<IIQ", 9, kind, len(value)) + b"".join(packed(item)[4:] for item in value)
    if isinstance(value, str):
        return struct.pack("<IQ", 8, len(value.encode())) + value.encode()
    return struct.pack("<I" + {bool: "?", int: "Q", float: "d"}[type(value)], TYPES[type(value)], value)


def model_of(path, tensors=0, **keys):
    """A model with such a header, `__` for a dot; None leaves a key out."""
    known = {"general.architecture": "llama", "llama.block_count": 4, "llama.context_length": 4096, "llama.embedding_length": 64,
             "llama.attention.head_count": 4, "llama.attention.head_count_kv": 2}
    known.update({name.replace("__", "."): value for name, value in keys.items()})
    known = {name: value for name, value in known.items() if value is not None}
    head = b"GGUF" + struct.pack("<IQQ", 3, tensors, len(known))
    for name, value in known.items():
        head += struct.pack("<Q", len(name)) + name.encode() + packed(value)
    for _ in range(tensors):
        head += struct.pack("<Q", 1) + b"t" + struct.pack("<IQIQ", 1, 64, 0, 0)
    path.write_bytes(head + b"\0" * 4096)
    return path


@pytest.mark.parametrize("keys", [
    {"llama__attention__head_count": 0, "llama__attention__head_count_kv": None},
    {"llama__attention__head_count": 0, "llama__attention__head_count_kv": 0},
    {"llama__attention__head_count": [0, 0, 0, 0], "llama__attention__head_count_kv": [0, 0, 0, 0]}], ids=str)
def test_a_model_without_attention_takes_no_room_for_its_context(tmp_path, keys):
    """As Mamba and RWKV have it: what they remember of a text has one size, however long it is."""
    config = config_for(model_of(tmp_path / "m.gguf", **keys), slurm={"nodes": "auto"}, model={"vram_per_node": "24GB"})
    model, plan = llmrun.read_model(config), llmrun.plan_nodes(config, True)
    assert (model.layers, plan.nodes, plan.kv_bytes) == (4, 1, 0)


def test_a_model_with_attention_in_some_layers_takes_room_for_these(tmp_path):
    path = model_of(tmp_path / "m.gguf", llama__attention__head_count=[0, 4, 0, 4], llama__attention__head_count_kv=[0, 2, 0, 2])
    assert llmrun.kv_cache_bytes(llmrun.read_model(config_for(path)), 256, 1) == 4 * 2 * 16 * llmrun.KV_BYTES * 256


ODD = [{"general__alignment": 0}, {"general__alignment": "32"}, {"general__alignment": []}, {"general__alignment": 1.5}, {"general__alignment": 33},
       {"general__architecture": []}, {"general__architecture": 7}, {"general__name": [1]}, *(
           {f"llama__{name}": value} for value in ([], "x", ["x"], 2**64 - 1, math.nan, math.inf, -1.0, 0)
           for name in ("block_count", "embedding_length", "context_length", "attention__head_count", "attention__head_count_kv",
                        "attention__key_length"))]


@pytest.mark.parametrize("keys", ODD, ids=lambda keys: "".join(f"{name}={value}" for name, value in keys.items()))
def test_an_odd_header_is_one_line_or_a_plan(tmp_path, keys):
    path = model_of(tmp_path / "m.gguf", tensors=1, **keys)
    config = config_for(path, slurm={"nodes": "auto"}, model={"vram_per_node": "24GB"})
    try:
        plan = llmrun.plan_nodes(config, True)
    except llmrun.UserError as error:
        assert "m.gguf" in str(error) and error.mend
    else:
        assert 1 <= plan.nodes < 2**63 and 0 <= plan.kv_bytes and plan.model.layers >= 0
        assert "B" in llmrun.show_size(plan.kv_bytes)


def test_an_array_of_arrays_of_arrays_is_no_model(tmp_path):
    deep = struct.pack("<IQ", 9, 1) * 100_000
    (tmp_path / "m.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"a" + struct.pack("<I", 9) + deep)
    with pytest.raises(llmrun.UserError, match="damaged"):
        llmrun.read_model(config_for(tmp_path / "m.gguf"))
