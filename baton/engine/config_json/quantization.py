"""What a checkpoint says about its quantization, and what Baton makes of it. Knows the words of config.json, no tensor.

Taken: plain checkpoints; fp8 in blocks of 128 x 128 (DeepSeek-V3's; turned back while loading); int8 weights with one scale per
output channel and int8 activations with one scale per token ("w8a8"), as compressed-tensors
(https://github.com/vllm-project/compressed-tensors: config_groups of weights and input_activations) or modelslim
(https://gitcode.com/Ascend/msmodelslim: `quantize` in config.json or quant_model_description.json, tensor name -> kind) write it.
Everything else is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from baton.engine.config_json.fields import Config, Fields
from baton.errors import ConfigError

DESCRIPTION = "quant_model_description.json"  # modelslim's
_SUPPORTED = (
    "supported are fp8 with e4m3 weights in blocks of [128, 128], compressed-tensors int-quantized with int8 weights per channel and "
    "dynamic int8 activations per token, modelslim W8A8_DYNAMIC, and unquantized checkpoints"
)
_MODELSLIM_KINDS = ("FLOAT", "W8A8_DYNAMIC")
_MODELSLIM_EXTRAS = ("kv_quant_type", "kv_cache_type", "fa_quant_type")
_FP8_DEFAULTS = {"fmt": "e4m3", "activation_scheme": "dynamic"}
_WEIGHTS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
_ACTIVATIONS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}

Kind = Literal["fp8", "w8a8"] | None


def quantization_of(config: Config, description: Config | None, asked: str) -> Literal["w8a8"] | None:
    """How a model is to be computed. description: the content of DESCRIPTION, if the checkpoint has it.

    asked: "auto" (as the checkpoint is; fp8 is turned back), "w8a8" (made while loading where it is not), "none". Raises ConfigError.
    """
    if asked not in ("auto", "none", "w8a8"):
        raise ConfigError(f"quantization {asked!r} is not supported; supported are auto, none, w8a8")
    kind = checkpoint_kind(config, description)
    if asked == "none" and kind == "w8a8":
        raise ConfigError(
            "quantization none cannot be had from this checkpoint: its weights are int8 already, and what was rounded away is not "
            "stored; use auto, or the unquantized checkpoint"
        )
    return "w8a8" if asked == "w8a8" or kind == "w8a8" else None


def checkpoint_kind(config: Config, description: Config | None = None) -> Kind:
    """How the weights are stored; None: as they were trained. Raises ConfigError for ways that Baton does not read."""
    stated = Fields(config).inner("quantization_config") or Fields(config).inner("compression_config")
    if description is not None or "model_quant_type" in stated:
        return _modelslim(description or stated)
    if stated:
        return _by_method(stated)
    return _by_word(config.get("quantize"))


def _by_word(word: object) -> Kind:
    if word is None or word in ("", "float"):
        return None
    if str(word).lower() != "w8a8_dynamic":
        raise ConfigError(f"quantization {word!r} (`quantize` in config.json) is not supported; {_SUPPORTED}")
    return "w8a8"


def _modelslim(description: Config) -> Kind:
    """Entries without a dot describe the whole and not a tensor."""
    for name, kind in description.items():
        if "." in name and kind not in _MODELSLIM_KINDS:
            raise ConfigError(f"quantization {kind!r} (modelslim, of {name}) is not supported; {_SUPPORTED}")
    for name in _MODELSLIM_EXTRAS:
        if description.get(name):
            raise ConfigError(f"{name} {description[name]!r} (modelslim) is not supported; {_SUPPORTED}")
    kinds = [kind for name, kind in description.items() if "." in name] or [description.get("model_quant_type")]
    if any(kind not in _MODELSLIM_KINDS for kind in kinds):
        raise ConfigError(f"quantization {kinds[0]!r} (modelslim) is not supported; {_SUPPORTED}")
    return "w8a8" if "W8A8_DYNAMIC" in kinds else None


def _by_method(stated: Config) -> Kind:
    method = stated.get("quant_method")
    if method == "fp8":
        _check("fp8", "", stated, {"fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}, _FP8_DEFAULTS)
        return "fp8"
    if method == "compressed-tensors":
        _check_compressed_tensors(stated)
        return "w8a8"
    raise ConfigError(f"quantization_config (quant_method {method!r}) is not supported; {_SUPPORTED}")


def _check_compressed_tensors(stated: Config) -> None:
    name = "compressed-tensors"
    _check(name, "", stated, {"format": "int-quantized", "kv_cache_scheme": None})
    if Fields(stated).inner("sparsity_config").get("format", "dense") != "dense":
        raise ConfigError(f"{name}: sparsity_config {stated['sparsity_config']!r} is not supported; {_SUPPORTED}")
    groups = Fields(stated).inner("config_groups")
    if not groups:
        raise ConfigError(f"{name}: config_groups is empty; {_SUPPORTED}")
    for group in groups:
        scheme = Fields(groups).inner(group)
        where = f"config_groups.{group}."
        _check(name, where, scheme, {"format": "int-quantized", "output_activations": None}, {"format": "int-quantized"})
        for part, wanted in (("weights", _WEIGHTS), ("input_activations", _ACTIVATIONS)):
            _check(name, f"{where}{part}.", Fields(scheme).inner(part), wanted, {"symmetric": True, "dynamic": False, "type": "int"})


def _check(method: str, where: str, found: Config, wanted: Mapping[str, Any], defaults: Mapping[str, Any] | None = None) -> None:
    """Raise ConfigError naming the first field that is not as wanted. defaults: what a field that is left out means."""
    for name, value in wanted.items():
        stated = found.get(name)
        stated = (defaults or {}).get(name) if stated is None else stated
        if stated != value:
            raise ConfigError(f"{method} with {where}{name} {stated!r} is not supported; {_SUPPORTED}")
