"""One HTML page about a compressed model beside its original: figures, bounds, the certificate's path, the questions that changed.

Questions, answers and names come from strangers: all text is escaped, pictures are encoded again before they are embedded, and the page
forbids itself scripts and anything from elsewhere.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from infoprune.certification.certificate import Certificate
from infoprune.data import Example
from infoprune.errors import DataError, InfoPruneError
from infoprune.outputs import check_file

MOST_SHOWN = 200
THUMBNAIL = 144  # pixels
BOUNDS = {"betting": "betting", "empirical_bernstein": "empirical Bernstein", "bootstrap": "bootstrap (approximate)"}
OUTCOMES = {
    (1, 0): "dense right, compressed wrong", (0, 1): "dense wrong, compressed right", (0, 0): "both wrong, differently",
    (1, 1): "both right, in other words",
}  # fmt: skip
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1b1f24; max-width: 62rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2rem }
table { border-collapse: collapse; margin: .5rem 0 } th, td { padding: .25rem .7rem; border-bottom: 1px solid #d8dee4; text-align: right }
th:first-child, td:first-child { text-align: left } thead th { border-bottom: 2px solid #8c959f }
.plot { max-width: 100% } .card { display: flex; gap: 1rem; border-bottom: 1px solid #d8dee4; padding: .6rem 0 }
.card img { width: 144px; height: auto; object-fit: contain; align-self: flex-start } .none { width: 144px; color: #8c959f }
.card p { margin: 0 0 .2rem } .lost { color: #b3261e } .won { color: #1a7f37 } .small { color: #57606a; font-size: .85rem }
.prompt { white-space: pre-wrap }
"""


def check_page(path: Path, *, against: bool) -> None:
    """Refuse a page that could not be written, before any work is done.

    Raises:
        InfoPruneError: Not an .html file, no such folder, or nothing to compare with.
    """
    if not against:
        raise InfoPruneError("The report compares two models: give the dense one with --against.")
    if path.suffix.lower() not in (".html", ".htm"):
        raise InfoPruneError(f"The report is an HTML page; give a name that ends in .html instead of '{path}'.")
    check_file(path, "the report")


def write_page(result: dict[str, Any], path: Path, certificate: Certificate | None = None) -> None:
    """Write the page, aside first and then in place.

    Args:
        result: Of :func:`infoprune.evaluation.runner.evaluate`, with ``comparison``; where it has them, ``skipped`` are bad records, and
            ``warnings`` are what a reader must know.
        path: An .html file.
        certificate: Shown if there is one.

    Raises:
        InfoPruneError: It can't be written.
    """
    aside = path.with_name(f".{path.name}.partial")
    try:
        aside.write_text(page(result, certificate), encoding="utf-8")
        aside.replace(path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise InfoPruneError(f"Can't write the report {path}: {error.strerror or error}.") from error


def page(result: dict[str, Any], certificate: Certificate | None = None) -> str:
    """The page's HTML."""
    dense, compressed = result["models"]
    title = f"{Path(compressed['model']).name} against {Path(dense['model']).name}"
    sections = [_how(result), _figures(result), _kinds(result["models"]), _differences(result["comparison"])]
    if certificate is not None:
        sections.append(_certificate(certificate))
    sections.append(_changed(result["comparison"]["changed"]))
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{policy}">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>\n<h1>{escape(title)}</h1>\n"
        + "\n".join(sections)
        + "\n</body></html>\n"
    )


def _how(result: dict[str, Any]) -> str:
    judge = "exact match" if result["metric"] == "exact" else f"metric {result['metric']}"
    skipped = f" Bad records skipped: {result['skipped']:,}." if result.get("skipped") else ""
    asked = f"Data: {data['source']}{', a random sample' if data['sample'] else ''}. " if (data := result.get("data")) else ""
    told = f"{asked}Answers {result['answers']} in {result['dtype']}, {judge}.{skipped}"
    warned = "".join(f"<p><b>Warning: {escape(text)}</b></p>" for text in result.get("warnings", []))
    return f'{warned}<p>{escape(told)} Prompt of the first question: <code class="prompt">{escape(result["prompt"])}</code></p>'


