"""The documents say what the program does: tables, commands, links, presets and examples are held to the code."""

import ast
import re
import shlex
from pathlib import Path

import nbformat
import pytest

import ebr_lib
from ebr_lib import cli
from ebr_lib.data.pairs import read_pairs
from ebr_lib.evaluate.config import EvalConfig
from ebr_lib.finetune.config import FinetuneConfig
from ebr_lib.index.config import IndexConfig
from ebr_lib.inference.config import InferenceConfig
from ebr_lib.knobs.flags import from_flags
from ebr_lib.knobs.tables import with_tables
from ebr_lib.notebook import inject, parse_parameters
from ebr_lib.pairs.config import PairsConfig
from ebr_lib.visualize.config import VisConfig
from tests.visualize.test_points import ATLAS_COLUMNS

ROOT = Path(__file__).parent.parent
PAGES = sorted(path.name for path in (ROOT / "docs/en").glob("*.md"))
CHINESE = {"README.md": "README.zh-CN.md"} | {f"docs/en/{page}": f"docs/zh/{page}" for page in PAGES}
GUIDES = [*CHINESE, *CHINESE.values()]
DOCUMENTS = [*GUIDES, "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/RESULTS.md"]
STAGE_CONFIGS = {name: stage.config for name, stage in cli.STAGES.items()}
STAGE_OF_FOLDER = {name: name for name in STAGE_CONFIGS} | {"inference": "infer"}
TYPO = "noise_porb"  # a page shows the error message
NOTEBOOK_CONFIGS = {
    "PAIRS_CONFIG": PairsConfig,
    "FINETUNE_CONFIG": FinetuneConfig,
    "INFERENCE_CONFIG": InferenceConfig,
    "VIS_CONFIG": VisConfig,
    "EVAL_CONFIG": EvalConfig,
    "INDEX_CONFIG": IndexConfig,
}
SOURCES = "\n".join(
    path.read_text(encoding="utf-8")
    for path in [*sorted((ROOT / "ebr_lib").rglob("*.py")), ROOT / "EBR_workflow.ipynb"]
)
FILES = " ".join(
    p.name for place in (".", ".ci", "tests", "tests/*", "configs", "configs/*") for p in ROOT.glob(f"{place}/*")
)
PRESETS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "configs").rglob("*.yaml"))


@pytest.fixture(autouse=True)
def _at_root(monkeypatch):
    monkeypatch.chdir(ROOT)  # commands and presets name paths as seen from there


