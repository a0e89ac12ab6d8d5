"""`make bench`: every benchmark that can run here, one after the other. Each is a program of its own, with its own words."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
NEEDS = {"pump.py": "nginx", "million.py": "nginx", "slots.py": "cmake", "trouble.py": "python3", "submit.py": "python3",
         "overhead.py": "slurmctld", "scaling.py": "python3", "interruptions.py": "slurmctld", "lost_nodes.py": "slurmctld"}

path, missed = os.environ["PATH"] + ":/usr/sbin:/sbin", []
for name, program in NEEDS.items():
    print(f"\n── {name}", flush=True)
    if not shutil.which(program, path=path):
        print(f"left out: {program} is not here (tests/real/setup.sh installs it)")
    elif subprocess.run([sys.executable, str(HERE / name)], env=dict(os.environ, PATH=path)).returncode:
        missed.append(name)
if missed:
    sys.exit("not within their limits: " + ", ".join(missed))
