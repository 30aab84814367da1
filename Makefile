# make demo and make test work as the very first command in a fresh clone.
PYTHON ?= $(firstword $(foreach p,python3.11 python3.12 python3.10 python3,$(if $(shell command -v $(p) 2>/dev/null),$(p))))
BIN := .venv/bin

.PHONY: setup demo test test-nemo check lock

setup: .venv/complete

.venv/complete: requirements.lock pyproject.toml
	@test -n "$(PYTHON)" || { echo "no python3 on PATH: install Python 3.11, or name one: make PYTHON=/path/to/python3.11" >&2; exit 2; }
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit((3, 10) <= v < (3, 13) and "" or f"{sys.executable} is Python {v.major}.{v.minor}: vlmsft needs 3.10 to 3.12. Name one: make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --require-hashes --requirement requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --editable .
	@touch $@

demo: setup
	$(BIN)/python -m vlmsft.train experiment=demo

test: setup
	$(BIN)/python -m pytest

# the tests that import NeMo and train on the CPU (minutes)
test-nemo: setup
	$(BIN)/python -m pytest -m nemo

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

lock:
	$(BIN)/uv pip compile --quiet --upgrade --universal --generate-hashes --python-version 3.10 --extra dev pyproject.toml --output-file requirements.lock
