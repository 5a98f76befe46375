# make demo | test | lint | bench : each sets everything up into .venv first. Nothing else to remember.
PYTHON ?= python3.11
BIN := .venv/bin
export HF_HUB_OFFLINE ?= 1

.PHONY: setup demo demo-library test lint format bench evaluate report report-long wheel clean

setup: .venv/.ready

# The index is whatever pip is configured with; constraints.txt pins versions and names no host.
.venv/.ready: pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) is needed (3.11 or 3.12); or: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[experiments,gateway,edge,train,rl,dev]'
	@touch $@

demo: setup            ## the service: gateway, two edges, two devices, links; a stream of prompts, pictures, a summary
	$(BIN)/python -m experiments.service_demo --out out/demo

demo-library: setup    ## no service: prompts -> images at several handoff points, a contact sheet and a table
	$(BIN)/python -m experiments.demo --out out/demo-library

test: setup            ## the whole suite; prints the time per folder
	$(BIN)/python -m pytest tests

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup           ## step costs, own loop against diffusers, batch scaling, handoff; what the service adds; what a decision and a cached latent cost: tables
	$(BIN)/python -m experiments.bench --out docs/results/bench.md
	$(BIN)/python -m experiments.service_bench --out docs/results/service.md
	$(BIN)/python -m experiments.decision_bench --out docs/results/decision-latency.md
	$(BIN)/python -m experiments.cache_bench --out docs/results/cache.md
	$(BIN)/python -m experiments.load bench --out docs/results/load-control.md

evaluate: setup        ## the README's table: 500 held-out prompts a family (long)
	$(BIN)/python -m experiments.evaluate --out docs/results --readme README.md

# What the other commands measured, beside the papers' figures, stands in the same page.
RESULTS := $(foreach name,routing scheduling load cache-levels,--result docs/results/$(name).md)

report: setup          ## RISE's relay table on the embedded families, short form, as one HTML page
	$(BIN)/relay-experiment run configs/experiments/rise.yaml --out runs/experiments/rise
	$(BIN)/relay-experiment report runs/experiments/rise --out out/report $(RESULTS)

report-long: setup     ## its long form: T = 28 and 50, letters, three seeds, every baseline (hours; DTYPE=bf16 halves them on a CPU that multiplies bf16)
	$(BIN)/relay-experiment run configs/experiments/rise-long.yaml $(if $(DTYPE),--dtype $(DTYPE)) --out runs/experiments/rise-long
	$(BIN)/relay-experiment report runs/experiments/rise-long --out out/report-long $(RESULTS)

wheel: setup
	$(BIN)/hatchling build -t wheel

clean:
	rm -rf .venv out dist build *.egg-info
