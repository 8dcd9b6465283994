"""Distillation of real checkpoints, from directories to a directory."""

from .config import Config
from .job import Job

__all__ = ["Config", "Job"]
