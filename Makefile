# make demo   a real model with a hippocampus reads real text; make test   everything that must hold.
# Both make .venv first, from the pinned versions, and again when pyproject.toml or constraints.txt has changed.
# pip's own settings (PIP_INDEX_URL, PIP_FIND_LINKS, ...) decide where packages come from: a build of torch 2.13.0
# for the CPU alone is taken where they offer one.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
REPORT := .pytest_cache/report.xml

.PHONY: demo test unit lint support results results-quick clean
.DELETE_ON_ERROR:

demo: $(INSTALLED)
	$(BIN)/hippoformer demo

test: lint
	$(BIN)/python -m pytest --junitxml=$(REPORT)
	$(BIN)/python scripts/support_table.py $(REPORT) --check

# The quick part of the suite: no real model, nothing fetched.
unit: $(INSTALLED)
	$(BIN)/python -m pytest -m "not real"

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# docs/support.md, from the tests that show what works with what.
support: $(INSTALLED)
	$(BIN)/python -m pytest -m supports --junitxml=$(REPORT)
	$(BIN)/python scripts/support_table.py $(REPORT)

# Every figure of the README and the docs, from the test texts in the folder data; results-quick makes the headline rows.
results: $(INSTALLED)
	$(BIN)/python scripts/results.py

results-quick: $(INSTALLED)
	$(BIN)/python scripts/results.py --quick

# The stamp is written last, so an interrupted installation is taken up again. A .venv whose Python is gone is remade.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; sys.exit(None if sys.version_info >= (3, 10) else 'Python 3.10 or newer is needed: make PYTHON=...')"
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e ".[dev,demo]"
	touch $@

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist
