#!/usr/bin/env bash
# Pixel-aware diffusion beside diffusion with EDM's preconditioning and no structure, and beside an ordinary DDPM, both
# sampled by stock solvers, each with as many parameters and as many minutes; ablations; then quality against time.
#
#   benchmarks/recipes/pixel_aware.sh TRAIN TEST OUTPUT [cpu|gpu] [MINUTES an arm] [SEEDS]
#
# TRAIN, TEST: folders, or FILE.npz:ARRAY for gray images of an array. SIZE: side of the images, 32 by default. Resumable.
# FEATURES and WEIGHTS as in faces.sh. The second network's width (WIDE) makes up for the autoencoder's parameters.
set -euo pipefail
train=$1 test=$2 output=$3 size=${4:-cpu} seeds=${6:-"0 1"} side=${SIZE:-32}
case $size in
    cpu) minutes=${5:-10} preset=${PRESET:-tiny} wide=${WIDE:-24 48 80}
         ddpm=(--preset tiny --block_out_channels 32 64 64 --train_batch_size 32 --mixed_precision no)
         flags=(--train_batch_size 32 --learning_rate 1e-3 --autoencoder_share 0.4 --mixed_precision no) bench=() ;;
    gpu) minutes=${5:-9} preset=${PRESET:-small} wide=${WIDE:-80 112 144 192}
         ddpm=(--preset small --train_batch_size 512 --mixed_precision bf16)
         flags=(--train_batch_size 512 --learning_rate 1e-3 --mixed_precision bf16)
         bench=(--images 5000 --slow_images 2000 --batch_size 500 --time_batch 64) ;;
    *) echo "size $size: expected cpu or gpu" >&2; exit 2 ;;
esac
data=(--train_data_dir "${train%%:*}" --resolution "$side") tested=(--reference "${test%%:*}" --train "${train%%:*}")
seen=(--images "${test%%:*}" --size "$side")
if [[ $train == *:* ]]; then
    data+=(--array_key "${train#*:}" --image_channels 1)
    tested+=(--array_key "${test#*:}" --train_key "${train#*:}")
    seen+=(--array_key "${test#*:}" --channels 1)
fi
models=()
arm() { # NAME SEED FLAGS...
    local folder="$output/$1-$2"
    python examples/train_pixel_aware.py "${data[@]}" --output_dir "$folder" --seed "$2" --minutes "$minutes" \
        --cache_dir "$output/cache" --random_flip True --preset "$preset" "${flags[@]}" "${@:3}"
    models+=("$1:$2=$folder/pipeline")
}
for seed in $seeds; do
    arm pixel-aware "$seed"
    arm no-structure "$seed" --use_structure False --encoder_channels $wide
done
python examples/train_pddpm.py "${data[@]}" --output_dir "$output/ddpm-0" --minutes "$minutes" --learning_rate 1e-3 \
    --cache_dir "$output/cache" --random_flip True --use_coordinates False "${ddpm[@]}"
models+=("DDPM:0=$output/ddpm-0/pipeline")
arm uniform-rate 0 --schedule uniform
arm no-floor 0 --floor 0
arm paper 0 --mode paper --head literal
python benchmarks/pixel_aware.py --models "${models[@]}" "${tested[@]}" --features "${FEATURES:-squeezenet}" \
    ${WEIGHTS:+--weights "$WEIGHTS"} "${bench[@]}" --grids "$output/grids" --output "$output/table.json"
python benchmarks/pixel_aware_process.py "${seen[@]}" --paper_model "$output/paper-0/pipeline" \
    --structure_model "$output/pixel-aware-0/pipeline" --strips "$output/strips.png" --output "$output/process.json"
