"""A cache as a teacher: it teaches what the model does, and other caches are refused."""

import pickle

import pytest
import torch
from conftest import assert_trained_alike
from torch import nn
from torch.utils.data import Dataset

import kdkernels as kdk
from kdkernels import KDLoss, TopK, cache
from kdkernels.distill import (
    CachedTeacher,
    Checkpoints,
    Distiller,
    FeatureHint,
    SeveralTeachers,
    validate,
    write_cache,
)
from kdkernels.distill.validation import compare

pytest.importorskip("zstandard", reason="the extra `cache` is not installed")
pytest.importorskip("safetensors", reason="the extra `train` is not installed")

N, L, H, V = 24, 6, 8, 40


class Model(nn.Module):
    """Token ids (B, L) -> logits (B, L, V)."""

    def __init__(self, seed=0, width=H):
        super().__init__()
        torch.manual_seed(seed)
        self.embedding, self.head = nn.Embedding(V, width), nn.Linear(width, V)

    def forward(self, input_ids, attention_mask=None):
        return self.head(self.embedding(input_ids))


class Headed(Model):
    def forward(self, input_ids, attention_mask=None):
        return kdk.LinearHead(self.embedding(input_ids), self.head.weight, self.head.bias)


class Texts(Dataset):
    """Dicts of ids, labels and, of half of the rows, padding."""

    def __init__(self, ids, padded):
        self.ids, self.padded = ids, padded

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, row):
        labels, mask = self.ids[row].roll(-1), torch.ones(L, dtype=torch.int64)
        if self.padded and row % 2:
            labels[-2:], mask[-2:] = -100, 0
        found = {"input_ids": self.ids[row], "labels": labels}
        return {**found, "attention_mask": mask} if self.padded else found


IDS = torch.randint(V, (N, L), generator=torch.Generator().manual_seed(1))


def trained(teacher, inputs=IDS, labels=None, steps=6, **options):
    """-> the student's weights"""
    given = dict(loss=KDLoss(alpha=0.7), batch_size=5, seed=3)
    student = Model(seed=2)
    Distiller(student, teacher, inputs, labels, **{**given, **options}).train(steps)
    return torch.cat([x.detach().flatten() for x in student.parameters()])


BEFORE = torch.cat([x.detach().flatten() for x in Model(seed=2).parameters()])


@pytest.mark.parametrize(
    ("kind", "online"),
    [("dense:fp32", Model), ("hidden:fp32", Headed), (f"topk:{V}", Model)],
    ids=("dense", "hidden", "topk"),
)
@pytest.mark.parametrize("inputs", ("tensor", "dicts", "padded"))
def test_a_student_of_a_cache_is_one_of_the_teacher(tmp_path, kind, online, inputs):
    """However the examples come, and in whatever order."""
    data = IDS if inputs == "tensor" else Texts(IDS, inputs == "padded")
    labels = IDS.roll(-1, 1) if inputs == "tensor" else None
    stored = write_cache(tmp_path, online(1), data, kind, batch_size=3)
    options = dict(inputs=data, labels=labels, accumulate=2)
    live, read = trained(online(1), **options), trained(stored, **options)
    # The most probable classes are rounded.
    assert_trained_alike(live, read, BEFORE, 3e-2 if kind.startswith("topk") else 1e-4)
    assert not torch.equal(read, BEFORE)


def test_tails_and_samples(tmp_path):
    """The losses are those of the source that is read."""
    model = Model(1)
    for kind, tail in (("topk:4", "bucket"), ("topk:4", "renormalize"), ("sampled:9", None)):
        path = tmp_path / kind.partition(":")[0]
        write_cache(path, model, IDS, kind)
        found = cache.open(path, tail=tail)

        class Reads(nn.Module):
            def forward(self, ids, found=found):
                return found[ids]

        assert torch.equal(trained(found), trained(Reads()))
        assert not isinstance(found[IDS], TopK) or found[IDS].tail == tail


def test_several_caches_and_a_model(tmp_path):
    kinds = "dense:fp32", "hidden:fp32"
    models = Model(1), Headed(4)
    caches = [
        write_cache(tmp_path / str(k), model, IDS, kind)
        for k, (model, kind) in enumerate(zip(models, kinds, strict=True))
    ]
    live = trained(SeveralTeachers([*models, Model(5)]))
    read = trained(SeveralTeachers([*caches, Model(5)]))
    assert_trained_alike(live, read, BEFORE, 1e-4)


def test_a_copy_of_a_cache_and_examples_of_a_worker(tmp_path):
    stored = write_cache(tmp_path, Model(1), IDS, "dense:fp32")
    again = pickle.loads(pickle.dumps(stored))
    data = Texts(IDS, False)
    assert torch.equal(trained(stored, data), trained(again, data, workers=1))


def test_what_is_not_there_is_named(tmp_path):
    stored = write_cache(tmp_path, Model(1), IDS[:20], "topk:4")
    with pytest.raises(cache.CacheMissError):
        trained(stored, steps=10)
    trained(stored, IDS[:20], steps=10)
    # Padding that is no padding to the cache.
    with pytest.raises(cache.CacheMissError):
        trained(stored, Texts(IDS[:20], True))


