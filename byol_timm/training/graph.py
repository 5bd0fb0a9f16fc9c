"""A training step as one CUDA graph: one launch by the host, however many kernels it has."""

import contextlib
import logging
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn

from ..errors import ByolTimmError, one_line
from .optim import LARS
from .step import METRICS, train_step

logger = logging.getLogger(__name__)

# Ordinary steps before the capture: libraries choose their kernels and optimizers make their state in the first ones.
WARM_UP_STEPS = 3
SCALARS = (*METRICS, "grad_norm")


class GraphedStep:
    """`train_step` with one batch a step, captured once and then replayed; learning rate and decay may change.

    The first steps are ordinary ones. If the step cannot be captured (something random in the encoder, an operation
    that waits for the device), one warning says why and all steps stay ordinary ones. The metrics it returns are valid
    until the next step. Raises `ByolTimmError` for settings that a graph cannot have.
    """

    def __init__(self, accelerator: Accelerator, model: nn.Module, optimizer: AcceleratedOptimizer) -> None:
        for fault, wrong in (
            ("needs one process", accelerator.num_processes > 1),
            ("does not accumulate gradients", accelerator.gradient_accumulation_steps > 1),
            ("cannot be used with fp16. Use bf16", accelerator.scaler is not None),
        ):
            if wrong:
                raise ByolTimmError(f"--cuda_graph {fault}, or omit it")
        # Those whose learning rate may be a number on the device.
        if type(optimizer.optimizer) not in (LARS, torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW):
            raise ByolTimmError(
                f"--cuda_graph does not support {type(optimizer.optimizer).__name__}. Use lars, sgd, momentum or adamw"
            )
        self.accelerator, self.model, self.optimizer = accelerator, model, optimizer
        self.lr = torch.zeros((), device=accelerator.device)
        self.target_decay = torch.zeros((), device=accelerator.device)
        self.steps = 0
        self.views: tuple[Tensor, Tensor] | None = None
        self.graph: torch.cuda.CUDAGraph | None = None
        self.outputs: tuple[Tensor, Tensor] | None = None
        self.enabled = accelerator.device.type == "cuda"
        self.stream = torch.cuda.Stream() if self.enabled else None
        if not self.enabled:
            self._disable("no CUDA GPU")

    def __call__(self, pairs: Iterable[tuple[Tensor, Tensor]], *, lr: float, target_decay: float) -> dict[str, Tensor]:
        """Take one step on the only pair of views and return its metrics, as `train_step` does."""
        ((view1, view2),) = pairs
        self.lr.fill_(lr)
        self.target_decay.fill_(target_decay)
        if self.enabled and self.graph is None and self.steps == WARM_UP_STEPS:
            self._capture(view1, view2)
        self.steps += 1
        if self.graph is None or self.views is None or self.outputs is None:
            return self._ordinary(view1, view2)
        for static, view in zip(self.views, (view1, view2), strict=True):
            if static.data_ptr() != view.data_ptr():
                static.copy_(view)
        self.graph.replay()
        scalars, representation = self.outputs
        # The next replay writes where these are.
        metrics = dict(zip(SCALARS, scalars.clone().unbind(), strict=True))
        return {**metrics, "representation": representation}

    def _ordinary(self, view1: Tensor, view2: Tensor) -> dict[str, Tensor]:
        """Take a step without the graph: on a stream of its own before the capture, as torch asks for."""
        if self.stream is None or not self.enabled:
            return self._step(view1, view2)
        before, current, stream = torch.cuda.get_rng_state(), torch.cuda.current_stream(), self.stream
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            metrics = self._step(view1, view2)
        current.wait_stream(stream)
        for tensor in (view1, view2):
            tensor.record_stream(stream)
        for tensor in metrics.values():
            tensor.record_stream(current)
        if not torch.equal(before, torch.cuda.get_rng_state()):
            self._disable("something in the encoder is random (dropout or drop path)")
        return metrics

    def _step(self, view1: Tensor, view2: Tensor, *, capturing: bool = False) -> dict[str, Tensor]:
        pairs = [(view1, view2)]
        with _on_device(self.optimizer.optimizer, self.lr, capturing=capturing):
            return train_step(self.accelerator, self.model, self.optimizer, pairs, target_decay=self.target_decay)

    def _capture(self, view1: Tensor, view2: Tensor) -> None:
        # The capture must create the gradients, in the memory of the graph.
        self.optimizer.optimizer.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        views = view1, view2
        try:
            # Threads that load and save may use the device meanwhile.
            with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
                metrics = self._step(*views, capturing=True)
                scalars = torch.stack([metrics[name].float() for name in SCALARS])
        except RuntimeError as error:
            self.optimizer.optimizer.zero_grad(set_to_none=True)
            self._disable(one_line(error)[:200])
            return
        self.graph, self.views, self.outputs = graph, views, (scalars, metrics["representation"])

    def _disable(self, reason: str) -> None:
        self.enabled = False
        logger.warning("--cuda_graph: the step cannot be captured, so it runs without a graph (%s)", reason)


@contextlib.contextmanager
def _on_device(optimizer: torch.optim.Optimizer, lr: Tensor, *, capturing: bool) -> Iterator[None]:
    """Let a step of the optimizer read the learning rate on the device; its groups are unchanged afterwards."""
    values: dict[str, Any] = {"lr": lr}
    if not isinstance(optimizer, LARS):
        # Only torch's fused kernels take a learning rate on the device without reading it on the host.
        values |= {"fused": True, "foreach": False}
    if isinstance(optimizer, torch.optim.Adam):
        values["capturable"] = capturing
        for state in optimizer.state.values():
            state["step"] = state["step"].to(lr.device, torch.float32)
    before = [{name: group[name] for name in values} for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group.update(values)
    try:
        yield
    finally:
        for group, kept in zip(optimizer.param_groups, before, strict=True):
            group.update(kept)
