"""Report: the results of a run as one page. The page is a view of JSON that is already on disk.

rows         plan, statistics and measurements -> the rows of tables.json; the only file here that imports torch
tables       rows and summaries that need no tensors
words        values as text
scale        what stands on an axis, where, and its ticks
figures      four kinds of figure: Bars, Points (and curves), Heatmap, Histogram
views        what else a section shows: Table, Facts, Gallery, Each
sections     the sections of the page, as data over the tables, and the figures for what passes log
answers      the four answers that come first
goals        whether what was asked of the file is kept
page         report.json and tables.json -> report.html, self-contained; draw: the page of a run folder
frontpage    the page of `fewbit search`
sensitivity  the page of `fewbit sensitivity`
matrix       the page of `fewbit sweep`
templates    the markup of these pages; every value is escaped there, and nowhere else is there any

A new section is an entry in `sections.SECTIONS`. A new method needs none: the rows that its pass logs become a table.
"""
