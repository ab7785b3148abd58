"""The knobs of `export`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ebr_lib.knobs.checks import Config, knob
from ebr_lib.knobs.fields import BASE_PATH, HUB, REMOTE_CODE, Place, Places
from ebr_lib.names import Choice, Hub


@dataclass(frozen=True)
class ExportConfig(Config):
    """`export`: write a trained model as one folder that other engines serve, and check it."""

    model_name: Place = knob(
        "./saved_model/all-MiniLM-L6-v2-peft-lora",
        "The model: a fine-tuned folder, a local folder or a hub name.",
        "要导出的模型：微调目录、本地目录或 Hub 名称。",
    )
    output_dir: Place = knob(
        "./export/all-MiniLM-L6-v2",
        "Output folder: a sentence-transformers folder with the adapter merged, and the graphs.",
        "输出目录：已合并适配器的 sentence-transformers 目录与计算图。",
    )
    graphs: tuple[Literal["openvino", "onnx"], ...] = knob(
        [],
        "Graphs to write as well: `openvino/openvino_model.xml`, `onnx/model.onnx` (needs the extra `onnx`).",
        "另外写出的计算图：`openvino/openvino_model.xml`、`onnx/model.onnx`（需安装附加项 `onnx`）。",
    )
    side: Literal["query", "document"] = knob(
        "query",
        "Which side to export, of a model that encodes queries and documents with other weights.",
        "查询与文档使用不同权重的模型，导出哪一侧。",
    )
    trust_remote_code: Choice = knob(False, *REMOTE_CODE)
    hub: Hub = knob("auto", *HUB)
    base_model_path: Places | None = knob(None, *BASE_PATH)
