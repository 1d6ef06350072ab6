#!/usr/bin/env bash
# Pyramidal DDPM on Fashion-MNIST at 8/16/32, then every plan timed and scored.
#
#   benchmarks/recipes/fashion.sh FASHION_MNIST.npz OUTPUT [cpu|gpu] [MINUTES]
#
# Resumable: the same command goes on.
set -euo pipefail
data=$1 output=$2 size=${3:-cpu}
case $size in
    cpu) minutes=${4:-15} flags=(--preset tiny --train_batch_size 128) ;;
    gpu) minutes=${4:-8} flags=(--preset small --train_batch_size 4096 --compile True) ;;
    *) echo "size $size: expected cpu or gpu" >&2; exit 2 ;;
esac
accelerate launch --num_processes 1 --num_machines 1 --mixed_precision bf16 --dynamo_backend no \
    examples/train_pddpm.py --train_data_dir "$data" --array_key x_train --image_channels 1 \
    --output_dir "$output/training" --resolution 8 16 32 --learning_rate 1e-3 --random_flip True \
    --minutes "$minutes" "${flags[@]}"
python benchmarks/plans.py --model "$output/training/pipeline" --reference "$data" --array_key x_test --bf16 \
    --output "$output/plans.json" ${LPIPS_WEIGHTS:+--lpips_weights "$LPIPS_WEIGHTS"}
