"""Saving a trained model: a complete sentence-transformers folder with contract and card."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ebr_lib.model.adapters import ADAPTER_NAME, adapter_weights
from ebr_lib.model.contract import (
    PROBES,
    Contract,
    library_versions,
    named_sha256,
    number_type,
    probe_vectors,
    setup_of,
)
from ebr_lib.model.hubs import MODELSCOPE
from ebr_lib.model.loading import load_model, prompt_of
from ebr_lib.model.packaged import find_model, local_folder
from ebr_lib.model.provenance import ModelIdentity

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from torch import Tensor


def is_finite(model: SentenceTransformer) -> bool:
    """Whether an adapter's weights, and the vectors that the model makes with them, are finite."""
    return all_finite(adapter_weights(model).values()) and bool(np.isfinite(probe_vectors(model, "")).all())


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether all values are finite."""
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


def make_contract(
    model: SentenceTransformer,
    base: ModelIdentity,
    *,
    adapter_side: str,
    matryoshka_dims: tuple[int, ...] = (),
) -> Contract:
    """The contract of a model as it is now, with probe vectors of both sides; for an adapter on queries only, those of
    documents are the base model's, which is loaded for them."""
    of_documents = model
    if adapter_side == "query":
        of_documents = load_model(base.base_model, trust_remote_code=base.trust_remote_code, device="cpu")
    prompts = {"query": prompt_of(model, "query"), "document": prompt_of(model, "document")}
    probes = {
        "query": probe_vectors(model, prompts["query"]),
        "document": probe_vectors(of_documents, prompts["document"]),
    }
    return Contract(
        base_model=base.base_model,
        base_sha256=base.base_sha256,
        trust_remote_code=base.trust_remote_code,
        prompts=prompts,
        max_seq_length=int(model.max_seq_length or 0),
        adapter_side=adapter_side,
        matryoshka_dims=matryoshka_dims,
        probes=probes,
        number_type=number_type(model),
        libraries=library_versions(),
        base_files=named_sha256(folder, weights=False) if (folder := local_folder(base.base_model)) else {},
        **setup_of(model),
    )


def save_adapter(model: SentenceTransformer, folder: Path, base: ModelIdentity, contract: Contract) -> None:
    """Save adapter, tokenizer, pooling, prompts and contract as a folder that sentence-transformers loads too."""
    config = model.transformers_model.peft_config[ADAPTER_NAME]
    place = find_model(base.base_model)  # other libraries do not know names of ModelScope
    config.base_model_name_or_path = str(local_folder(place)) if place.startswith(MODELSCOPE) else place
    if isinstance(config.target_modules, set):  # written in the order of this process's hashes, it differs between runs
        config.target_modules = sorted(config.target_modules)
    model.save_pretrained(str(folder), create_model_card=False)
    contract.save(folder)


def model_card(
    name: str, base: ModelIdentity, contract: Contract, facts: Mapping[str, object], tables: Mapping[str, str]
) -> str:
    """The README.md of a saved model: training data, metrics, usage."""
    trusting = f", trust_remote_code={contract.trust_remote_code!r}" if contract.trust_remote_code else ""
    usage = f"""from ebr_lib.model.loading import load_model, prompt_of

model = load_model("{name}"{trusting})
queries = model.encode(["{PROBES[0]}"], prompt=prompt_of(model, "query"))"""
    if contract.adapter_side == "query":
        usage += f"""

base = load_model("{name}", side="document"{trusting})  # without the adapter: documents keep the base model's vectors
documents = base.encode(["{PROBES[-2]}"], prompt=prompt_of(base, "document"))"""
    side = "queries and documents" if contract.adapter_side == "both" else "queries only; documents keep the base model"
    dims = ", ".join(map(str, contract.matryoshka_dims))
    cut = f" Trained to be cut to {dims} dimensions too." if dims else ""
    lines = "\n".join(f"- {key}: {value}" for key, value in facts.items())
    blocks = "\n\n".join(f"## {title}\n\n```\n{text}\n```" for title, text in tables.items())
    return f"""---
library_name: sentence-transformers
base_model: {base.base_model}
tags: [sentence-transformers, feature-extraction, peft, lora]
---

# {Path(name).name}

A LoRA adapter on `{base.base_model}` (weights sha256 `{base.base_sha256}`), {contract.dimension} dimensions,
{contract.pooling} pooling, texts cut at {contract.max_seq_length} tokens. Applied to {side}.{cut}

## Use

```python
{usage}
```

Prompts: query `{contract.prompts["query"]!r}`, document `{contract.prompts["document"]!r}`. Inference puts them on by
itself. `ebr_contract.json` holds probe vectors; loading checks them.

## Training

{lines}

{blocks}
"""
