"""What AdaScale checks and makes of its arguments."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from adareduce.ops import ReduceOp
from adareduce.runtime import ProcessSet, global_process_set
from adareduce.torch.gradients import GradientReducer


def own_reducer(
    optimizer: torch.optim.Optimizer,
    named_parameters: Iterable[tuple[str, torch.Tensor]] | None,
    passes: int | None,
    process_set: ProcessSet,
    gradient_as_bucket_view: bool,
) -> GradientReducer:
    """The reducer of a plain optimizer's gradients.

    Raises:
        ValueError: The passes are not positive, or a parameter has no name.
    """
    passes = 1 if passes is None else int(passes)
    if passes < 1:
        raise ValueError(f"AdaScale: backward_passes_per_step must be at least 1, got {passes}")
    groups = [list(group["params"]) for group in optimizer.param_groups]
    names = None
    if named_parameters is not None:
        by_parameter = {parameter: name for name, parameter in named_parameters}
        unnamed = sum(p not in by_parameter for group in groups for p in group)
        if unnamed:
            raise ValueError(
                f"AdaScale: named_parameters must name all parameters, got none for {unnamed}"
            )
        names = [by_parameter[parameter] for group in groups for parameter in group]
    return GradientReducer(
        groups,
        names,
        op=ReduceOp.Average,
        passes_per_step=passes,
        with_statistics=True,
        gradient_as_bucket_view=gradient_as_bucket_view,
        process_set=process_set,
    )


def check_distributed(
    optimizer: torch.optim.Optimizer,
    named_parameters: object,
    passes: int | None,
    process_set: ProcessSet,
    gradient_as_bucket_view: bool,
) -> None:
    """Refuses a distributed optimizer that does not average, and what only it can be told.

    Raises:
        ValueError: Either.
    """
    reducer = getattr(optimizer, "reducer", None)  # that of Adasum has none
    if reducer is None or reducer.op != ReduceOp.Average:
        op = ReduceOp.Adasum if reducer is None else ReduceOp(reducer.op)
        raise ValueError(f"AdaScale: optimizer must have op=Average, got op={op.name}")
    for name, value, default in (
        ("named_parameters", named_parameters, None),
        ("backward_passes_per_step", passes, None),
        ("process_set", process_set, global_process_set),
        ("gradient_as_bucket_view", gradient_as_bucket_view, False),
    ):
        if value is not default:
            raise ValueError(
                f"AdaScale: {name} must be given to the DistributedOptimizer that is wrapped, got"
                f" {value!r:.80}"
            )


def check_schedule(
    schedule: torch.Tensor | None, num_groups: int, device: torch.device
) -> torch.Tensor | None:
    """A schedule as float64 (T, K), the rates of K groups, on ``device``.

    Raises:
        ValueError: Not a table of rates, one for all groups or one for each.
    """
    if schedule is None:
        return None
    table = torch.as_tensor(schedule)
    if table.dim() == 1:
        table = table[:, None].expand(-1, num_groups)
    if table.dim() != 2 or table.shape[0] < 1 or table.shape[1] != num_groups:
        raise ValueError(
            f"AdaScale: schedule must have shape (T,) or (T, {num_groups}) with T at least 1, got"
            f" {tuple(torch.as_tensor(schedule).shape)}"
        )
    table = table.to(device, torch.float64).contiguous()
    if not bool((torch.isfinite(table) & (table >= 0)).all()):
        raise ValueError("AdaScale: schedule must be finite and not negative, got other entries")
    return table
