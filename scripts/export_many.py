"""Export several models for several targets, on all machines of a Ray cluster or one after another on this one.

    python scripts/export_many.py MODEL ... --target x86-cpu --target arm-cpu --out bundles
        [--cpus 2] [--memory-gb 8] [--address auto] [--in-turn] [--again] [--scheme S] [--kv K] [--compress RECIPE]

Ray (extra `cluster`) runs each export as a task with the given cores and memory. --address joins a cluster; without it,
one is started on this machine. All machines must see the models and the folder --out. Each export writes NAME-TARGET
and NAME-TARGET.json there: the request, and the bundle's digest or the error. A second run of the same command
continues the first: it exports only what failed or is missing. A failure stops no other export. Exit status 1 with
failures.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgelm.runtime import Bundle, EdgelmError
from edgelm.runtime.host.files import replacing


@dataclass(frozen=True)
class Job:
    """One export. out: the bundle's folder; the other fields are those of `ExportConfig`."""

    model: str
    target: str
    out: str
    scheme: str | None = None
    kv: str | None = None
    compress: str | None = None

    @property
    def record(self) -> Path:
        """The file with the outcome."""
        return Path(f"{self.out}.json")


@dataclass(frozen=True)
class Outcome:
    """The result of an export: the bundle's digest, or an error message."""

    digest: str | None
    error: str | None
    seconds: float


Runner = Callable[[Iterable[Job], argparse.Namespace], Iterator[tuple[Job, Outcome]]]


def main(words: list[str] | None = None) -> int:
    """Plan, export what is missing, print the outcomes. Returns the exit status."""
    arguments = parse(words)
    jobs = plan(arguments)
    left = [job for job in jobs if arguments.again or not is_done(job)]
    print(f"{len(jobs)} exports, {len(jobs) - len(left)} of them done before")
    failed = 0
    run: Runner = in_turn if arguments.in_turn else on_ray
    for job, outcome in run(left, arguments):
        failed += outcome.error is not None
        said = f"failed: {outcome.error}" if outcome.error else f"done, {outcome.seconds:.0f} s"
        print(f"{Path(job.out).name}: {said}", flush=True)
    print(f"{len(left) - failed} exported, {failed} failed")
    return 1 if failed else 0


def parse(words: list[str] | None) -> argparse.Namespace:
    """Parse the arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL", help="as for  edgelm export")
    parser.add_argument("--target", action="append", required=True, metavar="NAME", dest="targets")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the bundles")
    parser.add_argument("--scheme")
    parser.add_argument("--kv")
    parser.add_argument("--compress", metavar="RECIPE")
    parser.add_argument("--cpus", type=int, default=2, metavar="N", help="cores for an export (2)")
    parser.add_argument("--memory-gb", type=float, default=4.0, metavar="GB", help="memory for an export (4)")
    parser.add_argument("--address", metavar="ADDRESS", help="address of a Ray cluster, such as auto (start one here)")
    parser.add_argument("--in-turn", action="store_true", help="one after the other in this process, without Ray")
    parser.add_argument("--again", action="store_true", help="also export existing bundles")
    return parser.parse_args(words)


def plan(arguments: argparse.Namespace) -> list[Job]:
    """All exports, each model for each target. Raises: SystemExit, if two have the same output."""
    from edgelm.export.source.loading import short_name

    jobs = []
    for model, target in itertools.product(arguments.models, arguments.targets):
        out = arguments.out.resolve() / f"{short_name(model)}-{Path(target).stem}"
        jobs.append(Job(model, target, str(out), arguments.scheme, arguments.kv, arguments.compress))
    places = [job.out for job in jobs]
    twice = {place for place in places if places.count(place) > 1}
    if twice:
        raise SystemExit(f"two exports would be written to {min(twice)}: give them folders of their own with --out")
    return jobs


def is_done(job: Job) -> bool:
    """Return whether the bundle exists, complete and with the requested settings."""
    try:
        record = json.loads(job.record.read_text(encoding="utf-8"))
        return bool(record["asked"] == asdict(job) and record["digest"] == Bundle.open(job.out).manifest.digest)
    except (OSError, ValueError, LookupError, TypeError, EdgelmError):
        return False


def perform(job: Job) -> Outcome:
    """Export and record the outcome, on the machine where the task runs: nothing is lost if the driver ends."""
    from edgelm.export import ExportConfig, export_model

    started, digest, error = time.perf_counter(), None, None
    asked = asdict(job)
    try:
        digest = export_model(ExportConfig(**{**asked, "out": Path(job.out)}, force=True)).manifest.digest
    except Exception as failure:  # noqa: BLE001, no failure may stop other exports
        error = f"{type(failure).__name__}: {failure}"
    return written(job, Outcome(digest, error, round(time.perf_counter() - started, 1)))


def written(job: Job, outcome: Outcome) -> Outcome:
    """Write an outcome into the export's record."""
    record: dict[str, Any] = {"asked": asdict(job), **asdict(outcome)}
    job.record.parent.mkdir(parents=True, exist_ok=True)
    with replacing(job.record) as file:
        file.write((json.dumps(record, indent=1) + "\n").encode())
    return outcome


def in_turn(jobs: Iterable[Job], _: argparse.Namespace) -> Iterator[tuple[Job, Outcome]]:
    """Run the exports one after another in this process."""
    for job in jobs:
        yield job, perform(job)


def on_ray(jobs: Iterable[Job], arguments: argparse.Namespace) -> Iterator[tuple[Job, Outcome]]:
    """Run as tasks of a Ray cluster; yields in the order in which they end. A task whose process dies is retried
    once."""
    try:
        import ray
    except ImportError as error:
        raise SystemExit('Ray is not installed: pip install "edgelm[cluster]", or give --in-turn') from error
    ray.init(address=arguments.address, include_dashboard=False, log_to_driver=False)
    try:
        task = ray.remote(num_cpus=arguments.cpus, memory=int(arguments.memory_gb * 1e9), max_retries=1)(perform)
        under_way = {task.remote(job): job for job in jobs}
        while under_way:
            (ended,), _ = ray.wait(list(under_way), num_returns=1)
            job = under_way.pop(ended)
            try:
                yield job, ray.get(ended)
            except ray.exceptions.RayError as error:
                words = " ".join(str(error).split())
                yield job, written(job, Outcome(None, f"the process ended ({words[:300]})", 0.0))
    finally:
        ray.shutdown()


if __name__ == "__main__":
    raise SystemExit(main())
