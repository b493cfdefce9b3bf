"""Pages and live views of a run. No torch here: a page is made from files.

page         of a run           evaluation, comparison, audit   of these          html        what all pages share
heatmap      of its rollouts    live, progress, lines, terminal   while it runs   tables/     their tables
"""
