"""Optimizers and learning-rate schedules, built by name from plain numbers."""

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

__all__ = [
    "OPTIMIZERS",
    "SCHEDULES",
    "SCHEDULES_OF_ALL_STEPS",
    "build_optimizer",
    "build_schedule",
    "learning_rates",
    "load_training_state",
    "training_state",
]
