"""The mixes of `llama-quantize` by name: which tensor gets which format.

A mix quantizes most of a model in one format and spends more bits where they matter most: the output matrix, the value
projections, the down projections of some layers. The rules, and the numbers of the mixes in `general.file_type`, are
llama.cpp's (`llama_tensor_get_type` in llama-quant.cpp), without its exceptions for Falcon.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from trichord.errors import RequestError
from trichord.gguf_file import GGUFFile, TensorInfo
from trichord.weight_format import WeightFormat as F


@dataclass(frozen=True)
class Site:
    """Where a tensor stands: the facts that the rules go by."""

    layer: int  # among the tensors of its role, in the order of layers
    layers: int
    query_groups: int  # query heads a key-value head
    experts: int
    stacked: bool  # one matrix an expert
    llama_70b: bool
    importance: bool  # an importance matrix is at hand


Condition = Callable[[Site], bool]
Rules = tuple[tuple[Condition, F], ...]


def _always(site: Site) -> bool:
    return True


def _more_bits(site: Site) -> bool:
    """The first and last eighth of the layers, and every third between."""
    eighth = site.layers // 8
    return site.layer < eighth or site.layer >= 7 * site.layers // 8 or (site.layer - eighth) % 3 == 2


def _first(layers: int) -> Condition:
    return lambda site: site.layer < layers


def _first_eighth(site: Site) -> bool:
    return site.layer < site.layers // 8


def _first_sixteenth(site: Site) -> bool:
    return site.layer < site.layers // 16


def _middle(site: Site) -> bool:
    return site.layers // 8 <= site.layer < 7 * site.layers // 8


def _grouped(site: Site) -> bool:
    """Few key-value heads: their matrices are small, so more bits cost little."""
    return site.query_groups >= 4


def _grouped_or_experts(site: Site) -> bool:
    return _grouped(site) or site.experts >= 4


def _eight_experts(site: Site) -> bool:
    return site.experts == 8


def _llama_70b(site: Site) -> bool:
    """Eight heads share each value projection: it is small, so more bits cost little."""
    return site.llama_70b


def _stacked(site: Site) -> bool:
    return site.stacked


def _importance(site: Site) -> bool:
    return site.importance


def _without_importance(site: Site) -> bool:
    return not site.importance


def _both(first: Condition, second: Condition) -> Condition:
    return lambda site: first(site) and second(site)


@dataclass(frozen=True)
class Mix:
    """A mix: its number in `general.file_type`, its main format, that of the output matrix, and its exceptions.

    rules: by the role of a tensor (see `_ROLES`, and "any"), the first condition that holds gives the format.
    """

    file_type: int
    format: F
    output: F
    rules: dict[str, Rules] = field(default_factory=dict)


_EIGHT_EXPERTS_OUTPUT: Rules = ((_eight_experts, F.Q5_K),)


def _mix(file_type: int, format: F, output: F = F.Q6_K, **rules: Rules) -> Mix:
    """A mix with what nearly all have in common: finer keys and values in a model of 8 experts and in Llama 70B."""
    value: Rules = ((_eight_experts, F.Q8_0),)
    for condition, chosen in (*rules.get("value", ()), (_always, format)):
        if chosen in (F.Q3_K, F.Q4_K):
            value += ((_both(_llama_70b, condition), F.Q5_K),)
        value += ((condition, chosen),)
    key = ((_eight_experts, F.Q8_0), *rules.get("key", ()))
    return Mix(file_type, format, output, rules | {"value": value, "key": key})


def _two_bit_mix(file_type: int, format: F, more: F, attention_output: F | None = None) -> Mix:
    """The mixes below three bits; `more` is the format of what they keep finer."""
    rules = {
        "embedding": ((_always, more),),
        "value": ((_grouped_or_experts, F.Q4_K), (_always, more)),
        "key": ((_eight_experts, F.Q4_K),),
        "down": ((_first_eighth, more),),
        "attention_output": _EIGHT_EXPERTS_OUTPUT + (((_always, attention_output),) if attention_output else ()),
    }
    return Mix(file_type, format, F.Q5_K, rules)


_TERNARY_EMBEDDING: Rules = ((_always, F.Q4_K),)

MIXES: dict[str, Mix] = {
    "F32": Mix(0, F.F32, F.F32),
    "F16": Mix(1, F.F16, F.F16),
    "BF16": Mix(32, F.BF16, F.BF16),
    "Q1_0": _mix(40, F.Q1_0),
    "Q2_0": _mix(41, F.Q2_0, embedding=_TERNARY_EMBEDDING),
    "Q4_0": _mix(2, F.Q4_0, down=((_both(_importance, _first_eighth), F.Q4_1),)),
    "Q4_1": _mix(3, F.Q4_1),
    "Q5_0": _mix(8, F.Q5_0, down=((_both(_importance, _first_eighth), F.Q5_1),)),
    "Q5_1": _mix(9, F.Q5_1),
    "Q8_0": _mix(7, F.Q8_0, F.Q8_0),
    "Q2_K": _mix(
        10,
        F.Q2_K,
        value=((_grouped, F.Q4_K), (_always, F.Q3_K)),
        down=((_always, F.Q3_K),),
        attention_output=(*_EIGHT_EXPERTS_OUTPUT, (_always, F.Q3_K)),
    ),
    "Q2_K_S": _mix(21, F.Q2_K, value=((_grouped, F.Q4_K),), down=((_first_eighth, F.Q4_K),)),
    "Q3_K_S": _mix(11, F.Q3_K, attention_output=_EIGHT_EXPERTS_OUTPUT),
    "Q3_K_M": _mix(
        12,
        F.Q3_K,
        value=((_first(2), F.Q5_K), (_always, F.Q4_K)),
        down=((_first_sixteenth, F.Q5_K), (_always, F.Q4_K)),
        attention_output=(*_EIGHT_EXPERTS_OUTPUT, (_always, F.Q4_K)),
    ),
    "Q3_K_L": _mix(
        13,
        F.Q3_K,
        value=((_always, F.Q5_K),),
        down=((_always, F.Q5_K),),
        attention_output=((_eight_experts, F.Q3_K), (_always, F.Q5_K)),
    ),
    "Q4_K_S": _mix(
        14,
        F.Q4_K,
        value=((_first(4), F.Q5_K),),
        down=((_first_eighth, F.Q5_K),),
        attention_output=_EIGHT_EXPERTS_OUTPUT,
    ),
    "Q4_K_M": _mix(
        15,
        F.Q4_K,
        value=((_more_bits, F.Q6_K),),
        down=((_more_bits, F.Q6_K),),
        attention_output=_EIGHT_EXPERTS_OUTPUT,
    ),
    "Q5_K_S": _mix(16, F.Q5_K),
    "Q5_K_M": _mix(17, F.Q5_K, value=((_more_bits, F.Q6_K),), down=((_more_bits, F.Q6_K),)),
    "Q6_K": _mix(18, F.Q6_K),
    "TQ1_0": _mix(36, F.TQ1_0, embedding=_TERNARY_EMBEDDING),
    "TQ2_0": _mix(37, F.TQ2_0, embedding=_TERNARY_EMBEDDING),
    "IQ1_S": _two_bit_mix(24, F.IQ1_S, F.Q2_K, F.IQ2_XXS),
    "IQ1_M": _two_bit_mix(31, F.IQ1_M, F.Q2_K, F.IQ2_XXS),
    "IQ2_XXS": _two_bit_mix(19, F.IQ2_XXS, F.Q2_K),
    "IQ2_XS": _two_bit_mix(20, F.IQ2_XS, F.Q2_K),
    "IQ2_S": _two_bit_mix(28, F.IQ2_XS, F.IQ3_S, F.IQ3_S),
    "IQ2_M": _two_bit_mix(29, F.IQ2_S, F.IQ3_S, F.IQ3_S),
    "IQ3_XXS": _mix(
        23,
        F.IQ3_XXS,
        F.Q5_K,
        embedding=((_always, F.IQ3_S),),
        value=((_grouped, F.Q4_K), (_without_importance, F.IQ3_S)),
        key=((_always, F.IQ2_S),),
        query=((_always, F.IQ2_S),),
        down=((_both(_without_importance, _first_eighth), F.Q4_K), (_without_importance, F.Q3_K)),
        attention_output=(*_EIGHT_EXPERTS_OUTPUT, (_always, F.IQ3_S)),
    ),
    "IQ3_XS": _mix(
        22,
        F.IQ3_S,
        value=((_grouped, F.Q4_K),),
        key=((_always, F.IQ3_XXS),),
        query=((_always, F.IQ3_XXS),),
        gate=((_middle, F.IQ3_XXS),),
        up=((_middle, F.IQ3_XXS),),
        attention_output=_EIGHT_EXPERTS_OUTPUT,
    ),
    "IQ3_S": _mix(26, F.IQ3_S, value=((_grouped, F.Q4_K),), attention_output=_EIGHT_EXPERTS_OUTPUT),
    "IQ3_M": _mix(
        27,
        F.IQ3_S,
        value=((_always, F.Q4_K),),
        down=((_first_eighth, F.Q4_K), (_both(_eight_experts, _more_bits), F.Q4_K)),
        attention_output=(*_EIGHT_EXPERTS_OUTPUT, (_always, F.Q4_K)),
    ),
    "IQ4_NL": _mix(
        25,
        F.IQ4_NL,
        value=((_grouped, F.Q5_K),),
        down=((_both(_without_importance, _first_eighth), F.Q5_K),),
        attention_output=_EIGHT_EXPERTS_OUTPUT,
    ),
    "IQ4_XS": _mix(
        30,
        F.IQ4_XS,
        value=((_grouped, F.Q5_K),),
        down=((_both(_without_importance, _first_eighth), F.Q5_K),),
        attention_output=_EIGHT_EXPERTS_OUTPUT,
    ),
    "MXFP4_MOE": Mix(38, F.MXFP4, F.Q8_0, {"any": ((_stacked, F.MXFP4), (_always, F.Q8_0))}),
    "NVFP4": _mix(39, F.NVFP4),
}

_ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}


def mix_by_name(name: str) -> Mix:
    """The mix of this name, in upper or lower case. Raises RequestError for an unknown one."""
    upper = name.upper()
    try:
        return MIXES[_ALIASES.get(upper, upper)]
    except KeyError:
        raise RequestError(f"{name!r} is not a quantization type; there are {', '.join(MIXES)}") from None


# Roles by a part of the tensor's name, the first match counting. Fused and compressed projections pass for values.
_ROLES = (
    ("attn_qkv.weight", "value"),
    ("attn_kv_b.weight", "value"),
    ("attn_v.weight", "value"),
    ("attn_k.weight", "key"),
    ("attn_q.weight", "query"),
    ("attn_output.weight", "attention_output"),
    ("ffn_up", "up"),
    ("ffn_gate", "gate"),
    ("ffn_down", "down"),
)

# Matrices that are small, sensitive or read element by element, by a part of their name.
_KEPT = re.compile(
    r"_norm\.weight|ffn_gate_inp\.weight|ffn_gate_tid2eid\.weight|altup|laurel|per_layer_model_proj|position_embd"
    r"|token_types|ssm_conv1d|shortconv\.conv\.weight|indexer\.[kq]_proj\.weight|attn_rel_b\.weight"
    r"|time_mix_(first|w[012]|v[012]|a[012]|g[12]|decay_w[12]|lerp_fused)\.weight"
    r"|sam\.pos_embd|sam\.neck\.|sam\.net_|\.rel_pos|\.patch_embd|\.patch_merger|a\.rvq\.codebook|mm\.a\.code_embd"
)
_EMBEDDINGS = ("token_embd.weight", "per_layer_token_embd.weight")
_OUTPUT = "output.weight"

# Where blocks do not fill a row: a format of shorter blocks, and no fewer bits.
_SHORTER_BLOCKS = {
    F.IQ1_S: F.IQ4_NL,
    F.IQ1_M: F.IQ4_NL,
    F.IQ2_XXS: F.IQ4_NL,
    F.IQ2_XS: F.IQ4_NL,
    F.IQ2_S: F.IQ4_NL,
    F.IQ3_XXS: F.IQ4_NL,
    F.IQ3_S: F.IQ4_NL,
    F.IQ4_XS: F.IQ4_NL,
    F.Q1_0: F.Q4_0,
    F.Q2_0: F.Q4_0,
    F.Q2_K: F.Q4_0,
    F.Q3_K: F.Q4_0,
    F.TQ1_0: F.Q4_0,
    F.TQ2_0: F.Q4_0,
    F.NVFP4: F.MXFP4,
    F.Q4_K: F.Q5_0,
    F.Q5_K: F.Q5_1,
    F.Q6_K: F.Q8_0,
}

_NEED_IMPORTANCE = frozenset({F.IQ1_S, F.IQ1_M, F.IQ2_XXS, F.IQ2_XS, F.IQ2_S})


def needs_importance(name: str, format: F) -> bool:
    """Whether this tensor is of little use in this format unless an importance matrix guides the search."""
    return format in _NEED_IMPORTANCE and name not in (*_EMBEDDINGS, _OUTPUT)


def choose_formats(file: GGUFFile, mix: Mix, pure: bool = False, importance: bool = False) -> dict[str, F]:
    """The format of each tensor of `file` in this mix, in the file's order.

    pure: the mix's main format for all that is quantized. importance: whether an importance matrix is at hand.
    """
    site_of = _sites(file, importance)
    tied = _OUTPUT not in file.tensors
    chosen = {}
    for name, tensor in file.tensors.items():
        if not _is_quantized(tensor):
            chosen[name] = tensor.format
        elif pure or mix.format.block_size == 1:
            chosen[name] = _fitting(mix.format, tensor)
        elif name == _OUTPUT or (tied and name in _EMBEDDINGS):
            # Fewer bits for neither reason than the main format's blocks allow.
            fits = tensor.shape[-1] % mix.format.block_size == 0
            chosen[name] = _fitting(mix.output if fits else F.Q8_0, tensor)
        else:
            role, site = site_of[name]
            rules = (*mix.rules.get(role, ()), *mix.rules.get("any", ()), (_always, mix.format))
            chosen[name] = _fitting(next(format for condition, format in rules if condition(site)), tensor)
    return chosen


def _is_quantized(tensor: TensorInfo) -> bool:
    """Whether a mix applies: to matrices (one or one an expert), not to vectors, biases, norms and small tables."""
    is_matrix = any(size > 1 for size in tensor.shape[:-1])
    return is_matrix and tensor.name.endswith("weight") and not _KEPT.search(tensor.name)


def _fitting(format: F, tensor: TensorInfo) -> F:
    while tensor.shape[-1] % format.block_size:
        format = _SHORTER_BLOCKS.get(format, F.F16)
    return format


def _role(name: str) -> str:
    if name in _EMBEDDINGS:
        return "embedding"
    return next((role for part, role in _ROLES if part in name), "")


def _sites(file: GGUFFile, importance: bool) -> dict[str, tuple[str, Site]]:
    """Role and site of each tensor that a mix applies to."""
    architecture = file.get("general.architecture", str, "")

    def number(key: str) -> int:
        value = file.metadata.get(f"{architecture}.{key}", 0)
        return int(np.ravel(value)[0])  # a list has one number a layer

    layers, experts = number("block_count"), number("expert_count")
    heads, kv_heads = number("attention.head_count"), number("attention.head_count_kv")
    by_role: dict[str, list[str]] = defaultdict(list)
    quantized = [name for name, tensor in file.tensors.items() if _is_quantized(tensor)]
    for name in sorted(quantized, key=lambda name: (_layer(name), name)):
        by_role[_role(name)].append(name)
    sites = {}
    for role, names in by_role.items():
        for rank, name in enumerate(names):
            is_value = role == "value"
            sites[name] = (
                role,
                Site(
                    layer=_layer(name) if experts > 1 and not is_value else rank,
                    layers=len(names) if is_value else layers,
                    query_groups=heads // kv_heads if kv_heads else 0,
                    experts=experts,
                    stacked=len(file.tensors[name].shape) > 2 and file.tensors[name].shape[0] > 1,
                    llama_70b=architecture == "llama" and layers == 80 and heads != kv_heads,
                    importance=importance,
                ),
            )
    return sites


def _layer(name: str) -> int:
    match = re.match(r"blk\.(\d+)\.", name)
    return int(match[1]) if match else -1
