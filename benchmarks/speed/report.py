"""What the speed benchmark reports: results.json, table.md and the pictures, from its rows."""

import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.runs import results
from benchmarks.speed import ways
from benchmarks.speed.goals import bandwidths, by_way, goals, multiples, power
from benchmarks.speed.pictures import draw_projection, draw_steps
from benchmarks.speed.ranks import DDP, SHARED
from benchmarks.speed.timing import Row, fit_exponent, paired_ratio

__all__ = ["write_report"]


def write_report(content: Mapping[str, Any], folder: Path) -> str:
    """Write results.json, table.md and the pictures into ``folder``; returns the table.

    Args:
        content: command, date, machine, environment, preset, sizes, and rows: of every part what
            each way took in each cell.
        folder: it exists.
    """
    rows, rounds = content["rows"], content["sizes"]["rounds"]
    toy = content["preset"] != "full"
    reached = [] if toy else goals(rows)  # toy sizes reach and miss nothing
    sections = [_header(content)]
    for part, section in _SECTIONS.items():
        if some := [row for row in rows if row["part"] == part]:
            sections += section(some, rounds)
    if reached:
        lines = [
            [goal["what"], f"{goal['sign']} {goal['wanted']:g}", goal["shown"], goal["verdict"]]
            for goal in reached
        ]
        header = ["ratio", "goal", "this run", ""]
        sections += ["## Goals", results.markdown_table(header, lines)]
    table = "\n\n".join(section.strip() for section in sections) + "\n"
    results.write_text(folder / results.TABLE, table)
    machine, title = content["machine"], f"torch {content['environment']['torch']}"
    title = f"{machine['gpu'] or machine['processor']}, threads: {machine['threads']}, {title}"
    title += ", TOY SIZES" * toy
    if projections := [row for row in rows if row.get("task") == "rows"]:
        draw_projection(folder / "projection.png", title, projections)
    if steps := [row for row in rows if "apart" in row]:
        draw_steps(folder / "step.png", title, steps)
    # Last: a folder that has it is finished.
    results.write_json(folder / results.RESULTS, {**content, "goals": reached})
    return table


def _header(content: Mapping[str, Any]) -> str:
    machine, versions = content["machine"], content["environment"]
    gpu = f"; {machine['gpu']}" if machine["gpu"] else ""
    load = f"; load of the machine at the end {machine['load']}" if machine["load"] else ""
    toy = "\n\n**Toy sizes: the numbers show that it runs, not how fast.**"
    return f"""\
# gradsplit: speed

    $ {content["command"]}

{content["date"]}. {machine["processor"]}{gpu}, cores: {machine["cores"]}, threads of torch: \
{machine["threads"]}{load}.
{", ".join(f"{name} {version}" for name, version in versions.items())}.
Times are the median (minimum-maximum) of the runs of one process, in which all ways take turns;
{content["sizes"]["rounds"]} runs each unless another number is given (×N): what takes seconds runs
less often. Ratios are medians over the rounds.{toy * (content["preset"] != "full")}"""


# --- a section per part: headings, notes and tables ----------------------------------------------


def _projection(rows: Sequence[Row], rounds: int) -> Iterator[str]:
    yield "## Projection alone"
    some = [row for row in rows if row["task"] == "rows"]
    cells, (read, *others) = _unique(some, "m", "n"), _unique(some, "way")
    lines = []
    for m, n in cells:
        taken = by_way(some, m=m, n=n)
        times = [_times(taken.get(way), rounds) for way in (read, *others)]
        ratios = [_number(paired_ratio(taken, way, read), 1) for way in others]
        lines.append([str(m), power(n), *times, *ratios])
    header = ["m", "n", *(f"{way} (ms)" for way in (read, *others))]
    header += [f"{way} / read" for way in others]
    yield results.markdown_table(header, lines)
    yield """\
Float32 rows, random, as a list of gradients per parameter (182 tensors, the U-Net's sizes scaled),
which ours copies into flat rows; then Gramian, GMD rule, merge. The copying pays a fixed price per
tensor, which is most of it where n is small. All others get one (m, n) matrix, and ours with rows
filled does too. One read: the sum of that matrix. The loop: PCGrad as its paper defines it, pair by
pair; left out where it would take many seconds, as all are where the rows take gigabytes."""
    yield "p of time ~ size^p, fitted where there are the most sizes:"
    yield _projection_growth(some)
    kernels = [
        [str(m), power(n), name, f"{fraction:.2f}"]
        for m, n in cells
        for name, fraction in bandwidths(rows, m, n).items()
    ]
    if kernels:
        yield "Bytes read and written per second, over those of a copy of the matrix:"
        yield results.markdown_table(["m", "n", "kernel", "fraction"], kernels)


