"""A model that is downloaded while it is quantized, from a Hub on the loopback with faults."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load, save
from typer.testing import CliRunner

from gptq_cli import api
from gptq_cli.checkpoint import download, ranges
from gptq_cli.checkpoint.locate import locate_model
from gptq_cli.checkpoint.streaming import stream_model
from gptq_cli.cli.app import app
from gptq_cli.errors import ConfigError, ExistsError, InputError, ResourceError, size
from gptq_cli.events import BlockFinished, BlockStarted, Event, LayerSolved, Report, Resumed
from gptq_cli.hub_errors import NETWORK_UNCACHED
from gptq_cli.planning.checks import check_sharing
from gptq_cli.preview import preview_run
from gptq_cli.quantization.run import QuantizeResult, quantize_checkpoint
from gptq_cli.storage.work_directory import WorkDirectory, read_run
from tests.checkpoint.test_ranges import shortened
from tests.disks import DyingDisk, Killed, using
from tests.families import save_drafted, save_model
from tests.hub import Change, Fault, Hub, Reply, client_of, serve
from tests.quantization.test_adapters import pair, write_adapter
from tests.quantization.test_coded_sources import (
    EXPERTS_KEPT,
    FIRST_KEPT,
    Source,
    gpt_oss,
    modelopt,
)
from tests.runs import config, digest
from tests.tiny import SETTINGS, SMALL, killer

ID = "someone/tiny"
WEIGHTS = r"GET .*/resolve/.*\.safetensors$"
DEEP = SMALL | {"num_hidden_layers": 4}


def contents(model: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in model.iterdir()}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Return a model with four blocks in four shards, which cut through blocks."""
    folder = tmp_path_factory.mktemp("hub") / "model"
    return contents(save_model(folder, max_shard_size="140KB", **DEEP))


@pytest.fixture
def hub(files: dict[str, bytes], tmp_path: Path) -> Iterator[Hub]:
    """Serve the model, and send the client of this process there."""
    with serve({ID: files}, kind="model") as server, client_of(server, tmp_path / "home"):
        yield server


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let headers take two requests and tensors several, and tries follow at once."""
    monkeypatch.setattr(ranges, "FIRST_PAUSE", 0.0)
    monkeypatch.setattr(ranges, "FIRST_BYTES", 100)
    monkeypatch.setattr(download, "PART_BYTES", 30_000)


@pytest.fixture(scope="module")
def plain(files: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return the hashes of the output if the model is downloaded first."""
    folder = tmp_path_factory.mktemp("plain")
    with serve({ID: files}, kind="model") as server, client_of(server, folder / "home"):
        run(folder / "out", stream_download=False)
    return digest(folder / "out")


def shards(files: Mapping[str, bytes]) -> dict[str, bytes]:
    return {name: data for name, data in files.items() if name.endswith(".safetensors")}


def header_bytes(data: bytes) -> int:
    return 8 + int.from_bytes(data[:8], "little")


def run(output: Path, **changes: object) -> QuantizeResult:
    """Quantize the model of the Hub; `changes` are settings or options of the run."""
    names = ("resume", "revision", "report", "stream_download", "overwrite")
    options = {name: changes.pop(name) for name in names if name in changes}
    options = {"stream_download": True} | options
    return quantize_checkpoint(ID, output, config(**(SETTINGS | changes)), **options)


def fetched(hub: Hub, files: Mapping[str, bytes]) -> dict[str, list[tuple[int, int]]]:
    """Return the ranges of tensors that were sent of each shard, in order."""
    found = {}
    for name, sent in hub.ranges.items():
        start = header_bytes(files[name])
        found[name] = sorted(bounds for bounds in sent if bounds[0] >= start)
    return found


@dataclass(frozen=True)
class Streamed:
    """A streamed run: its output, ranges of each shard, bytes of the download at each event."""

    output: Path
    commit: str | None
    ranges: dict[str, list[tuple[int, int]]]
    held: list[int]


@pytest.fixture(scope="module")
def streamed(files: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory) -> Streamed:
    folder = tmp_path_factory.mktemp("streamed")
    download = WorkDirectory(folder / "out").download
    held: list[int] = []

    def measure(_event: Event) -> None:
        found = [file.stat().st_blocks * 512 for file in download.rglob("*.safetensors")]
        held.append(sum(found))

    with serve({ID: files}, kind="model") as server, client_of(server, folder / "home"):
        result = run(folder / "out", report=measure)
        return Streamed(folder / "out", result.commit, fetched(server, files), held)


