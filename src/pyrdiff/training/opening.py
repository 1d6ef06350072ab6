"""What a training begins with: the methods that it trains, their networks, and the images."""

from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator

from pyrdiff import hub
from pyrdiff.data import ImageLevels, ImageSource, MultiScaleBatches, open_source
from pyrdiff.data.sources import FolderImages
from pyrdiff.plugins import Method

from .notes import notes_on_images
from .settings import TrainingSettings
from .starting import Start, open_start


class Stage(NamedTuple):
    """A method to train, its settings, the folder of its run, and the trained network that it begins with, if any."""

    method: Method
    settings: TrainingSettings
    folder: Path
    start: Start | None = None


def stages_of(method: Method, settings: TrainingSettings) -> list[Stage]:
    """What the method builds on, if anything, and the method."""
    folder = Path(settings.output_dir)
    first = method.first(settings) if method.first is not None else None
    before = [] if first is None else [Stage(*first, folder / first[0].name)]
    start = None
    if settings.init_from is not None:
        if first is not None:
            raise ValueError(f"init_from={settings.init_from!r}: expected none; {method.name} trains two networks")
        if settings.lora_rank is not None:
            hub.require_peft()
        start = open_start(settings.init_from, method.name)
    return [*before, Stage(method, settings, folder, start)]


def network_of(stage: Stage, source: ImageSource) -> torch.nn.Module:
    """A stage's network, with random weights or those that it begins with."""
    torch.manual_seed(stage.settings.seed)
    method, settings, start = stage.method, stage.settings, stage.start
    named = {"class_names": source.labels.names} if settings.class_labels else {}
    if start is None:
        return method.model(settings, settings.image_channels, **named)
    network = start.network(method, settings, **named)
    start.copy_into(network)
    if settings.lora_rank is not None:
        start.check_same(network)
        hub.inject(network, settings.lora_rank)
    return network


def source_of(settings: TrainingSettings, accelerator: Accelerator) -> ImageSource:
    """The images as they lie there, none of them read yet."""
    with accelerator.main_process_first():
        return open_source(
            settings.train_data_dir or settings.dataset_name,
            dataset_config=settings.dataset_config_name,
            image_column=settings.image_column,
            array_key=settings.array_key,
            leave_out_runs=True,
            class_labels=settings.class_labels,
        )


def batches_of(settings: TrainingSettings, source: ImageSource, accelerator: Accelerator) -> MultiScaleBatches:
    """The data: read by the main process first, which fills the cache for the others."""
    with accelerator.main_process_first():
        if isinstance(source, FolderImages):
            accelerator.print(source.listing, flush=True)
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
        for note in notes_on_images(images, settings):
            accelerator.print(f"note: {note}", flush=True)
    return MultiScaleBatches(
        images,
        settings.train_batch_size,
        patch_size=settings.patch_size,
        random_flip=settings.random_flip,
        seed=settings.seed,
        num_processes=accelerator.num_processes,
        process_index=accelerator.process_index,
        accumulation=settings.gradient_accumulation_steps,
        level_share=settings.level_share,
    )
