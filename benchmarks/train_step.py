"""
Seconds per training step: our loop against the loop of diffusers' `train_unconditional.py`, on the same network, batch
and resolution, in alternating blocks:

    python benchmarks/train_step.py --train_data_dir my_images --output benchmarks/results/train_step.json

The stock loop stands twice: as the script has it, decoding images in the step (no workers, its default), and with the
decoded images already in memory.
"""

import statistics
import tempfile
from functools import partial

import report
from flags import parser_of


class StockLoop:
    """The steps of `train_unconditional.py` with --use_ema, as that script does them."""

    def __init__(self, options, network, in_memory: bool):
        import numpy as np
        import torch
        from accelerate import Accelerator
        from diffusers import DDPMScheduler
        from diffusers.optimization import get_scheduler
        from diffusers.training_utils import EMAModel

        from pyrdiff.data import decode_image, fit_image, list_images

        files, size = list_images(options.train_data_dir), options.resolution

        class Images(torch.utils.data.Dataset):
            def __init__(self):
                self.kept = {}

            def __len__(self):
                return len(files)

            def __getitem__(self, index):
                pixels = self.kept.get(index)
                if pixels is None:
                    pixels = np.array(fit_image(decode_image(files[index], 3), size, size))
                    if in_memory:
                        self.kept[index] = pixels
                tensor = torch.from_numpy(pixels).permute(2, 0, 1).float() / 255
                return {"input": (tensor.flip(-1) if torch.rand(()) < 0.5 else tensor) * 2 - 1}

        data = Images()
        if in_memory:
            for index in range(len(files)):
                data[index]
        self.accelerator = Accelerator(mixed_precision=options.mixed_precision)
        self.scheduler = DDPMScheduler()
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6)
        loader = torch.utils.data.DataLoader(data, batch_size=options.batch_size, shuffle=True)
        rate = get_scheduler("cosine", optimizer, num_warmup_steps=500, num_training_steps=10_000)
        self.ema = EMAModel(network.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
        self.model, self.optimizer, self.loader, self.rate = self.accelerator.prepare(network, optimizer, loader, rate)
        self.batches = iter(self.loader)

    def step(self) -> None:
        import torch
        import torch.nn.functional as F

        batch = next(self.batches, None)
        if batch is None:
            self.batches = iter(self.loader)
            batch = next(self.batches)
        clean = batch["input"]
        noise = torch.randn(clean.shape, device=clean.device)
        timesteps = torch.randint(0, 1000, (clean.shape[0],), device=clean.device)
        noisy = self.scheduler.add_noise(clean, noise, timesteps)
        with self.accelerator.accumulate(self.model):
            loss = F.mse_loss(self.model(noisy, timesteps).sample.float(), noise.float())
            self.accelerator.backward(loss)
            if self.accelerator.sync_gradients:
                self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.rate.step()
            self.optimizer.zero_grad()
        self.ema.step(self.model.parameters())
        _ = {"loss": loss.detach().item(), "lr": self.rate.get_last_lr()[0], "ema_decay": self.ema.cur_decay_value}


class OurLoop:
    """The steps of `pyrdiff.training.loop.Run.fit`."""

    def __init__(self, options, folder: str):
        from pyrdiff.methods.pddpm import METHOD
        from pyrdiff.training.loop import prepare

        settings = METHOD.settings(
            train_data_dir=options.train_data_dir,
            output_dir=folder,
            resolution=(str(options.resolution),),
            train_batch_size=options.batch_size,
            preset=options.preset,
            mixed_precision=options.mixed_precision,
            random_flip=True,
        )
        self.run = prepare(METHOD, settings)

    def step(self) -> None:
        self.run.checked(self.run.optimise())


def measure(options) -> dict:
    import torch

    import pyrdiff
    from pyrdiff.machine import in_turn

    torch.set_num_threads(options.threads)
    sizes = dict(resolutions=(options.resolution,))

    def network():
        return pyrdiff.CoordinateUNet2DModel.from_preset(options.preset, **sizes)

    with tempfile.TemporaryDirectory() as folder:
        loops = {
            "pyrdiff": OurLoop(options, folder),
            "train_unconditional.py": StockLoop(options, network(), in_memory=False),
            "train_unconditional.py, images in memory": StockLoop(options, network(), in_memory=True),
        }

        def block(loop, turn: int) -> None:
            for _ in range(options.steps):
                loop.step()

        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        blocks = in_turn({name: partial(block, loop) for name, loop in loops.items()}, options.blocks, device)
        seconds = {name: [value / options.steps for value in values] for name, values in blocks.items()}
    ours = seconds["pyrdiff"]
    arms = []
    for name, values in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(ours, values, strict=True))
        arms.append({"name": name, "seconds": values, "median": statistics.median(values), "pyrdiff_over_this": ratio})
    return {
        "bench": "train_step",
        "resolution": options.resolution,
        "batch_size": options.batch_size,
        "preset": options.preset,
        "mixed_precision": options.mixed_precision,
        "steps_a_block": options.steps,
        **report.surroundings(options.threads),
        "arms": arms,
    }


def table(result: dict) -> str:
    lines = [
        f"{result['preset']} at {result['resolution']}, batch {result['batch_size']}, mixed precision "
        f"{result['mixed_precision']}. {report.caption(result)}",
        "",
        "| loop | seconds a step, median (min) of blocks | pyrdiff / this, median of pairs |",
        "|---|---|---|",
    ]
    for arm in result["arms"]:
        seconds = f"{arm['median']:.3f} ({min(arm['seconds']):.3f}) of {len(arm['seconds'])}"
        lines.append(f"| {arm['name']} | {seconds} | {arm['pyrdiff_over_this']:.3f} |")
    return "\n".join(lines)


def main() -> None:
    parser = parser_of(__doc__, batch_size=8)
    parser.add_argument("--train_data_dir", required=True, help="folder of images")
    parser.add_argument("--resolution", type=int, default=64)
    parser.add_argument("--preset", default="small")
    parser.add_argument("--mixed_precision", default="no", choices=["no", "bf16"])
    parser.add_argument("--blocks", type=int, default=7)
    parser.add_argument("--steps", type=int, default=3)
    options = parser.parse_args()
    report.save(measure(options), options.output)


if __name__ == "__main__":
    main()
