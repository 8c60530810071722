"""The four answers at the top of a report: is it right, is it good, is it small and fast, what is not as requested."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fewbit.report.words import (
    UNIT,
    Json,
    bare,
    ends_of,
    fall,
    grouped,
    measured,
    megabytes,
    paired_speed,
    percent,
    places,
    plural,
    share,
    signed,
    size,
    speed,
)

ELSEWHERE = ("runtime", "machine")  # kinds of fallbacks where another runtime or processor than the target's computed
MARGIN = 1.02  # times as fast as the runtime's fastest float model, from which an integer file pays


@dataclass(frozen=True)
class Card:
    """An answer: what is large, with small words beside it, lines below, and what one must not miss; a word for a glance."""

    question: str
    big: str
    small: str = ""
    lines: Sequence[str] = ()
    loud: Sequence[str] = ()
    word: str = ""
    mood: str = ""


def answers(report: Json, tables: Json) -> list[Card]:
    return [right(report, tables), good(report), small_and_fast(report), not_as_requested(report)]


def right(report: Json, tables: Json) -> Card:
    verify, question = report.get("verify"), "Is it right?"
    if not verify:
        return Card(question, "not verified", lines=["No codes were compared with a runtime."], word="unknown", mood="unsure")
    differing, compared, problems = verify["codes_differing"], verify["codes_compared"], verify.get("problems") or ()
    checks, lines = tables.get("checks"), list[str]()
    explained = verify.get("codes_wrong", sum(row["wrong"] for row in checks) if checks else None)
    wrong, what = (differing, "differ") if explained is None else (explained, "are wrong")
    if wrong:
        lines.append(f"Worst site: {verify['worst_site']}, off by at most {verify['max_difference']}.")
    if differing > wrong:
        ties = plural(differing - wrong, "tie")
        lines.append(f"{ties} besides: codes that are off where the simulation stands on a rounding boundary.")
    lines += filter(None, [near_ties(verify)])
    crowds, far = verify.get("tied_sites"), apart(verify)
    if not problems and "outputs" in verify:
        rest = "." if far else ", and the outputs differ no more than float32 rounding explains."
        lines.append(f"The weights in the file are the plan's{rest}")
    lines += [] if crowds or not far else [f"{far} Ties in other places than where its codes are shown explain that."]
    word, mood = ("no", "bad") if wrong or problems else ("yes, but for ties", "unsure") if crowds else ("yes", "good")
    small = f"of {compared:,} codes {what}, at {plural(verify['sites'], 'site')}"
    loud = [*(f"{line}." for line in problems), *([f"{crowded(verify)} {far}"] if crowds else [])]
    return Card(question, f"{wrong:,}", small, lines, loud, word, mood)


def crowded(verify: Json) -> str:
    """What is said where a site has more ties than chance brings; "" where none has, or where nobody has looked."""
    sites = verify.get("tied_sites") or ()
    if not sites:
        return ""
    worst, more = sites[0], f" So it is at {plural(len(sites) - 1, 'site')} besides." if len(sites) > 1 else ""
    return (
        f"At {worst['site']} {worst['ties']:,} of {worst['compared']:,} codes are ties, more than chance brings: so many of "
        f"its numbers stand on the boundary of two codes, and the runtime takes the other one.{more}"
    )


def apart(verify: Json) -> str:
    """How far the outputs of the file are from those of the simulation by itself, by the one that is furthest for its spread;
    "" where nobody has looked.
    """
    rows = verify.get("gaps") or ()
    if not rows:
        return ""
    worst = max(rows, key=_far)
    start = f"The outputs of the file ({worst['place']}) differ from what the simulation gives by itself"
    difference, spread = float(worst["difference"]), worst["spread"]
    if not math.isfinite(difference):
        return f"{start}: {worst['output']} has another shape, or infinite numbers where the other has none."
    if spread is None:
        return f"{start}: {percent(100 * difference)} of the numbers of {worst['output']} are others."
    most = f"{start} by up to {difference:.3g} in {worst['output']}"
    return f"{most}, {percent(100 * difference / spread)} of its standard deviation." if spread else f"{most}."


def _far(row: Json) -> float:
    difference, spread = float(row["difference"]), row["spread"]
    far = difference if spread is None else difference / spread if spread else math.inf if difference else 0.0
    return math.inf if math.isnan(far) else far


def near_ties(verify: Json) -> str:
    """What is said where nearly equal scores were selected among; "" where none were, or where nobody has looked."""
    near, rows = verify.get("near_ties", 0), verify.get("selections", 0)
    if not near:
        return ""
    what = plural(near, "selection") + " was a near tie" if near == 1 else plural(near, "selection") + " were near ties"
    return (
        f"{what}, of {rows:,} (top-k, sorting, the largest, thresholds): numbers that float32 rounding may order either way. "
        "What the runtime selected was taken, and all codes behind it were compared."
    )


def good(report: Json) -> Card:
    accuracy, images, question = report.get("accuracy"), report.get("images") or {}, "Is it good?"
    exempt = [f"Left alone on request: {'; '.join(report['exemptions'])}."] if report.get("exemptions") else []
    if not accuracy:
        return Card(question, "not evaluated", lines=["No images were scored.", *exempt])
    before, after, unit = accuracy.get("float"), accuracy.get("quantized"), accuracy.get("unit", "%")
    what, ends = str(accuracy["agreement_measure"]), accuracy.get("interval")
    agreement = percent(accuracy["agreement"])
    if before is not None and after is not None:
        low, high = map(signed, ends)
        big, small = f"{bare(before, unit)} → {measured(after, unit)}", accuracy["measure"]
        moved = ("+" if after >= before else "") + fall(after - before, unit)
        change = f"Change on the same images {moved}, 95{UNIT}% interval {low} to {high}."
        lines = [change, f"{agreement} {what}."]
    else:
        big, small = agreement, what
        interval = ends_of(ends) if ends else "not known"
        unused = "" if accuracy["why"] else ": no labels were used"
        lines = [f"95{UNIT}% interval {interval}. This is agreement with the float model, not accuracy{unused}."]
    scored = f"{plural(images.get('scored', 0), 'image')} scored in {accuracy['runtime']}"
    calibrated = f", {images['calibration']:,} others for calibration" if "calibration" in images else ""
    warnings = (*report.get("notes", ()), *(report.get("calibration") or {}).get("warnings", ()))
    loud = [str(line) for line in (accuracy["why"], *warnings) if line]
    goal = [report["goal"]] if report.get("goal") else []
    more = more_images((report.get("calibration") or {}).get("seen"))
    return Card(question, big, small, [*lines, f"{scored}{calibrated}.", *more, *goal, *exempt], loud)


def more_images(seen: Json | None) -> list[str]:
    """What more calibration images can bring: a part of what the file does better on those that it was fitted to."""
    if not seen:
        return []
    gap, known = seen["agreement"] - seen["others"], percent(seen["agreement"])
    here = f"On {seen['images']:,} of the calibration images agreement is {known}"
    if gap <= seen["chance"]:
        return [f"{here}, no more than chance away: more of them would bring little."]
    return [f"{here}: codes are fitted to these. More images (--calibration) can bring a part of the {gap:.1f} points between."]


def small_and_fast(report: Json) -> Card:
    sizes, timings, question = report.get("size"), report.get("latency") or {}, "Is it small and fast?"
    big, small, lines, loud = "not exported", "", list[str](), list[str]()
    if sizes:
        both = sizes["float_bytes"], sizes["onnx_bytes"]
        before, after = (megabytes(of_file, both) for of_file in both)
        unit = after[after.rindex(UNIT) :]
        big = f"{before.removesuffix(unit)} → {after}"
        small = size(*both)
        lines.append(f"ONNX files; {sizes['average_weight_bits']:.2f} bits a weight.")
    for runtime, row in timings.items():
        faster = paired_speed(row["float_ms"], row["quantized_ms"], row["ratio"])
        said = f"{runtime}: {row['float_ms']:.2f} → {row['quantized_ms']:.2f} ms, {faster}."
        (loud if row["ratio"] < 1 else lines).append(said)
    if not timings and report.get("skipped"):
        lines.append("Times were not measured (--quick); fewbit bench RUN measures them.")
    elif not timings:
        elsewhere = [row["why"] for row in report.get("fallbacks") or () if row.get("kind") in ELSEWHERE]
        lines.append(f"No time of the target is known{': ' if elsewhere else ''}{'; '.join(elsewhere)}.")
    paid = report.get("pays")
    if paid is None or paid["pays"]:
        return Card(question, big, small, lines, loud)
    return Card(question, big, small, [*lines, *loud], [unpaid(paid)], "keep your float model", "bad")


def unpaid(paid: Json) -> str:
    """Why an integer file does not pay: both times with their spread, and whether noise may have decided."""

    def time(name: str) -> str:
        low, high = paid[f"{name}spread"]
        return f"{paid[f'{name}ms']:.2f}{UNIT}ms ({low:.2f} to {high:.2f})"

    low, high = paid["interval"]
    where = f"batch {paid['batch']}, threads: {paid['threads']}, {plural(paid['rounds'], 'round')}"
    before, after = f"{time('float_')} in {paid['float_runtime']}", f"{time('')} in {paid['runtime']}"
    ratio = f"median ratio {paid['ratio']:.3f}, 95{UNIT}% interval {low:.3f} to {high:.3f}"
    said, alone = speed(paid["ratio"]), speed(paid["float_ms"] / paid["ms"])
    medians = "" if said == alone else f", by these two medians alone {alone}"
    words = f"Keep your float model: it takes {before}, the file {after} ({where}). In paired rounds the file is {said} "
    words += f"({ratio}){medians}; a file pays from {100 * (MARGIN - 1):.0f}{UNIT}% faster in paired rounds."
    noise = " Noise may have decided: measure again with fewbit bench when little else runs."
    return words + noise if high >= MARGIN else words


def not_as_requested(report: Json) -> Card:
    """Goals that were missed, and fallbacks; what was left in float on purpose is told apart from them."""
    question, missed = "What is not as requested?", report.get("missed") or ()
    rows, integer = report.get("fallbacks") or (), report.get("integer_share")
    chosen, refused = chosen_and_refused(rows)
    lines = [] if integer is None else [f"{share(integer)} of the multiply-accumulates run in integers."]
    for group in grouped([row for row in refused if row.get("kind") in ELSEWHERE], ("requested", "actual", "why")):
        lines.append(f"{group['actual']} took the place of {group['requested']}: {group['why']}.")
    inside = [row for row in refused if row.get("kind") not in ELSEWHERE]
    if inside:
        most = max(grouped(inside, ("requested", "actual", "why")), key=lambda group: len(group["site"]))
        where = places(most["site"])
        lines.append(f"Most often {most['requested']} became {most['actual']}, at {where}: {most['why']}.")
    if report.get("skipped"):
        lines.append(f"Left out on request (--quick): {', '.join(report['skipped'])}.")
    islands = {row["site"] for row in refused if row["actual"] == "float"}
    if islands:
        lines.append(f"{places([*islands])} stayed float.")
    for group in grouped(chosen, ("why",)):
        lines.append(f"{places(group['site'])} left in float on purpose: {group['why']}.")
    counts = [plural(len(what), word) for what, word in ((missed, "missed goal"), (refused, "fallback")) if what]
    big, _, small = (", ".join(counts) or "nothing").partition(" ")
    return Card(question, big, small, lines, missed, *(("not kept", "bad") if missed else ()))


def chosen_and_refused(rows: Iterable[Json]) -> tuple[list[Json], list[Json]]:
    """The rows of what is in float on purpose (faster, asked for, or by --max-drop), and those of what could not be had."""
    rows = list(rows)
    return [row for row in rows if row.get("kind") == "chosen"], [row for row in rows if row.get("kind") != "chosen"]


def _again(command: str, folder: str, name: str, *more: str) -> str:
    """A command, if there is one, with more options, that writes to a folder beside that of its run, which stays. It measures
    times, also where its run did not (--quick).
    """
    if not command:
        return ""
    words = shlex.split(command)
    places = {i for i, word in enumerate(words) if word in ("--force", "--quick") or word.startswith("--out=")}
    places |= {place for i, word in enumerate(words) if word == "--out" for place in (i, i + 1)}
    kept = [word for i, word in enumerate(words) if i not in places]
    return shlex.join([*kept, *more, "--out", f"{folder.rstrip('/')}-{name}"])


def advice(report: Json, tables: Json) -> list[tuple[str, str]]:
    """What to do next: sentences, each with a command or none."""
    verify, accuracy, paid = report.get("verify"), report.get("accuracy"), report.get("pays")
    if not verify or not accuracy:
        return []
    if verify.get("problems"):
        return [
            ("Do not use this file: it does not compute what was planned. On the target's own hardware, verify it there.", "")
        ]
    command = str((tables.get("run") or {}).get("command") or "")
    again = command if command.startswith("fewbit quantize") else ""
    more = tables.get("next") or {}
    folder, modules = more.get("folder", "RUN"), more.get("sensitivity") or f"fewbit sensitivity {report.get('model')}"
    steps = []
    if paid and not paid["pays"] and "--only-what-pays" not in again:
        steps.append(("Leave float what loses time in integers.", _again(again, folder, "that-pays", "--only-what-pays")))
    if accuracy.get("quantized") is not None and accuracy["interval"][1] < 0 and "--max-drop" not in again:
        steps.append(("It loses more than chance explains. Find the fastest file within a limit, here half a point:",
                      _again(again, folder, "within-0.5", "--max-drop", "0.5")))  # fmt: skip
        steps.append(
            (
                "Or see which modules lose most, and leave them float.",
                modules,
            )
        )
    if steps:
        return steps
    return [
        ("Try it: a picture in the browser, both answers side by side.", shlex.join(["fewbit", "serve", folder])),
        (
            "Take it along: the model, its preprocessing and a program without torch.",
            shlex.join(["fewbit", "export", folder, "--to", "FOLDER"]),
        ),
    ]
