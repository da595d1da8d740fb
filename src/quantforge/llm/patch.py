"""`patch_model`: a model whose own `generate()` keeps its cache packed.

What a patch adds to the model object, and `unpatch_model` takes away again:

    vars(model)["_prepare_cache_for_generation"]   where transformers makes the cache of a call
    vars(model)["_quantforge_patches"]             the patches in effect, the last one counts
    a forward pre-hook                             the same for plain `model(...)`

The class stays as it is, and so do `state_dict`, `config` and what `save_pretrained` writes. The
three are plain objects that hold the model, so a copied or pickled model comes out patched.
"""

from __future__ import annotations

import inspect
from types import TracebackType
from typing import Any

from transformers import DynamicCache, EncoderDecoderCache

from quantforge.errors import InputError, UnsupportedError
from quantforge.llm.cache import QuantForgeCache

PATCHES = "_quantforge_patches"
PREPARE = "_prepare_cache_for_generation"
CACHE = "past_key_values"
CHECKPOINT_DEFAULTS = ("hybrid", "hybrid_chunked", "sliding_window")
"""Deprecated names of `cache_implementation` that stand in the files of older Gemma and Mistral
checkpoints: nobody chose them for a call, so they do not count as a cache that was asked for."""


class Patch:
    """A patch in effect; leaving it as a context, or `remove()`, takes it off again.

    Attributes:
        settings: what each cache is made with.
        forward: whether plain `model(...)` gets a cache too.
    """

    def __init__(self, outer: Any, model: Any, forward: bool, settings: dict[str, Any]) -> None:
        self._outer, self._model = outer, model
        self.forward, self.settings = forward, settings

    def __enter__(self) -> Any:
        """Return the model that was patched."""
        return self._outer

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.remove()

    def new_cache(self) -> Any:
        """Return an empty cache for the model."""
        cache = QuantForgeCache(self._model.config, **self.settings)
        if not self._model.config.is_encoder_decoder:
            return cache
        # what the encoder says is computed once and attended to in full
        cross = DynamicCache(config=self._model.config.get_text_config(decoder=True))
        return EncoderDecoderCache(cache, cross)

    def remove(self) -> None:
        """Take this patch off; others stay. Does nothing the second time."""
        patches = vars(self._model).get(PATCHES, [])
        if self in patches:
            patches.remove(self)
            if not patches:
                _uninstall(self._model)


def patch_model(model: Any, *, forward: bool = True, **settings: Any) -> Patch:
    """Let a model make a `QuantForgeCache` wherever it would make its own growing cache.

    Takes effect at once and until `unpatch_model(model)`; or for the length of a context:

        with patch_model(model, bits=4, layers={0: {"bits": 8}}):
            model.generate(ids)

    A cache that is passed in, and a `cache_implementation` that asks for another kind, are
    respected. Patches nest: the latest one counts. Pipelines, `accelerate` hooks (layers on several
    devices, CPU and disk offload), `deepcopy`, pickling and `save_pretrained` work as without.

    Args:
        model: a transformers model with `generate`, or a PEFT model or `torch.compile`d module
            around one. Of a pipeline give `pipeline.model`.
        forward: also when the model is called without a cache, in evaluation mode, and would make
            one (`use_cache`).
        **settings: of `QuantForgeCache`.

    Raises:
        InputError: for an object that is not such a model.
        UnsupportedError: for a model that does not keep keys and values in a transformers cache.
        ConfigError: for settings that `QuantForgeCache` refuses.
    """
    target = _generator_of(model)
    patch = Patch(model, target, forward, settings)
    patch.new_cache()  # refuses wrong settings here rather than in the first generate()
    if PATCHES not in vars(target):
        _install(target)
    vars(target)[PATCHES].append(patch)
    return patch


def unpatch_model(model: Any) -> None:
    """Take all patches off a model, which then is as it was; nothing happens without a patch.

    Raises:
        InputError: for an object that `patch_model` does not take.
    """
    for patch in reversed(list(vars(_generator_of(model)).get(PATCHES, []))):
        patch.remove()


def _generator_of(model: Any) -> Any:
    """Return the transformers model inside adapters and compiled modules."""
    inner = getattr(model, "_orig_mod", model)
    if hasattr(inner, "get_base_model"):
        inner = inner.get_base_model()
    if not hasattr(inner, PREPARE) or not hasattr(inner, "register_forward_pre_hook"):
        remedy = "its .model" if hasattr(model, "model") else "a model with a language-model head"
        raise InputError(
            f"{type(model).__name__} is not a transformers model with generate(); patch {remedy}"
        )
    takes_cache = CACHE in inspect.signature(type(inner).forward).parameters
    if not takes_cache or not inner._supports_default_dynamic_cache():
        raise UnsupportedError(
            f"{type(inner).__name__} does not keep its state in a transformers cache of keys and "
            "values; use it unpatched"
        )
    return inner


def _install(model: Any) -> None:
    vars(model)[PREPARE] = _Prepare(model, vars(model).get(PREPARE))
    vars(model)[PATCHES] = []
    model.register_forward_pre_hook(_Fill(model), with_kwargs=True)


def _uninstall(model: Any) -> None:
    own = vars(model).pop(PREPARE).own
    if own is not None:
        vars(model)[PREPARE] = own
    del vars(model)[PATCHES]
    hooks = model._forward_pre_hooks
    for key in [key for key, hook in hooks.items() if isinstance(hook, _Fill)]:
        del hooks[key], model._forward_pre_hooks_with_kwargs[key]


class _Prepare:
    """Stands for the model's method that makes a cache, and replaces what that makes."""

    def __init__(self, model: Any, own: Any) -> None:
        self._model = model
        self.own = own
        """What another library had put there before, or None for the method of the class."""

    def __call__(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Do what the model does, then exchange a growing cache that is new for one of ours."""
        if generation_config.cache_implementation in CHECKPOINT_DEFAULTS:
            generation_config.cache_implementation = None  # of a copy that generate() made
        given = model_kwargs.get(CACHE)
        if self.own is None:
            own = getattr(type(self._model), PREPARE).__get__(self._model)
        else:
            own = self.own
        result = own(generation_config, model_kwargs, *args, **kwargs)
        made = model_kwargs.get(CACHE)
        if made is not None and made is not given and _is_default(made):
            cache = vars(self._model)[PATCHES][-1].new_cache()
            if generation_config.is_assistant:
                cache.activate_past_recording()
            model_kwargs[CACHE] = cache
        return result


def _is_default(cache: Any) -> bool:
    """Return whether a cache is the one that transformers makes when nothing is asked for."""
    if isinstance(cache, EncoderDecoderCache):
        cache = cache.self_attention_cache
    return type(cache) is DynamicCache and not cache.offloading


class _Fill:
    """A forward pre-hook that passes a cache where the model would make its own."""

    def __init__(self, model: Any) -> None:
        self._model = model
        # of the class: accelerate puts wrappers on the object
        self._position = list(inspect.signature(type(model).forward).parameters).index(CACHE) - 1

    def __call__(
        self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Return the arguments with a cache, or None to leave them."""
        patch = vars(self._model)[PATCHES][-1]
        if not patch.forward or module.training or kwargs.get(CACHE) is not None:
            return None
        before, after = args[: self._position], args[self._position + 1 :]
        if after or args[self._position :] not in ((), (None,)):
            return None
        use_cache = kwargs.get("use_cache")
        if use_cache is None:
            use_cache = getattr(self._model.config.get_text_config(decoder=True), "use_cache", True)
        return (before, kwargs | {CACHE: patch.new_cache()}) if use_cache else None
