# The verbs a person types. `make` alone lists them.

PYTHON ?= python3
BACKEND ?= eager
TIER ?=
JOBS ?= 2
ARGS ?=
CASE ?=

# A variable on the command line that nothing reads would be ignored, and more would run than was
# asked for: so it is an error. What is exported by a shell is not looked at.
KNOWN := PYTHON BACKEND TIER JOBS ARGS CASE MEGAMOE_PYTHON TORCH INCLUDE NVCC
# "; did you mean NAME?", or ";": of a word and the known names.
MEANT = $(or $(shell '$(PYTHON)' -m megamoe.suggest '$(1)' $(2) 2>/dev/null),;)
GIVEN := $(foreach v,$(.VARIABLES),$(if $(filter command,$(origin $v)),$v))
UNKNOWN := $(filter-out $(KNOWN) SHELL MAKEFLAGS,$(GIVEN))
ifneq ($(UNKNOWN),)
$(error no verb reads $(firstword $(UNKNOWN))$(call MEANT,$(firstword $(UNKNOWN)),$(KNOWN)) `make` reads: $(KNOWN))
endif
VERBS := help setup check check-full test test-fast lint format bench golden-verify sanitize \
  compile-sm100 versions lock clean
UNKNOWN := $(filter-out $(VERBS),$(MAKECMDGOALS))
ifneq ($(UNKNOWN),)
$(error no verb $(firstword $(UNKNOWN))$(call MEANT,$(firstword $(UNKNOWN)),$(VERBS)) `make` lists the verbs)
endif
OF_CASES := check check-full golden-verify
ifneq ($(filter CASE,$(GIVEN)),)
ifneq ($(filter-out $(OF_CASES) setup,$(MAKECMDGOALS))$(if $(MAKECMDGOALS),,help),)
$(error CASE chooses cases of $(OF_CASES); $(or $(MAKECMDGOALS),help) reads none)
endif
endif
CASES := $(if $(strip $(CASE)),--case '$(CASE)' )
# A backend in ARGS stands for BACKEND, which has a default.
OF_BACKEND := $(if $(findstring --backend,$(ARGS)),,--backend '$(BACKEND)' )
# Without TIER, `check` decides: the quick tier, and any tier where cases are named.
OF_TIER := $(if $(strip $(TIER)),--tier '$(TIER)' )

# An interpreter that has torch already: then no .venv is made. `nix develop` exports it.
MEGAMOE_PYTHON ?=
ifeq ($(strip $(MEGAMOE_PYTHON)),)
INTERPRETER := .venv/bin/python
IMPORTS :=
SETUP := PYTHON='$(PYTHON)' TORCH='$(TORCH)' sh tools/setup_env.sh
else
# Before what the shell says, not instead of it: a Nix shell may keep its packages there.
INTERPRETER := '$(MEGAMOE_PYTHON)'
IMPORTS := PYTHONPATH=".$${PYTHONPATH:+:$$PYTHONPATH}"
SETUP := sh tools/setup_env.sh --host '$(MEGAMOE_PYTHON)'
endif
PY := $(IMPORTS) $(INTERPRETER)
MEGAMOE := $(PY) -c 'import sys; from megamoe.commands.main import main; sys.exit(main())'

# One thread a worker: two workers with a pool each would fight over two cores.
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -n $(JOBS) --dist worksteal
LINT := $(IMPORTS) sh tools/lint.sh $(INTERPRETER)

.DEFAULT_GOAL := help
.PHONY: $(VERBS)

help: ## list the verbs
	@echo 'make VERB [VARIABLE=value ...]'
	@echo
	@awk -F ': .*## ' '/^[a-z0-9-]+: .*## / { printf "  %-14s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@echo
	@echo '  BACKEND=$(BACKEND)  what check judges: a name, or path/to/file.py:OBJECT'
	@echo '  TIER=$(TIER)          how many cases check runs: quick or full (default: quick; of named cases full)'
	@echo '  CASE=          which cases check and golden-verify take, as CASE="requant-*,!*-t384"; of'
	@echo '                 any tier, as with --case'
	@echo '  ARGS=          further options, as ARGS="--kind forward --quiet"'
	@echo '  INCLUDE=       headers that compile-sm100 compiles: the include folder of DeepGEMM'
	@echo '  NVCC=          its compiler, CUDA 12.9 or newer (default: the one on the path)'
	@echo '  JOBS=$(JOBS)         test processes at a time'
	@echo '  PYTHON=$(PYTHON)  the Python 3.11 or newer that .venv is made from'
	@echo '  TORCH=         cpu or cuda (default: cuda where an NVIDIA GPU is)'
	@echo '  MEGAMOE_PYTHON= an interpreter that has torch already; no .venv is made'

setup: ## make .venv from the hashed locks (the other verbs do it by themselves)
	@$(SETUP)

check: setup ## judge BACKEND against the goldens
	@$(MEGAMOE) check $(OF_BACKEND)$(OF_TIER)$(CASES)$(ARGS)

check-full: setup ## the same with every case
	@$(MEGAMOE) check $(OF_BACKEND)--tier full $(CASES)$(ARGS)

# Lint takes one core for a minute, so it runs beside the tests; what it prints follows theirs.
test: setup ## all tests of this repository: lint, types, pytest
	@status=0; log=$$(mktemp); trap 'rm -f "$$log"' EXIT; trap 'exit 130' INT; \
	$(LINT) >"$$log" 2>&1 & \
	$(PYTEST) $(ARGS) || status=1; wait $$! || status=1; echo lint:; cat "$$log"; exit $$status

test-fast: setup ## pytest without the slow tests
	@$(PYTEST) -m 'not slow' $(ARGS)

lint: setup ## ruff, mypy and versions
	@$(LINT)

format: setup ## let ruff rewrite what it can
	@$(PY) -m ruff check --fix . && $(PY) -m ruff format .

bench: setup ## time the triton backend beside the floor and peers (needs an NVIDIA GPU)
	@$(MEGAMOE) bench $(ARGS)

golden-verify: setup ## recompute the goldens from the oracle; they must be equal in every bit
	@$(MEGAMOE) golden verify $(CASES)$(ARGS)

sanitize: setup ## compute-sanitizer memcheck and racecheck over a few cases (needs a GPU)
	@sh tools/sanitize.sh $(PY)

compile-sm100: setup ## compile DeepGEMM's fused kernel for sm_100a, without a GPU (INCLUDE=, NVCC=)
	@$(PY) tools/compile_sm100.py --include '$(INCLUDE)' $(if $(NVCC),--nvcc '$(NVCC)') $(ARGS)

versions: setup ## do the flake, the locks and the documentation say what toolchain.toml says?
	@$(PY) tools/versions.py

lock: ## resolve requirements/*.txt anew (needs uv)
	@'$(PYTHON)' tools/lock.py

clean: ## remove caches and build outputs (the environment stays; it is .venv)
	@rm -rf build dist out *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -path ./.venv -prune -o -name __pycache__ -type d -print | xargs rm -rf
