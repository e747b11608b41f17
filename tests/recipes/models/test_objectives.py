"""Flow and ddpm: the formulas, random numbers that no layout changes, guidance, validation and sampling."""

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from gatewright.recipes.data.draw import Draw
from gatewright.recipes.models.ddpm import DDPM, STEPS, Schedule, log_likelihood
from gatewright.recipes.models.diffusion import create_objective, draw_samples, validation_loss
from gatewright.recipes.models.dit import DiT
from gatewright.recipes.models.dit_config import dit_config
from gatewright.recipes.models.flow import Flow

CONFIG = dit_config("tiny", "promoe", input_shape=(1, 8, 8), dim=32, depth=2, num_classes=3)


class Answer(torch.nn.Module):
    """A model that answers what a function of (x, t, labels) says, and remembers what it was asked."""

    def __init__(self, answer):
        super().__init__()
        self.answer, self.asked = answer, []
        self.anchor = torch.nn.Parameter(torch.zeros(()))

    def forward(self, x, t, labels, **key):
        self.asked.append((x, t, labels, key))
        return self.answer(x, t, labels), []


def both_halves(value):
    return torch.cat([value, torch.zeros_like(value)], dim=1)


def zeros(x, t, labels):
    return both_halves(torch.zeros_like(x))


def images(count, shape=(1, 8, 8)):
    return Draw(1, 0, tuple(range(count))).normal("image", shape).double().clamp(-1, 1), torch.arange(count) % 3


@pytest.mark.parametrize("name", ["flow", "ddpm"])
def test_no_layout_changes_what_a_sample_is_asked(name):
    """Eight samples in one batch, and as two ranks with two micro-batches each."""
    x0, labels = images(8)
    objective, asked = create_objective(name, dit_config("tiny", "promoe", label_dropout=0.5)), []
    for pieces in (1, 4):
        model = Answer(zeros)
        for part in torch.arange(8).chunk(pieces):
            objective.loss(model, x0[part], labels[part], Draw(3, 5, tuple(part.tolist())))
        asked.append([torch.cat([call[i] for call in model.asked]) for i in range(3)])
        assert all(call[3]["seed"] == 3 and call[3]["step"] == 5 for call in model.asked)
        asked[-1].append(torch.cat([call[3]["sample_id"] for call in model.asked]))
    for whole, in_parts in zip(*asked, strict=True):
        assert torch.equal(whole, in_parts)
    assert 0 < (asked[0][2] == 10).sum() < 8


@pytest.mark.parametrize("name", ["flow", "ddpm"])
def test_steps_and_seeds_differ(name):
    x0, labels = images(4)
    model, objective = Answer(zeros), create_objective(name, CONFIG)
    for seed, step in ((0, 0), (0, 1), (1, 0)):
        objective.loss(model, x0, labels, Draw(seed, step, (0, 1, 2, 3)))
    first, *others = [call[0] for call in model.asked]
    assert not any(torch.allclose(first, other) for other in others)


def test_label_dropout_hides_its_share():
    objective = Flow(CONFIG)
    draw = Draw(0, 0, tuple(range(4000)))
    labels = objective.drop_labels(torch.zeros(4000, dtype=torch.int64), draw)
    assert (labels == 3).double().mean().item() == pytest.approx(0.1, abs=0.02)
    assert set(labels.tolist()) == {0, 3}


def test_flow_scores_a_zero_predictor_by_the_velocity():
    x0, labels = images(64)
    model, draw = Answer(zeros), Draw(0, 0, tuple(range(64)))
    result = Flow(CONFIG).loss(model, x0, labels, draw)
    noise = draw.normal("noise", (1, 8, 8)).double()
    torch.testing.assert_close(result.loss, (noise - x0).square().mean())
    assert result.loss.item() == pytest.approx(1 + x0.square().mean().item(), rel=0.05)


