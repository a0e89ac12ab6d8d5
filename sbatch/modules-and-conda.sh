#!/bin/bash
# The batch script of the llmrun job modules-and-conda, in four sections.
# ── 1 · resources ──────────────────────────────────────────────────────────────
#SBATCH --job-name=modules-and-conda
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --time=1-00
#SBATCH --partition=gpu
#SBATCH --account=my-lab
#SBATCH --output=slurm-%j.out
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
#SBATCH --propagate=NONE
#SBATCH --no-kill
#SBATCH --requeue
# ── 2 · environment and modules ────────────────────────────────────────────────
trap '' USR1  # Slurm's early warning stays ignored, through exec, until the driver listens for it
ulimit -n "$(ulimit -Hn)" 2>/dev/null
fail() { echo "llmrun: $1" >&2; exit 3; }
# Python is found before any module can put another one, or its settings, in the way.
for candidate in "$LLMRUN_PYTHON" python3.14 python3.13 python3.12 python3.11 python3.10 python3.9 python3; do
    python=$(command -v "$candidate") &&
        "$python" -c 'import sys; sys.exit(sys.version_info < (3, 9))' 2>/dev/null && break
    python=
done
[ -n "$python" ] || fail 'no Python 3.9 or newer found on'" $(hostname); set [environment] python in the config"
type module >/dev/null 2>&1 || . /etc/profile
module load gcc/13 || fail 'module load gcc/13 failed; see `module avail`'
module load cuda/12.4 || fail 'module load cuda/12.4 failed; see `module avail`'
eval "$(conda shell.bash hook)" || fail "conda is not on the PATH of the node"
conda activate llm || fail 'conda activate llm failed; see `conda env list`'
umask 027
export HF_HOME="$HOME/hf"
export TOKENIZERS_PARALLELISM=false
# ── 3 · container ──────────────────────────────────────────────────────────────
# none: the engine runs as it is installed on the nodes
# ── 4 · run ────────────────────────────────────────────────────────────────────
exec "$python" -I llmrun.py drive --config config.toml
