"""`KDTrainer` is the Trainer where that is right, and the loss of the formula with a teacher."""

import copy
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_trained_alike

from kdkernels import KDLoss, Sampled, TopK
from kdkernels.distill import SeveralTeachers, write_cache

transformers = pytest.importorskip("transformers", reason="the extra `train` is not installed")
pytest.importorskip("accelerate", reason="the extra `train` is not installed")

from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments  # noqa: E402

from kdkernels.integrations.transformers import (  # noqa: E402
    HiddenStates,
    KDTrainer,
    KDTrainerMixin,
    TeacherColumns,
)

V, N, L, STEPS, RATE = 48, 16, 10, 3, 0.5
SIZES = dict(intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
SIZES.update(num_key_value_heads=1, vocab_size=V, max_position_embeddings=32)
SIZES.update(pad_token_id=0, bos_token_id=1, eos_token_id=2, initializer_range=0.2)


def make(seed=0, hidden=16, **options):
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(hidden_size=hidden, **{**SIZES, **options}))


def make_teacher(seed=5, **options):
    return make(seed, hidden=24, **options)


def rows(count=N, seed=0):
    """Of one length, with 1 to 10 labels that count."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        ids = torch.randint(3, V, (L,), generator=generator)
        labels = ids.clone()
        labels[: int(torch.randint(0, L, (), generator=generator))] = -100
        found.append(dict(input_ids=ids, labels=labels, attention_mask=torch.ones_like(ids)))
    return found


DATA, OTHERS = rows(), rows(6, seed=1)


@pytest.fixture
def train(tmp_path):
    """-> a trainer after some steps; 2 examples a batch, 2 batches a step."""

    def run(kind=KDTrainer, student=None, steps=STEPS, data=DATA, given=None, **options):
        arguments = dict(per_device_train_batch_size=2, gradient_accumulation_steps=2)
        arguments.update(per_device_eval_batch_size=4, max_steps=steps, logging_steps=1)
        arguments.update(learning_rate=RATE, optim="sgd", max_grad_norm=0.0, save_strategy="no")
        arguments.update(report_to=[], disable_tqdm=True, use_cpu=True, seed=1)
        arguments = TrainingArguments(output_dir=str(tmp_path), **{**arguments, **(given or {})})
        if student is None and "model_init" not in options:
            student = make()
        trainer = kind(student, arguments, train_dataset=data, eval_dataset=OTHERS, **options)
        trainer.train()
        return trainer

    return run


class Examples(torch.utils.data.Dataset):
    """Of a list, which the cache does not take."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, row):
        return self.rows[row]


def weights(of):
    model = of.model if isinstance(of, Trainer) else of
    return torch.cat([x.detach().flatten() for x in model.parameters()])


def logged(trainer, name="loss"):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def same(trainer, other, bound=1e-5, before=None):
    before = weights(make()) if before is None else before
    assert_trained_alike(weights(trainer), weights(other), before, bound)
    torch.testing.assert_close(logged(trainer), logged(other), rtol=bound, atol=0.0)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_without_a_teacher_it_is_the_trainer(train, smoothing):
    given = dict(label_smoothing_factor=smoothing)
    plain = train(Trainer, given=given)
    trainer = train(loss=KDLoss(alpha=0.0), given=given)
    same(trainer, plain)
    wanted = plain.evaluate()["eval_loss"]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(wanted, rel=1e-6)
    assert "distill" not in trainer.state.log_history[0]


def test_the_loss_is_that_of_the_formula(train):
    """In float64, over all tokens of a step that count."""
    alpha, temperature = 0.7, 2.0
    trainer = train(
        teacher=make_teacher(),
        loss=dict(alpha=alpha, temperature=temperature),
        steps=1,
        data=DATA[:4],
    )
    student, teacher = make().double(), make_teacher().double()
    soft, hard, count = 0.0, 0.0, 0
    for row in DATA[:4]:
        ids, labels = row["input_ids"][None], row["labels"][1:]
        logits = student(input_ids=ids).logits[0, :-1][labels != -100]
        with torch.no_grad():
            target = teacher(input_ids=ids).logits[0, :-1][labels != -100]
        p, q = ((x / temperature).log_softmax(-1) for x in (target, logits))
        soft = soft + temperature**2 * (p.exp() * (p - q)).sum()
        hard = hard + F.cross_entropy(logits, labels[labels != -100], reduction="sum")
        count += len(logits)
    loss = (alpha * soft + (1 - alpha) * hard) / count
    loss.backward()
    wanted = torch.cat([(x - RATE * x.grad).flatten() for x in student.parameters()])
    assert_trained_alike(weights(trainer), wanted.detach(), weights(make()), 1e-5)
    first = trainer.state.log_history[0]
    for name, value in (("loss", loss), ("distill", soft / count), ("hard", hard / count)):
        assert first[name] == pytest.approx(value.item(), rel=1e-5), name


