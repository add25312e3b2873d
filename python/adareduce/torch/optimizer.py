"""The optimizer of a data-parallel training: every rank takes the step of all ranks."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch

from adareduce.ops import Adasum, Average, ReduceOp, Sum
from adareduce.runtime import (
    HorovodInternalError,
    ProcessSet,
    global_process_set,
    reject_call,
)
from adareduce.settings import Settings
from adareduce.torch.allreduce import allreduce
from adareduce.torch.compression import Compression, Compressor
from adareduce.torch.delta import DeltaForm
from adareduce.torch.gradients import GradientReducer
from adareduce.torch.optimizer_arguments import Options, check_groups, check_names
from adareduce.torch.wrapping import Wrapper, wrap


def DistributedOptimizer(  # noqa: N802
    optimizer: torch.optim.Optimizer,
    named_parameters: Iterable[tuple[str, torch.Tensor]] | None = None,
    compression: type[Compressor] = Compression.none,
    backward_passes_per_step: int = 1,
    op: ReduceOp = Average,
    gradient_predivide_factor: float = 1.0,
    num_groups: int = 0,
    groups: int | Sequence[Sequence[torch.Tensor]] | None = None,
    sparse_as_dense: bool = False,
    process_set: ProcessSet = global_process_set,
    *,
    gradient_as_bucket_view: bool = False,
) -> Any:
    """Makes of an optimizer one that takes the step of all ranks.

    Average and Sum reduce gradients while backward runs; ``step`` waits. Gradients are added over
    the passes and reduced over the ranks only, as in Horovod: divide the loss by the passes where
    their mean is wanted. Adasum combines weight changes: see ``DeltaForm``. docs/optimizer.md.

    Args:
        optimizer: Any of torch's; the result is an instance of its class, too, and shares its
            state and parameter groups.
        named_parameters: ``model.named_parameters()``: names for messages, and the order.
        compression: What gradients (Adasum: weight changes) are turned into while they travel.
        backward_passes_per_step: Passes before ``step``.
        op: Average, Sum or Adasum.
        gradient_predivide_factor: With Average: divides before the sum, multiplies afterwards.
        num_groups: Deprecated: ``groups``.
        groups: How many requests, or lists of parameters that travel in one request each.
        sparse_as_dense: Makes sparse gradients dense, for good; otherwise they are an error.
        process_set: The ranks that take part; others step by themselves.
        gradient_as_bucket_view: Gradients (Adasum: weight changes) lie side by side in a buffer per
            request, and are not packed. This call is collective then, otherwise not.

    Raises:
        TypeError: ``optimizer`` or ``compression`` is not one.
        ValueError: Another argument is not of its form, or init() was not called.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(
            "DistributedOptimizer: optimizer must be a torch.optim.Optimizer, got"
            f" {type(optimizer).__name__}"
        )
    if isinstance(optimizer, Wrapper):
        raise ValueError(
            "DistributedOptimizer: optimizer must be one of torch's, got one that is distributed"
        )
    if not hasattr(compression, "compress"):
        raise TypeError(
            f"DistributedOptimizer: compression must be one of hvd.Compression, got {compression!r}"
        )
    if op not in (Average, Sum, Adasum):
        raise ValueError(f"DistributedOptimizer: op must be Average, Sum or Adasum, got {op!r}")
    if gradient_predivide_factor != 1.0 and op != Average:
        raise ValueError(
            "DistributedOptimizer: gradient_predivide_factor must be 1 where op is not Average, got"
            f" {gradient_predivide_factor} with op={ReduceOp(op).name}"
        )
    if not gradient_predivide_factor > 0:
        raise ValueError(
            "DistributedOptimizer: gradient_predivide_factor must be above 0, got"
            f" {gradient_predivide_factor}"
        )
    if num_groups != 0:
        warnings.warn(
            "DistributedOptimizer: num_groups is deprecated; use groups",
            DeprecationWarning,
            stacklevel=2,
        )
        groups = num_groups if groups is None else groups
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    check_groups(groups, parameters)
    options = Options(
        names=check_names(named_parameters, parameters),
        groups=groups,
        bucket_bytes=Settings.from_environment().fusion_threshold,
        op=ReduceOp(op),
        predivide_factor=float(gradient_predivide_factor),
        passes_per_step=backward_passes_per_step,
        compression=compression,
        sparse_as_dense=sparse_as_dense,
        gradient_as_bucket_view=gradient_as_bucket_view,
        process_set=process_set,
    )
    return wrap(DeltaForm if op == Adasum else GradientForm, optimizer, options)


