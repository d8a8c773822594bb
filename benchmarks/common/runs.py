"""One runner, one record of a run, and the statistics of many."""

import json
import math
import multiprocessing
import os
import statistics
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import torch

from measure import environment

RESULTS = Path(__file__).parent.parent / "results"
Run = dict[str, Any]


class Estimate(NamedTuple):
    """A mean over seeds and half of its 95 % confidence interval, by Student's t."""

    mean: float
    half: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Estimate":
        """Of one value for each seed; a single one has an interval without end."""
        from scipy import stats

        mean = statistics.fmean(values)
        if len(values) < 2:
            return cls(mean, math.inf)
        return cls(mean, float(stats.sem(values) * stats.t.ppf(0.975, len(values) - 1)))

    def text(self, digits: int = 3) -> str:
        """For a table: ``0.883 ± 0.004``."""
        interval = f" ± {self.half:.{digits}f}" if math.isfinite(self.half) else ""
        return f"{self.mean:.{digits}f}{interval}"


def paired(ours: Mapping[int, float], theirs: Mapping[int, float]) -> float:
    """p of Student's paired t-test, two-sided, over the seeds that both have.

    It is nan for fewer than two seeds.
    """
    from scipy import stats

    seeds = sorted(ours.keys() & theirs.keys())
    if len(seeds) < 2:
        return math.nan
    return float(stats.ttest_rel([ours[s] for s in seeds], [theirs[s] for s in seeds]).pvalue)


def holm(values: Mapping[str, float]) -> dict[str, float]:
    """Holm's correction of p values for the number of comparisons; nan stays nan.

    See Holm 1979, doi 10.2307/4615733.
    """
    adjusted, floor = dict(values), 0.0
    known = [name for name in values if not math.isnan(values[name])]
    for place, name in enumerate(sorted(known, key=lambda name: values[name])):
        floor = adjusted[name] = max(floor, min(1.0, values[name] * (len(known) - place)))
    return adjusted


def select(runs: Iterable[Run], **settings: Any) -> list[Run]:
    """The runs that have these settings."""
    return [run for run in runs if all(run.get(key) == value for key, value in settings.items())]


def by_seed(runs: Iterable[Run], metric: str) -> dict[int, float]:
    """A metric of runs that differ by seed.

    Two runs of one seed are an error, since they differ in some setting.
    """
    result: dict[int, float] = {}
    for run in runs:
        if run["seed"] in result:
            raise ValueError(
                f"two runs of seed {run['seed']}: {run}; "
                "keep runs of other settings in a file of their own"
            )
        result[run["seed"]] = run[metric]
    return result


def by_rate(runs: Iterable[Run], metric: str) -> dict[float, list[float]]:
    """Of runs that differ by learning rate and seed: the metric at each rate.

    Rates where a run diverged are left out.
    """
    rates: dict[float, list[float]] = {}
    for run in runs:
        rates.setdefault(run["lr"], []).append(math.nan if run[metric] is None else run[metric])
    return {rate: rates[rate] for rate in sorted(rates) if all(map(math.isfinite, rates[rate]))}


def best_rate(runs: Iterable[Run], metric: str, largest: bool) -> float:
    """The learning rate with the best mean of a metric of the validation data."""
    means = {rate: statistics.fmean(values) for rate, values in by_rate(runs, metric).items()}
    return (max if largest else min)(means, key=lambda rate: means[rate])


def read(path: Path | None) -> dict[str, Any]:
    """A result file, or an empty result."""
    return json.loads(path.read_text()) if path and path.exists() else {"runs": []}


def write(path: Path | None, result: Mapping[str, Any]) -> None:
    """Write a result file at one stroke, one run a line; no path, no file."""
    if path:
        runs = ",\n".join(json.dumps(run) for run in result["runs"])
        rest = {key: value for key, value in result.items() if key != "runs"}
        head = json.dumps(rest, indent=1)[:-2]  # without the brace that closes it
        draft = path.with_suffix(".tmp")
        draft.write_text(f'{head},\n "runs": [\n{runs}\n]}}\n')
        os.replace(draft, path)


def finite(value: Any) -> Any:
    """The value, with None for each number inside that is not finite."""
    if isinstance(value, dict):
        return {key: finite(of_key) for key, of_key in value.items()}
    if isinstance(value, list):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def rate_text(rate: float, runs: Iterable[Run]) -> str:
    """A learning rate for a table, marked where it is the least or the largest that was tried."""
    rates = {run["lr"] for run in runs}
    return f"{rate:g}" + (" (edge)" if rate in (min(rates), max(rates)) else "")


def run_all(
    jobs: Sequence[Run], work: Callable[[Run], Run], path: Path | None, workers: int
) -> dict[str, Any]:
    """Run ``work`` on the settings of every job; return the result file's content.

    That is ``{"environment": ..., "runs": [...]}``. A run is one dict: its settings (every job has
    the same ones), what ``work`` returned, and the commit. The file is written after each run, and
    jobs that stand in it are not run again, so that an interrupted benchmark goes on where it was.
    ``workers`` processes of one thread each run jobs side by side; with 0 this process runs them,
    with the threads it has. Numbers that are not finite are written as null.
    """
    from tqdm import tqdm

    result = read(path) | {"environment": environment()}
    done = [{key: run[key] for key in jobs[0] if key in run} for run in result["runs"]]
    left = [job for job in jobs if job not in done]

    def keep(job: Run, outcome: Run) -> None:
        result["runs"].append({**job, **finite(outcome), "commit": result["environment"]["commit"]})
        write(path, result)

    with tqdm(total=len(jobs), initial=len(jobs) - len(left), unit="run", disable=None) as bar:
        if not workers:
            for job in left:
                keep(job, work(job))
                bar.update()
            return result
        with ProcessPoolExecutor(
            workers, multiprocessing.get_context("spawn"), torch.set_num_threads, (1,)
        ) as pool:
            futures = {pool.submit(work, job): job for job in left}
            try:
                for future in as_completed(futures):
                    keep(futures[future], future.result())
                    bar.update()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    return result


def get_parser(doc: str, *, seeds: int) -> ArgumentParser:
    """The command line that all experiments have."""
    parser = ArgumentParser(description=doc, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument(
        "--json",
        type=Path,
        metavar="PATH",
        help="result file; runs in it are not repeated (default: none)",
    )
    parser.add_argument(
        "--seeds", type=int, default=seeds, help=f"runs of each setting (default: {seeds})"
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=os.cpu_count() or 1,
        help="processes of one thread (default: one a core)",
    )
    parser.add_argument(
        "--quick", action="store_true", help="small runs, to see that everything works"
    )
    return parser
