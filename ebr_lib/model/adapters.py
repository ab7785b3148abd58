"""LoRA adapters: put one on a model, take its weights out and back exactly, merge it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ebr_lib.errors import ModelError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from torch import Tensor

ADAPTER_NAME = "default"
ADAPTER_FILE = "adapter_model.safetensors"


def add_lora(
    model: SentenceTransformer, *, r: int, alpha: int, dropout: float, dora: bool = False, rslora: bool = False
) -> None:
    """Put a LoRA adapter (Hu et al. 2021, arXiv 2106.09685) on all linear layers; only it is trained.

    Its weights are float32 whatever the base is: in bfloat16 an update of 1e-4 of a weight is rounded away.

    :raises ModelError: the model has no linear layer that an adapter could go on.
    """
    from peft import LoraConfig, TaskType
    from peft.tuners.tuners_utils import cast_adapter_dtype

    # sentence embeddings pool token states: nothing flows through BERT's own pooler
    has_pooler = any(name.split(".")[0] == "pooler" for name, _ in model.transformers_model.named_modules())
    config = LoraConfig(
        task_type=TaskType.FEATURE_EXTRACTION,
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules="all-linear",
        exclude_modules=r"pooler\..*" if has_pooler else None,
        use_dora=dora,
        use_rslora=rslora,
    )
    try:
        model.add_adapter(config, adapter_name=ADAPTER_NAME)
    except ValueError as error:
        raise ModelError(f"no adapter could be put on {type(model.transformers_model).__name__}: {error}") from error
    cast_adapter_dtype(model.transformers_model, ADAPTER_NAME)


def is_adapted(model: SentenceTransformer) -> bool:
    """Whether an adapter is on the model already."""
    return bool(getattr(model.transformers_model, "peft_config", None))


def lora_knobs(model: SentenceTransformer) -> dict[str, Any]:
    """How the adapter on a model is shaped, as the knobs that shape one are named."""
    lora = model.transformers_model.peft_config[ADAPTER_NAME]
    return {
        "lora_r": lora.r,
        "lora_alpha": lora.lora_alpha,
        "lora_dropout": lora.lora_dropout,
        "use_dora": lora.use_dora,
        "use_rslora": lora.use_rslora,
    }


def trainable_counts(model: SentenceTransformer) -> tuple[int, int]:
    """(trainable parameters, all parameters)."""
    weights = list(model.parameters())
    return sum(w.numel() for w in weights if w.requires_grad), sum(w.numel() for w in weights)


def adapter_weights(model: SentenceTransformer) -> dict[str, Tensor]:
    """A copy of the adapter's weights on the CPU, in their own type."""
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(model.transformers_model, adapter_name=ADAPTER_NAME)
    return {name: weight.detach().cpu().clone() for name, weight in state.items()}


def set_adapter_weights(model: SentenceTransformer, weights: Mapping[str, Tensor]) -> None:
    """Put weights back, bit for bit.

    :raises ModelError: the weights belong to an adapter of another shape.
    """
    from peft import set_peft_model_state_dict

    found = set_peft_model_state_dict(model.transformers_model, dict(weights), adapter_name=ADAPTER_NAME)
    if found.unexpected_keys:
        raise ModelError(f"the adapter's weights do not fit the model: {', '.join(found.unexpected_keys[:3])} …")


def read_adapter(folder: Path) -> dict[str, Tensor]:
    """The adapter weights saved in a folder."""
    from safetensors.torch import load_file

    weights = load_file(folder / ADAPTER_FILE)
    return {name.removeprefix("base_model.model."): weight for name, weight in weights.items()}


def merge_adapter(model: SentenceTransformer) -> None:
    """Fold the adapter into the base weights, in place; the model is then an ordinary one."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    inner = model.transformers_model
    for name, module in list(inner.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge(safe_merge=True)
            parent, _, child = name.rpartition(".")
            setattr(inner.get_submodule(parent), child, module.get_base_layer())
    inner._hf_peft_config_loaded = False
    del inner.peft_config
    if hasattr(inner, "_weight_conversions"):
        del inner._weight_conversions  # on a reloaded adapter they would rename the merged weights on save
