"""Microbenchmarks of the distillation loss: `python -m kdkernels bench`, read README.md."""
