"""
The whole way in minutes, on the letters that pyrdiff carries:

    python examples/demo.py --output_dir demo

Trains through `accelerate launch`, then samples in a second process that knows diffusers only.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

EXAMPLES = Path(__file__).parent
TRAINING = {
    "train_data_dir": "glyphs",
    "image_channels": 1,
    "resolution": ("8", "16", "32"),
    "preset": "tiny",
    "prediction_type": "v_prediction",
    "train_batch_size": 64,
    "learning_rate": 1e-3,
    "lr_warmup_steps": 50,
    "checkpointing_steps": 1000,
    "save_images_steps": 500,
}


def faster_precision() -> str:
    """bf16 where this machine is faster with it: many CPUs only emulate it."""
    import torch

    if torch.cuda.is_available():
        return "bf16"
    seconds = {}
    for kind in (torch.float32, torch.bfloat16):
        image, weight = torch.randn(64, 32, 16, 16, dtype=kind), torch.randn(32, 32, 3, 3, dtype=kind)
        times = []
        for _ in range(5):
            began = time.perf_counter()
            torch.nn.functional.conv2d(image, weight.requires_grad_(), padding=1).sum().backward()
            times.append(time.perf_counter() - began)
        seconds[kind] = min(times)
    return "bf16" if seconds[torch.bfloat16] < seconds[torch.float32] else "no"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="demo")
    parser.add_argument("--minutes", type=float, default=5.0, help="training time")
    options = parser.parse_args()
    folder = Path(options.output_dir)

    precision = faster_precision()
    flags = [f"--output_dir={folder / 'training'}", f"--minutes={options.minutes}"]
    for name, value in TRAINING.items():
        flags += [f"--{name}", *value] if isinstance(value, tuple) else [f"--{name}={value}"]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes=1", "--num_machines=1"]
    launch += [f"--mixed_precision={precision}", "--dynamo_backend=no"]
    subprocess.run([*launch, str(EXAMPLES / "train_pddpm.py"), *flags], check=True)

    model = folder / "training" / "pipeline"
    sample = [
        sys.executable,
        str(EXAMPLES / "generate.py"),
        f"--model={model}",
        "--trust_remote_code",
        "--batch_size=12",
    ]
    # Steps at 8x8 cost next to nothing; a network trained this briefly had better not repaint what they found.
    sample += ["--num_inference_steps=250", "--refine_steps=20", "--refine_strength=0.15"]
    subprocess.run([*sample, f"--output_dir={folder}"], check=True)


if __name__ == "__main__":
    main()
