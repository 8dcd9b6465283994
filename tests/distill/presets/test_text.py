import json
import os
from pathlib import Path

import pytest
import torch

pytest.importorskip("mistral_common")
pytest.importorskip("transformers")
pytest.importorskip("zstandard")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from kdkernels import KDLoss, LinearHead, TopK, cache
from kdkernels.distill import validation
from kdkernels.distill.capture import write_cache
from kdkernels.distill.presets import text, text_demo

TINY = dict(steps=2, teacher_steps=2, blocks=4, topk=4)


@pytest.fixture(scope="module")
def tokenizer():
    return text.load_tokenizer()


@pytest.fixture(scope="module")
def corpus(tokenizer):
    return text.load(tokenizer)


@pytest.fixture
def small(tokenizer, corpus, monkeypatch):
    """The demo with two held-out blocks, and its measurements as short as can be; what it measures
    memory of is in the list."""
    held_out = text.Corpus(
        corpus.train, text.Blocks(corpus.test.ids[:2]), *list(vars(corpus).values())[2:]
    )
    monkeypatch.setattr(text, "load_tokenizer", lambda: tokenizer)
    monkeypatch.setattr(text, "load", lambda tokenizer: held_out)
    monkeypatch.setattr(validation, "SECONDS", 0.0)
    monkeypatch.setattr(validation, "WARM_UP", 1)
    measured = []

    def peak_of(*args, **loss):
        measured.append((*args, loss))
        return 10.0 * len(measured)

    monkeypatch.setattr(text_demo, "peak_of", peak_of)
    return measured


def test_the_tokenizer_gives_back_the_text(tokenizer, corpus):
    assert tokenizer.n_words == text.VOCABULARY
    for document in list(text.documents().values())[:10]:
        ids = tokenizer.encode(document, bos=True, eos=False)
        assert tokenizer.decode(ids) == document
        assert 0 <= min(ids) and max(ids) < text.VOCABULARY
    ids = torch.cat([corpus.train.ids, corpus.test.ids])
    assert ids.dtype == torch.int64 and ids.shape[1] == text.BLOCK
    assert len(ids.unique()) > 3000  # of a real language


def test_held_out_documents_share_nothing_with_the_training_text(corpus):
    texts = text.documents()
    train, test = corpus.train_documents, corpus.test_documents
    assert sorted(train + test) == sorted(texts) and not set(train) & set(test)

    def paragraphs(names):
        return {" ".join(p.split()) for name in names for p in texts[name].split("\n\n")}

    assert not paragraphs(train) & paragraphs(test)
    assert 0.05 < len(corpus.test) / len(corpus.train) < 0.2


