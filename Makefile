# The one task runner: every recipe is a line a person could type. What to change from outside:
#   make demo PYTHON=python3.12    another Python, 3.11 or newer
#   make demo TORCH_INDEX=URL      a package index that has a CPU build of torch: a fifth of the download
#   make record DATASET_DIR=mine FPS=30 WINDOW="SuperTux 2"     your own sessions; all recipes but demo read DATASET_DIR
#   make train-custom EPOCHS=50 BATCH_SIZE=32 LR=1e-4 FLAGS="--backbone cnn"      FLAGS: any flag of the script
#   make train FLAGS=--overwrite   replace the files that another run left in CHECKPOINTS
#   make export CKPT=checkpoints/reflex_epoch_0.pth OUT=reflex.onnx
SHELL := bash
PYTHON ?= $(shell python3.11 -c '' 2>/dev/null && echo python3.11 || echo python3)
TORCH_INDEX ?=
DATASET_DIR ?= dataset
FPS ?= 10
WINDOW ?= SuperTux
NEWEST_SESSION = $(patsubst %/recording.mp4,%,$(shell ls -t $(DATASET_DIR)/*/recording.mp4 2>/dev/null | head -1))
SESSION ?= $(or $(NEWEST_SESSION),$(DATASET_DIR))
EPOCHS ?=
BATCH_SIZE ?=
LR ?=
FLAGS ?=
CHECKPOINTS ?= checkpoints
CKPT ?= $(or $(shell ls -td runs/*__iql_reflex*/ 2>/dev/null | head -1),runs)
OUT ?= reflex.onnx

CPU_VERSIONS = $(shell nvidia-smi -L >/dev/null 2>&1 || echo -c constraints-cpu.txt)
PIP_OPTIONS = $(CPU_VERSIONS) $(addprefix --extra-index-url ,$(TORCH_INDEX))
CHECK_PYTHON = import sys; sys.version_info < (3, 11) and sys.exit("Python 3.11 or newer is needed, %s is %s. Name one: make PYTHON=python3.11" % (sys.executable, sys.version.split()[0]))

.PHONY: help install install-pokemon demo demo-pokemon test smoke lint sample fresh-labels record label label-all train train-awr train-no-awr train-custom export play bench-speed
.NOTPARALLEL:

help: ## this list
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 16

install: .venv/.core ## make .venv and install what the scripts need

install-pokemon: .venv/.pokemon ## the same, and the emulator of PokemonEnv

# A stamp says that an install came to its end; one that was cut off leaves none, and the next make goes on with it.
.venv/.test: EXTRA = [test]
.venv/.dev: EXTRA = [dev]
.venv/.live: EXTRA = [live]
.venv/.bench: EXTRA = [bench]
.venv/.pokemon: EXTRA = [pokemon]
.venv/.core .venv/.test .venv/.dev .venv/.live .venv/.bench .venv/.pokemon: pyproject.toml constraints-cpu.txt
	@$(PYTHON) -c '$(CHECK_PYTHON)'
	@echo "== installing .$(EXTRA) into .venv $(CPU_VERSIONS); torch is large, the first time takes some minutes"
	test -x .venv/bin/pip || $(PYTHON) -m venv .venv
	set -o pipefail; .venv/bin/pip install -e ".$(EXTRA)" $(PIP_OPTIONS) | grep --line-buffered -E '^ *(Downloading .*\.whl \(|Installing|Successfully)'
	@touch $@

demo: .venv/.core ## label the sample, train a policy on it, evaluate on the held-out session: about ten minutes
	@echo "== 1 of 2: labels: deaths, wins, episodes and returns of sample_dataset"
	.venv/bin/python precompute_labels.py --data-dir sample_dataset --half-life-s 2 --overwrite
	@echo "== 2 of 2: train iql_reflex.py, then evaluate it on the sessions that were held out"
	.venv/bin/python iql_reflex.py --data-dir sample_dataset --image-size 112 --backbone cnn --lr 1e-3 --max-updates 1500

demo-pokemon: .venv/.pokemon ## an expert plays the quest on an emulator, bc_pokemon.py learns to: about a quarter of an hour
	@echo "== 1 of 2: twenty episodes of the scripted expert"
	rm -rf build/demo_pokemon
	.venv/bin/python collect_expert_data.py --episodes 20 --epsilon 0.4 --num-workers 2 --expert-data-dir build/demo_pokemon/expert_data
	@echo "== 2 of 2: train bc_pokemon.py on them, then let it play beside the expert and the baselines"
	.venv/bin/python bc_pokemon.py --expert-data-dir build/demo_pokemon/expert_data --model-dir build/demo_pokemon/models --total-training-steps 4000 --learning-rate 1e-3 --anneal-lr --obs-height 40 --obs-width 60 --capture-video $(FLAGS)

record: .venv/.live ## record a window of your desktop into DATASET_DIR; WINDOW and FPS say which and how
	.venv/bin/python record_session.py --fps $(FPS) --window "$(WINDOW)" --output $(DATASET_DIR)

label: .venv/.core ## label the newest session of DATASET_DIR, or SESSION=
	.venv/bin/python precompute_labels.py --data-dir $(SESSION)

label-all: .venv/.core ## label all sessions of DATASET_DIR that have no labels
	.venv/bin/python precompute_labels.py --data-dir $(DATASET_DIR)

