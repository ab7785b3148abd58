"""Extension stage: compare what is served with what was trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ebr_lib.errors import MissingError, ModelError
from ebr_lib.files import read_token
from ebr_lib.logs import RESULT, logger
from ebr_lib.model.bases import look_for_models
from ebr_lib.model.packaged import find_model, local_folder, model_label
from ebr_lib.model.parity import Gap, Served, Trained, compare
from ebr_lib.model.served import served_folder, trained_sides, with_prompts
from ebr_lib.model.spec import EncoderSpec
from ebr_lib.tables import TableRepr, make_table
from ebr_lib.verify.config import VerifyConfig
from ebr_lib.verify.endpoint import Endpoint, served_name

if TYPE_CHECKING:
    from pandas import DataFrame


@dataclass(frozen=True, repr=False)
class VerifyResult(TableRepr):
    """How far the served vectors are from the trained model's, and the likely causes; none if they are the same."""

    target: str
    model_name: str
    gaps: tuple[Gap, ...]
    causes: tuple[str, ...]
    tables: dict[str, DataFrame] = field(compare=False)

    @property
    def is_same(self) -> bool:
        """Whether the vectors are the trained model's, up to rounding."""
        return not self.causes


def verify_endpoint(config: VerifyConfig | Mapping[str, Any] | None = None) -> VerifyResult:
    """Compare an endpoint's or a folder's vectors with the trained model's: both sides, short and long texts, English
    and Chinese.

    :param config: a VerifyConfig, a dict of its knobs, or None for the defaults.
    :raises ConfigError: a knob is unknown or out of range (all are listed).
    :raises ModelError: there are no vectors to compare: the endpoint cannot be reached, answers with something else, or
        gives vectors of another dimension; or the trained model does not load.
    :raises MissingError: a folder is not there.
    """
    config = VerifyConfig.resolve(config)
    look_for_models(config.base_model_path, config.hub)
    find_model(config.model_name)
    endpoint = _endpoint(config) if config.is_address else None
    spec = EncoderSpec(
        model_name=config.model_name,
        normalize=False,
        precision="float32",
        backend="torch",
        device=config.device,
        trust_remote_code=config.trust_remote_code,
    )
    sides = trained_sides(spec, config.sides)
    parity = compare(sides, _served(config, endpoint, sides), half=config.precision == "half", dims=config.truncate_dim)
    verdict = "不同 other vectors than" if parity.causes else "一致 the vectors of"
    title = f"{config.target}: {verdict} {config.model_name}"
    columns = ("side", "texts", "largest distance")
    rows = [(gap.side, gap.kind, f"{gap.distance:.1e}") for gap in parity.gaps]
    tables = {"distances": make_table(title, columns, rows)}
    return VerifyResult(config.target, config.model_name, parity.gaps, parity.causes, tables)


def run_verify(config: VerifyConfig | Mapping[str, Any] | None = None) -> VerifyResult:
    """The command `python -m ebr_lib verify URL|FOLDER`: show the distances, and fail if the vectors differ.

    :raises ModelError: they differ; names the likely causes.
    """
    result = verify_endpoint(config)
    logger.info("%s", result, extra=RESULT)
    if not result.is_same:
        causes = "; ".join(result.causes)
        raise ModelError(f"{result.target} does not give the vectors of {result.model_name}; likely cause: {causes}")
    logger.info("向量一致 the endpoint gives the trained model's vectors: %s", result.target)
    return result


def _endpoint(config: VerifyConfig) -> Endpoint:
    token = read_token(config.token_file)
    label = model_label(config.model_name)
    name = config.served_name or served_name(config.target, token, config.timeout, label)
    return Endpoint(
        config.target,
        name or label,
        token,
        config.timeout,
        config.request,
        named=config.prompts == "name",
    )


def _served(config: VerifyConfig, endpoint: Endpoint | None, sides: list[Trained]) -> Served:
    if endpoint is None:
        folder = local_folder(config.target)
        if folder is None:
            raise MissingError(f"target {config.target}: no such folder; give a folder or an address with http://")
        encode = served_folder(folder)
        return with_prompts(encode, sides) if config.prompts == "text" else lambda _, texts: encode(texts)
    if config.prompts != "text":
        return endpoint
    prompts = {trained.side: trained.encoder.prompt for trained in sides}
    return lambda side, texts: endpoint(side, [prompts[side] + text for text in texts])
