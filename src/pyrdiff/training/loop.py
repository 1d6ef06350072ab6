"""Training of any method, top to bottom: model, data, scheduler, prepare, loop, save."""

import copy
import hashlib
import json
import math
import shutil
import signal
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import diffusers
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from tqdm import tqdm

import pyrdiff
from pyrdiff import hub
from pyrdiff.data import ImageLevels, MultiScaleBatches, open_source
from pyrdiff.data.seeds import seed_of
from pyrdiff.plugins import Method

from . import checkpoints
from .losses import Draws
from .settings import TrainingDiverged, TrainingSettings, TrainingStopped

TIME_IS_UP = 1000  # beside the signals' numbers


@dataclass
class DeviceBatch:
    """What a loss sees: `images` [B, C, H, W] in [-1, 1]; `boxes` [B, 4] of patches in the whole image, or None."""

    images: torch.Tensor
    boxes: torch.Tensor | None


def train(method: Method, settings: TrainingSettings) -> Path:
    """
    Trains a method on images, with checkpoints, and exports the finished pipeline.

    Returns:
        The exported folder, `output_dir/pipeline`.

    Raises:
        ValueError: for bad input, before any work.
        TrainingStopped: after SIGTERM or SIGINT, a checkpoint saved.
        TrainingDiverged: when the loss is not finite; the last finite checkpoint is kept.
    """
    clock = time.monotonic()
    accelerator = Accelerator(
        mixed_precision=settings.mixed_precision,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        log_with=settings.report_to,
        project_dir=settings.output_dir,
    )
    if settings.report_to and not accelerator.log_with:
        raise ValueError(f"report_to={settings.report_to!r}: expected a tracker that is installed")
    folder = Path(settings.output_dir)
    first = method.first(settings) if method.first is not None else None
    _check_folder(folder, settings, within=first and first[0].name)

    repo_id = None
    if settings.push_to_hub and accelerator.is_main_process:
        name = settings.hub_model_id or folder.resolve().name
        repo_id = hub.reserve(name, private=settings.hub_private_repo or None)

    # Models: all of them, so that bad settings are met before any work.
    networks = []
    for stage, its_settings in [*([first] if first else []), (method, settings)]:
        torch.manual_seed(settings.seed)
        networks.append(stage.model(its_settings, settings.image_channels))

    # Data.
    if accelerator.is_main_process:
        for place in (folder, *([folder / first[0].name] if first else [])):
            checkpoints.sweep_strays(place)
    with accelerator.main_process_first():
        source = open_source(
            settings.train_data_dir or settings.dataset_name,
            dataset_config=settings.dataset_config_name,
            image_column=settings.image_column,
            array_key=settings.array_key,
        )
        images = ImageLevels.build(
            source,
            settings.sizes,
            channels=settings.image_channels,
            background=settings.background,
            on_bad_image=settings.on_bad_image,
            allow_enlarging=settings.allow_enlarging,
            cache_dir=settings.cache_dir,
            progress=accelerator.is_main_process,
        )
    batches = MultiScaleBatches(
        images,
        settings.train_batch_size,
        patch_size=settings.patch_size,
        random_flip=settings.random_flip,
        seed=settings.seed,
        num_processes=accelerator.num_processes,
        process_index=accelerator.process_index,
        accumulation=settings.gradient_accumulation_steps,
    )

    # What the method builds on.
    before = None
    if first is not None:
        run = _run(*first, accelerator, folder / first[0].name, images, batches, networks[0], clock)
        method = method.building_on(run.finish())
        before = (run.digest, run.earlier_seconds)
        del run, networks[0]
        accelerator.free_memory()  # its optimiser, above all

    # The loop, then save.
    run = _run(method, settings, accelerator, folder, images, batches, networks[-1], clock, before)
    _check_classes(method, run.pipeline)
    run.fit()
    target = run.export()
    if repo_id is not None:
        try:
            print(f"published {hub.push(target, repo_id).url}", flush=True)
        except OSError as error:
            raise OSError(f"{error} The model is in {target}: pyrdiff push {target} {repo_id}") from error
    return target


def _run(method, settings, accelerator, folder, images, batches, network, clock, before=None) -> "Run":
    scheduler = method.scheduler(settings, images)
    pipeline = method.pipeline(settings, network, scheduler, images)
    return Run(method, settings, accelerator, folder, images, batches, network, scheduler, pipeline, clock, before)


