#!/usr/bin/env bash
# One network trained on what plans visit, on all times and levels alike, and at the full size alone: the same minutes of one
# processor core for each, two seeds, each sampled by the plans that suit it (results/engine.json).
#
#   benchmarks/recipes/engine.sh TRAIN_IMAGES TEST_IMAGES OUTPUT [MINUTES]
#
# About 4 hours with 30 minutes a training. Resumable: the same command goes on. WEIGHTS names the file of the feature
# network (squeezenet); BF16=--bf16 samples in bfloat16, on a processor that computes in it.
set -euo pipefail
train=$1 test=$2 output=$3 minutes=${4:-30}
export OMP_NUM_THREADS=1
for seed in 0 1; do
    for arm in full new paper; do
        python benchmarks/engine.py train --train_data_dir "$train" --output "$output" --arm $arm --seed $seed --minutes "$minutes"
    done
done
python benchmarks/engine.py score --train_data_dir "$train" --held_out "$test" --output "$output" --minutes "$minutes" \
    ${WEIGHTS:+--weights "$WEIGHTS"} ${BF16:-} --result "$output/engine.json"
