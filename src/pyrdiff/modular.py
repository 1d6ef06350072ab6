"""Modular Diffusers: any of the pipelines as one block, to be put in a sequence with others."""

import inspect

from diffusers import DiffusionPipeline, ModularPipelineBlocks, SchedulerMixin
from diffusers.modular_pipelines import ComponentSpec, InputParam, OutputParam


class PipelineBlock(ModularPipelineBlocks):
    """
    A pipeline as a block of Modular Diffusers: its components are the block's, the arguments of its call the inputs,
    the fields of its output the outputs.

    Args:
        pipeline_class: One of pyrdiff's pipelines, or another that is written like them.
        reads: {argument: name}: what to read from the state under another name than the argument's. With
            `{"image": "images"}` a pipeline that enlarges takes what the block before it generated.
        settings: What the pipeline's constructor takes beside components, such as `plans`.

    Raises:
        ValueError: if `reads` or `settings` names something that the pipeline does not take.

    Example:
        >>> import pyrdiff, torch
        >>> from diffusers.modular_pipelines import SequentialPipelineBlocks
        >>> from pyrdiff.modular import PipelineBlock
        >>> blocks = SequentialPipelineBlocks.from_blocks_dict({
        ...     "generate": PipelineBlock(pyrdiff.PyramidalPipeline),
        ...     "enlarge": PipelineBlock(pyrdiff.GuidedSRPipeline, reads={"image": "images"}),
        ... })
        >>> pipeline = blocks.init_pipeline()
        >>> pipeline.update_components(**pyrdiff.load("noto-emoji").components)
        >>> images = pipeline(num_inference_steps=4, refine_steps=2, scale_factor=2, output="images")
        >>> images[0].size
        (128, 128)
    """

    def __init__(
        self, pipeline_class: type[DiffusionPipeline], reads: dict | None = None, settings: dict | None = None
    ):
        super().__init__()
        self.pipeline_class, self.reads, self.settings = pipeline_class, dict(reads or {}), dict(settings or {})
        call = inspect.signature(pipeline_class.__call__)
        ignored = ("self", "return_dict", "output_type", "callback_on_step_end", "callback_on_step_end_tensor_inputs")
        self.arguments = {name: each for name, each in call.parameters.items() if name not in ignored}
        for what, given, known in (
            ("reads", self.reads, set(self.arguments)),
            ("settings", self.settings, set(inspect.signature(pipeline_class.__init__).parameters)),
        ):
            if set(given) - known:
                raise ValueError(f"{what}={given!r}: {pipeline_class.__name__} takes {sorted(known - {'self'})}")
        output_class = next(each for each in call.return_annotation.__args__ if each is not tuple)
        self.fields = [name for name in output_class.__dataclass_fields__]

    @property
    def description(self) -> str:
        return inspect.getdoc(self.pipeline_class)

    @property
    def expected_components(self) -> list[ComponentSpec]:
        names = self.pipeline_class._get_signature_keys(self.pipeline_class)[0]
        annotations = inspect.signature(self.pipeline_class.__init__).parameters
        found = []
        for name in sorted(set(names) | set(self.pipeline_class._optional_components)):
            kind = annotations[name].annotation
            found.append(ComponentSpec(name, kind if inspect.isclass(kind) else SchedulerMixin))
        return found

    @property
    def inputs(self) -> list[InputParam]:
        found = []
        for name, each in self.arguments.items():
            needed = each.default is inspect.Parameter.empty
            found.append(
                InputParam(self.reads.get(name, name), required=needed, default=None if needed else each.default)
            )
        return found

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [OutputParam(name) for name in self.fields]

    def __call__(self, components, state):
        block = self.get_block_state(state)
        parts = {spec.name: getattr(components, spec.name, None) for spec in self.expected_components}
        pipeline = self.pipeline_class(**parts, **self.settings)
        given = {name: getattr(block, self.reads.get(name, name)) for name in self.arguments}
        output = pipeline(**given)
        for name in self.fields:
            setattr(block, name, getattr(output, name))
        self.set_block_state(state, block)
        return components, state
