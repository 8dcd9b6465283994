"""Hugging Face models, whose logits need not exist: hidden states and the weight behind them."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ...distill.predictions import inference
from ...sources import LinearHead

TOKENS = 8  # of the probe
LARGE = 100.0  # of the largest logit, so that a soft cap nobody knows of shows
# What a logit may differ by, relative to the largest: products in another order.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 4e-2, torch.float16: 5e-3, torch.float64: 1e-9}
# As configurations call them. Some scales multiply and some divide, by names that do not say which.
SCALES = "logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier"
SOFTCAPS = "final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap"


class HiddenStates(nn.Module):
    """A causal language model that returns a `LinearHead` instead of logits.

    The model is taken apart into its decoder and its output embedding, whose bias, logit scale and
    soft cap are found too. That they make the model's own logits is tried on a few tokens, because
    configurations of different architectures mean different things by the same names. The model's
    parameters are shared: it is trained and saved as it is.

    Args:
        model: a `transformers` causal language model, or a PEFT model of one.

    Raises:
        TypeError: the model has no decoder, or an output embedding that is no `torch.nn.Linear`
            (one with LoRA is not: leave it out of the adapter's target modules).
        ValueError: what was found does not make the model's logits; train on logits then.

    Example:
        distiller = Distiller(HiddenStates(student), HiddenStates(teacher), blocks, loss=loss)
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        inner = base_of(model)
        self.model = model
        decoders, head = _decoders(inner), _head(inner)
        config = inner.config.get_text_config()
        for decoder in decoders:
            self.parts = decoder, head  # a tuple is not registered: they are the model's
            if found := _found(model, config, decoder, head):
                break
        else:
            raise ValueError(
                f"the logits of {_name(model)} are not those of its output embedding, whether "
                f"scaled by {', '.join(f'{x:g}' for x in _scales(config))} or capped at "
                f"{_softcaps(config)[0]}: train on logits"
            )
        self.logit_scale, self.softcap = found

    def forward(self, **inputs: Any) -> LinearHead:
        """Keyword arguments of the decoder: input_ids (B, L), attention_mask (B, L), ... ->
        `LinearHead`, hidden (B, L, H) and weight (V, H); under autocast in its dtype."""
        decoder, head = self.parts
        hidden = _hidden(decoder, inputs)
        kind, dtype = hidden.device.type, head.weight.dtype
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
        weight, bias = head.weight.to(dtype), None if head.bias is None else head.bias.to(dtype)
        if not torch.is_grad_enabled():  # parameters require grad all the same, a teacher must not
            weight, bias = weight.detach(), None if bias is None else bias.detach()
        return LinearHead(hidden.to(dtype), weight, bias, self.logit_scale, self.softcap)


def base_of(model: Any) -> Any:
    """Without PEFT's adapters around it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _decoders(model: Any) -> list[Any]:
    """What may make the last hidden states: of all inputs, images too; or of text alone, which is
    what some architectures call themselves."""
    decoders = []
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
        decoders = [getattr(model, "base_model", None), decoder]
    decoders = [x for x in dict.fromkeys(decoders) if x is not None and x is not model]
    if not decoders:
        raise TypeError(f"model must be a causal language model, {_name(model)} has no decoder")
    return decoders


def _head(model: Any) -> nn.Linear:
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    # Of FSDP2 it is a class of its own, with the same forward.
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward:
        where = f"{type(head).__module__}.{type(head).__name__}"
        raise TypeError(
            f"the output embedding must be a torch.nn.Linear without adapters, that of "
            f"{_name(model)} is {'missing' if head is None else where}"
        )
    return head


def _hidden(decoder: Any, inputs: Mapping[str, Any]) -> torch.Tensor:
    """-> (B, L, H)"""
    output = decoder(**inputs, use_cache=False, return_dict=True)
    hidden: torch.Tensor = output.last_hidden_state
    return hidden


def _scales(config: Any) -> list[float]:
    scales = [1.0]
    for value in (getattr(config, name, None) for name in SCALES):
        scales += [value, 1 / value] if value else []
    return scales


def _softcaps(config: Any) -> list[float | None]:
    return [value for name in SOFTCAPS if (value := getattr(config, name, None))] + [None]


def _found(
    model: Any, config: Any, decoder: nn.Module, head: nn.Linear
) -> tuple[float, float | None] | None:
    """The scale and the soft cap that make the model's own logits of its head's; None: nothing."""
    scales, softcaps = _scales(config), _softcaps(config)
    tokens = torch.arange(TOKENS, device=head.weight.device)[None] % config.vocab_size  # (1, L)
    with inference(model):
        hidden = _hidden(decoder, dict(input_ids=tokens))
        largest = head(hidden).abs().amax().item() or 1.0
        pairs = []
        large = max([LARGE, *(2 * softcap for softcap in softcaps if softcap)])
        # Small logits do not show a soft cap, large ones not what is added to them.
        for factor in (1.0, large / largest):
            with _amplified(decoder, factor):
                # Its hooks are not called: those of FSDP2 shard what is in use around this.
                wanted = model.forward(input_ids=tokens, use_cache=False, return_dict=True).logits
            plain = head(hidden * factor)
            pairs.append((plain.double(), wanted.double()))
    tolerance = TOLERANCE[plain.dtype]
    for scale in scales:
        for softcap in softcaps:
            if all(_same(*pair, scale, softcap, tolerance) for pair in pairs):
                return float(scale), softcap
    return None


@contextlib.contextmanager
def _amplified(decoder: nn.Module, factor: float) -> Iterator[None]:
    """While this is open, the decoder's last hidden states come out that many times as large."""

    def amplify(module: nn.Module, args: Any, output: Any) -> Any:
        output.last_hidden_state = output.last_hidden_state * factor
        return output

    handle = decoder.register_forward_hook(amplify)
    try:
        yield
    finally:
        handle.remove()


def _same(
    plain: torch.Tensor,
    wanted: torch.Tensor,
    scale: float,
    softcap: float | None,
    tolerance: float,
) -> bool:
    """plain, wanted: (1, L, V) float64"""
    logits = plain * scale
    if softcap is not None:
        logits = softcap * (logits / softcap).tanh()
    if logits.shape != wanted.shape:
        return False
    return bool(((logits - wanted).abs() <= tolerance * wanted.abs().amax()).all())


def _name(model: object) -> str:
    return type(model).__name__
