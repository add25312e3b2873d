"""How ranks with GPUs choose the way that data moves. Oracle: the rules of docs/design.md."""

from __future__ import annotations

import re
from typing import Any

import pytest

from adareduce._core import testing

AUTO, NCCL, PEER, STAGED, SINGLE = range(5)
NEW, SHARING = 22809, 23003  # versions of NCCL


def facts(rank: int, **changes: Any) -> testing.DeviceFacts:
    """A rank with a process and a GPU of its own on one node, and a usable NCCL."""
    result = testing.DeviceFacts()
    result.host, result.pid, result.process = "a", 100 + rank, 7000 + rank
    result.gpu, result.num_multiprocessors = f"gpu {rank}", 132
    result.driver_version, result.nccl_version = 13000, NEW
    for name, value in changes.items():
        setattr(result, name, value)
    return result


def chosen(ranks: list[testing.DeviceFacts]) -> dict[str, Any]:
    choice = testing.choose_path(ranks)
    assert choice["why"]
    assert "\n" not in choice["why"]
    assert choice["num_blocks"] >= 1
    assert choice["peer_memory_is_possible"] == (choice["why_no_peer_memory"] == "")
    return choice


def test_ranks_with_a_gpu_each_use_nccl_and_may_use_peer_memory() -> None:
    choice = chosen([facts(rank) for rank in range(8)])
    assert (choice["path"], choice["peer_memory_is_possible"]) == (NCCL, True)
    assert choice["why"] == "NCCL 2.28.9 connects 8 ranks on 8 GPUs of 1 node"
    assert (choice["num_blocks"], choice["warning"]) == (132, "")


def test_one_rank_needs_no_path() -> None:
    assert chosen([facts(0, nccl_version=0)])["path"] == SINGLE
    choice = chosen([facts(0, wanted_path=PEER)])
    assert choice["path"] == SINGLE
    assert "(peer)" in choice["why"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"nccl_version": 0, "nccl_why_not": "no libnccl.so.2"}, "rank 2 has no NCCL: no libnccl"),
        ({"nccl_version": 21704}, "rank 2 has NCCL 2.17.4, older than 2.18.0"),
        ({"nccl_version": 22907}, "rank 0 has NCCL 2.28.9 and rank 2 2.29.7"),
        ({"gpu": "gpu 1"}, "ranks 1 and 2 share a GPU, which NCCL 2.28.9 refuses"),
    ],
)
def test_without_nccl_the_ranks_of_a_node_use_peer_memory(
    changes: dict[str, Any], reason: str
) -> None:
    choice = chosen([facts(0), facts(1), facts(2, **changes)])
    assert choice["path"] == PEER
    assert reason in choice["why"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"host": "b"}, "rank 2 is on another node than rank 0"),
        ({"can_share_memory": False}, "the GPU of rank 2 cannot share memory"),
        ({"unreachable": ["gpu 7", "gpu 1"]}, "the GPU of rank 2 cannot read that of rank 1"),
    ],
)
def test_without_nccl_and_peer_memory_tensors_go_through_the_host(
    changes: dict[str, Any], reason: str
) -> None:
    choice = chosen([facts(0, nccl_version=0), facts(1), facts(2, **changes)])
    assert (choice["path"], choice["peer_memory_is_possible"]) == (STAGED, False)
    assert reason in choice["why"]
    assert "rank 0 has no NCCL" in choice["why"]
    assert chosen([facts(0), facts(1), facts(2, **changes)])["path"] == NCCL


def test_nine_ranks_are_too_many_for_peer_memory() -> None:
    ranks = [facts(rank) for rank in range(9)]
    assert chosen(ranks)["why_no_peer_memory"] == "there are 9 ranks, more than 8"
    for rank in ranks:
        rank.nccl_version = 0
    assert chosen(ranks)["path"] == STAGED


def test_threads_of_one_process_need_no_memory_between_processes() -> None:
    ranks = [
        facts(rank, pid=5, process=9, nccl_version=0, can_share_memory=False) for rank in range(4)
    ]
    assert chosen(ranks)["path"] == PEER
    ranks[3].process = 10  # the same pid in another container
    assert chosen(ranks)["path"] == STAGED


