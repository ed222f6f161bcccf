# The commands of this project. `make demo` and `make test` need nothing but Python 3.11–3.13, Node's npm and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test test-long check lint serve goldens docs bench clean

demo: $(READY)
	$(BIN)/python -m scripts.demo

SHORT := -m pytest -m "not slow and not long" -p no:cacheprovider
SLOW := -m pytest -m "slow and not long" -p no:cacheprovider --ignore tests/control
CONTROL := -m pytest -m "not long" -p no:cacheprovider tests/control

# Side by side: lint, those of the control world, the slow ones of the others and the rest. Each waits a good deal for
# processes and timers, so that three of them keep two cores busy.
test: $(READY)
	@$(MAKE) --no-print-directory lint & lint=$$!; \
	$(BIN)/python $(SLOW) & slow=$$!; \
	$(BIN)/python $(CONTROL) & control=$$!; \
	$(BIN)/python $(SHORT) --ignore tests/control; failed=$$?; \
	for part in $$lint $$slow $$control; do wait $$part || failed=1; done; exit $$failed

# What `make test` leaves out for time, with more kills and more random input.
test-long: $(READY)
	$(BIN)/python -m pytest -m long
	SERVER_KILLS=26 MORE_INPUTS=3 $(BIN)/python -m pytest tests/control/test_kills.py tests/control/test_any_input.py
	WORKER_FAULTS=20 $(BIN)/python -m pytest tests/control/test_worker_faults.py

check: lint
	$(BIN)/python $(SHORT)

lint: $(READY)
	$(BIN)/ruff check src tests scripts
	$(BIN)/ruff format --check src tests scripts
	$(BIN)/lint-imports
	$(BIN)/pyright

serve: $(READY)
	$(BIN)/simpletuner server --host 127.0.0.1

goldens: $(READY)
	$(BIN)/python -m pytest tests/goldens tests/config tests/train -m "not slow" --write-goldens

docs: $(READY)
	$(BIN)/python -m scripts.write_docs

bench: $(READY)
	$(BIN)/simpletuner bench

$(READY): requirements.lock pyproject.toml
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $(READY)

clean:
	rm -rf $(VENV) build dist demo-run .pytest_cache .ruff_cache .hypothesis .import_linter_cache
