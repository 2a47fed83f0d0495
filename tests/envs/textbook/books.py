"""Small books in each format, as files of a folder."""

import pathlib

COLLECTION = """<col:collection xmlns:col="http://cnx.rice.edu/collxml" xmlns:md="http://cnx.rice.edu/mdml">
<metadata><md:title>Small Numbers</md:title><md:slug>small</md:slug><md:language>en</md:language>
<md:license url="http://creativecommons.org/licenses/by/4.0/">CC</md:license></metadata>
<col:content><col:subcollection><md:title>Sums</md:title><col:content>
<col:module document="m10002"/><col:module document="m10001"/></col:content></col:subcollection>
</col:content></col:collection>"""

MODULE = """<document xmlns="http://cnx.rice.edu/cnxml" xmlns:m="http://www.w3.org/1998/Math/MathML">
<title>{title}</title><content>{content}</content>
<glossary><definition><term>sum</term><meaning>what comes of adding</meaning></definition></glossary>
</document>"""

SUMS = """<section id="s1"><title>Adding</title><para id="p1">To add is to count on. See <link
target-id="e1"/>.</para>
<example id="e1"><exercise id="x1"><problem id="q1"><para id="p2">Find the sum ⓐ <m:math><m:mfrac>
<m:mn>1</m:mn><m:mn>4</m:mn></m:mfrac><m:mo>+</m:mo><m:mn>2</m:mn></m:math>.</para></problem>
<solution id="a1"><title>Solution</title><para id="p3">It is <m:math><m:mroot><m:mn>8</m:mn><m:mn>3</m:mn>
</m:mroot></m:math> and <m:math><m:mi>π</m:mi></m:math>.</para></solution></exercise></example>
<note class="try"><exercise id="x2"><problem><para id="p4">Find the sum ⓐ 3 + 4.</para></problem>
<solution><para id="p5">7</para></solution></exercise></note></section>
<section class="practice-perfect"><para id="p6">In the following exercises, simplify.</para>
<exercise id="x3"><problem><para id="p7"><m:math><m:mn>2</m:mn><m:mo>+</m:mo><m:mn>5</m:mn></m:math></para>
</problem><solution><para id="p8">7</para></solution></exercise>
<exercise id="x4"><problem><para id="p9">10<sup>2</sup> + 1</para></problem></exercise>
<exercise id="x5"><problem><media alt="a [line] of dots"><image src="a.jpg"/></media></problem>
<solution><para id="pa"><m:math><m:mn>1</m:mn><m:mtext>.</m:mtext><m:mtext>50 m/s</m:mtext></m:math></para>
</solution><solution><para id="pb">or more</para></solution></exercise></section>"""

SPEED = """<para id="p1">A body moves.</para><example id="e9"><title>How fast</title><para id="p2">How fast is
it?</para><para id="p3"><emphasis effect="bold">Strategy</emphasis> Divide.</para><para
id="p4"><emphasis effect="bold">Solution</emphasis> 3 m/s, see <link target-id="e1"/></para>
<para id="p5"><emphasis effect="bold">Discussion</emphasis> Fast.</para></example>
<section class="stepwise problems-exercises"><exercise id="x9"><problem><para id="p6">How far? Use the
list:</para><list list-type="enumerated" number-style="lower-alpha"><item>at once</item><item>later</item>
</list></problem><solution><para id="p7">(a) 12 m (b) 5 m</para></solution></exercise></section>"""

CNXML = {
    "collections/small.collection.xml": COLLECTION,
    "modules/m10001/index.cnxml": MODULE.format(title="Speed", content=SPEED),
    "modules/m10002/index.cnxml": MODULE.format(title="Sums of Numbers", content=SUMS),
}