def _figures(result: dict[str, Any]) -> str:
    dense, compressed = result["models"]
    rows: list[Sequence[str]] = [
        (
            "accuracy [95%, questions taken as independent]",
            *(f"{m['accuracy']:.2f}% [{m['accuracy_ci95'][0]:.1f}, {m['accuracy_ci95'][1]:.1f}]" for m in result["models"]),
            "",
        )
    ]

    def ratio(label: str, before: float, after: float, unit: str, scale: float) -> None:
        rows.append((label, f"{before / scale:.1f} {unit}", f"{after / scale:.1f} {unit}", f"{before / after:.2f}x" if after else ""))

    ratio("parameters", dense["params"], compressed["params"], "M", 1e6)
    ratio("FLOPs per example", dense["flops"]["total"], compressed["flops"]["total"], "G", 1e9)
    if dense["bytes_on_disk"] and compressed["bytes_on_disk"]:
        ratio("bytes on disk", dense["bytes_on_disk"], compressed["bytes_on_disk"], "MB", 1e6)
    for part, times in dense.get("milliseconds", {}).items():
        ratio(f"time, {part.replace('_', ' ')}", times["median"], compressed["milliseconds"][part]["median"], "ms", 1)
    return _table(("", "dense", "compressed", "dense / compressed"), rows)


def _kinds(records: Sequence[dict[str, Any]]) -> str:
    """What the metric of generated answers says, overall and by kind of question."""
    if "metric" not in records[0]:
        return ""
    dense, compressed = (record["metric"] for record in records)

    def cells(label: str, before: float, after: float, count: int | None = None) -> Sequence[str]:
        return label, f"{before:.2f}", f"{after:.2f}", "" if count is None else f"{count:,}"

    rows = [cells("overall", dense["overall"], compressed["overall"], dense["num_questions"])]
    rows += [cells(name, value, compressed["further"].get(name, value)) for name, value in dense["further"].items()]
    for name, groups in dense["breakdown"].items():
        for kind, group in groups.items():
            rows.append(cells(f"{name}: {kind}", group["percent"], compressed["breakdown"][name][kind]["percent"], group["count"]))
    notes = f'<p class="small">{escape(" ".join(dense["notes"]))}</p>' if dense["notes"] else ""
    return f"<h2>By kind of question, {escape(dense['metric'])}</h2>{_table(('', 'dense', 'compressed', 'questions'), rows)}{notes}"


def _differences(compared: dict[str, Any]) -> str:
    low, high = compared["drop_ci95"]
    test = compared["mcnemar"]
    rows: list[Sequence[str]] = [("drop, points [95%]", f"{compared['drop_points']:+.2f} [{low:+.2f}, {high:+.2f}]")]
    level = f"{100 * compared['confidence']:g}%"
    rows += [(f"drop at most, {level} one-sided: {label}", f"{compared['drop_bounds'][name]:+.2f}") for name, label in BOUNDS.items()]
    low, high = compared["agreement_ci95"]
    rows += [
        ("right in the dense model alone", f"{test['dense_only']:,}"),
        ("right in the compressed model alone", f"{test['compressed_only']:,}"),
        ("McNemar's exact test, p (questions taken as independent; right is a score above 0.5)", f"{test['p_value']:.3g}"),
        ("same answer [95%]", f"{compared['agreement']:.2f}% [{low:.2f}, {high:.2f}]"),
        ("KL(dense || compressed), nats per answer token", f"{compared['kl_nats']:.4f}"),
    ]
    about = f"{compared['num_questions']:,} questions about {compared['num_images']:,} images, the units of the bounds and intervals here."
    return f"<h2>What was lost</h2><p>{about}</p>{_table(('', ''), rows)}"


def _certificate(certificate: Certificate) -> str:
    rows: list[Sequence[str]] = []
    for step in certificate.path:
        m = step.measured
        if m is None:
            rows.append((f"{step.share:g}", "", "", f"{step.predicted_loss_nats:.3g}", "", "not tried"))
            continue
        rows.append((
            f"{step.share:g}", f"{m.drop_points:+.2f} [{m.drop_ci95[0]:+.2f}, {m.drop_ci95[1]:+.2f}]", f"{m.drop_bounds['betting']:+.2f}",
            f"{step.predicted_loss_nats:.3g}", f"{m.kl_nats:.4f}", "certified" if m.certified else "failed",
        ))  # fmt: skip
    header = (
        "FLOPs share",
        "drop [95%]",
        f"bound, {100 * certificate.confidence:g}%",
        "predicted, nats per example",
        "KL, nats per token",
        "",
    )
    rank = certificate.rank_correlation
    told = "" if rank is None else f"<p>Rank correlation of predicted loss and measured KL (Spearman): {rank:.2f}.</p>"
    assumptions = "".join(f"<li>{escape(text)}</li>" for text in certificate.assumptions)
    return (
        f"<h2>Certificate</h2><p><b>{escape(certificate.statement)}</b></p>{_table(header, rows)}{told}"
        f'<img class="plot" alt="the path of plans" src="{_path_plot(certificate)}"><ul class="small">{assumptions}</ul>'
    )


