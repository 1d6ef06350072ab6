#!/usr/bin/env bash
# Pyramidal DDPM on colour images at 16/32/64, with coordinates and without (paper P, fig. 6), then every plan timed and
# scored on the network with coordinates.
#
#   benchmarks/recipes/faces.sh TRAIN_IMAGES TEST_IMAGES OUTPUT [cpu|gpu] [MINUTES an arm]
#
# Resumable: the same command goes on. CPU: a smaller network; GPU: the small preset, compiled. Both in bf16.
set -euo pipefail
train=$1 test=$2 output=$3 size=${4:-cpu}
case $size in
    cpu) minutes=${5:-40} flags=(--block_out_channels 64 96 128 192 --train_batch_size 48) ;;
    gpu) minutes=${5:-8} flags=(--train_batch_size 1024 --compile True) ;;
    *) echo "size $size: expected cpu or gpu" >&2; exit 2 ;;
esac
for coordinates in True False; do
    accelerate launch --num_processes 1 --num_machines 1 --mixed_precision bf16 --dynamo_backend no \
        examples/train_pddpm.py --train_data_dir "$train" --output_dir "$output/coordinates-$coordinates" \
        --resolution 16 32 64 --preset small --learning_rate 2e-4 --random_flip True \
        --use_coordinates "$coordinates" --minutes "$minutes" "${flags[@]}"
done
python benchmarks/plans.py --model "$output/coordinates-True/pipeline" --reference "$test" --bf16 \
    --output "$output/plans.json" ${LPIPS_WEIGHTS:+--lpips_weights "$LPIPS_WEIGHTS"}
