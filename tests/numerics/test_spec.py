"""The spec: choices, the canonical string, and what it refuses."""

from __future__ import annotations

import dataclasses

import pytest

from quantforge.errors import ConfigError, FormatError, QuantForgeError
from quantforge.spec import QuantSpec

SPECS = (
    QuantSpec(64),
    QuantSpec(100, 8, rotation="qr", seed=2**32 - 1),
    QuantSpec(96, 3, scale_rule="norm", scale_dtype="float32"),
    QuantSpec(80, 5, codebook="e4m3", scale_rule="mse"),
    QuantSpec(128, 2, estimator="prod", codebook="gaussian"),
)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_key_round_trip(spec: QuantSpec) -> None:
    assert QuantSpec.from_key(spec.key) == spec
    assert hash(QuantSpec.from_key(spec.key)) == hash(spec)
    assert spec.key == dataclasses.replace(spec).key


def test_keys_tell_specs_apart() -> None:
    assert len({spec.key for spec in SPECS}) == len(SPECS)


def test_key_is_pinned() -> None:
    """It is written into files: changing it is a format change."""
    assert QuantSpec(64).key == (
        "dim=64;bits=4;rotation=hadamard;seed=0;codebook=lloyd_max;scale_rule=unbiased;"
        "estimator=mse;scale_dtype=float16"
    )


@pytest.mark.parametrize(
    "key",
    [
        "",
        "dim=64",
        QuantSpec(64).key + ";extra=1",
        QuantSpec(64).key.replace("bits=4;", ""),
        QuantSpec(64).key.replace("dim=64;bits=4", "bits=4;dim=64"),
        QuantSpec(64).key.replace("bits", "bitz"),
    ],
)
def test_malformed_keys(key: str) -> None:
    with pytest.raises(FormatError, match="fields"):
        QuantSpec.from_key(key)


@pytest.mark.parametrize(
    "key",
    [
        QuantSpec(64).key.replace("bits=4", "bits=four"),
        QuantSpec(64).key.replace("bits=4", "bits=9"),
        QuantSpec(64).key.replace("hadamard", "spin"),
    ],
)
def test_keys_with_bad_values_name_them(key: str) -> None:
    with pytest.raises(QuantForgeError, match=r"four|9|spin"):
        QuantSpec.from_key(key)


@pytest.mark.parametrize("dim", [3, 36, 63, 100, 127, 300])
def test_no_hadamard_for_this_dim(dim: int) -> None:
    with pytest.raises(ConfigError, match=rf"dim {dim}.*qr"):
        QuantSpec(dim)
    assert QuantSpec(dim, rotation="qr").dim == dim


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dim": 0}, "dim.*got 0"),
        ({"dim": 64.0}, "dim.*got 64.0"),
        ({"dim": True}, "dim.*got True"),
        ({"bits": 0}, "bits.*from 1 to 8.*got 0"),
        ({"bits": 9}, "bits.*from 1 to 8.*got 9"),
        ({"bits": "4"}, "bits.*got '4'"),
        ({"seed": -1}, "seed.*got -1"),
        ({"seed": 2**32}, "seed.*got 4294967296"),
        ({"rotation": "auto"}, "rotation.*hadamard, qr.*got 'auto'"),
        ({"codebook": "nf4"}, "codebook.*lloyd_max, gaussian, e4m3.*'nf4'"),
        ({"scale_rule": "max"}, "scale_rule.*unbiased, norm, mse.*'max'"),
        ({"estimator": "qjl"}, "estimator.*mse, prod.*'qjl'"),
        ({"scale_dtype": "bfloat16"}, "scale_dtype.*float16, float32.*'bfloat16'"),
        ({"codebook": "e4m3", "bits": 6}, "e4m3.*1-5.*bits=6.*lloyd_max"),
        ({"estimator": "prod", "bits": 1}, "prod.*bits >= 2"),
    ],
)
def test_refused(fields: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        QuantSpec(**{"dim": 64, **fields})


def test_derived_numbers() -> None:
    assert (QuantSpec(64, 4).code_bits, QuantSpec(64, 4).scales_per_vector) == (4, 1)
    prod = QuantSpec(64, 4, estimator="prod")
    assert (prod.code_bits, prod.scales_per_vector) == (3, 2)
    # prod may have one bit more than the e4m3 codebook itself allows only up to 5 in total
    assert QuantSpec(64, 5, codebook="e4m3", estimator="prod").code_bits == 4
