"""The figures of the site: each function draws one, when the site is built."""

from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from gradsplit import Decoupling, ModalityDecoupledOptimizer, modality_combinations, rules
from gradsplit.sharing import fuse_available

WIDTH = 4.8  # inches: what a phone shows without shrinking the letters much
COLORS = {"sum": "0.45", "gmd": "tab:blue", "pcgrad": "tab:orange"}


def projection() -> None:
    """Two rows that conflict, their plain sum, and what gmd makes of them."""
    text, audio = torch.tensor([4.0, 0.0]), torch.tensor([-1.0, 1.0])
    weights = rules.gmd(torch.stack([text, audio]) @ torch.stack([text, audio]).T)
    _, axes = plt.subplots(figsize=(WIDTH, 3.4))
    _arrow(axes, text, "0.0", "$g_{text}$ = (4, 0)", (-38, -17))
    _arrow(axes, audio, "0.0", "$g_{audio}$ = (−1, 1)", (-16, 8))
    _arrow(axes, text + audio, COLORS["sum"], "sum (3, 1)", (36, 0))
    merged = weights[0] * text + weights[1] * audio
    _arrow(axes, merged, COLORS["gmd"], "gmd (2, 3)", (0, 6))
    for row, left in ((text, (2, 2)), (audio, (0, 1))):
        axes.plot(*zip(row.tolist(), left, strict=True), ":", color="tab:blue")
        axes.annotate("", left, (0, 0), arrowprops={"arrowstyle": "->", "color": "tab:blue"})
    # Whatever lies on the far side of this line raises audio's loss to first order.
    side = torch.tensor([[-0.9, -0.9], [4.6, 4.6]])
    axes.plot(*side.T, color="tab:red", lw=1)
    axes.fill([-0.9, 4.6, 4.6], [-0.9, 4.6, -0.9], color="tab:red", alpha=0.08, lw=0)
    axes.text(4.45, -0.75, "raises audio", color="tab:red", ha="right")
    axes.set(xlim=(-2.3, 4.6), ylim=(-0.9, 3.6), aspect="equal", yticks=range(4))


def _arrow(axes: plt.Axes, to: Tensor, color: str, label: str, shift: tuple[int, int]) -> None:
    axes.annotate(
        "", to.tolist(), (0, 0), arrowprops={"arrowstyle": "-|>", "color": color, "lw": 2}
    )
    axes.annotate(label, to.tolist(), shift, textcoords="offset points", color=color, ha="center")


def readme() -> None:
    """Write README's picture: :func:`projection`, and beside it the report of a real step.

    Called by hand: Sphinx's plots run this file as a script, and know no path of it.
    """
    opposed = [str(report) for report in _digits() if report.opposed()]
    report = min(opposed, key=len)  # few pairs conflict: it fits
    projection()
    figure, left = plt.gcf(), plt.gca()
    figure.set_size_inches(10.4, 2.9)
    left.set_position((0.01, 0.1, 0.36, 0.86))
    left.set_axis_off()
    figure.text(0.41, 0.9, "print(report), in training on digits", weight="bold", size=10)
    figure.text(0.41, 0.8, report, family="monospace", size=7.4, va="top", linespacing=1.7)
    figure.savefig(Path(__file__).with_name("readme.png"), dpi=150, facecolor="white")


def gramian() -> None:
    """The cosines of one step of a real training, and the norms."""
    report = max(_digits(), key=lambda report: report.angles().max().item())
    cosine, m = report.cosine(), len(report.names)
    _, axes = plt.subplots(figsize=(WIDTH, 4.6))
    axes.imshow(cosine, cmap="RdBu", vmin=-1, vmax=1)
    for j in range(m):
        for k in range(m):
            text = f"{report.norms()[j]:.2g}" if j == k else f"{cosine[j, k]:.2f}"
            dark = abs(cosine[j, k]) > 0.6
            axes.text(k, j, text, ha="center", va="center", color="white" if dark else "black")
    axes.set_xticks(range(m), report.names, rotation=45, ha="right")
    axes.set_yticks(range(m), report.names)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)


def angles() -> None:
    """Histograms of the angles between rows, before and after each projects out the others."""
    reports = _digits()
    orders = [rules.draw_order(len(r.names), seed=0, step=n) for n, r in enumerate(reports)]
    after = {
        "before": [r.gramian for r in reports],
        "after gmd": [_projected(r.gramian, None) for r in reports],
        "after pcgrad": [
            _projected(r.gramian, order) for r, order in zip(reports, orders, strict=True)
        ],
    }
    figure, panels = plt.subplots(3, figsize=(WIDTH, 5.6), sharex=True, sharey=True)
    for (title, gramians), axes in zip(after.items(), panels, strict=True):
        color = COLORS.get(title.removeprefix("after "), COLORS["sum"])
        found = torch.cat([_report(gramian).angles() for gramian in gramians])
        axes.hist(found.numpy(), bins=range(0, 181, 5), color=color)
        axes.axvline(90, color="black", lw=1)
        wide = (found > 90).double().mean()
        axes.set_title(f"{title}: {wide:.0%} above 90°", loc="left", fontsize=11)
    panels[-1].set(xlabel="angle between two rows, degrees", xticks=range(0, 181, 30))
    figure.supylabel("pairs of rows", fontsize=11)


