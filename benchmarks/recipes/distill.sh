#!/usr/bin/env bash
# Pyramids of recipes/engine.sh distilled to one call or two, and super-resolution in one call (results/distill.json and
# one_call_sr.json).
#
#   benchmarks/recipes/distill.sh TRAIN_IMAGES TEST_IMAGES ENGINE OUTPUT [MINUTES]
#
# ENGINE is the output folder of engine.sh. About 5 hours of a processor core with 40 minutes a distillation. Resumable: the
# same command goes on. WEIGHTS and LPIPS_WEIGHTS name the files of squeezenet and of alexnet; BF16=--bf16 samples in
# bfloat16, on a processor that computes in it. The images are those of UTKFace by their names, which say age, gender and
# race: the second feature network is a classifier of these.
set -euo pipefail
train=$1 test=$2 engine=$3 output=$4 minutes=${5:-40}
export OMP_NUM_THREADS=1
lpips=(${LPIPS_WEIGHTS:+--lpips_weights "$LPIPS_WEIGHTS"})
mkdir -p "$output"
for seed in 0 1; do
    python benchmarks/distill.py train --teacher "$engine/new-$seed/pipeline" --train_data_dir "$train" --output "$output" \
        --seed $seed --minutes "$minutes" "${lpips[@]}"
done
[ -f "$output/classifier.safetensors" ] ||
    python benchmarks/distill.py classifier --train_data_dir "$train" --classifier "$output/classifier.safetensors"
python benchmarks/distill.py score --engine "$engine" --train_data_dir "$train" --held_out "$test" --output "$output" \
    --classifier "$output/classifier.safetensors" ${WEIGHTS:+--weights "$WEIGHTS"} ${BF16:-} --result "$output/distill.json"

for arm in teacher:10 distilled:8 plain:18; do
    flags=("${lpips[@]}")
    python benchmarks/one_call_sr.py train --arm "${arm%:*}" --minutes "${arm#*:}" --train_data_dir "$train" \
        --trained "$output/sr" "${flags[@]}"
done
python benchmarks/one_call_sr.py score --reference "$test" --trained "$output/sr" --images 64 --title "UTKFace faces," \
    ${WEIGHTS:+--weights "$WEIGHTS" --lpips_weights "$WEIGHTS"} --output "$output/one_call_sr.json"
