#!/usr/bin/env bash
# Policies learnt from recordings play the real game, from an empty folder. Two scripted demonstrators are recorded, a
# first policy imitates them, plays in turns with the better one, and learns from what that one would have pressed
# (DAgger). Then it plays beside the demonstrator and the baselines; advantage weights, plain cloning and IQL are
# compared on the recordings. Needs SuperTux and Xvfb, and two cores that have nothing else to do.
#
#   benchmarks/train/closed_loop.sh            all steps, writes benchmarks/results/closed_loop*.json, docs/closed_loop*.png
#   STEPS="record label first correct policy" benchmarks/train/closed_loop.sh    a policy: build/closed_loop/policy.onnx
#   STEPS=play MODEL=$PWD/reflex.onnx REPLAY=sample_dataset/run_1 OUT=build/mine RESULTS=build/mine FIGURES=build/mine \
#       benchmarks/train/closed_loop.sh        the tables of a model of yours
#
# What is there already is not made again: a step that was cut off goes on where it stood. Remove the files of a step to
# repeat it, and the folder of a recording that was cut off.
set -euo pipefail
cd "$(dirname "$0")/../.."
export PYTHON=${PYTHON:-.venv/bin/python} OUT=${OUT:-build/closed_loop} OMP_NUM_THREADS=1 TQDM_MININTERVAL=10
export DATA=${DATA:-$OUT/recordings} CORRECTED=${CORRECTED:-$OUT/corrected} MODEL=${MODEL:-$OUT/policy.onnx}
STEPS=${STEPS:-record label first correct policy play rules compare offline}
LEVELS=${LEVELS:-generated:0-9 welcome_antarctica journey_begins}
SEEDS=${SEEDS:-1 2} EPISODES=${EPISODES:-20} GAMES=${GAMES:-3}
RESULTS=${RESULTS:-benchmarks/results} FIGURES=${FIGURES:-docs}
mkdir -p "$OUT" "$RESULTS" "$FIGURES"

