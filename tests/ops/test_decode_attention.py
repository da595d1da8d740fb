"""`decode_attention` against the float64 oracle, in eager torch and in the fused kernel."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch

from quantforge.errors import InputError, UnsupportedError
from quantforge.numerics.encode import decode, encode
from quantforge.numerics.packing import unpack
from quantforge.numerics.pages import page_layout
from quantforge.ops import decode_attention, dequantize
from quantforge.ops.decode_attention import op
from quantforge.ops.decode_attention.api import Dense, Pages
from quantforge.ops.decode_attention.reference import decode_attention as reference
from quantforge.ops.pages import key_pages, read_key_pages, read_value_pages, value_pages
from quantforge.spec import QuantSpec
from tests.helpers import Statistic, assert_close, statistics_of, to_float64

DEVICES = [
    pytest.param(("cpu", torch.float32), id="cpu-float32"),
    pytest.param(("cuda", torch.float16), id="cuda-float16", marks=pytest.mark.gpu),
    pytest.param(("cuda", torch.bfloat16), id="cuda-bfloat16", marks=pytest.mark.gpu),
]


FOUR_BITS = QuantSpec(128, 4)


@dataclass(frozen=True)
class Case:
    """A batch of rows with sinks, packed tokens and recent tokens."""

    batch: int = 2
    heads: int = 4
    kv_heads: int = 2
    q_len: int = 1
    tokens: int = 256
    dense: int = 21
    sinks: int = 4
    k: QuantSpec = FOUR_BITS
    v: QuantSpec = FOUR_BITS
    statistic: Statistic = "none"
    starts: tuple[int, ...] | None = None
    seqlens: tuple[int, ...] | None = None
    lengths: tuple[int, ...] | None = None
    paged: bool = False
    softcap: float = 0.0
    window: int = 0
    magnitude: float = 1.0
    is_causal: bool = True
    masked: bool = False


class Built:
    """The tensors of a case, and what the oracle says."""

    def __init__(self, case: Case, device: str, dtype: torch.dtype, seed: int = 0) -> None:
        self.case, self.dtype = case, dtype
        layout = page_layout(case.k, case.v)
        lead = (case.batch, case.kv_heads)
        capacity = -(-case.tokens // layout.tokens) * layout.tokens
        rng = np.random.RandomState(seed)
        sides = {}
        for name, spec in (("key", case.k), ("value", case.v)):
            shift, equalizer = statistics_of(case.statistic, lead, spec.dim, seed)
            x = case.magnitude * rng.standard_normal((*lead, capacity, spec.dim)).astype(np.float32)
            if shift is not None and equalizer is not None:
                x = x * equalizer + shift
            encoded = encode(x, spec, shift, equalizer)
            codes = torch.from_numpy(unpack(encoded.packed, spec.dim, spec.bits))
            scales = torch.from_numpy(encoded.scales[..., 0])
            make = key_pages if name == "key" else value_pages
            pages = make(codes, scales, layout).transpose(1, 2)  # (B, pages, Hkv, bytes)
            exact = decode(encoded, spec, shift, equalizer)
            plain = dequantize(
                torch.from_numpy(encoded.packed),
                torch.from_numpy(encoded.scales),
                spec,
                shift=None if shift is None else torch.from_numpy(shift),
                equalizer=None if equalizer is None else torch.from_numpy(equalizer),
                impl="eager",
            ).numpy()
            dense = rng.standard_normal((*lead, case.dense + 3, spec.dim)) * case.magnitude
            dense = torch.from_numpy(dense)
            sides[name] = (pages, shift, equalizer, exact, plain, dense.to(dtype))
        self.query = torch.from_numpy(
            rng.standard_normal((case.batch, case.heads, case.q_len, case.k.dim)) / case.magnitude
        ).to(device, dtype)
        self.sides = sides
        table = None
        keys, values = (sides[name][0].flatten(0, 1) for name in ("key", "value"))
        if case.paged:  # the same pages in another order, with strange ones between them
            order = rng.permutation(2 * len(keys))[: len(keys)]
            table = torch.from_numpy(order.astype(np.int32)).view(case.batch, -1)
            keys, values = (self._scattered(t, order) for t in (keys, values))

        def there(t: Any) -> torch.Tensor | None:
            if t is None:
                return None
            return (t if isinstance(t, torch.Tensor) else torch.from_numpy(np.asarray(t))).to(
                device
            )

        def lengths(t: tuple[int, ...] | None) -> torch.Tensor | None:
            return None if t is None else torch.tensor(t, dtype=torch.int32, device=device)

        self.pages = Pages(
            keys.contiguous().to(device),
            values.contiguous().to(device),
            case.k,
            case.v,
            0 if case.seqlens is not None else case.tokens,
            lengths(case.seqlens),
            there(table),
            there(sides["key"][1]),
            there(sides["key"][2]),
            there(sides["value"][1]),
            there(sides["value"][2]),
        )
        self.dense = None
        if case.dense:
            k, v = (sides[name][-1].to(device) for name in ("key", "value"))
            n_dense = 0 if case.lengths is not None else case.dense
            self.dense = Dense(k, v, n_dense, case.sinks, lengths(case.lengths))
        self.starts = lengths(case.starts)
        self.mask = None
        if case.masked:
            shape = (case.batch, 1, case.q_len, capacity + case.dense + 3)
            self.mask = torch.from_numpy(rng.rand(*shape) < 0.7).to(device)

    @staticmethod
    def _scattered(pages: torch.Tensor, order: np.ndarray) -> torch.Tensor:
        pool = torch.full((2 * len(pages), *pages.shape[1:]), 0x7B, dtype=torch.uint8)
        pool[torch.from_numpy(order.astype(np.int64))] = pages
        return pool

    def run(self, impl: str = "auto") -> tuple[torch.Tensor, torch.Tensor]:
        case = self.case
        return decode_attention(
            self.query, self.pages, self.dense, starts=self.starts, mask=self.mask,
            is_causal=case.is_causal,
            softcap=case.softcap, window=case.window, impl=impl,
        )  # fmt: skip

    def exact(self) -> tuple[np.ndarray, np.ndarray]:
        return self._reference(np.float64)

    def naive(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Decode and evaluate in float32, on operands rounded where kernels multiply halves."""
        out, lse = self._reference(np.float32 if self.dtype == torch.float32 else np.float16)
        return torch.from_numpy(out), torch.from_numpy(lse)

    def _reference(self, operand: type) -> tuple[np.ndarray, np.ndarray]:
        case, is_exact = self.case, operand is np.float64
        packed = np.array(case.seqlens or [case.tokens] * case.batch)
        dense = np.array(case.lengths or [case.dense] * case.batch)
        rows = {}
        for name in ("key", "value"):
            *_, exact, plain, held = self.sides[name]
            decoded = exact if is_exact else plain
            held = to_float64(held)
            length = int((packed + dense).max())
            rows[name] = np.zeros((*exact.shape[:2], length, exact.shape[-1]))
            for b in range(case.batch):
                parts = [held[b, :, : case.sinks], decoded[b, :, : packed[b]]]
                parts.append(held[b, :, case.sinks : dense[b]])
                row = np.concatenate(parts if case.dense else parts[1:2], axis=1)
                rows[name][b, :, : row.shape[1]] = row
        query, key, value = (
            x.astype(operand).astype(np.float64 if is_exact else np.float32)
            for x in (to_float64(self.query), *rows.values())
        )
        return reference(
            query, key, value, case.sinks if case.dense else 0,
            packed, dense, np.array(case.starts or [0] * case.batch), case.k.dim**-0.5,
            case.softcap, case.window,
            None if self.mask is None else self.mask.cpu().numpy(), case.is_causal,
        )  # fmt: skip


