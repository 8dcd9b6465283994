"""What only a GPU has: streams, graphs, errors that arrive later, more elements than an int counts.

What the operators compute is tested with all other backends, through cuda_for_cpu.py.
"""

import pytest
import torch
from conftest import NAMES, assert_plus_zero, assert_same_bits, problem, random_like
from oracle import assert_gradient_close, assert_loss_close, reference

from kdkernels import kd_loss
from kdkernels.backends import bad_labels, registry

UNAVAILABLE = {name: registry.BACKENDS[name].unavailable("cuda") for name in ("native", "triton")}

MIB = 2**20


@pytest.fixture(params=["native", "triton"], autouse=True)
def by_default(request, isolated, monkeypatch):
    """The backend of every call that names none."""
    if UNAVAILABLE[request.param]:
        pytest.skip(f"{request.param} on CUDA: {UNAVAILABLE[request.param]}")
    monkeypatch.setenv(registry.ENVIRONMENT_VARIABLE, request.param)
    return request.param


def on_gpu(*shape, **options):
    return [x.cuda() for x in problem(*shape, **options)]


def step(student, teacher, labels=None, upstream=None, **options):
    """(loss, gradient), of the leaf itself."""
    student.requires_grad_()
    loss = kd_loss(student, teacher, labels, **options)
    upstream = random_like(loss.cpu()).cuda() if upstream is None else upstream
    return loss.detach(), torch.autograd.grad(loss, student, upstream)[0]


def test_the_automatic_choice(by_default, monkeypatch):
    monkeypatch.delenv(registry.ENVIRONMENT_VARIABLE)
    first = next(name for name, reason in UNAVAILABLE.items() if not reason)
    assert registry.resolve("cuda", torch.bfloat16) == first
    assert registry.resolve("cuda", torch.float64) == "eager"
    student, teacher, labels = on_gpu(3, 19, dtype=torch.float64)
    with pytest.raises(TypeError, match="float64"):
        kd_loss(student, teacher, labels, backend=by_default)


# By how many blocks share a row, and where they keep it: from one to all that there are.
@pytest.mark.parametrize("v", [1, 1000, 4096, 32000, 50257, 128256, 262144, 1_100_000])
def test_every_plan(v, by_default, dtype=torch.bfloat16):
    student, teacher, labels = problem(3, v, dtype=dtype)
    few = v > 32000 or (by_default == "triton" and v != 4096)  # which compiles for seconds
    for divergence in ("forward_kl", "jsd") if few else NAMES:
        options = dict(divergence=divergence, temperature=2.0)
        upstream = torch.tensor(1.7)
        there = [x.cuda() for x in (student, teacher, labels)]
        loss, grad = step(*there, upstream=upstream.cuda(), **options)
        ref = reference(student, teacher, labels, upstream=upstream, **options)
        assert_loss_close(loss.cpu(), ref, 2e-5)
        assert_gradient_close(grad.cpu(), ref, check_blind=False)


def test_labels_out_of_range_are_reported_by_a_later_call():
    student, teacher, labels = on_gpu(5, 1000)
    labels[3] = 1000
    student.requires_grad_()
    loss = kd_loss(student, teacher, labels, reduction="none")
    torch.cuda.synchronize()
    with pytest.raises(IndexError, match="earlier call on cuda:.* row 3"):
        kd_loss(student, teacher, labels)
    # The report is over: what follows computes.
    (grad,) = torch.autograd.grad(loss, student, torch.ones_like(loss))
    assert loss.isnan().tolist() == [False, False, False, True, False]
    assert grad.isnan().any(-1).tolist() == [False, False, False, True, False]
    labels[3] = 7
    loss, grad = step(student, teacher, labels)
    assert loss.isfinite() and grad.isfinite().all()


def test_backward_reports_a_label_too():
    student, teacher, labels = on_gpu(5, 1000)
    labels[0] = -1
    student.requires_grad_()
    loss = kd_loss(student, teacher, labels)
    torch.cuda.synchronize()
    with pytest.raises(IndexError, match="row 0"):
        loss.backward()


def test_nothing_waits_for_the_gpu():
    student, teacher, labels = on_gpu(64, 32000, dtype=torch.bfloat16)
    labels[5] = -100
    step(student, teacher, labels)
    num_items = torch.tensor(61, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        for options in (dict(), dict(num_items=num_items), dict(return_terms=True)):
            student = student.detach().requires_grad_()
            result = kd_loss(student, teacher, labels, **options)
            (result.loss if options.get("return_terms") else result).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_graph_capture_and_replay(dtype):
    shape = (16, 32000)
    student, teacher, labels = on_gpu(*shape, dtype=dtype)
    weights = torch.rand(16, device="cuda")
    upstream = torch.tensor(3.0, device="cuda")

    def one():
        return step(student, teacher, labels, upstream, token_weights=weights, temperature=2.0)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        one()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = one()
    for seed in range(3):
        torch.manual_seed(seed)
        with torch.no_grad():
            for x, y in zip((student, teacher, labels), problem(*shape, dtype=dtype), strict=True):
                x.copy_(y)
            labels[seed] = -100
            weights.copy_(torch.rand(16))
            upstream.fill_(0.5 + seed)
        graph.replay()
        assert_same_bits(*[(a.cpu(), b.cpu()) for a, b in zip(replayed, one(), strict=True)])


def test_streams_do_not_share_their_scratch():
    inputs = [on_gpu(64, 32000, dtype=torch.bfloat16) for _ in range(4)]
    expected = [step(*each) for each in inputs]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in inputs]
    for _ in range(5):
        found = []
        for stream, each in zip(streams, inputs, strict=True):
            with torch.cuda.stream(stream):
                found.append(step(*each))
        torch.cuda.synchronize()
        for actual, right in zip(found, expected, strict=True):
            assert_same_bits(*[(a.cpu(), b.cpu()) for a, b in zip(actual, right, strict=True)])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_device_that_is_not_current():
    here = on_gpu(4, 1000)
    there = [x.to("cuda:1") for x in here]
    assert torch.cuda.current_device() == 0
    expected, found = step(*here), step(*there, upstream=torch.tensor(1.0, device="cuda:1"))
    assert found[0].device.index == 1 and torch.cuda.current_device() == 0
    assert_same_bits((found[0].cpu(), expected[0].cpu()))


