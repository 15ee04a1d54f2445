#!/usr/bin/env bash
# A policy from sample_dataset plays the real game beside the demonstrator and the baselines, from an empty folder: labels,
# training, export, then 20 episodes of each player on each level. Needs SuperTux and Xvfb; two hours on two cores that
# have nothing else to do. The sample was recorded on levels of its own, some of generated:0-9 among them.
#
#   benchmarks/train/closed_loop.sh            writes benchmarks/results/closed_loop.json and docs/closed_loop.png
#   MODEL=reflex.onnx LEVELS=generated:3 EPISODES=2 OUT=build/try RESULTS=build/try.json FIGURE=build/try.png \
#       benchmarks/train/closed_loop.sh        a model of yours, no training
set -euo pipefail
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-.venv/bin/python} OUT=${OUT:-build/closed_loop} MODEL=${MODEL:-} FLAGS=${FLAGS:-}
LEVELS=${LEVELS:-generated:0-9 welcome_antarctica journey_begins} EPISODES=${EPISODES:-20} GAMES=${GAMES:-1}
RESULTS=${RESULTS:-benchmarks/results/closed_loop.json} FIGURE=${FIGURE:-docs/closed_loop.png}
export TQDM_MININTERVAL=10 OMP_NUM_THREADS=1
if [ -e "$OUT" ]; then
    echo "$OUT is there already; runs of two times would be mixed. Move it away, or name another: OUT=build/again" >&2
    exit 1
fi
mkdir -p "$OUT"

if [ -z "$MODEL" ]; then
    echo "== 1 of 3: label the sample, train, export"
    MODEL=$OUT/reflex.onnx
    cp -r sample_dataset "$OUT/sample"
    $PYTHON precompute_labels.py --data-dir "$OUT/sample" --half-life-s 2 --overwrite
    OMP_NUM_THREADS=2 $PYTHON iql_reflex.py --data-dir "$OUT/sample" --image-size 112 --backbone cnn --lr 1e-3 \
        --max-updates 1500 --run-root "$OUT/runs"
    $PYTHON export_reflex.py --checkpoint "$OUT"/runs/* --output "$MODEL"
fi

echo "== 2 of 3: $EPISODES episodes of each player on $LEVELS"
for level in $LEVELS; do
    replay=sample_dataset/run_1 # the fastest win; of the game's own level the only skilled session
    if [ "$level" = welcome_antarctica ]; then replay=sample_dataset/run_8; fi
    # shellcheck disable=SC2086
    $PYTHON play_reflex.py closed-loop --model "$MODEL" --level "$level" --episodes "$EPISODES" --games "$GAMES" \
        --replay-session $replay --output "$OUT/${level/:/_}" $FLAGS
done

echo "== 3 of 3: $RESULTS, $FIGURE"
mkdir -p "$(dirname "$RESULTS")" "$(dirname "$FIGURE")"
# shellcheck disable=SC2086
$PYTHON - "$OUT" "$RESULTS" $LEVELS <<'END'
import json
import sys
from pathlib import Path

out, results, *levels = sys.argv[1:]
tables = {level: json.loads((Path(out) / level.replace(":", "_") / "closed_loop.json").read_text()) for level in levels}
Path(results).write_text(json.dumps({"command": "benchmarks/train/closed_loop.sh", "levels": tables}, indent=1) + "\n")
END
first=${LEVELS%% *}
cp "$OUT/${first/:/_}/closed_loop.png" "$FIGURE"
