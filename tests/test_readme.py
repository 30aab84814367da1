"""README is true: its commands compose, its groups and files exist."""

from __future__ import annotations

import re

import pytest
from config_cases import commands_in, compose_command, problems_of_values

from vlmsft.config_files import root

README = (root() / "README.md").read_text(encoding="utf-8")
COMMANDS = [command for command in commands_in(README) if "optim.max_lrr=1" not in command[1]]


def test_there_are_commands():
    assert len(COMMANDS) > 8


@pytest.mark.parametrize(("name", "arguments"), COMMANDS, ids=lambda value: str(value)[:60])
def test_command_composes(name, arguments):
    assert problems_of_values(compose_command(name, arguments)) == []


def test_group_table_lists_every_choice():
    table = dict(re.findall(r"^\| `(\w+)` \| ([\w, -]+) \|", README, re.MULTILINE))
    folders = {
        path.parent for group in ("conf/*/*.yaml", "launch/*.yaml", "sweeps/*.yaml") for path in root().glob(group)
    }
    assert {name: set(choices.split(", ")) for name, choices in table.items()} == {
        folder.name: {path.stem for path in folder.glob("*.yaml")} for folder in folders
    }


def test_make_targets_exist():
    makefile = (root() / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"make ([\w-]+)", README)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_links_and_pictures_exist():
    links = re.findall(r"\]\(([^)#:]+)\)", README)
    assert links
    for link in links:
        assert (root() / link).exists(), link
