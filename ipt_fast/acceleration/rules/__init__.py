"""The rules, one small file for each family of models. A class name belongs to the rules of one or more files."""

from . import (
    atd,
    convolution,
    cross,
    dat,
    ecbsr,
    fdat,
    grl,
    hat,
    maxvit,
    omnisr,
    restormer,
    rgt,
    span,
    srformer,
    swin,
    swin2sr,
    uformer,
    xcit,
)
from ._rule import Rule

# In the order of how much the models are used.
RULES: tuple[Rule, ...] = (
    *dat.RULES,
    *fdat.RULES,
    *swin.RULES,
    *hat.RULES,
    *omnisr.RULES,
    *restormer.RULES,
    *srformer.RULES,
    *rgt.RULES,
    *atd.RULES,
    *swin2sr.RULES,
    *uformer.RULES,
    *grl.RULES,
    *cross.RULES,
    *maxvit.RULES,
    *span.RULES,
    *ecbsr.RULES,
    *xcit.RULES,
    *convolution.RULES,
)


def rule_named(name: str) -> Rule:
    """The rule of that name, which pickles hold."""
    for rule in RULES:
        if rule.name == name:
            return rule
    raise ValueError(f"name must be that of a rule ({', '.join(rule.name for rule in RULES)}); got {name!r}")
