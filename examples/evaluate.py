"""
Measure generated images, in one table and one JSON that says how, as `pyrdiff evaluate` does:

    python examples/evaluate.py --generated samples --reference my_images --features inception --output scores.json
    python examples/evaluate.py runs/pddpm/pipeline --num_images 500 --reference my_images --output scores.json
    python examples/evaluate.py --paired --generated upscaled --reference originals --channels y --crop_border 4
"""

from pyrdiff.cli import run
from pyrdiff.commands.evaluate import main

if __name__ == "__main__":
    run(main)
