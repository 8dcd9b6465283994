"""NeMo AutoModel's `KDLoss` by another `_target_`: its numbers, whole and over ranks."""

import processes
import pytest
import torch
import torch.distributed as dist
from conftest import NAN, problem, random_like
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

theirs = pytest.importorskip(
    "nemo_automodel.components.loss.kd_loss", reason="nemo-automodel is not installed"
)

from nemo_automodel.components.config.loader import ConfigNode  # noqa: E402
from nemo_automodel.components.loss.loss import (  # noqa: E402
    LossFromFactoryConfig,
    build_loss_module,
)

from kdkernels.integrations.nemo import KDLoss  # noqa: E402

B, L, V = 2, 9, 50
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed.nn.functional:FutureWarning")


def data(dtype=torch.float32):
    student, teacher, labels = problem(B, L, V, dtype=dtype)
    labels[0, 1:4] = labels[1, 5] = -100
    return student, teacher, labels


def step(loss, student, *inputs, upstream, **options):
    student = student.detach().requires_grad_()
    value = loss(student, *inputs, **options)
    (grad,) = torch.autograd.grad(value, student, upstream)
    return value.detach(), grad


@pytest.mark.parametrize("num_batch_labels", [None, 40])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("options", [{}, dict(chunk_size=4), dict(fp32_upcast=False)], ids=str)
def test_values_and_gradients_are_theirs(options, temperature, num_batch_labels):
    options = dict(options, temperature=temperature)
    student, teacher, labels = data()
    upstream = random_like(student.sum())
    inputs = student, teacher, labels, num_batch_labels
    wanted, wanted_grad = step(theirs.KDLoss(**options), *inputs, upstream=upstream)
    value, grad = step(KDLoss(**options), *inputs, upstream=upstream)
    torch.testing.assert_close(value, wanted)
    assert (grad - wanted_grad).abs().amax() < 1e-6 * wanted_grad.abs().amax()


def test_without_the_upcast_theirs_rounds_the_tempered_logits_and_ours_does_not():
    student, teacher, labels = data(torch.bfloat16)
    exact = KDLoss(temperature=3.0)(student.double(), teacher.double(), labels)
    found = {}
    for loss in (theirs.KDLoss, KDLoss):
        value = loss(temperature=3.0, fp32_upcast=False)(student, teacher, labels)
        found[loss] = abs(value / exact - 1)
    assert found[KDLoss] < 1e-6 and found[theirs.KDLoss] > 1e-5


@pytest.mark.parametrize("chunk_size", [0, 4])
def test_what_is_kept_for_backward_is_the_gradient_alone_and_theirs_is_more(chunk_size):
    student, teacher, labels = data(torch.bfloat16)
    kept = {}
    for loss in (theirs.KDLoss, KDLoss):
        sizes = {}

        def pack(x, sizes=sizes):
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        leaf = student.clone().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            value = loss(chunk_size=chunk_size)(leaf, teacher, labels)
        kept[loss] = sum(sizes.values()) / leaf.nbytes
        assert value.requires_grad
    # In chunks they are theirs all the same: only the forward has them one by one.
    assert kept[KDLoss] < 1.1 and kept[theirs.KDLoss] > 3


def test_a_batch_whose_labels_are_all_ignored_is_0_and_has_a_gradient():
    student, teacher, labels = data()
    labels = torch.full_like(labels, 3)
    upstream = random_like(student.sum())
    for infinite in (False, True):  # a class that both models rule out
        student[..., 7] = teacher[..., 7] = -torch.inf if infinite else 0.0
        loss = KDLoss(ignore_index=3)
        value, grad = step(loss, student, teacher, labels, upstream=upstream)
        assert value == 0 and not grad.any()
        wanted = theirs.KDLoss(ignore_index=3)(student, teacher, labels)
        assert wanted.isnan() if infinite else wanted == 0  # 0 · −inf


