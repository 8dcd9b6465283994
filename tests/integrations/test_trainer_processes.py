"""`KDTrainer` in two processes, with DDP and with FSDP2: the weights of one."""

import pytest
import torch
from conftest import assert_trained_alike
from processes import run

from kdkernels import KDLoss

pytest.importorskip("transformers", reason="the extra `train` is not installed")
pytest.importorskip("accelerate", reason="the extra `train` is not installed")

from test_trainer import DATA, OTHERS, lora, make, make_teacher, weights  # noqa: E402
from transformers import Trainer, TrainingArguments  # noqa: E402

from kdkernels.integrations.transformers import KDTrainer  # noqa: E402

KINDS = "ddp", "ddp checkpointing", "fsdp", "fsdp headed", "fsdp lora"
STEPS, RATE = 3, 0.5


class Sharding(KDTrainer):
    """FSDP2, of which accelerate itself makes one on GPUs alone."""

    apart = ["LlamaDecoderLayer"]

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        from accelerate import DistributedType, FullyShardedDataParallelPlugin

        self.accelerator.state.distributed_type = DistributedType.FSDP
        self.accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=self.apart,
        )
        self.is_fsdp_enabled = True


class HeadApart(Sharding):
    """The head is sharded by itself, and nobody calls it."""

    apart = ["LlamaDecoderLayer", "Linear"]


def student(kind):
    return lora(make(), target_modules=["q_proj"]) if "lora" in kind else make()


def train(folder, kind="ddp", kept=True, trainer=None, **given):
    trainer = trainer or (
        KDTrainer if "ddp" in kind else HeadApart if "headed" in kind else Sharding
    )
    options = dict(per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=STEPS)
    options.update(per_device_eval_batch_size=4, logging_steps=1, learning_rate=RATE, optim="sgd")
    options.update(max_grad_norm=0.0, report_to=[], disable_tqdm=True, use_cpu=True, seed=1)
    options.update(save_strategy="no", gradient_checkpointing="checkpointing" in kind, **given)
    arguments = TrainingArguments(output_dir=folder, **options)
    more = {}
    if trainer is not Trainer:
        more = dict(teacher=make_teacher(), loss=KDLoss(temperature=2.0, alpha=0.7))
        more = more if kept else dict(loss=KDLoss(alpha=0.0))
    found = trainer(student(kind), arguments, train_dataset=DATA, eval_dataset=OTHERS, **more)
    found.train()
    return found


def facts(trainer):
    entries = [x for x in trainer.state.log_history if "loss" in x]
    terms = [[x.get(name, 0.0) for name in ("loss", "distill", "hard")] for x in entries]
    whole = torch.cat(
        [
            getattr(x, "full_tensor", lambda x=x: x)().detach().flatten()
            for x in trainer.model.parameters()
        ]
    )
    return whole, torch.tensor(terms), trainer.evaluate()["eval_loss"]


def job(folder):
    from accelerate.state import AcceleratorState

    found = {}
    for kind in KINDS:
        trainer = train(folder, kind)
        assert trainer.accelerator.num_processes == 2
        wrapped = type(trainer.model_wrapped).__name__
        assert wrapped.startswith("Distributed" if "ddp" in kind else "FSDP")
        assert trainer._student[1] is not None  # without logits
        found[kind] = facts(trainer)
        AcceleratorState._reset_state()
    for name, kind in (("plain", Trainer), ("alone", KDTrainer)):
        given = dict(average_tokens_across_devices=False, kept=False)
        found[name] = facts(train(folder, trainer=kind, **given))
        found[f"{name} together"] = facts(train(folder, trainer=kind, kept=False))
    if trainer.accelerator.is_main_process:
        torch.save(found, f"{folder}/found.pt")
    trainer.accelerator.end_training()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("processes"))
    run(f"test_trainer_processes.job({folder!r})", 2)
    return torch.load(f"{folder}/found.pt")


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_have_the_weights_of_one(found, tmp_path, kind):
    """Whose batch is as large as those of both; and the log has the same loss and terms."""
    one = train(str(tmp_path), kind, trainer=KDTrainer, per_device_train_batch_size=4)
    mine, terms, _ = found[kind]
    wanted, wanted_terms, _ = facts(one)
    assert_trained_alike(mine, wanted, weights(student(kind)), 1e-5)
    torch.testing.assert_close(terms, wanted_terms, rtol=1e-5, atol=0.0)


def test_the_number_of_processes_counts_where_it_does_for_the_trainer(found):
    """With `average_tokens_across_devices` and without; the loss of the evaluation is the same."""
    for more in ("", " together"):
        (mine, terms, evaluated), (wanted, wanted_terms, its) = (
            found[name + more] for name in ("alone", "plain")
        )
        assert_trained_alike(mine, wanted, weights(make()), 1e-5)
        torch.testing.assert_close(terms[:, 0], wanted_terms[:, 0], rtol=1e-5, atol=0.0)
        assert evaluated == pytest.approx(its, rel=1e-5)
    assert not torch.allclose(found["alone"][0], found["alone together"][0], rtol=1e-3)
