# Everything starts from a bare clone with Python 3.10+ and make: `make demo`, `make test`, `make lint`, `make bench`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DOCS ?= NOTICE
MINUTES ?= 8.5
QUESTION ?= Who made the base model?

.PHONY: demo test needle delta lint format reference bench model clean

demo: model  ## ask about a file of this repository with the built-in model
	$(BIN)/nsa ask $(DOCS) "$(QUESTION)" --max-tokens 60

test: model
	$(BIN)/python -m pytest

needle: $(VENV)/installed  ## train a two-layer model to find a needle, with and without selection: minutes
	$(BIN)/python -m pytest tests/models/training/test_needle.py -m slow -s

delta: model  ## a slice of training the built-in model on a GPU; run it again until it is done
	$(BIN)/nsa train delta --minutes $(MINUTES)

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

reference: $(VENV)/installed  ## the page of every command's help
	$(BIN)/python -m nsa_cli.reference > REFERENCE.md

bench: model
	$(BIN)/nsa bench

model: $(VENV)/installed
	$(BIN)/nsa models install

$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "nsa needs Python 3.10 or newer; name one: make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
