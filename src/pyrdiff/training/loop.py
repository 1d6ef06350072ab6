"""Training of any method, top to bottom: what it begins with, the loop, checkpoints, export."""

import inspect
import json
import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from pyrdiff import hub
from pyrdiff.data import MultiScaleBatches
from pyrdiff.data.seeds import seed_of
from pyrdiff.parts.files import sweep
from pyrdiff.plugins import Method

from . import reports
from .accelerating import accelerator_for
from .folder import RunFolder, refuse_other_folder
from .learner import Learner, learning_rate
from .lock import FolderLock
from .losses import Draws
from .opening import Stage, batches_of, network_of, source_of, stages_of
from .outcomes import Launched, Outcome, launched
from .progress import Progress
from .settings import TrainingDiverged, TrainingSettings, TrainingStopped
from .snapshots import is_due
from .stopping import TIME_IS_UP, Budget, Signals, Stopwatch

MAX_OVERFLOWS = 30  # in a row: the factor of fp16 begins at 2**16 and is halved at each


class Surroundings(NamedTuple):
    """
    What the runs of one training share. The pipeline is published at `repo_id`, unless that is None.
    `locks` are those on its folders, in the process that writes.
    """

    accelerator: Accelerator
    batches: MultiScaleBatches
    watch: Stopwatch
    repo_id: str | None
    locks: dict[Path, FolderLock]


@dataclass
class DeviceBatch:
    """
    What a loss sees: `images` [B, C, H, W] in [-1, 1]; `boxes` [B, 4] of patches in the whole image, or None; `level`,
    0 the lowest resolution; `labels` int64 [B], the classes of the images, or None.
    """

    images: torch.Tensor
    boxes: torch.Tensor | None
    level: int = 0
    labels: torch.Tensor | None = None


def train(method: Method, settings: TrainingSettings, clock: Callable[[], float] = time.monotonic) -> Path:
    """
    Trains a method on images, with checkpoints, and exports the finished pipeline.

    Args:
        method: What to train.
        settings: Its flags, an instance of `method.settings`.
        clock: f() -> seconds, for `minutes` and all times that are reported. With `time.process_time` the minutes are
            CPU time, and what else the machine does has no part in how long the run is.

    Returns:
        The exported folder, `output_dir/pipeline`, or `output_dir/adapter` with `lora_rank`.

    Raises:
        ValueError: for bad input, before any work, and for a folder that another process trains in.
        TrainingStopped: after SIGTERM or SIGINT, a checkpoint saved.
        TrainingDiverged: when the loss is not finite; the last finite checkpoint is kept.
        OSError: if the disk refuses, or the output folder is gone.
    """
    run = prepare(method, settings, clock)
    try:
        run.fit()
        return run.export()
    finally:
        run.close()


def prepare(method: Method, settings: TrainingSettings, clock: Callable[[], float] = time.monotonic) -> "Run":
    """
    Everything before the first step, or before the next one of a run that resumes: networks, data, and the whole
    training of what the method builds on. Arguments and errors are those of `train`.

    Returns:
        The run; `fit` trains it, `export` saves and publishes the pipeline, `close` lets others train in its folder.
    """
    watch, accelerator = Stopwatch(clock), accelerator_for(settings)
    stages = stages_of(method, settings)
    folders = [stage.folder for stage in stages]
    for stage in stages:
        refuse_other_folder(stage.folder, stage.settings, within=folders)
    repo_id = None
    if settings.push_to_hub and accelerator.is_main_process:
        name = settings.hub_model_id or folders[-1].resolve().name
        repo_id = hub.reserve(name, private=settings.hub_private_repo or None)
    source = source_of(settings, accelerator)
    networks = [network_of(stage, source) for stage in stages]  # all, so that bad settings are met before any work
    with ExitStack() as held:  # until the run has them
        locks = {}
        for folder in folders if accelerator.is_main_process else ():
            locks[folder] = FolderLock(folder)
            held.callback(locks[folder].release)
            sweep(folder)
        surroundings = Surroundings(accelerator, batches_of(settings, source, accelerator), watch, repo_id, locks)
        stage, given = stages[-1], None
        if len(stages) > 1:
            first = Run(stages[0], networks.pop(0), surroundings)
            stage = stage._replace(method=method.building_on(first.finish()))
            given = first.folder.finished_digest()
            del first
            accelerator.free_memory()  # its optimiser, above all
        run = Run(stage, networks.pop(), surroundings, given)
        _refuse_other_classes(method, run.pipeline)
        held.pop_all()
    return run