def test_a_streamed_run_writes_the_bytes_of_a_plain_one(
    streamed: Streamed, hub: Hub, plain: dict[str, str]
) -> None:
    assert digest(streamed.output) == plain
    assert streamed.commit == hub.commit(ID)
    assert not WorkDirectory(streamed.output).path.exists()


def test_each_byte_of_a_tensor_is_downloaded_once(
    streamed: Streamed, files: dict[str, bytes]
) -> None:
    assert set(streamed.ranges) == set(shards(files))
    for name, parts in streamed.ranges.items():
        position = header_bytes(files[name])
        for first, last in parts:
            assert first == position
            position = last + 1
        assert position == len(files[name])


def test_the_disk_holds_two_blocks_and_what_is_in_none(
    streamed: Streamed, files: dict[str, bytes]
) -> None:
    found = tensors_of(files)
    of_block = sum(data.nbytes for name, data in found.items() if ".layers.2." in name)
    outside = sum(data.nbytes for name, data in found.items() if ".layers." not in name)
    pages = 2 * 4096 * 7  # a header and a last page: 3 files outside, 2 blocks in 2 shards each
    assert 2 * of_block < max(streamed.held) <= 2 * of_block + outside + pages
    assert max(streamed.held) < sum(data.nbytes for data in found.values()) - of_block


