#!/usr/bin/env bash
# SR3, SR4 and what lies between (paper S, table 1), and the schemes of injection, each trained on the same budget and
# measured on images that none has seen; then few network calls on SR4.
#
#   benchmarks/recipes/sr_table.sh TRAIN_IMAGES TEST_IMAGES OUTPUT [cpu|gpu] [train|measure]
#
# Resumable: the same command goes on. "train" and "measure" do only that; ROWS="sr4 cosine" trains those only. FEATURES
# and WEIGHTS choose the feature network (squeezenet, and its file), LPIPS_WEIGHTS is of LPIPS' network.
set -euo pipefail
train=$1 test=$2 output=$3 size=${4:-cpu} part=${5:-all}
case $size in
    cpu) flags=(--resolution 32 --scale_factor 4 --preset tiny --train_batch_size 4 --learning_rate 3e-4
                --max_train_steps 1000 --lr_warmup_steps 100 --mixed_precision no)
         measured=(--images 32 --slow_images 4) ;;
    gpu) flags=(--resolution 128 --scale_factor 8 --preset paper --train_batch_size 32 --minutes 9 --mixed_precision bf16)
         measured=(--images 256 --slow_images 64 --batch_size 64) ;;
    *) echo "size $size: expected cpu or gpu" >&2; exit 2 ;;
esac
baseline=(--low_res_injection none --attention 16x16 --prediction_target image)
linear=(--beta_schedule linear)
declare -A row=(
    [sr3]="${baseline[*]} ${linear[*]} --ddpm_num_steps 2000"
    [sr3_500]="${baseline[*]} ${linear[*]}"
    [vlb]="${baseline[*]} --variance_type learned_range"
    [cosine]="${baseline[*]}"
    [attention_fusion]="${baseline[*]} --input_fusion attention"
    [residual]="--low_res_injection none --attention 16x16"
    [residual_as_printed]="--low_res_injection none --attention 16x16 --residual_scale 1"
    [sr4]=""
    [sr4_direct]="--low_res_injection direct"
    [sr4_bicubic]="--low_res_injection bicubic"
    [sr4_large_kernel]="--low_res_injection large_kernel"
)
order=(sr3 sr3_500 vlb cosine attention_fusion residual residual_as_printed sr4 sr4_direct sr4_bicubic sr4_large_kernel)
common=(--reference "$test" "${measured[@]}" --features "${FEATURES:-squeezenet}" ${WEIGHTS:+--weights "$WEIGHTS"}
        ${LPIPS_WEIGHTS:+--lpips_weights "$LPIPS_WEIGHTS"})
models=()
for name in "${order[@]}"; do models+=("$name=$output/$name/pipeline"); done
if [ "$part" != measure ]; then
    for name in ${ROWS:-${order[@]}}; do
        # shellcheck disable=SC2086
        python examples/train_sr.py --train_data_dir "$train" --output_dir "$output/$name" --cache_dir "$output/cache" \
            --random_flip True --save_images_steps 0 "${flags[@]}" ${row[$name]}
    done
fi
if [ "$part" != train ]; then
    python benchmarks/residual_sr.py --arms table --models "${models[@]}" "${common[@]}" --grids "$output/grids" \
        --output "$output/table.json"
fi
