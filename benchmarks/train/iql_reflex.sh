#!/usr/bin/env bash
# Advantage weighting against plain cloning, inverse dynamics 0.2 against 0: three seeds each on sample_dataset, the
# same batches in every arm of a seed. Nine runs, two at a time, one thread each, at most 15 minutes a run.
#
#   benchmarks/train/iql_reflex.sh            writes benchmarks/results/iql_reflex.json and docs/iql_reflex_seeds.png
#   UPDATES=8 SIZE=32 RESULTS=build/try.json FIGURE=build/try.png OUT=build/try benchmarks/train/iql_reflex.sh
set -euo pipefail
cd "$(dirname "$0")/../.."
export PYTHON=${PYTHON:-.venv/bin/python} DATA=${DATA:-sample_dataset} OUT=${OUT:-build/iql_reflex_seeds}
export UPDATES=${UPDATES:-1500} SIZE=${SIZE:-112} OMP_NUM_THREADS=1
RESULTS=${RESULTS:-benchmarks/results/iql_reflex.json} FIGURE=${FIGURE:-docs/iql_reflex_seeds.png}
if [ -e "$OUT" ]; then
    echo "$OUT is there already; runs of two times would be mixed. Move it away, or name another: OUT=build/again" >&2
    exit 1
fi
mkdir -p "$OUT"

echo "== 1 of 3: labels with a half-life of 2 s"
$PYTHON precompute_labels.py --data-dir "$DATA" --half-life-s 2 --overwrite

echo "== 2 of 3: nine runs, logs in $OUT"
arms() { # name, seed, what is different
    for seed in 1 2 3; do
        echo "awr $seed --use-awr --inv-dyn-weight 0.2"
        echo "bc $seed --no-use-awr --inv-dyn-weight 0.2"
        echo "no_inv_dyn $seed --use-awr --inv-dyn-weight 0"
    done
}
arms | xargs -P 2 -L 1 bash -c '
    started=$SECONDS
    TQDM_DISABLE=1 timeout 900 $PYTHON iql_reflex.py --data-dir "$DATA" --run-root "$OUT/runs" --exp-name $0 --seed $1 \
        --image-size $SIZE --backbone cnn --lr 1e-3 --max-updates $UPDATES --video-seconds 0 "${@:2}" \
        > "$OUT/$0_$1.log" 2>&1 || { echo "$0 seed $1 failed or took over 15 minutes: $OUT/$0_$1.log"; exit 1; }
    echo "$0 seed $1: $((SECONDS - started)) s"'

echo "== 3 of 3: means, intervals, paired differences"
$PYTHON benchmarks/train/summary.py "$OUT/runs" "$RESULTS" "$FIGURE"