def tensors_of(files: Mapping[str, bytes]) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for data in shards(files).values():
        found |= load(data)
    return found


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize("last", [1, 70, 140])
def test_a_killed_run_resumes_with_the_same_bytes(
    last: int, plain: dict[str, str], tmp_path: Path
) -> None:
    with pytest.raises(Killed), using(DyingDisk(last)):
        run(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    run(tmp_path / "out")
    assert digest(tmp_path / "out") == plain


def test_a_resumed_run_fetches_no_block_that_is_finished(
    hub: Hub, files: dict[str, bytes], plain: dict[str, str], tmp_path: Path
) -> None:
    with pytest.raises(Killed):
        run(tmp_path / "out", report=killer(2))
    hub.ranges.clear()
    seen: list[Event] = []
    run(tmp_path / "out", report=seen.append)
    assert [event.index for event in seen if isinstance(event, Resumed)] == [3]
    assert digest(tmp_path / "out") == plain
    assert blocks_in(fetched(hub, files), files) == {0, 3}  # block 0 shows how blocks are called


def blocks_in(sent: Mapping[str, list[tuple[int, int]]], files: Mapping[str, bytes]) -> set[int]:
    """Return the numbers of the blocks of which a byte was sent."""
    found = set()
    for shard, parts in sent.items():
        start = header_bytes(files[shard])
        for name, entry in json.loads(files[shard][8:start]).items():
            if ".layers." not in name:
                continue
            first, end = entry["data_offsets"]
            for sent_first, sent_last in parts:
                if sent_first < start + end and start + first <= sent_last:
                    found.add(int(name.split(".")[2]))
    return found


@pytest.mark.usefixtures("hub")
def test_a_plain_run_resumes_a_streamed_one(plain: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(Killed):
        run(tmp_path / "out", report=killer(1))
    run(tmp_path / "out", stream_download=False)
    assert digest(tmp_path / "out") == plain


# ---------------------------------------------------------------- faults of the Hub


def empty(reply: Reply) -> Reply:
    return replace(reply, body=b"")


def test_faults_that_pass_change_no_byte(hub: Hub, plain: dict[str, str], tmp_path: Path) -> None:
    faults = [Fault(WEIGHTS, None, 3), Fault(WEIGHTS, shortened, 3), Fault(WEIGHTS, Reply(503), 3)]
    hub.faults += faults
    run(tmp_path / "out")
    assert [fault.times for fault in faults] == [0, 0, 0]
    assert digest(tmp_path / "out") == plain


def failing(hub: Hub, fault: Fault, seen: list[Event]) -> Report:
    """Return a report that notes events, and lets the Hub fail from the second block on."""

    def note(event: Event) -> None:
        seen.append(event)
        if isinstance(event, LayerSolved) and event.report.name.startswith("model.layers.1."):
            hub.faults.append(fault)

    return note


@pytest.mark.parametrize(
    ("reply", "code", "hint"),
    [
        (Reply(500), "E_HUB_NETWORK", "finished blocks are kept"),
        (Reply(403), "E_HUB_AUTH", "hf auth login"),
    ],
)
def test_work_is_kept_if_the_hub_fails_in_a_run(
    reply: Reply, code: str, hint: str, hub: Hub, plain: dict[str, str], tmp_path: Path
) -> None:
    seen: list[Event] = []
    with pytest.raises(InputError) as caught:
        run(tmp_path / "out", report=failing(hub, Fault(WEIGHTS, reply), seen))
    assert (caught.value.code, caught.value.exit_code) == (code, 3)
    assert "`someone/tiny`" in str(caught.value)
    assert hint in (caught.value.hint or "")
    work = WorkDirectory(tmp_path / "out")
    assert "failed" not in (read_run(work.path) or {})
    assert not work.download.exists()
    hub.faults.clear()
    finished = sum(isinstance(event, BlockFinished) for event in seen)
    run(tmp_path / "out", report=seen.append)
    assert [event.index for event in seen if isinstance(event, Resumed)] == [finished]
    assert digest(tmp_path / "out") == plain


def test_other_bytes_of_the_same_size_end_the_run(hub: Hub, tmp_path: Path) -> None:
    def other(reply: Reply) -> Reply:
        return replace(reply, body=reply.body[::-1], headers={**reply.headers, "ETag": '"other"'})

    seen: list[Event] = []
    with pytest.raises(InputError, match='but now has "other"') as caught:
        run(tmp_path / "out", report=failing(hub, Fault(WEIGHTS, other), seen))
    assert (caught.value.code, caught.value.exit_code) == ("E_SOURCE_CHANGED", 3)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("reply", [Reply(500), empty])
def test_a_hub_that_fails_at_the_start_promises_no_cache(
    reply: Reply | Change, hub: Hub, tmp_path: Path
) -> None:
    hub.faults.append(Fault(WEIGHTS, reply))
    with pytest.raises(InputError) as caught:
        run(tmp_path / "out")
    assert (caught.value.code, caught.value.exit_code) == ("E_HUB_NETWORK", 3)
    assert (caught.value.hint or "").endswith(NETWORK_UNCACHED)


def test_the_commit_is_pinned_if_the_branch_moves_on(
    hub: Hub, files: dict[str, bytes], plain: dict[str, str], tmp_path: Path
) -> None:
    other = {name: data[::-1] for name, data in shards(files).items()}
    pinned = hub.commit(ID)

    def push(event: Event) -> None:
        if isinstance(event, BlockStarted) and event.index == 1:
            hub.move_on(ID, {**files, **other})

    assert run(tmp_path / "out", report=push).commit == pinned != hub.commit(ID)
    assert digest(tmp_path / "out") == plain


def test_work_of_another_commit_is_refused_until_it_is_named(
    hub: Hub, files: dict[str, bytes], plain: dict[str, str], tmp_path: Path
) -> None:
    pinned = hub.commit(ID)
    with pytest.raises(Killed):
        run(tmp_path / "out", report=killer(1))
    hub.move_on(ID, {**files, "README.md": b"a new page"})
    with pytest.raises(ExistsError, match=r"source\.commit was") as caught:
        run(tmp_path / "out")
    assert caught.value.code == "E_RESUME_MISMATCH"
    work = WorkDirectory(tmp_path / "out").path
    assert f"gptq resume {tmp_path / 'out'}" in (caught.value.hint or "")
    request = (read_run(work) or {})["request"]
    assert (request["revision"], request["stream_download"]) == (pinned, True)
    done = CliRunner().invoke(app, ["resume", str(work), "--quiet"])
    assert done.exit_code == 0, done.output
    assert digest(tmp_path / "out") == plain


def test_numbers_that_are_not_finite_end_the_run(
    hub: Hub, files: dict[str, bytes], tmp_path: Path
) -> None:
    hub.repos = {ID: with_nan(files, "model.layers.2.mlp.up_proj.weight")}
    with pytest.raises(InputError, match=r"up_proj\.weight` in model-0000.*holds NaN") as caught:
        run(tmp_path / "out")
    assert (caught.value.code, caught.value.exit_code) == ("E_CKPT_NONFINITE", 3)
    assert not (tmp_path / "out").exists()


def with_nan(files: Mapping[str, bytes], name: str) -> dict[str, bytes]:
    """Return the files with one NaN in the tensor `name`."""
    changed = dict(files)
    for shard, data in shards(files).items():
        tensors = load(data)
        if name in tensors:
            tensors[name][1, 3] = math.nan
            changed[shard] = save(tensors, {"format": "pt"})
    return changed


# ---------------------------------------------------------------- other models


def served_run(model: Path, folder: Path, **changes: object) -> tuple[Path, Path]:
    """Return the outputs of a streamed and of a plain run of `model`, served by a Hub."""
    with serve({ID: contents(model)}, kind="model") as server:
        for name, stream in (("streamed", True), ("plain", False)):
            with client_of(server, folder / "home" / name):
                run(folder / name, stream_download=stream, **changes)
    return folder / "streamed", folder / "plain"


def test_adapters_are_merged_while_blocks_are_downloaded(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", **SMALL)
    tensors = pair("model.layers.1.mlp.down_proj", 32, 64)
    tensors |= pair("model.layers.0.self_attn.v_proj", 64, 32)
    adapter = write_adapter(tmp_path / "adapter", tensors)
    streamed, plain = served_run(model, tmp_path, lora=[str(adapter)])
    assert digest(streamed) == digest(plain)


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (gpt_oss, {"dynamic": EXPERTS_KEPT, "moe_uncovered": "rtn"}),
        (modelopt, {"dynamic": FIRST_KEPT, "lm_head": False}),
    ],
)
def test_codes_are_decoded_while_blocks_are_downloaded(
    make: Callable[[Path], Source], settings: dict[str, object], tmp_path: Path
) -> None:
    streamed, plain = served_run(make(tmp_path).coded, tmp_path / "out", **settings)
    assert digest(streamed) == digest(plain)


def test_a_vision_tower_and_a_draft_block_are_downloaded(tmp_path: Path) -> None:
    model = save_drafted(tmp_path / "model", "qwen3_5_moe")
    settings = {"moe_uncovered": "rtn", "unfit": "keep"}  # the head reads the tower once more
    streamed, plain = served_run(model, tmp_path, **settings)
    assert digest(streamed) == digest(plain)


def test_files_of_another_model_in_a_folder_stay_out(
    hub: Hub, files: dict[str, bytes], tmp_path: Path
) -> None:
    others = {"lora/adapter_model.safetensors": b"", "lora/notes.txt": b"", "prompts/a.txt": b"a"}
    hub.repos = {ID: {**files, **others}}
    _, source = stream_model(ID, None, tmp_path)
    names = {path.as_posix() for path in source.other_files()}
    assert "prompts/a.txt" in names
    assert not any(name.startswith("lora") for name in names)


def test_a_model_in_the_cache_is_not_fetched_again(hub: Hub, tmp_path: Path) -> None:
    located = locate_model(ID)
    hub.requests.clear()
    found, source = stream_model(ID, None, tmp_path / "pieces")
    assert (found, source.download) == (located, None)
    assert not [request for request in hub.requests if "safetensors" in request]


def test_requests_carry_the_token_of_the_user(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    stream_model(ID, None, tmp_path)
    assert set(hub.tokens) == {"Bearer hf_secret"}


# ---------------------------------------------------------------- refusals


def without_ranges(reply: Reply) -> Reply:
    return Reply(200, reply.body, {"ETag": '"any"'})


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        ({"model.safetensors.index.json": None}, "E_CKPT_INDEX", "4 safetensors files, but no"),
        ({"model-00002-of-00004.safetensors": None}, "E_CKPT_MISSING", "lacks 1 of 4 shards"),
        ({"model-00002-of-00004.safetensors": b"{"}, "E_CKPT_CORRUPT", "in a file of 1 bytes"),
        ({"model-00002-of-00004.safetensors": b"\x10" + b"\0" * 9}, "E_CKPT_CORRUPT", "16 bytes"),
    ],
)
def test_weights_that_cannot_be_read_are_refused(
    change: dict[str, bytes | None],
    code: str,
    message: str,
    hub: Hub,
    files: dict[str, bytes],
    tmp_path: Path,
) -> None:
    changed = {**files, **change}
    hub.repos = {ID: {name: data for name, data in changed.items() if data is not None}}
    with pytest.raises(InputError, match=message) as caught:
        stream_model(ID, None, tmp_path)
    assert (caught.value.code, caught.value.exit_code) == (code, 3)


