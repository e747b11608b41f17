"""Statistics: what adds up adds up exactly, what is read back is what was written, and strange files are refused."""

import json
import os

import numpy as np
import pytest
import safetensors.numpy
from made_up_statistics import made_up_statistics

from gatewright.tools.prune.statistics import EASY_EP, STANDARD, DomainStatistics, Statistics, exponents, key


def demo(seed: int, L: int = 2, E: int = 4) -> DomainStatistics:
    draw = np.random.default_rng(seed)
    # quarters add up without rounding, so equality below is exact
    sums = {name: draw.integers(0, 100, (L, E)) / 4 for name in STANDARD}
    return DomainStatistics.of_demo(sums, draw.integers(0, 9, (L, E)) / 4, 10 + seed)


def equal(first: DomainStatistics, second: DomainStatistics) -> bool:
    return (
        first.sums.keys() == second.sums.keys()
        and all(np.array_equal(first.sums[name], second.sums[name]) for name in first.sums)
        and first.per_demo.keys() == second.per_demo.keys()
        and all(np.array_equal(first.per_demo[name], second.per_demo[name]) for name in first.per_demo)
        and np.array_equal(first.max_norm, second.max_norm)
        and np.array_equal(first.tokens_per_demo, second.tokens_per_demo)
    )


def test_names_of_sums():
    assert key(1, 1, 0) == "1,1,0" and key(0.5, 2.0, 0) == "0.5,2,0"
    assert exponents("0.5,2,0") == (0.5, 2, 0)
    assert len(STANDARD) == len(set(STANDARD)) == 10 and EASY_EP in STANDARD
    for wrong in ("1,1", "a,b,c", "1,1,1,1", "-1,0,0", "1.0,0,0", "nan,0,0", "inf,0,0", ""):
        with pytest.raises(ValueError, match="names no sum"):
            exponents(wrong)


def test_adding_is_associative_and_keeps_the_order_of_demonstrations():
    a, b, c = demo(0), demo(1), demo(2)
    assert equal((a + b) + c, a + (b + c))
    assert equal((a + b) + c, DomainStatistics.total([a, b, c]))
    total = a + b + c
    assert total.demos == 3 and total.tokens == 33 and total.tokens_per_demo.tolist() == [10, 11, 12]
    assert np.array_equal(total.easy_ep_per_demo[1], b.sums[EASY_EP])
    assert np.array_equal(total.max_norm, np.maximum(np.maximum(a.max_norm, b.max_norm), c.max_norm))
    assert equal(total.subset([1, 2]), dataclass_with(b + c, per_demo={}, max_norm=total.max_norm))


def dataclass_with(domain: DomainStatistics, **changes) -> DomainStatistics:
    fields = {name: getattr(domain, name) for name in ("sums", "max_norm", "tokens_per_demo", "per_demo")}
    return DomainStatistics(**fields | changes)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"sums": {}, "per_demo": {}}, "without a sum"),
        ({"sums": {"0,0,0": np.zeros(4)}}, "not \\[layers, experts\\]"),
        ({"sums": {"0,0,0": -np.ones((2, 4))}, "per_demo": {}}, "negative"),
        ({"sums": {"0,0,0": np.full((2, 4), np.nan)}, "per_demo": {}}, "not finite"),
        ({"sums": {"gate": np.zeros((2, 4))}, "per_demo": {}}, "names no sum"),
        ({"max_norm": np.zeros((2, 5))}, "max_norm has shape"),
        ({"tokens_per_demo": np.array([], dtype=int)}, "at least one"),
        ({"tokens_per_demo": np.array([3, 4])}, "by demonstration has shape"),
        ({"sums": {"0,1,0": demo(0).sums["0,1,0"]}}, "not in all"),
    ],
)
def test_wrong_parts_are_refused(changes, says):
    with pytest.raises(ValueError, match=says):
        dataclass_with(demo(0), **changes)


def test_demonstrations_must_add_up():
    total = demo(0) + demo(1)
    with pytest.raises(ValueError, match="do not add up to the sum over all"):
        dataclass_with(total, sums={name: 2 * value + 1 for name, value in total.sums.items()})


def test_different_sums_do_not_add():
    few = dataclass_with(demo(0), sums={"0,0,0": demo(0).sums["0,0,0"]}, per_demo={})
    with pytest.raises(ValueError, match="do not add up"):
        few + demo(1)
    with pytest.raises(ValueError, match="no statistics"):
        DomainStatistics.total([])


def test_file_round_trip(tmp_path):
    made = made_up_statistics(domains=("code", "Prosa, größer"), mtp_layers=[3])
    made.save(tmp_path / "stats")
    read = Statistics.load(tmp_path / "stats")
    assert read.model == made.model and read.options == made.options and read.version == made.version
    assert list(read.domains) == ["code", "Prosa, größer"]
    assert all(equal(read.domains[name], made.domains[name]) for name in made.domains)
    assert np.array_equal(read.weights["aimer"], made.weights["aimer"])
    assert read.sha256 == made.sha256
    read.save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "stats").read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["again", "stats"]


def test_foreign_newer_and_damaged_files_are_refused(tmp_path):
    made_up_statistics().save(tmp_path / "stats")
    content = (tmp_path / "stats").read_bytes()
    cut, text, foreign, newer = (tmp_path / name for name in ("cut", "text", "foreign", "newer"))
    cut.write_bytes(content[: len(content) // 2])
    text.write_text("not safetensors at all")
    safetensors.numpy.save_file({"x": np.zeros(3)}, foreign)
    with safetensors.safe_open(tmp_path / "stats", framework="numpy") as stream:
        about = json.loads(stream.metadata()["gatewright"])
    arrays = safetensors.numpy.load_file(tmp_path / "stats")
    safetensors.numpy.save_file(
        arrays, newer, metadata={"gatewright": json.dumps(about | {"format": 2, "version": "9.9"})}
    )
    for file, says in (
        (cut, "cut short"),
        (text, "not a file of pruning statistics"),
        (foreign, "not a file of pruning statistics"),
        (newer, "format 2 .gatewright 9.9 wrote it.*update gatewright"),
        (tmp_path, "is a folder"),
    ):
        with pytest.raises(ValueError, match=says):
            Statistics.load(file)
    with pytest.raises(FileNotFoundError, match="collect statistics first"):
        Statistics.load(tmp_path / "none")

    arrays.pop("domain.1.max_norm")
    safetensors.numpy.save_file(arrays, tmp_path / "lacks", metadata={"gatewright": json.dumps(about)})
    with pytest.raises(ValueError, match="damaged: it lacks 'domain.1.max_norm'"):
        Statistics.load(tmp_path / "lacks")


def test_merge():
    code, prose = made_up_statistics(domains=("code",)), made_up_statistics(domains=("prose",))
    both = code.merge(prose)
    assert list(both.domains) == ["code", "prose"]
    twice = both.merge(made_up_statistics(domains=("code",), seed=0))
    assert twice.domains["code"].demos == 2 * code.domains["code"].demos
    assert np.array_equal(twice.domains["code"].sums[EASY_EP], 2 * code.domains["code"].sums[EASY_EP])
    with pytest.raises(ValueError, match="different model .*header_hash is 'h0' in one and 'other'"):
        code.merge(made_up_statistics(header_hash="other"))
    other = made_up_statistics(domains=("more",), seed=1)
    with pytest.raises(ValueError, match="aimer.*not statistics of the same weights"):
        code.merge(other)


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ({"model_type": None}, "model_type is None"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_k": 1.5}, "top_k is 1.5"),
        ({"top_k": 17}, "top_k is 17 of 16"),
        ({"num_experts": "16"}, "num_experts is '16'"),
        ({"num_groups": 3}, "must divide"),
        ({"topk_group": 2}, "no more can be chosen"),
        ({"layers": [1, 0, 2]}, "ascending"),
        ({"experts_per_layer": [16, 16, 12, 16]}, "one count for each of 3 layers"),
        ({"experts_per_layer": [12, 12, 12]}, "the largest of them"),
        ({"mtp_layers": ["61"]}, "not a list of whole numbers"),
    ],
)
def test_impossible_models_are_refused(model, says):
    good = made_up_statistics()
    with pytest.raises(ValueError, match=says):
        Statistics(model=good.model | model, domains=good.domains)


def test_layers_of_different_sizes():
    made = made_up_statistics(model_type="gatewright/dit", experts_per_layer=[16, 12, 16], top_k=1.5)
    assert made.experts.sum(-1).tolist() == [16, 12, 16]
    full = made_up_statistics(model_type="gatewright/dit")
    with pytest.raises(ValueError, match="experts that its layer does not have"):
        Statistics(model=made.model, domains=full.domains)
    with pytest.raises(ValueError, match="has shape"):
        Statistics(model=made_up_statistics(layers=(0, 1)).model, domains=full.domains)
    with pytest.raises(ValueError, match="without a domain"):
        Statistics(model=made.model)
