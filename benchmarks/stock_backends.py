"""OpenVINO and ONNX backends of sentence-transformers, in an environment of their own; inference.py starts it.

    python stock_backends.py MODEL BACKEND TEXTS.json VECTORS.npy

They need optimum, which requires an older transformers than ours, so the interpreter must have sentence-transformers 5,
`optimum-intel` and `optimum-onnx[onnxruntime]`. BACKEND is openvino, onnx or onnx-int8 (8-bit weights and activations,
by the library's own settings for this processor). Each line on stdin encodes the texts once and prints the seconds; the
vectors of the first turn are saved.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path

sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]


def load(model: str, backend: str):  # noqa: ANN201
    from sentence_transformers import SentenceTransformer

    if backend != "onnx-int8":
        return SentenceTransformer(model, backend=backend, device="cpu")
    from sentence_transformers import export_dynamic_quantized_onnx_model

    folder = tempfile.mkdtemp()
    full = SentenceTransformer(model, backend="onnx", device="cpu")
    full.save_pretrained(folder)
    export_dynamic_quantized_onnx_model(full, "avx512_vnni", folder)
    name = next(Path(folder).rglob("*qint8*.onnx")).relative_to(folder).as_posix()
    return SentenceTransformer(folder, backend="onnx", device="cpu", model_kwargs={"file_name": name})


def main(model: str, backend: str, texts_path: str, vectors_path: str) -> None:
    import numpy as np

    texts = json.loads(Path(texts_path).read_text(encoding="utf-8"))
    encoder = load(model, backend)
    print("ready", flush=True)
    for turn, _ in enumerate(sys.stdin):
        start = time.perf_counter()
        vectors = encoder.encode(texts, batch_size=32, normalize_embeddings=True, show_progress_bar=False)
        seconds = time.perf_counter() - start
        if turn == 0:
            np.save(vectors_path, vectors[:4096])
        print(seconds, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
