#!/usr/bin/env bash
# The transformer on ten simulated sessions of two minutes, from an empty folder: the command of
# docs/controls_transformer.md with both forms of the loss, side by side with one thread each, then each policy on four
# sessions of persons that neither its training nor its thresholds have seen, beside the best score that can be reached
# and the baselines. At most 45 minutes on two cores that have nothing else to do.
#
#   benchmarks/train/controls_transformer.sh        writes benchmarks/results/controls_transformer.json
#   SESSIONS=3 MINUTES=0.5 EPOCHS=1 STRIDE=8 VAL_STRIDE=8 RESULTS=build/try.json OUT=build/try \
#       benchmarks/train/controls_transformer.sh
set -euo pipefail
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-.venv/bin/python} OUT=${OUT:-build/controls_transformer}
SESSIONS=${SESSIONS:-10} MINUTES=${MINUTES:-2} EPOCHS=${EPOCHS:-16} STRIDE=${STRIDE:-4} VAL_STRIDE=${VAL_STRIDE:-4}
HISTORY_DROPOUT=${HISTORY_DROPOUT:-1.0} # 1: without a history, which free running could not repeat
RESULTS=${RESULTS:-benchmarks/results/controls_transformer.json} FLAGS=${FLAGS:---dropout 0.1 --warmup-epochs 2}
export TQDM_DISABLE=1 OMP_NUM_THREADS=1
if [ -e "$OUT" ]; then
    echo "$OUT is there already; runs of two times would be mixed. Move it away, or name another: OUT=build/again" >&2
    exit 1
fi
mkdir -p "$OUT"

echo "== 1 of 3: $SESSIONS sessions of $MINUTES minutes, and four of other persons"
$PYTHON benchmarks/make_control_sessions.py --output "$OUT/recordings" --sessions "$SESSIONS" --minutes "$MINUTES"
$PYTHON benchmarks/make_control_sessions.py --output "$OUT/fresh" --sessions 4 --persons 4 --minutes "$MINUTES" --seed 2

train() { # the form of the loss
    local started=$SECONDS
    # shellcheck disable=SC2086
    $PYTHON controls_transformer.py --exp-name "controls_$1" --recordings-dir "$OUT/recordings" --loss-norm "$1" \
        --epochs "$EPOCHS" --stride "$STRIDE" --val-stride "$VAL_STRIDE" --action-history-dropout "$HISTORY_DROPOUT" \
        --run-root "$OUT/runs" --model-dir "$OUT/models/$1" $FLAGS > "$OUT/$1.log" 2>&1 || { echo "$1 failed:"; tail -5 "$OUT/$1.log"; return 1; }
    echo "controls_$1: $((SECONDS - started)) s" | tee -a "$OUT/seconds.txt"
}

echo "== 2 of 3: --loss-norm masked-mean and --loss-norm seed"
trap 'kill $(jobs -p) 2> /dev/null || true' EXIT
train masked-mean &
first=$!
train seed
wait "$first"

echo "== 3 of 3: fresh persons"
for norm in masked-mean seed; do
    for session in "$OUT"/fresh/session_*.npz; do
        $PYTHON controls_transformer.py --replay "$session" --model "$OUT/models/$norm" --run-root "$OUT/replays/$norm" \
            >> "$OUT/replays.log"
    done
done

$PYTHON benchmarks/train/controls_transformer_summary.py "$OUT" "$RESULTS"
