"""Report: what a run found, as one page. Compute, then draw: everything here is a view of JSON that is already on disk.

figures    rows -> a plotly figure
pieces     values as text, pieces of HTML
answers    the four answers that come first, every fallback
sections   what comes behind them
page       report.json and tables.json -> report.html, self-contained
"""