def test_accumulated_batches_are_one_batch(train):
    given = [
        dict(per_device_train_batch_size=b, gradient_accumulation_steps=8 // b) for b in (8, 2, 1)
    ]
    one, *others = (train(teacher=make_teacher(), given=each) for each in given)
    for other in others:
        same(other, one)
        torch.testing.assert_close(
            logged(other, "distill"), logged(one, "distill"), rtol=1e-5, atol=0.0
        )
        assert len(logged(other, "hard")) == STEPS


def gpt2():
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=V)
    config.update(dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, initializer_range=0.2))
    config.update(dict(bos_token_id=1, eos_token_id=2))
    return transformers.GPT2LMHeadModel(config)


def test_a_language_model_that_is_not_called_causal_predicts_the_next_token(train):
    """GPT2LMHeadModel, whose first labels the Trainer counts: they are masked here."""
    data = [dict(row, labels=F.pad(row["labels"][1:], (1, 0), value=-100)) for row in DATA]
    trainer = train(student=gpt2(), data=data, loss=KDLoss(alpha=0.0))
    same(trainer, train(Trainer, gpt2(), data=data), before=weights(gpt2()))


class MeanOfMeans(Trainer):
    """What overriding `compute_loss` is without `num_items_in_batch`."""

    loss_is_scaled_for_ga = False

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = dict(inputs)
        labels = inputs.pop("labels")
        with torch.no_grad():
            target = self.teacher(**inputs).logits
        return KDLoss(shift=True)(model(**inputs).logits, target, labels)


def test_a_mean_of_means_is_something_else(train):
    """As others have it: a batch with few labels counts as much as one with many."""
    MeanOfMeans.teacher = make_teacher()
    naive, trainer = train(MeanOfMeans), train(teacher=make_teacher())
    before = weights(make())
    error = (weights(naive) - weights(trainer)).norm() / (weights(trainer) - before).norm()
    assert error > 0.05
    even = [dict(row, labels=row["input_ids"]) for row in DATA]
    same(train(MeanOfMeans, data=even), train(teacher=make_teacher(), data=even))


class Watched(LlamaForCausalLM):
    """Fails where a cross-entropy is computed, and counts the times its logits are."""

    def __init__(self, config):
        super().__init__(config)
        self.heads = 0
        self.lm_head.register_forward_hook(self.count)

    def count(self, *_):
        self.heads += 1

    def loss_function(self, *args, **kwargs):
        raise AssertionError("the student's own loss is computed")

    def forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs):
        assert labels is None
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, **kwargs)


def watched():
    model = Watched(LlamaConfig(hidden_size=16, **SIZES))
    model.load_state_dict(make().state_dict())
    return model


def test_neither_logits_nor_cross_entropy_are_made_for_nothing(train):
    student, teacher = watched(), Watched(LlamaConfig(hidden_size=16, **SIZES))
    trainer = train(student=student, teacher=teacher, steps=1)
    assert student.heads == teacher.heads == 5  # what it found out beforehand
    trainer.evaluate()
    assert student.heads == teacher.heads == 5
    seen = []

    def compute(prediction):
        seen.append(prediction.predictions.shape)
        return {}

    trainer.compute_metrics = compute
    trainer.evaluate()
    assert seen == [(len(OTHERS), L, V)] and (student.heads, teacher.heads) == (7, 5)


