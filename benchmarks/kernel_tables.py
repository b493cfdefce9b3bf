"""The tables and the figure of docs/performance.md, from result files: `python benchmarks/kernel_speed.py --table`.

Every figure of that page stands between two marker comments and is written here, so that none is typed by hand.
"""

import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kept_memory
from blocks import filled, markdown

ROOT = Path(__file__).resolve().parents[1]
PAGE, FIGURE = ROOT / "docs/performance.md", ROOT / "docs/growth.svg"
MISSING = "Not measured yet."
# Rows of the result files that are no contestants any more: an engine through torch.compile.
DROPPED = ("ours, compiled",)
TITLES = {"logits": "Logits → statistics", "head": "Hidden states → statistics"}
WAYS = {"forward": "forward", "backward": "forward and backward"}

Result = dict[str, Any]


def write(files: list[Path]) -> None:
    """Fill the page from these result files, by default all of benchmarks/results."""
    results = [
        json.loads(path.read_text(encoding="utf-8"))
        for path in files or sorted((ROOT / "benchmarks/results").glob("*.json"))
    ]
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), results), encoding="utf-8")
    cpu = _find(results, "kernels", "cpu")
    if "growth" in cpu:
        FIGURE.write_text(figure(cpu), encoding="utf-8")


def page(text: str, results: list[Result]) -> str:
    """The page with every marked block written anew."""
    cpu, cuda = (_find(results, "kernels", device) for device in ("cpu", "cuda"))
    code, kept = _find(results, "kernel_code"), _find(results, "kept_memory")
    blocks = {
        "kernels:budgets": budgets(cpu, cuda, *(_find(results, "trainer_step", device) for device in (None, "cuda"))),
        "kernels:cpu": tables(cpu),
        "kernels:growth": growth(cpu),
        "kernels:cuda": "\n\n".join(filter(None, [tables(cuda), growth(cuda) if cuda else "", tuned(cuda)])),
        "kept_memory": kept_memory.block(kept) if kept else MISSING,
        "kernel_code": instructions(code),
        "accelerator": parts(_find(results, "accelerator")),
    }
    return filled(text, blocks, PAGE.name)


def _find(results: list[Result], benchmark: str, device: str | None = None) -> Result:
    found = [r for r in results if r.get("benchmark") == benchmark and r.get("device") == device]
    return found[-1] if found else {}


# Tables of times


def tables(result: Result) -> str:
    if not result:
        return MISSING
    return "\n\n".join([made(result), *(table(s) for s in result["sections"] if s["kind"] in TITLES)])


def made(result: Result) -> str:
    """Where, when and with what."""
    environment = result["environment"]
    machine, packages = environment["machine"], environment["packages"]
    where = machine.get("gpu") or f"{machine['processor']}, {machine['torch_threads']} of {machine['cores']} cores"
    versions = ", ".join(f"{name} {packages[name]}" for name in ("torch", "triton", "trl") if name in packages)
    return f"{where}; {versions}; {environment['date'][:10]}; `{environment['command']}`."


