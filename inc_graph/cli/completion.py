"""`inc-graph completion`: a script that lets the shell complete the command line."""

from __future__ import annotations

import argparse
import shlex
from dataclasses import dataclass

from inc_graph.cli.result import Result

NAME = "completion"
HELP = "print a script for the shell that completes this command line"
DESCRIPTION = """Print a script that lets a shell complete this command line.

  bash:  eval "$(inc-graph completion bash)"                              in ~/.bashrc
  zsh:   eval "$(inc-graph completion zsh)"                               in ~/.zshrc, after compinit
  fish:  inc-graph completion fish > ~/.config/fish/completions/inc-graph.fish"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of this command."""
    parser.add_argument("shell", choices=sorted(_SHELLS), help="the shell that the script is for")


def run(args: argparse.Namespace) -> Result:
    """Print the script."""
    script = _SHELLS[args.shell](_words(args.parser))
    return Result({"shell": args.shell, "script": script}, script.rstrip("\n"))


@dataclass(frozen=True)
class _Command:
    """What may stand behind a command: its options, and the words that an argument is one of."""

    help: str
    options: dict[str, str]
    choices: tuple[str, ...]


def _words(parser: argparse.ArgumentParser) -> dict[str, _Command]:
    """Command -> what may stand behind it."""
    (commands,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    helps = {a.dest: a.help or "" for a in commands._choices_actions}
    found = {}
    for name, made in commands.choices.items():
        options = {o: _short(a.help) for a in made._actions for o in a.option_strings if o.startswith("--")}
        choices = tuple(str(c) for a in made._actions if not a.option_strings for c in a.choices or ())
        found[name] = _Command(helps[name], options, choices)
    return found


def _short(text: str | None) -> str:
    return (text or "").partition(";")[0].partition(" (")[0].replace("%%", "%")


def _bash(words: dict[str, _Command]) -> str:
    cases = "\n".join(
        f"        {name}) words={shlex.quote(' '.join([*c.options, *c.choices]))} ;;" for name, c in words.items()
    )
    return f"""_inc_graph() {{
    local current="${{COMP_WORDS[COMP_CWORD]}}" words
    COMPREPLY=()
    if [ "$COMP_CWORD" -eq 1 ]; then
        COMPREPLY=($(compgen -W {shlex.quote(" ".join(words))} -- "$current"))
        return
    fi
    case "${{COMP_WORDS[1]}}" in
{cases}
    esac
    COMPREPLY=($(compgen -W "$words" -- "$current"))
    if [ "${{current#-}}" = "$current" ]; then
        COMPREPLY+=($(compgen -f -- "$current"))
    fi
}}
complete -o filenames -F _inc_graph inc-graph
"""


def _zsh(words: dict[str, _Command]) -> str:
    names = "\n".join(f"        {shlex.quote(f'{name}:{c.help}')}" for name, c in words.items())
    cases = "\n".join(
        f"        {name}) found=({' '.join(shlex.quote(w) for w in [*c.options, *c.choices])}) ;;"
        for name, c in words.items()
    )
    return f"""#compdef inc-graph
_inc_graph() {{
    local -a commands found
    commands=(
{names}
    )
    if (( CURRENT == 2 )); then
        _describe command commands
        return
    fi
    case "$words[2]" in
{cases}
    esac
    compadd -- $found
    [[ $PREFIX == -* ]] || _files
}}
compdef _inc_graph inc-graph
"""


def _fish(words: dict[str, _Command]) -> str:
    lines = ["complete -c inc-graph -n __fish_use_subcommand -f"]
    for name, c in words.items():
        lines.append(f"complete -c inc-graph -n __fish_use_subcommand -f -a {name} -d {_quoted(c.help)}")
        here = f"-n '__fish_seen_subcommand_from {name}'"
        lines += [f"complete -c inc-graph {here} -l {o[2:]} -d {_quoted(text)}" for o, text in c.options.items()]
        if c.choices:
            lines.append(f"complete -c inc-graph {here} -f -a '{' '.join(c.choices)}'")
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    """A word of fish: in single quotes, where a backslash goes before a quote."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


_SHELLS = {"bash": _bash, "zsh": _zsh, "fish": _fish}
