# `make demo` and `make test` install everything into .venv/ first. Requires Python 3.11 to 3.13 and a package index.
PY := .venv/bin/python

.PHONY: help setup demo test test-unit fuzz chaos chaos-quick lint lint-types lint-text format reference lock audit clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 12

setup: ## install the CPU environment into .venv/
	@deploy/setup-cpu.sh

demo: setup ## train a small model on a real task, both processes on this machine
	$(PY) -m learner.demo $(DEMO_FLAGS)

# In order of their names: integration tests, the longest, first, so that both workers have work to the end.
test: setup ## run all tests; the integration tests start a real vLLM
	$(PY) -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder tests

test-unit: setup ## run the unit tests, in seconds
	$(PY) -m pytest -q tests/unit

chaos: setup ## train under a random schedule of faults, about 40 minutes (CHAOS_FLAGS="--seed N")
	$(PY) -m tests.chaos $(CHAOS_FLAGS)

chaos-quick: setup ## train under a few faults, in minutes
	$(PY) -m tests.chaos --quick $(CHAOS_FLAGS)

fuzz: setup ## send 20,000 malformed requests to a rollout server (FUZZ_FLAGS="--seed 7")
	FUZZ_EXAMPLES=10000 $(PY) -m pytest -q --timeout 1200 tests/unit/shared/test_adapter_blobs.py
	$(PY) -m tests.fuzz $(FUZZ_FLAGS)

lint: setup ## run ruff, import-linter, mypy, hadolint, Kubernetes schemas, and a search for secrets
	@$(MAKE) --no-print-directory -j 2 --output-sync=target lint-types lint-text

lint-types:
	$(PY) -m mypy

lint-text:
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	.venv/bin/lint-imports --no-cache
	deploy/lint.sh
	files=$$(git ls-files) && $(PY) -m detect_secrets.pre_commit_hook --no-verify $$files

format: setup ## format the code, and fix what ruff can fix
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

reference: setup ## regenerate docs/cli.md and docs/http.md from the code
	$(PY) -m docs.reference

lock: ## regenerate the lists of pinned packages (UPGRADE=1: newest versions)
	deploy/lock-cpu.sh
	deploy/lock-images.sh

audit: ## look up known vulnerabilities of the pinned packages (needs pypi.org)
	deploy/audit.sh

clean: ## remove environment, builds and caches, but not runs/
	rm -rf .venv build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis ./*.egg-info
	find shared rollout_server learner bench tests -name __pycache__ -type d -prune -exec rm -rf {} +
