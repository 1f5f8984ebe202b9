"""Optimizers and learning-rate schedules, some built by name from plain numbers."""

from .builders import (
    OPTIMIZERS,
    SCHEDULES,
    SCHEDULES_OF_ALL_STEPS,
    build_optimizer,
    build_schedule,
    learning_rates,
    load_training_state,
    training_state,
)
from .exponent import ExponentSchedule
from .lcam import LCAM
from .smes import SMES, GatedSMES

__all__ = [
    "LCAM",
    "OPTIMIZERS",
    "SCHEDULES",
    "SCHEDULES_OF_ALL_STEPS",
    "SMES",
    "ExponentSchedule",
    "GatedSMES",
    "build_optimizer",
    "build_schedule",
    "learning_rates",
    "load_training_state",
    "training_state",
]
