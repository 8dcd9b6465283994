"""Ranks of a group that do not agree: found out together, by name, and nobody waits for nobody."""

import pytest
import torch
from conftest import problem, run
from rank_threads import over_ranks, run_sharded

from kdkernels import KDLoss, LinearHead, TopK, kd_loss
from kdkernels.parallel import groups


def errors_of(size, function):
    """What function(group) raises on each rank."""

    def on_rank(group):
        with pytest.raises(Exception) as caught:
            function(group)
        return caught.value

    return over_ranks(size, on_rank)


def halves(*tensors, rank):
    return [x[..., x.shape[-1] // 2 * rank :][..., : x.shape[-1] // 2] for x in tensors]


@pytest.mark.parametrize("who", ["student", "teacher", "both"])
def test_replicas_instead_of_shards_are_refused(who):
    student, teacher, labels = problem(5, 40)

    def call(group):
        s, t = halves(student, teacher, rank=group.rank)
        s = student[:, :20] if who != "teacher" else s
        t = teacher[:, :20] if who != "student" else t
        return kd_loss(s, t, labels % 20, group=group)

    for error in errors_of(2, call):
        assert isinstance(error, ValueError)
        name = "teacher" if who == "teacher" else "student"
        assert f"{name} is the same on every rank" in str(error) and "vocab_size=40" in str(error)


def test_a_replicated_vocabulary_size_makes_no_shards_of_replicas():
    student, teacher, labels = problem(5, 20)

    def call(group):
        return kd_loss(student, teacher, labels, group=group, vocab_size=20)

    for error in errors_of(2, call):
        assert "as if it were replicated" in str(error)


def test_a_replicated_head_is_refused():
    hidden, weight = torch.randn(5, 6), torch.randn(20, 6)
    _, teacher, labels = problem(5, 40)

    def call(group):
        (t,) = halves(teacher, rank=group.rank)
        return kd_loss(LinearHead(hidden, weight), t, labels, group=group)

    for error in errors_of(2, call):
        assert "student.weight is the same on every rank" in str(error)


def test_shards_that_are_meant_to_be_equal_are_taken():
    """P13: twice the classes, the same KL, and a cross-entropy that is greater by log 2."""
    student, teacher, labels = problem(5, 20)
    once, _ = run(student, teacher, labels, alpha=0.0)
    doubled = [torch.cat([x, x], 1) for x in (student, teacher)]
    twice, _ = run_sharded(*doubled, labels, [20, 20], alpha=0.0, vocab_size=40)
    torch.testing.assert_close(twice - once, torch.tensor(2.0).log(), rtol=1e-5, atol=0.0)


def test_shards_that_nothing_tells_apart_are_taken():
    """A head of zeros, as some begin with."""
    _, teacher, labels = problem(5, 40)
    loss, _ = run_sharded(torch.zeros(5, 40), teacher, labels, [20, 20], alpha=0.0)
    torch.testing.assert_close(loss, torch.tensor(40.0).log(), rtol=1e-6, atol=0.0)


def test_shards_of_another_size_than_in_the_call_before():
    """The ranks take the layout to be that of the call before, and some cannot know better."""
    cases = ([5, 4], [5, 6], [5, 4], [3, 6], [5, 5, 5][:2])
    problems = [problem(4, sum(splits)) for splits in cases]

    def on_rank(group):
        losses = []
        for splits, (student, teacher, labels) in zip(cases, problems, strict=True):
            own = slice(0, splits[0]) if group.rank == 0 else slice(splits[0], None)
            losses.append(kd_loss(student[:, own], teacher[:, own], labels, group=group))
        return torch.stack(losses)

    first, second = over_ranks(2, on_rank)
    assert torch.equal(first, second)
    alone = torch.stack([kd_loss(*x) for x in problems])
    torch.testing.assert_close(first, alone, rtol=2e-6, atol=0.0)


def test_heads_of_another_size_than_in_the_call_before():
    cases, labels = ([5, 4], [5, 6], [3, 6]), torch.arange(8)
    problems = [
        (torch.randn(8, 3), torch.randn(sum(splits), 3), torch.randn(8, sum(splits)))
        for splits in cases
    ]

    def on_rank(group):
        losses = []
        for splits, (hidden, weight, teacher) in zip(cases, problems, strict=True):
            own = slice(0, splits[0]) if group.rank == 0 else slice(splits[0], None)
            head = LinearHead(hidden, weight[own], chunk_rows=3)
            alone = kd_loss(LinearHead(hidden, weight), teacher, labels)
            losses.append(kd_loss(head, teacher[:, own], labels, group=group) / alone)
        return torch.stack(losses)

    for ratio in over_ranks(2, on_rank):
        torch.testing.assert_close(ratio, torch.ones(3), rtol=2e-6, atol=0.0)


@pytest.mark.parametrize(
    "name", ["labels", "token_weights", "num_items", "the options of kd_loss", "teacher.ids"]
)
def test_what_differs_between_ranks_is_named(name):
    student, teacher, labels = problem(5, 40)
    ids = torch.arange(3).expand(5, 3)

    def call(group):
        (s,) = halves(student, rank=group.rank)
        off = group.rank
        options = dict(
            token_weights=torch.ones(5) + off * (name == "token_weights"),
            num_items=5 + off * (name == "num_items"),
            alpha=0.5 + off * (name == "the options of kd_loss") / 4,
        )
        teacher = TopK(ids + off * (name == "teacher.ids"), torch.full((5, 3), -3.0))
        own_labels = (labels + off * (name == "labels")) % 40
        return kd_loss(s, teacher, own_labels, group=group, **options)

    for error in errors_of(2, call):
        assert isinstance(error, ValueError)
        assert str(error).startswith(f"{name} must be the same on every rank of group")
        assert "ranks 0 and 1" in str(error)


def test_hidden_states_that_are_not_all_there_are_named():
    weight, teacher = torch.randn(40, 6), torch.randn(5, 40)

    def call(group):
        w, t = weight[20 * group.rank :][:20], teacher[:, 20 * group.rank :][:, :20]
        return kd_loss(LinearHead(torch.full((5, 6), 1.0 + group.rank), w), t, group=group)

    for error in errors_of(2, call):
        assert "student.hidden must be the same on every rank" in str(error)


def test_teachers_columns_are_the_students():
    student, teacher, labels = problem(5, 40)

    def call(group):
        s, t = (student[:, :20], teacher[:, :18]), (student[:, 20:], teacher[:, 18:])
        return kd_loss(*(s, t)[group.rank], labels, group=group, vocab_size=36)

    for error in errors_of(2, call):
        assert "teacher must have the columns that the student has" in str(error)
        assert "[18, 22]" in str(error) and "[20, 20]" in str(error)


def test_a_label_out_of_the_whole_range_is_an_index_error_on_all():
    student, teacher, labels = problem(5, 40)
    labels[3] = 40

    def call(group):
        return kd_loss(*halves(student, teacher, rank=group.rank), labels, group=group)

    for error in errors_of(2, call):
        assert isinstance(error, IndexError) and "[0, 40)" in str(error) and "row 3" in str(error)


def test_a_vocabulary_that_is_too_large_is_refused():
    student, teacher, labels = problem(5, 40)

    def call(group):
        s, t = halves(student, teacher, rank=group.rank)
        return kd_loss(s, t, labels, group=group, vocab_size=41)

    for error in errors_of(2, call):
        assert "vocab_size must be in [1, 40]" in str(error)


def test_vocabulary_sizes_that_differ_are_an_option_that_differs():
    student, teacher, labels = problem(5, 40)

    def call(group):
        s, t = halves(student, teacher, rank=group.rank)
        return kd_loss(s, t, labels % 9, group=group, vocab_size=36 + group.rank)

    for error in errors_of(2, call):
        assert "the options of kd_loss must be the same" in str(error)


def test_ranks_that_differ_in_what_has_a_gradient():
    hidden, weight, teacher = torch.randn(5, 6), torch.randn(40, 6), torch.randn(5, 40)

    def call(group):
        w, t = weight[20 * group.rank :][:20], teacher[:, 20 * group.rank :][:, :20]
        x = hidden.clone().requires_grad_(group.rank == 0)
        return kd_loss(LinearHead(x, w), t, group=group)

    for error in errors_of(2, call):
        assert "the options of kd_loss must be the same" in str(error)


def test_no_rank_has_a_column():
    def call(group):
        return kd_loss(torch.zeros(3, 0), torch.zeros(3, 0), group=group)

    for error in errors_of(2, call):
        assert "at least one class" in str(error)


def test_a_teacher_of_weight_0_is_not_looked_at():
    student, teacher, labels = problem(5, 40)

    def on_rank(group):
        (s,) = halves(student, rank=group.rank)
        return kd_loss(s, teacher[:, :20], labels, group=group, alpha=0.0)

    first, _ = over_ranks(2, on_rank)
    torch.testing.assert_close(
        first, kd_loss(student, teacher, labels, alpha=0.0), rtol=2e-6, atol=0.0
    )


def test_a_checksum_sees_every_bit_and_the_order():
    x = torch.randn(3000)
    x[5] = -torch.inf
    others = [x.clone() for _ in range(3)]
    others[0][[7, 1028]] = x[[1028, 7]]
    others[1][9] += 1e-6
    others[2][5] = torch.nan
    sums = [groups.checksum(y).item() for y in (x, *others)]
    assert len(set(sums)) == 4 and groups.checksum(x.clone()).item() == sums[0]
    assert all(y == int(y) and 0 <= y < 2**53 for y in sums)


def test_an_error_of_one_rank_is_an_error_of_all(monkeypatch):
    """A sparse teacher that only one rank cannot read."""
    student, _, labels = problem(5, 40)

    def call(group):
        (s,) = halves(student, rank=group.rank)
        ids = torch.tensor([[1, 2], [3, 4], [5, 6], [7, 8], [9, 9 if group.rank else 10]])
        # The same to a checksum: only rank 1 has a duplicate.
        monkeypatch.setattr(groups, "checksum", lambda x: torch.zeros((), dtype=torch.float64))
        return kd_loss(s, TopK(ids, torch.full((5, 2), -3.0)), labels, group=group)

    first, second = errors_of(2, call)
    assert isinstance(first, RuntimeError) and "rank 1 of group could not go on" in str(first)
    assert isinstance(second, ValueError) and "ids must differ" in str(second)


@pytest.mark.parametrize("group", ["world", 3, [0, 1]], ids=str)
def test_what_is_no_group(group):
    student, teacher, labels = problem(5, 4)
    with pytest.raises(TypeError, match="group must be a torch.distributed.ProcessGroup, got"):
        kd_loss(student, teacher, labels, group=group)


def test_a_group_of_one_rank_is_no_group_and_the_module_takes_one():
    student, teacher, labels = problem(5, 9)

    def on_rank(group):
        criterion = KDLoss(temperature=2.0, group=group)
        return criterion(student, teacher, labels)

    (loss,) = over_ranks(1, on_rank)
    assert torch.equal(loss, kd_loss(student, teacher, labels, temperature=2.0))


def test_no_rows_take_no_message():
    def on_rank(group):
        student = torch.zeros(0, 5, requires_grad=True)
        loss = kd_loss(student, torch.zeros(0, 5), torch.zeros(0, dtype=torch.int64), group=group)
        loss.backward()
        return loss, student.grad, group.shared.messages

    for loss, grad, messages in over_ranks(2, on_rank):
        assert loss == 0 and grad.shape == (0, 5) and not messages


def test_a_compiled_call_says_that_it_cannot(monkeypatch):
    student, teacher, labels = problem(5, 4)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with pytest.raises(RuntimeError, match="cannot be compiled"):
        over_ranks(2, lambda group: kd_loss(student, teacher, labels, group=group))


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_the_first_two_calls_alone_make_tensors_of_numbers(monkeypatch, divergence):
    """On a GPU each is a copy that the host waits for, and that no CUDA graph can hold."""
    student, teacher, labels = (x.view(2, 3, -1).squeeze(-1) for x in problem(6, 40))
    weight, hidden = torch.randn(40, 4), torch.randn(2, 3, 4)
    make, made = torch.tensor, []

    def on_rank(group):
        s, t = halves(student, teacher, rank=group.rank)
        head = LinearHead(hidden, weight[20 * group.rank :][:20])
        for _ in range(3):
            made.clear()
            for prediction in (s, head):
                kd_loss(prediction, t, labels, group=group, divergence=divergence)
        return list(made)

    monkeypatch.setattr(torch, "tensor", lambda *x, **more: made.append(x) or make(*x, **more))
    monkeypatch.setattr(groups, "waits_for", lambda device: False)
    groups.constants.cache_clear()
    assert over_ranks(2, on_rank)[1] == []


def test_on_other_devices_only_the_first_call_looks(monkeypatch):
    """There what the ranks do not agree on any more makes the row NaN, without waiting."""
    student, teacher, labels = problem(5, 40)
    looks = []
    look = groups.Group._look
    monkeypatch.setattr(groups, "waits_for", lambda device: False)
    monkeypatch.setattr(
        groups.Group, "_look", lambda self, *x: (looks.append(self.rank), look(self, *x))
    )

    student[0], labels[0] = torch.nan, -100  # whatever an ignored row holds

    def on_rank(group):
        s, t = halves(student, teacher, rank=group.rank)
        first, again = (kd_loss(s, t, labels, group=group) for _ in range(2))
        off = kd_loss(s, t, (labels + group.rank) % 40, group=group)
        replicas = kd_loss(student[:, :20], t, labels, group=group)
        elsewhere = kd_loss(s, teacher[:, : 20 + 2 * group.rank], labels, group=group)
        return first, again, off, replicas, elsewhere

    for first, again, *wrong in over_ranks(2, on_rank):
        assert torch.equal(first, again) and first.isfinite()
        assert all(x.isnan() for x in wrong)
    assert sorted(looks) == [0, 1]

    def grown(group):
        s, t = halves(student, teacher, rank=group.rank)
        kd_loss(s, t, labels, group=group)
        own = slice(0, 20) if group.rank == 0 else slice(20, 36)
        return kd_loss(student[:, own], teacher[:, own], labels % 36, group=group)

    with pytest.raises(ValueError, match="as many columns on each rank of group as in the first"):
        over_ranks(2, grown)