def test_a_row_does_not_depend_on_its_neighbours():
    student, teacher, labels = on_gpu(300, 32000, dtype=torch.bfloat16)
    options = dict(reduction="sum", temperature=2.0, upstream=torch.tensor(1.0, device="cuda"))
    _, grad = step(student, teacher, labels, **options)
    for row in (0, 1, 299):
        part = slice(row, row + 1)
        inputs = (x[part].detach().clone() for x in (student, teacher, labels))
        _, alone = step(*inputs, **options)
        assert_same_bits((grad[part].cpu(), alone.cpu()))


@pytest.mark.parametrize("inplace", [False, True])
def test_memory_is_the_gradient_only(inplace):
    student, teacher, labels = on_gpu(512, 128256, dtype=torch.bfloat16)
    student.requires_grad_()
    logits = student.view_as(student) if not inplace else student.detach().clone().requires_grad_()
    logits = logits * 1.0 if inplace else logits
    kd_loss(student.detach()[:4], teacher[:4], labels[:4])
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    loss = kd_loss(logits, teacher, labels, inplace=inplace, temperature=2.0)
    torch.cuda.synchronize()
    gradient = 0 if inplace else student.numel() * student.element_size()
    assert torch.cuda.max_memory_allocated() - before <= gradient + MIB
    assert loss.isfinite()


def test_more_than_2_to_the_31_elements():
    rows, v = 17_000, 128_256
    if torch.cuda.mem_get_info()[0] < 20 * 2**30:
        pytest.skip("needs 20 GiB of GPU memory")
    generator = torch.Generator("cuda").manual_seed(0)
    student, teacher = (
        torch.randn(rows, v, device="cuda", dtype=torch.bfloat16, generator=generator)
        for _ in range(2)
    )
    labels = torch.randint(v, (rows,), device="cuda", generator=generator)
    options = dict(temperature=2.0, reduction="sum", upstream=torch.tensor(1.0, device="cuda"))
    _, grad = step(student, teacher, labels, **options)
    for part in (slice(0, 2), slice(rows - 3, rows)):
        inputs = (x[part].detach().clone() for x in (student, teacher, labels))
        _, alone = step(*inputs, **options)
        assert_same_bits((grad[part].cpu(), alone.cpu()))


@pytest.mark.parametrize("v", [1000, 1001])
def test_the_loss_alone(v):
    student, teacher, labels = on_gpu(5, v, dtype=torch.bfloat16)
    alone = kd_loss(student, teacher, labels)
    with_gradient = kd_loss(student.requires_grad_(), teacher, labels).detach()
    assert_same_bits((alone.cpu(), with_gradient.cpu()))


def test_a_first_call_in_inference_mode():
    student, teacher, labels = on_gpu(5, 1000)
    bad_labels.flag.cache_clear()
    with torch.inference_mode():
        kd_loss(student, teacher, labels)
    labels[1] = -7
    kd_loss(student, teacher, labels)
    torch.cuda.synchronize()
    with pytest.raises(IndexError, match="row 1"):
        kd_loss(student, teacher, labels.clamp(min=0))
    assert kd_loss(student, teacher, labels.clamp(min=0)).isfinite()


def test_ignored_rows_are_not_read():
    student, teacher, labels = on_gpu(6, 50257, dtype=torch.float16)
    labels[[1, 4]] = -100
    student[[1, 4]] = teacher[[1, 4]] = float("nan")
    loss, grad = step(student, teacher, labels)
    assert loss.isfinite()
    assert_plus_zero(grad[[1, 4]].cpu())


def test_compiled():
    student, teacher, labels = on_gpu(8, 1000)

    @torch.compile(fullgraph=True)
    def compiled(student, teacher, labels):
        return kd_loss(student, teacher, labels, temperature=2.0)

    leaf = student.detach().clone().requires_grad_()
    loss = compiled(leaf, teacher, labels)
    loss.backward()
    upstream = torch.tensor(1.0, device="cuda")
    expected = step(student, teacher, labels, upstream, temperature=2.0)
    found = loss.detach(), leaf.grad
    assert_same_bits(*[(a.cpu(), b.cpu()) for a, b in zip(found, expected, strict=True)])
