"""The configuration of a training run: typed, bounded, from files, with overrides from the command line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from .errors import UserError, reading
from .files import write_text
from .yaml12 import dump, load

Probability = Annotated[float, Field(ge=0.0, lt=1.0)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Weight = Annotated[float, Field(ge=0.0)]
Count = Annotated[int, Field(ge=1)]
Exponent = Annotated[float, Field(ge=-4.0, le=4.0)]


class Section(BaseModel):
    """A part of the configuration: immutable, no unknown keys, no NaN."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True)


class DataConfig(Section):
    """What is trained on."""

    name: str = Field("mocap6", description="Dataset, as trgnet.load_dataset knows it.")
    root: str | None = Field(
        None, description="Folder that the dataset is read from; null for the datasets in the package."
    )
    text: str | tuple[str, str] | None = Field(
        None,
        description="Text embeddings: an .npz of trgnet text embed, two .npy files (joints, actions) in the "
        "dataset's order, or 'none' to know nothing; null: those of the dataset.",
    )
    cache: str | None = Field(
        None,
        description="Folder for prepared features, which are then mapped from disk; null: kept in memory.",
    )
    test: list[str] | None = Field(
        None, description="Names of the recordings held out for testing; null: the dataset's own choice."
    )
    validation: float = Field(
        0.0, ge=0.0, lt=1.0, description="Share of the training recordings held out for validation."
    )
    options: dict[str, Any] = Field(
        {}, description="Further options of the dataset, see trgnet.load_dataset."
    )


class AugmentConfig(Section):
    """Augmentation of the training recordings (SAEP): at most one of the two per recording and epoch."""

    occlusion: float = Field(0.35, ge=0.0, le=1.0, description="Probability of zeroing random joints.")
    rotation: float = Field(
        0.35, ge=0.0, le=1.0, description="Probability of a rotation about the vertical axis."
    )

    @model_validator(mode="after")
    def _at_most_one(self) -> AugmentConfig:
        if self.occlusion + self.rotation > 1:
            raise ValueError(
                f"occlusion + rotation must be at most 1, got {self.occlusion + self.rotation:g}"
            )
        return self


class ModelConfig(Section):
    """The network; defaults are those of the publication (arXiv 2503.15126)."""

    features: Count = Field(64, description="Feature channels F.")
    relations: Count = Field(8, description="Relation channels R of the dynamic graph convolution.")
    hops: Count = Field(
        13, description="Hops of the multi-scale graph convolution, the joint itself included."
    )
    layers: Count = Field(10, description="Attention layers of the encoder; layer i has dilation 2^i.")
    refine_layers: Count = Field(10, description="Layers of every refinement stage.")
    action_stages: int = Field(
        2, ge=1, description="Class predictions: the encoder's and every refinement's."
    )
    boundary_stages: int = Field(
        3, ge=1, description="Boundary predictions: the encoder's and every refinement's."
    )
    heads: Count = Field(4, description="Attention heads; must divide the feature channels.")
    channel_dropout: Probability = Field(
        0.3, description="Dropout of whole channels before the fusion layers."
    )
    fusion_dropout: Probability = Field(0.3, description="Dropout inside the fusion layers.")
    attention_dropout: Probability = Field(0.05, description="Dropout of the attention's output.")
    output_dropout: Probability = Field(0.5, description="Dropout of every dilated layer's output.")

    @model_validator(mode="after")
    def _heads_divide_features(self) -> ModelConfig:
        if self.features % self.heads:
            raise ValueError(f"heads ({self.heads}) must divide features ({self.features})")
        return self


class LossConfig(Section):
    """Weights of the losses beside the cross entropy, whose weight is 1."""

    boundary: Weight = Field(0.1, description="Weight of the boundary loss.")
    absolute: Weight = Field(0.8, description="Weight of the contrast of segments with their action's text.")
    relative: Weight = Field(
        1.0, description="Weight of the match of segment distances with the action graph."
    )
    class_weights: Literal["none", "median_frequency"] = Field(
        "none", description="Class weights of the cross entropy."
    )


