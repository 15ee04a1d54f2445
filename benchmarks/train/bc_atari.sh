#!/usr/bin/env bash
# Cloning in a game that is no Pokemon: Pong, from a rule that follows the ball, beside that rule and chance. About a
# quarter of an hour on two cores. The table that bc_pokemon.py prints at the end goes to docs/bc_pokemon.md by hand.
#
#   benchmarks/train/bc_atari.sh          writes benchmarks/results/bc_atari.json
#   STEPS=20 EPISODES=2 SEEDS=2 RESULTS=build/try.json OUT=build/try_atari benchmarks/train/bc_atari.sh
set -euo pipefail
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-.venv/bin/python} OUT=${OUT:-build/bc_atari} RESULTS=${RESULTS:-benchmarks/results/bc_atari.json}
STEPS=${STEPS:-1500} EPISODES=${EPISODES:-10} SEEDS=${SEEDS:-20}
if [ -e "$OUT" ]; then
    echo "$OUT is there already; runs of two times would be mixed. Move it away, or name another: OUT=build/again" >&2
    exit 1
fi
expert=benchmarks/train/pong_expert.py:make_expert
$PYTHON collect_expert_data.py --env-id ALE/Pong-v5 --expert $expert --episodes "$EPISODES" --max-steps 600 \
    --expert-data-dir "$OUT/expert_data" --compress
$PYTHON bc_pokemon.py --exp-name bc_atari --env-id ALE/Pong-v5 --expert $expert --expert-data-dir "$OUT/expert_data" \
    --run-root "$OUT/runs" --model-dir "$OUT/models" --max-steps 1000 --total-training-steps "$STEPS" \
    --learning-rate 5e-4 --eval-frequency 0 --final-eval-episodes "$SEEDS" --baseline-episodes "$SEEDS"
mkdir -p "$(dirname "$RESULTS")"
$PYTHON - "$OUT/runs" "$RESULTS" <<'END'
import json
import sys
from pathlib import Path

(run,) = Path(sys.argv[1]).iterdir()
evaluation, provenance = (json.loads((run / name).read_text()) for name in ("eval.json", "provenance.json"))
facts = {name: provenance[name] for name in ("commit", "dirty", "torch", "cpu_capability", "threads")}
facts |= {"command": "benchmarks/train/bc_atari.sh", "metrics": evaluation["metrics"]}
Path(sys.argv[2]).write_text(json.dumps(facts | {"summaries": evaluation["summaries"]}, indent=1) + "\n")
print(sys.argv[2])
END
