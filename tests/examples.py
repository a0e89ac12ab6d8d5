"""The files of the checkout that are written from the program: sbatch/ and config.example.toml.

`make sbatch` writes them; a test holds them equal to what the program would write now."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import llmrun  # noqa: E402

CASES = {
    "one-node.sh": {"slurm": {"time": "02:00:00", "gpus_per_node": "1", "mem": "32G"}},
    "rpc-three-nodes.sh": {"slurm": {"nodes": 3, "time": "04:00:00", "gpus_per_node": "1", "cpus_per_node": 8}},
    "modules-and-conda.sh": {
        "slurm": {"time": "1-00", "partition": "gpu", "account": "my-lab"},
        "environment": {"modules": ["gcc/13", "cuda/12.4"], "conda": "llm", "setup": ["umask 027"],
                        "vars": {"HF_HOME": "$HOME/hf", "TOKENIZERS_PARALLELISM": "false"}}},
    "array.sh": {"slurm": {"jobs": 4, "time": "08:00:00", "gpus_per_node": "a100:2"}},
}


def rendered():
    """{path: text} of every written file."""
    files = {ROOT / "config.example.toml": llmrun.example_toml()}
    for name, data in CASES.items():
        config = llmrun.build_config(llmrun.Config, {"name": name[:-3], **data}, "config.toml", None)
        command = ["llmrun.py", "drive", "--config", "config.toml"]
        files[ROOT / "sbatch" / name] = llmrun.job_script(config, config.slurm.nodes, "slurm-%j.out", command)
    return files


if __name__ == "__main__":
    for path, text in rendered().items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        print("wrote", path.relative_to(ROOT))