class OptimizerConfig(Section):
    """The optimizer."""

    name: Literal["adam", "adamw", "sgd", "lcam", "smes", "gated_smes"] = Field(
        "adam",
        description="Optimizer: adam, adamw, sgd as torch.optim defines them; lcam (SGD whose momentum the loss "
        "chooses), smes (Adam with another exponent), gated_smes (both in one).",
    )
    lr: float = Field(1e-3, gt=0.0, description="Learning rate.")
    weight_decay: Weight = Field(0.0, description="Weight decay: decoupled for adamw, L2 for the others.")
    betas: tuple[Probability, Probability] = Field(
        (0.9, 0.999), description="Decay rates of adam, adamw and smes; gated_smes takes the second."
    )
    momentum: Probability = Field(0.9, description="Momentum of sgd.")
    momenta: tuple[Probability, Probability] = Field(
        (0.9, 0.95),
        description="Momentum of lcam, first decay rate of gated_smes: where the loss is below its average, and else.",
    )
    average: Literal["epoch", "window", "ema", "run"] = Field(
        "epoch",
        description="Losses that lcam and gated_smes average; trainings of one epoch want window or ema.",
    )
    window: Count = Field(100, description="Losses in the window of average window.")
    smoothing: Probability = Field(0.98, description="Weight of the past in average ema.")
    gate: Literal["next", "same"] = Field(
        "next", description="Step on which a loss decides, in lcam and gated_smes."
    )
    eps: float = Field(
        1e-8, ge=0.0, description="Added to the denominator of adam, adamw, smes and gated_smes."
    )
    alpha: Exponent = Field(
        0.5,
        description="Exponent of the second moment in smes and gated_smes: 0.5 is Adam's. Each wants a learning rate "
        "of its own.",
    )
    alphas: tuple[Exponent, Exponent] | None = Field(
        None, description="Two exponents of gated_smes, chosen as momenta are; null: alpha for both."
    )

    @property
    def exponent(self) -> float | tuple[float, float] | None:
        """The exponent, or one for each phase; None where the optimizer has none."""
        if self.name == "gated_smes" and self.alphas is not None:
            return self.alphas
        return self.alpha if self.name in ("smes", "gated_smes") else None


class ExponentConfig(Section):
    """The exponent of smes and gated_smes over the training, set anew for every optimizer step."""

    name: Literal["constant", "linear", "cosine", "cyclic"] = Field(
        "constant", description="Shape, from optimizer.alpha to final; cyclic: and back, again and again."
    )
    final: Exponent = Field(0.5, description="Exponent at the end of linear and cosine, halfway in cyclic.")
    period_epochs: Count = Field(10, description="Epochs from optimizer.alpha to final and back in cyclic.")


class ScheduleConfig(Section):
    """The learning rate over the training, set anew for every optimizer step."""

    name: Literal["constant", "cosine", "linear", "step"] = Field("constant", description="Shape.")
    warmup_epochs: int = Field(0, ge=0, description="Epochs of linear warm-up before it.")
    final: Share = Field(0.0, description="Share of the learning rate at the end of cosine and linear.")
    step_epochs: Count = Field(100, description="Epochs between two drops of step.")
    step_factor: float = Field(0.1, gt=0.0, le=1.0, description="Factor of each drop of step.")


class TrainConfig(Section):
    """The training loop."""

    epochs: Count = Field(300, description="Passes over the training recordings.")
    batch_size: Count = Field(8, description="Recordings per batch, of all processes together.")
    accumulate: Count = Field(1, description="Batches whose mean gradient makes one optimizer step.")
    seed: int = Field(
        0, ge=0, description="Seed of weights, order, augmentation, dropout and validation split."
    )
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        "fp32", description="Precision of the network's operations; fp16 needs a GPU. Weights stay fp32."
    )
    clip_norm: Annotated[float, Field(gt=0.0)] | None = Field(
        None, description="Largest norm of the gradient of all weights together; null: no clipping."
    )
    drop_last: bool = Field(False, description="Leave out the last batch of an epoch when it is short.")
    length_sorted: bool = Field(
        False, description="Put recordings of similar length into a batch: less padding, less random batches."
    )
    pad_multiple: Count = Field(16, description="Batches are padded to a multiple of this many frames.")
    cuda_graph: Literal["auto", True, False] = Field(
        "auto",
        description="Start whole training steps as CUDA graphs; batches are padded further, to few lengths. "
        "Takes more memory. auto: on one GPU, without accumulate and compile; true: an error elsewhere.",
    )
    compile: bool = Field(False, description="Train the network through torch.compile.")
    device: str = Field("auto", description="Device of torch ('cpu', 'cuda', 'cuda:1'); auto: a GPU if any.")
    log_every: Count = Field(
        10, description="Steps between two looks at the loss on a GPU, which wait for it; a CPU looks always."
    )
    batch_norm: Literal["synchronised", "local"] = Field(
        "synchronised",
        description="Batch statistics of several processes: of all their recordings, or each of its own.",
    )
    best_on: Literal["validation", "test"] = Field(
        "validation",
        description="Recordings that choose the best epoch; 'test' flatters, and is labelled so.",
    )
    evaluate_every: Count = Field(10, description="Epochs between two evaluations.")
    final_epochs: Count = Field(
        20, description="Every one of that many last epochs is evaluated, and averaged."
    )
    checkpoint_every: Count = Field(10, description="Epochs between two checkpoints.")
    checkpoint_minutes: Annotated[float, Field(ge=0.0)] | None = Field(
        10.0,
        description="Minutes after which one is written within an epoch too; 0: every step; null: never.",
    )
    workers: int = Field(
        0, ge=0, description="Processes that prepare batches; 0: the training process itself."
    )


