#!/usr/bin/env bash
# The patch experiment (paper P, fig. 5): trained on windows of half the top side with their coordinates, and without,
# two seeds of each; sampled at the top size, which no network saw whole.
#
#   benchmarks/recipes/patches.sh TRAIN_IMAGES TEST_IMAGES OUTPUT [cpu|gpu] [STEPS an arm]
#
# Resumable: the same command goes on. FEATURES, WEIGHTS and PRECISION as in faces.sh.
set -euo pipefail
train=$1 test=$2 output=$3 size=${4:-cpu}
case $size in
    cpu) steps=${5:-1500} precision=${PRECISION:-no} flags=(--preset mini --train_batch_size 48) images=192 top=48 ;;
    gpu) steps=${5:-4000} precision=${PRECISION:-bf16} flags=(--preset small --train_batch_size 256) images=1000 top=500 ;;
    *) echo "size $size: expected cpu or gpu" >&2; exit 2 ;;
esac
arms=()
for seed in 0 1; do
    for coordinates in True False; do
        folder=$output/patches-$coordinates-$seed
        accelerate launch --num_processes 1 --num_machines 1 --mixed_precision "$precision" --dynamo_backend no \
            examples/train_pddpm.py --train_data_dir "$train" --output_dir "$folder" --resolution 16 32 64 \
            --patch_size 32 --learning_rate 5e-4 --random_flip True --seed "$seed" --use_coordinates "$coordinates" \
            --noise_window 1.0 --level_share 1 1 1 --max_train_steps "$steps" "${flags[@]}"
        name=$([ "$coordinates" = True ] && echo "patches with coordinates" || echo "patches without coordinates")
        arms+=(--arm "$name, seed $seed=$folder/pipeline")
    done
done
python benchmarks/ablation.py "${arms[@]}" --reference "$test" --features "${FEATURES:-squeezenet}" \
    ${WEIGHTS:+--weights "$WEIGHTS"} --images "$images" --top_images "$top" --grids "$output/grids" \
    --output "$output/patches.json" --title "Trained on windows of 32x32, sampled at 64x64, $steps steps an arm."