def test_inputs_that_a_cache_cannot_find(tmp_path):
    stored = write_cache(tmp_path, Model(1), IDS, "topk:4")
    with pytest.raises(TypeError, match="must be token ids, or have input_ids, got torch.float32"):
        trained(stored, IDS.float())
    with pytest.raises(TypeError, match="must be token ids, or have input_ids, got dict"):
        stored_of(stored, {"pixel_values": IDS.float()})
    with pytest.raises(ValueError, match="temperature must be 1 with TopK"):
        trained(stored, loss=KDLoss(temperature=2.0))
    images = torch.randn(N, 3)
    of_images = write_cache(tmp_path / "images", nn.Linear(3, 4), images, "dense:fp32")
    with pytest.raises(TypeError, match="this cached teacher must be a tensor, got dict"):
        stored_of(of_images, {"pixel_values": images})


def stored_of(found, inputs):
    return CachedTeacher(found)(kdk.distill.batches.Batch(torch.arange(N), inputs, None))


def test_images(tmp_path):
    images = torch.randn(N, 3, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    model, students = nn.Linear(3, 4), []
    stored = write_cache(tmp_path, model, images, "dense:fp32")
    for teacher in (model, stored):
        torch.manual_seed(1)
        student = nn.Linear(3, 4)
        before = student.weight.detach().clone()
        Distiller(student, teacher, images, loss=KDLoss(temperature=3.0), batch_size=7).train(5)
        students.append(student.weight.detach())
    assert_trained_alike(*students, before, 1e-4)


def hinted(teacher, path):
    return trained(teacher, hints=[FeatureHint("embedding", path)])


def test_hints_beside_a_cache_are_of_the_model(tmp_path):
    model = Model(1, width=12)
    stored = write_cache(tmp_path, model, IDS, "dense:fp32")
    with pytest.raises(ValueError, match="need a teacher that is a module, got TeacherCache"):
        hinted(stored, "embedding")
    with pytest.raises(ValueError, match="the teacher has no module 'model.embedding'"):
        hinted(CachedTeacher(stored), "model.embedding")
    live = hinted(model, "embedding")
    read = hinted(CachedTeacher(stored, model), "model.embedding")
    assert_trained_alike(live, read, BEFORE, 1e-4)
    # The soft targets are the cache's, whatever the model says.
    with torch.no_grad():
        model.head.weight.mul_(-5)
    assert torch.equal(hinted(CachedTeacher(stored, model), "model.embedding"), read)


def test_the_head_of_a_cache_moves_once(tmp_path, monkeypatch):
    stored, moved = write_cache(tmp_path, Headed(1), IDS, "hidden:fp32"), []
    put = torch.Tensor.to

    def to(x, *arguments, **options):
        found = put(x, *arguments, **options)
        if x.shape == (V, H) and found.device != x.device:
            moved.append(found.device.type)
        return found

    monkeypatch.setattr(torch.Tensor, "to", to)
    batch = kdk.distill.batches.Batch(torch.arange(3), IDS[:3].to("meta"), None)
    monkeypatch.setattr(type(stored), "read", lambda self, ids, mask=None: self.head)
    teacher = CachedTeacher(stored)
    assert teacher(batch).weight.is_meta and teacher(batch).weight.is_meta
    assert moved == ["meta"]


def distiller(teacher, **options):
    return Distiller(Model(seed=2), teacher, IDS, loss=KDLoss(), batch_size=5, **options)


def test_a_run_is_not_resumed_from_another_cache(tmp_path):
    model = Model(1)
    stored = write_cache(tmp_path / "a", model, IDS, "topk:4")
    other = write_cache(tmp_path / "b", model, IDS, "topk:5")
    checkpoints = Checkpoints(tmp_path / "run")
    distiller(stored).train(4, checkpoints=checkpoints)

    moved = (tmp_path / "a").rename(tmp_path / "c")
    again = distiller(cache.open(moved))
    assert again.resume(checkpoints) == 4
    again.train(3)
    whole = distiller(cache.open(moved))
    whole.train(7)
    pairs = zip(again.student.parameters(), whole.student.parameters(), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)

    for teacher in (other, model, SeveralTeachers([cache.open(moved), model])):
        message = f"cache must be {stored.checksum}, as before"
        with pytest.raises(cache.CacheMismatchError, match=message):
            distiller(teacher).resume(checkpoints)
    distiller(CachedTeacher(cache.open(moved), model)).resume(checkpoints)


def test_a_run_of_several_caches_is_resumed_with_all_of_them(tmp_path):
    model = Model(1)
    paths = [tmp_path / kind for kind in ("dense:fp32", "dense:bf16")]
    caches = [write_cache(path, model, IDS, path.name) for path in paths]
    checkpoints = Checkpoints(tmp_path / "run")
    distiller(SeveralTeachers(caches)).train(2, checkpoints=checkpoints)
    assert distiller(SeveralTeachers(caches)).resume(checkpoints) == 2
    with pytest.raises(cache.CacheMismatchError, match="the teacher's cache must be"):
        distiller(SeveralTeachers(caches[::-1])).resume(checkpoints)


def test_a_student_is_compared_with_a_cache(tmp_path):
    data, model = Texts(IDS, False), Model(1)
    stored = write_cache(tmp_path, model, data, "topk:3")
    for student in (model, Model(2)):
        live = validate(student, data, teacher=model)
        assert validate(student, data, teacher=stored) == live
    (row,) = compare({"student": Model(2)}, CachedTeacher(stored, model), data)
    assert row["agreement"] == live.agreement
