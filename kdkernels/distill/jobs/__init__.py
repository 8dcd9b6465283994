"""Distillation of real checkpoints, from directories to a directory."""

from .cache_job import CacheConfig, CacheJob
from .config import Config
from .job import Job

__all__ = ["CacheConfig", "CacheJob", "Config", "Job"]