def _refuse_other_classes(method: Method, pipeline) -> None:
    """Refuses a method that would export what `pyrdiff.load` could not read."""
    classes = {type(part) for part in (pipeline, *pipeline.components.values()) if part is not None}
    foreign = {cls for cls in classes if cls.__module__.split(".")[0] != "diffusers"}
    missing = sorted(cls.__name__ for cls in foreign - set(method.classes()))
    if missing:
        raise ValueError(f"method {method.name!r}: its `classes` lack {missing}, of which its pipeline is made")


class Run:
    """
    One training run: the loop, and its progress.

    Args:
        stage: What is trained, and where it is kept.
        network: The network.
        surroundings: What all runs of the training share.
        given: SHA-256 of the weights of the network that the method builds on, if there is one.
    """

    def __init__(self, stage: Stage, network: torch.nn.Module, surroundings: Surroundings, given: str | None = None):
        self.method, self.settings = stage.method, stage.settings
        self.accelerator, self.batches, self.watch, self.repo_id, self.locks = surroundings
        self.images = self.batches.images
        self.scheduler = self.method.scheduler(self.settings, self.images)
        self.start = stage.start
        if self.start is not None:
            self.start.check_scheduler(self.scheduler)
        self.pipeline = self.method.pipeline(self.settings, network, self.scheduler, self.images)
        self.identity = self._identity(network, given)
        self.identity["start"] = None if self.start is None else self.start.digest()
        self.identity["lora_rank"] = self.settings.lora_rank
        self.folder = RunFolder(stage.folder, self.settings, self.locks.get(stage.folder))
        self.learner = Learner(network, self.settings, self.accelerator)
        self.budget = Budget(self.watch, self.settings.minutes)
        self.signals = Signals()
        self.checks_late = self.accelerator.device.type != "cpu"
        self.step, self.total_steps = 0, self.settings.max_train_steps
        self.saved_seconds = 0.0  # the run's time at its last checkpoint
        self.previewed: int | None = None  # the last step with a picture
        self.overflows = 0  # steps in a row that fp16 has skipped
        self._resume()
        self.learner.prepare()

    def _identity(self, network: torch.nn.Module, given: str | None) -> dict[str, Any]:
        """What must be the same when a run resumes."""
        shares = self.batches.level_share
        identity = {
            "method": self.method.name,
            "network": _config(network),
            "scheduler": _config(self.scheduler),
            "images": len(self.images),
            "data": self.images.fingerprint,
            "batch": [self.accelerator.num_processes * size for size in self.batches.batch_sizes],
            "level_share": None if len(set(shares)) == 1 else shares,
            "accumulation": self.settings.gradient_accumulation_steps,
            "patch_size": self.settings.patch_size,
            "random_flip": self.settings.random_flip,
            "seed": self.settings.seed,
        }
        return identity if given is None else {**identity, "given": given}

    # The loop.

    def fit(self) -> None:
        """Trains to the end.

        Raises:
            TrainingStopped: after a signal, a checkpoint saved.
            TrainingDiverged: when the loss or the gradient is not finite.
            OSError: if the disk refuses, or the output folder is gone.
        """
        settings, is_main = self.settings, self.accelerator.is_main_process
        if is_main:
            self.folder.open(self.step)
            reports.opening(self)
        self.accelerator.wait_for_everyone()
        progress = Progress(self)
        warm = self.step + 2 * len(self.images.sizes)  # the first visits to a level compile and warm up
        stop, unread = 0, []
        with progress, self.signals:
            while self.step < self.total_steps and not stop:
                began = self.watch.clock()
                current = self.optimise()
                unread.append(current)
                saving, logging = self._is_due(settings.checkpointing_steps), self._is_due(settings.logging_steps)
                copying = self.learner.averages is not None and is_due(self.step)

                # On a GPU a step is checked while the next one is running: no waiting, one step late. Every process
                # reads the same numbers at the same place, so all of them stop together.
                behind = 1 if self.checks_late and not (saving or logging or copying) else 0
                while len(unread) > (0 if stop else behind):
                    step = unread.pop(0)
                    outcome = self.checked(step)
                    progress.read(outcome.loss)
                    stop = outcome.stop
                if logging and is_main:
                    reports.log_step(self, step, outcome.loss)
                if copying:
                    self._copy_averages()
                if saving or stop:
                    self._save()
                    progress.saved()
                if self.step > warm:
                    self.budget.note_step(self.watch.clock() - began)
                progress.trained(current, self.watch.clock() - began)
                if not stop and self._preview_is_due():
                    self._preview()
                if self._plan_is_due():
                    self._plan_length()
                    progress.plan()
        if 0 < stop < TIME_IS_UP:
            self.accelerator.end_training()
            raise TrainingStopped(stop, self.step)
        self._copy_averages()
        if not self.folder.has_saved(self.step):
            self._save()

    def optimise(self) -> Launched:
        """One optimiser step: the gradients of its batches are added up."""
        settings, accelerator, learner = self.settings, self.accelerator, self.learner
        rate = learning_rate(settings, self.step, self.total_steps)
        learner.set_rate(rate)
        losses = []
        for micro in range(settings.gradient_accumulation_steps):
            batch = self.batches.draw(self.step, micro)
            draws = Draws(
                settings.seed,
                self.step,
                micro,
                device=accelerator.device,
                num_processes=accelerator.num_processes,
                process_index=accelerator.process_index,
            )
            torch.manual_seed(seed_of(settings.seed, self.step, micro, accelerator.process_index))  # dropout only
            with accelerator.accumulate(learner.model):
                loss = self.method.loss(learner.model, self.scheduler, settings, self._on_device(batch), draws)
                accelerator.backward(loss)
                losses.append(loss.detach())
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(learner.parameters, settings.max_grad_norm)
                learner.optimizer.step()
                learner.optimizer.zero_grad()
        self.step += 1
        learner.average(self.step)
        loss = torch.stack(losses).mean()
        return launched(accelerator, self.step, batch.level, rate, loss, norm, self._stop_request())

    def _on_device(self, batch) -> DeviceBatch:
        """The batch on the device, moved without waiting for the work that a GPU has queued."""

        def moved(tensor: torch.Tensor) -> torch.Tensor:
            tensor = tensor.pin_memory() if self.accelerator.device.type == "cuda" else tensor
            return tensor.to(self.accelerator.device, non_blocking=True)

        images = moved(batch.images).to(torch.float32, memory_format=self.learner.memory_format)
        boxes = None if batch.boxes is None else moved(batch.boxes)
        labels = None if batch.labels is None else moved(batch.labels)
        return DeviceBatch(images.div_(127.5).sub_(1), boxes, batch.level, labels)

    def _stop_request(self) -> int:
        """The number of a signal that came, TIME_IS_UP, or 0."""
        return self.signals.number or (TIME_IS_UP if self.budget.seconds_left < 0 else 0)

    def checked(self, step: Launched) -> Outcome:
        """A step's numbers; if they are not finite, the batch is written down and the run ends."""
        outcome, scaler = step.outcome(), self.accelerator.scaler
        overflow = math.isfinite(outcome.loss) and not math.isfinite(outcome.gradient_norm)
        self.overflows = self.overflows + 1 if overflow else 0
        skipped = overflow and scaler is not None  # the scaler takes a smaller factor for the next step
        if math.isfinite(outcome.loss) and (not overflow or (skipped and self.overflows < MAX_OVERFLOWS)):
            return outcome
        path, in_a_row = self.folder.failure(step.number), ""
        if skipped:
            in_a_row = f" (the {self.overflows}th step in a row that fp16 skipped)"
        if self.accelerator.is_main_process:
            self.folder.write_failure(step.number, reports.failure(self, step, outcome))
        raise TrainingDiverged(
            f"loss {outcome.loss}, gradient norm {outcome.gradient_norm} at step {step.number}{in_a_row}: stopped; "
            f"{path} names the batch, and the last checkpoint is from before. A lower learning_rate often helps"
            + (", or mixed_precision bf16" if skipped else "")
        )

    # What is due after a step.

    def _is_due(self, every: int) -> bool:
        """Whether something is to be done after this step: it is one of `every` steps, or the last."""
        return self.step % every == 0 or self.step >= self.total_steps

    def _plan_is_due(self) -> bool:
        """With a budget in minutes: half-way through each 8 rounds of the levels, once the time of a step is known."""
        period = 8 * len(self.images.sizes)
        return self.settings.minutes is not None and self.budget.step_seconds > 0 and self.step % period == period // 2

    def _preview_is_due(self) -> bool:
        """Every `save_images_steps`; with a budget also before the first plan, which has to know how long one takes."""
        every, first_plan = self.settings.save_images_steps, 4 * len(self.images.sizes)
        return every > 0 and (self.step % every == 0 or (self.step == first_plan and self._plan_is_due()))

    def _plan_length(self) -> None:
        """As many steps as fit into the minutes, agreed between the processes."""
        total = [self.budget.total_steps(self.step)]
        self.total_steps = broadcast_object_list(total)[0] if self.accelerator.num_processes > 1 else total[0]

    def _preview(self) -> None:
        began = self.watch.clock()
        if self.accelerator.is_main_process:
            reports.preview(self)
        self.previewed = self.step
        self.accelerator.wait_for_everyone()
        self.budget.note_preview(self.watch.clock() - began)

    # Checkpoints.

    def _copy_averages(self) -> None:
        """Into the run's folder, before a checkpoint of the same step, so that who resumes from that has them."""
        averages = self.learner.named_averages()
        if averages and self.accelerator.is_main_process:
            self.folder.keep_averages(self.step, averages)

    def _save(self) -> None:
        self.saved_seconds = self.watch.seconds
        bad = self.learner.unusable()
        if bad is not None:
            raise TrainingDiverged(
                f"{bad} has values that are not finite, or far too large for weights, at step {self.step}: stopped "
                "without saving. The last checkpoint is from before; a lower learning_rate often helps"
            )
        if self.accelerator.is_main_process:
            progress = {
                "step": self.step,
                "total_steps": self.total_steps,
                "step_seconds": self.budget.step_seconds,
                "seconds": self.saved_seconds,
                "identity": self.identity,
                "versions": reports.versions(),
            }
            self.folder.save(self.step, self.learner.tensors(), {**progress, **self.learner.state()})
        self.accelerator.wait_for_everyone()

    def _resume(self) -> None:
        defaults = {"network": _defaults(self.learner.network), "scheduler": _defaults(self.scheduler)}
        saved = self.folder.saved(self.identity, defaults)
        if saved is None:
            return
        self.learner.load(saved)
        self.step = saved.state["step"]
        self.watch.earlier = self.saved_seconds = saved.state["seconds"]
        if self.settings.minutes is not None:
            self.budget.step_seconds = saved.state["step_seconds"] or self.watch.seconds / max(1, self.step)
            self._plan_length()
        self.accelerator.print(f"resuming from {saved.path}")

    # What is left of the run.

    def finish(self) -> torch.nn.Module:
        """
        For what another method builds on: trains to the end, unless that was done before.

        Returns:
            The network with its averaged weights, frozen.
        """
        target = self.folder.finished
        if not target.is_dir():
            self.fit()
            self._last_preview()
            if self.accelerator.is_main_process:
                with self.learner.averaged_weights():
                    if self.method.finish is not None:
                        self.method.finish(self.settings, self.learner.network, self.images)
                    self.folder.keep_finished(self.learner.network)
                reports.closing(self, target)
            self.accelerator.wait_for_everyone()
        network = type(self.learner.network).from_pretrained(target, use_safetensors=True)
        for tracker in self.accelerator.trackers:
            tracker.finish()
        return self.learner.lay_out(network).eval().requires_grad_(False)

    def export(self) -> Path:
        """
        Exports the pipeline with the averaged weights, or the adapter, after a last sample grid; publishes it where
        that is wanted.

        Returns:
            The exported folder.
        """
        adapts = self.settings.lora_rank is not None
        target = self.folder.path / ("adapter" if adapts else "pipeline")
        self._last_preview()
        if self.accelerator.is_main_process:
            self.folder.check()
            facts = {
                "description": f"{self.method.summary} Trained for {self.step} steps on {len(self.images)} images.",
                "license": self.settings.license,
                "training": reports.card_facts(self),
                "data": self.settings.data_description,
            }
            with self.learner.averaged_weights():
                if adapts:
                    digest = hub.base_digest(self.start.tensors)
                    hub.save_adapter(
                        self.pipeline, target, base=hub.public_name(self.start.place), digest=digest, **facts
                    )
                else:
                    hub.export(self.pipeline, target, **facts, limits=self.method.limits)
                if self.method.tune is not None and not adapts:
                    self.method.tune(self.settings, self.pipeline, target)
            reports.closing(self, target)
            print(f"next: {reports.next_command(self, target)}", flush=True)
        self.accelerator.end_training()
        if self.repo_id is not None:
            try:
                print(f"published {hub.push(target, self.repo_id).url}", flush=True)
            except OSError as error:
                raise OSError(f"{error} The model is in {target}: pyrdiff push {target} {self.repo_id}") from error
        return target

    def close(self) -> None:
        """Lets others train in the folder; to be called when no more is written."""
        for lock in self.locks.values():
            lock.release()

    def _last_preview(self) -> None:
        if self.settings.save_images_steps and self.previewed != self.step:
            self._preview()


def _config(part) -> dict[str, Any]:
    """A config without what names versions and places."""
    return {key: value for key, value in json.loads(part.to_json_string()).items() if not key.startswith("_")}


def _defaults(part) -> dict[str, Any]:
    """The defaults of what a config holds, as JSON has them."""
    parameters = inspect.signature(type(part).__init__).parameters.values()
    return {item.name: json.loads(json.dumps(item.default, default=str)) for item in parameters}