step() { # name, what it does
    if [[ " $STEPS " != *" $1 "* ]]; then return 1; fi
    echo "== $1: $2"
}
record() { # lines of: demonstrator, level, seed, name, seconds, folder, flags; three games at a time
    xargs -P 3 -L 1 bash -c '[ -e "$5/$3" ] || $PYTHON record_session.py --demonstrator $0 --level $1 --seed $2 --name $3 \
        --seconds $4 --output "$5" --preset veryfast "${@:6}" > "$OUT/record_$3.log" 2>&1 ||
        { echo "$3 was not recorded, see $OUT/record_$3.log; call this script again" >&2; exit 1; }'
}
label() { # folder; two sessions at a time
    find "$1" -mindepth 1 -maxdepth 1 -type d | sort |
        xargs -P 2 -I{} $PYTHON precompute_labels.py --data-dir {} --half-life-s 2 > "$OUT/label_$(basename "$1").log" 2>&1
}
train() { # name, folder of sessions, updates, flags
    if [ -e "$OUT/$1.onnx" ]; then return; fi
    rm -rf "$OUT"/runs/*__"$1"__*
    $PYTHON iql_reflex.py --overwrite --exp-name "$1" --run-root "$OUT/runs" --data-dir "$2" --max-updates "$3" --action-horizon 0 \
        --image-size 112 --backbone cnn --cnn-grid 7 --lr 1e-3 --batch-size 64 --inv-dyn-weight 0 --video-seconds 0 \
        --thresholds even-odds "${@:4}" > "$OUT/train_$1.log" 2>&1
    $PYTHON export_reflex.py --checkpoint "$OUT"/runs/*__"$1"__* --output "$OUT/$1.onnx" >> "$OUT/train_$1.log" 2>&1
    echo "$1 is trained, log in $OUT/train_$1.log"
}
export -f train

if step record "72 sessions of mixed skill, an hour of play, none on generated:0-9"; then
    {
        for seed in {300..308}; do echo "skilled welcome_antarctica $seed antarctica_$seed 80 $DATA"; done
        for seed in {40..85}; do echo "skilled generated $seed skilled_$seed 75 $DATA"; done
        for seed in {100..111}; do echo "sloppy generated $seed sloppy_$seed 60 $DATA"; done
        for seed in 310 311; do echo "sloppy welcome_antarctica $seed antarctica_$seed 60 $DATA"; done
        for seed in 86 87; do echo "skilled generated $seed heldout_$seed 75 $DATA"; done
        echo "skilled welcome_antarctica 309 heldout_309 80 $DATA"
    } | record
fi
if step label "deaths, squished enemies and wins; half-life 2 s"; then label "$DATA"; fi
if step first "a first policy, plain cloning of the recordings"; then
    OMP_NUM_THREADS=2 train first "$DATA" 2000 --no-use-awr
fi
if step correct "it plays in turns with the demonstrator, whose keys are the labels; 50 sessions"; then
    {
        for seed in {112..141}; do echo "skilled generated $seed corrected_$seed 50 $CORRECTED --policy $OUT/first.onnx"; done
        for seed in {320..339}; do
            echo "skilled welcome_antarctica $seed corrected_$seed 45 $CORRECTED --policy $OUT/first.onnx"
        done
    } | record
    label "$CORRECTED"
fi
if step policy "the policy, plain cloning of both"; then
    mkdir -p "$OUT/both"
    ln -sfn "$(realpath "$DATA")"/* "$(realpath "$CORRECTED")"/* "$OUT/both"
    OMP_NUM_THREADS=2 train policy "$OUT/both" 4000 --no-use-awr
fi

if step play "$EPISODES episodes of each player on $LEVELS"; then
    for level in $LEVELS; do
        if [ -e "$OUT/play_${level/:/_}" ]; then continue; fi
        replay=${REPLAY:-$DATA/skilled_83} # the fastest win; of the game's own level the first life that came farthest
        if [ "$level" = welcome_antarctica ]; then replay=${REPLAY:-$DATA/antarctica_301}; fi
        $PYTHON play_reflex.py closed-loop --model "$MODEL" --level "$level" --episodes "$EPISODES" --games "$GAMES" \
            --seed 100 --debounce 1 --max-hold 3 --replay-session "$replay" \
            --output "$OUT/play_${level/:/_}"
        cp "$OUT/play_${level/:/_}/closed_loop.json" "$RESULTS/closed_loop_${level/:/_}.json"
        cp "$OUT/play_${level/:/_}/closed_loop.png" "$FIGURES/closed_loop_${level/:/_}.png"
    done
fi

if step rules "the policy with thresholds of equal rate, and with keys drawn from its probabilities"; then
    OMP_NUM_THREADS=2 train policy_equal_rate "$OUT/both" 4000 --no-use-awr --thresholds equal-rate
    $PYTHON benchmarks/play/compare.py --level welcome_antarctica --episodes "$EPISODES" --games "$GAMES" \
        --models "policy=$MODEL" "policy_equal_rate=$OUT/policy_equal_rate.onnx" "policy+sample=$MODEL" \
        --output "$RESULTS/closed_loop_decoding.json" --figure "$OUT/closed_loop_decoding.png"
fi
if step compare "plain cloning, advantage weights (training seeds $SEEDS), IQL, thresholds, on the recordings alone"; then
    {
        for seed in $SEEDS; do
            echo "bc_$seed $DATA 2000 --seed $seed --checkpoint-dir $OUT/checkpoints/bc_$seed --no-use-awr"
            echo "awr_$seed $DATA 2000 --seed $seed --checkpoint-dir $OUT/checkpoints/awr_$seed"
        done
        echo "iql_1 $DATA 2000 --checkpoint-dir $OUT/checkpoints/iql_1 --q-head"
        echo "bc_1_equal_rate $DATA 2000 --no-use-awr --thresholds equal-rate"
        echo "awr_1_equal_rate $DATA 2000 --thresholds equal-rate"
    } | xargs -P 2 -L 1 bash -euc 'train "$@"' train
    models=()
    for seed in $SEEDS; do models+=("bc=$OUT/bc_$seed.onnx" "awr=$OUT/awr_$seed.onnx"); done
    models+=("iql=$OUT/iql_1.onnx" "iql+q=$OUT/iql_1.onnx")
    models+=("bc_equal_rate=$OUT/bc_1_equal_rate.onnx" "awr_equal_rate=$OUT/awr_1_equal_rate.onnx")
    $PYTHON benchmarks/play/compare.py --models "${models[@]}" --level "${LEVELS%% *}" --episodes "$EPISODES" \
        --games "$GAMES" --output "$RESULTS/closed_loop_arms.json" --figure "$FIGURES/closed_loop_arms.png"
fi
if step offline "do the figures of held-out sessions say how well a policy plays?"; then
    $PYTHON benchmarks/play/offline_metrics.py --checkpoints "$OUT"/checkpoints/*/*.pth --data-dir "$DATA" \
        --games "$GAMES" --output "$RESULTS/offline_metrics.json" --figure "$FIGURES/offline_metrics.png"
fi
