"""Kill, starve and damage many small runs, and check that no output is torn or lost.

    python scripts/soak.py [--kills 700] [--operation-kills 300] [--sizes 50] [--damages 500]

Each run quantizes a tiny model, or converts or dequantizes its result, in a process of its own that
is forked from a server with torch imported. After each, OUT must be absent, unchanged, or the whole
checkpoint; the same call afterwards must write the same bytes and keep nothing beside them. Prints
the counts of each part and writes them as JSON; exits with an error if it found a violation.
`make soak` runs all of it.
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
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import ROOT, argument_parser, write_json

from gptq_cli.storage.manifest import file_hash

CHILDREN = multiprocessing.get_context("forkserver")


def tree(directory: Path) -> dict[str, str]:
    """Return the hashes of all files by name."""
    return {str(path.relative_to(directory)): file_hash(path) for path in files_of(directory)}


def files_of(directory: Path) -> list[Path]:
    """Return all files below `directory` in a fixed order."""
    return [path for path in sorted(directory.rglob("*")) if path.is_file()]


def quantize(model: Path, output: Path, answers: Any = None) -> None:
    """Quantize in a child process; answer with the resumed blocks or the code of the error."""
    from gptq_cli.errors import GptqError
    from tests.tiny import Case

    try:
        answer: object = Case(model, {}, []).run(output).resumed_blocks
    except GptqError as error:
        answer = error.code
    if answers is not None:
        answers.put(answer)


def call(model: Path, output: Path) -> object:
    """Return the answer of a child that is not killed."""
    answers = CHILDREN.SimpleQueue()
    child = CHILDREN.Process(target=quantize, args=(model, output, answers))
    child.start()
    child.join()
    if answers.empty():
        return f"exit {child.exitcode}"
    return answers.get()


def is_torn(output: Path, golden: dict[str, str]) -> bool:
    """Return whether an output is there but is not the whole checkpoint."""
    return output.exists() and tree(output) != golden


def is_whole(folder: Path, golden: dict[str, str]) -> bool:
    """Return whether `folder` holds the whole checkpoint `out` and nothing else."""
    output = folder / "out"
    return list(folder.iterdir()) == [output] and tree(output) == golden


def timed(model: Path, output: Path) -> float:
    """Return the seconds of a child that is not killed, and remove its output."""
    started = time.perf_counter()
    call(model, output)
    seconds = time.perf_counter() - started
    shutil.rmtree(output)
    return seconds


def kills(
    model: Path, golden: dict[str, str], folder: Path, count: int, seed: int
) -> dict[str, Any]:
    """Kill at random times, up to ten times for one output, then let a call live."""
    chance, output = random.Random(seed), folder / "out"
    longest = min(timed(model, output) for _ in range(3))  # the first waits for the server
    killed = resumed = chains = lived = 0
    violations = []
    while killed < count:
        chains += 1
        for _ in range(chance.randint(1, 10)):
            child = CHILDREN.Process(target=quantize, args=(model, output))
            child.start()
            child.join(chance.uniform(0, longest))
            child.kill()
            child.join()
            if child.exitcode == -signal.SIGKILL:
                killed += 1
            else:
                lived += 1
            if is_torn(output, golden):
                violations.append("torn output")
        answer = call(model, output)
        if isinstance(answer, int) and answer > 0:
            resumed += 1
        if not is_whole(folder, golden):
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
    """A command that makes OUT from `source`, over the checkpoint `old` if there is one."""

    name: str
    source: Path
    old: Path | None
    to: str = "gptq_v2"  # the format of `convert`

    def run(self, output: Path) -> None:
        from gptq_cli.inspection.convert import convert_checkpoint
        from gptq_cli.inspection.dequantize import dequantize_checkpoint
        from tests.tiny import Case

        overwrite = self.old is not None
        if self.name == "quantize":
            Case(self.source, {}, []).run(output, overwrite=overwrite)
        elif self.name == "convert":
            convert_checkpoint(str(self.source), output, self.to, overwrite=overwrite)
        else:
            dequantize_checkpoint(str(self.source), output, overwrite=overwrite)

    def prepare(self, folder: Path) -> Path:
        """Return OUT in an empty `folder`, as it is before the command runs."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        if self.old is not None:
            shutil.copytree(self.old, folder / "out")
        return folder / "out"


def die(command: Command, output: Path, last: int) -> None:
    """Run in a child that is killed after operation `last` on the disk, unless it is refused."""
    from gptq_cli.errors import GptqError
    from gptq_cli.storage import durable
    from tests.quantization.children import DeadlyDisk

    durable.disk = DeadlyDisk(last)
    with suppress(GptqError):
        command.run(output)


