"""What is read is what belongs to the sample, whatever else is in the batch."""

import multiprocessing
import pickle
import threading

import pytest
import torch
from cache_samples import CLASSES, KINDS, head_of, rows_of, token_ids, write

from kdkernels import LinearHead, TopK, cache, kd_loss

pytest.importorskip("zstandard")


def assert_rows(found, expected):
    """found, expected: sources with rows (n, ·); what one is filled up with, the other may lack."""
    for name, x in rows_of(expected).items():
        y = rows_of(found)[name]
        k = min(x.shape[-1], y.shape[-1])
        assert torch.equal(x[..., :k], y[..., :k])
        filler = -1 if name == "ids" else 0
        assert (x[..., k:] == filler).all() and (y[..., k:] == filler).all()


def row(source, *place):
    if isinstance(source, torch.Tensor):
        return source[place]
    from dataclasses import replace

    return replace(source, **{name: x[place] for name, x in rows_of(source).items()})


@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_is_found_in_any_batch_and_place(tmp_path, kind):
    samples = token_ids()
    write(tmp_path, kind, samples)
    teacher = cache.open(tmp_path)
    alone = [teacher[ids] for ids in samples]
    for order in ([4, 0, 3, 1, 2], [2, 2, 0]):
        batch = teacher[[samples[k] for k in order]]
        for place, k in enumerate(order):
            assert_rows(row(batch, place, slice(len(samples[k]))), alone[k])
    pair = teacher[torch.stack([samples[3], samples[1]])]
    assert_rows(row(pair, 0), alone[3])
    assert_rows(row(pair, 1), alone[1])


@pytest.mark.parametrize("kind", KINDS)
def test_samples_that_are_decoded_apart_are_read_together(tmp_path, kind, monkeypatch):
    """Rows of one group may have more entries than those of another."""
    samples = token_ids((12,) * 5)
    write(tmp_path, kind, samples)
    teacher = cache.open(tmp_path)
    expected = [teacher[ids] for ids in samples]
    monkeypatch.setattr("kdkernels.cache.reader.ROWS", 30)
    batch = teacher[samples]
    for k, each in enumerate(expected):
        assert_rows(row(batch, k), each)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_has_no_prediction(tmp_path, kind):
    samples = token_ids()
    write(tmp_path, kind, samples)
    batch = cache.open(tmp_path)[samples]
    for name, x in rows_of(batch).items():
        for k, ids in enumerate(samples):
            assert (x[k, len(ids) :] == (-1 if name == "ids" else 0)).all()


def test_a_mask_says_where_samples_are(tmp_path):
    samples = token_ids()
    write(tmp_path, "topk:7", samples)
    teacher = cache.open(tmp_path)
    ids, mask = torch.zeros(3, 30, dtype=torch.int32), torch.zeros(3, 30, dtype=torch.int64)
    ids[0, 18:], mask[0, 18:] = samples[1], 1  # padded on the left
    ids[1], mask[1] = samples[4], 1
    # Three of them packed into a row, of which two have one number, and end where another begins.
    packed = [samples[0], samples[3], samples[2]]
    ids[2, :18], mask[2, :18] = torch.cat(packed), torch.tensor([1] * 5 + [2] * 12 + [1])
    found = teacher.read(ids, mask)
    assert found.ids.shape == (3, 30, 7)
    assert_rows(row(found, 0, slice(18, 30)), teacher[samples[1]])
    assert_rows(row(found, 1), teacher[samples[4]])
    assert_rows(row(found, 2, slice(0, 5)), teacher[samples[0]])
    assert_rows(row(found, 2, slice(5, 17)), teacher[samples[3]])
    assert_rows(row(found, 2, slice(17, 18)), teacher[samples[2]])
    assert (found.ids[mask == 0] == -1).all()


def test_a_sample_that_is_not_there_is_an_error_and_never_another(tmp_path):
    samples = token_ids()
    write(tmp_path, "topk:7", samples, data={"length": 12})
    teacher = cache.open(tmp_path)
    for wrong in (samples[1][:-1], samples[1].flip(0), torch.cat(samples[:2]), samples[1] + 1):
        assert wrong not in teacher
        with pytest.raises(cache.CacheMissError, match=r"1 of 2 samples.*number 1.*'length': 12"):
            teacher[[samples[0], wrong]]
    assert samples[1] in teacher
    assert teacher.has([samples[0], wrong, samples[4]]).tolist() == [True, False, True]


