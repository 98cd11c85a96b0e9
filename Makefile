# `make train` and `make test` do all the set-up that they need; nothing outside this folder is touched.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DATA := data/quickstart
PROCESSES ?= 2

.PHONY: train test slow parity crash-test matrix slurm-test lint format bench clean kill-test

# at Ctrl-C torchrun gives its workers 30 s, or what this says: a step and a save may need more
train: $(DATA)/heldout.manifest.json
	TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600 OMP_NUM_THREADS=1 $(BIN)/torchrun --nproc-per-node $(PROCESSES) pretrain_hope.py configs/quickstart.yaml

# two workers: most tests wait for processes half of the time. The cluster of the SLURM tests is one for all of them
test: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile --ignore tests/slurm
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" tests/slurm

# every layout x every kind of model against one device: 253 trainings, and 396 with other optimizers, about an hour
parity: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/parity -m slow --ignore tests/parity/test_checkpoint_layouts.py

# the longer cases of the other tests
slow: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow tests/unit tests/resume tests/launch

# 50 kill -9 in training and in saves, 3 minutes
crash-test: $(VENV)/.installed
	OMP_NUM_THREADS=1 PYTHONPATH=.:tests $(BIN)/python tests/crash.py --rounds 50

# every checkpoint layout into every other, and a selection for every optimizer: 20 minutes
matrix: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/parity/test_checkpoint_layouts.py -m slow

# tokenizing killed at 20 random moments and resumed: equal bytes every time, two minutes
kill-test: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/data -m slow -s

# power failure, a real time limit, hangs, every starter, sweeps, on a private SLURM: about ten minutes
slurm-test: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/slurm

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.installed
	$(BIN)/python benchmarks/cpu_speed.py
	$(BIN)/python benchmarks/cpu_speed.py --lengths

$(DATA)/heldout.manifest.json: $(VENV)/.installed
	$(BIN)/python -m data_prep quickstart --out $(DATA)

# DeepSpeed comes as source: without DS_BUILD_OPS=0 its build looks for CUDA
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip setuptools wheel
	$(BIN)/pip install --quiet "torch>=2.11,<2.14"
	DS_BUILD_OPS=0 DS_ACCELERATOR=cpu $(BIN)/pip install --quiet --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) runs data .pytest_cache .mypy_cache .ruff_cache
