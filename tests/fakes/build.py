"""Makes a folder that looks like a build of llama.cpp, from the fakes in llama.py.

In a test:  make_build(tmp_path / "llama", age="old"); make_model(tmp_path / "tiny.gguf")
By hand:    python tests/fakes/build.py FOLDER [--age new|old] [--no-rpc] [--model FILE]
"""

import argparse
import os
import struct
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
SCRIPT = """#!{python} -SE
import sys
sys.path.insert(0, {here!r})
import llama
llama.main({program!r}, age={age!r}, rpc={rpc!r})
"""


def make_build(folder, age="new", rpc=True):
    """Writes `llama-server` and the RPC worker into the folder, which is returned."""
    os.makedirs(folder, exist_ok=True)
    programs = ["llama-server"]
    if rpc:
        programs.append("ggml-rpc-server" if age == "new" else "rpc-server")
    for program in programs:
        path = os.path.join(folder, program)
        with open(path, "w") as file:
            file.write(SCRIPT.format(python=python(), here=HERE, program=program, age=age, rpc=rpc))
        os.chmod(path, 0o755)
    return folder


def python():
    """This interpreter itself: a shebang may not name a link chain that needs `site`."""
    return os.path.realpath(sys.executable)


MODEL = {"general.architecture": "llama", "llama.block_count": 4, "llama.context_length": 4096,
         "llama.embedding_length": 64, "llama.attention.head_count": 4, "llama.attention.head_count_kv": 2}


def make_model(path, **keys):
    """Writes a GGUF file that has a header and no tensors: enough for the fakes, not for a real
    engine. `keys` are added to the header, with `__` for a dot: `llama__context_length=512`."""
    def text(value):
        return struct.pack("<Q", len(value.encode())) + value.encode()

    header = dict(MODEL, **{key.replace("__", "."): value for key, value in keys.items()})
    with open(path, "wb") as file:
        file.write(b"GGUF" + struct.pack("<Iqq", 3, 0, len(header)))
        for key, value in header.items():
            file.write(text(key))
            if isinstance(value, str):
                file.write(struct.pack("<i", 8) + text(value))
            else:
                file.write(struct.pack("<iI", 4, value))
    return path


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder")
    parser.add_argument("--age", choices=["new", "old"], default="new")
    parser.add_argument("--no-rpc", action="store_true")
    parser.add_argument("--model", metavar="FILE", help="write a small model file too")
    given = parser.parse_args()
    if given.model:
        make_model(given.model)
    print(make_build(given.folder, given.age, not given.no_rpc))
