"""Who predictions are of: another teacher and another tokenizer have another digest."""

import hashlib
import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from kdkernels.cache import identity

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.float8_e4m3fn)


class Model(nn.Module):
    """State in many dtypes: (3, 4) in each, a count, and a mask."""

    def __init__(self, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        for k, dtype in enumerate(DTYPES):
            x = torch.randn(3, 4, generator=generator).to(dtype)
            self.register_buffer(f"x{k}", x)
        self.register_buffer("count", torch.tensor(7))
        self.register_buffer("mask", torch.tensor([True, False]))
        self.layer = nn.Linear(1, 1)
        nn.init.constant_(self.layer.weight, 0.5)
        nn.init.constant_(self.layer.bias, 0.25)


def weights(model):
    return identity.of_teacher(model, "t")["weights"]


def test_the_same_weights_have_the_same_digest():
    whole = identity.of_teacher(Model(), "large")
    assert whole == identity.of_teacher(Model(), "large")
    assert (whole["name"], whole["dtype"], len(whole["weights"])) == ("large", "float32", 64)
    assert identity.of_teacher(Model().half(), "t")["dtype"] == "float16"
    mixed = nn.ModuleList([nn.Linear(1, 1), nn.Linear(1, 1).bfloat16()])
    assert identity.of_teacher(mixed, "t")["dtype"] == "bfloat16, float32"


def test_the_digest_is_the_documented_one():
    """So that a cache of another version, or another program, is one of the same teacher."""
    layer = nn.Linear(2, 1)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, -2.0]]))
        layer.bias.fill_(0.5)
    text = b'["bias", "float32", [1]]\n' + bytes.fromhex("0000003f")
    text += b'["weight", "float32", [1, 2]]\n' + bytes.fromhex("0000803f000000c0")
    assert weights(layer) == hashlib.sha256(text).hexdigest()


@pytest.mark.parametrize("name", [*(f"x{k}" for k in range(len(DTYPES))), "count", "mask"])
@pytest.mark.parametrize("place", ("first", "last"))
def test_any_bit_is_another_digest(name, place):
    model = Model()
    data = getattr(model, name).reshape(-1).view(torch.uint8)
    data[0 if place == "first" else -1] ^= 1
    assert weights(model) != weights(Model())


def test_bits_and_not_numbers_count():
    one, other = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    for model, value in ((one, 0.0), (other, -0.0)):
        nn.init.constant_(model.weight, value)
    assert weights(one) != weights(other)


def test_another_name_shape_or_dtype_is_another_digest():
    def digest(name, x):
        model = nn.Module()
        model.register_buffer("same", torch.zeros(2))
        model.register_buffer(name, x)
        return weights(model)

    x = torch.zeros(2, 3)
    found = {digest("x", x), digest("y", x), digest("x", x.mT), digest("x", x.reshape(6))}
    found |= {digest("x", x.int()), digest("x", x[..., None])}
    assert len(found) == 6


def test_the_order_of_the_dict_the_strides_and_the_pieces_do_not_matter(monkeypatch):
    forth, back = nn.Module(), nn.Module()
    tensors = {"a": torch.arange(12.0).view(3, 4), "b": torch.ones(5), "c": torch.tensor(1.0)}
    for name, x in tensors.items():
        forth.register_buffer(name, x)
    for name, x in reversed(tensors.items()):
        back.register_buffer(name, x.T.contiguous().T if x.dim() == 2 else x)
    assert not back.a.is_contiguous() and list(forth.state_dict()) != list(back.state_dict())
    whole = weights(forth)
    assert weights(back) == whole
    monkeypatch.setattr(identity, "PIECE", 5)
    assert weights(back) == whole


