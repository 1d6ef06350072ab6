#!/usr/bin/env bash
# The photo model that comes with pyrdiff: super-resolution in one call, trained on the 24 photographs of Kodak's set.
#
#   benchmarks/recipes/photos.sh KODAK OUTPUT [MINUTES] [FACTOR]
#
# KODAK: the folder of its PNG files (01.png ... 24.png, 768x512; released for unrestricted use). Resumable: the same
# command with more MINUTES trains on. PERCEPTUAL_FILE: weights of AlexNet for the loss; downloaded by default.
# START: a model to begin with, such as that of another factor.
set -euo pipefail
kodak=$1 output=$2 minutes=${3:-60} factor=${4:-4}
[ -d "$output/tiles" ] || python - "$kodak" "$output/tiles" <<'END'
import sys
from pathlib import Path

from PIL import Image

kodak, tiles = map(Path, sys.argv[1:])
tiles.mkdir(parents=True, exist_ok=True)
side = 256
for path in sorted(kodak.glob("*.png")):
    photo = Image.open(path).convert("RGB")
    for name, share in (("whole", 1), ("two_thirds", 2 / 3), ("half", 1 / 2)):
        scaled = photo.resize([round(length * share) for length in photo.size], Image.Resampling.LANCZOS)
        counts = [-(-length // side) for length in scaled.size]
        for row in range(counts[1]):
            for column in range(counts[0]):
                left, top = (
                    round(place * (length - side) / max(count - 1, 1))
                    for place, length, count in zip((column, row), scaled.size, counts)
                )
                tile = scaled.crop((left, top, left + side, top + side))
                tile.save(tiles / f"{path.stem}_{name}_{row}{column}.png")
END
python examples/train_sr_one_call.py --train_data_dir "$output/tiles" --output_dir "$output/x$factor" \
    --cache_dir "$output/cache" --resolution 256 --patch_size 96 --scale_factor "$factor" --random_flip True \
    --minutes "$minutes" --mixed_precision bf16 --channels_last True --save_images_steps 0 \
    ${PERCEPTUAL_FILE:+--perceptual_file "$PERCEPTUAL_FILE"} ${START:+--init_from "$START"} --license apache-2.0 \
    --data_description "The 24 photographs of the Kodak lossless true color image suite, released for unrestricted use."
python - "$output" "$factor" <<'END'
import sys
from pathlib import Path

import pyrdiff
import torch
from pyrdiff import hub

output, factor = Path(sys.argv[1]), sys.argv[2]
trained, small = output / f"x{factor}" / "pipeline", output / f"photos-x{factor}"
hub.export(pyrdiff.load(trained, torch_dtype=torch.float16), small, max_shard_size="4MB")
text = (trained / "README.md").read_text(encoding="utf-8").replace(f"# x{factor}\n", f"# Photographs x{factor}\n", 1)
(small / "README.md").write_text(text, encoding="utf-8")
(small / "LICENSE").write_bytes(Path("LICENSE").read_bytes())
END