def test_flow_asks_on_the_line_and_scores_the_right_answer_zero():
    x0, labels = images(5)
    draw = Draw(0, 0, tuple(range(5)))
    noise = draw.normal("noise", (1, 8, 8)).double()
    model = Answer(lambda x, t, labels: both_halves(noise - x0))
    result = Flow(CONFIG).loss(model, x0, labels, draw)
    assert result.loss == 0 and result.parts == {} and result.total == 0
    x, t, _, _ = model.asked[0]
    s = (t / 1000)[:, None, None, None]
    torch.testing.assert_close(x, (1 - s) * x0 + s * noise)


def test_flow_times_are_logit_normal():
    draw = Draw(0, 0, tuple(range(2000)))
    model = Answer(zeros)
    Flow(CONFIG).loss(model, torch.zeros(2000, 1, 1, 1), torch.zeros(2000, dtype=torch.int64), draw)
    logits = (model.asked[0][1] / 1000).logit()
    assert abs(logits.mean()) < 0.07 and abs(logits.std() - 1) < 0.05


def test_flow_goes_back_along_a_line():
    """For a single image the exact velocity is (x - x0) / s: Euler then meets it in any number of steps."""
    target = images(1)[0].float()
    model = Answer(lambda x, t, labels: both_halves((x - target) / (t / 1000)[:, None, None, None]))
    for steps in (1, 7):
        result = draw_samples(Flow(CONFIG), model, torch.tensor([0, 1]), steps=steps)
        torch.testing.assert_close(result, target.expand(2, -1, -1, -1), rtol=0, atol=1e-5)


def test_ddpm_scores_a_zero_predictor_one():
    x0, labels = images(256)
    result = DDPM(CONFIG).loss(Answer(zeros), x0, labels, Draw(0, 0, tuple(range(256))))
    assert result.parts["noise"].item() == pytest.approx(1, abs=0.03)


def test_ddpm_variance_loss_is_the_divergence_of_the_posteriors():
    objective = DDPM(CONFIG)
    x0, labels = images(3)
    t = torch.tensor([1, 400, 999])
    noise = Draw(0, 0, (0, 1, 2)).normal("noise", (1, 8, 8)).double()
    guess, v = 0.9 * noise, 0.3 * noise.sin()
    model = Answer(lambda x, t, labels: torch.cat([guess, v], dim=1))
    scored = objective.score_at(model, x0, labels, noise, t, Draw(0, 0, (0, 1, 2)))

    betas = torch.linspace(1e-4, 0.02, STEPS, dtype=torch.float64)
    abar = (1 - betas).cumprod(0)
    for row, step in enumerate(t.tolist()):
        a, before, beta = abar[step], abar[step - 1], betas[step]
        x = a.sqrt() * x0[row] + (1 - a).sqrt() * noise[row]
        least = beta * (1 - before) / (1 - a)

        def mean_from(image, x=x, a=a, before=before, beta=beta):
            return (before.sqrt() * beta * image + (1 - beta).sqrt() * (1 - before) * x) / (1 - a)

        image = (x - (1 - a).sqrt() * guess[row]) / a.sqrt()
        fraction = (v[row] + 1) / 2
        deviation = (0.5 * (fraction * beta.log() + (1 - fraction) * least.log())).exp()
        kl = kl_divergence(Normal(mean_from(x0[row]), least.sqrt()), Normal(mean_from(image), deviation))
        torch.testing.assert_close(scored.terms["variance"][row], kl.mean() / math.log(2))
        torch.testing.assert_close(scored.terms["noise"][row], (0.1 * noise[row]).square().mean())


def test_ddpm_first_step_is_a_likelihood_of_8_bit_values():
    """All 256 values together have probability 1, up to the approximation of the distribution function."""
    values = torch.linspace(-1, 1, 256, dtype=torch.float64)
    for mean, log_scale in ((0.1, -2.0), (0.99, -4.0)):
        total = log_likelihood(values, torch.tensor(mean), torch.tensor(log_scale, dtype=torch.float64)).exp().sum()
        assert total.item() == pytest.approx(1, abs=1e-6)
    objective, (x0, labels) = DDPM(CONFIG), images(2)
    scored = objective.score_at(Answer(zeros), x0, labels, x0 * 0, torch.tensor([0, 0]), Draw(0, 0, (0, 1)))
    assert scored.terms["variance"].isfinite().all() and (scored.terms["variance"] > 0).all()


