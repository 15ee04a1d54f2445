# The one task runner: every recipe is a line a person could type. What to change from outside:
#   make demo PYTHON=python3.12    another Python, 3.11 or newer
#   make demo TORCH_INDEX=URL      a package index that has a CPU build of torch: a fifth of the download
SHELL := bash
PYTHON ?= $(shell python3.11 -c '' 2>/dev/null && echo python3.11 || echo python3)
TORCH_INDEX ?=

CPU_VERSIONS = $(shell nvidia-smi -L >/dev/null 2>&1 || echo -c constraints-cpu.txt)
PIP_OPTIONS = $(CPU_VERSIONS) $(addprefix --extra-index-url ,$(TORCH_INDEX))
CHECK_PYTHON = import sys; sys.version_info < (3, 11) and sys.exit("Python 3.11 or newer is needed, %s is %s. Name one: make PYTHON=python3.11" % (sys.executable, sys.version.split()[0]))
FRESH_SEEDS = 33 36 38 40 101 102 103 104 109 110

.PHONY: help install demo test smoke lint sample fresh-deaths
.NOTPARALLEL:

help: ## this list
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 16

install: .venv/.core ## make .venv and install what the scripts need

# A stamp says that an install came to its end; one that was cut off leaves none, and the next make goes on with it.
.venv/.test: EXTRA = [test]
.venv/.dev: EXTRA = [dev]
.venv/.core .venv/.test .venv/.dev: pyproject.toml constraints-cpu.txt
	@$(PYTHON) -c '$(CHECK_PYTHON)'
	@echo "== installing .$(EXTRA) into .venv $(CPU_VERSIONS); torch is large, the first time takes some minutes"
	test -x .venv/bin/pip || $(PYTHON) -m venv .venv
	set -o pipefail; .venv/bin/pip install -e ".$(EXTRA)" $(PIP_OPTIONS) | grep --line-buffered -E '^ *(Downloading .*\.whl \(|Installing|Successfully)'
	@touch $@

demo: .venv/.core ## label the sample, train a policy on it, evaluate on the held-out session: about ten minutes
	@echo "== 1 of 2: labels: deaths, wins, episodes and returns of sample_dataset"
	.venv/bin/python precompute_labels.py --data-dir sample_dataset --half-life-s 2 --overwrite
	@echo "== 2 of 2: train iql_reflex.py, then evaluate it on the session that was held out"
	.venv/bin/python iql_reflex.py --data-dir sample_dataset --image-size 112 --backbone cnn --lr 1e-3 --max-updates 1500

test: .venv/.test ## all tests; those of the game skip where SuperTux or Xvfb is missing
	.venv/bin/pytest tests/static tests/unit tests/smoke tests/game

smoke: .venv/.test ## the tests that need no game, in under five minutes
	.venv/bin/pytest -m "not slow and not game" tests/static tests/unit tests/smoke

lint: .venv/.dev ## ruff: rules and format
	.venv/bin/ruff check
	.venv/bin/ruff format --check

# name, demonstrator, seed, seconds, level
define SESSIONS
run_1 skilled 13 60 generated
run_2 sloppy 27 80 generated
run_3 skilled 17 60 generated
run_4 skilled 19 60 generated
run_5 sloppy 3 80 generated
run_6 skilled 12 60 generated
run_7 sloppy 2 60 welcome_antarctica
run_8 skilled 1 60 welcome_antarctica
run_9 skilled 14 60 generated
heldout_1 sloppy 8 60 generated
heldout_2 sloppy 2 60 generated
endef
export SESSIONS
RECORD = .venv/bin/python record_session.py --crf 28

sample: .venv/.test ## record the sessions of sample_dataset again, into build/sample; needs SuperTux and Xvfb
	rm -rf build/sample
	xargs -P 2 -L 1 sh -c '$(RECORD) --output build/sample --name $$0 --demonstrator $$1 --seed $$2 --seconds $$3 --level $$4' <<< "$$SESSIONS"
	cp -r sample_dataset/sprites sample_dataset/README.md build/sample
	@echo "== to take them over: rm -r sample_dataset && mv build/sample sample_dataset"

fresh-deaths: .venv/.test ## record ten new sessions into build/fresh, print precision and recall of their labels
	rm -rf build/fresh
	xargs -P 2 -n 1 sh -c '$(RECORD) --output build/fresh --name run_$$0 --demonstrator sloppy --seed $$0 --seconds 90' <<< "$(FRESH_SEEDS)"
	.venv/bin/python precompute_labels.py --data-dir build/fresh --truth
