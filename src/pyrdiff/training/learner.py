"""A network in training, with its optimiser and its moving average."""

from collections.abc import Callable
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel

from pyrdiff.parts.weights import unusable

from .averages import PowerAverages
from .checkpoints import Tensors
from .folder import Saved
from .resuming import AVERAGE, check_tensors
from .settings import TrainingSettings


class Learner:
    """
    What a step changes: the weights of `network`, the state of AdamW, `ema`, the average of the weights, or None, and
    `averages`, of which others are made after the run, or None.
    After `prepare`, `model` is the network as a loss calls it (compiled, distributed) and `optimizer` steps AdamW.
    """

    def __init__(self, network: torch.nn.Module, settings: TrainingSettings, accelerator: Accelerator):
        self.settings, self.accelerator = settings, accelerator
        on_gpu = accelerator.device.type == "cuda"
        channels_last = on_gpu if settings.channels_last is None else settings.channels_last
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.network = self.lay_out(network)
        self.trained = trained_parameters(network)
        self.parameters = list(self.trained.values())
        self.adamw = torch.optim.AdamW(
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
        self.averages = PowerAverages(self.parameters) if settings.keep_averages else None

    def average(self, step: int) -> None:
        """Takes the weights after a step into the averages; steps count from 1."""
        if self.ema is not None:
            self.ema.step(self.parameters)
        if self.averages is not None:
            self.averages.step(self.parameters, step)

    def lay_out(self, network: torch.nn.Module) -> torch.nn.Module:
        """Moves a network to the device, and the weights of its convolutions into the memory format."""
        network.to(self.accelerator.device)
        for parameter in network.parameters():
            if parameter.ndim == 4:
                parameter.data = parameter.data.to(memory_format=self.memory_format)
        return network

    def prepare(self) -> None:
        """Makes `model` and `optimizer`; the weights are final by then."""
        compiled = torch.compile(self.network, dynamic=False) if self.settings.compile else self.network
        self.model, self.optimizer = self.accelerator.prepare(compiled, self.adamw)

    def set_rate(self, rate: float) -> None:
        for group in self.adamw.param_groups:
            group["lr"] = rate

    @contextmanager
    def averaged_weights(self):
        """The network in evaluation mode with its averaged weights, for sampling and for export."""
        self.network.eval()
        if self.ema is not None:
            self.ema.store(self.parameters)
            self.ema.copy_to(self.parameters)
        try:
            yield
        finally:
            if self.ema is not None:
                self.ema.restore(self.parameters)
            self.network.train()

    # What a checkpoint keeps.

    def unusable(self) -> str | None:
        """The first tensor of the weights, or of their average, with values that no run goes on from."""
        average = {} if self.ema is None else self._named(self.ema.shadow_params)
        tensors = [self.network.state_dict(), average, *self.named_averages().values()]
        return min((name for group in tensors for name in unusable(group)), default=None)

    def named_averages(self) -> dict[float, dict[str, torch.Tensor]]:
        """{length: {name of the parameter: values}} of the averages of which others are made."""
        values = {} if self.averages is None else self.averages.values
        return {length: self._named(group) for length, group in values.items()}

    def _named(self, values: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        """By the names of the parameters."""
        return dict(zip(self.trained, values, strict=True))

    def _kept(self) -> dict[str, torch.Tensor]:
        """The weights that a checkpoint keeps: all, or those of the adapter that is trained."""
        state = self.network.state_dict()
        return {name: state[name] for name in self.trained} if has_adapter(self.network) else state

    def tensors(self) -> Tensors:
        state = self.adamw.state_dict()["state"]
        tensors = {
            "model": self._kept(),
            "optimizer": {f"{i}.{key}": value for i, values in state.items() for key, value in values.items()},
        }
        if self.ema is not None:
            tensors["ema"] = self._named(self.ema.state_dict()["shadow_params"])
        return tensors | {f"{AVERAGE}{length}": values for length, values in self.named_averages().items()}

    def state(self) -> dict[str, Any]:
        scaler = self.accelerator.scaler
        state = {"scaler": None if scaler is None else scaler.state_dict()}
        if self.ema is not None:
            state["ema"] = {key: value for key, value in self.ema.state_dict().items() if key != "shadow_params"}
        return state

    def load(self, saved: Saved) -> None:
        """
        Takes over what a checkpoint keeps.

        Raises:
            ValueError: if it lacks the average.
            CheckpointError: if its tensors are not those of this network in training. Nothing was taken over then.
        """
        check_tensors(saved.path, saved.state["step"], saved.tensors, self._kept(), self.trained)
        self.network.load_state_dict(saved.tensors["model"], strict=False)  # of an adapter's run without its base
        self._load_adamw(saved.tensors["optimizer"])
        if self.ema is not None:
            if "ema" not in saved.tensors:
                raise ValueError(f"use_ema=True: {saved.path} was trained without; expected use_ema=False")
            named = self.trained.items()
            shadow = [torch.empty_like(value).copy_(saved.tensors["ema"][name]) for name, value in named]
            counter = {"optimization_step": saved.state["ema"]["optimization_step"], "shadow_params": shadow}
            self.ema.load_state_dict({**self.ema.state_dict(), **counter})
        self._load_averages(saved)
        if self.accelerator.scaler is not None and saved.state["scaler"]:
            self.accelerator.scaler.load_state_dict(saved.state["scaler"])

    def _load_averages(self, saved: Saved) -> None:
        """An average has all steps in it, or is none: a run that began without goes on without."""
        averages = self.named_averages()
        if any(f"{AVERAGE}{length}" not in saved.tensors for length in averages):
            self.averages = None
            self.accelerator.print(f"keep_averages=True: {saved.path} was trained without; the run goes on without")
            return
        for length, values in averages.items():
            for name, value in values.items():
                value.copy_(saved.tensors[f"{AVERAGE}{length}"][name])

    def _load_adamw(self, tensors: dict[str, torch.Tensor]) -> None:
        state: dict[int, dict[str, torch.Tensor]] = {}
        for name, value in tensors.items():
            index, key = name.split(".", 1)
            like = self.parameters[int(index)]
            if value.shape == like.shape:  # the fused optimiser needs the parameter's memory layout
                value = torch.empty_like(like, dtype=value.dtype).copy_(value)
            state.setdefault(int(index), {})[key] = value
        self.adamw.load_state_dict({"state": state, "param_groups": self.adamw.state_dict()["param_groups"]})


def has_adapter(network: torch.nn.Module) -> bool:
    return bool(getattr(network, "peft_config", None))


def trained_parameters(network: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The parameters that are trained, by name: all, or those of an adapter."""
    only = has_adapter(network)
    return {name: value for name, value in network.named_parameters() if value.requires_grad or not only}


def learning_rate(settings: TrainingSettings, step: int, total_steps: int) -> float:
    """The rate of optimiser step `step` (from 0) in a run of `total_steps`."""
    warmup_steps = min(settings.lr_warmup_steps, total_steps // 2)
    return settings.learning_rate * _rate_factor(settings.lr_scheduler, warmup_steps, total_steps)(step)


@lru_cache(maxsize=1)
def _rate_factor(name: str, warmup_steps: int, total_steps: int) -> Callable[[int], float]:
    """diffusers' schedule as a function of the step. It is made for an optimiser, whichever it is."""
    spare = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=1.0)
    return get_scheduler(name, spare, num_warmup_steps=warmup_steps, num_training_steps=total_steps).lr_lambdas[0]