@pytest.mark.parametrize("kind", ["topk:7", "sampled:20", "hidden:bf16", "dense:bf16"])
def test_the_loss_is_that_of_the_stored_values_in_memory(tmp_path, kind):
    """P33: to the bit."""
    samples = token_ids((12, 12))
    given = write(tmp_path, kind, samples)
    ids = torch.stack(samples)
    labels = torch.randint(CLASSES, ids.shape)
    teacher = cache.open(tmp_path)[ids]
    if kind == "topk:7":
        same = TopK(teacher.ids.clone(), teacher.logprobs.clone())
        wanted = torch.stack([x.topk(7).indices.sort().values for x in given])
        assert torch.equal(teacher.ids.long(), wanted)
    elif kind == "hidden:bf16":
        head = head_of(kind)
        same = LinearHead(torch.stack(given).bfloat16().float(), head.weight, head.bias)
    elif kind == "dense:bf16":
        same = torch.stack(given).bfloat16()
    else:
        same = teacher
        counts = torch.zeros(2, 12, CLASSES)
        counts.scatter_add_(-1, teacher.ids.clamp(min=0).long(), teacher.counts.float())
        for k, each in enumerate(given):
            drawn = torch.zeros(12, CLASSES).scatter_add_(-1, each.ids, torch.ones(12, 20))
            assert torch.equal(counts[k], drawn)
    losses = []
    for each in (teacher, same):
        student = torch.randn(2, 12, CLASSES, generator=torch.Generator().manual_seed(5))
        student.requires_grad_()
        loss = kd_loss(student, each, labels, alpha=0.5)
        (loss * 1.7).backward()
        losses.append((loss.detach(), student.grad))
    assert torch.equal(losses[0][0], losses[1][0])
    assert torch.equal(losses[0][1], losses[1][1])


@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
def test_the_tail_is_read_as_asked(tmp_path, tail):
    samples = token_ids()
    write(tmp_path, "topk:7", samples, tail=tail)
    assert cache.open(tmp_path)[samples[0]].tail == tail
    for other in cache.kinds.TAILS:
        assert cache.open(tmp_path, tail=other)[samples[0]].tail == other
    with pytest.raises(ValueError, match="tail must be one of bucket, renormalize, got 'ghost'"):
        cache.open(tmp_path, tail="ghost")


def _read(teacher, samples, queue):
    queue.put(pickle.dumps(teacher[samples].logprobs.numpy()))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_processes_read_at_the_same_time(tmp_path, method):
    samples = token_ids()
    write(tmp_path, "topk:7", samples)
    teacher = cache.open(tmp_path)
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    readers = [context.Process(target=_read, args=(teacher, samples, queue)) for _ in range(2)]
    for reader in readers:
        reader.start()
    found = [torch.from_numpy(pickle.loads(queue.get(timeout=60))) for _ in readers]
    for reader in readers:
        reader.join()
    for each in found:
        assert torch.equal(each, teacher[samples].logprobs)


def test_workers_of_a_loader_read(tmp_path):
    samples = token_ids((12,) * 8)
    write(tmp_path, "sampled:20", samples)
    teacher = cache.open(tmp_path)

    def collate(batch):
        return torch.stack(batch), vars(teacher[torch.stack(batch)])

    loader = torch.utils.data.DataLoader(
        samples, 3, shuffle=True, num_workers=2, collate_fn=collate
    )
    for ids, found in loader:
        assert_rows(type(teacher[ids])(**found), teacher[ids])


def test_threads_read_at_the_same_time(tmp_path):
    samples = token_ids((12,) * 8)
    write(tmp_path, "hidden:bf16", samples)
    expected, teacher = cache.open(tmp_path)[samples].hidden, cache.open(tmp_path)
    wrong = []

    def read():
        for _ in range(20):
            if not torch.equal(teacher[samples].hidden, expected):
                wrong.append(True)

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_cache_that_was_written_again_is_not_opened_in_another_process(tmp_path):
    write(tmp_path / "a", "topk:7")
    pickled = pickle.dumps(cache.open(tmp_path / "a"))
    assert pickle.loads(pickled).tokens == sum(map(len, token_ids()))
    for path in (tmp_path / "a").iterdir():
        path.unlink()
    write(tmp_path / "a", "topk:7", token_ids(seed=9))
    with pytest.raises(cache.CacheMismatchError, match="written again"):
        pickle.loads(pickled)