def test_evaluation_has_the_same_loss_with_logits_and_without(train):
    trainer = train(teacher=make_teacher(), loss=KDLoss(temperature=2.0))
    without = trainer.evaluate()["eval_loss"]
    trainer.compute_metrics = lambda prediction: {}
    assert trainer.evaluate()["eval_loss"] == pytest.approx(without, rel=1e-6)
    unlabelled = [dict(input_ids=row["input_ids"]) for row in OTHERS]
    found = trainer.predict(unlabelled)
    assert found.predictions.shape == (len(OTHERS), L, V) and "test_loss" not in found.metrics
    labelled = trainer.predict(OTHERS)
    torch.testing.assert_close(torch.tensor(labelled.predictions), torch.tensor(found.predictions))
    assert labelled.metrics["test_loss"] == pytest.approx(without, rel=1e-6)


def test_compute_loss_returns_outputs_where_they_are_asked_for(train):
    trainer = train(teacher=make_teacher())
    batch = {name: torch.stack([row[name] for row in OTHERS]) for name in OTHERS[0]}
    loss, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    assert outputs.logits.shape == (len(OTHERS), L, V)
    torch.testing.assert_close(trainer.compute_loss(trainer.model, batch), loss)
    items = (batch["labels"][:, 1:] != -100).sum()
    halved = trainer.compute_loss(trainer.model, batch, num_items_in_batch=2 * items)
    torch.testing.assert_close(halved, loss / 2)
    assert set(batch) == {"input_ids", "attention_mask", "labels"}  # nothing is taken out


