#!/usr/bin/env bash
# The figures of docs/agent_finetune.md, from an empty folder: pack 20,000 frames of Airstriker, train all phases, play
# 20 games; the same with the committed sample alone. At most 50 minutes on two cores that have nothing else to do.
#
#   benchmarks/train/agent.sh        writes benchmarks/results/agent_finetune.json
#   FRAMES=1500 STEPS=20 GAMES=2 RESULTS=build/try.json OUT=build/try benchmarks/train/agent.sh
set -euo pipefail
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-.venv/bin/python} OUT=${OUT:-build/agent} FRAMES=${FRAMES:-20000} STEPS=${STEPS:-0} GAMES=${GAMES:-20}
RESULTS=${RESULTS:-benchmarks/results/agent_finetune.json} GAME=retro:Airstriker-Genesis-v0
export TQDM_DISABLE=1
if [ -e "$OUT" ]; then
    echo "$OUT is there already; runs of two times would be mixed. Move it away, or name another: OUT=build/again" >&2
    exit 1
fi
mkdir -p "$OUT"

step() { # name, then a command; its output goes to a log
    local name=$1 started=$SECONDS
    shift
    "$@" > "$OUT/$name.log" 2>&1 || { echo "$name failed:"; tail -5 "$OUT/$name.log"; return 1; }
    echo "$name: $((SECONDS - started)) s" | tee -a "$OUT/seconds.txt"
}

train() { # name, data, play or not
    step "$1" "$PYTHON" agent_finetune.py --exp-name "$1" --data-dir "$2" --run-root "$OUT/runs" \
        --tokenizer-steps "$STEPS" --dynamics-steps "$STEPS" --agent-steps "$STEPS"
    step "${1}_play" "$PYTHON" agent_finetune.py --exp-name "${1}_play" --data-dir "$2" --run-root "$OUT/runs" --phase eval \
        --agent-checkpoint "$(echo "$OUT"/runs/*__"$1"__*/agent.pt)" --env-id "$GAME" --play-episodes "$GAMES"
}

step pack "$PYTHON" pack_episodes.py --env-id "$GAME" --output "$OUT/packed" --frames "$FRAMES"
train packed "$OUT/packed"
train sample sample_packed
$PYTHON benchmarks/train/agent_summary.py "$OUT" "$RESULTS"
