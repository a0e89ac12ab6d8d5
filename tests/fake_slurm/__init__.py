"""A fake Slurm for tests: real processes and real signals, several named nodes on one machine.

cluster.py is the door; nothing else here is meant to be imported by tests."""