LATEX = {
    "main.tex": r"""\documentclass{book}
\newtheorem{exc}{Exercise}[chapter]
\newcommand\withchapter[2]{\setcounter{chapter}{#1}\include{#2/text}}
\newcommand{\size}{40}
\newcommand{\whole}{{\mathbb N}}
\newcommand{\odd}{\chapter{Not a chapter}}
\begin{document}
\withchapter{1}{one}
\input{/etc/passwd}
\input{../outside}
\include{two-lang}
\input{missing}
\end{document}
""",
    "one/text.tex": r"""\chapter{Counting}
We count to \size{} here. % a comment with \begin{exc} in it
\iffalse \begin{exc} hidden \end{exc} \fi
\begin{example}\label{a} How many are \size{} and 1?
\textbf{Solution.} 41, or 100\% of them.
\end{example}
\renewcommand{\size}{50}
\begin{exc} Count $\whole$ to \size{}, see \ref{a\size}. \index{x} \begin{solution} Done: $50$. \end{solution}
\end{exc}
\begin{verbatim}
100 % kept
\end{verbatim}
""",
    "two.tex": r"""\chapter{Adding}
\onlyhere{\begin{exc} Add $1+1$. \end{exc}}
\begin{problem} Add $2+2$. \end{problem}
\begin{solution} $4$ \end{solution}
""",
}

OPENINTRO = {
    "main.tex": r"""\documentclass{book}
\newenvironment{chapterpage}[1]{\vspace{1mm}\chapter{#1}}{}
\newenvironment{eoce}[2][]{}{}
\newcommand{\eocesolch}[1]{\textbf{#1}}
\newcommand{\eocesol}[1]{\refstepcounter{eocesol}#1\refstepcounter{eocesol}}
\begin{document}
\begin{chapterpage}{Data}\end{chapterpage}
\begin{nexample}{What is 1 of 4?}It is 25\%.\end{nexample}
\begin{nexercise}What is 1 of 5?\footnotemark{}\end{nexercise}
Text.\footnotemark{} \footnotetext{It is 20\%.} \footnotetext{A note.}
\eoce{\qt{First} \begin{parts}\item One? \item Two? \end{parts}}{}
\eoce{Second}{}
\eoce{Third}{}
\begin{chapterpage}{Chance}\end{chapterpage}
\eoce{Fourth}{}
\appendix
\chapter{Solutions}
\eocesolch{Data}
\eocesol{(a)~It is $2/4 = 0.5$. (b)~Yes.}
\eocesol{True.}
\eocesolch{Chance}
\eocesol{(a)~One. (b)~Two.}
\end{document}
"""
}

HTML = {
    "index.html": '<h1>Easy Sums</h1><p><a href="b.html">One</a> <a href="a.html">Two</a>',
    "b.html": r"""<!DOCTYPE html><title>One | Easy Sums</title><script>var x = "<p>(9) no";</script>
<h1>Adding</h1><p>If $a<b$ then add. <p><em>Examples</em>
<p>(1) Add $1+1$. <p>It is $2$. <p>(2) Add $2+2$. <p>It is $4$.
<hr><h3>Exercises I</h3> <p>Add the following:
<p>(1) $y = 3+4$ (2) not a marker
(2) $y = 5+6$
<p>(3) $y = 7$ <img src=x alt="a [dot]">
<p><em>Well done!</em>
<p><h3 class="answers">Answers</h3><p>(1) $7$. <p>(2) $11$.
<p>(1) again <p>(7) more
<hr><p>Next page""",
    "a.html": "<h1>Taking away</h1><p>Take <em>Example (3)</em>. <p><em>Example (1)</em> Take 1. <p>Done.",
}

MARKDOWN = {
    "book.md": """# Sums

## 1.1 Adding

To add is to count on.

**Example 1.** Find 2 + 3.

**Solution.** It is 5.

### Exercises 1.1

Find each sum.

1. 3 + 4
2. 4 + 5
   in one go
3. Repeat the previous problem with 9.

## 1.2 Taking away

Text ![a line](line.png) here.

### Practice 1.2

1. 9 - 1

   **Answer:** 8

# Answers

## Answers to Exercises 1.1

1. 7
2. 9
5. 11
"""
}

PDF = {
    "scan.txt": """# Algebra

## 1.1 Sums

Example 1.

2 + 3      Add the two
5      Our Solution

Now we go on to the sums that are harder than the ones before them.

## 1.1 Practice - Sums

Find each sum.

1) 3 + 4                 2) 4 + 5
3) 6 + 7                 4) 8 + 9
5) How many apples are there in two baskets of the size that
we have seen before?

8                        1
6) 3                     7) 2

## 1.1 Answers - Sums

1) 7                     5) 12
2) 9                     6) 8n2

3) 13                    7) 4
4) 17
"""
}


def write(folder: pathlib.Path, files: dict[str, str]) -> pathlib.Path:
    """The folder, with the files in it."""
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return folder
