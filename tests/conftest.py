"""Shared settings: real components at toy size, on the CPU, offline."""

import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # toy sizes: more threads only wait for each other
# diffusers copies the code of loaded folders here; a test must neither see nor leave any.
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="pyrdiff-test-modules-")
sys.path.insert(0, str(Path(__file__).parent))
