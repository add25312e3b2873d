"""How much memory may be shared, read from /proc and /sys of invented machines.

Oracle: the least of what machine and cgroups leave, less a sixteenth (at most 1 GiB) of each.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from adareduce import _core

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
TOTAL, AVAILABLE = 64 * GIB, 40 * GIB
OF_MACHINE = AVAILABLE - GIB

V1 = "memory.limit_in_bytes", "memory.usage_in_bytes"
V2 = "memory.max", "memory.current"


def margin(limit: int) -> int:
    return min(limit // 16, GIB)


class Machine:
    """Files below a folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.write("proc/meminfo", f"MemTotal: {TOTAL // KIB} kB\nMemFree: 1 kB\n")
        self.write("proc/meminfo", f"MemAvailable: {AVAILABLE // KIB} kB\n")

    def write(self, path: str, text: str) -> None:
        file = self.root / path.lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a") as stream:
            stream.write(text)

    def version_2(self, cgroup: str, root: str = "/", point: str = "/sys/fs/cgroup") -> None:
        self.write("proc/self/cgroup", f"0::{cgroup}\n")
        self.write(
            "proc/self/mountinfo",
            f"30 23 0:28 {root} {point} rw,relatime shared:4 - cgroup2 cgroup2 rw,nsdelegate\n",
        )

    def version_1(self, cgroup: str, root: str = "/") -> None:
        self.write("proc/self/cgroup", f"5:cpu,cpuacct:/elsewhere\n4:memory:{cgroup}\n0::/\n")
        self.write(
            "proc/self/mountinfo",
            "32 31 0:29 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu,cpuacct\n"
            f"35 31 0:32 {root} /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n",
        )

    def limit(
        self, folder: str, names: tuple[str, str], limit: int | str, usage: int, **stat: int
    ) -> None:
        self.write(f"{folder}/{names[0]}", f"{limit}\n")
        self.write(f"{folder}/{names[1]}", f"{usage}\n")
        self.write(f"{folder}/memory.stat", "".join(f"{k} {v}\n" for k, v in stat.items()))

    def room(self) -> int:
        room: int = _core.testing.room_for_shared_memory(str(self.root))
        return room


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_a_machine_without_limits_has_what_is_available(machine: Machine) -> None:
    assert machine.room() == OF_MACHINE


def test_the_cgroup_of_this_process_limits(machine: Machine) -> None:
    machine.version_2("/job/step")
    machine.limit("/sys/fs/cgroup/job/step", V2, 8 * GIB, 3 * GIB)
    assert machine.room() == 5 * GIB - margin(8 * GIB)


@pytest.mark.parametrize("tightest", ["", "/a", "/a/b", "/a/b/c"])
def test_every_ancestor_limits(machine: Machine, tightest: str) -> None:
    machine.version_2("/a/b/c")
    for folder in ("", "/a", "/a/b", "/a/b/c"):
        machine.limit(f"/sys/fs/cgroup{folder}", V2, (4 if folder == tightest else 9) * GIB, GIB)
    assert machine.room() == 3 * GIB - margin(4 * GIB)


def test_memory_high_limits_and_max_does_not(machine: Machine) -> None:
    machine.version_2("/job")
    machine.limit("/sys/fs/cgroup/job", V2, "max", GIB)
    assert machine.room() == OF_MACHINE
    machine.write("/sys/fs/cgroup/job/memory.high", f"{2 * GIB}\n")
    assert machine.room() == GIB - margin(2 * GIB)


def test_files_in_the_page_cache_are_no_obstacle(machine: Machine) -> None:
    machine.version_2("/job")
    cache = {"anon": GIB, "inactive_file": 4 * GIB, "active_file": 2 * GIB, "shmem": 7}
    machine.limit("/sys/fs/cgroup/job", V2, 8 * GIB, 7 * GIB, **cache)
    assert machine.room() == 7 * GIB - margin(8 * GIB)


def test_a_full_cgroup_has_no_room(machine: Machine) -> None:
    machine.version_2("/job")
    machine.limit("/sys/fs/cgroup/job", V2, GIB, GIB)
    assert machine.room() == 0


def test_version_1_limits(machine: Machine) -> None:
    machine.version_1("/slurm/job")
    machine.limit("/sys/fs/cgroup/memory", V1, 9223372036854771712, 50 * GIB)
    stat = {"inactive_file": 3 * GIB, "total_inactive_file": MIB, "total_active_file": MIB}
    machine.limit("/sys/fs/cgroup/memory/slurm/job", V1, 2 * GIB, GIB, **stat)
    assert machine.room() == GIB + 2 * MIB - margin(2 * GIB)


def test_a_container_that_sees_only_its_own_cgroup_finds_its_limit(machine: Machine) -> None:
    # /proc/self/cgroup names the machine's path, and only its last part is mounted.
    machine.version_1("/docker/1234/inner", root="/docker/1234")
    machine.limit("/sys/fs/cgroup/memory", V1, 3 * GIB, GIB)
    machine.limit("/sys/fs/cgroup/memory/inner", V1, 9 * GIB, GIB)
    assert machine.room() == 2 * GIB - margin(3 * GIB)


def test_a_cgroup_outside_the_namespace_still_has_the_limit_of_the_mount(machine: Machine) -> None:
    machine.version_2("/../../other", root="/")
    machine.limit("/sys/fs/cgroup", V2, 3 * GIB, GIB)
    assert machine.room() == 2 * GIB - margin(3 * GIB)


def test_a_mount_point_may_have_a_blank(machine: Machine) -> None:
    machine.version_2("/job", point="/my\\040cgroups")
    machine.limit("/my cgroups/job", V2, 3 * GIB, GIB)
    assert machine.room() == 2 * GIB - margin(3 * GIB)


def test_this_machine_has_room_and_not_more_than_is_available() -> None:
    with open("/proc/meminfo") as file:
        total = next(int(line.split()[1]) * KIB for line in file if line.startswith("MemTotal"))
    assert 0 < _core.testing.room_for_shared_memory() <= total - margin(total)
