"""AdaScale and the distributed optimizers with CUDA tensors, without a GPU: tests/emulated_gpu.py.

Oracle: the same training with CPU tensors. Float64; the kernels add up in another order than the
CPU's, and shares are rounded twice: EXACT of test_adascale_device.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import pytest
from adascale_reference import groups_of, loss_of, make_model, wrap
from no_host_reads import no_host_reads
from test_adascale_device import EXACT, MAKERS, ROUNDED, assert_near
from test_cuda_collectives import gpu_modes

from adareduce.torch import device_gain
from adareduce.torch.adascale_steps import DeviceSteps
from emulated_gpu import Gpu, emulate


@pytest.fixture
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    with emulate(request.param) as gpu:
        if request.param == "emulated":
            # Torch's own work does not lie on the emulation's streams.
            launch_on = device_gain._launch_on

            def waiting(index: int | None) -> Any:
                launch = launch_on(index)
                module = device_gain.cuda_library.load()

                def call(*arguments: Any) -> None:
                    launch(*arguments)
                    module.testing.synchronize()

                return call

            monkeypatch.setattr(device_gain, "_launch_on", waiting)
        yield gpu


def make(name: str, how: dict[str, Any], wrapping: str, passes: int, **options: Any) -> Any:
    model = make_model()
    return model, wrap(wrapping, MAKERS[name](groups_of(model), **how), passes, **options)


@gpu_modes("stand-in", "emulated")
@pytest.mark.parametrize("passes", [1, 3])
@pytest.mark.parametrize("wrapping", ["plain", "distributed"])
@pytest.mark.parametrize(
    ("name", "how", "near"),
    [("momentum", {"fused": True}, ROUNDED), ("AdamW", {}, EXACT)],
    ids=["fused", "shares"],
)
def test_training_on_a_gpu_is_that_on_the_cpu(gpu, name, how, near, wrapping, passes, rank, size):
    mine = make(name, how, wrapping, passes)
    is_device = isinstance(mine[1]._steps, DeviceSteps)
    assert is_device == (gpu.mode == "emulated"), "the module _cuda decides"
    with gpu.host():
        theirs = make(name, {}, "plain", passes)
    for step in range(10):
        is_bad = step == 4
        mine[1].zero_grad()
        for number in range(passes):
            factor = math.inf if is_bad and rank == size - 1 else 1.0
            (loss_of(mine[0], step, rank, number) * factor / passes).backward()
        with no_host_reads(mine[1]) if is_device else contextlib.nullcontext():
            mine[1].step()
        with gpu.host():
            theirs[1].zero_grad()
            for number in range(passes):
                factor = math.inf if is_bad and rank == size - 1 else 1.0
                (loss_of(theirs[0], step, rank, number) * factor / passes).backward()
            theirs[1].step()
        assert_near(mine, theirs, near)
    assert mine[1].progress().skipped_steps <= 1
    assert size * passes == 1 or mine[1].gain > 1.05, "the test must see a gain"
