"""Started by cluster.py: the controller of one cluster."""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from fake_slurm.controller import main  # noqa: E402

main(sys.argv[1:])
