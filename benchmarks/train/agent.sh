#!/usr/bin/env bash
# The figures of docs/agent_finetune.md: pack 60,000 frames of Airstriker, train an agent, play 40 games, let it dream,
# play again; the same without dreams from the committed sample alone. Two hours on two cores that have nothing else to
# do, and twenty minutes for each row of the ablations.
#
#   benchmarks/train/agent.sh                        all steps; writes benchmarks/results/agent_finetune.json
#   benchmarks/train/agent.sh ablations summary      some of: pack packed sample imagine ablations summary
#   FRAMES=1500 STEPS=20 GAMES=2 GATES=--no-gates RESULTS=build/try.json OUT=build/try benchmarks/train/agent.sh
set -euo pipefail
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-.venv/bin/python} OUT=${OUT:-build/agent} FRAMES=${FRAMES:-60000} STEPS=${STEPS:-0} GAMES=${GAMES:-40}
RESULTS=${RESULTS:-benchmarks/results/agent_finetune.json} GAME=retro:Airstriker-Genesis-v0 GATES=${GATES:---gates}
export TQDM_DISABLE=1
if [ $# = 0 ] && [ -e "$OUT" ]; then
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

agent() { # name of the run, data, then flags
    local name=$1 data=$2
    shift 2
    step "$name" "$PYTHON" agent_finetune.py --exp-name "$name" --data-dir "$data" --run-root "$OUT/runs" "$@"
}

checkpoint() { echo "$OUT"/runs/*__"$1"__*/"$2".pt; } # of a run

imagine() { # name of the run, --baselines or --no-baselines (those of `imagine` play the same seeds), then flags
    local name=$1 baselines=$2
    shift 2
    agent "$name" "$OUT/packed" --phase imagine --agent-checkpoint "$(checkpoint packed agent)" --imagine-steps "$STEPS" \
        "$GATES" "$@"
    agent "${name}_play" "$OUT/packed" --phase eval --imagine-checkpoint "$(checkpoint "$name" imagine)" --env-id "$GAME" \
        --play-episodes "$GAMES" "$baselines"
}

train() { # name of the run, data
    agent "$1" "$2" --phase agent --tokenizer-steps "$STEPS" --dynamics-steps "$STEPS" --agent-steps "$STEPS"
    agent "${1}_play" "$2" --phase eval --agent-checkpoint "$(checkpoint "$1" agent)" --env-id "$GAME" \
        --play-episodes "$GAMES"
}

for part in ${*:-pack packed sample imagine ablations summary}; do
    case $part in
        pack) step pack "$PYTHON" pack_episodes.py --env-id "$GAME" --output "$OUT/packed" --frames "$FRAMES" ;;
        packed) train packed "$OUT/packed" ;;
        imagine) imagine imagine --baselines ;;
        sample) train sample sample_packed ;;
        ablations)
            imagine lambda --no-baselines --lam 0.8
            imagine horizon --no-baselines --horizon 15
            imagine beta --no-baselines --beta 0.3
            imagine noise --no-baselines --context-noise 0.25
            imagine sign --no-baselines --no-advantage-weights
            ;;
        summary) $PYTHON benchmarks/train/agent_summary.py "$OUT" "$RESULTS" ;;
        *) echo "$part: expected pack, packed, sample, imagine, ablations or summary" >&2 && exit 1 ;;
    esac
done
