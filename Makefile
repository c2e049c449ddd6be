# One command each for everything a newcomer, a developer and a CI need. `make` alone lists them.
PYTHON ?= python3.11
# Extra arguments for pip; PIP_ARGS="--extra-index-url ..." chooses the index of a CPU or CUDA build of torch.
PIP_ARGS ?=
BIN := .venv/bin
READY := .venv/.ready
PYTEST := $(BIN)/python -m pytest
# Processes that share the tests; each has servers of its own.
TEST_PROCESSES ?= 2

.DEFAULT_GOAL := help
.PHONY: help setup protos lint test test-unit test-integration test-e2e chaos two-hosts demo bench-teacher bench-corpus bench-head bench-index bench-load bench-lookup bench-swap study-refresh fuzz breaking publish-protos up down

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY) ## Make .venv with exactly the packages of requirements.lock

$(READY): requirements.lock pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "Byline needs Python 3.11; set PYTHON=/path/to/python3.11" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@# torch first and with the lock as constraints: which build it is, and what it needs, is the index's business.
	$(BIN)/python -m pip install --disable-pip-version-check -q $(PIP_ARGS) -c requirements.lock "$$(grep '^torch==' requirements.lock)"
	$(BIN)/python -m pip install --disable-pip-version-check -q --no-deps $(PIP_ARGS) -r requirements.lock
	$(BIN)/python -m pip install --disable-pip-version-check -q --no-deps --no-build-isolation -e .
	@touch $@

protos: setup ## Generate Python code from protos/, then check style
	PATH="$(CURDIR)/$(BIN):$$PATH" sh protos/generate.sh
	$(BIN)/buf lint

lint: setup ## Style, types and protos
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/buf lint

test: setup ## All tests: unit, contract, integration, end to end, short chaos
	OMP_NUM_THREADS=1 $(PYTEST) -n $(TEST_PROCESSES) --no-loadscope-reorder

test-unit: setup ## Tests without servers or processes
	$(PYTEST) tests/unit tests/contract

test-integration: setup ## Tests on real Postgres and Redis
	$(PYTEST) tests/integration

test-e2e: setup ## Tests with real processes
	$(PYTEST) tests/e2e

two-hosts: setup ## Workers in a network namespace of their own, the link cut for a while (root and iproute2; 2 minutes)
	BYLINE_TEST_TWO_HOSTS=1 $(PYTEST) tests/e2e/test_two_hosts.py

chaos: setup ## 10,000 jobs while everything dies in turn; verdict, seed and history in reports/chaos (25 minutes on two cores)
	OMP_NUM_THREADS=1 $(BIN)/python -m byline.cli.chaos

fuzz: setup ## 13,000 damaged images and requests; reports/fuzz/result.json (two minutes)
	rm -f reports/fuzz/result.json
	BYLINE_TEST_FUZZ_INPUTS=13000 BYLINE_TEST_FUZZ_REPORT=$(CURDIR)/reports/fuzz/result.json $(PYTEST) tests/integration/gateway/test_fuzz.py

breaking: setup ## Are the protos still compatible with those that were published?
	PATH="$(CURDIR)/$(BIN):$$PATH" sh protos/breaking.sh

publish-protos: breaking ## Let the protos as they are now be those that later ones must be compatible with
	$(BIN)/buf build protos -o protos/published.binpb --exclude-source-info


demo: setup ## The whole path on real images; writes reports/demo/index.html
	$(BIN)/byline demo

bench-teacher: setup ## The teacher beside its published form: cost at equal agreement (25 minutes on one quiet core)
	OMP_NUM_THREADS=1 $(BIN)/python -m byline.cli.bench_teacher

bench-corpus: setup ## A thousand items added to a running system: seconds until they are found
	OMP_NUM_THREADS=1 $(BIN)/python -m byline.cli.bench_corpus

bench-index: setup ## Index tiers beside the bare FAISS call and plain scans, 10k and 100k embeddings (20 minutes on one quiet core)
	OMP_NUM_THREADS=1 $(BIN)/python -m byline.cli.bench_index

bench-head: setup ## Our head's trainer beside the published recipe: time and held-out mAP (20 minutes of one quiet core)
	OMP_NUM_THREADS=1 $(BIN)/python -m byline.cli.bench_head

bench-load: setup ## Lookups a second at which p99 stays in target, and what happens at twice that (5 minutes on two quiet cores)
	OMP_NUM_THREADS=1 $(BIN)/python -m byline.cli.bench_load

bench-lookup: setup ## The fast tier end to end over gRPC at 120k x 768, real servers and services (20 minutes on two quiet cores)
	OMP_NUM_THREADS=1 $(BIN)/python -m byline.cli.bench_lookup

bench-swap: setup ## Ten releases swapped under 50 lookups a second, 120k x 768, real servers and services (15 minutes on two quiet cores)
	OMP_NUM_THREADS=1 $(BIN)/python -m byline.cli.bench_swap

study-refresh: setup ## A simulated year of the loop: shift, artists, active against random labels (20 minutes of one quiet core)
	OMP_NUM_THREADS=1 $(BIN)/python -m studies.refresh --page docs/refresh.md

up: setup ## Start servers and services in the background (state in .byline/)
	$(BIN)/byline up

down: setup ## Stop what `make up` started; data is kept
	$(BIN)/byline down
