"""Kill, starve and damage many small runs; write what became of them as JSON. `make soak` runs all of it.

Each run quantizes a tiny model, or converts or dequantizes what came of it, in a process of its own, forked from a
server that has torch imported. What must hold after each: OUT is absent, what it was, or the whole checkpoint; the same
call afterwards writes the same bytes and keeps nothing beside them.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from gptq_cli.storage.manifest import file_hash  # noqa: E402

CHILDREN = multiprocessing.get_context("forkserver")


def tree(directory: Path) -> dict[str, str]:
    """Hashes of all files by name."""
    return {
        str(path.relative_to(directory)): file_hash(path)
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def quantize(model: Path, output: Path, answers: Any = None) -> None:
    """In a child: quantize, and answer how many blocks were there before, or with which code it failed."""
    from gptq_cli.errors import GptqError
    from tests.tiny import Case

    try:
        answer: object = Case(model, {}, []).run(output).resumed_blocks
    except GptqError as error:
        answer = error.code
    if answers is not None:
        answers.put(answer)


def call(model: Path, output: Path) -> object:
    """The answer of a child that is let live."""
    answers = CHILDREN.SimpleQueue()
    child = CHILDREN.Process(target=quantize, args=(model, output, answers))
    child.start()
    child.join()
    return answers.get() if not answers.empty() else f"exit {child.exitcode}"


def judge(output: Path, golden: dict[str, str]) -> str | None:
    """What is wrong with an output that may be absent, None if nothing is."""
    return None if not output.exists() or tree(output) == golden else "torn output"


def timed(model: Path, output: Path) -> float:
    """Seconds of a child that is let live; its output is removed."""
    started = time.perf_counter()
    call(model, output)
    seconds = time.perf_counter() - started
    shutil.rmtree(output)
    return seconds


def kills(
    model: Path, golden: dict[str, str], folder: Path, count: int, seed: int
) -> dict[str, Any]:
    """SIGKILL at random times, up to ten times for one output, then a call that lives."""
    chance, output = random.Random(seed), folder / "out"
    longest = min(timed(model, output) for _ in range(3))  # the first waits for the server
    killed, violations, resumed, chains, lived = 0, [], 0, 0, 0
    while killed < count:
        chains += 1
        for _ in range(chance.randint(1, 10)):
            child = CHILDREN.Process(target=quantize, args=(model, output))
            child.start()
            child.join(chance.uniform(0, longest))
            child.kill()
            child.join()
            dead = child.exitcode == -signal.SIGKILL
            killed, lived = killed + dead, lived + (not dead)
            if wrong := judge(output, golden):
                violations.append(wrong)
        answer = call(model, output)
        resumed += isinstance(answer, int) and answer > 0
        if (
            not output.exists()
            or tree(output) != golden
            or [path.name for path in folder.iterdir()] != ["out"]
        ):
            violations.append(f"after {killed} kills: {answer}")
        shutil.rmtree(folder)
        folder.mkdir()
    return {
        "kills": killed,
        "chains": chains,
        "came_too_late": lived,
        "resumed": resumed,
        "violations": violations,
    }


@dataclass(frozen=True)
class Command:
    """A command of which OUT is made from `source`, over the checkpoint `old` if there is one."""

    name: str
    source: Path
    old: Path | None

    def run(self, output: Path) -> None:
        from gptq_cli.inspection.convert import convert_checkpoint, dequantize_checkpoint
        from tests.tiny import Case

        overwrite = self.old is not None
        if self.name == "quantize":
            Case(self.source, {}, []).run(output, overwrite=overwrite)
        elif self.name == "convert":
            convert_checkpoint(str(self.source), output, "gptq_v2", overwrite=overwrite)
        else:
            dequantize_checkpoint(str(self.source), output, overwrite=overwrite)

    def prepare(self, folder: Path) -> Path:
        """OUT in an empty `folder`, as it is before the command runs."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        if self.old is not None:
            shutil.copytree(self.old, folder / "out")
        return folder / "out"


def die(command: Command, output: Path, last: int) -> None:
    """In a child: be killed after operation `last` on the disk; a call that is refused ends before."""
    from gptq_cli.errors import GptqError
    from gptq_cli.storage import durable
    from tests.quantization.children import DeadlyDisk

    durable.disk = DeadlyDisk(last)
    with suppress(GptqError):
        command.run(output)


