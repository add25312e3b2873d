"""AdaScale: the learning rate of large batches, from the variance of the gradients."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from adareduce import cuda_library
from adareduce.runtime import ProcessSet, global_process_set, reject_call
from adareduce.torch import streams
from adareduce.torch.adascale_arguments import check_distributed, check_schedule, own_reducer
from adareduce.torch.adascale_steps import DeviceSteps, HostSteps, Parts, Steps
from adareduce.torch.device_gain import Progress
from adareduce.torch.device_step import choose_rates
from adareduce.torch.gain import GainEstimator
from adareduce.torch.gradients import GradientReducer, check_passes
from adareduce.torch.loss_scaling import LossScale


class AdaScale(torch.optim.Optimizer):
    """Wraps an optimizer: averages gradients over all ranks and multiplies the rate by the gain.

    The wrapped optimizer's ``lr`` and its schedule stay those of scale 1; for the time of its
    ``step`` alone each group's ``lr`` is multiplied by the gain, between 1 and S. ``tau`` counts
    scale-invariant steps: index the schedule by it (``AdaScaleSchedule``), and stop by it.

    Args:
        optimizer: A ``DistributedOptimizer`` with op=Average, or a plain one.
        named_parameters: Names for messages. This, ``backward_passes_per_step`` and
            ``process_set`` are for a plain optimizer: a distributed one has been told.
        scale: S; ranks times passes by default. Above 1 on one rank without accumulation, the
            gain comes from differences of consecutive gradients, which is biased.
        backward_passes_per_step: Passes before ``step``. They are added: divide the loss by them.
        per_group: Each parameter group has its own gain; else all have the total one.
        loss_scale: What the loss was multiplied by when gradients are reduced: a number, a
            function, or a GradScaler. Statistics alone are divided by it.
        schedule: Rates of scale 1 by steps of scale 1, (T,) or (T, groups): row floor(tau) counts
            instead of ``lr``, the last one repeats. ``tabulate`` makes it of a scheduler.
        rates: "auto", or how rates get their gain on a GPU: ``choose_rates``. The host waits for
            nothing there, except with "host".
        gradient_as_bucket_view: Of a plain optimizer, as for ``DistributedOptimizer``.
        process_set: The ranks that take part.
        **estimator: ``smoothing``, ``averaging``, ``clip``, ``floor``, ``absolute_floor``, as
            ``GainEstimator`` takes them.

    Raises:
        ValueError: An argument is out of range, the wrapped optimizer does not average, or its
            parameters are on a GPU and its step is not linear in the rate.

    Source: Johnson et al., arXiv 2007.05105; docs/large_batch.md.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        named_parameters: Iterable[tuple[str, torch.Tensor]] | None = None,
        *,
        scale: float | None = None,
        backward_passes_per_step: int | None = None,
        per_group: bool = True,
        loss_scale: float | Callable[[], float] | Any = 1.0,
        schedule: torch.Tensor | None = None,
        rates: str = "auto",
        gradient_as_bucket_view: bool = False,
        process_set: ProcessSet = global_process_set,
        **estimator: Any,
    ) -> None:
        self.optimizer = optimizer
        # As after unpickling: the hooks of an optimizer, without parameter groups of its own.
        self.__setstate__({})
        for number, group in enumerate(optimizer.param_groups):
            if "lr" not in group:
                raise ValueError(f"AdaScale: optimizer must have an lr in group {number}, got none")
        self._is_distributed = hasattr(optimizer, "skip_synchronize")
        if self._is_distributed:
            check_distributed(optimizer, named_parameters, backward_passes_per_step, process_set,
                              gradient_as_bucket_view)  # fmt: skip
            self._reducer: GradientReducer = optimizer.reducer  # type: ignore[attr-defined]
            self._reducer.with_statistics = True
        else:
            self._reducer = own_reducer(
                optimizer, named_parameters, backward_passes_per_step, process_set,
                gradient_as_bucket_view,
            )  # fmt: skip
        if not self._reducer.process_set.included():
            raise ValueError("AdaScale: process_set must include this rank, got one that does not")
        device = next((p.device for p in self._parameters()), torch.device("cpu"))
        gpus = {streams.device_of(parameter) for parameter in self._parameters()}
        self._is_on_gpu = len(gpus) == 1 and None not in gpus and cuda_library.is_built()
        self._wanted_rates = rates
        rates = self._choose_rates()
        num_groups = len(optimizer.param_groups)
        self._estimator = GainEstimator(
            num_groups, self._count(), scale, device=device, **estimator
        )
        parts = Parts(
            optimizer,
            self._reducer,
            self._estimator,
            per_group,
            LossScale(loss_scale),
            check_schedule(schedule, num_groups, device),
            device,
        )
        self._steps: Steps = HostSteps(parts) if rates == "host" else DeviceSteps(parts, rates)
        self._must_synchronize = True
        self._is_synchronized = False  # by the caller, without a step since
        self._is_reduced_for_scaler = False

    # ---- a step -----------------------------------------------------------------------------

    @torch.no_grad()
    def synchronize(self) -> None:
        """Reduces the gradients now, so that they can be clipped before ``step``.

        Let ``step`` follow in ``skip_synchronize()``. Collective; blocks.
        """
        self._reduce()
        self._is_synchronized = True

    @contextlib.contextmanager
    def skip_synchronize(self) -> Iterator[None]:
        """Within this, ``step`` takes the gradients as they are, after ``synchronize()``."""
        if not self._is_synchronized:
            raise RuntimeError("AdaScale.skip_synchronize: synchronize() must come first, got none")
        self._must_synchronize = False
        try:
            yield
        finally:
            self._must_synchronize = True
            self._is_synchronized = False

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Reduces the gradients and takes one step of the wrapped optimizer at the scaled rate.

        If a reduced gradient is not finite, all ranks skip the step: averages, tau, weights and
        the wrapped optimizer's state stay as they are. Collective; blocks.

        Args:
            closure: Called once, before the reduction; must call ``backward``.

        Returns:
            What ``closure`` returned, or None.

        Raises:
            RuntimeError: ``synchronize()`` has averaged the gradients, but this is not called in
                ``skip_synchronize()``; or passes are missing.
        """
        result = None
        if closure is not None:
            try:
                with torch.enable_grad():
                    result = closure()
            except Exception as error:
                self._reducer.abandon(error)
                raise
        is_scalers_first_look = self._is_reduced_for_scaler
        if self._must_synchronize and not self._is_reduced_for_scaler:
            self._reduce()
        self._is_synchronized = self._is_reduced_for_scaler = False
        grad_scale = getattr(self, "grad_scale", None)  # GradScaler's, None after unscale_
        found_inf = getattr(self, "found_inf", None)
        if is_scalers_first_look and grad_scale is None and found_inf is not None:
            raise RuntimeError(
                "AdaScale.step: synchronize() must come before scaler.unscale_(), and step() in"
                " skip_synchronize(), got gradients that were unscaled before they were averaged"
            )
        self._steps.take(self._step_of_optimizer, grad_scale, found_inf)
        return result

    def _step_of_optimizer(self) -> None:
        try:
            with self._without_reduction():
                self.optimizer.step()
        except Exception as error:
            # A distributed one has told the others by itself.
            if not self._is_distributed:
                reject_call(self._reducer.process_set, error)
            raise

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As the wrapped optimizer's."""
        self._is_synchronized = self._is_reduced_for_scaler = False
        if not self._is_distributed:
            self._reducer.reset()
        self.optimizer.zero_grad(set_to_none=set_to_none)

    def set_backward_passes_per_step(self, passes: int) -> None:
        """Changes the passes, on all ranks between the same steps; S changes in proportion."""
        check_passes(passes)
        self._estimator.set_count(self._reducer.process_set.size() * passes)
        self._reducer.passes_per_step = passes
        self._steps.follow_estimator()

    @property
    def _step_supports_amp_scaling(self) -> bool:
        # GradScaler.step asks for this before it looks at gradients. Reduced now, they are the same
        # on all ranks, which find the same infinities. It then always calls step().
        if self._must_synchronize:
            with torch.no_grad():
                self._reduce()
            self._is_reduced_for_scaler = True
        return True

    # ---- what is known ----------------------------------------------------------------------

    @property
    def tau(self) -> torch.Tensor:
        """float64 (): scale-invariant steps so far, the sum of the total gains.

        To read this or another tensor's value waits for a GPU; ``progress`` does not.
        """
        return self._steps.tau

    scale_invariant_steps = tau

    @property
    def gain(self) -> torch.Tensor:
        """float64 (): gain of all groups together, which drives ``tau``; in [1, S]."""
        return self._steps.gain

    @property
    def gains(self) -> torch.Tensor:
        """float64 (groups,): what each group's rate was multiplied by."""
        return self._steps.gains

    def progress(self) -> Progress:
        """``tau``, ``gain`` and ``skipped_steps`` as far as the host knows them. Does not block.

        On a GPU those of an earlier call or step: each call takes what has arrived and asks for
        the newest. A loop that calls it after each step is usually one or two steps behind.
        """
        return self._steps.progress()

    @property
    def variance(self) -> torch.Tensor:
        """float64 (): averaged sigma^2, the trace of the gradient's covariance at scale 1."""
        return self._estimator.variance

    @property
    def squared_norm(self) -> torch.Tensor:
        """float64 (): averaged mu^2, the squared norm of the true gradient."""
        return self._estimator.squared_norm

    @property
    def scale(self) -> float:
        """S."""
        return self._estimator.scale

    @property
    def is_biased(self) -> torch.Tensor:
        """Whether the gain comes from differences of consecutive gradients; bool ()."""
        return self._estimator.is_biased

    @property
    def skipped_steps(self) -> torch.Tensor:
        """int64 (): steps that were skipped because gradients were not finite."""
        return self._steps.skipped

    def noise_scale(self, micro_batch_size: int) -> torch.Tensor:
        """float64 (): the gradient noise scale in examples; see ``GainEstimator.noise_scale``."""
        return self._estimator.noise_scale(micro_batch_size)

    # ---- an optimizer's other sides ---------------------------------------------------------

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The wrapped optimizer's groups; their ``lr`` are the rates of scale 1."""
        return self.optimizer.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        """The wrapped optimizer's state."""
        return self.optimizer.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """The wrapped optimizer's defaults."""
        return self.optimizer.defaults

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused: groups belong to the wrapped optimizer, before it is wrapped."""
        raise ValueError("AdaScale.add_param_group: groups must be added before AdaScale is made")

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's state and AdaScale's, which is tensors only.

        What ``torch.save`` writes, ``torch.load(weights_only=True)`` reads.
        """
        return {"optimizer": self.optimizer.state_dict(), "adascale": self._steps.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues from ``state_dict()``, also on another number of ranks. Not collective.

        Raises:
            ValueError: The state is not AdaScale's, has another number of groups, or is of an
                optimizer that cannot take its ``rates``.
        """
        if "adascale" not in state_dict:
            raise ValueError(
                f"AdaScale.load_state_dict: state_dict must be AdaScale's, got {list(state_dict)}"
            )
        self._steps.load_state_dict(state_dict["adascale"])
        self.optimizer.load_state_dict(state_dict["optimizer"])
        self._steps.follow_optimizer(self._choose_rates())  # groups bring their form, as in torch

    # ---- behind the scenes ------------------------------------------------------------------

    def _parameters(self) -> Iterator[torch.nn.Parameter]:
        return (p for group in self.optimizer.param_groups for p in group["params"])

    def _choose_rates(self) -> str:
        innermost = getattr(self.optimizer, "_optimizer", self.optimizer)  # of a distributed one
        return choose_rates(self._wanted_rates, innermost, self._is_on_gpu)

    def _count(self) -> int:
        """Micro-batches of a step."""
        return self._reducer.process_set.size() * self._reducer.passes_per_step

    def _problem(self) -> str | None:
        if self._is_synchronized:
            return (
                "AdaScale.step: after synchronize() it must be called in skip_synchronize(), got"
                " gradients that are averaged already"
            )
        if len(self.param_groups) != self._estimator.num_groups:
            return (
                "AdaScale.step: parameter groups must be those it was made for, got"
                f" {len(self.param_groups)} where there were {self._estimator.num_groups}"
            )
        if self._count() != self._estimator.count:
            return (
                "AdaScale.step: backward_passes_per_step must be changed by AdaScale's own"
                f" set_backward_passes_per_step, got {self._reducer.passes_per_step} passes"
            )
        if self._reducer.is_incomplete:
            return (
                f"AdaScale.step: all {self._reducer.passes_per_step} backward passes must come"
                " before it, since the gain depends on their number; got fewer"
            )
        return None

    def _reduce(self) -> None:
        problem = self._problem()
        if problem is not None:
            self._reducer.abandon(RuntimeError(problem))  # reduce() raises it, here and elsewhere
        if self._is_distributed:
            self.optimizer.synchronize()  # type: ignore[attr-defined]
        else:
            self._reducer.reduce()
        self._steps.keep_statistics()

    @contextlib.contextmanager
    def _without_reduction(self) -> Iterator[None]:
        if self._is_distributed:
            with self.optimizer.skip_synchronize():  # type: ignore[attr-defined]
                yield
        else:
            yield
