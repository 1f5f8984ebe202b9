from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError
from pydantic.fields import FieldInfo
from trgnet.optimizers import EXPONENT_SCHEDULES, OPTIMIZERS, SCHEDULES

from trgnet.config import (
    Config,
    ExponentConfig,
    OptimizerConfig,
    ScheduleConfig,
    built_in_configs,
    differing_keys,
    load_config,
    save_config,
)
from trgnet.errors import UserError


def test_defaults_are_the_published_settings():
    config = load_config(None)
    assert config == Config()
    assert (config.train.epochs, config.train.batch_size) == (300, 8)
    assert (config.optimizer.name, config.optimizer.lr, config.optimizer.weight_decay) == ("adam", 1e-3, 0.0)
    assert (config.loss.boundary, config.loss.absolute, config.loss.relative) == (0.1, 0.8, 1.0)
    assert (config.train.cuda_graph, config.train.compile) == ("auto", False)


def test_every_field_is_described_and_every_number_bounded():
    def check(field: FieldInfo, key: str) -> None:
        assert field.description, key
        if field.annotation in (int, float):
            assert field.metadata, f"{key} has no bounds"

    for section, outer in Config.model_fields.items():
        assert outer.description, section
        for name, field in outer.annotation.model_fields.items():
            check(field, f"{section}.{name}")


@pytest.mark.parametrize("name", built_in_configs())
def test_built_in_configurations_load(name):
    assert isinstance(load_config(name), Config)


def test_mocap6_is_built_in():
    assert load_config("mocap6").data.name == "mocap6"


def test_overrides_are_yaml():
    config = load_config(
        "mocap6",
        [
            "train.epochs=10",
            "optimizer.lr=5e-4",
            "data.test=[13_30, 14_14]",
            "train.clip_norm=null",
            "train.drop_last=true",
            "train.cuda_graph=true",
            "train.compile=true",
            "optimizer.betas=[0.5, 0.9]",
            "data.options.frames=40",
            "data.options.kind=on",
        ],
    )
    assert config.train.epochs == 10
    assert config.optimizer.lr == 5e-4
    assert config.data.test == ["13_30", "14_14"]  # YAML 1.1 would read the integers 1330 and 1414
    assert config.train.clip_norm is None
    assert config.train.drop_last is config.train.cuda_graph is config.train.compile is True
    assert config.optimizer.betas == (0.5, 0.9)
    assert config.data.options == {"frames": 40, "kind": "on"}


def test_numbers_in_quotes_are_numbers():
    assert load_config(None, ["optimizer.lr='5e-4'"]).optimizer.lr == 5e-4


def test_file(tmp_path: Path):
    file = tmp_path / "my settings.yaml"
    file.write_text("train:\n  epochs: 7\noptimizer:\n  lr: 1e-2\n")
    config = load_config(file, ["train.seed=3"])
    assert (config.train.epochs, config.train.seed, config.optimizer.lr) == (7, 3, 1e-2)


def test_saved_configuration_reads_back_equal(tmp_path: Path):
    options = {
        "number": 5e-4,
        "text": "5e-4",
        "name": "13_30",
        "word": "no",
        "nothing": None,
        "empty": "",
        "é": [1],
    }
    config = Config.model_validate(
        {"data": {"test": ["13_30", "010", "1e3"], "options": options}, "optimizer": {"lr": 1e-5}}
    )
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config
    assert [file.name for file in tmp_path.iterdir()] == ["config.yaml"]


def test_configuration_is_immutable():
    with pytest.raises(ValidationError, match="frozen"):
        Config().train.epochs = 3


