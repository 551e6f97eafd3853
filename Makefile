# make demo, make test and make check need Python 3.11 or newer and pip; they make .venv when it is missing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test wan chaos chaos-wan check format clean

demo: $(STAMP)
	$(BIN)/elastic demo

test: $(STAMP)
	$(BIN)/python -m pytest

# The data plane over the emulated WAN: needs root, /dev/net/tun, iproute2 and a C compiler, and says so.
wan: $(STAMP)
	$(BIN)/python -m benchmarks.wan.wan check
	$(BIN)/python -m pytest -m "wan and not chaos" tests/wan tests/chaos

# Random faults on real processes with new seeds: training for so many seconds (CHAOS_SEED=N begins with that seed),
# kills in mid all-reduce (KILLS_SEED), and schedules of faults on bare groups (SCHEDULE_SEED); random orders of events
# through the control plane's state machine (ORDERS_SEED).
CHAOS_SECONDS ?= 300
CHAOS_KILLS ?= 1000
CHAOS_SCHEDULES ?= 1000
CHAOS_ORDERS ?= 20000
chaos: export CHAOS_SECONDS := $(CHAOS_SECONDS)
chaos: export CHAOS_KILLS := $(CHAOS_KILLS)
chaos: export CHAOS_SCHEDULES := $(CHAOS_SCHEDULES)
chaos: export CHAOS_ORDERS := $(CHAOS_ORDERS)
chaos: $(STAMP)
	$(BIN)/python -m pytest -m "chaos and not wan" -s -o faulthandler_timeout=0 tests/chaos tests/collectives tests/elastic

# The same on sites of the emulated WAN, with cut paths; needs what `make wan` needs.
chaos-wan: export CHAOS_SECONDS := $(CHAOS_SECONDS)
chaos-wan: $(STAMP)
	$(BIN)/python -m pytest -m "chaos and wan" -s -o faulthandler_timeout=0 tests/chaos

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict -p collectives -p fault -p elastic -p actors -p cli
	$(BIN)/python -m pytest tests/test_house.py

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $(STAMP)

clean:
	rm -rf $(VENV) build dist *.egg-info
