"""Print a script that completes commands and options in your shell.

bash   quantforge completion bash > ~/.local/share/bash-completion/completions/quantforge
zsh    quantforge completion zsh  > a file _quantforge in a folder of $fpath
fish   quantforge completion fish > ~/.config/fish/completions/quantforge.fish
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterator
from typing import NamedTuple

SUMMARY = "print a completion script for bash, zsh or fish"


class Level(NamedTuple):
    """One command, with what may follow it."""

    path: tuple[str, ...]
    commands: dict[str, str]
    options: list[argparse.Action]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("shell", choices=tuple(SHELLS))


def run(args: argparse.Namespace) -> int:
    """Print the script."""
    from quantforge.cli.main import parser

    print(SHELLS[args.shell](list(levels(parser(), ()))))
    return 0


def levels(parser: argparse.ArgumentParser, path: tuple[str, ...]) -> Iterator[Level]:
    """Yield a parser and those of its commands."""
    subs = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    commands = {c.dest: c.help or "" for sub in subs for c in sub._choices_actions}
    yield Level(path, commands, [a for a in parser._actions if a.option_strings])
    for sub in subs:
        for name, child in sub.choices.items():
            yield from levels(child, (*path, name))


def _long(option: argparse.Action) -> str:
    return max(option.option_strings, key=len)


def _cases(found: list[Level]) -> tuple[str, str, str]:
    """Return the cases of a shell's `case`: paths, words after them, values of options."""
    inner = "|".join(shlex.quote(" ".join(level.path)) for level in found if level.path)
    words, values = [], []
    for level in found:
        where = " ".join(level.path)
        offered = [*level.commands, *(_long(option) for option in level.options)]
        words.append(f"        {shlex.quote(where)}) offered=({' '.join(offered)}) ;;")
        values += [
            f"        {shlex.quote(f'{where} {_long(option)}'.strip())}) "
            f"offered=({' '.join(map(str, option.choices))}) ;;"
            for option in level.options
            if option.choices
        ]
    return inner, "\n".join(words), "\n".join(values)


BASH = """_quantforge() {
    local current="${COMP_WORDS[COMP_CWORD]}" previous="${COMP_WORDS[COMP_CWORD-1]}"
    local at="" word offered=()
    for word in "${COMP_WORDS[@]:1:COMP_CWORD-1}"; do
        case "${at:+$at }$word" in
            %(inner)s) at="${at:+$at }$word" ;;
        esac
    done
    case "${at:+$at }$previous" in
%(values)s
    esac
    if [[ ${#offered[@]} -eq 0 ]]; then
        case "$at" in
%(words)s
        esac
        # without a dash, what has no commands takes files
        [[ "$current" != -* && "${offered[0]}" == -* ]] && offered=()
    fi
    COMPREPLY=($(compgen -W "${offered[*]}" -- "$current"))
}
complete -o default -F _quantforge quantforge"""

ZSH = """#compdef quantforge
_quantforge() {
    local current="${words[CURRENT]}" previous="${words[CURRENT-1]}"
    local at="" word
    local -a offered
    for word in "${(@)words[2,CURRENT-1]}"; do
        case "${at:+$at }$word" in
            %(inner)s) at="${at:+$at }$word" ;;
        esac
    done
    case "${at:+$at }$previous" in
%(values)s
    esac
    if (( ${#offered} == 0 )); then
        case "$at" in
%(words)s
        esac
        [[ "$current" != -* && "${offered[1]}" == -* ]] && offered=()
    fi
    if (( ${#offered} )); then compadd -- "${offered[@]}"; else _files; fi
}
if [[ "$funcstack[1]" == _quantforge ]]; then
    _quantforge
else
    compdef _quantforge quantforge
fi"""


def _bash(found: list[Level]) -> str:
    inner, words, values = _cases(found)
    return BASH % {"inner": inner, "words": words, "values": values}


def _zsh(found: list[Level]) -> str:
    inner, words, values = _cases(found)
    return ZSH % {"inner": inner, "words": words, "values": values}


def _fish(found: list[Level]) -> str:
    lines = []
    for level in found:
        seen = [f"__fish_seen_subcommand_from {name}" for name in level.path]
        if level.commands:
            names = " ".join(level.commands)
            at = "; and ".join([*seen, f"not __fish_seen_subcommand_from {names}"])
            lines += [
                f"complete -c quantforge -f -n {shlex.quote(at)} -a {name} -d {shlex.quote(text)}"
                for name, text in level.commands.items()
            ]
        for option in level.options if level.path else ():
            line = f"complete -c quantforge -n {shlex.quote('; and '.join(seen))}"
            line += f" -l {_long(option).removeprefix('--')} -d {shlex.quote(option.help or '')}"
            if option.choices:
                line += f" -x -a {shlex.quote(' '.join(map(str, option.choices)))}"
            elif option.nargs != 0:
                line += " -r"
            lines.append(line)
    return "\n".join(lines)


SHELLS = {"bash": _bash, "zsh": _zsh, "fish": _fish}
