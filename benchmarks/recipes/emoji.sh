#!/usr/bin/env bash
# The model that comes with pyrdiff: Pyramidal DDPM on Noto emoji at 16/32/64, every tenth image held out, its plans
# measured on those; float16 shards, with the card.
#
#   benchmarks/recipes/emoji.sh TRAIN_IMAGES TEST_IMAGES OUTPUT [cpu|gpu] [MINUTES]
#
# TRAIN_IMAGES, TEST_IMAGES: folders of PNG files. Resumable. FEATURES and WEIGHTS as in faces.sh.
set -euo pipefail
train=$1 test=$2 output=$3 size=${4:-cpu}
case $size in
    cpu) minutes=${5:-138} flags=(--preset mini --train_batch_size 64 --learning_rate 6e-4 --mixed_precision no) ;;
    gpu) minutes=${5:-9} flags=(--preset mini --train_batch_size 1024 --learning_rate 1e-3 --mixed_precision bf16) ;;
    *) echo "size $size: expected cpu or gpu" >&2; exit 2 ;;
esac
python examples/train_pddpm.py --train_data_dir "$train" --output_dir "$output/training" --resolution 16 32 64 \
    --prediction_type v_prediction --lr_warmup_steps 200 --minutes "$minutes" --cache_dir "$output/cache" \
    --license apache-2.0 "${flags[@]}" --data_description \
    "Noto Emoji by Google (Apache-2.0), 128x128 PNG without skin-tone variants, transparency laid on white."
pyrdiff bench --model "$output/training/pipeline" --reference "$test" --output "$output/bench.json" --resolution 64 \
    --features "${FEATURES:-squeezenet}" ${WEIGHTS:+--weights "$WEIGHTS"}
python - "$output" <<'END'
import sys
from pathlib import Path

import pyrdiff
import torch
from diffusers.utils import make_image_grid
from pyrdiff import hub

output = Path(sys.argv[1])
trained, small = output / "training" / "pipeline", output / "noto-emoji"
hub.export(pyrdiff.load(trained, torch_dtype=torch.float16), small, max_shard_size="4MB")
pipeline = pyrdiff.load(small)
images = pipeline(16, plan="balanced", generator=[torch.Generator().manual_seed(seed) for seed in range(16)]).images
make_image_grid(images, 2, 8).save(small / "samples.png")
bench = hub.card.read_bench(output / "bench.json")
(small / "bench.json").write_bytes((output / "bench.json").read_bytes())
text = (trained / "README.md").read_text(encoding="utf-8")
text = hub.card.fill(text, bench=bench, pictures={"samples.png": "Samples with seeds 0 to 15, plan balanced."})
(small / "README.md").write_text(text.replace("# pipeline\n", "# Noto emoji, 64x64\n", 1), encoding="utf-8")
END
