"""Hidden states and head of real architectures make the logits that the models make themselves."""

import copy

import pytest
import torch

from kdkernels import KDLoss, LinearHead
from kdkernels.distill import Distiller

transformers = pytest.importorskip("transformers", reason="the extra `train` is not installed")

from kdkernels.integrations.transformers import HiddenStates  # noqa: E402

V, B, L = 96, 2, 7
COMMON = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
COMMON.update(num_key_value_heads=1, vocab_size=V, max_position_embeddings=32)
COMMON.update(pad_token_id=0, bos_token_id=1, eos_token_id=2)
NEOX = {k: v for k, v in COMMON.items() if k != "num_key_value_heads"}
MODELS = {
    "Llama": COMMON,
    "Llama, tied": dict(COMMON, tie_word_embeddings=True),
    "Mistral": COMMON,
    "Qwen2": COMMON,
    "Qwen3": dict(COMMON, head_dim=8),
    "Gemma2": dict(COMMON, head_dim=8, final_logit_softcapping=3.0),
    "Cohere": dict(COMMON, logit_scale=0.25),
    "Granite": dict(COMMON, logits_scaling=4.0),
    "GPT2": dict(n_embd=16, n_layer=2, n_head=2, vocab_size=V, bos_token_id=1, eos_token_id=2),
    "GPTNeoX": NEOX,
    "Phi": COMMON,
    "OPT": dict(COMMON, ffn_dim=24, word_embed_proj_dim=16),  # calls a part of its base model
    "FalconH1": dict(
        COMMON, lm_head_multiplier=0.5, mamba_d_ssm=16, mamba_n_heads=2, mamba_d_head=8
    ),
}


def make(name="Llama", seed=0, **options):
    name = name.partition(",")[0]
    config = getattr(transformers, f"{name}Config")(**{**MODELS.get(name, COMMON), **options})
    torch.manual_seed(seed)
    return transformers.AutoModelForCausalLM.from_config(config).eval()  # no dropout


def tokens(seed=0):
    return torch.randint(3, V, (B, L), generator=torch.Generator().manual_seed(seed))


def logits_of(head):
    """head: `LinearHead` -> (B, L, V)"""
    logits = head.hidden @ head.weight.T
    logits = (logits if head.bias is None else logits + head.bias) * head.logit_scale
    return logits if head.softcap is None else head.softcap * (logits / head.softcap).tanh()


@pytest.mark.parametrize("name", MODELS)
def test_the_parts_make_the_logits_and_the_gradients_of_the_whole(name):
    model = make(name, **MODELS[name])
    bias = model.get_output_embeddings().bias
    assert (bias is not None) == (name == "Phi")
    if bias is not None:
        torch.nn.init.normal_(bias)  # zero as it is made
    whole = copy.deepcopy(model)
    parts = HiddenStates(model)
    wanted = whole(input_ids=tokens()).logits
    head = parts(input_ids=tokens())
    assert isinstance(head, LinearHead) and head.hidden.shape == (B, L, 16)
    torch.testing.assert_close(logits_of(head), wanted)

    teacher = torch.randn(B, L, V, generator=torch.Generator().manual_seed(1))
    loss = KDLoss(temperature=2.0)
    loss(head, teacher, tokens()).backward()
    loss(wanted, teacher, tokens()).backward()
    pairs = list(zip(model.named_parameters(), whole.parameters(), strict=True))
    scale = max(b.grad.abs().amax() for _, b in pairs)
    for (parameter, a), b in pairs:
        error = (a.grad - b.grad).abs().amax() / scale
        assert error < 1e-5, parameter


@pytest.mark.parametrize(
    ("name", "scale", "softcap"),
    [
        ("Llama", 1.0, None),
        ("Gemma2", 1.0, 3.0),
        ("Cohere", 0.25, None),
        ("Granite", 0.25, None),  # it divides by 4 what
        ("HyperCLOVAX", 4.0, None),  # multiplies here, under the same name
    ],
)
def test_scale_and_softcap_are_found(name, scale, softcap):
    options = MODELS.get(name) or dict(COMMON, logits_scaling=4.0)
    found = HiddenStates(make(name, **options))
    assert (found.logit_scale, found.softcap) == (scale, softcap)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", ["Llama", "Gemma2", "Granite"])