def test_ddpm_variance_loss_leaves_the_mean_alone():
    out = torch.randn(4, 2, 8, 8, dtype=torch.float64, requires_grad=True)
    x0, labels = images(4)
    scored = DDPM(CONFIG).score(Answer(lambda *asked: out), x0, labels, Draw(0, 0, (0, 1, 2, 3)))
    scored.terms["variance"].sum().backward()
    assert not out.grad[:, :1].any() and out.grad[:, 1:].any()


@pytest.mark.parametrize("sampler", ["ddim", "ancestral"])
@pytest.mark.parametrize("learned", [True, False])
def test_ddpm_samplers_find_a_single_image(sampler, learned):
    """For a single image the exact noise is (x - sqrt(abar) x0) / sqrt(1 - abar)."""
    target = 0.5 * images(1)[0].float()
    objective = DDPM(CONFIG, sampler=sampler)

    def exact(x, t, labels):
        abar = objective.schedule.at("abar", t.long(), x)
        noise = (x - abar.sqrt() * target) / (1 - abar).sqrt()
        return both_halves(noise) if learned else noise

    for steps in (1, 20, 1000):
        result = draw_samples(objective, Answer(exact), torch.tensor([0, 1]), steps=steps)
        torch.testing.assert_close(result, target.expand(2, -1, -1, -1), rtol=0, atol=2e-3)


def test_respaced_schedule_keeps_abar():
    full = DDPM(CONFIG).schedule
    part = Schedule(full.abar[[9, 499, 999]])
    torch.testing.assert_close((1 - part.beta).cumprod(0), full.abar[[9, 499, 999]])
    assert (full.beta.log() >= full.log_least).all() or full.log_least[0] <= full.beta[1].log()


@pytest.mark.parametrize("name", ["flow", "ddpm"])
def test_guidance_acts_on_every_channel(name):
    def by_label(x, t, labels):
        return (labels.to(x)[:, None, None, None] * torch.arange(1, 9)[:, None, None]).expand(-1, -1, 8, 8)

    model = Answer(by_label)
    guided = create_objective(name, CONFIG).guide(
        model, torch.zeros(2, 4, 8, 8), torch.ones(2), torch.tensor([0, 1]), guidance=2.5
    )
    expected = [3 + 2.5 * (label - 3) for label in (0, 1)]
    assert torch.equal(guided[:, :, 0, 0], torch.tensor(expected)[:, None] * torch.arange(1, 9))
    assert model.asked[0][2].tolist() == [0, 1, 3, 3]


@pytest.mark.parametrize("name", ["flow", "ddpm"])
def test_without_guidance_no_null_label_is_asked(name):
    model = Answer(zeros)
    draw_samples(create_objective(name, CONFIG), model, torch.tensor([0, 2]), steps=2)
    assert all(call[2].tolist() == [0, 2] for call in model.asked)


@pytest.mark.parametrize("options", [("flow", {}), ("ddpm", {}), ("ddpm", {"sampler": "ancestral"})])
def test_samples_follow_from_the_seed_and_their_place(options):
    name, options = options
    model, objective = opened(DiT(CONFIG)).train(), create_objective(name, CONFIG, **options)
    labels = torch.tensor([0, 1, 2, 3, 0])
    ask = {"guidance": 2.0, "steps": 3}
    first = draw_samples(objective, model, labels, seed=4, **ask)
    torch.manual_seed(99)
    assert torch.equal(first, draw_samples(objective, model, labels, seed=4, **ask))
    torch.testing.assert_close(
        first, draw_samples(objective, model, labels, seed=4, batch_size=2, **ask), rtol=1e-4, atol=1e-4
    )
    assert not torch.allclose(first, draw_samples(objective, model, labels, seed=5, **ask))
    assert not torch.allclose(first[0], first[4])
    assert model.training and first.shape == (5, 1, 8, 8) and first.isfinite().all()


def opened(model):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(0, 0.1, generator=generator)
    return model