def _check_classes(method: Method, pipeline) -> None:
    """Refuses a method that would export what `pyrdiff.load` could not read."""
    parts = {type(part) for part in (pipeline, *pipeline.components.values()) if part is not None}
    foreign = {each for each in parts if each.__module__.split(".")[0] != "diffusers"}
    missing = sorted(each.__name__ for each in foreign - set(method.classes()))
    if missing:
        raise ValueError(f"method {method.name!r}: its `classes` lack {missing}, of which its pipeline is made")


def _check_folder(folder: Path, settings: TrainingSettings, within: str | None = None) -> None:
    """Refuses an output folder that is something else than a run of ours; `within` is one that lies in it."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output_dir={str(folder)!r}: expected a folder, found a file")
    if within is not None:
        _check_folder(folder / within, settings)
    used = folder.is_dir() and any(path.name != within for path in folder.iterdir())
    if used and not (folder / "settings.json").is_file() and not checkpoints.list_checkpoints(folder):
        raise ValueError(f"output_dir={str(folder)!r}: expected a new, an empty or an earlier run's folder")
    if used and settings.resume_from_checkpoint == "none" and checkpoints.list_checkpoints(folder):
        raise ValueError(f"output_dir={str(folder)!r}: holds checkpoints; expected a new folder, or resume 'latest'")


class Run:
    """
    One training run: its parts and its progress. `before`: of what the method builds on, the SHA-256 of the weights and
    the seconds that it took in earlier sessions.
    """

    FINISHED = "finished"  # folder of a network that another method builds on

    def __init__(
        self, method, settings, accelerator, folder, images, batches, network, scheduler, pipeline, clock, before=None
    ):
        self.method, self.settings, self.accelerator, self.folder = method, settings, accelerator, folder
        self.images, self.batches, self.scheduler, self.pipeline = images, batches, scheduler, pipeline
        self.network = network
        self.clock, self.earlier_seconds = clock, 0.0 if before is None else before[1]
        self.step, self.total_steps = 0, settings.max_train_steps
        self.previewed: int | None = None  # the last step with a picture
        self._schedule: tuple | None = None  # (total steps, factor of the rate by step)
        self.signal_number = 0
        self.reserve = 5.0  # seconds kept for the end of a run with a budget
        self.step_seconds = 0.0  # mean of the last 100 steps
        self.saved_seconds = 0.0  # spent by the last checkpoint
        self.identity = {
            "method": method.name,
            "network": _public(network),
            "scheduler": _public(scheduler),
            "data": images.fingerprint,
            "batch": [accelerator.num_processes * size for size in batches.batch_sizes],
            "accumulation": settings.gradient_accumulation_steps,
            "patch_size": settings.patch_size,
            "random_flip": settings.random_flip,
            "seed": settings.seed,
        }
        if before is not None:
            self.identity["given"] = before[0]

        network.to(accelerator.device)
        on_gpu = accelerator.device.type == "cuda"
        channels_last = on_gpu if settings.channels_last is None else settings.channels_last
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self._lay_out(network)
        self.parameters = list(network.parameters())
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=settings.learning_rate,
            betas=(settings.adam_beta1, settings.adam_beta2),
            weight_decay=settings.adam_weight_decay,
            eps=settings.adam_epsilon,
            fused=accelerator.device.type in ("cpu", "cuda"),
        )
        self.ema = None
        if settings.use_ema:
            self.ema = EMAModel(
                self.parameters,
                decay=settings.ema_max_decay,
                use_ema_warmup=True,
                inv_gamma=settings.ema_inv_gamma,
                power=settings.ema_power,
                foreach=True,
            )
        self._resume()
        compiled = torch.compile(network, dynamic=False) if settings.compile else network
        self.model, self.prepared_optimizer = accelerator.prepare(compiled, self.optimizer)

    # Progress, time and rate.

    @property
    def seconds(self) -> float:
        """Time spent on this run, earlier sessions included."""
        return self.earlier_seconds + time.monotonic() - self.clock

    def _learning_rate(self) -> float:
        """The rate of the coming step, counted in optimiser steps; a pure function of step and total."""
        if self._schedule is None or self._schedule[0] != self.total_steps:
            spare = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=self.settings.learning_rate)
            schedule = get_scheduler(
                self.settings.lr_scheduler,
                spare,
                num_warmup_steps=min(self.settings.lr_warmup_steps, self.total_steps // 2),
                num_training_steps=self.total_steps,
            )
            self._schedule = (self.total_steps, schedule.lr_lambdas[0])
        return self.settings.learning_rate * self._schedule[1](self.step)

    def _plan_length(self) -> None:
        """With a budget in minutes: as many steps as fit, agreed between the processes."""
        left = self.settings.minutes * 60 - self.seconds - self.reserve
        total = [max(1, self.step + max(0, int(left / self.step_seconds)))]
        self.total_steps = broadcast_object_list(total)[0] if self.accelerator.num_processes > 1 else total[0]

    def fit(self) -> None:
        """Trains to the end. Raises `TrainingStopped` or `TrainingDiverged`."""
        settings, accelerator = self.settings, self.accelerator
        if accelerator.is_main_process:
            self._open_folder()
        accelerator.wait_for_everyone()
        levels = len(settings.sizes)
        log = (self.folder / "log.jsonl").open("a", encoding="utf-8") if accelerator.is_main_process else None
        bar = tqdm(total=self.total_steps, initial=self.step, disable=not accelerator.is_main_process, mininterval=2.0)
        bar.set_description("training")
        first, durations, unchecked, stop = self.step, [], None, 0
        with self._signals():
            while self.step < self.total_steps and not stop:
                began = time.monotonic()
                rate = self._learning_rate()
                for group in self.optimizer.param_groups:
                    group["lr"] = rate
                level, statistics = self._optimise()
                self.step += 1
                saving = self.step % settings.checkpointing_steps == 0 or self.step >= self.total_steps
                logging = self.step % settings.logging_steps == 0 or self.step >= self.total_steps

                # On a GPU the step before is checked while this one is still running: no waiting, one step late. Every
                # process reads the same numbers at the same place, so all of them stop together.
                if unchecked is not None:
                    stop = self._check(*unchecked)[2]
                unchecked = (self.step, statistics)
                if accelerator.device.type == "cpu" or saving or logging or stop:
                    loss, _, stop_now = self._check(*unchecked)
                    stop, unchecked = stop or stop_now, None
                    if logging and log is not None:
                        self._log(log, level, loss, rate)
                if saving or stop:
                    self._save()
                if self.step - first > 2 * len(settings.sizes):  # the first visits to a level compile and warm up
                    durations = [*durations[-99:], time.monotonic() - began]
                    self.step_seconds = sum(durations) / len(durations)
                bar.update()
                planning = settings.minutes is not None and self.step % (8 * levels) == 4 * levels
                every = settings.save_images_steps
                if every and not stop and (self.step % every == 0 or (planning and self.step < 8 * levels)):
                    before = time.monotonic()
                    self._preview()
                    self.reserve = max(self.reserve, 2 * (time.monotonic() - before) + 5.0)
                if planning and durations:
                    self._plan_length()
                    bar.total = self.total_steps
        if unchecked is not None:
            self._check(*unchecked)
        bar.close()
        if log is not None:
            log.close()
        if 0 < stop < TIME_IS_UP:
            accelerator.end_training()
            raise TrainingStopped(int(stop), self.step)
        if self.folder / f"checkpoint-{self.step}" not in checkpoints.list_checkpoints(self.folder):
            self._save()

    def _optimise(self) -> tuple[int, tuple]:
        """
        One optimiser step. Returns the level, and what `_check` reads: [loss, gradient norm, why to stop] over all
        processes, on its way to the CPU, and the event of its arrival.
        """
        settings, accelerator = self.settings, self.accelerator
        losses = []
        for micro in range(settings.gradient_accumulation_steps):
            batch = self.batches.draw(self.step, micro)
            images = self._on_device(batch.images)
            images = images.to(torch.float32, memory_format=self.memory_format).div_(127.5).sub_(1)
            boxes = None if batch.boxes is None else self._on_device(batch.boxes)
            draws = Draws(
                settings.seed,
                self.step,
                micro,
                device=accelerator.device,
                num_processes=accelerator.num_processes,
                process_index=accelerator.process_index,
            )
            torch.manual_seed(seed_of(settings.seed, self.step, micro, accelerator.process_index))  # dropout only
            with accelerator.accumulate(self.model):
                device_batch = DeviceBatch(images, boxes)
                loss = self.method.loss(self.model, self.scheduler, settings, device_batch, draws)
                accelerator.backward(loss)
                losses.append(loss.detach())
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(self.parameters, settings.max_grad_norm)
                self.prepared_optimizer.step()
                self.prepared_optimizer.zero_grad()
        if self.ema is not None:
            self.ema.step(self.parameters)
        mean = torch.stack(losses).mean()
        stop = torch.full_like(mean, self._stop_request())
        if accelerator.num_processes > 1:
            mean = accelerator.reduce(mean, "mean")
            stop = accelerator.gather(stop[None]).max()
        statistics = torch.stack((mean.float(), norm.float(), stop.float()))
        if not statistics.is_cuda:
            return batch.level, (statistics, None)
        # Copied as soon as the step is done; who reads it waits for this step only, not for what is queued after it.
        statistics, done = statistics.to("cpu", non_blocking=True), torch.cuda.Event()
        done.record()
        return batch.level, (statistics, done)

    def _on_device(self, tensor: torch.Tensor) -> torch.Tensor:
        """Moved without waiting for the work that the GPU has queued."""
        if self.accelerator.device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(self.accelerator.device, non_blocking=True)

    def _check(self, step: int, statistics: tuple) -> list[float]:
        """Reads a step's statistics; stops the run if they are not finite, after writing down the batch."""
        values, arrived = statistics
        if arrived is not None:
            arrived.synchronize()
        loss, norm, stop = values.tolist()
        fp16_skip = self.accelerator.scaler is not None and math.isfinite(loss)
        if math.isfinite(loss) and (math.isfinite(norm) or fp16_skip):
            return [loss, norm, stop]
        whole = copy.copy(self.batches)  # any process may have met the bad image
        drawn = []
        for whole.process_index in range(self.accelerator.num_processes):
            drawn += [whole.draw(step - 1, micro) for micro in range(self.settings.gradient_accumulation_steps)]
        indices = [int(index) for batch in drawn for index in batch.indices]
        report = {
            "step": step,
            "seed": self.settings.seed,
            "loss": repr(loss),
            "gradient_norm": repr(norm),
            "resolution": list(self.settings.sizes[drawn[0].level]),
            "images": [self.images.names[index] for index in indices],
        }
        path = self.folder / f"failure-{step}.json"
        if self.accelerator.is_main_process:
            path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        raise TrainingDiverged(
            f"loss {loss}, gradient norm {norm} at step {step}: stopped; {path} names the batch, and the last "
            "checkpoint is from before. A lower learning_rate often helps"
        )

    # Why a run ends early.

    def _stop_request(self) -> int:
        """The number of a signal that came, TIME_IS_UP, or 0."""
        if self.signal_number:
            return self.signal_number
        over = self.settings.minutes is not None and self.seconds > self.settings.minutes * 60 - self.reserve
        return TIME_IS_UP if over else 0

    @contextmanager
    def _signals(self):
        """SIGTERM and Ctrl-C are noted, and acted on after the running step."""

        def note(number, frame):
            self.signal_number = number

        before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    # Checkpoints.

    def _resume(self) -> None:
        wanted = self.settings.resume_from_checkpoint
        if wanted == "none":
            return
        if wanted == "latest":
            path = checkpoints.newest_checkpoint(
                self.folder, lambda damaged, reason: print(f"passing over {damaged}: {reason}", flush=True)
            )
            if path is None:
                return
        else:
            path = Path(wanted)
            if not path.is_dir():
                raise ValueError(f"resume_from_checkpoint={wanted!r}: expected 'latest', 'none' or a checkpoint folder")
        tensors, state = checkpoints.load_checkpoint(path)
        newest = checkpoints.list_checkpoints(self.folder)[-1:]
        if wanted != "latest" and newest and newest[0].name != f"checkpoint-{state['step']}":
            raise ValueError(f"resume_from_checkpoint={wanted!r}: {newest[0]} is there; expected another output_dir")
        for key, value in self.identity.items():
            if state["identity"].get(key) != value:
                raise ValueError(
                    f"{path} has {key}={_short(state['identity'].get(key))}, this run has {_short(value)}; "
                    "expected the same, or another output_dir"
                )
        self.network.load_state_dict(tensors["model"])
        self._load_optimizer(tensors["optimizer"])
        if self.ema is not None:
            if "ema" not in tensors:
                raise ValueError(f"use_ema=True: {path} was trained without; expected use_ema=False")
            named = self.network.named_parameters()
            shadow = [torch.empty_like(value).copy_(tensors["ema"][name]) for name, value in named]
            counter = {"optimization_step": state["ema"]["optimization_step"], "shadow_params": shadow}
            self.ema.load_state_dict({**self.ema.state_dict(), **counter})
        if self.accelerator.scaler is not None and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.step, self.earlier_seconds = state["step"], state["seconds"]
        self.saved_seconds = state["seconds"]
        if self.settings.minutes is not None:
            self.step_seconds = state["step_seconds"] or self.seconds / max(1, self.step)
            self._plan_length()
        self.accelerator.print(f"resuming from {path}")

    def _load_optimizer(self, tensors: dict[str, torch.Tensor]) -> None:
        state: dict[int, dict[str, torch.Tensor]] = {}
        for name, value in tensors.items():
            index, key = name.split(".", 1)
            like = self.parameters[int(index)]
            if value.shape == like.shape:  # the fused optimiser needs the parameter's memory layout
                value = torch.empty_like(like, dtype=value.dtype).copy_(value)
            state.setdefault(int(index), {})[key] = value
        self.optimizer.load_state_dict({"state": state, "param_groups": self.optimizer.state_dict()["param_groups"]})

    def _save(self) -> None:
        self.saved_seconds = self.seconds
        if self.accelerator.is_main_process:
            optimizer = self.optimizer.state_dict()["state"]
            tensors = {
                "model": self.network.state_dict(),
                "optimizer": {f"{i}.{key}": value for i, part in optimizer.items() for key, value in part.items()},
            }
            state = {
                "step": self.step,
                "total_steps": self.total_steps,
                "step_seconds": self.step_seconds,
                "seconds": self.saved_seconds,
                "identity": self.identity,
                "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler is not None else None,
                "versions": {
                    "pyrdiff": pyrdiff.__version__,
                    "torch": torch.__version__,
                    "diffusers": diffusers.__version__,
                },
            }
            if self.ema is not None:
                names = [name for name, _ in self.network.named_parameters()]
                ema = self.ema.state_dict()
                tensors["ema"] = dict(zip(names, ema.pop("shadow_params"), strict=True))
                state["ema"] = ema
            checkpoints.save_checkpoint(self.folder, self.step, tensors, state)
            checkpoints.prune_checkpoints(self.folder, self.settings.checkpoints_total_limit)
        self.accelerator.wait_for_everyone()

    # A network that another method builds on.

    def finish(self) -> torch.nn.Module:
        """Trains to the end unless that was done before; the network with its averaged weights, frozen."""
        target, accelerator = self.folder / self.FINISHED, self.accelerator
        if not target.is_dir():
            self.fit()
            if self.settings.save_images_steps and self.previewed != self.step:
                self._preview()
            if accelerator.is_main_process:
                self.network.eval()
                with self._averaged_weights():
                    if self.method.finish is not None:
                        self.method.finish(self.settings, self.network, self.images)
                    beside = self.folder / f".{self.FINISHED}.writing"
                    shutil.rmtree(beside, ignore_errors=True)
                    self.network.save_pretrained(beside, safe_serialization=True)
                    beside.rename(target)
                print(f"saved {target} after {self.step} steps, {self.seconds / 60:.1f} minutes", flush=True)
            accelerator.wait_for_everyone()
        network = type(self.network).from_pretrained(target, use_safetensors=True)
        self._lay_out(network.to(accelerator.device))
        for tracker in accelerator.trackers:
            tracker.finish()
        return network.eval().requires_grad_(False)

    def _lay_out(self, network: torch.nn.Module) -> None:
        """Puts the weights of convolutions into the run's memory format."""
        for parameter in network.parameters():
            if parameter.ndim == 4:
                parameter.data = parameter.data.to(memory_format=self.memory_format)

    @property
    def digest(self) -> str:
        """SHA-256 of the finished network's weights."""
        digest = hashlib.sha256()
        for path in sorted((self.folder / self.FINISHED).glob("*.safetensors")):
            digest.update(path.read_bytes())
        return digest.hexdigest()

    # What a person looks at.

    def _open_folder(self) -> None:
        """Writes the resolved settings and starts the trackers."""
        self.folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(asdict(self.settings), indent=2)
        (self.folder / "settings.json").write_text(text + "\n", encoding="utf-8")
        parameters = sum(p.numel() for p in self.parameters)
        print(
            f"{text}\n{len(self.images)} images ({len(self.images.bad)} skipped, {self.images.composited} with "
            f"transparency laid on {tuple(self.settings.background)}, {self.images.enlarged} enlarged), "
            f"{parameters / 1e6:.1f}M parameters, batches {self.batches.batch_sizes} in each of "
            f"{self.accelerator.num_processes} processes on {self.accelerator.device}, mixed precision "
            f"{self.accelerator.mixed_precision}",
            flush=True,
        )
        if self.settings.report_to:
            values = {
                k: v if isinstance(v, (int, float, str, bool)) else str(v) for k, v in asdict(self.settings).items()
            }
            self.accelerator.init_trackers(self.method.name, config=values)

    def _log(self, log, level: int, loss: float, rate: float) -> None:
        values = {
            "step": self.step,
            "resolution": "{}x{}".format(*self.settings.sizes[level]),
            "loss": loss,
            "learning_rate": rate,
            "seconds": round(self.seconds, 3),
            "step_seconds": round(self.step_seconds, 4),
            "total_steps": self.total_steps,
        }
        log.write(json.dumps(values) + "\n")
        log.flush()
        if self.settings.report_to:
            numbers = {key: value for key, value in values.items() if isinstance(value, (int, float))}
            self.accelerator.log(numbers, step=self.step)

    @contextmanager
    def _averaged_weights(self):
        """The network with its EMA weights, for sampling and for export."""
        if self.ema is None:
            yield
            return
        self.ema.store(self.parameters)
        self.ema.copy_to(self.parameters)
        try:
            yield
        finally:
            self.ema.restore(self.parameters)

    def _preview(self) -> None:
        if self.accelerator.is_main_process:
            self.network.eval()
            with self._averaged_weights(), self.accelerator.autocast():
                path = self.folder / "samples" / f"step-{self.step:07d}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                values = self.method.preview(self.settings, self.pipeline, self.images, path)
            self.network.train()
            if values:
                with (self.folder / "log.jsonl").open("a", encoding="utf-8") as log:
                    log.write(json.dumps({"step": self.step, "validation": values}) + "\n")
                numbers = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
                print(f"step {self.step}: {numbers}", flush=True)
                if self.settings.report_to:
                    self.accelerator.log(
                        {f"validation_{name}": value for name, value in values.items()}, step=self.step
                    )
        self.previewed = self.step
        self.accelerator.wait_for_everyone()

    def export(self) -> Path:
        """The finished pipeline with the averaged weights, and a last sample grid."""
        target = self.folder / "pipeline"
        if self.settings.save_images_steps and self.previewed != self.step:
            self._preview()
        if self.accelerator.is_main_process:
            self.network.eval()
            with self._averaged_weights():
                description = f"{self.method.summary} Trained for {self.step} steps on {len(self.images)} images."
                hub.export(
                    self.pipeline,
                    target,
                    description=description,
                    license=self.settings.license,
                    training=self._for_the_card(),
                    data=self.settings.data_description,
                    limits=self.method.limits,
                )
            print(f"saved {target} after {self.step} steps, {self.seconds / 60:.1f} minutes", flush=True)
            if self.step <= self.settings.lr_warmup_steps:
                print(f"note: {self.step} steps are no more than lr_warmup_steps: it has learnt next to nothing")
        self.accelerator.end_training()
        return target

    def _for_the_card(self) -> dict[str, object]:
        """What a reader of the model card wants to know of the training; no places on this machine."""
        settings, accelerator = self.settings, self.accelerator
        cpu = f"cpu, {torch.get_num_threads()} threads"
        return {
            "method": self.method.name,
            "data set": settings.dataset_name or Path(settings.train_data_dir).name,
            "images": len(self.images),
            "resolutions": ", ".join("{}x{}".format(*size) for size in settings.sizes),
            "parameters": sum(p.numel() for p in self.network.parameters()),
            "steps": self.step,
            "images a step": ", ".join(str(accelerator.num_processes * size) for size in self.batches.batch_sizes),
            "minutes": round(self.saved_seconds / 60, 1),
            "device": torch.cuda.get_device_name() if accelerator.device.type == "cuda" else cpu,
            "processes": accelerator.num_processes,
            "precision": "float32" if accelerator.mixed_precision == "no" else accelerator.mixed_precision,
            "seed": settings.seed,
            "versions": f"pyrdiff {pyrdiff.__version__}, diffusers {diffusers.__version__}, torch {torch.__version__}",
        }


def _public(part) -> dict:
    """A config without what names versions and places."""
    return {key: value for key, value in json.loads(part.to_json_string()).items() if not key.startswith("_")}


def _short(value) -> str:
    text = json.dumps(value)
    return text if len(text) < 80 else text[:77] + "..."
