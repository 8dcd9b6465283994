"""Specialists: the clusters, their data, and what they say together, against other optimisers."""

import itertools
import math

import pytest
import torch

from kdkernels.distill.specialists import (
    combine,
    confusable_classes,
    specialist_labels,
    specialist_rows,
)

optimize = pytest.importorskip("scipy.optimize", reason="the extra `train` is not installed")

N, V = 40, 7


def draw(*shape, seed=0, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)


def ids(*classes):
    return torch.tensor(classes)


def restricted(q, classes):
    """log q (N, V) -> log q_m (N, S + 1): the classes of a specialist, and the sum of the rest."""
    others = [k for k in range(q.shape[-1]) if k not in classes.tolist()]
    return torch.cat([q[:, classes], q[:, others].logsumexp(-1, keepdim=True)], -1)


def kl(log_p, log_q):
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def objective(q, generalist, specialists, active=1):
    """Equation 5 as it is written, for log q (N, V) -> (N,)."""
    p = generalist.log_softmax(-1)
    top = p.topk(active).indices
    total = kl(p, q)
    for classes, answer in specialists:
        called = torch.tensor([bool(set(k) & set(classes.tolist())) for k in top.tolist()])
        total = total + called * kl(answer.log_softmax(-1), restricted(q, classes))
    return total


def three_specialists():
    return [
        (ids(0, 1, 2), draw(N, 4, seed=1)),
        (ids(2, 5), draw(N, 3, seed=2)),
        (ids(3, 4, 5, 6), draw(N, 5, seed=3)),
    ]


def test_the_generalist_alone():
    generalist = draw(N, V)
    expected = generalist.log_softmax(-1)
    torch.testing.assert_close(combine(generalist, []), expected, rtol=1e-13, atol=0)


def test_a_specialist_that_nobody_calls_says_nothing():
    generalist = draw(N, V)
    generalist[:, 6] += 100
    specialist = (ids(0, 1), draw(N, 3, seed=1))
    expected = generalist.log_softmax(-1)
    torch.testing.assert_close(combine(generalist, [specialist]), expected, rtol=1e-12, atol=0)
    assert not torch.allclose(combine(generalist, [specialist], active=V), expected)


def test_a_specialist_that_agrees_changes_nothing():
    generalist = draw(N, V)
    p = generalist.log_softmax(-1)
    specialists = [(each, restricted(p, each)) for each in (ids(0, 3), ids(1, 2, 4))]
    found = combine(generalist, specialists, active=V)
    torch.testing.assert_close(found, p, rtol=1e-12, atol=0)


