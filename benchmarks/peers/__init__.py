"""Who computes the loss: one adapter for each library, used where it is installed.

An adapter calls its library as its users would. What a library lacks of a formula, PyTorch adds,
within the time and by name in the title; where that is not possible the variant is listed with what
it lacks.
"""

from . import fla, kdkernels, liger, pytorch, quack, speculators, trl

ADAPTERS = kdkernels, pytorch, liger, trl, fla, speculators, quack
PACKAGES = "liger-kernel", "trl", "fla-core", "speculators", "quack-kernels"


def variants_of(suite):
    """{name: Variant} of everybody who takes part in a suite."""
    found = {}
    for adapter in ADAPTERS:
        for name, variant in adapter.VARIANTS.get(suite, {}).items():
            assert name not in found, name
            found[name] = variant
    return found
