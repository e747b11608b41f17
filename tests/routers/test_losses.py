"""The auxiliary losses at values that are known in closed form."""

import math

import pytest
import torch
import torch.nn.functional as F

from gatewright.routers.losses import balance_loss, contrastive_loss, similarity_loss, z_loss

D64 = torch.float64


def test_balance_is_1_at_balance_and_e_at_collapse():
    scores = torch.full((8, 4), 0.25, dtype=D64)
    assert balance_loss(scores, torch.full((4,), 2)) == 1
    collapsed = torch.eye(4, dtype=D64)[:1].expand(8, 4)
    assert balance_loss(collapsed, torch.tensor([8, 0, 0, 0])) == 4
    assert balance_loss(collapsed, torch.tensor([0, 8, 0, 0])) == 0
    assert balance_loss(scores, torch.zeros(4)) == 0


def test_balance_by_hand():
    scores = torch.tensor([[0.5, 0.5], [0.25, 0.75]], dtype=D64, requires_grad=True)
    loss = balance_loss(scores, torch.tensor([1, 3]))
    assert loss.item() == pytest.approx(2 * (0.25 * 0.375 + 0.75 * 0.625), abs=1e-15)
    loss.backward()
    assert scores.grad.tolist() == [[0.25, 0.75]] * 2  # E f_e / T
    thirds = balance_loss(scores.detach(), torch.tensor([1, 2]))
    assert thirds.item() == pytest.approx(2 * (0.375 + 2 * 0.625) / 3, abs=1e-15), "a share is no float32"


def test_z_is_the_squared_log_of_e_at_zero():
    assert z_loss(torch.zeros(5, 8, dtype=D64)).item() == pytest.approx(math.log(8) ** 2, abs=1e-14)
    logits = torch.tensor([[1.0, 2.0], [0.0, -3.0]], dtype=D64)
    by_hand = [math.log(math.e + math.e**2), math.log(1 + math.e**-3)]
    assert z_loss(logits).item() == pytest.approx(sum(v * v for v in by_hand) / 2, abs=1e-14)


def test_means_are_over_real_tokens():
    real = torch.tensor([True, False, True])
    values = torch.rand(3, 4, dtype=D64).softmax(1)
    dirty = values.masked_fill(~real[:, None], torch.nan)
    count = torch.tensor([1, 1, 0, 0])
    assert balance_loss(dirty, count, real) == balance_loss(values[real], count)
    assert z_loss(dirty, real) == z_loss(values[real])
    chosen = torch.randint(2, (3, 4)) * real[:, None]
    torch.testing.assert_close(similarity_loss(dirty, chosen, real), similarity_loss(values[real], chosen[real]))
    nobody = torch.zeros(3, dtype=torch.bool)
    assert z_loss(dirty, nobody) == balance_loss(dirty, count, nobody) == 0
    assert similarity_loss(dirty, torch.zeros(3, 4), nobody) == 0


def contrastive(prototypes, centroids, active=None, temperature=0.07):
    active = torch.ones(len(prototypes), dtype=torch.bool) if active is None else torch.tensor(active)
    return contrastive_loss(prototypes, centroids[None], active[None], temperature)


def test_contrastive_known_values():
    axes = torch.eye(2, 5, dtype=D64)
    on_their_own = contrastive(axes, 3 * axes)
    assert on_their_own.item() == pytest.approx(math.log1p(math.exp(-1 / 0.07)), rel=1e-6)
    assert on_their_own.item() == pytest.approx(6.2e-7, rel=0.01)
    assert contrastive(axes, axes.flip(0)).item() == pytest.approx(14.2857, abs=1e-4)
    parallel = torch.ones(3, 5, dtype=D64)
    assert contrastive(parallel, 2 * parallel).item() == pytest.approx(math.log(3), abs=1e-14)
    assert contrastive(axes, axes, [True, False]) == 0
    assert contrastive(axes, axes, [False, False]) == 0


