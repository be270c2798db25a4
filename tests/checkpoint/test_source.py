"""Faulty checkpoints are refused, each with its code; odd but usable ones give remarks."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gptq_cli.checkpoint.headers import read_header
from gptq_cli.checkpoint.model_files import is_safe_path
from gptq_cli.checkpoint.source import open_checkpoint
from gptq_cli.checkpoint.writer import copy_side_files
from gptq_cli.errors import InputError
from gptq_cli.storage.manifest import INDEX_NAME
from tests.checkpoint.gptq_files import SHARDS, gptq_files


def write_checkpoint(directory: Path) -> Path:
    """Write two shards with two tensors each, an index and a config; return `directory`."""
    directory.mkdir(exist_ok=True)
    shards = {
        SHARDS[0]: {"a": torch.arange(6.0).reshape(2, 3), "b": torch.arange(4).half()},
        SHARDS[1]: {"c": torch.arange(3), "d": torch.ones(2, 2, dtype=torch.bfloat16)},
    }
    weight_map = {}
    for file, tensors in shards.items():
        save_file(tensors, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    (directory / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (directory / "config.json").write_text('{"model_type": "llama"}')
    return directory


def test_headers_hold_dtype_shape_and_offsets_of_tensors(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_checkpoint(tmp_path))
    found = {name: (tensor.dtype, tensor.shape) for name, tensor in checkpoint.tensors.items()}
    assert found == {
        "a": ("F32", (2, 3)),
        "b": ("F16", (4,)),
        "c": ("I64", (3,)),
        "d": ("BF16", (2, 2)),
    }
    a = checkpoint.tensors["a"]
    data = a.file.read_bytes()[a.start : a.end]
    assert torch.frombuffer(bytearray(data), dtype=torch.float32).tolist() == [0, 1, 2, 3, 4, 5]
    assert checkpoint.nbytes == 24 + 8 + 24 + 8


def test_other_files_are_neither_weights_nor_hidden(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    for name in [
        "tokenizer.json",
        "LICENSE",
        "templates/chat.jinja",
        "modeling.py",
        "old.bin",
        ".cache/x",
        "original/y",
    ]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    found = [str(path) for path in open_checkpoint(tmp_path).other_files()]
    assert found == ["LICENSE", "modeling.py", "templates/chat.jinja", "tokenizer.json"]


OF_TRAINING = [
    "trainer_state.json", "training_args.bin", "training_args.json", "optimizer.pt", "scheduler.pt",
    "rng_state_0.pth", "all_results.json", "eval_results.json", "trainer_log.jsonl",
    "zero_to_fp32.py", "train.log", "events.out.tfevents.1.host", ".git/config",
    ".cache/huggingface/x.lock", "model.lock", "half.incomplete", "__pycache__/modeling.txt",
    "code/__pycache__/x.pyc", "runs/Nov29/events", "wandb/run/config.yaml",
    "logs/a.json", "tensorboard/b.json", "checkpoint-500/config.json",
    "checkpoint-500/trainer_state.json", "global_step500/README",
]  # fmt: skip
OF_OTHER_MODELS = [
    "lora/adapter_config.json",
    "lora/adapter_model.safetensors",
    "draft/deep/config.json",
    "draft/model.safetensors",
    "adapter_config.json",
    "adapter_model.safetensors",
]
OF_THE_MODEL = [
    "LICENSE",
    "chat_template.jinja",
    "code/modeling.py",
    "latest/readme.md",
    "modeling.py",
    "tokenizer.json",
    "tokenizer.model",
]


def test_files_of_training_and_other_models_are_no_side_files(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    for name in [*OF_TRAINING, *OF_OTHER_MODELS, *OF_THE_MODEL]:
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text("x")
    found = [file.as_posix() for file in open_checkpoint(tmp_path).other_files()]
    assert found == sorted(OF_THE_MODEL)


def test_an_adapter_beside_the_model_gives_a_remark(tmp_path: Path) -> None:
    assert open_checkpoint(write_checkpoint(tmp_path)).remarks == ()
    (tmp_path / "adapter_config.json").write_text("{}")
    text = (
        "holds an adapter beside the model (adapter_config.json): it is not applied and not copied"
    )
    assert open_checkpoint(tmp_path).remarks == (("W_CKPT_ADAPTER", f"`{tmp_path}` {text}"),)


def truncate(directory: Path) -> None:
    shard = directory / SHARDS[1]
    shard.write_bytes(shard.read_bytes()[:-1])


def append(directory: Path) -> None:
    with (directory / SHARDS[1]).open("ab") as stream:
        stream.write(b"x")


def giant_header(directory: Path) -> None:
    shard = directory / SHARDS[0]
    shard.write_bytes((2**60).to_bytes(8, "little") + shard.read_bytes()[8:])


def duplicate_key(directory: Path) -> None:
    entry = '"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}'
    header = f"{{{entry}, {entry}}}".encode()
    (directory / SHARDS[0]).write_bytes(len(header).to_bytes(8, "little") + header + b"x")


def lying_shape(directory: Path) -> None:
    shard = directory / SHARDS[0]
    shard.write_bytes(shard.read_bytes().replace(b'"shape":[2,3]', b'"shape":[3,3]'))


def empty_file(directory: Path) -> None:
    (directory / SHARDS[0]).write_bytes(b"")


def missing_shard(directory: Path) -> None:
    (directory / SHARDS[1]).unlink()


def lfs_pointer(directory: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 5775952\n"
    (directory / SHARDS[1]).write_text(pointer)


def linked_shard(directory: Path) -> None:
    shard = directory / SHARDS[1]
    shard.symlink_to(shard.rename(directory.parent / "elsewhere.safetensors"))


def index_change(**changes: str | None) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        index = json.loads((directory / INDEX_NAME).read_text())
        weight_map = index["weight_map"] | changes
        index["weight_map"] = {name: file for name, file in weight_map.items() if file}
        (directory / INDEX_NAME).write_text(json.dumps(index))

    return change


def hold_twice(name: str) -> Callable[[Path], None]:
    """Copy a tensor of the first shard into the second one."""

    def change(directory: Path) -> None:
        first, second = directory / SHARDS[0], directory / SHARDS[1]
        tensors = load_file(second) | {name: load_file(first)[name]}
        save_file(tensors, second, metadata={"format": "pt"})

    return change


def both(*changes: Callable[[Path], None]) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        for each in changes:
            each(directory)

    return change


def prefixed(name: str, content: bytes) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        (directory / name).write_bytes(content + (directory / name).read_bytes())

    return change


def metadata(content: bytes) -> Callable[[Path], None]:
    """Replace the metadata of the first shard by `content`."""

    def change(directory: Path) -> None:
        shard = directory / SHARDS[0]
        whole = shard.read_bytes()
        length = int.from_bytes(whole[:8], "little")
        header = whole[8 : 8 + length].replace(b'{"format":"pt"}', content)
        shard.write_bytes(len(header).to_bytes(8, "little") + header + whole[8 + length :])

    return change


def only(*names: str) -> Callable[[Path], None]:
    def keep(directory: Path) -> None:
        for path in directory.iterdir():
            path.unlink()
        for name in names:
            (directory / name).write_text("{}")

    return keep


FAULTS: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "truncated shard": (truncate, "E_CKPT_CORRUPT", "model-00002-of-00002"),
    "trailing bytes": (append, "E_CKPT_CORRUPT", "model-00002-of-00002"),
    "giant header": (giant_header, "E_CKPT_CORRUPT", "header of 1152921504606846976 bytes"),
    "duplicate key in a header": (duplicate_key, "E_CKPT_CORRUPT", "duplicate key 'a'"),
    "shape that does not fit its bytes": (lying_shape, "E_CKPT_CORRUPT", r"'a': F32 \[3, 3\]"),
    "empty file": (empty_file, "E_CKPT_CORRUPT", "model-00001-of-00002"),
    "missing shard": (missing_shard, "E_CKPT_MISSING", "lacks 1 of 2 shards: model-00002-of-00002"),
    "index names the wrong shard": (
        index_change(a=SHARDS[1]),
        "E_CKPT_INDEX",
        "puts `a` into model-00002",
    ),
    "tensor in two shards": (
        hold_twice("a"),
        "E_CKPT_INDEX",
        "puts `a` into model-00001.*00002.* holds it",
    ),
    "unlisted tensor in two shards": (
        both(hold_twice("a"), index_change(a=None)),
        "E_CKPT_INDEX",
        "model-00001-of-00002.safetensors holds `a`, but model-00002-of-00002.safetensors holds it",
    ),
    "byte order mark": (
        prefixed("config.json", b"\xef\xbb\xbf"),
        "E_CKPT_CONFIG",
        "config.json` begins with a byte order",
    ),
    "byte order mark in the index": (
        prefixed(INDEX_NAME, b"\xef\xbb\xbf"),
        "E_CKPT_CONFIG",
        "index.json` begins with",
    ),
    "metadata that is no object": (metadata(b"[]"), "E_CKPT_CORRUPT", "metadata is not a mapping"),
    "metadata that is no text": (
        metadata(b'{"a":0}'),
        "E_CKPT_CORRUPT",
        "metadata is not a mapping",
    ),
    "path traversal": (
        index_change(a="../secret.safetensors"),
        "E_UNSAFE_PATH",
        "outside its directory",
    ),
    "absolute path": (
        index_change(a="/etc/secret.safetensors"),
        "E_UNSAFE_PATH",
        "outside its directory",
    ),
    "pointer of Git LFS": (
        lfs_pointer,
        "E_CKPT_CORRUPT",
        "00002.safetensors` is a pointer of Git LFS",
    ),
    "linked shard": (
        linked_shard,
        "E_UNSAFE_PATH",
        "00002.safetensors` is a link that leads out of its directory, to",
    ),
    "pickles only": (
        only("config.json", "pytorch_model.bin"),
        "E_CKPT_PICKLE",
        "pickled weights only",
    ),
    "adapter": (only("adapter_config.json", "adapter_model.bin"), "E_CKPT_KIND", "is an adapter"),
    "diffusers": (only("model_index.json"), "E_CKPT_KIND", "is a diffusers pipeline"),
    "gguf": (only("model.gguf"), "E_CKPT_KIND", "GGUF"),
    "no weights": (only("config.json"), "E_CKPT_MISSING", "no \\*.safetensors"),
    "no config": (only("model.safetensors"), "E_CKPT_CONFIG", "no config.json"),
    "empty directory": (only(), "E_CKPT_CONFIG", "no config.json"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_checkpoint_is_refused_with_a_code(fault: str, tmp_path: Path) -> None:
    break_it, code, message = FAULTS[fault]
    (tmp_path / "model").mkdir()
    break_it(write_checkpoint(tmp_path / "model"))
    with pytest.raises(InputError, match=message) as caught:
        open_checkpoint(tmp_path / "model")
    assert caught.value.code == code
    assert caught.value.exit_code == 3


def remarks(directory: Path) -> list[tuple[str, str]]:
    """Return the remarks of the checkpoint, with DIR for its directory."""
    found = open_checkpoint(directory).remarks
    return [(code, text.replace(str(directory), "DIR")) for code, text in found]


def test_index_entries_without_a_tensor_give_a_remark(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    assert remarks(tmp_path) == []
    index_change(z=SHARDS[0])(tmp_path)
    one = "`DIR/model.safetensors.index.json` lists `z`, which no shard holds"
    assert remarks(tmp_path) == [("W_CKPT_INDEX", one)]
    index_change(y=SHARDS[1])(tmp_path)
    two = "`DIR/model.safetensors.index.json` lists `z` and 1 more, which no shard holds"
    assert remarks(tmp_path) == [("W_CKPT_INDEX", two)]
    assert open_checkpoint(tmp_path).absent == ("z", "y")
    assert set(open_checkpoint(tmp_path).tensors) == set("abcd")


def test_a_tensor_without_an_index_entry_gives_a_remark(tmp_path: Path) -> None:
    index_change(b=None)(write_checkpoint(tmp_path))
    assert set(open_checkpoint(tmp_path).tensors) == set("abcd")
    text = "`DIR/model.safetensors.index.json` does not list `b`, which its shards hold"
    assert remarks(tmp_path) == [("W_CKPT_INDEX", text)]


def test_names_of_shards_may_begin_with_a_dot_and_slash(tmp_path: Path) -> None:
    known = open_checkpoint(write_checkpoint(tmp_path)).tensors
    index_change(a="./model-00001-of-00002.safetensors", c="./model-00002-of-00002.safetensors")(
        tmp_path
    )
    assert open_checkpoint(tmp_path).tensors == known
    assert remarks(tmp_path) == []


def test_a_second_set_of_weights_gives_a_remark(tmp_path: Path) -> None:
    known = open_checkpoint(write_checkpoint(tmp_path)).tensors
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    text = (
        "`DIR` holds model.safetensors as well, "
        "which transformers reads instead of the shards of the index"
    )
    assert remarks(tmp_path) == [("W_CKPT_INDEX", text)]
    assert open_checkpoint(tmp_path).tensors == known


def test_metadata_may_be_null(tmp_path: Path) -> None:
    metadata(b"null")(write_checkpoint(tmp_path))
    assert set(open_checkpoint(tmp_path).tensors) == set("abcd")
    file = tmp_path / SHARDS[0]
    assert set(load_file(file)) == {"a", "b"}  # as the library does


def test_two_equal_values_of_a_key_give_no_remark(tmp_path: Path) -> None:
    (write_checkpoint(tmp_path) / "config.json").write_text(
        '{"model_type": "llama", "vocab_size": 5, "x": {"y": [1], "y": [1]}, "vocab_size": 5}'
    )
    assert remarks(tmp_path) == []


def test_the_last_of_two_values_of_a_key_counts(tmp_path: Path) -> None:
    long = "z" * 99
    text = '{"model_type": "llama", "vocab_size": 5, "x": {"y": [1], "y": "LONG"}, "vocab_size": 6}'
    config = write_checkpoint(tmp_path) / "config.json"
    config.write_text(text.replace("LONG", long))
    expected = {"model_type": "llama", "vocab_size": 6, "x": {"y": long}}
    assert open_checkpoint(tmp_path).config == expected
    assert json.loads(config.read_text()) == expected
    remark = (
        "`DIR/config.json` has keys with two values, and the last one counts, as in transformers: "
        f'y is [1], then "{long[:39]}...; vocab_size is 5, then 6'
    )
    assert remarks(tmp_path) == [("W_CKPT_CONFIG", remark)]


@pytest.fixture(params=["config", "text_config"])
def with_bitsandbytes(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A checkpoint of floats with a config.json that names bitsandbytes."""
    method = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    content: dict[str, object] = {"quantization_config": method}
    if request.param == "text_config":
        content = {"text_config": content}
    (write_checkpoint(tmp_path) / "config.json").write_text(json.dumps(content))
    return tmp_path


