"""One option, one meaning: what several commands take is declared once, and `--help` says the same of it everywhere."""

from __future__ import annotations

from collections.abc import Iterator

import click

from kittybuild.cli import main

APART = {
    "--output": [["build", "why"], ["cache keygen"]],
    "--tensor": [["why"], ["verify"]],
    "--full": [["store check"], ["store repair"]],
    "--older-than": [["store check"], ["store gc"], ["cache gc"]],
    "--drop": [["store roots"], ["cache roots"]],
}
"""Words that mean something else in a command of another kind."""
PROGRAMS = ("merge", "moe", "multi", "pytorch", "layershuffle", "tokensurgeon", "extract-lora", "merge-lora", "legacy")


def commands(group: click.Group = main, before: str = "") -> Iterator[tuple[str, click.Command]]:
    """All commands by their whole names."""
    for name in group.list_commands(click.Context(group)):
        command = group.get_command(click.Context(group), name)
        assert command is not None
        if isinstance(command, click.Group):
            yield from commands(command, f"{before}{name} ")
        else:
            yield before + name, command


def test_help_says_the_same_of_an_option_everywhere() -> None:
    said: dict[str, dict[tuple[object, ...], list[str]]] = {}
    for name, command in commands():
        for option in command.params:
            if isinstance(option, click.Option) and not option.hidden and name not in PROGRAMS:
                long = option.opts[-1]
                meaning = (option.help, option.metavar, str(option.default), option.show_default)
                said.setdefault(long, {}).setdefault(meaning, []).append(name)
    apart = {word: list(meanings.values()) for word, meanings in said.items() if len(meanings) > 1}
    assert apart == APART


def test_programs_have_our_options_with_our_words() -> None:
    found = dict(commands())
    ours = {option.opts[-1]: option.help for option in found["build"].params if isinstance(option, click.Option)}
    for name in PROGRAMS:
        theirs = {
            word: option.help
            for option in found[name].params
            for word in option.opts
            if isinstance(option, click.Option)
        }
        for word in ("--store", "--memory", "--jobs", "--numerics", "--methods", "--offline", "--json", "--verbose"):
            assert theirs[word] == ours[word], (name, word)