def killed_commands(model: Path, folder: Path, count: int, seed: int) -> dict[str, Any]:
    """Commands with and without an old output, each killed after operations on the disk, `count` times or more."""
    made = {}
    for name, source in {
        "quantize": model,
        "convert": folder / "quantize",
        "dequantize": folder / "quantize",
    }.items():
        made[name] = folder / name
        Command(name, source, None).run(made[name])
    olds = {
        "quantize": made["convert"],
        "convert": made["dequantize"],
        "dequantize": made["convert"],
    }
    foreign = Path(
        shutil.copytree(model, folder / "foreign")
    )  # a checkpoint that gptq has not written
    (foreign / "vocab.txt").write_text("a file that no new output has")
    found: dict[str, Any] = {"kills": 0, "violations": []}
    for name, old in olds.items():
        source = model if name == "quantize" else made["quantize"]
        # `quantize` without an old output is what `kills` does, and the suite after each operation.
        bare: dict[str, Path | None] = {} if name == "quantize" else {"": None}
        for over, what in {
            **bare,
            " over an output": old,
            " over a foreign checkpoint": foreign,
        }.items():
            one = killed_command(Command(name, source, what), folder / "work", count, seed)
            found["kills"] += one["kills"]
            found["violations"] += [
                f"{name}{over}: {violation}" for violation in one.pop("violations")
            ]
            found[name + over] = one
            print(f"{name}{over}: {one}", file=sys.stderr, flush=True)
    return found


def killed_command(command: Command, folder: Path, count: int, seed: int) -> dict[str, Any]:
    """SIGKILL after an operation, each time another, then up to three times more after any; then a call that lives."""
    from tests.disks import CountingDisk, using

    chance, counting = random.Random(seed), CountingDisk()
    output = command.prepare(folder)
    before = tree(output)
    with using(counting):
        command.run(output)
    operations, golden = len(counting.operations), tree(output)
    order = chance.sample(range(1, operations + 1), operations)
    chains, kills, violations = 0, 0, []
    while kills < count:
        first = order[chains % operations]
        others = [chance.randint(1, operations) for _ in range(chance.randint(0, 3))]
        chains += 1
        command.prepare(folder)
        for last in (first, *others):
            child = CHILDREN.Process(target=die, args=(command, output, last))
            child.start()
            child.join()
            kills += child.exitcode == -signal.SIGKILL
            if tree(output) not in (before, golden):
                violations.append(f"torn output after operations {first}, {others}")
        was_whole = tree(output) == golden
        code = lives(command, output)
        if code != "done" and not (code == "E_OUT_EXISTS" and was_whole and command.old is None):
            violations.append(f"{code} after operations {first}, {others}")
        if tree(output) != golden or [path.name for path in folder.iterdir()] != ["out"]:
            violations.append(f"other files after operations {first}, {others}")
    places = {"operations": operations, "killed_first_after": min(chains, operations)}
    return {**places, "chains": chains, "kills": kills, "violations": violations}


def lives(command: Command, output: Path) -> str:
    """`done`, or the code that a call in this process ends with."""
    from gptq_cli.errors import GptqError
    from tests.disks import CountingDisk, using

    try:
        with using(CountingDisk()):
            command.run(output)
    except GptqError as error:
        return error.code
    return "done"


def disk_sizes(model: Path, golden: dict[str, str], count: int, largest: int) -> dict[str, Any]:
    """A tmpfs of each of `count` sizes, mounted without privileges; enlarged until the run fits."""
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False).returncode:
        return {"skipped": "no unprivileged mounts here"}
    command = [
        "unshare",
        "-rm",
        sys.executable,
        __file__,
        "--inside",
        str(model),
        "--sizes",
        str(count),
    ]
    command += ["--largest", str(largest)]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode:
        return {"sizes": count, "violations": [answer.stderr[-2000:]]}
    found: dict[str, Any] = json.loads(answer.stdout)
    found["violations"] += [
        f"{size} bytes: other output" for size, out in found.pop("trees") if out != golden
    ]
    return found


def inside(model: Path, count: int, largest: int) -> dict[str, Any]:
    """In a user namespace: run on a small tmpfs, see it fail cleanly, enlarge it, run again."""
    import gptq_cli.quantization.run as pipeline

    # The check before the run would refuse most sizes: let the disk itself refuse on every second one.
    preflight = pipeline.check_disk
    codes: dict[str, int] = {}
    violations, trees = [], []
    mount = Path(tempfile.mkdtemp())
    for number in range(count):
        size = 8192 + number * largest // count  # the largest ones suffice
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(mount)], check=True
        )
        pipeline.check_disk = preflight if number % 2 else lambda *_: None
        code = attempt(model, mount / "out")
        codes[code] = codes.get(code, 0) + 1
        if code not in ("E_DISK", "done") or (code == "E_DISK" and (mount / "out").exists()):
            violations.append(f"{size} bytes: {code}")
        subprocess.run(["mount", "-o", "remount,size=64m", str(mount)], check=True)
        again = attempt(model, mount / "out")
        trees.append((size, tree(mount / "out") if again == "done" else {"failed": again}))
        subprocess.run(["umount", str(mount)], check=True)
    mount.rmdir()
    return {"sizes": count, "ended": codes, "violations": violations, "trees": trees}