def test_no_number_is_read_off_the_device(train):
    """A step reads none: the terms are read when they are logged."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Reads(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count += func is torch.ops.aten._local_scalar_dense.default
            return func(*args, **(kwargs or {}))

    trainer = train(teacher=make_teacher())
    batch = {name: torch.stack([row[name] for row in OTHERS]) for name in OTHERS[0]}
    counts = []
    for compute in (KDTrainer.compute_loss, Trainer.compute_loss):
        trainer.model.train()
        with Reads() as reads:
            compute(trainer, trainer.model, dict(batch), num_items_in_batch=torch.tensor(9))
        counts.append(reads.count)
    assert counts[0] <= 2 * counts[1]  # two models, which look whether they need a mask


def test_shift_labels_are_not_shifted_again(train):
    shifted = [dict(row, shift_labels=F.pad(row["labels"][1:], (0, 1), value=-100)) for row in DATA]
    wrong = [dict(row, labels=row["labels"].flip(0)) for row in shifted]

    def collate(examples):
        return {name: torch.stack([each[name] for each in examples]) for name in examples[0]}

    given = dict(remove_unused_columns=False)
    options = dict(teacher=make_teacher(), data_collator=collate, given=given)
    same(train(data=wrong, **options), train(teacher=make_teacher()))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_not_seen(train, side):
    """Whatever is there, the mask keeps it from both models."""

    def padded(fill):
        found = []
        for k, row in enumerate(DATA):
            pad = (k % 4, 4 - k % 4) if side == "left" else (0, 4)
            row = dict(row, labels=F.pad(row["labels"][1:], (1, 0), value=-100))
            fills = dict(input_ids=fill, labels=-100, attention_mask=0)
            found.append({name: F.pad(x, pad, value=fills[name]) for name, x in row.items()})
        return found

    same(
        train(teacher=make_teacher(), data=padded(0)), train(teacher=make_teacher(), data=padded(7))
    )
    if side == "right":
        same(train(teacher=make_teacher(), data=padded(0)), train(teacher=make_teacher()))


def predictions(row, source):
    with torch.no_grad():
        logprobs = make_teacher()(input_ids=row["input_ids"][None]).logits[0].log_softmax(-1)
    if source == "logits":
        return dict(of_teacher=logprobs)
    ids = torch.arange(V).expand(L, V)
    return dict(ids=ids, of_teacher=logprobs if source == "topk" else logprobs.exp())


COLUMNS = {
    "topk": TeacherColumns(TopK, ids="ids", logprobs="of_teacher"),
    "sampled": TeacherColumns(Sampled, ids="ids", counts="of_teacher"),
    "logits": TeacherColumns(lambda logits: logits, logits="of_teacher"),
}


@pytest.mark.parametrize("as_lists", [False, True])
@pytest.mark.parametrize("source", COLUMNS)
def test_columns_of_the_data_are_a_teacher(train, source, as_lists):
    """They are kept, though a Trainer removes columns that its model does not know."""
    data = [dict(row, **predictions(row, source), text=0.5) for row in DATA]
    if as_lists:
        datasets = pytest.importorskip("datasets", reason="datasets is not installed")
        lists = [{k: getattr(x, "tolist", lambda x=x: x)() for k, x in row.items()} for row in data]
        data = datasets.Dataset.from_list(lists)
    trainer = train(teacher=COLUMNS[source], data=data, loss=KDLoss(alpha=0.8))
    same(trainer, train(teacher=make_teacher(), loss=KDLoss(alpha=0.8)), bound=1e-4)
    assert "text" not in trainer.callback_handler.train_dataloader.dataset[0] or not as_lists


@pytest.mark.parametrize("kept", [5, V])
def test_columns_are_padded_as_the_tokens_are(train, kept):
    """Examples of different lengths, on either side, and rows of different widths."""
    lengths = [4 + k % 5 for k in range(N)]
    data, others = [], []
    for k, (row, length) in enumerate(zip(DATA, lengths, strict=True)):
        cut = {name: x[-length:] for name, x in row.items()}
        cut["labels"] = F.pad(cut["labels"][1:], (1, 0), value=-100)  # which padding would predict
        with torch.no_grad():
            logits = make_teacher()(input_ids=cut["input_ids"][None]).logits[0]
        top = logits.log_softmax(-1).topk(kept - k % 2 * (kept < V))
        data.append(dict(cut, ids=top.indices, of_teacher=top.values))
        others.append(cut)
    found = []
    for side in ("left", "right"):

        def collate(examples, side=side):
            longest = max(len(each["input_ids"]) for each in examples)
            fills, batch = dict(input_ids=0, labels=-100, attention_mask=0), {}
            for name, fill in fills.items():
                missing = [longest - len(each[name]) for each in examples]
                pads = [(n, 0) if side == "left" else (0, n) for n in missing]
                pairs = zip(examples, pads, strict=True)
                batch[name] = torch.stack([F.pad(e[name], pad, value=fill) for e, pad in pairs])
            return batch

        options = dict(data_collator=collate, loss=KDLoss(alpha=0.8))
        found.append(train(teacher=COLUMNS["topk"], data=data, **options))
        if kept == V:
            same(found[-1], train(teacher=make_teacher(), data=others, **options), bound=1e-4)
    same(*found)


def test_columns_that_are_missing_or_too_short_are_named(train):
    with pytest.raises(ValueError, match="must have the teacher's column 'ids', it has"):
        train(teacher=COLUMNS["topk"])
    short = [dict(row, **predictions(row, "topk")) for row in DATA]
    for row in short:
        row["ids"] = row["ids"][1:]
    with pytest.raises(
        ValueError, match=r"column 'ids' must have a row for each token, \[10, 10\]"
    ):
        train(teacher=COLUMNS["topk"], data=short)


@pytest.mark.parametrize("kind", ["hidden:fp32", "dense:fp32", f"topk:{V}"])
def test_a_cache_is_a_teacher(train, tmp_path, kind):
    pytest.importorskip("zstandard", reason="the extra `cache` is not installed")
    cache = write_cache(tmp_path / "cache", HiddenStates(make_teacher()), Examples(DATA), kind)
    data = [{name: F.pad(x, (0, 3)) for name, x in row.items()} for row in DATA]
    for row in data:
        row["labels"][L:] = -100
    same(train(teacher=cache, data=data), train(teacher=make_teacher()), bound=2e-3)


def test_a_cache_finds_the_samples_of_a_row_without_padding(train, tmp_path):
    """As a collator makes of them that leaves only their positions to tell them apart."""
    pytest.importorskip("zstandard", reason="the extra `cache` is not installed")
    cache = write_cache(tmp_path / "cache", make_teacher(), Examples(DATA), "dense:fp32")
    data = [{name: row[name].tolist() for name in ("input_ids", "labels")} for row in DATA]
    options = dict(data=data, data_collator=transformers.DataCollatorWithFlattening())
    same(train(teacher=cache, **options), train(teacher=make_teacher(), **options), bound=2e-3)


def test_several_teachers_are_their_mean(train):
    pair = [make_teacher(5), make(6)]
    for given, weighted in ((pair, [1, 1]), (SeveralTeachers(pair, [1, 3]), [1, 3])):
        data = []
        for row in DATA:
            with torch.no_grad():
                each = [m(input_ids=row["input_ids"][None]).logits[0].softmax(-1) for m in pair]
            mean = sum(w * x for w, x in zip(weighted, each, strict=True)) / sum(weighted)
            data.append(dict(row, of_teacher=mean.log()))
        same(train(teacher=given), train(teacher=COLUMNS["logits"], data=data), bound=1e-4)


def test_the_teacher_is_nobodys_but_the_trainers(train, tmp_path):
    teacher = make_teacher(attention_dropout=0.5).train()
    before = copy.deepcopy(teacher.state_dict())
    trainer = train(teacher=teacher, given=dict(weight_decay=0.1))
    same(trainer, train(teacher=make_teacher(), given=dict(weight_decay=0.1)))
    assert not teacher.training and not any(x.requires_grad for x in teacher.parameters())
    assert all(torch.equal(x, before[name]) for name, x in teacher.state_dict().items())
    its = {id(x) for x in teacher.parameters()}
    assert not its & {id(x) for x in trainer.model.parameters()}
    assert not its & {id(x) for group in trainer.optimizer.param_groups for x in group["params"]}
    assert trainer.accelerator._models == [trainer.model]  # what `save_state` writes
    trainer.save_model(tmp_path / "saved")
    again = LlamaForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(weights(again), weights(trainer))
    assert again.state_dict().keys() == make().state_dict().keys()


def test_a_run_that_is_resumed_has_the_same_weights(train, tmp_path):
    given = dict(save_strategy="steps", save_steps=2, optim="adamw_torch", learning_rate=0.01)
    whole = train(teacher=make_teacher(), steps=5, given=given)
    arguments = copy.deepcopy(whole.args)
    again = KDTrainer(make(9), arguments, train_dataset=DATA, teacher=make_teacher())
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert torch.equal(weights(again), weights(whole))
    torch.testing.assert_close(logged(again, "distill"), logged(whole, "distill"))


def test_the_log_has_the_terms_of_the_steps_since_the_last(train):
    each = train(teacher=make_teacher(), loss=KDLoss(alpha=0.3), steps=6)
    some = train(
        teacher=make_teacher(), loss=KDLoss(alpha=0.3), steps=6, given=dict(logging_steps=3)
    )
    for name in ("distill", "hard"):
        means = torch.tensor(logged(each, name)).view(2, 3).mean(1)
        torch.testing.assert_close(torch.tensor(logged(some, name)), means)
    for loss, *terms in zip(*(logged(each, x) for x in ("loss", "distill", "hard")), strict=True):
        assert loss == pytest.approx(0.3 * terms[0] + 0.7 * terms[1], rel=1e-5)
    assert not logged(train(teacher=make_teacher(), loss=KDLoss(alpha=1.0)), "distill")


def test_terms_that_were_not_logged_are_not_of_the_next_run(train):
    options = dict(teacher=make_teacher(), loss=KDLoss(alpha=0.3), given=dict(logging_steps=2))
    trainer = train(steps=3, **options)  # the terms of the third are left
    trainer.train()
    loss, distill, hard = (logged(trainer, name)[0] for name in ("loss", "distill", "hard"))
    assert loss == pytest.approx(0.3 * distill + 0.7 * hard, rel=1e-5)


def test_a_step_without_labels_that_count_teaches_nothing(train):
    nothing = [dict(row, labels=torch.full_like(row["labels"], -100)) for row in DATA]
    trainer = train(teacher=make_teacher(), data=nothing)
    assert torch.equal(weights(trainer), weights(make()))
    assert logged(trainer) == logged(trainer, "distill") == logged(trainer, "hard") == [0.0] * STEPS


@pytest.mark.parametrize(
    "name, options",
    [("Gemma2", dict(head_dim=8, final_logit_softcapping=3.0)), ("Cohere", dict(logit_scale=0.25))],
)
def test_soft_caps_and_logit_scales_count(train, name, options):
    """As they do where the logits are made by the model itself."""

    def student():
        config = getattr(transformers, f"{name}Config")
        torch.manual_seed(0)
        return transformers.AutoModelForCausalLM.from_config(
            config(hidden_size=16, **{**SIZES, **options})
        )

    before = weights(student())
    heads = [train(student=student(), teacher=teacher()) for teacher in (make_teacher, student)]
    for head, teacher in zip(heads, (make_teacher, student), strict=True):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(HiddenStates, "__init__", refuse)
            with pytest.warns(
                UserWarning, match="the student's logits will exist in full: not now"
            ):
                logits = train(student=student(), teacher=teacher())
        same(head, logits, before=before)


def refuse(self, model):
    raise ValueError("not now")


def lora(student, **options):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    torch.manual_seed(2)
    return peft.get_peft_model(student, peft.LoraConfig(task_type="CAUSAL_LM", r=2, **options))


def test_adapters_are_trained_alone(train):
    before = lora(make(), target_modules=["q_proj", "v_proj"])
    student = copy.deepcopy(before)
    trainer = train(student=student, teacher=make_teacher())
    for (name, x), y in zip(student.named_parameters(), before.parameters(), strict=True):
        assert torch.equal(x, y) == ("lora_" not in name), name
    with pytest.MonkeyPatch.context() as patch, pytest.warns(UserWarning, match="not now"):
        patch.setattr(HiddenStates, "__init__", refuse)
        logits = train(student=copy.deepcopy(before), teacher=make_teacher())
    same(trainer, logits, before=weights(before))


def test_an_adapter_of_the_head_takes_the_logits(train):
    student = lora(make(), target_modules=["q_proj", "lm_head"])
    before = copy.deepcopy(student)
    with pytest.warns(UserWarning, match="the student's logits will exist in full: .* adapters"):
        train(student=student, teacher=make_teacher())
    for (name, x), y in zip(student.named_parameters(), before.parameters(), strict=True):
        assert torch.equal(x, y) == ("lora_" not in name), name


@pytest.mark.parametrize(
    "given, bound",
    [
        (dict(bf16=True), 0.03),
        (dict(gradient_checkpointing=True), 1e-6),
        (dict(neftune_noise_alpha=0.0), 1e-6),
        (dict(auto_find_batch_size=True), 1e-6),
        (dict(average_tokens_across_devices=False), 1e-6),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_what_the_trainer_offers_changes_nothing_else(train, given, bound):
    same(train(teacher=make_teacher(), given=given), train(teacher=make_teacher()), bound)


def test_the_compiled_model_is_one_graph(train):
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    given = dict(torch_compile=True, torch_compile_backend="aot_eager")
    same(train(teacher=make_teacher(), given=given), train(teacher=make_teacher()))
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


def test_the_model_may_be_made_by_the_trainer(train):
    """When training begins, another one than there was at first."""
    given = dict(model_init=lambda: make())
    trainer = train(**given, loss=KDLoss(alpha=0.0))
    same(trainer, train(Trainer, **given))
    assert trainer.evaluate()["eval_loss"] > 0


def test_a_vocabulary_may_be_padded_to_two_widths(train):
    real = 40
    data = [dict(row, input_ids=row["input_ids"] % real) for row in DATA]
    for row in data:
        row["labels"] = torch.where(row["labels"] == -100, -100, row["input_ids"])
    loss = KDLoss(vocab_size=real)
    trainer = train(teacher=make_teacher(vocab_size=V + 16), loss=loss, data=data)
    moved = weights(trainer.model.lm_head) != weights(make().lm_head)
    assert moved.view(V, -1)[:real].any(1).all() and not moved.view(V, -1)[real:].any()
    with pytest.raises(ValueError, match="student's vocabulary, got 64 and 48 classes"):
        train(teacher=make_teacher(vocab_size=V + 16))


def t5():
    torch.manual_seed(0)
    config = transformers.T5Config(
        d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=V, dropout_rate=0.0
    )
    config.decoder_start_token_id = 0
    return transformers.T5ForConditionalGeneration(config)


def bert():
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, vocab_size=V)
    sizes.update(num_attention_heads=2, num_labels=5, initializer_range=0.2)
    sizes.update(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return transformers.BertForSequenceClassification(transformers.BertConfig(**sizes))


OTHER_MODELS = {  # (the model, what is uneven of the labels, what is not)
    "T5": (
        t5,
        [dict(row, decoder_input_ids=F.pad(row["input_ids"][:-1], (1, 0))) for row in DATA],
        lambda row: row["input_ids"],
    ),
    "BERT": (
        bert,
        [dict(row, labels=row["input_ids"][0] % 5) for row in DATA],
        lambda row: row["labels"],
    ),
}


@pytest.mark.parametrize("name", OTHER_MODELS)
def test_the_trainer_multiplies_the_loss_of_some_models_and_this_does_not(train, name):
    """Those take `num_items_in_batch` and do not look at it: the means of all batches of a step
    are added up and never divided, so that the gradient is as many times too large."""
    model, uneven, labels = OTHER_MODELS[name]
    even = [dict(row, labels=labels(row)) for row in uneven]
    before = weights(model())

    def run(kind, parts, data, rate=0.02, **options):
        given = dict(learning_rate=rate, gradient_accumulation_steps=parts)
        given["per_device_train_batch_size"] = 4 // parts
        return train(kind, model(), data=data, given=given, **options)

    loss = dict(loss=KDLoss(alpha=0.0))
    one = run(KDTrainer, 1, uneven, **loss)
    same(run(Trainer, 1, uneven), one, before=before)  # it is the Trainer's, and not shifted
    same(run(KDTrainer, 2, uneven, **loss), one, before=before)

    ours = run(KDTrainer, 2, even, **loss)
    theirs = run(Trainer, 2, even, rate=0.01)  # half the rate: twice the gradient
    assert_trained_alike(weights(theirs), weights(ours), before, 1e-5)
    twice = [2 * x for x in logged(ours)]
    torch.testing.assert_close(logged(theirs), twice, rtol=1e-5, atol=0.0)
    run(KDTrainer, 2, uneven, teacher=model())


class Bigrams(torch.nn.Module):
    """Of a token the next one: no language model that `transformers` knows."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = torch.nn.Embedding(V, 8), torch.nn.Linear(8, V)

    def forward(self, input_ids):
        return dict(logits=self.head(self.embedding(input_ids)))


