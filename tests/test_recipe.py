"""Recipes: text and record are inverse, and what can't be read is named."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeq import steps
from edgeq.errors import RecipeError
from edgeq.recipe import DEFAULT, PRESETS, Recipe, Step, parse

KNOWN = {"one": frozenset({"a", "b_c"}), "two_2": frozenset[str](), "three": frozenset({"range"})}
NAMES = st.sampled_from(sorted(KNOWN))
VALUES = (
    st.text(st.characters(categories=["L", "N"], include_characters=" ._-/:+"), min_size=1).map(str.strip).filter(bool)
)


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    made = []
    for name in draw(st.lists(st.sampled_from(["one", "three"]), min_size=1, max_size=4)):
        keys = draw(st.lists(st.sampled_from(sorted(KNOWN[name])), unique=True))
        made.append(Step(name, {key: draw(VALUES) for key in keys}))
    return Recipe(tuple(made))


@given(recipes())
def test_text_and_record_are_inverse(recipe: Recipe) -> None:
    assert parse(str(recipe), KNOWN) == recipe


def test_spaces_and_empty_brackets_mean_nothing() -> None:
    tight, loose = parse("one(a=1,b_c=2);three", KNOWN), parse("  one ( a = 1 , b_c=2 ) ;  three( ) ", KNOWN)
    assert tight == loose
    assert str(loose) == "one(a=1, b_c=2); three"


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_a_recipe(name: str) -> None:
    found = parse(name, steps.KNOWN)
    assert parse(str(found), steps.KNOWN) == found
    assert DEFAULT in PRESETS


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("quantise", "no step or preset 'quantise' in recipe 'quantise'", "did you mean 'quantize'?"),
        ("canonicalize; balance", "no step or preset 'balance'", "did you mean 'balanced'?"),
        ("", "can't read '' in recipe ''", "write step(option=value); step"),
        ("quantize;", "can't read '' in recipe 'quantize;'", "write step(option=value); step"),
        ("quantize(ranges=mse", "can't read 'quantize(ranges=mse'", "write step(option=value); step"),
        ("quantize(range=mse)", "step 'quantize' has no option 'range'", "did you mean 'ranges'?"),
        ("smooth(alpha=1)", "step 'smooth' has no option 'alpha'", "it takes none"),
        ("quantize(ranges)", "option 'ranges' of step 'quantize' has no value", "write ranges=VALUE"),
        ("quantize(=mse)", "step 'quantize' has no option ''", "known: activations, bias, ranges"),
        ("quantize(ranges=mse, ranges=minmax)", "option 'ranges' of step 'quantize' is given twice", "keep one"),
    ],
)
def test_what_cannot_be_read_is_named(text: str, message: str, hint: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse(text, steps.KNOWN)
    assert message in caught.value.message
    assert hint in caught.value.hint


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("quantize(rounding=nearst)", "quantize(rounding=nearst) is not known", "gptq"),
        ("quantize(bias=none)", "quantize(bias=none) is not known", "weights or sequential"),
        ("quantize(relief=much)", "quantize(relief=much) is no number of dB from 0 to 60", "3 halves"),
        ("quantize(relief=-3)", "quantize(relief=-3) is no number of dB from 0 to 60", "3 halves"),
    ],
)
def test_values_of_options_are_checked_before_any_work(text: str, message: str, hint: str) -> None:
    step = parse(text, steps.KNOWN).steps[0]
    with pytest.raises(RecipeError) as caught:
        steps.quantize(None, None, **step.options)  # type: ignore[arg-type]  # neither is looked at
    assert message in str(caught.value)
    assert hint in str(caught.value.hint)