def text_of(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


def blocks(document: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text_of(document), re.DOTALL | re.MULTILINE)


def prose(document: str) -> str:
    """A document without its fenced blocks and generated tables."""
    without_tables = re.sub(r"<!-- knobs:.*?<!-- /knobs -->", "", text_of(document), flags=re.DOTALL)
    return re.sub(r"^```.*?^```$", "", without_tables, flags=re.DOTALL | re.MULTILINE)


def commands(document: str) -> list[str]:
    """Commands of a document, without comments."""
    lines = "\n".join(blocks(document, "bash")).splitlines()
    return [command for line in lines if (command := shlex.join(shlex.split(line, comments=True)))]


# --- two languages ------------------------------------------------------------------------------------------------


def test_there_are_the_same_pages_in_both_languages():
    assert sorted(path.name for path in (ROOT / "docs/zh").iterdir()) == PAGES


@pytest.mark.parametrize("english", CHINESE)
def test_both_languages_have_the_same_sections_commands_examples_and_numbers(english):
    for found in (levels, commands, examples, decimals):
        assert found(english) == found(CHINESE[english]), found.__name__


def levels(document: str) -> list[str]:
    return re.findall(r"^#+", prose(document), re.MULTILINE)


def examples(document: str) -> list[str]:
    return [ast.dump(ast.parse(code)) for code in blocks(document, "python")]


def decimals(document: str) -> set[str]:
    """Numbers with a point: a hundred thousand is written in another way in Chinese."""
    return set(re.findall(r"\d+\.\d+", prose(document)))


# --- commands -----------------------------------------------------------------------------------------------------


def check_command(words: list[str]) -> None:
    """Fail unless a command line would start: its program, flags, values, presets and files exist."""
    if "ebr_finetune.py" in words:
        return check_stage(["finetune", *words[words.index("ebr_finetune.py") + 1 :]])
    if words[:3] == ["python", "-m", "ebr_lib"]:
        return check_stage(words[3:])
    if words[0] == "make":
        makefile = text_of("Makefile")
        assert len(words) == 2 and re.search(rf"^{words[1]}:", makefile, re.MULTILINE)
    elif words[0] == "embedding-atlas":
        assert words[1:] == ["embedding_scatter.parquet", *ATLAS_COLUMNS]
    elif words[:2] == ["pip", "install"]:
        assert words[2] in text_of("requirements.txt").split() or (ROOT / words[-1]).is_file()
    elif words[:3] == ["python", "-m", "pytest"] or words[:2] == ["jupyter", "notebook"]:
        assert (ROOT / words[-1]).is_file()
    else:
        assert words in (
            [".venv/bin/pre-commit", "install"],
            ["python3.11", "-m", "venv", ".venv"],
            ["source", ".venv/bin/activate"],
        )
    return None


def check_stage(words: list[str]) -> None:
    arguments, unknown = cli._parser(words).parse_known_args(words)
    assert not unknown
    if words[0] == "notebook":
        check_parameters(arguments.notebook, arguments.set)
    elif words[0] == "knobs":
        assert all((ROOT / name).is_file() for name in arguments.write)
    else:
        from_flags(arguments.stage_config, vars(arguments))


def check_parameters(notebook: str, settings: list[str]) -> None:
    parameters = parse_parameters(settings)
    inject(nbformat.read(notebook, as_version=4), parameters)
    for name in parameters.keys() & NOTEBOOK_CONFIGS:
        NOTEBOOK_CONFIGS[name].resolve(parameters[name])


@pytest.mark.parametrize("command", sorted({command for document in DOCUMENTS for command in commands(document)}))
def test_every_command_parses(command):
    check_command(shlex.split(command))


@pytest.mark.parametrize(
    "command",
    [
        "python ebr_finetune.py --noise_porb 0.1",
        "python -m ebr_lib notebook --set RUN_FINETUNING=false",
        "python -m ebr_lib knobs --write NONE.md",
        "make tea",
        "rm -rf saved_model",
    ],
)
def test_a_wrong_command_would_be_noticed(command):
    with pytest.raises((AssertionError, ValueError)):
        check_command(shlex.split(command))


def test_the_commands_of_the_users_guide_are_there():
    found = {
        command for page in CHINESE for command in commands(page) if command.startswith("python ebr_finetune.py --")
    }
    for flag in ("--noise_type random_delete", "--train_batch_size 2 --eval_batch_size 1", "--fp16",
                 "--l1_regularization 1e-4", "--eval_steps 100", "--lr_scheduler_type cosine --num_epochs 3",
                 "--l1_regularization 5e-5"):  # fmt: skip
        assert any(flag in command for command in found), flag


# --- tables, links, names -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("language", ["en", "zh"])
def test_knob_tables_are_what_the_code_generates(language):
    text = text_of(f"docs/{language}/knobs.md")
    assert text == with_tables(text, STAGE_CONFIGS), "stale: run `make docs`"
    marked = re.findall(r"<!-- knobs:(\w+)(:zh)? -->", text)
    assert marked == [(name, ":zh" if language == "zh" else "") for name in STAGE_CONFIGS]


def anchors(document: str) -> set[str]:
    """The anchors that GitHub gives a document's headings."""
    headings = re.findall(r"^#+ (.+)$", prose(document), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_and_pictures_are_there(document):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(document)):
        if target.startswith(("http://", "https://")):
            continue
        place, _, anchor = target.partition("#")
        linked = (ROOT / document).parent / place if place else ROOT / document
        assert linked.exists(), target
        assert not anchor or anchor in anchors(str(linked)), target


@pytest.mark.parametrize("document", DOCUMENTS)
def test_names_in_prose_are_in_the_code(document):
    spans = re.findall(r"`([^`\n]+)`", prose(document))
    names = {name for span in spans for name in re.findall(r"\b[a-z]+(?:_[a-z0-9]+)+\b", span)}
    assert [name for name in sorted(names - {TYPO}) if name not in SOURCES and name not in FILES] == []
    for preset in re.findall(r"configs/[\w/]+\.yaml", text_of(document)):
        assert (ROOT / preset).is_file(), preset


@pytest.mark.parametrize("language", ["en", "zh"])
def test_every_preset_of_fine_tuning_is_listed(language):
    listed = re.findall(r"^\| `(\w+\.yaml)` \|", text_of(f"docs/{language}/fine-tune.md"), re.MULTILINE)
    assert sorted(listed) == sorted(path.name for path in (ROOT / "configs/finetune").glob("*.yaml"))


def test_measured_numbers_are_in_the_results():
    measured = decimals("benchmarks/RESULTS.md")
    for number in re.findall(r"\d+\.\d+", text_of("README.md").split("\n## Measured\n")[1].split("\n## ")[0]):
        places = len(number.partition(".")[2])
        assert number in {f"{float(found):.{places}f}" for found in measured}


@pytest.mark.parametrize("language", ["en", "zh"])
def test_log_lines_of_the_guide_are_in_the_code(language):
    lines = re.findall(r"^\| `([^`]*[一-龥][^`]*)`", text_of(f"docs/{language}/fine-tune.md"), re.MULTILINE)
    assert len(lines) >= 8
    assert [line for line in lines if re.split(r"[:…]", line)[0] not in SOURCES] == []


# --- examples and presets -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("document", CHINESE)
def test_python_examples_hold(document):
    for code in blocks(document, "python"):
        for statement in ast.parse(code).body:
            if isinstance(statement, ast.ImportFrom) and statement.module == "ebr_lib":
                assert {alias.name for alias in statement.names} <= set(ebr_lib.__all__)
            if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Dict):
                NOTEBOOK_CONFIGS[ast.unparse(statement.targets[0])].resolve(ast.literal_eval(statement.value))