@pytest.mark.parametrize("name", ["flow", "ddpm"])
def test_validation_never_changes_and_tells_null_apart(name):
    x0, labels = images(10)
    objective = create_objective(name, CONFIG)
    model = opened(DiT(CONFIG)).train()
    first = validation_loss(objective, model, x0.float(), labels, batch_size=4)
    torch.manual_seed(99)
    assert first == validation_loss(objective, model, x0.float(), labels, batch_size=4)
    assert model.training and first["conditional"] != first["null"]
    other = validation_loss(objective, model, x0.float(), labels, batch_size=3)
    assert other == pytest.approx(first, rel=1e-5)


def test_validation_of_a_zero_predictor():
    x0, labels = images(200)
    found = validation_loss(Flow(CONFIG), Answer(zeros), x0, labels, repeats=2)
    assert found["conditional"] == found["null"] == pytest.approx(1 + x0.square().mean().item(), rel=0.05)


def test_validation_over_ranks_is_that_of_one(monkeypatch):
    """Three ranks, of which the last has no image in the last round: each takes part, and each image counts once."""
    x0, labels = images(10)
    model, sums = Answer(zeros), []
    whole = validation_loss(Flow(CONFIG), model, x0, labels, repeats=1)
    monkeypatch.setattr("torch.distributed.all_reduce", lambda totals: sums.append(totals.clone()))
    calls = []
    for rank in range(3):
        model.asked.clear()
        validation_loss(Flow(CONFIG), model, x0, labels, repeats=1, batch_size=2, rank=rank, ranks=3)
        calls.append(len(model.asked))
    assert calls == [4, 4, 4]
    conditional, null = (sum(sums) / 10).tolist()
    assert {"conditional": conditional, "null": null} == pytest.approx(whole)


def test_race_predictions_are_held_against_the_target():
    config = dit_config("tiny", "race", input_shape=(1, 8, 8), dim=32, depth=4)
    x0, labels = images(4)
    model, draw = DiT(config).train(), Draw(0, 0, (0, 1, 2, 3))
    with_it = create_objective("flow", config, prediction_weight=0.5).loss(model, x0.float(), labels, draw)
    assert config.predicts_target and set(with_it.auxiliary) == {"similarity", "prediction"}
    routings = with_it.routings
    target = draw.normal("noise", (1, 8, 8)) - x0.float()
    by_hand = [
        (routing.prediction.view(4, 4, 4, 2, 2).permute(0, 1, 3, 2, 4).reshape(4, 1, 8, 8) - target).square().mean()
        for routing in routings
    ]
    torch.testing.assert_close(with_it.auxiliary["prediction"], 0.5 * sum(by_hand))
    torch.testing.assert_close(with_it.total, with_it.loss + sum(with_it.auxiliary.values()))
    without = create_objective("flow", config, prediction_weight=0).loss(model, x0.float(), labels, draw)
    assert set(without.auxiliary) == {"similarity"}


def test_contrastive_losses_add_up_over_layers():
    config = dit_config("tiny", "promoe", input_shape=(1, 8, 8), dim=32, depth=4, label_dropout=0)
    x0, labels = images(4)
    result = create_objective("flow", config).loss(DiT(config).train(), x0.float(), labels, Draw(0, 0, (0, 1, 2, 3)))
    parts = [routing.losses["routing_contrastive"] for routing in result.routings]
    torch.testing.assert_close(result.auxiliary["routing_contrastive"], parts[0] + parts[1])


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: create_objective("flwo", CONFIG), "did you mean flow"),
        (lambda: create_objective("ddpm", CONFIG, sampler="euler"), 'choose "ddim" or "ancestral"'),
        (lambda: create_objective("flow", CONFIG, prediction_weight=-1), "prediction_weight=-1"),
        (lambda: draw_samples(Flow(CONFIG), Answer(zeros), torch.tensor([4])), "classes 0 to 2, or 3 for none"),
        (lambda: draw_samples(Flow(CONFIG), Answer(zeros), torch.tensor([0]), steps=0), "steps=0"),
        (lambda: draw_samples(DDPM(CONFIG), Answer(zeros), torch.tensor([0]), steps=1001), "at most"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