class RefineConfig(Section):
    """Refinement of the frame labels by the predicted boundaries."""

    threshold: float = Field(0.5, gt=0.0, lt=1.0, description="Probability from which a peak is a boundary.")


class Config(Section):
    """Everything that decides a training run. Unknown keys, wrong types and bad numbers are refused."""

    data: DataConfig = Field(DataConfig(), description="What is trained on.")
    augment: AugmentConfig = Field(AugmentConfig(), description="Augmentation.")
    model: ModelConfig = Field(ModelConfig(), description="The network.")
    loss: LossConfig = Field(LossConfig(), description="Weights of the losses.")
    optimizer: OptimizerConfig = Field(OptimizerConfig(), description="The optimizer.")
    schedule: ScheduleConfig = Field(ScheduleConfig(), description="The learning rate over time.")
    exponent: ExponentConfig = Field(ExponentConfig(), description="The optimizer's exponent over time.")
    train: TrainConfig = Field(TrainConfig(), description="The training loop.")
    refine: RefineConfig = Field(RefineConfig(), description="Refinement of the output.")

    @model_validator(mode="after")
    def _warmup_fits(self) -> Config:
        if self.schedule.warmup_epochs > self.train.epochs:
            raise ValueError(
                f"schedule.warmup_epochs ({self.schedule.warmup_epochs}) must be at most "
                f"train.epochs ({self.train.epochs})"
            )
        return self

    @model_validator(mode="after")
    def _exponent_can_change(self) -> Config:
        if self.exponent.name == "constant":
            return self
        if self.optimizer.exponent is None:
            raise ValueError(
                f"exponent.name={self.exponent.name} is for optimizer.name=smes or gated_smes, "
                f"and here it is {self.optimizer.name}"
            )
        if isinstance(self.optimizer.exponent, tuple):
            raise ValueError(
                f"exponent.name={self.exponent.name} starts from optimizer.alpha; set optimizer.alphas=null"
            )
        return self