def check(case: Case, where: tuple[str, torch.dtype], impl: str = "auto") -> None:
    built = Built(case, *where)
    got, want, naive = built.run(impl), built.exact(), built.naive()
    assert got[0].dtype == where[1]
    assert got[1].dtype == torch.float32
    for x, plain, exact in zip(got, naive, want, strict=True):
        assert_close(x.to(where[1]), [plain], exact)
    out, seen = to_float64(got[0]), np.isfinite(want[1])
    assert not out[~seen].any()
    if where[1] != torch.bfloat16:  # whose own rounding is 2e-3
        assert np.linalg.norm(out - want[0]) <= 2e-3 * np.linalg.norm(want[0])


CODES = [(2, 2), (3, 3), (4, 4), (4, 2), (3, 4), (2, 3)]


@pytest.mark.parametrize("where", DEVICES)
@pytest.mark.parametrize("codebook", ["lloyd_max", "e4m3", "gaussian"])
@pytest.mark.parametrize(("k_bits", "v_bits"), CODES)
def test_codes(k_bits: int, v_bits: int, codebook: Any, where: tuple, poison: None) -> None:
    k, v = (QuantSpec(128, bits, codebook=codebook) for bits in (k_bits, v_bits))
    check(Case(k=k, v=v), where)


@pytest.mark.parametrize("where", DEVICES)
@pytest.mark.parametrize(("dim", "value_dim"), [(64, 64), (128, 64), (256, 128), (64, 256)])
def test_dims(dim: int, value_dim: int, where: tuple, poison: None) -> None:
    check(Case(k=QuantSpec(dim, 4), v=QuantSpec(value_dim, 4)), where)


