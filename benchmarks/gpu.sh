#!/usr/bin/env bash
# All that only a GPU can show, in about ten minutes: what was never run on CUDA, then seconds, memory, and two models.
#
#   benchmarks/gpu.sh OUTPUT [EMOJI] [PHOTOS LOW HIGH]
#
# EMOJI: as in recipes/emoji.sh, and for steps beside those of the stock loop. PHOTOS, LOW and HIGH: as in
# recipes/sr_photos.sh. Without them those parts are left out.
# Each part has its own time, a log and a line in OUTPUT/parts.tsv; one that is stopped or fails costs no other. In another
# run, parts that ended well are skipped, and the others go on where they were. MINUTES: of each recipe's training (2).
# DEVICE=cpu rehearses all of it at tiny sizes; PATIENCE is a factor on all times, for a busy machine.
set -uo pipefail
output=$1 emoji=${2:-} photos=${3:-} low=${4:-} high=${5:-}
device=${DEVICE:-cuda} minutes=${MINUTES:-2} here=$(cd "$(dirname "$0")" && pwd)
tiny=() size=gpu rounds=5 smoke=(-m gpu) steps=(--preset small --batch_size 256 --mixed_precision bf16 --steps 20)
if [ "$device" = cpu ]; then
    export ACCELERATE_USE_CPU=true
    tiny=(--tiny) size=cpu rounds=1 minutes=${MINUTES:-0.2} smoke=(-k test_watches)
    steps=(--preset tiny --batch_size 4 --blocks 1 --steps 1 --resolution 32)
fi
mkdir -p "$output"
output=$(cd "$output" && pwd)
cd "$here/.."

part() { # part NAME SECONDS COMMAND...
    local name=$1 limit=$(($2 * ${PATIENCE:-1})) began=$SECONDS code=0
    shift 2
    if [ -e "$output/$name.done" ]; then
        echo "$name: done before"
        return
    fi
    timeout --signal=INT --kill-after=20 "$limit" "$@" >>"$output/$name.log" 2>&1 || code=$?
    [ "$code" = 0 ] && touch "$output/$name.done"
    printf '%s\t%s\t%s\n' "$name" "$code" "$((SECONDS - began))" >>"$output/parts.tsv"
    echo "$name: exit $code after $((SECONDS - began)) s of at most $limit; $output/$name.log"
}

gpu() { # gpu PART SECONDS [NAME]
    part "${3:-$1}" "$2" python benchmarks/gpu.py "$1" --device "$device" --rounds "$rounds" "${tiny[@]}" \
        --output "$output/$1.json"
}

part smoke 120 python -m pytest -n 0 -q -p no:cacheprovider "${smoke[@]}" tests/test_gpu.py tests/test_watches.py \
    tests/pipelines/test_pipeline_waits.py tests/pipelines/test_pipeline_dtypes.py tests/training/test_training_waits.py
gpu training 120
gpu sampling 90
PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True gpu memory 45 memory_growing
PYTORCH_CUDA_ALLOC_CONF=expandable_segments:False gpu memory 45 memory_plain
[ -n "$emoji" ] && part steps 60 \
    python benchmarks/train_step.py --train_data_dir "$emoji" --output "$output/steps.json" "${steps[@]}"
[ -n "$emoji" ] && part emoji "$((${minutes%.*} * 60 + 90))" \
    benchmarks/recipes/emoji.sh "$emoji" "$output/emoji" "$size" "$minutes"
[ -n "$photos" ] && part photos "$((${minutes%.*} * 60 + 90))" \
    benchmarks/recipes/sr_photos.sh "$photos" "$low" "$high" "$output/photos" "$size" "$minutes"
cat "$output/parts.tsv"
! cut -f 2 "$output/parts.tsv" | grep -qv '^0$'
