"""The page: report.json as one HTML file that needs no network, no server and no script to read.

A pure function of report.json. Texts of models and annotators are untrusted: everything is escaped
by the template engine, and only elements made here are marked as safe.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from rlhf.report.gather import Row
from rlhf.report.view import (
    compare,
    cost,
    data,
    guide,
    ppo,
    reward,
    sampling,
    scores,
    summary,
    versions,
)
from rlhf.report.view.blocks import Section, slug
from rlhf.report.view.common import prose
from rlhf.report.view.refs import Ref

TEMPLATES = "templates"

SECTIONS = (summary, reward, scores, sampling, ppo, versions, data, cost, guide)
"""Modules that make the sections, in reading order."""


def page(report: Row, *, data_file: str) -> str:
    """Return the page of a report; `data_file` is the name of report.json beside it."""
    root = Ref(report)
    return render(
        [module.section(root) for module in SECTIONS],
        title=f"{report['run']}: report",
        heading=report["run"],
        subtitle=f"recipe {report['recipe']}",
        data_file=data_file,
        prefix=slug(report["run"]),
    )


def comparison_page(comparison: Row, *, data_file: str) -> str:
    """Return the page that compares two runs; `data_file` is the comparison's JSON beside it."""
    names = comparison["names"]
    return render(
        compare.sections(Ref(comparison)),
        title=f"{names['a']} and {names['b']}",
        heading=f"{names['a']} and {names['b']}",
        subtitle="two runs compared",
        data_file=data_file,
        prefix=slug(names["a"], names["b"]),
    )


def render(sections: Sequence[Section], **values: str) -> str:
    """Return a page of sections; `values` are its title, heading, subtitle and file names."""
    environment = Environment(
        loader=PackageLoader("rlhf.report", TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
    )
    environment.filters["prose"] = prose
    template = environment.get_template("page.html")
    return template.render(sections=sections, css=asset("page.css"), js=asset("page.js"), **values)


def asset(name: str) -> Markup:
    """Return a style sheet or script of this package, which goes into the page as it is."""
    return Markup(files("rlhf.report").joinpath(TEMPLATES, name).read_text(encoding="utf-8"))
