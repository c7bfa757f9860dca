"""A checkpoint of any layout loads in any other: tensors equal by bits, and the next steps within 1e-5 (R6). One of
the models averages its weights, too."""

from __future__ import annotations

import numpy as np
import pytest

from tests.helpers import reshard
from tests.helpers.cases import Case
from tests.helpers.grid import ALL_TARGETS
from tests.helpers.reshard import Model

BOUND = 1e-5
MODELS = [
    # Vocabularies that no tensor-parallel size divides; four groups of keys and values, so that TP 4 has them.
    Model(
        name="full", loss={"learn_temperature": True}, ema=0.9, changes={"vocab_size": 17, "num_key_value_heads": 4}
    ),
    Model(
        name="adapters",
        kind="multi_layer",
        targets=ALL_TARGETS,
        loss={"learn_temperature": True, "matryoshka_dims": [8]},
        changes={"vocab_size": 127, "num_key_value_heads": 4},
    ),
]
LARGE = Model(name="large", kind="mean", changes={"vocab_size": 31123, "num_key_value_heads": 4})
LAYOUTS = {
    "1": Case(),
    "dp2": Case(world=2, overlap=True),
    "tp2 sp": Case(world=2, tp=2, sp=True),
    "pp2 x 2": Case(world=2, pp=2, chunks=2),
    "pp2: 1 + 3": Case(world=2, pp=2, first=1),
    "tp2 sp pp2": Case(world=4, tp=2, sp=True, pp=2),
    "cp2": Case(world=2, cp=2, overlap=True),
    # The others are among the long tests only.
    "dp3": Case(world=3),
    "dp2 whole": Case(world=2, distributed=False),
    "tp2 dp2": Case(world=4, tp=2, overlap=True),
    "pp4": Case(world=4, pp=4),
    "tp2 pp2: 3 + 1": Case(world=4, tp=2, pp=2, last=1),
    "tp4 whole": Case(world=4, tp=4, distributed=False),
    "tp2": Case(world=2, tp=2),
    "pp2": Case(world=2, pp=2),
    "dp3 whole": Case(world=3, distributed=False),
    "dp4": Case(world=4),
    "tp4 sp": Case(world=4, tp=4, sp=True),
    "pp2 dp2": Case(world=4, pp=2, overlap=True),
    "tp2 sp dp2": Case(world=4, tp=2, sp=True),
    "tp2 pp2 whole": Case(world=4, tp=2, pp=2, distributed=False),
    "pp2 x 2 dp2": Case(world=4, pp=2, chunks=2),
    "cp2 dp2": Case(world=4, cp=2),
    "cp2 tp2 sp whole": Case(world=4, cp=2, tp=2, sp=True, distributed=False),
    "cp2 pp2": Case(world=4, cp=2, pp=2),
}
"""`dp` data-parallel, `cp` context-parallel, `tp` tensor-parallel, `sp` with sequence parallelism, `pp` pipeline
stages, `x` chunks of each, `whole`: the optimizer is not sharded. With `overlap`, gradients are in many buckets."""
SHORT = ["1", "dp2", "pp2 x 2", "pp2: 1 + 3", "tp2 sp pp2", "cp2"]


@pytest.fixture(scope="module")
def shop(world, tmp_path_factory):
    """Makes what is asked for once: checkpoints by layout, and the run that nobody saved."""
    return Shop(world, tmp_path_factory.mktemp("checkpoints"))


