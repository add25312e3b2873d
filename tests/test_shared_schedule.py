"""Schedules through shared memory as values, and ranks that walk them in any order.

Oracles: each element has one place, and a slot holds what its readers expect.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from adareduce._core import testing

Schedule = dict[str, Any]

TILE = testing.shared_tile_numel
MIN_SLOTS = testing.SHARED_MIN_SLOTS
RING = testing.SHARED_RING_BYTES
LINE_BYTES = 64
FUSED_ALIGNMENT = 16  # elements
SIZES = [1, 2, 3, 4, 5, 8, 9, 16, 17, 64]
ADASUM_SIZES = [size for size in SIZES if size <= 16]
FOR_ALL = ["shared_reduction", "shared_adasum", "resident_reduction", "resident_adasum"]
FOR_OWNERS = ["shared_gather", "shared_scatter"]


def sizes_of(kind: str) -> list[int]:
    return ADASUM_SIZES if "adasum" in kind else SIZES


def geometry(size: int, width: int, chunk_bytes: int, ring_bytes: int = RING) -> Any:
    gram = size * (size + 1) // 2
    return testing.SharedGeometry(
        size=size,
        width=width,
        chunk_bytes=chunk_bytes,
        ring_bytes=ring_bytes,
        max_segments=testing.SHARED_GRAM_NUMEL // gram,
        gram_places=testing.SHARED_GRAM_PLACES,
    )


def tight_ring(size: int, width: int, slots: int = MIN_SLOTS) -> int:
    """The smallest ring: so many tiles."""
    return slots * TILE(size) * width


def segment_lists(size: int) -> dict[str, list[int]]:
    """Numels of segments; huge ones do not fit into the smallest ring."""
    tile = TILE(size)
    huge = (MIN_SLOTS + 3) * tile + 1234
    rng = random.Random(size)
    return {
        "none": [],
        "only empty": [0, 0, 0],
        "one element": [1],
        "a tile": [tile],
        "a tile and one": [tile + 1],
        "less than a tile by one": [tile - 1],
        "odd sizes": [rng.randrange(1, 3 * tile) for _ in range(5)],
        "tiny ones": [rng.randrange(1, 40) for _ in range(2000)],
        "huge": [huge],
        "huge among tiny ones": [5, 0, 17, huge, 3, 1, 0],
        "two huge ones": [huge, 7, huge + 16],
        "empty first, between and last": [0, 300, 0, 0, 2 * tile + 5, 9, 0],
    }


GEOMETRIES = [  # width, chunk in tiles, ring in tiles
    (4, 1, MIN_SLOTS),
    (4, 3, 4 * MIN_SLOTS),
    (1, 2, 2 * MIN_SLOTS + 1),
    (2, 1, 3 * MIN_SLOTS),
    (8, 1, MIN_SLOTS),
]


def geometries(size: int) -> Iterator[Any]:
    for width, chunk, ring in GEOMETRIES:
        tile = TILE(size) * width
        yield geometry(size, width, chunk * tile, ring * tile)


def pieces_of(schedule: Schedule, chunk: dict[str, Any]) -> list[tuple[int, ...]]:
    begin, end = chunk["pieces"]
    return schedule["pieces"][begin:end]


def owned(numels: Sequence[int], size: int) -> list[tuple[int, int]]:
    """Segments with owners, as many as there are ranks and more."""
    return [(index % size, numel) for index, numel in enumerate(numels)]


def make(kind: str, numels: Sequence[int], of: Any, size: int) -> Schedule:
    segments: Any = owned(numels, size) if kind in FOR_OWNERS else list(numels)
    return getattr(testing, kind)(segments, of)


# ---- what is done ---------------------------------------------------------------------------


def check_covered(numels: Sequence[int], pieces: Sequence[tuple[int, ...]]) -> None:
    ends = [0] * len(numels)
    for segment, _, begin, numel, _ in pieces:
        assert begin == ends[segment], "pieces of a segment come one after the other"
        assert numel > 0
        ends[segment] += numel
    assert ends == list(numels)


@pytest.mark.parametrize("kind", FOR_ALL + FOR_OWNERS)
def test_every_element_is_combined_once_and_counts_once(kind: str) -> None:
    for size in sizes_of(kind):
        for numels in segment_lists(size).values():
            for of in geometries(size):
                schedule = make(kind, numels, of, size)
                chunks = schedule["chunks"]
                combined = [p for c in chunks if c["combines"] for p in pieces_of(schedule, c)]
                check_covered(numels, combined)
                if "adasum" not in kind:
                    continue
                counted = [p for c in chunks if c["has_gram"] for p in pieces_of(schedule, c)]
                check_covered(numels, counted)


@pytest.mark.parametrize("kind", FOR_ALL)
def test_pieces_and_the_order_of_sums_depend_on_neither_chunks_nor_rings(kind: str) -> None:
    for size in sizes_of(kind):
        for numels in segment_lists(size).values():
            seen = set()
            for of in geometries(size):
                schedule = make(kind, numels, of, size)
                for what in ("has_gram", "combines"):
                    pieces = [p for c in schedule["chunks"] if c[what]
                              for p in pieces_of(schedule, c)]  # fmt: skip
                    seen.add(tuple(piece[:4] for piece in pieces))
            assert len(seen) == 1


@pytest.mark.parametrize("kind", FOR_ALL)
def test_the_last_part_of_a_segment_knows_all_of_its_gram_matrix(kind: str) -> None:
    if "adasum" not in kind:
        return
    for size in sizes_of(kind):
        for numels in segment_lists(size).values():
            for of in geometries(size):
                schedule = make(kind, numels, of, size)
                counted: dict[int, set[int]] = defaultdict(set)  # by segment: chunks that count
                for index, chunk in enumerate(schedule["chunks"]):
                    for piece in pieces_of(schedule, chunk):
                        first, end = chunk["segments"]
                        assert first <= piece[0] < end
                        assert end - first <= testing.SHARED_GRAM_NUMEL // (size * (size + 1) // 2)
                        if chunk["has_gram"]:
                            counted[piece[0]].add(index)
                for chunk in schedule["chunks"]:
                    for piece in pieces_of(schedule, chunk):
                        assert max(counted[piece[0]]) <= chunk["ready"]
                # The orthogonality of an empty tensor is asked for, too.
                combined = [c["segments"] for c in schedule["chunks"] if c["combines"]]
                named = {s for first, end in combined for s in range(first, end)}
                assert named == set(range(len(numels)))


@pytest.mark.parametrize("kind", FOR_ALL)
def test_the_ranks_share_the_work_of_every_tile(kind: str) -> None:
    for size in sizes_of(kind):
        numels = [10 * TILE(size) + 5 * size + 3]
        for of in geometries(size):
            schedule = make(kind, numels, of, size)
            tiles: dict[int, dict[int, int]] = defaultdict(lambda: defaultdict(int))
            for chunk in schedule["chunks"]:
                if not chunk["combines"]:
                    continue
                for _, owner, begin, numel, _ in pieces_of(schedule, chunk):
                    assert begin // TILE(size) == (begin + numel - 1) // TILE(size)
                    tiles[begin // TILE(size)][owner] += numel
            for tile in range(10):
                assert tiles[tile] == {rank: TILE(size) // size for rank in range(size)}
            # A last tile is cut by lines of the fused buffer.
            fair = (5 * size + 3 + FUSED_ALIGNMENT) / size
            assert max(tiles[10].values()) <= fair + FUSED_ALIGNMENT


@pytest.mark.parametrize("kind", ["shared_gather", "shared_scatter"])
def test_all_owners_work_at_the_same_time(kind: str) -> None:
    for size in SIZES:
        numel = 3 * TILE(size)
        for of in geometries(size):
            schedule = getattr(testing, kind)([(rank, numel) for rank in range(size)], of)
            for chunk in schedule["chunks"]:
                shares = {piece[1]: piece[3] for piece in pieces_of(schedule, chunk)}
                assert len(shares) == size
                assert len(set(shares.values())) == 1


# ---- where --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["shared_reduction", "shared_adasum", *FOR_OWNERS])
def test_pieces_of_a_slot_do_not_overlap_and_fit(kind: str) -> None:
    for size in sizes_of(kind):
        for numels in segment_lists(size).values():
            for (width, _, ring), of in zip(GEOMETRIES, geometries(size), strict=True):
                schedule = make(kind, numels, of, size)
                ends: dict[int, int] = {}
                for chunk in schedule["chunks"]:
                    assert chunk["slot_begin"] % LINE_BYTES == 0
                    # Owners of a gather write into their own slots.
                    areas: dict[int, list[tuple[int, int]]] = defaultdict(list)
                    for _, owner, _, numel, place in pieces_of(schedule, chunk):
                        area = owner if kind == "shared_gather" else 0
                        areas[area].append((place, place + numel))
                    last = 0
                    for spans in areas.values():
                        spans.sort()
                        assert spans[0][0] >= 0
                        for (_, end), (begin, _) in itertools.pairwise(spans):
                            assert end <= begin
                        last = max(last, spans[-1][1])
                    end = chunk["slot_begin"] + last * width
                    assert end <= ring * TILE(size) * width
                    ends[chunk["slot_begin"]] = max(end, ends.get(chunk["slot_begin"], 0))
                slots = sorted(ends.items())
                for (_, end), (begin, _) in itertools.pairwise(slots):
                    assert end <= begin, "slots overlap"


@pytest.mark.parametrize("size", [1, 2, 8, 9, 16, 17, testing.SHARED_MAX_RANKS])
def test_enough_slots_fit_into_the_ring_for_the_widest_elements(size: int) -> None:
    assert TILE(size) * 8 <= testing.SHARED_MAX_TILE_BYTES
    assert MIN_SLOTS * TILE(size) * 8 <= RING
    for chunk_bytes in (1, 512 << 10, 2048 << 10, 1 << 40):
        schedule = testing.shared_reduction([20 * TILE(size)], geometry(size, 8, chunk_bytes))
        begins = {chunk["slot_begin"] for chunk in schedule["chunks"]}
        longest = max(
            end - begin
            for begin, end in [
                (0, sum(p[3] for p in pieces_of(schedule, c))) for c in schedule["chunks"]
            ]
        )
        assert longest * 8 * MIN_SLOTS <= RING
        assert max(begins) + longest * 8 <= RING


# ---- when ---------------------------------------------------------------------------------------

# What the executors wait for (shared_reduce.cpp, shared_adasum.cpp), written down once more: by
# work the counters of all other ranks that must have come to a chunk, and the counter that goes up
# afterwards. A chunk of -1 stands for all earlier walks.
Waits = dict[str, list[tuple[str, str]]]


@dataclasses.dataclass(frozen=True)
class Rules:
    waits: Waits
    signals: dict[str, str]
    last_wait: str | None = None  # of the last chunk, before a rank goes on


THIS = "index"
RULES = {
    "shared_reduction": Rules(
        {"pack": [("unpacked", "slot_after")], "combine": [("packed", THIS)],
         "unpack": [("combined", THIS)]},
        {"pack": "packed", "combine": "combined", "unpack": "unpacked"},
    ),
    "shared_adasum": Rules(
        {"pack": [("unpacked", "slot_after")],
         "gram": [("packed", THIS), ("unpacked", "gram_after")],
         "combine": [("packed", THIS), ("gram", "ready")],
         "unpack": [("combined", THIS)]},
        {"pack": "packed", "gram": "gram", "combine": "combined", "unpack": "unpacked"},
    ),
    "resident_reduction": Rules({"combine": []}, {"combine": "combined"}, "combined"),
    "resident_adasum": Rules(
        {"gram": [("combined", "gram_after")], "combine": [("gram", "ready")]},
        {"gram": "gram", "combine": "combined"}, "combined",
    ),
    "shared_gather": Rules(
        {"pack": [("unpacked", "slot_after")], "unpack": [("packed", THIS)]},
        {"pack": "packed", "unpack": "unpacked"},
    ),
    "shared_scatter": Rules(
        {"pack": [("unpacked", "slot_after")], "combine": [("packed", THIS)]},
        {"pack": "packed", "combine": "unpacked"},
    ),
}  # fmt: skip
COUNTERS = ("packed", "gram", "combined", "unpacked")


class Walkers:
    """All ranks, which walk schedules one after the other without any other synchronisation."""

    def __init__(self, size: int, walks: Sequence[tuple[str, Schedule]]) -> None:
        self.size, self.walks = size, walks
        self.bases = [0]
        for _, schedule in walks:
            self.bases.append(self.bases[-1] + len(schedule["chunks"]))
        self.counters = {name: [0] * size for name in COUNTERS}
        self.at = [(0, 0)] * size  # walk, step
        # By rank: what lies in its slots and Gram places, (walk, chunk or its `ready`).
        self.slots: list[dict[int, tuple[int, int]]] = [{} for _ in range(size)]
        self.grams: list[dict[int, tuple[int, int]]] = [{} for _ in range(size)]
        self.done: list[set[tuple[int, str, int]]] = [set() for _ in range(size)]

    def is_over(self, rank: int) -> bool:
        return self.at[rank][0] == len(self.walks)

    def waits_of(self, walk: int, step: int) -> list[tuple[str, int]]:
        kind, schedule = self.walks[walk]
        if step == len(schedule["steps"]):
            last = RULES[kind].last_wait
            return [(last, self.bases[walk + 1])] if last and schedule["chunks"] else []
        work, index = schedule["steps"][step]
        chunk = schedule["chunks"][index]
        if "adasum" in kind and not self.is_real(work, chunk):
            return []
        waits = []
        for counter, which in RULES[kind].waits[work]:
            if which == "gram_after" and (index != chunk["ready"] or chunk[which] < 0):
                continue
            to = index if which == THIS else chunk[which]
            waits.append((counter, self.bases[walk] + to + 1))
        return waits

    @staticmethod
    def is_real(work: str, chunk: dict[str, Any]) -> bool:
        """Where a segment passes twice, each pass leaves something out."""
        return {"pack": True, "gram": chunk["has_gram"]}.get(work, chunk["combines"])

    def can_go(self, rank: int) -> bool:
        return not self.is_over(rank) and all(
            self.counters[counter][peer] >= epoch
            for counter, epoch in self.waits_of(*self.at[rank])
            for peer in range(self.size)
            if peer != rank
        )

    def go(self, rank: int) -> None:
        walk, step = self.at[rank]
        kind, schedule = self.walks[walk]
        if step == len(schedule["steps"]):
            for counter in self.counters.values():
                counter[rank] = self.bases[walk + 1]
            self.at[rank] = (walk + 1, 0)
            return
        work, index = schedule["steps"][step]
        chunk = schedule["chunks"][index]
        has_slots = kind.startswith("shared")
        if has_slots and work == "pack":
            self.slots[rank][chunk["slot_begin"]] = (walk, index)
        elif self.is_real(work, chunk):
            self.read(rank, kind, walk, work, index, chunk)
            if has_slots:
                for peer in range(self.size):
                    if pieces_of(schedule, chunk) and (peer != rank or work != "unpack"):
                        assert self.slots[peer][chunk["slot_begin"]] == (walk, index), (
                            f"rank {rank} reads chunk {index} of walk {walk} from rank {peer}'s"
                            " slot, which holds another one"
                        )
        self.done[rank].add((walk, work, index))
        self.counters[RULES[kind].signals[work]][rank] = self.bases[walk] + index + 1
        self.at[rank] = (walk, step + 1)

    def read(
        self, rank: int, kind: str, walk: int, work: str, index: int, chunk: dict[str, Any]
    ) -> None:
        """Everything that a work needs of other ranks has been done by them."""
        needs = {
            "shared_reduction": {"combine": "pack", "unpack": "combine"},
            "shared_adasum": {"gram": "pack", "combine": "pack", "unpack": "combine"},
            "shared_gather": {"unpack": "pack"},
            "shared_scatter": {"combine": "pack"},
        }.get(kind, {})
        if work in needs:
            for peer in range(self.size):
                assert (walk, needs[work], index) in self.done[peer]
        if "adasum" not in kind:
            return
        place, ready = chunk["gram_place"], (walk, chunk["ready"])
        if work == "gram" and index == chunk["ready"]:
            self.grams[rank][place] = ready
        if work == "combine":
            for peer in range(self.size):
                assert self.grams[peer][place] == ready, "another Gram matrix lies there"

    def walk(self, choose: Any) -> None:
        while not all(self.is_over(rank) for rank in range(self.size)):
            ready = [rank for rank in range(self.size) if self.can_go(rank)]
            assert ready, f"deadlock at {self.at}"
            self.go(choose(ready))


def orders(size: int, seed: int) -> Iterator[Any]:
    """Who goes next: by chance, or one rank only when nobody else can, or always when it can."""
    for number in range(3):
        yield random.Random(seed + number).choice
    for slowest in {0, size // 2, size - 1}:
        yield lambda ready, slowest=slowest: max(ready, key=lambda r: (r != slowest, r))
        yield lambda ready, slowest=slowest: max(ready, key=lambda r: (r == slowest, -r))


def walk_in_all_orders(size: int, walks: Sequence[tuple[str, Schedule]], seed: int) -> None:
    for choose in orders(size, seed):
        Walkers(size, walks).walk(choose)


WALK_LISTS = ("none", "only empty", "one element", "odd sizes", "huge among tiny ones",
              "two huge ones", "empty first, between and last")  # fmt: skip


@pytest.mark.parametrize("kind", FOR_ALL + FOR_OWNERS)
@pytest.mark.parametrize("size", [1, 2, 3, 5, 8])
def test_no_order_of_the_ranks_blocks_or_overwrites_what_is_read(size: int, kind: str) -> None:
    for seed, name in enumerate(WALK_LISTS):
        numels = segment_lists(size)[name]
        for of in geometries(size):
            walk_in_all_orders(size, [(kind, make(kind, numels, of, size))], seed)


@pytest.mark.parametrize("size", [2, 3, 5])
def test_walks_may_follow_each_other_without_an_agreement_between_them(size: int) -> None:
    # The parts of one call: one for each dtype. Of any kind, which is more than is needed.
    rng = random.Random(size)
    lists = [segment_lists(size)[name] for name in WALK_LISTS]
    for seed in range(12):
        walks = []
        for _ in range(4):
            kind = rng.choice(["shared_reduction", "shared_adasum", *FOR_OWNERS])
            of = rng.choice(list(geometries(size)))
            walks.append((kind, make(kind, rng.choice(lists), of, size)))
        walk_in_all_orders(size, walks, seed)


def test_many_ranks_and_groups_of_tiny_segments_walk_as_well() -> None:
    for kind, size in [("shared_reduction", 20), ("shared_adasum", 16), ("shared_scatter", 20)]:
        numels = [8 * TILE(size)] if size == 20 else [30] * 700 + [TILE(size)] * 2
        of = geometry(size, 4, TILE(size) * 4, tight_ring(size, 4))
        schedule = make(kind, numels, of, size)
        for choose in list(orders(size, seed=1))[-3:]:
            Walkers(size, [(kind, schedule)]).walk(choose)


def test_the_simulation_finds_a_wait_that_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    of = geometry(2, 4, TILE(2) * 4, tight_ring(2, 4))
    schedule = testing.shared_adasum(segment_lists(2)["huge among tiny ones"], of)
    rules = RULES["shared_adasum"]
    for work, wait in [("pack", 0), ("gram", 0), ("combine", 1), ("unpack", 0)]:
        waits = {w: [x for i, x in enumerate(of_w) if (w, i) != (work, wait)]
                 for w, of_w in rules.waits.items()}  # fmt: skip
        monkeypatch.setitem(RULES, "shared_adasum", dataclasses.replace(rules, waits=waits))
        with pytest.raises((AssertionError, KeyError)):
            walk_in_all_orders(2, [("shared_adasum", schedule)] * 2, seed=0)


@pytest.mark.parametrize("kind", FOR_ALL + FOR_OWNERS)
def test_each_chunk_goes_through_its_works_in_order_and_once(kind: str) -> None:
    for size in (2, 5):
        for numels in segment_lists(size).values():
            for of in geometries(size):
                schedule = make(kind, numels, of, size)
                works = [w for w in ("pack", "gram", "combine", "unpack")
                         if w in RULES[kind].waits]  # fmt: skip
                by_work = {w: [c for v, c in schedule["steps"] if v == w] for w in works}
                for chunks in by_work.values():
                    assert chunks == list(range(len(schedule["chunks"])))
                place = {step: i for i, step in enumerate(schedule["steps"])}
                assert len(place) == len(schedule["steps"]) == len(works) * len(by_work[works[0]])
                for before, after in itertools.pairwise(works):
                    for index in range(len(schedule["chunks"])):
                        assert place[before, index] < place[after, index]