def test_modules_around_a_model_do_not_matter():
    class Wrapper(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

    plain = Model()
    assert weights(Wrapper(plain)) == weights(Wrapper(Wrapper(plain))) == weights(plain)
    renamed = nn.ModuleDict({"a": nn.Linear(1, 1), "b": nn.Linear(1, 1)})
    swapped = nn.ModuleDict({"b": renamed["a"], "a": renamed["b"]})
    assert weights(renamed) != weights(swapped)
    other = nn.ModuleDict({"a": renamed["a"], "c": renamed["b"]})
    assert weights(renamed) != weights(other)


def test_tied_weights_are_there_twice():
    model = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    model[1].weight = model[0].weight
    before = weights(model)
    with torch.no_grad():
        model[0].weight[0, 0] += 1
    assert weights(model) != before


def test_state_that_is_no_tensor_is_refused():
    class Odd(nn.Linear):
        def get_extra_state(self):
            return {"scale": 3}

        def set_extra_state(self, state):
            pass

    with pytest.raises(TypeError, match="state dict of tensors, '_extra_state' is a dict"):
        identity.of_teacher(Odd(1, 1), "t")


def transformers_like(vocab, extra=(), **roles):
    special = [*roles.values(), *extra]
    return SimpleNamespace(
        get_vocab=lambda: vocab, special_tokens_map=roles, all_special_tokens=special
    )


VOCAB = {"<eos>": 2, "a": 0, "é": 1, "<tool>": 3}


def test_a_tokenizer_is_its_ids_and_its_special_tokens():
    found = identity.of_tokenizer(transformers_like(VOCAB, ["<tool>"], eos_token="<eos>"))
    pairs = [[0, "a"], [1, "é"], [2, "<eos>"], [3, "<tool>"]]
    text = json.dumps(pairs, separators=(",", ":"))
    assert found == {
        "digest": hashlib.sha256(text.encode()).hexdigest(),
        "size": 4,
        "special_tokens": {"<tool>": 3, "eos_token": 2},
    }
    backwards = transformers_like(dict(reversed(VOCAB.items())), ["<tool>"], eos_token="<eos>")
    assert identity.of_tokenizer(backwards) == found
    swapped = transformers_like({**VOCAB, "a": 1, "é": 0}, ["<tool>"], eos_token="<eos>")
    assert identity.of_tokenizer(swapped)["digest"] != found["digest"]
    renamed = {**VOCAB, "A": VOCAB["a"]}
    del renamed["a"]
    assert identity.of_tokenizer(transformers_like(renamed))["digest"] != found["digest"]
    other = identity.of_tokenizer(transformers_like(VOCAB, ["<eos>"], eos_token="<tool>"))
    assert other["digest"] == found["digest"]
    assert other["special_tokens"] == {"<eos>": 2, "eos_token": 3}
    absent = transformers_like(VOCAB, ["<none>"], eos_token="<eos>", pad_token="<pad>")
    special = {"<none>": None, "eos_token": 2, "pad_token": None}
    assert identity.of_tokenizer(absent)["special_tokens"] == special


def test_a_tokenizer_of_mistral_common():
    pieces = ["<unk>", "<s>", "</s>", "�", "�", "<pad>"]  # parts of characters look alike

    def made(pieces):
        ids = dict(bos_id=1, eos_id=2, pad_id=5, unk_id=0)
        return SimpleNamespace(n_words=len(pieces), vocab=lambda: pieces, **ids)

    found = identity.of_tokenizer(made(pieces))
    assert found["size"] == 6
    names = {"bos_token": 1, "eos_token": 2, "pad_token": 5, "unk_token": 0}
    assert found["special_tokens"] == names
    others = [pieces[:3] + pieces[4:], [pieces[3], *pieces[1:3], pieces[0], *pieces[4:]]]
    digests = {identity.of_tokenizer(made(each))["digest"] for each in others}
    assert len(digests | {found["digest"]}) == 3


def test_tokenizers_of_the_libraries():
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.models.WordLevel({"<unk>": 0, "<eos>": 1, "the": 2}, "<unk>")
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(model), eos_token="<eos>", unk_token="<unk>"
    )
    before = identity.of_tokenizer(made)
    assert before["size"] == 3
    assert before["special_tokens"] == {"eos_token": 1, "unk_token": 0}
    made.add_special_tokens({"additional_special_tokens": ["<tool>"]})
    after = identity.of_tokenizer(made)
    assert after["size"] == 4 and after["digest"] != before["digest"]
    assert after["special_tokens"] == {"<tool>": 3, "eos_token": 1, "unk_token": 0}

    pytest.importorskip("mistral_common")
    from kdkernels.distill.presets import text

    found = identity.of_tokenizer(text.load_tokenizer())
    assert found["size"] == text.VOCABULARY and found["special_tokens"]["eos_token"] == 2
