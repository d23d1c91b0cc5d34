"""`check_method` passes what keeps the laws, and finds each law that a method breaks."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from kittybuild.builders.base import BLOCK, Block, Builder, Combine, Job
from kittybuild.builders.registry import BUILTIN
from kittybuild.model.method import Method, Param
from kittybuild.testing import LAWS, BrokenLaw, check_method

if TYPE_CHECKING:
    from kittybuild.builders.floats import Array

WEIGHT = Param("weight", float, "input", "", required=True)


def mean(job: Job) -> Combine:
    """The mean of the inputs, each step rounded once."""

    def combine(block: Block) -> Array:
        total, *others = block.inputs
        for other in others:
            total += other
        total /= len(block.inputs)
        return total

    return combine


def method(prepare: Callable[[Job], Combine], *params: Param, **changed: object) -> Builder:
    """A builder of a method with these parameters."""
    form = Method("mine", "Mine", "", params, "ordinary", random=bool(changed.pop("random", False)))
    return replace(Builder("mine", 1, prepare, scratch=0, method=form), **changed)  # type: ignore[arg-type]


def broken(builder: Builder, *laws: str) -> str:
    """What is said of a builder that breaks one of these laws, where only they are asked."""
    with pytest.raises(BrokenLaw) as caught:
        check_method(builder, except_for=set(LAWS) - set(laws))
    return str(caught.value)


def test_a_sound_method_passes() -> None:
    check_method(method(mean, WEIGHT))


OURS = [method.name for method in BUILTIN.methods() if method.name not in ("slerp", "passthrough")]


@pytest.mark.parametrize("name", OURS)
def test_methods_of_ours_pass(name: str) -> None:
    check_method(BUILTIN[name])


def test_slerp_passes_with_t_and_with_weights() -> None:
    check_method(BUILTIN["slerp"], params={"t": 0.25})
    check_method(BUILTIN["slerp"], params={"weight": 0.5})


def test_parameters_may_be_given_and_laws_left_out() -> None:
    with pytest.raises(BrokenLaw, match="equal inputs give something else"):
        check_method(BUILTIN["passthrough"], params={"scale": 0.25})
    check_method(BUILTIN["passthrough"], params={"scale": 0.25}, except_for=["identical"])
    with pytest.raises(ValueError, match="no laws: colour"):
        check_method(BUILTIN["linear"], except_for=["colour"])


def test_what_depends_on_the_blocks_is_found() -> None:
    def prepare(job: Job) -> Combine:
        return lambda block: block.inputs[0] - block.inputs[0].sum() * 1e-6

    assert "other bits with 1 leaves or rows a block" in broken(method(prepare), "blocks")


def test_what_depends_on_the_run_is_found() -> None:
    runs = itertools.count()

    def prepare(job: Job) -> Combine:
        number = next(runs)
        return lambda block: block.inputs[0] + number

    assert "other bits run again" in broken(method(prepare), "runs")


def test_what_threads_share_is_found() -> None:
    shared: list[Array] = []

    def prepare(job: Job) -> Combine:
        def combine(block: Block) -> Array:
            shared[:] = [block.inputs[0] * (threading.get_ident() % 1000)]
            time.sleep(0.01)
            return shared[0]

        return combine

    assert "in four threads at once" in broken(method(prepare), "threads")


def test_what_fails_on_some_dtype_or_shape_is_found() -> None:
    def no_scalars(job: Job) -> Combine:
        width = job.output.shape[-1]
        return lambda block: block.inputs[0] + width * 0

    assert "IndexError on F32[]" in broken(method(no_scalars), "shapes")

    def overflows(job: Job) -> Combine:
        return lambda block: block.inputs[0] / 0

    assert "NaN or infinity from finite inputs" in broken(method(overflows), "dtypes")


def test_equal_inputs_that_give_something_else_are_found() -> None:
    def twice(job: Job) -> Combine:
        return lambda block: block.inputs[0] * 2

    assert "equal inputs give something else" in broken(method(twice), "identical")


@pytest.mark.parametrize(("held", "scratch", "sound"), [(1, 1, True), (2, 2, True), (2, 1, False), (5, 3, False)])
def test_a_method_that_holds_more_than_it_says_is_found(held: int, scratch: int, sound: bool) -> None:
    def prepare(job: Job) -> Combine:
        def combine(block: Block) -> Array:
            first = block.inputs[0]
            copies = [first.copy() for _ in range(held)]
            first *= len(copies) / held
            return first

        return combine

    builder = method(prepare, scratch=scratch)
    if sound:
        check_method(builder, except_for=set(LAWS) - {"scratch"})
    else:
        assert f"it has scratch={scratch}, but holds {held} blocks" in broken(builder, "scratch")


class TestSeeds:
    def test_random_and_seeded_go_together(self) -> None:
        assert "go together" in broken(method(mean, random=True), "seeds")
        assert "go together" in broken(method(mean, seeded=True), "seeds")

    def test_one_that_draws_the_same_for_every_tensor_is_found(self) -> None:
        def drops(*keys: str) -> Callable[[Job], Combine]:
            def prepare(job: Job) -> Combine:
                import hashlib

                text = "/".join(str(job.params[key]) for key in keys)
                share = hashlib.sha256(text.encode()).digest()[0] / 256
                return lambda block: block.inputs[0] * share

            return prepare

        check_method(method(drops("seed", "tensor"), random=True, seeded=True), except_for=["identical", "scratch"])
        assert "{'tensor': 'lm_head.weight'}" in broken(method(drops("seed"), random=True, seeded=True), "seeds")
        assert "{'seed': 8}" in broken(method(drops("tensor"), random=True, seeded=True), "seeds")


class TestTrials:
    """Which parameters and how many models are tried."""

    @staticmethod
    def seen(form: Method) -> list[tuple[dict[str, object], int]]:
        found = []

        def prepare(job: Job) -> Combine:
            found.append((dict(job.params), len(job.inputs)))
            return lambda block: block.inputs[0]

        builder = Builder("mine", 1, prepare, scratch=0, method=form)
        check_method(builder, except_for=set(LAWS) - {"identical", "shapes"})
        return [each for index, each in enumerate(found) if each not in found[:index]]

    def test_the_fewest_and_three_models_with_and_without_an_optional_base(self) -> None:
        def counts(base: str, least: int, most: int | None) -> list[int]:
            return sorted(count for _, count in self.seen(Method("mine", "", "", (), base, least, most)))  # type: ignore[arg-type]

        assert counts("ordinary", 1, None) == [1, 3]
        assert counts("ordinary", 2, 2) == [2]
        assert counts("required", 0, 1) == [2]
        assert counts("optional", 2, None) == [2, 3, 3, 4]

    def test_ends_of_ranges_words_and_switches(self) -> None:
        params = (
            Param("share", float, "input", "", default=0.25, low=0, high=1),
            Param("steps", int, "shared", "", required=True, low=2),
            Param("mode", str, "shared", "", default="a", choices=("a", "b")),
            Param("flag", bool, "shared", "", default=False),
            Param("ignored", float, "shared", "", accepted=True),
        )
        tried = [given for given, _ in self.seen(Method("mine", "", "", params, "ordinary", 1, 1))]
        plain = {"share": [0.25], "steps": 2, "mode": "a", "flag": False}
        assert tried == [
            plain,
            {**plain, "share": [0.0]},
            {**plain, "share": [1.0]},
            {**plain, "mode": "b"},
            {**plain, "flag": True},
        ]

    def test_what_the_method_refuses_is_not_tried(self) -> None:
        share = Param("share", float, "shared", "", default=0.5, low=0, high=1)
        form = Method("mine", "", "", (share,), "ordinary", 1, 1)
        refuse_ends = replace(form, check=lambda params: None if params["share"] == 0.5 else "no")
        assert [given["share"] for given, _ in self.seen(refuse_ends)] == [0.5]
        with pytest.raises(BrokenLaw, match="refuses its defaults"):
            check_method(Builder("mine", 1, mean, method=replace(form, check=lambda params: "no")))

    def test_only_methods_are_checked(self) -> None:
        with pytest.raises(ValueError, match="cast is no merge method"):
            check_method(BUILTIN["cast"])


def test_blocks_of_rows_are_whole_rows() -> None:
    widths = set()

    def prepare(job: Job) -> Combine:
        def combine(block: Block) -> Array:
            widths.add(block.count % job.output.shape[-1] if job.output.shape else 0)
            return block.inputs[0]

        return combine

    check_method(method(prepare, rows=True), except_for=set(LAWS) - {"blocks"})
    assert widths == {0}
    widths.clear()
    check_method(method(prepare), except_for=set(LAWS) - {"blocks"})
    assert any(width for width in widths), f"a leaf of {BLOCK} is no whole row"