def test_they_are_found_in_every_dtype(name, dtype):
    wanted = HiddenStates(make(name))
    found = HiddenStates(make(name).to(dtype))
    assert (found.logit_scale, found.softcap) == (wanted.logit_scale, wanted.softcap)
    assert found(input_ids=tokens()).hidden.dtype == dtype


def test_a_softcap_that_the_model_does_not_apply_is_not_taken():
    found = HiddenStates(make("Llama", final_logit_softcapping=3.0))
    assert found.softcap is None


def test_images_reach_what_makes_the_hidden_states():
    """The text decoder alone does not take them."""
    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    vision = transformers.CLIPVisionConfig(image_size=28, patch_size=14, **sizes)
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=transformers.LlamaConfig(**COMMON), image_token_index=90
    )
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(config).eval()
    ids = torch.tensor([[1, 90, 90, 90, 90, 5, 6]])  # a token for each of 4 patches
    inputs = dict(input_ids=ids, pixel_values=torch.randn(1, 3, 28, 28))
    wanted = model(**inputs).logits
    torch.testing.assert_close(logits_of(HiddenStates(model)(**inputs)), wanted)
    other = model(**dict(inputs, pixel_values=torch.zeros(1, 3, 28, 28))).logits
    assert not torch.allclose(other, wanted, rtol=1e-2)


class Shifted(transformers.LlamaForCausalLM):
    """Its logits are its head's and something more."""

    def forward(self, **inputs):
        output = super().forward(**inputs)
        output.logits = self.more(output.logits)
        return output


@pytest.mark.parametrize(
    "more",
    [
        lambda logits: logits + 0.1 * torch.linspace(0, 1, V),
        lambda logits: 30 * (logits / 30).tanh(),  # of logits this small: the same to 5 digits
        lambda logits: logits[..., : V - 8],
        lambda logits: logits * float("nan"),
    ],
    ids=["added", "capped", "cut", "NaN"],
)
def test_logits_that_are_not_the_heads_are_refused(more):
    model = Shifted(transformers.LlamaConfig(**COMMON))
    model.more = more
    with pytest.raises(ValueError, match="the logits of Shifted are not those of its output"):
        HiddenStates(model)


def test_models_without_a_head_or_a_decoder_are_refused():
    with pytest.raises(TypeError, match="LlamaModel has no decoder"):
        HiddenStates(make().model)
    with pytest.raises(TypeError, match="Linear has no decoder"):
        HiddenStates(torch.nn.Linear(2, 2))
    headless = make()
    headless.get_output_embeddings = lambda: None
    with pytest.raises(TypeError, match="that of LlamaForCausalLM is missing"):
        HiddenStates(headless)


def test_masks_and_positions_reach_the_decoder():
    model = make()
    parts = HiddenStates(model)
    inputs = dict(input_ids=tokens())
    inputs["attention_mask"] = torch.ones(B, L, dtype=torch.int64)
    inputs["attention_mask"][0, :3] = 0
    inputs["position_ids"] = torch.arange(L).expand(B, L) // 2
    wanted = model(**inputs).logits[:, 3:]
    torch.testing.assert_close(logits_of(parts(**inputs))[:, 3:], wanted)
    plain = logits_of(parts(input_ids=tokens()))[:, 3:]
    assert not torch.allclose(plain, wanted, atol=1e-3 * wanted.abs().amax().item())


def test_modes_and_parameters_are_left_as_they_were():
    model = make(attention_dropout=0.5)
    model.train()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    saved = copy.deepcopy(model.state_dict())
    parts = HiddenStates(model)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(x, saved[name]) for name, x in model.state_dict().items())
    assert not model.model._forward_hooks
    assert {id(x) for x in parts.parameters()} == {id(x) for x in model.parameters()}
    assert list(parts.state_dict()) == [f"model.{name}" for name in model.state_dict()]


