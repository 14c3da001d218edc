# Two commands for everybody: `make demo` and `make test`. Each makes its own virtual environment where needed.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test test-all bench clean

$(STAMP): requirements.txt requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -r requirements-dev.txt
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/python demo.py

test: $(STAMP)
	$(BIN)/python -m pytest -q -m "not slow" tests

test-all: $(STAMP)
	$(BIN)/python -m pytest -q tests

bench: $(STAMP)
	$(BIN)/python benchmarks/help_time.py
	$(BIN)/python benchmarks/train_step.py
	$(BIN)/python benchmarks/train_overhead.py
	$(BIN)/python benchmarks/val_overhead.py
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/two_processes.py

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache
