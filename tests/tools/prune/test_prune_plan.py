"""Plans: what is chosen, what is refused and in which words, and that a file says the same when it is read again."""

import json

import numpy as np
import pytest
from made_up_statistics import made_up_statistics

from gatewright.tools.prune import selection
from gatewright.tools.prune.criteria import score
from gatewright.tools.prune.plan import Plan, make_plan, parse_keep, parse_size
from gatewright.tools.prune.statistics import DomainStatistics, Statistics

GROUPED = {"model_type": "deepseek_v3", "num_groups": 4, "topk_group": 2}
OWN = {"model_type": "gatewright/dit", "experts_per_layer": [16, 12, 16]}


@pytest.fixture(scope="module")
def statistics():
    return made_up_statistics()


def best_of(scores, count):
    return {
        layer: tuple(sorted(sorted(range(len(row)), key=lambda i: (-row[i], i))[:count]))
        for layer, row in scores.items()
    }


@pytest.mark.parametrize("criterion", ["easy-ep", "reap", "gating", "0,1,1,0.5", "random", "aimer"])
def test_keeps_the_best_of_every_layer(statistics, criterion):
    plan = make_plan(statistics, keep=6, criterion=criterion, domains=["code"], seed=4)
    scores = dict(enumerate(score(statistics, "code", criterion, seed=4).tolist()))
    assert plan.keep == best_of(scores, 6)
    assert plan.count == 6 and plan.mask.sum() == 18


def test_ties_go_to_the_lower_id():
    flat = {name: np.ones((3, 16)) for name in ("0,0,0", "1,1,1")}
    made = made_up_statistics()
    domain = DomainStatistics.of_demo(flat, np.ones((3, 16)), 10)
    plan = make_plan(Statistics(model=made.model, domains={"code": domain}), keep=0.25)
    assert set(plan.keep.values()) == {(0, 1, 2, 3)}
    assert plan.stability == {"reason": "there is one demonstration only"}


def test_shares_are_rounded_up(statistics):
    assert make_plan(statistics, keep=0.5).count == 8
    assert make_plan(statistics, keep=0.55).count == 9
    assert make_plan(made_up_statistics(experts=10), keep=0.3).count == 3
    assert make_plan(made_up_statistics(**GROUPED), keep=0.55).count == 12
    own = make_plan(made_up_statistics(**OWN), keep=0.25)
    assert own.counts == {0: 4, 1: 3, 2: 4}
    assert make_plan(statistics, keep=1.0).notes[0] == "every expert stays: nothing is pruned"


def test_size(statistics):
    def bytes_at(count):
        return 1000 + 10**6 * count

    plan = make_plan(statistics, keep="9.5MB", bytes_at=bytes_at)
    assert plan.count == 9 and plan.budget == {"kind": "uniform", "keep": "9.5MB", "count": 9, "bytes": 9_001_000}
    assert plan.replay(statistics).hash == plan.hash
    grouped = make_plan(made_up_statistics(**GROUPED), keep="9.5MB", bytes_at=bytes_at)
    assert grouped.count == 8
    with pytest.raises(ValueError, match="no pruned checkpoint fits 1MB: with 2 experts a layer.* it has 1.91 MiB"):
        make_plan(statistics, keep="1MB", bytes_at=bytes_at)
    with pytest.raises(ValueError, match="fits 5MB: with 8 experts a layer"):
        make_plan(made_up_statistics(**GROUPED), keep="5MB", bytes_at=bytes_at)
    assert make_plan(statistics, keep="1.5MB", top_k=1, bytes_at=bytes_at).count == 1
    with pytest.raises(ValueError, match="--model"):
        make_plan(statistics, keep="9MB")


def test_what_keep_may_be():
    assert parse_keep("64") == 64 and parse_keep("0.5") == 0.5 and parse_keep("30GiB") == "30GiB"
    assert parse_size("1.5 GiB") == 3 * 2**29 and parse_size("64gb") == 64 * 10**9
    for wrong in ("half", "30 gibbons", "-3", "50%"):
        with pytest.raises(ValueError):
            parse_size(wrong)


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        ({"keep": 17}, "keep 17 of 16 experts"),
        ({"keep": 0}, "keep 0 of 16"),
        ({"keep": 1.5}, "a share up to 1.0"),
        ({"keep": 0.0}, "a share up to 1.0"),
        ({"keep": True}, "a share up to 1.0"),
        ({"keep": 1}, r"2 experts a token of 1 that stay: keep 2 or more in every layer, or .*--top-k 1"),
        ({"keep": 0.5, "top_k": 3}, "from 1 to the 2 experts"),
        ({"keep": 0.5, "criterion": "easy_ep"}, "did you mean easy-ep"),
        ({"keep": 0.5, "domains": ["cod"]}, "did you mean code"),
        ({"keep": 0.5, "domains": []}, "at least one domain"),
        ({"keep": 0.5, "domains": {"code": 0}}, "a number above 0"),
        ({"keep": 0.5, "domains": {"code": 1, "prose": 2}, "mixture": "max-min"}, "leave the weights out"),
        ({"keep": 0.5, "mixture": "maxmin"}, "did you mean max-min"),
        ({"keep": 0.5, "budget": "globl"}, "did you mean global"),
        ({"keep": 0.5, "budget": "global"}, "qwen3_moe configuration has one count for all layers: no stock engine"),
        ({"keep": 0.5, "budget": "equal-groups"}, "the router has no groups"),
        ({"keep": 0.5, "policy": "slice-equal-groups"}, "the router has no groups"),
        ({"keep": 0.5, "policy": "slice-regroup"}, "the router has no groups, so use slice"),
        ({"keep": 0.5, "policy": "cut"}, "choose one of slice"),
        ({"keep": 0.5, "floor": 2}, "budget global"),
    ],
)
def test_impossible_requests_are_refused(statistics, request_, says):
    with pytest.raises(ValueError, match=says):
        make_plan(statistics, **request_)


def test_fewer_experts_a_token_must_be_asked_for(statistics):
    plan = make_plan(statistics, keep=1, top_k=1)
    assert (plan.top_k, plan.count) == (1, 1)
    assert "a token uses 1 experts, not 2" in plan.notes[0]


# --- grouped routers


def test_a_grouped_router_keeps_equal_groups_unless_told_otherwise():
    made = made_up_statistics(**GROUPED)
    plan = make_plan(made, keep=8)
    assert (plan.policy, plan.budget["kind"]) == ("slice-equal-groups", "equal-groups")
    assert (plan.num_groups, plan.topk_group) == (4, 2)
    assert (plan.mask.reshape(3, 4, 4).sum(-1) == 2).all()
    free = make_plan(made, keep=8, policy="slice")
    assert (free.num_groups, free.topk_group) == (1, 1) and "no longer does" in " ".join(free.notes)
    assert free.kept_mass["domains"]["code"]["mean"] > plan.kept_mass["domains"]["code"]["mean"]
    again = make_plan(made, keep=8, policy="slice-regroup")
    assert again.keep == free.keep and again.num_groups == 4 and "cut anew" in " ".join(again.notes)
    assert make_plan(made, keep=8, policy="keep-rows").num_groups == 4


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        ({"keep": 6}, "keep a multiple of 4 from 8 .the next is 8., or drop the groups with policy slice"),
        ({"keep": 10}, "the next is 12"),
        ({"keep": 4}, "4 experts in 4 groups.*from 8"),  # one a group, whose score takes its two best
        ({"keep": 10, "policy": "slice-regroup"}, "multiple of 4"),
        ({"keep": 8, "budget": "uniform", "policy": "slice-equal-groups"}, "does not go with"),
        ({"keep": 8, "budget": "equal-groups", "policy": "slice"}, "does not go with"),
    ],
)
def test_what_engines_would_route_wrongly_is_refused(request_, says):
    with pytest.raises(ValueError, match=says):
        make_plan(made_up_statistics(**GROUPED), **request_)


def test_too_few_in_the_groups_of_a_token():
    made = made_up_statistics(model_type="deepseek_v3", num_groups=4, topk_group=1, top_k=3)
    with pytest.raises(ValueError, match="8 experts in 4 groups, 1 of which serve a token's 3: .* from 12"):
        make_plan(made, keep=8)
    assert make_plan(made, keep=12).count == 12


def test_one_a_group_is_enough_where_the_best_scores_a_group():
    made = made_up_statistics(**GROUPED | {"model_type": "deepseek_v2"})
    assert make_plan(made, keep=4).count == 4


# --- several domains


def test_weighted_domains(statistics):
    shares = {name: selection.normalised(score(statistics, name)) for name in ("code", "prose")}
    for weights in ({"code": 1, "prose": 1}, {"code": 3, "prose": 1}):
        mixed = sum(weights[name] / sum(weights.values()) * shares[name] for name in weights)
        plan = make_plan(statistics, keep=5, domains=weights)
        assert plan.keep == best_of(dict(enumerate(mixed.tolist())), 5)
    assert (
        make_plan(statistics, keep=5, domains={"code": 7}).keep == make_plan(statistics, keep=5, domains=["code"]).keep
    )
    masses = make_plan(statistics, keep=5).kept_mass["domains"]
    for name, mass in masses.items():
        kept = make_plan(statistics, keep=5).mask
        by_hand = (shares[name] * kept).sum(-1)
        assert mass["mean"] == pytest.approx(by_hand.mean(), abs=1e-6)
        assert list(mass["layers"].values()) == pytest.approx(by_hand.tolist(), abs=1e-6)


def test_max_min_keeps_more_of_the_worst_served_domain():
    made = made_up_statistics(domains=("code", "prose", "law"), seed=2)
    weighted, fair = (make_plan(made, keep=5, mixture=mixture) for mixture in ("weighted", "max-min"))

    def least(plan):
        masses = [list(mass["layers"].values()) for mass in plan.kept_mass["domains"].values()]
        return np.min(masses, axis=0)

    assert (least(fair) >= least(weighted)).all() and least(fair).mean() > least(weighted).mean()
    assert "no set exceeds" in " ".join(fair.notes)
    assert make_plan(made, keep=5, mixture="max-min", domains=["law"]).mixture == "weighted"


# --- budgets of our own runs


def test_global_budget_of_an_own_run():
    made = made_up_statistics(**OWN)
    plan = make_plan(made, keep=0.25, budget="global")
    assert sum(plan.counts.values()) == 11 and min(plan.counts.values()) >= 2
    assert plan.budget == {"kind": "global", "keep": 0.25, "floor": 2, "total": 11}
    assert len(set(plan.counts.values())) > 1
    with pytest.raises(ValueError, match="see counts"):
        _ = plan.count
    assert plan.replay(made).hash == plan.hash
    assert min(make_plan(made, keep=0.25, budget="global", floor=3).counts.values()) >= 3
    with pytest.raises(ValueError, match="at least the 2 experts"):
        make_plan(made, keep=0.25, budget="global", floor=1)
    with pytest.raises(ValueError, match="floor is 4, but 11 experts in 3 layers are to stay: .* lower it to 3"):
        make_plan(made, keep=0.25, budget="global", floor=4)
    assert make_plan(made_up_statistics(**OWN, top_k=1.5), keep=0.25).top_k == 1.5


# --- layers for multi-token prediction


def test_mtp_layers_are_stripped_or_given_ids():
    made = made_up_statistics(mtp_layers=[3])
    plan = make_plan(made, keep=4)
    assert plan.mtp == "strip" and "(3) are stripped" in " ".join(plan.notes)
    assert make_plan(made, keep=4, mtp_keep={3: [0, 1, 2, 9]}).mtp == "prune"
    with pytest.raises(ValueError, match="4 experts for each of the layers .3."):
        make_plan(made, keep=4, mtp_keep={3: [0, 1]})
    with pytest.raises(ValueError, match="names layer 4"):
        make_plan(made, keep=4, mtp_keep={4: [0, 1, 2, 3]})


# --- stability


def test_stability_by_hand(statistics):
    plan = make_plan(statistics, keep=4, domains=["code"], seed=7)
    demos = statistics.domains["code"].easy_ep_per_demo
    draw, halves, one = np.random.default_rng(7), [], []

    def chosen(rows):
        return selection.top(demos[rows].sum(0), np.full(3, 4))

    for _ in range(10):
        order = draw.permutation(12)
        halves.append((chosen(order[:6]) & chosen(order[6:])).sum(-1) / 4)
        one.append(((chosen(order[:1]) & plan.mask).sum(-1) / 4).mean())
    assert plan.stability["split_half"] == pytest.approx(np.mean(halves), abs=1e-6)
    assert plan.stability["shots"]["1"] == pytest.approx(np.mean(one), abs=1e-6)
    assert plan.stability["shots"].keys() == {"1", "5", "10"}
    assert plan.stability["chance"] == 0.25 and plan.stability["demos"] == {"code": 12}


def test_an_unstable_choice_is_said_to_be_one(statistics):
    unstable = make_plan(statistics, keep=2)
    assert unstable.stability["split_half"] < 0.9
    assert "collect more demonstrations" in " ".join(unstable.notes)
    stable = make_plan(statistics, keep=15)
    assert stable.stability["split_half"] > 0.9
    assert "collect more" not in " ".join(stable.notes)


def test_stability_that_cannot_be_known_says_why(statistics):
    assert "does not look at demonstrations" in make_plan(statistics, keep=4, criterion="random").stability["reason"]
    assert "all demonstrations together" in make_plan(statistics, keep=4, criterion="max-norm").stability["reason"]


def test_margins_by_hand(statistics):
    plan = make_plan(statistics, keep=4, domains=["code"])
    for layer, row in enumerate(score(statistics, "code").tolist()):
        ranked = sorted(row, reverse=True)
        assert plan.margins[str(layer)] == pytest.approx((ranked[3] - ranked[4]) / ranked[3], abs=1e-6)


def test_experts_that_no_demonstration_used_are_pointed_at():
    made = made_up_statistics()
    zero = {name: value * (np.arange(16) < 3) for name, value in made.domains["code"].sums.items()}
    domain = DomainStatistics.of_demo(zero, made.domains["code"].max_norm, 5)
    plan = make_plan(Statistics(model=made.model, domains={"code": domain}), keep=8)
    idle = 3 * 8 - (zero["1,1,1"] > 0).sum()
    assert f"{idle} of the experts kept scored nothing (3 layers)" in " ".join(plan.notes)


# --- the file


def test_file_round_trip(tmp_path, statistics):
    plan = make_plan(statistics, keep=0.5, source="models/tiny")
    plan.save(tmp_path / "plan.json")
    read = Plan.load(tmp_path / "plan.json")
    assert read == plan and read.hash == plan.hash
    assert read.replay(statistics).hash == plan.hash
    text = (tmp_path / "plan.json").read_text()
    assert len(text.splitlines()) < 60 and max(map(len, text.splitlines())) < 200, "a person reads it"
    content = json.loads(text)
    assert content["num_experts"] == 16 and content["keep"]["0"] == list(plan.keep[0])
    assert content["statistics_sha256"] == statistics.sha256


def test_the_hash_follows_what_is_pruned_and_nothing_else(statistics):
    plan = make_plan(statistics, keep=4)
    by_hand = {"criterion": "random", "domains": {}, "policy": "slice", "top_k": 2}
    same = Plan(model=plan.model, keep={str(layer): ids for layer, ids in plan.keep.items()}, **by_hand)
    assert same.hash == plan.hash
    with pytest.raises(ValueError, match="made by hand"):
        same.replay(statistics)
    arrays = Plan(model=plan.model, keep={layer: tuple(np.array(ids)) for layer, ids in plan.keep.items()}, **by_hand)
    assert arrays.hash == plan.hash and json.loads(arrays.text())["keep"] == json.loads(plan.text())["keep"]
    assert make_plan(statistics, keep=np.int64(4)).hash == plan.hash
    assert make_plan(statistics, keep=4, top_k=1).hash != plan.hash
    assert make_plan(statistics, keep=5).hash != plan.hash
    assert make_plan(statistics, keep=4, policy="keep-rows").hash != plan.hash
    other = Plan(model=plan.model | {"header_hash": "h1"}, keep=plan.keep, **by_hand)
    assert other.hash != plan.hash


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"kind": "something"}, "not a pruning plan"),
        ({"format": 2, "version": "9.9"}, "gatewright 9.9 wrote it.*update gatewright"),
        ({"format": None}, "names no format"),
        ({"keep": {"0": [0, 1], "1": [0, 1]}}, "keep lacks layer 2"),
        ({"keep": {"0": [0, 1], "1": [0, 1], "3": [0, 1]}}, "names layer 3: the layers are 0, 1, 2"),
        ({"keep": {"0": [1, 0], "1": [0, 1], "2": [0, 1]}}, "layer 0 must be ascending ids below 16"),
        ({"keep": {"0": [0, 0], "1": [0, 1], "2": [0, 1]}}, "each once"),
        ({"keep": {"0": [0, 16], "1": [0, 1], "2": [0, 1]}}, "ids below 16"),
        ({"keep": {"0": [-1, 1], "1": [0, 1], "2": [0, 1]}}, "ids below 16"),
        ({"keep": {"0": ["0"], "1": [0, 1], "2": [0, 1]}}, "not a list of expert ids"),
        ({"keep": {"0": [], "1": [0, 1], "2": [0, 1]}}, "at least one"),
        ({"keep": [0, 1]}, "not a mapping"),
        ({"keep": {"0": [0, 1, 2], "1": [0, 1], "2": [0, 1]}}, "has one count for all layers"),
        ({"keep": {"0": [0], "1": [0], "2": [0]}}, "2 experts a token of 1 that stay"),
        ({"policy": "cut"}, "choose one of slice"),
        ({"mtp": "strip"}, "no layer for multi-token prediction"),
        ({"num_groups": 2}, "num_groups 2"),
        ({"num_experts": 12}, "num_experts is 12, the model's 16"),
        ({"kepe": {}}, "no field kepe"),
        ({"top_k": 1.5}, "not a whole number"),
        ({"criterion": "best"}, "unknown criterion"),
        ({"model": 5}, "model is 5, not an object"),
        ({"model": {}}, "model_type is None"),
        ({"domains": ["code"]}, "not an object"),
        ({"domains": {"code": "much"}}, "a number above 0"),
        ({"kept_mass": 5}, "kept_mass is 5"),
        ({"notes": "all well"}, "not a list of sentences"),
    ],
)
def test_what_cannot_be_is_refused_on_reading(tmp_path, statistics, change, says):
    file = tmp_path / "plan.json"
    make_plan(statistics, keep=4).save(file)
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | change))
    with pytest.raises(ValueError, match=says):
        Plan.load(file)


def test_other_files_are_refused(tmp_path, statistics):
    with pytest.raises(FileNotFoundError, match="make a plan first"):
        Plan.load(tmp_path / "none.json")
    with pytest.raises(ValueError, match="is a folder"):
        Plan.load(tmp_path)
    statistics.save(tmp_path / "stats")
    with pytest.raises(ValueError, match="it is no JSON"):
        Plan.load(tmp_path / "stats")
    (tmp_path / "half.json").write_text('{"format": 1, "kind": "gatewright pruning plan"}')
    with pytest.raises(ValueError, match="not a whole plan"):
        Plan.load(tmp_path / "half.json")


def test_equal_groups_are_checked_on_reading(tmp_path):
    file = tmp_path / "plan.json"
    make_plan(made_up_statistics(**GROUPED), keep=8).save(file)
    content = json.loads(file.read_text())
    content["keep"]["1"] = list(range(8))
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"layer 1 keeps \[4, 4, 0, 0\] experts of its groups"):
        Plan.load(file)


def test_summary_says_what_matters(statistics):
    text = make_plan(statistics, keep=0.5, domains={"code": 3, "prose": 1}).summary()
    for part in (
        "keeps 8 of 16 experts in each of 3 MoE layers",
        "easy-ep on code 75%, prose 25%",
        "kept score mass",
        "stability",
    ):
        assert part in text