def test_gradient_checkpointing_changes_no_gradient():
    runs = []
    for checkpointing in (False, True):
        model = make()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.train()
        calls = []
        forward = model.model.layers[0].self_attn.forward
        model.model.layers[0].self_attn.forward = lambda *a, f=forward, c=calls, **k: (
            c.append(1) or f(*a, **k)
        )
        head = HiddenStates(model)(input_ids=tokens())
        calls.clear()
        KDLoss()(head, torch.zeros(B, L, V), tokens()).backward()
        assert len(calls) == checkpointing  # computed again in the backward pass
        runs.append([x.grad for x in model.parameters()])
    for plain, again in zip(*runs, strict=True):
        torch.testing.assert_close(plain, again)


def test_autocast_computes_what_the_models_own_head_does():
    model = make()
    parts = HiddenStates(model)
    with torch.autocast("cpu", torch.bfloat16):
        head = parts(input_ids=tokens())
        assert head.hidden.dtype == head.weight.dtype == torch.bfloat16
        wanted = model(input_ids=tokens()).logits
        assert wanted.dtype == torch.bfloat16
        KDLoss()(head, torch.zeros(B, L, V), tokens()).backward()
    assert torch.equal(logits_of(head), wanted)
    assert model.lm_head.weight.grad.dtype == torch.float32


def test_a_head_of_more_rows_than_the_tokenizer_has_tokens():
    """Rows from `vocab_size` on are padding: they get no gradient, and widths may differ."""
    real, model = 90, make()
    teacher = make(seed=1, vocab_size=V + 32)
    loss = KDLoss(vocab_size=real)
    labels = tokens() % real
    head = HiddenStates(model)(input_ids=labels)
    with torch.no_grad():
        target = HiddenStates(teacher)(input_ids=labels)
    loss(head, target, labels).backward()
    gradient = model.lm_head.weight.grad
    assert gradient[:real].abs().sum(1).all() and not gradient[real:].any()


def test_a_student_learns_from_a_teacher_of_another_architecture():
    teacher = HiddenStates(make("Gemma2", seed=1))
    student = make()
    blocks = [dict(input_ids=row, labels=row) for row in tokens().repeat(4, 1)]

    class Blocks(torch.utils.data.Dataset):
        def __len__(self):
            return len(blocks)

        def __getitem__(self, row):
            return blocks[row]

    loss = KDLoss(alpha=1.0, shift=True)
    distiller = Distiller(HiddenStates(student), teacher, Blocks(), loss=loss, batch_size=4)
    history = distiller.train(30, record_every=1)
    assert history.losses[-1] < 0.8 * history.losses[0]


def lora(model, **options):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    return peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=2, **options))


def test_gradients_reach_lora_and_nothing_else():
    adapted = lora(make(), target_modules=["q_proj", "v_proj"], lora_dropout=0.0)
    for name, x in adapted.named_parameters():
        if "lora_B" in name:  # zero as it is made
            torch.nn.init.normal_(x)
    whole = copy.deepcopy(adapted)
    head = HiddenStates(adapted)(input_ids=tokens())
    wanted = whole(input_ids=tokens()).logits
    torch.testing.assert_close(logits_of(head), wanted)
    KDLoss()(head, torch.zeros(B, L, V), tokens()).backward()
    KDLoss()(wanted, torch.zeros(B, L, V), tokens()).backward()
    reached = []
    for (name, x), y in zip(adapted.named_parameters(), whole.parameters(), strict=True):
        if y.grad is None:
            assert x.grad is None
            continue
        reached.append(name)
        assert x.grad.any()
        torch.testing.assert_close(x.grad, y.grad, rtol=1e-4, atol=1e-5 * y.grad.abs().amax())
    assert len(reached) == 8 and all("lora_" in name for name in reached)


def test_lora_on_the_output_embedding_is_refused():
    adapted = lora(make(), target_modules=["q_proj", "lm_head"])
    with pytest.raises(TypeError, match="without adapters, that of LlamaForCausalLM is peft"):
        HiddenStates(adapted)


def test_adapters_that_are_not_in_the_decoder_are_refused():
    peft = pytest.importorskip("peft", reason="peft is not installed")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(ValueError, match="the logits of PeftModelForCausalLM are not those"):
        HiddenStates(peft.get_peft_model(make(), config))
