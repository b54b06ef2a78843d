"""The model card of a compressed checkpoint: what was cut, what it cost, what is certified, how to load it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from infoprune.certification.certificate import Certificate
from infoprune.data.images import home_expanded
from infoprune.plan import CompressionPlan

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
PARTS = {
    "total": "whole model", "vision_tower": "vision tower", "projector": "projector", "prefill": "prefill", "decode_step": "decode step",
    "lm_head": "language head, one position",
}  # fmt: skip


def model_card(
    plan: CompressionPlan, report: dict[str, Any] | None = None, certificate: Certificate | None = None, *, licence: str | None = None
) -> str:
    """Markdown with the front matter that model hubs read.

    Args:
        plan: What was cut.
        report: Of :meth:`infoprune.steps.Compressed.as_dict`; its figures are left out where it is missing.
        certificate: Shown if there is one.
        licence: The original's, as a hub's identifier; where unknown, the card says whose licence holds and names none.
    """
    sections = [_front_matter(plan, licence), _head(plan), _cut(plan)]
    if report and report.get("training"):
        sections.append(_training(report["training"], report.get("trained_with", {})))
    if report and "flops" in report and "dense_flops" in report:
        sections.append(_figures(report))
    sections.append(_certificate(certificate) if certificate is not None else NO_CERTIFICATE)
    sections += [LOADING, _licence(plan, licence)]
    return "\n".join(sections)


def base_licence(model_id: str) -> str | None:
    """The licence that the original's own card states, where that card is at hand: in the checkpoint's folder."""
    card = home_expanded(model_id) / "README.md"
    try:
        text = card.read_text(encoding="utf-8")
        matter = yaml.safe_load(text.split("---", 2)[1]) if text.startswith("---") else None
    except (OSError, ValueError, IndexError, RecursionError, yaml.YAMLError):  # ValueError: dates that there are not
        return None
    found = matter.get("license") if isinstance(matter, dict) else None
    return found if isinstance(found, str) and re.fullmatch(r"[\w.+-]{1,60}", found) else None


def _front_matter(plan: CompressionPlan, licence: str | None) -> str:
    matter: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "image-text-to-text", "tags": ["infoprune", "compressed"]}
    if _on_hub(plan):
        matter["base_model"] = plan.model_id
    if licence is not None:
        matter["license"] = licence
    return f"---\n{yaml.safe_dump(matter, sort_keys=False)}---\n"


def _on_hub(plan: CompressionPlan) -> bool:
    return HUB_ID.fullmatch(plan.model_id) is not None and not Path(plan.model_id).exists()


def _name(plan: CompressionPlan) -> str:
    """The original's name; of a local folder the last part, since the rest is nobody's business."""
    return plan.model_id if _on_hub(plan) else Path(plan.model_id).name or plan.model_id


def _head(plan: CompressionPlan) -> str:
    budget = ", ".join(f"{_plain(name)} {value:g}" for name, value in plan.budget.items()) or "none stated"
    return (
        f"# {_plain(_name(plan))}, compressed\n\n"
        f"A {_plain(plan.model_type)} model, made smaller and faster by infoprune {_plain(plan.library)} (budget: {budget}).\n"
    )


def _cut(plan: CompressionPlan) -> str:
    removed = sum(head.num_units - len(head.keep_units) for head in plan.heads.values())
    whole = sum(not head.keep_units for head in plan.heads.values())
    narrowed = [ffn for ffn in plan.ffn.values() if ffn.keep_neurons is not None and ffn.num_neurons is not None]
    neurons = sum((ffn.num_neurons or 0) - len(ffn.keep_neurons or ()) for ffn in narrowed)
    linears = sum(len(ffn.ranks) + (ffn.joint_rank is not None) for ffn in plan.ffn.values())
    lines = [
        "## What was cut\n",
        f"* {removed} attention units (key/value heads with their query heads) out of {len(plan.heads)} blocks; {whole} dropped whole",
        f"* {linears} linears in {len(plan.ffn) - len(narrowed)} FFNs factorised",
    ]
    if narrowed:
        gone = sum(not ffn.keep_neurons for ffn in narrowed)
        lines.append(f"* {neurons:,} neurons out of {len(narrowed)} FFNs; {gone} dropped whole")
    if plan.method:
        lines.append("* method: " + ", ".join(f"{_plain(name)} {_plain(str(value))}" for name, value in plan.method.items()))
    if plan.calibration is not None:
        data = _plain(_source(plan.calibration.data))
        lines.append(f"* calibrated on {plan.calibration.count:,} questions of {data}; knowledge beyond that task may be lost")
    return "\n".join([*lines, "* `plan.json` lists every decision\n"])


def _training(stages: dict[str, Any], options: dict[str, Any]) -> str:
    """What was trained, and what it was stopped on."""
    lines = ["## Training\n"]
    for stage, told in stages.items():
        how = f", {_plain(told['method'])}" if "method" in told else ""
        lines.append(f"* {_plain(stage)}{how}: {told['steps']} steps over {told['questions']:,} questions")
    if validation := options.get("validation"):
        digest = _plain(validation["fingerprint"])
        lines.append(f"* validated on {validation['questions']:,} questions, fingerprint `{digest}`; options are in `report.json`")
    return "\n".join([*lines, ""])


def _figures(report: dict[str, Any]) -> str:
    rows = ["## Figures\n", "| | dense | compressed | share |", "|---|---|---|---|"]
    for part, label in PARTS.items():
        dense, now = report["dense_flops"][part], report["flops"][part]
        rows.append(f"| FLOPs, {label} | {dense / 1e9:.3f} G | {now / 1e9:.3f} G | {now / max(dense, 1):.3f} |")
    dense, now = report["dense_parameters"], report["parameters"]
    rows.append(f"| parameters | {dense / 1e6:.1f} M | {now / 1e6:.1f} M | {now / dense:.3f} |")
    if speed := report.get("speedup"):
        times = f"{speed['dense_ms']:.1f} ms | {speed['compressed_ms']:.1f} ms"
        rows.append(f"| end to end, measured where it was cut | {times} | {1 / speed['measured']:.3f} |")
    if "predicted_loss_nats" in report:
        rows.append(f"\nPredicted loss of information: {report['predicted_loss_nats']:.2g} nats per example (second order).")
    return "\n".join([*rows, ""])


def _certificate(certificate: Certificate) -> str:
    data = certificate.data
    rows = [
        "## Certificate\n",
        f"**{certificate.statement}**\n",
        f"Score: {_plain(certificate.score)}, {_plain(certificate.metric)}; dense {certificate.dense_accuracy:.2f}%. "
        f"Method: {_plain(certificate.method)}. Data: {_plain(_source(data.source))}, fingerprint `{_plain(data.fingerprint)}`. It holds "
        "under these assumptions:\n",
        *(f"* {_plain(assumption)}" for assumption in certificate.assumptions),
        "",
        f"| FLOPs share | drop, points [95%] | bound, {100 * certificate.confidence:g}%: betting | empirical Bernstein | bootstrap "
        "| predicted, nats per example | KL, nats per answer token | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for step in certificate.path:
        if step.measured is None:
            rows.append(f"| {step.share:g} | | | | | {step.predicted_loss_nats:.2g} | | not tried |")
            continue
        m = step.measured
        bounds = " | ".join(f"{m.drop_bounds[name]:.2f}" for name in ("betting", "empirical_bernstein", "bootstrap"))
        verdict = "**this model**" if step is certificate.step else "certified" if m.certified else "failed"
        rows.append(
            f"| {step.share:g} | {m.drop_points:+.2f} [{m.drop_ci95[0]:+.2f}, {m.drop_ci95[1]:+.2f}] | {bounds} "
            f"| {step.predicted_loss_nats:.2g} | {m.kl_nats:.4f} | {verdict} |"
        )
    if certificate.rank_correlation is not None:
        rows.append(f"\nRank correlation of predicted loss and measured KL (Spearman): {certificate.rank_correlation:.2f}.")
    return "\n".join([*rows, ""])


NO_CERTIFICATE = """## Certificate

None. `infoprune compress --max-drop` searches for a model with one.
"""

LOADING = """## Load

```python
import infoprune  # or pass trust_remote_code=True to both calls: the code is in this repository
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained(FOLDER_OR_ID)
processor = AutoProcessor.from_pretrained(FOLDER_OR_ID)
```
"""


def _licence(plan: CompressionPlan, licence: str | None) -> str:
    named = f" ({licence})" if licence else ""
    return f"## Licence\n\nThese weights derive from {_plain(_name(plan))} and carry its licence{named}.\n"


def _source(data: str) -> str:
    """Data by name; files without their folders."""
    return Path(data).name if "/" in data or "\\" in data else data


def _plain(text: str) -> str:
    """Text from elsewhere, unable to be markup, a table cell or a line of its own."""
    return re.sub(r"([\\`*\[\]<>|#])", r"\\\1", " ".join(text.split()))
