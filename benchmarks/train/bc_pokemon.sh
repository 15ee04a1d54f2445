#!/usr/bin/env bash
# Cloning, DAgger and the hybrid on the quest, from an empty folder: expert episodes, then the quick command of
# docs/bc_pokemon.md with 100 evaluation seeds for everyone, then the comparisons. One run at a time, all cores.
#
#   benchmarks/train/bc_pokemon.sh        writes benchmarks/results/bc_pokemon.json and docs/bc_pokemon.png
#   STEPS=20 EPISODES=3 SEEDS=4 RESULTS=build/try.json FIGURE=build/try.png OUT=build/try benchmarks/train/bc_pokemon.sh
set -euo pipefail
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-.venv/bin/python} OUT=${OUT:-build/bc_pokemon}
STEPS=${STEPS:-2000} EPISODES=${EPISODES:-20} SEEDS=${SEEDS:-100} LABELS=${LABELS:-2000}
RESULTS=${RESULTS:-benchmarks/results/bc_pokemon.json} FIGURE=${FIGURE:-docs/bc_pokemon.png}
if [ -e "$OUT" ]; then
    echo "$OUT is there already; runs of two times would be mixed. Move it away, or name another: OUT=build/again" >&2
    exit 1
fi
mkdir -p "$OUT"
export TQDM_DISABLE=1

train() { # name, seed, data, what is different
    local started=$SECONDS
    $PYTHON bc_pokemon.py --exp-name "$1" --seed "$2" --expert-data-dir "$OUT/$3" --run-root "$OUT/runs" \
        --model-dir "$OUT/models/$1_$2" --total-training-steps "$STEPS" --learning-rate 5e-4 --eval-frequency 0 \
        --final-eval-episodes "$SEEDS" "${@:4}" > "$OUT/$1_$2.log" 2>&1 || { tail -5 "$OUT/$1_$2.log"; exit 1; }
    echo "$1 seed $2: $((SECONDS - started)) s"
}

echo "== 1 of 4: $EPISODES episodes of the expert, and as many in which every tenth step is random"
started=$SECONDS
$PYTHON collect_expert_data.py --episodes "$EPISODES" --expert-data-dir "$OUT/clean" > "$OUT/collect.log" 2>&1
$PYTHON collect_expert_data.py --episodes "$EPISODES" --expert-data-dir "$OUT/noisy" --epsilon 0.1 >> "$OUT/collect.log" 2>&1
echo "both: $((SECONDS - started)) s"

echo "== 2 of 4: the quick command, everyone on $SEEDS seeds"
train quick 1 clean --baseline-episodes "$SEEDS"

echo "== 3 of 4: cloning and DAgger with $LABELS expert labels and $STEPS updates each"
for seed in 1 2; do
    train few_labels "$seed" clean --baseline-episodes 0 --label-budget "$LABELS"
    train dagger "$seed" clean --baseline-episodes 0 --label-budget "$LABELS" --algorithm dagger --dagger-share decay
done

echo "== 4 of 4: cloning and the hybrid on the noisy episodes, three seeds"
for seed in 1 2 3; do
    train noisy_bc "$seed" noisy --baseline-episodes 0
    train noisy_hybrid "$seed" noisy --baseline-episodes 0 --algorithm hybrid
done

$PYTHON benchmarks/train/bc_pokemon_summary.py "$OUT/runs" "$RESULTS" "$FIGURE"
