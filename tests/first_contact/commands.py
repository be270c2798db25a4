"""Commands as a stranger types them, with the exit code and what the program must say.

`says` holds parts of what is printed, in their order, with single blanks between words.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Contact:
    """A line that is typed, the exit code, and parts of the answer in their order."""

    line: str
    exit_code: int
    says: tuple[str, ...]


MODEL = "./Qwen3-0.6B"
CONTACTS = (
    # to look around
    Contact("gptq", 2, ("Usage: gptq COMMAND [OPTIONS]", "Plan plan", "Quantize allocate")),
    Contact("gptq --help", 0, ("Usage: gptq COMMAND [OPTIONS]", "gptq help COMMAND shows")),
    Contact("gptq help", 0, ("Usage: gptq COMMAND [OPTIONS]",)),
    Contact("gptq -V", 0, ("gptq 0.",)),
    Contact("gptq version", 0, ("gptq 0.",)),
    Contact(
        "gptq help quantize", 0, ("bits size of layers", "Example: gptq quantize", "--help-all")
    ),
    Contact("gptq plan --help", 0, ("Example: gptq plan", "--bits")),
    Contact("gptq recipes", 0, ("vllm-4bit 4 bits that every reader of GPTQ loads",)),
    Contact("gptq explain E_SHAPE", 0, ("E_SHAPE", "does not fit the group size")),
    Contact("gptq env", 0, ("gptq_cli", "torch")),
    # words that are nearly right
    Contact(
        f"gptq quantise {MODEL}",
        2,
        ("error[E_USAGE]: there is no command `quantise`", "hint: did you mean quantize?"),
    ),
    Contact("gptq help qantize", 2, ("there is no command `qantize`", "did you mean quantize?")),
    Contact("gptq frobnicate", 2, ("error[E_USAGE]: there is no command `frobnicate`",)),
    Contact("gptq --verison", 2, ("there is no option --verison", "hint: did you mean --version?")),
    Contact(
        f"gptq quantize {MODEL} --bit 4",
        2,
        ("error[E_USAGE]: there is no option --bit", "hint: did you mean --bits?"),
    ),
    Contact("gptq plan --bogus", 2, ("there is no option --bogus", "hint: see gptq plan --help")),
    Contact("gptq env --jsn", 2, ("there is no option --jsn", "hint: did you mean --json?")),
    Contact(
        f"gptq quantize {MODEL} -g auto --preset bets",
        2,
        ("error[E_CFG_RANGE]: --preset must be", 'got "bets"', "hint: did you mean best?"),
    ),
    Contact(
        f"gptq plan {MODEL} --target vlmm",
        2,
        ("error[E_CFG_RANGE]: --target must be an engine", "hint: did you mean vllm?"),
    ),
    Contact(
        f"gptq quantize {MODEL} --config vllm-4bits",
        2,
        ("there is no file and no recipe `vllm-4bits`", "did you mean the recipe vllm-4bit?"),
    ),
    Contact("gptq explain E_SHAP", 2, ("there is no code `E_SHAP`", "hint: did you mean E_SHAPE?")),
    Contact(
        f"gptq check-engine {MODEL} --engine vlm",
        2,
        ("must be vllm, llama.cpp, mlx or transformers", "hint: did you mean vllm?"),
    ),
    # words that are missing or too many
    Contact(
        "gptq quantize", 2, ("the argument MODEL is missing", "hint: see gptq quantize --help")
    ),
    Contact("gptq plan", 2, ("the argument MODEL is missing", "hint: see gptq plan --help")),
    Contact(f"gptq compare {MODEL}", 2, ("the argument B is missing", "see gptq compare --help")),
    Contact(f"gptq convert {MODEL} --to mlx", 2, ("the option --output is missing",)),
    Contact(f"gptq generate {MODEL}", 2, ("the argument PROMPT is missing",)),
    Contact(f"gptq push {MODEL}", 2, ("the argument REPO is missing", "see gptq push --help")),
    Contact(
        f"gptq quantize {MODEL} 4",
        2,
        ("takes no further argument: `4`", "hint: give the output with -o"),
    ),
    # values that do not work
    Contact(
        f"gptq quantize {MODEL}",
        2,
        (
            "error[E_SHAPE]: group_size 128 does not divide the 192 input features",
            "hint: use --group-size auto, which takes 64",
        ),
    ),
    Contact(
        f"gptq quantize {MODEL} --bits four",
        2,
        ("error[E_CFG_TYPE]: --bits must be 2, 3, 4, 5, 6, 7 or 8, or an average", 'got "four"'),
    ),
    Contact(
        f"gptq quantize {MODEL} --bits 9",
        2,
        ("error[E_CFG_RANGE]: --bits must be", "got 9", "hint: 8 bits are the most"),
    ),
    Contact(
        f"gptq quantize {MODEL} --nsamples 0",
        2,
        ("error[E_CFG_RANGE]: --nsamples must be", "got 0", "hint: the default is 128"),
    ),
    Contact(
        f"gptq quantize {MODEL} --no-sym",
        2,
        ("there is no option --no-sym", "hint: did you mean --asym?"),
    ),
    Contact(
        f"gptq quantize {MODEL} --desc-act --act-group-aware",
        2,
        (
            "--desc-act and --act-group-aware are both true and exclude each other",
            "hint: use --no-act-group-aware, or leave out --act-group-aware",
        ),
    ),
    Contact(
        f"gptq convert {MODEL} --to awq -o ./new",
        2,
        ("error[E_CFG_RANGE]: --to must be gptq", "hint: most engines load gptq"),
    ),
    Contact(
        f"gptq quantize {MODEL} --bits 5 -g 64",
        2,
        ("gptq stores 2, 3, 4 or 8 bits", "hint: use --format compressed-tensors"),
    ),
    Contact(
        f"gptq quantize {MODEL} -g auto --device gpu",
        2,
        (
            "error[E_CFG_RANGE]: --device must be auto, cpu, cuda or cuda:N",
            'got "gpu"',
            "hint: did you mean cuda?",
        ),
    ),
    Contact(
        f"gptq plan {MODEL} --bits 3 -g auto --target vllm",
        2,
        ("error[E_TARGET]: vllm does not load 3 bits", "hint: use --bits 4 or 8"),
    ),
    Contact(
        f"gptq quantize {MODEL} -g auto -o {MODEL}",
        2,
        ("error[E_OUT_IS_INPUT]: `Qwen3-0.6B` is the model's own directory", "hint: choose"),
    ),
    Contact(
        f"gptq quantize {MODEL} --config recipe.yaml",
        2,
        (
            "error[E_CFG_UNKNOWN_KEY]: groupsize is not a known key",
            "--> recipe.yaml:2:1",
            "2 | groupsize: 64",
            "| ^",
            "hint: did you mean group_size?",
        ),
    ),
    Contact(
        "gptq validate-config recipe.yaml",
        2,
        ("groupsize is not a known key", "--> recipe.yaml:2:1", "did you mean group_size?"),
    ),
    # files that are something else
    Contact(
        "gptq quantize ./Qwen3-0.6",
        3,
        ("`./Qwen3-0.6` is not a directory", "hint: did you mean Qwen3-0.6B?"),
    ),
    Contact("gptq plan ./empty", 3, ("`empty` has no config.json", "hint: point to a Hugging")),
    Contact("gptq inspect ./nothing", 3, ("`./nothing` is not a directory", "hint: give a model")),
    Contact(f"gptq quantize {MODEL} -g auto --dataset notes.pdf", 3, ("error[E_DATA", "notes.pdf")),
    Contact(
        f"gptq verify {MODEL}",
        3,
        ("error[E_CKPT_KIND]: `Qwen3-0.6B` is not quantized", "hint: name a GPTQ checkpoint"),
    ),
    Contact(
        f"gptq report {MODEL}",
        3,
        ("error[E_REPORT]: `Qwen3-0.6B` holds no gptq_report.json", "hint: gptq quantize writes"),
    ),
    Contact("gptq resume .", 3, ("there is no unfinished run", "hint: give the output of a run")),
    # and what works
    Contact(f"gptq inspect {MODEL}", 0, ("qwen3",)),
    Contact(
        f"gptq plan {MODEL} -g auto",
        0,
        ("14 layers to quantize in 2 blocks", "* 4 64", "next: add --bits 4 to see"),
    ),
    Contact(
        f"gptq plan {MODEL} -b 4 -g auto",
        0,
        ("Qwen3-0.6B -> Qwen3-0.6B-GPTQ-Int4-g64", "size", "smaller", "loads in vllm"),
    ),
)