def _changed(changed: list[dict[str, Any]]) -> str:
    shown = changed[:MOST_SHOWN]
    head = f"<h2>Answers that changed ({len(changed):,})</h2>"
    if not changed:
        return head + "<p>None.</p>"
    left = "" if len(shown) == len(changed) else f'<p class="small">The worst {len(shown)}; <code>--json</code> has all.</p>'
    return head + left + "".join(map(_card, shown))


def _card(item: dict[str, Any]) -> str:
    source = thumbnail(Path(item["image"]))
    picture = f'<img alt="" src="{source}">' if source else '<div class="none">no picture</div>'
    kl = "" if item["kl_nats"] is None else f", KL {item['kl_nats']:.3f} nats per answer token"
    name = escape(Path(item["image"]).name) + ("" if item["id"] is None else f", question {escape(str(item['id']))}")
    return (
        f'<div class="card">{picture}<div><p><b>{escape(item["question"])}</b></p><p>reference: {escape(item["answer"])}</p>'
        f"<p>dense: {escape(item['dense_answer'])}</p><p>compressed: {escape(item['compressed_answer'])}</p>"
        f'<p class="small"><span class="{escape(item["outcome"])}">{_outcome(item)}</span>{kl}; {name}</p></div></div>'
    )


def _outcome(item: dict[str, Any]) -> str:
    """In words: who is right, where answers are right or wrong; else what the answer is worth."""
    before, after = item["dense_score"], item["compressed_score"]
    if before in (0, 1) and after in (0, 1):
        return OUTCOMES[before, after]
    if before == after:
        return f"same score ({before:.2g}), in other words"
    return f"compressed worth {'less' if after < before else 'more'} ({before:.2g}, now {after:.2g})"


def thumbnail(path: Path) -> str | None:
    """A small picture as a data URI, encoded again; ``None`` if the file is no readable image."""
    try:
        picture = Example(path, "", "").load_image()
    except DataError:
        return None
    picture.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    return _uri(_encoded(picture), "image/jpeg")


def _encoded(picture: Image.Image) -> bytes:
    held = io.BytesIO()
    picture.save(held, "JPEG", quality=85)
    return held.getvalue()


def _path_plot(certificate: Certificate) -> str:
    """Bounds along the path, and the prediction beside the measured KL, as a data URI."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    steps = [(step, step.measured) for step in certificate.path if step.measured is not None]
    figure = Figure(figsize=(11, 4), layout="constrained")
    FigureCanvasSVG(figure)
    bound, prediction = figure.subplots(1, 2)
    shares = [step.share for step, _ in steps]
    drops = [m.drop_points for _, m in steps]
    spread = [[max(sign * (m.drop_points - m.drop_ci95[side]), 0.0) for _, m in steps] for sign, side in ((1, 0), (-1, 1))]
    bound.errorbar(shares, drops, yerr=spread, fmt="o", ms=4, capsize=3, color="#57606a", label="drop, 95% interval")
    bound.plot(
        shares, [m.drop_bounds["betting"] for _, m in steps], "v-", color="#0969da", label=f"bound, {100 * certificate.confidence:g}%"
    )
    bound.axhline(certificate.max_drop_points, color="#b3261e", ls="--", lw=1, label="limit")
    bound.axvline(certificate.step.share, color="#1a7f37", ls=":", lw=1, label="certified")
    bound.invert_xaxis()
    bound.set(xlabel="share of the dense FLOPs", ylabel="drop of accuracy, points")
    bound.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=4, fontsize=8, frameon=False)
    positive = [(step.predicted_loss_nats, m.kl_nats, step.share) for step, m in steps if step.predicted_loss_nats > 0 and m.kl_nats > 0]
    for predicted, kl, share in positive:
        prediction.annotate(f"{share:g}", (predicted, kl), xytext=(6, -8), textcoords="offset points", fontsize=8)
    prediction.plot([p for p, _, _ in positive], [k for _, k, _ in positive], "o-", color="#0969da", ms=4)
    prediction.set(xlabel="predicted loss, nats per example", ylabel="measured KL, nats per answer token")
    if positive:
        prediction.set(xscale="log", yscale="log")
    held = io.BytesIO()
    figure.savefig(held, format="svg", metadata={"Date": None})
    return _uri(held.getvalue(), "image/svg+xml")


def _uri(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Cells are escaped here."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