SHAPES = {
    "flat": lambda logits, labels: (logits, labels.flatten()),
    "packed": lambda logits, labels: (logits.flatten(0, 1)[None], labels.flatten()),
    "flat logits": lambda logits, labels: (logits.flatten(0, 1), labels),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_labels_may_have_another_shape_as_theirs_may(shape):
    """Logits of packed sequences are (1, tokens, V) of some models, and their labels (tokens,)."""
    student, teacher, labels = data()
    upstream = random_like(student.sum())
    (student, labels), (teacher, _) = (SHAPES[shape](x, labels) for x in (student, teacher))
    wanted = step(theirs.KDLoss(), student, teacher, labels, upstream=upstream)
    value, grad = step(KDLoss(), student, teacher, labels, upstream=upstream)
    torch.testing.assert_close(value, wanted[0])
    assert (grad - wanted[1]).abs().amax() < 1e-5 * wanted[1].abs().amax()
    with pytest.raises(ValueError, match="labels must have shape"):
        KDLoss()(student, teacher, labels.flatten()[1:])
    with pytest.raises(TypeError, match="labels must be a tensor, got NoneType"):
        KDLoss()(student, teacher, None)


def test_labels_only_say_which_rows_count():
    """A mask is one, whatever its dtype; ids of another vocabulary are, too."""
    student, teacher, labels = data()
    value = KDLoss()(student, teacher, labels)
    assert KDLoss()(student, teacher, torch.where(labels == -100, -100, V)) == value
    for dtype in (torch.bool, torch.uint8, torch.float32):
        mask = (labels != -100).to(dtype)
        assert KDLoss(ignore_index=0)(student, teacher, mask) == value
        torch.testing.assert_close(theirs.KDLoss(ignore_index=0)(student, teacher, mask), value)


def test_ignored_rows_are_not_read():
    student, teacher, labels = data()
    value = KDLoss()(student, teacher, labels)
    student[0, 2] = teacher[0, 3] = NAN
    assert KDLoss()(student, teacher, labels) == value


def test_a_recipe_takes_it_by_its_target():
    target = "kdkernels.integrations.nemo.KDLoss"
    loss = ConfigNode({"_target_": target, "temperature": 2.0, "chunk_size": 64}).instantiate()
    assert type(loss) is KDLoss
    assert (loss.ignore_index, loss.temperature) == (-100, 2.0)  # what the recipe reads


def test_a_factory_builds_it_where_the_name_alone_builds_theirs():
    assert type(build_loss_module(KDLoss, temperature=2.0)) is theirs.KDLoss
    wrapped = LossFromFactoryConfig(factory=KDLoss, kwargs=dict(temperature=2.0))
    assert type(build_loss_module(wrapped)) is KDLoss


def test_accumulated_over_uneven_batches_it_is_one_batch():
    student, teacher, labels = data()
    count = int((labels != -100).sum())
    upstream = random_like(student.sum())
    _, wanted = step(KDLoss(), student, teacher, labels, upstream=upstream)
    pieces = zip(student, teacher, labels, strict=True)
    grads = [step(KDLoss(), *x, num_batch_labels=count, upstream=upstream)[1] for x in pieces]
    assert (torch.stack(grads) - wanted).abs().amax() < 1e-6 * wanted.abs().amax()


def test_vocabularies_of_different_sizes_are_refused():
    student, teacher, labels = data()
    with pytest.raises(ValueError, match="vocab_size"):
        KDLoss()(student, teacher[..., :-1], labels)


@pytest.fixture
def mesh(tmp_path):
    """A mesh of this process alone."""
    store = f"file://{tmp_path}/store"
    dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,), mesh_dim_names=("tp",))
    dist.destroy_process_group()


@pytest.mark.parametrize("placement", [Shard(2), Shard(1), Replicate()], ids=str)
def test_dtensors_have_their_gradients(mesh, placement):
    student, teacher, labels = data()
    upstream = random_like(student.sum())
    _, wanted = step(KDLoss(), student, teacher, labels, upstream=upstream)
    for loss in (theirs.KDLoss(), KDLoss()):
        local = [distribute_tensor(x, mesh, [placement]) for x in (student, teacher)]
        _, grad = step(loss, *local, labels, upstream=upstream)
        assert isinstance(grad, DTensor) and grad.placements == (placement,)
        assert (grad.full_tensor() - wanted).abs().amax() < 1e-6 * wanted.abs().amax()


def check_ranks():
    """Uneven columns for `tp_group`, which DTensors have not; the recipe's own chunks for them."""
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    mesh, rank = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",)), dist.get_rank()
    student, teacher, labels = data()
    upstream = random_like(student.sum())
    options = dict(temperature=2.0)
    value, grad = step(KDLoss(**options), student, teacher, labels, upstream=upstream)
    group = mesh.get_group()
    for own in (slice(None, 20), slice(20, None))[rank], (slice(None, 25), slice(25, None))[rank]:
        local = student[..., own], teacher[..., own], labels
        for loss in (theirs.KDLoss, KDLoss):
            found = step(loss(tp_group=group, **options), *local, upstream=upstream)
            torch.testing.assert_close(found[0], value)
            assert (found[1] - grad[..., own]).abs().amax() < 1e-5 * grad.abs().amax()
    whole = [distribute_tensor(x, mesh, [Shard(2)]) for x in (student, teacher)]
    for placed in (whole[1], teacher.chunk(2, dim=-1)[rank]):  # as a teacher on another mesh has it
        for loss in (theirs.KDLoss, KDLoss):
            found = step(loss(**options), whole[0], placed, labels, upstream=upstream)
            torch.testing.assert_close(found[0], value)
            assert (found[1].full_tensor() - grad).abs().amax() < 1e-5 * grad.abs().amax()
    rows = [distribute_tensor(x, mesh, [Shard(0)]) for x in (student, teacher)]
    torch.testing.assert_close(step(KDLoss(**options), *rows, labels, upstream=upstream)[0], value)
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_gloo_available(), reason="torch has no gloo")
def test_ranks_that_share_the_vocabulary_have_the_same_loss():
    processes.run("test_nemo.check_ranks()", 2)
