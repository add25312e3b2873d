"""How one of torch's optimizers becomes a distributed one, and stays what it was."""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from adareduce.torch.loss_scaling import (
    clear_first_momentum,
    parameters_without_momentum,
    unscale,
)
from adareduce.torch.optimizer_arguments import Options

Form = TypeVar("Form", bound="Wrapper")


class Wrapper(torch.optim.Optimizer):
    """What both forms of the distributed optimizer share.

    Never made by itself: ``wrap`` makes a class that derives from a form and from the optimizer's
    class, in this order, so that ``super()`` in a form is the optimizer.
    """

    _options: Options
    # GradScaler finds _step_supports_amp_scaling true and always calls step(), which finds here the
    # scale (None where the user has called scaler.unscale_) and the number of infinities.
    grad_scale: torch.Tensor | None
    found_inf: torch.Tensor | int | None

    _optimizer: torch.optim.Optimizer  # the one that was wrapped: the same state and groups
    _num_groups: int
    _optimizer_supports_scaling: bool  # it does what GradScaler wants by itself: fused ones

    @abc.abstractmethod  # for readers: a metaclass of ours could not meet an optimizer's own
    def prepare(self) -> None:
        """Makes what depends on the parameters."""
        raise NotImplementedError

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds parameters, on all ranks between the same steps. Not collective.

        Raises:
            RuntimeError: Gradients are being reduced.
        """
        self._before_new_group()
        super().add_param_group(param_group)
        self.prepare()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As the optimizer's. Not collective: load it on all ranks, or broadcast it."""
        super().load_state_dict(state_dict)
        # This made new ones; the wrapped optimizer goes on sharing them.
        self._optimizer.state = self.state
        self._optimizer.param_groups = self.param_groups

    def _before_new_group(self) -> None:
        """Gives up what depends on the parameters."""

    def _step_of_optimizer(self, closure: Callable[[], Any] | None) -> Any:
        """The optimizer's own step. A fused one skips by itself, without the host."""
        found_inf = getattr(self, "found_inf", None)
        if not isinstance(found_inf, torch.Tensor):
            return super().step(closure)
        fresh = parameters_without_momentum(self)
        result = super().step(closure)
        clear_first_momentum(self, fresh, found_inf > 0)
        return result

    def _is_infinite_here(self) -> bool:
        """Whether GradScaler has found an infinity and the optimizer does not skip by itself.

        Waits for a GPU, as GradScaler does for such optimizers.
        """
        found_inf = getattr(self, "found_inf", None)
        if found_inf is None or self._optimizer_supports_scaling:
            return False
        return bool(found_inf > 0)

    @torch.no_grad()
    def _unscale_gradients(self) -> None:
        """GradScaler's part, where there is one and the optimizer does not do it by itself."""
        if getattr(self, "found_inf", None) is None or self._optimizer_supports_scaling:
            return
        if self.grad_scale is not None:
            unscale(self.param_groups, self.grad_scale)
        self.grad_scale = self.found_inf = None  # not for the optimizer; GradScaler removes them

    def _check_groups_are_known(self) -> None:
        if len(self.param_groups) != self._num_groups:
            raise RuntimeError(
                f"step: parameter groups must be added to the distributed optimizer, got"
                f" {len(self.param_groups)} groups where it knows {self._num_groups}"
            )


def wrap(form: type[Form], optimizer: torch.optim.Optimizer, options: Options) -> Form:
    """An object of a class made of ``form`` and the optimizer's class, with its attributes."""
    kind = type(optimizer)
    combined = type(kind.__name__, (form, kind), {"__doc__": form.__doc__})
    result: Form = object.__new__(combined)
    # These attributes would hide ours: a learning rate scheduler that was there first has put a
    # "step" of the optimizer's class among them.
    hiding = ("step", "_step_supports_amp_scaling")
    vars(result).update({k: v for k, v in vars(optimizer).items() if k not in hiding})
    result._options = options
    result._optimizer = optimizer
    result._optimizer_supports_scaling = bool(
        getattr(optimizer, "_step_supports_amp_scaling", False)
    )
    result.prepare()
    return result