def test_one_specialist_in_closed_form():
    """q is the mean on its classes; the others share the mean of their sums as the generalist
    has them."""
    generalist, answer, classes = draw(N, V), draw(N, 4, seed=1), ids(1, 2, 5)
    p, mine = generalist.softmax(-1), answer.softmax(-1)
    others = [0, 3, 4, 6]
    expected = torch.empty_like(p)
    expected[:, classes] = (p[:, classes] + mine[:, :3]) / 2
    share = p[:, others] / p[:, others].sum(-1, keepdim=True)
    expected[:, others] = share * (p[:, others].sum(-1, keepdim=True) + mine[:, 3:]) / 2
    found = combine(generalist, [(classes, answer)], active=V)
    torch.testing.assert_close(found, expected.log(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("active", (1, 2, V))
def test_it_is_what_another_optimiser_finds(active):
    """Quasi-Newton steps on the logits of q, an example at a time."""
    generalist, specialists = draw(N, V), three_specialists()
    found = combine(generalist, specialists, active)
    for row in range(0, N, 4):
        one = slice(row, row + 1)
        some = [(classes, answer[one]) for classes, answer in specialists]

        def of(z, one=one, some=some):
            z = torch.from_numpy(z).requires_grad_()
            value = objective(z[None].log_softmax(-1), generalist[one], some, active).sum()
            return value.item(), torch.autograd.grad(value, z)[0].numpy()

        result = optimize.minimize(of, generalist[row].numpy(), jac=True, method="BFGS", tol=1e-9)
        expected = torch.from_numpy(result.x).softmax(-1)
        torch.testing.assert_close(found[row].exp(), expected, rtol=1e-6, atol=0)


def test_no_perturbation_is_better():
    generalist, specialists = draw(N, V), three_specialists()
    found = combine(generalist, specialists, active=2)
    torch.testing.assert_close(found.exp().sum(-1), torch.ones(N, dtype=torch.float64))
    least = objective(found, generalist, specialists, active=2)
    for seed, scale in itertools.product(range(20), (1.0, 0.1, 0.01)):
        other = (found + draw(N, V, seed=seed, scale=scale)).log_softmax(-1)
        assert (objective(other, generalist, specialists, active=2) > least).all()


def test_certain_models_stay_finite():
    generalist, answer = 1e4 * torch.eye(V)[:3], 1e4 * torch.eye(3)[[1, 0, 2]]
    found = combine(generalist, [(ids(0, 1), answer)])
    assert found.dtype == torch.float32 and found.isfinite().all()
    # 0 or 1? Each has a say.
    torch.testing.assert_close(found[0].exp()[:2], torch.tensor([0.5, 0.5]))


def test_wrong_specialists_are_refused():
    generalist = draw(N, V)
    for classes, shape in ((ids(0, 1), (N, 2)), (torch.arange(V), (N, V + 1)), (ids(1), (1, 2))):
        with pytest.raises(ValueError, match="specialists must be class ids"):
            combine(generalist, [(classes, draw(*shape))])
    with pytest.raises(ValueError, match=r"active must be in \[1, 7\], got 8"):
        combine(generalist, [], active=8)


def test_classes_that_are_confused_are_together():
    """A generalist that is sure of the pair, and not which of the two."""
    pair = torch.arange(300) % 3
    logits = draw(300, 6, scale=1.0)
    logits[torch.arange(300), pair] += 8
    logits[torch.arange(300), pair + 3] += 8
    for seed in range(5):
        found = confusable_classes(logits, 3, seed)
        assert sorted(each.tolist() for each in found) == [[0, 3], [1, 4], [2, 5]]


def test_every_class_is_in_one_cluster():
    for clusters in (2, 4, V):
        found = confusable_classes(draw(N, V), clusters)
        assert len(found) <= clusters and all(len(each) for each in found)
        assert torch.cat(found).sort().values.tolist() == list(range(V))
    with pytest.raises(ValueError, match=r"clusters must be in \[2, 7\]"):
        confusable_classes(draw(N, V), 1)


def test_labels_of_a_specialist():
    labels = ids(3, 0, 5, 4, 3, 6)
    assert specialist_labels(labels, ids(3, 5)).tolist() == [0, 2, 1, 2, 0, 2]


def test_half_of_a_specialists_examples_are_others():
    labels = torch.arange(100) % 10
    rows, correction = specialist_rows(labels, ids(2, 7), torch.Generator().manual_seed(0))
    chosen = labels[rows]
    assert len(rows) == len(rows.unique()) == 40
    assert (torch.isin(chosen, ids(2, 7))).sum() == 20
    assert correction == pytest.approx(math.log(80 / 20))


def test_the_correction_makes_a_biased_posterior_right():
    """A specialist that knows only how many there are of each says what is true of all data."""
    labels = torch.arange(100) % 10
    rows, correction = specialist_rows(labels, ids(2, 7), torch.Generator().manual_seed(0))
    counts = specialist_labels(labels[rows], ids(2, 7)).bincount().double()
    logits = counts.log() + torch.tensor([0, 0, correction])
    torch.testing.assert_close(logits.softmax(-1), torch.tensor([0.1, 0.1, 0.8]).double())


def test_where_the_others_are_fewer_all_of_them_are_taken():
    labels = torch.arange(100) % 10
    rows, correction = specialist_rows(labels, torch.arange(8), torch.Generator())
    assert sorted(rows.tolist()) == list(range(100)) and correction == 0
