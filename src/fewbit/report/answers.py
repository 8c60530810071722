"""The four answers at the top of a report: is it right, is it good, is it small and fast, what did we not get."""

from __future__ import annotations

from html import escape

from fewbit.report.pieces import UNIT, Json, card, grouped, megabytes, percent, plural, share


def right(report: Json, tables: Json) -> str:
    verify, question = report.get("verify"), "Is it right?"
    if not verify:
        return card(question, "not verified", "No codes were compared with a runtime.", word="unknown", mood="unsure")
    differing, compared = verify["codes_differing"], verify["codes_compared"]
    checks, explained = tables.get("checks"), ""
    total = sum(row["wrong"] for row in checks) if checks else None
    unexplained = verify.get("codes_wrong", total)
    wrong = differing if unexplained is None else unexplained
    if unexplained is not None and differing:
        ties = "Every difference is a tie: off by one where the simulation stands on a rounding boundary."
        explained = f"{plural(wrong, 'code')} cannot be explained by rounding." if wrong else ties
    big = f"{differing:,} <small>of {compared:,} codes differ</small>"
    how = f"Simulation against runtime, the same codes going in, at {plural(verify['sites'], 'site')}."
    problems = verify.get("problems") or ()
    more = (
        []
        if problems or "outputs" not in verify
        else [
            f"{verify['stored_codes']:,} codes of weights in the file are the plan's, {plural(verify['outputs'], 'output')} "
            "within what float32 rounding explains."
        ]
    )
    worst = f"Worst site: {escape(str(verify['worst_site']))}, off by at most {verify['max_difference']}."
    word, mood = ("no", "bad") if wrong or problems else ("yes", "good")
    said = (*more, *(f"<b>{escape(str(line))}.</b>" for line in problems))
    return card(question, big, how, worst if differing else "", explained, *said, word=word, mood=mood)


def good(report: Json) -> str:
    accuracy, images, question = report.get("accuracy"), report.get("images") or {}, "Is it good?"
    exempt = "; ".join(map(escape, report.get("exemptions") or ())) or "nothing"
    if not accuracy:
        return card(question, "not evaluated", "No images were scored.", f"Exempt: {exempt}.")
    before, after = accuracy.get("float"), accuracy.get("quantized")
    labelled = before is not None and after is not None
    what = escape(str(accuracy["agreement_measure"]))
    agreement = f"{percent(accuracy['agreement'])} {what}."
    ends, unit = accuracy.get("interval"), escape(str(accuracy.get("unit", "%")))
    scored = f"{plural(images.get('scored', 0), 'image')} scored in {escape(str(accuracy['runtime']))}"
    if labelled:
        points = "points" if unit == "%" else unit
        low, high = (f"{end:+.2f}".replace("-", "−") for end in ends)
        change = f"{after - before:+.2f}".replace("-", "−")
        big = f"{before:.2f} → {after:.2f}{UNIT}{unit} <small>{escape(str(accuracy['measure']))}</small>"
        lines = [f"{change} {points}; 95{UNIT}% interval of this change {low} to {high}.", agreement]
    else:
        interval = " to ".join(map(percent, ends)) if ends else "not known"
        big = f"{percent(accuracy['agreement'])} <small>{what}</small>"
        lines = [f"No labels, so no accuracy; 95{UNIT}% interval {interval}."]
    if accuracy["why"]:
        lines.append(f"<b>{escape(str(accuracy['why']))}</b>")
    calibrated = f"; {images['calibration']:,} for calibration" if "calibration" in images else ""
    warnings = (*report.get("notes", ()), *(report.get("calibration") or {}).get("warnings", ()))
    warned = [f"<b>{escape(str(warning))}</b>" for warning in warnings]
    return card(question, big, *lines, f"{scored}{calibrated}.", f"Exempt: {exempt}.", *warned)


def small_and_fast(report: Json) -> str:
    sizes, timings, question = report.get("size"), report.get("latency") or {}, "Is it small and fast?"
    lines = []
    if sizes:
        big = f"{sizes['float_bytes'] / 1e6:.2f} → {megabytes(sizes['onnx_bytes'])}"
        big += f" <small>{sizes['float_bytes'] / sizes['onnx_bytes']:.2f}× smaller</small>"
        packed = f"weights packed {megabytes(sizes['packed_bytes'])}, " if sizes.get("packed_bytes") is not None else ""
        lines.append(f"ONNX files; {packed}{sizes['average_weight_bits']:.2f} bits a weight.")
    else:
        big = "not exported"
    for runtime, row in timings.items():
        lines.append(
            f"{escape(runtime)}: {row['float_ms']:.2f} → {row['quantized_ms']:.2f} ms, "
            f"{'<b>slower</b>, ' if row['quantized_ms'] > row['float_ms'] else ''}{row['ratio']:.2f}× as fast."
        )
    return card(question, big, *lines, "" if timings else "No latency was measured.")


def not_got(report: Json) -> str:
    fallbacks, integer = report.get("fallbacks") or (), report.get("integer_share")
    big = f"{len(fallbacks):,} <small>{'fallback' if len(fallbacks) == 1 else 'fallbacks'}</small>"
    lines = [] if integer is None else [f"{share(integer)} of multiply-accumulates run in integers."]
    if fallbacks:
        most = max(grouped(fallbacks, ("requested", "actual", "why")), key=lambda group: len(group["site"]))
        requested, actual, why = (escape(str(most[key])) for key in ("requested", "actual", "why"))
        lines.append(f"Most often {requested} became {actual}, at {plural(len(most['site']), 'site')}: {why}.")
    islands = {row["site"] for row in fallbacks if row["actual"] == "float"}
    lines.append(
        f"{plural(len(islands), 'site')} stayed float." if islands else "Every site that was requested runs in integers."
    )
    return card("What did we not get?", big, *lines)
