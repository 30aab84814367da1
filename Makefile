# make demo and make test work as the very first command in a fresh clone.
SUPPORTED := import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 13))
PYTHON ?= $(shell for p in python3.11 python3.12 python3.10 python3; do $$p -c '$(SUPPORTED)' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin

.PHONY: setup demo test test-nemo test-browser test-slurm test-gpu check lock

setup: .venv/complete

.venv/complete: requirements.lock pyproject.toml
	@$(or $(PYTHON),false) -c '$(SUPPORTED)' || { echo 'vlmsft needs Python 3.10 to 3.12 (found: $(or $(PYTHON),none)). Name one: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11' >&2; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --require-hashes --requirement requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --editable .
	@touch $@

# prepare, train, export, generate, evaluate; a new run at each time
demo: DEMO := $(shell date +%Y%m%d-%H%M%S)
demo: setup
	$(BIN)/python -m vlmsft.prepare dataset=sample
	$(BIN)/python -m vlmsft.train experiment=demo id=$(DEMO)
	$(BIN)/python -m vlmsft.export_ckpt checkpoint=runs/demo/$(DEMO) output=exports/demo-$(DEMO)
	$(BIN)/python -m vlmsft.generate checkpoint=exports/demo-$(DEMO) input=vlmsft/data/sample/validation.jsonl output=exports/demo-$(DEMO).answers.jsonl image_folder=vlmsft/data/sample/images max_new_tokens=64 batch_size=16
	$(BIN)/python -m vlmsft.evaluate 'models={demo: exports/demo-$(DEMO)}' tasks=[sample] generation.max_new_tokens=64

# processes of the test runs; each takes 2 GB with NeMo, as much for what it forks, and one thread
WORKERS ?= 2
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses=$(WORKERS) --dist=loadfile

test: setup
	$(PYTEST)

# the tests that import NeMo and train on the CPU (minutes); one needs g++
test-nemo: setup
	$(PYTEST) -m nemo

# needs Debian's chromium
test-browser: setup
	$(BIN)/python -m pytest -m browser

# brings up a Slurm on this machine: root, and the packages that tests/slurm/cluster.py names
test-slurm: setup
	$(BIN)/python -m pytest -m slurm

# needs a CUDA GPU, and TransformerEngine (README, "On a GPU")
test-gpu: setup
	$(BIN)/python -m pytest -m gpu tests/mllama/test_gpu.py tests/test_train_gpu.py

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

lock:
	$(BIN)/uv pip compile --quiet --upgrade --universal --generate-hashes --python-version 3.10 --extra dev pyproject.toml --output-file requirements.lock