def test_bitsandbytes_is_ignored_if_the_weights_are_floats(with_bitsandbytes: Path) -> None:
    checkpoint = open_checkpoint(with_bitsandbytes)
    assert (checkpoint.method, checkpoint.quantization) == (None, None)
    text = (
        "config.json of `DIR` names bitsandbytes, but the weights are plain floats: "
        "they are read as such"
    )
    assert remarks(with_bitsandbytes) == [("W_CKPT_CONFIG", text)]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8])
def test_bitsandbytes_is_the_method_if_weights_are_codes(
    dtype: torch.dtype, with_bitsandbytes: Path
) -> None:
    shard = with_bitsandbytes / SHARDS[1]
    save_file(load_file(shard) | {"d": torch.ones(2, 2, dtype=dtype)}, shard)
    assert open_checkpoint(with_bitsandbytes).method == "bitsandbytes"
    assert remarks(with_bitsandbytes) == []


def test_command_of_the_hint_removes_a_byte_order_mark(tmp_path: Path) -> None:
    prefixed("config.json", b"\xef\xbb\xbf")(write_checkpoint(tmp_path / "a b"))
    with pytest.raises(InputError) as caught:
        open_checkpoint(tmp_path / "a b")
    command = (caught.value.hint or "").partition(": ")[2]
    subprocess.run(command, shell=True, check=True)
    assert open_checkpoint(tmp_path / "a b").config == {"model_type": "llama"}


