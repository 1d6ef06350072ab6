#!/usr/bin/env bash
# Pyramidal DDPM on colour images at 16/32/64, then ways of sampling timed and scored on it (paper P, tables 1, 2 and the
# levels of table 4).
#
#   benchmarks/recipes/faces.sh TRAIN_IMAGES TEST_IMAGES OUTPUT [cpu|gpu] [MINUTES]
#
# Trained as the paper has it, at all times, since solvers at full size run on the same network. Resumable: the same
# command goes on. FEATURES and WEIGHTS choose the feature network (squeezenet, and its file);
# PRECISION=bf16 pays on a CPU only if it computes in it: others emulate it and are far slower.
set -euo pipefail
train=$1 test=$2 output=$3 size=${4:-cpu}
case $size in
    cpu) minutes=${5:-60} precision=${PRECISION:-no} flags=(--preset mini --train_batch_size 48 --learning_rate 3e-4)
         slow=(--skip 'DDPM 1000' 'DDPM 100' '1000/30/30' 'strength 0.5' 'strength 0.4' --score_images 192) ;;
    gpu) minutes=${5:-9} precision=${PRECISION:-bf16}
         flags=(--preset small --train_batch_size 1024 --learning_rate 2e-4 --compile True)
         slow=(--score_images 500 --batch_size 100) ;;
    *) echo "size $size: expected cpu or gpu" >&2; exit 2 ;;
esac
accelerate launch --num_processes 1 --num_machines 1 --mixed_precision "$precision" --dynamo_backend no \
    examples/train_pddpm.py --train_data_dir "$train" --output_dir "$output/training" \
    --resolution 16 32 64 --random_flip True --noise_window 1.0 --level_share 1 1 1 --minutes "$minutes" "${flags[@]}"
python benchmarks/fitted_arms.py --model "$output/training/pipeline" --train "$train" --output "$output/arms.json"
bench=(python benchmarks/bench.py --arms "$output/arms.json" --model "$output/training/pipeline" --reference "$test" --output "$output/bench.json"
       --cache "$output/images" --features "${FEATURES:-squeezenet}" ${WEIGHTS:+--weights "$WEIGHTS"})
[ "$precision" = bf16 ] && bench+=(--bf16)
"${bench[@]}" --phase score "${slow[@]}"
"${bench[@]}" --phase memory --only 'DPM-Solver++ 20' 'DDIM 50' 'saved plan' '100/8/8'
"${bench[@]}" --phase time
