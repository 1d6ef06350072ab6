#!/usr/bin/env bash
# Pyramidal DDPM on Fashion-MNIST at 8/16/32 with coordinates and without, two seeds of each, scored (paper P, fig. 6);
# then ways of sampling on the first.
#
#   benchmarks/recipes/fashion.sh FASHION_MNIST.npz OUTPUT [cpu|gpu] [STEPS an arm]
#
# Resumable: the same command goes on. FEATURES, WEIGHTS and PRECISION as in faces.sh.
set -euo pipefail
data=$1 output=$2 size=${3:-cpu}
case $size in
    cpu) steps=${4:-2500} precision=${PRECISION:-no} flags=(--preset tiny --train_batch_size 128) ;;
    gpu) steps=${4:-8000} precision=${PRECISION:-bf16} flags=(--preset small --train_batch_size 512) ;;
    *) echo "size $size: expected cpu or gpu" >&2; exit 2 ;;
esac
features=(--features "${FEATURES:-squeezenet}" ${WEIGHTS:+--weights "$WEIGHTS"})
arms=()
for seed in 0 1; do
    for coordinates in True False; do
        folder=$output/coordinates-$coordinates-$seed
        accelerate launch --num_processes 1 --num_machines 1 --mixed_precision "$precision" --dynamo_backend no \
            examples/train_pddpm.py --train_data_dir "$data" --array_key x_train --image_channels 1 \
            --output_dir "$folder" --resolution 8 16 32 --learning_rate 1e-3 --random_flip True \
            --noise_window 1.0 --level_share 1 1 1 \
            --seed "$seed" --use_coordinates "$coordinates" --max_train_steps "$steps" "${flags[@]}"
        name=$([ "$coordinates" = True ] && echo "with coordinates" || echo "without coordinates")
        arms+=(--arm "$name, seed $seed=$folder/pipeline")
    done
done
python benchmarks/ablation.py "${arms[@]}" --reference "$data" --array_key x_test "${features[@]}" --images 500 \
    --top_images 250 --grids "$output/grids" --output "$output/coordinates.json" \
    --title "Fashion-MNIST at 8/16/32, $steps steps an arm."
python benchmarks/bench.py --model "$output/coordinates-True-0/pipeline" --reference "$data" --array_key x_test \
    "${features[@]}" --cache "$output/images" --skip 'DDPM 1000' '1000/30/30' --output "$output/bench.json"
