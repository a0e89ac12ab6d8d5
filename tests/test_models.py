"""What a GGUF header tells before anything is submitted."""

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
    assert llmrun.plan_nodes(config).nodes == nodes


def test_auto_without_the_memory_of_a_node_says_what_to_write(tmp_path):
    make_model(tmp_path / "m.gguf")
    with pytest.raises(llmrun.UserError, match="vram_per_node"):
        llmrun.plan_nodes(config_for(tmp_path / "m.gguf", slurm={"nodes": "auto"}))


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
    assert llmrun.plan_nodes(config).nodes == 4
