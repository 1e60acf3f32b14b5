"""The report's pages, written anew when later stages have more to say: what was packaged, what the endpoint answers."""

from __future__ import annotations

from typing import Any

from tunewright.evaluate import report
from tunewright.run import Run, write_text


def write(run: Run) -> None:
    """evaluate/report.html and report.md from evaluate/report.json and what is there of package and test. Without an
    evaluation, or with nothing to evaluate on, there is no page."""
    if not run.manifest_file("evaluate").is_file() or not (body := run.manifest("evaluate"))["rows"]:
        return
    whole = body | _later(run)
    write_text(run.report_page, report.render_html(whole))
    write_text(run.report_text, report.render_markdown(whole))


def _later(run: Run) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if run.manifest_file("package").is_file():
        package = run.manifest("package")
        found["fidelity"] = package.get("fidelity") or {}
        found["rendering"] = package.get("rendering")
    if run.manifest_file("deploy").is_file() and (asked := run.manifest("deploy").get("rendering")):
        found["rendering"] = asked
    if run.manifest_file("test").is_file():
        test = run.manifest("test")
        found["served"] = {key: test[key] for key in ("rows", "compared", "equal", "ties", "latency_s") if key in test}
    return found
