"""JSON that comes in and goes out, as pydantic models; the OpenAPI document is made from them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from quantforge.config import QuantForgeConfig
from quantforge.spec import CodebookName, Estimator, ScaleDtype, ScaleRule
from quantforge.vectordb.config import MAX_LISTS

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$"
MAX_ID = 2**63 - 1
MAX_RERANK = 100_000

Bits = Annotated[int, Field(ge=1, le=8)]
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]
Id = Annotated[int, Field(ge=0, le=MAX_ID)]
Ids = list[Id] | list[str]
Matrix = list[list[float]]
Metadata = dict[str, list[Any]]


class Strict(BaseModel):
    """Refuses names that it does not know."""

    model_config = ConfigDict(extra="forbid")


class Sent(Strict):
    """A body; `true` is no number and "3" neither."""

    model_config = ConfigDict(strict=True)


class Background(Strict):
    """Whether the answer is the result, or a job to ask for it."""

    background: bool | None = Field(
        default=None, description="True: a job; null: a job if it is long"
    )


class Codec(Strict):
    """The code to use."""

    rotation: Literal["auto", "hadamard", "qr", "none"] = "auto"
    codebook: CodebookName = "lloyd_max"
    scale_rule: ScaleRule = "unbiased"
    estimator: Estimator = "mse"
    shift: bool = Field(default=False, description="subtract the mean of the data first")
    equalizer: bool = Field(
        default=False, description="divide channels by the root of their RMS first"
    )
    seed: Seed = 0
    scale_dtype: ScaleDtype = "float16"

    def config(self, bits: int) -> QuantForgeConfig:
        """Return the settings for so many bits."""
        names = Codec.model_fields
        return QuantForgeConfig(bits=bits, **{name: getattr(self, name) for name in names})


class CompressQuery(Codec, Background):
    """How to compress."""

    bits: Bits = 4


class DecompressQuery(Background):
    """What to get back."""

    format: Literal["safetensors", "npy", "json"] = "safetensors"


class BenchmarkQuery(Codec, Background):
    """What to measure."""

    bits: list[Bits] = Field(default=[1, 2, 3, 4, 5, 6, 7, 8], min_length=1, max_length=8)


class Vectors(Sent):
    """Vectors as lists of numbers, for a few of them."""

    vectors: Matrix = Field(description="rows of equal length")


class BenchmarkRow(BaseModel):
    """One width; see `quantforge.measure.Measured`."""

    bits: int
    vectors: int
    bytes_per_vector: float
    ratio: float = Field(description="float32 bytes by bytes")
    mse: float = Field(description="squared error by squared norm")
    theory: float | None = Field(description="the same for vectors without structure")
    bound: float = Field(description="Shannon's: no code of so many bits beats it on them")
    cosine: float
    recall: float | None = Field(description="at 10, of inner products; null below 20 vectors")
    encode_gb_s: float
    decode_gb_s: float


class BenchmarkReport(BaseModel):
    """Compression against error on the vectors sent."""

    dim: int
    queries: int = Field(description="the last of the vectors sent; not compressed")
    device: str
    rows: list[BenchmarkRow]


class OptimizeQuery(Background):
    """What to look for; see `quantforge.optimizer.optimize`."""

    objective: Literal["balanced", "accuracy", "bytes", "latency"] = "balanced"
    accuracy: Literal["recall", "cosine", "mse"] = "recall"
    metric: Literal["ip", "cosine", "l2"] = "ip"
    max_bytes: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="bytes of a vector"
    )
    min_accuracy: Annotated[float, Field(ge=0, le=1)] | None = None
    sample: Annotated[int, Field(ge=10, le=100_000)] = Field(
        default=10_000, description="vectors that are measured"
    )
    seed: Seed = 0


class JobInfo(BaseModel):
    """A job and how far it is."""

    id: str
    kind: str
    state: Literal["waiting", "running", "done", "failed", "cancelled"]
    progress: float = Field(ge=0, le=1)
    created: str
    finished: str | None = None
    error: dict[str, str] | None = None
    result: str | None = Field(default=None, description="path of the result, when there is one")


class JobList(BaseModel):
    """All jobs, oldest first."""

    jobs: list[JobInfo]


class CollectionSettings(Sent):
    """How a collection codes and compares vectors; see `IndexConfig`."""

    dim: Annotated[int, Field(ge=1, le=1 << 16)]
    bits: Bits = 4
    mode: Literal["adapted", "centred", "oblivious"] = "oblivious"
    metric: Literal["ip", "cosine", "l2"] = "cosine"
    nlist: Annotated[int, Field(ge=0, le=MAX_LISTS)] | None = Field(
        default=None, description="lists (IVF); null: by the number of vectors; 0: none"
    )
    nprobe: Annotated[int, Field(ge=1, le=MAX_LISTS)] | None = Field(
        default=None, description="lists that a search looks into; null: what recall needs"
    )
    originals: Literal["none", "float16"] = "none"
    seed: Seed = 0


class CollectionInfo(BaseModel):
    """A collection and what it takes."""

    name: str
    settings: CollectionSettings
    vectors: int
    memory: dict[str, int] = Field(description="bytes by part, and in total")
    float32_bytes: int = Field(description="what the vectors would take uncompressed")


class CollectionList(BaseModel):
    """All collections by name, and those that could not be opened."""

    collections: list[CollectionInfo]
    damaged: dict[str, str]


class Points(Sent):
    """Vectors to add."""

    vectors: Matrix
    ids: Ids | None = Field(default=None, description="new to the collection; numbered if null")
    metadata: Metadata | None = Field(default=None, description="column to values, one a vector")


class Added(BaseModel):
    """Ids of what was added, on the disk now."""

    ids: Ids


class PointIds(Sent):
    """Points by id."""

    ids: Ids = Field(min_length=1)


class Removed(BaseModel):
    """How many are gone, from the disk too."""

    removed: int


class Page(BaseModel):
    """Some ids, in the order of rows."""

    total: int
    ids: Ids


class Search(Sent):
    """What to look for: vectors, or points that are there."""

    queries: Matrix | None = None
    like: Ids | None = Field(default=None, description="ids of points to take as queries")
    k: Annotated[int, Field(ge=1)] = 10
    ids: Ids | None = Field(default=None, description="only these may be found")
    metadata: bool = Field(default=False, description="whether to return it")
    where: dict[str, Any] | None = Field(
        default=None, description="what metadata of results must be"
    )
    nprobe: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="lists to look into"
    )
    recall: Annotated[float, Field(gt=0, le=1)] | None = Field(
        default=None, description="share of the best to find; more costs time"
    )
    rerank: Annotated[int, Field(ge=1, le=MAX_RERANK)] | None = Field(
        default=None, description="candidates that are compared by the vectors kept"
    )


class Found(BaseModel):
    """Neighbours of each query, best first; fewer than k where there are no more."""

    ids: list[Ids]
    scores: list[list[float]]
    metadata: list[list[dict[str, Any]]] | None = Field(
        default=None, description="of each neighbour, if asked for"
    )


class Health(BaseModel):
    """The process is there."""

    status: Literal["ok"]


class Version(BaseModel):
    """What is running."""

    quantforge: str
    torch: str
    python: str
    device: str