def test_any_module_may_be_a_student(train):
    """It takes no labels, and no number of them: they are counted for the loss all the same."""
    loss = KDLoss(shift=True, temperature=2.0)
    given = dict(per_device_train_batch_size=4, gradient_accumulation_steps=1)
    options = dict(teacher=make_teacher(), loss=loss)
    one = train(student=Bigrams(), **options, given=given)
    same(train(student=Bigrams(), **options), one, before=weights(Bigrams()))
    assert one.evaluate()["eval_loss"] > 0


def test_a_head_that_zero_3_has_partitioned_is_not_read(train, monkeypatch):
    trainer = train(teacher=make_teacher(), steps=1)
    trainer._student = None
    plugin = type("Plugin", (), dict(zero_stage=3))
    monkeypatch.setattr(type(trainer.accelerator.state), "deepspeed_plugin", plugin, raising=False)
    with pytest.warns(UserWarning, match="logits will exist in full: ZeRO-3 gathers"):
        assert trainer._headed(trainer.model, trainer.model) is None


def test_encoder_decoders_need_their_decoders_inputs(train):
    with pytest.raises(ValueError, match="must have decoder_input_ids"):
        train(student=t5(), loss=KDLoss(alpha=0.0))


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_it_goes_on_top_of_other_trainers(train, tmp_path):
    """TRL's SFTTrainer: its data and collator, this loss."""
    trl = pytest.importorskip("trl", reason="trl is not installed")
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    from tokenizers import Tokenizer, models

    class Mine(KDTrainerMixin, trl.SFTTrainer):
        pass

    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{k}": k for k in range(3, V)}}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<pad>")),
        pad_token="<pad>",
        eos_token="</s>",
    )
    lists = [
        {k: row[k][k0:].tolist() for k in ("input_ids", "labels")}
        for k0, row in enumerate(DATA[:6])
    ]
    given = []
    for row in lists:
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            top = make_teacher()(input_ids=ids).logits[0].log_softmax(-1).topk(V)
        given.append(dict(row, ids=top.indices.tolist(), of_teacher=top.values.tolist()))

    def run(kind, rows=lists, more=None, **options):
        arguments = dict(per_device_train_batch_size=2, max_steps=STEPS, logging_steps=1)
        arguments.update(learning_rate=RATE, optim="sgd", max_grad_norm=0.0, save_strategy="no")
        arguments.update(report_to=[], use_cpu=True, disable_tqdm=True, bf16=False, seed=1)
        data = datasets.Dataset.from_list(rows)
        arguments = trl.SFTConfig(str(tmp_path), **arguments, max_length=None, **(more or {}))
        trainer = kind(
            make(),
            arguments,
            train_dataset=data,
            eval_dataset=data,
            processing_class=tokenizer,
            **options,
        )
        trainer.train()
        return trainer, trainer.evaluate()["eval_loss"]

    plain, evaluated = run(trl.SFTTrainer)
    trainer, mine = run(Mine, loss=KDLoss(alpha=0.0))
    same(trainer, plain)
    assert mine == pytest.approx(evaluated, rel=1e-5)
    with pytest.raises(ValueError, match="loss_type must be 'nll', .* got 'dft'"):
        run(Mine, more=dict(loss_type="dft"), teacher=make_teacher())
    online, _ = run(Mine, teacher=make_teacher())
    for more in (None, dict(padding_free=True)):
        of_columns, _ = run(Mine, given, more, teacher=COLUMNS["topk"])
        same(of_columns, online, bound=1e-4)


