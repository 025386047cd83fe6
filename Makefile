# Everything starts from a bare clone with Python 3.10+ and make: `make demo`, `make test`, `make lint`, `make bench`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DOCS ?= NOTICE
MINUTES ?= 8.5
QUESTION ?= Who made the base model?

.PHONY: demo test needle delta lint format reference bench bench-gpu model clean

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

PARTS ?= forward backward decode groups-forward groups-backward small overflow
bench-gpu: $(if $(NSA),,model)  ## what BENCHMARKS.md lists of a GPU, some 5 minutes a part; one: make bench-gpu PARTS=decode
	mkdir -p gpu
	for part in $(PARTS); do \
		$(or $(NSA),$(BIN)/nsa) bench kernels --part $$part --minutes 8 | tee gpu/$$part.jsonl; done
	$(or $(NSA),$(BIN)/nsa) bench goals gpu/*.jsonl

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