def attempt(model: Path, output: Path) -> str:
    from gptq_cli.errors import GptqError
    from tests.tiny import Case

    try:
        Case(model, {}, []).run(output)
    except GptqError as error:
        return error.code
    return "done"


def damage(
    model: Path, golden: dict[str, str], folder: Path, count: int, seed: int
) -> dict[str, Any]:
    """One bit of one file of an unfinished work directory, or a cut journal; then a call that lives."""
    from tests.disks import CountingDisk, Killed, using
    from tests.tiny import WORK, Case, killer

    chance = random.Random(seed)
    case, unfinished = Case(model, {}, []), folder / "unfinished"
    with suppress(Killed):
        case.run(unfinished / "out", report=killer(1))
    violations: list[str] = []
    files = [
        path
        for path in sorted((unfinished / WORK).rglob("*"))
        if path.is_file() and path.stat().st_size
    ]
    for number in range(count):
        trial = Path(shutil.copytree(unfinished, folder / "trial"))
        path = trial / chance.choice(files).relative_to(unfinished)
        content = bytearray(path.read_bytes())
        where = chance.randrange(len(content))
        if path.name == "journal.jsonl" and number % 2:
            del content[where:]
        else:
            content[where] ^= 1 << chance.randrange(8)
        path.write_bytes(content)
        with using(CountingDisk()):
            case.run(trial / "out")
        if tree(trial / "out") != golden:
            violations.append(f"{path.name} at {where}")
        shutil.rmtree(trial)
    return {"damages": count, "violations": violations}


def flips(golden: Path, count: int, seed: int) -> dict[str, Any]:
    """One bit of one file of a finished checkpoint, which `gptq verify --full` must notice."""
    from gptq_cli.checkpoint.verify import verify_checkpoint
    from gptq_cli.errors import GptqError

    chance, missed = random.Random(seed), []
    files = sorted(path for path in golden.rglob("*") if path.is_file())
    for _ in range(count):
        path = chance.choice(files)
        original = path.read_bytes()
        where, bit = chance.randrange(len(original)), chance.randrange(8)
        path.write_bytes(
            original[:where] + bytes([original[where] ^ 1 << bit]) + original[where + 1 :]
        )
        with suppress(GptqError):
            if verify_checkpoint(golden, full=True).ok:
                missed.append(f"bit {bit} of byte {where} of {path.name}")
        path.write_bytes(original)
    return {"flips": count, "files": len(files), "violations": missed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=700)
    parser.add_argument(
        "--operation-kills", type=int, default=300, help="at least, of each command"
    )
    parser.add_argument("--sizes", type=int, default=50)
    parser.add_argument("--damages", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=ROOT / "docs" / "benchmarks" / "soak.json")
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--largest", type=int, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    if chosen.inside:
        print(json.dumps(inside(chosen.inside, chosen.sizes, chosen.largest)))
        return
    CHILDREN.set_forkserver_preload(["tests.quantization.children", "gptq_cli.inspection.convert"])
    from tests.families import save_model
    from tests.tiny import SMALL, Case

    folder = Path(tempfile.mkdtemp())
    started = time.time()
    model = save_model(
        folder / "model", **SMALL | {"num_hidden_layers": 6}
    )  # most of the time goes into blocks
    small = save_model(folder / "small", **SMALL)
    Case(model, {}, []).run(folder / "golden")
    golden = tree(folder / "golden")
    n_bytes = sum(path.stat().st_size for path in (folder / "golden").rglob("*"))
    result: dict[str, Any] = {"seed": chosen.seed}
    for name, run in {
        "disk_sizes": lambda _: disk_sizes(model, golden, chosen.sizes, 2 * n_bytes),
        "damage": lambda work: damage(model, golden, work, chosen.damages, chosen.seed),
        "flipped_outputs": lambda _: flips(folder / "golden", chosen.damages, chosen.seed),
        "operation_kills": lambda work: killed_commands(
            small, work, chosen.operation_kills, chosen.seed
        ),
        "random_kills": lambda work: kills(model, golden, work, chosen.kills, chosen.seed),
    }.items():
        (folder / name).mkdir()
        begun = time.time()
        result[name] = {**run(folder / name), "seconds": round(time.time() - begun)}
        print(f"{name}: {result[name]}", file=sys.stderr)
    result["seconds"] = round(time.time() - started)
    shutil.rmtree(folder)
    chosen.json.write_text(json.dumps(result, indent=2) + "\n")
    if any(part.get("violations") for part in result.values() if isinstance(part, dict)):
        sys.exit("violations were found")


if __name__ == "__main__":
    main()