def test_a_hub_without_ranges_is_refused(hub: Hub, tmp_path: Path) -> None:
    hub.faults.append(Fault(WEIGHTS, without_ranges))
    with pytest.raises(InputError, match="does not send ranges of model-0000") as caught:
        run(tmp_path / "out")
    assert (caught.value.code, caught.value.exit_code) == ("E_STREAM", 3)
    assert caught.value.hint == ranges.WHOLE


def test_pickled_and_quantized_weights_are_refused(
    hub: Hub, files: dict[str, bytes], tmp_path: Path
) -> None:
    rest = {name: data for name, data in files.items() if "safetensors" not in name}
    hub.repos = {ID: {**rest, "pytorch_model.bin": b""}}
    with pytest.raises(InputError) as pickled:
        stream_model(ID, None, tmp_path)
    assert pickled.value.code == "E_CKPT_PICKLE"
    quantized = json.loads(files["config.json"]) | {"quantization_config": {"quant_method": "gptq"}}
    hub.repos = {ID: {**files, "config.json": json.dumps(quantized).encode()}}
    with pytest.raises(InputError, match="is quantized, and its codes") as codes:
        stream_model(ID, None, tmp_path)
    assert (codes.value.code, codes.value.hint) == ("E_STREAM", ranges.WHOLE)


