"""The tables of bench_overlap: how much of the communication each schedule hides, in figures and as a picture.

████████▒▒▒▒▒▒······    of the sequential time: compute, communication still exposed, and what is saved
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

from bench.record import table, target

WIDTH = 24
COMPUTE, EXPOSED, SAVED = "█▒·"
# The project's targets for a GPU: least tokens -> most of the communication that may stay exposed.
MOST_EXPOSED = {2048: 0.2, 1024: 0.4}
LEAST_SPEEDUP = 0.99
IN_PLACE = "sums in place"
LEGEND = f"""In brackets: the share of the communication that a schedule hides, or its speed where sequential is faster.
The bar is the sequential time: {COMPUTE} compute, {EXPOSED} exposed by the fastest schedule, {SAVED} saved by it."""
LEGEND_IN_PLACE = f"""{IN_PLACE}: from the last rank's arrival to the last rank's leaving, sequential -> auto."""


def overlap_rows(results: dict[str, dict]) -> list[dict]:
    """Of the sections' rows those of bench_overlap; of the same case the newest."""
    ordered = sorted(results.values(), key=lambda result: result["stamp"]["date"])
    return list({row["what"]: row for result in ordered for row in result["rows"] if "schedules" in row}.values())


def duration(us: float) -> str:
    """With three digits: `12.6 us`, `1.26 ms`, `1.26 s`."""
    unit, factor = next((u, f) for u, f, most in (("us", 1, 1e3), ("ms", 1e3, 1e6), ("s", 1e6, 1e99)) if us < most)
    return f"{us / factor:#.3g} {unit}".replace(". ", " ")


def picture(row: dict) -> str:
    """The fastest schedule beside the sequential one, which is as wide as the bar."""
    sequential, compute = _us(row, "off"), row["compute_us"]["median"]
    best = min(min(_us(row, mode) for mode in row["schedules"]), sequential)
    first = min(round(WIDTH * compute / sequential), WIDTH)
    second = max(round(WIDTH * best / sequential), first)
    return COMPUTE * first + EXPOSED * (second - first) + SAVED * (WIDTH - second)


def overlap_table(rows: Iterable[dict]) -> str:
    """One table for each model, role and number of ranks, a line for each number of tokens; and what it means."""
    rows = list(rows)
    if not (tables := [_table(list(group)) for _, group in itertools.groupby(rows, key=_title)]):
        return ""
    legend = [LEGEND, LEGEND_IN_PLACE] if any(row["in_place_us"] for row in rows) else [LEGEND]
    return "\n\n".join([*tables, "\n".join(legend)])


def _title(row: dict) -> str:
    width = f", 1/{row['scale']} as wide" if row["scale"] > 1 else ""
    layers = f"{row['layers']} " if row["role"] == "layers" else ""
    return f"{row['model']}{width}, {layers}{row['role']}, tp {row['tp_size']}, {row['dtype']}, {row['link']}"


def _table(rows: Sequence[dict]) -> str:
    others = [mode for mode in rows[0]["schedules"] if mode != "off"]
    has_sums = any(row["in_place_us"] for row in rows)
    lines = [["M", "compute", "communication", "ideal", "sequential", *others, *[IN_PLACE] * has_sums, ""]]
    for row in rows:
        communication = duration(row["communication_us"]["median"])
        if row.get("published_us"):
            communication += f" (published {duration(row['published_us'])})"
        figures = duration(row["ideal_us"]), duration(_us(row, "off")), *(_cell(row, mode) for mode in others)
        sums = [_in_place(row)] * has_sums
        compute = duration(row["compute_us"]["median"])
        lines.append([str(row["m"]), compute, communication, *figures, *sums, picture(row)])
    return f"{_title(rows[0])}\n\n{table(lines)}"


def _cell(row: dict, mode: str) -> str:
    """The time and the share hidden, or where it is slower than sequential its speed; the name of what is the same."""
    schedule = row["schedules"][mode]
    if schedule["as"]:
        return f"= {'sequential' if schedule['as'] == 'off' else schedule['as']}"
    us, share = schedule["us"]["median"], schedule["hidden"]
    judged = f"{_us(row, 'off') / us:.2f}x" if us > _us(row, "off") else "" if share is None else f"{share:.0%}"
    name = f" {row['chosen']}" if mode == "auto" and row["chosen"] else ""
    return f"{duration(us)} {f'({judged})' if judged else ''}{name}".strip()


def _in_place(row: dict) -> str:
    """What sequential sums cost where they are, and those of `auto` if they are others."""
    auto = row["schedules"]["auto"]["as"] or "auto"
    found = row["in_place_us"]
    return " -> ".join(duration(found[mode]["median"]) for mode in dict.fromkeys(("off", auto)) if mode in found)


def overlap_targets(rows: Sequence[dict]) -> list[dict]:
    """What is left exposed by `auto` in decoder layers, the worst of all rows of a size; and its speed, of any row."""
    found = []
    layers = [row for row in rows if row["role"] == "layers" and row["schedules"]["auto"]["hidden"] is not None]
    for least, most in MOST_EXPOSED.items():
        next_m = min((m for m in MOST_EXPOSED if m > least), default=1 << 62)
        shares = [1 - row["schedules"]["auto"]["hidden"] for row in layers if least <= row["m"] < next_m]
        if shares:
            name = f"communication exposed by auto, decoder layers, M >= {least}"
            found.append(target(name, max(shares), most=most))
    if rows:
        worst = min(row["schedules"]["auto"]["speedup"]["median"] for row in rows)
        found.append(target("auto over sequential, the worst row", worst, least=LEAST_SPEEDUP))
    return found


def _us(row: dict, mode: str) -> float:
    return row["schedules"][mode]["us"]["median"]
