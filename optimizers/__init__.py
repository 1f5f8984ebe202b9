"""Optimizers and learning-rate schedules, some built by name from plain numbers."""

from .builders import (
    EXPONENT_SCHEDULES,
    OPTIMIZERS,
    SCHEDULES,
    SCHEDULES_OF_ALL_STEPS,
    build_exponent_schedule,
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
    "EXPONENT_SCHEDULES",
    "LCAM",
    "OPTIMIZERS",
    "SCHEDULES",
    "SCHEDULES_OF_ALL_STEPS",
    "SMES",
    "ExponentSchedule",
    "GatedSMES",
    "build_exponent_schedule",
    "build_optimizer",
    "build_schedule",
    "learning_rates",
    "load_training_state",
    "training_state",
]
