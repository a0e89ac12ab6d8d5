# What a checkout can do; each target sets up what it needs. PYTHON chooses the interpreter (3.9 or newer).
PYTHON ?= python3
VENV := .venv-$(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
RUN := $(VENV)/bin/python

.PHONY: demo test test-real lint mutants bench chaos storm sbatch clean

demo: $(VENV)/ready  ## the whole path through a fake Slurm's sbatch, in seconds
	@$(RUN) tests/demo.py

test: $(VENV)/ready  ## everything against fakes: no root, no Slurm, no network
	$(RUN) -m pytest -q -n 4 --dist worksteal --timeout 120 --ignore=tests/real --ignore=tests/bench tests

test-real: $(VENV)/ready  ## the same scenarios on a real Slurm and a real llama.cpp (root on Debian)
	bash tests/real/setup.sh
	LLMRUN_BENCH=real $(RUN) -m pytest -q -rs -n 2 --dist worksteal --timeout 300 -k "not test_fake_slurm or test_both" \
		tests/test_scenarios.py tests/test_lives.py tests/test_sites.py tests/test_slurm.py tests/test_fake_slurm.py
	LLMRUN_BENCH=real $(RUN) -m pytest -q -rs --timeout 300 tests/real

lint: $(VENV)/ready
	$(RUN) -m ruff check .
	$(RUN) tests/test_house.py

mutants: $(VENV)/ready  ## faults put into llmrun.py one at a time: the tests must notice; TENTH=SEED takes a tenth; minutes
	$(RUN) tests/mutants.py $(if $(TENTH),--tenth $(TENTH))

chaos: $(VENV)/ready  ## simulated runs by the thousand, and runs of real processes, in storms; minutes
	$(RUN) tests/simulation.py --seeds 10000
	$(RUN) tests/chaos.py

storm: $(VENV)/ready  ## five runs of the chaos: a minute
	$(RUN) tests/chaos.py --seeds 5

bench: $(VENV)/ready  ## ratios against named alternatives, in one run
	$(RUN) tests/bench/all.py

sbatch: $(VENV)/ready  ## write sbatch/ and config.example.toml anew
	$(RUN) tests/examples.py

$(VENV)/ready: tests/requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install -q -r tests/requirements.txt
	touch $@

clean:
	rm -rf .venv-* runs llmrun-demo .pytest_cache .ruff_cache
