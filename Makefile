# Everything runs in .venv, which the first target that needs it makes.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RECIPE := training/recipes/quickstart.yaml

.PHONY: demo test test-long style quality clean

demo: $(VENV)/installed  ## float training, low-bit training, packing and the table of results, on built-in digits
	$(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
		training/run_qat.py $(RECIPE)

test: quality  ## lint, types and the tests that take seconds
	$(BIN)/pytest -n 2 -q -m "not long"

test-long: quality  ## all tests
	$(BIN)/pytest -n 2 -q

quality: $(VENV)/installed  ## lint, format and types, changing nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

style: $(VENV)/installed  ## mend lint and format, and remake the file that is made from others
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/python -m hf_oscqat.integration.remote_code

$(VENV)/installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -e ".[dev]"
	touch $@

clean:  ## remove what runs and tests left; .venv stays
	rm -rf runs build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
