"""The options that commands share. Each defaults to None, "not said"; words and defaults are the configuration's."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import typer

from gptq_cli.config.engines import TARGETS
from gptq_cli.config.schema import QuantizeConfig

ALGORITHM, SWITCHES, LAYERS, TEXT = "Algorithm", "Algorithm, on or off", "Layers", "Text"  # long names stand apart
OUTPUT, RUN, GATE = "Output", "Run", "Comparison"
DEFAULTS = QuantizeConfig(bits=4)  # with what the default preset fills in
DATASET = "wikitext2, c4, a Hub id, a file or a folder; default wikitext2"


def setting(field: str, *names: str, panel: str, metavar: str | None = None, note: str = "") -> Any:
    """The typer option for a field of the configuration."""
    info, value = QuantizeConfig.model_fields[field], getattr(DEFAULTS, field)
    default = "" if info.is_required() or not value else f"; default {_word(value)}"
    return typer.Option(
        *(names or (f"--{field.replace('_', '-')}",)),
        help=f"{info.description}{note}{default}",
        metavar=metavar or _metavar(info.annotation),
        rich_help_panel=panel,
        show_default=False,
    )


def plain(*names: str, help: str, panel: str | None = None, metavar: str | None = None, min: int | None = None) -> Any:
    """The typer option for something that is no field of the configuration."""
    return typer.Option(*names, help=help, metavar=metavar, rich_help_panel=panel, show_default=False, min=min)


def _word(default: object) -> str:
    return {True: "on", False: "off"}[default] if isinstance(default, bool) else str(default)


def _metavar(annotation: Any) -> str | None:
    """The values of a literal type, or a letter for a number."""
    members = get_args(annotation) if get_origin(annotation) is not Literal else (annotation,)
    literal = next((member for member in members if get_origin(member) is Literal), None)
    if literal is not None:
        return "|".join(map(str, get_args(literal)))
    return {int: "N", float: "X", bool: None}.get(annotation, "TEXT")


Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="model directory or Hub id", show_default=False, rich_help_panel="Input")
]
ConfigFile = Annotated[
    Path | None,
    plain(
        "--config",
        "-c",
        help="YAML or JSON file, or a recipe's name; flags and GPTQ_* variables go first",
        metavar="FILE",
    ),
]
Revision = Annotated[
    str | None, plain("--revision", help="branch, tag or commit of a Hub model", metavar="REV", panel="Input")
]

Bits = Annotated[int | None, setting("bits", "--bits", "-b", panel=ALGORITHM)]
GroupSize = Annotated[
    int | None, setting("group_size", "--group-size", "-g", panel=ALGORITHM, note=", -1 for one group a row")
]
Sym = Annotated[bool | None, setting("sym", "--sym/--asym", panel=SWITCHES)]
DescAct = Annotated[bool | None, setting("desc_act", "--desc-act/--no-desc-act", panel=SWITCHES)]
ActGroupAware = Annotated[
    bool | None, setting("act_group_aware", "--act-group-aware/--no-act-group-aware", panel=SWITCHES)
]
StaticGroups = Annotated[bool | None, setting("static_groups", "--static-groups/--no-static-groups", panel=SWITCHES)]
TrueSequential = Annotated[
    bool | None, setting("true_sequential", "--true-sequential/--no-true-sequential", panel=SWITCHES)
]
SignedScales = Annotated[bool | None, setting("signed_scales", "--signed-scales/--no-signed-scales", panel=SWITCHES)]
ScaleSearch = Annotated[str | None, setting("scale_search", panel=ALGORITHM, metavar="HOW", note=", or none")]
RefineSweeps = Annotated[int | None, setting("refine_sweeps", panel=ALGORITHM)]
AsymmetricCalibration = Annotated[float | None, setting("asymmetric_calibration", panel=ALGORITHM, metavar="0..1")]
DampMode = Annotated[str | None, setting("damp_mode", panel=ALGORITHM)]
DampPercent = Annotated[float | None, setting("damp_percent", panel=ALGORITHM)]
Preset = Annotated[str | None, setting("preset", panel=ALGORITHM, metavar="NAME")]

MoeUncovered = Annotated[str | None, setting("moe_uncovered", panel=LAYERS)]
OnNumericFault = Annotated[str | None, setting("on_numeric_fault", panel=LAYERS)]
MaxFallbacks = Annotated[int | None, setting("max_fallbacks", panel=LAYERS, metavar="N")]
LmHead = Annotated[bool | None, setting("lm_head", "--lm-head/--no-lm-head", panel=LAYERS)]
AllowRequantize = Annotated[bool | None, setting("allow_requantize", "--allow-requantize", panel=LAYERS)]
Target = Annotated[str | None, setting("target", panel=LAYERS, metavar="ENGINE", note=f": {', '.join(TARGETS)}")]
Dynamic = Annotated[
    list[str] | None,
    setting("dynamic", panel=LAYERS, metavar="RULE", note=": '-:regex' keeps, '+:regex={bits: 8}' changes; repeatable"),
]

Dataset = Annotated[
    str | None,
    plain("--dataset", help=DATASET, metavar="TEXT", panel=TEXT),
]
Datasets = Annotated[
    list[str] | None,
    plain("--dataset", help=f"{DATASET}; given twice or more: the texts themselves", metavar="TEXT", panel=TEXT),
]
DatasetConfig = Annotated[str | None, setting("dataset_config", panel=TEXT)]
DatasetSplit = Annotated[str | None, setting("dataset_split", panel=TEXT)]
TextColumn = Annotated[str | None, setting("text_column", panel=TEXT)]
NSamples = Annotated[int | None, setting("nsamples", panel=TEXT)]
SeqLen = Annotated[int | None, setting("seqlen", panel=TEXT)]
MaxWindows = Annotated[
    int | None, plain("--max-windows", help="stop after so many windows", metavar="N", panel=TEXT, min=1)
]
BatchSize = Annotated[int | None, setting("batch_size", panel=TEXT)]
Seed = Annotated[int | None, setting("seed", panel=TEXT)]

Output = Annotated[
    Path | None,
    plain("--output", "-o", help="directory to write; default NAME-GPTQ-Int4-g128 here", panel=OUTPUT, metavar="DIR"),
]
Overwrite = Annotated[
    bool, plain("--overwrite", help="replace a checkpoint at the output when the new one is complete", panel=OUTPUT)
]
Format = Annotated[str | None, setting("format", panel=OUTPUT)]
MaxShardSize = Annotated[str | None, setting("max_shard_size", panel=OUTPUT, metavar="SIZE")]

WithReport = Annotated[bool, plain("--report", help="leave a page about the run in the output", panel=OUTPUT)]
PrintConfig = Annotated[bool, plain("--print-config", help="print the resolved configuration and leave")]
DryRun = Annotated[bool, plain("--dry-run", "-n", help="show the plan and leave, as gptq plan does")]

Resume = Annotated[
    str | None,
    plain(
        "--resume", help="go on with unfinished work: if there is some, only then, not at all; default auto",
        panel=RUN, metavar="auto|require|never",
    ),
]  # fmt: skip
MaxRuntime = Annotated[
    str | None,
    plain("--max-runtime", help="stop in time with exit code 75, the work kept", panel=RUN, metavar="3h30m"),
]
AllowNetworkFs = Annotated[
    bool, plain("--allow-network-fs", help="write to a network file system, whose locks may not hold", panel=RUN)
]
Device = Annotated[str | None, setting("device", panel=RUN, metavar="auto|cpu|cuda:N")]
Devices = Annotated[
    str | None,
    plain(
        "--devices", help="devices that share the work, a process each: GPUs, or cpu:N; the result is the same",
        panel=RUN, metavar="0,1,..",
    ),
]  # fmt: skip
DType = Annotated[str | None, setting("dtype", panel=RUN)]
MaxVram = Annotated[str | None, setting("max_vram", panel=RUN, metavar="SIZE")]
MaxRam = Annotated[str | None, setting("max_ram", panel=RUN, metavar="SIZE")]
Backend = Annotated[str | None, setting("backend", panel=RUN)]
TrustRemoteCode = Annotated[bool | None, setting("trust_remote_code", "--trust-remote-code", panel=RUN)]
AsJson = Annotated[bool, plain("--json", help="the result, or what went wrong, as one JSON object on stdout")]
Quiet = Annotated[bool, plain("--quiet", "-q", help="no progress, the shortest result")]
Verbose = Annotated[bool, plain("--verbose", "-v", help="a line for each layer, the traceback of a failure")]
LogFile = Annotated[
    Path | None, plain("--log-file", help="keep what is said on stderr, and what --verbose adds, here", metavar="FILE")
]
