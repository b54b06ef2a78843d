"""The pictures of README and docs, from the result files."""

from __future__ import annotations

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from arena_tables import SCOPES, arena_rows, mean, methods_of
from result_tables import RESULTS, ROOT, load

COLOURS = 10  # in a plot's cycle


def draw_curve() -> None:
    """Accuracy and speed-up of the training-free demo model over FLOPs."""
    rows = load("demo")["rows"]
    curve = [row for row in rows if row["method"] in ("dense", "infoprune")]
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    shares = [row["flops_ratio"] for row in curve]
    reached = [row["accuracy"] for row in curve]
    above, below = ([abs(row.get("drop_ci95", [0, 0])[end] - row.get("drop_points", 0)) for row in curve] for end in (0, 1))
    left.errorbar(shares, reached, [below, above], fmt="o-", capsize=3, label="infoprune, drop from dense [95%]")
    for method in dict.fromkeys(row["method"] for row in rows if ":" in row["method"]):
        other = [row for row in rows if row["method"] == method]
        left.plot([r["flops_ratio"] for r in other], [r["accuracy"] for r in other], "s", mfc="none", label=method.partition(":")[2])
    left.set(xlabel="share of the dense FLOPs", ylabel="accuracy, % (easy-VQA test)")
    left.legend()
    for part in ("vision", "prefill", "end_to_end"):
        right.plot(shares, [row.get(f"speedup_{part}", 1.0) for row in curve], "o-", label=part.replace("_", " "))
    right.plot(shares, [1 / share for share in shares], "k:", label="end to end by FLOPs")
    right.set(xlabel="share of the dense FLOPs", ylabel="speed-up, CPU")
    right.legend()
    figure.savefig(ROOT / "docs" / "demo-curve.png", dpi=120)


def draw_gates() -> None:
    """Gates by layer and unit over training, and what stayed: one row per tower."""
    rows = load("headline")["rows"] if (RESULTS / "headline.json").is_file() else []
    gates = next((row["gates"] for row in rows if "gates" in row), None)
    if gates is None:
        return
    figure = Figure(figsize=(13, 6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 2, width_ratios=(3, 2))
    places, start = {}, 0
    for path, units in gates["units"].items():
        places[path] = range(start, start := start + units)
    snapshots = [*gates["trajectory"], gates["final"]]
    for (over, end), (title, marker) in zip(axes, (("vision tower", "vision"), ("language model", "language")), strict=True):
        paths = [path for path in places if (marker in path)]
        columns = [place for path in paths for place in places[path]]
        image = over.imshow(
            [[snapshot[c] for c in columns] for snapshot in snapshots], vmin=0, vmax=1, aspect="auto", interpolation="nearest",
            extent=(0, len(paths), gates["steps"], 0),
        )  # fmt: skip
        over.set(title=f"{title}: gates over training", xlabel="layer (units side by side)", ylabel="step")
        width = max(len(places[path]) for path in paths)
        kept = [
            [float(unit in gates["kept"][path]) if unit < len(places[path]) else float("nan") for path in paths] for unit in range(width)
        ]
        end.imshow(kept, vmin=0, vmax=1, aspect="auto", interpolation="nearest")
        share = sum(len(gates["kept"][path]) for path in paths) / len(columns)
        gone = sum(not gates["kept"][path] for path in paths)
        end.set(title=f"{share:.0%} kept, {gone} of {len(paths)} blocks gone", xlabel="layer", ylabel="unit", yticks=range(width))
        figure.colorbar(image, ax=over, label="gate")
    figure.savefig(ROOT / "docs" / "gates.png", dpi=110)


def draw_arena() -> None:
    """KL over the scope's FLOPs, one line a method, for test questions and for the second data set."""
    rows = arena_rows()
    if not rows:
        return
    scopes = [scope for scope in SCOPES if methods_of(rows, scope)]
    figure = Figure(figsize=(6 * len(scopes), 10), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, len(scopes), sharex=True, squeeze=False)
    for column, scope in enumerate(scopes):
        for line, (title, figure_of) in enumerate(
            (("test questions", lambda r: r["kl_nats"]), ("second data set", lambda r: r["shifted"]["kl_nats"]))
        ):
            axis = axes[line][column]
            for number, method in enumerate(methods_of(rows, scope)):
                own = [row for row in rows if row["scope"] == scope and row["method"] == method]
                shares = sorted({row["budget"] for row in own})
                points = [mean([figure_of(row) for row in own if row["budget"] == share]) for share in shares]
                ours = method == "infoprune"
                style = "o-" if ours else "o--" if number < COLOURS else "^:"  # colours come round again
                axis.plot(shares, points, style, label=method, ms=6 if ours else 3, lw=2.5 if ours else 1, zorder=3 if ours else 2)
            axis.set(
                title=f"{scope}: {title}", yscale="log", xlabel=f"share of the FLOPs kept ({scope})", ylabel="KL, nats per answer token"
            )
        axes[1][column].legend(fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.15))  # below, where no line is
    figure.savefig(ROOT / "docs" / "arena.png", dpi=90)


def draw_certificate() -> None:
    """Predicted beside measured loss of the plans on the certified path, and their drop: measured, bounded, and on the test split."""
    rows = load("certificate")["rows"] if (RESULTS / "certificate.json").is_file() else []
    path = [row for row in rows if row["part"] == "path"]
    if not path:
        return
    figure = Figure(figsize=(11, 4), layout="constrained")
    FigureCanvasAgg(figure)
    loss, drop = figure.subplots(1, 2)
    predicted, measured = ([row[key] for row in path] for key in ("predicted_loss_nats", "kl_nats"))
    loss.plot(predicted, measured, "o-")
    for row, x, y in zip(path, predicted, measured, strict=True):
        loss.annotate(f"{row['budget']:g}", (x, y), textcoords="offset points", xytext=(5, -10), fontsize=8)
    rank = next(row["rank_correlation"] for row in rows if row["part"] == "prediction")
    told = "" if rank is None else f": rank correlation {rank:.2f}"
    loss.set(xscale="log", yscale="log", xlabel="predicted loss, nats per example", ylabel="measured KL, nats per answer token",
             title=f"{len(path)} plans by their share of FLOPs{told}")  # fmt: skip
    loss.xaxis.set_minor_formatter(NullFormatter())
    shares = [row["budget"] for row in path]
    bottom, top = ([row["test_drop_ci95"][end] for row in path] for end in (0, 1))
    middle = [row["test_drop_points"] for row in path]
    errors = [[m - b for m, b in zip(middle, bottom, strict=True)], [t - m for m, t in zip(middle, top, strict=True)]]
    drop.errorbar(shares, middle, errors, fmt="s", color="#57606a", capsize=3, label="test questions [95%]")
    drop.plot(shares, [row["drop_points"] for row in path], "o-", label="certification questions")
    limit = max(path[0]["bounds"], key=float)
    drop.plot(shares, [row["bounds"][limit]["betting"] for row in path], "v--", label=f"bound at 95%, for a limit of {limit}")
    for row in (row for row in rows if row["part"] == "certified" and row["certified"]):
        drop.axhline(row["max_drop_points"], color="#b3261e", lw=0.8, ls=":")
    drop.set(xlabel="share of the dense FLOPs", ylabel="drop, points", title="drop; dotted: what was asked for")
    drop.legend(fontsize=8)
    figure.savefig(ROOT / "docs" / "certificate.png", dpi=110)