def test_contrastive_gradient_in_closed_form():
    """d L / d cos(p_i, m_j) = (q_ij - delta_ij) / (N_a tau): through cosines that are parameters here."""
    generator = torch.Generator().manual_seed(0)
    prototypes = torch.randn(5, 6, generator=generator, dtype=D64, requires_grad=True)
    centroids = torch.randn(5, 6, generator=generator, dtype=D64, requires_grad=True)
    active, tau = torch.tensor([True, True, False, True, True]), 0.3
    contrastive_loss(prototypes, centroids[None], active[None], tau).backward()

    with torch.no_grad():
        p, m = F.normalize(prototypes, dim=1), F.normalize(centroids, dim=1)
        among = active.nonzero().flatten()
        q = ((p @ m.T)[among][:, among] / tau).softmax(1)
        slope = torch.zeros(5, 5, dtype=D64)
        slope[among[:, None], among] = (q - torch.eye(4, dtype=D64)) / (4 * tau)
        # d cos(p, m) / dp = (m - cos p) / |p|
        cosine = p @ m.T
        by_prototype = (slope @ m - (slope * cosine).sum(1, keepdim=True) * p) / prototypes.norm(dim=1, keepdim=True)
        by_centroid = (slope.T @ p - (slope * cosine).sum(0)[:, None] * m) / centroids.norm(dim=1, keepdim=True)
    torch.testing.assert_close(prototypes.grad, by_prototype, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(centroids.grad, by_centroid, rtol=1e-12, atol=1e-13)
    assert (prototypes.grad[2] == 0).all() and (centroids.grad[2] == 0).all()


def test_contrastive_is_the_mean_of_cross_entropies_over_groups():
    generator = torch.Generator().manual_seed(1)
    prototypes = torch.randn(4, 6, generator=generator, dtype=D64)
    centroids = torch.randn(3, 4, 6, generator=generator, dtype=D64)
    active = torch.tensor([[True] * 4, [True, False, True, True], [False] * 4])
    terms = []
    for g in range(3):
        among = active[g].nonzero().flatten()
        cosine = F.cosine_similarity(prototypes[among][:, None], centroids[g][among][None], dim=-1)
        if len(among):
            terms.append(F.cross_entropy(cosine / 0.07, torch.arange(len(among)), reduction="none"))
    expected = torch.cat(terms).mean()
    torch.testing.assert_close(contrastive_loss(prototypes, centroids, active, 0.07), expected, rtol=1e-12, atol=0)


def test_similarity_against_the_loops():
    generator = torch.Generator().manual_seed(2)
    probabilities = torch.randn(7, 3, generator=generator, dtype=D64).softmax(1).requires_grad_()
    chosen = torch.randint(2, (7, 3), generator=generator)
    together, alike = chosen.double().T @ chosen.double(), probabilities.T @ probabilities
    own = sum(together[a, a] for a in range(3))
    other = sum(together[a, b] for a in range(3) for b in range(3) if a != b)
    expected = 0
    for i in range(3):
        for j in range(3):
            weight = 3 * together[i, j] / own if i == j else (9 - 3) * together[i, j] / other
            expected = expected + weight * alike[i, j] / 7
    torch.testing.assert_close(similarity_loss(probabilities, chosen), expected, rtol=1e-13, atol=0)


def test_similarity_at_known_values():
    # nobody shares a token, everyone has as many: the diagonal is E/E each, and P' of one-hot rows is T/E
    one_hot = torch.eye(4, dtype=D64).repeat(2, 1)
    assert similarity_loss(one_hot, one_hot).item() == pytest.approx(1, abs=1e-14)
    uniform = torch.full((8, 4), 0.25, dtype=D64)
    assert similarity_loss(uniform, one_hot).item() == pytest.approx(4 / 16, abs=1e-14)
    assert similarity_loss(uniform, torch.ones(8, 4)).item() == pytest.approx((4 + 12) / 16, abs=1e-14)
