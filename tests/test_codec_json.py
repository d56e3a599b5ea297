"""Codecs and choices as JSON: all of them, users' as well, come back as they were."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from slimfit_fx import Config, ConfigError
from slimfit_fx.codecs import (
    BitMask,
    Codec,
    Derivative,
    FixedPoint,
    Float8,
    Format,
    Quantize,
    Recompute,
    TopK,
    TopOfBlock,
    WhenFrozen,
)

FORMATS = [
    Quantize(4, 64),
    FixedPoint(4, 0.5, -4.0),
    Float8(),
    TopK(0.2),
    TopOfBlock(4),
    BitMask(),
    Recompute(None),
    Recompute(WhenFrozen(Quantize(8))),
    Derivative(None, Recompute(TopK())),
    Derivative(FixedPoint(4, 0.5, -4.0), WhenFrozen(None)),
    WhenFrozen(Quantize(8)),
]


@pytest.mark.parametrize("format", FORMATS, ids=repr)
def test_json_has_them(format):
    config = Config(codecs={"encoder": format})
    assert Config.from_json(config.to_json()) == config
    assert Format.from_dict(format.to_dict()) == format == Codec.from_dict(format.to_dict())
    assert format.to_dict()["codec"] == type(format).__name__


@dataclass(frozen=True)
class Fine(Quantize):
    """A codec of a user's that is made of a concrete one."""

    spare: int = 1


@dataclass(frozen=True)
class Finer(Fine):
    pass


def test_json_has_codecs_that_are_made_of_others():
    for codec in (Fine(4, spare=2), Finer(8, spare=3)):
        config = Config(codecs={"norm input": Recompute(codec)})
        assert Config.from_json(config.to_json()) == config


def test_a_codec_that_was_defined_anew_replaces_the_older_one():
    older = dataclass(frozen=True)(type("Anew", (Fine,), {"__module__": __name__}))
    newer = dataclass(frozen=True)(type("Anew", (Fine,), {"__module__": __name__}))
    assert type(Format.from_dict(older().to_dict())) is newer


def test_two_codecs_of_one_name_are_not_mixed_up():
    def define():
        return dataclass(frozen=True)(type("Twin", (Fine,), {"__module__": "another"}))

    twins = [dataclass(frozen=True)(type("Twin", (Fine,), {"__module__": __name__})), define()]
    with pytest.raises(ConfigError, match="several codecs have the name 'Twin', in .*another"):
        Format.from_dict(twins[0]().to_dict())


@pytest.mark.parametrize(
    ("codecs", "message"),
    [
        ('{"norm input": "int8"}', "a codec is written as"),
        ('{"norm input": {}}', "unknown codec None"),
        ('{"norm input": 0}', "a codec is written as"),
        ('{"norm input": {"codec": "Choice"}}', "unknown codec 'Choice'"),
        ('{"norm input": {"codec": "FixedPoint", "bits": 4}}', "FixedPoint needs the option 'step'"),
        ('{"norm input": {"codec": "WhenFrozen", "codec_": {"codec": "Recompute"}}}', "WhenFrozen.codec takes a Codec"),
        ("[1]", "codecs is a mapping"),
    ],
)
def test_json_that_is_no_codec_is_named(codecs, message):
    with pytest.raises(ConfigError, match=message):
        Config.from_json(f'{{"codecs": {codecs}}}')
