#!/usr/bin/env bash
# SR4 and SR3 on the same budget, 16 to 64 (a GPU: 16 to 128), then the fewest network calls of SR4 without loss.
#
#   benchmarks/recipes/sr_faces.sh TRAIN_IMAGES TEST_IMAGES OUTPUT [cpu|gpu] [train|measure]
#
# Resumable, FEATURES, WEIGHTS, LPIPS_WEIGHTS: as in sr_table.sh.
set -euo pipefail
train=$1 test=$2 output=$3 size=${4:-cpu} part=${5:-all}
case $size in
    cpu) flags=(--resolution 64 --scale_factor 4 --preset mini --train_batch_size 4 --learning_rate 3e-4
                --max_train_steps 3500 --lr_warmup_steps 200 --mixed_precision no)
         measured=(--images 32 --slow_images 4) searched=(--images 12) ;;
    gpu) flags=(--resolution 128 --scale_factor 8 --preset paper --train_batch_size 32 --minutes 9 --mixed_precision bf16)
         measured=(--images 256 --slow_images 64 --batch_size 64) searched=(--images 64 --batch_size 64) ;;
    *) echo "size $size: expected cpu or gpu" >&2; exit 2 ;;
esac
common=(--features "${FEATURES:-squeezenet}" ${WEIGHTS:+--weights "$WEIGHTS"}
        ${LPIPS_WEIGHTS:+--lpips_weights "$LPIPS_WEIGHTS"})
sr3=(--low_res_injection none --attention 16x16 --prediction_target image --beta_schedule linear --ddpm_num_steps 2000)
if [ "$part" != measure ]; then
    for name in sr4 sr3; do
        [ $name = sr3 ] && flags+=("${sr3[@]}")
        python examples/train_sr.py --train_data_dir "$train" --validation_data_dir "$test" --output_dir "$output/$name" \
            --cache_dir "$output/cache" --random_flip True "${flags[@]}"
    done
fi
if [ "$part" != train ]; then
    python benchmarks/residual_sr.py --arms table --models "SR4=$output/sr4/pipeline" "SR3=$output/sr3/pipeline" \
        --reference "$test" "${measured[@]}" "${common[@]}" --grids "$output/grids" --output "$output/table.json"
    python benchmarks/few_steps.py --models "SR4=$output/sr4/pipeline" --reference "$train" "${searched[@]}" \
        "${common[@]}" --output "$output/few_steps.json"
    python benchmarks/residual_sr.py --arms frontier --models "SR4=$output/sr4/pipeline" --reference "$test" \
        "${measured[@]}" "${common[@]}" --plans "$output/few_steps.json" --output "$output/frontier.json"
fi