def slides() -> None:
    """Two valleys that cross: gmd goes down both, the plain sum up the small one at first."""

    def text(p: Tensor) -> Tensor:
        return 10 * (p[1] - 0.2 * p[0] ** 2) ** 2

    def audio(p: Tensor) -> Tensor:
        return 0.3 * (p[0] - 1.8 + 0.8 * (p[1] - 0.65)) ** 2

    _compare(text, audio, start=(-1.8, 1.8), lr=0.02, steps=150)


def stops() -> None:
    """Two bowls with different bottoms: gmd stops where the gradients are opposite."""

    def text(p: Tensor) -> Tensor:
        return (p[0] + 1) ** 2 + p[1] ** 2

    def audio(p: Tensor) -> Tensor:
        return 0.25 * ((p[0] - 1) ** 2 + p[1] ** 2)

    _compare(text, audio, start=(0.9, 1.8), lr=0.05, steps=150)


def _compare(
    text: Callable[[Tensor], Tensor],
    audio: Callable[[Tensor], Tensor],
    start: tuple[float, float],
    lr: float,
    steps: int,
) -> None:
    """Gradient descent by each rule: the ways on the plain sum's map, and both losses."""
    _, (top, bottom) = plt.subplots(2, figsize=(WIDTH, 5.2), height_ratios=[1.4, 1])
    ticks = torch.linspace(-2.4, 2.4, 200)
    grid = torch.stack(torch.meshgrid(ticks, ticks, indexing="xy"))
    levels = torch.logspace(-2, 2, 18).tolist()
    top.contour(*grid, text(grid) + audio(grid), levels=levels, colors="0.8", linewidths=0.7)
    for rule in ("sum", "gmd"):
        point = torch.tensor(start, requires_grad=True)
        opt = ModalityDecoupledOptimizer(
            torch.optim.SGD([point], lr=lr), rule=rule, reduction="sum"
        )
        way, seen = [start], []
        for _ in range(steps):
            losses = opt.step({"text": text(point), "audio": audio(point)})
            seen.append([loss.item() for loss in losses.values()])
            way.append(tuple(point.tolist()))
        top.plot(*zip(*way, strict=True), ".-", color=COLORS[rule], label=rule, lw=1)
        for values, style, name in zip(
            zip(*seen, strict=True), "-:", ("text", "audio"), strict=True
        ):
            bottom.plot(values, style, color=COLORS[rule], label=f"{name}, {rule}")
    top.plot(*start, "o", color="black", label="start")
    top.set(xlim=(-2.4, 2.4), ylim=(-0.6, 2.2), aspect="equal", xticks=[], yticks=[])
    top.legend(loc="upper right", frameon=False)
    bottom.set(xlabel="step", ylabel="loss", yscale="log", ylim=(0.02, 30), yticks=(0.1, 1, 10))
    bottom.legend(frameon=False, ncols=2, fontsize=9)


def _digits(steps: int = 150, unit: float = 10.0) -> list[Decoupling]:
    """The reports of a training with the plain sum: two halves of digits, two tasks, three losses
    each. The second task, the ink, is in a unit that makes its gradients larger.
    """
    torch.manual_seed(0)
    pixels, digit = map(torch.from_numpy, load_digits(return_X_y=True))
    images = pixels.float().view(-1, 8, 8)
    ink = (images.sum((1, 2)) - images.sum((1, 2)).mean()) / unit
    halves = dict(zip(("left", "right"), (images / 16).split(4, dim=2), strict=True))
    encoders = nn.ModuleDict({name: nn.Linear(32, 16) for name in halves})
    trunk = nn.Sequential(nn.Tanh(), nn.Linear(16, 16), nn.Tanh())
    head = nn.Linear(16, 11)  # ten digits and the ink
    parameters = nn.ModuleList([encoders, trunk, head]).parameters()
    base = torch.optim.Adam(parameters, lr=3e-3)
    opt = ModalityDecoupledOptimizer(base, rule="sum", scope="all")
    combinations = modality_combinations(halves)
    reports = []
    for _ in range(steps):
        batch = torch.randint(len(digit), (16,))
        features = {n: trunk(encoders[n](half[batch].flatten(1))) for n, half in halves.items()}
        losses = {}
        fused = fuse_available(features, combinations=combinations)
        for combination, feature in zip(combinations, fused, strict=True):
            name, out = "+".join(combination), head(feature)
            losses[f"{name} digit"] = F.cross_entropy(out[:, :10], digit[batch].long())
            losses[f"{name} ink"] = F.mse_loss(out[:, 10], ink[batch])
        opt.step(losses)
        reports.append(opt.last)
    return reports


def _report(gramian: Tensor) -> Decoupling:
    ones = torch.ones(len(gramian))
    return Decoupling(tuple(map(str, range(len(gramian)))), (), ones, gramian, ones)


def _projected(gramian: Tensor, order: Tensor | None) -> Tensor:
    """The Gramian of the rows after each has met the others: all at once, or in an order."""
    m = len(gramian)
    coefficients = torch.eye(m, dtype=gramian.dtype)
    if order is None:
        coefficients -= gramian.clamp(max=0.0) / gramian.diagonal()
    else:
        for i in range(m):
            for j in order[i].tolist():
                inner = coefficients[i] @ gramian[:, j]
                if j != i and inner < 0:
                    coefficients[i, j] -= inner / gramian[j, j]
    return coefficients @ gramian @ coefficients.T
