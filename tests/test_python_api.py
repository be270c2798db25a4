"""`from gptq_cli import ...`: the code of the command line, quick to import, with examples."""

from __future__ import annotations

import dataclasses
import doctest
import inspect
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import pytest

import gptq_cli
from gptq_cli import (
    EvalRequest,
    GenerateRequest,
    GptqError,
    QuantizeConfig,
    allocate,
    compare,
    convert,
    dequantize,
    evaluate_perplexity,
    events,
    generate,
    load_config,
    plan,
    quantize,
)
from gptq_cli.cli.app import load_command
from gptq_cli.config import settings
from gptq_cli.config.python_names import for_python
from gptq_cli.config.schema import fill
from gptq_cli.errors import ConfigError
from tests.cli.conftest import Run, gptq  # noqa: F401
from tests.runs import digest
from tests.workspace import (
    MODEL,
    QUANTIZED,
    SETTINGS,
    config,
    copy_workspace,
    make_workspace,
    stop_after_the_first_block,
    supply,
)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workspace(tmp_path_factory.mktemp("api"))


@pytest.fixture
def workspace(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(copy_workspace(files, tmp_path))
    supply(files, QUANTIZED)
    return tmp_path


def examples() -> list[doctest.DocTest]:
    finder = doctest.DocTestFinder(exclude_empty=True)
    found = []
    for name in gptq_cli.__all__:
        public = getattr(gptq_cli, name)
        if not inspect.ismodule(public):
            found += finder.find(public, name, module=inspect.getmodule(public))
    return [example for example in found if example.examples]


@pytest.mark.parametrize("example", examples(), ids=lambda example: example.name)
@pytest.mark.usefixtures("workspace")
def test_examples_of_docstrings_give_the_output_shown(example: doctest.DocTest) -> None:
    said: list[str] = []
    failed, tried = doctest.DocTestRunner(verbose=False).run(example, out=said.append)
    assert not failed, "".join(said)
    assert tried


def test_public_functions_have_examples() -> None:
    named = {example.name for example in examples()}
    functions = {name for name in gptq_cli.__all__ if inspect.isfunction(getattr(gptq_cli, name))}
    assert functions | {"QuantizeConfig", "EvalRequest", "GenerateRequest"} == named
    assert len(functions) == 12


@pytest.mark.parametrize(
    ("statement", "allowed"),
    [
        ("import gptq_cli", set()),
        ("from gptq_cli import QuantizeConfig, quantize, evaluate_perplexity", {"pydantic"}),
    ],
)
def test_import_loads_no_heavy_package(statement: str, allowed: set[str]) -> None:
    script = f"import sys, json; {statement}; print(json.dumps([*sys.modules]))"
    found = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    heavy = {"torch", "transformers", "datasets", "safetensors", "typer", "rich", "pydantic"}
    assert heavy & set(json.loads(found.stdout)) == allowed


def test_package_has_exactly_its_public_names() -> None:
    assert set(gptq_cli.__all__) <= set(dir(gptq_cli))
    assert all(getattr(gptq_cli, name) is not None for name in gptq_cli.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'quantise'"):
        gptq_cli.quantise  # noqa: B018
    assert (Path(gptq_cli.__file__).parent / "py.typed").is_file()


EVERYWHERE = {"verbose", "log_file", "color", "as_json", "quiet"}
ONLY_IN_PYTHON = {"on_event", "settings"}
ONLY_IN_A_SHELL = {"config", "devices", "help_all"} | set(QuantizeConfig.model_fields) | EVERYWHERE


def test_arguments_have_the_names_of_the_options() -> None:
    assert arguments("quantize") - {"command"} <= option_names("quantize")
    asked = {field.name for field in dataclasses.fields(EvalRequest)}
    assert asked <= option_names("eval-ppl")
    assert (
        option_names("eval-ppl") - asked
        == {"model", "max_increase", "max_kl", "min_top1", "max_ppl"} | EVERYWHERE
    )
    asked = {field.name for field in dataclasses.fields(GenerateRequest)}
    assert option_names("generate") == asked | {"model"} | EVERYWHERE


@pytest.mark.parametrize(
    "command", ["plan", "allocate", "inspect", "compare", "verify", "convert", "dequantize", "push"]
)
def test_a_function_has_the_arguments_of_its_command(command: str) -> None:
    assert arguments(command) - {"config"} >= option_names(command) - ONLY_IN_A_SHELL
    assert arguments(command) <= option_names(command)


def arguments(function: str) -> set[str]:
    return set(inspect.signature(getattr(gptq_cli, function)).parameters) - ONLY_IN_PYTHON


def option_names(command: str) -> set[str]:
    return {str(parameter.name) for parameter in load_command(command).params}


CALLS = {
    "plan": ["Qwen3-0.6B", "--bits=4", "--dataset=calibration.txt", "--seqlen=64"],
    "inspect": [QUANTIZED],
    "compare": [QUANTIZED, "Qwen3-0.6B"],
    "verify": [QUANTIZED],
}


@pytest.mark.parametrize("command", CALLS)
@pytest.mark.usefixtures("workspace")
def test_results_are_those_that_the_command_prints_as_json(
    command: str,
    gptq: Run,  # noqa: F811
) -> None:
    words = [word for word in CALLS[command] if not word.startswith("-")]
    settings = {}
    if command == "plan":
        settings = {"bits": 4, "dataset": "calibration.txt", "seqlen": 64}
    found = getattr(gptq_cli, command)(*words, **settings).to_json()
    printed = json.loads(gptq(command, *CALLS[command], "--json").stdout)
    for values in (found, printed):
        values.pop("seconds", None)
        values.pop("disk", None)
    assert {"schema": 1, "status": "ok", **found} == printed


OF_OPTIMUM = {"bits": 3, "desc_act": False, "quant_method": "gptq", "pad_token_id": 7}


@pytest.mark.usefixtures("workspace")
def test_a_dict_is_a_configuration_that_settings_change() -> None:
    seen: list[events.Event] = []
    planned = plan(MODEL, {**SETTINGS, **OF_OPTIMUM}, bits=4, group_size=32, on_event=seen.append)
    assert {(layer.config.bits, layer.config.group_size) for layer in planned.plan.quantized} == {
        (4, 32)
    }
    notes = [event.text for event in seen if isinstance(event, events.Noted)]
    assert notes[0].startswith("pad_token_id has no effect")
    of_three = plan(MODEL, {**SETTINGS, **OF_OPTIMUM})
    assert {layer.config.bits for layer in of_three.plan.quantized} == {3}


@pytest.mark.parametrize(
    ("config", "settings", "code", "message", "hint"),
    [
        (
            QuantizeConfig(bits=4),
            {"nsamples": 4},
            "E_CFG_CONFLICT",
            "config is complete, but nsamples is given beside it",
            "give all settings in one of them; a dict as config can be overridden",
        ),
        (
            "vllm-4bit",
            {},
            "E_CFG_TYPE",
            'config must be a QuantizeConfig or a dict, got "vllm-4bit"',
            "load a file or a recipe with load_config",
        ),
        (
            None,
            {"bit": 4, "bits": 4},
            "E_CFG_UNKNOWN_KEY",
            "bit is not a known key",
            "did you mean bits?",
        ),
        (
            {"checkpoint_format": "gptq_v3"},
            {"bits": 4},
            "E_CFG_RANGE",
            "checkpoint_format must be",
            None,
        ),
    ],
)
def test_a_wrong_configuration_is_refused_before_the_model_is_read(
    config: object, settings: dict[str, object], code: str, message: str, hint: str | None
) -> None:
    for call in (quantize, plan, allocate):
        with pytest.raises(GptqError) as refused:
            call("nowhere", config, **settings)  # type: ignore[operator]
        assert (refused.value.code, refused.value.exit_code) == (code, 2)
        assert message in str(refused.value)
        assert hint is None or refused.value.hint == hint


@pytest.mark.usefixtures("workspace")
def test_compare_and_formats_refuse_what_has_no_effect() -> None:
    with pytest.raises(GptqError, match=r"^seqlen needs text") as refused:
        compare(QUANTIZED, MODEL, seqlen=64)
    assert (refused.value.code, refused.value.hint) == (
        "E_CFG_CONFLICT",
        "add text, or omit seqlen",
    )
    with pytest.raises(GptqError, match=r"^to must be gptq, gptq_v2") as unknown:
        convert(QUANTIZED, "awq", "out")
    assert (unknown.value.code, unknown.value.exit_code) == ("E_CFG_RANGE", 2)
    with pytest.raises(GptqError, match=r"^dtype must be auto") as dtype:
        dequantize(QUANTIZED, "out", "int8")
    assert (dtype.value.code, dtype.value.exit_code) == ("E_CFG_RANGE", 2)


def test_python_and_the_command_line_write_the_same_bytes(
    workspace: Path,
    gptq: Run,  # noqa: F811
) -> None:
    quantize(MODEL, config(), "from-python")
    words = [f"--{key.replace('_', '-')}={value}" for key, value in SETTINGS.items()]
    done = gptq("quantize", MODEL, "--bits", "4", "-o", "from-shell", *words)
    assert done.exit_code == 0, done.stderr
    assert digest(workspace / "from-python") == digest(workspace / "from-shell")


def test_run_ended_by_its_callback_resumes_on_the_same_call(workspace: Path) -> None:
    with pytest.raises(GptqError, match="one block is enough") as stopped:
        quantize(MODEL, config(), "out", on_event=stop_after_the_first_block)
    assert stopped.value.exit_code == 75
    assert not (workspace / "out").exists()
    seen: list[events.Event] = []
    result = quantize(MODEL, config(), "out", on_event=seen.append)
    assert result.resumed_blocks == 1
    assert [event.index for event in seen if isinstance(event, events.BlockFinished)] == [1]


def test_every_run_leaves_its_data_for_a_report(workspace: Path, gptq: Run) -> None:  # noqa: F811
    quantize(MODEL, config(), "out")
    file = workspace / "out" / "gptq_report.json"
    data = json.loads(file.read_text())
    assert (data["command"], len(data["blocks"]), len(data["layers"])) == (
        "gptq_cli.quantize",
        2,
        14,
    )
    assert quantize(MODEL, config(), "out", command="again").already_done
    assert json.loads(file.read_text()) == data
    assert gptq("report", "out").exit_code == 0
    assert gptq("verify", "out", "--full").exit_code == 0


def test_report_names_the_command(workspace: Path) -> None:
    quantize(MODEL, config(), "out", report=True, command="my program")
    assert "my program" in (workspace / "out" / "gptq_report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ("use --bits 4 or 8; as it is", "use bits=4 or 8; as it is"),
        ("use --format gptq_v2", 'use format="gptq_v2"'),
        ("choose another -o, or add --overwrite", "choose another output, or add overwrite=True"),
        ("use --group-size auto, which takes 64", 'use group_size="auto", which takes 64'),
        ("10 windows (--nsamples)", "10 windows (nsamples)"),
        ("leave out --no-pack, or --asym", "leave out pack=False, or sym=False"),
        ("raise --max-ram 4.5GB", 'raise max_ram="4.5GB"'),
        ("discard it: --resume never", 'discard it: resume="never"'),
        ("see: gptq verify out --full; or --bits 3", "see: gptq verify out --full; or bits=3"),
        ("look at `pip --format x`, --other", "look at `pip --format x`, --other"),
    ],
)
def test_errors_name_settings_as_python_does(said: str, meant: str) -> None:
    def refuse() -> None:
        raise ConfigError("E_CFG_RANGE", said, hint=said)

    with pytest.raises(GptqError) as refused:
        for_python(refuse, QuantizeConfig.model_fields)()
    assert (str(refused.value), refused.value.hint) == (meant, meant)
    assert refused.value.problems[0].code == "E_CFG_RANGE"


def test_public_functions_and_types_name_no_flag() -> None:
    with pytest.raises(GptqError) as refused:
        plan("nowhere", bits=5)
    assert refused.value.hint == 'use format="compressed-tensors", "mlx" or "auto-round"'
    with pytest.raises(GptqError) as built:
        QuantizeConfig(bits=5)
    assert built.value.hint == refused.value.hint


def plain(kind: Any) -> Any:
    """Return a type without the checks of its values; the order in a union does not count."""
    if get_origin(kind) is Annotated:
        return plain(get_args(kind)[0])
    if get_origin(kind) in (Union, UnionType):
        members: set[Any] = set()
        for member in map(plain, get_args(kind)):
            members |= member if isinstance(member, frozenset) else {member}
        return frozenset(members)
    if get_origin(kind) in (list, dict):
        return (get_origin(kind), *map(plain, get_args(kind)))
    return kind


def test_types_of_settings_are_those_of_the_schema() -> None:
    expected = get_type_hints(QuantizeConfig, include_extras=True)
    fields = {name: plain(expected[name]) for name in QuantizeConfig.model_fields}
    hints = get_type_hints(settings.Settings)
    assert {name: plain(kind) for name, kind in hints.items()} == fields


@pytest.mark.parametrize(
    ("request_type", "typed", "others"),
    [
        (EvalRequest, settings.EvalSettings, set()),
        (EvalRequest, settings.CompareSettings, {"dataset", "max_windows", "baseline"}),
        (GenerateRequest, settings.GenerateSettings, set()),
    ],
)
def test_types_of_fields_are_those_of_the_request(
    request_type: type, typed: type, others: set[str]
) -> None:
    expected = get_type_hints(request_type)
    assert get_type_hints(typed) == {name: expected[name] for name in expected.keys() - others}


@pytest.mark.parametrize(
    ("function", "kind"),
    [
        (quantize, "Settings"),
        (plan, "Settings"),
        (allocate, "Settings"),
        (compare, "CompareSettings"),
        (evaluate_perplexity, "EvalSettings"),
        (generate, "GenerateSettings"),
    ],
)
def test_settings_of_functions_are_typed(function: Callable[..., object], kind: str) -> None:
    *_, last = inspect.signature(function).parameters.values()
    assert (last.kind, last.annotation) == (last.VAR_KEYWORD, f"Unpack[{kind}]")


def test_one_error_lists_all_problems_of_a_configuration() -> None:
    with pytest.raises(GptqError) as refused:
        QuantizeConfig(bits=9, group_sise=64, dynamic={"+:x": {"bits": 1}})
    said = [(problem.code, problem.message, problem.hint) for problem in refused.value.problems]
    assert said == [
        (
            "E_CFG_RANGE",
            "bits must be 2, 3, 4, 5, 6, 7 or 8, or an average such as 3.5, got 9",
            "8 bits are the most; a rule `-:NAME` of dynamic keeps a layer as it is",
        ),
        (
            "E_CFG_RANGE",
            "dynamic['+:x'].bits must be 2, 3, 4, 5, 6, 7 or 8, got 1",
            "2 bits are the fewest",
        ),
        ("E_CFG_UNKNOWN_KEY", "group_sise is not a known key", "did you mean group_size?"),
    ]
    with pytest.raises(GptqError, match="signed_scales and sym conflict") as refused:
        QuantizeConfig(bits=4, signed_scales=True, sym=False)
    assert (
        refused.value.hint
        == "set signed_scales to false, or remove it: an asymmetric grid has no larger end"
    )
    assert refused.value.exit_code == 2


def test_copied_configuration_keeps_its_derived_values() -> None:
    whole = QuantizeConfig(bits=3, desc_act=True)
    assert QuantizeConfig.model_validate(whole) is whole
    assert QuantizeConfig(**whole.model_dump()) == whole
    assert whole.act_group_aware is False
    assert fill({"bits": 3, "desc_act": True})[0]["act_group_aware"] is False


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ({"model": "./none"}, "E_MODEL_NOT_FOUND", "`./none` is not a directory"),
        (
            {"resume": "always"},
            "E_CFG_RANGE",
            "resume must be auto, require or never, got 'always'",
        ),
        ({"max_runtime": "soon"}, "E_CFG_RANGE", "max_runtime must be a time such as 3h30m"),
        ({"output": MODEL}, "E_OUT_IS_INPUT", "is the model's own directory"),
    ],
)
@pytest.mark.usefixtures("workspace")
def test_wrong_arguments_are_refused(arguments: dict[str, str], code: str, message: str) -> None:
    usual = {"model": MODEL, "config": config(), "output": "out"}
    with pytest.raises(GptqError) as refused:
        quantize(**(usual | arguments))
    assert (refused.value.code, message in str(refused.value)) == (code, True)


