"""A real Slurm (cluster.py), a real llama.cpp (llama.py) and a tiny model for it (tiny_model.py)."""
