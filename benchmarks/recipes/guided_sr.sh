#!/usr/bin/env bash
# Super-resolution with a trained pyramid (paper P, tables 3 and 4) at x4 and x8, on images that it has not seen.
#
#   benchmarks/recipes/guided_sr.sh MODEL TEST_IMAGES OUTPUT [cpu|gpu]
#
# MODEL is a pipeline that faces.sh or fashion.sh trained. FEATURES, WEIGHTS: as in faces.sh; LPIPS_WEIGHTS: of LPIPS'
# network (squeeze). ARRAY_KEY: of TEST_IMAGES, if they are an array.
set -euo pipefail
model=$1 test=$2 output=$3 size=${4:-cpu}
case $size in
    cpu) flags=(--images 48 --slow_images 8 --batch_size 8) ;;
    gpu) flags=(--images 500 --slow_images 100 --batch_size 100) ;;
    *) echo "size $size: expected cpu or gpu" >&2; exit 2 ;;
esac
for factor in 4 8; do
    python benchmarks/guided_sr.py --model "$model" --reference "$test" ${ARRAY_KEY:+--array_key "$ARRAY_KEY"} \
        --factor "$factor" "${flags[@]}" --features "${FEATURES:-squeezenet}" ${WEIGHTS:+--weights "$WEIGHTS"} \
        ${LPIPS_WEIGHTS:+--lpips_weights "$LPIPS_WEIGHTS"} --grids "$output/x$factor" --output "$output/x$factor.json"
done