def killed_commands(model: Path, folder: Path, count: int, seed: int) -> dict[str, Any]:
    """Kill commands with and without an old output, each at least `count` times."""
    found: dict[str, Any] = {"kills": 0, "violations": []}
    for label, command in commands_to_kill(model, folder).items():
        one = killed_command(command, folder / "work", count, seed)
        found["kills"] += one["kills"]
        for violation in one.pop("violations"):
            found["violations"].append(f"{label}: {violation}")
        found[label] = one
        print(f"{label}: {one}", file=sys.stderr, flush=True)
    return found


def commands_to_kill(model: Path, folder: Path) -> dict[str, Command]:
    """Make an output of each command; return commands over nothing, over these and over another."""
    quantized, converted = folder / "quantize", folder / "convert"
    dequantized = folder / "dequantize"
    Command("quantize", model, None).run(quantized)
    Command("convert", quantized, None).run(converted)
    Command("dequantize", quantized, None).run(dequantized)
    foreign = Path(shutil.copytree(model, folder / "foreign"))  # gptq has not written it
    (foreign / "vocab.txt").write_text("a file that no new output has")
    # `kills` and the test suite cover `quantize` without an old output.
    return {
        "quantize over an output": Command("quantize", model, converted),
        "quantize over a foreign checkpoint": Command("quantize", model, foreign),
        "convert": Command("convert", quantized, None),
        "convert to mlx": Command("convert", quantized, None, "mlx"),
        "convert over an output": Command("convert", quantized, dequantized),
        "convert over a foreign checkpoint": Command("convert", quantized, foreign),
        "dequantize": Command("dequantize", quantized, None),
        "dequantize over an output": Command("dequantize", quantized, converted),
        "dequantize over a foreign checkpoint": Command("dequantize", quantized, foreign),
    }


def killed_command(command: Command, folder: Path, count: int, seed: int) -> dict[str, Any]:
    """Kill a command after an operation on the disk, then after up to three more; let one live.

    The first operation is another one in each chain of kills, until all have had their turn.
    """
    from tests.disks import CountingDisk, using

    chance, counting = random.Random(seed), CountingDisk()
    output = command.prepare(folder)
    before = tree(output)
    with using(counting):
        command.run(output)
    operations, golden = len(counting.operations), tree(output)
    order = chance.sample(range(1, operations + 1), operations)
    chains = kills = 0
    violations = []
    while kills < count:
        first = order[chains % operations]
        others = [chance.randint(1, operations) for _ in range(chance.randint(0, 3))]
        where = f"after operations {first}, {others}"
        chains += 1
        command.prepare(folder)
        for last in (first, *others):
            if is_killed(command, output, last):
                kills += 1
            if tree(output) not in (before, golden):
                violations.append(f"torn output {where}")
        expected = ["done"]
        if command.old is None and tree(output) == golden:  # a call before has finished it
            expected.append("E_OUT_EXISTS")
        code = lives(command, output)
        if code not in expected:
            violations.append(f"{code} {where}")
        if not is_whole(folder, golden):
            violations.append(f"other files {where}")
    return {
        "operations": operations,
        "killed_first_after": min(chains, operations),
        "chains": chains,
        "kills": kills,
        "violations": violations,
    }


def is_killed(command: Command, output: Path, last: int) -> bool:
    """Run `command` in a child; return whether it was killed after operation `last`."""
    child = CHILDREN.Process(target=die, args=(command, output, last))
    child.start()
    child.join()
    return child.exitcode == -signal.SIGKILL


def lives(command: Command, output: Path) -> str:
    """Run `command` in this process; return `done` or the code of its error."""
    from gptq_cli.errors import GptqError
    from tests.disks import CountingDisk, using

    try:
        with using(CountingDisk()):
            command.run(output)
    except GptqError as error:
        return error.code
    return "done"


def disk_sizes(model: Path, golden: dict[str, str], count: int, largest: int) -> dict[str, Any]:
    """Run on a tmpfs of each of `count` sizes, mounted without privileges, enlarged afterwards."""
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False).returncode:
        return {"skipped": "no unprivileged mounts here"}
    command = ["unshare", "-rm", sys.executable, __file__, "--inside", str(model)]
    command += ["--sizes", str(count), "--largest", str(largest)]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode:
        return {"sizes": count, "violations": [answer.stderr[-2000:]]}
    found: dict[str, Any] = json.loads(answer.stdout)
    for size, files in found.pop("trees"):
        if files != golden:
            found["violations"].append(f"{size} bytes: other output")
    return found


