"""
Enlarge a picture, or a folder with the folders below it, as `pyrdiff upscale` does:

    python examples/upscale.py runs/mine/pipeline --input photos --output larger --scale_factor 4 --keep_going
"""

from pyrdiff.cli import run
from pyrdiff.commands.upscale import main

if __name__ == "__main__":
    run(main)
