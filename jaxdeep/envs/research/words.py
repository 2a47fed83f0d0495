"""Lists of English words that the comparison of texts needs, and what counts as a word."""

from __future__ import annotations

import re

CJK = "\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\uac00-\ud7af"
"""Chinese, Japanese and Korean letters, each of which counts as a word."""


def _set(words: str) -> frozenset[str]:
    return frozenset(words.split())


STOP_WORDS = _set(
    """a about again also am an and any are as at be because been being between both but by can
    could did do does doing down during each else even ever for from further had has have having he
    her here hers him his how however i if in into is it its itself just like may me might much must
    my now of off on once one other our ours out own per quite rather same see shall she should
    shown so some such than that the their them then there these they this those through thus to too
    until up upon us very was we were what when where whether which while who whom whose why will
    with would yet you your according noted"""
)
"""Words that a claim may have or not have. Those that change what is said are not among them: few,
more, only, before, under, or."""

NEGATIONS = _set(
    """no not never none nobody nothing neither nor without cannot hardly barely scarcely lack lacks
    lacked fail fails failed unable"""
)

PRONOUNS = _set("it its they their this these that those he she his her he's it's")

SEPARATORS = _set("and or while but which who whereas although")
"""Words after which another clause may begin."""

LITTLE = _set("a an the that which of")
"""Words that may come, go or change when a quotation is repaired."""

QUANTITIES = _set(
    """three seven eight eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen
    twenty thirty forty fifty sixty seventy eighty ninety hundred thousand million billion trillion
    first second third fourth fifth sixth seventh eighth ninth tenth half double triple dozen never
    neither hardly barely without"""
)
"""Words in which no letter is a typing error."""

ABBREVIATIONS = _set(
    """al approx bros ca capt cf co col corp dept dr eds e.g etc gen gov hon i.e inc jr lt ltd maj mr
    mrs ms mt p.m a.m prof rep rev sen sgt sr st vs u.s u.k u.n jan feb mar apr jun jul aug sep sept
    oct nov dec"""
)

BEFORE_NUMBERS = _set("art ch ed eq fig figs no nos op p pp sec vol")
"""Abbreviations where a number follows, and words where none does."""


def count(text: str) -> int:
    """Words between white space; of Chinese, Japanese and Korean each character."""
    return len(re.findall(rf"[{CJK}]|[^\s{CJK}]*[^\W{CJK}][^\s{CJK}]*", text))
