#!/bin/bash
# The batch script of the llmrun job one-node, in four sections.
# ── 1 · resources ──────────────────────────────────────────────────────────────
#SBATCH --job-name=one-node
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --time=02:00:00
#SBATCH --gpus-per-node=1
#SBATCH --mem=32G
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
# nothing more to load
# ── 3 · container ──────────────────────────────────────────────────────────────
# none: the engine runs as it is installed on the nodes
# ── 4 · run ────────────────────────────────────────────────────────────────────
exec "$python" -I llmrun.py drive --config config.toml
