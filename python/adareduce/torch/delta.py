"""Adasum of weight changes: every rank steps by itself, then the steps are combined."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from adareduce.ops import Adasum, Max
from adareduce.runtime import (
    HorovodInternalError,
    ProcessSet,
    reject_call,
    rejected_on_all_ranks,
)
from adareduce.torch.allreduce import allreduce_, grouped_allreduce_async_
from adareduce.torch.buckets import check_known, name_of_request
from adareduce.torch.compression import Compression, Compressor
from adareduce.torch.flat_buffers import lay_out
from adareduce.torch.gradients import check_passes
from adareduce.torch.handles import Handle, synchronize
from adareduce.torch.wrapping import Wrapper


class DeltaForm(Wrapper):
    """An optimizer whose step is the Adasum of all ranks' steps.

    start = w;  w <- the optimizer's step, with this rank's gradients;
    w <- start + Adasum(w - start)

    For SGD without momentum this is Adasum of the gradients; with momentum or Adam it is what the
    paper trains with. Use the learning rate of one worker. **Before the step everything is local:**
    gradients, clipping, accumulation (any number of passes), GradScaler's scale, and the
    optimizer's state, which therefore differs between the ranks. ``synchronize`` does nothing.
    A parameter without a gradient on this rank adds nothing to the others' steps. A GradScaler that
    finds an infinity on any rank makes all ranks skip the step; weights and state stay.

    Source: arXiv 2006.02924, section 3; docs/optimizer.md.
    """

    _step_supports_amp_scaling = True

    def prepare(self) -> None:
        """Makes room for weights and their changes: twice the parameters' memory."""
        options, groups = self._options, [group["params"] for group in self.param_groups]
        check_passes(options.passes_per_step)
        self._num_groups = len(groups)
        names = options.names_of(groups)
        self._names = {
            id(p): name for p, name in zip([p for g in groups for p in g], names, strict=True)
        }
        process_set = options.process_set
        number = process_set.num_reducers
        process_set.num_reducers += 1
        shares = options.gradient_as_bucket_view and process_set.included()
        sharers = process_set if shares else None
        self._request_name = f"weights {number}"
        self._buckets = [
            _DeltaBucket(f"{self._request_name}.{place}", bucket, self._names, sharers)
            for place, bucket in enumerate(options.buckets_of(groups))
        ]
        self._known = {id(p) for bucket in self._buckets for p in bucket.parameters}

    def synchronize(self) -> None:
        """Does nothing: gradients stay those of this rank."""

    @contextlib.contextmanager
    def skip_synchronize(self) -> Iterator[None]:
        """Changes nothing: ``step`` combines the ranks' steps here, too."""
        yield

    def set_backward_passes_per_step(self, passes: int) -> None:
        """Changes nothing: ``step`` takes the gradients of any number of passes."""
        check_passes(passes)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Takes the optimizer's step with this rank's gradients and combines those of all ranks.

        Collective; blocks on the CPU. On a GPU the host waits only where GradScaler is used with
        an optimizer that is not fused. All or nothing: after an error the weights are what they
        were, but the optimizer's state has moved.

        Args:
            closure: Computes loss and gradients, of this rank alone.

        Returns:
            What the optimizer returns; None where GradScaler makes all ranks skip.

        Raises:
            ValueError: A parameter was unfrozen since the optimizer was made.
            HorovodInternalError: The ranks disagree, one made a mistake, or one is lost.
        """
        process_set = self._options.process_set
        found_inf = getattr(self, "found_inf", None)  # GradScaler's
        if not process_set.included():
            if self._is_infinite_here():
                return None
            self._unscale_gradients()
            return self._step_of_optimizer(closure)
        with self._rejecting(len(self._buckets) if found_inf is None else 1):
            self._check_groups_are_known()
            every = (p for group in self.param_groups for p in group["params"])
            check_known(every, self._known, self._names)
        if found_inf is not None:
            found_inf = self._infinite_anywhere(found_inf, process_set)
            if self._optimizer_supports_scaling:
                self.found_inf = found_inf  # it skips by itself: a change of zero
            elif found_inf.item() > 0:
                return None
        with self._rejecting(len(self._buckets)):
            self._unscale_gradients()
            for bucket in self._buckets:
                bucket.keep_start()
            with self._restoring():
                loss = self._step_of_optimizer(closure)
        self._optimizer._opt_called = True  # type: ignore[attr-defined]  # for its schedulers
        with self._restoring():
            self._combine(process_set)
        return loss

    step.hooked = True  # type: ignore[attr-defined]  # the optimizer's own step calls step hooks

    @torch.no_grad()
    def _combine(self, process_set: ProcessSet) -> None:
        error: Exception | None = None
        for place, bucket in enumerate(self._buckets):
            try:
                bucket.submit(self._options.compression, process_set)
            except Exception as problem:
                error = problem
                reject_call(process_set, problem, count=len(self._buckets) - place - 1)
                break
        for bucket in self._buckets:
            try:
                bucket.wait(self._options.compression)
            except Exception as problem:
                error = error or problem
        if error is not None:
            raise error
        for bucket in self._buckets:
            bucket.apply()

    def _infinite_anywhere(self, found_inf: Any, process_set: ProcessSet) -> torch.Tensor:
        """float32 (): 1 where a rank has found an infinity, else 0; where ``found_inf`` is."""
        if not isinstance(found_inf, torch.Tensor):  # 0, where this rank has no gradient at all
            device = next(p.device for group in self.param_groups for p in group["params"])
            found_inf = torch.full((), float(found_inf), dtype=torch.float32, device=device)
        mine = found_inf.detach().float().clamp(max=1.0)
        name = f"{self._request_name}: found_inf"
        return allreduce_(mine, op=Max, name=name, process_set=process_set)

    @contextlib.contextmanager
    def _rejecting(self, count: int) -> Iterator[None]:
        """The other ranks are not kept waiting for ``count`` calls where this rank raises."""
        try:
            yield
        except HorovodInternalError:  # the others know
            raise
        except Exception as error:
            reject_call(self._options.process_set, error, count=count)
            raise

    @contextlib.contextmanager
    def _restoring(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            for bucket in self._buckets:
                bucket.restore()
            raise


class _DeltaBucket:
    """Parameters whose changes are one request; ``sharers``: in flat buffers of these ranks."""

    def __init__(
        self,
        title: str,
        parameters: Sequence[torch.Tensor],
        names: Mapping[int, str],
        sharers: ProcessSet | None,
    ) -> None:
        self.parameters = list(parameters)
        self._title = name_of_request(title, [names[id(parameter)] for parameter in parameters])
        self._starts = [torch.empty_like(p, requires_grad=False) for p in parameters]
        if sharers is None:
            self._deltas = [torch.empty_like(p, requires_grad=False) for p in parameters]
        else:
            self._deltas = [place.tensor for place in lay_out(self.parameters, sharers)]
        self._handle: Handle | None = None
        self._contexts: list[Any] = []

    @torch.no_grad()
    def keep_start(self) -> None:
        torch._foreach_copy_(self._starts, self.parameters)

    @torch.no_grad()
    def restore(self) -> None:
        torch._foreach_copy_(self.parameters, self._starts)

    def submit(self, compression: type[Compressor], process_set: ProcessSet) -> None:
        with rejected_on_all_ranks(process_set):
            torch._foreach_copy_(self._deltas, self.parameters)
            torch._foreach_sub_(self._deltas, self._starts)
            pairs = [compression.compress(delta) for delta in self._deltas]
        self._contexts = [context for _, context in pairs]
        self._handle = grouped_allreduce_async_(
            [tensor for tensor, _ in pairs], op=Adasum, name=self._title, process_set=process_set
        )

    def wait(self, compression: type[Compressor]) -> None:
        if self._handle is None:
            return
        handle, self._handle = self._handle, None
        results = synchronize(handle)
        if compression is not Compression.none:
            plain = [
                compression.decompress(result, context)
                for result, context in zip(results, self._contexts, strict=True)
            ]
            torch._foreach_copy_(self._deltas, plain)

    def apply(self) -> None:
        self.restore()
        torch._foreach_add_(self.parameters, self._deltas)