def test_blocks_are_the_documents_one_after_the_other(tokenizer, corpus):
    ids = [
        i
        for name in corpus.test_documents
        for i in tokenizer.encode(text.documents()[name], bos=True, eos=False)
    ]
    assert corpus.test.ids.flatten().tolist() == ids[: len(ids) // text.BLOCK * text.BLOCK]
    example = corpus.test[1]
    assert (
        example["input_ids"].tolist() == example["labels"].tolist() == corpus.test.ids[1].tolist()
    )


def test_students_with_less_text_see_a_part_of_what_others_see(corpus):
    few, more = (text.some_of(corpus.train, count, 0).ids.tolist() for count in (5, 9))
    assert len(few) == 5 and more[:5] == few
    assert text.some_of(corpus.train, 5, 1).ids.tolist() != few


def test_a_language_model_depends_on_its_seed_alone():
    state = torch.get_rng_state()
    first, same, other = (text.language_model(8, seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    pairs = list(zip(first.parameters(), same.parameters(), other.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b, _ in pairs)
    assert any(not torch.equal(a, c) for a, _, c in pairs)


def test_the_cache_teaches_as_the_teacher_in_memory_does(corpus, tmp_path):
    """The losses are those of a student that gets `TopK` of the teacher's logits at each step."""
    blocks = text.Blocks(corpus.train.ids[:4, :16])
    teacher = text.language_model(16, 0).requires_grad_(False)
    stored = write_cache(tmp_path / "cache", teacher, blocks, "topk:8")

    class InMemory(torch.nn.Module):
        def forward(self, input_ids):
            head = teacher(input_ids=input_ids)
            logprobs = (head.hidden @ head.weight.T).log_softmax(-1)
            top, ids = logprobs.topk(8, -1)
            return TopK(ids, top)

    losses = []
    for source in (stored, InMemory()):
        student = text.language_model(8, 1)
        history = text.train(student, blocks, source, steps=3, rate=1e-2, alpha=0.9, records=3)
        losses.append(history.losses)
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=0)
    student = text.language_model(8, 1)
    hard = text.train(student, blocks, steps=3, rate=1e-2, records=3).losses
    assert all(abs(a - b) > 1e-2 for a, b in zip(hard, losses[0], strict=True))


def test_the_naive_loss_is_the_same_loss():
    generator = torch.Generator().manual_seed(0)

    def head(width):
        hidden = torch.randn(2, 5, width, generator=generator)
        weight = torch.randn(300, width, generator=generator)
        return LinearHead(hidden, weight)

    student, teacher = head(4), head(6)
    labels = torch.randint(300, (2, 5), generator=generator)
    options = dict(temperature=2.0, alpha=0.7, backend=None)
    fused = text_demo.fused_loss(student, teacher, labels, **options)
    torch.testing.assert_close(
        text_demo.naive_loss(student, teacher, labels, **options), fused, rtol=1e-5, atol=0
    )


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc")
def test_the_fused_loss_takes_a_part_of_the_naive_one_s_memory():
    fused, naive = (
        text_demo.peak_of(kind, 2, temperature=1.0, alpha=0.9, backend=None)
        for kind in ("fused", "naive")
    )
    logits = 4 * 2 * text.BLOCK * text.VOCABULARY / 1e6  # MB of one model
    assert 4 * logits < naive
    assert fused < 2.5 * logits


def test_a_loss_that_fails_where_its_memory_is_measured_says_why():
    with pytest.raises(RuntimeError, match="alpha must be in"):
        text_demo.peak_of("fused", 1, temperature=1.0, alpha=2.0, backend=None)


def test_the_demo_tells_what_it_did(small, tmp_path, capsys, monkeypatch):
    first = text_demo.Demo(tmp_path / "run", **TINY).run()
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results == first
    assert results["options"] == {
        **TINY, "temperature": 1.0, "alpha": 0.9, "seed": 0, "backend": None
    }  # fmt: skip
    (teacher, hard, soft, kept), notes = results["comparison"], results["notes"]
    for row in results["comparison"]:
        assert torch.tensor(row["cross_entropy"]).exp().item() == pytest.approx(row["perplexity"])
        assert 1 < row["perplexity"] < 10 * text.VOCABULARY
        assert 0 <= row["accuracy"] <= 1 and row["latency_ms"] > 0
    assert teacher["parameters"] > 1.9 * soft["parameters"] and teacher["name"] == "teacher"
    assert hard["parameters"] == soft["parameters"] == kept["parameters"]
    assert len({row["perplexity"] for row in results["comparison"]}) == 4
    assert kept["targets"] == "α = 0.9, T = 1, K = 4"
    for curve in results["curves"]:
        assert len(curve["steps"]) == len(curve["values"]) and curve["steps"][-1] == 2
    loss = dict(temperature=1.0, alpha=0.9, backend=None)
    assert small == [(kind, text_demo.MEMORY_BLOCKS, loss) for kind in ("fused", "naive")]
    tokens = text_demo.MEMORY_BLOCKS * text.BLOCK
    assert results["memory"] == {"tokens": tokens, "fused_mb": 10.0, "naive_mb": 20.0}
    assert any(f"for {tokens} tokens: 10 MB; as a formula in PyTorch: 20 MB" in x for x in notes)
    assert (tmp_path / "run" / text_demo.CURVES).read_bytes()[:4] == b"\x89PNG"
    stored = cache.open(tmp_path / "run" / text_demo.CACHE)
    assert stored.tokens == 4 * text.BLOCK and stored.kind.spec == "topk:4"
    assert any(f" {stored.bytes / stored.tokens:.0f} bytes a token" in x for x in notes)
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == (
        f"Held-out perplexity: {hard['perplexity']:.0f} → {soft['perplexity']:.0f} with soft "
        f"targets, {kept['perplexity']:.0f} with their top 4 (teacher: {teacher['perplexity']:.0f})"
    )

    monkeypatch.setattr(text_demo, "peak_of", lambda *args, **loss: None)
    again = text_demo.Demo(tmp_path / "again", **TINY).run()
    assert any("not measured" in note for note in again["notes"])
    measured = ("latency_ms", "speed_up")
    for one, other in zip(first["comparison"], again["comparison"], strict=True):
        assert {**one, **dict.fromkeys(measured)} == {**other, **dict.fromkeys(measured)}
    assert first["curves"] == again["curves"]


@pytest.mark.parametrize(
    "wrong, error, message",
    [
        (dict(steps=0), ValueError, "steps must be at least 1"),
        (dict(teacher_steps=1.5), TypeError, "teacher_steps must be an int"),
        (dict(blocks=10**6), ValueError, "blocks must be in"),
        (dict(topk=0), ValueError, "topk must be in"),
        (dict(topk=2**17 + 1), ValueError, "topk must be in"),
        (dict(temperature=0.0), ValueError, "temperature"),
        (dict(alpha=1.5), ValueError, "alpha"),
        (dict(backend="fast"), ValueError, "backend"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_made(wrong, error, message, tmp_path):
    with pytest.raises(error, match=message):
        text_demo.Demo(tmp_path / "run", **wrong)
    assert not Path(tmp_path / "run").exists()


def test_soft_targets_are_what_the_loss_is_given(corpus):
    """alpha = 1 without a temperature: the loss is the divergence from the teacher alone."""
    blocks = text.Blocks(corpus.train.ids[:2, :16])
    student, teacher = text.language_model(8, 1), text.language_model(16, 0).requires_grad_(False)
    with torch.no_grad():
        head, target = student(input_ids=blocks.ids), teacher(input_ids=blocks.ids)
        expected = KDLoss(alpha=1.0, shift=True)(
            LinearHead(head.hidden, head.weight.detach()), target, blocks.ids
        )
    history = text.train(student, blocks, teacher, steps=1, rate=1e-3, alpha=1.0)
    assert history.losses == pytest.approx([expected.item()], rel=1e-6)