@pytest.mark.parametrize("document", GUIDES)
def test_json_examples_are_read(document, tmp_path):
    for i, rows in enumerate(blocks(document, "json")):
        (tmp_path / f"{i}.jsonl").write_text(rows, encoding="utf-8")
        assert len(read_pairs(tmp_path / f"{i}.jsonl")) == len(rows.splitlines())


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_resolves_and_opens_with_its_command(preset):
    kind = STAGE_CONFIGS[STAGE_OF_FOLDER[Path(preset).parent.name]]
    kind.resolve(None, [preset])
    comments = []
    for line in text_of(preset).splitlines():
        if not line.startswith("#"):
            break
        comments.append(line.removeprefix("#").strip())
    found = [line for line in comments if line.startswith("python ")]
    assert found and any(preset in command for command in found)
    for command in found:
        check_command(shlex.split(command, comments=True))


ODD = ['"open quote', "NA", None, "", "two\rparts", " x ", "001", "a\x85b\u2028c", '"q"', "\x0b", "#c", "null", "苹果"]


def test_the_lines_that_read_an_output_read_every_value(tmp_path, monkeypatch):
    import numpy
    import pandas
    import polars

    from ebr_lib.data.embeddings.base import ids_path
    from ebr_lib.data.embeddings.files import write_embeddings

    (code,) = [code for code in blocks("docs/en/encode.md", "python") if "read_csv" in code]
    vectors = numpy.random.default_rng(0).normal(size=(len(ODD), 3)).astype(numpy.float32)
    columns = {"id": [str(i) for i in range(len(ODD))], "odd": ODD}
    for ending in (".txt", ".parquet", ".npy"):
        write_embeddings(tmp_path / "faiss" / f"embeds_2{ending}", columns, vectors)
    monkeypatch.chdir(tmp_path)
    names = {"numpy": numpy, "pandas": pandas, "polars": polars}
    tables = [eval(ast.unparse(statement), names) for statement in ast.parse(code).body]
    assert len(tables) == 5
    assert (tables.pop() == vectors).all()
    for table in tables:
        odd = table["odd"].to_list()
        assert [None if isinstance(value, float) else value for value in odd] == ODD
        read = [numpy.array(v.split(), numpy.float32) if isinstance(v, str) else v for v in table["vector"]]
        assert (numpy.stack(read) == vectors).all()
    ids = ast.unparse(ast.parse(code).body[0]).replace("embeds_2.txt", ids_path("embeds_2.npy").name)
    assert len(eval(ids, names)) == len(ODD)
