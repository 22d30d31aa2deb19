"""How every figure of this package looks, and what several of them share.

A figure is drawn once, by matplotlib: a function takes data and returns a figure, ``style.save_png`` writes it to a
folder, and ``svg.inline_svg`` puts it into a page.
"""
