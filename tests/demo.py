"""`make demo`: the demo of llmrun.py, through the sbatch of a fake Slurm, in a folder that is gone afterwards."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).resolve().parent
sys.path.insert(0, str(TESTS))

from fake_slurm.cluster import FakeCluster  # noqa: E402

with tempfile.TemporaryDirectory() as folder, FakeCluster(Path(folder) / "cluster") as cluster:
    shutil.copy(TESTS.parent / "llmrun.py", folder)
    sys.exit(subprocess.call([sys.executable, "llmrun.py", "demo", "--submit"], cwd=folder,
                             env=dict(os.environ, **cluster.env)))
