#!/usr/bin/env bash
# Cloning, DAgger and the hybrid on the quest, from an empty folder: expert episodes, the quick command of
# docs/bc_pokemon.md on all cores with 100 evaluation seeds for everyone, then the comparisons, two runs at a time with one
# thread each. About 70 minutes on two cores.
#
#   benchmarks/train/bc_pokemon.sh        writes benchmarks/results/bc_pokemon.json and docs/bc_pokemon.png
#   STEPS=40 EPISODES=3 SEEDS=4 LABELS=400 RESULTS=build/try.json FIGURE=build/try.png OUT=build/try \
#       benchmarks/train/bc_pokemon.sh
set -euo pipefail
cd "$(dirname "$0")/../.."
export PYTHON=${PYTHON:-.venv/bin/python} OUT=${OUT:-build/bc_pokemon} TQDM_DISABLE=1
export STEPS=${STEPS:-4000} EPISODES=${EPISODES:-20} SEEDS=${SEEDS:-100} LABELS=${LABELS:-3000}
RESULTS=${RESULTS:-benchmarks/results/bc_pokemon.json} FIGURE=${FIGURE:-docs/bc_pokemon.png}
mkdir -p "$OUT" # what is finished there stays as it is; the results name the commit of every run

train() { # name, seed, data, seeds of the evaluation, updates, what is different
    local started=$SECONDS
    if grep -qs "^files" "$OUT/$1_$2.log"; then return; fi
    rm -rf "$OUT"/runs/*"__$1__$2__"* "$OUT/models/$1_$2"
    $PYTHON bc_pokemon.py --exp-name "$1" --seed "$2" --expert-data-dir "$OUT/$3" --final-eval-episodes "$4" \
        --total-training-steps "$5" --learning-rate 1e-3 --anneal-lr --obs-height 40 --obs-width 60 \
        --run-root "$OUT/runs" --model-dir "$OUT/models/$1_$2" "${@:6}" \
        > "$OUT/$1_$2.log" 2>&1 || { echo "$1 seed $2 failed:"; tail -5 "$OUT/$1_$2.log"; return 1; }
    echo "$1, $2: $((SECONDS - started)) s" | tee -a "$OUT/seconds.txt"
}
export -f train

echo "== 1 of 4: $EPISODES episodes of the expert, and as many with two random steps in five"
started=$SECONDS
if [ ! -e "$OUT/clean.log" ]; then
    $PYTHON collect_expert_data.py --episodes "$EPISODES" --num-workers 2 --epsilon 0.4 --expert-data-dir "$OUT/noisy" > "$OUT/noisy.log" 2>&1
    echo "noisy, 1: $((SECONDS - started)) s" | tee -a "$OUT/seconds.txt"
    $PYTHON collect_expert_data.py --episodes "$EPISODES" --num-workers 2 --expert-data-dir "$OUT/clean" > "$OUT/clean.log" 2>&1
fi

echo "== 2 of 4: the quick command, everyone on $SEEDS seeds"
train quick 1 noisy "$SEEDS" "$STEPS" --baseline-episodes "$SEEDS"

echo "== 3 of 4: cloning and DAgger, the same number of labels and of updates, three seeds"
echo "== 4 of 4: cloning and the hybrid on the noisy episodes, three seeds"
few="--no-eval-sampled --baseline-episodes 0"
dagger="--algorithm dagger --dagger-steps $((LABELS / 12)) --dagger-share decay --dagger-decay 0" # the student plays every step
arms() {
    for seed in 1 2 3; do
        echo "dagger $seed clean $SEEDS $((STEPS * 3 / 4)) $few --label-budget $LABELS $dagger"
        echo "few_labels $seed clean $SEEDS $((STEPS * 3 / 4)) $few --label-budget $LABELS"
    done
    for seed in 1 2 3; do
        echo "noisy_hybrid $seed noisy $((SEEDS / 2)) $((STEPS * 3 / 10)) $few --algorithm hybrid --target-frequency 100"
        echo "noisy_bc $seed noisy $((SEEDS / 2)) $((STEPS * 3 / 10)) $few"
    done
}
export OMP_NUM_THREADS=1
arms | xargs -P 2 -L 1 bash -c 'train "$0" "$@"'

$PYTHON benchmarks/train/bc_pokemon_summary.py "$OUT/runs" "$RESULTS" "$FIGURE"
