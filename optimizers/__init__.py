"""Optimizers and learning-rate schedules, built by name from plain numbers."""

from .builders import OPTIMIZERS, SCHEDULES, build_optimizer, build_schedule

__all__ = ["OPTIMIZERS", "SCHEDULES", "build_optimizer", "build_schedule"]
