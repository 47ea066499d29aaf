# Short names for the commands of README.md and CONTRIBUTING.md.
PYTHON ?= .venv/bin/python

.venv/bin/python:
	python3 -m venv .venv
	.venv/bin/pip install --quiet --editable '.[dev]'

.PHONY: install run smoke test slow lint format wheel
install: .venv/bin/python

run: install          ## the quick run: BERT-base to a 4-layer student
	$(PYTHON) train.py model=bert student=tiny

smoke: install        ## every stage of the quick run in a minute
	$(PYTHON) train.py model=bert student=tiny trainer=smoke

test: install         ## the default tests
	$(PYTHON) -m pytest

slow: install         ## the long ones
	$(PYTHON) -m pytest -m slow

lint: install
	$(PYTHON) -m ruff check . && $(PYTHON) -m ruff format --check . && $(PYTHON) -m mypy

format: install
	$(PYTHON) -m ruff check --fix . ; $(PYTHON) -m ruff format .

wheel: install
	$(PYTHON) -m build
