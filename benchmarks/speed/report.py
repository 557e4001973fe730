"""What the speed benchmark reports: tables, goals, pictures. Everything from the numbers alone."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib import style
from matplotlib.figure import Figure  # without pyplot: it draws by Agg and needs no display

from benchmarks.runs import results
from benchmarks.runs.pictures import (
    BLACK,
    BLUE,
    GREEN,
    ORANGE,
    PURPLE,
    RED,
    SKY,
    STYLE,
    finish,
    legend_of,
)
from benchmarks.speed.ranks import DDP, SHARED, WAYS
from benchmarks.speed.timing import fit_exponent, paired_ratio
from benchmarks.speed.ways import (
    AUTOGRAM,
    AUTOJAC,
    BATCHED,
    COPY,
    EXACT,
    FILLED,
    FUSED,
    GROWING,
    HALF,
    JD_PCGRAD,
    JOINT,
    KERNELS,
    LOOP,
    METHODS,
    ON_BLOCK,
    ON_HEAD,
    OURS,
    PLAIN,
    PROJECTIONS,
    READ,
    SAMPLED,
    VMAP,
)

__all__ = ["PARTS", "Goal", "goals", "write_report"]

PARTS = ("projection", "step", "memory", "growth", "ranks")
Content = Mapping[str, Any]
"""What results.json holds; see ``benchmarks.speed.main``."""

_MS, _S = 1e3, 1.0


# --- goals ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Goal:
    """A ratio that is wanted to be at most, or at least, so much.

    Attributes:
        what: in words.
        sign: "<=" or ">=".
        wanted: the goal.
        measured: in this run; None where it was not measured.
    """

    what: str
    sign: str
    wanted: float
    measured: float | None

    @property
    def verdict(self) -> str:
        if self.measured is None:
            return "not measured"
        shown = float(self.shown)  # what a reader compares
        above, equal = shown >= self.wanted, shown == self.wanted
        return "reached" if equal or above == (self.sign == ">=") else "NOT REACHED"

    @property
    def shown(self) -> str:
        return "-" if self.measured is None else f"{self.measured:.3g}"


def goals(parts: Mapping[str, Any]) -> list[Goal]:
    """All that gradsplit wants to reach, with what this run found."""
    found = [*_projection_goals(parts), *_step_goals(parts), *_memory_goals(parts)]
    found += _ranks_goals(parts)
    return [Goal(what, sign, wanted, measured) for what, sign, wanted, measured in found]


_Found = list[tuple[str, str, float, float | None]]


def _projection_goals(parts: Mapping[str, Any]) -> _Found:
    cells = {c["columns"]: c for c in parts.get("projection", []) if c["rows"] == 15}
    seconds: dict[int, Mapping[str, Sequence[float]]]
    seconds = {columns: cell["seconds"] for columns, cell in cells.items()}
    found: _Found = []
    for columns, wanted in ((100_000, 40), (1_000_000, 12), (5_000_000, 9)):
        taken = seconds.get(columns, {})
        what = f"copying, Gramian and merge over one read (m = 15, n = {_power(columns)})"
        found.append((what, "<=", wanted, _ratio(taken, FUSED if FUSED in taken else OURS, READ)))
    taken, where = seconds.get(5_000_000, {}), "(m = 15, n = 5e6)"
    found += [
        (f"pairwise loop over ours, rows filled {where}", ">=", 40, _ratio(taken, LOOP, FILLED)),
        (f"TorchJD's PCGrad over ours, rows filled {where}", ">=", 2.5,
         _ratio(taken, JD_PCGRAD, FILLED)),
    ]  # fmt: skip
    for name, fraction in _fractions(cells.get(20_000_000, {})).items():
        found.append((f"{name}: bandwidth over a copy's (m = 15, n = 2e7)", ">=", 0.8, fraction))
    return found


def _step_goals(parts: Mapping[str, Any]) -> _Found:
    step = parts.get("step", {"scenes": [], "forwards": {}})
    found: _Found = []
    for scene, m, wanted in (
        ("small MLP", 4, 1.7), ("MLP", 8, 1.7), ("sentiment", 7, 1.06), ("U-Net", 15, 1.03)
    ):  # fmt: skip
        times = _scene(step, scene, m, False)
        what = f"our exact step over m plain backwards ({scene}, m = {m})"
        plain = _fastest(times, (PLAIN, BATCHED))
        found.append((what, "<=", wanted, _ratio(times, EXACT, plain)))
    whole, whole_apart = (_scene(step, "U-Net", 15, apart) for apart in (False, True))
    forwards = step["forwards"]
    evaluation = "evaluation, all combinations"
    return [
        *found,
        ("our step over TorchJD's fastest, one forward per loss (U-Net, m = 15)", "<=", 0.2,
         _ratio(whole_apart, EXACT, _fastest(whole_apart, (AUTOJAC, VMAP, AUTOGRAM)))),
        ("conflict_parameters (head) step over the joint step (U-Net, m = 15)", "<=", 1.3,
         _ratio(whole, ON_HEAD, JOINT)),
        ("conflict_parameters (last block) step over the joint step (U-Net, m = 15)", "<=", 1.3,
         _ratio(whole, ON_BLOCK, JOINT)),
        ("k = 5 step over the joint step (U-Net, m = 15)", "<=", 2.3,
         _ratio(whole, SAMPLED, JOINT)),
        ("forward of all modalities over a loop over them (U-Net)", "<=", 1.0,
         _ratio(forwards, "forward, all modalities", "loop over modalities")),
        ("evaluation of 15 combinations over four branch passes (U-Net)", "<=", 1.15,
         _ratio(forwards, evaluation, "one pass per modality, no gradients")),
    ]  # fmt: skip


def _memory_goals(parts: Mapping[str, Any]) -> _Found:
    found: _Found = []
    for task, m in (("MLP", 8), ("U-Net", 15)):
        live = _multiples(parts, task, m, "live")
        what = f"live gradients in multiples of n ({task}, m = {m})"
        found.append((f"{what}, goal m + 1", "<=", m + 1, live.get(EXACT)))
        what += ", bfloat16 rows, goal (m + 2) / 2 + 0.1"  # a buffer of half a megabyte
        found.append((what, "<=", (m + 2) / 2 + 0.1, live.get(HALF)))
    for kind in ("live", "resident"):
        taken = _multiples(parts, "encoders", 7, kind)
        above = taken[EXACT] - taken[PLAIN] if {EXACT, PLAIN} <= taken.keys() else None
        what = f"{kind} above a plain loop in multiples of n (private encoders, m = 7)"
        found.append((what, "<=", 2, above))
    return found


def _ranks_goals(parts: Mapping[str, Any]) -> _Found:
    cells = {(cell["ranks"], cell["losses"]): cell for cell in parts.get("ranks", [])}
    cell, where = cells.get((4, 15)), "in multiples of n (MLP, m = 15, R = 4), goal"
    sent, live = (None, None) if cell is None else _per_element(cell)
    return [
        (f"sent per rank and step {where} (m + 1) (R - 1) / R", "<=", 12, sent),
        (f"live bytes of a rank {where} m / R + 1 and a gradient", "<=", 5.75, live),
    ]


def _per_element(cell: Mapping[str, Any]) -> tuple[float, float]:
    """Sent and live, in multiples of n float32 elements."""
    return cell["sent"] / cell["elements"], cell["live"] / cell["elements"] / 4


def _ratio(
    seconds: Mapping[str, Sequence[float]], above: str | None, below: str | None
) -> float | None:
    if above is None or below is None or above not in seconds or below not in seconds:
        return None
    return paired_ratio(seconds[above], seconds[below])


def _fastest(seconds: Mapping[str, Sequence[float]], names: Sequence[str]) -> str | None:
    there = [name for name in names if name in seconds]
    return min(there, key=lambda name: statistics.median(seconds[name]), default=None)


def _scene(step: Mapping[str, Any], name: str, m: int, apart: bool) -> dict[str, list[float]]:
    for scene in step["scenes"]:
        if (scene["scene"], scene["losses"], scene["apart"]) == (name, m, apart):
            return _whole(scene["seconds"])
    return {}


def _whole(scene: Mapping[str, Any]) -> dict[str, list[float]]:
    """Seconds of forward and backward together."""
    return {
        name: [a + b for a, b in zip(taken["forward"], taken["backward"], strict=True)]
        for name, taken in scene.items()
    }


def _multiples(parts: Mapping[str, Any], task: str, m: int, kind: str) -> dict[str, float]:
    """By method, "live" or "resident" memory in multiples of n float32 elements."""
    return {
        entry["method"]: entry[kind] / entry["elements"] / 4
        for entry in parts.get("memory", [])
        if entry["task"] == task and entry["losses"] == m and entry[kind] is not None
    }


def _fractions(cell: Mapping[str, Any]) -> dict[str, float]:
    """By kernel: the bandwidth that it reaches over that of a copy."""
    seconds: Mapping[str, Sequence[float]] = cell.get("kernels", {})
    moved = {name: rows(cell["rows"]) for name, (rows, _) in KERNELS.items() if name in seconds}
    return {
        name: paired_ratio(seconds[COPY], seconds[name]) * moved[name] / moved[COPY]
        for name in moved
        if name != COPY
    }


def _power(columns: int) -> str:
    return f"{columns:.0e}".replace("e+0", "e")


# --- tables --------------------------------------------------------------------------------------


def write_report(content: Content, folder: Path) -> str:
    """Write results.json, table.md and the pictures into ``folder``; returns the table."""
    parts = content["parts"]
    reached = [] if content["quick"] else goals(parts)  # toy sizes reach and miss nothing
    results.write_json(
        folder / results.RESULTS,
        {**content, "goals": [{**vars(goal), "verdict": goal.verdict} for goal in reached]},
    )
    tables = [_header(content)]
    tables += [_TABLES[part](parts[part], content) for part in PARTS if part in parts]
    if reached:
        tables.append(_goal_table(reached))
    table = "\n".join(tables)
    results.write_text(folder / results.TABLE, table)
    title = _title(content)
    if "projection" in parts:
        panels = _projection_panels(parts["projection"])
        draw_projection(folder / "projection.png", title, panels)
    if "step" in parts:
        draw_steps(folder / "step.png", title, _step_panels(parts["step"]))
    return table


def _title(content: Content) -> str:
    machine = content["machine"]
    where = machine["gpu"] or f"{machine['processor']}, {_count(machine['threads'], 'thread')}"
    quick = ", TOY SIZES (--quick)" if content["quick"] else ""
    return f"{where}, torch {content['environment']['torch']}{quick}"


def _header(content: Content) -> str:
    machine, versions = content["machine"], content["environment"]
    lines = [
        "# gradsplit: speed",
        "",
        f"    $ {content['command']}",
        "",
        f"{content['date']}. {machine['processor']}, {_count(machine['cores'], 'core')}, "
        f"{_count(machine['threads'], 'thread')} for torch"
        + (f"; {machine['gpu']}" if machine["gpu"] else "")
        + (f"; load of the machine at the end {machine['load']}" if machine["load"] else "")
        + ".",
        ", ".join(f"{name} {version}" for name, version in versions.items()) + ".",
        "Times are the median (minimum-maximum) of the runs of one process, in which all methods "
        "take turns;",
        f"{content['sizes']['rounds']} runs each unless another number is given (×N): what takes "
        "seconds runs less often. Ratios",
        "are medians over the rounds.",
    ]
    if content["quick"]:
        lines += ["", "**Toy sizes (--quick): the numbers show that it runs, not how fast.**"]
    return "\n".join(lines) + "\n"


def _projection_table(cells: Sequence[Mapping[str, Any]], content: Content) -> str:
    names = [name for name in PROJECTIONS if any(_knows(cell, name) for cell in cells)]
    rows = []
    for cell in cells:
        line = [str(cell["rows"]), _power(cell["columns"])]
        for name in names:
            if name in cell["seconds"]:
                line.append(_times(cell["seconds"][name], content, _MS))
            else:
                line.append("-")
        for name in names[1:]:
            ratio = _ratio(cell["seconds"], name, READ)
            line.append("-" if ratio is None else f"{ratio:.1f}")
        rows.append(line)
    header = ["m", "n", *(f"{name} (ms)" for name in names), *(f"{n} / read" for n in names[1:])]
    table = results.markdown_table(header, rows)
    notes = [
        "Float32 rows, random, as a list of gradients per parameter (182 tensors, the U-Net's "
        "sizes scaled), which",
        "ours copies into flat rows; then Gramian, GMD rule, merge. The copying pays a fixed price "
        "per tensor, which",
        "is most of it where n is small. All others get one (m, n) matrix, and ours with rows "
        "filled does too. One read:",
        "the sum of that matrix. The loop: PCGrad as its paper defines it, pair by pair.",
    ]
    left = [
        f"m = {cell['rows']}, n = {_power(cell['columns'])}: "
        + (f"no {LOOP}: it " if len(cell["skipped"]) == 1 else "nothing: ")
        + next(iter(cell["skipped"].values()))
        for cell in cells
        if cell["skipped"]
    ]
    if left:
        notes += ["Left out: " + ";\n".join(left) + "."]
    if FUSED not in names:
        notes.append("Ours, fused: on a GPU only.")
    kernels = [
        [str(cell["rows"]), _power(cell["columns"]), name, f"{fraction:.2f}"]
        for cell in cells
        for name, fraction in _fractions(cell).items()
    ]
    if kernels:
        notes += ["", "Bytes read and written per second, over those of a copy of the matrix:", ""]
        notes.append(results.markdown_table(["m", "n", "kernel", "fraction"], kernels))
    return "\n## Projection alone\n\n" + table + "\n" + "\n".join(notes) + "\n"


def _knows(cell: Mapping[str, Any], name: str) -> bool:
    return name in cell["seconds"] or name in cell["skipped"]


def _step_table(step: Mapping[str, Any], content: Content) -> str:
    sizes = content["sizes"]
    text = (
        "\n## Whole step\n\n"
        "Forward and backward, without the optimizer's step. Ours with the GMD rule, TorchJD with "
        'PCGrad, whose weights\ncost the least. "m backwards" takes the gradients and does '
        "nothing with them. k = 5: another draw at each step.\n"
        "TorchJD's vmap has no batched backward of attention (sentiment): it runs once per loss.\n"
        "Conflicts of: conflict_parameters, the U-Net's head or its last convolution before that, "
        "the transformer's head or\nthe last linear layer of its last block, the MLP's last layer "
        "or the one before.\n"
    )
    for scene in step["scenes"]:
        whole = _whole(scene["seconds"])
        rows = []
        for name, taken in scene["seconds"].items():
            back = {other: times["backward"] for other, times in scene["seconds"].items()}
            rows.append(
                [
                    name,
                    *(_times(taken[stage], content, _MS) for stage in ("forward", "backward")),
                    _times(whole[name], content, _MS),
                    f"{_ratio(back, name, PLAIN):.2f}",
                    f"{_ratio(whole, name, PLAIN):.2f}",
                    f"{_ratio(whole, name, JOINT):.2f}",
                ]
            )
        header = [
            "method", "forward (ms)", "backward (ms)", "both (ms)",
            "backward / m backwards", "both / m backwards", "both / joint",
        ]  # fmt: skip
        shape = _shape_of(scene, sizes)
        text += f"\n### {_scene_title(scene)}\n\n{shape}\n\n"
        text += results.markdown_table(header, rows)
    rows = [[name, _times(taken, content, _MS)] for name, taken in step["forwards"].items()]
    text += f"\n### U-Net, forwards alone\n\n{sizes['crop']}^3, batch {sizes['batch']}.\n\n"
    return text + results.markdown_table(["what", "time (ms)"], rows)


def _scene_title(scene: Mapping[str, Any]) -> str:
    how = "one forward per loss" if scene["apart"] else "one forward for all losses"
    return f"{scene['scene']}, m = {scene['losses']}, {how}"


def _shape_of(scene: Mapping[str, Any], sizes: Mapping[str, Any]) -> str:
    crop = sizes["crop_apart"] if scene["apart"] else sizes["crop"]
    shapes = {
        "U-Net": f"crop {crop}^3, batch {sizes['batch']}, width {sizes['width']}",
        "sentiment": f"{sizes['frames']} frames, batch {sizes['utterances']}, no dropout",
        "MLP": f"width {sizes['mlp'][1]}, batch {sizes['utterances']}",
        "small MLP": f"width {sizes['small_mlp'][1]}, batch {sizes['utterances']}; each time is "
        f"the mean of {sizes['repeats']} steps",
    }
    return f"n = {scene['elements']:,} in {scene['tensors']} tensors; {shapes[scene['scene']]}."


def _memory_table(entries: Sequence[Mapping[str, Any]], content: Content) -> str:
    rows = [
        [
            entry["task"],
            str(entry["losses"]),
            entry["method"],
            *(
                "-" if entry[kind] is None else f"{entry[kind] / entry['elements'] / 4:.2f}"
                for kind in ("live", "resident")
            ),
            f"{entry['elements'] * 4 / 1e6:.1f}",
        ]
        for entry in entries
    ]
    header = ["model", "m", "method", "live / n", "resident / n", "n (MB)"]
    return (
        "\n## Memory\n\n"
        "In multiples of n float32 elements. Live: at most alive at once of all tensors that the "
        "backward made, m rows\nand all else. Resident: growth of the process over forward and "
        "backward, activations included; each method in a\nprocess of its own, second step. On "
        "the CPU, with batches so small (U-Net: 16^3, batch 1; MLP: batch 2) that\nactivations "
        "are little next to n. k = 5 has five rows. Encoders: three private ones and a head of "
        "0.1 %, one closure\nper combination, whose forward counts as backward.\n\n"
        + results.markdown_table(header, rows)
    )


def _growth_table(cells: Sequence[Mapping[str, Any]], content: Content) -> str:
    text = "\n## Growth\n\nForward and backward of the MLP; p of time ~ size^p, fitted to all.\n"
    for along, size in (("m", "losses"), ("n", "elements")):
        some = [cell for cell in cells if cell["along"] == along]
        fixed = (
            f"n = {some[0]['elements']:,} or little more" if along == "m"
            else f"m = {some[0]['losses']}"
        )  # fmt: skip
        sizes = [cell[size] for cell in some]
        rows = []
        for name in GROWING:
            times = [statistics.median(cell["seconds"][name]) for cell in some]
            shown = [_times(cell["seconds"][name], content, _MS) for cell in some]
            rows.append([name, *shown, f"{fit_exponent(sizes, times):.2f}"])
        header = ["method", *(f"{along} = {value:,} (ms)" for value in sizes), "p"]
        text += f"\nAgainst {along}, {fixed}:\n\n" + results.markdown_table(header, rows)
    return text + _projection_growth(content["parts"].get("projection", []))


def _projection_growth(cells: Sequence[Mapping[str, Any]]) -> str:
    """Exponents of the projection, along the row and the column with the most sizes."""
    rows = []
    for name in PROJECTIONS:
        times = {
            (cell["rows"], cell["columns"]): statistics.median(cell["seconds"][name])
            for cell in cells
            if name in cell["seconds"]
        }
        line = [name]
        for axis in (0, 1):
            by_other: dict[int, list[tuple[int, int]]] = {}
            for key in times:
                by_other.setdefault(key[1 - axis], []).append(key)
            # The largest of those with the most sizes: far from where overheads rule.
            other = max(by_other, key=lambda k: (len(by_other[k]), k), default=None)
            keys = [] if other is None else sorted(by_other[other])
            if len(keys) < 2:
                line.append("-")
                continue
            p = fit_exponent([key[axis] for key in keys], [times[key] for key in keys])
            sizes = f"{keys[0][axis]:,} to {keys[-1][axis]:,}"
            line.append(f"{p:.2f} ({'mn'[axis]} = {sizes} at {'nm'[axis]} = {other:,})")
        if times:
            rows.append(line)
    if not rows:
        return ""
    header = ["projection alone", "p against m", "p against n"]
    return "\nThe projection, from the first part:\n\n" + results.markdown_table(header, rows)


def _ranks_table(cells: Sequence[Mapping[str, Any]], content: Content) -> str:
    rows = []
    for cell in cells:
        m, size, messages, seconds = (
            cell[key] for key in ("losses", "ranks", "messages", "seconds")
        )
        sent, live = _per_element(cell)
        numbers = [
            sent, (m + 1) * (size - 1) / size, cell["sent_by_ddp"] / cell["elements"],
            2 * m * (size - 1) / size, live, m / size + 1,
        ]  # fmt: skip
        rows.append(
            [
                str(size), str(m), *(f"{number:.2f}" for number in numbers),
                f"{len(messages)}: {min(messages)} to {max(messages)}",
                *(_times(seconds[way], content, _MS) for way in WAYS),
                *(f"{_ratio(seconds, way, DDP):.2f}" for way in WAYS[:-1]),
            ]
        )  # fmt: skip
    header = [
        "R", "m", "sent / n", "(m + 1) (R - 1) / R", "sent by DDP / n", "2 m (R - 1) / R",
        "live / n", "m / R + 1", "messages: bytes", *(f"{way} (ms)" for way in WAYS),
        *(f"{way} / DDP" for way in WAYS[:-1]),
    ]  # fmt: skip
    layers, width = content["sizes"]["mlp"][0], content["sizes"]["memory"][0]
    return (
        "\n## Many ranks\n\n"
        f"The MLP, {layers} layers of width {width}, n = {cells[0]['elements']:,} or little more; "
        f"batch {content['sizes']['utterances']} on each of R ranks, processes of\none thread on "
        "this machine, gloo. Sent: elements per rank and step, (R - 1) / R of what is "
        "reduce-scattered or gathered, twice\nthat of what is all-reduced, as NCCL's rings do. "
        "(gloo makes a reduce-scatter an all-reduce: it sends m n (R - 1) / R\nmore.) "
        "Messages: what has less than n / 100 elements. Live: at most alive at once of all that\n"
        "the backward made, in float32 elements; m / R + 1 is for the rows and "
        "what is on its way, and autograd's gradient is\n1 more. DDP averages each of its m "
        f'backwards, each after a forward of its own, as closures have; "{SHARED}"\nhas one for '
        "all losses, which DDP cannot. Times of the slowest rank, forward and backward; more ranks "
        "than cores take\n"
        "turns.\n\n" + results.markdown_table(header, rows)
    )


def _goal_table(reached: Sequence[Goal]) -> str:
    rows = [
        [
            goal.what,
            f"{goal.sign} {goal.wanted:g}",
            goal.shown,
            goal.verdict,
        ]
        for goal in reached
    ]
    header = ["ratio", "goal", "this run", ""]
    return "\n## Goals\n\n" + results.markdown_table(header, rows)


_TABLES: Mapping[str, Callable[[Any, Content], str]] = {
    "projection": _projection_table,
    "step": _step_table,
    "memory": _memory_table,
    "growth": _growth_table,
    "ranks": _ranks_table,
}


def _times(seconds: Sequence[float], content: Content, factor: float) -> str:
    """Median (minimum-maximum), and how many there are if not all."""
    low, middle, high = (
        factor * value for value in (min(seconds), statistics.median(seconds), max(seconds))
    )
    # Three digits of the median, and as many decimals for all.
    digits = max(0, 2 - math.floor(math.log10(middle))) if middle > 0 else 0
    digits = min(digits, 3)
    fewer = "" if len(seconds) == content["sizes"]["rounds"] else f" ×{len(seconds)}"
    return f"{middle:.{digits}f} ({low:.{digits}f}-{high:.{digits}f}){fewer}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")


# --- pictures ------------------------------------------------------------------------------------


def _projection_panels(
    cells: Sequence[Mapping[str, Any]],
) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """By m and method: (n, time over one read)."""
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for m in sorted({cell["rows"] for cell in cells}):
        panel: dict[str, list[tuple[float, float]]] = {}
        for name in PROJECTIONS:
            points = [
                (float(cell["columns"]), ratio)
                for cell in cells
                if cell["rows"] == m and name != READ
                and (ratio := _ratio(cell["seconds"], name, READ)) is not None
            ]  # fmt: skip
            if points:
                panel[name] = points
        if panel:
            panels[f"{m} rows"] = panel
    return panels


def _step_panels(
    step: Mapping[str, Any],
) -> dict[str, dict[str, tuple[float, float, float]]]:
    """By scene and method: lowest, median and highest ratio to the joint step."""
    panels = {}
    names = [method.name for method in METHODS if method.name != JOINT]
    for scene in step["scenes"]:
        whole = _whole(scene["seconds"])
        panel = {}
        for name in names:
            if name in whole:
                ratios = [a / b for a, b in zip(whole[name], whole[JOINT], strict=False)]
                panel[name] = (min(ratios), statistics.median(ratios), max(ratios))
        panels[_scene_title(scene)] = panel
    return panels


def draw_projection(
    path: Path,
    title: str,
    panels: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]],
) -> None:
    """Time of a projection over one read of its data, against n: a panel per number of rows.

    Args:
        path: the file to write.
        title: of the whole picture.
        panels: by the panel's title: by method, (n, ratio); both axes are logarithmic.
    """
    methods = list(dict.fromkeys(method for panel in panels.values() for method in panel))
    with style.context(STYLE):
        figure = Figure(figsize=(max(7.0, 1.0 + 2.6 * len(panels)), 4.4))
        axes = figure.subplots(1, max(1, len(panels)), sharex=True, sharey=True, squeeze=False)[0]
        for axis, (name, panel) in zip(axes, panels.items(), strict=False):
            for method, points in panel.items():
                axis.plot(*zip(*points, strict=True), label=method, **_speed_look(method, methods))
            axis.axhline(1, color=BLACK, linestyle=(0, (4, 3)), linewidth=1.2, label="one read")
            axis.set_xscale("log")
            axis.set_yscale("log")
            axis.set_title(name)
            axis.set_xlabel("n")
        axes[0].set_ylim(bottom=0.7)
        axes[0].yaxis.set_major_formatter("{x:g}")
        axes[0].set_ylabel("time / one read of the data")
        finish(
            figure,
            path,
            "Projection alone: from rows to the merged gradient\n" + title,
            *legend_of(axes),
        )


def draw_steps(
    path: Path,
    title: str,
    panels: Mapping[str, Mapping[str, tuple[float, float, float]]],
) -> None:
    """Ratios of steps to the joint step: two panels side by side, a line per method.

    Args:
        path: the file to write.
        title: of the whole picture.
        panels: by the panel's title: by method, the lowest, median and highest ratio.
    """
    methods = list(dict.fromkeys(method for panel in panels.values() for method in panel))
    with style.context(STYLE):
        lines = -(-len(panels) // 2)
        figure = Figure(figsize=(12.0, (0.55 + 0.24 * len(methods)) * lines + 1.0))
        axes = figure.subplots(lines, 2, sharex=True, sharey=True, squeeze=False)
        # Down the left column, then down the right one.
        for axis, (name, panel) in zip(axes.T.flat, panels.items(), strict=False):
            for place, method in enumerate(methods):
                if method in panel:
                    low, middle, high = panel[method]
                    color = _speed_look(method, methods)["color"]
                    axis.plot([low, high], [place, place], color=color, linewidth=2, alpha=0.45)
                    axis.plot(middle, place, marker="o", color=color, markersize=6)
                    number = f"{middle:.2f}" if middle < 10 else f"{middle:.1f}"
                    axis.annotate(
                        number, (high, place), (7, 0), textcoords="offset points", va="center",
                        fontsize=9, bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8},
                    )  # fmt: skip
            axis.axvline(1, color=BLACK, linestyle=(0, (4, 3)), linewidth=1.2)
            axis.set_xscale("log")
            axis.xaxis.set_major_formatter("{x:g}")
            axis.set_title(name)
            axis.grid(axis="y", visible=False)
        axes[0][0].set_yticks(range(len(methods)), methods)
        axes[0][0].set_ylim(len(methods) - 0.5, -0.5)
        low, high = axes[0][0].get_xlim()
        axes[0][0].set_xlim(low, high * 1.5)  # room for the numbers
        for axis in axes[-1]:
            axis.set_xlabel("time / joint step (bar: minimum to maximum)")
        finish(
            figure, path, "Forward and backward against one of the summed losses\n" + title, [], []
        )


def _speed_look(method: str, methods: Sequence[str]) -> dict[str, Any]:
    """Ours in red, TorchJD in blue and its neighbours, anything else in grey and black."""
    families = {
        "ours": (RED, ORANGE, "#8C5A00", PURPLE, "#882255"),
        "TorchJD": (BLUE, SKY, GREEN, "#004466"),
        "": ("#7F7F7F", BLACK, "#B0B0B0"),
    }
    family = next(name for name in families if method.startswith(name))
    others = [name for name in methods if next(f for f in families if name.startswith(f)) == family]
    place = others.index(method)
    marker = {"ours": "D", "TorchJD": "o", "": "s"}[family]
    colors = families[family]
    return {
        "color": colors[place % len(colors)], "marker": marker, "markersize": 5, "linewidth": 1.6,
        "linestyle": ("-", "--", ":")[place % 3],
    }  # fmt: skip
