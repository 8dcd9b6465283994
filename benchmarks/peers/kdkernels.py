"""kdkernels itself, by its backends."""

import functools

from kdkernels import LinearHead, kd_loss
from kdkernels.backends import registry

from .base import Missing, Variant, on_gpu


def loss_of(case, backend, **options):
    """`kd_loss` as the case wants it; raises Missing where the backend cannot be had."""
    try:
        registry.resolve(case.device, case.torch_dtype, backend)
    except (RuntimeError, TypeError) as error:
        raise Missing(str(error)) from error
    return functools.partial(kd_loss, **case.options(backend=backend, **options))


def of_logits(case, backend, **options):
    loss = loss_of(case, backend, **options)
    return lambda x: loss(x.student, x.teacher, x.labels)


def of_heads(case, backend):
    loss = loss_of(case, backend)

    def call(x):
        student = LinearHead(x.hidden, x.weight)
        return loss(student, LinearHead(x.teacher_hidden, x.teacher_weight), x.labels)

    return call


def triton(make, case):
    on_gpu(case)
    return make(case, "triton")


def variants(make, **more):
    def of(backend):
        return functools.partial(make, backend=backend)

    return {
        "native": Variant("kdkernels", of("native"), "exact", ours=True),
        **more,
        "triton": Variant(
            "kdkernels, backend='triton'", functools.partial(triton, make), "exact", ours=True
        ),
        "eager": Variant("kdkernels, backend='eager'", of("eager"), "float32", ours=True),
    }


INPLACE = Variant(
    "kdkernels, inplace=True",
    functools.partial(of_logits, backend="native", inplace=True),
    "exact",
    ours=True,
    overwrites=True,
)
VARIANTS = {
    "dense": variants(of_logits, inplace=INPLACE),
    "linear": variants(of_heads),
    "sparse": variants(of_logits),
}