TRAIN = .venv/bin/python iql_reflex.py --data-dir $(DATASET_DIR)
TRAIN_FLAGS = $(addprefix --epochs ,$(EPOCHS)) $(addprefix --batch-size ,$(BATCH_SIZE)) $(addprefix --lr ,$(LR)) $(FLAGS)

train: .venv/.core ## train on DATASET_DIR with the script's own settings; EPOCHS, BATCH_SIZE, LR, FLAGS change them
	$(TRAIN) --checkpoint-dir $(CHECKPOINTS) $(TRAIN_FLAGS)

train-awr: .venv/.core ## advantage-weighted; the two runs stand side by side in tensorboard --logdir runs
	$(TRAIN) --exp-name iql_reflex_awr --use-awr --checkpoint-dir $(CHECKPOINTS)/awr $(TRAIN_FLAGS)

train-no-awr: .venv/.core ## the same as plain behavioural cloning
	$(TRAIN) --exp-name iql_reflex_no_awr --no-use-awr --checkpoint-dir $(CHECKPOINTS)/no_awr $(TRAIN_FLAGS)

train-custom: .venv/.core ## train with EPOCHS=, BATCH_SIZE=, LR= and any FLAGS=
	$(TRAIN) --exp-name iql_reflex_custom --checkpoint-dir $(CHECKPOINTS) $(TRAIN_FLAGS)

export: .venv/.core ## a checkpoint, CKPT= or the newest run's best.pt, as ONNX for playing: OUT=
	.venv/bin/python export_reflex.py --checkpoint $(CKPT) --output $(OUT) $(FLAGS)

play: .venv/.live ## the exported policy OUT= in the window WINDOW=; a dry run unless FLAGS=--send-keys
	.venv/bin/python play_reflex.py live --model $(OUT) --window "$(WINDOW)" $(FLAGS)

test: .venv/.test ## all tests; those of the game skip where SuperTux or Xvfb is missing
	.venv/bin/pytest tests/static tests/unit tests/smoke tests/game

smoke: .venv/.test ## the tests that need no game, in under five minutes
	.venv/bin/pytest -m "not slow and not game" tests/static tests/unit tests/smoke

lint: .venv/.dev ## ruff: rules and format
	.venv/bin/ruff check
	.venv/bin/ruff format --check

bench-speed: .venv/.bench ## decoding, matching and training beside their rivals: benchmarks/results, docs/benchmarks.md
	.venv/bin/python -m benchmarks.speed.decode
	.venv/bin/python -m benchmarks.speed.template_matching
	.venv/bin/python -m benchmarks.speed.train_step
	.venv/bin/python -m benchmarks.speed.episodes
	.venv/bin/python -m benchmarks.speed.collect
	.venv/bin/python -m benchmarks.speed.controls
	.venv/bin/python -m benchmarks.speed.agent

# name, demonstrator, seed, seconds, level
define SESSIONS
run_1 skilled 9 80 generated
run_2 sloppy 27 80 generated
run_3 skilled 4 60 generated
run_4 skilled 14 80 generated
run_5 sloppy 3 60 generated
run_6 skilled 12 60 generated
run_7 sloppy 2 60 welcome_antarctica
run_8 skilled 1 60 welcome_antarctica
run_9 sloppy 5 80 generated
run_10 sloppy 33 80 generated
run_11 sloppy 36 60 generated
heldout_1 sloppy 22 60 generated
heldout_2 sloppy 2 70 generated
endef
export SESSIONS
RECORD = .venv/bin/python record_session.py --crf 28

sample: .venv/.test ## record the sessions of sample_dataset again, into build/sample (those that are not there yet); needs SuperTux, Xvfb
	xargs -P 2 -L 1 sh -c 'test -e build/sample/$$0/frames.parquet || $(RECORD) --output build/sample --name $$0 --demonstrator $$1 --seed $$2 --seconds $$3 --level $$4' <<< "$$SESSIONS"
	cp -r sample_dataset/sprites sample_dataset/README.md build/sample
	@echo "== to take them over: rm -r sample_dataset && mv build/sample sample_dataset"

fresh-labels: .venv/.test ## record 76 new sessions into build/fresh (those not there yet), compare their labels with what the game reported
	printf '%s\n' "skilled 640 480 "{200..211} "skilled 800 600 "{212..219} "sloppy 640 480 "{220..223} "sloppy 800 600 "{224..227} "sloppy 640 480 "{228..231} "sloppy 800 600 "{232..235} \
		"skilled 640 480 "{240..242} "sloppy 640 480 "{243..245} "skilled 1280 800 "{246..248} "sloppy 1280 800 "{249..251} \
		"skilled 602 452 "{252..254} "sloppy 602 452 "{255..257} "skilled 1710 600 "{258..260} "sloppy 1710 600 "{261..263} \
		"skilled 602 452 "{264,266,267} "sloppy 602 452 "{265,271} "skilled 1710 600 "{268,269} "sloppy 1710 600 270" \
		"skilled 602 452 "{272,273} "sloppy 602 452 "{274,275} "skilled 1710 600 "{276,277} "sloppy 1710 600 "{278,279} \
	| xargs -P 2 -L 1 sh -c 'test -e build/fresh/run_$$3/frames.parquet || $(RECORD) --output build/fresh --name run_$$3 --demonstrator $$0 --width $$1 --height $$2 --seed $$3 --seconds 90'
	.venv/bin/python precompute_labels.py --data-dir build/fresh --truth truth.parquet --overwrite