def test_differing_keys():
    first = load_config(None, ["train.epochs=10", "model.features=16"])
    assert differing_keys(first, Config()) == ("model.features", "train.epochs")
    assert differing_keys(first, first) == ()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.epoch=3", "unknown key 'train.epoch'; did you mean 'train.epochs'?"),
        ("epochs=3", "unknown key 'epochs'; did you mean 'train.epochs'?"),
        ("optimizer.learning_rat=3", "unknown key 'optimizer.learning_rat'"),
        ("trian.epochs=3", "unknown section 'trian'; did you mean 'train'?"),
        (
            "train.epochs",
            "an override has the form section.key=value, such as train.epochs=10; got 'train.epochs'",
        ),
        ("=3", "an override has the form section.key=value"),
        ("train.epochs=[", "the value of 'train.epochs=[' is no valid YAML"),
        ("train.epochs=0", "train.epochs: input should be greater than or equal to 1, got 0"),
        ("train.epochs=many", "train.epochs: input should be a valid integer"),
        ("train.epochs.x=3", "train.epochs: input should be a valid integer"),
        ("optimizer.lr=-1", "optimizer.lr: input should be greater than 0, got -1"),
        ("optimizer.lr=.nan", "optimizer.lr: input should be a finite number, got nan"),
        (
            "optimizer.name=lcm",
            "optimizer.name: input should be 'adam', 'adamw', 'sgd', 'lcam', 'smes' or 'gated_smes', got 'lcm'",
        ),
        ("optimizer.momentas=1", "unknown key 'optimizer.momentas'; did you mean 'optimizer.momenta'?"),
        ("optimizer.momenta=[0.9, 1.0]", "optimizer.momenta.1: input should be less than 1, got 1.0"),
        ("optimizer.alpha=5", "optimizer.alpha: input should be less than or equal to 4, got 5"),
        (
            "optimizer.alphas=[0, -5]",
            "optimizer.alphas.1: input should be greater than or equal to -4, got -5",
        ),
        (
            "exponent.name=cosine",
            "exponent.name=cosine is for optimizer.name=smes or gated_smes, and here it is adam",
        ),
        ("optimizer.betas=[0.9, 1.0]", "optimizer.betas.1: input should be less than 1, got 1.0"),
        ("augment.rotation=0.9", "augment: occlusion + rotation must be at most 1, got 1.25"),
        ("model.heads=5", "model: heads (5) must divide features (64)"),
        ("schedule.warmup_epochs=301", "schedule.warmup_epochs (301) must be at most train.epochs (300)"),
        ("train=3", "train: input should be a valid dictionary"),
    ],
)
def test_faults_are_one_line_that_names_the_key(override, message):
    with pytest.raises(UserError) as error:
        load_config("mocap6", [override])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_an_exponent_that_changes_starts_from_one():
    settings = ["optimizer.name=gated_smes", "optimizer.alphas=[0.5, 0.25]"]
    assert load_config(None, settings).optimizer.exponent == (0.5, 0.25)
    with pytest.raises(
        UserError, match="exponent.name=linear starts from optimizer.alpha; set optimizer.alphas"
    ):
        load_config(None, [*settings, "exponent.name=linear"])


def test_names_are_those_of_the_builders():
    assert OptimizerConfig.model_fields["name"].annotation.__args__ == OPTIMIZERS
    assert ExponentConfig.model_fields["name"].annotation.__args__ == EXPONENT_SCHEDULES
    assert ScheduleConfig.model_fields["name"].annotation.__args__ == SCHEDULES


def test_faults_are_blamed_on_what_set_the_value(tmp_path: Path):
    file = tmp_path / "my.yaml"
    file.write_text("train:\n  epochs: 0\n")
    with pytest.raises(UserError) as error:
        load_config(file, ["train.seed=-1", "model.features=16", "optimizer.betas=[0.9, 1]"])
    faults = str(error.value).split("; ")
    assert [fault.rpartition(": input")[0] for fault in faults] == [
        "override 'optimizer.betas=[0.9, 1]': optimizer.betas.1",
        f"{file}: train.epochs",
        "override 'train.seed=-1': train.seed",
    ]
    with pytest.raises(UserError, match="^override 'train.epoch=3': unknown key 'train.epoch'; did you"):
        load_config("mocap6", ["train.epoch=3"])
    with pytest.raises(
        UserError, match="^mocap6 with train.epochs=3, schedule.warmup_epochs=4: schedule.war"
    ):
        load_config("mocap6", ["train.epochs=3", "schedule.warmup_epochs=4"])


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(
        UserError, match="unknown configuration 'mocap7'; did you mean 'mocap6'.*ends in .yaml"
    ):
        load_config("mocap7")


def test_missing_and_malformed_files(tmp_path: Path):
    with pytest.raises(UserError, match="No such file"):
        load_config(tmp_path / "none.yaml")
    file = tmp_path / "broken.yaml"
    file.write_text("train: [")
    with pytest.raises(UserError, match="broken.yaml is no valid YAML"):
        load_config(file)
    file.write_text("- 1\n")
    with pytest.raises(UserError, match="expected sections such as 'train:'"):
        load_config(file)
    file.write_text("")
    assert load_config(file) == Config()


def test_no_python_objects_from_yaml(tmp_path: Path):
    file = tmp_path / "evil.yaml"
    file.write_text(f"data:\n  options: !!python/object/apply:pathlib.Path.touch [{tmp_path}/touched]\n")
    with pytest.raises(UserError, match="no valid YAML"):
        load_config(file)
    assert not (tmp_path / "touched").exists()
