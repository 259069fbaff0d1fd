"""The rules, one small file for each family of models. A class name belongs to the rules of one or more files."""

from . import cross, dat, fdat, omnisr, restormer, span, swin, xcit
from ._rule import Rule

RULES: tuple[Rule, ...] = (
    *swin.RULES,
    *dat.RULES,
    *fdat.RULES,
    *omnisr.RULES,
    *restormer.RULES,
    *cross.RULES,
    *span.RULES,
    *xcit.RULES,
)


def rule_named(name: str) -> Rule:
    """The rule of that name, which pickles hold."""
    for rule in RULES:
        if rule.name == name:
            return rule
    raise ValueError(f"name must be that of a rule ({', '.join(rule.name for rule in RULES)}); got {name!r}")