@pytest.mark.parametrize("where", DEVICES)
@pytest.mark.parametrize("heads", [2, 6, 16, 40])
@pytest.mark.parametrize("q_len", [1, 3, 8, 16])
def test_query_rows(q_len: int, heads: int, where: tuple, poison: None) -> None:
    check(Case(heads=heads, q_len=q_len), where)


@pytest.mark.parametrize("where", DEVICES)
@pytest.mark.parametrize("tokens", [0, 1, 63, 64, 65, 100, 127, 1000])
@pytest.mark.parametrize("dense", [0, 5, 128, 200])
def test_sizes(dense: int, tokens: int, where: tuple, poison: None) -> None:
    check(Case(tokens=tokens, dense=dense, sinks=min(4, dense)), where)


@pytest.mark.parametrize("where", DEVICES)
@pytest.mark.parametrize(
    "features", ["statistics per head", "soft cap with shift", "a mask and lengths"]
)
@pytest.mark.parametrize(("k", "v"), [("qr", "qr"), ("none", "hadamard"), ("hadamard", "qr")])
def test_rotations(k: Any, v: Any, features: str, where: tuple, poison: None) -> None:
    specs = (QuantSpec(128, 4, rotation=rotation) for rotation in (k, v))
    check(Case(**FEATURES[features], k=next(specs), v=next(specs)), where)


FEATURES: dict[str, dict[str, Any]] = {
    "shared statistics": {"statistic": "shared"},
    "statistics per head": {"statistic": "per_head"},
    "lengths on the device": {"seqlens": (256, 70), "lengths": (21, 9)},
    "an empty row": {"seqlens": (0, 256), "lengths": (6, 21)},
    "pages in any order": {"paged": True, "seqlens": (200, 131)},
    "left padding": {"starts": (3, 150)},
    "left padding beyond the pages": {"starts": (0, 265)},
    "window": {"window": 50},
    "window over several pages": {"window": 200, "q_len": 4},
    "window in the recent rows": {"window": 5, "q_len": 8},
    "soft cap": {"softcap": 3.0},
    "soft cap with shift": {"softcap": 3.0, "statistic": "per_head"},
    "all at once": {
        "softcap": 20.0, "window": 120, "starts": (60, 0), "seqlens": (256, 190), "paged": True,
        "lengths": (21, 20), "statistic": "per_head", "q_len": 5, "heads": 6,
    },
    "a mask": {"masked": True, "q_len": 3, "is_causal": False, "heads": 6},
    "a mask and lengths": {"masked": True, "seqlens": (256, 70), "lengths": (21, 9)},
    "not causal": {"q_len": 4, "is_causal": False},
    "large numbers": {"magnitude": 300.0},
    "small numbers": {"magnitude": 1e-3},
}  # fmt: skip


@pytest.mark.parametrize("where", DEVICES)
@pytest.mark.parametrize("name", FEATURES)
def test_features(name: str, where: tuple, poison: None) -> None:
    check(Case(**FEATURES[name]), where)
    three = Case(**FEATURES[name], k=QuantSpec(128, 3), v=QuantSpec(128, 2, codebook="e4m3"))
    check(three, where)


@pytest.mark.gpu
@pytest.mark.parametrize("name", FEATURES)
def test_eager_on_the_gpu(name: str) -> None:
    """Models in float32 have no fused kernel."""
    check(Case(**FEATURES[name]), ("cuda", torch.float32), "eager")


@pytest.mark.parametrize("where", DEVICES)
def test_window_of_nothing(where: tuple) -> None:
    """Padding can hide everything from a row: 0 and -inf."""
    check(Case(starts=(0, 1000)), where)


def test_pages_round_trip() -> None:
    layout = page_layout(QuantSpec(128, 3), QuantSpec(128, 4))
    rng = np.random.RandomState(0)
    for bits, make, read in ((3, key_pages, read_key_pages), (4, value_pages, read_value_pages)):
        codes = torch.from_numpy(rng.randint(0, 1 << bits, (2, 256, 128)).astype(np.uint8))
        scales = torch.from_numpy(rng.rand(2, 256).astype(np.float16))
        got_codes, got_scales = read(make(codes, scales, layout), layout)
        assert torch.equal(got_codes, codes)
        assert torch.equal(got_scales, scales)


