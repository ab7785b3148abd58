"""The knobs of `verify`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from ebr_lib.knobs.checks import Config, knob
from ebr_lib.knobs.fields import BASE_PATH, DEVICE, HUB, REMOTE_CODE, TOKEN_FILE, Name, Place, Places, Positive
from ebr_lib.names import Choice, Hub


@dataclass(frozen=True)
class VerifyConfig(Config):
    """`verify`: compare an endpoint's or a folder's vectors with the trained model's, and name the likely cause of a difference."""

    target: Place = knob(
        "http://127.0.0.1:8000",
        "Address of an OpenAI-compatible `/v1/embeddings` or of TEI's `/embed`, or a sentence-transformers, OpenVINO or ONNX folder.",
        "要检查的地址（兼容 OpenAI 的 `/v1/embeddings` 或 TEI 的 `/embed`），或 sentence-transformers、OpenVINO、ONNX 目录。",
    )
    model_name: Place = knob(
        "./saved_model/all-MiniLM-L6-v2-peft-lora",
        "The trained model that it should serve: a fine-tuned folder, a local folder or a hub name.",
        "应当被部署的模型：微调目录、本地目录或 Hub 名称。",
    )
    sides: tuple[Literal["query", "document"], ...] = knob(
        ["query", "document"],
        "Which texts it encodes; give one if queries and documents have endpoints of their own.",
        "它编码哪一侧的文本；查询与文档分开部署时只写一侧。",
    )
    prompts: Literal["text", "name", "server"] = knob(
        "text",
        "How the prompt reaches the model: text writes it before each text, as a client of vLLM does; name sends `prompt_name` (TEI) and `input_type`; server sends the bare text.",
        "提示词由谁加：text 由客户端写在文本前（如 vLLM）；name 发送 `prompt_name`（TEI）与 `input_type`；server 只发原文，由服务端加。",
    )
    served_name: Name | None = knob(
        None,
        "Model name in requests; null asks `/v1/models`, and otherwise uses the folder's name.",
        "请求中的模型名；null 先查 `/v1/models`，查不到则用目录名。",
    )
    request: dict[Name, Any] = knob(
        {},
        "More fields for every request, such as `{truncate_prompt_tokens: 256}` for vLLM or `{truncate: true}` for TEI.",
        "每个请求附加的字段，如 vLLM 的 `{truncate_prompt_tokens: 256}`、TEI 的 `{truncate: true}`。",
    )
    precision: Literal["float32", "half"] = knob(
        "float32",
        "Precision of the endpoint: half allows for the rounding of float16 and bfloat16.",
        "服务端的精度：half 允许 float16、bfloat16 的舍入误差。",
    )
    truncate_dim: Positive | None = knob(
        None, "Compare only the first dimensions (Matryoshka models).", "只比较前若干维（Matryoshka 模型）。"
    )
    token_file: Place | None = knob(None, *TOKEN_FILE)
    timeout: Annotated[float, Field(gt=0, le=3600)] = knob(60.0, "Seconds to wait for an answer.", "等待应答的秒数。")
    trust_remote_code: Choice = knob(False, *REMOTE_CODE)
    hub: Hub = knob("auto", *HUB)
    base_model_path: Places | None = knob(None, *BASE_PATH)
    device: str | None = knob(None, *DEVICE)

    @property
    def is_address(self) -> bool:
        """Whether the target is an endpoint; otherwise it is a folder."""
        return "://" in self.target

    def conflicts(self) -> Iterator[str]:
        if not self.sides:
            yield "sides is empty: give query, document or both"
        if self.is_address and not self.target.startswith(("http://", "https://")):
            yield f"target: {self.target!r} is not an address of http or https"
        if not self.is_address and self.prompts == "name":
            yield "prompts: name is for an endpoint; a folder takes text or server"
