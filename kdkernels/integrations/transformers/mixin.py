"""`KDTrainerMixin`: a Trainer of `transformers` whose loss is a `KDLoss` with a teacher."""

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from ...cache import TeacherCache
from ...distill import checks
from ...distill.batches import Batch
from ...distill.predictions import CachedTeacher, SeveralTeachers, as_teacher
from ...functional import kd_loss
from ...modules import KDLoss
from ...source_rows import detached
from .columns import Collator, TeacherColumns
from .hidden_states import HiddenStates, base_of

IGNORED = -100  # the label that the Trainer does not count
OWN = "labels", "shift_labels", "skip_logits"  # inputs that are not for the models


class KDTrainerMixin:
    """What makes of a `transformers.Trainer`, or a class derived from it, one with a teacher.

    The loss is `kd_loss` of student and teacher, over the tokens of the whole optimiser step: of
    all its batches and all processes, whatever `gradient_accumulation_steps` is. The student gets
    no labels, so that no cross-entropy is computed and thrown away, and where `HiddenStates` can
    take a model apart, neither it nor the teacher makes logits. The trainer's log has the two
    terms as `distill` and `hard`, where there are two.

    Args:
        *args, **kwargs: of the Trainer.
        teacher: a model (a `torch.nn.Module` of the student's inputs; it is frozen, moved to the
            trainer's device, called in evaluation mode, and never saved); a `cache.TeacherCache`
            of the data's token ids; `TeacherColumns` of the data set, which are kept; a list of
            models and caches, or `distill.SeveralTeachers` with their weights; or None, where the
            loss has alpha = 0.
        loss: a `KDLoss`, or a dict of its keywords; None: `KDLoss()`. Of a causal language model
            `shift` need not be given; and the Trainer's `label_smoothing_factor` is the loss's.

    Raises:
        TypeError, ValueError: what cannot be honoured: `compute_loss_func`, a loss that is not the
            mean over labels other than −100, a teacher that is the student or has another
            vocabulary, `nn.DataParallel`, sequences split over processes, the loss of a router.

    Example:
        class Mine(KDTrainerMixin, SFTTrainer):
            pass

        Mine(model, args, train_dataset=data, teacher=teacher, loss=KDLoss(temperature=2.0))
    """

    # It is divided by the tokens of all accumulated batches: the Trainer must not divide again.
    loss_is_scaled_for_ga: Any = True

    # Of the Trainer.
    accelerator: Any
    args: Any
    compute_loss_func: Any
    data_collator: Any
    get_tp_size: Any
    is_fsdp_enabled: Any
    label_names: Any
    model: Any
    state: Any
    _signature_columns: Any

    def __init__(self, *args: Any, teacher: Any = None, loss: Any = None, **kwargs: Any) -> None:
        self.kd_loss = _as_loss(loss)
        self.teacher = teacher
        self._loss_only = False
        self._student: tuple[nn.Module, HiddenStates | None] | None = None
        self._terms: torch.Tensor | None = None  # (2,), Σ over batches since it was None
        self._terms_state: Any = None  # of the run that they are of, a new one for every run
        self._terms_since = 0  # the step before
        super().__init__(*args, **kwargs)
        self._check_arguments()
        shift = self.kd_loss.options["shift"] or _shifts(self.model)
        smoothing = self._label_smoothing()
        options = {**self.kd_loss.options, "shift": shift, "label_smoothing": smoothing}
        self.kd_loss = KDLoss(**options)
        self._loss_shifts_labels = shift  # which labels the Trainer counts
        self.model_accepts_loss_kwargs = True  # or it would not count them
        self.label_names = self.label_names or ["labels"]  # of a student that takes none
        self._check_teacher(self.teacher)
        self._teacher = self._prepared(self.teacher)
        if isinstance(teacher, TeacherColumns):
            self.data_collator = Collator(self.data_collator, teacher.columns)
        if not self.is_fsdp_enabled:
            self._headed(self.model, self.model)

    def _check_arguments(self) -> None:
        if self.compute_loss_func is not None:
            raise ValueError(
                "compute_loss_func must be None, a teacher's loss is `loss`: it would see neither "
                "the teacher nor the columns of the data"
            )
        if self.args.n_gpu > 1:
            raise ValueError(
                f"nn.DataParallel over {self.args.n_gpu} GPUs is not supported: start a process "
                "for each, with torchrun or accelerate launch, or show one in CUDA_VISIBLE_DEVICES"
            )
        parallel = getattr(self.accelerator, "parallelism_config", None)
        for name in ("cp_size", "sp_size"):
            if (ranks := getattr(parallel, name, 1)) > 1:
                raise ValueError(
                    f"parallelism_config must leave sequences whole, got {name}={ranks}"
                )
        if (kind := getattr(self.args, "loss_type", "nll")) != "nll":  # of TRL's SFTConfig
            raise ValueError(f"loss_type must be 'nll', a teacher's loss is `loss`, got {kind!r}")
        config = getattr(self.model, "config", None)
        if getattr(config, "output_router_logits", False):
            raise ValueError(
                "the student's output_router_logits must be False (give SFTConfig, which sets it, "
                "router_aux_loss_coef=0.0): the loss of its router, which it adds to its own, is "
                "not computed"
            )

    def _label_smoothing(self) -> float:
        mine, given = self.kd_loss.options["label_smoothing"], self.args.label_smoothing_factor
        if mine and given and mine != given:
            raise ValueError(
                f"label_smoothing of the loss and label_smoothing_factor of the Trainer must not "
                f"differ, got {mine} and {given}"
            )
        return float(mine or given)

    def _check_teacher(self, teacher: Any) -> None:
        several = teacher.teachers if isinstance(teacher, SeveralTeachers) else teacher
        if isinstance(several, (list, tuple)):
            if not several:
                raise ValueError("teacher must have a model or cache at least, got an empty list")
            for each in several:
                if each is None or isinstance(each, (TeacherColumns, list, tuple)):
                    raise TypeError(
                        f"a list of teachers must be of models and caches, got a "
                        f"{type(each).__name__} among them"
                    )
                self._check_teacher(each)
        elif teacher is None:
            if self.kd_loss.options["alpha"] > 0:
                raise ValueError("teacher must be given, got None, for a loss with alpha > 0")
        elif isinstance(teacher, nn.Module):
            trained = {id(x) for x in self.model.parameters() if x.requires_grad}
            if any(id(x) in trained for x in teacher.parameters()):
                raise ValueError(
                    "teacher must have parameters of its own, it has some that the student "
                    "trains: give a copy, of copy.deepcopy, from before adapters are added"
                )
            self._check_vocabulary(teacher)
        elif not isinstance(teacher, (TeacherCache, TeacherColumns)):
            raise TypeError(
                "teacher must be a torch.nn.Module, a TeacherCache, TeacherColumns, or a list of "
                f"models and caches, got {type(teacher).__name__}"
            )

    def _check_vocabulary(self, teacher: nn.Module) -> None:
        mine, its = _vocabulary(self.model), _vocabulary(teacher)
        if mine and its and mine != its and self.kd_loss.options["vocab_size"] is None:
            raise ValueError(
                f"teacher must have the student's vocabulary, got {its} and {mine} classes: if "
                "they are the same tokens, padded to two widths, give KDLoss(vocab_size=...)"
            )

    def _prepared(self, teacher: Any) -> Callable[[Batch], Any] | None:
        """What a batch is asked of."""
        if teacher is None or isinstance(teacher, TeacherColumns):
            return None
        if isinstance(teacher, (list, tuple)):
            teacher = SeveralTeachers(teacher)
        if isinstance(teacher, SeveralTeachers):
            models = [self._ready(each) for each in teacher.teachers]
            teacher = SeveralTeachers(models, teacher.weights, teacher.mean)
        else:
            teacher = self._ready(teacher)
        found: Callable[[Batch], Any] = as_teacher(teacher, self.accelerator)
        return found

    def _ready(self, teacher: Any) -> Any:
        """A model frozen, where it runs, and without logits if it can be; or a cache."""
        if not isinstance(teacher, nn.Module) or isinstance(teacher, CachedTeacher):
            return teacher
        as_teacher(teacher, self.accelerator)  # moves it
        teacher.eval().requires_grad_(False)
        if isinstance(teacher, HiddenStates):
            return teacher
        return _without_logits("teacher", teacher) or teacher

    def _headed(self, model: nn.Module, inner: nn.Module) -> HiddenStates | None:
        """The student without logits, None if it cannot be.

        Args:
            model: the student with what wraps it.
            inner: the student, another one for every trial of a hyperparameter search.
        """
        if self._student is None or self._student[0] is not inner:
            plugin = getattr(self.accelerator.state, "deepspeed_plugin", None)
            if plugin is not None and plugin.zero_stage == 3:
                self._student = inner, None
                text = "the student's logits will exist in full: ZeRO-3 gathers a weight for the"
                warnings.warn(
                    f"{text} layer that it is of, a head's not for the loss", stacklevel=3
                )
                return None

            def find() -> torch.Tensor:  # sharded weights are whole inside of the forward
                self._student = inner, _without_logits("student", inner)
                return torch.zeros(())

            with torch.no_grad():
                _inside(model, inner, find)
        assert self._student is not None
        return self._student[1]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The loss of a batch, as `Trainer.compute_loss`: () or (loss, outputs).

        Args:
            inputs: of the models, and labels (B, L), −100 where they do not count; shift_labels
                (B, L) take their place, and are not shifted again.
            num_items_in_batch: what the sum over the batch's tokens is divided by; None: by their
                number, of this batch in this process.

        Raises:
            ValueError: a batch without labels, without the teacher's columns, or of an
                encoder-decoder without decoder inputs.
        """
        options = dict(self.kd_loss.options)
        labels = inputs.get("labels") if (given := inputs.get("shift_labels")) is None else given
        options["shift"] &= given is None
        if labels is None:
            raise ValueError(
                f"the batch must have labels, {IGNORED} where they do not count, it has "
                f"{sorted(inputs)}: DataCollatorForLanguageModeling(tokenizer, mlm=False) makes "
                "them of the input_ids"
            )
        inner = self.accelerator.unwrap_model(model, keep_torch_compile=False)
        if getattr(getattr(inner, "config", None), "is_encoder_decoder", False):
            if inputs.get("decoder_input_ids") is None:
                raise ValueError(
                    "the batch must have decoder_input_ids, which the student does not make "
                    "without labels: DataCollatorForSeq2Seq(tokenizer, model=model) does"
                )
        of_models = self._of_models(inputs)
        target = self._target(inputs, of_models, labels)
        whole = return_outputs and not self._loss_only
        headed = None if whole else self._headed(model, inner)
        # Two terms are logged where there are two.
        options["return_terms"] = both = model.training and 0 < options["alpha"] < 1
        outputs = None

        def loss_inside(**given: Any) -> Any:
            nonlocal outputs
            if headed is not None:
                with self.accelerator.autocast():
                    prediction = headed(**given)
            else:
                outputs = inner.forward(**given)
                prediction = _logits(outputs)
            teacher = detached(prediction) if target is None else target
            return kd_loss(prediction, teacher, labels, num_items=num_items_in_batch, **options)

        found = _inside(model, inner, loss_inside, **of_models)
        scale, share = 1, 1.0
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            # It is of all processes, whose gradients are averaged.
            scale = self.accelerator.num_processes // self.get_tp_size()
        if both:
            if num_items_in_batch is not None:
                share = found.num_items / torch.as_tensor(num_items_in_batch).clamp(min=1) * scale
            self._add_terms(torch.stack([found.distill, found.hard]) * share)
        loss = (found.loss if both else found) * scale
        if not return_outputs:
            return loss
        return loss, {"loss": loss} if outputs is None else outputs

    def _of_models(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        apart = {*OWN, *self._columns()}
        return {name: x for name, x in inputs.items() if name not in apart}

    def _columns(self) -> list[str]:
        return [*self.teacher.columns.values()] if isinstance(self.teacher, TeacherColumns) else []

    def _target(self, inputs: Mapping[str, Any], of_models: dict[str, Any], labels: Any) -> Any:
        """The teacher's prediction for a batch, None where the loss does not read it."""
        if not checks.reads_teacher(self.kd_loss, labels):
            return None
        if isinstance(self.teacher, TeacherColumns):
            return self.teacher(inputs)
        assert self._teacher is not None
        with torch.no_grad(), self.accelerator.autocast():
            return self._teacher(Batch(torch.arange(len(labels)), of_models, labels))

    def _add_terms(self, terms: torch.Tensor) -> None:
        if self._terms is None or self._terms_state is not self.state:
            self._terms, self._terms_state = torch.zeros_like(terms), self.state
            self._terms_since = self.state.global_step
        self._terms += terms

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As `Trainer.log`; with a training loss come its terms, means over the same steps."""
        if "loss" in logs and self._terms is not None:
            steps = self.state.global_step - self._terms_since
            terms = self.accelerator.gather(self._terms[None]).mean(0) / max(steps, 1)
            logs["distill"], logs["hard"] = terms.tolist()
            self._terms = None
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    def prediction_step(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> Any:
        """As `Trainer.prediction_step`; logits are made only where something reads them."""
        if inputs.get("labels") is None:
            inputs = {name: x for name, x in inputs.items() if name not in self._columns()}
        self._loss_only = prediction_loss_only
        try:
            return super().prediction_step(  # type: ignore[misc]
                model, inputs, prediction_loss_only, ignore_keys
            )
        finally:
            self._loss_only = False

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()  # type: ignore[misc]
        kept = self._signature_columns
        kept += [name for name in self._columns() if name not in kept]


def _as_loss(loss: Any) -> KDLoss:
    loss = KDLoss(**(loss or {})) if loss is None or isinstance(loss, Mapping) else loss
    checks.single_loss(loss)
    for option, wanted in (("reduction", "mean"), ("ignore_index", IGNORED)):
        if (got := loss.options[option]) != wanted:
            raise ValueError(f"loss must have {option}={wanted!r}, as the Trainer has, got {got!r}")
    found: KDLoss = loss
    return found


def _shifts(model: nn.Module) -> bool:
    """Whether a model's own loss is that of position i for label i + 1."""
    from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

    inner = base_of(model)
    if getattr(getattr(inner, "config", None), "is_encoder_decoder", False):
        return False
    loss = LOSS_MAPPING.get(getattr(inner, "loss_type", None) or "")
    if loss is not None:
        return loss is ForCausalLMLoss
    # GPT2LMHeadModel, say: of a class that it has no loss for, `transformers` takes the causal one.
    embeddings = getattr(inner, "get_output_embeddings", None)
    return embeddings is not None and embeddings() is not None


