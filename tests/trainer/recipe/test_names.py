"""The adapter that a recipe names: what may be a name, and what stands in for one."""

import pytest

from runtime.adapters.store import check_name, clashes, name_problem, split_version
from runtime.errors import InvalidRequest
from runtime.trainer.recipe import adapter_name
from runtime.trainer.recipe.schema import Recipe


@pytest.mark.parametrize("name", ["a", "org-tickets", "v1.5", "team:tickets", "x" * 128])
def test_names_that_may_be(name: str) -> None:
    assert name_problem(name) is None
    assert split_version(f"{name}@7") == (name, 7)
    check_name(name, base="SmolLM2", param="name")


@pytest.mark.parametrize(
    ("name", "base"),
    [
        ("smollm2", "SmolLM2"),
        ("SMOLLM2", "SmolLM2"),
        ("tiny", "Ｔｉｎｙ"),  # full-width letters, which NFKC makes ordinary ones
        ("fine", "ﬁne"),
        ("strasse", "Straße"),
        ("tickets", "tickets:3"),  # a version of it would be called so
        ("tickets", "Tickets@3"),
        ("tickets", "tickets:ckpt-step-4"),
    ],
)
def test_the_base_models_name_in_any_form(name: str, base: str) -> None:
    assert clashes(name, base)
    with pytest.raises(InvalidRequest, match="--served-model-name") as caught:
        check_name(name, base=base, param="alias")
    assert caught.value.param == "alias"


@pytest.mark.parametrize(("name", "base"), [("a", "ab"), ("tickets", "tickets-3"), ("i", "ı"), ("x", "y:3")])
def test_names_that_are_others(name: str, base: str) -> None:
    assert not clashes(name, base)
    check_name(name, base=base, param="name")


@pytest.mark.parametrize("name", ["", "x" * 129, "-a", "a/b", "a..b", "tickets:3", "tickets@3", "x²", "ﬁne", "a b"])
def test_names_that_may_not(name: str) -> None:
    assert name_problem(name) is not None


@pytest.mark.parametrize(
    ("output_dir", "name"),
    [("./outputs/tickets/", "tickets"), ("./outputs/out:3", "job-1"), ("./outputs/..", "job-1"), (None, "job-1")],
)
def test_without_a_name_the_output_directory_gives_one_if_it_can(output_dir: str | None, name: str) -> None:
    assert adapter_name(Recipe(adapter="lora", datasets=(), learning_rate=1e-4, output_dir=output_dir), "job-1") == name
