"""Write the tables and pictures of README and docs from ``benchmarks/results``.

    python benchmarks/tables.py [--check]

Tables stand between ``<!-- table:NAME -->`` and ``<!-- end -->``. With ``--check`` nothing is written and a stale table is an error.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable

from arena_tables import ARENA_TABLES
from cost_tables import COST_TABLES
from pictures import draw_arena, draw_certificate, draw_curve, draw_gates
from result_tables import RESULTS, ROOT, drop, load, source, table
from training_tables import TRAINING_TABLES

PARTS = ("vision", "prefill", "decode", "end_to_end")
DOCUMENTS = (ROOT / "README.md", ROOT / "docs" / "benchmarks.md", ROOT / "docs" / "families.md")


def demo() -> str:
    rows = []
    for row in load("demo")["rows"]:
        dense = row["method"] == "dense"
        times = row["milliseconds"]
        rows.append([
            "dense" if dense else f"`--flops {row['budget']:g}`",
            f"{row['flops_ratio']:.3f}",
            f"{row['params'] / 1e6:.1f} M",
            f"{row['accuracy']:.2f}%",
            "" if dense else drop(row),
            "" if dense else f"{row['kl_nats']:.4f}",
            *(f"{times[p]['median']:.1f}" + ("" if dense else f" ({row['speedup_' + p]:.2f}x)") for p in PARTS),
        ])  # fmt: skip
    header = [
        "",
        "FLOPs share",
        "parameters",
        "accuracy",
        "drop, points [95%]",
        "KL, nats",
        "vision, ms",
        "prefill, ms",
        "decode step, ms",
        "end to end, ms",
    ]
    return table(header, rows) + source("demo")


def tower() -> str:
    cells = []
    for row in load("tower")["rows"]:
        after = f", {row['steps']} steps of recovery" if row["recovered"] else ""
        cells.append([
            f"{row['budget']:g}", row["method"] + after, f"{row['flops_ratio']:.3f}", f"{row['accuracy']:.2f}%", f"{row['kl_nats']:.4f}",
            f"{row['shifted']['accuracy']:.2f}%, {row['shifted']['kl_nats']:.3f}", f"{row['speedup_vision']:.2f}x",
        ])  # fmt: skip
    header = ["share asked", "method", "FLOPs share of seeing", "accuracy", "KL, nats", "beyond the task: accuracy, KL", "tower's time"]
    return table(header, cells) + source("tower")


def generate() -> str:
    cells = [
        [r["method"], f"{r['num_questions']:,}", f"{r['generated_accuracy']:.2f}%", f"{r['accuracy']:.2f}%", f"{r['disagreements']}"]
        for r in load("generate")["rows"]
    ]
    return table(["model", "questions", "`generate`", "scored", "judged differently"], cells) + source("generate")


def runner() -> str:
    cells = [
        [r["method"], r["questions_per_image"], f"{r['num_questions']:,}", f"{r['questions_per_second']:.1f}",
         f"{r['speedup_questions_per_second']:.2f}x ({r['speedup_range'][0]:.2f} to {r['speedup_range'][1]:.2f})", f"{r['other_answers']}"]
        for r in load("runner")["rows"]
    ]  # fmt: skip
    header = ["", "questions an image", "questions", "questions per second", "median speed-up (range)", "other answers"]
    return table(header, cells) + source("runner")


def crash() -> str:
    cells = [[f"`{r['verb']}`", f"{r['moment']:.0%}", f"{r['answers_kept']}", r["outcome"]] for r in load("crash")["rows"]]
    return table(["killed", "at", "answers kept", "outcome"], cells) + source("crash")


def cost() -> str:
    rows = load("demo")["rows"]
    cells = [["load the dense model, answer once", "", f"{rows[0]['peak_rss_gb']:.2f} GB", f"{rows[0]['bytes_on_disk'] / 1e6:.0f} MB"]]
    for row in rows[1:]:
        cells.append([f"compress `--flops {row['budget']:g}`, save, reload, compare", f"{row['seconds_to_compress']:.0f} s",
                          f"{row['peak_rss_gb']:.2f} GB", f"{row['bytes_on_disk'] / 1e6:.0f} MB"])  # fmt: skip
    return table(["process", "time to compress", "peak memory", "weights on disk"], cells)


def ffn() -> str:
    rows = load("ffn")["rows"]
    shares = sorted({row["budget"] for row in rows}, reverse=True)
    methods = list(dict.fromkeys(row["method"] for row in rows))
    cells = []
    for method in methods:
        found = {row["budget"]: row for row in rows if row["method"] == method}
        cells.append(
            [method, *(f"{found[s]['accuracy']:.2f}%, {found[s]['kl_nats']:.4f} ({found[s]['kl_over_svd_llm']:.2f})" for s in shares)]
        )
    return table(["method", *(f"{s:g} of the FFN FLOPs" for s in shares)], cells) + source("ffn")


def heads() -> str:
    rows = [row for row in load("heads")["rows"] if row["compensated"]]
    cases = list(dict.fromkeys((row["tower"], row["share_removed"]) for row in rows))
    cells = []
    for method in dict.fromkeys(row["method"] for row in rows):
        line = [method]
        for case in cases:
            found = [r for r in rows if r["method"] == method and (r["tower"], r["share_removed"]) == case]
            kl = [r["kl_nats"] for r in found]
            spread = f" ({min(kl):.4f} to {max(kl):.4f})" if len(kl) > 1 else ""
            line.append(f"{sum(r['accuracy'] for r in found) / len(found):.1f}%, {sum(kl) / len(kl):.4f}{spread}")
        cells.append(line)
    return table(["criterion, compensated", *(f"{tower}: {share:.0%} removed" for tower, share in cases)], cells) + source("heads")


def tail() -> str:
    found = load("tail")
    return f"{len(found['rows'])} linears, worst relative difference {found['meta']['worst_relative_difference']:.1e}." + source("tail")


def prefill() -> str:
    found = load("prefill")
    rows, meta = found["rows"], found["meta"]
    cells = []
    for r in rows:
        parts = [f"{r[f'{part}_ms']:.1f}" for part in ("matrix_products", "attention", "other_operators", "python_and_dispatch")]
        speed, flops = rows[0]["prefill_ms"] / r["prefill_ms"], rows[0]["flops"] / r["flops"]
        cells.append([r["method"], f"{r['flops'] / 1e9:.2f} ({flops:.2f}x)", f"{r['prefill_ms']:.1f} ({speed:.2f}x)", *parts,
                      f"{r['operators']:.0f}", f"{r['bound_ms']:.1f}"])  # fmt: skip
    header = [
        "",
        "GFLOPs",
        "prefill, ms",
        "matrix products",
        "attention",
        "other operators",
        "Python and dispatch",
        "operators",
        "bound, ms",
    ]
    text = (
        f"\n\nA large matrix product reaches {meta['flop_rate'] / 1e9:.0f} GFLOP/s here, a large read {meta['byte_rate'] / 1e9:.1f} GB/s."
    )
    return table(header, cells) + text + source("prefill")


def families() -> str:
    """Families by what their tests found; several tiny models of a family are one row, and a capability needs all of them."""
    rows = load("families")["rows"]
    names = list(dict.fromkeys(name for row in rows for name in row["capabilities"]))
    cells = []
    for family in dict.fromkeys(row["family"] for row in rows):
        here = [row for row in rows if row["family"] == family]
        towers = (", ".join(dict.fromkeys(row[tower] for row in here)) for tower in ("vision", "text"))
        passed = ("yes" if all(row["capabilities"].get(name) == "passed" for row in here) else "**no**" for name in names)
        cells.append([f"`{family}`", *towers, *passed])
    return table(["family", "vision towers tested", "language models tested", *names], cells) + source("families")


def quantise() -> str:
    rows, meta = load("quantise")["rows"], load("quantise")["meta"]
    cells = [
        [row["name"], f"{row['bytes_on_disk'] / 1e6:.0f} MB", f"{row['accuracy']:.2f}%", drop(row), f"{row['kl_nats']:.4f}"] for row in rows
    ]
    text = f"\n\n{meta['num_questions']:,} test questions, {rows[0]['budget']:g} of the FLOPs kept, torchao {meta['torchao']}."
    return table(["", "weights on disk", "accuracy", "drop from dense, points [95%]", "KL, nats"], cells) + text + source("quantise")


def graphs() -> str:
    rows, meta = load("graphs")["rows"], load("graphs")["meta"]
    cells = []
    for runtime in dict.fromkeys(row["runtime"] for row in rows):
        dense, small = (next(r for r in rows if (r["runtime"], r["model"]) == (runtime, name)) for name in ("dense", "compressed"))
        line = [runtime]
        for part in ("prompt", "decode"):
            was, now = (row["milliseconds"][part]["median"] for row in (dense, small))
            line += [f"{was:.1f}", f"{now:.1f} ({was / now:.2f}x)"]
        cells.append(line)
    ratio = next(row["flops_ratio"] for row in rows if row["model"] == "compressed")
    text = f"\n\n{ratio:.3f} of the FLOPs kept; {meta['answers_that_differ']} of {4 * meta['num_questions']} answers differ from PyTorch's."
    header = ["runtime", "image and prompt, dense, ms", "compressed", "decode step, dense, ms", "compressed"]
    return table(header, cells) + text + source("graphs")


def refused() -> str:
    from infoprune.families import REFUSED

    reasons = {reason: [name for name in REFUSED if REFUSED[name] == reason] for reason in REFUSED.values()}
    return table(["families", "why not"], [[", ".join(f"`{name}`" for name in names), reason] for reason, names in reasons.items()])


def fuzz() -> str:
    cells = [
        [f"`{row['metric']}`", f"{row['sets']:,}", f"{row['disagreements']:,}", f"{row['totals']:,}", f"{row['disagreeing_totals']:,}"]
        for row in load("fuzz")["rows"]
    ]
    return table(["metric", "generated answer sets", "scored differently", "totals", "different totals"], cells) + source("fuzz")


def reference_scripts() -> str:
    found = load("reference_scripts")
    cells = [
        [f"`{row['metric']}`", row["script"], f"{row['sets']:,}", f"{row['disagreements']:,}" if row["scored"] else "not told",
         *((f"{row['figures']:,}", f"{row['different_figures']:,}") if row["figures"] else ("none", ""))]
        for row in found["rows"]
    ]  # fmt: skip
    header = ["metric", "script", "generated answer sets", "scored differently", "figures over all", "different figures"]
    meta = found["meta"]
    text = f"\n\n{meta['other_prompts']:,} of {meta['prompts']:,} prompts differ from lmms-eval's." if "prompts" in meta else ""
    return table(header, cells) + text + source("reference_scripts")


def coverage() -> str:
    rows = [r for r in load("certificate")["rows"] if r["part"] == "coverage" and r["bound"] != "fixed-sequence"]
    bounds = list(dict.fromkeys(r["bound"] for r in rows))

    def setting(r: dict) -> tuple:
        return r["images"], tuple(r["questions_per_image"]), r["true_drop"], r["changed"], r["together"], r.get("soft", False)

    found = {(*setting(r), r["bound"]): r for r in rows}
    cells = [
        [f"{images:,}", "-".join(map(str, dict.fromkeys(sizes))), f"{drop:.2g}", f"{changed:.3g}%{' by .3, .6 or .9' if soft else ''}",
         f"{together:.0%}",
         *(f"{found[(images, sizes, drop, changed, together, soft, bound)]['violation_rate']:.1%}" for bound in bounds)]
        for images, sizes, drop, changed, together, soft in dict.fromkeys(setting(r) for r in rows)
    ]  # fmt: skip
    header = ["images", "questions an image", "true drop, points", "answers changed", "images that change whole", *bounds]
    draws = f"{rows[0]['draws']:,} draws each; with a true rate of 5% the standard error is {rows[0]['standard_error']:.1%}."
    return table(header, cells) + f"\n\n{draws}" + source("certificate")


def fixed_sequence() -> str:
    rows = [r for r in load("certificate")["rows"] if r["part"] == "coverage" and r["bound"] == "fixed-sequence"]
    cells = [
        [r["path"], f"{r['images']:,}", ", ".join(f"{drop:.2g}" for drop in r["true_drop"]), f"{r['together']:.0%}",
         f"{r['violation_rate']:.2%}", f"{r['mean_certified']:.2f}"]
        for r in rows
    ]  # fmt: skip
    header = ["path", "images", "true drops, points", "images that change whole", "certified a plan above 0.5", "plans certified, mean"]
    return table(header, cells) + source("certificate")


def certificate() -> str:
    rows = load("certificate")["rows"]
    if not any(r["part"] == "certified" for r in rows):
        return "Not run yet: `python benchmarks/certificate.py --parts demo`."
    cells = []
    for r in (r for r in rows if r["part"] == "certified"):
        if r["certified"]:
            (low, high), (test_low, test_high) = r["drop_ci95"], r["test_drop_ci95"]
            cells.append([f"{r['max_drop_points']:g}", f"{r['flops_ratio']:.3f}", f"{r['drop_points']:.2f} [{low:.2f}, {high:.2f}]",
                          f"{r['bound_points']:.2f}", f"{r['test_drop_points']:.2f} [{test_low:.2f}, {test_high:.2f}]"])  # fmt: skip
        else:
            cells.append([f"{r['max_drop_points']:g}", "none certified", "", "", ""])
    path = [r for r in rows if r["part"] == "path"]
    header = ["certified drop, points", "FLOPs share", "measured there [95%]", "bound at 95%", "drop on test questions [95%]"]
    told = next(r for r in rows if r["part"] == "prediction")
    text = (
        f"\n\n{path[0]['num_questions']:,} questions about {path[0]['num_images']:,} images to certify on, "
        f"{path[0]['test_questions']:,} test questions. "
        f"Predicted loss and measured KL of the {told['plans']} plans have a rank correlation of {told['rank_correlation']:.2f}."
    )
    return table(header, cells) + text + source("certificate")


TABLES: dict[str, Callable[[], str]] = {
    "coverage": coverage,
    "fixed_sequence": fixed_sequence,
    "certificate": certificate,
    "fuzz": fuzz,
    "reference_scripts": reference_scripts,
    "families": families,
    "refused": refused,
    "graphs": graphs,
    "quantise": quantise,
    "demo": demo,
    "tower": tower,
    "cost": cost,
    "ffn": ffn,
    "heads": heads,
    "tail": tail,
}
TABLES |= {"prefill": prefill, "generate": generate, "runner": runner, "crash": crash} | ARENA_TABLES | COST_TABLES | TRAINING_TABLES

FILES = dict.fromkeys(ARENA_TABLES, "arena") | {
    "rare": "rare",
    "selection": "selection",
    "refused": "families",
    "cost": "demo",
    "headline_ways": "headline",
    "coverage": "certificate",
    "fixed_sequence": "certificate",
    "decode": "efficiency",
}  # tables that share a result file


def main() -> None:
    for document in DOCUMENTS:
        text = before = document.read_text()
        for name, make in TABLES.items():
            pattern = re.compile(rf"(<!-- table:{name} -->\n).*?(<!-- end -->)", re.DOTALL)
            if pattern.search(text) and (RESULTS / f"{FILES.get(name, name)}.json").is_file():
                body = make()
                text = pattern.sub(lambda match, body=body: match.group(1) + body + "\n" + match.group(2), text)
        if "--check" in sys.argv[1:]:
            if text != before:
                sys.exit(f"{document.name}'s tables are stale: run `make tables`.")
        else:
            document.write_text(text)
    if "--check" not in sys.argv[1:]:
        for draw in (draw_curve, draw_gates, draw_arena, draw_certificate):
            draw()


if __name__ == "__main__":
    main()
