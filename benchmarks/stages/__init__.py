"""Where the time of a pass over dense rows goes: `python -m benchmarks.stages`, see README.md."""