class GradientForm(Wrapper):
    """An optimizer whose gradients are reduced before its step: Average and Sum.

    Attributes:
        reducer: The GradientReducer at work.
    """

    reducer: GradientReducer

    def prepare(self) -> None:
        """Makes the reducer, for the parameters that there are now."""
        options, groups = self._options, [group["params"] for group in self.param_groups]
        self._num_groups = len(groups)
        former = vars(self).get("reducer")
        self.reducer = GradientReducer(
            groups,
            options.names_of(groups),
            op=options.op,
            passes_per_step=options.passes_per_step,
            prescale_factor=1.0 / options.predivide_factor,
            postscale_factor=options.predivide_factor,
            compression=options.compression,
            buckets=options.buckets_of(groups),
            sparse_as_dense=options.sparse_as_dense,
            with_statistics=former is not None and former.with_statistics,
            gradient_as_bucket_view=options.gradient_as_bucket_view,
            process_set=options.process_set,
        )
        self._is_synchronized = False  # by synchronize(), without a step since
        self._is_reduced_for_scaler = False
        self._must_synchronize = True

    def synchronize(self) -> None:
        """Waits for the gradients of all ranks, to clip or look at them before ``step``.

        Collective; blocks. Let ``step`` follow in ``skip_synchronize()``. Errors are those of
        ``GradientReducer.reduce``.
        """
        self.reducer.reduce()
        self._is_synchronized = True

    @contextlib.contextmanager
    def skip_synchronize(self) -> Iterator[None]:
        """Within this, ``step`` takes the gradients as they are."""
        self._must_synchronize = False
        try:
            yield
        finally:
            self._must_synchronize = True

    def set_backward_passes_per_step(self, passes: int) -> None:
        """Changes ``backward_passes_per_step``, on all ranks between the same steps.

        Raises:
            ValueError: ``passes`` is not a positive number.
            RuntimeError: Gradients are being reduced.
        """
        self.reducer.passes_per_step = passes
        self._options.passes_per_step = passes

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Waits for the gradients of all ranks and takes the optimizer's step.

        Collective; blocks. Errors are those of ``GradientReducer.reduce``.

        Args:
            closure: Computes loss and gradients; they are reduced each time it was called.

        Returns:
            What the optimizer returns: the closure's loss on this rank (LBFGS decides by it and
            gets the mean over the ranks).
        """
        self._check_groups_are_known()
        if closure is not None and self._must_synchronize:
            return self._local_step(self._reducing(closure))
        if closure is None and not self._must_synchronize and not self._is_synchronized:
            raise RuntimeError(
                "step: synchronize() must come before a step() in skip_synchronize(), got gradients"
                " of this rank alone"
            )
        if self._must_synchronize and not self._is_reduced_for_scaler:
            self._reduce_for_step()
        is_first_look = self._is_reduced_for_scaler and not self._is_synchronized
        self._is_synchronized = self._is_reduced_for_scaler = False
        if is_first_look and getattr(self, "grad_scale", self) is None:
            raise RuntimeError(
                "step: gradients must not be unscaled while they are being reduced: call"
                " synchronize() before scaler.unscale_(), and step() in skip_synchronize()"
            )
        if self._is_infinite_here():
            return None
        self._unscale_gradients()
        return self._local_step(closure)

    step.hooked = True  # type: ignore[attr-defined]  # the optimizer's own step calls step hooks

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forgets the gradients, and the passes that were counted. Not collective.

        Raises:
            RuntimeError: Gradients are being reduced: call step() or synchronize() first.
        """
        self.reducer.reset()
        self._is_synchronized = self._is_reduced_for_scaler = False
        super().zero_grad(set_to_none)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        # GradScaler.step asks for this before it looks at the gradients. It is the last moment to
        # wait for them; afterwards all ranks find the same infinities.
        if self._must_synchronize:
            self._reduce_for_step()
            self._is_reduced_for_scaler = True
        return True

    def _local_step(self, closure: Callable[[], Any] | None) -> Any:
        self._known_error: BaseException | None = None
        try:
            return self._step_of_optimizer(closure)
        except Exception as error:
            # This rank's weights are no longer those of the others: their next call raises.
            if error is not self._known_error and not isinstance(error, HorovodInternalError):
                reject_call(self._options.process_set, error)
            raise
        finally:
            # What a scheduler that was made for the wrapped optimizer looks at.
            self._optimizer._opt_called = True  # type: ignore[attr-defined]

    def _reduce_for_step(self) -> None:
        if self._is_synchronized:
            warnings.warn(
                "step() after synchronize() reduces the gradients a second time; call it in"
                " optimizer.skip_synchronize()",
                stacklevel=3,
            )
        self.reducer.reduce()

    def _reducing(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        def reducing_closure() -> Any:
            try:
                loss = closure()
            except Exception as error:
                self.reducer.abandon(error)
                self._known_error = error
                raise
            try:
                self.reducer.reduce()
            except Exception as error:  # the others know
                self._known_error = error
                raise
            if isinstance(self, torch.optim.LBFGS) and self._options.process_set.included():
                with torch.no_grad():
                    loss = allreduce(torch.as_tensor(loss), process_set=self._options.process_set)
            return loss

        return reducing_closure

    def _before_new_group(self) -> None:
        self.reducer.reset()
        self.reducer.close()
