"""docs/from-mergekit.md tells every option of every program, and the notes in it are those of the code."""

from __future__ import annotations

import click
import pytest

from kittybuild.cli import extract_lora, legacy, moe, multi, programs, tokensurgeon
from tests.unit.test_docs import PROGRAMS, between, command_of, page, rows, section, words

PAGE = page("from-mergekit.md")


def told(text: str) -> dict[str, str]:
    """Each option in the first column of a text's tables, without its value, and what is said of it."""
    return {word.partition(" ")[0]: row[1] for row in rows(text) for word in words(row[0]) if word.startswith("-")}


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_option_of_a_program_is_told(name: str) -> None:
    command, _ = command_of([name])
    shared, own = told(section(PAGE, "Options of all programs")), told(section(PAGE, name))
    options = [param for param in command.params if isinstance(param, click.Option)]
    real = {word for option in options for word in option.opts}
    real |= {word for option in options for word in option.secondary_opts if not word.startswith("--")}
    assert real - set(shared) == set(own), "what is not told for all programs is told here"
    assert set(shared) <= real


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_arguments_of_a_program_are_told(name: str) -> None:
    command, _ = command_of([name])
    text = section(PAGE, name).partition("`kittybuild ")[2].partition("`")[0]
    arguments = [param for param in command.params if isinstance(param, click.Argument)]
    written = [str(arg.name).upper() if arg.required else f"[{str(arg.name).upper()}]" for arg in arguments]
    assert text.split()[1 : 1 + len(written)] == written


@pytest.mark.parametrize("name", ["Options of all programs", "moe", "multi", "tokensurgeon", "extract-lora", "legacy"])
def test_an_option_that_changes_nothing_has_the_same_note_everywhere(name: str) -> None:
    own = {"moe": moe.NOTES, "multi": multi.NOTES, "tokensurgeon": tokensurgeon.NOTES}
    own |= {"extract-lora": extract_lora.NOTES, "legacy": legacy.NOTES}
    notes = own.get(name, programs.NOTES)
    text = told(section(PAGE, name))
    for option, note in notes.items():
        for word in option.partition(" ")[0].partition("/")[0].split(","):
            assert text[word] == note
    if notes is programs.NOTES:
        assert len(told(between(PAGE, "shared notes"))) == len(notes)
