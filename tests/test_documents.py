"""What the documents say is what the repository holds."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "csrc" / "README.md"]


def run_tables(*arguments: str, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    script = folder / "benchmarks" / "tables.py"
    return subprocess.run(
        [sys.executable, script, *arguments], capture_output=True, text=True, check=False
    )


def test_tables_are_those_of_the_results() -> None:
    result = run_tables("--check")
    assert result.returncode == 0, result.stdout + result.stderr


def test_a_changed_number_is_noticed_and_mended(tmp_path: Path) -> None:
    for part in ("docs/performance.md", "benchmarks/tables.py"):
        (tmp_path / part).parent.mkdir(exist_ok=True)
        (tmp_path / part).write_text((ROOT / part).read_text())
    (tmp_path / "benchmarks" / "results").symlink_to(ROOT / "benchmarks" / "results")
    document = tmp_path / "docs" / "performance.md"
    original = document.read_text()
    changed = re.sub(r"(\| pair_stats .*?\| )\d", r"\g<1>9", original, count=1)
    assert changed != original
    document.write_text(changed)
    assert run_tables("--check", folder=tmp_path).returncode == 1
    assert run_tables(folder=tmp_path).returncode == 0
    assert document.read_text() == original


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text()):
        if "://" not in target:
            assert (document.parent / target).exists(), target
