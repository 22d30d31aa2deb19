"""The common style and common kinds of all figures.

Figures are drawn by matplotlib: a function takes data and returns a figure, ``style.save_figure`` writes it to a file,
and ``svg.inline_svg`` embeds it in a page.
"""
