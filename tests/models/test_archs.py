"""docs/architectures.md: the page says what the records say."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from trichord.cli import main
from trichord.models.architectures import ARCHITECTURES

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "scripts"))

import architecture_table  # noqa: E402 - scripts are no package

PAGE = (ROOT / "docs" / "architectures.md").read_text(encoding="utf-8")


def test_the_page_is_what_the_script_prints(capsys):
    assert architecture_table.main() == 0
    assert capsys.readouterr().out == PAGE, "python scripts/architecture_table.py > docs/architectures.md"


def test_the_page_lists_what_the_command_does(capsys):
    assert main(["archs", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    runs = PAGE.split("## What is missing")[0]
    rows = dict(re.findall(r"^\| `([^`]+)` \| (.*?) ?\|$", runs, re.MULTILINE))
    assert {name: ", ".join(features) for name, features in listed.items()} == rows


def test_nothing_that_runs_is_called_missing():
    missing = PAGE.split("## What is missing")[1].split("\n* ")[0]
    named = {
        name for cell in re.findall(r"^\| (`.*?) \|", missing, re.MULTILINE) for name in re.findall("`(.*?)`", cell)
    }
    assert len(named) > 20
    assert not named & set(ARCHITECTURES)