@pytest.mark.parametrize("content", ["{", "[1]", "\x00"])
def test_a_config_that_is_not_a_json_object_is_refused(content: str, tmp_path: Path) -> None:
    (write_checkpoint(tmp_path) / "config.json").write_text(content)
    with pytest.raises(InputError) as caught:
        open_checkpoint(tmp_path)
    assert caught.value.code == "E_CKPT_CONFIG"


def test_a_mutated_header_is_refused_or_keeps_its_sizes(tmp_path: Path) -> None:
    file = write_checkpoint(tmp_path) / SHARDS[0]
    original = file.read_bytes()
    refused = 0
    for position in range(len(original) - 32):
        for flip in (0x01, 0x10, 0x80):
            mutated = bytearray(original)
            mutated[position] ^= flip
            file.write_bytes(mutated)
            try:
                tensors = read_header(file)
            except InputError:
                refused += 1
            else:
                assert sum(tensor.nbytes for tensor in tensors.values()) == 32
    assert refused > len(original)


def cached(tmp_path: Path) -> Path:
    """Write a snapshot as in the cache of the Hub; each file is a link to a blob."""
    repository = tmp_path / "models--a--b"
    snapshot, blobs = repository / "snapshots" / "0123", repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    files = sorted(write_checkpoint(repository / "files").iterdir())
    for number, file in enumerate(files):
        file.rename(blobs / str(number))
        (snapshot / file.name).symlink_to(Path("..") / ".." / "blobs" / str(number))
    return snapshot