class Shop:
    def __init__(self, world, folder) -> None:
        self.world, self.folder = world, folder
        self.saved: dict[str, dict[str, reshard.Whole]] = {}
        self.truths: dict[str, tuple[list[float], reshard.Whole]] = {}

    def run(self, layout: str, function, *args):
        """On the processes of a layout, which are some of four."""
        return self.world(4).run(function, *args, ranks=LAYOUTS[layout].world)

    def source(self, layout: str, models: list[Model]) -> None:
        """Checkpoints of a layout, and the whole tensors of its live models."""
        saved = self.saved.setdefault(layout, {})
        models = [model for model in models if model.name not in saved]
        if models:
            by_rank = self.run(layout, reshard.save_all, models, LAYOUTS[layout], self.folder / layout)
            saved |= {model.name: reshard.whole(model, [one[model.name] for one in by_rank]) for model in models}

    def truth(self, model: Model) -> tuple[list[float], reshard.Whole]:
        """Losses and final tensors of one process that goes on."""
        if model.name not in self.truths:
            ((losses, parts),) = self.run("1", reshard.straight, [model])[0]
            self.truths[model.name] = losses, reshard.whole(model, [parts])
        return self.truths[model.name]

    def check(self, target: str, pairs: list[tuple[Model, str]]) -> None:
        """Load checkpoints of models and layouts in the target's layout and go on."""
        sources = [(model, self.folder / source) for model, source in pairs]
        by_rank = self.run(target, reshard.load_all, sources, LAYOUTS[target])
        for (model, source), *ranks in zip(pairs, *by_rank, strict=True):
            loaded, losses, parts = zip(*ranks, strict=True)
            same_bits(reshard.whole(model, loaded), self.saved[source][model.name])
            expected, tensors = self.truth(model)
            np.testing.assert_allclose(losses, [expected] * len(losses), rtol=BOUND, err_msg=f"{source} -> {target}")
            close(reshard.whole(model, parts), tensors)


def same_bits(found: reshard.Whole, expected: reshard.Whole) -> None:
    assert found.keys() == expected.keys()
    moments = [name for name in found if name.startswith("exp_avg_sq ")]
    averages = [name for name in found if name.startswith("average ")]
    assert len(averages) in (0, len(moments))
    assert moments and all(f"exp_avg {name.split(' ', 1)[1]}" in found for name in moments)
    assert [name for name in found if found[name].tobytes() != expected[name].tobytes()] == []


def close(found: reshard.Whole, expected: reshard.Whole) -> None:
    """Weights and their averages after the last step."""
    for name in (name for name in expected if name.startswith(("weight ", "average "))):
        difference = np.abs(found[name] - expected[name]).max() / max(np.abs(expected[name]).max(), 1e-3)
        assert difference <= BOUND, (name, difference)


@pytest.mark.parametrize("target", SHORT)
def test_loads_in(shop, target):
    """Each model from another layout; over all targets each layout is a source of both."""
    place = SHORT.index(target)
    pairs = [(model, SHORT[place - step]) for model, step in zip(MODELS, (1, 3), strict=True)]
    for _, source in pairs:
        shop.source(source, MODELS)
    shop.check(target, pairs)


@pytest.mark.slow
@pytest.mark.parametrize("target", LAYOUTS)
def test_loads_in_from_every_other(shop, target):
    """All pairs of layouts, with the two models by turns."""
    pairs = [(MODELS[(number + list(LAYOUTS).index(target)) % 2], source) for number, source in enumerate(LAYOUTS)]
    for model, source in pairs:
        shop.source(source, [model])
    shop.check(target, pairs)


def test_a_large_odd_vocabulary(shop):
    """31123 rows are padded to 31232 in every layout, so that every tensor-parallel size divides them."""
    shop.source("tp2 sp pp2", [LARGE])
    assert shop.saved["tp2 sp pp2"]["large"]["weight embedding.word_embeddings.weight"].shape == (31232, 32)
    shop.check("dp3", [(LARGE, "tp2 sp pp2")])


def test_one_wrong_bit_would_be_seen(shop):
    """One bit of one moment."""
    shop.source("1", MODELS)
    expected = shop.saved["1"]["full"]
    moment = "exp_avg_sq decoder.layers.3.mlp.linear_fc2.weight"
    spoiled = {**expected, moment: expected[moment].copy()}
    spoiled[moment].view(np.uint32)[0, 0] ^= 1
    with pytest.raises(AssertionError, match="linear_fc2"):
        same_bits(spoiled, expected)
