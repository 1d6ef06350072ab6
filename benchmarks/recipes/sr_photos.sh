#!/usr/bin/env bash
# SR4 x4 on windows of photographs, then on pairs of files (such as Set5) in windows.
#
#   benchmarks/recipes/sr_photos.sh TRAIN_IMAGES LOW HIGH OUTPUT [cpu|gpu] [MINUTES]
#
# Resumable. LPIPS_WEIGHTS: of LPIPS' network (squeeze).
set -euo pipefail
train=$1 low=$2 high=$3 output=$4 size=${5:-cpu}
case $size in
    cpu) minutes=${6:-32} flags=(--preset mini --patch_size 64 --train_batch_size 4 --learning_rate 3e-4
                                 --mixed_precision no) tile=128 ;;
    gpu) minutes=${6:-9} flags=(--preset small --patch_size 256 --train_batch_size 32 --mixed_precision bf16) tile=512 ;;
    *) echo "size $size: expected cpu or gpu" >&2; exit 2 ;;
esac
python examples/train_sr.py --train_data_dir "$train" --output_dir "$output/training" --cache_dir "$output/cache" \
    --resolution 256 --scale_factor 4 --random_flip True --minutes "$minutes" --save_images_steps 0 "${flags[@]}"
python benchmarks/photos_sr.py --model "$output/training/pipeline" --low "$low" --high "$high" --tile $tile --plans fast \
    ${LPIPS_WEIGHTS:+--lpips_weights "$LPIPS_WEIGHTS"} --grids "$output/grids" --output "$output/result.json"
