"""The parser, and what is the same for all commands: output, warnings, errors and exit codes.

Exit codes: 0 all is well; 1 what was looked at is not in order, or the library has raised an error; 2 wrong usage.
Results go to stdout, everything else to stderr: what the user's code prints, too.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from inc_graph.cli import completion, import_inc, inspect, load, quantize, version
from inc_graph.cli.result import FAILED, USAGE, UsageError, error_data
from inc_graph.errors import IncError, IncWarning

__all__ = ["build_parser", "main"]

_COMMANDS: tuple[Any, ...] = (version, inspect, load, quantize, import_inc, completion)
_EXIT_CODES = """exit codes:
  0  all is well
  1  what was looked at is not in order, or the work failed
  2  wrong usage"""


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    raw = argparse.RawDescriptionHelpFormatter
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument(
        "--json", action="store_true", default=argparse.SUPPRESS, help="print one JSON document on stdout, nothing else"
    )
    shared.add_argument(
        "--debug", action="store_true", default=argparse.SUPPRESS, help="show where in the code an error was raised"
    )
    parser = argparse.ArgumentParser(
        prog="inc-graph",
        description="Quantize PyTorch models; look at, check and convert what was saved.",
        epilog=_EXIT_CODES,
        parents=[shared],
        formatter_class=raw,
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command", required=True)
    for module in _COMMANDS:
        made = commands.add_parser(
            module.NAME, help=module.HELP, description=module.DESCRIPTION, parents=[shared], formatter_class=raw
        )
        module.add_arguments(made)
        made.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Without the name of the program; None for that of the process.

    Returns:
        The exit code.
    """
    parser = build_parser()
    try:
        args = parser.parse_args(argv)
    except SystemExit as e:  # argparse has said why
        return e.code if isinstance(e.code, int) else USAGE
    args.parser = parser
    as_json, debug = getattr(args, "json", False), getattr(args, "debug", False)
    try:
        with contextlib.redirect_stdout(sys.stderr), _warnings_in_a_line():
            result = args.run(args)
        result.show(as_json)
        sys.stdout.flush()
        return int(result.code)
    except UsageError as e:
        parser_of(parser, args.command).print_usage(sys.stderr)
        print(f"inc-graph {args.command}: {e}", file=sys.stderr)
        if as_json:
            print(json.dumps(error_data(e), indent=2))
        return USAGE
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:  # whoever read the output has seen enough
        sys.stdout = open(os.devnull, "w")  # which the interpreter flushes at its end
        return FAILED
    except (IncError, NotImplementedError, OSError) as e:
        if debug:
            raise
        print(f"error: {e}", file=sys.stderr)
        if as_json:
            print(json.dumps(error_data(e), indent=2))
        return FAILED


def parser_of(parser: argparse.ArgumentParser, command: str) -> argparse.ArgumentParser:
    """The parser of one command."""
    (found,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    return found.choices[command]


@contextlib.contextmanager
def _warnings_in_a_line() -> Any:
    """Our warnings without the line of code that they come from: it is none of the user's."""
    with warnings.catch_warnings():
        usual = warnings.showwarning

        def show(message: Any, category: Any, *rest: Any, **named: Any) -> None:
            if issubclass(category, IncWarning):
                print(f"warning: {message}", file=sys.stderr)
            else:
                usual(message, category, *rest, **named)

        warnings.showwarning = show
        warnings.simplefilter("always", IncWarning)
        yield
