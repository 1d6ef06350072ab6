"""
Enlarge a picture, or a folder with the folders below it, as `pyrdiff upscale` does:

    python examples/upscale.py --model runs/mine/pipeline --input photos --output larger --outscale 4 --keep_going
"""

from pyrdiff.cli import run
from pyrdiff.commands.upscale import main

if __name__ == "__main__":
    run(main)