def _vocabulary(model: nn.Module) -> int | None:
    config = getattr(model.model if isinstance(model, HiddenStates) else model, "config", None)
    if config is None:
        return None
    size: int | None = getattr(config.get_text_config(), "vocab_size", None)
    return size


def _without_logits(role: str, model: nn.Module) -> HiddenStates | None:
    """None, and a warning that says why, of a language model that needs its logits."""
    try:
        return HiddenStates(model)
    except (TypeError, ValueError) as error:
        embeddings = getattr(base_of(model), "get_output_embeddings", None)
        if embeddings is not None and embeddings() is not None:
            warnings.warn(f"the {role}'s logits will exist in full: {error}", stacklevel=4)
    return None


def _logits(output: Any) -> torch.Tensor:
    """(B, ..., V) of what a model returns."""
    logits = (
        output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    )
    if not isinstance(logits, torch.Tensor):
        raise TypeError(f"the student must return logits, got {type(output).__name__}")
    return logits


def _inside(model: nn.Module, inner: nn.Module, function: Callable[..., Any], **given: Any) -> Any:
    """function(**given), called where the model calls the forward of the module inside of it.

    So DDP and FSDP, which act on a forward's inputs and outputs, see the loss as the output, and
    all parameters that it takes, the head's too, are used inside. The forward itself is as it was
    while the function runs.
    """
    own = inner.__dict__.get("forward")  # of an instance: accelerate's, with autocast

    def restore() -> None:
        if own is None:
            inner.__dict__.pop("forward", None)
        else:
            inner.forward = own

    def instead(**again: Any) -> Any:
        restore()
        return function(**again)

    inner.forward = instead
    try:
        return model(**given)
    finally:
        restore()