@pytest.mark.parametrize(
    "ids, mask, error, message",
    [
        (torch.zeros(3), None, TypeError, "ids must be integers, got float32"),
        (torch.zeros(1, 2, 3, dtype=torch.long), None, ValueError, r"\(L,\) or \(B, L\), got"),
        (torch.tensor([1, -1]), None, ValueError, "ids must be in .* got -1 to 1"),
        ([], None, ValueError, "ids must have a sample at least"),
        (
            torch.zeros(2, 3, dtype=torch.long),
            torch.zeros(2, 2),
            TypeError,
            "mask must be integers",
        ),
        (torch.zeros(2, 3, dtype=torch.long), torch.ones(2, 2).long(), ValueError, r"mask must be"),
        (torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, 3).long(), ValueError, "at least"),
    ],
)
def test_what_is_no_sample_is_an_error(tmp_path, ids, mask, error, message):
    write(tmp_path, "topk:7")
    with pytest.raises(error, match=message):
        cache.open(tmp_path).read(ids, mask)


@pytest.mark.parametrize(
    "expect, message",
    [
        ({"vocab_size": 2000}, "vocab_size is 1000, wanted 2000"),
        ({"teacher": {"weights": "abc"}}, "teacher.weights is 'def', wanted 'abc'"),
        ({"tokenizer": {"digest": "1"}}, "tokenizer is None, wanted"),
        ({"data": {"length": 3}}, "data.length is 4, wanted 3"),
        ({"kind": {"name": "sampled"}}, "kind.name is 'topk', wanted 'sampled'"),
    ],
)
def test_another_cache_than_expected_is_refused(tmp_path, expect, message):
    teacher = {"name": "numbers", "weights": "def", "dtype": "float32"}
    write(tmp_path, "topk:7", teacher=teacher, data={"length": 4, "seed": 0})
    with pytest.raises(cache.CacheMismatchError, match=message):
        cache.open(tmp_path, expect=expect)
    cache.open(tmp_path, expect={"teacher": {"name": "numbers"}, "data": {"length": 4}})


def test_keys_are_of_the_teacher_too(tmp_path):
    write(tmp_path / "a", "topk:7", teacher="one")
    write(tmp_path / "b", "topk:7", teacher="another")
    keys = [set(map(bytes, cache.open(tmp_path / x).shards[0].index["key"])) for x in "ab"]
    assert not keys[0] & keys[1]


def test_values_other_than_tokens_are_found_by_their_content(tmp_path):
    images = torch.randn(6, 2, 3, 3)
    logits = torch.randn(6, 10)
    with cache.Writer(
        tmp_path, "dense:fp32", vocab_size=10, teacher="numbers", sample="values"
    ) as writer:
        for image, row in zip(images, logits, strict=True):
            writer.add(image, row[None])
    teacher = cache.open(tmp_path)
    order = [5, 0, 3]
    assert torch.equal(teacher[images[order]], logits[order])
    for other in (images[:1] + 1e-6, images[:1].double(), images[:1].reshape(1, 3, 3, 2)):
        with pytest.raises(cache.CacheMissError):
            teacher[other]


@pytest.mark.parametrize("kind", KINDS)
def test_a_padded_batch_has_the_loss_of_its_samples(tmp_path, kind, backend):
    """Positions that are padded are ignored, whatever the student says there."""
    samples = token_ids()
    write(tmp_path, kind, samples)
    teacher = cache.open(tmp_path)
    students = [torch.randn(len(ids), CLASSES, requires_grad=True) for ids in samples]
    rows = sum(map(len, samples))
    expected = (
        sum(
            kd_loss(student, teacher[ids], ids, alpha=0.3, reduction="sum", backend=backend)
            for student, ids in zip(students, samples, strict=True)
        )
        / rows
    )
    gradients = torch.autograd.grad(expected * 3, students)

    batch = torch.nn.utils.rnn.pad_sequence(students, batch_first=True, padding_value=float("nan"))
    labels = torch.nn.utils.rnn.pad_sequence(samples, batch_first=True, padding_value=-100)
    loss = kd_loss(batch, teacher[samples], labels, alpha=0.3, backend=backend)
    assert torch.allclose(loss, expected, rtol=1e-6, atol=0)
    found = torch.autograd.grad(loss * 3, students)
    for each, wanted in zip(found, gradients, strict=True):
        scale = wanted.abs().amax()
        assert ((each - wanted).abs() <= 1e-5 * scale).all()
