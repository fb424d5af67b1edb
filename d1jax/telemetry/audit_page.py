"""The page of an audit: one self-contained HTML file from the result of `python -m d1jax.audit`. It fetches nothing."""

from collections.abc import Mapping
from typing import Any

from d1jax.telemetry.audit_charts import Bar, Group, bars, log_log
from d1jax.telemetry.markup import compact, esc, percent
from d1jax.telemetry.page_assets import STYLE

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
_STYLE = (
    STYLE + "#table table{font-size:13.5px}#table tbody th{white-space:nowrap}#table th,#table td{padding-right:12px}"
)
_LEGEND = (
    "Variance of the score of a text and of a token, correlation of one draw with the ELBO, and the share of tokens whose ratio "
    "leaves the clip range when the new and the old score have masks of their own, and when they share them."
)
_COLUMNS = (
    "estimator", "passes", "bias, nats", "variance", "a token", "Pearson", "Spearman", "rms log ratio", "1 ± 0.2", "1 ± 0.5",
    "shared", "gradient noise",
)  # fmt: skip


def audit_html(result: Mapping[str, Any]) -> str:
    setting, rows = result["setting"], result["estimators"]
    where = f"{setting['run']}, {setting['stage']} at step {setting['step']}"
    findings = "".join(f"<li>{esc(line)}</li>" for line in result["findings"])
    silent = [row["name"] for row in rows if not row["variance"] > 0]
    without = f" Without variance: {esc(', '.join(silent))}." if silent else ""
    truth = result["truth"]
    body = (
        f'<header><h1>{esc(where)}</h1><p class="task">Audit of likelihood estimators</p>'
        f'<p class="context">{esc(setting["rows"])} rollouts of {compact(truth["tokens"])} tokens at temperature '
        f"{esc(setting['temperature'])}, {esc(setting['samples'])} draws of each estimator, ELBO from "
        f"{esc(setting['truth_samples'])} maskings: {compact(truth['mean'])} ± {compact(truth['error_of_the_mean'])} nats a "
        "sequence. The weights never change, so every ratio should be 1.</p></header>"
        + _section("findings", "Findings", f"<ul>{findings}</ul>")
        + _section("table", "Numbers", _table(rows), _LEGEND)
        + _section(
            "variance", "Variance against cost", _variance(rows), f"Of a text's score, mean over texts.{without}"
        )
        + _section("bias", "Bias", _bias(rows), "E[score] - ELBO, nats a sequence, with one standard error.")
        + _section("ratio", "Clipped before any learning", _clipped(rows), "Two draws of the masks, the same weights.")
        + _section("setting", "Setting", _facts(setting) + _facts(result["environment"]))
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f'<link rel="icon" href="data:,"><title>{esc(where)}: d1jax audit</title><style>{_STYLE}</style></head>\n'
        f"<body><main>{body}</main></body></html>\n"
    )


def _section(name: str, title: str, body: str, lead: str = "") -> str:
    lead = f'<p class="lead">{lead}</p>' if lead else ""
    return f'<section id="{name}" aria-labelledby="{name}-h"><h2 id="{name}-h">{title}</h2>{lead}{body}</section>'


def _table(rows: list[dict[str, Any]]) -> str:
    shown = _COLUMNS if any("gradient_noise" in row for row in rows) else _COLUMNS[:-1]
    first, *others = (esc(name) for name in shown)
    head = f'<th scope="col">{first}</th>' + "".join(f'<th scope="col" class="num">{name}</th>' for name in others)
    lines = []
    for row in rows:
        apart = row["unshared"]
        cells = (
            row["passes"], f"{row['bias']:+.3f} ± {row['bias_error']:.3f}", compact(row["variance"]),
            compact(row["token_variance"]), _three(row["pearson"]), _three(row["spearman"]), f"{apart['rms']:.3f}",
            percent(apart["outside_0.2"]), percent(apart["outside_0.5"]), percent(row["shared"]["outside_0.2"]),
            _three(row.get("gradient_noise")),
        )  # fmt: skip
        values = "".join(f'<td class="num">{esc(cell)}</td>' for cell in cells[: len(shown) - 1])
        lines.append(f'<tr><th scope="row">{esc(row["name"])}</th>{values}</tr>')
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def _three(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _family(name: str) -> str:
    """`coupled exact K=2 + full` -> `coupled exact + full`: what a line of the chart joins."""
    return " ".join(part for part in name.split() if not part.startswith("K="))


def _variance(rows: list[dict[str, Any]]) -> str:
    families: dict[str, list[tuple[float, float, str]]] = {}
    for row in rows:
        if row["variance"] > 0:
            families.setdefault(_family(row["name"]), []).append((row["passes"], row["variance"], row["name"]))
    groups = [Group(name, tuple(points)) for name, points in families.items()]
    return log_log(
        "Variance of the score", "forward passes of a score (log scale)", "variance, nats² (log scale)", groups
    )


def _bias(rows: list[dict[str, Any]]) -> str:
    return bars(
        "Bias",
        [Bar(r["name"], (r["bias"],), f"{r['bias']:+.2f} ± {r['bias_error']:.2f}", r["bias_error"]) for r in rows],
    )


def _clipped(rows: list[dict[str, Any]]) -> str:
    shares = [(row["name"], row["unshared"]["outside_0.2"], row["unshared"]["outside_0.5"]) for row in rows]
    shown = [Bar(name, (near, far), f"{percent(near)}, {percent(far)}") for name, near, far in shares]
    most = max((row["shared"]["outside_0.2"] for row in rows), default=0.0)
    shown.append(Bar("any, shared masks", (most,), percent(most)))
    return bars("Tokens outside the clip range", shown, ("outside 1 ± 0.2", "outside 1 ± 0.5"))


def _facts(values: Mapping[str, Any]) -> str:
    lines = "".join(f'<tr><th scope="row">{esc(name)}</th><td>{esc(value)}</td></tr>' for name, value in values.items())
    return f'<div class="scroll"><table><tbody>{lines}</tbody></table></div>'
