# make demo       a real model with a hippocampus reads real text, in three minutes
# make test       what a change must pass, in ten minutes on two cores; make test-all   everything, before a release
# Both make .venv first, from the pinned versions, and again when pyproject.toml or constraints.txt has changed.
# pip's own settings (PIP_INDEX_URL, PIP_FIND_LINKS, ...) decide where packages come from: a build of torch 2.13.0
# for the CPU alone is taken where they offer one.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
REPORT := .pytest_cache/report.xml
# Every test has one thread to itself; each process loads the real model once, in about a gigabyte.
PYTEST := -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal

# The oldest torch that is allowed is 2.6.0; of another index or folder that has a build of it for the CPU alone, say
# make test-lowest LOWEST_TORCH=2.6.0 PIP_EXTRA_INDEX_URL=...
LOWEST := .venv-lowest
LOWEST_TORCH ?= 2.13.0

SKY := .venv-sky

# The source distribution of transformers, whose tests of a model run over ours. It leaves out those of `generate`: with a
# checkout of the same release, make test-transformers TRANSFORMERS_TESTS=checkout/tests runs them too.
TRANSFORMERS := .transformers
TRANSFORMERS_TESTS ?= $(TRANSFORMERS)/tests

.PHONY: demo test test-all unit test-lowest test-cloud test-transformers lint docs mutations support results clean
.DELETE_ON_ERROR:

demo: $(INSTALLED)
	$(BIN)/hippoformer demo

# Without what is marked slow.
test: lint
	$(BIN)/python $(PYTEST) -m "not slow" --durations=20

# All tests, and whether docs/support.md says what they showed.
test-all: lint
	$(BIN)/python $(PYTEST) --durations=20 --junitxml=$(REPORT)
	$(BIN)/python scripts/support_table.py $(REPORT) --check

# The quick suite without the real model: nothing is fetched.
unit: $(INSTALLED)
	$(BIN)/python $(PYTEST) -m "not slow and not real"

# The same with the lowest version of every dependency; warnings are errors there too.
test-lowest: $(LOWEST)/.installed-$(LOWEST_TORCH)
	$(LOWEST)/bin/python $(PYTEST) -m "not real"

# The files under cloud/, read by SkyPilot's own parser.
test-cloud: $(INSTALLED) $(SKY)/.installed
	HIPPOFORMER_SKY_PYTHON=$(SKY)/bin/python $(BIN)/python -m pytest tests/test_cloud.py

# transformers' own tests of a model, over a tiny HippoFormer; what cannot apply is in docs/support.md.
test-transformers: $(INSTALLED) $(TRANSFORMERS_TESTS)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt parameterized
	TRANSFORMERS_TESTS=$(TRANSFORMERS_TESTS) $(BIN)/python $(PYTEST) -c tests/transformers_suite/pytest.ini tests/transformers_suite

lint: docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

# The site, in site/; every page and link is checked.
docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# Breaks the package one line at a time; each named test must fail (tests/mutations.yaml). About fifteen minutes on one quiet core.
mutations: $(INSTALLED)
	$(BIN)/python tests/run_mutations.py

# docs/support.md, from the tests that show what works with what.
support: $(INSTALLED)
	$(BIN)/python $(PYTEST) -m supports --junitxml=$(REPORT)
	$(BIN)/python scripts/support_table.py $(REPORT)

# The README's rows from nothing: hours on two CPU cores. Other results: the other scripts under runs/.
results: $(INSTALLED)
	export PATH=$(abspath $(BIN)):$$PATH; for run in perplexity recall bytes speed; do bash runs/$$run.sh || exit 1; done

# The stamp is written last, so an interrupted installation is taken up again. A .venv whose Python is gone is remade.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; sys.exit(None if sys.version_info >= (3, 10) else 'Python 3.10 or newer is needed: make PYTHON=...')"
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e ".[dev,lint]"
	touch $@

$(LOWEST)/.installed-$(LOWEST_TORCH): pyproject.toml constraints-lowest.txt
	$(PYTHON) -m venv --clear $(LOWEST)
	$(LOWEST)/bin/python -m pip install --disable-pip-version-check -c constraints-lowest.txt torch==$(LOWEST_TORCH) -e ".[dev]"
	touch $@

$(SKY)/.installed:
	$(PYTHON) -m venv --clear $(SKY)
	$(SKY)/bin/python -m pip install --disable-pip-version-check skypilot==0.14.1
	touch $@

$(TRANSFORMERS)/tests: constraints.txt | $(INSTALLED)
	rm -rf $(TRANSFORMERS)
	$(BIN)/python -m pip download --disable-pip-version-check -c constraints.txt --no-deps --no-binary transformers -d $(TRANSFORMERS) transformers
	tar -xzf $(TRANSFORMERS)/transformers-*.tar.gz -C $(TRANSFORMERS) --strip-components=1
	touch $@

clean:
	rm -rf $(VENV) $(LOWEST) $(SKY) $(TRANSFORMERS) .import_linter_cache .mypy_cache site .pytest_cache .ruff_cache .hypothesis build dist