def test_nccl_shares_a_gpu_when_it_was_told_to_and_can() -> None:
    def both(**changes: Any) -> int:
        return int(chosen([facts(rank, gpu="one", **changes) for rank in range(2)])["path"])

    assert both(nccl_may_share_gpu=True, nccl_version=SHARING) == NCCL
    assert both(nccl_may_share_gpu=True, nccl_version=SHARING - 1) == PEER
    assert both(nccl_may_share_gpu=False, nccl_version=SHARING) == PEER
    assert both(nccl_host="same") == PEER


def test_nccl_takes_ranks_of_one_gpu_for_two_nodes_when_their_host_ids_differ() -> None:
    ranks = [facts(rank, gpu="one", nccl_host=f"host {rank}") for rank in range(3)]
    assert chosen(ranks)["path"] == NCCL
    ranks[2].nccl_host = ""
    assert chosen(ranks)["path"] == PEER
    ranks[2].nccl_host = "host 0"
    assert chosen(ranks)["path"] == PEER


@pytest.mark.parametrize(("sharing", "blocks"), [(1, 132), (2, 66), (4, 33), (8, 16)])
def test_blocks_of_all_ranks_of_a_gpu_fit_side_by_side(sharing: int, blocks: int) -> None:
    choice = chosen([facts(rank, gpu=f"gpu {rank // sharing}") for rank in range(8)])
    assert choice["num_blocks"] == blocks
    assert (f"up to {sharing} ranks share a GPU" in choice["warning"]) == (sharing > 1)


def test_the_smallest_gpu_decides_how_many_blocks() -> None:
    assert chosen([facts(0), facts(1, num_multiprocessors=5)])["num_blocks"] == 5
    small = [facts(rank, gpu="one", num_multiprocessors=3) for rank in range(8)]
    assert chosen(small)["num_blocks"] == 1


@pytest.mark.parametrize("wanted", [NCCL, PEER, STAGED])
def test_a_path_that_is_wanted_and_possible_is_taken(wanted: int) -> None:
    choice = chosen([facts(rank, wanted_path=wanted) for rank in range(2)])
    assert choice["path"] == wanted
    assert choice["why"].endswith(", as was asked for")


@pytest.mark.parametrize(
    ("wanted", "changes", "text"),
    [
        (NCCL, {"nccl_version": 0}, "got nccl, but rank 1 has no NCCL"),
        (PEER, {"host": "b"}, "got peer, but rank 1 is on another node than rank 0"),
        (SINGLE, {}, "got single, but there are 2 ranks"),
        (17, {}, "got unknown (17), but there are 2 ranks"),
    ],
)
def test_a_path_that_is_wanted_and_impossible_is_refused(
    wanted: int, changes: dict[str, Any], text: str
) -> None:
    ranks = [facts(0, wanted_path=wanted), facts(1, wanted_path=wanted, **changes)]
    with pytest.raises(ValueError, match=re.escape(text)):
        testing.choose_path(ranks)


def test_ranks_that_want_different_paths_are_told_so() -> None:
    ranks = [facts(0, wanted_path=NCCL), facts(1, wanted_path=NCCL), facts(2)]
    with pytest.raises(Exception, match="rank 0 wants nccl and rank 2 wants auto"):
        testing.choose_path(ranks)


def test_no_ranks_are_refused() -> None:
    with pytest.raises(ValueError, match="ranks must not be empty"):
        testing.choose_path([])


def test_facts_survive_the_wire() -> None:
    sent = facts(
        3,
        nccl_why_not="because\0of a zero",
        nccl_may_share_gpu=True,
        nccl_host="ü",
        can_share_memory=False,
        unreachable=["", "gpu 1", "x" * 1000],
        wanted_path=PEER,
        process=2**64 - 1,
    )
    received = testing.DeviceFacts.from_bytes(sent.to_bytes())
    assert received == sent
    assert received != facts(3)


def test_bytes_that_are_no_facts_are_refused() -> None:
    sent = facts(0).to_bytes()
    for bytes_ in (b"", sent[:-1], sent + b"\0", b"\xff" * len(sent)):
        with pytest.raises(ValueError, match="bytes must come from to_bytes"):
            testing.DeviceFacts.from_bytes(bytes_)