def built_in_configs() -> tuple[str, ...]:
    """Names of the configuration files that come with the package."""
    files = resources.files(__package__).joinpath("configs").iterdir()
    return tuple(sorted(file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml")))


def load_config(name_or_path: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """Read a configuration.

    Args:
        name_or_path: name of a built-in configuration (``"mocap6"``), or a YAML file, which is recognised by
            its ending or by a folder in front; None: the defaults alone.
        overrides: ``"section.key=value"`` each, the value in YAML, such as ``"train.epochs=10"``,
            ``"data.test=[13_30, 14_14]"`` or ``"train.clip_norm=null"``.

    YAML is read by its core schema of version 1.2: ``5e-4`` is a number, and ``13_30``, ``on`` and ``no`` are
    strings.

    Raises:
        UserError: for files that cannot be read, unknown keys (the nearest known one is suggested), values of
            the wrong type or out of range.
    """
    source = "configuration" if name_or_path is None else str(name_or_path)
    values = {} if name_or_path is None else _parse(_read(name_or_path), source)
    for override in overrides:
        _apply(values, override)
    return _validated(values, source, overrides)


def with_overrides(config: Config, overrides: Sequence[str]) -> Config:
    """`config` with the overrides of :func:`load_config` applied; raises the same."""
    values = config.model_dump(mode="json")
    for override in overrides:
        _apply(values, override)
    return _validated(values, "configuration", overrides)


def _validated(values: Mapping[str, Any], source: str, overrides: Sequence[str]) -> Config:
    """The configuration; a fault names the overrides that it is of, or else `source`."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        faults = error.errors(include_url=False)
        listed = "; ".join(f"{_origin(fault['loc'], source, overrides)}: {_fault(fault)}" for fault in faults)
        raise UserError(listed) from error


def _origin(place: Sequence[str | int], source: str, overrides: Sequence[str]) -> str:
    """Where the value at `place` comes from: the overrides of it, of a part of it or of its section."""
    if not place:  # several sections do not fit together
        return f"{source} with {', '.join(overrides)}" if overrides else source

    def concerns(override: str) -> bool:
        key = override.partition("=")[0].split(".")
        return all(mine == str(its) for mine, its in zip(key, place))

    concerned = [repr(override) for override in overrides if concerns(override)]
    return f"override {', '.join(concerned)}" if concerned else source


def save_config(config: Config, path: str | Path) -> None:
    """Write `config`, complete, as a YAML file that :func:`load_config` reads back to an equal one."""
    write_text(path, dump(config.model_dump(mode="json")))


def config_items(config: Config) -> Iterator[tuple[str, Any]]:
    """Dotted key and value of every setting, in the order of the file."""
    for section, values in config.model_dump().items():
        for key, value in values.items():
            yield f"{section}.{key}", value


def differing_keys(first: Config, second: Config) -> tuple[str, ...]:
    """Dotted keys whose values differ between two configurations, in the order of the file."""
    theirs = dict(config_items(second))
    return tuple(key for key, value in config_items(first) if theirs[key] != value)


def _read(name_or_path: str | Path) -> str:
    path = Path(name_or_path)
    if path.suffix in (".yaml", ".yml") or path.parent != Path("."):
        with reading(f"configuration file {path}"):
            return path.read_text(encoding="utf-8")
    known = built_in_configs()
    if str(path) not in known:
        raise UserError(
            f"unknown configuration {str(path)!r}{_did_you_mean(str(path), known)}: expected one of "
            f"{', '.join(known)}, or a file whose name ends in .yaml"
        )
    return resources.files(__package__).joinpath("configs", f"{path}.yaml").read_text(encoding="utf-8")


def _parse(text: str, source: str) -> dict[str, Any]:
    try:
        values = load(text)
    except ValueError as error:
        raise UserError(f"{source} is {error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{source}: expected sections such as 'train:' with keys under them, got {values!r}")
    return values


def _apply(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")):
        raise UserError(
            f"an override has the form section.key=value, such as train.epochs=10; got {override!r}"
        )
    try:
        value = load(text)
    except ValueError as error:
        raise UserError(f"the value of {override!r} is {error}") from error
    *path, last = key.split(".")
    for name in path:
        inner = values.get(name)
        if not isinstance(inner, dict):
            inner = values[name] = {}
        values = inner
    values[last] = value


def _fault(fault: Mapping[str, Any]) -> str:
    key = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        known = [f"{section}.{name}" for section, field in Config.model_fields.items()
                 for name in field.annotation.model_fields]  # fmt: skip
        if "." not in key and isinstance(fault["input"], dict):
            return f"unknown section {key!r}{_did_you_mean(key, list(Config.model_fields))}"
        return f"unknown key {key!r}{_did_you_mean(key, known)}"
    message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "value_error":
        return f"{key}: {message}" if key else message
    return f"{key}: {message[0].lower()}{message[1:]}, got {fault['input']!r}"


def _did_you_mean(key: str, known: Sequence[str]) -> str:
    """A known key that is spelt alike, or whose last part is."""
    last_parts = {name.rpartition(".")[2]: name for name in reversed(known)}
    near = get_close_matches(key, known, n=1, cutoff=0.75)
    near = near or [last_parts[part] for part in get_close_matches(key.rpartition(".")[2], last_parts, n=1)]
    return f"; did you mean {near[0]!r}?" if near else ""