def shared_with(student):
    teacher = make_teacher()
    teacher.lm_head = student.lm_head
    return teacher


@pytest.mark.parametrize(
    "error, text, options",
    [
        (ValueError, "compute_loss_func must be None", dict(compute_loss_func=print)),
        (ValueError, "teacher must be given, got None", dict(teacher=None)),
        (TypeError, "teacher must be a torch.nn.Module, .* got str", dict(teacher="gpt2")),
        (TypeError, "got a NoneType among them", dict(teacher=[make_teacher(), None])),
        (TypeError, "got a TeacherColumns among them", dict(teacher=[COLUMNS["topk"]])),
        (ValueError, "got an empty list", dict(teacher=[])),
        (TypeError, "loss must be a kdkernels.KDLoss, got str", dict(loss="kl")),
        (ValueError, "loss must have reduction='mean'", dict(loss=KDLoss(reduction="sum"))),
        (ValueError, "got return_terms=True", dict(loss=KDLoss(return_terms=True))),
        (ValueError, "must have ignore_index=-100", dict(loss=dict(ignore_index=0))),
        (TypeError, "unexpected keyword argument 'tau'", dict(loss=dict(tau=2.0))),
        (
            ValueError,
            "must not differ, got 0.2 and 0.1",
            dict(loss=KDLoss(label_smoothing=0.2), given=dict(label_smoothing_factor=0.1)),
        ),
        (
            ValueError,
            "the batch must have labels, -100 where",
            dict(data=[dict(input_ids=row["input_ids"]) for row in DATA]),
        ),
    ],
)
def test_what_cannot_be_honoured_is_refused(train, error, text, options):
    with pytest.raises(error, match=text):
        train(**{"teacher": make_teacher(), **options})