def table(section: Result) -> str:
    """A section's markdown table, the methods that make equally many matrix products together, and what beats ours."""
    cold = any("cold" in r.get("seconds", {}) for r in section["contestants"].values())
    backward = section["way"] == "backward"
    head = section["kind"] == "head"
    columns: list[tuple[str, Callable[[str, Result], str]]] = [
        ("", lambda name, r: f"*{name}*" if r["ceiling"] else name),
        ("products", lambda name, r: str(r["products"])),
        ("time, ms", lambda name, r: _times(r, "hot")),
        ("caches cold, ms", lambda name, r: _times(r, "cold")),
        ("× ours", lambda name, r: _ratio_to_ours(section, name)),
        ("of the ceiling", lambda name, r: _share(section, r)),
        ("extra memory, MiB", lambda name, r: f"{r['extra_bytes'] / 2**20:,.1f}" if "extra_bytes" in r else ""),
        ("error of log p", lambda name, r: _error(r, "logp")),
        ("of H", lambda name, r: _error(r, "entropy")),
        ("of T", lambda name, r: _error(r, "sensitivity")),
        ("of gradients", lambda name, r: _error(r, "grad_logits", "grad_hidden", "grad_weight")),
        ("computed in", lambda name, r: r["note"]),
    ]
    absent = {"products"} if not (head and backward) else set()
    absent |= set() if cold else {"caches cold, ms"}
    absent |= set() if backward else {"of gradients"}
    absent |= set() if head or cold else {"of the ceiling"}
    columns = [(title, cell) for title, cell in columns if title not in absent]
    size = f"N = {section['rows']:,}, V = {section['vocabulary']:,}" + (f", D = {section['width']:,}" if head else "")
    title = f"**{TITLES[section['kind']]}, {WAYS[section['way']]}**"
    lines = [
        f"{title}: {size}, {section['dtype']}, {section['rounds']} rounds",
        "",
        f"| {' | '.join(title for title, _ in columns)} |",
        "|---" * len(columns) + "|",
    ]
    for name, r in sorted(section["contestants"].items(), key=_order):
        if name in DROPPED:
            continue
        cells = [cell(name, r) for _, cell in columns]
        if r["status"] in ("not installed", "failed"):
            cells = [name, f"failed: {r['error'].replace('|', '/')}" if r["status"] == "failed" else "not installed"]
            cells += [""] * (len(columns) - 2)
        elif r["status"] == "wrong":
            cells[0] += " (wrong)"
        lines.append(f"| {' | '.join(cells)} |")
    faster = [name for name, r in section["contestants"].items() if _beats_ours(section, name, r)]
    if faster:
        lines += ["", f"Faster here than ours: {'; '.join(faster)}."]
    return "\n".join(lines)


def _order(item: tuple[str, Result]) -> tuple[Any, ...]:
    _, r = item
    return "seconds" not in r, r["ceiling"], -r["products"], _median(r) if "seconds" in r else 0


def _median(r: Result, temperature: str | None = None) -> float:
    """Seconds, with cold caches where they were measured."""
    return statistics.median(r["seconds"][temperature or ("cold" if "cold" in r["seconds"] else "hot")])


def _times(r: Result, temperature: str) -> str:
    if temperature not in r.get("seconds", {}):
        return ""
    low, middle, high = statistics.quantiles(r["seconds"][temperature], n=4, method="inclusive")
    return f"{_ms(middle)} [{_ms(low)}, {_ms(high)}]"


def _ms(seconds: float) -> str:
    """Three digits."""
    ms = seconds * 1e3
    return f"{ms:,.0f}" if ms >= 100 else f"{ms:.{1 if ms >= 10 else 2 if ms >= 1 else 3}f}"


def _error(r: Result, *names: str) -> str:
    found = [r["errors"][name] for name in names if name in r.get("errors", {})]
    return "NaN" if None in found else f"{max(found):.0e}" if found else ""


def _ours(section: Result, name: str) -> str:
    """The contestant of ours that a method is compared with: of as many products, with as many gradients."""
    if section["kind"] == "logits":
        return "ours, triton" if "ours, triton" in section["contestants"] else "ours, chunked"
    if "frozen" in name or section["contestants"][name]["products"] == 2:
        return "ours, frozen head"
    return "ours, callback" if section["contestants"][name]["products"] == 3 else "ours"