def test_links_inside_the_hub_cache_are_accepted(tmp_path: Path) -> None:
    snapshot = cached(tmp_path)
    assert len(open_checkpoint(snapshot).tensors) == 4
    (tmp_path / "elsewhere").symlink_to(snapshot)
    assert len(open_checkpoint(tmp_path / "elsewhere").tensors) == 4


def test_a_link_out_of_the_hub_cache_is_refused(tmp_path: Path) -> None:
    snapshot = cached(tmp_path)
    (tmp_path / "secret").write_text("x")
    (snapshot / "tokenizer.json").symlink_to(tmp_path / "secret")
    with pytest.raises(InputError, match="leads out of its directory") as caught:
        open_checkpoint(snapshot)
    assert (caught.value.code, caught.value.exit_code) == ("E_UNSAFE_PATH", 3)


@pytest.mark.parametrize(
    "name",
    [
        *("a\\b.txt", "C:x", "a\nb.txt", "\x1b[2J", "code/\u202etxt.py", "\udcff.md"),
        *("back\\slash.md", "c:x.md", "new\nline.md", "a/b\x1b.md", "\u202etxt.md", "caf\udce9.md"),
    ],
)
def test_a_file_with_an_unsafe_name_is_refused(name: str, tmp_path: Path) -> None:
    file = write_checkpoint(tmp_path) / name
    file.parent.mkdir(exist_ok=True)
    file.write_text("x")
    with pytest.raises(InputError) as caught:
        open_checkpoint(tmp_path)
    assert (caught.value.code, caught.value.exit_code) == ("E_UNSAFE_PATH", 3)
    assert str(caught.value) == f"`{file}` has a name that not every system accepts or shows"
    assert (caught.value.hint or "").startswith("rename it, without backslash")
    assert "move it elsewhere" in (caught.value.hint or "")
    file.rename(tmp_path / ".hidden\\name")  # hidden files are not copied
    assert open_checkpoint(tmp_path).other_files() == []


@pytest.mark.parametrize("name", ["\u00e9 x.txt", "-o", "*", "~", "CON", "$(x)", "\u8bf4\u660e.md"])
def test_other_names_of_side_files_are_accepted(name: str, tmp_path: Path) -> None:
    (write_checkpoint(tmp_path) / name).write_text("x")
    assert open_checkpoint(tmp_path).other_files() == [Path(name)]


def test_a_link_to_blobs_outside_a_snapshot_is_refused(tmp_path: Path) -> None:
    snapshot = cached(tmp_path)
    snapshot.parent.rename(snapshot.parent.parent / "mine")
    with pytest.raises(InputError, match="leads out of its directory"):
        open_checkpoint(tmp_path / "models--a--b" / "mine" / "0123")


def test_names_of_the_greatest_length_are_copied(tmp_path: Path) -> None:
    directory = gptq_files().write(tmp_path / "c")
    names = {"x" * 252 + ".md", "ä" * 126 + ".md"}
    for name in names:
        (directory / name).write_text(name)
    copy_side_files(open_checkpoint(directory), tmp_path / "out", without=())
    assert {path.name for path in (tmp_path / "out").iterdir()} >= names
    assert not is_safe_path(directory, "ä" * 128)