def test_a_teacher_that_is_trained_is_refused(train):
    student = make()
    for teacher in (student, shared_with(student), [make_teacher(), HiddenStates(student)]):
        with pytest.raises(ValueError, match="teacher must have parameters of its own"):
            train(student=student, teacher=teacher)
    base = make()
    with pytest.raises(ValueError, match="teacher must have parameters of its own"):
        train(student=lora(base, target_modules=["q_proj"]), teacher=base)


def test_the_loss_of_a_router_is_not_left_out(train):
    config = transformers.MixtralConfig(hidden_size=16, num_local_experts=2, **SIZES)
    train(student=transformers.MixtralForCausalLM(config), teacher=make_teacher(), steps=1)
    config.output_router_logits = True
    with pytest.raises(ValueError, match="output_router_logits must be False"):
        train(student=transformers.MixtralForCausalLM(config), teacher=make_teacher())


def test_places_that_split_examples_are_refused(train, monkeypatch):
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda self: 2))
    with pytest.raises(ValueError, match="nn.DataParallel over 2 GPUs is not supported"):
        KDTrainerMixin._check_arguments(train(Trainer, steps=1))


def test_columns_say_what_they_want():
    with pytest.raises(TypeError, match="source must be callable, TopK say, got str"):
        TeacherColumns("topk", ids="ids")
    with pytest.raises(TypeError, match="columns must be names, one at least"):
        TeacherColumns(TopK)


def test_only_the_trainer_imports_transformers():
    code = (
        "import sys; from kdkernels.integrations.transformers import HiddenStates, KDTrainerMixin;"
        "assert not {'transformers', 'accelerate', 'peft'} & set(sys.modules), 'imported'"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    import kdkernels.integrations.transformers as package

    with pytest.raises(AttributeError, match="has no attribute 'Trainer'"):
        _ = package.Trainer
    assert issubclass(package.KDTrainer, Trainer)
