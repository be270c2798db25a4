#!/usr/bin/env python3
"""Train the demo model, a Llama of 2.9 M parameters, on a synthetic language of known entropy.

    .venv/bin/python scripts/make_demo_model.py --out scripts/demo

Takes about 7 minutes (estimated) on two cores that multiply in bfloat16. Writes the model and its
texts (demo_language.py); prints the loss and, for the held-out text, the perplexity of the model
beside that of the language. Texts depend on the seeds only; weights also depend on the arithmetic
of the machine, so another machine gives a model that is as good but has other bits.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from pathlib import Path

import torch
from common import DEMO, argument_parser
from demo_language import Text, write_text
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

VOCAB_SIZE, SEQLEN, BATCH = 1024, 512, 16
BOS, EOS = "<s>", "</s>"
CHARACTERS = {"calibration": 180_000, "heldout": 180_000}


def train_tokenizer(text: str) -> Tokenizer:
    """Train a byte-level BPE tokenizer that puts one `<s>` before a text, as Llama's does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, 0)]
    )
    return tokenizer


def model_config() -> LlamaConfig:
    """Return the shape; every linear reads 256 or 512 columns: two or four groups of 128."""
    return LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=SEQLEN,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
        dtype="bfloat16",
    )


def training_batches(tokenizer: Tokenizer, steps: int) -> Tensor:
    """Return fresh text for every step, as ids [steps, BATCH, SEQLEN].

    Half of the rows begin with `<s>`, as samples do.
    """
    rows = steps * BATCH
    ids: list[int] = []
    part = 0
    while len(ids) < rows * SEQLEN:
        text = write_text(f"training {part}", 1_000_000).text
        ids += tokenizer.encode(text, add_special_tokens=False).ids
        part += 1
    batches = torch.tensor(ids[: rows * SEQLEN]).view(steps, BATCH, SEQLEN)
    batches[:, ::2, 0] = 0
    return batches


def make_optimizers(model: LlamaForCausalLM, peak_lr: float) -> tuple[torch.optim.Optimizer, ...]:
    """Return Muon for the matrices of the blocks and AdamW for the rest.

    With AdamW alone the perplexity ends at 5.83 instead of 5.66.
    """
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        if name.startswith("model.layers.") and parameter.dim() == 2:
            matrices.append(parameter)
        else:
            others.append(parameter)
    return (
        torch.optim.Muon([{"params": matrices, "peak": peak_lr}], lr=peak_lr, weight_decay=0.1),
        torch.optim.AdamW([{"params": others, "peak": 3e-3}], betas=(0.9, 0.98), weight_decay=0.0),
    )


def train(tokenizer: Tokenizer, steps: int, peak_lr: float) -> LlamaForCausalLM:
    """Train a model in float32."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(model_config()).float()
    optimizers = make_optimizers(model, peak_lr)
    started = time.monotonic()
    for step, batch in enumerate(training_batches(tokenizer, steps)):
        warmup, decay = min(1.0, (step + 1) / 50), 0.5 * (1 + math.cos(math.pi * step / steps))
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * warmup * max(decay, 0.02)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(batch).logits
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].float().flatten(0, 1), batch[:, 1:].flatten()
        )
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if step % 25 == 0 or step == steps - 1:
            seconds = time.monotonic() - started
            print(f"step {step:4} of {steps}  loss {loss.item():.4f}  {seconds:4.0f} s", flush=True)
    return model.eval()


@torch.no_grad()
def mean_loss(model: LlamaForCausalLM, ids: list[int]) -> float:
    """Return nats per token over full windows of SEQLEN without the tail, as `gptq eval-ppl`."""
    windows = torch.tensor(ids[: len(ids) // SEQLEN * SEQLEN]).view(-1, SEQLEN)
    losses = []
    for window in windows:
        logits = model(window[None, :]).logits[0, :-1].float()
        losses.append(torch.nn.functional.cross_entropy(logits, window[1:]))
    return torch.stack(losses).mean().item()


def report(model: LlamaForCausalLM, tokenizer: Tokenizer, heldout: Text) -> None:
    """Print the entropy of the held-out text beside the loss reached on it."""
    ids = tokenizer.encode(heldout.text).ids
    floor, loss = heldout.surprisal / len(ids), mean_loss(model, ids)
    words, size = len(heldout.text.split()), len(heldout.text.encode())
    print(f"held-out: {size} bytes, {words} words, {len(ids)} tokens")
    print(
        f"entropy: {floor:.4f} nats per token, {heldout.surprisal / words:.4f} per word, "
        f"{heldout.surprisal / size / math.log(2):.4f} bits per byte"
    )
    perplexities = f"language {math.exp(floor):.4f}, model in bfloat16 {math.exp(loss):.4f}"
    print(f"perplexity per token: {perplexities}")


def save(model: LlamaForCausalLM, tokenizer: Tokenizer, folder: Path) -> None:
    """Write the model as a Hub repository holds it."""
    shutil.rmtree(folder, ignore_errors=True)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "model_max_length": SEQLEN,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    for file in folder.iterdir():
        file.chmod(0o644)


def main() -> None:
    """Train the model, write it with its texts, and measure it."""
    parser = argument_parser(__doc__)
    parser.add_argument("--out", type=Path, default=DEMO, help="folder to write into")
    parser.add_argument("--steps", type=int, default=400, help=f"steps of {BATCH * SEQLEN} tokens")
    parser.add_argument("--threads", type=int, default=2, help="threads of the CPU")
    parser.add_argument("--lr", type=float, default=0.02, help="peak learning rate of Muon")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.out.mkdir(parents=True, exist_ok=True)
    texts = {}
    for name, characters in CHARACTERS.items():
        texts[name] = write_text(name, characters)
        (arguments.out / f"{name}.txt").write_text(texts[name].text)
    tokenizer = train_tokenizer(write_text("tokenizer", 1_000_000).text)
    model = train(tokenizer, arguments.steps, arguments.lr)
    save(model, tokenizer, arguments.out / "model")
    report(model, tokenizer, texts["heldout"])


if __name__ == "__main__":
    main()
