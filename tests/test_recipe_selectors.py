"""Which parameters the selectors of a recipe choose, and what they say that choose none."""

from __future__ import annotations

import random
import re

import pytest

from engine.recipe.document import recipe_of
from engine.recipe.selectors import prunable, select, strays
from engine.recipe.trainable import TrainableTransition
from models.network import Network
from models.yaml_reader import from_spec
from tests.helpers import SMALL_CLASSIFIER, small, stock
from utils.errors import InputError


@pytest.fixture(scope="module")
def network() -> Network:
    return Network(small())


def names(network: Network) -> list[str]:
    return [name for name, _ in network.named_parameters()]


def test_prunable_are_the_convolution_weights(network: Network) -> None:
    found = prunable(network)
    assert found == [n for n in names(network) if re.search(r"(\.conv|model\.14\.m\.\d)\.weight$", n)]
    assert found[0] == "model.0.conv.weight" and found[-1] == "model.14.m.1.weight"


def test_prunable_of_yolov5n() -> None:
    network = Network(stock("n"))
    sizes = dict(network.named_parameters())
    assert len(prunable(network)) == 60
    assert sum(sizes[n].numel() for n in prunable(network)) == sum(p.numel() for p in network.parameters() if p.dim() == 4)


def test_prunable_of_a_classifier() -> None:
    network = Network(from_spec(SMALL_CLASSIFIER, "small", None))
    assert prunable(network)[0] == "model.0.conv.weight"
    assert all(n.endswith(".weight") for n in prunable(network))


@pytest.mark.parametrize("token", ["__ALL__", "__all__", "__All__"])
def test_all(network: Network, token: str) -> None:
    assert select([token], network, "r.yaml:1") == names(network)


@pytest.mark.parametrize("token", ["__ALL_PRUNABLE__", "__all_prunable__"])
def test_all_prunable(network: Network, token: str) -> None:
    assert select([token], network, "r.yaml:1") == prunable(network)


def test_names_come_in_the_networks_order_and_once(network: Network) -> None:
    chosen = ["model.5.conv.weight", "model.0.conv.weight", "re:model\\.0\\.conv"]
    assert select(chosen, network, "r.yaml:1") == ["model.0.conv.weight", "model.5.conv.weight"]


def test_patterns_match_from_the_start(network: Network) -> None:
    assert select(["re:model\\.14\\.m\\.\\d+\\.weight"], network, "r.yaml:1") == ["model.14.m.0.weight", "model.14.m.1.weight"]
    assert select(["re:model\\.0"], network, "r.yaml:1") == [n for n in names(network) if n.startswith("model.0.")]


def test_random_selections_are_unions(network: Network) -> None:
    """Any list chooses what its members choose one by one."""
    rng = random.Random(0)
    everything = names(network)
    pool = [*everything, "re:.*bias", "re:model\\.[1-4]\\.", "re:.*\\.conv\\.weight", "__ALL_PRUNABLE__"]
    for _ in range(50):
        chosen = rng.sample(pool, rng.randint(1, 6))
        union = set().union(*(select([s], network, "r.yaml:1") for s in chosen))
        assert select(chosen, network, "r.yaml:1") == [n for n in everything if n in union]


def test_not_strict_passes_over_what_matches_nothing(network: Network) -> None:
    assert select(["model.0.conv.weight", "model.99.conv.weight", "re:nothing"], network, "r.yaml:1", strict=False) == [
        "model.0.conv.weight"
    ]


MISSES = [
    (["model.2.cv1.conv"], "'model.2.cv1.conv'; did you mean model.2.cv1.conv.weight?"),
    (["model.2.cv1"], "'model.2.cv1'; did you mean model.2.cv1.conv.weight, model.2.cv1.bn.weight, model.2.cv1.bn.bias?"),
    (["model.0.conv.wieght"], "'model.0.conv.wieght'; did you mean model.0.conv.weight, "),
    (["model.2.cv1.conv.wight"], "'model.2.cv1.conv.wight'; did you mean model.2.cv1.conv.weight, model.2.cv"),
    (["model.5.cv3.conv.weight"], "'model.5.cv3.conv.weight'; did you mean model.5.conv.weight"),
    (["re:model\\.5\\.cv3\\.conv\\.weight$"], "'re:model\\.5\\.cv3\\.conv\\.weight$'; did you mean model.5.conv.weight"),
    (["model.0.conv.weight", "xyz"], "'xyz'"),
    (["re:cv1"], "'re:cv1' (a pattern must match from the start of a name; re:.*cv1 would match "),
    (["re:model\\.99\\.conv\\.weight"], "'re:model\\.99\\.conv\\.weight'; did you mean "),
    (["a", "b", "c", "d", "e"], "'a' and 'b' and 'c' (and 2 more like this)"),
]  # fmt: skip


@pytest.mark.parametrize("selectors,said", MISSES, ids=lambda v: str(v)[:30])
def test_misses_are_named_with_near_names(network: Network, selectors: list[str], said: str) -> None:
    with pytest.raises(InputError) as error:
        select(selectors, network, "r.yaml:7")
    assert str(error.value).startswith("r.yaml:7: params: no parameter of this model is matched by " + said)
    assert "\n" not in str(error.value)


def test_only_the_misses_are_named(network: Network) -> None:
    with pytest.raises(InputError) as error:
        select(["model.5.conv.weight", "xyz"], network, "r.yaml:7")
    assert "model.5" not in str(error.value)


def test_a_broken_pattern(network: Network) -> None:
    with pytest.raises(InputError, match=r"^r.yaml:7: params: 're:\(' is no regular expression \("):
        select(["re:("], network, "r.yaml:7", strict=False)


@pytest.mark.parametrize(
    "selectors,said",
    [
        (
            ["re:.*cv1"],
            r"'re:.*cv1' also chose 20 parameters (model.2.cv1.bn.weight first), of batch norms or biases, which are better left alone; let "
            r"patterns end with conv\.weight, as in re:.*cv1.*conv\.weight",
        ),
        (
            ["re:.*cv1.*conv\\.weight", "re:model\\.0", "re:model\\.1\\."],
            r"'re:model\.0' and 1 more also chose 4 parameters (model.0.bn.weight first), of",
        ),
        (["re:.*bias$", "model.0.conv.weight"], "'re:.*bias$' also chose "),
        (["re:.*conv\\.weight$", "__ALL_PRUNABLE__", "model.0.bn.weight"], ""),
        (["__ALL__", "re:.*"], ""),
    ],
)
def test_patterns_that_also_choose_batch_norms_and_biases_are_told(network: Network, selectors: list[str], said: str) -> None:
    told = strays(selectors, network, select(selectors, network, "r.yaml:7"), "r.yaml:7")
    assert told.startswith(said) and bool(told) == bool(said)
    assert strays(selectors, network, prunable(network), "r.yaml:7") == "", "those that a mask's shape leaves out are not chosen"


def test_the_modifier_is_named() -> None:
    recipe = recipe_of("modifiers:\n  - !TrainableParamsModifier {params: [model.0.conv.wieght], trainable: false}\n", "r.yaml")
    with pytest.raises(
        InputError,
        match="^r.yaml:2: TrainableParamsModifier: params: no parameter of this model is matched by 'model.0.conv.wieght'; did you",
    ):
        TrainableTransition(recipe, Network(small()))
