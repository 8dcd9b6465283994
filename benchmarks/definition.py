"""Whether an output is right: how far it is from the float64 definition, and how far it may be.

An error of a gradient's entry is relative to what the entry is made of (`Definition.sizes`), or to
the entry where that is larger: cancellation between student and teacher is no excuse, and no error.
"""

import torch

# The largest errors (loss, gradient) of what is timed, by suite, dtype, and what is computed in it:
# "exact": one rounding of the gradient, beyond what the float32 logits of a head may be off by;
# "float32": sums of V terms in float32, in PyTorch's way; "logits": a head's logits are rounded to
# its dtype; "own": everything is. In half precision a KL of 0.8 comes out wrong by 4 %.
TOLERANCES = {
    ("dense", "float32"): {"exact": (1e-5, 1e-4), "float32": (2e-4, 1e-3), "own": (2e-4, 1e-3)},
    ("dense", "bfloat16"): {
        "exact": (1e-5, 1e-4 + 2.0**-8),
        "float32": (2e-4, 2.0**-7),
        "own": (0.1, 0.25),
    },
    ("dense", "float16"): {
        "exact": (1e-5, 1e-4 + 2.0**-11),
        "float32": (2e-4, 2.0**-9),
        "own": (0.02, 0.05),
    },
    ("linear", "float32"): dict.fromkeys(("exact", "float32", "logits", "own"), (1e-5, 1e-4)),
    ("linear", "bfloat16"): {
        **dict.fromkeys(("exact", "float32", "logits"), (2e-3, 2.0**-4)),
        "own": (0.1, 2.0**-2),
    },
    ("linear", "float16"): {
        **dict.fromkeys(("exact", "float32", "logits"), (2e-4, 2.0**-7)),
        "own": (0.02, 2.0**-5),
    },
    ("loop", "float32"): dict.fromkeys(("exact", "float32", "logits", "own"), (2e-4, 1e-3)),
    # The models themselves are computed in half precision.
    ("loop", "bfloat16"): dict.fromkeys(("exact", "float32", "logits", "own"), (0.1, 0.5)),
    ("loop", "float16"): dict.fromkeys(("exact", "float32", "logits", "own"), (0.02, 0.1)),
}
TOLERANCES.update(
    {("sparse", dtype): TOLERANCES["dense", dtype] for dtype in ("float32", "bfloat16", "float16")}
)
# What is smaller may have become 0: the normal numbers' least, half of a subnormal's step.
FLUSHED = {"float32": 2.0**-126, "bfloat16": 2.0**-126, "float16": 2.0**-25}


def errors(step, definitions):
    """(relative error of the loss, largest error of a gradient's entry, None without gradients).

    Of a step that has run, by the definition it is nearest to. NaN where the output is.
    """
    found = [errors_by(step, each) for each in definitions]
    return min(found, key=lambda of: of[0] if of[1] is None else of[1])


def errors_by(step, definition):
    case = step.case
    value = step.value.detach().double()
    of_loss = float((value - definition.loss).abs() / definition.loss.abs())
    if not definition.gradients:
        return of_loss, None
    worst, flushed = [], FLUSHED[case.dtype] / case.upstream
    wanted = definition.gradients, definition.sizes, definition.rows
    for gradient, grad, size, rows in zip(step.gradients(), *wanted, strict=True):
        found = gradient[rows.to(gradient.device)].double() / case.upstream
        error = ((found - grad).abs() - flushed).clamp_(min=0)
        # A NaN anywhere makes the sum NaN, and with it the error.
        unwritten = 0 * gradient.sum(dtype=torch.float32)
        of = torch.maximum(size, grad.abs()).clamp_(min=2.0**-126)
        worst.append((error / of).max() + unwritten)
    return of_loss, float(torch.stack(worst).max())


def verdict(found, allowed):
    """'ok', or what is wrong: errors and tolerances of (loss, gradient)."""
    wrong = [
        f"{what} off by {error:.1e}, {tolerance:.1e} allowed"
        for what, error, tolerance in zip(("loss", "gradient"), found, allowed, strict=True)
        if error is not None and not error <= tolerance  # NaN is wrong
    ]
    return "wrong: " + "; ".join(wrong) if wrong else "ok"