@pytest.mark.gpu
def test_splits_and_batch_do_not_matter() -> None:
    """A long row, alone and in a batch of others: the same within rounding."""
    case = Case(batch=3, tokens=6000, k=QuantSpec(128, 3, codebook="e4m3"), heads=8, sinks=0)
    built = Built(case, "cuda", torch.bfloat16)
    out, _ = built.run()
    pages, per_row = built.pages, len(built.pages.keys) // 3
    alone = replace(case, batch=1)
    for b in range(3):
        part = slice(b * per_row, (b + 1) * per_row)
        one = decode_attention(
            built.query[b : b + 1],
            pages._replace(keys=pages.keys[part], values=pages.values[part]),
            Dense(built.dense.keys[b : b + 1], built.dense.values[b : b + 1], alone.dense),
        )[0]
        error = (one[0].float() - out[b].float()).norm() / out[b].float().norm()
        assert error < 4e-3


@pytest.mark.gpu
def test_graph_replays_while_rows_grow() -> None:
    case = Case(tokens=512, seqlens=(100, 64), lengths=(21, 5), sinks=0)
    built = Built(case, "cuda", torch.bfloat16)
    built.run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = built.run()
    for seqlens, lengths in (((100, 64), (21, 5)), ((300, 511), (7, 21)), ((512, 1), (1, 1))):
        built.pages.seqlens.copy_(torch.tensor(seqlens, dtype=torch.int32))
        built.dense.lengths.copy_(torch.tensor(lengths, dtype=torch.int32))
        graph.replay()
        fresh = Built(replace(case, seqlens=seqlens, lengths=lengths), "cuda", torch.bfloat16)
        for x, plain, exact in zip((out, lse), fresh.naive(), fresh.exact(), strict=True):
            assert_close(x.to(torch.bfloat16), [plain], exact)


@pytest.mark.gpu
@pytest.mark.slow
def test_more_than_two_to_the_31_bytes() -> None:
    spec = QuantSpec(128, 4)
    layout = page_layout(spec, spec)
    pages = (1 << 31) // (8 * layout.key_bytes) + 3000  # per batch row of 8 heads
    keys = torch.randint(0, 256, (pages, 8, layout.key_bytes), dtype=torch.uint8, device="cuda")
    scales = keys[..., -2 * layout.tokens :].contiguous().view(torch.float16)
    scales.copy_(torch.rand(scales.shape, device="cuda") + 0.5)
    keys[..., -2 * layout.tokens :] = scales.view(torch.uint8)
    query = torch.randn(1, 8, 1, 128, device="cuda", dtype=torch.bfloat16)
    last = torch.arange(pages - 4, pages, dtype=torch.int32, device="cuda")[None]
    far = Pages(keys, keys, spec, spec, 256, page_table=last)
    near = Pages(keys[-4:].contiguous(), keys[-4:].contiguous(), spec, spec, 256)
    got, want = (decode_attention(query, p, impl="triton")[0] for p in (far, near))
    assert torch.equal(got, want)
    everything = Pages(keys, keys, spec, spec, pages * layout.tokens)
    assert bool(decode_attention(query, everything, impl="triton")[0].isfinite().all())


@pytest.mark.parametrize("statistic", ["none", "per_head"])
def test_opcheck(statistic: Statistic) -> None:
    built = Built(Case(statistic=statistic, seqlens=(256, 70)), "cpu", torch.float32)
    pages, dense = built.pages, built.dense
    args = (
        built.query, pages.keys, pages.values, None, pages.seqlens, 0, None, dense.keys,
        dense.values, None, dense.n_dense, dense.n_sinks, None, True,
        pages.key_shift, pages.key_equalizer,
        pages.value_shift, pages.value_equalizer, 0.1, 0.0, 0, pages.key_spec.key,
        pages.value_spec.key,
    )  # fmt: skip
    torch.library.opcheck(op.decode_attention, args)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no layout": ({"key_spec": QuantSpec(128, 5)}, "no page layout"),
    "bytes": ({"key_spec": QuantSpec(128, 2)}, "must be uint8 of shape"),
    "lengths": ({"seqlens": torch.zeros(2)}, "must be int32"),
    "statistic": ({"key_shift": torch.zeros(3)}, "key_shift must have shape"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    built = Built(Case(), "cpu", torch.float32)
    change, message = BAD[name]
    with pytest.raises(InputError, match=message):
        decode_attention(built.query, built.pages._replace(**change))
    with pytest.raises(InputError, match=r"dense\.keys must be"):
        decode_attention(built.query, built.pages, Dense(built.query, built.query, 1))


def test_an_explicit_backend_does_not_fall_back() -> None:
    built = Built(Case(), "cpu", torch.float32)
    with pytest.raises(UnsupportedError, match="GPU"):
        built.run("triton")