@pytest.mark.usefixtures("hub")
def test_what_cannot_be_streamed_conflicts_with_the_option(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", **SMALL)
    with pytest.raises(ConfigError, match="is a directory") as local:
        stream_model(str(model), None, tmp_path)
    _, source = stream_model(ID, None, tmp_path)
    with pytest.raises(ConfigError, match="but there are 2") as shared:
        check_sharing(source, 2)
    with pytest.raises(ConfigError, match="reads them twice") as twice:
        api.quantize(ID, config(bits=3.5), tmp_path / "out", stream_download=True)
    aware: dict[str, object] = {"preset": "max"}
    by_rule: dict[str, object] = {"dynamic": {".*q_proj": {"loss_aware": True}}}
    for changes in (aware, by_rule):
        with pytest.raises(ConfigError, match="three times: for gradients") as thrice:
            api.quantize(ID, config(**changes), tmp_path / "out", stream_download=True)
    for caught in (local, shared, twice, thrice):
        assert (caught.value.code, caught.value.exit_code) == ("E_CFG_CONFLICT", 2)
        assert (caught.value.hint or "").startswith("omit --stream-download")


# ---------------------------------------------------------------- plan


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize("changes", [{}, {"asymmetric_calibration": 1.0}])
def test_plan_names_the_disk_that_the_run_asks_for(
    changes: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = config(**(SETTINGS | changes))
    planned = preview_run(ID, given, tmp_path / "out")
    assert planned.download is not None
    wanted = {True: planned.download.streamed_peak_disk_bytes, False: planned.disk.needed}
    for stream_download, needed in wanted.items():
        full = Mock(f_bavail=0, f_frsize=4096)
        monkeypatch.setattr("gptq_cli.planning.checks.os", Mock(statvfs=Mock(return_value=full)))
        with pytest.raises(ResourceError, match=f"{size(needed)} are needed") as caught:
            run(tmp_path / "out", stream_download=stream_download, **changes)
        assert (caught.value.code, caught.value.exit_code) == ("E_DISK", 5)


@pytest.mark.usefixtures("hub")
def test_plan_shows_both_ways_of_downloading(hub: Hub, files: dict[str, bytes]) -> None:
    del hub  # which serves the model
    arguments = ["plan", ID, "--bits", "4", "--group-size", "32", "--dataset", SETTINGS["dataset"]]
    shown = CliRunner().invoke(app, [*arguments, "--json"])
    data = json.loads(shown.stdout)
    found = tensors_of(files)
    total = sum(tensor.nbytes for tensor in found.values())
    of_block = sum(tensor.nbytes for name, tensor in found.items() if ".layers.3." in name)
    outside = sum(tensor.nbytes for name, tensor in found.items() if ".layers." not in name)
    output = data["disk"]["needed_bytes"]  # and hidden states
    assert output > data["bytes_after"]
    assert data["download"] == {
        "bytes": total,
        "peak_disk_bytes": output + total,
        "streamed_peak_disk_bytes": output + 2 * of_block + outside,
    }
    text = CliRunner().invoke(app, arguments).stdout
    assert f"fetch   {size(total)}, kept in the Hub's cache: {size(output + total)} of disk" in text
    assert f"{size(output + 2 * of_block + outside)} of disk at most" in text
    locate_model(ID)
    cached = CliRunner().invoke(app, arguments).stdout
    assert "fetch" not in cached
