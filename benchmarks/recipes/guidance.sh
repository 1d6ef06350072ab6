#!/usr/bin/env bash
# A pyramid with classes on Fashion-MNIST at 8/16/32, sampled without guidance, guided by the classes and by an early
# average of the same run, and with averages of three lengths (results/guidance.json).
#
#   benchmarks/recipes/guidance.sh FASHION_MNIST.npz OUTPUT [MINUTES] [SEEDS ...]
#
# Resumable: the same command goes on. WEIGHTS names the file of the feature network (squeezenet).
set -euo pipefail
data=$1 output=$2 minutes=${3:-20} seeds=(${@:4})
[ ${#seeds[@]} -gt 0 ] || seeds=(0)
export OMP_NUM_THREADS=1
order=(t-shirt trouser pullover dress coat sandal shirt sneaker bag boot)
python - "$data" "$output/images" "${order[@]}" <<'PYTHON'
import sys
from pathlib import Path

import numpy as np
from PIL import Image

data, folder, *names = sys.argv[1:]
with np.load(data) as arrays:
    for index, (image, label) in enumerate(zip(arrays["x_train"], arrays["y_train"].reshape(-1))):
        path = Path(folder, names[label], f"{index:05d}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            Image.fromarray(image).save(path)
PYTHON
for seed in "${seeds[@]}"; do
    python benchmarks/guidance.py train --images "$output/images" --output "$output" --seed "$seed" --minutes "$minutes"
done
python benchmarks/guidance.py score --output "$output" --reference "$data" --order "${order[@]}" --seeds "${seeds[@]}" \
    --minutes "$minutes" ${WEIGHTS:+--weights "$WEIGHTS"} --grids "$output/grids" --result "$output/guidance.json"
