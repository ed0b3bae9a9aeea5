"""docs/command_line.md speaks of every command and option, and its commands can be parsed."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from inc_graph.cli.app import build_parser

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "command_line.md").read_text(encoding="utf-8")


def test_every_command_and_option_is_described() -> None:
    commands = next(a for a in build_parser()._actions if hasattr(a, "choices") and a.choices).choices
    for name, parser in commands.items():
        assert f"inc-graph {name}" in PAGE
        options = {o for a in parser._actions for o in a.option_strings if o.startswith("--")}
        assert not {o for o in options - {"--help"} if f"`{o}" not in PAGE and f" {o}" not in PAGE}, name


def test_the_commands_of_the_page_can_be_parsed() -> None:
    blocks = re.findall(r"^```sh\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    lines = re.findall(r"inc-graph [^)\n>]+", "".join(blocks))
    assert len(lines) > 8
    for line in lines:
        build_parser().parse_args(shlex.split(line)[1:])
