# Two commands for everybody: `make demo` and `make test`. Each makes its own virtual environment where needed.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
EXPORT := $(VENV)/.export

.PHONY: demo test test-all bench clean

$(STAMP): requirements.txt requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -r requirements-dev.txt
	touch $(STAMP)

$(EXPORT): $(STAMP) requirements-export.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-export.txt
	touch $(EXPORT)

demo: $(STAMP)
	$(BIN)/python demo.py

# Two processes of one thread each: on two cores that is twice as fast as one process of two, whose threads wait for each other.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile

test: $(EXPORT)
	$(PYTEST) -m "not slow" tests

test-all: $(EXPORT)
	$(PYTEST) tests

bench: $(EXPORT)
	$(BIN)/python benchmarks/help_time.py
	$(BIN)/python benchmarks/train_step.py
	$(BIN)/python benchmarks/train_overhead.py
	$(BIN)/python benchmarks/val_overhead.py
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/two_processes.py
	$(BIN)/python benchmarks/prune_time.py
	$(BIN)/python benchmarks/latency.py --divisor 16
	$(BIN)/python benchmarks/latency.py --alignment --batch 1
	$(BIN)/python benchmarks/latency.py --int8 --divisor 16 --batch 1
	$(BIN)/python benchmarks/latency_layers.py
	$(BIN)/python benchmarks/agreement.py

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache
