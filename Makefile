# Everything runs in .venv, which the first target that needs it makes.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RECIPE := training/recipes/quickstart.yaml

.PHONY: demo test test-long test-oldest style quality bench clean

demo: $(VENV)/installed  ## float training, low-bit training, packing and the table of results, on built-in digits
	$(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
		training/run_qat.py $(RECIPE)

test: quality  ## lint, types and the tests that take seconds
	$(BIN)/pytest -n 2 --dist loadfile -q -m "not long"

test-long: quality  ## all tests
	$(BIN)/pytest -n 2 --dist loadfile -q

test-oldest: $(VENV)-oldest/installed  ## the tests that take seconds, with the oldest supported versions
	$(VENV)-oldest/bin/pytest -n 2 --dist loadfile -q -m "not long"

quality: $(VENV)/installed  ## lint, format and types, changing nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

style: $(VENV)/installed  ## mend lint and format, and remake the file that is made from others
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/python -m hf_oscqat.integration.remote_code

bench: $(VENV)-bench/installed  ## what a training step costs, beside float training and other libraries; BENCH=options
	PATH="$(CURDIR)/$(VENV)-bench/bin:$$PATH" $(VENV)-bench/bin/python training/benchmarks/bench.py \
		--json docs/bench/ --picture docs/bench/ $(BENCH)

$(VENV)-oldest/installed: pyproject.toml tests/oldest.txt
	$(PYTHON) -m venv $(VENV)-oldest
	$(VENV)-oldest/bin/pip install --quiet --upgrade pip
	$(VENV)-oldest/bin/pip install --quiet -e ".[dev]" -c tests/oldest.txt
	touch $@

# A library that does not install beside this torch costs its own row, and no other.
$(VENV)-bench/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)-bench
	$(VENV)-bench/bin/pip install --quiet --upgrade pip
	$(VENV)-bench/bin/pip install --quiet -e ".[bench]" || { $(VENV)-bench/bin/pip install --quiet -e . && \
		for library in $$($(VENV)-bench/bin/python -c 'import tomllib; \
			print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["bench"])'); \
		do $(VENV)-bench/bin/pip install --quiet -e . "$$library" \
			|| echo "$$library cannot be installed here: its row of the table will say that it is missing"; \
		done; }
	touch $@

$(VENV)/installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -e ".[dev]"
	touch $@

clean:  ## remove what runs and tests left; .venv stays
	rm -rf runs build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
