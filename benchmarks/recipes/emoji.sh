#!/usr/bin/env bash
# The model that comes with pyrdiff: Pyramidal DDPM on the faces of Noto emoji at 16/32/64, float16 shards, with the card.
#
#   benchmarks/recipes/emoji.sh NOTO_EMOJI OUTPUT [cpu|gpu] [MINUTES]
#
# NOTO_EMOJI: the folder of the set's PNG files (emoji_u1f600.png ...). Of its 112 faces none is held out, so the bench
# compares with the images of the training: it tells the plans apart, not how the model does on others. Resumable.
# Trained in the noise windows of its plans, the network cannot be sampled at full size, so no such solver is beside them.
# FEATURES and WEIGHTS as in faces.sh.
set -euo pipefail
emoji=$1 output=$2 size=${3:-cpu}
case $size in
    cpu) minutes=${4:-64} flags=(--preset mini --train_batch_size 64 --learning_rate 6e-4 --mixed_precision no)
         bench=(--num_images 48 --runs 1) ;;
    gpu) minutes=${4:-9} flags=(--preset mini --train_batch_size 1024 --learning_rate 1e-3 --mixed_precision bf16)
         bench=(--num_images 112 --runs 5) ;;
    *) echo "size $size: expected cpu or gpu" >&2; exit 2 ;;
esac
python - "$emoji" "$output/faces" <<'END'
import shutil
import sys
from pathlib import Path

emoji, faces = map(Path, sys.argv[1:])
faces.mkdir(parents=True, exist_ok=True)
ranges = (0x1F600, 0x1F644), (0x1F910, 0x1F917), (0x1F920, 0x1F92F), (0x1F970, 0x1F97A), (0x1FAE0, 0x1FAE9)
codes = {code for first, last in ranges for code in range(first, last + 1)} | {0x1F9D0, 0x2639, 0x263A}
for code in sorted(codes - {0x1F916, 0x1F926, 0x1F977, 0x1FAE6, 0x1FAE7}):  # a robot, a person, a ninja, lips, bubbles
    if (emoji / f"emoji_u{code:x}.png").exists():
        shutil.copy(emoji / f"emoji_u{code:x}.png", faces)
END
python examples/train_pddpm.py --train_data_dir "$output/faces" --output_dir "$output/training" --resolution 16 32 64 \
    --random_flip --prediction_type v_prediction --lr_warmup_steps 200 --minutes "$minutes" --cache_dir "$output/cache" \
    --license apache-2.0 "${flags[@]}" --data_description \
    "Noto Emoji by Google (Apache-2.0): the 112 faces among its 128x128 PNG files, transparency laid on white."
pyrdiff bench --model "$output/training/pipeline" --reference "$output/faces" --resolution 64 "${bench[@]}" \
    --only fast balanced --output "$output/bench.json" --features "${FEATURES:-squeezenet}" ${WEIGHTS:+--weights "$WEIGHTS"}
python - "$output" <<'END'
import sys
from pathlib import Path

import pyrdiff
import torch
from pyrdiff import hub

output = Path(sys.argv[1])
hub.export(pyrdiff.load(output / "training" / "pipeline", torch_dtype=torch.float16), output / "noto-emoji", max_shard_size="4MB")
END
python benchmarks/show_model.py "$output/noto-emoji" "$output/faces"
python - "$output" <<'END'
import sys
from pathlib import Path

from pyrdiff import hub

output = Path(sys.argv[1])
small = output / "noto-emoji"
bench = hub.card.read_bench(output / "bench.json")
(small / "bench.json").write_bytes((output / "bench.json").read_bytes())
text = (output / "training" / "pipeline" / "README.md").read_text(encoding="utf-8")
pictures = {
    "samples.png": "Samples with seeds 0 to 15, plan balanced.",
    "neighbours.png": "Below each of them the training image that is nearest in pixels.",
}
text = hub.card.fill(text.replace("# training\n", "# Noto emoji: faces, 64x64\n", 1), bench=bench, pictures=pictures)
note = "No image was held out, so the table tells the plans apart and not how the model does on others. "
text = text.replace("## Limits\n\n", f"## Limits\n\n{note}")
(small / "README.md").write_text(text, encoding="utf-8")
END
