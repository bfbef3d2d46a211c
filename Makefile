# One word per chore. Everything lives in .venv, where the commands are too.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: setup demo chat test test-slow check bench protos docs clean

setup: $(READY)

$(READY): pyproject.toml requirements/tested.txt requirements/crypten.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "mpcache needs Python 3.11 or newer; set PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements/tested.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -r requirements/crypten.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $(READY)

demo: setup  ## the main job: three parties on this machine answer a private question
	$(BIN)/mpcache generate --max-new-tokens 6

chat: setup  ## a conversation with a real model (98 MB, fetched once) about a made-up clinic
	$(BIN)/mpcache chat --policy full --max-new-tokens 48 --context mpcache/demo/clinic.txt \
		--model "$$($(BIN)/python tools/fetch_model.py)"

test: setup
	$(BIN)/python -m pytest -n 2 -m "not slow"

test-slow: setup
	$(BIN)/python -m pytest -n 2 -m slow

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python tools/protos.py --check
	$(BIN)/python tools/docs.py --check
	$(BIN)/python -m tools.figures --check

bench: setup
	$(BIN)/python tools/bench.py

docs: setup  ## docs/protocols.md from the programs, and the exact figures of README.md and docs/
	$(BIN)/python tools/docs.py
	$(BIN)/python -m tools.figures

protos: setup
	$(BIN)/python tools/protos.py

clean:
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