@pytest.mark.usefixtures("workspace")
def test_file_system_error_becomes_a_gptq_error() -> None:
    Path("loop").symlink_to("loop")
    for call in (
        lambda: quantize("loop", config(), "out"),
        lambda: evaluate_perplexity(MODEL, EvalRequest(dataset="./loop", seqlen=32, device="cpu")),
        lambda: evaluate_perplexity("loop"),
        lambda: generate("loop", "the quick"),
    ):
        with pytest.raises(
            GptqError, match=r"cannot read `.*loop`: Too many levels of symbolic links"
        ) as refused:
            call()
        assert (refused.value.code, refused.value.exit_code) == ("E_FILE", 3)
    with pytest.raises(GptqError, match="cannot read the configuration loop") as wrong:
        load_config("loop")
    assert wrong.value.code == "E_CFG_FILE"
    with pytest.raises(GptqError, match="cannot write `loop`") as output:
        quantize(MODEL, config(), "loop")
    assert (output.value.code, output.value.exit_code) == ("E_DISK", 5)


@pytest.mark.usefixtures("workspace")
@pytest.mark.parametrize("when", ["block", "copy", "verify"])
def test_removed_work_directory_ends_the_call(when: str) -> None:
    def remove(event: object) -> None:
        block = isinstance(event, events.BlockFinished) and when == "block"
        if block or (isinstance(event, events.PhaseStarted) and event.name == when):
            shutil.rmtree(".out.gptq-work", ignore_errors=True)

    with pytest.raises(GptqError, match="was removed while this run was working in it") as refused:
        quantize(MODEL, config(), "out", on_event=remove)
    assert (refused.value.code, refused.value.exit_code) == ("E_WORK_GONE", 5)
    assert not Path("out").exists()


