"""`python -m kdkernels bench cache`: what a teacher on disk costs, and what it teaches."""
