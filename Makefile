# Everything below needs Python 3.11 or newer and nothing else: make PYTHON=python3.12 serve
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt

CLIENTS := .venv-clients
AIPERF := .venv-aiperf

.PHONY: serve test test-clients check format bench clean

serve: $(VENV)/.serve  ## Set up if needed, and serve the embedded checkpoint on 127.0.0.1:8000.
	$(BIN)/rheostat serve $(OPTIONS)

test: check  ## Set up if needed, and run every check and test.
	$(BIN)/coverage run -m pytest
	$(BIN)/coverage report --skip-covered --skip-empty

test-clients: $(VENV)/.serve $(CLIENTS)/.installed $(AIPERF)/.installed  ## Real clients against a real server, in environments of their own.
	SERVER_BIN=$(abspath $(BIN)) AIPERF_BIN=$(abspath $(AIPERF)/bin) \
		$(CLIENTS)/bin/python -m pytest -c tests/clients/pytest.ini --rootdir . tests/clients

# .venv-clients from requirements.txt, .venv-aiperf from requirements-aiperf.txt.
$(CLIENTS)/.installed: tests/clients/requirements.txt
$(AIPERF)/.installed: tests/clients/requirements-aiperf.txt
$(CLIENTS)/.installed $(AIPERF)/.installed:
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --disable-pip-version-check --quiet --requirement $<
	touch $@

check: $(VENV)/.develop  ## Format, lint, import rule, strict types.
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/mypy

format: $(VENV)/.develop  ## Format the code, and mend what the linter can.
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

bench: $(VENV)/.develop  ## Compute, prefill time and decode time per budget, as JSON.
	$(BIN)/python -m benchmarks.budget_latency --json

clean:  ## Remove the environment and caches.
	rm -rf $(VENV) $(CLIENTS) $(AIPERF) build *.egg-info .coverage .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Rheostat needs Python 3.11 or newer, this is " + sys.version)'
	$(PYTHON) -m venv $(VENV)

# The stamps make a second run start at once; a change of the requirements installs again.
$(VENV)/.serve: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) --editable .
	touch $@

$(VENV)/.develop: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) --editable .[dev]
	touch $@ $(VENV)/.serve
