"""Which codec a tensor gets: overrides by role and by module, and their way through JSON."""

from __future__ import annotations

import pytest
from torch import nn
from transformer_block import block, rows

import slimfit_fx
from slimfit_fx.codecs import Quantize, Recompute, TopK
from slimfit_fx.errors import ConfigError


def test_overrides_by_role_and_by_module():
    slim, _ = block(preset="balanced", codecs={"norm input": None, "activation input": Quantize(4), r"1\.up$": TopK()})
    found = rows(slim)
    assert found["norm input"]["stored_as"] == ""
    assert found["activation input"]["stored_as"] == "largest 10%"  # the module's override goes before the role's
    slim, _ = block(preset="balanced", codecs={r"^1": Quantize(4)})
    stored = {row["stored_as"] for row in slimfit_fx.report(slim).rows if row["module"].startswith("1")}
    assert stored >= {"bits", "int4, group 128"}  # masks have no four bits
    assert all(not row["stored_as"] for row in slimfit_fx.report(slim).rows if row["role"] == "statistics")


@pytest.mark.parametrize(
    ("codecs", "message"),
    [
        ({"norm input": "int8"}, "must be a codec"),
        ({"norm imput": Quantize(8)}, "matches no module"),
        ({"dropout mask": Quantize(8)}, "does not encode bool"),
        ({"(": Quantize(8)}, "not a regular expression"),
        ([Quantize(8)], "a mapping"),
    ],
)
def test_bad_overrides_are_named(codecs, message):
    with pytest.raises(ConfigError, match=message):
        slimfit_fx.transform(nn.Linear(4, 4), codecs=codecs)


def test_configurations_with_codecs_survive_json():
    config = slimfit_fx.Config(codecs={"norm input": None, "softmax output": Recompute(Quantize(4)), "^x": TopK(0.2)})
    assert slimfit_fx.Config.from_json(config.to_json()) == config
    with pytest.raises(ConfigError, match="unknown codec 'Quantise'"):
        slimfit_fx.Config.from_json('{"codecs": {"norm input": {"codec": "Quantise"}}}')
    with pytest.raises(ConfigError, match="unknown option of Quantize 'bit'"):
        slimfit_fx.Config.from_json('{"codecs": {"norm input": {"codec": "Quantize", "bit": 8}}}')