def _projection_growth(rows: Sequence[Row]) -> str:
    """Exponents of the projection, along the row and the column with the most sizes."""
    lines = []
    for way in _unique(rows, "way"):
        line = [way]
        for axis, fixed in (("m", "n"), ("n", "m")):
            some = [row for row in rows if row["way"] == way]
            counts = Counter(row[fixed] for row in some)
            # The largest of those with the most sizes: far from where overheads rule.
            other = max(counts, key=lambda size: (counts[size], size))
            taken = {r[axis]: statistics.median(r["seconds"]) for r in some if r[fixed] == other}
            low, high = min(taken), max(taken)
            p = fit_exponent(list(taken), list(taken.values()))
            line.append(f"{p:.2f} ({axis} = {low:,} to {high:,} at {fixed} = {other:,})")
        lines.append(line)
    return results.markdown_table(["projection alone", "p against m", "p against n"], lines)


def _step(rows: Sequence[Row], rounds: int) -> Iterator[str]:
    yield """\
## Whole step

Forward and backward, without the optimizer's step. Ours with the GMD rule, TorchJD with PCGrad,
whose weights cost the least. "m backwards" takes the gradients and does nothing with them. k = 5:
another draw at each step. TorchJD's vmap has no batched backward of attention (sentiment): it runs
once per loss. Conflicts of: conflict_parameters, the U-Net's head or its last convolution before
that, the transformer's head or the last linear layer of its last block, the MLP's last layer or the
one before."""
    steps = [row for row in rows if "apart" in row]
    for task, apart in _unique(steps, "task", "apart"):
        some = [row for row in steps if (row["task"], row["apart"]) == (task, apart)]
        first, taken = some[0], by_way(some)
        how = "one forward per loss" if apart else "one forward for all losses"
        repeated = f"; each time is the mean of {first['repeats']} steps" * (first["repeats"] > 1)
        yield f"### {task}, m = {first['m']}, {how}"
        yield f"n = {first['n']:,} in {first['tensors']} tensors; {first['shape']}{repeated}."
        lines = []
        for row in some:
            backward = [a - b for a, b in zip(row["seconds"], row["forward"], strict=True)]
            times = [_times(one, rounds) for one in (row["forward"], backward, row["seconds"])]
            ratios = [paired_ratio(taken, row["way"], way) for way in (ways.PLAIN, ways.JOINT)]
            lines.append([row["way"], *times, *(_number(ratio) for ratio in ratios)])
        header = ["way", "forward (ms)", "backward (ms)", "both (ms)"]
        header += ["both / m backwards", "both / joint"]
        yield results.markdown_table(header, lines)
    forwards = [row for row in rows if row["task"] == "forwards"]
    yield f"### U-Net, forwards alone\n\n{forwards[0]['shape']}."
    lines = [[row["way"], _times(row["seconds"], rounds)] for row in forwards]
    yield results.markdown_table(["what", "time (ms)"], lines)


def _memory(rows: Sequence[Row], rounds: int) -> Iterator[str]:
    yield """\
## Memory

In multiples of n float32 elements. Live: at most alive at once of all tensors that the backward
made, m rows and all else. Resident: growth of the process over forward and backward, activations
included; each way in a process of its own, second step. On the CPU, with batches so small (U-Net:
16^3, batch 1; MLP: batch 2) that activations are little next to n. k = 5 has five rows. Encoders:
three private ones and a head of 0.1 %, one closure per combination, whose forward counts as
backward."""
    lines = []
    for row in sorted(rows, key=lambda row: str(row["task"])):
        taken = [multiples([row], kind).get(row["way"]) for kind in ("live", "resident")]
        shown = [*(_number(number) for number in taken), f"{row['n'] * 4 / 1e6:.1f}"]
        lines.append([row["task"], str(row["m"]), row["way"], *shown])
    header = ["model", "m", "way", "live / n", "resident / n", "n (MB)"]
    yield results.markdown_table(header, lines)


