"""Gradients of all ranks become one, bucket by bucket, while backward still runs."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from adareduce.ops import Average, ReduceOp, Sum
from adareduce.runtime import (
    HorovodInternalError,
    ProcessSet,
    global_process_set,
    reject_call,
    rejected_on_all_ranks,
)
from adareduce.settings import Settings
from adareduce.torch.allreduce import grouped_allreduce_async_
from adareduce.torch.bucket_statistics import BucketStatistics
from adareduce.torch.buckets import Bucket, check_known, cut_buckets
from adareduce.torch.compression import Compression, Compressor
from adareduce.torch.handles import Handle, poll, synchronize
from adareduce.torch.statistics import grouped_allreduce_with_stats_async_

# The reducer whose hooks a parameter has. A newer one takes its parameters over: two would reduce
# the same gradients twice.
_reducer_of: WeakIdKeyDictionary = WeakIdKeyDictionary()


class GradientReducer:
    """Reduces the gradients of parameters, bucket by bucket, while backward runs.

    A bucket is one request. It is launched from the hook that sees the last of its gradients, but
    never before its predecessor, so that all ranks submit in one order; ``reduce`` launches what
    is missing. A parameter without a gradient on this rank contributes zeros; one without a
    gradient on any rank keeps ``.grad`` None, as on a single process.

    Args:
        groups: Parameter groups, as an optimizer has them. Frozen parameters are left out.
        names: Of all parameters, for messages.
        op: Average or Sum, over the ranks. Passes are always added, never averaged.
        passes_per_step: Backward passes after which a gradient is ready.
        prescale_factor: Multiplies every gradient before the reduction.
        postscale_factor: Multiplies every reduced gradient.
        compression: What gradients are turned into while they travel.
        bucket_bytes: ``cut_buckets``; ADAREDUCE_FUSION_THRESHOLD by default.
        buckets: The buckets themselves, instead.
        sparse_as_dense: Makes sparse gradients dense, for good; otherwise they are an error.
        with_statistics: Fill ``statistics``.
        gradient_as_bucket_view: Gradients lie in a flat buffer per bucket; docs/optimizer.md. The
            constructor is collective then.
        process_set: The ranks that take part; on others nothing is reduced.

    Attributes:
        found: What ``statistics`` and ``nonfinite`` are made of.
    """

    def __init__(
        self,
        groups: Sequence[Sequence[torch.Tensor]],
        names: Sequence[str] | None = None,
        *,
        op: ReduceOp = Average,
        passes_per_step: int = 1,
        prescale_factor: float = 1.0,
        postscale_factor: float = 1.0,
        compression: type[Compressor] = Compression.none,
        bucket_bytes: int | None = None,
        buckets: Sequence[Sequence[torch.Tensor]] | None = None,
        sparse_as_dense: bool = False,
        with_statistics: bool = False,
        gradient_as_bucket_view: bool = False,
        process_set: ProcessSet = global_process_set,
    ) -> None:
        if op not in (Average, Sum):
            raise ValueError(f"GradientReducer: op must be Average or Sum, got {op!r}")
        self._groups = groups
        self.op = ReduceOp(op)
        self._prescale_factor = float(prescale_factor)
        self._postscale_factor = float(postscale_factor)
        self._compression = compression
        self._sparse_as_dense = sparse_as_dense
        self._with_statistics = with_statistics
        self.process_set = process_set
        self._is_member = process_set.included()
        self._has_statistics = False
        self._combined: torch.Tensor | None = None

        parameters = [p for group in groups for p in group]
        self._names = {
            id(parameter): names[place] if names is not None else f"parameter {place}"
            for place, parameter in enumerate(parameters)
        }
        backward_order = [p for p in reversed(parameters) if p.requires_grad]
        if buckets is None:
            if bucket_bytes is None:
                bucket_bytes = Settings.from_environment().fusion_threshold
            buckets = cut_buckets(backward_order, bucket_bytes)
        if sorted(map(id, backward_order)) != sorted(id(p) for b in buckets for p in b):
            raise ValueError(
                "GradientReducer: buckets must hold every parameter that requires a gradient once"
            )
        number = process_set.num_reducers
        process_set.num_reducers += 1
        group_of = {id(p): place for place, group in enumerate(groups) for p in group}
        sharers = process_set if gradient_as_bucket_view and self._is_member else None
        self._buckets = [
            Bucket(f"gradients {number}.{place}", bucket, self._names, group_of, sharers)
            for place, bucket in enumerate(buckets)
            if bucket
        ]
        self.found = BucketStatistics(self._buckets, len(groups), self._prescale_factor)
        self._known = set(map(id, backward_order))
        self._num_launched = 0
        self._step = 0  # in names
        self._failure: Exception | None = None
        self._passes_per_step = 0
        self._removers: list[Callable[[], None]] = []
        self.passes_per_step = passes_per_step

    @property
    def passes_per_step(self) -> int:
        """Backward passes after which a gradient is ready. Settable between steps."""
        return self._passes_per_step

    @passes_per_step.setter
    def passes_per_step(self, passes: int) -> None:
        check_passes(passes)
        self.reset()
        self._passes_per_step = passes
        self.close()
        if self._is_member:
            self._add_hooks()

    @property
    def with_statistics(self) -> bool:
        """Whether ``reduce`` fills ``statistics``. Settable between steps."""
        return self._with_statistics

    @with_statistics.setter
    def with_statistics(self, is_wanted: bool) -> None:
        self._with_statistics = is_wanted
        self.passes_per_step = self._passes_per_step  # other hooks

    @property
    def num_buckets(self) -> int:
        """Requests per step."""
        return len(self._buckets)

    @property
    def num_copied(self) -> int:
        """Gradients that had to be copied into the buffers of gradient_as_bucket_view so far."""
        return sum(bucket.num_copied for bucket in self._buckets)

    @property
    def num_finished(self) -> int:
        """Requests of this step that have finished; those of a step that waits count."""
        return sum(bucket.handle is not None and poll(bucket.handle) for bucket in self._buckets)

    @property
    def is_incomplete(self) -> bool:
        """Whether backward passes were made on this rank, but none of them was the last."""
        most = max((max(bucket.passes, default=0) for bucket in self._buckets), default=0)
        return 0 < most < self._passes_per_step

    @property
    def is_outstanding(self) -> bool:
        """Whether a reduction is under way, so that gradients must not be touched."""
        return any(bucket.handle is not None for bucket in self._buckets)

    @property
    def statistics(self) -> torch.Tensor | None:
        """float64 (K, 2) for K parameter groups, after ``reduce`` with statistics; else None.

        The sum over ranks and passes of |g|^2, and |mean over ranks|^2 of the gradients added over
        the passes, both before the scale factors; the same bits on all ranks.
        """
        if self._has_statistics and self._combined is None:
            self._combined = self.found.total(self._passes_per_step)
        return self._combined

    @property
    def nonfinite(self) -> bool:
        """Whether a gradient has an infinite or undefined element. Blocks on a GPU.

        After ``reduce`` the same on all ranks, without communication. Reads the gradients where
        there are no statistics, which have counted.
        """
        if self._with_statistics:
            return self.found.any_nonfinite()
        gradients = (p.grad for bucket in self._buckets for p in bucket.parameters)
        return any(bool((~torch.isfinite(g)).any()) for g in gradients if g is not None)

    @torch.no_grad()
    def reduce(self) -> None:
        """Launches the buckets that are missing, waits for all and leaves the results in ``.grad``.

        Collective over the process set; blocks on the CPU. On a GPU the current stream waits and
        the host does not, except where a parameter has no gradient on this rank. Gradients whose
        passes are not complete are reduced as they are.

        Raises:
            RuntimeError: Somebody changed or replaced a gradient while it was being reduced, or
                a backward pass has failed before.
            ValueError: A gradient is sparse, or a parameter was added or unfrozen meanwhile.
            HorovodInternalError: The ranks disagree, one made a mistake, or one is lost. After any
                error a gradient is either reduced or not: call ``zero_grad``.
        """
        if not self._is_member:
            return
        try:
            check_known((p for g in self._groups for p in g), self._known, self._names)
            while self._failure is None and self._num_launched < len(self._buckets):
                self._launch(self._buckets[self._num_launched])
        except Exception as error:
            self.abandon(error)
        self._wait()
        failure, self._failure = self._failure, None
        self._num_launched = len(self._buckets)  # also where there are none: it was a step
        self.reset()
        if failure is not None:
            raise failure
        self._has_statistics, self._combined = self._with_statistics, None

    def reset(self) -> None:
        """Forgets the passes that were counted. Not collective; blocks only after an error.

        Raises:
            RuntimeError: A reduction is under way.
        """
        if self._failure is not None:
            self._wait()
            self._failure = None
        if self.is_outstanding:
            raise RuntimeError(
                "gradients must not be touched while they are being reduced: call step() or"
                " synchronize() after backward()"
            )
        if self._num_launched > 0 or any(any(bucket.passes) for bucket in self._buckets):
            self._step += 1  # done or given up
        self._num_launched = 0
        for bucket in self._buckets:
            bucket.reset()

    def close(self) -> None:
        """Removes the hooks. Not collective."""
        for remove in self._removers:
            remove()
        self._removers.clear()

    def _add_hooks(self) -> None:
        needs_squares = self._with_statistics and self._passes_per_step > 1
        for number, bucket in enumerate(self._buckets):
            for place, parameter in enumerate(bucket.parameters):
                former = _reducer_of[parameter]() if parameter in _reducer_of else None
                if former is not None and former is not self:
                    former.close()
                _reducer_of[parameter] = weakref.ref(self)
                if needs_squares:
                    see = _hook(self, GradientReducer._see, number, place)
                    self._removers.append(parameter.register_hook(see).remove)  # type: ignore[no-untyped-call]
                count = _hook(self, GradientReducer._count, number, place)
                hook = parameter.register_post_accumulate_grad_hook(count)  # type: ignore[no-untyped-call]
                self._removers.append(hook.remove)

    def _see(self, number: int, place: int, gradient: torch.Tensor) -> None:
        self._buckets[number].see(place, gradient)

    def _count(self, number: int, place: int, _: torch.Tensor) -> None:
        bucket = self._buckets[number]
        if self._failure is not None:  # this step is lost; reduce() will say so
            return
        bucket.passes[place] += 1
        bucket.keep_squares(place)
        if bucket.passes[place] > self._passes_per_step:
            error = RuntimeError(
                f"backward: the gradient of {bucket.names[place]!r} must be computed at most"
                f" {self._passes_per_step} times before step(), got one more; raise"
                " backward_passes_per_step to accumulate gradients"
            )
            self.abandon(error)
            raise error
        bucket.adopt(place)
        if bucket.passes[place] == self._passes_per_step:
            bucket.num_waiting -= 1
            while self._num_launched < len(self._buckets):
                following = self._buckets[self._num_launched]
                if following.num_waiting > 0:
                    return
                self._launch(following)

    def _launch(self, bucket: Bucket) -> None:
        try:
            with rejected_on_all_ranks(self.process_set):
                gradients = bucket.prepare(self._sparse_as_dense)
                pairs = [self._compression.compress(gradient) for gradient in gradients]
            tensors = [*(tensor for tensor, _ in pairs), bucket.presence]
            call: Callable[..., Handle] = grouped_allreduce_async_
            extra: dict[str, Any] = {}
            if self._with_statistics:
                call, extra["groups"] = grouped_allreduce_with_stats_async_, bucket.rows
                if self._passes_per_step > 1:
                    extra["local_squares"] = bucket.squares
            handle = call(
                tensors,
                name=bucket.name_in(self._step),
                op=self.op,
                prescale_factor=self._prescale_factor,
                postscale_factor=self._postscale_factor,
                process_set=self.process_set,
                **extra,
            )
        except Exception as error:
            self._num_launched += 1  # its place is taken by a rejection
            self.abandon(error)
            raise
        self._num_launched += 1
        bucket.handle, bucket.contexts = handle, [context for _, context in pairs]

    def abandon(self, error: Exception) -> None:
        """Gives this step up: the other ranks' ``reduce`` raises ``error``'s text. Does not block.

        Buckets that were launched go on; the others are rejected, so that every rank has made as
        many calls for this step and the next one finds them in line. ``zero_grad`` begins it.
        """
        if self._failure is not None:
            return
        self._failure = error
        missing = len(self._buckets) - self._num_launched
        self._num_launched = len(self._buckets)
        if not isinstance(error, HorovodInternalError):
            reject_call(self.process_set, error, count=missing)

    def _wait(self) -> None:
        """Waits for all that is under way; keeps the first error as the step's failure."""
        for bucket in self._buckets:
            if bucket.handle is None:
                continue
            try:
                bucket.check_untouched()
            except RuntimeError as error:
                self._failure = self._failure or error
            try:
                result = synchronize(bucket.handle)
            except Exception as error:
                self._failure = self._failure or error
                bucket.handle = None
                continue
            bucket.handle = None
            if self._with_statistics:
                result, bucket.stats = result
            if self._failure is None:
                try:
                    bucket.finish(result[:-1], self._compression)
                except Exception as error:
                    self._failure = error
        if self._failure is None:
            for bucket in self._buckets:
                bucket.drop_what_nobody_has()


def _hook(
    reducer: GradientReducer,
    method: Callable[[GradientReducer, int, int, torch.Tensor], None],
    number: int,
    place: int,
) -> Callable[[torch.Tensor], None]:
    """A hook that does not keep the reducer alive: parameters may outlive it."""
    reference = weakref.ref(reducer)

    def hook(tensor: torch.Tensor) -> None:
        living = reference()
        if living is not None:
            method(living, number, place, tensor)

    return hook


def check_passes(passes: Any) -> None:
    """Refuses a ``backward_passes_per_step`` that is not of its form.

    Raises:
        ValueError: Not a positive number.
    """
    if isinstance(passes, bool) or not isinstance(passes, int) or passes < 1:
        raise ValueError(f"backward_passes_per_step must be at least 1, got {passes!r}")