def inside(model: Path, count: int, largest: int) -> dict[str, Any]:
    """Run on small disks in a user namespace: fail cleanly, enlarge the disk, run again."""
    from gptq_cli.quantization import run

    # The check before the run would refuse most sizes, so every second run goes without it.
    checks = [lambda *_: None, run.check_disk]
    codes: Counter[str] = Counter()
    violations, trees = [], []
    mount = Path(tempfile.mkdtemp())
    output = mount / "out"
    for number in range(count):
        size = 8192 + number * largest // count  # the largest sizes suffice
        options = ["-t", "tmpfs", "-o", f"size={size}", "tmpfs"]
        subprocess.run(["mount", *options, str(mount)], check=True)
        run.check_disk = checks[number % 2]
        code = attempt(model, output)
        codes[code] += 1
        failed_cleanly = code == "E_DISK" and not output.exists()
        if code != "done" and not failed_cleanly:
            violations.append(f"{size} bytes: {code}")
        subprocess.run(["mount", "-o", "remount,size=64m", str(mount)], check=True)
        again = attempt(model, output)
        files = {"failed": again}
        if again == "done":
            files = tree(output)
        trees.append((size, files))
        subprocess.run(["umount", str(mount)], check=True)
    mount.rmdir()
    return {"sizes": count, "ended": codes, "violations": violations, "trees": trees}


def attempt(model: Path, output: Path) -> str:
    """Quantize in this process; return `done` or the code of the error."""
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
    """Flip a bit of a file of an unfinished work directory, or cut the journal; then resume."""
    from tests.disks import CountingDisk, Killed, using
    from tests.tiny import WORK, Case, killer

    chance = random.Random(seed)
    case, unfinished = Case(model, {}, []), folder / "unfinished"
    with suppress(Killed):
        case.run(unfinished / "out", report=killer(1))
    violations: list[str] = []
    files = [path for path in files_of(unfinished / WORK) if path.stat().st_size]
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
    """Flip a bit of a file of a finished checkpoint, which `gptq verify --full` must notice."""
    from gptq_cli.checkpoint.verify import verify_checkpoint
    from gptq_cli.errors import GptqError

    chance, missed = random.Random(seed), []
    files = files_of(golden)
    for _ in range(count):
        path = chance.choice(files)
        original = path.read_bytes()
        where, bit = chance.randrange(len(original)), chance.randrange(8)
        damaged = bytearray(original)
        damaged[where] ^= 1 << bit
        path.write_bytes(damaged)
        with suppress(GptqError):
            if verify_checkpoint(golden, full=True).ok:
                missed.append(f"bit {bit} of byte {where} of {path.name}")
        path.write_bytes(original)
    return {"flips": count, "files": len(files), "violations": missed}


def parse() -> argparse.Namespace:
    parser = argument_parser(__doc__)
    parser.add_argument("--kills", type=int, default=700, help="kills at random times")
    about = "least number of kills of each command after operations on the disk"
    parser.add_argument("--operation-kills", type=int, default=300, help=about)
    parser.add_argument("--sizes", type=int, default=50)
    parser.add_argument("--damages", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=ROOT / "docs" / "benchmarks" / "soak.json")
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--largest", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    chosen = parse()
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
    # six blocks, so that most of the time goes into blocks
    model = save_model(folder / "model", **SMALL | {"num_hidden_layers": 6})
    small = save_model(folder / "small", **SMALL)
    Case(model, {}, []).run(folder / "golden")
    golden = tree(folder / "golden")
    n_bytes = sum(path.stat().st_size for path in (folder / "golden").rglob("*"))
    result: dict[str, Any] = {"seed": chosen.seed}
    seed = chosen.seed
    parts: dict[str, Callable[[Path], dict[str, Any]]] = {
        "disk_sizes": lambda _: disk_sizes(model, golden, chosen.sizes, 2 * n_bytes),
        "damage": lambda work: damage(model, golden, work, chosen.damages, seed),
        "flipped_outputs": lambda _: flips(folder / "golden", chosen.damages, seed),
        "operation_kills": lambda work: killed_commands(small, work, chosen.operation_kills, seed),
        "random_kills": lambda work: kills(model, golden, work, chosen.kills, seed),
    }
    found_violations = False
    for name, part in parts.items():
        work = folder / name
        work.mkdir()
        part_started = time.time()
        found = part(work)
        result[name] = {**found, "seconds": round(time.time() - part_started)}
        print(f"{name}: {result[name]}", file=sys.stderr)
        if found.get("violations"):
            found_violations = True
    result["seconds"] = round(time.time() - started)
    shutil.rmtree(folder)
    write_json(chosen.json, result)
    if found_violations:
        sys.exit("violations were found")


if __name__ == "__main__":
    main()
