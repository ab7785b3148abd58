"""LoRA adapters: add one to a model, copy its weights out and back exactly, merge it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ebr_lib.errors import ModelError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from torch import Tensor
    from torch.nn import Module

ADAPTER_NAME = "default"
ADAPTER_FILE = "adapter_model.safetensors"


def add_lora(
    model: SentenceTransformer, *, r: int, alpha: int, dropout: float, dora: bool = False, rslora: bool = False
) -> None:
    """Add a LoRA adapter (Hu et al. 2021, arXiv 2106.09685) to all linear layers; only it is trained.

    Its weights are float32 whatever the base is: in bfloat16 an update of 1e-4 of a weight is rounded away.

    :raises ModelError: the model has no transformer, or no linear layer for an adapter.
    """
    from peft import LoraConfig, TaskType
    from peft.tuners.tuners_utils import cast_adapter_dtype

    if not model.has_peft_compatible_model():
        raise ModelError(
            f"LoRA cannot be put on this model: its first module is {type(model[0]).__name__}, not a transformer. It "
            "encodes, and cannot be fine-tuned here; fine-tune a model with a transformer, such as all-MiniLM-L6-v2"
        )
    # sentence embeddings pool token states, and do not use BERT's own pooler
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
    freeze_base(model)


def load_adapter(model: SentenceTransformer, folder: Path, *, trainable: bool = False) -> None:
    """Add a saved adapter to its base model, in float32 as it was saved.

    :param trainable: train its weights, and nothing else.
    :raises ModelError: the tensors in the file and in the model are not the same.
    """
    from peft import PeftConfig

    config = PeftConfig.from_pretrained(str(folder))
    config.inference_mode = not trainable
    model.add_adapter(config, adapter_name=ADAPTER_NAME)
    restore_adapter(model, folder)
    if trainable:
        freeze_base(model)
    else:
        model.requires_grad_(False)
        model.eval()


def restore_adapter(model: SentenceTransformer, folder: Path) -> None:
    """Set an adapter's weights from its file, in float32: peft drops DoRA's magnitudes and rounds to the base's type.

    :raises ModelError: as `load_adapter`.
    """
    from peft.tuners.tuners_utils import cast_adapter_dtype

    cast_adapter_dtype(model.transformers_model, ADAPTER_NAME)
    set_adapter_weights(model, read_adapter(folder))


def freeze_base(model: SentenceTransformer) -> None:
    """Train only the adapter: the modules after the transformer (Dense, LayerNorm) are loaded from the base."""
    for name, weight in model.named_parameters():
        weight.requires_grad_(any(part.startswith("lora_") for part in name.split(".")))


def is_adapted(model: SentenceTransformer) -> bool:
    """Whether the model has an adapter."""
    return bool(getattr(model.transformers_model, "peft_config", None))


def lora_knobs(model: SentenceTransformer) -> dict[str, Any]:
    """Shape of a model's adapter, by the names of the knobs."""
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
    """Set all of an adapter's weights, bit for bit.

    :raises ModelError: the weights are not the adapter's, tensor by tensor; names some of them.
    """
    from peft import set_peft_model_state_dict

    there = adapter_weights(model)
    fitting = {name: weight for name, weight in weights.items() if name in there and weight.shape == there[name].shape}
    set_peft_model_state_dict(model.transformers_model, fitting, adapter_name=ADAPTER_NAME)
    arrived = adapter_weights(model)
    wrong = [name for name in arrived.keys() | weights.keys() if not _same(arrived.get(name), weights.get(name))]
    if wrong:
        shown = ", ".join(sorted(wrong)[:3])
        raise ModelError(
            f"{len(wrong)} tensors of the adapter are not in the model as they are in its file: {shown}"
            f"{' …' if len(wrong) > 3 else ''}; the adapter was made for another base model, or by another version of "
            "peft: merge it into its base with the library that made it"
        )


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    """Whether both exist and are equal, in the first one's type; NaN equals NaN."""
    if one is None or other is None or one.shape != other.shape:
        return False
    return bool(one.isclose(other.to(one), rtol=0, atol=0, equal_nan=True).all())


def read_adapter(folder: Path) -> dict[str, Tensor]:
    """The adapter weights saved in a folder."""
    from safetensors.torch import load_file

    weights = load_file(folder / ADAPTER_FILE)
    return {name.removeprefix("base_model.model."): weight for name, weight in weights.items()}


def merge_adapter(model: SentenceTransformer) -> None:
    """Fold the adapter into the base weights, in place, or drop it if it is disabled."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import ModulesToSaveWrapper

    inner = model.transformers_model
    for name, module in list(inner.named_modules()):
        if isinstance(module, BaseTunerLayer):
            if not module.disable_adapters:
                module.merge(safe_merge=True)
            _replace(inner, name, module.get_base_layer())
        elif isinstance(module, ModulesToSaveWrapper):  # a layer that was trained without LoRA
            kept = module.original_module if module.disable_adapters else module.modules_to_save[ADAPTER_NAME]
            _replace(inner, name, kept)
    inner._hf_peft_config_loaded = False
    del inner.peft_config
    if hasattr(inner, "_weight_conversions"):
        del inner._weight_conversions  # of a reloaded adapter: they would rename the merged weights on save


def _replace(inner: Module, name: str, module: Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(inner.get_submodule(parent), child, module)