def _growth(rows: Sequence[Row], rounds: int) -> Iterator[str]:
    yield "## Growth\n\nForward and backward of the MLP; p of time ~ size^p, fitted to all."
    for along, fixed in (("m", "n"), ("n", "m")):
        some = [row for row in rows if row["along"] == along]
        more = " or little more" * (along == "m")
        yield f"Against {along}, {fixed} = {some[0][fixed]:,}{more}:"
        sizes, lines = _unique(some, along), list[list[str]]()
        for way in _unique(some, "way"):
            taken = [row["seconds"] for row in some if row["way"] == way]
            p = fit_exponent(sizes, [statistics.median(one) for one in taken])
            lines.append([way, *(_times(one, rounds) for one in taken), f"{p:.2f}"])
        header = ["way", *(f"{along} = {size:,} (ms)" for size in sizes), "p"]
        yield results.markdown_table(header, lines)


def _ranks(rows: Sequence[Row], rounds: int) -> Iterator[str]:
    yield f"""\
## Many ranks

The MLP on each of R ranks, processes of one thread on this machine, gloo; n = {rows[0]["n"]:,} or
little more. Sent: elements per rank and step, (R - 1) / R of what is reduce-scattered or gathered,
twice that of what is all-reduced, as NCCL's rings do. (gloo makes a reduce-scatter an all-reduce:
it sends m n (R - 1) / R more.) Expected: (m + 1) (R - 1) / R of ours, 2 m (R - 1) / R of DDP.
Messages: what has less than n / 100 elements. Live: at most alive at once of all that the backward
made, in float32 elements; of one forward m / R + 1 is expected for the rows and what is on its way,
and autograd's gradient is 1 more; that of the others holds their forwards too. DDP averages each of
its m backwards, each after a forward of its own, as closures have; "{SHARED}" has one for
all losses, which DDP cannot. Times of the slowest rank, forward and backward; more ranks than cores
take turns."""
    lines = []
    for row in rows:
        m, size, way = row["m"], row["ranks"], row["way"]
        travels = 2 * m if way == DDP else m + 1
        taken = by_way(rows, ranks=size, m=m)
        sent, live = (multiples([row], kind)[way] for kind in ("sent", "live"))
        lines.append(
            [
                str(size), str(m), way,
                f"{sent:.2f}", f"{travels * (size - 1) / size:.2f}", f"{live:.2f}",
                str(len(row["messages"])), str(sum(row["messages"])),
                _times(row["seconds"], rounds), _number(paired_ratio(taken, way, DDP)),
            ]
        )  # fmt: skip
    header = ["R", "m", "way", "sent / n", "expected", "live / n", "messages", "bytes", "time (ms)"]
    yield results.markdown_table([*header, "time / DDP"], lines)


_SECTIONS: Mapping[str, Callable[[Sequence[Row], int], Iterator[str]]] = {
    "projection": _projection, "step": _step, "memory": _memory, "growth": _growth, "ranks": _ranks,
}  # fmt: skip


def _unique(rows: Sequence[Row], *keys: str) -> list[Any]:
    """What there is, in order: values of one key, tuples of several."""
    found = dict.fromkeys(tuple(row[key] for key in keys) for row in rows)
    return list(found) if len(keys) > 1 else [value for (value,) in found]


def _number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _times(seconds: Sequence[float] | None, rounds: int) -> str:
    """In ms, median (minimum-maximum), and how many there are if not all."""
    if seconds is None:
        return "-"
    low, middle, high = (
        1e3 * value for value in (min(seconds), statistics.median(seconds), max(seconds))
    )
    # Three digits of the median, and as many decimals for all.
    digits = min(3, max(0, 2 - math.floor(math.log10(middle)))) if middle > 0 else 0
    fewer = "" if len(seconds) == rounds else f" ×{len(seconds)}"
    return f"{middle:.{digits}f} ({low:.{digits}f}-{high:.{digits}f}){fewer}"
