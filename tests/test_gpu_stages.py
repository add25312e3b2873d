"""The runner of benchmarks/gpu.py: a stage that fails, hangs or leaves something stops no other."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
import stages  # noqa: E402
from stages import Runner, Stage  # noqa: E402


def python(text: str) -> list[str]:
    return [sys.executable, "-c", text]


def lives(pid: int) -> bool:
    """Whether there is such a process, and it is no zombie."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes() != b""
    except OSError:
        return False


@pytest.fixture
def runner(tmp_path: Path) -> Runner:
    return Runner(tmp_path / "out", 100.0, {"machine": "made up"})


def test_a_stage_that_fails_does_not_stop_the_next(runner: Runner) -> None:
    runner.run(Stage("first", python("print('so it ended'); raise SystemExit(3)"), 20))
    runner.run(Stage("missing", ["/nowhere/at/all"], 20))
    runner.run(Stage("third", python("print('RESULT 7'); print('bye')"), 20, note="RESULT"))
    assert [outcome.status for outcome in runner.outcomes] == ["failed", "failed", "passed"]
    assert [outcome.note for outcome in runner.outcomes][::2] == ["so it ended", "RESULT 7"]
    assert "No such file" in runner.outcomes[1].note
    assert not runner.succeeded()
    lines = (runner.out / "stages.jsonl").read_text().splitlines()
    assert [json.loads(line)["stage"] for line in lines] == ["first", "missing", "third"]
    assert {json.loads(line)["machine"] for line in lines} == {"made up"}
    log = runner.out / runner.outcomes[2].log
    assert log.read_text().splitlines()[1:] == ["RESULT 7", "bye"]


def test_a_stage_that_hangs_is_ended_with_its_children_in_other_sessions(
    runner: Runner, tmp_path: Path
) -> None:
    child = tmp_path / "child"
    text = (
        "import os, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'],"
        " start_new_session=True)\n"
        f"open({str(child)!r}, 'w').write(str(child.pid))\n"
        "print('waiting', flush=True)\n"
        "time.sleep(600)\n"
    )
    outcome = runner.run(Stage("hangs", python(text), 2.0))
    assert outcome.status == "timed out"
    assert outcome.note == "waiting"
    assert not lives(int(child.read_text()))
    assert runner.run(Stage("next", python(""), 20)).status == "passed"


def test_what_a_stage_leaves_behind_does_not_outlive_it(runner: Runner, tmp_path: Path) -> None:
    child = tmp_path / "child"
    text = (
        "import subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'],"
        " start_new_session=True)\n"
        f"open({str(child)!r}, 'w').write(str(child.pid))\n"
    )
    assert runner.run(Stage("leaves", python(text), 20)).status == "passed"
    assert not lives(int(child.read_text()))


def test_what_needs_a_failed_stage_is_skipped(runner: Runner) -> None:
    runner.run(Stage("build", python("raise SystemExit(1)"), 20))
    outcome = runner.run(Stage("test", python(""), 20, needs=["build", "not run at all"]))
    assert (outcome.status, outcome.note) == ("skipped", "needs build")


def test_nothing_starts_when_the_time_is_used_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [1000.0]
    monkeypatch.setattr(stages.time, "monotonic", lambda: clock[0])
    runner = Runner(tmp_path / "out", 60.0, {})
    seen = []
    monkeypatch.setattr(
        runner, "_execute", lambda stage, limit: (seen.append(limit), ("passed", 0.0, ""))[1]
    )
    runner.run(Stage("short", ["x"], 30))
    clock[0] += 40
    runner.run(Stage("cut", ["x"], 30))
    clock[0] += 15
    runner.run(Stage("late", ["x"], 30))
    assert seen == [30, 60 - 40 - stages._RESERVE_SECONDS]
    assert runner.outcomes[-1].note == "no time left"


def test_all_output_can_go_into_one_file(tmp_path: Path) -> None:
    runner = Runner(tmp_path / "out", 100.0, {}, one_log=True)
    for name in ("a", "b"):
        outcome = runner.run(Stage(name, python(f"print('from {name}')"), 20, note="from"))
        assert outcome.note == f"from {name}"
    assert {file.name for file in runner.out.iterdir()} == {"stages.jsonl", "stages.log"}
    assert "from a" in (runner.out / "stages.log").read_text()


def test_a_runner_that_did_nothing_has_not_succeeded(runner: Runner) -> None:
    assert not runner.succeeded()