@pytest.mark.parametrize(
    "said", [{"max_windows": 0}, {"seqlen": "64"}, {"device": "gpu"}, {"backend": "marlin"}]
)
def test_wrong_eval_request_is_refused(said: dict[str, object]) -> None:
    with pytest.raises(GptqError, match=f"{next(iter(said))} must be") as refused:
        EvalRequest(**said)  # type: ignore[arg-type]
    assert refused.value.exit_code == 2


@pytest.mark.parametrize(
    ("call", "code", "message"),
    [
        (lambda: plan(MODEL, devices=0), "E_CFG_RANGE", "devices must be a whole number of 1 or"),
        (lambda: plan(MODEL, devices=1.5), "E_CFG_TYPE", "devices must be a whole number, got 1.5"),
        (lambda: plan(MODEL, devices=True), "E_CFG_TYPE", "devices must be a whole number, got"),
        (lambda: plan(MODEL, time="no"), "E_CFG_TYPE", 'time must be true or false, got "no"'),
        (lambda: plan(None), "E_CFG_TYPE", "model must be a directory or a Hub id, got null"),
        (lambda: plan(""), "E_CFG_TYPE", 'model must be a directory or a Hub id, got ""'),
        (lambda: quantize(MODEL, overwrite="no"), "E_CFG_TYPE", "overwrite must be true or false"),
        (lambda: quantize(MODEL, max_runtime=30), "E_CFG_TYPE", "max_runtime must be a time such"),
        (lambda: allocate(MODEL, output=3), "E_CFG_TYPE", "output must be a path, got 3"),
        (lambda: gptq_cli.inspect(MODEL, layer=3), "E_CFG_TYPE", "layer must be a text, got 3"),
        (lambda: gptq_cli.verify(None), "E_CFG_TYPE", "directory must be a path, got null"),
        (lambda: load_config(None), "E_CFG_TYPE", "file must be a path, got null"),
        (lambda: compare(MODEL, MODEL, foo=1), "E_CFG_UNKNOWN_KEY", "foo is not a known key"),
        (
            lambda: compare(MODEL, MODEL, "heldout.txt", dataset="heldout.txt"),
            "E_CFG_UNKNOWN_KEY",
            "dataset is not a known key",
        ),
        (
            lambda: compare(MODEL, MODEL, "heldout.txt", max_windows="2"),
            "E_CFG_TYPE",
            'max_windows must be a whole number, got "2"',
        ),
        (lambda: evaluate_perplexity(MODEL, foo=1), "E_CFG_UNKNOWN_KEY", "foo is not a known key"),
        (
            lambda: evaluate_perplexity(MODEL, {"seqlen": 64}),
            "E_CFG_TYPE",
            "request must be of type EvalRequest, got",
        ),
        (lambda: EvalRequest(max_windows="2"), "E_CFG_TYPE", "max_windows must be a whole number"),
        (
            lambda: generate(MODEL, 3),
            "E_CFG_TYPE",
            "request must be of type GenerateRequest, got 3",
        ),
        (
            lambda: generate(MODEL, "x", max_new_tokens=1.5),
            "E_CFG_TYPE",
            "max_new_tokens must be a whole number, got 1.5",
        ),
        (
            lambda: GenerateRequest("x", temperature="hot"),
            "E_CFG_TYPE",
            "temperature must be a num",
        ),
        (lambda: GenerateRequest(None), "E_CFG_TYPE", "prompt must be a text, got null"),
    ],
)
@pytest.mark.usefixtures("workspace")
def test_arguments_of_a_wrong_type_are_refused(
    call: Callable[[], object], code: str, message: str
) -> None:
    with pytest.raises(GptqError) as refused:
        call()
    assert (refused.value.code, refused.value.exit_code) == (code, 2)
    assert message in str(refused.value)


@pytest.mark.usefixtures("workspace")
def test_a_text_to_compare_on_may_be_a_path() -> None:
    found = compare(QUANTIZED, MODEL, Path("heldout.txt"), seqlen=64, max_windows=1)
    assert found.predictions is not None
