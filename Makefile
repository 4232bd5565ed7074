# Every target does its own set-up in .venv: a fresh machine needs Python, make and a package index.

PYTHON ?= $(or $(shell command -v python3),python)
WORKERS ?= 2
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
CODE := lightning_compress recipes benchmarks tests

# One thread a process: tests run side by side, and threads that wait busily slow each other down. Nothing may go online.
TEST_ENV := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE HF_HUB_OFFLINE=1 WANDB_MODE=offline TOKENIZERS_PARALLELISM=false

.DEFAULT_GOAL := help
.PHONY: help install demo test check format clean

help:
	@echo "make demo     train a vision transformer on the digits, compress it in the same fit, print the report"
	@echo "make test     run the tests"
	@echo "make check    lint, format check, type check"
	@echo "make format   format the code and fix what ruff can fix"
	@echo "make install  only set up .venv"
	@echo "make clean    remove .venv, caches and what runs left behind"
	@echo
	@echo "Variables (make TARGET NAME=VALUE):"
	@echo "  PYTHON   interpreter that creates .venv, >= 3.11 for the pinned versions; now $(PYTHON)"
	@echo "  WORKERS  test processes; now $(WORKERS)"
	@echo "  ARGS     further arguments for the demo script or for pytest, as in: make test ARGS='-k plan -x'"

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Expected Python >= 3.11, which the versions pinned in constraints.txt need, but got %d.%d at %s. Choose another with PYTHON=/path/to/python3.11. (The library itself runs on 3.10: pip install .)" % (sys.version_info[:2] + (sys.executable,)))'
	@echo "Setting up $(VENV); the first time takes a few minutes."
	@"$(PYTHON)" -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)" -c constraints.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev,recipes]' -c constraints.txt
	@touch $@

demo: $(INSTALLED)
	$(BIN)/python recipes/image_classification.py $(ARGS)

test: $(INSTALLED)
	$(TEST_ENV) $(BIN)/python -m pytest -n $(WORKERS) $(ARGS)

check: $(INSTALLED)
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix $(CODE)
	$(BIN)/ruff format $(CODE)

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis lightning_logs
	find $(CODE) -name __pycache__ -type d -prune -exec rm -rf {} +
