# make train, make test: everything from a clean clone. CONTRIBUTING.md explains the rest.
PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python

# Linux without an NVIDIA driver takes torch's CPU build, 200 MB instead of 3 GB. If that index cannot be reached, the
# default one serves.
ifeq ($(shell uname -s)$(shell command -v nvidia-smi),Linux)
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
endif

.PHONY: train test test-slow rehearse install fmt check clean

train: install
	$(RUN) cli.py fit

test: install
	OMP_NUM_THREADS=1 $(RUN) -m pytest -m "not slow" -n 2 --dist loadfile

test-slow: install
	$(RUN) -m pytest -m slow

rehearse: install
	$(RUN) benchmarks/rehearse.py

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	$(if $(TORCH_INDEX),-$(RUN) -m pip install --no-deps --retries 0 --timeout 15 --index-url $(TORCH_INDEX) \
		--constraint constraints.txt torch)
	$(RUN) -m pip install --constraint constraints.txt --editable ".[dev]"
	$(RUN) -m pip install --constraint constraints.txt --no-deps litgpt
	touch $@

fmt: install
	$(RUN) -m ruff format .
	$(RUN) -m ruff check --fix .

check: install
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