def ratio(section: Result, top: str, bottom: str) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile over rounds of how many times longer `top` takes than `bottom`."""
    pairs = [section["contestants"][name]["seconds"] for name in (top, bottom)]
    temperature = "cold" if "cold" in pairs[0] else "hot"
    each = [a / b for a, b in zip(pairs[0][temperature], pairs[1][temperature], strict=True)]
    low, middle, high = statistics.quantiles(each, n=4, method="inclusive")
    return low, middle, high


def _comparable(section: Result, name: str) -> bool:
    pair = [section["contestants"].get(n, {}) for n in (name, _ours(section, name))]
    return all("seconds" in r and r["status"] in ("ok", "wrong") for r in pair)


def _ratio_to_ours(section: Result, name: str) -> str:
    return f"{ratio(section, name, _ours(section, name))[1]:.2f}" if _comparable(section, name) else ""


def _beats_ours(section: Result, name: str, r: Result) -> bool:
    if r["ceiling"] or name == _ours(section, name) or not _comparable(section, name):
        return False
    return ratio(section, name, _ours(section, name))[1] < 1


def _share(section: Result, r: Result) -> str:
    """How much of the time is the part that no method can do without.

    That is the bare matrix products; or one read of the logits at the bandwidth of a copy, and for gradients
    another read and a write.
    """
    share = share_of_ceiling(section, r)
    return "" if share is None or r["ceiling"] else f"{share:.2f}"


def share_of_ceiling(section: Result, r: Result) -> float | None:
    copies = 0.5 if section["way"] == "forward" else 1.5
    products = f"{r['products']} bare product" + ("s" if r["products"] > 1 else "")
    name, factor = ("a copy of the logits", copies) if section["kind"] == "logits" else (products, 1.0)
    ceiling = section["contestants"].get(name, {})
    return factor * _median(ceiling) / _median(r) if "seconds" in ceiling and "seconds" in r else None


# Budgets


def budgets(cpu: Result, cuda: Result, trainer: Result, gpu_trainer: Result) -> str:
    """The budgets, and beside each what was measured."""
    rows = [
        ("training step with all statistics and PAPO", "TRL's GRPO step", "time ≤ 1.02",
         *_trainer(trainer, "papo_to_grpo", 1.02)),
        ("the same, GPU, a model of 0.6B parameters", "TRL's GRPO step", "time ≤ 1.02",
         *_trainer(gpu_trainer, "papo_to_grpo", 1.02)),
        ("an update of it, without generation", "TRL's GRPO update", "time ≤ 1.02",
         *_trainer(gpu_trainer, "papo_update_to_grpo_update", 1.02)),
        ("training step with a forecast of its update", "the step without", "time ≤ 1.05",
         *_trainer(trainer, "forecast_to_papo", 1.05)),
        ("training step with exact signs on every rollout, one update each", "the step with local ones", "none",
         *_trainer(trainer, "exact_to_papo")),
        ("all statistics of float32 logits, CPU", "TRL's log p and H", "time ≤ 0.3, extra memory ≤ 16 MiB",
         *logits_budget(cpu)),
        ("hidden states → statistics, forward, CPU", "the bare matrix product", "time ≤ 1.10", *head_budget(cpu)),
        ("all statistics of bf16 logits, GPU", "one read of the logits at the bandwidth of a copy", "≥ 0.85 of it",
         *_bandwidth(cuda)),
        ("hidden states → statistics, forward and backward, GPU", "the fastest method with as many products",
         "time ≤ 1.0", *_peers(cuda)),
        ("the same, memory", "the smallest with float32 gradients", "≤ 1.0, and one tile more", *_memory(cuda)),
        ("growth in tokens and in vocabulary", "linear", "time exponent ≤ 1.1; memory in V ≤ 0.1", *_growth(cpu)),
    ]  # fmt: skip
    return "\n".join(
        [
            "| what | against | budget | measured | met |",
            "|---|---|---|---|---|",
            *(f"| {' | '.join(r)} |" for r in rows),
        ]
    )


def _section(result: Result, kind: str, way: str, dtype: str, **sizes: int) -> Result | None:
    wanted = {"kind": kind, "way": way, "dtype": dtype, **sizes}
    return next((s for s in result.get("sections", []) if wanted.items() <= s.items()), None)


def _verdict(measured: str, met: bool) -> tuple[str, str]:
    return measured, "yes" if met else "**no**"


NOT_YET = ("not measured yet", "")


def _trainer(trainer: Result, name: str, budget: float | None = None) -> tuple[str, str]:
    if name not in trainer:
        return NOT_YET
    figure = trainer[name]
    low, high = figure["interval_95"]
    measured = f"{figure['ratio']:.3f} [{low:.3f}, {high:.3f}]"
    return (measured, "") if budget is None else _verdict(measured, figure["ratio"] <= budget)


def logits_budget(cpu: Result) -> tuple[str, str]:
    section = _section(cpu, "logits", "forward", "float32")
    if section is None or not _comparable(section, "TRL"):
        return NOT_YET
    low, middle, high = ratio(section, "ours, chunked", "TRL")
    extra = section["contestants"]["ours, chunked"]["extra_bytes"] / 2**20
    return _verdict(f"{middle:.2f} [{low:.2f}, {high:.2f}]; {extra:.1f} MiB", middle <= 0.3 and extra <= 16)


def head_budget(cpu: Result) -> tuple[str, str]:
    section = _section(cpu, "head", "forward", "float32")
    if section is None or not _comparable(section, "1 bare product"):
        return NOT_YET
    low, middle, high = ratio(section, "ours", "1 bare product")
    return _verdict(f"{middle:.2f} [{low:.2f}, {high:.2f}]", middle <= 1.1)


def _bandwidth(cuda: Result) -> tuple[str, str]:
    section = _section(cuda, "logits", "forward", "bfloat16")
    share = None if section is None else share_of_ceiling(section, section["contestants"]["ours, triton"])
    return NOT_YET if share is None else _verdict(f"{share:.2f}", share >= 0.85)


def _rivals(cuda: Result) -> list[tuple[Result, str, dict[str, Result]]]:
    """For each measured width and for 4 and 3 products: the section, our method and those of others."""
    found = []
    for section in cuda.get("sections", []):
        if section["kind"] == "head" and section["way"] == "backward":
            for ours in ("ours", "ours, callback"):
                rivals = {
                    name: r
                    for name, r in section["contestants"].items()
                    if r["status"] == "ok" and not r["ceiling"] and not name.startswith(("ours", "naive"))
                    if _ours(section, name) == ours and _comparable(section, name)
                }
                if rivals:
                    found.append((section, ours, rivals))
    return found


def _peers(cuda: Result) -> tuple[str, str]:
    cells, ratios = [], []
    for section, ours, rivals in _rivals(cuda):
        best = min(rivals, key=lambda name, rivals=rivals: _median(rivals[name]))
        ratios.append(ratio(section, ours, best)[1])
        products = section["contestants"][ours]["products"]
        cells.append(f"D = {section['width']:,}, {products} products: {ratios[-1]:.2f} of {best}")
    return _verdict("; ".join(cells), max(ratios) <= 1) if cells else NOT_YET


def _memory(cuda: Result) -> tuple[str, str]:
    cells, met = [], True
    for section, ours, rivals in _rivals(cuda):
        sizes = {name: r["extra_bytes"] for name, r in rivals.items() if r["note"].startswith("float32")}
        if sizes:
            least, mine = min(sizes, key=lambda name: sizes[name]), section["contestants"][ours]["extra_bytes"]
            products = section["contestants"][ours]["products"]
            cells.append(f"D = {section['width']:,}, {products} products: {mine / sizes[least]:.2f} of {least}")
            met &= mine <= sizes[least] + (2**28 if ours == "ours" else 2**29)  # the tile of either way
    return _verdict("; ".join(cells), met) if cells else NOT_YET


def _growth(result: Result) -> tuple[str, str]:
    if "growth" not in result:
        return NOT_YET
    rows, vocabulary = (result["growth"]["fused"][along] for along in ("rows", "vocabulary"))
    measured = f"time {rows['time']:.2f} in N, {vocabulary['time']:.2f} in V; memory {vocabulary['memory']:.2f} in V"
    return _verdict(measured, max(rows["time"], vocabulary["time"]) <= 1.1 and vocabulary["memory"] <= 0.1)


# Growth, tuning and instructions


def growth(result: Result) -> str:
    if "growth" not in result:
        return MISSING
    lines = ["| exponent of | time in N | time in V | memory in N | memory in V |", "|---|---|---|---|---|"]
    for name, title in (("fused", "fused: a tile of logits at a time"), ("logits", "all logits at once")):
        along = result["growth"][name]
        cells = [f"{along[a][what]:.2f}" for what in ("time", "memory") for a in ("rows", "vocabulary")]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    picture = "![Time and extra memory against tokens and vocabulary, fused and with all logits](growth.svg)\n\n"
    return (picture if result["device"] == "cpu" else "") + "\n".join(lines)


def tuned(result: Result) -> str:
    """The three best settings of each sweep."""
    if "tune" not in result:
        return ""
    lines = ["| sweep | settings, the fastest first | time, ms |", "|---|---|---|"]
    for name, settings in result["tune"].items():
        for r in [r for r in settings if "seconds" in r][:3]:
            constants = ", ".join(f"{key} {value:,}" for key, value in r.items() if key.isupper())
            lines.append(f"| {name} | {constants} | {_ms(statistics.median(r['seconds']))} |")
    return "\n".join(lines)


def parts(run: Result) -> str:
    """What benchmarks/accelerator.py did on a GPU, part by part."""
    if not run or run["rehearsal"]:
        return MISSING
    environment = run["environment"]
    rows = [
        [name, part["status"], f"{part.get('seconds', 0):.0f}", str(part.get("found") or part.get("why", ""))[:300]]
        for name, part in run["parts"].items()
    ]
    return f"{environment['card']}; {environment['date'][:10]}.\n\n" + markdown(["part", "", "seconds", "found"], rows)


def instructions(code: Result) -> str:
    """The main kernels without a mask, which changes nothing in the loop; first and last tiles are like the others."""
    if not code:
        return MISSING
    lines = [
        "| kernel | logits | soft cap | instructions per logit, sm_80 | sm_90 | registers, sm_90 | spills |",
        "|---|---|---|---|---|---|---|",
    ]
    rows = [r for r in code["kernels"] if not r["mask"] and r["case"] in ("whole rows", "middle tile", "gradient")]
    for r in sorted((r for r in rows if r["architecture"] == "sm_90"), key=lambda r: (r["softcap"], r["dtype"])):
        same = ("case", "dtype", "softcap")
        other = next((o for o in rows if o["architecture"] == "sm_80" and all(o[k] == r[k] for k in same)), None)
        figures = [f"{other['per_element']:.1f}" if other else "", f"{r['per_element']:.1f}", str(r["registers"])]
        spills = r["spill_instructions"] + (other["spill_instructions"] if other else 0)
        cap = "yes" if r["softcap"] else ""
        lines.append(f"| {' | '.join([r['case'], r['dtype'], cap, *figures, str(spills)])} |")
    environment = code["environment"]
    made = f"Triton {environment['packages']['triton']}; {environment['date'][:10]}; `{environment['command']}`."
    return f"{made}\n\n" + "\n".join(lines)


# The figure


# Colours that can be read on white and on black.
STYLE = """<style>
text { font: 12px sans-serif; fill: #7d828a } .title { font-weight: bold } .grid { stroke: #999; stroke-opacity: .3 }
.fused { stroke: #2f86c6; fill: #2f86c6 } .logits { stroke: #d9711c; fill: #d9711c }
polyline { fill: none !important; stroke-width: 2 } text.fused, text.logits { stroke: none }
</style>"""
WIDTH, HEIGHT, LEFT, TOP, STEP_X, STEP_Y = 270, 170, 70, 50, 380, 250


def figure(result: Result) -> str:
    """Four panels, logarithmic both ways: time and extra memory against tokens and against vocabulary."""
    sections = [s for s in result["sections"] if s["kind"] == "growth"]
    fixed = {a: statistics.mode(s[a] for s in sections) for a in ("rows", "vocabulary")}
    titles = {"rows": f"tokens N (V = {fixed['vocabulary']:,})", "vocabulary": f"vocabulary V (N = {fixed['rows']:,})"}
    body = []
    for column, along in enumerate(("rows", "vocabulary")):
        other = {"rows": "vocabulary", "vocabulary": "rows"}[along]
        line = sorted((s for s in sections if s[other] == fixed[other]), key=lambda s: s[along])
        values: dict[str, Callable[[Result], float]] = {
            "time, ms": lambda r: _median(r) * 1e3,
            "extra memory, MiB": lambda r: max(r["extra_bytes"] / 2**20, 2**-6),
        }
        for row, (label, value) in enumerate(values.items()):
            series = {name: [(s[along], value(s["contestants"][name])) for s in line] for name in ("fused", "logits")}
            body.append(_panel(LEFT + column * STEP_X, TOP + row * STEP_Y, label, titles[along], series))
    names = {"fused": "fused: a tile of logits at a time", "logits": "all logits at once"}
    legend = "".join(
        f'<circle class="{name}" cx="{LEFT + 250 * i}" cy="18" r="4"/>'
        f'<text x="{LEFT + 250 * i + 10}" y="22" class="{name} title">{text}</text>'
        for i, (name, text) in enumerate(names.items())
    )
    size = f'viewBox="0 0 {LEFT + STEP_X + WIDTH + 20} {TOP + STEP_Y + HEIGHT + 50}"'
    title = "<title>Time and extra memory against tokens and vocabulary</title>"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size}>\n{title}\n{STYLE}\n{legend}\n'
        + "\n".join(body)
        + "\n</svg>\n"
    )


def _panel(left: int, top: int, label: str, below: str, series: dict[str, list[tuple[float, float]]]) -> str:
    points = [point for line in series.values() for point in line]
    place_x = _scale([x for x, _ in points], left, left + WIDTH, margin=1.15)
    place_y = _scale([y for _, y in points], top + HEIGHT, top, margin=1.3)
    parts = [f'<g><text x="{left}" y="{top - 8}" class="title">{label}</text>']
    parts.append(f'<text x="{left + WIDTH / 2}" y="{top + HEIGHT + 36}" text-anchor="middle">{below}</text>')
    for x in sorted({x for x, _ in points}):
        at = f"{place_x(x):.1f}"
        parts.append(f'<line class="grid" x1="{at}" x2="{at}" y1="{top}" y2="{top + HEIGHT}"/>')
        parts.append(f'<text x="{at}" y="{top + HEIGHT + 18}" text-anchor="middle">{_short(x)}</text>')
    for y in (digit * 10.0**n for n in range(-3, 9) for digit in (1, 2, 5)):
        if top <= place_y(y) <= top + HEIGHT:
            at = place_y(y)
            parts.append(f'<line class="grid" x1="{left}" x2="{left + WIDTH}" y1="{at:.1f}" y2="{at:.1f}"/>')
            parts.append(f'<text x="{left - 8}" y="{at + 4:.1f}" text-anchor="end">{y:g}</text>')
    for name, line in series.items():
        places = [(place_x(x), place_y(y)) for x, y in line]
        parts.append(f'<polyline class="{name}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in places)}"/>')
        parts += [f'<circle class="{name}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in places]
    return "\n".join([*parts, "</g>"])


def _scale(values: list[float], start: float, stop: float, margin: float) -> Callable[[float], float]:
    """From a value to its place on a logarithmic axis."""

    low, high = math.log(min(values) / margin), math.log(max(values) * margin)
    return lambda value: start + (math.log(value) - low) / (high - low) * (stop - start)


def _short(x: float) -> str:
    return f"{x / 1024:g}k" if x >= 1024 else f"{x:g}"
